"""What was kept as one HTML page: a slider over the layers, frames as a strip, tokens to point at.

It needs no network and no other file. Names, questions and answers reach it as data in JSON, and
are set as text by its script: none can become markup.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jinja2

from vtprune.errors import BIDI_CONTROLS
from vtprune.pictures.contact_sheet import colour_of
from vtprune.pictures.drawing import Drawing, DrawnRun, Panel, Token, rounded

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = 80
"""Of the JPEGs in the page."""
WITHOUT_BIDI = dict.fromkeys(map(ord, BIDI_CONTROLS))


def draw_page(drawing: Drawing) -> bytes:
    """Return the HTML page of a drawing, all frames in it."""
    keys = [panel.key for panel in drawing.runs[0].panels]
    drawing.read_pictures(keys)
    pictures: dict[str, str] = {}
    first = drawing.runs[0]
    data = {
        "question": first.question,
        "files": first.files,
        "model": first.model,
        "runs": [run_data(drawing, run, pictures) for run in drawing.runs],
        "pictures": pictures,
    }
    return render_page("page.html", data)


def render_page(name: str, data: Mapping[str, object]) -> bytes:
    """Return a page with its data in it.

    Args:
        name: of its template.
    """
    templates = jinja2.PackageLoader("vtprune", "pictures")
    page = jinja2.Environment(autoescape=True, loader=templates).get_template(name)
    return page.render(data=without_bidi(data)).encode("utf-8", "replace")  # tojson escapes < > & '


def without_bidi(value: object) -> object:
    """Return data without bidirectional control characters in its texts."""
    if isinstance(value, str):
        return value if value.isascii() else value.translate(WITHOUT_BIDI)
    if isinstance(value, Mapping):
        return {key: without_bidi(part) for key, part in value.items()}
    return [without_bidi(part) for part in value] if isinstance(value, (list, tuple)) else value


def panel_data(
    drawing: Drawing,
    run: DrawnRun,
    panel: Panel,
    pictures: dict[str, str],
    fields: Callable[[Token], Sequence[object]],
    prefix: str = "",
) -> dict[str, object]:
    """Return what a page is told of one panel.

    Args:
        pictures: gets the picture behind it, as a data URL.
        fields: what the page adds to a token's place.
        prefix: of the picture's name, where drawings have pictures of their own.
    """
    item, (media, frame) = run.item_of(panel), panel.picture_key
    key = f"{prefix}{media}-{frame}"
    if key not in pictures:
        pictures[key] = to_url(drawing.picture(run, panel))
    tokens = []
    for token in panel.tokens:
        place = token.place
        box = [round(edge, 1) for edge in place.box or ()]
        tokens.append([place.column, *box, place.tile, place.row, place.col, *fields(token)])
    return {
        "title": run.title(panel),
        "picture": key,
        "width": item.source.width,
        "height": item.source.height,
        "tokens": tokens,
        "large": not item.timestamps,
    }


def run_data(drawing: Drawing, run: DrawnRun, pictures: dict[str, str]) -> dict[str, object]:
    """Return what the page is told of one way to prune.

    Args:
        pictures: gets each picture behind a panel, as a data URL.
    """

    def fate(token: Token) -> list[object]:
        return [
            -1 if token.dropped_by is None else token.dropped_by,
            -1 if token.merged_into is None else token.merged_into,
            [None if score is None else rounded(score) for score in token.scores],
        ]

    panels = [panel_data(drawing, run, panel, pictures, fate) for panel in run.panels]
    merged = {token.merged_into for token in run.tokens} - {None}
    return {
        "name": run.name,
        "answer": run.answer,
        "legend": [text for text in (run.legend, run.not_drawn) if text],
        "layers": run.kept.num_layers,
        "total": run.total,
        "stages": [
            {"layer": one.layer, "title": run.stage_title(number), "method": one.method}
            for number, one in enumerate(run.stages)
        ],
        "panels": panels,
        "colours": {
            str(column): list(colour_of(column)) for column in merged if column is not None
        },
    }


def to_url(picture: Image) -> str:
    """Return a picture as a data URL."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
