"""A batch on a Ray cluster: workers that hold the model; the driver alone writes the lines."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError
from vtprune.inference.measuring import describe_versions
from vtprune.inference.report import Versions
from vtprune.process_settings import environment
from vtprune.serving.batch import (
    AHEAD,
    Answering,
    AnswerLines,
    BatchSettings,
    Counts,
    Line,
    Writer,
    line_of,
    read_ahead,
)
from vtprune.serving.ray_address import LOCAL, check_cluster, missing_package, no_cluster
from vtprune.serving.requests import Request

if TYPE_CHECKING:
    import numpy

    from vtprune.models.loading import Progress

STORE_BYTES = 200 * 10**6
"""Of the object store of a cluster on this machine: only lines pass through it."""
TASK_RETRIES = 3
"""How often requests are tried again whose worker was lost with them."""
WORKER_RESTARTS = 8
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal",
               "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # fmt: skip
NUMBER, TEXT, FAILED, NOTE, FAULT, HINT = "number", "text", "failed", "note", "fault", "hint"


@dataclass(frozen=True)
class RayJob:
    """All that a worker needs.

    Args:
        loading: the arguments of `models.loading.load`.
        requests: those without a line.
        run: as of AnswerLines.
        folder: that the requests' paths are relative to.
        versions: of the libraries that answers follow from.
    """

    loading: Mapping[str, object]
    requests: Sequence[Request]
    settings: BatchSettings
    run: str
    folder: str
    versions: Versions


class Worker:
    """An actor of Ray Data, with the model loaded once; two tasks at a time.

    One task's media are decoded while the other one's requests are answered. An error that every
    request would have (a model that is not there) is handed to the driver with the first of them.
    """

    def __init__(self, job: RayJob) -> None:
        self.job, self.lock = job, Lock()
        self.fault: VtpruneError | None = None
        try:
            self.prepare()
        except VtpruneError as error:
            self.fault = error

    def prepare(self) -> None:
        """Load the model.

        Raises:
            VtpruneError: it can't be, or this machine has other versions or files.
        """
        from vtprune.models.loading import load

        logging.disable(logging.WARNING)
        if (versions := describe_versions()) != self.job.versions:
            raise VtpruneError(
                f"a machine of the cluster has {in_words(versions)}, and this one "
                f"{in_words(self.job.versions)}",
                "install the same versions everywhere: others may answer otherwise",
            )
        try:
            os.chdir(self.job.folder)
        except OSError as error:
            names = [str(name) for each in self.job.requests for name in each.files]
            if not all(map(os.path.isabs, names)):
                raise VtpruneError(
                    f"a machine of the cluster has no folder {self.job.folder}",
                    "give files by absolute paths of a disk that all machines share",
                ) from error
        self.loaded = load(**self.job.loading)  # type: ignore[arg-type]
        self.counts = Counts(0)
        self.answering = Answering(self.loaded, self.job.settings, self.counts)

    def __call__(self, rows: dict[str, numpy.ndarray]) -> dict[str, list[object]]:
        """Answer the requests of some numbers."""
        numbers = [int(number) for number in rows[NUMBER]]
        if self.fault is not None:
            return self.columns({numbers[0]: Line("", True)}, self.fault)
        todo = [self.job.requests[number] for number in numbers]
        lines: dict[int, Line] = {}
        settings = self.job.settings
        with ThreadPoolExecutor(settings.workers, "media") as pool:
            for chunk in read_ahead(pool, self.loaded, todo, settings):
                with self.lock:
                    for place, result in self.answering.answer(chunk):
                        lines[numbers[place]] = line_of(todo[place], self.job.run, result)
        return self.columns(lines)

    def columns(
        self, lines: Mapping[int, Line], fault: VtpruneError | None = None
    ) -> dict[str, list[object]]:
        """Return lines by number as columns, with the notes of this worker beside them."""
        size = len(lines)
        note = "" if fault else "\n".join(self.counts.notes)
        return {
            NUMBER: list(lines),
            TEXT: [line.text for line in lines.values()],
            FAILED: [line.failed for line in lines.values()],
            NOTE: [note] * size,
            FAULT: [fault.message if fault else ""] * size,
            HINT: [(fault.hint or "") if fault else ""] * size,
        }


def in_words(versions: Versions) -> str:
    """Return versions as "torch 2.11, ..."."""
    return ", ".join(f"{name} {version}" for name, version in versions.to_dict().items())


def run_on_ray(
    address: str,
    loading: Mapping[str, object],
    requests: Sequence[Request],
    lines: AnswerLines,
    settings: BatchSettings,
    on_progress: Progress | None = None,
) -> Counts:
    """Answer the requests that have no line yet, as `run_batch` does, by workers of a cluster.

    Requests whose worker is lost are tried again, by others and in the end one by one; a line is
    written here, when it has come and there is none of its request.

    Args:
        address: of a cluster; "local" starts one on this machine for the run.
        loading: the arguments of `models.loading.load`.

    Raises:
        VtpruneError: no Ray, no such cluster, none left, or no worker that can load the model.
    """
    todo = [request for request in requests if request.key not in lines.keys]
    counts = Counts(len(requests), before=len(requests) - len(todo))
    if not todo:
        return counts
    writer = Writer(lines, todo, settings.in_order, counts, on_progress)
    job = RayJob(loading, todo, settings, lines.run, os.getcwd(), describe_versions())
    left = dict.fromkeys(range(len(todo)))
    notes: dict[str, None] = {}
    with connected(address):
        started = time.perf_counter()
        for alone in (False, True):
            for row in answer_rows(job, list(left), alone):
                if row[FAULT]:
                    raise VtpruneError(str(row[FAULT]), str(row[HINT]))
                notes |= dict.fromkeys(filter(None, str(row[NOTE]).split("\n")))
                number = int(str(row[NUMBER]))
                if number in left:  # a task that was lost and repeated may give it twice
                    del left[number]
                    writer.add(number, Line(str(row[TEXT]), bool(row[FAILED])))
            if not left:
                break
        if len(left) == len(todo):
            raise VtpruneError(
                "no worker of the cluster came to an answer: each was lost while it began",
                "see the logs of the Ray session; a worker needs the memory for a model",
            )
        for number in left:
            lost = VtpruneError(
                f"the worker was lost with this request alone, {1 + TASK_RETRIES} times",
                "its media or the model may take more memory than a machine of the cluster has",
            )
            writer.add(number, line_of(todo[number], lines.run, lost))
    counts.seconds = time.perf_counter() - started
    counts.notes += notes
    return counts


def answer_rows(job: RayJob, numbers: Sequence[int], alone: bool) -> Iterator[dict[str, object]]:
    """Yield what workers give for requests, as it comes; those are missing that were lost.

    Args:
        alone: each request is a task of its own, so that it is lost with no other.

    Raises:
        VtpruneError: the cluster is lost, or has no place for a worker.
    """
    import ray
    from ray.data import ActorPoolStrategy, from_items

    needs, most = size_workers(ray.nodes())
    batch_size = job.settings.batch_size
    share = -(-len(numbers) // (2 * most))  # two tasks a worker, where there are few requests
    together = 1 if alone else max(min(AHEAD * batch_size, share), 1)
    tasks = -(-len(numbers) // together)
    workers = min(most, tasks)
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=workers,
        initial_size=workers,
        max_tasks_in_flight_per_actor=2,
        max_concurrent_calls_per_actor=2,
        enable_true_multi_threading=True,
    )
    items = [{NUMBER: number} for number in numbers]
    data = from_items(items, override_num_blocks=tasks).map_batches(
        Worker,
        fn_constructor_args=(job,),
        batch_size=together,
        compute=pool,
        max_restarts=WORKER_RESTARTS,
        max_task_retries=TASK_RETRIES,
        **needs,
    )
    try:
        for block in data.iter_batches(batch_size=None, prefetch_batches=0):
            for values in zip(*block.values(), strict=True):
                yield dict(zip(block, values, strict=True))
    except ray.exceptions.RayError as error:
        raise VtpruneError(
            f"the cluster is lost: {type(error).__name__}: {str(error).strip().splitlines()[0]}",
            "start it again, then give the same command: it goes on from there",
        ) from error


def size_workers(nodes: Sequence[Mapping[str, object]]) -> tuple[dict[str, float], int]:
    """Return what a worker takes of a machine, and how many the cluster has room for.

    A GPU each, with its share of the machine's processors; where there is none, all processors of
    the smallest machine.

    Args:
        nodes: as Ray lists them.

    Raises:
        VtpruneError: no machine of the cluster has a processor to give.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    assert all(isinstance(each, Mapping) for each in resources)
    pairs = [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources]  # type: ignore[attr-defined]
    with_gpu = [(cpus, gpus) for cpus, gpus in pairs if gpus and cpus]
    if with_gpu:
        share = max(min(cpus // gpus for cpus, gpus in with_gpu), 1)
        most = sum(min(gpus, cpus // share) for cpus, gpus in with_gpu)
        return {"num_gpus": 1.0, "num_cpus": float(share)}, most
    with_cpu = [cpus for cpus, _ in pairs if cpus]
    if not with_cpu:
        raise VtpruneError(
            "no machine of the cluster has a processor to give", "start one with ray start"
        )
    share = min(with_cpu)
    return {"num_cpus": float(share)}, sum(cpus // share for cpus in with_cpu)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to a cluster, with nothing of Ray's own on the terminal.

    Raises:
        VtpruneError: Ray is not installed, or no cluster answers at the address.
    """
    with ExitStack() as stack:
        variables = dict(ENVIRONMENT)
        options: dict[str, object] = {}
        if address == LOCAL:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="vtprune-ray-", ignore_cleanup_errors=True)
            )
            variables["RAY_TMPDIR"] = folder
            variables["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else it makes one in the home
            options = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        else:
            check_cluster(address)
        stack.enter_context(environment(variables))
        stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            with stderr_of_process_hidden():  # its C++ part tells of its own log level
                import ray
                import ray.data

                ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
        except ImportError as error:
            raise missing_package(error.name or "ray") from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise no_cluster(address, str(error).strip().splitlines()[0]) from error
        stack.callback(ray.shutdown)
        stack.enter_context(settings_of_ray_data())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(silenced("ray"))
        stack.enter_context(silenced("ray.data"))
        yield


@contextmanager
def settings_of_ray_data() -> Iterator[None]:
    """Let Ray Data print nothing, and go on without the requests that were lost for good."""
    from ray.data import DataContext

    context = DataContext.get_current()
    values = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "max_errored_blocks": -1,
    }
    before = {name: getattr(context, name) for name in values}
    for name, value in values.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


@contextmanager
def stderr_of_process_hidden() -> Iterator[None]:
    """Let nothing that this process or a library in it writes come to standard error."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Keep a library's log lines off the terminal."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
