"""Runs that are killed and started again, by the harness for it; and what it takes for a fault."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import assert_refused

from vtprune import demo
from vtprune._dev import kills
from vtprune._dev.kills import KilledRun, kill_run, lines_of, run_kills, start, wait, whole_lines
from vtprune.cli import TERMINATED, _terminate, cli

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    kills.warm_up()


def test_a_batch_that_is_killed_ends_like_one_that_is_not(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    runs = run_kills("batch", 2, 0, log)
    assert [run.fault for run in runs] == [""] * len(runs)
    assert sum(run.kills for run in runs) >= 2
    assert len(log.read_text().splitlines()) == len(runs)


def test_most_kills_come_early_and_some_at_the_end() -> None:
    rng = random.Random(0)
    moments = [kills.kill_moment(rng, 8.0) for _ in range(1000)]
    assert 450 < sum(moment < 1 for moment in moments) < 550
    assert 0 <= min(moments) < 0.01
    assert 7.9 < max(moments) <= 8


def test_a_line_that_is_there_twice_or_by_half_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "a", "seconds": 3}\n{"key": "b"}\n')
    assert lines_of("a.jsonl", ("key",))(tmp_path) == ['{"key": "a"}', '{"key": "b"}']
    path.write_text('{"key": "a"}\n{"key": "a"}\n')
    with pytest.raises(AssertionError, match="1 doubled"):
        lines_of("a.jsonl", ("key",))(tmp_path)
    path.write_text('{"key": "a"}\n{"key": ')
    whole_lines("a.jsonl")(tmp_path)  # what a kill leaves at the end
    path.write_text('{"key": \n{"key": "a"}\n')
    with pytest.raises(json.JSONDecodeError):
        whole_lines("a.jsonl")(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected", "fault"),
    [(["methods"], "other", "other results"), (["methods", "nothing"], "", "exit code 1")],
)
def test_another_result_and_an_error_are_faults(
    tmp_path: Path, arguments: list[str], expected: str, fault: str
) -> None:
    run = KilledRun(arguments, lambda folder: "result", lambda folder: None)
    assert fault in kill_run("methods", run, expected, 0.0001, 0, tmp_path).fault


# -- signals ---------------------------------------------------------------------------------------


STARTED: list[int] = []
"""Processes that a test has started by `with_handler`."""


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """After a test that failed, a server would go on."""
    yield
    while STARTED:
        process = STARTED.pop()
        with suppress(ChildProcessError):  # it has ended, and was waited for
            if os.waitpid(process, os.WNOHANG)[0] == 0:
                kills.kill(process)


def with_handler(
    arguments: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals | None = None,
    due: Callable[[], bool] = lambda: True,
) -> int:
    """Start a command in a process that takes signals as the program does.

    Args:
        number: a signal that the process gets once, at a call of attention: there a command is in
            the middle of its work, however fast the machine is.
        due: whether that call is this one.
    """

    def command(args: list[str], standalone_mode: bool) -> object:
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number is not None:
            torch.nn.functional.scaled_dot_product_attention = signalled
        return program(args, standalone_mode=standalone_mode)

    attention = torch.nn.functional.scaled_dot_product_attention

    def signalled(*args: Any, **options: Any) -> torch.Tensor:
        if number is not None and due():
            torch.nn.functional.scaled_dot_product_attention = attention
            os.kill(os.getpid(), number)
        return attention(*args, **options)

    program = kills.cli
    with monkeypatch.context() as patch:
        patch.setattr(kills, "cli", command)
        STARTED.append(start(arguments, folder))
    return STARTED[-1]


LONG: dict[str, Callable[[Path], list[str]]] = {
    "batch": lambda samples: ["batch", str(samples), "-q", "what?", "--save", "a.jsonl"],
    "tune": lambda samples: [
        *["tune", str(samples / "questions.jsonl"), "--methods", "random", "--save", "t.yaml"],
        *["--answers", "a.jsonl", "--floor", "0.1"],
    ],
    "calibrate": lambda samples: [
        *["calibrate", str(samples / "questions.jsonl"), "--save", "c.yaml"]
    ],
    "compare": lambda samples: ["compare", str(next(samples.glob("*.png"))), "what?"],
    "profile": lambda samples: ["profile", "--seconds", "30"],
    "explain": lambda samples: ["explain", str(next(samples.glob("*.png"))), "what?"],
    "check": lambda samples: ["check"],
    "reproduce": lambda samples: ["reproduce", "embedded", str(samples / "questions.jsonl")],
    "ask": lambda samples: [
        *["ask", str(next(samples.glob("*.mp4"))), "what?", "--compare"]
    ],
}  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", LONG)
def test_a_signal_ends_every_long_command_with_a_word_and_its_code(
    command: str, number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.write(tmp_path / "samples", 9, 0)
    calls = itertools.count(1)
    process = with_handler(
        LONG[command](tmp_path / "samples"), tmp_path, monkeypatch, number, lambda: next(calls) > 40
    )
    ended, text = wait(process, 60), (tmp_path / "stderr").read_text()
    assert ended == code, text
    assert "Traceback" not in text
    assert "internal" not in text
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    if number == signal.SIGTERM:
        assert re.search(r"kept in a\.jsonl; the same command|stopped: nothing is kept", text)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, 130)])
def test_a_signal_says_how_many_answers_are_kept(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.write(tmp_path / "samples", 9, 0)
    answers, said = tmp_path / "a.jsonl", tmp_path / "stderr"
    command = ["evaluate", str(tmp_path / "samples" / "questions.jsonl"), "--methods", "uniform",
               "--keep", "0.3", "--seeds", "1", "--answers", answers.name]  # fmt: skip

    def some_are_kept() -> bool:
        return answers.exists() and answers.read_bytes().count(b"\n") > 1

    process = with_handler(command, tmp_path, monkeypatch, number, some_are_kept)
    assert wait(process, 120) == code, said.read_text()
    kept = len(answers.read_text().splitlines()) - 1
    assert f"{kept} answers kept in a.jsonl; the same command goes on" in said.read_text()


@pytest.mark.parametrize(
    ("signals", "grace", "code", "answered"),
    [
        ([signal.SIGTERM], 300, TERMINATED, True),
        ([signal.SIGINT], 300, 130, True),
        ([signal.SIGINT] * 2, 300, 130, False),
        ([signal.SIGTERM], 1, TERMINATED, False),
    ],
)
def test_a_server_that_is_stopped_answers_what_is_here_or_says_that_it_does_not(
    signals: list[int], grace: int, code: int, answered: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("uvicorn")
    from vtprune.serving import queue

    generate = queue.generate

    def held(*args: Any, stopped: Callable[[], list[bool]], **options: Any) -> object:
        (tmp_path / "begun").touch()
        while not (tmp_path / "go").exists() and not any(stopped()):
            time.sleep(0.01)
        return generate(*args, stopped=stopped, **options)

    monkeypatch.setattr(queue, "generate", held)
    monkeypatch.setattr("vtprune.cli.serve.GRACE", grace)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    demo.write(tmp_path / "samples", 9, 0)
    body = kills.chat_body(next((tmp_path / "samples").glob("*.png")).read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = with_handler(["serve", "--port", str(port)], tmp_path, monkeypatch)
    said, answers = tmp_path / "stderr", list[object]()
    until = time.monotonic() + 60
    while not ("serving" in said.read_text() if said.exists() else False):
        assert time.monotonic() < until, said.read_text()
        time.sleep(0.01)

    def ask() -> None:
        try:
            answers.append(kills.ask(port, body))
        except (OSError, HTTPException) as error:  # the connection broke
            answers.append(error)

    client = threading.Thread(target=ask, daemon=True)
    client.start()
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < until, said.read_text()
        time.sleep(0.01)
    assert os.listdir(tmp_path / "temporary")
    for number in signals:
        os.kill(process, number)
        time.sleep(1)  # two that come at once are one
    if answered:
        (tmp_path / "go").touch()
    assert wait(process, 60) == code, said.read_text()
    client.join(60)
    assert isinstance(answers[0], str) == answered
    *_, last = said.read_text().splitlines()
    which = "the requests that were here are" if answered else "requests that were still here have"
    assert last.startswith(f"stopped: {which}")
    assert "Traceback" not in said.read_text()
    assert os.listdir(tmp_path / "temporary") == []


def test_a_server_without_room_for_uploads_says_so_before_a_model_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(tempfile, "tempdir", "/none")
    monkeypatch.setattr("vtprune.models.loading.load", None)
    result = CliRunner().invoke(cli, ["serve", "--port", "0"])
    assert_refused(result, "Error: /none/vtprune-serve-.*: No such file or directory")


@pytest.mark.parametrize("command", [["methods"], ["presets", "list"], ["models"]])
def test_a_reader_that_goes_away_ends_a_command_in_silence(
    command: list[str], tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = os.fork()
    if not process:
        code = 2
        try:
            os.dup2(writer, 1)
            os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            kills.cli(command, standalone_mode=True)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 2
        finally:
            os._exit(code)
    os.close(writer)
    assert wait(process, 60) == 1
    assert (tmp_path / "stderr").read_text() == ""
