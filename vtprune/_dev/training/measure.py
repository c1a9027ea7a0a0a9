"""Measure a model on questions of test: `python -m vtprune._dev.training.measure WEIGHTS`.

Everything goes the user's way: files are written, decoded, prepared by the official recipe and
answered with `generate`, unpruned. Beside each kind stand its chance and what the model answers to
blank and to exchanged pictures.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import vtprune
from vtprune._dev.arguments import Parser
from vtprune._dev.training.extra_questions import names_held_out
from vtprune.demo.questions import KINDS, Question, draw_questions
from vtprune.demo.samples import FRAMES_PER_SECOND, Sample, samples, write_file
from vtprune.demo.score import is_right
from vtprune.demo.world import generator, make_clip, make_picture
from vtprune.inference.library import Media

MANNERS = ("seen", "blank", "exchanged")


@dataclass(frozen=True)
class Answered:
    """One question about one file, and what was answered."""

    file: str
    question: Question
    answer: str

    @property
    def right(self) -> bool:
        return is_right(self.question.kind, self.question.answer, self.answer)


def blank(sample: Sample) -> Media:
    """A grey picture or clip of a sample's size."""
    scene = sample.scene
    grey = np.full((scene.num_frames, scene.height, scene.width, 3), 128, dtype=np.uint8)
    return vtprune.Clip(grey, FRAMES_PER_SECOND) if scene.is_clip else grey[0]


def answer_all(
    model: Path | None, folder: Path, num: int, seed: int, split: str, manner: str
) -> list[Answered]:
    """Answer `num` questions; `manner` says what the model is shown."""
    asked: list[tuple[str, Question]] = []
    items: list[tuple[Media, str]] = []
    last: dict[tuple[int, ...], Media] = {}
    for sample in samples(num, seed, split):
        path, scene = folder / sample.name, sample.scene
        if not path.exists():
            write_file(path, scene)
        medium: Media = path
        if manner == "blank":
            medium = blank(sample)
        if manner == "exchanged":
            # The one before of the same kind and size.
            size = scene.height, scene.width, int(scene.is_clip)
            medium, last[size] = last.get(size, blank(sample)), path
        asked += [(sample.name, question) for question in sample.questions]
        items += [(medium, question.text) for question in sample.questions]
    reports = vtprune.answer(model, items, keep=1.0)
    return [
        Answered(name, question, report.answer or "")
        for (name, question), report in zip(asked, reports, strict=True)
    ]


def interval(results: list[Answered], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """A 95 % interval of the share of right answers, files drawn with replacement."""
    by_file: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        by_file[result.file].append(result.right)
    right = np.array([sum(v) for v in by_file.values()])
    count = np.array([len(v) for v in by_file.values()])
    index = np.random.default_rng(seed).integers(len(right), size=(draws, len(right)))
    shares = right[index].sum(axis=1) / count[index].sum(axis=1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)


def guesses(num_scenes: int = 3000) -> dict[str, str]:
    """For each template, the answer that is most often right in train without looking.

    An answer may be a fixed one, or one of the template's own words ("{one}").
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(num_scenes):
        rng = generator("train", 5_000_000, index)
        size = ((112, 112), (224, 224))[index // 2 % 2]
        scene = (
            make_clip("train", 9, index)
            if index % 2
            else make_picture("train", 9, index, size=size)
        )
        for question in draw_questions(scene, rng, 4):
            counts[question.template][question.answer] += 1
            for name, word in fields(question).items():
                if word == question.answer:
                    counts[question.template]["{" + name + "}"] += 1
    return {template: count.most_common(1)[0][0] for template, count in counts.items()}


def fields(question: Question) -> dict[str, str]:
    """The words that fill a question's template: {"one": "red circle moves left", ...}."""
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(question.template))
    match = re.fullmatch(pattern, question.text)
    assert match is not None, question
    return match.groupdict()


def guess(question: Question, best: dict[str, str]) -> str:
    """The best answer without looking."""
    return best.get(question.template, "").format(**fields(question))


def table(results: dict[str, list[Answered]]) -> list[dict[str, object]]:
    """A row for each kind: share right, its interval, chance, blank, exchanged, held-out pairs."""
    best = guesses()
    rows: list[dict[str, object]] = []
    for kind in (*KINDS, "all"):
        of = {m: [r for r in rs if kind in (r.question.kind, "all")] for m, rs in results.items()}
        seen = of["seen"]
        if not seen:
            continue
        held = [r for r in seen if names_held_out(r.question)]
        low, high = interval(seen)
        lucky = [
            is_right(r.question.kind, r.question.answer, guess(r.question, best)) for r in seen
        ]
        rows.append(
            {
                "kind": kind,
                "questions": len(seen),
                "right": _share([r.right for r in seen]),
                "interval": [round(low, 4), round(high, 4)],
                "chance": _share(lucky),
                **{m: _share([r.right for r in of[m]]) for m in results if m != "seen"},
                "held_out": _share([r.right for r in held]) if held else None,
                "held_out_questions": len(held),
            }
        )
    return rows


def _share(values: list[bool]) -> float:
    return round(sum(values) / max(len(values), 1), 4)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--manners", nargs="+", choices=MANNERS, default=list(MANNERS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            manner: answer_all(args.weights, Path(folder), args.num, args.seed, args.split, manner)
            for manner in args.manners
        }
    for row in table(results):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
