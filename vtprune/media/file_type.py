"""Tell the type of a file by its first bytes: which reader takes it, or why none does."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vtprune.errors import MediaError
from vtprune.media.file_blocks import is_motion_jpeg
from vtprune.media.source import printable, unreadable

_HEAD = 8192
Reader = Literal["picture", "pages", "video"]


@dataclass(frozen=True)
class FileType:
    """The type of a file that can be read.

    Args:
        reader: "picture": Pillow, in this process; "pages": files of one or several pages, in a
            process of their own; "video": FFmpeg.
        formats: the names that Pillow or FFmpeg knows it by.
    """

    reader: Reader
    formats: tuple[str, ...]


# FFmpeg may only take a file for what its first bytes say: by itself it searches the whole file
# for something that looks like frames, and finds "a video" in a PDF, a mail or an archive.
_ELEMENTARY = FileType("video", ("h264", "hevc", "m4v", "mpeg", "mpegvideo", "h263"))
_SIGNATURES: tuple[tuple[bytes, FileType], ...] = (
    (b"\x89PNG\r\n\x1a\n", FileType("picture", ("PNG",))),
    (b"GIF8", FileType("picture", ("GIF",))),
    (b"qoif", FileType("picture", ("QOI",))),
    (b"II*\0", FileType("pages", ("TIFF",))),
    (b"MM\0*", FileType("pages", ("TIFF",))),
    (b"II+\0", FileType("pages", ("TIFF",))),  # BigTIFF
    (b"MM\0+", FileType("pages", ("TIFF",))),
    (b"\0\0\0\x0cjP  \r\n\x87\n", FileType("pages", ("JPEG2000",))),
    (b"\xff\x4f\xff\x51", FileType("pages", ("JPEG2000",))),
    (b"\x1a\x45\xdf\xa3", FileType("video", ("matroska",))),
    (b"FLV\x01", FileType("video", ("flv",))),
    (b"DKIF", FileType("video", ("ivf",))),
    (b"OggS", FileType("video", ("ogg",))),
    (b".RMF", FileType("video", ("rm",))),
    (b"YUV4MPEG2 ", FileType("video", ("yuv4mpegpipe",))),
    (b"nut/multimedia container\0", FileType("video", ("nut",))),
    (b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02", FileType("video", ("mxf",))),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", FileType("video", ("asf",))),
    (b"\xb7\xd8\x00\x20\x37\x49\xda\x11", FileType("video", ("wtv",))),
    (b"\0\0\x01\xba", FileType("video", ("mpeg",))),
    (b"\0\0\x01", _ELEMENTARY),
    (b"\0\0\0\x01", _ELEMENTARY),
    (b"\x1f\x07\x00", FileType("video", ("dv",))),
    (b"\x12\x00\x0a", FileType("video", ("obu",))),
    *((bytes([0, 0, start]), FileType("video", ("h263",))) for start in range(0x80, 0x84)),
)
_RIFF = {
    b"WEBP": FileType("picture", ("WEBP",)),
    b"AVI ": FileType("video", ("avi",)),
    b"AVIX": FileType("video", ("avi",)),
    b"AMV ": FileType("video", ("avi",)),
}
# Boxes that a QuickTime or MP4 file may begin with.
_BOXES = b"ftyp moov mdat moof free skip wide pnot styp sidx uuid junk pict udta prfl emsg prft"
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_DIB_SIZES = (12, 40, 52, 56, 64, 108, 124)  # of a bitmap's header, by its version
_TS_PACKETS = (188, 192, 204)  # bytes of a transport stream's packet: plain, with time, with parity

_PICTURE = "convert it to JPEG or PNG"
_DOCUMENT = "convert it to PDF, or to pictures"
_UNPACK = "unpack it, and give the files inside"
_SOUND = "sound is not read; give a video or a picture"
# What is no picture, page or video, and the way out.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"\xc5\xd0\xd3\xc6", "an EPS file", _DOCUMENT),
    (b"\xd0\xcf\x11\xe0", "a Microsoft Office document or mail (OLE)", _DOCUMENT),
    (b"AT&TFORM", "a DjVu document", _DOCUMENT),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"8BPS", "a Photoshop file", _PICTURE),
    (b"\x76\x2f\x31\x01", "an OpenEXR picture", _PICTURE),
    (b"#?RADIANCE", "a Radiance HDR picture", _PICTURE),
    (b"\xff\x0a", "a JPEG XL picture", _PICTURE),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture", _PICTURE),
    (b"II\xbc", "a JPEG XR picture", _PICTURE),
    (b"IIRO", "a camera's raw picture", _PICTURE),
    (b"IIU\0", "a camera's raw picture", _PICTURE),
    (b"FUJIFILMCCD-RAW", "a camera's raw picture", _PICTURE),
    (b"\0\0\x01\0", "an icon", _PICTURE),
    (b"\0\0\x02\0", "a cursor", _PICTURE),
    (b"icns", "an icon", _PICTURE),
    (b"DDS ", "a DDS texture", _PICTURE),
    (b"ID3", "a sound file", _SOUND),
    (b"fLaC", "a sound file", _SOUND),
    (b"MThd", "a MIDI file", _SOUND),
    (b"#!AMR", "a sound file", _SOUND),
    (b"\x7fELF", "a program", ""),
    (b"MZ", "a program", ""),
    (b"SQLite format 3", "a database", ""),
    (b"\x93NUMPY", "a numpy array", _PICTURE),
    (b"\x89HDF", "an HDF5 file", _PICTURE),
)
_ZIP = (  # a name inside, what the archive then is
    (b"word/", "a Word document", _DOCUMENT),
    (b"xl/", "an Excel sheet", _DOCUMENT),
    (b"ppt/", "a PowerPoint presentation", _DOCUMENT),
    (b"epub+zip", "an EPUB book", _DOCUMENT),
    (b"vnd.oasis.opendocument", "an OpenDocument file", _DOCUMENT),
    (b"[Content_Types].xml", "a Microsoft Office document", _DOCUMENT),
)
_WEB = ("a web page (HTML)", "save it as a PDF, or take a screenshot")
_TEXTS = (  # a beginning in lower case
    (b"%!ps", "a PostScript file", _DOCUMENT),
    (b"{\\rtf", "an RTF document", _DOCUMENT),
    (b"#extm3u", "a playlist", "give the video itself"),
    (b"<?xml", *_WEB),
    (b"<!--", *_WEB),
    (b"<!doctype html", *_WEB),
    (b"<html", *_WEB),
    (b"<head", *_WEB),
    (b"<body", *_WEB),
)
_MAIL = re.compile(
    rb"From \S+@|(Return-Path|Received|Delivered-To|Message-ID|MIME-Version|X-[\w-]+): "
    rb"|(From|To|Subject|Date|Content-Type|Reply-To): [^\n]*(@|\n[A-Z][\w-]+: )",
    re.IGNORECASE,
)


def file_type_of(path: Path) -> FileType:
    """Return the type of a file.

    Raises:
        MediaError: no reader takes it; with what the file is, where that is known.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        hint = "check the path and its permissions"
        raise MediaError(f"{printable(path)}: {error.strerror}", hint) from error
    for detect in (_by_signature, _jpeg, _riff, _boxes, _bitmap, _pdf, _transport_stream):
        file_type = detect(path, head)
        if file_type is not None:
            return file_type
    what, hint = _describe(head)
    if not what:
        raise unreadable(path)
    raise MediaError(
        f"{printable(path)}: {what}, not a picture or a video that can be read",
        hint or "give a picture, a PDF or a video",
    )


def _by_signature(path: Path, head: bytes) -> FileType | None:
    if head[:4] == b"II*\0" and head[8:10] == b"CR":
        raise _refused(path, "a camera's raw picture (CR2)")
    return next((kind for start, kind in _SIGNATURES if head.startswith(start)), None)


def _jpeg(path: Path, head: bytes) -> FileType | None:
    if head[:3] != b"\xff\xd8\xff":
        return None
    return FileType("video", ("mjpeg",)) if is_motion_jpeg(path) else FileType("picture", ("JPEG",))


def _riff(path: Path, head: bytes) -> FileType | None:
    return _RIFF.get(head[8:12]) if head[:4] == b"RIFF" else None


def _boxes(path: Path, head: bytes) -> FileType | None:
    """Recognise files of boxes (size, name): MP4, QuickTime, AVIF, HEIC, Canon's raw pictures."""
    if head[4:8] != b"ftyp":
        return FileType("video", ("mov",)) if head[4:8] in _BOXES.split() else None
    size = max(16, min(int.from_bytes(head[:4], "big"), 512))
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, size, 4))]
    if b"avif" in brands or b"avis" in brands:
        return FileType("picture", ("AVIF",))
    if brands[0] in _HEIC:
        raise MediaError(f"{printable(path)}: HEIC pictures are not read", _PICTURE)
    if brands[0] == b"crx ":
        raise _refused(path, "a camera's raw picture (CR3)")
    return FileType("video", ("mov",))


def _bitmap(path: Path, head: bytes) -> FileType | None:
    """Recognise Windows bitmaps, with or without a file header, and PBM to PFM."""
    start = 14 if head[:2] == b"BM" else 0
    if len(head) >= start + 16:
        (size,) = struct.unpack_from("<I", head, start)
        (planes,) = struct.unpack_from("<H", head, start + (8 if size == 12 else 12))
        if size in _DIB_SIZES and planes == 1:
            return FileType("picture", ("BMP",) if start else ("DIB",))
    return FileType("picture", ("PPM",)) if re.match(rb"P([1-6]\s+[#\d]|f\s)", head) else None


def _pdf(path: Path, head: bytes) -> FileType | None:
    """Recognise a PDF: its mark is in the first kilobyte, after blanks and a byte order mark."""
    return FileType("pages", ("PDF",)) if re.match(rb"(\xef\xbb\xbf)?\s*%PDF-", head) else None


def _transport_stream(path: Path, head: bytes) -> FileType | None:
    """Recognise MPEG-TS: packets that begin with 0x47; a recording may begin within one."""
    for size in _TS_PACKETS:
        for start in range(min(size, len(head))):
            marks = head[start::size]
            if len(marks) >= 4 and marks.count(0x47) >= 0.8 * len(marks):
                return FileType("video", ("mpegts",))
    return None


def _refused(path: Path, what: str) -> MediaError:
    return MediaError(f"{printable(path)}: {what}, which is not read", _PICTURE)


def _describe(head: bytes) -> tuple[str, str]:
    """Return what an unreadable file is, in words, and the way out; empty texts if unknown."""
    described = _describe_text(head)
    if described:
        return described
    if _is_text(head):
        return "a text file", "paste the text into the question"
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        inside = ((what, hint) for name, what, hint in _ZIP if name in head)
        return next(inside, ("a ZIP archive", _UNPACK))
    for start, what, hint in _OTHERS:
        if head.startswith(start):
            return what, hint
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[128:132] == b"DICM":
        return "a DICOM picture", _PICTURE
    wave = head[:4] == b"RIFF" and head[8:12] == b"WAVE"
    mp3 = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 6
    return ("a sound file", _SOUND) if wave or mp3 else ("", "")


def _describe_text(head: bytes) -> tuple[str, str] | None:
    """Return what a file is that begins as a known kind of text, whatever follows."""
    if _MAIL.match(head):
        return "an e-mail", "save its attachments as files, and give those"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<?xml", b"<svg", b"<!--", b"<!doctype svg")):
        if b"<svg" in start:
            return "an SVG drawing", "convert it to PNG or PDF"
        if b"<html" not in start:
            return "an XML file", ""
    texts = (text for text in _TEXTS if start.startswith(text[0]))
    return next(((what, hint) for _, what, hint in texts), None)


def _is_text(head: bytes) -> bool:
    """Whether the bytes are UTF-8 (or UTF-16 with its mark) without control characters."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return True
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < _HEAD:  # else a character cut in two
            return False
        text = head[: error.start].decode("utf-8")
    return bool(text.strip()) and not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text)
