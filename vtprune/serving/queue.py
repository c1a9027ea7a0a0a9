"""The queue before one model: waiting requests are joined in batches, and not too many wait."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from vtprune.errors import ModelError, VtpruneError
from vtprune.inference.generate import Generation, Listener, Run, end_tokens, generate
from vtprune.inference.measuring import build_report
from vtprune.inference.out_of_memory import OutOfMemoryError
from vtprune.inference.prepare import PreparedQuestion, group_alike, sampling_of, with_sampling
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.models.structure import find_structure
from vtprune.serving.batch import prepare_request, result_or_error
from vtprune.serving.requests import Request
from vtprune.serving.stop_sequences import before_stop, visible_part

if TYPE_CHECKING:
    from vtprune.inference.report import Report
    from vtprune.models.loading import Loaded
    from vtprune.models.structure import Structure
    from vtprune.preset import Preset


LAST_TOKEN = 2.0
"""Seconds that the end of a server waits for a token of an answer that nobody wants."""


class QueueFullError(VtpruneError):
    """More requests wait than the server holds."""


class StoppingError(VtpruneError):
    """The server takes no more requests: it is about to end."""


class HungUpError(Exception):
    """The client has gone: its media are not needed."""


@dataclass(eq=False)
class Job:
    """One request on its way.

    Args:
        stops: sequences that end the answer; they are no part of it.
        listener: gets the pieces of its answer, in the model's thread; None: nobody reads along.
        thumbnails: keep small pictures, so that what was kept can be drawn.
        on_prepared: called when its files are needed no more, whatever became of them.
        gone: set when nobody waits for the answer any more.
        arrived, ready, began: when it came, when its media were decoded, and when its batch began;
            on `time.perf_counter`'s clock.
        stopped: whether one of the stop sequences has come.
        finish_reason: why the answer ended, in OpenAI's words: "stop" or "length".
    """

    request: Request
    generation: Generation
    stops: tuple[str, ...] = ()
    listener: Listener | None = None
    thumbnails: bool = False
    on_prepared: Callable[[], None] = lambda: None
    gone: threading.Event = field(default_factory=threading.Event)
    result: Future[Report] = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)
    ready: float = 0.0
    began: float = 0.0
    prepared: PreparedQuestion | None = None
    preset: Preset | None = None
    sent: str = ""
    stopped: bool = False
    finish_reason: str = "stop"

    def listen(self) -> Listener | None:
        """Return what gets the pieces of one run; those that an earlier run gave are left out."""
        self.stopped = False
        if self.listener is None and not self.stops:
            return None
        text = ""

        def take(piece: str) -> None:
            nonlocal text
            if self.stopped:
                return
            text += piece
            self.stopped = before_stop(text, self.stops) is not None
            self.send(visible_part(text, self.stops))

        return take

    def send(self, text: str) -> None:
        """Give the listener what is new in the answer so far."""
        if self.listener is not None and len(text) > len(self.sent):
            self.listener(text[len(self.sent) :])
            self.sent = text

    def notice(self, stage: str, done: int, total: int) -> None:
        """End the decoding of media that nobody waits for."""
        if self.gone.is_set():
            raise HungUpError

    def fail(self, error: VtpruneError) -> None:
        """Give an error in place of an answer, without the folders of this machine."""
        for folder in {f"{os.path.dirname(str(file))}{os.sep}" for file in self.request.files}:
            error.message = error.message.replace(folder, "")
            error.hint = error.hint.replace(folder, "")
        if not self.result.done():
            self.result.set_exception(error)

    def finish(self, report: Report, reason: str) -> None:
        """Give the answer."""
        self.finish_reason = reason
        self.send(report.answer)
        if not self.result.done():
            self.result.set_result(report)

    def drop(self) -> None:
        """Give no answer: nobody waits for it."""
        self.result.cancel()


@dataclass(frozen=True)
class QueueSettings:
    """How requests are joined.

    Args:
        max_batch: the most requests in one forward.
        max_wait: seconds that a request waits for others to join it.
        max_queue: requests that may wait; one more is refused.
        workers: threads that decode media.
    """

    max_batch: int = 8
    max_wait: float = 0.02
    max_queue: int = 64
    workers: int = 2
    limits: Limits = field(default_factory=Limits)
    sampling: Callable[[Preset], Sampling] = sampling_of


class JobQueue:
    """Requests for one model, answered by one thread.

    Args:
        on_done: hears of every answer, for counting.
    """

    def __init__(
        self,
        loaded: Loaded,
        settings: QueueSettings,
        on_done: Callable[[Job, Report], None] = lambda job, report: None,
    ) -> None:
        self.loaded, self.settings, self.on_done = loaded, settings, on_done
        self.structure: Structure | None = None
        with suppress(ModelError):  # it runs unpruned
            self.structure = find_structure(loaded.model)
        self.changed = threading.Condition()
        self.ready: list[Job] = []
        self.waiting = 0  # taken, and not yet begun
        self.batch: list[Job] = []  # that runs
        self.stopping = False
        self.batch_sizes: Counter[int] = Counter()
        self.pool = ThreadPoolExecutor(settings.workers, "media")
        self.thread = threading.Thread(target=self.work, name="model", daemon=True)
        self.thread.start()

    @property
    def running(self) -> int:
        """Requests in the batch that runs."""
        return len(self.batch)

    def check_room(self) -> None:
        """Refuse a request where there is no room for it.

        Raises:
            QueueFullError: too many wait already.
            StoppingError: the server is about to end.
        """
        if self.stopping:
            raise StoppingError("the server is shutting down", "ask again later")
        if self.waiting >= self.settings.max_queue:
            raise QueueFullError(
                f"{self.waiting} requests wait already, the most that may", "ask again later"
            )

    def enter(self) -> None:
        """Take a place, for a request whose media are still fetched; as `check_room`."""
        with self.changed:
            self.check_room()
            self.waiting += 1

    def leave(self) -> None:
        """Give a place back."""
        with self.changed:
            self.waiting -= 1
            self.changed.notify_all()

    def submit(self, job: Job) -> None:
        """Take a request that has a place; its result comes to `job.result`."""
        self.pool.submit(self.prepare, job)

    def hang_up(self, job: Job) -> None:
        """Drop a request that nobody waits for any more; one that waits gives its place back."""
        with self.changed:
            job.gone.set()
            if job in self.ready:
                self.ready.remove(job)
                self.waiting -= 1
                job.drop()
            self.changed.notify_all()

    def prepare(self, job: Job) -> None:
        """Decode the media of a request, and hand it to the model's thread."""
        result = None if job.gone.is_set() else result_or_error(partial(self.decode, job))
        job.on_prepared()
        job.ready = time.perf_counter()
        with self.changed:
            if isinstance(result, PreparedQuestion) and not job.gone.is_set():
                job.prepared = result
                self.ready.append(job)
            else:
                self.waiting -= 1
            self.changed.notify_all()
        if job.gone.is_set():
            job.drop()
        elif isinstance(result, VtpruneError):
            job.fail(result)

    def decode(self, job: Job) -> PreparedQuestion:
        """Return the model's inputs for a request."""
        preset = job.request.preset
        sampling = self.settings.sampling(preset)
        job.preset = with_sampling(preset, sampling)
        prepared = prepare_request(
            self.loaded, job.request, sampling, self.settings.limits, job.thumbnails, job.notice
        )
        self.check_text(prepared)
        return prepared

    def check_text(self, prepared: PreparedQuestion) -> None:
        """Refuse texts that alone are longer than the model reads: all others would wait for them.

        Raises:
            VtpruneError: more tokens of text than the model has positions.
        """
        limit = None if self.structure is None else self.structure.num_positions
        if self.structure is None or limit is None:
            return
        visual = self.structure.placeholder_ids()
        text = sum(token not in visual for token in prepared.tensors["input_ids"][0].tolist())
        if text > limit:
            raise VtpruneError(
                f"the messages have {text:,} tokens of text, and this model was made for "
                f"{limit:,} positions",
                "leave the oldest out, or ask a shorter question",
            )

    def work(self) -> None:
        """Answer batch after batch, until the server ends and none is left."""
        while (batch := self.next_batch()) is not None:
            fault = result_or_error(partial(self.answer, batch))
            for job in batch:
                if isinstance(fault, VtpruneError):
                    job.fail(fault)
                job.drop()  # what has no answer by now gets none
            with self.changed:
                self.batch = []
                self.changed.notify_all()

    def next_batch(self) -> list[Job] | None:
        """Return requests that can be one batch, as soon as it is full or has waited long enough;
        None at the end."""
        with self.changed:
            while True:
                if not self.ready:
                    if self.stopping and not self.waiting:
                        return None
                    self.changed.wait(0.5)
                    continue
                batch = self.alike()
                oldest = min(job.arrived for job in batch)
                left = oldest + self.settings.max_wait - time.perf_counter()
                if len(batch) < self.settings.max_batch and left > 0 and not self.stopping:
                    self.changed.wait(left)
                    continue
                for job in batch:
                    self.ready.remove(job)
                self.waiting -= len(batch)
                self.batch = batch
                self.batch_sizes[len(batch)] += 1
                return batch

    def alike(self) -> list[Job]:
        """Return the oldest request that is ready, and those that can be answered with it."""
        first = min(self.ready, key=lambda job: job.arrived)
        same = [job for job in self.ready if kind_of(job) == kind_of(first)]
        same.sort(key=lambda job: job.arrived)
        tensors = [job.prepared.tensors for job in same if job.prepared is not None]
        for places in group_alike(tensors, self.settings.max_batch):
            if 0 in places:
                return [same[place] for place in places]
        raise AssertionError("the oldest request is in a group")

    def answer(self, batch: Sequence[Job]) -> None:
        """Answer a batch; where memory runs out its halves, where it fails each request alone."""
        batch = [job for job in batch if not job.gone.is_set()]
        if not batch:
            return
        began = time.perf_counter()
        runs = result_or_error(partial(self.run, batch))
        if isinstance(runs, VtpruneError):
            if len(batch) == 1:
                batch[0].fail(runs)
                return
            size = len(batch) // 2 if isinstance(runs, OutOfMemoryError) else 1
            for start in range(0, len(batch), size):
                self.answer(batch[start : start + size])
            return
        for job, run in zip(batch, runs, strict=True):
            job.began = began
            report = result_or_error(partial(self.report, job, run))
            if isinstance(report, VtpruneError):
                job.fail(report)
            elif not job.gone.is_set():
                self.on_done(job, report)
                job.finish(report, self.reason(job, run))

    def reason(self, job: Job, run: Run) -> str:
        """Return why an answer ended, in OpenAI's words."""
        tokens = run.tokens.tolist()
        cut = len(tokens) >= job.generation.max_new_tokens and not job.stopped
        return "length" if cut and tokens[-1] not in end_tokens(self.loaded) else "stop"

    def run(self, batch: Sequence[Job]) -> list[Run]:
        """Return the runs of a batch."""
        assert batch[0].preset is not None
        questions = [job.prepared for job in batch if job.prepared is not None]
        listeners = [job.listen() for job in batch]

        def stopped() -> list[bool]:
            return [job.stopped or job.gone.is_set() for job in batch]

        return generate(
            self.loaded, questions, batch[0].preset, batch[0].generation,
            listeners=listeners, stopped=stopped,
        )  # fmt: skip

    def report(self, job: Job, run: Run) -> Report:
        """Return the report of a job."""
        assert job.prepared is not None
        assert job.preset is not None
        answer = before_stop(run.answer, job.stops)
        cut = run if answer is None else replace(run, answer=answer.rstrip())
        return build_report(self.loaded, job.prepared, job.preset, cut, began=job.arrived)

    def stop(self, seconds: float = 60.0) -> None:
        """Take no more requests, and wait until all who still wait for an answer have it.

        What runs for clients that have gone ends at the next token; a long prompt is not waited
        for, and leaves the thread alive.
        """
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
            self.changed.wait_for(self.is_idle, seconds)
        self.thread.join(LAST_TOKEN)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self.waiting and all(job.gone.is_set() for job in self.batch)


def kind_of(job: Job) -> tuple[object, ...]:
    """Return what requests have to share to be one batch; a prompt without media stays apart."""
    return job.preset, job.generation, bool(job.request.files)
