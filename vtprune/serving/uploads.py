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
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from vtprune.errors import MediaError, quote

DATA = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.=+-]+)*;base64,", re.ASCII)
UPLOAD = re.compile(r"file-[0-9a-f]{24}")
MOST_REDIRECTS = 3
BLOCK = 1 << 16


@dataclass(frozen=True)
class UploadRules:
    """What a client may name, and how much it may send.

    Args:
        hosts: whose http and https addresses are fetched.
        root: the folder whose files may be named, by `file:` addresses; None: none may.
        most_bytes: of one media item.
        seconds: that fetching one may take.
    """

    hosts: tuple[str, ...] = ()
    root: Path | None = None
    most_bytes: int = 256 << 20
    seconds: float = 30.0


class Uploads:
    """The files of what clients sent, in a folder of their own.

    Args:
        folder: that they are written to.
    """

    def __init__(self, folder: Path, rules: UploadRules) -> None:
        self.folder, self.rules = folder, rules

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
            return str(self.uploaded(reference))
        scheme = urlsplit(reference).scheme.lower()
        if scheme in ("http", "https"):
            return str(self.write(request, fetch(reference, self.rules)))
        if scheme == "file":
            return str(self.inside_root(reference))
        raise MediaError(
            f"{quote(reference)}: neither a data URL, an uploaded file, nor an address",
            "send the file itself: data:video/mp4;base64,...",
        )

    def write(self, folder: Path, data: bytes) -> Path:
        """Write a media item into a folder, by a name of the server's own."""
        path = folder / secrets.token_hex(8)
        path.write_bytes(data)
        return path

    def upload(self, data: bytes) -> str:
        """Keep an uploaded file; return its id."""
        if len(data) > self.rules.most_bytes:
            raise too_large(self.rules.most_bytes)
        name = f"file-{secrets.token_hex(12)}"
        (self.folder / name).write_bytes(data)
        return name

    def uploaded(self, name: str) -> Path:
        """Return the path of an uploaded file.

        Raises:
            MediaError: there is none of that id.
        """
        path = self.folder / name
        if not UPLOAD.fullmatch(name) or not path.is_file():
            raise MediaError(f"{quote(name)}: no file of that id was uploaded", "upload it first")
        return path

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
        parts = urlsplit(address)
        named = unquote(parts.path)
        if parts.netloc.lower() not in ("", "localhost") or "\0" in named:
            raise MediaError(f"{quote(address)}: not a file of the server", "file:///clip.mp4")
        top = os.path.realpath(root)
        # Of the root, or from its top: "file:///clip.mp4" is a file in it too.
        for path in (named, os.path.join(top, named.lstrip("/"))):
            found = os.path.realpath(path)
            if found.startswith(top + os.sep) and os.path.exists(found):
                return Path(found)
        raise MediaError(f"{quote(address)}: no such file in the server's media", "check the path")


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
        parts = urlsplit(address)
        host = (parts.hostname or "").lower()
        if parts.scheme.lower() not in ("http", "https") or host not in rules.hosts:
            raise MediaError(
                f"{quote(address)}: addresses of {host or 'no host'} are not fetched",
                "allow the host with --allow-url, or send the file itself",
            )
        try:
            answer = _get(parts, host, until)
            with answer:
                if answer.status in (301, 302, 303, 307, 308):
                    address = urljoin(address, answer.headers.get("Location", ""))
                    continue
                if answer.status != 200:
                    raise MediaError(f"{quote(address)}: status {answer.status}", "check it")
                return _read(answer, rules.most_bytes, until)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise MediaError(f"{quote(address)}: can't be fetched: {error}", "check it") from error
    raise MediaError(f"{quote(address)}: more than {MOST_REDIRECTS} redirections", "check it")


class _Answer:
    """The answer of a server, and the connection that ends with it."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self.connection = connection
        self.response = connection.getresponse()
        self.status, self.headers = self.response.status, self.response.headers

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()


def _get(parts: SplitResult, host: str, until: float) -> _Answer:
    """Ask a server for what an address names."""
    scheme = parts.scheme.lower()
    port = parts.port or {"http": 80, "https": 443}[scheme]
    place = public_address(host, port)
    left = max(until - time.monotonic(), 0.1)
    plain = socket.create_connection(place, timeout=left)
    connection = http.client.HTTPConnection(host, port, timeout=left)
    connection.sock = plain
    if scheme == "https":
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(plain, server_hostname=host)
    path = parts.path or "/"
    query = f"?{parts.query}" if parts.query else ""
    connection.request("GET", path + query, headers={"Host": host, "User-Agent": "vtprune"})
    return _Answer(connection)


def _read(answer: _Answer, most: int, until: float) -> bytes:
    """Return the body of an answer, as far as size and time allow."""
    parts: list[bytes] = []
    size = 0
    while block := answer.response.read(BLOCK):
        parts.append(block)
        size += len(block)
        if size > most:
            raise too_large(most)
        if time.monotonic() > until:
            raise MediaError("fetching a media item took too long", "send the file itself")
    return b"".join(parts)


def public_address(host: str, port: int) -> tuple[str, int]:
    """Return an address of a host.

    Raises:
        MediaError: one of its addresses is of this machine, or of a private network.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MediaError(f"{host}: no such host", "check the address") from error
    places = [str(info[4][0]) for info in found]
    if not places or not all(is_public(place) for place in places):
        raise MediaError(f"{host}: an address of a private network", "send the file itself")
    return places[0], port


def is_public(place: str) -> bool:
    """Return whether an IP address is one that anybody on the internet could reach."""
    address = ipaddress.ip_address(place.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global and not address.is_multicast
