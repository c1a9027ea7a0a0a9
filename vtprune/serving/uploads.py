"""Media that clients send, as files: data URLs, uploads, a root's files, allowed addresses.

What a client sends is untrusted. Nothing of it names a path outside of the folder that the server
made or of the root that its user gave, and no address leads to this machine or its network.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import os
import re
import secrets
import shutil
import socket
import ssl
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from vtprune.errors import MediaError, VtpruneError, quote

DATA = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.=+-]+)*;base64,", re.ASCII)
UPLOAD = re.compile(r"file-[0-9a-f]{24}")
MOST_REDIRECTS = 3
BLOCK = 1 << 16
UNICAST = ipaddress.IPv6Network("2000::/3")
"""What is given out of IPv6; outside of it are tunnels to IPv4 and networks of one's own."""
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv6 for the IPv4 addresses of other machines, where a network has IPv6 alone."""


@dataclass(frozen=True)
class UploadRules:
    """What a client may name, and how much it may send.

    Args:
        hosts: whose http and https addresses are fetched.
        root: the folder whose files may be named, by `file:` addresses; None: none may.
        most_bytes: of one media item.
        seconds: that fetching one may take.
        most_files, most_space: uploads that are kept at once, and their bytes.
        kept: seconds that an upload is kept after its last use.
    """

    hosts: tuple[str, ...] = ()
    root: Path | None = None
    most_bytes: int = 256 << 20
    seconds: float = 30.0
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


def split_address(address: str) -> SplitResult:
    """Return the parts of an address.

    Raises:
        MediaError: it is none.
    """
    try:
        return urlsplit(address)
    except ValueError as error:
        raise MediaError(f"{quote(address)}: not an address: {error}", "check it") from error


def too_large(most: int) -> MediaError:
    """Return the error for a media item above the limit."""
    return MediaError(f"a media item is over the limit of {most:,} bytes", "send a smaller one")


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


# -- addresses of other machines -------------------------------------------------------------------


def fetch(address: str, rules: UploadRules) -> bytes:
    """Return what an address of an allowed host holds.

    Every redirection is held to the same rules. The connection goes to the very address that was
    looked at, so that a name can't mean another one a moment later.

    Raises:
        MediaError: the host is not allowed or not a public one, or it can't be had in time.
    """
    until = time.monotonic() + rules.seconds
    for _ in range(MOST_REDIRECTS + 1):
        parts = split_address(address)
        host = (parts.hostname or "").lower()
        if parts.scheme.lower() not in ("http", "https") or host not in rules.hosts:
            raise MediaError(
                f"{quote(address)}: addresses of {quote(host) if host else 'no host'} are not "
                "fetched",
                "allow the host with --allow-url, or send the file itself",
            )
        try:
            with _get(parts, host, until) as answer:
                if answer.status in (301, 302, 303, 307, 308):
                    address = urljoin(address, answer.headers.get("Location", ""))
                    continue
                if answer.status != 200:
                    raise MediaError(f"{quote(address)}: status {answer.status}", "check it")
                data = _read(answer, rules.most_bytes)
                if time.monotonic() >= until:  # a body without a length may have been cut
                    raise TimeoutError
                return data
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= until:
                raise MediaError(
                    f"{quote(address)}: not there after {rules.seconds:g} seconds",
                    "send the file itself",
                ) from error
            raise MediaError(f"{quote(address)}: can't be fetched: {error}", "check it") from error
    raise MediaError(f"{quote(address)}: more than {MOST_REDIRECTS} redirections", "check it")


@contextmanager
def _get(parts: SplitResult, host: str, until: float) -> Iterator[http.client.HTTPResponse]:
    """Ask a server for what an address names; the connection is cut when the time is over."""
    scheme = parts.scheme.lower()
    port = parts.port or {"http": 80, "https": 443}[scheme]
    connection = http.client.HTTPConnection(host, port)
    sockets = [_connect(host, port, until)]
    # A timeout of the socket is for each read alone: a server may send a byte now and then.
    timer = threading.Timer(max(until - time.monotonic(), 0), _cut, [sockets])
    timer.start()
    try:
        if scheme == "https":
            secure = ssl.create_default_context().wrap_socket(
                sockets[0], server_hostname=host, do_handshake_on_connect=False
            )
            sockets.append(secure)
            secure.do_handshake()
        connection.sock = sockets[-1]
        path = parts.path or "/"
        query = f"?{parts.query}" if parts.query else ""
        connection.request("GET", path + query, headers={"User-Agent": "vtprune"})
        with connection.getresponse() as answer:
            yield answer
    finally:
        timer.cancel()
        sockets[-1].close()


def _connect(host: str, port: int, until: float) -> socket.socket:
    """Return a connection to the first address of a host that answers."""
    failed: OSError = TimeoutError("timed out")
    for place in public_addresses(host, port):
        left = until - time.monotonic()
        if left <= 0:
            break
        try:
            return socket.create_connection((place, port), timeout=left)
        except OSError as error:
            failed = error
    raise failed


def _cut(sockets: Sequence[socket.socket]) -> None:
    """End a connection from another thread, whatever waits for it."""
    with suppress(OSError):
        sockets[-1].shutdown(socket.SHUT_RDWR)


def _read(answer: http.client.HTTPResponse, most: int) -> bytes:
    """Return the body of an answer, as far as its size allows."""
    if (answer.length or 0) > most:
        raise too_large(most)
    parts: list[bytes] = []
    size = 0
    while block := answer.read(BLOCK):
        parts.append(block)
        size += len(block)
        if size > most:
            raise too_large(most)
    if answer.length:  # less than its header says
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def public_addresses(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host.

    Raises:
        MediaError: one of them is of this machine, or of a private network.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MediaError(f"{quote(host)}: no such host", "check the address") from error
    places = list(dict.fromkeys(str(info[4][0]) for info in infos))
    if not places or not all(is_public(place) for place in places):
        raise MediaError(f"{quote(host)}: an address of a private network", "send the file itself")
    return places


def is_public(place: str) -> bool:
    """Return whether an IP address is one that anybody on the internet could reach."""
    address = ipaddress.ip_address(place.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None:
            return address in UNICAST and address.is_global
        address = inner
    return address.is_global and not address.is_multicast
