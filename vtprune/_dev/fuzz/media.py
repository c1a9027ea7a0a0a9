"""Damaged pictures, pages and videos of every format that is read."""

from __future__ import annotations

import importlib.util
import io
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av import VideoStream
from av.codec.codec import UnknownCodecError
from PIL import Image

from vtprune._dev.fuzz.blocks import damage_blocks
from vtprune._dev.fuzz.mutations import damage_bytes
from vtprune._dev.fuzz.trials import Case
from vtprune.inference.prompt_media import plan_media, read_planned
from vtprune.media import Limits, open_source, open_sources, read, sample_evenly
from vtprune.models.base import Sampling
from vtprune.models.loading import open_model

WIDTH, HEIGHT = 160, 64  # decord2 3.4 takes rows of fewer than 128 pixels for others
FRAMES = 6
STILLS: Mapping[str, tuple[str, str, Mapping[str, object]]] = {
    "png": ("PNG", "RGB", {}),
    "grey16.png": ("PNG", "I;16", {}),
    "palette.png": ("PNG", "P", {}),
    "alpha.png": ("PNG", "LA", {}),
    "jpg": ("JPEG", "RGB", {}),
    "progressive.jpg": ("JPEG", "RGB", {"progressive": True, "quality": 60}),
    "cmyk.jpg": ("JPEG", "CMYK", {}),
    "gif": ("GIF", "P", {}),
    "webp": ("WEBP", "RGB", {}),
    "lossless.webp": ("WEBP", "RGBA", {"lossless": True}),
    "avif": ("AVIF", "RGB", {}),
    "bmp": ("BMP", "RGB", {}),
    "palette.bmp": ("BMP", "P", {}),
    "dib": ("DIB", "RGB", {}),
    "ppm": ("PPM", "RGB", {}),
    "pgm": ("PPM", "L", {}),
    "qoi": ("QOI", "RGB", {}),
    "tif": ("TIFF", "RGB", {}),
    "lzw.tif": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "deflate.tif": ("TIFF", "RGBA", {"compression": "tiff_adobe_deflate"}),
    "jpeg.tif": ("TIFF", "RGB", {"compression": "jpeg"}),
    "fax.tif": ("TIFF", "1", {"compression": "group4"}),
    "float.tif": ("TIFF", "F", {}),
    "jp2": ("JPEG2000", "RGB", {}),
    "pdf": ("PDF", "RGB", {}),
}
"""Suffix -> Pillow's format, the mode and how it is saved."""
SEVERAL: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "moving.gif": ("GIF", {"duration": 80}),
    "moving.png": ("PNG", {"duration": 80}),
    "moving.webp": ("WEBP", {"duration": 80}),
    "moving.avif": ("AVIF", {"duration": 80}),
    "pages.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "pages.pdf": ("PDF", {}),
}
"""Suffix -> Pillow's format, and how several pictures are saved in one file."""
VIDEOS: Mapping[str, str] = {
    "mp4": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4", "ts": "mpeg2video",
    "mov": "mjpeg", "flv": "flv", "ogv": "libtheora", "wmv": "wmv2", "nut": "ffv1",
    "y4m": "rawvideo", "hevc.mp4": "libx265", "av1.mp4": "libsvtav1",
}  # fmt: skip
"""Suffix -> the codec; left out where this FFmpeg lacks it."""
OTHERS = Path(__file__).resolve().parents[3] / "tests" / "media"


class MediaSubject:
    """Damaged media files.

    Args:
        given: files beside those that are made.
        only: the suffixes to take; () for all.
    """

    def __init__(self, given: Sequence[Path] = (), only: Sequence[str] = ()) -> None:
        files = [*given, *sorted(OTHERS.glob("*.*"))]
        read_in = {file.name: file.read_bytes() for file in files if file.suffix != ".md"}
        samples = {**make_samples(), **read_in}
        self.samples = {
            name: data for name, data in samples.items() if not only or name.endswith(tuple(only))
        }
        self.model = open_model(None)
        self.decoders = ["pyav"]
        if importlib.util.find_spec("decord") is not None:
            self.decoders.append("decord")

    def case(self, rng: random.Random, folder: Path) -> Case:
        """Return a damaged file; how it is read is drawn too."""
        name, other = rng.choice(list(self.samples)), rng.choice(list(self.samples))
        data, damage = self.samples[name], ""
        if rng.random() < 0.5:
            damage, data = damage_blocks(data, rng)
        if not damage or rng.random() < 0.1:
            damage, data = damage_bytes(data or b"-", self.samples[other], rng)
        limits = Limits(allow_partial=rng.random() < 0.3, decoder=rng.choice(self.decoders))
        ways: list[tuple[str, Callable[[], object]]] = [
            ("path", partial(self.read_path, name, data, folder, limits, rng)),
            ("path", partial(self.read_path, name, data, folder, limits, rng)),
            ("bytes", partial(read_all, data, limits)),
            ("open file", partial(read_all, io.BytesIO(data), limits)),
            ("model", partial(self.read_by_model, name, data, folder, limits, rng)),
            ("folder", partial(read_folder, data, folder, limits)),
        ]
        way, work = rng.choice(ways)

        def run() -> str:
            work()
            return ""

        return Case(name.partition(".")[2], f"{damage}, {way}", run)

    def read_path(
        self, name: str, data: bytes, folder: Path, limits: Limits, rng: random.Random
    ) -> None:
        """Read some frames or pages of a file."""
        path = folder / name
        path.write_bytes(data)
        if rng.random() < 0.5:
            read_all(
                path, replace(limits, max_pages=rng.choice((1, 64)), dpi=rng.choice((36, 144)))
            )
            return
        source = open_source(path, limits)
        index = sample_evenly(source, rng.choice((1, 8, 16)), max_frames=64)
        read(source, index, small, limits)

    def read_by_model(
        self, name: str, data: bytes, folder: Path, limits: Limits, rng: random.Random
    ) -> None:
        """Read a file as the embedded model's family does for a question."""
        path = folder / name
        path.write_bytes(data)
        sampling = Sampling(frames=rng.choice((None, 1, 4)))
        plan = plan_media(self.model, [path], sampling, None, limits)
        read_planned(plan, limits)


def small(pictures: torch.Tensor) -> torch.Tensor:
    """Return every sixteenth row and column."""
    return pictures[:, :, ::16, ::16].contiguous()


def read_all(medium: object, limits: Limits) -> None:
    """Read all that a media item holds."""
    for source in open_sources([medium], limits):  # type: ignore[list-item]
        read(source, None, small, limits)


def read_folder(data: bytes, folder: Path, limits: Limits) -> None:
    """Read a folder of numbered pictures, of which one is damaged, whatever its name says."""
    for number in (1, 3):
        picture(number).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(data)
    read_all(folder, limits)


def picture(number: int = 0) -> Image.Image:
    """Return a picture with edges and some noise, another for every number."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    noise = np.random.default_rng(number).integers(0, 40, (HEIGHT, WIDTH, 3))
    waves = np.stack([rows * 3, columns * 2, (rows + columns + 9 * number) % 64 * 3], -1)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def make_samples() -> dict[str, bytes]:
    """Return a small file of every format that Pillow and FFmpeg write here."""
    samples: dict[str, bytes] = {}
    first, *rest = [picture(number) for number in range(FRAMES)]
    Image.init()
    for suffix, (kind, mode, options) in STILLS.items():
        if kind in Image.SAVE:
            file = io.BytesIO()
            grey = first.convert("L")
            deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
            image = deep if mode == "I;16" else first.convert(mode)
            image.save(file, kind, **options)  # type: ignore[arg-type]
            samples[f"a.{suffix}"] = file.getvalue()
    for suffix, (kind, options) in SEVERAL.items():
        if kind in Image.SAVE:
            file = io.BytesIO()
            first.save(file, kind, save_all=True, append_images=rest, **options)  # type: ignore[arg-type]
            samples[f"a.{suffix}"] = file.getvalue()
    exif = Image.Exif()
    exif[274] = 6
    file = io.BytesIO()
    first.save(file, "JPEG", exif=exif)
    samples["a.turned.jpg"] = file.getvalue()
    os.environ.setdefault("SVT_LOG", "1")  # errors alone
    for suffix, codec in VIDEOS.items():
        with suppress(UnknownCodecError), same_scheduling():  # which this FFmpeg can't write
            samples[f"a.{suffix}"] = make_video(suffix, codec)
    return samples


@contextmanager
def same_scheduling() -> Iterator[None]:
    """Put this thread's scheduling back: SVT-AV1 makes it a real-time one where it may (as root).

    Such a thread that waits by spinning, as others' encoders do, keeps all others from a core.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def make_video(suffix: str, codec: str) -> bytes:
    """Return a clip of a few frames."""
    formats = {"mkv": "matroska", "ts": "mpegts", "ogv": "ogg", "wmv": "asf", "y4m": "yuv4mpegpipe"}
    name = suffix.rpartition(".")[2]
    file = io.BytesIO()
    with av.open(file, "w", formats.get(name, name)) as container:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = cast("VideoStream", container.add_stream(codec, rate=25, options=options))
        stream.width, stream.height, stream.time_base = WIDTH, HEIGHT, Fraction(1, 25)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(2 * FRAMES):
            frame = av.VideoFrame.from_image(picture(number))
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
