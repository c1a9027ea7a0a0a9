"""Memory and time of loading: `python -m vtprune._dev.bench.loading DIR [--dtype float32]`.

Memory is the process's peak (private and file-mapped pages) beyond what the imports and a model of
the same class without weights take, as a multiple of the weights; Linux alone. Times are medians in
this process, from the system's cache.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from vtprune.models.loading import open_model
from vtprune.models.skeleton import build_skeleton
from vtprune.models.weights_progress import read_weights_in


def status(name: str) -> float:
    """Return a figure of this process, in MB."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) * 1024 / 1e6


def load(directory: str, dtype: str) -> tuple[nn.Module, float]:
    opened = open_model(directory, device="cpu", dtype=dtype)
    started = time.perf_counter()
    return opened.load().model, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="of a checkpoint")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    build_skeleton(open_model(args.directory, device="cpu").files.config)  # imports its class
    before = status("VmRSS")
    model, _ = load(args.directory, args.dtype)
    size = sum(weight.nbytes for weight in model.parameters()) / 1e6
    peak = status("VmHWM") - before
    sys.stdout.write(f"weights {size:,.0f} MB, peak {peak:,.0f} MB, {peak / size:.2f} x\n")
    del model
    mapped, ratios = [], []
    for _ in range(args.repeats):
        started = time.perf_counter()
        plain = AutoModelForImageTextToText.from_pretrained(args.directory, dtype=args.dtype)
        mapped.append(time.perf_counter() - started)
        read_weights_in(plain, torch.device("cpu"), None)
        seconds = time.perf_counter() - started
        del plain
        ratios.append(load(args.directory, args.dtype)[1] / seconds)
    sys.stdout.write(
        f"from_pretrained {statistics.median(mapped):.2f} s; vtprune takes "
        f"{statistics.median(ratios):.2f} of from_pretrained and a pass over the weights\n"
    )


if __name__ == "__main__":
    main()
