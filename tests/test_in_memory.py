"""Media in memory: the same pixels as of files, under the same limits, wherever media are taken."""

from __future__ import annotations

import gc
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from vtprune.errors import MediaError
from vtprune.media import Clip, Limits, Stored, media_list, open_source, read

SHORT = vtprune.Generation(max_new_tokens=2)


def pixels_of(medium: Any, limits: Limits | None = None) -> torch.Tensor:
    limits = limits or Limits()
    return read(open_source(medium, limits), limits=limits).pictures


FORMS: dict[str, Callable[[Path], Any]] = {
    "Pillow": Image.open,
    "loaded": lambda path: Image.open(path).copy(),
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "array": lambda path: np.array(Image.open(path)),
    "reversed": lambda path: np.array(Image.open(path))[..., ::-1][..., ::-1],
    "tensor": lambda path: torch.from_numpy(np.array(Image.open(path))),
    "stored": lambda path: Stored("a.parquet#1", path.read_bytes),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_in_memory_has_the_pixels_of_its_file(picture: Path, form: str) -> None:
    medium = FORMS[form](picture)
    source, of_file = open_source(medium), open_source(picture)
    assert (source.kind, source.width, source.height) == ("image", of_file.width, of_file.height)
    assert torch.equal(pixels_of(medium), pixels_of(picture))
    assert torch.equal(pixels_of(medium), pixels_of(picture)), "it can be read again"
    assert media_list(medium) == [medium] if form not in ("array", "reversed", "tensor") else True


def test_the_orientation_of_a_pillow_picture_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(path, exif=exif)
    source = open_source(Image.open(path))
    assert (source.width, source.height) == (40, 60)
    assert torch.equal(pixels_of(Image.open(path)), pixels_of(path))


def test_an_array_of_frames_is_a_video_and_a_clip_has_its_rate() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)
    source = open_source(frames)
    assert (source.kind, source.num_frames, source.timestamps) == ("video", 5, (0, 1, 2, 3, 4))
    assert torch.equal(read(source, [4, 1]).pictures,
                       torch.from_numpy(frames[[4, 1]]).permute(0, 3, 1, 2))  # fmt: skip
    clip = open_source(Clip([Image.fromarray(frame) for frame in frames], fps=25))
    assert (clip.timestamps[1], clip.duration, clip.fps) == (0.04, 0.2, 25)
    assert torch.equal(read(clip).pictures, read(source).pictures)
    assert open_source(frames) == source
    assert open_source(frames + np.uint8(1)) != source


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "floats": (lambda: np.zeros((4, 4, 3)), "an array of float64, but pixels are uint8"),
    "channels first": (lambda: np.zeros((3, 8, 9), np.uint8), r"of shape \(3, 8, 9\) is no pict"),
    "grey": (lambda: np.zeros((8, 9), np.uint8), r"of shape \(8, 9\) is no picture"),
    "empty": (lambda: np.zeros((0, 8, 9, 3), np.uint8), "is no picture and no video"),
    "large": (lambda: np.zeros((200, 200, 3), np.uint8), "40,000 pixels is over the limit"),
    "large Pillow": (lambda: Image.new("L", (200, 200)), "40,000 pixels is over the limit"),
    "animated": (lambda: Image.open(animation()), "has 3 frames or pages"),
    "sizes": (lambda: Clip([Image.new("L", (4, 4)), Image.new("L", (5, 4))]), "frame 1 is 5 x 4"),
    "no frame": (lambda: Clip(["a.png"]), "is no picture"),  # type: ignore[list-item]
    "no bytes": (lambda: b"", "bytes: it holds no bytes"),
    "text": (lambda: io.StringIO("text"), "the file is opened as text"),
    "closed": (lambda: closed(), "can't be read"),
    "no media": (lambda: b"neither", "bytes: a text file, not a picture or a video"),
    "too many bytes": (lambda: b"x" * 100_001, "more than the limit of 100,000 bytes"),
}


def animation() -> io.BytesIO:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    file.seek(0)
    return file


def closed() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_is_refused_with_the_reason(kind: str) -> None:
    make, message = BAD[kind]
    with pytest.raises(MediaError, match=message) as raised:
        open_source(make(), Limits(max_pixels=30_000, max_bytes=100_000))
    assert raised.value.hint
    assert "/tmp" not in raised.value.message


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_clip_without_a_rate_is_refused(fps: float) -> None:
    with pytest.raises(MediaError, match="must be above 0"):
        Clip([Image.new("L", (4, 4))], fps)


def test_the_temporary_file_of_bytes_goes_with_its_source(picture: Path) -> None:
    source = open_source(picture.read_bytes())
    path = source.path
    assert path.is_file()
    del source
    gc.collect()
    assert not path.parent.exists()


def test_media_in_memory_are_answered_like_their_files(
    loaded: vtprune.Loaded, picture: Path
) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), np.uint8)
    items: list[Any] = [
        (picture, "what?"),
        (Image.open(picture), "what?"),
        (picture.read_bytes(), "what?"),
        (np.zeros((3, 8, 9), np.uint8), "what?"),
        ([Image.open(picture), picture], "what?"),
        (clip, "what?"),
        (7, "what?"),
        "no pair",
        (picture, 5),
        ([picture, picture], "what?"),
    ]
    reports = vtprune.answer(loaded, items, keep=0.4, generation=SHORT)
    good = [True, True, True, False, True, True, False, False, False, True]
    assert [report.error is None for report in reports] == good
    assert reports[1].answer == reports[2].answer == reports[0].answer
    assert reports[1].input.files == [str(picture)]
    assert reports[2].input.files[0].startswith("bytes-")
    assert reports[4].tokens == reports[9].tokens
    assert reports[4].input.modality == "image"
    assert reports[5].input.modality == "video"
    assert "the item is 'no pair', but must be media and a question" in str(reports[7].error)
    kept = reports[5].kept_tokens
    assert kept is not None
    assert not kept.media[0].source.in_memory, "a report keeps no pixels"
    assert vtprune.draw(reports[5]).png().startswith(b"\x89PNG")
    assert vtprune.draw([reports[2], reports[2]]).png().startswith(b"\x89PNG")


def test_every_function_takes_media_in_memory(loaded: vtprune.Loaded, picture: Path) -> None:
    medium = picture.read_bytes()
    explained = vtprune.explain(loaded, medium, "what?", by="attention", generation=SHORT)
    assert explained.answer == vtprune.explain(loaded, picture, "what?", by="attention",
                                               generation=SHORT).answer  # fmt: skip
    compared = vtprune.compare_methods(
        loaded, np.array(Image.open(picture)), "what?", ["random"], [0.5], repeats=0,
        generation=SHORT,
    )  # fmt: skip
    assert compared.rows[0].answer == explained.answer


def test_pieces_of_an_answer_are_heard_and_iterated(loaded: vtprune.Loaded, picture: Path) -> None:
    generation = vtprune.Generation(max_new_tokens=6)
    pieces: list[str] = []
    report = vtprune.ask(loaded, picture, "what?", generation=generation, on_text=pieces.append)
    assert "".join(pieces).strip() == report.answer
    heard: dict[int, str] = {}
    items = [(picture, "what?"), ("none.png", "what?"), (picture, "which one is it?")]
    reports = vtprune.answer(
        loaded, items, generation=generation,
        on_text=lambda number, text: heard.update({number: heard.get(number, "") + text}),
    )  # fmt: skip
    assert {number: text.strip() for number, text in heard.items()} == {
        number: reports[number].answer for number in (0, 2)
    }
    with vtprune.stream(loaded, picture, "what?", generation=generation) as stream:
        assert "".join(stream).strip() == report.answer
        assert stream.report.tokens == report.tokens


def test_a_stream_takes_what_an_answer_takes(loaded: vtprune.Loaded, picture: Path) -> None:
    taken = [set(inspect.signature(each).parameters) for each in (vtprune.ask, vtprune.stream)]
    assert taken[0] - taken[1] == {"compare", "on_text"}
    generation = vtprune.Generation(max_new_tokens=3)
    with vtprune.stream(loaded, picture, "what?", tokens_after=4, generation=generation) as stream:
        list(stream)
        assert stream.report.tokens.stages[0].after == 4


def test_a_stream_raises_the_error_and_can_be_closed(loaded: vtprune.Loaded, picture: Path) -> None:
    with pytest.raises(MediaError, match=r"none\.png"):
        list(vtprune.stream(loaded, "none.png", "what?"))
    long = vtprune.Generation(max_new_tokens=10_000)
    with vtprune.stream(loaded, picture, "what?", generation=long) as stream:
        next(stream)
    with pytest.raises(RuntimeError, match="closed before the answer ended"):
        _ = stream.report
