"""A few frames of a long clip: this project's reading beside decord and PyAV called plainly."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vtprune._dev.bench.results import Pass, Results, Side
from vtprune.media import open_source, read, sample_evenly
from vtprune.models.preprocess import resize

SIZE, BICUBIC = (384, 384), 3
KEYFRAMES = 250  # frames from one to the next at most, as x264 has it
RATE = 30


def write_clip(path: Path, seconds: int, width: int, height: int, rate: int = RATE) -> None:
    """A clip of a coarse pattern that moves, in H.264; left as it is where it is there already."""
    import av

    if path.exists():
        return
    part = path.with_suffix(f".part{path.suffix}")
    pattern = np.random.default_rng(0).integers(0, 256, (height // 8, width // 4, 3), np.uint8)
    pattern = pattern.repeat(8, 0).repeat(8, 1)
    with av.open(str(part), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": str(KEYFRAMES)}
        for number in range(seconds * rate):
            left = 4 * number % width
            pixels = np.ascontiguousarray(pattern[: height // 8 * 8, left : left + width])
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    part.replace(path)


def measure_decoding(
    results: Results, folder: Path, seconds: int, width: int, height: int, frames: int, repeats: int
) -> list[Pass]:
    """From a path to frames of 384 x 384, evenly from the first to the last."""
    settings = {"seconds": seconds, "size": f"{width}x{height}", "frames": frames}

    def sides() -> Mapping[str, Side]:
        path = folder / f"clip-{seconds}s-{width}x{height}.mp4"
        results.show(f"  {path.name}")
        write_clip(path, seconds, width, height)
        index = sample_evenly(open_source(path), frames)
        ways: dict[str, Callable[[Path, Sequence[int]], torch.Tensor]] = {
            "vtprune": by_vtprune,
            "PyAV": by_pyav,
            "PyAV, seeking": by_pyav_seeking,
        }
        if runs("decord"):
            ways["decord"] = by_decord
        if runs("torchcodec.decoders"):
            ways["torchcodec"] = by_torchcodec
        return {name: partial(timed, way, path, index) for name, way in ways.items()}

    return results.measure("decoding", settings, sides, repeats, torch.device("cpu"))


def runs(library: str) -> bool:
    """Whether a library can be imported: some need an FFmpeg that is not there."""
    try:
        importlib.import_module(library)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def timed(
    way: Callable[[Path, Sequence[int]], torch.Tensor], path: Path, index: Sequence[int]
) -> dict[str, float]:
    started = time.perf_counter()
    frames = way(path, index)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "frames": float(len(frames)), "mean": float(frames.float().mean())}


def by_vtprune(path: Path, index: Sequence[int]) -> torch.Tensor:
    """Opening, with all its checks, decoding, and every frame resized right after."""
    return read(open_source(path), index, lambda pixels: resize(pixels, SIZE, BICUBIC)).pictures


def by_decord(path: Path, index: Sequence[int]) -> torch.Tensor:
    import decord

    frames = decord.VideoReader(str(path)).get_batch(list(index)).asnumpy()
    return resized(frames)


def by_pyav(path: Path, index: Sequence[int]) -> torch.Tensor:
    """All frames decoded from the first on; those that are wanted kept."""
    import av

    wanted = set(index)
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        decoded = enumerate(container.decode(video=0))
        return resized(
            [frame.to_ndarray(format="rgb24") for number, frame in decoded if number in wanted]
        )


def by_pyav_seeking(path: Path, index: Sequence[int]) -> torch.Tensor:
    """A seek to every frame's time, and decoding from the keyframe before it."""
    import av

    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate, unit = stream.average_rate, stream.time_base
        assert rate
        assert unit
        for number in index:
            wanted = round(number / rate / unit)
            container.seek(wanted, stream=stream)
            frame = next(frame for frame in container.decode(stream) if (frame.pts or 0) >= wanted)
            frames.append(frame.to_ndarray(format="rgb24"))
    return resized(frames)


def by_torchcodec(path: Path, index: Sequence[int]) -> torch.Tensor:
    decoders = importlib.import_module("torchcodec.decoders")
    return resize(decoders.VideoDecoder(str(path)).get_frames_at(list(index)).data, SIZE, BICUBIC)


def resized(frames: Sequence[np.ndarray] | np.ndarray) -> torch.Tensor:
    return resize(torch.from_numpy(np.stack(list(frames))).permute(0, 3, 1, 2), SIZE, BICUBIC)
