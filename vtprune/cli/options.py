"""Every option of every command, declared once."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from vtprune.cli import complete
from vtprune.cli.help import Option
from vtprune.errors import VtpruneError, brief, quote

F = TypeVar("F", bound=Callable[..., object])

MAX_NEW_TOKENS = 256
Bounds = tuple[float, float, str]
"""The least and the greatest value of an option, and the rule in words."""


@dataclass(frozen=True)
class Declaration:
    """What the command line knows of an option beside its name and type.

    Args:
        section: heading in the help.
        metavar: what the help shows for the value; "" for a switch.
        help: one sentence, and the default in words where the code works it out.
        names: as they are typed; () for the name of the field with dashes.
        bounds: of a number.
        commas: the value is a list with commas.
        complete: what the shell offers.
        config: the config file can set it.
    """

    section: str
    metavar: str
    help: str
    names: tuple[str, ...] = ()
    bounds: Bounds | None = None
    commas: bool = False
    complete: complete.Completion | None = None
    config: bool = False


LARGEST = 2**63 - 1  # of 64 bits, which torch takes
_ABOVE_0, _FINITE = math.nextafter(0, 1), math.nextafter(math.inf, 0)


def whole(least: int, most: float = math.inf) -> Bounds:
    """Return the bounds of a whole number."""
    span = f"from {least} to {most}" if most < LARGEST else f"{least} or more"
    return least, most, f"a whole number, {span}"


def share(note: str = "") -> Bounds:
    """Return the bounds of a share, with what 1 does."""
    return _ABOVE_0, 1, "above 0, up to 1" + (f": {note}" if note else "")


def _option(
    section: str, metavar: str, help: str, default: object = None, **settings: object
) -> Any:
    declared = Declaration(section, metavar, help, **settings)  # type: ignore[arg-type]
    return field(default=default, metadata={"option": declared})


(_model, _pruning, _explaining, _media, _limits, _input, _questions, _needles, _answer, _batch,
 _server, _measuring, _search, _output) = (
    functools.partial(_option, section)
    for section in ("Model", "Pruning", "Explaining", "Media", "Media", "Input", "Questions",
                    "Needles and captions", "Answer", "Batch", "Server", "Measuring",
                    "Search for a schedule", "Output")
)  # fmt: skip


# fmt: off
@dataclass(frozen=True, repr=False)
class Flags:
    """The options that the user gave; a field's default where nothing was given.

    A field is the declaration of an option: its name and annotation give flag and type. A command
    lists the options that it takes with `takes`.
    """

    model: str | None = _model(
        "NAME", "Short name (vtprune models lists them), hub id or directory.  [default: "
        "embedded, a small demonstration model]", complete=complete.models, config=True)
    adapter: str | None = _model(
        "NAME", "Directory or hub id of an adapter (LoRA and the like) for the model. Without "
        "--model, the base model that the adapter names is loaded.")
    device: str | None = _model(
        "NAME", "auto, cpu, cuda, cuda:1, mps, or map, which spreads the model over all devices.  "
        "[default: auto]", config=True)
    quantize: str | None = _model("BITS", "4bit or 8bit weights, by bitsandbytes.")
    dtype: str | None = _model(
        "NAME", "Type of the weights: auto, float32, bfloat16 or float16.  [default: auto]",
        config=True)
    attention: str | None = _model(
        "NAME", "Attention kernel by transformers' name: sdpa, eager, flash_attention_2.  "
        "[default: transformers' choice]", config=True)
    calibration: Path | None = _model(
        "FILE", "YAML from vtprune calibrate: the model's entropy collapse layer and information "
        "horizon.  [default: the packaged calibration]")
    compile: bool = _model(
        "", "Compile the model's layers by torch.compile: the first questions take longer, later "
        "ones less. On a CPU it needs a C++ compiler.", default=False)
    trust_remote_code: bool = _model(
        "", "Run Python code that comes with the checkpoint.", default=False)

    keep: str | None = _pruning(
        "FRACTION", "Kept fraction of the visual tokens, averaged over the decoder's layers: 0.3, "
        "or image=0.5,video=0.2.")
    tokens: int | None = _pruning(
        "N", "Largest number of visual tokens, averaged over the decoder's layers, in place of "
        "--keep.", bounds=whole(1, LARGEST))
    tokens_after: int | None = _pruning(
        "N", "Largest number of visual tokens that the first cut leaves, in place of --keep.",
        bounds=whole(1, LARGEST))
    fit: str | None = _pruning(
        "WHAT", "Keep what fits, in place of --keep: context, the model's positions with room for "
        "question and answer; or memory, the device's free memory.")
    decode_every: int | None = _pruning(
        "N", "Cut the KV cache after each N decoded tokens, to --decode-keep.",
        bounds=whole(1, LARGEST))
    decode_keep: float | None = _pruning(
        "SHARE", "Share of the visual tokens in the KV cache that each cut while decoding leaves: "
        "those that the answer attended to most.",
        bounds=share("1 cuts nothing while decoding"))
    keep_for_turns: float | None = _pruning(
        "SHARE", "Share of what is kept for the question that is chosen without it, so that later "
        "questions about the same media find their tokens.",
        bounds=share("1 keeps nothing for the question alone"))
    stream: bool = _pruning(
        "", "Encode a long video in segments, and cut each before the next one is encoded, so that "
        "memory does not grow with its length.  [default: where its frames do not fit the memory]",
        default=False)
    stream_frames: int | None = _pruning(
        "N", "Number of frames of a segment of --stream.  [default: 32]", bounds=whole(1))
    stream_keep: float | None = _pruning(
        "FRACTION", "Kept fraction of the visual tokens of the segments of --stream.  [default: "
        "twice what is kept of the whole video]", bounds=share())
    stream_share: str | None = _pruning(
        "NAME", "How segments of --stream share that: equal, or information, more to those whose "
        "tokens differ more.  [default: equal]")
    keeps: tuple[str, ...] = _pruning(
        "FRACTION,...", "Kept fractions of the visual tokens, each averaged over the decoder's "
        "layers.", default=(), names=("--keep",), commas=True)
    preset: str | None = _pruning(
        "NAME", "A packaged preset (vtprune presets list) or a YAML file.",
        complete=complete.presets, config=True)
    presets: tuple[str, ...] = _pruning(
        "NAME,...", "Packaged presets (vtprune presets list) or YAML files.", default=(),
        commas=True, complete=complete.presets)
    method: str | None = _pruning(
        "NAME", "One pruning method (vtprune methods) in place of a preset; "
        "package.module:Class is one of your own.",
        complete=complete.methods)
    methods: tuple[str, ...] = _pruning(
        "NAME,...", "Pruning methods (vtprune methods), each in place of a preset; "
        "package.module:Class is one of your own.", default=(),
        commas=True, complete=complete.methods)
    at: str | None = _pruning(
        "PLACE", "Where each named method cuts: pixels, input, ecl, horizon, a layer number or a "
        "depth such as 60%.  [default: the method's own place]", complete=complete.places)
    option: tuple[str, ...] = _pruning(
        "KEY=VALUE", "An option of the method, such as norm=none; of several methods, of each that "
        "has it. Repeatable.", default=(), names=("-o",), complete=complete.method_options)
    seed: int | None = _pruning(
        "N", "Seed of all random choices.  [default: 0]", bounds=whole(0, LARGEST))
    compare: bool = _pruning(
        "", "Measure the speed-up over the unpruned model; for that, both answer greedily.",
        default=False)
    beside: bool = _pruning(
        "", "Add matched baselines: random and uniform at the layers and counts of every row that "
        "cuts deeper than the input.", default=False)
    turns: bool = _pruning(
        "", "Ask every question again as the second of a conversation, on the tokens kept for the "
        "first.", default=False)
    seeds: int = _pruning(
        "N", "Number of seeds, from --seed on, that every random row averages over.", default=5)
    floor: float = _pruning(
        "SHARE", "Share of the unpruned model's quality that pruning has to keep.", default=0.98)

    by: str = _explaining(
        "METHOD", "How maps are made: relevance, attention, gradient, occlusion, information, mask "
        "or hierarchical.", default="relevance", complete=complete.evidence_methods)
    passes: int = _explaining(
        "N", "Largest number of forward passes for the maps of an answer; a gradient counts as "
        "three.", default=256, bounds=whole(1))
    window: int | None = _explaining(
        "N", "Rows and columns of the windows of tokens that occlusion and information try.  "
        "[default: 2 and 1, larger where --passes asks for it]", bounds=whole(1))
    stride: int | None = _explaining(
        "N", "Rows and columns from one window to the next, at most --window.  [default: 1]",
        bounds=whole(1))
    from_layer: int = _explaining(
        "N", "The layer from which on information leaves tokens out; 0 is the language model's "
        "input.", default=0, bounds=whole(0))

    evidence: bool = _explaining(
        "", "Add how much of the unpruned answer's evidence every row keeps, by the default map of "
        "vtprune explain.", default=False)

    frames: int | None = _media(
        "N", "Number of frames of a video, evenly spaced from first to last.  [default: the "
        "model's own sampling]", bounds=whole(1))
    fps: float | None = _media(
        "RATE", "Frames per second of video, in place of --frames.",
        bounds=(_ABOVE_0, _FINITE, "frames a second, above 0"))
    max_frames: int | None = _media("N", "Upper limit of the number of frames.", bounds=whole(1))
    start: float | None = _media(
        "TIME", "Time in the video to start at: seconds, mm:ss or h:mm:ss.")
    end: float | None = _media("TIME", "Time in the video to stop at: seconds, mm:ss or h:mm:ss.")
    segment: float | None = _media(
        "MINUTES", "Length of the segments of --per-segment.  [default: 10]",
        bounds=(_ABOVE_0, _FINITE, "minutes, above 0"))
    per_segment: bool = _media(
        "", "Answer for each segment of a video, with its times, and then for all of it.",
        default=False)
    max_tiles: int | None = _media(
        "N", "Upper limit of the number of tiles of a picture.", bounds=whole(0))
    max_pixels: int | None = _media(
        "N", "Largest picture that is read, as width x height.  [default: 178956970]",
        bounds=whole(1))
    allow_partial: bool = _media(
        "", "Read as much of a damaged file as decodes.", default=False)
    decoder: str | None = _media(
        "NAME", "Video decoder: auto, pyav, or decord with PyAV for what it can't read.  "
        "[default: auto, which is pyav]")
    allow_url: tuple[str, ...] = _media(
        "HOST", "Fetch media from http and https addresses of this host. Repeatable.", default=())
    pages: str | None = _media(
        "N-M,...", "Pages of PDF and TIFF files: 1-3, or 1,3,5-.  [default: all; 64 are the most]")
    dpi: int | None = _media(
        "N", "Resolution at which PDF pages are drawn, in pixels per inch.  [default: 144]",
        bounds=whole(10, 1200))

    cache: Path | None = _media(
        "DIR", "Keep decoded and encoded media in DIR: later questions about them, of any process, "
        "skip decoder and vision tower.")
    cache_size: float = _media(
        "GB", "Most that --cache may take; what was not used for longest goes.", default=10.0,
        bounds=(_ABOVE_0, _FINITE, "gigabytes, above 0"))

    image: str | None = _input(
        "SIZE", "A picture of this size, such as 1344x1344, or a file.  [default: the largest "
        "that the family takes]")
    video: str | None = _input(
        "SIZE", "A video of so many frames of this size, such as 64x448x448, or a file.")
    text_tokens: int = _input(
        "N", "Number of tokens of the prompt that are not visual.", default=64, bounds=whole(1))
    answer_tokens: int = _input(
        "N", "Number of tokens of the answer, for the cost of decoding.", default=32,
        bounds=whole(1))

    question: tuple[str, ...] = _questions(
        "TEXT", "A question about the media; repeatable. Every positional argument is then a "
        "media file.", default=(), names=("-q", "--question"))
    system: str | None = _questions("TEXT", "System prompt.", config=True)
    columns: tuple[str, ...] = _questions(
        "KEY=COLUMN,...", "Columns of a list that hold its keys under other names, such as "
        "file=image,question=text.", default=(), commas=True)
    limit: int | None = _questions(
        "N", "Largest number of questions, evenly spaced in the file.  [default: all; of demo "
        "200]")
    metric: str = _questions(
        "NAME", "How answers are scored: auto, exact, contains, choice, number, anls or vqa.",
        default="auto")
    windows: int = _questions(
        "N", "Number of files on which to measure, too, what the text reads from single 2 x 2 "
        "windows of tokens.", default=0, bounds=whole(0))
    num: int = _questions("N", "Number of questions.", default=24, bounds=whole(1))

    needle: bool = _needles(
        "", "Plant small changes in the media, ask about each, and say which of their tokens, and "
        "which answers, every row keeps.", default=False)
    needle_kinds: tuple[str, ...] = _needles(
        "KIND,...", "Kinds of needle: patch, digit, object, frame.  [default: all that the files "
        "allow]", default=(), commas=True)
    needle_sizes: tuple[str, ...] = _needles(
        "SHARE,...", "Widths of the needles, as shares of the shorter side.",
        default=("0.05,0.1,0.2,0.3",), commas=True)
    needle_count: int = _needles(
        "N", "Number of needles of each kind and size, each in the next of the files.", default=20,
        bounds=whole(1))
    needle_frames: int = _needles(
        "N", "Of those frames that the model samples of a clip, in how many a needle is.",
        default=1, bounds=whole(1))

    captions: int | None = _needles(
        "N", "Sample N captions of every question, and say how right and how different they are, "
        "unpruned and pruned.", bounds=whole(2, 1000))

    max_new_tokens: int | None = _answer(
        "N", "Largest number of tokens of an answer.", bounds=whole(1), config=True)
    temperature: float = _answer(
        "T", "Above 0, sample the answer at this temperature; 0 decodes greedily.", default=0.0,
        bounds=(0, _FINITE, "0 or more: 0 decodes greedily, 0.7 is usual for sampling"))
    top_p: float = _answer(
        "P", "Sample from the likeliest tokens whose probabilities add up to P.", default=1.0,
        bounds=share("1 samples from all tokens"))

    batch_size: int = _batch(
        "N", "Largest number of requests in one forward; where memory runs out, half of it, and so "
        "on.", default=8, bounds=whole(1))
    workers: int = _batch(
        "N", "Number of threads that decode media ahead of the model.", default=2,
        bounds=whole(1, 64))
    ray: str | None = _batch(
        "ADDRESS", "Answer on the Ray cluster at ADDRESS, a worker a GPU; local starts one on this "
        "machine. Needs vtprune[ray].")
    in_order: bool = _batch(
        "", "Write the lines in the order of the requests; without it, as they are answered.",
        default=False)

    host: str = _server(
        "NAME", "Address to listen on.", default="127.0.0.1")
    port: int = _server("N", "Port to listen on.", default=8000, bounds=whole(0, 65535))
    api_key_file: Path | None = _server(
        "FILE", "A file with the key that clients have to give.  [default: none is asked for]")
    max_batch: int = _server(
        "N", "Largest number of requests in one forward.", default=8, bounds=whole(1, 256))
    max_wait: float = _server(
        "S", "How long a request waits for others to join it, in seconds.", default=0.02,
        bounds=(0, 60, "0 to 60"))
    max_queue: int = _server(
        "N", "Number of requests that may wait; one more is refused.", default=64,
        bounds=whole(1, 100_000))
    media_root: Path | None = _server(
        "DIR", "Let clients name files of this folder, by file: addresses.")

    repeats: int = _measuring(
        "N", "How often each row is timed.", default=5,
        bounds=(1, math.inf, "1 or more; 5 give a reliable median"))
    seconds: float = _measuring(
        "S", "How long measuring may take.", default=60.0,
        bounds=(_ABOVE_0, _FINITE, "above 0; 60 is usual"))
    gpu: str | None = _measuring(
        "NAME", "Predict for this card from its data sheet, and measure nothing: H100 SXM, RTX "
        "4090, MI300X and others; a wrong name lists the nearest.", complete=complete.gpus)
    no_measure: bool = _measuring(
        "", "Count tokens and FLOPs without timing anything, which is much faster.",
        default=False)

    propose: float | None = _search(
        "KEEP", "Try schedules that keep this fraction of the visual tokens, averaged over the "
        "decoder's layers.")
    contribute: bool = _output(
        "", "Print the calibration as an entry of the packaged ones, with the model's revision, "
        "versions and what it was measured on, and without names of files.", default=False)
    propose_preset: Path | None = _search(
        "FILE", "Write the best schedule to FILE as a preset; --save writes the calibration.")

    json: bool = _output("", "Print JSON instead of text and tables.", default=False)
    saves: tuple[Path, ...] = _output(
        "FILE", "Write the result to FILE, in the format of its suffix: {formats}. Repeatable.",
        default=(), names=("--save",))
    shows: tuple[Path, ...] = _output(
        "FILE", "Draw which visual tokens were kept, as vtprune show does: FILE is .png, .html or "
        ".json. Repeatable.", default=(), names=("--show",))
    answers: Path | None = _output(
        "FILE", "Append every answer to FILE as it comes; run again, the command goes on from "
        "there. The result is written by --save, at the end.")
    all_frames: bool = _output(
        "", "Draw every frame of a long clip; without it, those with the most and the fewest "
        "kept tokens.", default=False, names=("--all",))
    terminal: bool = _output(
        "", "Print a miniature, a cell a token.", default=False)
    quiet: bool = _output(
        "", "Print answers and tables only: no progress, notes or warnings.", default=False)
# fmt: on


LOADING = ("model", "adapter", "device", "quantize", "dtype", "attention", "compile",
           "trust_remote_code")  # fmt: skip
MODEL = (*LOADING[:-1], "calibration", LOADING[-1])
"""Which model, and how it is loaded."""
ONE_WAY = ("keep", "tokens", "tokens_after", "fit", "preset", "method", "at", "option", "seed")
"""One way to prune; `flags.preset_from` reads it."""
DECODE = ("decode_every", "decode_keep", "keep_for_turns")
"""Cuts while decoding, and what is kept for later questions; `flags.preset_from` reads it."""
ROWS = ("methods", "presets", "keeps", "at", "option", "seed")
"""Many ways to prune; `asking.variants_from` reads them."""
NEEDLES = ("needle", "needle_kinds", "needle_sizes", "needle_count", "needle_frames")
"""Small changes that are planted in media; `asking.needles_from` reads them."""
STREAM = ("stream", "stream_frames", "stream_keep", "stream_share")
"""How a long video is encoded in segments; `flags.stream_from` reads it."""
LIMITS = ("max_pixels", "allow_partial", "decoder", "allow_url", "pages", "dpi")
"""What is read of media files."""
MEDIA = ("frames", "fps", "max_frames", "start", "end", "max_tiles", *LIMITS)
"""How much of the media the model gets."""
CACHE = ("cache", "cache_size")
"""Where it is kept; `flags.cache_from` reads it."""

FIELDS = {field.name: field for field in dataclasses.fields(Flags)}


CONFIG_KEYS = tuple(name for name in FIELDS if FIELDS[name].metadata["option"].config)
"""The options that the config file can set."""
CONFIG_KEYS_TEXT = f"{', '.join(CONFIG_KEYS[:-1])} and {CONFIG_KEYS[-1]}"


def declaration(name: str) -> Declaration:
    """Return what is declared of an option, by the name of its field."""
    declared = FIELDS[name].metadata["option"]
    assert isinstance(declared, Declaration)
    return declared


def flag_of(name: str) -> str:
    """Return an option as it is typed: `--max-tiles` for max_tiles."""
    return (*declaration(name).names, f"--{name.replace('_', '-')}")[0]


def refuse_unused(names: Sequence[str], reason: str, hint: str) -> None:
    """Refuse options of this call that would change nothing.

    Args:
        names: of their fields.
        reason: why: "without --needle".

    Raises:
        VtpruneError: one of them was given, be it as its default.
    """
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise VtpruneError(f"{flag_of(name)} changes nothing {reason}", hint)


def takes(
    *names: str,
    defaults: Mapping[str, object] | None = None,
    default_words: Mapping[str, str] | None = None,
    save: Sequence[tuple[str, str]] = (),
    needs_save: bool = False,
) -> Callable[[F], Callable[..., object]]:
    """Give a command these options; it gets their values, checked, as `flags`.

    Args:
        names: fields of `Flags`, in the order of the help.
        defaults: values of this command in place of the fields' own.
        default_words: what happens in this command where an option is not given, in words; in
            place of what the option's help says of it.
        save: what --save writes, and the suffixes for it: ("the rows", ".csv").
        needs_save: --save has to be given.
    """
    formats = "; ".join(f"{suffix} {what}" for what, suffix in save)

    def decorate(command: F) -> Callable[..., object]:
        @functools.wraps(command)
        def run(**values: object) -> object:
            given = {name: values.pop(name) for name in names}
            flags = Flags(**given)  # type: ignore[arg-type]
            check_flags(flags, names)
            check_names(flags)
            return command(**values, flags=flags)

        run.__doc__ = str(command.__doc__).replace("{config_keys}", CONFIG_KEYS_TEXT)
        decorated: Callable[..., object] = run
        for name in reversed(names):
            settings = _click_settings(name, (defaults or {}).get(name))
            text = str(settings["help"]).replace("{formats}", formats)
            if words := (default_words or {}).get(name):
                text = f"{text.split('  [default: ')[0]}  [default: {words}]"
            required = name == "saves" and needs_save
            decorated = click.option(
                *(declaration(name).names or (flag_of(name),)),
                name,
                **{**settings, "help": text, "required": required},  # type: ignore[arg-type]
            )(decorated)
        return decorated

    return decorate


def _click_settings(name: str, default: object) -> dict[str, object]:
    """Return what `click.option` is told of an option."""
    declared, kind = declaration(name), str(FIELDS[name].type).removesuffix(" | None")
    default = FIELDS[name].default if default is None else default
    settings: dict[str, object] = {
        "cls": Option,
        "section": declared.section,
        "help": declared.help,
        "default": default,
        "show_default": not (default is None or default is False or default == ()),
    }
    if kind == "bool":
        return {**settings, "is_flag": True}
    types: dict[str, object] = {"int": int, "float": float, "Path": click.Path(path_type=Path)}
    settings |= {
        "metavar": declared.metavar,
        "multiple": kind.startswith("tuple["),
        "type": types.get(kind.removeprefix("tuple[").removesuffix(", ...]"), str),
    }
    if declared.metavar == "TIME":
        settings["type"] = _time
    if declared.commas:
        settings["callback"] = _split_at_commas
    if declared.complete:
        settings["shell_complete"] = complete.completer(declared.complete, declared.commas)
    return settings


def _time(text: str) -> float:
    """Return the seconds that a time means.

    Raises:
        click.BadParameter: it is none.
    """
    from vtprune.media.times import parse_time

    try:
        return parse_time(text)
    except VtpruneError as error:
        raise click.BadParameter(error.message) from None


def _split_at_commas(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(","))


def check_flags(flags: Flags, names: Iterable[str]) -> None:
    """Refuse numbers out of range, options of no method, and options that exclude each other.

    Raises:
        VtpruneError: names the option, the value and the range.
    """
    method_options(flags.option)
    register_named(filter(None, (flags.method, *flags.methods)))
    for name in names:
        bounds, value = declaration(name).bounds, getattr(flags, name)
        if bounds and value is not None and not bounds[0] <= value <= bounds[1]:
            rule = f"{LARGEST} or less" if value > bounds[1] == LARGEST else bounds[2]
            raise VtpruneError(f"{flag_of(name)} {quote(value)} is out of range", rule)
    if flags.frames is not None and flags.fps is not None:
        raise VtpruneError("--frames and --fps exclude each other", "give one of them")
    if flags.system is not None:
        from vtprune.inference.questions_file import check_length

        if fault := check_length(flags.system, "system prompt"):
            raise VtpruneError(fault, "give --system a shorter text")
    if flags.quiet and flags.json:
        raise VtpruneError("--quiet and --json exclude each other", "--json prints the report only")


def register_named(methods: Iterable[str]) -> None:
    """Import and register the methods that are given as "package.module:Class".

    Raises:
        PresetError: one can't be imported, or breaks the contract of all methods.
    """
    for name in methods:
        if ":" in name:
            from vtprune.pruners import register_method
            from vtprune.pruners.class_path import check_module

            check_module(name)
            register_method(name, name)


def check_names(flags: Flags) -> None:
    """Refuse devices, types, methods and layers that can't be, before anything heavy is imported.

    Raises:
        VtpruneError: as the code that uses them, which takes seconds to import.
    """
    from vtprune.cli.flags import limits_from
    from vtprune.models import names
    from vtprune.pruners import find_method

    limits_from(flags)
    if flags.start is not None and flags.end is not None and flags.start >= flags.end:
        raise VtpruneError(
            f"--start {flags.start:g} must be before --end {flags.end:g}", "swap --start and --end"
        )
    if flags.method is not None:  # faults of --methods are named all at once, with the presets
        find_method(flags.method)
    if flags.device is not None:
        names.check_device_name(flags.device)
    if flags.dtype is not None:
        names.check_dtype_name(flags.dtype)
    if flags.attention is not None:
        names.check_attention_name(flags.attention)
    if flags.quantize is not None:
        names.check_quantize_name(flags.quantize)
    if flags.calibration is not None:
        from vtprune.preset.calibration import read_calibration

        read_calibration(flags.calibration)
    if flags.cache is not None:
        from vtprune.disk_cache import DiskCache

        DiskCache(flags.cache)
    for directory in filter(None, (flags.model, flags.adapter)):
        names.check_directory(directory)
    model = flags.model
    if model is not None and not os.path.exists(model) and not names.may_be_model(model):
        raise names.unknown_model(model)
    if flags.at is not None and not flags.adapter:
        from vtprune.cli.config import load_config

        names.check_layer(flags.at, model or load_config().model)


def method_options(pairs: Sequence[str]) -> dict[str, str]:
    """Return the `-o KEY=VALUE` options by key.

    Raises:
        VtpruneError: one has no "=", or a key is there twice.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, _, value = (part.strip() for part in pair.partition("="))
        if not (key and value):
            raise VtpruneError(
                f"-o {brief(pair)} is not KEY=VALUE",
                "-o is an option of the method, such as -o norm=none; --save FILE writes the "
                "result",
            )
        if key in options:
            raise VtpruneError(
                f"-o {brief(key)} is given twice: {brief(options[key])} and {brief(value)}",
                "give it once",
            )
        options[key] = value
    return options
