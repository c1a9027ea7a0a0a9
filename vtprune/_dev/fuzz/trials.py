"""Trials of damaged input: each in a process that may crash, hang, or fill the memory.

What counts as a finding: an error that is none of the project's own, a process that ended or hung,
a word on a standard stream, memory above a bound, a message that is longer than a screen of 24
lines of 80 columns, or one with characters that could steer a terminal.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vtprune._dev.lines import read_lines
from vtprune.errors import VtpruneError

MOST_SECONDS = 20.0
"""Of processor time; of the clock, on a machine that does nothing else."""
MOST_WAITED = 120.0
"""Of the clock, on a machine that does."""
MOST_MEMORY = 1_500_000_000
HARD_MEMORY = 12 << 30
SCREEN = (80, 24)
TRIALS_OF_WORKER = 200
CRASHED = ("the decoder ended", "the decoder did not come back")


@dataclass(frozen=True)
class Case:
    """One damaged input.

    Args:
        kind: what it is: "png", "preset".
        damage: what was done to it, in a word or two.
        run: reads it; returns what a user is shown where it is refused, "" where it is taken. It
            may raise VtpruneError, which is a refusal too; anything else is a finding.
    """

    kind: str
    damage: str
    run: Callable[[], str]


class CaseMaker(Protocol):
    """What makes cases."""

    def case(self, rng: random.Random, folder: Path) -> Case:
        """Return a damaged input, in a folder that is empty."""
        ...


@dataclass(frozen=True)
class CaseTrial:
    """How one damaged input was read.

    Args:
        outcome: "taken", "refused", "raised" (an error that is not ours), "crashed" or "hung".
        seconds: of the clock.
        cpu: seconds of the process and of its decoders.
        memory: the most bytes that one of them held.
        noise: what was written to standard output or error meanwhile.
    """

    seed: int
    kind: str
    damage: str
    outcome: str
    message: str = ""
    seconds: float = 0.0
    cpu: float = 0.0
    memory: int = 0
    noise: str = ""

    @property
    def finding(self) -> str:
        """What is wrong with it; empty where nothing is."""
        if self.outcome in ("crashed", "hung", "raised"):
            return self.outcome
        if any(word in self.message for word in CRASHED):
            return "crashed"
        if self.message.removeprefix("Error: ").startswith("internal"):
            return "raised"
        if self.noise:
            return "noise"
        if self.cpu > MOST_SECONDS or self.seconds > MOST_WAITED:
            return "slow"
        if self.memory > MOST_MEMORY:
            return "memory"
        if not self.message.replace("\n", "").isprintable():
            return "raw"
        return "long" if lines_on_screen(self.message) > SCREEN[1] else ""


def lines_on_screen(text: str) -> int:
    """Return how many lines a text takes on a terminal."""
    widths = (
        sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)
        for line in text.splitlines()
    )
    return sum(max(1, -(-width // SCREEN[0])) for width in widths)


def run_case(
    subject: CaseMaker,
    seed: int,
    folder: Path,
    begin: Callable[[Case], object] = lambda case: None,
) -> CaseTrial:
    """Make the case of a seed, and read it; `begin` gets it before it is read."""
    case = subject.case(random.Random(seed), folder)
    begin(case)
    outcome, message = "taken", ""
    try:
        message = case.run()
        outcome = "refused" if message else "taken"
    except VtpruneError as error:
        outcome = "refused"
        message = f"Error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else "")
    except BaseException as error:
        outcome, message = "raised", f"{type(error).__name__}: {error}"[:1000]
    return CaseTrial(seed, case.kind, case.damage, outcome, message.replace(f"{folder}/", ""))


class CaseReader:
    """A process that reads case after case."""

    def __init__(self, subject: CaseMaker) -> None:
        self.asked, asking = os.pipe()
        answering, answers = os.pipe()
        self.number = os.fork()
        if not self.number:
            os.close(asking), os.close(answering)  # type: ignore[func-returns-value]
            _work(subject, self.asked, answers)
        os.close(self.asked), os.close(answers)  # type: ignore[func-returns-value]
        self.questions, self.answers = asking, answering
        self.done = 0

    def try_seed(self, seed: int) -> CaseTrial:
        """Return the trial of a seed; the process may be over after it."""
        began = time.monotonic()
        _forget_peaks(self.number)
        cpu_before, memory = _usage(self.number)
        cpu, text = cpu_before, b""
        os.write(self.questions, f"{seed}\n".encode())
        outcome = ""
        while not outcome and text.count(b"\n") < 2:  # what is read, and how it went
            if select.select([self.answers], [], [], 0.25)[0]:
                piece = os.read(self.answers, 1 << 16)
                text += piece
                outcome = "" if piece else "crashed"
            with suppress(OSError, ValueError):
                cpu, held = _usage(self.number)
                memory = max(memory, held)
            waited = time.monotonic() - began
            if cpu - cpu_before > 2 * MOST_SECONDS or waited > 2 * MOST_WAITED:
                outcome = "hung"
        case, _, ended = text.partition(b"\n")
        if outcome:
            self.end()
            kind, damage = json.loads(case) if b"\n" in text else ("", "")
            values: dict[str, Any] = {
                "seed": seed,
                "kind": kind,
                "damage": damage,
                "outcome": outcome,
            }
        else:
            self.done += 1
            values = json.loads(ended)
        measured = {
            "seconds": round(time.monotonic() - began, 3),
            "cpu": round(cpu - cpu_before, 3),
            "memory": memory,
        }
        return CaseTrial(**values | measured)

    def end(self) -> None:
        """End the process."""
        os.kill(self.number, signal.SIGKILL)
        os.waitpid(self.number, 0)
        os.close(self.questions), os.close(self.answers)  # type: ignore[func-returns-value]


def _work(subject: CaseMaker, asked: int, answers: int) -> None:
    """Read cases until nobody asks; what is written to standard streams goes into the answers."""
    torch.set_num_threads(1)  # OpenMP's other threads are not in the copy of a process
    resource.setrlimit(resource.RLIMIT_DATA, (HARD_MEMORY, HARD_MEMORY))
    code = 1

    def begin(case: Case) -> None:
        os.write(answers, json.dumps([case.kind, case.damage]).encode() + b"\n")

    try:
        with (
            tempfile.TemporaryDirectory(prefix="fuzz-") as name,
            os.fdopen(asked) as questions,
            os.fdopen(
                os.open(Path(name, "noise"), os.O_RDWR | os.O_CREAT | os.O_APPEND), "w+"
            ) as noise,
        ):
            for number in (1, 2):
                os.dup2(noise.fileno(), number)
            sys.stdout = sys.stderr = noise
            for number, line in enumerate(questions):
                folder = Path(name, str(number))
                folder.mkdir()
                os.chdir(folder)  # where a file without a folder is written
                trial = run_case(subject, int(line), folder, begin)
                noise.flush()
                text = Path(name, "noise").read_text("utf-8", "replace")[:1000]
                os.truncate(noise.fileno(), 0)
                values = asdict(trial) | {"noise": text}
                os.write(answers, json.dumps(values).encode() + b"\n")
                os.chdir(name)
                _remove(folder)
        code = 0
    finally:
        os._exit(code)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def _processes(number: int) -> Iterator[Path]:
    """Yield the folders in /proc of a process and of its children."""
    yield Path("/proc", str(number))
    for file in Path(f"/proc/{number}/task").glob("*/children"):
        with suppress(OSError):
            yield from (Path("/proc", child) for child in file.read_text().split())


def _usage(number: int) -> tuple[float, int]:
    """Return the seconds that a process and its children have run, and the most memory of one."""
    ticks, memory = 0, 0
    for process in _processes(number):
        with suppress(OSError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            # Of children that have ended, their parent has the time.
            ticks += sum(map(int, fields[11 : 15 if process.name == str(number) else 13]))
            for line in (process / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    memory = max(memory, int(line.split()[1]) << 10)
    return ticks / os.sysconf("SC_CLK_TCK"), memory


def _forget_peaks(number: int) -> None:
    for process in _processes(number):
        with suppress(OSError):
            (process / "clear_refs").write_text("5")


def run_seeds(subject: CaseMaker, seeds: Sequence[int], log: Path) -> list[CaseTrial]:
    """Try those seeds that a log does not have yet, and add them to it; return the trials.

    A process reads some hundred of them, and is then replaced.
    """
    done = {line["seed"] for line in read_lines(log)}
    trials: list[CaseTrial] = []
    worker: CaseReader | None = None
    with log.open("a", encoding="utf-8") as file:
        for seed in seeds:
            if seed in done:
                continue
            worker = worker or CaseReader(subject)
            trial = worker.try_seed(seed)
            trials.append(trial)
            file.write(json.dumps(asdict(trial)) + "\n")
            file.flush()
            if trial.outcome in ("crashed", "hung"):
                worker = None
            elif worker.done >= TRIALS_OF_WORKER:
                worker.end()
                worker = None
    if worker is not None:
        worker.end()
    return trials


def summary(log: Path) -> str:
    """Return what a log says, in a few lines."""
    trials = [CaseTrial(**line) for line in read_lines(log)]
    if not trials:
        return "0 trials"
    outcomes = Counter(trial.outcome for trial in trials)
    found = [trial for trial in trials if trial.finding]
    lines = [
        f"{len(trials)} trials: " + ", ".join(f"{n} {what}" for what, n in outcomes.items()),
        f"slowest {max(trial.cpu for trial in trials):.1f} s of the processor "
        f"({max(trial.seconds for trial in trials):.1f} s of the clock), "
        f"most memory {max(trial.memory for trial in trials) / 1e6:.0f} MB, {len(found)} findings",
    ]
    for trial in found:
        text = " ".join((trial.message or trial.noise).split())[:300]
        lines.append(
            f"seed {trial.seed} ({trial.kind}, {trial.damage}): {trial.finding}: {text} "
            f"[{trial.cpu:.1f} s, {trial.memory / 1e6:.0f} MB]"
        )
    return "\n".join(lines)
