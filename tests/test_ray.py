"""Batches on a Ray cluster of two nodes: the same lines, whatever is killed. `--ray` runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import save_noise

import vtprune
from vtprune.errors import VtpruneError
from vtprune.inference.generate import Generation
from vtprune.inference.prepare import sampling_of
from vtprune.models.base import Sampling
from vtprune.preset import Preset
from vtprune.serving.batch import AnswerLines, BatchSettings, Counts, run_batch
from vtprune.serving.on_ray import TASK_RETRIES, run_on_ray, size_workers
from vtprune.serving.requests import Request, requests_about

SHORT = BatchSettings(generation=Generation(max_new_tokens=4), batch_size=1)
PRESET = vtprune.load_preset({"keep": 0.4, "stages": [{"at": 2, "method": "random"}]})
QUESTIONS = ["what?", "which of them is it then?", "where?", "how many?", "why?", "who?"]
STORE = 120_000_000
pytestmark = pytest.mark.timeout(240)


def node(cpus: int, gpus: int = 0, alive: bool = True) -> dict[str, object]:
    return {"Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}


def test_workers_have_a_gpu_each_or_the_processors_of_a_machine() -> None:
    assert size_workers([node(8), node(32, 8), node(16, 2)]) == (
        {"num_gpus": 1.0, "num_cpus": 4.0},
        10,
    )
    assert size_workers([node(2), node(8), node(64, 8, alive=False)]) == ({"num_cpus": 2.0}, 5)
    with pytest.raises(VtpruneError, match="no machine of the cluster has a processor"):
        size_workers([node(0)])


def test_without_ray_the_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    requests = requests_about(["a.png"], ["what?"], PRESET)
    with (
        AnswerLines(None, "r", lambda text: None) as lines,
        pytest.raises(VtpruneError, match="--ray needs the package ray") as caught,
    ):
        run_on_ray("local", {}, requests, lines, SHORT)
    assert caught.value.hint == 'pip install "vtprune[ray]"'


def test_without_a_cluster_the_run_is_refused() -> None:
    pytest.importorskip("ray")
    requests = requests_about(["a.png"], ["what?"], PRESET)
    with (
        AnswerLines(None, "r", lambda text: None) as lines,
        pytest.raises(VtpruneError, match=r"--ray 127.0.0.1:1: no cluster there: Connection"),
    ):
        run_on_ray("127.0.0.1:1", {}, requests, lines, SHORT)


# -- on a cluster ----------------------------------------------------------------------------------


class Nodes:
    """Two nodes on this machine, with a processor each; the second one can be killed."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        (folder / "ray").mkdir()
        self.folder = folder
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False,
                            "temp_dir": str(folder / "ray")},
        )  # fmt: skip
        self.add()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> None:
        self.second = self.cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def kill_second(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def workers(self) -> list[int]:
        """The processes that hold a model."""
        found = []
        for process in Path("/proc").iterdir():
            try:
                title = (process / "cmdline").read_bytes()
                if title.startswith(b"ray::") and b"Worker" in title:
                    mine = str(self.folder).encode() in (process / "environ").read_bytes()
                    found += [int(process.name)] * mine
            except OSError:
                continue
        return sorted(found)


@pytest.fixture(scope="module")
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    if not request.config.getoption("--ray"):
        pytest.skip("--ray runs a cluster")
    pytest.importorskip("ray")
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="vr-") as folder:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        nodes = Nodes(Path(folder))
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    """Questions about pictures, one of them damaged."""
    root = tmp_path_factory.mktemp("pictures")
    files = [save_noise(root / f"{number}.png", 40 + 20 * number, 60) for number in range(5)]
    (root / "bad.png").write_bytes(files[0].read_bytes()[:200])
    return requests_about([*map(str, files), str(root / "bad.png")], QUESTIONS, PRESET)


@pytest.fixture(scope="module")
def loading(checkpoints: Callable[[str], Path]) -> dict[str, object]:
    return {"name": str(checkpoints("llava_onevision"))}


@pytest.fixture(scope="module")
def alone(loading: dict[str, object], requests: Sequence[Request]) -> list[dict[str, Any]]:
    """The lines of a run without Ray."""
    texts: list[str] = []
    with AnswerLines(None, "r", texts.append) as lines:
        run_batch(vtprune.load(str(loading["name"])), requests, lines, SHORT)
    return [json.loads(text) for text in texts]


def run(
    nodes: Nodes,
    loading: dict[str, object],
    requests: Sequence[Request],
    path: Path,
    on_done: Callable[[int], None] = lambda done: None,
    settings: BatchSettings = SHORT,
) -> Counts:
    with AnswerLines(path, "r") as lines:
        return run_on_ray(nodes.address, loading, requests, lines, settings,
                          lambda stage, done, total: on_done(done))  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(lines: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]) -> None:
    """Nothing is lost, doubled or answered otherwise."""
    assert len(lines) == len({line["key"] for line in lines}) == len(alone)
    by_key = {line["key"]: line for line in lines}
    for line in alone:
        other = by_key[line["key"]]
        for name in set(line) - {"seconds"}:
            assert other[name] == line[name], name


def test_the_same_lines_as_without(
    nodes: Nodes, loading: dict[str, object], requests: list[Request], alone: list[dict[str, Any]],
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    seen: set[int] = set()
    settings = replace(SHORT, in_order=True, batch_size=2)
    counts = run(nodes, loading, requests, tmp_path / "a.jsonl",
                 lambda done: seen.update(nodes.workers()), settings)  # fmt: skip
    lines = read(tmp_path / "a.jsonl")
    assert_same(lines, alone)
    assert [line["key"] for line in lines] == [request.key for request in requests]
    assert (counts.answered, counts.failed) == (30, 6)
    assert len(seen) >= 2
    assert capfd.readouterr() == ("", "")
    again = run(nodes, loading, requests, tmp_path / "a.jsonl")
    assert (again.before, again.answered) == (36, 0)


@pytest.mark.parametrize("what", ["worker", "node"])
def test_what_is_killed_in_the_middle_loses_and_doubles_nothing(
    nodes: Nodes, loading: dict[str, object], requests: list[Request], alone: list[dict[str, Any]],
    tmp_path: Path, what: str
) -> None:  # fmt: skip
    killed = []

    def kill(done: int) -> None:
        if done < 4 or killed:
            return
        killed.append(done)
        if what == "node":
            nodes.kill_second()
        else:
            for process in nodes.workers()[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    try:
        run(nodes, loading, requests, tmp_path / "a.jsonl", kill)
    finally:
        if what == "node" and killed:
            nodes.add()
    assert killed
    assert killed[0] < len(requests)
    assert what == "node" or len(killed) == 2
    assert_same(read(tmp_path / "a.jsonl"), alone)


def test_a_request_that_ends_every_worker_has_an_error_in_its_line(
    nodes: Nodes, loading: dict[str, object], requests: list[Request], alone: list[dict[str, Any]],
    tmp_path: Path
) -> None:  # fmt: skip
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    deadly = replace(requests[3], preset=replace(PRESET, seed=13), key="deadly")

    def sampling(preset: Preset) -> Sampling:
        return os._exit(1) if preset.seed == 13 else sampling_of(preset)

    settings = replace(SHORT, sampling=sampling)
    run(nodes, loading, [*requests[:8], deadly], tmp_path / "a.jsonl", settings=settings)
    lines = read(tmp_path / "a.jsonl")
    (lost,) = [line for line in lines if line["key"] == "deadly"]
    assert f"lost with this request alone, {1 + TASK_RETRIES} times" in lost["error"]
    keys = {request.key for request in requests[:8]}
    assert_same([line for line in lines if line != lost],
                [line for line in alone if line["key"] in keys])  # fmt: skip


def test_a_killed_driver_goes_on_and_a_model_that_is_not_there_is_said_once(
    nodes: Nodes, loading: dict[str, object], requests: list[Request], tmp_path: Path
) -> None:
    folder, path = Path(requests[0].files[0]).parent, tmp_path / "a.jsonl"
    args = [sys.executable, "-m", "vtprune", "batch", str(folder), "--keep", "0.4",
            "--max-new-tokens", "2", "--batch-size", "1", "--ray", nodes.address, "--save",
            str(path), *(part for question in QUESTIONS for part in ("-q", question))]  # fmt: skip
    bare = tmp_path / "bare"  # only the workers look into it
    bare.mkdir()
    missing = subprocess.run([*args, "--model", str(bare)], capture_output=True, text=True)
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-2].startswith(f"Error: {bare}")
    assert missing.stderr.count("Error: ") == 1
    args += ["--model", str(loading["name"])]
    with subprocess.Popen(args, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (path.exists() and path.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    held = path.read_bytes().count(b"\n")
    assert 0 < held < 36
    done = subprocess.run([*args, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["before"] == held
    assert len({line["key"] for line in read(path)}) == len(read(path)) == 36
