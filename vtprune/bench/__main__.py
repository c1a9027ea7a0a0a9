"""`python -m vtprune.bench PART`: measures, prints a Markdown table, shows progress on stderr."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vtprune import __version__
from vtprune.bench.parts import add_parts
from vtprune.bench.selection import Row, measure_selection, table
from vtprune.pruners import METHODS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vtprune.bench", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    selection = parts.add_parser("selection", help="what each method's choice costs")
    selection.add_argument("--tokens", default="2880,7290", help="visual tokens, comma separated")
    selection.add_argument("--methods", default="", help="comma separated; all by default")
    selection.add_argument("--keep", type=float, default=0.3, help="kept fraction of the tokens")
    selection.add_argument("--repeats", type=int, default=5)
    selection.add_argument("--threads", type=int, default=1, help="CPU threads")
    selection.add_argument("--device", default="cpu")
    selection.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    selection.add_argument("--out", type=Path, help="write the table to this file too")
    selection.set_defaults(run=run_selection)
    add_parts(parts)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.run(args)


def run_selection(args: argparse.Namespace) -> None:
    names = (
        args.methods.split(",")
        if args.methods
        else [name for name, one in METHODS.items() if not (one.drops_all or one.before_tower)]
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
        f"{where}, {args.dtype}. Command: `python -m vtprune.bench {' '.join(sys.argv[1:])}`\n\n"
    )
    text = head + table(rows)
    sys.stdout.write(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
