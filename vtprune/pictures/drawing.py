"""A drawing of what pruning kept: each visual token's place and fate, and the pictures behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

from vtprune.engine.trace import Trace
from vtprune.errors import VtpruneError
from vtprune.inference.evidence.explanation import Explanation
from vtprune.inference.kept_tokens import KeptTokens, MediaItem, StageOfSample, stages_of
from vtprune.inference.places import Box, TokenPlace, find_places
from vtprune.inference.prompt_media import THUMBNAIL, Media, shrink
from vtprune.inference.report import FailedReport, Report
from vtprune.media import media_list
from vtprune.pictures import FORMATS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from vtprune.media import Limits, Medium
    from vtprune.pictures.evidence import EvidenceDrawing

SHEET = 12
"""The most frames of a contact sheet."""
SCHEMA = 1
"""Version of the JSON's schema."""


@dataclass(frozen=True)
class Token:
    """A visual token and its fate.

    Args:
        place: where it lies.
        dropped_by: number of the stage that dropped it; None: it was kept to the end.
        merged_into: column of the token that it was merged into when it was dropped.
        scores: for every stage what its method ranked it by; None where the stage did not.
    """

    place: TokenPlace
    dropped_by: int | None
    merged_into: int | None
    scores: tuple[float | None, ...] = ()

    def present(self, stage: int) -> bool:
        """Return whether it is there after so many stages."""
        return self.dropped_by is None or self.dropped_by >= stage


@dataclass(frozen=True)
class Panel:
    """A picture with tokens: a frame, a base picture, or a picture's tiles.

    Args:
        item: number of the media item in the prompt.
        media: number of the file.
        frame: time step of a video.
        tiled: whether its tokens are those of tiles.
        tokens: with a box.
    """

    item: int
    media: int
    frame: int
    tiled: bool
    tokens: tuple[Token, ...]

    @property
    def key(self) -> tuple[int, int, bool]:
        """What tells it from the other panels of a run."""
        return self.item, self.frame, self.tiled

    @property
    def picture_key(self) -> tuple[int, int]:
        """The file and its frame that the picture behind it is of."""
        frames = self.tokens[0].place.frames
        return self.media, frames[0] if frames else 0

    def count(self, stage: int) -> int:
        """Return its tokens that are there after so many stages."""
        return sum(token.present(stage) for token in self.tokens)


@dataclass(frozen=True, eq=False)
class DrawnRun:
    """One way to prune, as it is drawn.

    Args:
        kept: what it kept.
        keep_mean: layer average of the kept fraction.
        method, preset: how it was pruned; None where it is not known.
        keep: that was asked for; None where the stages have their own.
        question, answer, model: "" where they are not known.
    """

    kept: KeptTokens
    keep_mean: float
    method: str | None = None
    preset: str | None = None
    keep: float | None = None
    question: str = ""
    answer: str = ""
    model: str = ""

    @classmethod
    def of(cls, report: Report) -> DrawnRun:
        """Return the run of a report.

        Raises:
            VtpruneError: it has no visual tokens, or is of a question that failed.
        """
        if isinstance(report, FailedReport):
            raise report.error
        if report.kept_tokens is None:
            raise VtpruneError(
                "the report has no visual tokens whose places are known",
                "draw what vtprune.ask gave in this process, about a picture or a video",
            )
        preset = report.preset
        return cls(
            report.kept_tokens, report.tokens.keep_mean, preset.method, preset.name, preset.keep,
            report.question, report.answer, report.model.name,
        )  # fmt: skip

    @property
    def stages(self) -> tuple[StageOfSample, ...]:
        """The stages, in the order of the cuts."""
        return self.kept.stages

    @property
    def name(self) -> str:
        """The method or preset, and its keep."""
        names = " and ".join(dict.fromkeys(stage.method for stage in self.stages))
        name = self.method or self.preset or names or "not pruned"
        return f"{name}: {self.keep_mean:.0%} of the visual tokens, average over the layers"

    @cached_property
    def tokens(self) -> list[Token]:
        """Every visual token, in the order of the prompt."""
        dropped: dict[int, int] = {}
        into: dict[int, int] = {}
        columns = self.kept.layout.columns.tolist()
        for number, stage in enumerate(self.stages):
            into.update(stage.merged_into)
            for column in columns:
                if column not in stage.kept:
                    dropped.setdefault(column, number)
        scores = [stage.scores for stage in self.stages]
        return [
            Token(
                place,
                dropped.get(place.column),
                into.get(place.column),
                tuple(by_column.get(place.column) for by_column in scores),
            )
            for place in find_places(self.kept)
        ]

    @cached_property
    def panels(self) -> list[Panel]:
        """Frames, base pictures and tiles with a place, in the order of the prompt."""
        parts: dict[tuple[int, int, bool], list[Token]] = {}
        for token in self.tokens:
            if token.place.box is not None:
                key = token.place.item, token.place.frame, token.place.tile > 0
                parts.setdefault(key, []).append(token)
        return [
            Panel(item, tokens[0].place.media, frame, tiled, tuple(tokens))
            for (item, frame, tiled), tokens in sorted(parts.items())
        ]

    @property
    def total(self) -> int:
        """The visual tokens before any cut, those that smaller media do not have included."""
        return max([len(self.kept.layout), *(stage.before for stage in self.stages)])

    @property
    def legend(self) -> str:
        """What clear, dark and tinted tokens are."""
        legend = "clear: kept; dark: dropped"
        if any(token.merged_into is not None for token in self.tokens):
            legend += ", tinted in the colour of the outlined token that it was merged into"
        return legend

    @property
    def not_drawn(self) -> str:
        """How many tokens have no place, and how many of them were kept; "" without any."""
        kept = [token.dropped_by is None for token in self.tokens if token.place.box is None]
        if not kept:
            return ""
        return (f"not drawn: tokens of no place, such as ends of rows: {sum(kept)} of {len(kept)} "
                "kept to the end")  # fmt: skip

    @property
    def files(self) -> list[str]:
        """The names of the files, without their folders."""
        return [Path(item.source.name).name for item in self.kept.media]

    def item_of(self, panel: Panel) -> MediaItem:
        """Return the file of a panel."""
        return self.kept.media[panel.media]

    def title(self, panel: Panel) -> str:
        """Return the name of a panel: the frame and its time, or the file."""
        item = self.item_of(panel)
        several = len(self.kept.media) > 1
        file = f"{self.files[panel.media]} " if several else ""
        if not item.timestamps:
            tiles = {token.place.tile for token in panel.tokens}
            what = f"{len(tiles)} tiles" if panel.tiled else "picture"
            return f"{file}{what}"
        first = panel.tokens[0].place
        return f"{file}frame {first.frames[0]} · {first.seconds[0]:.2f} s"

    def stage_title(self, stage: int) -> str:
        """Return what heads a column: the stage, and what it left."""
        if not self.stages:
            return f"not pruned: {self.total} tokens"
        one = self.stages[stage]
        where = "input" if one.layer == 0 else f"layer {one.layer}"
        where = one.at if one.at in ("pixels", "segments", "decoding") else where
        return f"{where} · {one.method}: {one.after} of {self.total}"

    def to_dict(self) -> dict[str, object]:
        """Return it as the JSON has it."""
        return {
            "question": self.question,
            "answer": self.answer,
            "model": self.model,
            "preset": self.preset,
            "method": self.method,
            "keep": self.keep,
            "keep_mean": self.keep_mean,
            "layers": self.kept.num_layers,
            "media": [
                {
                    "file": item.source.name,
                    "kind": item.source.kind,
                    "width": item.source.width,
                    "height": item.source.height,
                    "frames": list(item.index) if item.timestamps else [],
                    "seconds": list(item.timestamps),
                }
                for item in self.kept.media
            ],
            "stages": [
                {
                    "at": one.at,
                    "layer": one.layer,
                    "method": one.method,
                    "modality": one.modality,
                    "before": one.before,
                    "after": one.after,
                }
                for one in self.stages
            ],
            "tokens": [token_to_dict(token) for token in self.tokens],
        }


def token_to_dict(token: Token) -> dict[str, object]:
    """Return a token as the JSON has it."""
    return {
        **token.place.to_dict(),
        "frames": list(token.place.frames),
        "kept": token.dropped_by is None,
        "dropped_by": token.dropped_by,
        "merged_into": token.merged_into,
        "scores": [None if score is None else rounded(score) for score in token.scores],
    }


def rounded(score: float) -> float:
    """Return a score of five digits."""
    return float(f"{score:.5g}")


class Drawing:
    """One or several ways to prune the same question, drawn.

    Args:
        runs: what was kept, each.
        limits: with which the files are read again.
        all_frames: draw every frame, and not those with the most and the fewest kept tokens.
    """

    def __init__(
        self, runs: Sequence[DrawnRun], limits: Limits | None = None, all_frames: bool = False
    ) -> None:
        self.runs, self._limits, self.all_frames = list(runs), limits, all_frames
        self._pictures: dict[tuple[int, int], Image] = {}

    def png(self) -> bytes:
        """Return it as a PNG."""
        from vtprune.pictures.contact_sheet import draw_sheet

        return draw_sheet(self)

    def html(self) -> bytes:
        """Return it as one HTML file that needs nothing else."""
        from vtprune.pictures.page import draw_page

        return draw_page(self)

    def makers(self) -> dict[str, Callable[[], bytes]]:
        """Return what makes the bytes of a file, by its suffix."""
        return dict(zip(FORMATS, (self.png, self.html, self.json), strict=True))

    def json(self) -> bytes:
        """Return places and fates of all visual tokens as JSON on one line."""
        return (json.dumps(self.to_dict(), allow_nan=False) + "\n").encode()

    def to_dict(self) -> dict[str, object]:
        """Return places and fates of all visual tokens; docs/show.md has the schema."""
        from vtprune import __version__

        runs = [run.to_dict() for run in self.runs]
        return {"schema": SCHEMA, "version": __version__, "runs": runs}

    def save(self, path: str | Path) -> None:
        """Write it to a file, all or nothing, in the format of its suffix: PNG, HTML or JSON.

        Raises:
            VtpruneError: the suffix is none of these, or the file can't be written.
        """
        from vtprune.saving import save_file

        path = Path(path)
        makers = self.makers()
        if path.suffix.lower() not in makers:
            raise VtpruneError(
                f"{path}: its suffix names no format of a drawing", f"name it {', '.join(FORMATS)}"
            )
        save_file(path, makers[path.suffix.lower()](), "save")

    def sheet(self) -> list[tuple[int, int, bool]]:
        """Return the keys of the panels that are drawn, in the order of the prompt.

        Of more than SHEET, those with the most and the fewest tokens kept at the end, by the first
        run; of as many, those with the most and the fewest before.
        """
        run = self.runs[0]
        panels = run.panels
        if self.all_frames or len(panels) <= SHEET:
            return [panel.key for panel in panels]
        stages = range(len(run.stages), -1, -1)
        order = sorted(panels, key=lambda panel: [-panel.count(after) for after in stages])
        chosen = order[: SHEET // 2] + order[-(SHEET // 2) :]
        return sorted(panel.key for panel in chosen)

    def picture(self, run: DrawnRun, panel: Panel) -> Image:
        """Return the picture behind a panel, at the size that it is drawn at."""
        return self._pictures[panel.picture_key]

    def read_pictures(self, keys: Sequence[tuple[int, int, bool]]) -> None:
        """Make the pictures behind some panels: of thumbnails, or of their files, read again.

        Raises:
            MediaError: a file can't be read any more.
        """
        from vtprune.media import Limits, read

        run = self.runs[0]
        wanted: dict[int, set[int]] = {}
        for panel in run.panels:
            media, frame = panel.picture_key
            if panel.key in keys and (media, frame) not in self._pictures:
                wanted.setdefault(media, set()).add(frame)
        for media, numbers in wanted.items():
            item = run.kept.media[media]
            index = sorted(numbers)
            if item.thumbnails is not None:
                rows = [item.thumbnails[item.index.index(number)] for number in index]
            else:
                smaller = partial(shrink, edge=THUMBNAIL[item.source.kind])
                rows = list(read(item.source, index, smaller, self._limits or Limits()).pictures)
            for number, pixels in zip(index, rows, strict=True):
                self._pictures[media, number] = _to_image(pixels)


def _to_image(pixels: torch.Tensor) -> Image:
    from PIL import Image as Images

    return Images.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def scaled(box: Box, item: MediaItem, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a box of the source in pixels of its picture of a size (width, height)."""
    across, down = size[0] / item.source.width, size[1] / item.source.height
    left, top, right, bottom = box
    return (round(left * across), round(top * down), round(right * across), round(bottom * down))


@overload
def draw(
    reports: Report | Trace | Sequence[Report],
    media: Media = (),
    *,
    limits: Limits | None = None,
    all_frames: bool = False,
    sample: int = 0,
) -> Drawing: ...


@overload
def draw(
    reports: Explanation, *, limits: Limits | None = None, all_frames: bool = False
) -> EvidenceDrawing: ...


def draw(
    reports: Report | Trace | Sequence[Report] | Explanation,
    media: Media = (),
    *,
    limits: Limits | None = None,
    all_frames: bool = False,
    sample: int = 0,
) -> Drawing | EvidenceDrawing:
    """Draw which visual tokens were kept, or what an answer rests on.

    >>> import vtprune
    >>> report = vtprune.ask(None, "clip.mp4", "what moves?", keep=0.3)
    >>> vtprune.draw(report).save("kept.html")

    Args:
        reports: what `ask` or `answer` gave; several, about the same files, are drawn side by side.
            Or the trace of a `pruning` block. It does not know how the user's own processor made
            the inputs: a picture's tokens are drawn as if they divided all of it evenly, and a
            video's steps as if they were evenly spaced frames. Or what `explain` gave.
        media: the files of a trace, in the order of the prompt; a report knows its own.
        limits: with which the files are read again.
        all_frames: all frames of a long clip, and not those with the most and the fewest kept
            tokens alone.
        sample: of a trace, the prompt of the batch.

    Raises:
        VtpruneError: a report without visual tokens, of a question that failed, or of other media;
            a trace of no prefill, or of another number of media.
    """
    if isinstance(reports, Explanation):
        from vtprune.pictures.evidence import EvidenceDrawing

        return EvidenceDrawing(reports, limits, all_frames)
    if isinstance(reports, Trace):
        paths = media_list(media)
        kept = kept_in_files(reports, paths, limits, sample)
        return Drawing([DrawnRun(kept, reports.keep_mean(sample))], limits, all_frames)
    listed = [reports] if isinstance(reports, Report) else list(reports)
    runs = [DrawnRun.of(report) for report in listed]
    if not runs:
        raise VtpruneError("there is no report to draw", "give one or more")
    files = {tuple(item.source.name for item in run.kept.media) for run in runs}
    if len(files) > 1:
        raise VtpruneError("the reports are about different files", "draw each of them apart")
    return Drawing(runs, limits, all_frames)


def kept_in_files(
    trace: Trace, paths: Sequence[Medium], limits: Limits | None, sample: int
) -> KeptTokens:
    """Return what a trace kept of files that the user's own processor prepared.

    Raises:
        VtpruneError: there are no tokens, or other media than the files.
    """
    from vtprune.media import Limits, open_source, sample_evenly

    if len(trace.layouts) <= sample or not len(trace.layouts[sample]):
        raise VtpruneError(
            "the trace has no visual tokens to draw",
            "draw it after a call with pictures or videos, such as model.generate(**inputs)",
        )
    layout = trace.layouts[sample]
    numbers = layout.items()
    count = int(numbers.max()) + 1
    if count != len(paths):
        raise VtpruneError(
            f"the prompt has {count} media items, and {len(paths)} files are given",
            "give the file of each, in the order of the prompt",
        )
    media = []
    for number, path in enumerate(paths):
        source = open_source(path, limits or Limits())
        steps = int(layout.grid.frame[numbers == number].max()) + 1
        video = source.kind == "video"
        index = tuple(sample_evenly(source, num_frames=steps)) if video else (0,)
        if len(index) != steps:
            raise VtpruneError(
                f"{source.name}: the prompt has {steps} steps of it, and it has "
                f"{source.num_frames} frames",
                "give the files in the order of the prompt",
            )
        times = tuple(source.timestamps[one] for one in index) if video else ()
        size = source.height, source.width
        media.append(MediaItem(source, size, index, times, len(index), 0, None))
    items = tuple((number, 0) for number in range(count))
    num_layers = len(trace.visual_by_layer[sample])
    return KeptTokens(layout, stages_of(trace, sample), items, tuple(media), num_layers)
