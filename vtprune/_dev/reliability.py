"""The counts of docs/reliability.md: `python -m vtprune._dev.reliability --measure FOLDER`.

It runs what is counted, for some hours, and goes on with the logs that FOLDER has already. In its
place LOG... takes logs of `vtprune._dev.fuzz` and `vtprune._dev.kills`. The counts are kept in
docs/reliability.jsonl, one line a row, in place of what was there under the same name; the table
between the markers of the page is made of that file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtprune._dev import CHECKOUT
from vtprune._dev.arguments import Parser
from vtprune._dev.fuzz.trials import CaseTrial
from vtprune._dev.kills import FILES, Kills
from vtprune._dev.lines import read_lines

COUNTS, PAGE = CHECKOUT / "docs" / "reliability.jsonl", CHECKOUT / "docs" / "reliability.md"
BEGIN, END = "<!-- counts -->", "<!-- end of counts -->"
TEXTS = ("answers", "cache", "calibration", "checkpoint", "config file", "flags", "preset",
         "questions", "requests", "server", "template")  # fmt: skip

FUZZED, KILLED = {"media": 10_000, "text": 5_000}, 100
"""Damaged inputs of each subject, and kills of each command, of a whole measurement."""


@dataclass(frozen=True)
class CountRow:
    """One row.

    Args:
        subject: "media", "text" or "kills".
        kind: of file, of text, or the command that was killed.
        number: of damaged inputs, or of kills.
        findings: of which each is a fault.
        taken, refused: of damaged inputs; of kills: runs, and 0.
        cpu: the most processor seconds of one.
        memory: the most bytes of one.
    """

    subject: str
    kind: str
    number: int
    findings: int
    taken: int
    refused: int
    cpu: float = 0.0
    memory: int = 0


def count_log(lines: Sequence[dict[str, Any]]) -> list[CountRow]:
    """Return the counts of the lines of logs of one kind."""
    if lines and "kills" in lines[0]:
        runs = [Kills(**line) for line in lines]
        return [
            CountRow("kills", command, sum(run.kills for run in of),
                  sum(run.fault != "" for run in of), len(of), 0)
            for command, of in sorted(_by_name((run.command, run) for run in runs).items())
        ]  # fmt: skip
    trials = [CaseTrial(**line) for line in lines]
    return [
        CountRow(
            "text" if kind in TEXTS else "media",
            kind,
            len(of),
            sum(trial.finding != "" for trial in of),
            sum(trial.outcome == "taken" for trial in of),
            sum(trial.outcome == "refused" for trial in of),
            max(trial.cpu for trial in of),
            max(trial.memory for trial in of),
        )
        for kind, of in sorted(_by_name((trial.kind, trial) for trial in trials).items())
    ]


def _by_name(pairs: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    groups = defaultdict(list)
    for name, value in pairs:
        groups[name.rpartition(".")[2]].append(value)
    return groups


def table(counts: Sequence[CountRow]) -> str:
    """Return the counts as a table of Markdown."""
    rows = [
        "| what | damaged, or kills | read, or runs | refused | processor, most | memory, most "
        "| findings |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for count in sorted(counts, key=lambda each: (each.subject, each.kind)):
        time, memory = f"{count.cpu:.1f} s", f"{count.memory / 1e6:,.0f} MB"
        refused = f"{count.refused:,}"
        if count.subject == "kills":
            time = memory = refused = ""
        rows.append(
            f"| {count.subject}: {count.kind} | {count.number:,} | {count.taken:,} | {refused} | "
            f"{time} | {memory} | {count.findings} |"
        )
    for subject in sorted({count.subject for count in counts}):
        of = [count for count in counts if count.subject == subject]
        number, findings = sum(each.number for each in of), sum(each.findings for each in of)
        rows.append(f"| **{subject}, all** | {number:,} | | | | | {findings} |")
    return "\n".join(rows)


def write_page(counts: Sequence[CountRow], page: Path = PAGE) -> None:
    """Put the table between the markers of the page."""
    text = page.read_text("utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n{table(counts)}\n{END}{tail}", "utf-8")


def measure(folder: Path) -> list[Path]:
    """Run all that is counted, but what the logs in a folder have already; return the logs."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = {name: folder / f"{name}.jsonl" for name in (*FUZZED, *FILES)}
    for subject, count in FUZZED.items():
        _run("fuzz", subject, "--count", count, "--save", logs[subject])
    for command in FILES:
        runs = [Kills(**line) for line in read_lines(logs[command])]
        left = KILLED - sum(run.kills for run in runs)
        if left > 0:
            first = ("--seed", len(runs), "--save", logs[command])
            _run("kills", command, "--count", left, *first)
    return list(logs.values())


def _run(tool: str, *arguments: object) -> None:
    command = [sys.executable, "-m", f"vtprune._dev.{tool}", *map(str, arguments)]
    subprocess.run(command, check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "logs", type=Path, nargs="*", help="of fuzz and kills; none: the page alone"
    )
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="make the logs first")
    args = parser.parse_args(arguments)
    logs = [*args.logs, *(measure(args.measure) if args.measure else ())]
    kept = {(line["subject"], line["kind"]): CountRow(**line) for line in read_lines(COUNTS)}
    lines = [line for log in logs for line in read_lines(log)]
    for of in (
        [line for line in lines if "kills" in line],
        [line for line in lines if "noise" in line],
    ):
        kept |= {(count.subject, count.kind): count for count in count_log(of)}
    counts = [kept[key] for key in sorted(kept)]
    COUNTS.write_text("".join(json.dumps(asdict(count)) + "\n" for count in counts), "utf-8")
    write_page(counts)


if __name__ == "__main__":
    main()
