"""A long video: its segments are encoded one by one, and each is cut before the next is encoded.

Only the features of kept tokens stay. The prompt that is prefilled then has those tokens alone,
with the positions that they have in the whole one; its features are given to the block in the
place of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from vtprune.device import Duration, mark, send
from vtprune.engine.encoded_rows import PER_LAYER
from vtprune.engine.features_on_disk import features_key, load_features, store_features
from vtprune.engine.plan import PlannedBatch, PruningPlan
from vtprune.engine.prefill import Prefill
from vtprune.engine.tower_attention import read_scores
from vtprune.engine.trace import Trace
from vtprune.engine.vision_encoder import EncoderHooks
from vtprune.errors import ModelError
from vtprune.models.base import PIXELS
from vtprune.models.encoder_cache import EncoderCache
from vtprune.models.seams import ENCODERS, Arguments
from vtprune.models.structure import Structure
from vtprune.preset import Preset, StageSpec
from vtprune.preset.calibration import Calibration
from vtprune.tokens.information import group_information
from vtprune.tokens.layout import NEWLINE, Grid, Layout
from vtprune.tokens.schedule import Cut, Schedule

ALIKE = 1e-2
"""Largest difference, of the largest feature, of frames that are encoded with others and without:
kernels round otherwise in another batch."""


@dataclass(frozen=True)
class OutputForm:
    """How an encoder gives the features of a video.

    Args:
        kind: class of the output; None: the features themselves.
        dims: of the features' tensor.
        listed: whether there is a list of such tensors, one a video.
        layers_listed: whether there is one for every layer too.
    """

    kind: type[MutableMapping[str, object]] | None
    dims: int
    listed: bool
    layers_listed: bool = False


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder gave for some tokens.

    Args:
        rows: (n, d).
        layers: (n, d) each: what some decoders add to the states after their first layers.
        tower: (n, V) float32 that the tokens receive of their tower's attention, by the names of
            `TOWER`; None: not read.
        form: of the output that they were taken from.
    """

    rows: torch.Tensor
    layers: tuple[torch.Tensor, ...] = ()
    tower: torch.Tensor | None = None
    form: OutputForm | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: torch.Tensor) -> Features:
        """Return those of the tokens at `index`, (k,) int64."""
        index = send(index, self.rows.device)
        tower = None if self.tower is None else self.tower[send(index, self.tower.device)]
        return replace(
            self, rows=self.rows[index], layers=tuple(layer[index] for layer in self.layers),
            tower=tower,
        )  # fmt: skip


def join_features(parts: Sequence[Features]) -> Features:
    """Return the features of several segments as one."""
    towers = [part.tower for part in parts if part.tower is not None]
    return Features(
        torch.cat([part.rows for part in parts]),
        tuple(torch.cat(layer) for layer in zip(*(part.layers for part in parts), strict=True)),
        torch.cat(towers) if len(towers) == len(parts) else None,
        parts[0].form,
    )


@dataclass(eq=False)
class SegmentEncoder:
    """Encodes the segments of one video, and cuts each.

    Args:
        structure: of the model.
        stage: what cuts; its place is the language model's input.
        seed: of the preset.
        calibration: of the model; None: the packaged one.
        text: (M,) int64 ids behind the prompt's last visual token, which methods may read.
        cache: of features on disk; None for none.

    Attributes:
        vision: how long encoding took.
        trace: with the warnings of the cuts.
    """

    structure: Structure
    stage: StageSpec
    seed: int
    calibration: Calibration | None
    text: torch.Tensor
    cache: EncoderCache | None = None
    vision: Duration = field(default_factory=Duration)
    trace: Trace = field(default_factory=Trace)

    def __post_init__(self) -> None:
        stages = (replace(self.stage, at="input", keep=None, positions="keep"),)
        preset = Preset(None, keep=0.5, seed=self.seed, stages=stages)  # the keep is not read
        self.plan = PruningPlan(preset, self.structure, self.calibration, self.trace)
        (self.group,) = [self.plan.group("all")]

    def encode(self, tensors: Mapping[str, torch.Tensor], layout: Layout) -> Features:
        """Return the features of a segment.

        Args:
            tensors: what the family gives the vision tower for it, on the model's device.
            layout: of its tokens.
        """
        started = mark(self.structure.device)
        modality, encode, given = self._encoder_call(tensors)
        hooks = EncoderHooks.outside_block(self.plan)
        key = None
        if self.cache is not None:
            key = features_key(self.cache, modality, given, None)
            known = key and load_features(self.cache, key, self.structure.device)
            if known and not self.plan.reads_tower:
                self.vision += Duration.since(started, self.structure.device)
                return take_apart(known[0])
        with torch.no_grad(), hooks.tapped_tower(modality, given, None):
            encoded = encode(**given, return_dict=True)
        if self.cache is not None and key is not None:
            store_features(self.cache, key, encoded, None)
        features = take_apart(encoded)
        if self.plan.reads_tower:
            scores = read_scores(self.structure, {modality: given}, [layout])[0]
            features = replace(features, tower=scores)
        self.vision += Duration.since(started, self.structure.device)
        return features

    def _encoder_call(
        self, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[str, Callable[..., object], dict[str, object]]:
        """Return the modality of the encoder that takes a segment, its method, its arguments."""
        pixels = next(name for name in PIXELS if name in tensors)
        modality = PIXELS[pixels]
        encode: Callable[..., object] | None = getattr(
            self.structure.inner, ENCODERS[modality], None
        )
        if encode is None:
            raise ModelError(
                f"{self.structure.model_type}: a video can't be encoded in segments: the model has "
                f"no {ENCODERS[modality]}",
                "leave --stream out, and give fewer frames",
            )
        names = Arguments(encode).order
        given: dict[str, object] = {name: tensors[name] for name in names if name in tensors}
        given.setdefault(names[0], tensors[pixels])  # some call a video's frames pixel_values too
        return modality, encode, given

    def information(self, features: Features) -> float:
        """Return the number of directions that a segment's tokens spread over."""
        group = torch.zeros(len(features), dtype=torch.long)
        return group_information(features.rows, group)[0]

    def cut(self, features: Features, layout: Layout, count: int) -> tuple[Features, torch.Tensor]:
        """Return what a segment keeps, and its index, (k,) int64, among the segment's tokens.

        Args:
            layout: of the tokens, where they are in the whole video.
            count: tokens to keep.
        """
        total = len(features)
        if count >= total:
            return features, torch.arange(total)
        here = replace(layout, columns=torch.arange(total))
        with torch.no_grad():
            words = self.structure.model.get_input_embeddings()(
                send(self.text, self.structure.device)
            )
            embeds = torch.cat([features.rows, words.to(features.rows)])[None]
            schedule = Schedule(self.plan.num_layers, total, (Cut(0, 0, count),))
            valid = torch.ones(embeds.shape[:2], dtype=torch.bool)
            batch = PlannedBatch(
                [here], valid, 0, [torch.zeros(0, dtype=torch.long)], [self.group], [[schedule]],
                Trace(layouts=[here]),
            )  # fmt: skip
            prefill = Prefill(self.plan, batch, {}, embeds, None, mark(self.structure.device))
            if features.tower is not None:
                prefill.readings.tower = [features.tower]
            prefill.readings.project(embeds, batch.projections(0))
            merged = prefill.cut(0, embeds)
        index = prefill.sequence.layouts[0].columns
        kept = features.take(index)
        return replace(kept, rows=merged[0, send(index, merged.device)]), index


def check_apart(apart: Features, among: Features, model_type: str) -> None:
    """Refuse a tower that mixes the frames of a segment.

    Args:
        apart: the features of some frames, encoded alone.
        among: of the same frames, encoded among others.

    Raises:
        ModelError: they differ.
    """
    sizes = (among.rows, apart.rows - among.rows)
    largest, difference = torch.stack([rows.abs().max() for rows in sizes]).tolist()
    if difference > ALIKE * max(largest, 1e-6):
        raise ModelError(
            f"{model_type}: its vision tower mixes the frames that it is given together, so a "
            "video encoded in segments would be another one",
            "leave --stream out, and give fewer frames",
        )


def fit_to_layout(features: Features, grid: Grid, model_type: str) -> tuple[Features, int]:
    """Return a segment's features for its tokens, and how many more the rest of the model adds.

    Some models end a video with a newline: their encoder gives one for every segment, or the rest
    of the model adds it.

    Args:
        grid: of the segment's tokens in the whole video.

    Returns:
        the features, and how many last tokens of the grid the rest of the model adds.

    Raises:
        ModelError: they are not those of the grid.
    """
    over = len(features) - len(grid)
    if over == 0:
        return features, 0
    if over == 1:
        return features.take(torch.arange(len(grid))), 0
    if over == -1 and int(grid.kind[-1]) == NEWLINE:
        return features, 1
    raise ModelError(
        f"{model_type}: a segment of the video gave {len(features)} features, and it has "
        f"{len(grid)} tokens",
        "leave --stream out, and give fewer frames",
    )


# -- encoders' outputs -----------------------------------------------------------------------------


def take_apart(encoded: object) -> Features:
    """Return the output of a vision encoder as features: one row a token.

    Raises:
        ModelError: it is of an unknown form.
    """
    pooled: object = encoded
    if isinstance(encoded, Mapping):  # an attribute, which 5.17 leaves out of the mapping
        pooled = getattr(encoded, "pooler_output", None)
    if isinstance(pooled, torch.Tensor):
        rows = pooled.reshape(-1, pooled.shape[-1])
        dims, listed = pooled.dim(), False
    elif isinstance(pooled, (list, tuple)) and all(
        isinstance(item, torch.Tensor) for item in pooled
    ):
        rows = torch.cat([item.reshape(-1, item.shape[-1]) for item in pooled])
        dims, listed = pooled[0].dim(), True
    else:
        raise ModelError(
            f"a vision encoder gave {type(pooled).__name__}, which is not read in segments",
            "leave --stream out, and give fewer frames",
        )
    layers, layers_listed = tuple[torch.Tensor, ...](), False
    if isinstance(encoded, Mapping):
        for name in PER_LAYER:
            values = getattr(encoded, name, None) or ()
            layers_listed |= any(isinstance(value, (list, tuple)) for value in values)
            layers += tuple(
                torch.cat(list(value)) if isinstance(value, (list, tuple)) else value
                for value in values
            )
    kind = type(encoded) if isinstance(encoded, MutableMapping) else None
    return Features(rows, layers, None, OutputForm(kind, dims, listed, layers_listed))


def put_together(features: Features) -> object:
    """Return features as the encoder's output of one video that has those tokens."""
    assert isinstance(features.form, OutputForm)
    kind, shape = features.form.kind, features.form.dims
    rows = features.rows[(None,) * (shape - 2)]
    pooled: object = [rows] if features.form.listed else rows
    if kind is None:
        return pooled
    output = kind()
    output["pooler_output"] = pooled
    if features.layers:
        listed = features.form.layers_listed
        output[PER_LAYER[0]] = [[layer] if listed else layer for layer in features.layers]
    return output
