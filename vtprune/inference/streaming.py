"""An answer as an iterator over its pieces, which come while it is generated."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import nn

from vtprune.inference.generate import Generation
from vtprune.inference.library import ask
from vtprune.inference.prompt_media import Media
from vtprune.inference.report import Report
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded
from vtprune.preset import Keep, Preset, StreamSpec


class AnswerStream(Iterator[str]):
    """The pieces of an answer, in order; its report once they have ended.

    Iterating raises the error of a question that can't be answered. `close`, or leaving a `with`
    block, ends the answer where it is.
    """

    def __init__(self, answer: Callable[[Callable[[str], None]], Report]) -> None:
        self._pieces: queue.Queue[str | Report | BaseException] = queue.Queue()
        self._closed = threading.Event()
        self._end: Report | BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(answer,), name="vtprune-stream", daemon=True
        )
        self._thread.start()

    def _run(self, answer: Callable[[Callable[[str], None]], Report]) -> None:
        try:
            self._pieces.put(answer(self._hear))
        except BaseException as error:  # handed to whoever iterates
            self._pieces.put(error)

    def _hear(self, piece: str) -> None:
        if self._closed.is_set():
            raise _ClosedError
        self._pieces.put(piece)

    def __next__(self) -> str:
        if self._end is None:
            piece = self._pieces.get()
            if isinstance(piece, str):
                return piece
            self._end = piece
        if isinstance(self._end, BaseException) and not isinstance(self._end, _ClosedError):
            raise self._end
        raise StopIteration

    @property
    def report(self) -> Report:
        """The report of the answer; it waits for the end of the answer.

        Raises:
            VtpruneError: the question can't be answered.
            RuntimeError: the stream was closed before the end.
        """
        for _ in self:
            pass
        if not isinstance(self._end, Report):
            raise RuntimeError("the stream was closed before the answer ended")
        return self._end

    def close(self) -> None:
        """End the answer at its next piece, and wait for that."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _ClosedError(Exception):
    """Nobody waits for the answer any more."""


def stream(
    model: nn.Module | Loaded | str | Path | None,
    media: Media,
    question: str,
    preset: str | Path | Mapping[str, object] | Preset | None = None,
    keep: Keep | None = None,
    *,
    method: str | None = None,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    tokens: int | None = None,
    tokens_after: int | None = None,
    fit: str | None = None,
    decode_every: int | None = None,
    decode_keep: float | None = None,
    keep_for_turns: float | None = None,
    stream: bool | Mapping[str, object] | StreamSpec | None = None,
) -> AnswerStream:
    """Answer one question as `ask` does, in a thread, and iterate over the pieces of the answer.

    >>> import vtprune
    >>> with vtprune.stream(None, "clip.mp4", "what moves?", keep=0.3) as pieces:
    ...     for piece in pieces:
    ...         print(piece, end="", flush=True)
    ...     print(pieces.report.tokens.kept_after)

    Args:
        model, media, question, preset, keep, method, at, options, seed, sampling, generation,
            limits, tokens, tokens_after, fit, decode_every, decode_keep, keep_for_turns, stream:
            as of `ask`.

    Raises:
        VtpruneError: while iterating: of any kind, with the way out.
    """

    def answer(on_text: Callable[[str], None]) -> Report:
        return ask(
            model, media, question, preset, keep, method=method, at=at, options=options, seed=seed,
            sampling=sampling, generation=generation, limits=limits, on_text=on_text,
            tokens=tokens, tokens_after=tokens_after, fit=fit,
            decode_every=decode_every, decode_keep=decode_keep, keep_for_turns=keep_for_turns,
            stream=stream,
        )  # fmt: skip

    return AnswerStream(answer)
