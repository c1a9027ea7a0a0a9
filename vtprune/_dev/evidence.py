"""Measure the maps of `vtprune explain` on the embedded world, whose boxes and moments are known.

`nice python -m vtprune._dev.evidence` asks questions, writes a line each to docs/explain.jsonl, and
goes on from there when it is run again; at the end, and with --table at once, it writes the table
into docs/explain.md and draws docs/explain.png.
"""

from __future__ import annotations

import functools
import json
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import torch

from vtprune._dev import CHECKOUT
from vtprune._dev.arguments import Parser
from vtprune._dev.lines import read_lines
from vtprune.demo.questions import Question
from vtprune.demo.regions import SceneRegion, boxes_at, find_region
from vtprune.demo.samples import samples, write_file
from vtprune.demo.world import Scene
from vtprune.evaluation.bootstrap import estimate
from vtprune.inference.evidence import METHODS, MapSettings
from vtprune.inference.evidence.ask import UNPRUNED, ExplainedAnswer, answer_to_explain
from vtprune.inference.evidence.explain import explain_answer, map_values
from vtprune.inference.evidence.explanation import to_shares
from vtprune.inference.evidence.probe import Passes
from vtprune.inference.generate import Generation
from vtprune.inference.kept_tokens import keep_record
from vtprune.inference.places import TokenPlace, find_places
from vtprune.inference.prepare import prepare_question
from vtprune.inference.prompt_media import read_media
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, load
from vtprune.pictures.evidence import EvidenceDrawing

DOCS = CHECKOUT / "docs"
PAGE, MARK = DOCS / "explain.md", "<!-- measured by python -m vtprune._dev.evidence -->"
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the tokens, from the top of a map, that are left, or left out."""
FIGURES = ("pointing", "energy", "time", "insertion", "deletion", "passes", "seconds")
Row = dict[str, float | None]
SEED = 11


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m vtprune._dev.evidence", description=__doc__)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--passes", type=int, default=64, help="for each part of an answer")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--weights", choices=["trained", "random"], default="trained")
    parser.add_argument("--table", action="store_true", help="write the table of what is there")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    suffix = "" if args.weights == "trained" else "-random"
    path = DOCS / f"explain{suffix}.jsonl"
    loaded = load()
    if args.weights == "random":
        scramble(loaded)
    if not args.table:
        measure(loaded, path, args)
    if args.weights == "trained":
        write_table(path, DOCS / "explain-random.jsonl")
        draw_examples(loaded)


def scramble(loaded: Loaded) -> None:
    """Give a model random weights of the scale of its own."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            if weight.dim() > 1:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(drawn * weight.float().std())


def asked() -> Iterator[tuple[int, str, Scene, Question]]:
    """Yield number, file, scene and question, without an end."""
    number = count()
    for sample in samples(10**6, SEED, "test"):
        for question in sample.questions:
            yield next(number), sample.name, sample.scene, question


def measure(loaded: Loaded, path: Path, args: object) -> None:
    """Append a line for each question whose right answer was given and has a place."""
    questions, passes = int(args.questions), int(args.passes)  # type: ignore[attr-defined]
    trained = args.weights == "trained"  # type: ignore[attr-defined]
    ends = time.monotonic() + 60 * float(args.minutes)  # type: ignore[attr-defined]
    done = read_lines(path)
    measured = sum("kind" in line for line in done)
    first = max((line["number"] for line in done), default=-1) + 1
    with tempfile.TemporaryDirectory() as folder, path.open("a", encoding="utf-8") as file:
        for number, name, scene, question in asked():
            if measured >= questions or time.monotonic() > ends:
                return
            if number < first:
                continue
            rows = measure_question(loaded, Path(folder) / name, scene, question, passes, trained)
            line: dict[str, object] = {"number": number}
            if rows is not None:
                line |= {"file": name, "kind": question.kind, "rows": rows}
                measured += 1
            file.write(json.dumps(line) + "\n")
            file.flush()


def measure_question(
    loaded: Loaded, path: Path, scene: Scene, question: Question, passes: int, trained: bool
) -> dict[str, Row] | None:
    """Return the figures of every method; None where there is nothing to point at."""
    regions = find_region(scene, question)
    if regions is None:
        return None
    if not path.is_file():
        write_file(path, scene)
    media = read_media(loaded, [path], Sampling(), None, Limits())
    generation = Generation(max_new_tokens=48 if trained else 4)
    prepared = prepare_question(loaded, media, question.text, generation)
    answer = answer_to_explain(loaded, prepared, UNPRUNED, generation, {})
    wanted = len(answer.parts) == len(regions) and answer.run.answer == question.answer
    if trained and not wanted:
        return None
    if not trained and len(regions) > 1:
        return None
    kept = keep_record(loaded, prepared, answer.run.trace, 0)
    assert kept is not None
    places = find_places(kept)
    targets = [target_of(scene, places, region) for region in regions]
    rows = {}
    for name in ("random", "uniform", *METHODS):
        counted, started = Passes(passes * len(answer.parts)), time.process_time()
        values = map_of(answer, name, counted, places)[:, : len(regions)]
        row: Row = {"passes": counted.done, "seconds": time.process_time() - started}
        shares = [to_shares(values[:, number]) for number in range(len(regions))]
        judged = [judge(s, places, *target) for s, target in zip(shares, targets, strict=True)]
        for figure in ("pointing", "energy", "time"):
            known = [one[figure] for one in judged if one[figure] is not None]
            row[figure] = sum(known) / len(known) if known else None  # type: ignore[arg-type]
        rows[name] = row | (curves(answer, shares) if trained else {})
    return rows


def map_of(
    answer: ExplainedAnswer, name: str, passes: Passes, places: Sequence[TokenPlace]
) -> torch.Tensor:
    """Return the (N, parts) map of a method or a baseline."""
    shape = len(answer.layout), len(answer.parts)
    if name == "uniform":
        return torch.ones(shape)
    if name == "random":
        generator = torch.Generator().manual_seed(len(places) * 31 + len(answer.run.tokens))
        return torch.rand(shape, generator=generator)
    return map_values(answer, MapSettings(name), passes)[0]


Target = tuple[torch.Tensor, torch.Tensor | None]


def target_of(scene: Scene, places: Sequence[TokenPlace], region: SceneRegion) -> Target:
    """Return which tokens lie on a region (their centre within half a token of its boxes), and
    which are in its time; None where it has none."""
    last = max(scene.num_frames - 1, 1)
    step = 1 / max(len({place.frame for place in places}) - 1, 1)
    boxes = functools.cache(lambda moment: boxes_at(scene, region, moment))
    inside, in_time = torch.zeros(len(places)), torch.zeros(len(places))
    for number, place in enumerate(places):
        if place.box is None:
            continue
        left, top, right, bottom = place.box
        for frame in place.frames or (0,):
            moment = frame / last if scene.is_clip else 0.0
            across, down = (right - left) / 2, (bottom - top) / 2
            x, y = left + across, top + down
            if any(b[0] - across <= x <= b[2] + across and b[1] - down <= y <= b[3] + down
                   for b in boxes(moment)):  # fmt: skip
                inside[number] = 1
            if region.span and region.span[0] - step <= moment <= region.span[1] + step:
                in_time[number] = 1
    return inside, in_time if scene.is_clip and region.span else None


def judge(
    shares: torch.Tensor,
    places: Sequence[TokenPlace],
    inside: torch.Tensor,
    in_time: torch.Tensor | None,
) -> Row:
    """Return whether the highest token lies on the region (a tie: the share of those that do), the
    share of the evidence that does, and whether the frame with the most is in its time."""
    shown = torch.tensor([float(place.box is not None) for place in places])
    shares = shares * shown
    if float(shares.sum()) <= 0:
        shares = shown
    top = shares == shares.max()
    row: Row = {
        "pointing": float(inside[top].mean()),
        "energy": float((shares * inside).sum() / shares.sum()),
        "time": None,
    }
    if in_time is not None:
        frames = torch.tensor([place.frame for place in places])
        sums = torch.zeros(int(frames.max()) + 1).index_add(0, frames, shares)
        best = [bool(in_time[frames == n].any()) for n in (sums >= sums.max() - 1e-6).nonzero()]
        row["time"] = sum(best) / len(best)
    return row


def curves(answer: ExplainedAnswer, shares: Sequence[torch.Tensor]) -> Row:
    """Return the areas of insertion and deletion, by exact pruning at the input: the probability of
    the answer, mean over FRACTIONS, with the highest tokens alone, and without them."""
    probe = answer.probe(Passes(10**9))
    base, totals = probe.base().exp(), {"insertion": 0.0, "deletion": 0.0}
    for part, values in enumerate(shares):
        noise = torch.rand(len(values), generator=torch.Generator().manual_seed(SEED))
        order = (values + noise * 1e-9).argsort(descending=True)
        kept = torch.zeros(len(FRACTIONS), len(values), dtype=torch.bool)
        for row, fraction in enumerate(FRACTIONS):
            kept[row, order[: max(1, round(fraction * len(values)))]] = True
        for name, mask in (("insertion", kept), ("deletion", ~kept)):
            scores = probe.alone(mask)[:, part].exp()
            totals[name] += float(scores.mean() / base[part].clamp_min(1e-6))
    return {name: total / len(shares) for name, total in totals.items()}


# -- the page -------------------------------------------------------------------------------------


def read_measured(path: Path) -> list[dict[str, object]]:
    """Return the lines of the questions that were measured."""
    return [line for line in read_lines(path) if "kind" in line]


def write_table(path: Path, random_path: Path) -> None:
    """Write what was measured into the page, behind its mark."""
    lines = read_measured(path)
    if not lines:
        return
    text = PAGE.read_text(encoding="utf-8")
    head, mark, rest = text.partition(MARK)
    tail = rest[rest.index("\n![") :]
    parts = [table(lines), by_kind(lines)]
    if random_lines := read_measured(random_path):
        parts.append(sanity(random_lines))
    PAGE.write_text(f"{head}{mark}\n\n" + "\n\n".join(parts) + "\n" + tail, encoding="utf-8")


def figure(lines: Sequence[Mapping[str, object]], method: str, name: str) -> str:
    """Return a mean and its 95 % interval over the files."""
    pairs = [
        (value, str(line["file"]))
        for line in lines
        if (value := line["rows"][method][name]) is not None  # type: ignore[index]
    ]
    if not pairs:
        return "-"
    values, files = [float(value) for value, _ in pairs], [file for _, file in pairs]
    if name in ("passes", "seconds"):
        return f"{sum(values) / len(values):.{0 if name == 'passes' else 2}f}"
    found = estimate(values, files)
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def table(lines: Sequence[Mapping[str, object]]) -> str:
    """Return the table of all methods."""
    clips = sum(line["rows"]["random"]["time"] is not None for line in lines)  # type: ignore[index]
    rows = [
        f"{len(lines)} questions with the right answer, {clips} of them with a moment; means with "
        "95 % bootstrap intervals over files.",
        "",
        "| | " + " | ".join(FIGURES) + " |",
        "| --- |" + " --- |" * len(FIGURES),
    ]
    for method in ("random", "uniform", *METHODS):
        cells = [figure(lines, method, name) for name in FIGURES]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def by_kind(lines: Sequence[Mapping[str, object]]) -> str:
    """Return the pointing hits by kind of question."""
    names = ("random", *METHODS)
    rows = [
        "Pointing by kind of question:", "",
        "| | questions | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names),
    ]  # fmt: skip
    for kind in dict.fromkeys(str(line["kind"]) for line in lines):
        some = [line for line in lines if line["kind"] == kind]
        hits = [
            sum(line["rows"][name]["pointing"] for line in some) / len(some)  # type: ignore[index]
            for name in names
        ]
        rows.append(f"| {kind} | {len(some)} | " + " | ".join(f"{h:.2f}" for h in hits) + " |")
    return "\n".join(rows)


def sanity(lines: Sequence[Mapping[str, object]]) -> str:
    """Return the pointing hits of a model with random weights."""
    cells = [f"{name} {figure(lines, name, 'pointing')}" for name in ("random", *METHODS)]
    text = f"With random weights, {len(lines)} questions, pointing: " + ", ".join(cells) + "."
    return textwrap.fill(text, 120)


def draw_examples(loaded: Loaded) -> None:
    """Draw the picture of the page: a clip whose events happen in different places."""
    with tempfile.TemporaryDirectory() as folder:
        for _, name, scene, question in asked():
            if question.kind == "what_happens" and len(scene.events) > 1:
                path = Path(folder) / name
                write_file(path, scene)
                media = read_media(loaded, [path], Sampling(frames=4), None, Limits())
                result = explain_answer(loaded, media, question.text)
                if result.answer == question.answer:
                    EvidenceDrawing(result).save(DOCS / "explain.png")
                    return


if __name__ == "__main__":
    main()
