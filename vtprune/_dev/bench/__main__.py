"""Measure one part: `python -m vtprune._dev.bench PART`, a Markdown table on stdout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vtprune._dev.arguments import Parser
from vtprune._dev.bench.first_token import measure_first_token
from vtprune._dev.bench.layers import measure_layers
from vtprune._dev.bench.parts import add_parts, device_and_dtype, place_options
from vtprune.evaluation.profiling.profile import ProfileOptions
from vtprune.evaluation.profiling.prompts import parse_size

PROGRAM = "python -m vtprune._dev.bench"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog=PROGRAM, description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    layers = parts.add_parser("layers", help="layers summed beside the whole model")
    layers.add_argument("--threads", type=int, default=1, help="CPU threads")
    place_options(layers)
    layers.add_argument("--save", type=Path, help="write the table to this file too")
    layers.add_argument("--model", default="llava-onevision-0.5b")
    layers.add_argument("--shown", default="384x384", help="a picture or video, by its size")
    layers.add_argument("--keep", default="0.5,0.3", help="kept fractions, comma separated")
    layers.add_argument("--presets", default="fast", help="presets, comma separated")
    layers.add_argument("--seconds", type=float, default=60.0, help="for each of the two ways")
    layers.add_argument("--repeats", type=int, default=3)
    layers.set_defaults(run=run_layers)
    first = parts.add_parser("first-token", help="first tokens of real clips under whole presets")
    first.add_argument("clips", type=Path, nargs="+")
    first.add_argument("--threads", type=int, default=1, help="CPU threads")
    place_options(first)
    first.add_argument("--model", default="llava-onevision-0.5b")
    first.add_argument("--presets", default="long-video", help="presets, comma separated")
    first.add_argument("--frames", type=int, default=16)
    first.add_argument("--share", type=int, default=1, help="build one layer in so many")
    first.add_argument("--passes", type=int, default=2)
    first.set_defaults(run=run_first_token)
    add_parts(parts)
    args = parser.parse_args(arguments)
    args.command = " ".join([PROGRAM, *(sys.argv[1:] if arguments is None else arguments)])
    torch.set_num_threads(args.threads)
    args.run(args)


def run_layers(args: argparse.Namespace) -> None:
    shown = parse_size(args.shown, "video") or parse_size(args.shown, "image")
    if shown is None:
        raise SystemExit(f"--shown {args.shown}: not a size")
    options = ProfileOptions(
        device=args.device, dtype=args.dtype, seconds=args.seconds, repeats=args.repeats
    )
    keeps = [float(one) for one in args.keep.split(",")]
    presets = args.presets.split(",")
    text = measure_layers(args.model, shown, keeps, presets, options, args.command)
    sys.stdout.write(text)
    if args.save:
        args.save.write_text(text, encoding="utf-8")


def run_first_token(args: argparse.Namespace) -> None:
    text = measure_first_token(
        args.model, args.clips, args.presets.split(","), args.frames, args.share,
        *device_and_dtype(args), args.passes,
    )  # fmt: skip
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
