"""Decoded and resized media in a cache on disk: by what the file holds, and how it is prepared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from vtprune import __version__
from vtprune.disk_cache import DiskCache
from vtprune.inference.downsampling import MediaView
from vtprune.media import Limits, Source
from vtprune.models.base import Preparable, PreparedMedia, ReadPlan
from vtprune.models.encoder_cache import describe_config

Read = tuple[PreparedMedia, str, tuple[str, ...]]
"""A media item, the decoder that ran, and its warnings."""
PIXELS = "pixels"
LIBRARIES = ("av", "decord2", "numpy", "pillow", "pypdfium2", "torch")
"""What decodes and resizes."""


def describe_preparation(model: Preparable, view: MediaView, num_alike: int) -> str:
    """Return all that says how a file is resized, and how much of it is taken.

    Args:
        num_alike: files of its kind in the prompt.
    """
    files = model.files
    contents = [files.image, files.video, files.processor]
    assembled = type(files.assembled and files.assembled.whole).__qualname__
    return json.dumps(
        [
            model.family.name, describe_config(files.config), contents, assembled,
            repr(view.sampling), view.size, num_alike, __version__, library_versions(),
        ],
        sort_keys=True,
        default=repr,
    )  # fmt: skip


@cache
def library_versions() -> tuple[str, ...]:
    """Return the versions of the libraries that pixels follow from."""
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return tuple(versions)


def digest_content(source: Source) -> str | None:
    """Return a digest of all bytes of a source's files; None where it is no file."""
    if source.in_memory:
        return None
    digests = []
    for path in source.files:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError:
            return None
    return " ".join(digests)


def read_through(
    disk: DiskCache,
    preparation: str,
    source: Source,
    plan: ReadPlan,
    limits: Limits,
    read: Callable[[], Read],
) -> Read:
    """Return a media item from a cache, or read it and put it there.

    Args:
        preparation: of `describe_preparation`.
        read: decodes and resizes it.
    """
    content = digest_content(source)
    if content is None:
        return read()
    how = [source.kind, source.page, source.decoder, plan.index, repr(limits)]
    key = json.dumps([PIXELS, content, how, preparation])
    with disk.entry(key):
        known = read_entry(disk, key, source, plan)
        if known is not None:
            return known
        item, decoder, warnings = read()
        disk.store(key, {PIXELS: item.pixels}, [item.index, item.timestamps, decoder, warnings])
    return item, decoder, warnings


def read_entry(disk: DiskCache, key: str, source: Source, plan: ReadPlan) -> Read | None:
    """Return a media item from a cache; None where it is not there."""
    entry = disk.load(key)
    if entry is None:
        return None
    tensors, notes = entry
    match notes:
        case [list(index), list(timestamps), str(decoder), list(warnings)] if PIXELS in tensors:
            item = PreparedMedia(
                source, tensors[PIXELS], tuple(index), tuple(timestamps), plan.regions,
                plan.transform,
            )  # fmt: skip
            return item, decoder, tuple(warnings)
    return None  # written by something else
