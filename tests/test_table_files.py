"""Printed tables as CSV, Markdown and LaTeX, the same for every command."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import string
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import assert_refused
from rich.console import Console
from rich.text import Text
from test_tables import SHOWN

from vtprune.cli import cli
from vtprune.cli.console.table_files import (
    PrintedTable,
    Recorded,
    latex,
    markdown,
    record,
    to_csv,
    to_latex,
    to_markdown,
)
from vtprune.cli.console.tables import Bar, labelled, plain_table, print_fitted

HOSTILE = [
    string.punctuation,
    r"\input{/etc/passwd} \\ & % $x^2$ #1 {",
    "[1] *star ~tilde --dash `tick' ``quotes'' ?` !` ,, << >> ''",
    "Grüße, naïve façade, Łódź, œuvre, Ångström, ĳ, ő, ş",
    "\u4e2d\u6587 \u043e\u0442 \u0639\u0631\u0628 \U0001f642 \U0001d518 \ufb01 \u0133",
    "\u2265 \u2264 \xb1 \xd7 \u2212 \u2192 \u2026 \u2013 \u2014",
    "\u201ca\u201d \u2018b\u2019 10\xb2 \xb5s \xb0C",
    "line\nbreak\ttab\x00null\x1besc\u200b\ud800",
    "*",
    "[",
    "&",
]
TABLES = Recorded(
    [
        PrintedTable("a 100 % title_of", ["", "n (%)", "answer"], [False, True, False],
                     [[text, str(number), 2 * text] for number, text in enumerate(HOSTILE)]
                     + [["", "", ""], ["  indented", "1", ""]]),
        PrintedTable("", ["", ""], [False, False], [["*", "["]]),
    ],
    [("model", "a_b 100 %\nc")],
)  # fmt: skip


def show(console: Console) -> None:
    console.print("kept, as a share", style="bold")
    table = plain_table()
    table.add_column("")
    table.add_column("first\ntoken", justify="right")
    table.add_column("")
    table.add_row(Text("a|b"), "1.5x", Bar(0.5))
    table.add_row()
    table.add_row(Text("  c"), "2 x", Bar(1))
    print_fitted(table, console)
    lines = labelled()
    lines.add_row("model", Text("a model"))
    lines.add_row("", Text("and more"))
    console.print(lines)


def test_what_is_printed_is_recorded_with_titles_and_facts() -> None:
    recorded = record(show)
    (table,) = recorded.tables
    assert table.title == "kept, as a share"
    assert table.headings == ["", "first token"]  # the bars are no column
    assert table.filled == [["a|b", "1.5x"], ["  c", "2 x"]]
    assert recorded.facts == [("model", "a model; and more")]


def test_a_word_that_a_narrow_heading_breaks_is_whole_in_a_file() -> None:
    def shown(console: Console) -> None:
        table = plain_table()
        table.add_column("of un-\npruned")
        table.add_row("1")
        print_fitted(table, console)

    assert record(shown).tables[0].headings == ["of unpruned"]


def test_the_three_formats_hold_the_same_cells() -> None:
    recorded = record(show)
    assert list(csv.reader(io.StringIO(to_csv(recorded)))) == [
        ["name", "first token"], ["a|b", "1.5x"], ["c", "2 x"],
    ]  # fmt: skip
    assert to_markdown(recorded) == (
        "kept, as a share\n\n|  | first token |\n| --- | ---: |\n| a\\|b | 1.5x |\n"
        "| &emsp;c | 2 x |\n\n- model: a model; and more\n"
    )
    assert (
        "\\begin{tabular}{lr}\n\\toprule\n & first token \\\\\n\\midrule\n"
        "a\\textbar{}b & 1.5x \\\\\n\\addlinespace\n\\quad c & 2 x \\\\\n\\bottomrule\n"
    ) in to_latex(recorded)


def test_several_tables_are_one_csv_with_a_column_for_which() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(TABLES).encode("utf-8", "replace").decode())))
    assert {row["table"] for row in rows} == {"a 100 % title_of", "2"}


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_is_latex_or_breaks_a_row(text: str) -> None:
    written = latex(text)
    bare = re.sub(r"\\[\\{}$&#%_]", "", re.sub(r"\\[a-zA-Z]+|\\['`^~=.\"]\{", "{", written))
    assert not re.search(r"[&#%_~^]", re.sub(r"\$[^$]*\$", "", bare).replace("--", ""))
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
    assert "\n" not in written
    assert "\\\\" not in written


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_is_markdown(text: str) -> None:
    assert not re.search(r"(?<!\\)[|*_`<$]", markdown(text).replace("\\\\", ""))
    assert "\n" not in markdown(text)


def has_booktabs() -> bool:
    if shutil.which("pdflatex") is None or shutil.which("kpsewhich") is None:
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_booktabs(), reason="no LaTeX with booktabs here")
def test_the_tables_of_all_commands_compile(tmp_path: Path) -> None:
    hostile = to_latex(TABLES) + "\\typeout{printed tables}\n"
    bodies = [hostile, *(to_latex(record(shows)) for shows in SHOWN.values())]
    body = "\n\\clearpage\n".join(bodies).encode("utf-8", "replace")
    head = b"\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (tmp_path / "t.tex").write_bytes(head + body + b"\\end{document}\n")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-1500:]
    assert b"Missing character" not in (tmp_path / "t.log").read_bytes()
    log = (tmp_path / "t.log").read_bytes().partition(b"printed tables")[2]
    assert log
    assert b"Overfull \\hbox" not in log  # no table of a command is wider than the page


@pytest.mark.parametrize(
    ("command", "name"),
    [(["methods"], "entropy"), (["models"], "llava-next"), (["presets", "list"], "balanced")],
)
def test_lists_are_saved_in_every_format(command: list[str], name: str, tmp_path: Path) -> None:
    files = [tmp_path / f"t{suffix}" for suffix in (".csv", ".md", ".tex", ".json")]
    saves = [part for file in files for part in ("--save", str(file))]
    result = CliRunner().invoke(cli, [*command, *saves])
    assert result.exit_code == 0
    assert name in result.stdout
    for file in files[:3]:
        assert name.replace("_", "\\_") in file.read_text()
    assert json.loads(files[3].read_text())


def test_facts_of_one_method_are_a_table_too(tmp_path: Path) -> None:
    file = tmp_path / "m.md"
    assert CliRunner().invoke(cli, ["models", "llava-next", "--save", str(file)]).exit_code == 0
    assert "| family | llava\\_next |" in file.read_text()


def test_an_unknown_suffix_names_all_formats(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["methods", "--save", str(tmp_path / "a.docx")])
    assert_refused(result, "Error: --save .*a.docx: its suffix names no format")
    assert "a.csv, a.md, a.tex" in result.stderr
