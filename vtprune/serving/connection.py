"""uvicorn's connections and server: slow clients are cut off, unanswered requests noted."""

from __future__ import annotations

import asyncio
import math
import socket
import time

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 30.0
"""Seconds that the head of a request may take to come, and that a client may read nothing of its
answer; uvicorn (0.35 to 0.54) has a limit for idle connections alone."""


class WatchedConnection(H11Protocol):
    """A connection that ends where PATIENCE seconds bring no request, however many bytes come, or
    take nothing of an answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.watch((None, 0))

    def watch(self, last: tuple[object, int]) -> None:
        """Look later what has changed since `last`: the request, and the bytes not yet sent."""
        self.timer = self.loop.call_later(PATIENCE, self.look, last)

    def look(self, last: tuple[object, int]) -> None:
        """End the connection if nothing has changed that should have."""
        # `cycle` is the request that is answered, or the last one that was.
        now = self.cycle, self.transport.get_write_buffer_size()
        idle = self.cycle is None or self.cycle.response_complete
        if now == last and (idle or now[1]):
            self.transport.abort()
        else:
            self.watch(now)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; a request that it was a part of gets no second answer.

        uvicorn (0.35 to 0.54) would send that answer, which h11 refuses: the server's own fault, as
        it looks.
        """
        super().send_400_response(msg)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.timer.cancel()
        super().connection_lost(error)


class WatchedServer(uvicorn.Server):
    """A server that notes whether its end left requests without an answer."""

    cut_off = False

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the requests that are here, until a time is over or a second Ctrl-C comes."""
        began, limit = time.monotonic(), self.config.timeout_graceful_shutdown or math.inf
        await super().shutdown(sockets)
        self.cut_off = self.force_exit or time.monotonic() - began >= limit
