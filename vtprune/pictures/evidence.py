"""What an answer rests on, drawn: heat over the frames and pictures, as a PNG, a page, or text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from vtprune.errors import VtpruneError
from vtprune.inference.evidence.explanation import (
    EvidenceMap,
    EvidenceRegion,
    ExplainedRun,
    Explanation,
)
from vtprune.inference.wording import counted
from vtprune.pictures import FORMATS
from vtprune.pictures.contact_sheet import (
    GAP,
    GREY,
    INK,
    PAPER,
    Row,
    arrange,
    paste_beside,
    split_rows,
)
from vtprune.pictures.drawing import SHEET, Drawing, DrawnRun, Panel, Token, scaled
from vtprune.pictures.lettering import HEAD, LINE, TEXT, draw_text, fit_lines, text_width
from vtprune.pictures.miniature import CELLS, beside
from vtprune.pictures.page import panel_data, render_page

if TYPE_CHECKING:
    from vtprune.media import Limits

Key = tuple[int, int, bool]
HEAT = (255, 80, 0)
"""Colour of the token with the most evidence."""
LEGEND = "the brighter, the more evidence; outlined: where the map points"
COLD = 0.45
"""Brightness of a token without any."""
SHADES = " ░▒▓█"
SMALL = 0.005
"""Share of the evidence that is not worth a word."""


class EvidenceDrawing:
    """An explanation, drawn: a map a part of the answer and a run.

    Args:
        explanation: what is drawn.
        limits: with which the files are read again.
        all_frames: draw every frame, and not those with the most evidence alone.
    """

    def __init__(
        self, explanation: Explanation, limits: Limits | None = None, all_frames: bool = False
    ) -> None:
        self.explanation, self.all_frames = explanation, all_frames
        self.drawings = [
            Drawing([DrawnRun(run.kept, run.keep_mean, question=run.question)], limits, all_frames)
            for run in explanation.runs
        ]

    @cached_property
    def shares(self) -> list[list[dict[int, float]]]:
        """Of each run and each of its maps: column -> share of the evidence."""
        return [
            [
                dict(zip(run.kept.layout.columns.tolist(), one.shares.tolist(), strict=True))
                for one in run.maps
            ]
            for run in self.explanation.runs
        ]

    def panels(self, number: int) -> list[Panel]:
        """Return the panels of a run that are drawn, in the order of the prompt."""
        panels = self.drawings[number].runs[0].panels
        if self.all_frames or len(panels) <= SHEET:
            return panels
        maps = range(len(self.shares[number]))
        total = {panel.key: sum(self.share(number, m, panel) for m in maps) for panel in panels}
        chosen = sorted(panels, key=lambda panel: -total[panel.key])[:SHEET]
        keys = {panel.key for panel in chosen}
        return [panel for panel in panels if panel.key in keys]

    def share(self, run: int, number: int, panel: Panel) -> float:
        """Return the share of a map's evidence that lies in a panel."""
        shares = self.shares[run][number]
        return sum(shares[token.place.column] for token in panel.tokens)

    # -- formats ---------------------------------------------------------------------------------

    def makers(self) -> dict[str, Callable[[], bytes]]:
        """Return what makes the bytes of a file, by its suffix."""
        return dict(zip(FORMATS, (self.png, self.html, self.json), strict=True))

    def to_dict(self) -> dict[str, object]:
        """Return it as the JSON has it."""
        return self.explanation.to_dict()

    def json(self) -> bytes:
        """Return the explanation as JSON on one line."""
        return (json.dumps(self.to_dict(), allow_nan=False) + "\n").encode()

    def save(self, path: str | Path) -> None:
        """Write it to a file, all or nothing, in the format of its suffix: PNG, HTML or JSON.

        Raises:
            VtpruneError: the suffix is none of these, or the file can't be written.
        """
        from vtprune.saving import save_file

        path = Path(path)
        if path.suffix.lower() not in FORMATS:
            raise VtpruneError(
                f"{path}: its suffix names no format of a drawing", f"name it {', '.join(FORMATS)}"
            )
        save_file(path, self.makers()[path.suffix.lower()](), "save")

    def png(self) -> bytes:
        """Return it as a PNG: a row a frame or picture, a column a map, runs side by side."""
        blocks = [self.draw_run(number) for number in range(len(self.drawings))]
        runs = arrange(blocks)
        lines = self.caption(runs.width - 2 * GAP)
        top = GAP + LINE * len(lines)
        sheet = Image.new("RGB", (runs.width, top + runs.height), PAPER)
        pen = ImageDraw.Draw(sheet)
        for line, (text, colour) in enumerate(lines):
            draw_text(pen, (GAP, GAP + line * LINE), text, colour, HEAD)
        sheet.paste(runs, (0, top))
        file = io.BytesIO()
        sheet.save(file, "PNG", compress_level=4)
        return file.getvalue()

    def caption(self, width: int) -> list[tuple[str, tuple[int, int, int]]]:
        """Return the lines over all runs, of at most so many pixels, and their colours."""
        first = self.explanation.runs[0]
        texts = [
            (f"Question: {first.question}", INK),
            (" · ".join([*first.files, first.model, f"by {self.explanation.by}"]), GREY),
        ]
        if self.explanation.kept:
            texts.append((kept_line(self.explanation), INK))
        texts.append((LEGEND, GREY))
        return [(line, colour) for text, colour in texts for line in fit_lines(text, HEAD, width)]

    def draw_run(self, number: int) -> Image.Image:
        """Return the maps of one run, in blocks side by side."""
        drawing, panels = self.drawings[number], self.panels(number)
        drawing.read_pictures([panel.key for panel in panels])
        rows = [(panel, drawing.picture(drawing.runs[0], panel)) for panel in panels]
        run = self.explanation.runs[number]
        blocks = [self.draw_block(number, block) for block in split_rows(rows, len(run.maps))]
        width = max(GAP + sum(block.width for block in blocks), 640)
        drawn, every = len(rows), len(drawing.runs[0].panels)
        title = run_line(run)
        if drawn < every:
            title += f" · the {drawn} of {every} frames with the most evidence"
        heads = [(title, INK)]
        if unplaced := unplaced_words(run):
            heads.append((f"not drawn: {unplaced}", GREY))
        top = GAP + LINE * len(heads)
        sheet = Image.new("RGB", (width, top + max(block.height for block in blocks)), PAPER)
        pen = ImageDraw.Draw(sheet)
        for line, (text, colour) in enumerate(heads):
            (head,) = fit_lines(text, HEAD, width - 2 * GAP, most=1)
            draw_text(pen, (GAP, GAP + line * LINE), head, colour, HEAD)
        paste_beside(sheet, blocks, top)
        return sheet

    def draw_block(self, number: int, rows: list[Row]) -> Image.Image:
        """Return some panels of a run, one below the other, a column a map under its text."""
        run, drawn = self.explanation.runs[number], self.drawings[number].runs[0]
        labels = [
            [f"{drawn.title(panel)} · {self.share(number, m, panel):.0%}" for panel, _ in rows]
            for m in range(len(run.maps))
        ]
        widest = max(text_width(text, TEXT) for column in labels for text in column)
        wide = max(*(picture.width for _, picture in rows), widest, 200)
        height = LINE + sum(picture.height + LINE + GAP for _, picture in rows)
        block = Image.new("RGB", (len(run.maps) * (wide + GAP), height), PAPER)
        pen = ImageDraw.Draw(block)
        for m, one in enumerate(run.maps):
            x, y = m * (wide + GAP), LINE
            (title,) = fit_lines(one.text or "(empty)", TEXT, wide, most=1)
            draw_text(pen, (x, 0), title, INK, TEXT)
            for row, (panel, picture) in enumerate(rows):
                draw_text(pen, (x, y), labels[m][row], GREY, TEXT)
                block.paste(self.draw_panel(number, m, one, panel, picture), (x, y + LINE - 3))
                y += picture.height + LINE + GAP
        return block

    def draw_panel(
        self, run: int, number: int, evidence: EvidenceMap, panel: Panel, picture: Image.Image
    ) -> Image.Image:
        """Return a picture with its tokens' evidence as heat, and the map's region outlined."""
        drawing, explained = self.drawings[run].runs[0], self.explanation.runs[run]
        item, shares = drawing.item_of(panel), self.shares[run][number]
        most = max(shares.values()) or 1.0
        grey = picture.convert("L").convert("RGB")
        drawn = Image.blend(Image.new("RGB", picture.size), grey, COLD)
        for token in panel.tokens:
            assert token.place.box is not None
            box = scaled(token.place.box, item, picture.size)
            if box[2] <= box[0] or box[3] <= box[1]:
                continue
            level = shares[token.place.column] / most
            part = picture.crop(box)
            lit = Image.blend(part, Image.new("RGB", part.size, HEAT), 0.4)
            drawn.paste(Image.blend(drawn.crop(box), lit, level), box[:2])
        pen = ImageDraw.Draw(drawn)
        region = explained.region(evidence)
        if region is not None and lies_on(region, panel):
            left, top, right, bottom = scaled(region.box, item, picture.size)
            pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)),
                          outline=(255, 255, 255), width=2)  # fmt: skip
        pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=GREY)
        return drawn

    def html(self) -> bytes:
        """Return it as one HTML file that needs nothing else, all frames in it."""
        pictures: dict[str, str] = {}
        runs = [self.run_data(number, pictures) for number in range(len(self.drawings))]
        first = self.explanation.runs[0]
        data = {
            "question": first.question,
            "files": first.files,
            "model": first.model,
            "by": self.explanation.by,
            "kept": kept_line(self.explanation) if self.explanation.kept else "",
            "legend": LEGEND,
            "pictures": pictures,
            "runs": runs,
        }
        return render_page("evidence.html", data)

    def run_data(self, number: int, pictures: dict[str, str]) -> dict[str, object]:
        """Return what the page is told of one run.

        Args:
            pictures: gets each picture behind a panel, as a data URL.
        """
        run, drawing = self.explanation.runs[number], self.drawings[number]
        drawn = drawing.runs[0]
        drawing.read_pictures([panel.key for panel in drawn.panels])

        def shares(token: Token) -> list[object]:
            column = token.place.column
            return [[round(of_map[column], 6) for of_map in self.shares[number]]]

        panels = [
            panel_data(drawing, drawn, panel, pictures, shares, f"{number}-")
            for panel in drawn.panels
        ]
        return {
            "name": run_line(run),
            "unplaced": unplaced_words(run),
            "maps": [map_data(run, one, drawn.panels) for one in run.maps],
            "panels": panels,
        }

    def miniature(self) -> str:
        """Return all maps in shades for a terminal, the panels of each side by side."""
        runs = self.explanation.runs
        texts = [self.run_miniature(number) for number in range(len(runs))]
        if len(runs) == 1:
            return texts[0]
        return "\n".join(f"{run_line(run)}\n{text}" for run, text in zip(runs, texts, strict=True))

    def run_miniature(self, number: int) -> str:
        """Return a run's maps in shades."""
        run, drawn = self.explanation.runs[number], self.drawings[number].runs[0]
        lines = []
        for m, one in enumerate(run.maps):
            if len(run.maps) > 1:
                lines.append(one.text)
            blocks = [
                shaded(drawn.title(panel), panel, self.shares[number][m],
                       self.share(number, m, panel))
                for panel in self.panels(number)
            ]  # fmt: skip
            lines.append(beside(blocks))
        return "\n".join(lines)


def lies_on(region: EvidenceRegion, panel: Panel) -> bool:
    """Return whether a map's region is on a panel."""
    frames = panel.tokens[0].place.frames
    in_time = not frames or not region.frames or frames[0] in region.frames
    return in_time and region.media == panel.media and (region.tile > 0) == panel.tiled


def map_data(
    run: ExplainedRun, evidence: EvidenceMap, panels: Sequence[Panel]
) -> dict[str, object]:
    """Return what the page is told of one map: `panels` are the numbers of those it points at."""
    region = run.region(evidence)
    on = [] if region is None else [n for n, panel in enumerate(panels) if lies_on(region, panel)]
    return {
        "text": evidence.text or "(empty answer)",
        "where": region_words(run, evidence),
        "most": max(evidence.shares.tolist(), default=0.0),
        "panels": on,
        "box": [] if region is None else [round(edge, 1) for edge in region.box],
    }


def shaded(title: str, panel: Panel, shares: dict[int, float], share: float) -> list[str]:
    """Return the lines of a panel in shades, all as wide as the widest, its title first."""
    most = max(shares.values()) or 1.0
    step = -(-(max(token.place.col for token in panel.tokens) + 1) // CELLS)  # tokens to a cell
    cells: dict[tuple[int, int], float] = {}
    for token in panel.tokens:
        key = token.place.row // step, token.place.col // step
        cells[key] = max(cells.get(key, 0.0), shares[token.place.column] / most)
    rows, cols = max(row for row, _ in cells) + 1, max(col for _, col in cells) + 1
    lines = [
        "".join(
            SHADES[round(cells.get((row, col), 0.0) * (len(SHADES) - 1))] for col in range(cols)
        )
        for row in range(rows)
    ]
    lines = [f"{title} {share:.0%}", *(f"|{line}|" for line in lines), ""]
    width = max(map(len, lines))
    return [line.ljust(width) for line in lines]


def run_line(run: ExplainedRun) -> str:
    """Return what heads a run."""
    kept = "" if run.keep_mean == 1 else f", {run.keep_mean:.0%} of the visual tokens"
    return f"{run.name}{kept}: {run.answer or '(empty answer)'}"


def kept_line(explanation: Explanation) -> str:
    """Return what pruning kept of the evidence, in words."""
    assert explanation.kept is not None
    last = explanation.runs[-1]
    return (
        f"{last.name} keeps {explanation.kept.mean:.0%} of the unpruned answer's evidence on "
        f"{last.keep_mean:.0%} of the visual tokens, average over the layers; "
        f"{explanation.kept.after:.0%} after the last cut"
    )


def region_words(run: ExplainedRun, evidence: EvidenceMap) -> str:
    """Return the place that a map points at: file, seconds, tile, box and share."""
    region = run.region(evidence)
    if region is None:
        return "nowhere in particular"
    parts = [run.files[region.media]] if len(run.files) > 1 else []
    if region.seconds:
        first, last = region.seconds[0], region.seconds[-1]
        parts.append(f"{first:.2f} s" if first == last else f"{first:.2f} to {last:.2f} s")
    if region.tile:
        parts.append(f"tile {region.tile}")
    left, top, right, bottom = region.box
    parts.append(f"pixels {left:.0f}, {top:.0f} to {right:.0f}, {bottom:.0f}")
    return f"{' > '.join(parts)} ({region.share:.0%})"


def unplaced_words(run: ExplainedRun) -> str:
    """Return how much of each map no place shows; "" where that is next to nothing."""
    shares = [run.unplaced(evidence) for evidence in run.maps]
    if max(shares, default=0.0) < SMALL:
        return ""
    each = ", ".join(f"{share:.0%}" for share in shares)
    return f"{each} of the evidence, on tokens of no place, such as ends of rows"


def passes_words(run: ExplainedRun) -> str:
    """Return what a map cost."""
    return f"{counted(run.passes, 'pass', 'passes')}, {run.seconds:.2f} s"
