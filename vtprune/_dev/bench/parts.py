"""The parts of the speed figures: the options of each, and what it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch

from vtprune._dev import CHECKOUT
from vtprune._dev.arguments import Parser
from vtprune._dev.bench.baseline import measure_kernels, measure_scores
from vtprune._dev.bench.chart import draw_growth
from vtprune._dev.bench.compiled import measure_compiled
from vtprune._dev.bench.decode_cuts import compare_decoding, describe
from vtprune._dev.bench.decoding import measure_decoding
from vtprune._dev.bench.end_to_end import measure_end_to_end
from vtprune._dev.bench.growth import FRAMES, measure_growth
from vtprune._dev.bench.long_video import measure_long_videos
from vtprune._dev.bench.memory import measure_memory
from vtprune._dev.bench.overlap import measure_overlap
from vtprune._dev.bench.page import make_page
from vtprune._dev.bench.prefill import measure_prefill
from vtprune._dev.bench.results import Pass, Results, read_passes
from vtprune._dev.bench.selection import measure_selection
from vtprune._dev.bench.subject import build_subject, narrow_shape
from vtprune.evaluation.profiling.prompts import ProfiledMedia, parse_size
from vtprune.preset.spec import DecodeSpec
from vtprune.pruners import METHODS

RESULTS = CHECKOUT / "docs" / "speed.jsonl"
MODEL, CLIP = "llava-onevision-0.5b", "8x384x384"  # 1,569 visual tokens
Parts: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_parts(parts: Parts) -> None:
    """Add all parts to a command line."""
    prefill = model_part(parts, "prefill", "the realised part of the speed-up", run_prefill, 5)
    prefill.add_argument("--at", default="2,input", help="where to cut, comma separated")
    prefill.add_argument("--method", default="entropy")
    clip = model_part(parts, "end-to-end", "the first token of a real clip", run_end_to_end, 3)
    clip.add_argument("clip", type=Path)
    clip.add_argument("--frames", type=int, default=8)
    clip.add_argument("--pixels", type=float, default=0.5, help="left by the stage at the pixels")
    compiled = model_part(parts, "compiled", "what compiling the layers saves", run_compiled, 5)
    compiled.add_argument("--preset", default="balanced")
    compiled.add_argument("--steps", type=int, default=24, help="tokens decoded after the first")
    compiled.add_argument("--caches", default="growing,static", help="comma separated")
    compiled.add_argument("--mode", help="of torch.compile, such as reduce-overhead")
    plain = model_part(parts, "baseline", "the plain published way beside ours", run_baseline, 3)
    plain.add_argument("--tokens", type=int, default=2880)
    growth = model_part(parts, "growth", "cost against tokens and frames", run_growth, 3)
    growth.add_argument(
        "--frames", default=",".join(map(str, FRAMES)), help="49 tokens each, comma separated"
    )
    growth.add_argument("--methods", default="entropy,spread", help="comma separated")
    choice = part(parts, "selection", "what each method's choice costs", run_selection)
    choice.add_argument("--tokens", default="2880,7290", help="visual tokens, comma separated")
    choice.add_argument("--methods", default="", help="comma separated; all by default")
    choice.add_argument("--keep", type=float, default=0.3, help="kept fraction of the tokens")
    place_options(choice)
    choice.add_argument("--repeats", type=int, default=3)
    decoding = part(parts, "decoding", "a few frames of a clip, beside other readers", run_decoding)
    decoding.add_argument("--frames", type=int, default=16)
    decoding.add_argument("--repeats", type=int, default=5)
    clip_options(decoding, 60, "1920x1080")
    cuts = part(parts, "decode-cuts", "decoding with cuts of the cache", run_decode_cuts)
    place_options(cuts)
    cuts.add_argument("--model", default=MODEL)
    cuts.add_argument("--shown", default="31x384x384", help="a video; 196 tokens a frame")
    cuts.add_argument("--depth", type=int, default=24, help="decoder layers")
    cuts.add_argument("--every", type=int, default=8)
    cuts.add_argument("--keep", type=float, default=0.5)
    cuts.add_argument("--tokens", type=int, default=64, help="decoded")
    cuts.add_argument("--repeats", type=int, default=5)
    overlap = part(parts, "overlap", "a clip decoded while weights are read", run_overlap)
    overlap.add_argument("--model", default=MODEL)
    overlap.add_argument("--frames", type=int, default=16)
    overlap.add_argument("--repeats", type=int, default=3)
    clip_options(overlap, 60, "1920x1080")
    memory = part(parts, "memory", "memory while a long video is decoded", run_memory)
    memory.add_argument("--fps", type=float, default=1.0)
    clip_options(memory, 7200, "640x360")
    long = part(parts, "long-video", "CPU time and memory of streamed videos", run_long_video)
    long.add_argument("--folder", type=Path, default=Path("/tmp"), help="for the clips")
    long.add_argument("--minutes", default="10,30,120", help="of the clips, comma separated")
    long.add_argument("--size", default="640x360")
    page = part(parts, "page", "the page and its chart, from the results", write_page)
    page.add_argument("--save", type=Path, default=CHECKOUT / "docs" / "speed.md")


def part(
    parts: Parts, name: str, summary: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """Add a part, with the options that all have."""
    parser = parts.add_parser(name, help=summary)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of measured passes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.set_defaults(run=run)
    return parser


def model_part(
    parts: Parts,
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], None],
    repeats: int,
) -> argparse.ArgumentParser:
    """Add a part that runs a model."""
    parser = part(parts, name, summary, run)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--shown", help="a picture 672x672 or a video 8x384x384; largest: the "
                      "largest picture of the model")  # fmt: skip
    parser.add_argument("--keep", type=float, default=0.3, help="kept fraction of the tokens")
    place_options(parser)
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser


def place_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of device and dtype."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))


def clip_options(parser: argparse.ArgumentParser, seconds: int, size: str) -> None:
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp"), help="for what is written to be read"
    )
    parser.add_argument("--seconds", type=int, default=seconds)
    parser.add_argument("--size", default=size)


def input_shape(args: argparse.Namespace) -> ProfiledMedia | None:
    """Return the picture or video that the model gets; None for its largest picture."""
    text = args.shown or (CLIP if args.model == MODEL else "largest")
    if text == "largest":
        return None
    shown = parse_size(text, "video") or parse_size(text, "image")
    if shown is None:
        raise SystemExit(f"--shown {text}: not a size")
    return shown


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    return torch.device(args.device), getattr(torch, args.dtype)


def write_passes(passes: list[Pass]) -> None:
    """Write the tables of these passes to standard output."""
    sys.stdout.write(make_page(passes).partition("\n## ")[2])


def run_prefill(args: argparse.Namespace) -> None:
    passes = measure_prefill(
        Results(args.results), args.model, input_shape(args), args.at.split(","), args.method,
        args.keep, *device_and_dtype(args), args.repeats,
    )  # fmt: skip
    write_passes(passes)


def run_end_to_end(args: argparse.Namespace) -> None:
    passes = measure_end_to_end(
        Results(args.results), args.model, args.clip, args.frames, args.pixels, args.keep,
        *device_and_dtype(args), args.repeats,
    )  # fmt: skip
    write_passes(passes)


def run_compiled(args: argparse.Namespace) -> None:
    passes = measure_compiled(
        Results(args.results), args.model, input_shape(args), args.preset, args.keep, args.steps,
        args.caches.split(","), args.mode, *device_and_dtype(args), args.repeats,
    )  # fmt: skip
    write_passes(passes)


def run_baseline(args: argparse.Namespace) -> None:
    results, place = Results(args.results), device_and_dtype(args)
    passes = measure_scores(results, args.tokens, *place, args.repeats)
    passes += measure_kernels(
        results, args.model, input_shape(args), args.keep, *place, args.repeats
    )
    write_passes(passes)


def run_growth(args: argparse.Namespace) -> None:
    frames = [int(text) for text in args.frames.split(",")]
    passes = measure_growth(
        Results(args.results), args.model, frames, args.methods.split(","), args.keep,
        *device_and_dtype(args), args.repeats,
    )  # fmt: skip
    write_passes(passes)


def run_selection(args: argparse.Namespace) -> None:
    choosing = [name for name, method in METHODS.items() if method.chooses]
    passes = measure_selection(
        Results(args.results), [int(text) for text in args.tokens.split(",")],
        args.methods.split(",") if args.methods else choosing, args.keep, *device_and_dtype(args),
        args.repeats,
    )  # fmt: skip
    write_passes(passes)


def run_decoding(args: argparse.Namespace) -> None:
    width, height = map(int, args.size.split("x"))
    passes = measure_decoding(
        Results(args.results), args.folder, args.seconds, width, height, args.frames, args.repeats
    )
    write_passes(passes)


def run_decode_cuts(args: argparse.Namespace) -> None:
    """Print the ratios of one process."""
    shown = parse_size(args.shown, "video")
    shape, place = narrow_shape(args.model, 384), device_and_dtype(args)
    subject = build_subject(shape, shown, *place, depth=args.depth)
    sys.stdout.write(f"{args.model}, {args.depth} layers, {subject.visual:,} visual tokens\n")
    decode = DecodeSpec(args.every, args.keep)
    pairs = compare_decoding(subject, decode, args.tokens, args.repeats)
    sys.stdout.write(describe(pairs, args.tokens))


def run_overlap(args: argparse.Namespace) -> None:
    width, height = map(int, args.size.split("x"))
    passes = measure_overlap(
        Results(args.results), args.model, args.folder, args.seconds, width, height, args.frames,
        args.repeats,
    )  # fmt: skip
    write_passes(passes)


def run_long_video(args: argparse.Namespace) -> None:
    """Print the table; nothing of it is in the results."""
    width, height = map(int, args.size.split("x"))
    minutes = [float(text) for text in args.minutes.split(",")]
    sys.stdout.write(measure_long_videos(args.folder, minutes, width, height))


def run_memory(args: argparse.Namespace) -> None:
    width, height = map(int, args.size.split("x"))
    passes = measure_memory(
        Results(args.results), args.folder, args.seconds, width, height, args.fps
    )
    write_passes(passes)


def write_page(args: argparse.Namespace) -> None:
    passes = read_passes(args.results)
    plot = args.save.with_suffix(".png")
    if any(run.part == "growth" for run in passes):
        plot.write_bytes(draw_growth(passes))
    drawn = plot.name if plot.exists() else ""
    args.save.write_text(make_page(passes, drawn), encoding="utf-8")
