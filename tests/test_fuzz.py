"""Damaged media and texts: what the harness finds, and that it finds nothing here."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from vtprune._dev import CHECKOUT
from vtprune._dev.fuzz import trials
from vtprune._dev.fuzz.blocks import blocks_of, damage_blocks
from vtprune._dev.fuzz.guided import KINDS, GuidedSubject
from vtprune._dev.fuzz.media import MediaSubject, make_samples
from vtprune._dev.fuzz.mutations import damage_value
from vtprune._dev.fuzz.trials import Case, CaseTrial, run_case, run_seeds, summary
from vtprune.errors import VtpruneError

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


class Faulty:
    """A reader with a fault."""

    def __init__(self, fault: Callable[[], str]) -> None:
        self.fault = fault

    def case(self, rng: random.Random, folder: Path) -> Case:
        return Case("faulty", "none", self.fault)


def refuse(text: str) -> Callable[[], str]:
    def run() -> str:
        raise VtpruneError(text, "a hint")

    return run


def write_noise() -> str:
    os.write(2, b"a library speaks")
    return ""


def take_memory() -> str:
    return "" if bytearray(2_000_000) else "none"


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        (lambda: "", ""),
        (refuse("a fault"), ""),
        (lambda: str(1 // 0), "raised"),
        (lambda: "Error: internal: KeyError: 3", "raised"),
        (lambda: str(os.kill(os.getpid(), 9)), "crashed"),
        (lambda: str(time.sleep(60)), "hung"),
        (write_noise, "noise"),
        (lambda: str(os.write(1, b"an answer?"))[:0], "noise"),
        (lambda: "Error: \x1b[2J", "raw"),
        (lambda: "Error: \u202e", "raw"),
        (lambda: "word " * 500, "long"),
        (lambda: "line\n" * 25, "long"),
        (lambda: "x" * (80 * 24), ""),
        (take_memory, "memory"),
    ],
)  # fmt: skip
def test_every_kind_of_fault_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], str], finding: str
) -> None:
    if finding == "hung":
        monkeypatch.setattr(trials, "MOST_WAITED", 0.4)
    # A worker is a copy of this process, which may hold more than the bound by itself.
    monkeypatch.setattr(trials, "MOST_MEMORY", 1_000_000 if finding == "memory" else 1 << 50)
    (trial,) = run_seeds(Faulty(fault), [0], tmp_path / "log.jsonl")
    assert trial.finding == finding
    assert (trial.kind, trial.damage) == ("faulty", "none")  # also of a process that ended or hung


def test_what_a_trial_writes_without_a_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (trial,) = run_seeds(Faulty(lambda: str(Path("stray").write_text("x"))[:0]), [0], Path("log"))
    assert trial.outcome == "taken"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_run_goes_on_with_the_seeds_that_its_log_lacks(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    subject = Faulty(lambda: "")
    run_seeds(subject, [1, 2], log)
    assert [trial.seed for trial in run_seeds(subject, range(4), log)] == [0, 3]
    assert sorted(json.loads(line)["seed"] for line in log.read_text().splitlines()) == [0, 1, 2, 3]
    assert summary(log).startswith("4 trials: 4 taken\n")


def test_a_seed_makes_the_same_case() -> None:
    subject = MediaSubject(only=("png", "jpg"))
    cases = [subject.case(random.Random(7), Path()) for _ in range(2)]
    assert cases[0].kind == cases[1].kind
    assert cases[0].damage == cases[1].damage


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="no scheduling to ask for")
def test_samples_leave_the_process_as_it_was_scheduled() -> None:
    before = os.sched_getscheduler(0)
    make_samples()
    assert os.sched_getscheduler(0) == before


@pytest.mark.parametrize("suffix", ["png", "jpg", "moving.webp", "avif", "mp4", "tif", "pages.pdf"])
def test_blocks_of_a_file_are_damaged(suffix: str) -> None:
    data = make_samples()[f"a.{suffix}"]
    blocks = list(blocks_of(data))
    assert len(blocks) > 1
    assert all(0 <= b.start < b.end <= len(data) for b in blocks)
    assert len({damage_blocks(data, random.Random(seed))[1] for seed in range(20)}) > 10


def test_a_damaged_chunk_of_png_has_a_right_checksum() -> None:
    data = make_samples()["a.png"]
    for seed in range(40):
        damage, changed = damage_blocks(data, random.Random(seed))
        if damage == "block content" and changed != data:
            break
    else:
        pytest.fail("no seed changes a chunk")
    for block in blocks_of(changed):
        body = changed[block.start + 4 : block.end - 4]
        assert struct.unpack(">I", changed[block.end - 4 : block.end])[0] == zlib.crc32(body)


def test_values_are_damaged_in_a_copy() -> None:
    value = {"a": [1, {"b": "text"}], "c": 0.5}
    changed = [repr(damage_value(value, random.Random(seed))[1]) for seed in range(100)]
    assert value == {"a": [1, {"b": "text"}], "c": 0.5}
    assert len(set(changed)) > 50


@pytest.mark.parametrize(("subject", "count"), [("media", 200), ("text", 100)])
def test_damaged_input_is_read_or_refused(tmp_path: Path, subject: str, count: int) -> None:
    if subject == "text":
        pytest.importorskip("fastapi")
    log = tmp_path / "log.jsonl"
    # Its workers are copies of the process that asks: this one may hold much already.
    command = [sys.executable, "-m", "vtprune._dev.fuzz", subject]
    command += ["--count", str(count), "--save", str(log)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ", 0 findings" in ended.stdout, ended.stdout + ended.stderr
    found = [CaseTrial(**json.loads(line)) for line in log.read_text().splitlines()]
    assert len(found) == count
    assert not [trial for trial in found if trial.finding]
    assert {"taken", "refused"} == {trial.outcome for trial in found}


@pytest.mark.parametrize("kind", KINDS)
def test_guided_damage_begins_from_files_that_are_taken(kind: str, tmp_path: Path) -> None:
    subject = GuidedSubject(kind)
    for name, data in subject.samples.items():
        subject.data = data
        trial = run_case(subject, 0, tmp_path)
        assert trial.outcome == "taken", f"{name}: {trial.message}"
    subject.data = b"\0"
    assert run_case(subject, 0, tmp_path).outcome == "refused"


def test_guided_damage_reads_files(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "vtprune._dev.fuzz.guided", "table", "--count", "200"]
    run = subprocess.run(
        [*command, "--save", tmp_path], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert "Done 200 runs" in run.stderr
    assert len([*(tmp_path / "table").iterdir()]) > 1
