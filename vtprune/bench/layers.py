"""`python -m vtprune.bench.layers`: single layers, timed and summed, beside the whole model."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from vtprune import __version__
from vtprune.profiling.inputs import Shown, parse_picture, parse_video
from vtprune.profiling.profile import Options, Profile, profile

PARTS = {
    "vision": "vision tower",
    "select": "selection",
    "prefill": "prefill",
    "decode_per_token": "decoded token",
    "first_token": "first token",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vtprune.bench.layers", description=__doc__)
    parser.add_argument("--model", default="llava-onevision-0.5b")
    parser.add_argument("--shown", default="384x384", help="a picture or video, by its size")
    parser.add_argument("--keep", default="0.5,0.3", help="kept fractions, comma separated")
    parser.add_argument("--preset", default="fast", help="presets, comma separated")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of the two ways")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shown = parse_video(args.shown) or parse_picture(args.shown)
    if shown is None:
        parser.error(f"--shown {args.shown}: not a size")
    found = {how: run(args, shown, how) for how in ("layers", "whole")}
    text = head(found["whole"]) + table(found["layers"].rows, found["whole"].rows)
    sys.stdout.write(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


def run(args: argparse.Namespace, shown: Shown, how: str) -> Profile:
    """One profile, measured one way."""

    def show(stage: str, done: int, total: int) -> None:
        sys.stderr.write(f"{how}: {stage} {done} of {total}\n")

    options = Options(device=args.device, dtype=args.dtype, seconds=args.seconds,
                      repeats=args.repeats, how=how)  # fmt: skip
    keeps = [float(one) for one in args.keep.split(",")]
    return profile(args.model, shown, keeps=keeps, presets=args.preset.split(","), options=options,
                   on_progress=show)  # fmt: skip


def head(found: Profile) -> str:
    """What was run, where."""
    shown, machine = found.input, found.machine
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    return (
        f"vtprune {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{machine['name']}{threads}, {found.model['dtype']}: {found.model['name']}, "
        f"{shown['visual_tokens']} visual tokens. "
        f"Command: `python -m vtprune.bench.layers {' '.join(sys.argv[1:])}`\n\n"
    )


def table(layers: Sequence[Mapping[str, object]], whole: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table: seconds of the whole model, and of the sum beside them."""
    lines = ["| row | part | layers summed, s | whole model, s | ratio |",
             "| --- | --- | ---: | ---: | ---: |"]  # fmt: skip
    for one, other in zip(layers, whole, strict=True):
        name = one["preset"] or f"keep {one['keep']:g}"
        for part, told in PARTS.items():
            summed, real = seconds_of(one, part), seconds_of(other, part)
            if real:
                lines.append(
                    f"| {name} | {told} | {summed:.4g} | {real:.4g} | {summed / real:.2f} |"
                )
        speedups = [figure(row, "compare", "prefill_speedup") for row in (one, other)]
        lines.append(
            f"| {name} | prefill speed-up | {speedups[0]:.2f} x | {speedups[1]:.2f} x | "
            f"{speedups[0] / speedups[1]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def seconds_of(row: Mapping[str, object], part: str) -> float:
    return figure(row, "seconds", part)


def figure(row: Mapping[str, object], block: str, name: str) -> float:
    return cast(float, cast("Mapping[str, object]", row[block])[name])


if __name__ == "__main__":
    main()
