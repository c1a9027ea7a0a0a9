"""Reports, registries and progress for a terminal; the only importer of rich."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtprune.catalog import Alias, Calibration
    from vtprune.preset import Preset, StageSpec
    from vtprune.pruners import Method

PAYS = 1.05  # a measured speed-up below this is no speed-up
BAR = 14  # characters of a full bar
LABEL = 8  # characters of the left column
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline

Values = Mapping[str, object]


def stderr_console() -> Console:
    """For everything that is not the answer; plain text in a pipe and under NO_COLOR."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """For the tables that a command is asked for."""
    return _console(stderr=False)


def _console(stderr: bool) -> Console:
    return Console(
        stderr=stderr,
        highlight=False,
        emoji=False,
        markup=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
    )


def printable(text: str) -> str:
    """Text from a model or a file's name without what could steer a terminal."""
    return CONTROLS.sub("", text)


# Progress


class ProgressLine:
    """One line that says how far the work is, gone when it is done; only ever on a terminal.

    Args:
        console: where.
        silent: never show anything.
    """

    def __init__(self, console: Console, silent: bool = False) -> None:
        self.shown = console.file.isatty() and not console.is_dumb_terminal and not silent
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._stage = ""

    def update(self, stage: str, done: int, total: int) -> None:
        """Shows `done` of `total` of a stage; a total of 0 or 1 shows that it goes on."""
        if not self.shown:
            return
        if stage != self._stage or (total and done >= total):
            self.stop()
        if total and done >= total:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", style="dim", markup=False),
                BarColumn(bar_width=BAR, complete_style="cyan", pulse_style="cyan"),
                TextColumn("{task.fields[counts]}", style="dim", markup=False),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task(stage, total=None, counts="")
            self._stage = stage
            self._progress.start()
        if total > 1:
            counts = f"{done:,} of {total:,}"
            self._progress.update(self._task, completed=done, total=total, counts=counts)

    def stop(self) -> None:
        """Takes the line away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._stage = None, ""


# Reports


def show_question(number: int, total: int, question: str, console: Console) -> None:
    """Heads an answer with its question."""
    console.print(Text.assemble((f"[{number}/{total}] ", "dim"), (printable(question), "bold")))


def render(report: Values, console: Console, before: Values | None = None) -> None:
    """Prints what one question cost.

    Args:
        report: `Report.to_dict()`.
        console: where to.
        before: the report of the question before, about the same media; what that said of them,
            of the model and as a warning is not said again.
    """
    groups = [
        [] if before else [_facts(report)],
        [_prompt(_dict(report, "tokens")), _shares(report), _peak(_dict(report, "memory_bytes"))],
        [_seconds(_dict(report, "seconds"))],
    ]
    if report.get("compare"):
        compare = _dict(report, "compare")
        groups.append([_speed(compare), _verdict(compare, str(report["answer"]))])
    said = _list(before or {}, "warnings")
    groups.append([_warning(str(one)) for one in _list(report, "warnings") if one not in said])
    for group in groups:
        if group:
            console.print()
        for table in group:
            console.print(table)


def _facts(report: Values) -> Table:
    """What was read, by which model, cut by what."""
    model, preset = _dict(report, "model"), _dict(report, "preset")
    parameters = _si(_number(model, "parameters")).replace("G", "B").strip()  # a billion
    lines = _lines()
    lines.add_row("read", Text(_read(_dict(report, "input"))))
    lines.add_row(
        "model",
        Text(
            f"{model['name']}: {parameters} parameters, {model['layers']} layers, "
            f"{model['device']}, {model['dtype']}, {model['attention']}"
        ),
    )
    lines.add_row("preset", Text(f"{preset['name']}{_asked(preset)}, seed {preset['seed']}"))
    return lines


def _asked(preset: Values) -> str:
    """The keep that was asked for, as ", keep 0.3 on average over the layers"."""
    top = preset.get("keep")
    own = {name: _dict(preset, name).get("keep", top) for name in ("image", "video")}
    if own["image"] == own["video"]:
        keeps = "" if own["image"] is None else f"{own['image']:g}"
    else:
        keeps = ", ".join(f"{name} {keep:g}" for name, keep in own.items() if keep is not None)
    return f", keep {keeps} on average over the layers" if keeps else ""


def _prompt(tokens: Values) -> Table:
    """How long the prompt and the answer are."""
    lines = _lines()
    lines.add_row(
        "prompt",
        f"{tokens['visual']:,} visual tokens, {tokens['text']:,} of text; the answer has "
        f"{tokens['answer']:,}",
    )
    return lines


def _read(source: Values) -> str:
    """The files, and what was looked at of them."""
    files = [printable(os.path.basename(str(file)) or str(file)) for file in _list(source, "files")]
    names = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    parts = [f"{names}: {source['modality']}"]
    if len(files) == 1:
        parts[0] += f" {source['width']} x {source['height']}"
    if source["duration"]:
        parts.append(_time(_number(source, "duration")))
    if source["frames"]:
        parts.append(_frames(source))
    tiles = _number(source, "tiles")
    if tiles > 1:
        parts.append(f"{tiles:.0f} tiles")
    return f"{', '.join(parts)} ({source['decoder']})"


def _frames(source: Values) -> str:
    """How many frames, and where they are where that is one clip."""
    told = f"{source['frames']} frame{'s' if source['frames'] != 1 else ''}"
    times = [f"{time:.1f}" for time in cast("list[float]", source["timestamps"])]
    if len(_list(source, "files")) > 1 or not times:
        return told
    shown = ", ".join(times) if len(times) <= 3 else f"{times[0]}, {times[1]} ... {times[-1]}"
    return f"{told} at {shown} s"


def _shares(report: Values) -> Table:
    """Tokens, compute and memory: what is left of what there would be unpruned."""
    lines = _lines("left", "right", "left", "right")
    sections = {"tokens": _token_rows, "compute": _compute_rows, "memory": _memory_rows}
    for section, rows in sections.items():
        label = section
        for item, left, whole, unit in rows(report):
            if whole is None:
                lines.add_row(label, Text(item), f"{_si(left)}{unit}", "", "")
            else:
                share = left / whole if whole else 1.0
                lines.add_row(label, Text(item), _of(left, whole, unit), Bar(share), f"{share:.1%}")
            label = ""
        if section == "tokens":
            for group in ("frame", "tile"):
                left_in = cast("list[int]", _list(_dict(report, "tokens"), f"by_{group}"))
                if len(left_in) > 1:
                    lines.add_row("", f"left in a {group}", f"{min(left_in)} to {max(left_in)}")
    return lines


Row = tuple[str, float, float | None, str]  # what, what is left, of what (None: not told), unit


def _token_rows(report: Values) -> Iterable[Row]:
    tokens = _dict(report, "tokens")
    total = _number(tokens, "visual")
    whole = {"all": total}  # visual tokens of each modality before any cut
    for stage in cast("list[Values]", _list(tokens, "stages")):
        modality, at, layer = (str(stage[key]) for key in ("modality", "at", "layer"))
        whole.setdefault(modality, _number(stage, "before"))
        place = (
            at
            if at in ("pixels", "input")
            else f"layer {layer}" + ("" if at == layer else f" ({at})")
        )
        name = f"{stage['method']}, {place}"
        if modality != "all":
            name = f"{modality}: {name}"
        yield name, _number(stage, "after"), whole[modality], ""
    yield "layer average", _number(tokens, "keep_mean") * total, total, ""
    left = _dict(tokens, "by_modality")
    if len(left) > 1:
        for modality in left:
            yield (
                f"{modality}, of what is left",
                _number(left, modality),
                _number(tokens, "kept_after"),
                "",
            )


def _compute_rows(report: Values) -> Iterable[Row]:
    flops = _dict(report, "flops")
    vision = _number(flops, "vision")
    left, whole = vision, vision
    # Of a tower that was given less, what all of it would have been is not in the report.
    stages = cast("list[Values]", _list(_dict(report, "tokens"), "stages"))
    early = any(stage["at"] == "pixels" for stage in stages)
    yield "vision", vision, None if early else vision, "FLOP"
    for part in ("prefill", "decode"):
        pruned, full = _number(flops, part), _number(flops, f"{part}_full")
        left, whole = left + pruned, whole + full
        yield part, pruned, full, "FLOP"
    yield "total", left, None if early else whole, "FLOP"


def _memory_rows(report: Values) -> Iterable[Row]:
    cache = _dict(report, "kv_cache_bytes")
    yield "KV cache", _number(cache, "kept"), _number(cache, "full"), "B"


def _peak(memory: Values) -> Table:
    """The most memory that was in use."""
    weights, peak = _number(memory, "weights"), _number(memory, "peak")
    lines = _lines()
    lines.add_row("", f"weights {_si(weights)}B, peak {_si(peak)}B")
    return lines


def _seconds(seconds: Values) -> Table:
    """Seconds by part, in the order in which they pass."""
    took = {part: _time(_number(seconds, part)) for part in seconds}
    before = ", ".join(f"{part} {took[part]}" for part in ("load", "media", "preprocess", "vision"))
    lines = _lines()
    lines.add_row("time", before)
    lines.add_row(
        "",
        Text.assemble(
            f"prefill {took['prefill']} (selection {took['select']}), decode {took['decode']}, ",
            "first token ", (took["first_token"], "bold"), ", total ", (took["total"], "bold"),
        ),
    )  # fmt: skip
    return lines


def _speed(compare: Values) -> Table:
    """Measured speed-ups, beside what the FLOPs promise."""
    seconds = _dict(compare, "seconds")
    lines = _lines("left", "right", "right")
    lines.add_row("compare", *(Text(head, "dim") for head in ("medians", "unpruned", "speed-up")))
    for part in ("prefill", "first_token", "total"):
        name = part.replace("_", " ") + (" without loading" if part == "total" else "")
        speedup = Text(f"{_number(compare, f'{part}_speedup'):.2f} x", "bold")
        lines.add_row("", name, _time(_number(seconds, part)), speedup)
    return lines


def _warning(text: str) -> Table:
    lines = _lines()
    lines.add_row(Text("warning", "yellow"), Text(text, "yellow"))
    return lines


def _verdict(compare: Values, answer: str) -> Table:
    """What was predicted, both answers, and whether pruning pays."""
    measured, whole = _number(compare, "prefill_speedup"), _number(compare, "total_speedup")
    lines = _lines()
    lines.add_row(
        "",
        f"prefill predicted from FLOPs: {_number(compare, 'prefill_predicted'):.2f} x, of which "
        f"{_number(compare, 'realised_fraction'):.0%} is realised; roofline estimate: "
        f"{_number(compare, 'prefill_roofline'):.2f} x",
    )
    if compare["same_answer"]:
        lines.add_row("", "the unpruned answer is the same")
    else:
        lines.add_row("", Text.assemble(("unpruned  ", "dim"), printable(str(compare["answer"]))))
        lines.add_row("", Text.assemble(("pruned    ", "dim"), printable(answer)))
    if measured < PAYS:
        lines.add_row("", Text(f"pruning does not pay here: {measured:.2f} x", "yellow"))
    elif whole < PAYS:
        told = f"pruning does not pay here: prefill {measured:.2f} x, the whole {whole:.2f} x"
        lines.add_row("", Text(told, "yellow"))
    return lines


# Registries


def show_methods(methods: Mapping[str, Method], console: Console) -> None:
    """Prints every method with its options."""
    names = [option.name for method in methods.values() for option in method.options]
    label = max([LABEL, *map(len, names)])
    for name, method in methods.items():
        console.print(Text.assemble((name, "bold"), (f"  at {method.at} by default", "dim")))
        lines = _lines(label=label)
        lines.add_row("keeps", method.summary)
        for option in method.options:
            choices = f"{option.values} (default {option.shown(option.default)})"
            lines.add_row(option.name, Text.assemble(choices, (f"  {option.help}", "dim")))
        if method.paper:
            lines.add_row("paper", method.paper)
        console.print(lines)


def show_presets(presets: Iterable[Preset], console: Console) -> None:
    """Prints every preset with its stages."""
    for preset in presets:
        keep = "" if preset.keep is None else f"  keep {preset.keep:g}"
        console.print(Text.assemble((preset.name, "bold"), (keep, "dim")))
        lines = _lines()
        lines.add_row("", preset.description)
        if preset.shared():
            lines.add_row("stages", _stages(preset.stages_for("image")))
        else:
            for modality in ("image", "video"):
                lines.add_row(modality, _stages(preset.stages_for(modality)))
        console.print(lines)


def _stages(stages: Iterable[StageSpec]) -> str:
    parts = []
    for stage in stages:
        keep = "" if stage.keep is None else f" keeps {stage.keep:g}"
        per = "" if stage.per == "all" else f" per {stage.per}"
        parts.append(f"{stage.method} at {stage.at}{keep}{per}")
    return ", then ".join(parts)


def show_models(aliases: Iterable[Alias], console: Console) -> None:
    """Prints every short name, with where the model can be cut and who says so."""
    headings = ("model", "family", "<size", "<ecl", "<horizon", "source")
    known = [(alias, alias.calibration) for alias in aliases]
    rows = [
        (alias.name, alias.model_type, alias.parameters, _figure(own, "ecl"),
         _figure(own, "horizon"), _sources(own.sources))
        for alias, own in known
    ]  # fmt: skip
    show_table(headings, rows, console)
    if any("default" in own.sources.values() for _, own in known):
        console.print(Text("(in brackets: a default, not measured for this model)", "dim"))


def _figure(known: Calibration, name: str) -> str:
    layer = getattr(known, name)
    return f"({layer})" if known.sources.get(name) == "default" else f"{layer} "


def _sources(sources: Mapping[str, str]) -> str:
    """Who says where to cut, in short: "ecl released code, horizon third party"."""
    parts = [
        f"{figure} {source.partition(' (')[0]}"
        for figure, source in sources.items()
        if source != "default" and figure in ("ecl", "horizon")
    ]
    return ", ".join(parts) or "default"


def show_table(headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Prints rows under headings; a heading that begins with "<" is of numbers, set to the right.

    The last column is folded where it is too long for its line.
    """
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        right, last = heading.startswith("<"), number == len(headings) - 1
        table.add_column(
            heading.removeprefix("<"), justify="right" if right else "left", no_wrap=not last
        )
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    console.print(table)


def show_facts(facts: Iterable[tuple[str, str]], console: Console) -> None:
    """Prints lines with a label each."""
    lines = _lines()
    for label, text in facts:
        lines.add_row(label, Text(printable(text)))
    console.print(lines)


def show_warning(text: str, console: Console) -> None:
    """Prints what the reader should know."""
    console.print(_warning(text))


# Pieces


@dataclass(frozen=True)
class Bar:
    """A bar of which `share` is full."""

    share: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(BAR, options.max_width)
        full = min(width, max(round(self.share * width), 1 if self.share > 0 else 0))
        solid, shade = ("#", ".") if options.ascii_only else ("█", "░")
        yield Text.assemble((solid * full, "cyan"), (shade * (width - full), "dim"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(6, BAR)


def _lines(*justify: JustifyMethod, label: int = LABEL) -> Table:
    """A table without lines whose left column labels the rest; text is taken literally."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", width=label, no_wrap=True)
    for side in justify or ("left",):
        table.add_column(justify=side, overflow="fold")
    return table


def _dict(values: Values, key: str) -> Values:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _list(values: Values, key: str) -> Sequence[object]:
    found = values.get(key)
    return found if isinstance(found, (list, tuple)) else ()


def _number(values: Values, key: str) -> float:
    found = values.get(key)
    return float(found) if isinstance(found, (int, float)) else 0.0


def _of(left: float, whole: float, unit: str) -> str:
    """ "2,212 of 6,272", or with a unit "33.5 of 106 TFLOP", both at the scale of the whole."""
    if not unit:
        return f"{left:,.0f} of {whole:,.0f}"
    size, prefix = _scale(whole)
    return f"{_digits(left / size)} of {_digits(whole / size)} {prefix}{unit}"


def _si(number: float) -> str:
    """Three digits and a prefix: "3.35 T"."""
    size, prefix = _scale(number)
    return f"{_digits(number / size)} {prefix}"


def _scale(number: float) -> tuple[float, str]:
    for size, prefix in PREFIXES:
        if number >= 0.9995 * size:
            return size, prefix
    return 1.0, ""


def _digits(number: float) -> str:
    """Three significant digits."""
    return "0" if number == 0 else f"{number:#.3g}".rstrip(".")


def _time(seconds: float) -> str:
    """Seconds at the scale that they have: "0.3 ms", "41 ms", "2.31 s"."""
    if seconds >= 0.0995:
        return f"{seconds:.2f} s"
    milliseconds = seconds * 1000
    return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.1f} ms"
