"""Many requests, answered in batches: a line an answer or an error; a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, TypeVar

from vtprune.errors import VtpruneError, json_fault
from vtprune.inference.generate import Generation, Run, generate
from vtprune.inference.measuring import build_report
from vtprune.inference.out_of_memory import OutOfMemoryError
from vtprune.inference.prepare import (
    PreparedQuestion,
    group_alike,
    prepare_turns,
    sampling_of,
    with_sampling,
)
from vtprune.inference.prompt_media import plan_media, read_planned
from vtprune.inference.report import Report
from vtprune.media import Limits, Source
from vtprune.models.base import Sampling, Turn
from vtprune.saving import ResumableLines, json_line, kept_in
from vtprune.serving.requests import Request

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress
    from vtprune.preset import Preset

T = TypeVar("T")
BEGINNING = b'{"key": "'
"""Of every line."""
MOST_PAGES = 256
"""Of all files of a request that are several."""
AHEAD = 4
"""Batches whose requests are ordered by length together."""
MOST_AHEAD_BYTES = 4 * 10**9
"""Of requests that are prepared and not yet answered; half of it is ordered together."""


@dataclass(frozen=True)
class BatchSettings:
    """How requests are answered.

    Args:
        sampling: how much of the media a request of a preset takes; None: as the preset says.
        batch_size: the most requests in one forward; fewer where memory runs out.
        workers: threads that decode media.
        in_order: lines in the order of the requests, and not as they are answered.
    """

    sampling: Callable[[Preset], Sampling] = sampling_of
    generation: Generation = field(default_factory=Generation)
    limits: Limits = field(default_factory=Limits)
    batch_size: int = 8
    workers: int = 2
    in_order: bool = False


@dataclass
class Counts:
    """How a run went.

    Args:
        answered, failed: requests of this run.
        before: of earlier runs, whose lines the file held.
        seconds: that this run took, without loading the model.
        notes: what the user should know.
    """

    requests: int
    before: int = 0
    answered: int = 0
    failed: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return {
            "requests": self.requests,
            "before": self.before,
            "answered": self.answered,
            "failed": self.failed,
            "seconds": self.seconds,
            "notes": self.notes,
        }


# -- lines -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """The line of one request.

    Args:
        failed: it says why there is no answer.
    """

    text: str
    failed: bool


def line_of(request: Request, run: str, result: Report | VtpruneError) -> Line:
    """Return the line of an answer: a report's compact form, or why there is none."""
    values: dict[str, object] = {"key": request.key, "run": run}
    if request.name is not None:
        values["id"] = request.name
    values |= {"files": list(map(str, request.files)), "question": request.question}
    if isinstance(result, VtpruneError):
        values |= {"answer": None, "error": result.message, "hint": result.hint}
    else:
        tokens, seconds = result.tokens, result.seconds
        values |= {
            "answer": result.answer,
            "error": None,
            "model": result.model.name,
            "preset": result.preset.name or result.preset.method,
            "tokens": {
                "visual": tokens.visual,
                "text": tokens.text,
                "answer": tokens.answer,
                "keep_mean": tokens.keep_mean,
                "kept_after": tokens.kept_after,
            },
            "seconds": {name: getattr(seconds, name) for name in ("media", "vision", "prefill",
                                                                   "decode", "total")},
            "warnings": list(result.warnings),
        }  # fmt: skip
    return Line(json_line(values), isinstance(result, VtpruneError))


def run_id(settings: Mapping[str, object]) -> str:
    """Return what is alike in all lines that were answered under the same settings."""
    text = json.dumps(settings, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


class AnswerLines:
    """The file that answers go to, one by one.

    Args:
        path: the file; a run that was killed goes on with it. None: lines go to `write`.
        run: of `run_id`; a file with lines of another run is refused.
        write: gets every line where there is no file.

    Raises:
        VtpruneError: the file can't be written, is being written, or holds other lines.
    """

    def __init__(
        self, path: Path | None, run: str, write: Callable[[str], None] | None = None
    ) -> None:
        self.path, self.run, self.write = path, run, write
        self.keys: set[str] = set()
        self.lines: ResumableLines | None = None
        if path is not None:
            self.lines = ResumableLines(path, self.take, BEGINNING, "answers of this batch")

    def take(self, line: bytes) -> str:
        """Note the key of a line; return what is wrong with it, "" where nothing is."""
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            return json_fault(error)
        if not isinstance(values, dict) or not isinstance(values.get("key"), str):
            return "no key"
        if values.get("run") != self.run:
            return "answered by another model, preset, settings or version"
        if values["key"] in self.keys:
            return "the same request as an earlier line"
        self.keys.add(values["key"])
        return ""

    def add(self, request: Request, line: Line) -> None:
        """Write the line of a request."""
        if self.lines is not None:
            self.lines.append(line.text, len(self.keys))
        elif self.write is not None:
            self.write(line.text)
        self.keys.add(request.key)

    def __enter__(self) -> AnswerLines:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KeyboardInterrupt) and self.path is not None:
            kept = kept_in(self.path, len(self.keys))
            error.add_note(f"{kept}; the same command goes on from there")
        if self.lines is not None:
            self.lines.close()


# -- the run ---------------------------------------------------------------------------------------

Prepared = PreparedQuestion | VtpruneError


def run_batch(
    loaded: Loaded,
    requests: Sequence[Request],
    lines: AnswerLines,
    settings: BatchSettings,
    on_progress: Progress | None = None,
) -> Counts:
    """Answer the requests that have no line yet.

    Media are decoded by threads, some batches ahead of the model. Requests of some batches are
    ordered by length before they are joined, so that little is padded.
    """
    todo = [request for request in requests if request.key not in lines.keys]
    counts = Counts(len(requests), before=len(requests) - len(todo))
    started = time.perf_counter()
    writer = Writer(lines, todo, settings.in_order, counts, on_progress)
    answering = Answering(loaded, settings, counts)
    with ThreadPoolExecutor(max(settings.workers, 1), "media") as pool:
        try:
            for chunk in read_ahead(pool, loaded, todo, settings):
                for number, result in answering.answer(chunk):
                    writer.add(number, line_of(todo[number], lines.run, result))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    counts.seconds = time.perf_counter() - started
    if loaded.cache is not None:
        counts.notes.append(loaded.cache.describe())
    return counts


class Writer:
    """Writes lines as they come, or each after all before it.

    Args:
        todo: the requests of this run.
    """

    def __init__(
        self,
        lines: AnswerLines,
        todo: Sequence[Request],
        in_order: bool,
        counts: Counts,
        on_progress: Progress | None,
    ) -> None:
        self.lines, self.todo, self.in_order = lines, todo, in_order
        self.counts, self.on_progress = counts, on_progress
        self.waiting: dict[int, Line] = {}
        self.next = 0
        if on_progress:
            on_progress("answering", 0, len(todo))

    def add(self, number: int, line: Line) -> None:
        """Write the line of a request, and those that waited for it."""
        if not self.in_order:
            self.write(number, line)
            return
        self.waiting[number] = line
        while self.next in self.waiting:
            self.write(self.next, self.waiting.pop(self.next))
            self.next += 1

    def write(self, number: int, line: Line) -> None:
        self.lines.add(self.todo[number], line)
        self.counts.failed += line.failed
        self.counts.answered += not line.failed
        if self.on_progress:
            done = self.counts.failed + self.counts.answered
            self.on_progress("answering", done, len(self.todo))


def read_ahead(
    pool: ThreadPoolExecutor, loaded: Loaded, todo: Sequence[Request], settings: BatchSettings
) -> Iterator[list[tuple[int, Request, Prepared]]]:
    """Yield prepared requests, some batches' together; the next ones are read meanwhile.

    A list is emptied when the next is asked for, so that only what waits is held.
    """
    reading = Reading(pool, partial(prepare, loaded, settings=settings), todo, settings)
    while chunk := reading.next_chunk():
        yield chunk
        reading.release(chunk)


class Reading:
    """Requests that threads prepare, about `MOST_AHEAD_BYTES` of them at most.

    Each that is ready starts the next while there is room, so that beyond the bound are those alone
    that the threads had begun. No thread waits for room.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        prepare: Callable[[Request], Prepared],
        todo: Sequence[Request],
        settings: BatchSettings,
    ) -> None:
        self.pool, self.prepare = pool, prepare
        self.numbered = iter(enumerate(todo))
        self.size, self.workers = AHEAD * settings.batch_size, max(settings.workers, 1)
        self.queue: deque[tuple[int, Request, Future[Prepared]]] = deque()
        self.running = self.held = 0
        self.lock = RLock()
        self.fill()

    def fill(self) -> None:
        """Begin requests while threads are idle and there is room; one where none is begun."""
        with self.lock:
            while self.running < self.workers and len(self.queue) < self.size:
                if self.queue and self.held >= MOST_AHEAD_BYTES:
                    return
                for number, request in islice(self.numbered, 1):
                    self.running += 1
                    future = self.pool.submit(self.prepare, request)
                    self.queue.append((number, request, future))
                    future.add_done_callback(self.done)
                    break
                else:
                    return

    def done(self, future: Future[Prepared]) -> None:
        """Count what a request holds, and begin others."""
        if future.cancelled():
            return
        with self.lock:
            self.running -= 1
            self.held += 0 if future.exception() else bytes_of(future.result())
        with suppress(RuntimeError):  # the pool was shut down: the run has ended
            self.fill()

    def next_chunk(self) -> list[tuple[int, Request, Prepared]]:
        """Return the next requests, some batches at most and half of the bytes; [] at the end."""
        chunk: list[tuple[int, Request, Prepared]] = []
        size = 0
        while len(chunk) < self.size and size < MOST_AHEAD_BYTES // 2:
            self.fill()
            with self.lock:
                if not self.queue:
                    break
                number, request, future = self.queue.popleft()
            self.fill()
            prepared = future.result()
            size += bytes_of(prepared)
            chunk.append((number, request, prepared))
        return chunk

    def release(self, chunk: list[tuple[int, Request, Prepared]]) -> None:
        """Let go of requests that are answered."""
        with self.lock:
            self.held -= sum(bytes_of(prepared) for _, _, prepared in chunk)
        chunk.clear()


def bytes_of(prepared: Prepared) -> int:
    """Return the bytes of a request's tensors, each storage once."""
    if isinstance(prepared, VtpruneError):
        return 0
    tensors = [*prepared.tensors.values(), *(item.pixels for item in prepared.media.items)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def prepare(loaded: Loaded, request: Request, settings: BatchSettings) -> Prepared:
    """Read a request's media and make the model's inputs; return why that can't be done."""

    sampling = settings.sampling(request.preset)
    return result_or_error(partial(prepare_request, loaded, request, sampling, settings.limits))


def prepare_request(
    loaded: Loaded,
    request: Request,
    sampling: Sampling,
    limits: Limits,
    thumbnails: bool = False,
    on_progress: Progress | None = None,
) -> PreparedQuestion:
    """Read a request's media and make the model's inputs.

    Args:
        thumbnails: keep small pictures of the media, for drawing.
        on_progress: hears how far decoding is; it may raise, which ends it.

    Raises:
        VtpruneError: a file can't be read, or the model can't take the request.
    """
    if request.fault:
        raise VtpruneError(request.fault, request.hint)
    plan = plan_media(loaded, request.files, sampling, request.preset, limits)
    if len(plan.views) > max(MOST_PAGES, len(request.files)):
        raise VtpruneError(
            f"{len(plan.views):,} pages of {len(request.files)} files are over {MOST_PAGES}",
            "give fewer files",
        )
    media = read_planned(replace(plan, thumbnails=thumbnails), limits, on_progress)
    return prepare_turns(loaded, media, turns_over(request, media.sources), on_device=False)


def turns_over(request: Request, sources: Sequence[Source]) -> list[Turn]:
    """Return the turns of a request; a file of several pages is as many media items.

    Args:
        sources: the pages and other files, in order.
    """
    counts = iter(_pages_by_file(sources))
    turns = []
    for turn in request.turns:
        pages = [next(counts) for _ in range(turn.media)]
        places = zip(turn.places, pages, strict=False)  # a turn without places has its media first
        repeated = tuple(place for place, count in places for _ in range(count))
        turns.append(replace(turn, media=sum(pages), places=repeated))
    return turns


def _pages_by_file(sources: Sequence[Source]) -> list[int]:
    """Return of how many sources in a row each file is."""
    counts: list[int] = []
    pages: set[int] = set()
    last: Path | None = None
    for source in sources:
        if source.path == last and source.page and source.page not in pages:
            counts[-1] += 1
            pages.add(source.page)
        else:  # another file, or the same one again
            counts.append(1)
            last, pages = source.path, {source.page}
    return counts


def result_or_error(work: Callable[[], T]) -> T | VtpruneError:
    """Return what some work for one request gives, or whatever goes wrong with it."""
    try:
        return work()
    except VtpruneError as error:
        return error
    except Exception as error:
        return VtpruneError(
            f"internal {type(error).__name__}: {error}", "this is a bug: report it with the file"
        )


class Answering:
    """The batches of a run; they get smaller when memory runs out.

    Args:
        counts: gets the note of that.
    """

    def __init__(self, loaded: Loaded, settings: BatchSettings, counts: Counts) -> None:
        self.loaded, self.settings, self.counts = loaded, settings, counts
        self.batch_size = settings.batch_size

    def answer(
        self, chunk: Sequence[tuple[int, Request, Prepared]]
    ) -> Iterator[tuple[int, Report | VtpruneError]]:
        """Yield the number and the result of each request of a chunk."""
        by_preset: dict[Preset, list[tuple[int, PreparedQuestion]]] = {}
        for number, request, prepared in chunk:
            if isinstance(prepared, VtpruneError):
                yield number, prepared
            else:
                sampling = self.settings.sampling(request.preset)
                preset = with_sampling(request.preset, sampling)
                by_preset.setdefault(preset, []).append((number, prepared))
        for preset, rows in by_preset.items():
            rows.sort(key=lambda row: row[1].tensors["input_ids"].shape[1])
            for places in group_alike([row[1].tensors for row in rows], len(rows)):
                yield from self.answer_alike([rows[place] for place in places], preset)

    def answer_alike(
        self, rows: Sequence[tuple[int, PreparedQuestion]], preset: Preset
    ) -> Iterator[tuple[int, Report | VtpruneError]]:
        """Yield the results of requests that can be one batch, in batches that fit the memory."""
        waiting = list(rows)
        while waiting:
            batch, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
            began = time.perf_counter()
            results = self.run(batch, preset)
            if isinstance(results, OutOfMemoryError) and len(batch) > 1:
                self.batch_size = max(len(batch) // 2, 1)
                self.counts.notes.append(
                    f"memory ran out with {len(batch)} requests in a batch: {self.batch_size} from "
                    "there on"
                )
                waiting = batch + waiting
            elif isinstance(results, VtpruneError) and len(batch) > 1:
                for row in batch:
                    yield from self.report([row], self.run([row], preset), preset, began)
            else:
                yield from self.report(batch, results, preset, began)

    def run(
        self, batch: Sequence[tuple[int, PreparedQuestion]], preset: Preset
    ) -> list[Run] | VtpruneError:
        """Return the runs of a batch, or why it can't be run."""
        questions = [question for _, question in batch]
        return result_or_error(
            partial(generate, self.loaded, questions, preset, self.settings.generation)
        )

    def report(
        self,
        batch: Sequence[tuple[int, PreparedQuestion]],
        results: list[Run] | VtpruneError,
        preset: Preset,
        began: float,
    ) -> Iterator[tuple[int, Report | VtpruneError]]:
        """Yield the reports of a batch's runs, or its error for each."""
        if isinstance(results, VtpruneError):
            yield from ((number, results) for number, _ in batch)
            return
        for (number, question), run in zip(batch, results, strict=True):
            make = partial(build_report, self.loaded, question, preset, run, began=began)
            yield number, result_or_error(make)
