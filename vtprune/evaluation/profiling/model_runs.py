"""Timed runs of a model with random weights, whole or with few layers that stand for all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from statistics import fmean, median
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vtprune.device import TimeMark, mark, now, seconds_between, time_runs
from vtprune.engine.inputs import FeatureCache
from vtprune.evaluation.profiling.rows import PlannedCut, PlannedRow
from vtprune.evaluation.profiling.shapes import tower_kinds
from vtprune.inference.generate import Generation, Run, generate
from vtprune.inference.model_inputs import to_device
from vtprune.inference.prepare import PreparedQuestion
from vtprune.models.structure import decoder_layers, find_decoder, find_structure
from vtprune.preset import Preset, StageSpec
from vtprune.preset.spec import PIXELS, ModalityPreset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from vtprune.evaluation.profiling.prompts import ProfiledPrompt
    from vtprune.models.loading import Loaded

STEPS = 3  # tokens that are decoded after the first
HEAD_ROWS = 128  # of the output head that is left where it is timed apart
HEAD_SAMPLE = 8192  # rows of it that are timed first


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run that generates a first token and STEPS more.

    Args:
        row: whose input it is, and whose cuts.
        preset: what is cut; None for nothing.
        counts: tokens that each of the model's layers sees.
        has_cuts: whether it makes all cuts of its row; else all tokens but so many go at the input.
    """

    row: PlannedRow
    preset: Preset | None
    counts: tuple[int, ...]
    has_cuts: bool = True


def whole_run(row: PlannedRow) -> PlannedRun:
    """Return the run of a row on the whole model."""
    preset = row.variant.preset if row.cuts else None
    return PlannedRun(row, preset, row.counts)


def short_run(row: PlannedRow, num_kinds: int) -> PlannedRun:
    """Return a row's run on few layers: one of each kind between two cuts."""
    starts = [0, *cut_layers(row)]
    place = {layer: num_kinds * number for number, layer in enumerate(starts)}
    all_counts = row.counts
    counts = tuple(all_counts[start] for start in starts for _ in range(num_kinds))
    cuts = [(cut, place[cut.layer]) for cut in row.model_cuts]
    preset = preset_of(cuts) if cuts else None
    return PlannedRun(row, preset, counts)


def count_run(row: PlannedRow, count: int, num_layers: int) -> PlannedRun:
    """Return a run with `count` tokens in every layer: the others go at the input, at random."""
    total = len(row.prompt.layout)
    visual = count - row.prompt.text
    spec = StageSpec("input", "random" if visual else "vtw")
    cut = PlannedCut(spec, "all", 0, total, visual, total)
    preset = preset_of([(cut, 0)]) if visual < total else None
    return PlannedRun(row, preset, (count,) * num_layers, has_cuts=False)


def cut_layers(row: PlannedRow) -> list[int]:
    """Return the layers after the first at which a row is cut."""
    return sorted({cut.layer for cut in row.model_cuts if cut.layer > 0})


def preset_of(cuts: Sequence[tuple[PlannedCut, int]]) -> Preset:
    """Return a preset with these cuts at these layers, and as many tokens left."""
    by_modality: dict[str, list[StageSpec]] = {}
    for cut, layer in cuts:
        at = PIXELS if cut.stage.at == PIXELS else str(layer) if layer else "input"
        spec = replace(cut.stage, at=at, keep=cut.after / cut.total)
        by_modality.setdefault(cut.modality, []).append(spec)
    groups = {name: tuple(stages) for name, stages in by_modality.items()}
    return Preset(
        "profile",
        stages=groups.get("all"),
        image=ModalityPreset(stages=groups.get("image")),
        video=ModalityPreset(stages=groups.get("video")),
    )


@dataclass(frozen=True)
class RunTimes:
    """Seconds of one run.

    Args:
        vision: of the vision tower with all its layers; 0 where its features were kept from before.
        select: choosing tokens, which is in `prefill`.
        prefill: of the decoder over the prompt.
        around: to the first token, without vision tower and prefill.
        decode: of one token after the first.
        visual: visual tokens that each layer saw.
        layers: of the prefill; none where the model is whole.
        decode_layers: of all decoded tokens, with the tokens that each cache began with.
    """

    vision: float
    select: float
    prefill: float
    around: float
    decode: float
    visual: tuple[int, ...]
    layers: tuple[LayerTime, ...] = ()
    decode_layers: tuple[LayerTime, ...] = ()

    @property
    def prefill_rest(self) -> float:
        """The prefill without its layers and without choosing: masks, the first and last norm."""
        layers = sum(one.seconds for one in self.layers)
        return max(self.prefill - layers - self.select, 0.0)

    @property
    def decode_rest(self) -> float:
        return max(self.decode - sum(one.seconds for one in self.decode_layers) / STEPS, 0.0)


@dataclass
class ModelRunner:
    """Runs rows on one model.

    Args:
        loaded: the model, with all layers or with few.
        config: of the model with all layers.
        towers: where that has its vision towers' layers.
        short: whether the model has few layers.
        tensors, features: of a prompt: its inputs on the model's device, and what the vision tower
            made of them.
    """

    loaded: Loaded
    config: PreTrainedConfig
    towers: Sequence[str]
    short: bool
    tensors: dict[ProfiledPrompt, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    features: dict[ProfiledPrompt, FeatureCache] = field(default_factory=dict)

    def run(self, run: PlannedRun) -> RunTimes:
        """Time a first token and STEPS more."""
        prompt, model = run.row.prompt, self.loaded.model
        if prompt not in self.tensors:
            self.tensors[prompt] = to_device(self.loaded, prompt.inputs.tensors)
            self.features[prompt] = {}
        # Tokens dropped before the vision tower give it another input: its features aren't cached.
        drops_pixels = run.has_cuts and run.row.encoded
        features = {} if drops_pixels else self.features[prompt]
        clock = LayerClock(model.device)
        with ExitStack() as stack:
            if self.short:
                stack.enter_context(small_head(model))
                stack.enter_context(at_depth(model, len(run.counts)))
                stack.enter_context(clock.on(layers_of(model)))
            towers = stack.enter_context(self.towers_timed())
            ran = run_once(self.loaded, self.tensors[prompt], prompt, run.preset, STEPS, features,
                           real=run.has_cuts and not self.short)  # fmt: skip
        took = ran.seconds
        prefill, *decoded = clock.forwards() or [[]]
        return RunTimes(
            vision=self.with_all_tower_layers(took["vision"], towers),
            select=took["select"],
            prefill=took["prefill"],
            around=max(took["first_choice"] - took["vision"] - took["prefill"], 0.0),
            decode=took["decode"] / STEPS,
            visual=tuple(ran.trace.visual_by_layer[0]),
            layers=tuple(prefill),
            decode_layers=tuple(
                replace(one, tokens=prefill[one.layer].tokens)
                for forward in decoded
                for one in forward
            ),
        )

    def encode_again(self, prompt: ProfiledPrompt) -> float:
        """Return the seconds of the vision tower on what it was given before."""
        device = self.loaded.model.device
        inner = find_structure(self.loaded.model).inner
        with self.towers_timed() as towers, torch.no_grad():
            started = now(device)
            for key, (given, _) in self.features[prompt].items():
                assert isinstance(key, tuple)
                assert isinstance(given, Mapping)
                encode = getattr(inner, key[0])
                takes = set(inspect.signature(encode).parameters) - {"kwargs"}
                values = {name: value for name, value in given.items() if name in takes}
                more = given.get("kwargs")
                encode(**values, **(more if isinstance(more, dict) else {}))
            seconds = now(device) - started
        return self.with_all_tower_layers(seconds, towers)

    @contextmanager
    def towers_timed(self) -> Iterator[list[LayerClock]]:
        """Time the layers of the vision towers inside the block."""
        model = self.loaded.model
        inner = find_structure(model).inner
        with ExitStack() as stack:
            clocks = []
            for path in self.towers:
                layers = inner.get_submodule(path)
                assert isinstance(layers, nn.ModuleList)
                clocks.append(stack.enter_context(LayerClock(model.device).on(list(layers))))
            yield clocks

    def with_all_tower_layers(self, seconds: float, clocks: Sequence[LayerClock]) -> float:
        """Return what the whole tower would have taken, where this one has few layers.

        Args:
            seconds: that this one took.
            clocks: of its layers.
        """
        forwards = [forward for clock in clocks for forward in clock.forwards()]
        kinds = tower_kinds(self.loaded.model.config), tower_kinds(self.config)
        if kinds[0] == kinds[1]:  # it has all of them
            return seconds
        return whole_tower(seconds, forwards, *kinds)


def whole_tower(
    seconds: float,
    forwards: Sequence[Sequence[LayerTime]],
    kinds: Sequence[str],
    all_kinds: Sequence[str],
) -> float:
    """Return what a vision tower with all its layers would have taken.

    Args:
        seconds: that the one with few layers took.
        forwards: its layers' seconds.
        kinds: what kind of layer each of its own is.
        all_kinds: what kind each of the whole tower's is.
    """
    for layers in forwards:
        mean = {
            kind: fmean(one.seconds for one in layers if kinds[one.layer] == kind)
            for kind in set(all_kinds)
        }
        seconds += sum(mean[kind] for kind in all_kinds) - sum(one.seconds for one in layers)
    return seconds


def run_once(
    loaded: Loaded,
    tensors: Mapping[str, torch.Tensor],
    prompt: ProfiledPrompt,
    preset: Preset | None,
    steps: int,
    features: FeatureCache,
    real: bool = True,
) -> Run:
    """Generate a first token and `steps` more, with hooks of their own.

    Args:
        real: the preset is the one that may have made the media smaller.
    """
    inputs = prompt.inputs if real else replace(prompt.inputs, full_size=None)
    question = PreparedQuestion("", prompt.gathered, replace(inputs, tensors=dict(tensors)))
    return generate(loaded, [question], preset or Preset("unpruned", keep=1.0), Generation(),
                    features=features, length=1 + steps)[0]  # fmt: skip


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    return list(decoder_layers(model))


@contextmanager
def at_depth(model: PreTrainedModel, depth: int) -> Iterator[None]:
    """Leave the decoder its first `depth` layers inside the block."""
    decoder, layers = find_decoder(model), decoder_layers(model)
    both = (cast("PreTrainedConfig", decoder.config), model.config.get_text_config())
    configs = list({id(config): config for config in both}.values())
    before = [
        (each, each.num_hidden_layers, getattr(each, "layer_types", None)) for each in configs
    ]
    try:
        decoder.layers = nn.ModuleList(list(layers)[:depth])
        for config, _, types in before:
            config.num_hidden_layers = depth
            if types is not None:
                config.layer_types = list(types)[:depth]
        yield
    finally:
        decoder.layers = layers
        for config, count, types in before:
            config.num_hidden_layers = count
            if types is not None:
                config.layer_types = types


@contextmanager
def small_head(model: PreTrainedModel) -> Iterator[None]:
    """Leave the output head HEAD_ROWS rows inside the block, tokens being chosen among them."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        yield
        return
    weight, bias = head.weight, head.bias
    try:
        head.weight = nn.Parameter(weight[:HEAD_ROWS], requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(bias[:HEAD_ROWS], requires_grad=False)
        yield
    finally:
        head.weight, head.bias = weight, bias


def time_head(model: PreTrainedModel, tokens: int, long: float) -> tuple[float, float]:
    """Return the seconds of the output head, at the end of a prompt and at a token on its own.

    They differ: models cut the last position out of the prompt's states, which on some CPUs takes
    another, slower way through the matrix product.

    Args:
        tokens: of the prompt.
        long: seconds; a head that takes more is timed by a part of its rows.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return 0.0, 0.0
    weight, some = head.weight, min(HEAD_SAMPLE, len(head.weight))
    prompt = torch.zeros(1, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)

    def seconds(states: torch.Tensor, rows: int) -> float:
        def multiply() -> torch.Tensor:
            return nn.functional.linear(states, weight[:rows])

        return median(time_runs(multiply, weight.device, 4)[1:])

    end, alone = prompt[:, -1:], prompt.new_zeros(1, 1, weight.shape[1])
    expected = seconds(end, some) * len(weight) / some
    if expected > long:
        return expected, seconds(alone, some) * len(weight) / some
    return seconds(end, len(weight)), seconds(alone, len(weight))


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one run of one layer.

    Args:
        layer: its number.
        tokens: that it was given.
    """

    layer: int
    tokens: int
    seconds: float


@dataclass
class LayerClock:
    """A clock for the layers of a model, without hooks and without stopping a GPU.

    Args:
        device: that the layers run on.
    """

    device: torch.device
    marks: list[tuple[int, int, TimeMark, TimeMark]] = field(default_factory=list)

    @contextmanager
    def on(self, layers: Sequence[nn.Module]) -> Iterator[LayerClock]:
        """Time `layers` inside the block, and leave them as they were."""
        try:
            for number, layer in enumerate(layers):
                layer.__dict__["forward"] = self.timed(number, layer.forward)
            yield self
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def timed(self, number: int, forward: Callable[..., object]) -> Callable[..., object]:
        @wraps(forward)
        def run(*args: object, **kwargs: object) -> object:
            hidden = args[0] if args else kwargs.get("hidden_states")
            tokens = int(hidden.shape[-2]) if isinstance(hidden, torch.Tensor) else 0
            started = mark(self.device)
            result = forward(*args, **kwargs)
            self.marks.append((number, tokens, started, mark(self.device)))
            return result

        return run

    def forwards(self) -> list[list[LayerTime]]:
        """Return the layers' seconds of every forward since the last call, in order."""
        forwards: list[list[LayerTime]] = []
        for number, tokens, started, ended in self.marks:
            if number == 0 or not forwards:
                forwards.append([])
            forwards[-1].append(LayerTime(number, tokens, seconds_between(started, ended)))
        self.marks = []
        return forwards
