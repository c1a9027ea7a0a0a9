"""Media files in, uint8 frames and their times out. The only importer of decoders.

    source = open_source("clip.mp4")
    index = sample_evenly(source, num_frames=16)
    frames = read(source, index, transform=resize)

Which decoder reads what: Pillow reads pictures and WebP animations in this process. In a child
process, PDFium reads the pages of PDFs; Pillow those of TIFF and JPEG 2000 files; PyAV videos, GIF
and APNG; decord, where it is asked for, the videos that it numbers right. Frames are 8-bit RGB: HDR
is read without tone mapping. The type of a file is what its first bytes say, whatever its name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vtprune.media.source import (
    AskedMedia,
    Frames,
    Limits,
    MediaGroup,
    Source,
    Stored,
    file_name,
    group_media,
)

if TYPE_CHECKING:
    from vtprune.media.in_memory import (
        AskedMedia,
        Clip,
        MediaGroup,
        Medium,
        Stored,
        media_list,
        name_of,
    )
    from vtprune.media.pages import stop_reading
    from vtprune.media.reading import (
        check_file,
        open_each,
        open_source,
        open_sources,
        read,
        read_parts,
    )
    from vtprune.media.sampling import frames_between, sample_evenly

# Imported on first use, so that the child process starts without torch.
_LAZY = {
    "Clip": "vtprune.media.in_memory",
    "Medium": "vtprune.media.in_memory",
    "check_file": "vtprune.media.reading",
    "frames_between": "vtprune.media.sampling",
    "media_list": "vtprune.media.in_memory",
    "name_of": "vtprune.media.in_memory",
    "open_each": "vtprune.media.reading",
    "open_source": "vtprune.media.reading",
    "open_sources": "vtprune.media.reading",
    "read": "vtprune.media.reading",
    "read_parts": "vtprune.media.reading",
    "sample_evenly": "vtprune.media.sampling",
    "stop_reading": "vtprune.media.pages",
}

__all__ = [
    "AskedMedia",
    "Clip",
    "Frames",
    "Limits",
    "MediaGroup",
    "Medium",
    "Source",
    "Stored",
    "check_file",
    "file_name",
    "frames_between",
    "group_media",
    "media_list",
    "name_of",
    "open_each",
    "open_source",
    "open_sources",
    "read",
    "read_parts",
    "sample_evenly",
    "stop_reading",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'vtprune.media' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
