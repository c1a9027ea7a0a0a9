"""`python -m vtprune.bench PART`: measures, prints a Markdown table, shows progress on stderr."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vtprune import __version__
from vtprune.bench.layers import measure_layers
from vtprune.bench.parts import Parts, add_parts
from vtprune.bench.selection import Row, measure_selection, table
from vtprune.profiling.cases import Options
from vtprune.profiling.shown import parse_picture, parse_video
from vtprune.pruners import METHODS

PROGRAM = "python -m vtprune.bench"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    selection = table_part(parts, "selection", "what each method's choice costs", run_selection)
    selection.add_argument("--tokens", default="2880,7290", help="visual tokens, comma separated")
    selection.add_argument("--methods", default="", help="comma separated; all by default")
    selection.add_argument("--keep", type=float, default=0.3, help="kept fraction of the tokens")
    selection.add_argument("--repeats", type=int, default=5)
    layers = table_part(parts, "layers", "layers summed beside the whole model", run_layers)
    layers.add_argument("--model", default="llava-onevision-0.5b")
    layers.add_argument("--shown", default="384x384", help="a picture or video, by its size")
    layers.add_argument("--keep", default="0.5,0.3", help="kept fractions, comma separated")
    layers.add_argument("--preset", default="fast", help="presets, comma separated")
    layers.add_argument("--seconds", type=float, default=60.0, help="for each of the two ways")
    layers.add_argument("--repeats", type=int, default=3)
    add_parts(parts)
    args = parser.parse_args(arguments)
    args.command = " ".join([PROGRAM, *(sys.argv[1:] if arguments is None else arguments)])
    torch.set_num_threads(args.threads)
    args.run(args)


def table_part(
    parts: Parts, name: str, told: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """A part that is measured at once and gives one table."""
    made = parts.add_parser(name, help=told)
    made.add_argument("--threads", type=int, default=1, help="CPU threads")
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument("--out", type=Path, help="write the table to this file too")
    made.set_defaults(run=run)
    return made


def publish(text: str, out: Path | None) -> None:
    sys.stdout.write(text)
    if out:
        out.write_text(text, encoding="utf-8")


def run_layers(args: argparse.Namespace) -> None:
    shown = parse_video(args.shown) or parse_picture(args.shown)
    if shown is None:
        raise SystemExit(f"--shown {args.shown}: not a size")
    options = Options(
        device=args.device, dtype=args.dtype, seconds=args.seconds, repeats=args.repeats
    )
    keeps = [float(one) for one in args.keep.split(",")]
    presets = args.preset.split(",")
    text = measure_layers(args.model, shown, keeps, presets, options, args.command)
    publish(text, args.out)


def run_selection(args: argparse.Namespace) -> None:
    names = (
        args.methods.split(",")
        if args.methods
        else [name for name, one in METHODS.items() if one.chooses]
    )
    device = torch.device(args.device)
    rows: list[Row] = []
    for number in (int(one) for one in args.tokens.split(",")):
        for name in names:
            sys.stderr.write(f"{name}, {number} tokens\n")
            dtype = getattr(torch, args.dtype)
            rows.append(measure_selection(name, number, args.keep, args.repeats, device, dtype))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} CPU thread"
    head = (
        f"vtprune {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{where}, {args.dtype}. Command: `{args.command}`\n\n"
    )
    publish(head + table(rows), args.out)


if __name__ == "__main__":
    main()
