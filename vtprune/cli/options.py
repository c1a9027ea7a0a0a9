"""The options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from vtprune.cli import complete
from vtprune.cli.help import F, Option, comma_list


def _group(section: str, *options: Callable[..., Callable[[F], F]]) -> Callable[[F], F]:
    """One decorator of several; their order in the help is that in which they are given."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(cls=Option, section=section)(command)
        return command

    return decorate


_opt = partial(partial, click.option)

# fmt: off
_DTYPE = _opt("--dtype", metavar="NAME",
              help="auto, float32, bfloat16 or float16.  [default: auto]")
_KERNEL = _opt("--attention", metavar="NAME", help="Attention kernel, by transformers' name: sdpa, "
               "eager, flash_attention_2.")
_LOADING = (
    _opt("--model", metavar="NAME", shell_complete=complete.complete_model,
         help="Short name (vtprune models), hub id or directory.  [default: embedded, a small "
         "demonstration model]"),
    _opt("--adapter", metavar="NAME", help="Directory or hub id of an adapter (LoRA and its kin) "
         "for the model.  [default model: the one that it names]"),
    _opt("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, or map: spread over all "
         "there are.  [default: auto]"),
    _opt("--quantize", metavar="BITS", help="4bit or 8bit, by bitsandbytes."),
    _DTYPE,
    _KERNEL,
)
_LIMITS = (
    _opt("--max-pixels", type=int, metavar="N", help="The largest picture that is read, width x "
         "height.  [default: 178956970]"),
    _opt("--allow-partial", is_flag=True, help="Read what decodes of a damaged file."),
    _opt("--decoder", metavar="NAME", help="Of videos: auto, pyav, or decord with PyAV for what it "
         "can't read.  [default: auto, which is pyav]"),
    _opt("--pages", metavar="N-M,...", help="Pages of PDF and TIFF files: 1-3, or 1,3,5-.  "
         "[default: all; 64 are the most]"),
    _opt("--dpi", type=int, metavar="N", help="Pixels an inch that PDF pages are drawn with.  "
         "[default: 144]"),
)
_CALIBRATION = _opt("--calibration", type=click.Path(path_type=Path), metavar="FILE",
                    help="Where ecl and horizon are in this model.")
_TRUST = _opt("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint "
              "brings.")

model_options = _group("Model", *_LOADING, _CALIBRATION, _TRUST)
"""Which model, and how it is loaded."""

uncalibrated_options = _group("Model", *_LOADING, _TRUST)
"""The same, for what finds out where it can be cut."""

shape_options = _group(
    "Model",
    _opt("--model", metavar="NAME", shell_complete=complete.complete_model,
         help="Short name (vtprune models), hub id, directory or config.json; no weights are "
         "needed.  [default: embedded]"),
    _opt("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.  [default: auto]"),
    _DTYPE,
    _KERNEL,
    _CALIBRATION,
)
"""Which model, where its shape alone is wanted."""

limit_options = _group("Input", *_LIMITS)
"""What is read of media files, where little else is looked at."""

_SEED = _opt("--seed", type=int, metavar="N", help="Seed of all random choices.  [default: 0]")


def method_option(whose: str) -> Callable[..., Callable[[F], F]]:
    """`-o KEY=VALUE`, which is an option of a method in every command."""
    return _opt("-o", "option", multiple=True, metavar="KEY=VALUE",
                shell_complete=complete.complete_option,
                help=f"An option of {whose}, such as norm=none; repeatable.")


one_way_options = _group(
    "Pruning",
    _opt("--keep", metavar="FRACTION", help="Kept fraction of the visual tokens, averaged over "
         "the decoder's layers: 0.3, or image=0.5,video=0.2."),
    _opt("--preset", metavar="NAME", shell_complete=complete.complete_preset,
         help="A packaged preset or a file.  [default: balanced]"),
    _opt("--method", metavar="NAME", shell_complete=complete.complete_method,
         help="One method in place of the preset's stages."),
    _opt("--at", metavar="PLACE", shell_complete=complete.complete_place,
         help="Where --method cuts: pixels, input, ecl, horizon, a layer number or a depth such "
         "as 60%."),
    method_option("the method"),
    _SEED,
)
"""One way to prune; `flags.preset_from` reads it."""


search_options = _group(
    "Search for a schedule",
    comma_list("--methods", metavar="NAME,...", shell_complete=complete.complete_methods,
               help="What schedules select tokens by.  [default: spread,entropy,random,uniform]"),
    method_option("all --methods that have it"),
)
"""Ways to prune that a calibration tries."""


def row_options(
    keeps: str = "0.5,0.3,0.1",
    presets: str = "Packaged presets or files, each at every keep.  [default: balanced, where no "
    "method is named]",
    methods: str = "Methods, each at its own place and at every keep.",
) -> Callable[[F], F]:
    """Many ways to prune; `flags.rows_asked` reads them.

    Args:
        keeps: the default of --keep.
        presets, methods: the help of --presets and --methods.
    """
    return _group(
        "Rows",
        comma_list("--methods", metavar="NAME,...", shell_complete=complete.complete_methods,
                   help=methods),
        comma_list("--presets", metavar="NAME,...", shell_complete=complete.complete_presets,
                   help=presets),
        comma_list("--keep", "keeps", metavar="FRACTION,...", default=(keeps,), show_default=True,
                   help="Kept fractions of the visual tokens, each an average over the decoder's "
                   "layers."),
        _opt("--at", metavar="PLACE", shell_complete=complete.complete_place,
             help="Where all --methods cut: pixels, input, ecl, horizon, a layer number or a depth "
             "such as 60%."),
        method_option("all --methods that have it"),
        _SEED,
    )


media_options = _group(
    "Media",
    _opt("--frames", type=int, metavar="N", help="Frames of a video, evenly from first to last.  "
         "[default: the model's own sampling]"),
    _opt("--fps", type=float, metavar="RATE", help="Frames a second instead."),
    _opt("--max-frames", type=int, metavar="N", help="The most frames."),
    _opt("--start", type=float, metavar="SECONDS", help="Where to start in a video."),
    _opt("--end", type=float, metavar="SECONDS", help="Where to end."),
    _opt("--max-tiles", type=int, metavar="N", help="The most tiles of a picture."),
    *_LIMITS,
)
"""How much of the media is looked at."""
# fmt: on
