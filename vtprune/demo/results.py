"""The project's own result on the embedded model: `python -m vtprune.demo.results OUT`.

Every method at every keep on the first questions of a split; the unpruned model, the presets, the
baselines and the rivals on all of them. Several processes share the files; a killed run goes on.
What is chosen is chosen with `--split dev`; test is for the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtprune.cli.output import save_file
from vtprune.demo import write
from vtprune.evaluation.cells import Cell, lay_cells
from vtprune.evaluation.intervals import Estimate
from vtprune.evaluation.records import Record, read_records
from vtprune.evaluation.summary import Evaluation, Row, compare_with_rivals, summarise
from vtprune.lineup import UNPRUNED, line_up
from vtprune.pruners import BASELINES, METHODS
from vtprune.questions_file import Asked, read_questions

KEEPS = (0.5, 0.3, 0.2, 0.1)
SEEDS = 5
Records = dict[tuple[int, str], Record]


@dataclass(frozen=True)
class Part:
    """Questions, by their numbers in the whole list, and the cells that they are asked in."""

    name: str
    numbers: tuple[int, ...]
    cells: tuple[Cell, ...]


def all_cells(
    methods: Sequence[str], presets: Sequence[str], keeps: Sequence[float], seeds: int = SEEDS
) -> list[Cell]:
    """Every method and preset at every keep; baselines at the presets' own layers and counts."""
    cells = lay_cells(line_up([], keeps, presets), seeds, beside=True) if presets else []
    if methods:
        cells += lay_cells(line_up(methods, keeps), seeds)
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.key, cell)
    return list(found.values())


def parts(
    asked: Sequence[Asked], cells: Sequence[Cell], rivals: Sequence[str], few: int
) -> list[Part]:
    """The first `few` questions in all cells, the others in those that the headline needs.

    A file's questions stay together.
    """
    while 0 < few < len(asked) and asked[few].file == asked[few - 1].file:
        few += 1
    first, rest = tuple(range(min(few, len(asked)))), tuple(range(few, len(asked)))
    found = [Part("first", first, tuple(cells))]
    wanted = tuple(cell for cell in cells if in_headline(cell, rivals))
    return [*found, Part("rest", rest, wanted)] if rest else found


def in_headline(cell: Cell, rivals: Sequence[str]) -> bool:
    """Unpruned, presets with what stands beside them, baselines at their own places, rivals."""
    entry = cell.entry
    plain = entry.method in BASELINES and entry.role == "baseline"
    return not entry.method or entry.role == UNPRUNED or plain or entry.method in rivals


def share(part: Part, asked: Sequence[Asked], rank: int, processes: int) -> tuple[int, ...]:
    """The numbers of one process: every so many files, each whole."""
    files = list(dict.fromkeys(asked[number].file for number in part.numbers))
    own = set(files[rank::processes])
    return tuple(number for number in part.numbers if asked[number].file in own)


def path_of(args: argparse.Namespace, part: Part, rank: int) -> Path:
    """Where one process keeps the answers of one part."""
    folder: Path = args.out
    return folder / f"{part.name}-{rank}-of-{args.processes}.jsonl"


def work_of(args: argparse.Namespace) -> tuple[list[Asked], list[Part]]:
    """The questions, and what is asked of them; the same in every process."""
    asked = read_questions(args.out / "files" / "questions.jsonl")
    cells = all_cells(args.methods, args.presets, args.keep, args.seeds)
    return asked, parts(asked, cells, args.rivals, args.few)


def answer(rank: int, args: argparse.Namespace) -> None:
    """One process: its share of the files, on one thread."""
    import torch

    from vtprune.demo.score import is_right
    from vtprune.evaluation.answering import Settings
    from vtprune.evaluation.run import Plan, evaluate
    from vtprune.loading import load

    def rate(asked: Asked, given: str) -> float:
        return float(is_right(asked.kind, asked.answer or "", given))

    def show(what: str, done: int, total: int) -> None:
        if rank == 0 and what == "answering":
            sys.stderr.write(f"{part.name}: {done} of {total}\n")

    torch.set_num_threads(1)
    loaded = load(args.model)
    asked, found = work_of(args)
    for part in found:
        own = tuple(asked[number] for number in share(part, asked, rank, args.processes))
        if own:
            plan = Plan(own, part.cells)
            evaluate(loaded, plan, Settings(score=rate), path_of(args, part, rank), show)


def collect(args: argparse.Namespace, asked: Sequence[Asked], found: Sequence[Part]) -> Records:
    """All processes' records, by the questions' numbers in the whole list."""
    records: Records = {}
    for part in found:
        for rank in range(args.processes):
            numbers = share(part, asked, rank, args.processes)
            path = path_of(args, part, rank)
            for record in read_records(path) if path.exists() else ():
                records[numbers[record.question], record.cell] = record
    return records


def table(rows: Sequence[Row], keeps: Sequence[float]) -> Iterator[str]:
    """Accuracy by row and keep, in Markdown, with the unpruned model's first."""
    base, *rest = rows
    assert base.accuracy is not None
    yield f"| | {' | '.join(f'keep {keep:g}' for keep in keeps)} |"
    yield "| --- " * (len(keeps) + 1) + "|"
    whole = _told(base.accuracy)
    yield f"| unpruned, {base.questions:,} questions | {' | '.join([whole] * len(keeps))} |"
    groups: dict[str, dict[float | None, Row]] = {}
    for row in rest:
        groups.setdefault(label(row), {})[row.keep] = row
    for name, own in groups.items():
        cells = [_cell(own.get(keep), base) for keep in keeps]
        yield f"| {name} | {' | '.join(cells)} |"


def label(row: Row) -> str:
    """What a row is called without its keep."""
    if " beside " in row.name:
        return f"`{row.method}`, cuts of `{row.name.split(' beside ')[1].split(' at ')[0]}`"
    return f"`{row.method}` at {row.at}" if row.method else f"**`{row.preset}`**"


def _told(found: Estimate) -> str:
    """A share with its interval, in percent."""
    return f"{100 * found.mean:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})"


def _cell(row: Row | None, base: Row) -> str:
    """Accuracy with its interval, and where it is of other questions or another keep, that."""
    if row is None or row.accuracy is None or row.keep is None:
        return "-"
    own = row.accuracy
    told = _told(own)
    notes = []
    if row.questions != base.questions:
        notes.append(f"of {row.questions}")
    if abs(row.keep_mean - row.keep) > 0.02:
        notes.append(f"keeps {row.keep_mean:.2f}")
    return f"{told}, {', '.join(notes)}" if notes else told


def rivals_table(
    asked: Sequence[Asked], cells: Sequence[Cell], records: Records, preset: str
) -> Iterator[str]:
    """A preset less each rival at each keep: paired difference in points, Holm's p of "worse"."""
    own = {cell.row: cell.entry for cell in cells if cell.entry.preset.name == preset
           and not cell.entry.method}  # fmt: skip
    for row, entry in own.items():
        found = compare_with_rivals(asked, cells, records, row)
        if entry.keep is None or not found:
            continue
        worse = [name for name, _, p in found if p < 0.05]
        yield (
            f"\n`{preset}` at keep {entry.keep:g} against {len(found)} rivals; worse than "
            f"{', '.join(worse) if worse else 'none'} (Holm, 5 %):\n"
        )
        yield "| rival | difference, points (95 %) | p, worse |"
        yield "| --- | --- | --- |"
        for name, gap, p in sorted(found, key=lambda one: one[1].mean):
            told = f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
            yield f"| {name.split(' keep ')[0]} | {told} | {p:.3f} |"


def report(args: argparse.Namespace) -> str:
    """The tables, of what is there."""
    asked, found = work_of(args)
    records = collect(args, asked, found)
    lines: list[str] = []
    told: list[str] = []
    for part in found:
        # What the headline has is of all questions, the rest of the first ones.
        numbers = part.numbers if part is found[0] else tuple(range(len(asked)))
        own = [asked[number] for number in numbers]
        mine = {key: one for key, one in records.items() if key[0] < len(own)}
        rows = summarise(own, part.cells, mine)
        lines += [*table(rows, args.keep)]
        for preset in args.presets:
            lines += rivals_table(own, part.cells, mine, Path(preset).stem)
        lines.append("")
        if args.plot is not None and part is found[0]:
            save_plot(args.plot, rows, own, args)
        told.append(json.dumps({"part": part.name, "rows": [row.to_dict() for row in rows]}))
    if args.json is not None:
        save_file(args.json, "".join(f"{line}\n" for line in told).encode(), "--json")
    return "\n".join(lines)


def save_plot(
    path: Path, rows: Sequence[Row], asked: Sequence[Asked], args: argparse.Namespace
) -> None:
    from vtprune.evaluation.plot import plot

    files = len({one.file for one in asked})
    model = {"name": f"embedded model, {args.split} split"}
    save_file(path, plot(Evaluation(model, tuple(rows), len(asked), files, True)), "--plot")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of files, answers and what goes on")
    parser.add_argument("--model", help="a checkpoint; default: the packaged one")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--seed", type=int, default=0, help="of the files and questions")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--few", type=int, default=500, help="how many all methods are asked")
    parser.add_argument("--methods", type=_names, default=tuple(METHODS))
    parser.add_argument("--presets", type=_names, default=("balanced",))
    parser.add_argument("--rivals", type=_names, default=(), help="methods that are asked all")
    parser.add_argument("--keep", type=_keeps, default=KEEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each random row")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--summary", action="store_true", help="tables of what is there, no more")
    args = parser.parse_args()
    if not args.summary:
        from torch.multiprocessing import spawn

        args.out.mkdir(parents=True, exist_ok=True)
        if not (args.out / "files" / "questions.jsonl").exists():
            write(args.out / "files", args.questions, args.seed, args.split)
        spawn(answer, (args,), nprocs=args.processes)
    sys.stdout.write(report(args) + "\n")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _keeps(text: str) -> tuple[float, ...]:
    return tuple(float(one) for one in text.split(","))


if __name__ == "__main__":
    main()
