"""Short runs of a model with few layers, in which every stretch of a row has a layer or two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtprune.engine import pruning
from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.evaluation.profiling.clock import Lap, LayerClock
from vtprune.evaluation.profiling.heads import small_head
from vtprune.evaluation.profiling.rows import Planned, Step
from vtprune.inference.generation import Generation, Run, generate
from vtprune.models.upstream import quiet
from vtprune.preset import Preset, StageSpec
from vtprune.preset.spec import PIXELS, ModalityPreset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vtprune.evaluation.profiling.inputs import Case
    from vtprune.models.loading import Loaded

STEPS = 3  # tokens that are decoded after the first


@dataclass(frozen=True)
class Probe:
    """One short run.

    Args:
        row: whose cuts it has.
        preset: the same cuts, at the layers of the short model; None for nothing cut.
        counts: tokens that each layer of the short model sees.
        whole: whether it has all cuts of its row; else all tokens but so many go at the input.
    """

    row: Planned
    preset: Preset | None
    counts: tuple[int, ...]
    whole: bool = False

    @property
    def depth(self) -> int:
        return len(self.counts)


@dataclass(frozen=True)
class Reading:
    """What one short run told; seconds. The output head is not in them.

    Args:
        laps: of the prefill's layers.
        rest: of the prefill without its layers: selection, masks, first and last norm.
        select: choosing, which is in `rest`.
        around: from the start to the first token, without vision tower and prefill.
        vision: of the vision tower; 0 where what it made was kept from before.
        decode_laps: of every decoded token's layers.
        decode_rest: of a decoded token without its layers.
    """

    laps: tuple[Lap, ...]
    rest: float
    select: float
    around: float
    vision: float = 0.0
    decode_laps: tuple[tuple[Lap, ...], ...] = ()
    decode_rest: float = 0.0

    @property
    def gap(self) -> float:
        """Seconds between two layers where nothing is cut; the last ones'."""
        return self.laps[-1].gap if len(self.laps) > 1 else 0.0

    @property
    def decode_gap(self) -> float:
        gaps = [laps[-1].gap for laps in self.decode_laps if len(laps) > 1]
        return fmean(gaps) if gaps else 0.0


def probe_row(row: Planned, num_kinds: int) -> Probe:
    """The short run of a row: a layer of each kind for every stretch, and one more at the end."""
    later = sorted({step.layer for step in row.cuts if step.layer > 0})
    place = {layer: num_kinds * (number + 1) for number, layer in enumerate(later)} | {0: 0}
    starts = [0, *later]
    counts = [row.counts[start] for start in starts for _ in range(num_kinds)]
    preset = preset_of([(step, place[step.layer]) for step in row.cuts]) if row.cuts else None
    return Probe(row, preset, (*counts, counts[-1]), whole=True)


def probe_count(row: Planned, count: int, num_kinds: int) -> Probe:
    """A short run with `count` tokens in every layer: the others go at the input, at random."""
    case = row.case
    visual = count - case.text
    method = "random" if visual else "vtw"
    spec = StageSpec("input", method)
    step = Step(spec, "all", 0, len(case.layout), visual, len(case.layout))
    preset = preset_of([(step, 0)]) if visual < len(case.layout) else None
    return Probe(row, preset, (count,) * num_kinds)


def preset_of(steps: Sequence[tuple[Step, int]]) -> Preset:
    """A preset with these cuts at these layers, and as many tokens left."""
    by_modality: dict[str, list[StageSpec]] = {}
    for step, layer in steps:
        spec = StageSpec(
            at=PIXELS if step.spec.at == PIXELS else str(layer) if layer else "input",
            method=step.spec.method,
            keep=step.after / step.total,
            per=step.spec.per,
            split=step.spec.split,
            positions=step.spec.positions,
            options=step.spec.options,
        )
        by_modality.setdefault(step.modality, []).append(spec)
    groups = {name: tuple(stages) for name, stages in by_modality.items()}
    return Preset(
        "probe",
        stages=groups.get("all"),
        image=ModalityPreset(stages=groups.get("image")),
        video=ModalityPreset(stages=groups.get("video")),
    )


@dataclass
class Prober:
    """Runs probes on one short model.

    Args:
        loaded: with the short model.
        tensors: of every case, on the model's device, by the case's identity.
        encoded: what the vision tower made of them, once.
    """

    loaded: Loaded
    tensors: dict[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    encoded: dict[int, FeatureCache] = field(default_factory=dict)

    def run(self, probe: Probe) -> Reading:
        """One probe; its case must have been encoded."""
        case, model = probe.row.case, self.loaded.model
        clock = LayerClock(model.device)
        with small_head(model), at_depth(model, probe.depth), clock.on(layers_of(model)):
            # What goes before the vision tower gives it another input, of which nothing is kept.
            encoded = {} if probe.whole and probe.row.encoded else self.encoded[id(case)]
            tensors = self.tensors[id(case)]
            ran = run_once(self.loaded, tensors, case, probe.preset, STEPS, encoded, real=False)
        prefill, *decoded = clock.forwards()
        inside = sum(lap.seconds for lap in prefill)
        took = ran.seconds
        steps = [sum(lap.seconds for lap in laps) for laps in decoded]
        return Reading(
            laps=tuple(prefill),
            rest=max(took["prefill"] - inside, 0.0),
            select=took["select"],
            around=max(took["first_choice"] - took["vision"] - took["prefill"], 0.0),
            vision=took["vision"],
            decode_laps=tuple(tuple(laps) for laps in decoded),
            decode_rest=max(took["decode"] / max(len(steps), 1) - fmean(steps), 0.0)
            if steps
            else 0.0,
        )


def run_once(
    loaded: Loaded,
    tensors: Mapping[str, torch.Tensor],
    case: Case,
    preset: Preset | None,
    steps: int,
    encoded: FeatureCache,
    real: bool = True,
) -> Run:
    """One generation of a first token and `steps` more, with its own hooks.

    Args:
        real: the preset is the one that may have made the media smaller.
    """
    keep = None if preset else 1.0
    inputs = case.inputs if real else replace(case.inputs, whole=None)
    block = pruning(
        loaded.model, preset, keep, calibration=loaded.calibration,
        inputs=PreparedInputs.of(tensors, [inputs], encoded),
    )  # fmt: skip
    with quiet(), block as trace:
        return generate(loaded, tensors, Generation(), trace, length=1 + steps)[0]


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    return list(model.get_decoder().layers)  # type: ignore[union-attr, arg-type]


@contextmanager
def at_depth(model: PreTrainedModel, depth: int) -> Iterator[None]:
    """Inside, the decoder has its first `depth` layers only."""
    decoder = model.get_decoder()
    both = (decoder.config, model.config.get_text_config())  # type: ignore[union-attr]
    configs = list({id(one): one for one in both}.values())
    layers = decoder.layers  # type: ignore[union-attr]
    before = [(one, one.num_hidden_layers, getattr(one, "layer_types", None)) for one in configs]
    try:
        decoder.layers = nn.ModuleList(list(layers)[:depth])  # type: ignore[union-attr, arg-type]
        for config, _, types in before:
            config.num_hidden_layers = depth
            if types is not None:
                config.layer_types = list(types)[:depth]
        yield
    finally:
        decoder.layers = layers  # type: ignore[union-attr]
        for config, count, types in before:
            config.num_hidden_layers = count
            if types is not None:
                config.layer_types = types
