"""Media files are read right, and bad ones are refused with a reason."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from vtprune.errors import MediaError
from vtprune.media import (
    Limits,
    Source,
    child_process,
    frames_between,
    open_source,
    open_sources,
    read,
    sample_evenly,
)
from vtprune.media.decoding import decord_frames
from vtprune.media.video import DecordUnfitError

SHARED = Path(__file__).parents[2] / "shared" / "media"
PARTIAL = Limits(allow_partial=True)
DECORD = Limits(decoder="decord")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared media are not here")
needs_decord = pytest.mark.skipif(
    "decord2" not in metadata.packages_distributions().get("decord", ()),
    reason="decord2 is not installed",
)
RED = (255, 0, 0)


def write_video(
    path: Path,
    grey: list[int],
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    fmt: str = "yuv420p",
    times: list[int] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container_format: str | None = None,
) -> Path:
    """A clip of grey frames (every 100 ms, or at `times` in ms) with a red square top left."""
    flags = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", format=container_format, options=flags) as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation and not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV writes no rotation")
        if rotation:
            stream.set_display_rotation(rotation)
        for i, value in enumerate(grey):
            pixels = np.full((size[1], size[0], 3), value, np.uint8)
            pixels[:16, :16] = RED
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times[i] if times else 100 * i, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def ramp(count: int) -> list[int]:
    """Grey values that tell the frames apart."""
    return [20 + i * 200 // count for i in range(count)]


def grey_of(pictures: torch.Tensor) -> list[int]:
    """The grey of each frame, in its middle."""
    height, width = pictures.shape[2:]
    return [int(value) for value in pictures[:, 1, height // 2, width // 2]]


def noise(path: Path) -> Path:
    """A clip of 40 frames that do not compress, so that cutting the file cuts frames."""
    random = np.random.default_rng(0)
    flags = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=flags) as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(40):
            pixels = random.integers(0, 255, (64, 96, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def first_pixel(path: Path) -> list[int]:
    return read(open_source(path)).pictures[0, :, 0, 0].tolist()


def moving_square(path: Path, **options: object) -> Path:
    """An animation of a square on transparent ground that moves by 10 pixels a frame."""
    frames = []
    for i in range(4):
        frame = Image.new("RGBA", (60, 40))
        ImageDraw.Draw(frame).rectangle((i * 10, 5, i * 10 + 9, 20), fill=(*RED, 255))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    return path


# Pictures


def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[274] = 6
    source = open_source(saved(tmp_path / "a.png", image, exif=exif))
    pictures = read(source).pictures
    assert (source.width, source.height) == (20, 40)
    assert pictures.shape == (1, 3, 40, 20)
    assert pictures[0, :, 2, 17].tolist() == list(RED)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), [255, 255, 255]),
        (Image.new("LA", (8, 8), (0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), [127, 127, 127]),
        (Image.new("L", (8, 8), 7), [7, 7, 7]),
        (Image.new("1", (8, 8), 1), [255, 255, 255]),
        (Image.new("RGB", (8, 8), (1, 2, 3)).quantize(4), [1, 2, 3]),
        (Image.fromarray(np.full((8, 8), 30000, np.uint16)), [117, 117, 117]),
    ],
    ids=["rgba", "la", "half", "grey", "bilevel", "palette", "16bit"],
)
def test_png_modes_become_rgb_on_white(
    tmp_path: Path, image: Image.Image, expected: list[int]
) -> None:
    assert first_pixel(saved(tmp_path / "a.png", image)) == expected


def test_transparent_palette_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert first_pixel(saved(tmp_path / "a.png", image, transparency=0)) == [255, 255, 255]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [(65535, np.uint16, 255), (30000, np.int32, 117), (0.5, np.float32, 128)],
)
def test_deep_tiff_is_scaled_and_not_clipped(
    tmp_path: Path, value: float, kind: type, expected: int
) -> None:
    image = Image.fromarray(np.full((8, 8), value, kind))
    assert first_pixel(saved(tmp_path / "a.tif", image)) == [expected] * 3


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    red, green, blue = first_pixel(
        saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    )
    assert red > 240
    assert max(green, blue) < 15


def test_an_image_has_one_frame_and_no_time(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path / "a.png", Image.new("RGB", (8, 6))))
    calls: list[tuple[int, ...]] = []
    frames = read(source, transform=lambda x: calls.append(x.shape) or x)
    assert (source.kind, source.num_frames, source.timestamps, source.fps) == ("image", 1, (), 0)
    assert calls == [(1, 3, 6, 8)]
    assert (frames.index, frames.timestamps, frames.decoder) == ((0,), (), "pillow")


# Animations


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_a_video_on_white_with_its_own_times(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {"disposal": 2 if suffix == "gif" else 1}
    path = moving_square(tmp_path / f"a.{suffix}", duration=[100, 200, 50, 300], **options)
    source = open_source(path)
    frames = read(source)
    assert source.kind == "video"
    assert source.timestamps == pytest.approx((0.0, 0.1, 0.3, 0.35))
    assert source.duration == pytest.approx(0.65)
    assert frames.decoder == ("pillow" if suffix == "webp" else "pyav")
    for i, picture in enumerate(frames.pictures):
        assert picture[:, 10, i * 10 + 5].tolist() == list(RED)
        assert picture[:, 10, (i * 10 + 25) % 60].tolist() == [255, 255, 255]
    some = read(source, [3, 1, 1])
    assert torch.equal(some.pictures, frames.pictures[[3, 1, 1]])


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_of_one_frame_is_an_image(tmp_path: Path, suffix: str) -> None:
    assert open_source(saved(tmp_path / f"a.{suffix}", Image.new("RGB", (8, 8)))).kind == "image"


# Videos


@pytest.mark.parametrize(
    ("decoder", "open_gop"),
    [("pyav", 0), ("pyav", 1)],
)
def test_frames_come_by_number_in_any_order(tmp_path: Path, decoder: str, open_gop: int) -> None:
    gop = f"keyint=7:bframes=3:min-keyint=1:scenecut=0:open-gop={open_gop}"
    options = {"x264-params": gop}
    grey = ramp(60)
    source = open_source(write_video(tmp_path / "a.mp4", grey, options=options))
    index = [59, 0, 33, 33, 7, 8, 34, 58]
    frames = read(dataclasses.replace(source, decoder=decoder), index)
    assert frames.decoder == decoder
    assert frames.index == tuple(index)
    assert frames.timestamps == pytest.approx([i / 10 for i in index])
    assert grey_of(frames.pictures) == pytest.approx([grey[i] for i in index], abs=3)


@pytest.mark.parametrize(("suffix", "open_gop"), [("mp4", 1), ("ts", 0), ("flv", 0)])
def test_decord_is_not_used_where_it_loses_count(
    tmp_path: Path, suffix: str, open_gop: int
) -> None:
    gop = f"keyint=7:bframes=3:min-keyint=1:scenecut=0:open-gop={open_gop}"
    path = write_video(tmp_path / f"a.{suffix}", ramp(60), options={"x264-params": gop})
    assert open_source(path).decoder == "pyav"


@pytest.mark.parametrize(
    ("name", "codec", "fmt"),
    [
        ("a.mkv", "ffv1", "yuv444p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mov", "qtrle", "argb"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.mkv", "libx265", "yuv420p10le"),
        ("a.h264", "libx264", "yuv420p"),
    ],
)
def test_containers_and_codecs_give_every_frame(
    tmp_path: Path, name: str, codec: str, fmt: str
) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    source = open_source(
        write_video(tmp_path / name, ramp(12), codec=codec, fmt=fmt, options=options)
    )
    assert source.num_frames == 12
    assert grey_of(read(source).pictures) == pytest.approx(ramp(12), abs=5)


def test_hidden_frames_of_vp8_are_not_counted(tmp_path: Path) -> None:
    shown = write_video(tmp_path / "shown.webm", ramp(10), codec="libvpx")
    path = tmp_path / "hidden.webm"
    with av.open(str(shown)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for i, packet in enumerate(packet for packet in given.demux(video=0) if packet.size):
            data = bytearray(bytes(packet))
            data[0] &= 0xFF if i != 4 else ~0x10 & 0xFF  # show_frame
            hidden = av.Packet(bytes(data))
            hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
            hidden.is_keyframe = packet.is_keyframe
            hidden.stream = stream
            made.mux(hidden)
    source = open_source(path)
    frames = read(source)
    assert (source.num_frames, frames.decoder) == (9, "pyav")
    assert source.timestamps[4] == pytest.approx(0.5)
    assert grey_of(frames.pictures) == pytest.approx(ramp(10)[:4] + ramp(10)[5:], abs=6)


@pytest.mark.parametrize("decoder", [pytest.param("decord", marks=needs_decord), "pyav"])
@pytest.mark.parametrize(("rotation", "corner"), [(90, (-8, 8)), (-90, (8, -8)), (180, (-8, -8))])
def test_display_rotation_is_applied(
    tmp_path: Path, rotation: int, corner: tuple[int, int], decoder: str
) -> None:
    source = open_source(write_video(tmp_path / "a.mp4", ramp(4), rotation=rotation))
    picture = read(dataclasses.replace(source, decoder=decoder)).pictures[0]
    assert (source.width, source.height) == ((96, 64) if rotation == 180 else (64, 96))
    assert picture.shape == (3, source.height, source.width)
    red, green, _ = picture[:, corner[0], corner[1]].tolist()
    assert red > 200
    assert green < 60


def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path) -> None:
    times = [0, 100, 150, 400, 410, 420, 900, 1000, 1500, 1600]
    source = open_source(write_video(tmp_path / "a.mp4", ramp(10), times=times))
    assert source.timestamps == pytest.approx([time / 1000 for time in times])
    assert sample_evenly(source, 5) == [0, 3, 6, 7, 9]  # at 0, 0.4, 0.8, 1.2, 1.6 s


def test_a_first_frame_after_zero_keeps_its_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", ramp(5), times=[5033, 5133, 5233, 5333, 5433])
    source = open_source(path)
    assert source.timestamps[0] == pytest.approx(5.033)
    assert source.duration == pytest.approx(0.5, abs=0.01)
    assert grey_of(read(source, [4]).pictures) == pytest.approx([ramp(5)[4]], abs=3)


def test_the_largest_stream_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        streams = []
        for size in ((64, 48), (128, 96), (96, 64)):
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            streams.append(stream)
        for _ in range(5):
            for value, stream in enumerate(streams):
                pixels = np.full((stream.height, stream.width, 3), 50 + 70 * value, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    source = open_source(path)
    assert (source.width, source.height) == (128, 96)
    assert grey_of(read(source).pictures) == pytest.approx([120] * 5, abs=3)


def test_a_decord_that_does_not_load_is_replaced_at_read_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_video(tmp_path / "a.mp4", ramp(5)))
    (tmp_path / "decord.py").write_text("raise ImportError('no such library')")
    monkeypatch.setattr(
        child_process, "CHILDREN", child_process._Children()
    )  # started anew, with this path
    monkeypatch.syspath_prepend(str(tmp_path))
    frames = read(dataclasses.replace(source, decoder="decord"))
    assert frames.decoder == "pyav"
    assert frames.warnings == ("a.mp4: PyAV read it, not decord: no such library",)


def test_frames_are_transformed_in_chunks_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune.media.reading._CHUNK_BYTES", 4 * 96 * 64 * 3)
    source = open_source(write_video(tmp_path / "a.mp4", ramp(10)))
    chunks: list[int] = []
    seen: list[tuple[int, int]] = []

    def halved(pictures: torch.Tensor) -> torch.Tensor:
        assert pictures.dtype == torch.uint8
        chunks.append(len(pictures))
        return pictures[:, :, ::2, ::2].float()

    frames = read(source, transform=halved, progress=lambda done, total: seen.append((done, total)))
    assert chunks == [4, 4, 2]
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert frames.pictures.shape == (10, 3, 32, 48)
    assert torch.equal(frames.pictures, read(source).pictures[:, :, ::2, ::2].float())


def test_a_large_frame_is_transformed_before_the_next_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def pictures(
        source: Source, index: list[int], *_: object
    ) -> Iterator[tuple[int, torch.Tensor]]:
        for i in index:
            steps.append(f"decode {i}")
            yield i, torch.zeros(source.height, source.width, 3, dtype=torch.uint8)

    def transform(pixels: torch.Tensor) -> torch.Tensor:
        steps.append(f"transform {len(pixels)}")
        return pixels[:, :, :2, :2].clone()

    for number in range(2):
        Image.new("RGB", (800, 600)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr("vtprune.media.folder.pictures", pictures)
    read(open_source(tmp_path), transform=transform)
    assert steps == ["decode 0", "transform 1", "decode 1", "transform 1"]


@needs_shared
@needs_decord
def test_dense_reading_of_a_large_clip_is_left_to_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtprune.media.decoding._AHEAD_BYTES", 1000)
    source = open_source(SHARED / "videos" / "bottles_40s.mp4", DECORD)
    with pytest.raises(DecordUnfitError, match="it would hold"):
        list(decord_frames(source, list(range(200))))
    assert len(list(decord_frames(source, [0, 19]))) == 2


def test_several_entries_for_each_picture_stay_together(tmp_path: Path) -> None:
    source = open_source(write_video(tmp_path / "a.mp4", ramp(3)))
    tiles = read(source, [2, 0], lambda x: x.repeat_interleave(2, 0)).pictures
    assert torch.equal(tiles, read(source, [2, 2, 0, 0]).pictures)


# Directories


def test_a_directory_of_numbered_pictures_is_a_video_in_natural_order(tmp_path: Path) -> None:
    for i in (10, 9, 1):
        saved(tmp_path / f"f{i}.png", Image.new("RGB", (8, 6), (i, i, i)))
    (tmp_path / "notes.txt").write_text("not a picture")
    source = open_source(tmp_path)
    frames = read(source)
    assert (source.kind, source.decoder, source.fps) == ("video", "directory", 1.0)
    assert source.timestamps == (0.0, 1.0, 2.0)
    assert grey_of(frames.pictures) == [1, 9, 10]


def test_a_directory_of_different_sizes_is_refused_by_file(tmp_path: Path) -> None:
    saved(tmp_path / "1.png", Image.new("RGB", (8, 6)))
    saved(tmp_path / "2.png", Image.new("RGB", (8, 7)))
    with pytest.raises(MediaError, match=r"2\.png: 8 x 7, but 1\.png is 8 x 6"):
        open_source(tmp_path)


def test_a_directory_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="has no pictures"):
        open_source(tmp_path)
    (tmp_path / "inside").mkdir()
    with pytest.raises(MediaError, match="has 1 folder and no pictures"):
        open_source(tmp_path)


def test_a_directory_of_all_sorts_points_to_batch(tmp_path: Path) -> None:
    saved(tmp_path / "1.png", Image.new("RGB", (8, 6)))
    write_video(tmp_path / "a.mp4", [0, 9])
    (warning,) = open_source(tmp_path).warnings
    assert "read as one video of its 1 picture, without the 1 video in it" in warning
    assert f"vtprune batch {tmp_path} -q" in warning
    saved(tmp_path / "2.png", Image.new("RGB", (8, 7)))
    with pytest.raises(MediaError) as refused:
        open_source(tmp_path)
    assert f"vtprune batch {tmp_path} -q" in refused.value.hint


# Sampling


def clip(times: list[float]) -> Source:
    count = len(times)
    return Source(Path("a.mp4"), "video", 8, 8, count, tuple(times), 1.0, float(count), "pyav", ())


TEN = clip([float(i) for i in range(10)])


def test_even_sampling_includes_the_first_and_the_last_frame() -> None:
    assert sample_evenly(TEN, 4) == [0, 3, 6, 9]
    assert sample_evenly(TEN, 3) == [0, 4, 9]  # 4.5 s is as near to 4 as to 5: the earlier
    assert sample_evenly(TEN, 1) == [0]
    assert sample_evenly(TEN) == list(range(10))


def test_even_sampling_between_two_times() -> None:
    assert sample_evenly(TEN, 3, start=2, end=6.5) == [2, 4, 6]
    assert frames_between(TEN, 2, 4) == [2, 3, 4]


def test_sampling_by_fps_begins_at_the_first_frame() -> None:
    assert sample_evenly(TEN, fps=0.5) == [0, 2, 4, 6, 8]
    assert sample_evenly(TEN, fps=0.5, max_frames=2) == [0, 9]
    assert sample_evenly(TEN, fps=1e12) == list(range(10))


def test_a_clip_with_fewer_frames_gives_each_once() -> None:
    assert sample_evenly(clip([0.0, 1.0, 2.0]), 8) == [0, 1, 2]
    assert sample_evenly(clip([0.0]), 8) == [0]


def test_a_long_pause_may_repeat_its_frame() -> None:
    assert sample_evenly(clip([0.0, 0.1, 0.2, 3.0]), 4) == [0, 2, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "frames 0 is out of range"),
        ({"max_frames": 0}, "max-frames 0 is out of range"),
        ({"fps": 0.0}, "fps 0 is out of range"),
        ({"fps": float("nan")}, "fps nan is out of range"),
        ({"num_frames": 2, "fps": 1.0}, "exclude each other"),
        ({"start": 3.0, "end": 3.0}, "start 3 s must be before end 3 s"),
        ({"start": 30.0}, r"no frame from 30 s on; its frames lie from 0.000 to 9.000 s"),
        ({"start": -1.0}, "start -1 is not a time"),
        ({"start": 3.2, "end": 3.4}, "no frame from 3.2 to 3.4 s"),
    ],
)
def test_sampling_that_cannot_be_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(MediaError, match=message):
        sample_evenly(TEN, **options)  # type: ignore[arg-type]


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "missing.mp4", "no such file"),
        (lambda d: "http://example.com/a.mp4", "not a local file"),
        (lambda d: "concat:a.mp4|b.mp4", "not a local file"),
        (lambda d: "/dev/zero", "a device, pipe or socket"),
        (lambda d: "a\0b", "not a file's name"),
    ],
)
def test_what_is_no_regular_file_is_refused(
    tmp_path: Path, make: Callable[[Path], str | Path], message: str
) -> None:
    with pytest.raises(MediaError, match=message) as raised:
        open_source(make(tmp_path))
    assert raised.value.hint


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match="pipe"):
        open_source(tmp_path / "pipe.mp4")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mp4", b"", "the file is empty"),
        ("a.mp4", b"just some text\n" * 9, "not a picture or a video"),
        ("a.txt", b"just some text\n" * 99, "not a picture or a video"),
        ("a.m3u8", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n", "not a picture"),
        ("a.mp4", b"ffconcat version 1.0\nfile b.mp4\n", "not a picture or a video"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(99), "not a picture or a video|damaged"),
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(99), "HEIC pictures are not read"),
        ("a.mp4", b"\0\0\0\x18ftypisom" + bytes(99), "no index"),
    ],
)
def test_a_file_that_is_no_media_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    write_video(tmp_path / "b.mp4", ramp(2))
    with pytest.raises(MediaError, match=message) as raised:
        read(open_source(tmp_path / name))
    assert name in raised.value.message
    assert raised.value.hint


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 6, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT")
    with pytest.raises(MediaError, match="3,600,000,000 pixels is over the limit") as raised:
        open_source(tmp_path / "a.png")
    assert "max_pixels" in raised.value.hint


def test_max_pixels_bounds_pictures_and_frames(tmp_path: Path) -> None:
    files = [
        saved(tmp_path / "a.png", Image.new("RGB", (96, 64))),
        moving_square(tmp_path / "a.gif"),
        write_video(tmp_path / "a.mp4", ramp(2)),
    ]
    for path in files:
        with pytest.raises(MediaError, match="over the limit of 2,000"):
            open_source(path, Limits(max_pixels=2000))
    assert len(open_sources(files, Limits(max_pixels=96 * 64))) == 3


def test_reading_a_picture_leaves_pillows_settings_alone(tmp_path: Path) -> None:
    from PIL import ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    random = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = cut(saved(tmp_path / "a.png", Image.fromarray(random)))
    read(open_source(path), limits=PARTIAL)
    after = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    assert before == after


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_is_read_only_if_allowed(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    source = open_source(cut(saved(tmp_path / f"a.{suffix}", Image.fromarray(random))))
    with pytest.raises(MediaError, match="damaged") as raised:
        read(source)
    assert "--allow-partial" in raised.value.hint
    frames = read(source, limits=PARTIAL)
    assert frames.pictures.shape == (1, 3, 64, 64)
    assert "only a part" in frames.warnings[0]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "gif"])
def test_a_truncated_video_is_read_only_if_allowed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    cut(moving_square(path) if suffix == "gif" else noise(path))
    with pytest.raises(MediaError, match="cut short") as raised:
        open_source(path)
    assert "--allow-partial" in raised.value.hint
    frames = read(open_source(path, PARTIAL), limits=PARTIAL)
    assert frames.decoder == "pyav"
    assert 0 < len(frames.index) < 40
    assert len(frames.pictures) == len(frames.index) == len(frames.timestamps)
    assert "cut short" in frames.warnings[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no sparse files")
@pytest.mark.parametrize("name", ["a.h264", "a.flv", "a.ts", "a.mkv", "a.avi", "a.mp4"])
def test_zeros_behind_a_video_are_not_read(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, ramp(12), codec="mpeg4" if name == "a.avi" else "libx264")
    before = read(open_source(path))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 29))
    started = time.monotonic()
    after = read(open_source(path))
    assert torch.equal(after.pictures, before.pictures)
    assert (after.timestamps, after.warnings) == (before.timestamps, before.warnings)
    assert time.monotonic() - started < 8  # over 20 before, and refused


def test_black_frames_at_the_end_of_plain_pixels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    write_video(path, [*ramp(4), 0, 0], (320, 240), codec="rawvideo", fmt="rgb24")
    data = path.read_bytes().rpartition(b"idx1")[0][:-200_000] + bytes(200_000)
    path.write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
    assert open_source(path).num_frames == 6


def test_a_hole_in_a_video_is_an_error_at_the_frame_that_needs_it(tmp_path: Path) -> None:
    path = noise(tmp_path / "a.mp4")
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] + bytes(len(data) - half))
    source = open_source(path)
    assert len(read(source, [0, 1]).index) == 2
    with pytest.raises(MediaError, match=r"frame \d+ of 40 does not decode"):
        read(source)
    frames = read(source, limits=PARTIAL)
    assert len(frames.pictures) == len(frames.index) < 40
    assert "do not decode" in frames.warnings[0]


def test_frames_out_of_range_and_no_frames_are_refused(tmp_path: Path) -> None:
    source = open_source(write_video(tmp_path / "a.mp4", ramp(3)))
    with pytest.raises(MediaError, match="frame 3 is out of range"):
        read(source, [0, 3])
    with pytest.raises(MediaError, match="no frame is asked for"):
        read(source, [])


def test_more_raw_pictures_than_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune.media.reading._UNRESIZED_BYTES", 1000)
    source = open_source(write_video(tmp_path / "a.mp4", ramp(3)))
    with pytest.raises(MediaError, match="3 frames of 96 x 64 take"):
        read(source)


# The shared files


@needs_shared
@pytest.mark.parametrize(
    "path",
    sorted((SHARED / "videos").glob("*")) + sorted((SHARED / "images").glob("*")),
    ids=lambda path: path.name,
)
def test_every_shared_file_is_read(path: Path) -> None:
    source = open_source(path)
    index = sample_evenly(source, 4)
    frames = read(source, index, lambda x: x[:, :, ::4, ::4].clone())
    assert frames.index == tuple(index)
    assert frames.decoder == source.decoder
    assert frames.pictures.float().std() > 1


@needs_shared
@needs_decord
@pytest.mark.parametrize(
    "name",
    [
        "alphabet_blocks_720p.mp4",
        "asl_book.mkv",
        "bbb_square_642_vp9.webm",
        "bottles_40s.mp4",
        "earth_night.avi",
        "nasa_13013_multistream.mp4",
        "one_by_one_139s.mp4",
        "rotated90_hevc_hlg_1080p.mp4",
    ],
)
def test_decord_and_pyav_number_frames_alike(name: str) -> None:
    source = open_source(SHARED / "videos" / name)
    last = source.num_frames - 1
    index = sorted({0, 1, last // 3, last // 2, last - 1, last})
    one, other = (
        read(dataclasses.replace(source, decoder=decoder), index) for decoder in ("decord", "pyav")
    )
    assert (one.decoder, other.decoder) == ("decord", "pyav")
    worst = (one.pictures.int() - other.pictures.int()).abs().max()
    assert worst <= (8 if "hevc" in name else 0)  # 10 bits are rounded differently


@needs_shared
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("videos/rotated90_hevc_hlg_1080p.mp4", (1080, 1920)),
        ("videos/nasa_13013_multistream.mp4", (480, 270)),
        ("images/exif6_waterfall_1200x1800.jpg", (1800, 1200)),
    ],
)
def test_shared_files_have_their_displayed_size(name: str, size: tuple[int, int]) -> None:
    source = open_source(SHARED / name)
    assert (source.width, source.height) == size


@needs_shared
def test_bad_files_give_one_error_and_no_noise() -> None:
    script = (
        "import sys\n"
        "from vtprune.errors import MediaError\n"
        "from vtprune.media import open_source, read\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        read(open_source(path))\n"
        "    except MediaError as error:\n"
        "        assert error.hint and path in error.message, error\n"
        "        print('refused')\n"
    )
    files = sorted(str(path) for path in (SHARED / "bad").iterdir())
    done = subprocess.run(
        [sys.executable, "-c", script, *files],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.splitlines() == ["refused"] * len(files)
    assert done.stderr == ""
