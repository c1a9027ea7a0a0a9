"""What is timed: a model of a published shape with random weights, and one input of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vtprune.engine.inputs import FeatureCache
from vtprune.evaluation.profiling.model_runs import LayerClock, layers_of, run_once
from vtprune.evaluation.profiling.profile import TEXT_TOKENS
from vtprune.evaluation.profiling.prompts import (
    ProfiledMedia,
    ProfiledPrompt,
    largest_picture,
    make_prompt,
)
from vtprune.evaluation.profiling.shapes import (
    Shape,
    build_random,
    find_shape,
    published_files,
    shallow_config,
)
from vtprune.inference.generate import Run
from vtprune.inference.model_inputs import to_device
from vtprune.models import cost
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded
from vtprune.preset import Preset, load_preset

STEPS = 3  # tokens decoded after the first
NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


@dataclass(frozen=True, eq=False)
class BenchSubject:
    """A model and its input.

    Args:
        loaded: the model, random weights.
        case: the input.
        tensors: of the input, on the model's device.
        encoded: what the vision tower made of it, once it has run.
    """

    loaded: Loaded
    case: ProfiledPrompt
    tensors: Mapping[str, torch.Tensor]
    encoded: FeatureCache

    @property
    def visual(self) -> int:
        return len(self.case.layout)

    def run(self, preset: Preset | None, tower: bool = False) -> dict[str, float]:
        """One prefill and a few decoded tokens; seconds, FLOPs and counts.

        Args:
            preset: what is cut; None for nothing.
            tower: run the vision tower too, rather than take what it made before.
        """
        clock = LayerClock(self.loaded.model.device)
        encoded = {} if tower else self.encoded
        with clock.on(layers_of(self.loaded.model)):
            ran = run_once(self.loaded, self.tensors, self.case, preset, STEPS, encoded)
        inside = sum(lap.seconds for lap in clock.forwards()[0])
        took = ran.seconds
        return {
            "vision": took["vision"],
            "select": took["select"],
            "prefill": took["prefill"],
            "outside_layers": max(took["prefill"] - inside, 0.0),
            "first_token": self.case.preprocess_seconds + took["first_choice"],
            "decode_per_token": took["decode"] / STEPS,
            "flops": self.flops(ran),
            "kept": float(ran.trace.visual_by_layer[0][-1]),
        }

    def flops(self, ran: Run) -> float:
        """Of the decoder's prefill, as it was cut."""
        shape = self.loaded.decoder_shape
        return cost.prefill_flops(shape, ran.trace.tokens_by_layer())


def build_subject(
    shape: Shape,
    shown: ProfiledMedia | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    attention: str | None = None,
    depth: int | None = None,
    tower: bool = False,
    sampling: Sampling | None = None,
    text_tokens: int = TEXT_TOKENS,
) -> BenchSubject:
    """A model with random weights, and an input for it.

    Args:
        shown: the input; None: the largest picture that the family takes.
        depth: of the decoder; None for all layers.
        tower: build the vision tower whole; else with as few layers as do.
    """
    config = copy.deepcopy(shape.config)
    if depth is not None:
        config = shallow_config(config, depth)
    elif not tower:
        shape.family.shorten_tower(config)
    model = build_random(config, device, dtype, attention)
    files = replace(shape.files, config=config)
    loaded = Loaded(shape.name, model, files, shape.family)
    shown = shown or largest_picture(loaded)
    case = make_prompt(loaded, shown, sampling or Sampling(), text_tokens)
    return BenchSubject(loaded, case, to_device(loaded, case.inputs.tensors), {})


def narrow_shape(name: str, side: int) -> Shape:
    """A published shape whose tower sees pictures of side x side and costs next to nothing."""
    shape = find_shape(name)
    config = copy.deepcopy(shape.config)
    for key, value in {**NARROW, "image_size": side}.items():
        if hasattr(config.vision_config, key):
            setattr(config.vision_config, key, value)
    files = published_files(shape.family, config)
    return replace(shape, config=config, files=files)


def one_stage(at: str, method: str, keep: float, **options: str) -> Preset:
    """A preset that leaves `keep` of the tokens from one place on."""
    return stages_of([{"at": at, "method": method, "keep": keep, **options}])


def stages_of(stages: Sequence[Mapping[str, object]]) -> Preset:
    return load_preset({"stages": list(stages)})
