"""What pruning saves on this machine, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.facts import model_fact, read_fact
from vtprune.cli.console.tables import Bar, labelled, plain_table, print_fitted, show_warning
from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import duration, si
from vtprune.evaluation.profiling.result import (
    FailedRow,
    MeasuredSpeedups,
    Profile,
    ProfileFlops,
    ProfileRow,
    PromptInfo,
    RowName,
)
from vtprune.evaluation.profiling.row_times import MeasurementInfo
from vtprune.inference.wording import counted, with_options

BOUNDS = {"compute": "c", "bandwidth": "b"}
"""What bounds a time, in one letter."""
PARTS = ("preprocess", "vision", "prefill", "decode")
"""The parts of the whole, which the bars are shares of."""


def show_profile(profile: Profile, console: Console) -> None:
    """Print a profile."""
    rows = profile.good_rows
    console.print(_facts(profile))
    console.print()
    print_fitted(_rows(rows), console)
    for text in _remarks(profile.rows, rows[0]):
        console.print(_line("", text))
    pruned = [row for row in rows if row.tokens.stages]
    if pruned:
        row = min(pruned, key=_distance)
        console.print()
        print_fitted(_parts(rows[0], row), console)
        console.print()
        console.print(_line("memory", Text(_memory(rows[0], row))))
    console.print()
    console.print(_line("verdict", Text(profile.verdict, "bold")))


def show_warnings(profile: Profile, console: Console) -> None:
    """Print what the reader should know before believing a figure."""
    for warning in profile.warnings:
        show_warning(warning, console)


def _distance(row: ProfileRow) -> tuple[bool, float]:
    """Return how far a row is from the one that the verdict is about: a keep, near 0.3."""
    return row.preset is not None, abs((row.keep or 0.0) - 0.3)


def _line(label: str, text: Text) -> Table:
    lines = labelled()
    lines.add_row(label, text)
    return lines


def _name(row: RowName) -> str:
    return printable(row.label)


def _facts(profile: Profile) -> Table:
    """Which model, on which input, where, and how it was measured."""
    prompt, machine = profile.input, profile.machine
    lines = labelled()
    lines.add_row("model", Text(model_fact(profile.model)))
    tokens = f"{prompt.visual_tokens:,} visual tokens, {prompt.text_tokens:,} of text"
    lines.add_row("input", Text(f"{_media(prompt)}: {tokens}"))
    where = counted(machine.threads, "thread") if machine.threads else machine.device
    rates = f"{si(machine.flops_per_second)}FLOP/s, {si(machine.bytes_per_second)}B/s"
    if machine.predicted:
        rates += f", {si(machine.free_bytes)}B"
    lines.add_row("machine", Text(f"{printable(machine.name)}, {where}: {rates}"))
    if machine.predicted:
        lines.add_row("measured", Text(f"nothing; predicted from: {machine.source}"))
    else:
        lines.add_row("measured", Text(_how(profile.measured, profile.model.layers)))
    bases = [with_options(row.stages_of, row.options) for row in profile.rows if row.stages_of]
    for base in dict.fromkeys(bases):
        lines.add_row("rows", Text(f"at every keep: the stages of preset {printable(base)}"))
    return lines


def _media(prompt: PromptInfo) -> str:
    """The files that were read, or the pixels that were drawn at random."""
    if prompt.decoder != "none":
        return read_fact(prompt)
    size = f"{prompt.width} x {prompt.height}"
    if prompt.frames:
        return f"a video of {size}, {prompt.frames} frames"
    return f"a picture of {size}" + (f" in {prompt.tiles} tiles" if prompt.tiles > 1 else "")


def _how(measured: MeasurementInfo | None, layers: int) -> str:
    if measured is None:
        return "nothing; speed-ups are what the peak FLOP/s and bytes/s of this machine allow"
    passes = f"{counted(measured.passes, 'pass', 'passes')} in {duration(measured.seconds)}"
    if measured.how == "whole":
        return f"the whole model with random weights, {passes}"
    return f"single layers with random weights, summed over all {layers}, {passes}"


def _remarks(rows: Sequence[ProfileRow | FailedRow], first: ProfileRow) -> Iterator[Text]:
    """What is to be said of single rows."""
    for row in rows:
        if isinstance(row, FailedRow):
            yield Text(f"{_name(row)}: {printable(row.error)}", "yellow")
        elif row.input != first.input:
            amounts = {
                "frames": row.input.frames,
                "tiles": row.input.tiles,
                "visual tokens": row.input.visual_tokens,
            }
            size = ", ".join(f"{number:,} {what}" for what, number in amounts.items() if number)
            yield Text(
                f"* {_name(row)} is given {size}, and is compared with the unpruned model on that"
            )
    good = [row for row in rows if isinstance(row, ProfileRow)]
    if not all(row.is_exact for row in good):
        yield Text("~ not run itself: summed or scaled from layers of other rows")
    if not first.seconds:
        yield Text(
            "roofline: speed-up of the prefill at the machine's ceilings; at least: its seconds "
            "there, and those of a decoded token, bound by compute (c) or by the memory's "
            "bandwidth (b)"
        )
        if not all(row.fits for row in good):
            yield Text("too large: the estimated peak is more than the machine's free memory")
    if first.seconds:
        yield Text(
            "prefill faster: speed-up over no pruning, median of the passes; in the passes: lowest "
            "and highest; roofline: the speed-up that this machine's FLOP/s and bytes/s allow; of "
            "FLOPs: the measured speed-up as a share of the one by FLOPs"
        )


def _rows(rows: Sequence[ProfileRow]) -> Table:
    """Every keep and preset: the kept tokens, and how much faster it is."""
    timed = rows[0].seconds is not None
    table = plain_table()
    for head in ("", "layer:kept"):
        table.add_column(head)
    heads = ["prefill\nFLOPs", "KV\ncache"]
    heads += ["first\ntoken", "prefill\nfaster", "in the\npasses"] if timed else []
    heads += ["roof-\nline", *(["of\nFLOPs"] if timed else ["prefill,\nat least", "a token", ""])]
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        cuts = [f"{stage.layer}:{stage.after:,}" for stage in row.tokens.stages]
        table.add_row(
            Text(_name(row) + "*" * (row.input != rows[0].input)),
            Text(" ".join(cuts) or f"all {row.tokens.visual:,}"),
            si(row.flops.prefill).strip(),
            f"{si(row.kv_cache_bytes.kept or 0)}B",
            *_speeds(row),
        )
    return table


def _speeds(row: ProfileRow) -> Iterator[str]:
    compare, limit = row.compare, f"{row.compare.prefill_roofline:.2f}x"
    if row.seconds is None or not isinstance(compare, MeasuredSpeedups):
        least = row.roofline
        yield limit
        yield f"{_seconds(least.prefill)} {BOUNDS[least.prefill_bound]}"
        yield f"{_seconds(least.decode_per_token)} {BOUNDS[least.decode_bound]}"
        yield "" if row.fits else "too large"
        return
    low, high = compare.prefill_spread
    yield _seconds(row.seconds.first_token)
    yield f"{'' if row.is_exact else '~'}{compare.prefill_speedup:.2f}x"
    yield f"{low:.2f}-{high:.2f}"
    yield limit
    yield f"{compare.realised_fraction:.0%}"


def _seconds(seconds: float | None) -> str:
    """Like `duration`, but whole seconds from 100 on."""
    if seconds is None:
        return ""
    return f"{seconds:,.0f} s" if seconds >= 99.995 else duration(seconds)


def _parts(unpruned: ProfileRow, row: ProfileRow) -> Table:
    """Where the time and the FLOPs go, unpruned and pruned."""
    timed = row.seconds is not None
    table = plain_table()
    table.add_column("")
    for head in ("FLOPs", _name(row), "seconds" if timed else "roofline", _name(row)):
        table.add_column(head, justify="right")
    table.add_column("")
    seconds = [_seconds_of(one) for one in (unpruned, row)]
    total = max(sum(seconds[0].get(part, 0.0) for part in PARTS), 1e-12)
    flops = [_flops_of(one.flops) for one in (unpruned, row)]
    names = {
        "preprocess": "preprocess",
        "vision": "vision tower",
        "projector": "  projector",
        "prefill": "prefill",
        "layer": "  a layer",
        "select": "  selection",
        "decode": "decode",
        "decode_per_token": "  a token",
    }
    for part, name in names.items():
        if part in flops[0] or part in seconds[0]:
            bar = Bar(seconds[1].get(part, 0.0) / total) if part in PARTS else ""
            table.add_row(name, *(one.get(part, "") for one in flops),
                          *(_seconds(one.get(part)) for one in seconds), bar)  # fmt: skip
    return table


def _seconds_of(row: ProfileRow) -> dict[str, float]:
    """Seconds by part: measured, else at the machine's ceilings."""
    if row.seconds:
        return {part: getattr(row.seconds, part) for part in (*PARTS, "select", "decode_per_token")}
    at_best, steps = row.roofline, max(row.tokens.answer - 1, 0)
    return {
        "vision": at_best.vision,
        "prefill": at_best.prefill,
        "decode": steps * at_best.decode_per_token,
        "decode_per_token": at_best.decode_per_token,
    }


def _flops_of(flops: ProfileFlops) -> dict[str, str]:
    """FLOPs by part; of one layer from the fewest to the most."""
    numbers = {
        "vision": flops.tower if flops.projector else flops.vision,
        "projector": flops.projector,
        "prefill": flops.prefill,
        "decode": flops.decode,
        "decode_per_token": flops.decode_per_token,
    }
    low, high = (si(pick(flops.prefill_by_layer)).strip() for pick in (min, max))
    parts = {part: si(number).strip() for part, number in numbers.items() if number}
    return {**parts, "layer": high if low == high else f"{low} to {high}"}


def _memory(unpruned: ProfileRow, row: ProfileRow) -> str:
    """The estimated peak, unpruned and pruned."""
    before, after = unpruned.memory_bytes, row.memory_bytes
    return (
        f"weights {si(before.weights)}B; peak, estimated without what the vision tower holds: "
        f"{si(before.peak)}B, {_name(row)} {si(after.peak)}B"
    )
