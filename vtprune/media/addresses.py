"""Media at http and https addresses, of hosts that the user allows.

No address leads to this machine or its network, whatever its name means a moment later, and none
takes more bytes or time than the rules say.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from vtprune.errors import MediaError, VtpruneError, brief, quote

ADDRESS = re.compile(r"https?://", re.IGNORECASE)
MOST_REDIRECTS = 3
BLOCK = 1 << 16
UNICAST = ipaddress.IPv6Network("2000::/3")
"""What is given out of IPv6; outside of it are tunnels to IPv4 and networks of one's own."""
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv6 for the IPv4 addresses of other machines, where a network has IPv6 alone."""


@dataclass(frozen=True)
class FetchRules:
    """Whose addresses are fetched, and how much of them.

    Args:
        hosts: names of hosts, in lower case.
        most_bytes: of one media item.
        seconds: that fetching one may take.
    """

    hosts: tuple[str, ...] = ()
    most_bytes: int = 256 << 20
    seconds: float = 30.0


def check_host(host: str) -> str:
    """Return the name of a host that is allowed, in lower case.

    Raises:
        VtpruneError: it is no name of a host alone.
    """
    if not host or set(host) & set("/:@?#*") or host.strip() != host:
        raise VtpruneError(
            f"--allow-url {brief(host)}: not the name of a host",
            "give the name alone: images.example.org",
        )
    return host.lower()


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


def allowed_host(address: str, hosts: Sequence[str]) -> str:
    """Return the host of an address that may be fetched.

    Raises:
        MediaError: it is no address, or its host is not among `hosts`.
    """
    parts = split_address(address)
    host = (parts.hostname or "").lower()
    if parts.scheme.lower() not in ("http", "https") or host not in hosts:
        raise MediaError(
            f"{quote(address)}: addresses of {quote(host) if host else 'no host'} are not fetched",
            "allow the host with --allow-url, or send the file itself",
        )
    return host


def fetch(address: str, rules: FetchRules) -> bytes:
    """Return what an address of an allowed host holds.

    Every redirection is held to the same rules. The connection goes to the very address that was
    looked at, so that a name can't mean another one a moment later.

    Raises:
        MediaError: the host is not allowed or not a public one, or it can't be had in time.
    """
    until = time.monotonic() + rules.seconds
    for _ in range(MOST_REDIRECTS + 1):
        parts, host = split_address(address), allowed_host(address, rules.hosts)
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
