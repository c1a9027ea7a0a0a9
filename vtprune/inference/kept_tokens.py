"""What a run kept, in the words of the prompt: its tokens, its stages, and how its media were made.

A report holds it, so that pictures can be drawn of it later. It has no pixels, but for thumbnails
where they were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vtprune.tokens.layout import MODALITIES, Layout, empty_layout
from vtprune.tokens.units import WHOLE, Region

if TYPE_CHECKING:
    from vtprune.engine.trace import MergedTokens, StageRecord, TokenScores, Trace
    from vtprune.inference.prepare import PreparedQuestion
    from vtprune.media import Source
    from vtprune.models.anyres import Plane
    from vtprune.models.base import PreparedMedia
    from vtprune.models.loading import Loaded


@dataclass(frozen=True)
class MediaItem:
    """One media item of a prompt, as the model got it.

    Args:
        source: the file as it is.
        read_size: (height, width) that it was read at: smaller where it was downsampled.
        index: the frame numbers that were read.
        timestamps: their times in seconds; () for a picture.
        num_rows: frames, or tiles with the base picture, that were made of it.
        base: which of them is the base picture.
        transform: makes them of (n, 3, *read_size) uint8.
        spans: as of `Family.spans`.
        plane: how its tiles lie, where they are cut to the picture.
        overlapping: whether its tiles overlap.
        thumbnails: as of PreparedMedia.
    """

    source: Source
    read_size: tuple[int, int]
    index: tuple[int, ...]
    timestamps: tuple[float, ...]
    num_rows: int
    base: int
    transform: Callable[[torch.Tensor], torch.Tensor] | None
    spans: tuple[Region, Region] = (WHOLE, WHOLE)
    plane: Plane | None = None
    overlapping: bool = False
    thumbnails: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class StageOfSample:
    """What one stage did to one sample.

    Args:
        at, layer, method, modality: as of StageRecord.
        before, after: counts of visual tokens, of every modality.
        kept: columns of the visual tokens still present.
        merge: which tokens it merged; None where it merged none.
        score: what its method ranked the tokens by; None where it chose by no score.
    """

    at: str
    layer: int
    method: str
    modality: str
    before: int
    after: int
    kept: frozenset[int]
    merge: MergedTokens | None
    score: TokenScores | None

    @property
    def merged_into(self) -> dict[int, int]:
        """The column of each dropped token that was merged -> that of the kept one."""
        return {} if self.merge is None else self.merge.by_column()

    @property
    def scores(self) -> dict[int, float]:
        """The score of each token that its method ranked, by column; higher is kept first."""
        return {} if self.score is None else self.score.by_column()

    def at_columns(self, columns: Mapping[int, int]) -> StageOfSample:
        """Return the stage for a prompt that has its tokens at other columns: old -> new."""

        def moved(old: torch.Tensor) -> torch.Tensor:
            return torch.tensor([columns[column] for column in old.tolist()], dtype=torch.long)

        merge, score = self.merge, self.score
        return replace(
            self,
            kept=frozenset(columns[column] for column in self.kept),
            merge=merge and replace(merge, columns=moved(merge.columns)),
            score=score and replace(score, columns=moved(score.columns)),
        )

    @classmethod
    def of(cls, record: StageRecord, sample: int) -> StageOfSample:
        """Return what a record of a batch says of one of its samples."""
        return cls(
            record.at,
            record.layer,
            record.method,
            record.modality,
            record.before[sample],
            record.after[sample],
            frozenset(record.kept[sample]),
            record.merges[sample],
            record.scores[sample] if record.scores else None,
        )


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The visual tokens of one prompt, and which of them each stage kept.

    Args:
        layout: the tokens before any cut.
        stages: in the order of the cuts.
        items: for each media item of the layout, in the order of the prompt, its number in `media`
            and the row of its pixels that it begins with.
        media: the files.
        num_layers: of the decoder.
    """

    layout: Layout
    stages: tuple[StageOfSample, ...]
    items: tuple[tuple[int, int], ...]
    media: tuple[MediaItem, ...]
    num_layers: int


def stages_of(trace: Trace, sample: int) -> tuple[StageOfSample, ...]:
    """Return the stages that cut one sample of a batch, the cuts while decoding as the last."""
    stages = [StageOfSample.of(one, sample) for one in trace.stages if one.cuts[sample]]
    if trace.decoding:
        stages.append(_decoding_stage(trace, sample))
    return tuple(stages)


def _decoding_stage(trace: Trace, sample: int) -> StageOfSample:
    """Return all cuts while decoding as one stage, which keeps what is left in any layer."""
    before = frozenset(trace.kept[sample].columns.tolist())
    last = trace.decoding[-1]
    layers = range(len(last.columns))
    kept = before & {column for layer in layers for column in last.left(sample, layer)}
    return StageOfSample(
        "decoding", len(layers), "attention", "all", len(before), len(kept), kept, None, None
    )


def keep_record(
    loaded: Loaded, question: PreparedQuestion, trace: Trace, sample: int
) -> KeptTokens | None:
    """Return what a run kept; None without visual tokens, or where their media are not known."""
    layout = trace.layouts[sample] if trace.layouts else empty_layout()
    stages, streamed = stages_of(trace, sample), question.inputs.streamed
    if streamed is not None and len(layout):
        columns = dict(
            zip(
                layout.columns.tolist(),
                streamed.layout.columns[streamed.index].tolist(),
                strict=True,
            )
        )
        layout = streamed.layout
        stages = tuple(stage.at_columns(columns) for stage in stages)
    prepared, sources = question.media.items, question.media.sources
    if not len(layout) or not prepared:
        return None
    items = _items_of_prompt(layout, prepared)
    if items is None:
        return None
    family, files = loaded.family, loaded.files
    names = ("image_sizes", "batch_num_images")
    given = {name: question.tensors[name] for name in names if name in question.tensors}
    planes = iter(family.planes(files.config, given) or ())
    media = tuple(
        MediaItem(
            source.without_content(),
            (item.source.height, item.source.width),
            item.index,
            item.timestamps,
            len(item.pixels),
            item.regions.index(WHOLE) if item.regions else 0,
            item.transform,
            family.spans(files, item),
            next(planes, None) if item.source.kind == "image" else None,
            family.overlapping_tiles,
            item.thumbnails,
        )
        for item, source in zip(prepared, sources or [one.source for one in prepared], strict=True)
    )
    num_layers = len(trace.visual_by_layer[sample]) if trace.visual_by_layer else 0
    return KeptTokens(layout, stages, items, media, num_layers)


def _items_of_prompt(
    layout: Layout, prepared: Sequence[PreparedMedia]
) -> tuple[tuple[int, int], ...] | None:
    """Return for each media item of a layout the file, and its row, that it was made of.

    The items of a modality are in the order of the files. A picture's crops may be pictures of
    their own in the prompt (Gemma 3): then each row of its pixels is one. None where neither fits.
    """
    item = layout.items()
    firsts = [int((item == number).nonzero()[0, 0]) for number in range(int(item.max()) + 1)]
    kinds = [MODALITIES[int(layout.modality[first])] for first in firsts]
    owners: dict[str, list[tuple[int, int]]] = {}
    for kind in MODALITIES:
        files = [number for number, one in enumerate(prepared) if one.source.kind == kind]
        whole = [(number, 0) for number in files]
        rows = [(number, row) for number in files for row in range(len(prepared[number].pixels))]
        owners[kind] = whole if kinds.count(kind) == len(files) else rows
        if kinds.count(kind) != len(owners[kind]):
            return None
    left = {kind: iter(numbers) for kind, numbers in owners.items()}
    return tuple(next(left[kind]) for kind in kinds)
