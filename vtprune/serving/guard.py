"""What a server refuses before it reads a request: hosts, keys; and bodies, while they come."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vtprune.errors import VtpruneError

HUNG_UP = 499
"""The status of a request whose client has gone, as nginx has it; nobody gets it."""
KINDS = {401: "invalid_api_key", 404: "not_found", 408: "timeout", 413: "too_large",
         429: "rate_limit_exceeded", 503: "unavailable", 507: "no_space"}  # fmt: skip
"""The word for a status in an error's body."""
OPEN = ("/", "/health", "/metrics")
"""Routes without a key."""


@dataclass(frozen=True)
class GuardRules:
    """Whose requests are read, and how much of them.

    Args:
        key: that clients have to give; "" for none.
        hosts: that a request without a key may name as the server; () for any. A page of another
            site can make a browser send requests here, also under a name of that site's own.
        most_bytes: of one request's body.
        most_held: of all bodies that are being read.
        seconds: that a body may take to come.
    """

    key: str = ""
    hosts: tuple[str, ...] = ()
    most_bytes: int = 512 << 20
    most_held: int = 1 << 30
    seconds: float = 300.0


def error_response(status: int, message: str, hint: str = "") -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    text = VtpruneError(message, hint)  # one line, of bounded length
    body = {
        "message": text.message + (f" ({text.hint})" if text.hint else ""),
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "param": None,
        "code": KINDS.get(status),
    }
    later = {"Retry-After": "1"} if status in (429, 503, 507) else {}
    return JSONResponse({"error": body}, status, headers=later)


class Guard:
    """An ASGI app around another: refuses what may not ask, and counts what is answered.

    Args:
        count: gets the path and the status of every answer.
    """

    def __init__(
        self, app: ASGIApp, rules: GuardRules, count: Callable[[Scope, int], None]
    ) -> None:
        self.app, self.rules, self.count = app, rules, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(scope, message["status"])
            await send(message)

        refused = self.refuse(scope)
        await (refused or self.app)(scope, receive, counted)

    def refuse(self, scope: Scope) -> JSONResponse | None:
        """Return why a request is refused before it is read; None where it is not."""
        headers = Headers(scope=scope)
        if self.rules.key:
            given = headers.get("authorization", "")
            expected = f"Bearer {self.rules.key}"
            right = secrets.compare_digest(given.encode(), expected.encode())
            if right or scope["path"] in OPEN:
                return None
            return error_response(
                401, "the API key is missing or wrong", "send Authorization: Bearer KEY"
            )
        named, origin = headers.get("host", ""), headers.get("origin")
        if self.rules.hosts and host_in(f"//{named}") not in self.rules.hosts:
            return error_response(
                403,
                f"this server is not {named!r}",
                "ask it as localhost; with --api-key-file it answers to any name",
            )
        if origin is not None and host_in(origin) != host_in(f"//{named}"):
            return error_response(403, f"a page of {origin!r} may not ask this server")
        return None


def host_in(address: str) -> str | None:
    """Return the host of an address in lower case; None where it has none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


class Bodies:
    """Reads requests' bodies, at most so many bytes at once."""

    def __init__(self, rules: GuardRules) -> None:
        self.rules = rules
        self.held = 0

    @asynccontextmanager
    async def limited(self, request: Request) -> AsyncIterator[Request]:
        """Give a request whose body is refused above the limits, while it comes.

        Raises:
            HTTPException: 413, 408, 429; 499 where the client hangs up.
        """
        rules, size = self.rules, 0
        until = asyncio.get_running_loop().time() + rules.seconds

        def check(total: int, more: int) -> None:
            if total > rules.most_bytes:
                raise HTTPException(413, f"the request is over {rules.most_bytes:,} bytes")
            if self.held + more > rules.most_held:
                raise HTTPException(429, f"{self.held:,} bytes are being read; ask again later")

        async def receive() -> Message:
            nonlocal size
            try:
                async with asyncio.timeout_at(until):
                    message = await request.receive()
            except TimeoutError as error:
                seconds = f"{rules.seconds:g} seconds"
                raise HTTPException(408, f"the request took over {seconds} to come") from error
            more = len(message.get("body", b""))
            check(size + more, more)
            size += more
            self.held += more
            return message

        length = request.headers.get("content-length", "")
        if length.isdecimal():
            check(int(length[:20]), int(length[:20]))
        try:
            yield Request(request.scope, receive)
        except ClientDisconnect as error:
            raise HTTPException(HUNG_UP, "the client has gone") from error
        finally:
            self.held -= size
