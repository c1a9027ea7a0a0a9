"""The printed tables of a command as files: CSV, Markdown, LaTeX."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.terminal import printable
from vtprune.inference.csv_file import csv_text

WIDTH = 1000  # characters: nothing is wrapped, and no column is left out
WIDE_CELL = 40  # characters, from which on a column of LaTeX has a width
ALL_WIDE_CELLS = 0.6  # of a line, that such columns share
INDENT = "  "  # of a row that belongs to the one before

ShowTables = Callable[[Console], None]


@dataclass
class PrintedTable:
    """One table without its looks.

    Args:
        title: the line above it; "" for none.
        headings: of the columns.
        numbers: which columns are set to the right.
        rows: cells; of a row that only separates others none has text.
    """

    title: str
    headings: list[str]
    numbers: list[bool]
    rows: list[list[str]]

    @property
    def filled(self) -> list[list[str]]:
        """The rows that have text."""
        return [row for row in self.rows if any(row)]


@dataclass
class Recorded:
    """What a command printed.

    Args:
        facts: labelled lines: what was asked, of which model, warnings.
    """

    tables: list[PrintedTable] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


class TableRecorder(Console):
    """A console that keeps what is printed on it, in place of showing it."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=WIDTH, color_system=None, emoji=False,
                         markup=False, highlight=False, _environ={})  # fmt: skip
        self.recorded = Recorded()
        self._line = ""

    def table(self, table: Table) -> None:
        """Keep a table, with the line printed before it as its title."""
        columns = [column for column in table.columns
                   if not any(_is_drawing(cell) for cell in column.cells)]  # fmt: skip
        rows = [list(cells) for cells in zip(*([_text(cell) for cell in column.cells]
                                               for column in columns), strict=True)]  # fmt: skip
        headings = [_heading(_text(column.header)) for column in columns]
        numbers = [column.justify == "right" for column in columns]
        self.recorded.tables.append(PrintedTable(self._line, headings, numbers, rows))
        self._line = ""

    def print(self, *objects: object, **options: object) -> None:
        """Keep a line, or the rows of labelled facts."""
        for value in objects:
            if isinstance(value, Table):
                self._facts(value)
            elif text := _text(value).strip():
                self._flush()
                self._line = text

    def finish(self) -> Recorded:
        """Return all that was printed."""
        self._flush()
        if not self.recorded.tables and self.recorded.facts:
            rows = [list(fact) for fact in self.recorded.facts]
            self.recorded = Recorded([PrintedTable("", ["", ""], [False, False], rows)])
        return self.recorded

    def _facts(self, lines: Table) -> None:
        self._flush()
        for label, *cells in zip(*(column.cells for column in lines.columns), strict=True):
            text = " ".join(" ".join(filter(None, map(_text, cells))).split())
            facts = self.recorded.facts
            if text and not _text(label) and facts:
                facts[-1] = facts[-1][0], f"{facts[-1][1]}; {text}"
            elif text:
                facts.append((_text(label), text))

    def _flush(self) -> None:
        if self._line:
            self.recorded.facts.append(("", " ".join(self._line.split())))
        self._line = ""


def record(*shows: ShowTables) -> Recorded:
    """Return what functions print."""
    recorder = TableRecorder()
    for show in shows:
        show(recorder)
    return recorder.finish()


def _is_drawing(cell: object) -> bool:
    return not isinstance(cell, (str, Text))


def _heading(text: str) -> str:
    """Return a heading on one line, with the words whole that a narrow column breaks."""
    return " ".join(text.replace("-\n", "").split())


def _text(cell: object) -> str:
    text = cell.plain if isinstance(cell, Text) else cell if isinstance(cell, str) else ""
    return printable(text)


# -- CSV -------------------------------------------------------------------------------------------


def to_csv(recorded: Recorded) -> str:
    """Return the tables as CSV; of several, a first column says which one a line is of."""
    lines = []
    for number, table in enumerate(recorded.tables, 1):
        headings = _distinct(table.headings)
        which = {"table": table.title or number} if len(recorded.tables) > 1 else {}
        for row in table.filled:
            cells = dict(zip(headings, (" ".join(cell.split()) for cell in row), strict=True))
            lines.append({**which, **cells})
    return csv_text(lines)


def _distinct(headings: Sequence[str]) -> list[str]:
    """Return names of columns that differ: the first column without one is the row's name."""
    names: list[str] = []
    for heading in headings:
        name = heading or ("name" if not names else "note")
        names.append(name if name not in names else f"{name} {len(names) + 1}")
    return names


# -- Markdown --------------------------------------------------------------------------------------

MARKDOWN = re.compile(r"([\\`*_\[\]<>|$~#])")


def to_markdown(recorded: Recorded) -> str:
    """Return the tables as GitHub's Markdown, the facts as a list under them."""
    parts = []
    for table in recorded.tables:
        if table.title:
            parts.append(markdown(table.title))
        marks = ["---:" if number else "---" for number in table.numbers]
        rows = [[markdown(cell) for cell in row] for row in (table.headings, *table.filled)]
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:])]
        parts.append("\n".join(lines))
    facts = [f"- {markdown(f'{label}: {text}' if label else text)}"
             for label, text in recorded.facts]  # fmt: skip
    if facts:
        parts.append("\n".join(facts))
    return "\n\n".join(parts) + "\n"


def markdown(text: str) -> str:
    """Return text on one line in which nothing is Markdown."""
    indent = "&emsp;" if text.startswith(INDENT) else ""
    return indent + MARKDOWN.sub(r"\\\1", " ".join(text.split()))


# -- LaTeX -----------------------------------------------------------------------------------------

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "`": "{`}",
    "[": "{[}", "]": "{]}", "*": "{*}", "-": "-{}", "'": "'{}", "!": "!{}", "?": "?{}", ",": ",{}",
    "\u00d7": r"$\times$", "\u00b1": r"$\pm$", "\u2264": r"$\leq$", "\u2265": r"$\geq$",
    "\u2248": r"$\approx$", "\u2192": r"$\rightarrow$", "\u2212": "$-$", "\u00b7": r"$\cdot$",
    "\u00b0": r"$^\circ$", "\u00b2": "$^2$", "\u00b3": "$^3$", "\u00b5": r"$\mu$",
    "\u03bc": r"$\mu$", "\u2013": "--", "\u2014": "---", "\u2026": r"\ldots{}", "\u2018": "`",
    "\u2019": "'", "\u201c": "``", "\u201d": "''", "\u00a0": "~", "\u00df": r"\ss{}",
    "\u00e6": r"\ae{}", "\u00c6": r"\AE{}", "\u0153": r"\oe{}", "\u0152": r"\OE{}",
    "\u00f8": r"\o{}", "\u00d8": r"\O{}", "\u00e5": r"\aa{}", "\u00c5": r"\AA{}",
    "\u0142": r"\l{}", "\u0141": r"\L{}",
}  # fmt: skip
LIGATURES = re.compile(r"(?<=[-'!?,])\{\}(?![-'`,!?])|(?<=[!?])\{\}(?!`)|(?<=,)\{\}(?!,)")
ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u",
    "\u0307": ".", "\u0308": '"', "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip
"""Combining characters, and the command that sets them over a letter."""
GLYPH = "vtpruneglyph"
PREAMBLE = rf"""% needs \usepackage{{booktabs,graphicx}}
% pdfLaTeX shows ? where it has no such character
\providecommand{{\{GLYPH}}}[1]{{\ifdefined\Umathchar#1\else?\fi}}
"""
FITTED = r"\noindent\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
"""Begins a box that is made smaller where it is wider than the line, and never larger."""


def to_latex(recorded: Recorded) -> str:
    """Return the tables as tabulars with rules of booktabs, in ASCII wherever LaTeX has a name.

    The facts are comments: a paper has its own captions.
    """
    lines = [f"% {_comment(f'{label}: {text}' if label else text)}\n"
             for label, text in recorded.facts]  # fmt: skip
    return "".join([*lines, PREAMBLE, "\\par\\bigskip\n".join(map(_tabular, recorded.tables))])


def _tabular(table: PrintedTable) -> str:
    widest = [max((len(row[place]) for row in table.rows), default=0)
              for place in range(len(table.headings))]  # fmt: skip
    wide = [width > WIDE_CELL and not number
            for width, number in zip(widest, table.numbers, strict=True)]  # fmt: skip
    share = ALL_WIDE_CELLS / max(1, sum(wide))
    columns = "".join(
        rf"p{{{share:.2f}\linewidth}}" if is_wide else "r" if number else "l"
        for is_wide, number in zip(wide, table.numbers, strict=True)
    )
    lines = [f"% {_comment(table.title)}"] if table.title else []
    lines += [FITTED, rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    if any(table.headings):
        lines += [_row(table.headings), r"\midrule"]
    lines += [_row(row) if any(row) else r"\addlinespace" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", ""])


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(latex, cells)) + r" \\"


def latex(text: str) -> str:
    """Return text on one line in which nothing is LaTeX but what sets its characters."""
    indent = r"\quad " if text.startswith(INDENT) else ""
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    return indent + LIGATURES.sub("", "".join(map(_character, text)))


def _character(character: str) -> str:
    if character in SPECIAL:
        return SPECIAL[character]
    if character.isascii():
        return character if character.isprintable() else " "
    parts = unicodedata.normalize("NFD", character)
    letter, mark = parts[0], parts[1:]
    if letter.isascii() and letter.isalpha() and mark in ACCENTS:
        dotless = {"i": r"\i{}", "j": r"\j{}"}.get(letter, letter)
        return rf"\{ACCENTS[mark]}{{{dotless}}}"
    return rf"\{GLYPH}{{{character}}}" if character.isprintable() else ""


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
