"""Media that clients send, as files: data URLs, uploads, a root's files, allowed addresses.

What a client sends is untrusted. Nothing of it names a path outside of the folder that the server
made or of the root that its user gave, and no address leads to this machine or its network.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from vtprune.errors import MediaError, VtpruneError, quote
from vtprune.media.addresses import BLOCK, FetchRules, fetch, split_address, too_large

DATA = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.=+-]+)*;base64,", re.ASCII)
UPLOAD = re.compile(r"file-[0-9a-f]{24}")
PREFIX = "vtprune-serve-"
"""Of the name of the folder for what clients send."""


@dataclass(frozen=True)
class UploadRules(FetchRules):
    """What a client may name, and how much it may send.

    Args:
        hosts, most_bytes, seconds: as of FetchRules.
        root: the folder whose files may be named, by `file:` addresses; None: none may.
        most_files, most_space: uploads that are kept at once, and their bytes.
        kept: seconds that an upload is kept after its last use.
    """

    root: Path | None = None
    most_files: int = 1000
    most_space: int = 4 << 30
    kept: float = 3600.0


class UploadsFullError(VtpruneError):
    """The uploads that are kept already leave no room."""


@dataclass
class Upload:
    """An uploaded file.

    Args:
        used: when it was last named, on `time.monotonic`'s clock.
    """

    name: str
    size: int
    created: int
    used: float


class Uploads:
    """The files of what clients sent, in a folder of their own.

    Args:
        folder: that they are written to.
    """

    def __init__(self, folder: Path, rules: UploadRules) -> None:
        self.folder, self.rules = folder, rules
        self.lock = threading.Lock()
        self.files: dict[str, Upload] = {}

    def open_folder(self) -> Path:
        """Make the folder of a request."""
        return Path(tempfile.mkdtemp(prefix="request-", dir=self.folder))

    def resolve(self, reference: str, request: Path) -> str:
        """Return the file that a reference of a request means.

        Args:
            request: the folder of the request, which its files go to.

        Raises:
            MediaError: it is not allowed, too large, or can't be had.
        """
        if reference[:5].lower() == "data:":
            return str(self.write(request, decode_data_url(reference, self.rules.most_bytes)))
        if UPLOAD.fullmatch(reference):
            return str(self.link(reference, request))
        scheme = split_address(reference).scheme.lower()
        if scheme in ("http", "https"):
            return str(self.write(request, fetch(reference, self.rules)))
        if scheme == "file":
            return str(self.inside_root(reference))
        raise MediaError(
            f"{quote(reference)}: neither a data URL, an uploaded file, nor an address",
            "send the file itself: data:video/mp4;base64,...",
        )

    def write(self, folder: Path, data: bytes) -> Path:
        """Write a media item into a folder."""
        path = next_path(folder)
        path.write_bytes(data)
        return path

    def upload(self, file: BinaryIO, size: int) -> Upload:
        """Keep an uploaded file of `size` bytes.

        Raises:
            MediaError: it is too large.
            UploadsFullError: there is no room.
        """
        if size > self.rules.most_bytes:
            raise too_large(self.rules.most_bytes)
        upload = Upload(f"file-{secrets.token_hex(12)}", size, int(time.time()), time.monotonic())
        space = self.space
        with self.lock:
            if len(self.files) >= self.rules.most_files or space + size > self.rules.most_space:
                raise UploadsFullError(
                    f"{len(self.files):,} uploads of {space:,} bytes are kept, and leave no room",
                    f"delete some; each goes {self.rules.kept:,.0f} seconds after its last use",
                )
            self.files[upload.name] = upload  # the place is taken while it is written
        try:
            with (self.folder / upload.name).open("xb") as kept:
                shutil.copyfileobj(file, kept, BLOCK)
        except BaseException:
            self.delete(upload.name)
            raise
        return upload

    @property
    def space(self) -> int:
        """The bytes of all uploads."""
        with self.lock:
            self.remove_old()
            return sum(upload.size for upload in self.files.values())

    def remove_old(self) -> None:
        """Remove the uploads that nobody named for long."""
        oldest = time.monotonic() - self.rules.kept
        for upload in [each for each in self.files.values() if each.used < oldest]:
            self._remove(upload.name)

    def uploaded(self, name: str) -> Upload:
        """Return an upload.

        Raises:
            MediaError: there is none of that id.
        """
        with self.lock:
            self.remove_old()
            if name not in self.files:
                raise MediaError(f"{quote(name)}: no file of that id is kept", "upload it first")
            return self.files[name]

    def link(self, name: str, request: Path) -> Path:
        """Return the path of an upload in a request's folder, where it stays when it is removed."""
        upload = self.uploaded(name)
        upload.used = time.monotonic()
        path = next_path(request)
        try:
            os.link(self.folder / name, path)
        except FileNotFoundError as error:
            raise MediaError(f"{name}: the file was deleted", "upload it again") from error
        return path

    def delete(self, name: str) -> None:
        """Remove an upload.

        Raises:
            MediaError: there is none of that id.
        """
        self.uploaded(name)
        with self.lock:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self.files.pop(name, None)
        with suppress(OSError):
            (self.folder / name).unlink()

    def inside_root(self, address: str) -> Path:
        """Return the path that a `file:` address means, if it lies in the root.

        Raises:
            MediaError: there is no root, or it does not.
        """
        root = self.rules.root
        if root is None:
            raise MediaError(
                f"{quote(address)}: files of the server are not open to clients",
                "start it with --media-root DIR, or send the file itself",
            )
        parts = split_address(address)
        named = unquote(parts.path)
        if parts.netloc.lower() not in ("", "localhost") or "\0" in named:
            raise MediaError(f"{quote(address)}: not a file of the server", "file:///clip.mp4")
        top = os.path.realpath(root)
        # Of the root, or from its top: "file:///clip.mp4" is a file in it too.
        for path in (named, os.path.join(top, named.lstrip("/"))):
            real = os.path.realpath(path)
            if real.startswith(top.rstrip(os.sep) + os.sep) and is_regular(real):
                return Path(real)
        raise MediaError(f"{quote(address)}: no such file in the server's media", "check the path")


def next_path(folder: Path) -> Path:
    """Return the path of the next media item of a request, by a name that clients can be told."""
    return folder / f"media-{sum(1 for _ in folder.iterdir()) + 1}"


def is_regular(path: str) -> bool:
    """Return whether a path is a file: no folder, whose files may be links, no pipe, no device."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def decode_data_url(text: str, most: int) -> bytes:
    """Return the bytes of a data URL.

    Raises:
        MediaError: it is not base64, or too large.
    """
    head = DATA.match(text[:256])
    if head is None:
        raise MediaError(
            f"{quote(text[:40])}: not a data URL in base64", "write data:image/png;base64,..."
        )
    if (len(text) - head.end()) * 3 // 4 > most + 3:
        raise too_large(most)
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError("a data URL whose base64 can't be decoded", "encode it again") from error
