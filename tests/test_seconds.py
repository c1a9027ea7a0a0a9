"""What the seconds of a report span: the command, from its process' start to the answer's end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import save_noise
from test_answer_questions import SHORT, ask

import vtprune
from vtprune.cli import startup
from vtprune.cli.startup import process_start
from vtprune.models.loading import load

ROOT = Path(__file__).parents[1]
PARTS = ("startup", "load", "preprocess", "vision", "prefill", "decode")
"""Of the total, those that overlap with no other; media are read while the model is loaded."""


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_noise(tmp_path_factory.mktemp("seconds") / "picture.png", 90, 150)


@pytest.fixture(scope="module")
def told(picture: Path) -> tuple[list[dict[str, Any]], list[float]]:
    """The reports of a command with two questions, and when each came, from the process' start."""
    command = [sys.executable, "-m", "vtprune", "ask", str(picture), "-q", "what colour?", "-q",
               "how many?", "--json"]  # fmt: skip
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stdout is not None
        reports, came = [], []
        for line in process.stdout:
            came.append(time.perf_counter() - began)
            reports.append(json.loads(line))
    return reports, came


def test_the_total_is_what_a_clock_shows_from_the_start_of_the_process(told: Any) -> None:
    (first, _), (came, _) = told
    # A tick of the process' start is 10 ms; what is between answer and line is not in the total.
    assert came - 0.5 < first["seconds"]["total"] < came + 0.02


def test_start_up_is_interpreter_and_imports_before_anything_is_loaded(told: Any) -> None:
    seconds = told[0][0]["seconds"]
    assert seconds["startup"] > 0.3  # torch and transformers alone take longer
    assert sum(seconds[part] for part in PARTS) <= seconds["total"]
    assert seconds["startup"] < seconds["total"] - seconds["load"]


def test_a_further_question_has_its_own_time_and_nothing_of_what_all_share(told: Any) -> None:
    (_, second), (first_came, second_came) = told
    seconds = second["seconds"]
    assert seconds["startup"] == seconds["load"] == seconds["media"] == 0
    assert sum(seconds[part] for part in PARTS) <= seconds["total"]
    assert seconds["total"] <= second_came - first_came + 0.1


def test_of_a_library_call_the_total_is_from_the_call_on(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    began = time.perf_counter()
    seconds = ask(loaded, picture)[0].seconds
    took = time.perf_counter() - began
    assert took - 0.5 < seconds.total <= took
    assert (seconds.startup, seconds.load) == (0, 0)  # it was loaded before the call


@pytest.mark.parametrize("compare", [False, True])
def test_answers_to_many_add_up_to_the_call(checkpoints, picture: Path, compare: bool) -> None:  # type: ignore[no-untyped-def]
    items = [(picture, "what?"), (picture, "where?")]
    began = time.perf_counter()
    reports = vtprune.answer(str(checkpoints("llava_onevision")), items, generation=SHORT,
                             batch_size=1, compare=compare)  # fmt: skip
    took = time.perf_counter() - began
    first, second = (one.seconds for one in reports)
    assert first.load > 0 == second.load
    assert first.total > first.load
    whole = first.total + second.total
    assert whole <= took
    if not compare:  # which measures besides
        assert whole > took - 0.5


def test_where_the_system_does_not_say_when_a_process_began_it_begins_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    age = time.perf_counter() - process_start()
    assert age > 0
    monkeypatch.setattr(startup.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError))
    assert time.perf_counter() - process_start() < 0.05


def test_a_process_with_an_odd_name_has_its_start(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to(sys.executable)
    code = "from vtprune.cli.startup import _process_age; print(_process_age())"
    began = time.perf_counter()
    done = subprocess.run(
        [str(program), "-c", code], capture_output=True, text=True, check=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),  # it finds no environment
            "PYTHONHOME": sys.base_prefix,
        },
    )  # fmt: skip
    assert 0 < float(done.stdout) <= time.perf_counter() - began + 0.02
