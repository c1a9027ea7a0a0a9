"""Kill runs at random moments: `python -m vtprune._dev.kills batch --count 100 --save LOG`.

A run is started, killed (SIGKILL) after a random time, and started again by the same command until
it ends by itself. Its result then has to be that of a run that nobody disturbed: nothing lost,
nothing doubled, nothing half written. `serve` is killed while clients ask: what they were answered
has to be whole and right, and the next server has to take their requests. A count of 100 is 100
kills. The processes are forked from one that has everything imported, so that most kills meet work.
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner

from vtprune import demo
from vtprune._dev.arguments import Parser
from vtprune._dev.lines import read_lines
from vtprune.cli import cli

MEASURED = {"seconds", "prefill", "first", "prefill_speedup", "first_token_speedup"}
"""Keys of results that are times, or made of them, which no two runs have alike."""
MOST_KILLS_OF_RUN = 8
PATIENCE = 300.0
FILES = {"batch": 6, "evaluate": 6, "tune": 9, "calibrate": 6, "serve": 6}
"""Samples that a run asks about; a tuning holds out some of them."""
CLIENTS = 3


@dataclass(frozen=True)
class KilledRun:
    """What a run is started by, and what it leaves.

    Args:
        arguments: of `vtprune`, in the run's own folder.
        results: reads what it has left: any values that are alike in all undisturbed runs.
        partial: reads what a killed run has left; it raises where something is half written.
    """

    arguments: Sequence[str]
    results: Callable[[Path], object]
    partial: Callable[[Path], None]


@dataclass(frozen=True)
class Kills:
    """How one run went that was killed and started again.

    Args:
        kills: how often.
        moments: seconds from each start to its kill.
        fault: what was lost, doubled, half written or other; "" for nothing.
    """

    command: str
    seed: int
    kills: int
    moments: tuple[float, ...]
    fault: str
    seconds: float


# -- results ---------------------------------------------------------------------------------------


def unmeasured(value: Any) -> Any:
    """Return a value without its times and its memory."""
    if isinstance(value, Mapping):
        return {key: unmeasured(item) for key, item in value.items() if key not in MEASURED}
    return [unmeasured(item) for item in value] if isinstance(value, list) else value


def lines_of(file: str, keys: Sequence[str]) -> Callable[[Path], list[str]]:
    """Return what reads a file of answers, in any order; each is there once."""

    def read(folder: Path) -> list[str]:
        lines = [line for line in read_lines(folder / file) if keys[0] in line]
        named = [tuple(line[key] for key in keys) for line in lines]
        assert len(named) == len(set(named)), f"{len(named) - len(set(named))} doubled"
        return sorted(json.dumps(unmeasured(line), sort_keys=True) for line in lines)

    return read


def whole_lines(file: str) -> Callable[[Path], None]:
    """Return what checks that all lines but the last are whole."""

    def check(folder: Path) -> None:
        path = folder / file
        *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for line in lines:
            json.loads(line)

    return check


def file_of(name: str, load: Callable[[str], object]) -> Callable[[Path], object]:
    """Return what reads a file that is there as a whole."""
    return lambda folder: unmeasured(load((folder / name).read_text("utf-8")))


def absent_or_whole(name: str, load: Callable[[str], object]) -> Callable[[Path], None]:
    """Return what checks a file that is written at the end."""

    def check(folder: Path) -> None:
        if (folder / name).exists():
            assert load((folder / name).read_text("utf-8")), f"{name} is empty"

    return check


def runs(samples: Path) -> dict[str, KilledRun]:
    """Return the runs that are killed, by the name of their command."""
    questions = str(samples / "questions.jsonl")
    evaluation = [questions, "--methods", "random", "--keep", "0.3", "--limit", "4", "--quiet"]
    answers = lines_of("answers.jsonl", ("question", "cell"))
    return {
        "batch": KilledRun(
            ["batch", str(samples), "-q", "what is it?", "-q", "colour?", "--max-new-tokens", "2",
             "--batch-size", "2", "--save", "answers.jsonl", "--quiet"],
            lines_of("answers.jsonl", ("key",)),
            whole_lines("answers.jsonl"),
        ),
        "evaluate": KilledRun(
            ["evaluate", *evaluation, "--answers", "answers.jsonl", "--save", "table.json"],
            lambda folder: (answers(folder), file_of("table.json", json.loads)(folder)),
            whole_lines("answers.jsonl"),
        ),
        "tune": KilledRun(
            ["tune", questions, "--methods", "random", "--keep", "0.5", "--floor", "0.1",
             "--answers", "answers.jsonl", "--save", "tuned.yaml", "--quiet"],
            lambda folder: (answers(folder), file_of("tuned.yaml", yaml.safe_load)(folder)),
            absent_or_whole("tuned.yaml", yaml.safe_load),
        ),
        "calibrate": KilledRun(
            ["calibrate", questions, "--save", "c.yaml", "--quiet"],
            file_of("c.yaml", yaml.safe_load),
            absent_or_whole("c.yaml", yaml.safe_load),
        ),
    }  # fmt: skip


# -- processes -------------------------------------------------------------------------------------


def start(arguments: Sequence[str], folder: Path) -> int:
    """Start `vtprune` in a process of its own; return its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)  # OpenMP's other threads are not in the copy of a process
        os.setsid()
        os.chdir(folder)
        log = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        sys.stdout = sys.stderr = os.fdopen(log, "w")
        cli(list(arguments), standalone_mode=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """Wait for a process; return its exit code, or None where it still runs."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(process: int) -> None:
    """Kill a process and what it has started in its session."""
    with suppress(ProcessLookupError):  # it has no session yet
        os.killpg(process, signal.SIGKILL)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def undisturbed(run: KilledRun, folder: Path) -> tuple[object, float]:
    """Return what a run leaves that nobody kills, and its seconds."""
    began = time.monotonic()
    code = wait(start(run.arguments, folder), PATIENCE)
    assert code == 0, (folder / "stderr").read_text("utf-8", "replace")[-1000:]
    return run.results(folder), time.monotonic() - began


def kill_moment(rng: random.Random, length: float) -> float:
    """Return the seconds from a start to its kill, of at most `length`, half of them in an eighth.

    A run that goes on where it was killed is thus killed several times before it is done, and the
    writes at the end are met too.
    """
    return length * rng.random() ** 3


def kill_run(
    name: str, run: KilledRun, expected: object, length: float, seed: int, folder: Path
) -> Kills:
    """Kill a run at random moments until it is done, and compare what it leaves."""
    rng, moments = random.Random(seed), list[float]()
    began, fault = time.monotonic(), ""
    try:
        while True:
            moment = kill_moment(rng, length) if len(moments) < MOST_KILLS_OF_RUN else PATIENCE
            process = start(run.arguments, folder)
            code = wait(process, moment)
            if code is not None:
                said = (folder / "stderr").read_text("utf-8", "replace")[-500:]
                assert code == 0, f"exit code {code}: {said}"
                break
            kill(process)
            assert len(moments) < MOST_KILLS_OF_RUN, "hung"
            moments.append(round(moment, 3))
            run.partial(folder)
        assert run.results(folder) == expected, "other results"
        parts = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
        assert len(parts) <= len(moments), f"{len(parts)} temporary files"
    except (AssertionError, OSError, ValueError, yaml.YAMLError) as error:
        fault = f"{type(error).__name__}: {error}"
    return Kills(name, seed, len(moments), tuple(moments), fault, time.monotonic() - began)


# -- a server --------------------------------------------------------------------------------------


@contextmanager
def asking(port: int, body: bytes, answers: list[object]) -> Iterator[None]:
    """Have clients ask a server all the time; what they were answered goes to `answers`."""
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                answers.append(ask(port, body))
            except urllib.error.HTTPError as error:
                answers.append(f"status {error.code}" if error.code not in (429, 503) else None)
            except (OSError, HTTPException):  # the connection broke, which a client sees
                time.sleep(0.01)
            except ValueError as error:
                answers.append(f"half an answer: {error}")

    threads = [threading.Thread(target=keep_asking, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def ask(port: int, body: bytes) -> str:
    """Return what a server answers to a request."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.loads(response.read())["choices"][0]["message"]["content"])


def kill_server(seed: int, folder: Path, samples: Path, kills: int) -> Kills:
    """Kill a server under load and start it again; all that clients are answered has to be one."""
    rng, moments, answers = random.Random(seed), list[float](), list[object]()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", "--port", str(port), "--max-new-tokens", "4", "--quiet"]
    picture = next(samples.glob("*.png")).read_bytes()
    body = chat_body(picture)
    began, fault = time.monotonic(), ""
    try:
        for number in range(kills + 1):
            process = start(arguments, folder)
            with asking(port, body, answers):
                before, until = len(answers), time.monotonic() + PATIENCE
                while len(answers) == before:  # it takes requests
                    assert wait(process, 0.05) is None, "the server ended"
                    assert time.monotonic() < until, "no answer"
                moment = rng.uniform(0, 1.0) if number < kills else 0.0
                time.sleep(moment)
                kill(process)
            if number < kills:
                moments.append(round(moment, 3))
        given = [answer for answer in answers if answer is not None]
        assert len(set(given)) == 1, f"answers: {set(given)}"
        assert "status" not in str(given[0]), given[0]
    except (AssertionError, OSError) as error:
        fault = f"{type(error).__name__}: {error}"
    return Kills("serve", seed, len(moments), tuple(moments), fault, time.monotonic() - began)


def chat_body(picture: bytes) -> bytes:
    """Return a request about a picture."""
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()


# -- the command -----------------------------------------------------------------------------------


def run_kills(command: str, count: int, seed: int, log: Path) -> list[Kills]:
    """Kill a command `count` times or a little more often; add what came of it to a log."""
    warm_up()
    done: list[Kills] = []
    with (
        tempfile.TemporaryDirectory(prefix="kills-") as name,
        log.open("a", encoding="utf-8") as file,
    ):
        root = Path(name)
        samples = root / "samples"
        demo.write(samples, FILES[command], 0)
        if command != "serve":
            run = runs(samples)[command]
            (root / "whole").mkdir()
            expected, length = undisturbed(run, root / "whole")
        while sum(each.kills for each in done) < count:
            number = seed + len(done)
            folder = root / str(number)
            folder.mkdir()
            if command == "serve":
                left = count - sum(each.kills for each in done)
                result = kill_server(number, folder, samples, min(left, MOST_KILLS_OF_RUN))
            else:
                result = kill_run(command, run, expected, length, number, folder)
            done.append(result)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
    return done


def warm_up() -> None:
    """Import what the commands do, once, before processes are forked."""
    with tempfile.TemporaryDirectory() as name:
        demo.write(Path(name), 1, 0)
        (picture, *_) = [path for path in Path(name).iterdir() if path.suffix != ".jsonl"]
        CliRunner().invoke(cli, ["ask", str(picture), "what?", "--max-new-tokens", "1"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("batch", "evaluate", "tune", "calibrate", "serve"))
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--save", type=Path, required=True, help="the log: a run a line")
    args = parser.parse_args(arguments)
    done = run_kills(args.command, args.count, args.seed, args.save)
    faults = [each for each in done if each.fault]
    kills = sum(each.kills for each in done)
    sys.stdout.write(f"{args.command}: {len(done)} runs, {kills} kills, {len(faults)} faults\n")
    for each in faults:
        sys.stdout.write(f"seed {each.seed}, killed at {each.moments}: {each.fault}\n")


if __name__ == "__main__":
    main()
