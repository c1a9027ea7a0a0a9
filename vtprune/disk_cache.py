"""Tensors by key in a directory: bounded in size, shared by processes, least recently used go."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError, brief_path, path_fault

if TYPE_CHECKING:
    import torch

SUFFIX, PART = ".safetensors", ".part"
NOTES, DIGEST = "notes", "sha256"
DEFAULT_BYTES = 10 * 10**9
STALE = 3600
"""Seconds after which a file that is being written is one that a killed process left."""
MOST_FAILURES = 3
"""Writes that fail, one after the other, before no more are tried."""


class DiskCache:
    """Tensors by key in a directory.

    An entry is a safetensors file with a digest of its tensors: a damaged one counts as missing,
    and is written anew. Entries appear whole, so that several processes can share a directory.
    A full disk, or a folder that can't be written any more, is no error: nothing is added then.

    Args:
        directory: made where there is none.
        max_bytes: the most that all entries take; those go that were not used for longest.

    Raises:
        VtpruneError: no directory, and none can be made.
    """

    def __init__(self, directory: Path, max_bytes: int = DEFAULT_BYTES) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            next(os.scandir(directory), None)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise VtpruneError(
                f"--cache {brief_path(directory)}: {path_fault(error).lower()}",
                "give a folder that can be read and written",
            ) from error
        self.directory, self.max_bytes = directory.absolute(), max_bytes
        self.found = self.added = self.failed = 0
        self.reason = ""
        self.lock = threading.Lock()
        self.locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __reduce__(self) -> tuple[object, ...]:
        """Return how another process opens the same directory."""
        return DiskCache, (self.directory, self.max_bytes)

    @contextmanager
    def entry(self, key: str) -> Iterator[None]:
        """Keep other threads from looking for an entry that this one is about to add."""
        with self.lock:
            lock = self.locks[key]
        with lock:
            yield
        with self.lock:
            self.locks.pop(key, None)

    def load(self, key: str) -> tuple[dict[str, torch.Tensor], list[object]] | None:
        """Return the tensors of an entry and the notes beside them; None: there is no such entry.

        An entry that can't be read, or whose content is not what was written, counts as none.
        """
        import safetensors.torch
        from safetensors import SafetensorError

        path = self.path(key)
        try:
            if path.stat().st_size > self.max_bytes:
                return None
            data = path.read_bytes()
            tensors = safetensors.torch.load(data)
            end = 8 + int.from_bytes(data[:8], "little")  # of the header
            metadata = json.loads(data[8:end])["__metadata__"]
            notes = json.loads(metadata[NOTES])
            whole = metadata[DIGEST] == digest(tensors, metadata[NOTES])
            if not whole or not isinstance(notes, list):
                return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
            return None
        with suppress(OSError):
            os.utime(path)  # it was used now
        with self.lock:
            self.found += 1
        return tensors, notes

    def store(self, key: str, tensors: Mapping[str, torch.Tensor], notes: Sequence[object]) -> None:
        """Add an entry, where there is room for it.

        Args:
            notes: values that JSON holds.
        """
        import safetensors.torch

        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.max_bytes or self.failed >= MOST_FAILURES:
            return
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(notes)
        data = safetensors.torch.save(whole, {NOTES: text, DIGEST: digest(whole, text)})
        part = self.directory / f"{os.getpid()}-{secrets.token_hex(4)}{PART}"
        try:
            self.make_room(len(data))
            try:
                with part.open("xb") as file:
                    file.write(data)
                part.replace(self.path(key))
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            with self.lock:
                self.failed += 1
                self.reason = (error.strerror or str(error)).lower()
            return
        with self.lock:
            self.added += 1
            self.failed = 0

    def make_room(self, size: int) -> None:
        """Remove entries, those first that were not used for longest, until `size` bytes fit."""
        entries: list[tuple[float, int, str]] = []
        for file in os.scandir(self.directory):
            with suppress(FileNotFoundError):  # another process was first
                facts = file.stat(follow_symlinks=False)
                if file.name.endswith(PART) and facts.st_mtime < time.time() - STALE:
                    os.unlink(file.path)
                elif file.name.endswith(SUFFIX):
                    entries.append((facts.st_mtime, facts.st_size, file.path))
        left = sum(entry[1] for entry in entries)
        for _, bytes_freed, path in sorted(entries):
            if left + size <= self.max_bytes:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            left -= bytes_freed

    def path(self, key: str) -> Path:
        """Return the file of an entry."""
        return self.directory / f"{hashlib.sha256(key.encode()).hexdigest()}{SUFFIX}"

    def describe(self) -> str:
        """Return what came of it, for a note."""
        text = f"cache: {self.found:,} found, {self.added:,} added"
        return f"{text}; not written: {self.reason}" if self.reason else text


def digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """Return a digest of tensors by name, on any device, and of a text."""
    import torch

    total = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        plain = tensor.detach().cpu().contiguous()
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
