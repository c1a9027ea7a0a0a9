"""uvicorn's connections, which end when a client takes too long to say what it wants."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0
"""That the head of a request may take; uvicorn has a limit for idle connections alone."""


class WatchedConnection(H11Protocol):
    """A connection that ends where HEAD_SECONDS bring no request, however many bytes come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.watch(None)

    def watch(self, last: object) -> None:
        """Look whether a request has come since the last look, which saw `last`."""
        self.timer = self.loop.call_later(HEAD_SECONDS, self.look, last)

    def look(self, last: object) -> None:
        # `cycle` is the request that is answered, or the last one that was.
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is last:
            self.transport.abort()
        else:
            self.watch(self.cycle)

    def connection_lost(self, error: Exception | None) -> None:
        self.timer.cancel()
        super().connection_lost(error)
