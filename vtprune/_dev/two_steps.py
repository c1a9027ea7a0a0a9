"""Measure what choosing in two steps costs on the embedded world, whose right answers are known.

`nice python -m vtprune._dev.two_steps` asks questions about clips of 8 to 256 frames with as many
tokens kept, chosen among all frames at once and by segments first. It writes a line a question to
docs/long-video.jsonl, goes on from there when it is run again, and writes the table into
docs/long-video.md; --table does that alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import vtprune
from vtprune._dev import CHECKOUT
from vtprune._dev.arguments import Parser
from vtprune._dev.lines import read_lines
from vtprune.demo.questions import CLIP_KINDS, Question, draw_questions
from vtprune.demo.samples import CLIP_SIDE, FRAMES_PER_SECOND, frames_of
from vtprune.demo.score import is_right
from vtprune.demo.world import generator, make_clip
from vtprune.evaluation.bootstrap import difference, estimate

PAGE, ROWS = CHECKOUT / "docs" / "long-video.md", CHECKOUT / "docs" / "long-video.jsonl"
MARK = "<!-- measured by python -m vtprune._dev.two_steps -->"
FRAMES = (8, 16, 32, 64, 128, 256)
TOKENS = 64
SEGMENT = 8
"""Frames of a segment."""
WAYS: dict[str, dict[str, object] | bool] = {
    "at once": False,
    "equal": {"frames": SEGMENT},
    "information": {"frames": SEGMENT, "share": "information"},
}
STAGES = [{"at": "input", "method": "spread", "positions": "renumber"}]
SEED, PER_CLIP = 23, 2
Row = dict[str, object]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m vtprune._dev.two_steps", description=__doc__)
    parser.add_argument("--questions", type=int, default=40, help="for each length")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--table", action="store_true", help="write the table of what is there")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = read_lines(args.rows)
    if not args.table:
        measure(args.rows, rows, args.questions, time.monotonic() + 60 * args.minutes)
    write_table(read_lines(args.rows))


def measure(path: Path, rows: Sequence[Row], num: int, until: float) -> None:
    """Ask what is not in the file yet, the lengths in turn, and write a line each."""
    done = {(row["frames"], row["clip"], row["question"]) for row in rows}
    model = vtprune.load(None)
    preset = vtprune.load_preset({"stages": STAGES, "tokens_after": TOKENS})
    for number in range(-(-num // PER_CLIP)):
        for frames in FRAMES:
            for clip, question in clip_questions(number, frames):
                if (frames, number, question.text) in done or time.monotonic() > until:
                    continue
                row: Row = {"frames": frames, "clip": number, "question": question.text}
                for way, stream in WAYS.items():
                    report = vtprune.ask(
                        model, clip, question.text, preset=preset, stream=stream,
                        sampling=vtprune.Sampling(frames=frames),
                        generation=vtprune.Generation(max_new_tokens=32),
                    )  # fmt: skip
                    assert report.tokens.kept_after <= TOKENS
                    row[way] = is_right(question.kind, question.answer, report.answer)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def clip_questions(number: int, frames: int) -> Iterator[tuple[vtprune.Clip, Question]]:
    """Yield a clip of so many frames, in memory, with questions about what happens in it."""
    scene = make_clip("dev", SEED, number, num_frames=frames, size=CLIP_SIDE)
    questions = draw_questions(scene, generator("dev", SEED, number), PER_CLIP, CLIP_KINDS)
    clip = vtprune.Clip(frames_of(scene), fps=FRAMES_PER_SECOND)
    for question in questions:
        yield clip, question


# -- the table -------------------------------------------------------------------------------------


def write_table(rows: Sequence[Row]) -> None:
    """Put the table into the page, in the place of the one that is there."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARK)
    after = rest.partition(MARK)[2]
    PAGE.write_text(f"{before}{MARK}\n{table(rows)}\n{MARK}{after}", encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Return the right answers by length and way, and what two steps change of them."""
    lines = [
        "| frames | questions | at once | equal | information | equal less at once |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for frames in (*FRAMES, "all"):
        some = [row for row in rows if frames in ("all", row["frames"])]
        if not some:
            continue
        files = [f"{row['frames']}/{row['clip']}" for row in some]
        right = {way: [float(bool(row[way])) for row in some] for way in WAYS}
        cells = [f"{100 * estimate(values, files).mean:.1f} %" for values in right.values()]
        gap = difference(right["equal"], right["at once"], files)
        change = f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
        lines.append(f"| {frames} | {len(some)} | {' | '.join(cells)} | {change} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
