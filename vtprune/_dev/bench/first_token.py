"""How much sooner the first token of real clips comes: whole presets, the vision tower counted."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from vtprune._dev.bench.subject import BenchSubject
from vtprune._dev.bench.tables import spread, table
from vtprune.evaluation.profiling.profile import TEXT_TOKENS
from vtprune.evaluation.profiling.prompts import ProfiledMedia, make_prompt
from vtprune.evaluation.profiling.shapes import Shape, build_random, find_shape
from vtprune.inference.model_inputs import to_device
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded
from vtprune.preset import Preset, load_preset


def smaller_shape(shape: Shape, share: int) -> Shape:
    """Return a shape with one layer in so many, in tower and decoder alike."""
    config = copy.deepcopy(shape.config)
    for part in (config.vision_config, config.get_text_config()):
        part.num_hidden_layers = max(part.num_hidden_layers // share, 1)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return replace(shape, config=config, files=replace(shape.files, config=config))


def measure_first_token(
    model: str,
    clips: Sequence[Path],
    presets: Sequence[str],
    frames: int,
    share: int,
    device: torch.device,
    dtype: torch.dtype,
    passes: int,
) -> str:
    """Return a Markdown table of the seconds and ratios, one row a clip and preset.

    Args:
        share: of the layers, one in so many is built.
        passes: of all presets in turn, there and back; medians of the passes' ratios.
    """
    shape = smaller_shape(find_shape(model), share)
    loaded = Loaded(
        shape.name, build_random(shape.config, device, dtype, None), shape.files, shape.family
    )
    rows: dict[str, Preset | None] = {"unpruned": None}
    rows |= {Path(name).stem: load_preset(name) for name in presets}
    head = ["clip", "row", "time in the tower", "vision, s", "prefill, s", "first token, s",
            "as soon"]  # fmt: skip
    lines: list[list[str]] = []
    speedups: dict[str, list[float]] = {name: [] for name in rows}
    for clip in clips:
        case = make_prompt(
            loaded, ProfiledMedia("video", paths=(str(clip),)), Sampling(frames=frames), TEXT_TOKENS
        )
        subject = BenchSubject(loaded, case, to_device(loaded, case.inputs.tensors), {})
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
        for number in range(passes):
            order = list(rows) if number % 2 == 0 else list(rows)[::-1]
            for name in order:
                seconds[name].append(subject.run(rows[name], tower=True))
        for name, runs in seconds.items():
            pairs = list(zip(seconds["unpruned"], runs, strict=True))
            ratios = [full["first_token"] / run["first_token"] for full, run in pairs]
            speedups[name].append(median(ratios))
            parts = ("vision", "prefill", "first_token")
            medians = [f"{median(run[part] for run in runs):.2f}" for part in parts]
            in_tower = median(run["vision"] / full["vision"] for full, run in pairs)
            lines.append([clip.name, name, f"{in_tower:.0%}", *medians, spread(ratios)])
            sys.stderr.write(", ".join(lines[-1]) + "\n")
    of_all = f"median of {len(clips)} clips"
    lines += [[of_all, name, "", "", "", "", spread(of_row)] for name, of_row in speedups.items()]
    return table(head, lines)
