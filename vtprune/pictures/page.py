"""What was kept as one HTML page: a slider over the layers, frames as a strip, tokens to point at.

It needs no network and no other file. Names, questions and answers reach it as data in JSON, and
are set as text by its script: none can become markup.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING

import jinja2

from vtprune.pictures.contact_sheet import colour_of
from vtprune.pictures.drawing import Drawing, DrawnRun, rounded

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = 80
"""Of the JPEGs in the page."""


def draw_page(drawing: Drawing) -> bytes:
    """Return the HTML page of a drawing, all frames in it."""
    keys = [panel.key for panel in drawing.runs[0].panels]
    drawing.read_pictures(keys)
    pictures: dict[tuple[int, int], str] = {}
    runs = [run_data(drawing, run, pictures) for run in drawing.runs]
    names = {key: f"{key[0]}-{key[1]}" for key in pictures}
    data = {
        "question": drawing.runs[0].question,
        "files": drawing.runs[0].files,
        "model": drawing.runs[0].model,
        "pictures": {names[key]: value for key, value in pictures.items()},
        "runs": runs,
    }
    source = resources.files("vtprune.pictures").joinpath("page.html").read_text(encoding="utf-8")
    return render_page(source, data)


def render_page(source: str, data: Mapping[str, object]) -> bytes:
    """Return a page with its data in it."""
    page = jinja2.Environment(autoescape=True).from_string(source)  # tojson escapes < > & '
    return page.render(data=data).encode("utf-8", "replace")


def run_data(
    drawing: Drawing, run: DrawnRun, pictures: dict[tuple[int, int], str]
) -> dict[str, object]:
    """Return what the page is told of one way to prune.

    Args:
        pictures: gets each picture behind a panel, as a data URL.
    """
    panels = []
    for panel in run.panels:
        item = run.item_of(panel)
        key = panel.picture_key
        if key not in pictures:
            pictures[key] = to_url(drawing.picture(run, panel))
        tokens = [
            [
                token.place.column,
                *(round(edge, 1) for edge in token.place.box or ()),
                -1 if token.dropped_by is None else token.dropped_by,
                -1 if token.merged_into is None else token.merged_into,
                token.place.tile,
                token.place.row,
                token.place.col,
                [None if score is None else rounded(score) for score in token.scores],
            ]
            for token in panel.tokens
        ]
        panels.append(
            {
                "title": run.title(panel),
                "picture": f"{key[0]}-{key[1]}",
                "width": item.source.width,
                "height": item.source.height,
                "tokens": tokens,
                "large": not item.timestamps,
            }
        )
    merged = {token.merged_into for token in run.tokens} - {None}
    return {
        "name": run.name,
        "answer": run.answer,
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
