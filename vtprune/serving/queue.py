"""The queue before one model: waiting requests are joined in batches, and not too many wait."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError
from vtprune.inference.generate import Generation, Listener, Run, generate
from vtprune.inference.measuring import build_report
from vtprune.inference.out_of_memory import OutOfMemoryError
from vtprune.inference.prepare import PreparedQuestion, group_alike, sampling_of, with_sampling
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.serving.batch import attempt, prepare_request
from vtprune.serving.requests import Request

if TYPE_CHECKING:
    from vtprune.inference.report import Report
    from vtprune.models.loading import Loaded
    from vtprune.preset import Preset


class QueueFullError(VtpruneError):
    """More requests wait than the server holds."""


class StoppingError(VtpruneError):
    """The server takes no more requests: it is about to end."""


@dataclass(eq=False)
class Job:
    """One request on its way.

    Args:
        listener: gets the pieces of its answer, in the model's thread; None: nobody reads along.
        thumbnails: keep small pictures, so that what was kept can be drawn.
        gone: set when nobody waits for the answer any more.
    """

    request: Request
    generation: Generation
    listener: Listener | None = None
    thumbnails: bool = False
    gone: threading.Event = field(default_factory=threading.Event)
    result: Future[Report] = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)
    prepared: PreparedQuestion | None = None
    preset: Preset | None = None
    sent: str = ""

    def listen(self) -> Listener | None:
        """Return what gets the pieces of one run; those that an earlier run gave are left out."""
        if self.listener is None:
            return None
        text = ""

        def take(piece: str) -> None:
            nonlocal text
            text += piece
            if len(text) > len(self.sent) and self.listener is not None:
                self.listener(text[len(self.sent) :])
                self.sent = text

        return take


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
        on_done: hears of every report, for counting.
    """

    def __init__(
        self,
        loaded: Loaded,
        settings: QueueSettings,
        on_done: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self.loaded, self.settings, self.on_done = loaded, settings, on_done
        self.changed = threading.Condition()
        self.ready: list[Job] = []
        self.waiting = 0  # taken, and not yet begun
        self.running = 0
        self.stopping = False
        self.batch_sizes: Counter[int] = Counter()
        self.pool = ThreadPoolExecutor(settings.workers, "media")
        self.thread = threading.Thread(target=self.work, name="model", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Take a request; its result comes to `job.result`.

        Raises:
            QueueFullError: too many wait already.
            StoppingError: the server is about to end.
        """
        with self.changed:
            if self.stopping:
                raise StoppingError("the server is shutting down", "ask again later")
            if self.waiting >= self.settings.max_queue:
                raise QueueFullError(
                    f"{self.waiting} requests wait already, the most that may", "ask again later"
                )
            self.waiting += 1
        self.pool.submit(self.prepare, job)

    def prepare(self, job: Job) -> None:
        """Decode the media of a request, and hand it to the model's thread."""
        result: PreparedQuestion | VtpruneError | None = None
        if not job.gone.is_set():
            request, settings = job.request, self.settings
            sampling = settings.sampling(request.preset)
            result = attempt(partial(prepare_request, self.loaded, request, sampling,
                                     settings.limits, job.thumbnails))  # fmt: skip
        with self.changed:
            if isinstance(result, PreparedQuestion):
                job.prepared = result
                preset = job.request.preset
                job.preset = with_sampling(preset, self.settings.sampling(preset))
                self.ready.append(job)
            else:
                self.waiting -= 1
            self.changed.notify_all()
        if isinstance(result, VtpruneError):
            job.result.set_exception(result)
        elif result is None:
            job.result.cancel()

    def work(self) -> None:
        """Answer batch after batch, until the server ends and none is left."""
        while (batch := self.next_batch()) is not None:
            self.answer(batch)
            with self.changed:
                self.running = 0
                self.changed.notify_all()

    def next_batch(self) -> list[Job] | None:
        """Return requests that can be one batch, as soon as it is full or has waited long enough;
        None at the end."""
        with self.changed:
            while True:
                gone = [job for job in self.ready if job.gone.is_set()]
                for job in gone:
                    self.ready.remove(job)
                    self.waiting -= 1
                    job.result.cancel()
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
                self.running = len(batch)
                self.batch_sizes[len(batch)] += 1
                return batch

    def alike(self) -> list[Job]:
        """Return the oldest request that is ready, and those that can be answered with it."""
        first = min(self.ready, key=lambda job: job.arrived)
        same = [
            job
            for job in self.ready
            if (job.preset, job.generation) == (first.preset, first.generation)
        ]
        same.sort(key=lambda job: job.arrived)
        tensors = [job.prepared.tensors for job in same if job.prepared is not None]
        for places in group_alike(tensors, self.settings.max_batch):
            if 0 in places:
                return [same[place] for place in places]
        raise AssertionError("the oldest request is in a group")

    def answer(self, batch: Sequence[Job]) -> None:
        """Answer a batch; where it fails, its requests one by one."""
        began = time.perf_counter()
        runs = attempt(partial(self.run, batch))
        if isinstance(runs, VtpruneError) and len(batch) > 1:
            if isinstance(runs, OutOfMemoryError):
                half = len(batch) // 2
                parts = [batch[:half], batch[half:]]
            else:
                parts = [[job] for job in batch]
            for part in parts:
                self.answer([job for job in part if not job.gone.is_set()] or part[:0])
            return
        if not batch:
            return
        if isinstance(runs, VtpruneError):
            batch[0].result.set_exception(runs)
            return
        for job, run in zip(batch, runs, strict=True):
            if job.gone.is_set():
                job.result.cancel()
                continue
            report = attempt(partial(self.report, job, run, began))
            if isinstance(report, VtpruneError):
                job.result.set_exception(report)
            else:
                self.on_done(report)
                job.result.set_result(report)

    def run(self, batch: Sequence[Job]) -> list[Run]:
        """Return the runs of a batch."""
        if not batch:
            return []
        assert batch[0].preset is not None
        questions = [job.prepared for job in batch if job.prepared is not None]
        listeners = [job.listen() for job in batch]

        def stopped() -> list[bool]:
            return [job.gone.is_set() for job in batch]

        return generate(
            self.loaded, questions, batch[0].preset, batch[0].generation,
            listeners=listeners, stopped=stopped,
        )  # fmt: skip

    def report(self, job: Job, run: Run, began: float) -> Report:
        """Return the report of a job."""
        assert job.prepared is not None
        assert job.preset is not None
        return build_report(self.loaded, job.prepared, job.preset, run, began=began)

    def stop(self, seconds: float = 60.0) -> None:
        """Take no more requests, and wait until those that are here have their answers."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.pool.shutdown(wait=True)
        self.thread.join(seconds)
