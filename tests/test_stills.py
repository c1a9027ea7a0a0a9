"""Pictures and pages from anywhere: right pixels, clear refusals, bounded memory and time."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw, TiffImagePlugin

from vtprune.cli import cli
from vtprune.errors import MediaError
from vtprune.media import (
    Limits,
    child_process,
    file_name,
    open_source,
    open_sources,
    pages,
    read,
    stop_reading,
)
from vtprune.media.child_process import CHILDREN
from vtprune.media.source import page_ranges

PARTIAL = Limits(allow_partial=True)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
ROOT = Path(__file__).parents[1]
SAVED = Image.registered_extensions()  # by this Pillow: AVIF from 11.3 on


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A picture of which no part looks like another."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def page_of_text() -> Image.Image:
    """Black lines on white, as a fax has them."""
    page = Image.new("1", (400, 300), 1)
    draw = ImageDraw.Draw(page)
    for i, y in enumerate(range(10, 290, 12)):
        draw.rectangle((10, y, 120 + i * 9, y + 5), fill=0)
    return page


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def pixels(path: Path | str, limits: Limits = Limits()) -> npt.NDArray[np.uint8]:
    """The one picture of a file, (H, W, 3)."""
    return read(open_source(path, limits), limits=limits).pictures[0].permute(1, 2, 0).numpy()


def jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "options"),
    [("png", {}), ("webp", {"lossless": True}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})],
)
def test_every_orientation_gives_the_upright_picture(
    tmp_path: Path, suffix: str, options: dict[str, object], orientation: int
) -> None:
    # How a picture that is upright is stored under each orientation, by the EXIF standard.
    stored_as = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright, turn = noise(), stored_as[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    tags = {"tiffinfo" if suffix == "tif" else "exif": Image.Exif()}
    next(iter(tags.values()))[274] = orientation
    path = saved(tmp_path / f"a.{suffix}", stored, **options, **tags)
    source = open_source(path)
    assert (source.width, source.height) == upright.size
    np.testing.assert_array_equal(pixels(path), np.asarray(upright))


def test_a_turned_jpeg_has_the_size_and_pixels_that_are_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = saved(tmp_path / "a.jpg", noise(), exif=exif)
    stored = pixels(saved(tmp_path / "b.jpg", noise()))
    assert (open_source(path).width, open_source(path).height) == (30, 40)
    np.testing.assert_array_equal(pixels(path), np.rot90(stored, -1))


def test_an_animation_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 8
    frames = [noise(seed=i) for i in range(3)]
    path = tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True, exif=exif)
    source = open_source(path)
    assert (source.width, source.height) == (30, 40)
    for frame, picture in zip(frames, read(source).pictures, strict=True):
        np.testing.assert_array_equal(picture.permute(1, 2, 0), np.rot90(np.asarray(frame), 1))


# Pages


@pytest.fixture
def three_pages(tmp_path: Path) -> Path:
    pages = [Image.new("RGB", (64, 48), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / "pages.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def colours(path: Path, limits: Limits = Limits()) -> list[tuple[int, ...]]:
    """The colour in the middle of every page."""
    found = []
    for source in open_sources([path], limits):
        picture = read(source, limits=limits).pictures[0]
        found.append(tuple(picture[:, source.height // 2, source.width // 2].tolist()))
    return found


def test_every_page_of_a_tiff_is_a_picture(three_pages: Path) -> None:
    sources = open_sources([three_pages])
    assert [source.kind for source in sources] == ["image"] * 3
    assert [source.name for source in sources] == [f"{three_pages}#page={i}" for i in (1, 2, 3)]
    assert colours(three_pages) == [RED, GREEN, BLUE]


def test_pages_are_chosen_in_the_order_given(three_pages: Path) -> None:
    assert colours(three_pages, Limits(pages="3,1-2")) == [BLUE, RED, GREEN]
    assert colours(three_pages, Limits(pages="2-")) == [GREEN, BLUE]
    assert tuple(pixels(three_pages, Limits(pages="2"))[0, 0]) == GREEN


def test_one_source_of_a_file_with_pages_is_refused(three_pages: Path) -> None:
    with pytest.raises(MediaError, match="3 pages, each a picture of its own"):
        open_source(three_pages)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"pages": "2-4"}, "the file has 3 pages, no page 4"),
        ({"pages": "1-2,2"}, "--pages 1-2,2 names page 2 twice"),
        ({"max_pages": 2}, "3 pages are over the limit of 2"),
        ({"pages": "1,2-", "max_pages": 2}, "3 pages are over the limit of 2"),
        ({"max_pixels": 1000}, "3,072 pixels is over the limit of 1,000"),
    ],
)
def test_pages_that_cannot_be_read_are_refused(
    three_pages: Path, limits: dict[str, object], message: str
) -> None:
    with pytest.raises(MediaError, match=message) as raised:
        open_sources([three_pages], Limits(**limits))  # type: ignore[arg-type]
    assert str(three_pages) in raised.value.message
    assert raised.value.hint


def test_pages_are_read_as_they_are_written() -> None:
    assert page_ranges("1-3, 7,9-") == [(1, 3), (7, 7), (9, None)]


@pytest.mark.parametrize("text", ["", "0", "-3", "3-1", "a", "1,,2", "1-2-3", "1" * 12, "\u0661"])
def test_pages_in_another_form_are_refused(text: str) -> None:
    with pytest.raises(MediaError, match="can't be read"):
        Limits(pages=text)


def test_pages_of_files_without_pages_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", noise())
    with pytest.raises(MediaError, match="no file has pages to choose from"):
        open_sources([path], Limits(pages="1"))


def test_smaller_copies_of_a_page_are_no_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with TiffImagePlugin.AppendingTiffWriter(path) as file:
        noise().save(file, "TIFF")
        file.newFrame()
        noise(20, 15).save(file, "TIFF", tiffinfo={254: 1})  # NewSubfileType: reduced resolution
        file.newFrame()
    assert [(one.width, one.height) for one in open_sources([path])] == [(40, 30)]


def test_a_raw_picture_of_a_camera_is_not_its_preview(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nef", noise(), format="TIFF", tiffinfo={254: 1, 330: 8})
    with pytest.raises(MediaError, match="a camera's raw picture"):
        open_source(path)


def test_the_sum_of_all_pages_is_bounded(
    three_pages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_TOTAL", 2)
    with pytest.raises(MediaError, match="3 pages of together 9,216 pixels are over the limit"):
        open_sources([three_pages], Limits(max_pixels=3072))


def test_ask_names_the_pages_and_reads_file_addresses(three_pages: Path) -> None:
    address = three_pages.as_uri()
    result = CliRunner().invoke(cli, ["ask", address, "which colour?", "--pages", "1,3", "--json"])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)["input"]
    assert told["files"] == [f"{three_pages}#page=1", f"{three_pages}#page=3"]
    assert (told["width"], told["height"], told["tiles"]) == (64, 48, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--pages", "0"], "pages '0' can't be read"), (["--dpi", "5"], "--dpi 5 is out of range")],
)
def test_page_options_out_of_range_are_refused(
    three_pages: Path, options: list[str], message: str
) -> None:
    result = CliRunner().invoke(cli, ["ask", str(three_pages), "what?", *options])
    assert result.exit_code == 1
    assert message in result.stderr


# PDF


def pdf(path: Path, boxes: list[str], content: bytes = b"1 0 0 rg 0 0 36 72 re f") -> Path:
    """A PDF, written by hand, with a page of every media box; their left half is red."""
    kids = " ".join(f"{5 + i} 0 R" for i in range(len(boxes)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {len(boxes)}/Kids[{kids}]>>".encode(),
        b"<<>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        *(f"<</Type/Page/Parent 2 0 R/MediaBox[{box}]/Contents 4 0 R>>".encode() for box in boxes),
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj" % number + body + b"endobj\n"
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table
    data += b"trailer<</Size %d/Root 1 0 R%%s>>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        len(data) - len(table) - len(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)),
    )
    path.write_bytes(data.replace(b"%s>>", b">>"))
    return path


needs_pdfium = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("pypdfium2"),
    reason="pypdfium2 is not installed",
)


@needs_pdfium
def test_pdf_pages_are_pictures_of_their_size_at_the_dpi(tmp_path: Path) -> None:
    path = pdf(tmp_path / "a.pdf", ["0 0 72 72", "0 0 144 36"])
    sources = open_sources([path])
    assert [(one.kind, one.width, one.height, one.decoder) for one in sources] == [
        ("image", 144, 144, "pdfium"),
        ("image", 288, 72, "pdfium"),
    ]
    first = pixels(path, Limits(pages="1", dpi=72))
    expected = np.full((72, 72, 3), 255, np.uint8)
    expected[:, :36] = RED
    np.testing.assert_array_equal(first, expected)


@needs_pdfium
def test_a_pdf_of_jpegs_is_pages_and_no_video(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (64, 48), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / "a.pdf"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    found = np.array(colours(path))
    assert np.abs(found - np.array([RED, GREEN, BLUE])).max() <= 2  # of JPEG


@needs_pdfium
def test_a_blank_page_is_told(tmp_path: Path) -> None:
    frames = read(open_source(pdf(tmp_path / "a.pdf", ["0 0 72 72"], b"")))
    assert frames.warnings == ("a.pdf: nothing is drawn on page 1: all of it is white",)


@needs_pdfium
@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (["0 0 1000000000 1000000000"], r"page 1 at 144 dpi: .* pixels is over the limit"),
        (["0 0 14400 14400"], "28,800 x 28,800 pixels is over the limit"),
        (["0 0 72 72"] * 10_000, "10,000 pages are over the limit of 64"),
        ([], "the PDF is damaged, or has no pages"),
    ],
    ids=["absurd", "large", "many", "none"],
)
def test_absurd_pdfs_are_refused_before_they_are_drawn(
    tmp_path: Path, boxes: list[str], message: str
) -> None:
    with pytest.raises(MediaError, match=message) as raised:
        open_sources([pdf(tmp_path / "a.pdf", boxes)])
    assert raised.value.hint


@needs_pdfium
def test_one_of_very_many_pages_is_read(tmp_path: Path) -> None:
    path = pdf(tmp_path / "a.pdf", ["0 0 72 72"] * 10_000)
    assert open_source(path, Limits(pages="9999")).name.endswith("#page=9999")


@needs_pdfium
def test_a_password_and_damage_are_told(tmp_path: Path) -> None:
    path = pdf(tmp_path / "a.pdf", ["0 0 72 72"])
    data = path.read_bytes()
    lock = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O(%s)/U(%s)>>/ID[(a)(a)]" % (
        b"o" * 32,
        b"u" * 32,
    )
    (tmp_path / "locked.pdf").write_bytes(data.replace(b"/Root 1 0 R", b"/Root 1 0 R" + lock))
    with pytest.raises(MediaError, match="the PDF asks for a password"):
        open_source(tmp_path / "locked.pdf")
    (tmp_path / "cut.pdf").write_bytes(data[:100])
    with pytest.raises(MediaError, match="the PDF is damaged"):
        open_source(tmp_path / "cut.pdf")


def test_without_the_extra_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pypdfium2.py").write_text("raise ImportError('not installed')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(child_process, "CHILDREN", child_process._Children())  # none is started
    with pytest.raises(MediaError, match="reading PDF pages needs pypdfium2") as raised:
        open_source(pdf(tmp_path / "a.pdf", ["0 0 72 72"]))
    assert "pip install 'vtprune[pdf]'" in raised.value.hint
    child_process.CHILDREN.end()


# What a file is


def zipped(name: str, inside: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, inside)
    return data.getvalue()


PICTURE = jpeg(noise(64, 48)) * 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", zipped("word/media/1.jpg", PICTURE), "a Word document"),
        ("a.xlsx", zipped("xl/media/1.jpg", PICTURE), "an Excel sheet"),
        ("a.pptx", zipped("ppt/media/1.jpg", PICTURE), "a PowerPoint presentation"),
        ("a.zip", zipped("1.jpg", PICTURE), "a ZIP archive"),
        ("a.eml", b"From: a@example.com\n\nhi\n" + PICTURE, "an e-mail"),
        ("a.eml", b"MIME-Version: 1.0\nSubject: x\n\n" + PICTURE, "an e-mail"),
        ("a.html", b"<!DOCTYPE html><html>" + PICTURE, "a web page"),
        ("a.svg", b"<?xml version='1.0'?>\n<svg xmlns='x'></svg>", "an SVG drawing"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + PICTURE, "a Microsoft Office document"),
        ("a.tar", b"1.jpg".ljust(257, b"\0") + b"ustar\0" + bytes(250) + PICTURE, "a tar archive"),
        ("a.bin", b"\x80\x81\x82\x83" + PICTURE, "not a picture or a video"),
        ("a.mp4", "Grüße,\ntext only.\n".encode(), "a text file"),
        ("a.jxl", b"\xff\x0a" + bytes(99), "a JPEG XL picture"),
        ("a.psd", b"8BPS" + bytes(99), "a Photoshop file"),
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(99), "HEIC pictures are not read"),
        ("a.cr2", b"II*\0\x10\0\0\0CR\x02\0" + bytes(99), "a camera's raw picture"),
        ("a.mp3", b"\xff\xfb\x90\x00" + bytes(99), "a sound file"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript file"),
    ],
)
def test_a_file_that_only_holds_pictures_is_refused_by_what_it_is(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=message) as raised:
        open_source(tmp_path / name)
    assert str(tmp_path / name) in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("padding", [b"", b"\0\0", b"\xff\xff\xff"])
def test_raw_motion_jpeg_is_a_video(tmp_path: Path, padding: bytes) -> None:
    path = tmp_path / "a.mjpeg"
    frames = [Image.new("RGB", (64, 48), (i * 20,) * 3) for i in range(12)]
    path.write_bytes(padding.join(map(jpeg, frames)))
    source = open_source(path)
    assert (source.kind, source.num_frames) == ("video", 12)
    greys = read(source).pictures[:, 1, 24, 32].tolist()
    assert greys == pytest.approx([i * 20 for i in range(12)], abs=2)


def with_mpf(data: bytes) -> bytes:
    """A JPEG that says, as phones' do, that further pictures follow it."""
    segment = b"MPF\0" + bytes(40)
    return data[:2] + b"\xff\xe2" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


@pytest.mark.parametrize(
    "behind",
    [b"", bytes(5000), b"junk" * 99, jpeg(noise(16, 12)), b"\0\0\0\x18ftypmp42" + bytes(99)],
    ids=["nothing", "zeros", "junk", "preview", "motion-photo"],
)
def test_a_jpeg_with_something_behind_it_is_a_picture(tmp_path: Path, behind: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(noise(64, 48)) + behind)
    assert open_source(path).kind == "image"
    assert pixels(path).shape == (48, 64, 3)


def test_a_second_picture_that_the_first_one_lists_is_no_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(with_mpf(jpeg(noise(64, 48))) + jpeg(noise(64, 48)))
    assert open_source(path).kind == "image"


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path: Path) -> None:
    data = io.BytesIO()
    noise(64, 48).save(data, "JPEG", progressive=True)
    content = data.getvalue()
    start = content.rindex(b"\xff\xda")  # the last scan, once more and once more
    (tmp_path / "a.jpg").write_bytes(content[:start] + content[start:-2] * 600 + content[-2:])
    with pytest.raises(MediaError, match="more than 500 scans"):
        pixels(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mpg", "mpeg2video", None), ("a.m2v", "mpeg2video", "mpeg2video"),
        ("a.m2ts", "mpeg2video", "mpegts"), ("a.mxf", "mpeg2video", None),
        ("a.m4v", "mpeg4", "m4v"), ("a.nut", "mpeg4", None), ("a.ivf", "libvpx", None),
        ("a.wmv", "wmv2", None), ("a.y4m", "wrapped_avframe", "yuv4mpegpipe"),
    ],
)  # fmt: skip
def test_videos_are_told_by_their_first_bytes(
    tmp_path: Path, name: str, codec: str, container: str | None
) -> None:
    with av.open(str(tmp_path / name), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(6):
            grey = np.full((64, 96, 3), i * 20, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        file.mux(stream.encode(None))
    (tmp_path / name).rename(tmp_path / "a.bin")
    source = open_source(tmp_path / "a.bin")
    assert (source.kind, source.num_frames) == ("video", 6)


# Addresses


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    path = saved(tmp_path / "ä b%.png", noise())
    for address in (path.as_uri(), path.as_uri().replace("file://", "file://localhost")):
        assert file_name(address) == str(path)
        np.testing.assert_array_equal(pixels(address), np.asarray(noise()))
    assert file_name("plain.png") == "plain.png"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file://server/a.png", "a file on server, not on this machine"),
        ("file:///a.pdf#page=2", "an address of a file ends with its path"),
        ("https://example.com/a.png", "not a local file"),
        ("file:///no/such/file.png", "no such file"),
    ],
)
def test_other_addresses_are_refused(address: str, message: str) -> None:
    with pytest.raises(MediaError, match=message) as raised:
        open_source(address)
    assert raised.value.hint


def test_a_questions_file_may_name_files_by_address(tmp_path: Path) -> None:
    from vtprune.inference.questions_file import read_questions

    path = saved(tmp_path / "a b.png", noise())
    line = json.dumps({"file": path.as_uri(), "question": "what?"})
    (tmp_path / "q.jsonl").write_text(line)
    assert read_questions(tmp_path / "q.jsonl")[0].file == path


# Deep pixels


def grey16(values: object) -> Image.Image:
    return Image.fromarray(np.asarray(values, np.uint16))


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_few_bits_in_sixteen_are_scaled_with_a_warning(
    tmp_path: Path, suffix: str, bits: int
) -> None:
    top = 2**bits - 1
    path = saved(tmp_path / f"a.{suffix}", grey16([[0, top // 2, top]]))
    frames = read(open_source(path))
    assert frames.pictures[0, 0, 0].tolist() == [0, round(top // 2 / top * 255), 255]
    assert f"read as {bits} bits, {top:,} is white" in frames.warnings[0]


def test_sixteen_bits_are_scaled_by_their_range(tmp_path: Path) -> None:
    frames = read(open_source(saved(tmp_path / "a.png", grey16([[0, 257, 30000, 65535]]))))
    assert frames.pictures[0, 0, 0].tolist() == [0, 1, 117, 255]
    assert frames.warnings == ()


def test_black_stays_black(tmp_path: Path) -> None:
    frames = read(open_source(saved(tmp_path / "a.png", grey16(np.zeros((4, 4))))))
    assert int(frames.pictures.max()) == 0
    assert frames.warnings == ()


def test_twelve_bits_that_the_file_states_need_no_warning(tmp_path: Path) -> None:
    packed = bytes([0x00, 0x08, 0x00])  # 0 and 2048, 12 bits each
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8),
            (277, 3, 1), (278, 3, 1), (279, 4, 3)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<I", 12) + packed + b"\0"
    (tmp_path / "a.tif").write_bytes(data + struct.pack("<H", len(tags)) + entries + bytes(4))
    frames = read(open_source(tmp_path / "a.tif"))
    assert frames.pictures[0, 0, 0].tolist() == [0, round(2048 / 4095 * 255)]
    assert frames.warnings == ()


def test_floats_out_of_any_range_are_shown_by_their_own_with_a_warning(tmp_path: Path) -> None:
    values = np.array([[-10, np.nan, 0, 30, np.inf]], np.float32)
    frames = read(open_source(saved(tmp_path / "a.tif", Image.fromarray(values))))
    assert frames.pictures[0, 0, 0].tolist() == [0, 64, 64, 255, 255]
    assert "grey values from -10 to 30" in frames.warnings[0]


def png16(path: Path, values: list[int]) -> Path:
    """A PNG of one row of 16-bit RGB, which Pillow does not write."""
    row = b"\0" + b"".join(struct.pack(">HHH", value, value, value) for value in values)
    header = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def test_sixteen_bit_colours_of_few_bits_are_refused(tmp_path: Path) -> None:
    assert pixels(png16(tmp_path / "a.png", [0, 65535])).tolist() == [[[0] * 3, [255] * 3]]
    assert pixels(png16(tmp_path / "b.png", [0, 0])).max() == 0
    with pytest.raises(MediaError, match="16-bit colours are all below 4,096"):
        pixels(png16(tmp_path / "c.png", [0, 4095]))


def test_lab_becomes_rgb(tmp_path: Path) -> None:
    from PIL import ImageCms

    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    image = ImageCms.applyTransform(Image.new("RGB", (4, 4), (200, 60, 30)), transform)
    assert image is not None
    found = pixels(saved(tmp_path / "a.tif", image))[0, 0].tolist()
    assert found == pytest.approx([200, 60, 30], abs=3)


# Damage


def zeroed(path: Path, share: float, length: int = 60) -> Path:
    """Overwrite bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    at = int(len(data) * share)
    data[at : at + length] = bytes(length)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("1", {"compression": "group4"}),
        ("1", {"compression": "group3"}),
        ("RGB", {"compression": "jpeg", "strip_size": 1 << 20}),
        ("RGB", {"compression": "tiff_adobe_deflate"}),
        ("RGB", {"compression": "tiff_lzw"}),
        ("L", {"compression": "packbits"}),
    ],
    ids=lambda value: str(value.get("compression")) if isinstance(value, dict) else value,
)
def test_a_damaged_tiff_is_refused_or_read_with_a_warning(
    tmp_path: Path, mode: str, options: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    image = page_of_text() if mode == "1" else noise(200, 150).convert(mode)
    path = saved(tmp_path / "a.tif", image, **options)
    pixels(path)
    zeroed(path, 0.4, 200 if options["compression"] == "packbits" else 60)
    with pytest.raises(MediaError, match="the picture is damaged") as raised:
        pixels(path)
    assert "--allow-partial" in raised.value.hint
    if options["compression"] in ("group4", "jpeg"):  # of others nothing is decoded
        frames = read(open_source(path), limits=PARTIAL)
        assert frames.pictures.shape == (1, 3, image.height, image.width)
        assert "only a part of the picture is there" in frames.warnings[0]
    assert capfd.readouterr() == ("", "")


def tiff_tag(path: Path, tag: int, value: int) -> Path:
    """Write another value into a TIFF's tag that has one."""
    data = bytearray(path.read_bytes())
    start = int.from_bytes(data[4:8], "little")
    for entry in range(start + 2, start + 2 + 12 * data[start], 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<I", data, entry + 8, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("tag", "value", "message"),
    [
        (273, 1 << 20, "strip or tile 1 of 1 is not in the file"),  # StripOffsets
        (279, 100, "strip or tile 1 of 1 is too short"),  # StripByteCounts
        (278, 40, "1 strips or tiles of 4"),  # RowsPerStrip
    ],
)
def test_strips_that_are_not_there_are_told(
    tmp_path: Path, tag: int, value: int, message: str
) -> None:
    path = saved(tmp_path / "a.tif", noise(200, 150), strip_size=1 << 20)
    pixels(path)
    tiff_tag(path, tag, value)
    with pytest.raises(MediaError, match=message):
        pixels(path)
    if tag != 273:
        assert "only a part" in read(open_source(path), limits=PARTIAL).warnings[0]


def test_a_png_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + bytes([i] * 40) for i in range(30))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 30, 8, 0, 0, 0, 0))
    pixel_data = bytearray(chunk(b"IDAT", zlib.compress(rows, 0)))  # stored: any byte decodes
    pixel_data[100] ^= 1
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + bytes(pixel_data) + chunk(b"IEND", b""))
    with pytest.raises(MediaError, match="a wrong checksum"):
        pixels(path)
    assert "only a part" in read(open_source(path), limits=PARTIAL).warnings[0]


def test_what_a_decoder_raises_is_a_media_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.png", noise())
    for error in (OSError, SyntaxError, IndexError, struct.error, zlib.error, EOFError,
                  OverflowError, RecursionError, MemoryError, SystemError):  # fmt: skip

        def fail(*_: object, error: type[Exception] = error) -> None:
            raise error("no")

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(MediaError) as raised:
            pixels(path)
        assert str(path) in raised.value.message


# The process of its own


def test_a_decoder_that_dies_costs_its_file_only(
    three_pages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = child_process._Child.run

    def dying(child: child_process._Child, *args: object) -> object:
        child.popen.kill()
        return run(child, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(child_process._Child, "run", dying)
    with pytest.raises(MediaError, match="the decoder ended with SIGKILL"):
        open_sources([three_pages])
    monkeypatch.undo()
    assert colours(three_pages) == [RED, GREEN, BLUE]


def test_a_decoder_that_does_not_come_back_is_ended(
    three_pages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_sources([three_pages])
    monkeypatch.setattr(pages, "_SECONDS", 1)
    CHILDREN.idle[-1].popen.send_signal(signal.SIGSTOP)  # it answers no more
    with pytest.raises(MediaError, match="the decoder did not come back within 1 s"):
        open_sources([three_pages])
    monkeypatch.undo()
    assert colours(three_pages) == [RED, GREEN, BLUE]


def test_a_wait_for_a_page_is_ended_from_another_thread(three_pages: Path) -> None:
    open_sources([three_pages])
    CHILDREN.idle[-1].popen.send_signal(signal.SIGSTOP)  # it answers no more
    refusals: list[MediaError] = []

    def look() -> None:
        with pytest.raises(MediaError) as raised:
            open_sources([three_pages])
        refusals.append(raised.value)

    thread = threading.Thread(target=look)
    thread.start()
    time.sleep(0.2)
    stop_reading()
    thread.join(timeout=10)  # less than an answer may take
    assert len(refusals) == 1
    assert colours(three_pages) == [RED, GREEN, BLUE]


def test_threads_share_the_process(three_pages: Path) -> None:
    found: list[list[tuple[int, ...]]] = []

    def look() -> None:
        found.extend(colours(three_pages) for _ in range(3))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[RED, GREEN, BLUE]] * 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_starts_a_process_of_its_own(three_pages: Path) -> None:
    open_sources([three_pages])
    used = CHILDREN.idle[-1]
    fork = os.fork()
    if fork == 0:
        right = len(open_sources([three_pages])) == 3 and used not in CHILDREN.idle
        CHILDREN.end()
        os._exit(0 if right else 1)
    assert os.waitpid(fork, 0)[1] == 0
    assert colours(three_pages) == [RED, GREEN, BLUE]
    assert used in CHILDREN.idle


# Memory, time and noise

MEASURE = """
import json, resource, sys, time
from vtprune.errors import VtpruneError
from vtprune.media import Limits, open_sources, read
import torch

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
answers = []
for path in sys.argv[1:]:
    started = time.monotonic()
    try:
        shapes = [tuple(read(source).pictures.shape) for source in open_sources([path])]
    except VtpruneError as error:
        shapes = error.message
    answers.append([shapes, time.monotonic() - started])
print(json.dumps([peak() - before, answers]))
"""


def measured(paths: list[Path]) -> tuple[float, list[tuple[object, float]]]:
    """Megabytes that reading some files takes at its peak, and for each its shapes and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stderr == ""
    peak, answers = json.loads(done.stdout)
    return peak, [(shapes, seconds) for shapes, seconds in answers]


@pytest.mark.skipif(sys.platform == "win32", reason="no sparse files, no resource module")
def test_what_follows_a_picture_takes_neither_memory_nor_time(tmp_path: Path) -> None:
    frames = [noise(seed=i) for i in range(3)]
    paths = []
    names = [
        "a.png",
        "a.jpg",
        "a.webp",
        "a.gif",
        "a.bmp",
        "a.tif",
        "a.ppm",
        "moving.webp",
        "moving.gif",
        "moving.png",
    ]
    for name in [*names, "a.avif"] if ".avif" in SAVED else names:
        moving = {"save_all": True, "append_images": frames[1:], "duration": 100}
        paths.append(saved(tmp_path / name, frames[0], **moving if "moving" in name else {}))
        with paths[-1].open("r+b") as file:
            file.truncate(paths[-1].stat().st_size + (1 << 30))
    peak, answers = measured(paths)
    for path, (shapes, seconds) in zip(paths, answers, strict=True):
        assert shapes == [[3 if "moving" in path.name else 1, 3, 30, 40]], path.name
        assert seconds < 5, path.name  # 30 to over 150 before
    assert peak < 60  # 2,050 before


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_a_large_grey_picture_is_held_once_and_once_as_rgb(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("L", (4000, 4000), 90))
    peak, answers = measured([path])
    assert answers[0][0] == [[1, 3, 4000, 4000]]
    assert peak < 4000 * 4000 * 4 / 2**20 * 1.2  # 1 byte a pixel, and 3; 11 before


def mutations(seed: int) -> Iterator[tuple[str, bytes]]:
    """Small files of every kind that is read, with a few bytes changed, cut off or doubled."""
    image, page = noise(60, 45), page_of_text()
    kinds: list[tuple[str, Image.Image, dict[str, object]]] = [
        ("png", image, {}), ("png", image.quantize(16), {"transparency": 3}), ("jpg", image, {}),
        ("jpg", image, {"progressive": True}), ("webp", image, {}), ("gif", image.quantize(16), {}),
        ("bmp", image, {}), ("ppm", image, {}), ("jp2", image, {}),
        ("tif", image, {}), ("tif", image, {"compression": "jpeg"}),
        ("tif", image, {"compression": "tiff_lzw"}), ("tif", page, {"compression": "group4"}),
        ("tif", page, {"compression": "group3"}), ("tif", image, {"compression": "packbits"}),
    ]  # fmt: skip
    generator = random.Random(seed)
    for suffix, picture, options in itertools.cycle(kinds):
        data = io.BytesIO()
        names = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
        picture.save(data, names.get(suffix, suffix), **options)
        content = bytearray(data.getvalue())
        place = generator.randrange(len(content))
        how = generator.randrange(4)
        if how == 0:
            content = content[: place + 1]
        elif how == 1:
            content[place : place + 20] = bytes(20)
        elif how == 2:
            content[place:place] = content[place : place + 50]
        else:
            for _ in range(3):
                content[generator.randrange(len(content))] = generator.randrange(256)
        yield suffix, bytes(content)


def test_mutated_files_are_read_or_refused_without_noise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    refusals: list[MediaError] = []
    for number, (suffix, content) in enumerate(itertools.islice(mutations(7), 112)):
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(content)
        limits = PARTIAL if number % 3 == 0 else Limits()
        try:
            for source in open_sources([path], limits):
                assert read(source, limits=limits).pictures.dtype == torch.uint8
        except MediaError as error:
            refusals.append(error)
    assert 40 < len(refusals) < 112
    for refusal in refusals:
        assert refusal.hint
        assert "\n" not in refusal.message
        assert "the decoder" not in refusal.message
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
