"""The project's own result on the embedded model: `python -m vtprune._dev.training.results OUT`.

Every method at every keep on the first questions of a split; the unpruned model, the presets, the
baselines and the rivals on all of them. Several processes share the files; a killed run goes on.
What is chosen is chosen with `--split dev`; test is for the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vtprune._dev.arguments import Parser
from vtprune._dev.training.asking import AskingJob, Records, questions, split_parts
from vtprune.evaluation.bootstrap import Difference, Estimate
from vtprune.evaluation.rows import EvaluationRow, make_rows, records_of
from vtprune.evaluation.variants import (
    UNPRUNED,
    Variant,
    group_by_row,
    list_variants,
    repeat_variants,
)
from vtprune.inference.questions_file import Asked
from vtprune.pruners import BASELINES, METHODS
from vtprune.saving import save_file

KEEPS = (0.5, 0.3, 0.2, 0.1)
SEEDS = 5


def all_cells(
    methods: Sequence[str], presets: Sequence[str], keeps: Sequence[float], seeds: int = SEEDS
) -> list[Variant]:
    """Every method and preset at every keep; baselines at the presets' own layers and counts."""
    cells = (
        repeat_variants(list_variants([], keeps, presets), seeds, matched=True) if presets else []
    )
    if methods:
        cells += repeat_variants(list_variants(methods, keeps), seeds)
    unique: dict[str, Variant] = {}
    for cell in cells:
        unique.setdefault(cell.key, cell)
    return list(unique.values())


def in_headline(cell: Variant, rivals: Sequence[str]) -> bool:
    """Unpruned, presets with what stands beside them, baselines at their own places, rivals."""
    entry = cell
    plain = entry.method in BASELINES and entry.role == "baseline"
    return not entry.method or entry.role == UNPRUNED or plain or entry.method in rivals


def job_of(args: argparse.Namespace) -> AskingJob:
    """The questions, and what is asked of them."""
    asked = questions(args.out, args.split, args.questions, args.seed)
    cells = all_cells(args.methods, args.presets, args.keep, args.seeds)
    headline = [cell for cell in cells if in_headline(cell, args.rivals)]
    parts = split_parts(asked, cells, headline, args.few)
    return AskingJob(args.out, asked, parts, args.model, args.processes, args.calibration)


def table(rows: Sequence[EvaluationRow], keeps: Sequence[float]) -> Iterator[str]:
    """Accuracy by row and keep, in Markdown, with the unpruned model's first."""
    base, *rest = rows
    assert base.accuracy is not None
    yield f"| | {' | '.join(f'keep {keep:g}' for keep in keeps)} |"
    yield "| --- " * (len(keeps) + 1) + "|"
    whole = format_estimate(base.accuracy)
    yield f"| unpruned, {base.questions:,} questions | {' | '.join([whole] * len(keeps))} |"
    groups: dict[str, dict[float | None, EvaluationRow]] = {}
    for row in rest:
        groups.setdefault(label(row), {})[row.keep] = row
    for name, own in groups.items():
        cells = [_cell(own.get(keep), base) for keep in keeps]
        yield f"| {name} | {' | '.join(cells)} |"


def label(row: EvaluationRow) -> str:
    """What a row is called without its keep."""
    if " beside " in row.name:
        return f"`{row.method}`, cuts of `{row.name.split(' beside ')[1].split(' at ')[0]}`"
    return f"`{row.method}` at {row.at}" if row.method else f"**`{row.preset}`**"


def format_estimate(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    return f"{100 * estimate.mean:.1f} ({100 * estimate.low:.1f}-{100 * estimate.high:.1f})"


def _cell(row: EvaluationRow | None, base: EvaluationRow) -> str:
    """Accuracy with its interval, and where it is of other questions or another keep, that."""
    if row is None or row.accuracy is None or row.keep is None:
        return "-"
    own = row.accuracy
    text = format_estimate(own)
    notes = []
    if row.questions != base.questions:
        notes.append(f"of {row.questions}")
    if abs(row.keep_mean - row.keep) > 0.02:
        notes.append(f"keeps {row.keep_mean:.2f}")
    return f"{text}, {', '.join(notes)}" if notes else text


def compare_with_rivals(
    asked: Sequence[Asked], variants: Sequence[Variant], records: Records, row: str
) -> list[tuple[str, Difference, float]]:
    """Compare one row with every other of the same keep: (rival, difference, p-value).

    A p-value is one-sided, that the row is not worse, and adjusted by Holm. Below 0.05 it is worse
    than that rival, also after the correction for their number.
    """
    groups = group_by_row(variant for variant in variants if not variant.follow_up)
    mine = records_of(asked, groups[row], records)
    rivals = [
        name
        for name, seeds in groups.items()
        if name not in (row, UNPRUNED) and seeds[0].keep == groups[row][0].keep
    ]
    gaps = [(name, mine.less(records_of(asked, groups[name], records))) for name in rivals]
    shared = [(name, gap) for name, gap in gaps if gap is not None]
    adjusted = holm([gap.worse for _, gap in shared])
    return [(name, gap, p) for (name, gap), p in zip(shared, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given (Holm, 1979)."""
    order = np.argsort(np.asarray(p_values), kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def rivals_table(
    asked: Sequence[Asked], cells: Sequence[Variant], records: Records, preset: str
) -> Iterator[str]:
    """A preset less each rival at each keep: paired difference in points, Holm's p of "worse"."""
    own = {cell.row: cell for cell in cells if cell.preset.name == preset
           and not cell.method}  # fmt: skip
    for row, entry in own.items():
        rivals = compare_with_rivals(asked, cells, records, row)
        if entry.keep is None or not rivals:
            continue
        worse = [name for name, _, p in rivals if p < 0.05]
        yield (
            f"\n`{preset}` at keep {entry.keep:g} against {len(rivals)} rivals; worse than "
            f"{', '.join(worse) if worse else 'none'} (Holm, 5 %):\n"
        )
        yield "| rival | difference, points (95 %) | p, worse |"
        yield "| --- | --- | --- |"
        for name, gap, p in sorted(rivals, key=lambda rival: rival[1].mean):
            text = f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
            yield f"| {name.split(' keep ')[0]} | {text} | {p:.3f} |"


def of_medium(asked: Sequence[Asked], records: Records, medium: str) -> tuple[list[Asked], Records]:
    """The questions about "pictures" or "clips", or "both", with their answers."""
    suffixes = {"pictures": (".png",), "clips": (".mp4",), "both": (".png", ".mp4")}[medium]
    numbers = [number for number, one in enumerate(asked) if Path(one.file.name).suffix in suffixes]
    place = {number: new for new, number in enumerate(numbers)}
    own = {(place[number], cell): one for (number, cell), one in records.items() if number in place}
    return [asked[number] for number in numbers], own


def report(args: argparse.Namespace, job: AskingJob, records: Records) -> str:
    """The tables, of what is there."""
    lines: list[str] = []
    json_lines: list[str] = []
    for part in job.parts:
        # What the headline has is of all questions, the rest of the first ones.
        asked = job.asked[: len(part.numbers)] if part is job.parts[0] else job.asked
        own, mine = of_medium(asked, records, args.medium)
        rows = make_rows(own, part.cells, mine)
        lines += [*table(rows, args.keep)]
        for preset in args.presets:
            lines += rivals_table(own, part.cells, mine, Path(preset).stem)
        lines.append("")
        for path in args.save if part is job.parts[0] else ():
            if path.suffix != ".json":
                save_plot(path, rows, own, args)
        json_lines.append(json.dumps({"part": part.name, "rows": [row.to_dict() for row in rows]}))
    for path in args.save:
        if path.suffix == ".json":
            save_file(path, "".join(f"{line}\n" for line in json_lines).encode())
    return "\n".join(lines)


def save_plot(
    path: Path, rows: Sequence[EvaluationRow], asked: Sequence[Asked], args: argparse.Namespace
) -> None:
    from vtprune.evaluation.evaluation_chart import plot_rows

    files = len({one.file for one in asked})
    model, kind = f"embedded model, {args.split} split", path.suffix.removeprefix(".")
    save_file(path, plot_rows(rows, model, len(asked), files, kind=kind))


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of files, answers and what goes on")
    parser.add_argument("--model", help="a checkpoint; default: the packaged one")
    parser.add_argument("--calibration", type=Path, help="a file of the model's own layers")
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
    parser.add_argument("--save", type=Path, action="append", default=[],
                        help=".json the rows, .png or .svg their chart; repeatable")  # fmt: skip
    parser.add_argument("--medium", choices=("both", "pictures", "clips"), default="both",
                        help="which questions the tables are of")  # fmt: skip
    parser.add_argument("--summary", action="store_true", help="tables of what is there, no more")
    args = parser.parse_args()
    job = job_of(args)
    if not of_medium([job.asked[number] for number in job.parts[0].numbers], {}, args.medium)[0]:
        parser.error(f"the first {args.few} questions have none about {args.medium}")
    records = job.collect() if args.summary else job.run()
    if not records:
        parser.error(f"{args.out} holds no answers to these questions")
    sys.stdout.write(report(args, job, records) + "\n")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _keeps(text: str) -> tuple[float, ...]:
    return tuple(float(one) for one in text.split(","))


if __name__ == "__main__":
    main()
