"""A clock of the system that jumps by days changes dates, and nothing else."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import save_noise

import vtprune
from vtprune.disk_cache import PART, DiskCache
from vtprune.inference.generate import Generation
from vtprune.serving.batch import AnswerLines, BatchSettings, run_batch
from vtprune.serving.requests import requests_about

ROOT = Path(vtprune.__file__).parent
DAY = 86400.0
SHORT = Generation(max_new_tokens=2)
PRESET = vtprune.load_preset({"keep": 0.4, "stages": [{"at": 2, "method": "random"}]})
WALL_CLOCK = re.compile(
    r"\btime\.(time|time_ns|ctime|localtime|gmtime)\(|\bdate(time)?\.(now|utcnow|today)\("
)
DATED = {
    "disk_cache.py",
    "evaluation/calibration/calibrate.py",
    "evaluation/tune.py",
    "serving/app.py",
    "serving/chat.py",
    "serving/uploads.py",
}
"""The files that read the system's clock: for the ages of files and the dates of results."""


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system whose clock is a day ahead, a day behind, and right, in turn."""
    jumps, clock = itertools.cycle((DAY, -DAY, 0.0)), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [save_noise(folder / f"{number}.png", 40 + 20 * number, 60) for number in range(3)]


def seconds_in(value: object, inside: bool = False) -> Iterator[float]:
    """The seconds in a result."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from seconds_in(item, inside or name in ("seconds", "prefill", "first"))
    elif isinstance(value, list):
        for item in value:
            yield from seconds_in(item, inside)
    elif inside and isinstance(value, (int, float)):
        yield value


def check_seconds(value: object) -> None:
    seconds = list(seconds_in(value))
    assert seconds
    assert all(0 <= each < 600 for each in seconds)


def test_the_clock_is_read_for_dates_alone() -> None:
    files = {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in ROOT.rglob("*.py")
    }
    assert {name for name, text in files.items() if WALL_CLOCK.search(text)} == DATED


@pytest.mark.usefixtures("jumping")
def test_a_batch_loses_nothing(
    loaded: vtprune.Loaded, pictures: list[Path], tmp_path: Path
) -> None:
    requests = requests_about(list(map(str, pictures)), ["what?", "where?"], PRESET)
    path = tmp_path / "answers.jsonl"
    with AnswerLines(path, "r") as lines:
        counts = run_batch(loaded, requests, lines, BatchSettings(generation=SHORT, batch_size=4))
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert {answer["key"] for answer in answers} == {request.key for request in requests}
    assert (counts.answered, counts.failed) == (6, 0)
    check_seconds([counts.to_dict(), *answers])


@pytest.mark.usefixtures("jumping")
def test_an_evaluation_loses_nothing(
    loaded: vtprune.Loaded, pictures: list[Path], tmp_path: Path
) -> None:
    questions = [(str(picture), "what?") for picture in pictures[:2]]
    path = tmp_path / "answers.jsonl"
    result = vtprune.evaluate(loaded, questions, ["uniform"], [0.4], seeds=1, generation=SHORT,
                              answers=path)  # fmt: skip
    _, *answers = map(json.loads, path.read_text().splitlines())
    assert len(answers) == len(questions) * len(result.rows)
    check_seconds([result.to_dict(), *answers])


@pytest.mark.usefixtures("jumping")
def test_a_server_answers_and_keeps_uploads(loaded: vtprune.Loaded, pictures: list[Path]) -> None:
    for package in ("fastapi", "prometheus_client", "python_multipart"):
        pytest.importorskip(package)
    from fastapi.testclient import TestClient

    from vtprune.serving.app import ServerSettings, create_app

    with TestClient(create_app(loaded, ServerSettings("tiny", PRESET, SHORT))) as client:
        data = pictures[0].read_bytes()
        name = client.post("/v1/files", files={"file": ("a.png", data)}).json()["id"]
        picture = {"type": "image_url", "image_url": {"url": name}}
        parts = [picture, {"type": "text", "text": "what?"}]
        body = {"messages": [{"role": "user", "content": parts}]}
        for _ in range(3):
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
        assert client.get(f"/v1/files/{name}").status_code == 200
        spans = re.findall(r"_seconds_sum\S* (\S+)", client.get("/metrics").text)
        assert spans
        assert all(0 <= float(span) < 600 for span in spans)


@pytest.mark.parametrize("days", [1, -1])
def test_a_cache_keeps_its_entries(
    days: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day ahead, what another process is writing counts as left by one that was killed."""
    cache, tensors = DiskCache(tmp_path), {"a": torch.arange(10)}
    cache.store("before", tensors, [])
    other = tmp_path / f"other{PART}"
    other.touch()
    clock: Callable[[], float] = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + days * DAY)
    cache.store("after", tensors, [])
    assert other.exists() == (days < 0)
    for key in ("before", "after"):
        entry = cache.load(key)
        assert entry is not None
        assert torch.equal(entry[0]["a"], tensors["a"])
    assert cache.failed == 0
