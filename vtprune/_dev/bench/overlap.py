"""What it saves to decode a clip while a model's weights are read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from vtprune._dev.bench.decoding import write_clip
from vtprune._dev.bench.results import Pass, Results, Side
from vtprune.evaluation.profiling.shapes import Shape, build_random, find_shape
from vtprune.inference.prompt_media import load_with_media, read_media
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.models.loading import open_model
from vtprune.preset import load_preset

Way = Callable[[Path, Path, Sampling], None]


def measure_overlap(
    results: Results,
    model: str,
    folder: Path,
    seconds: int,
    width: int,
    height: int,
    frames: int,
    repeats: int,
) -> list[Pass]:
    """From a checkpoint on disk and a clip to a model and resized frames, in two ways."""
    settings = {
        "model": model, "seconds": seconds, "size": f"{width}x{height}", "frames": frames,
    }  # fmt: skip

    def sides() -> Mapping[str, Side]:
        shape = find_shape(model)
        where = folder / f"{Path(shape.name).name}-random"
        clip = folder / f"clip-{seconds}s-{width}x{height}.mp4"
        results.show(f"  {where.name}, {clip.name}")
        write_clip(clip, seconds, width, height)
        write_checkpoint(shape, where)
        sampling = Sampling(frames=frames)
        ways: dict[str, Way] = {"one after the other": one_by_one, "at once": at_once}
        return {name: partial(timed, way, where, clip, sampling) for name, way in ways.items()}

    return results.measure("overlap", settings, sides, repeats, torch.device("cpu"))


def timed(way: Way, where: Path, clip: Path, sampling: Sampling) -> dict[str, float]:
    started = time.perf_counter()
    way(where, clip, sampling)
    return {"seconds": time.perf_counter() - started}


def one_by_one(where: Path, clip: Path, sampling: Sampling) -> None:
    loaded = open_model(str(where), device="cpu").load()
    read_media(loaded, [clip], sampling, None, Limits())


def at_once(where: Path, clip: Path, sampling: Sampling) -> None:
    opened = open_model(str(where), device="cpu")
    load_with_media(opened, [clip], sampling, load_preset(None), Limits())


def write_checkpoint(shape: Shape, where: Path) -> None:
    """A checkpoint with random bfloat16 weights; left as it is where it is there already."""
    if (where / "config.json").exists():
        return
    model = build_random(shape.config, torch.device("cpu"), torch.bfloat16)
    shape.files.tokenizer.save_pretrained(where)
    contents = {"preprocessor_config.json": shape.files.image,
                "video_preprocessor_config.json": shape.files.video}  # fmt: skip
    for name, values in contents.items():
        (where / name).write_text(json.dumps(dict(values)), encoding="utf-8")
    model.save_pretrained(where / "weights")
    for file in (where / "weights").iterdir():  # the config last: what is there is whole
        if file.name != "config.json":
            file.replace(where / file.name)
    (where / "weights" / "config.json").replace(where / "config.json")
