"""Media files in, uint8 frames and their times out. The only importer of decoders.

    source = open_source("clip.mp4")
    index = sample_evenly(source, num_frames=16)
    frames = read(source, index, transform=resize)

Which decoder reads what: Pillow pictures and WebP animations; decord the common videos; PyAV what
decord can't read or would read differently (AV1, GIF, APNG, edit lists, open groups of pictures,
transparency, interlaced or damaged files), and all videos where decord is not installed. Frames are
8-bit RGB: HDR is shown without tone mapping.
"""

from vtprune.media.reading import open_source, open_sources, read
from vtprune.media.sampling import frames_between, sample_evenly
from vtprune.media.source import Frames, Limits, Source

__all__ = [
    "Frames",
    "Limits",
    "Source",
    "frames_between",
    "open_source",
    "open_sources",
    "read",
    "sample_evenly",
]
