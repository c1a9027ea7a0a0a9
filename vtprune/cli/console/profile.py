"""What pruning saves on this machine, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.facts import model_fact, read_fact
from vtprune.cli.console.tables import Bar, labelled, plain_table, print_fitted, show_warning
from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import Values, dict_in, duration, list_in, number_in, si
from vtprune.inference.wording import with_options

PARTS = {
    "preprocess": "preprocess",
    "vision": "vision tower",
    "prefill": "prefill",
    "decode": "decode",
}
"""The parts of the whole, which the bars are shares of."""
WITHIN = {"select": "  selection", "decode_per_token": "  a token"}
"""What is counted in one of these parts."""
NAMES = {**PARTS, **WITHIN}


def show_profile(profile: Values, console: Console) -> None:
    """Prints a profile.

    Args:
        profile: `Profile.to_dict()`.
        console: where to.
    """
    rows = cast("list[Values]", list_in(profile, "rows"))
    console.print(_facts(profile, rows))
    console.print()
    print_fitted(_rows(rows), console)
    for text in _remarks(rows):
        console.print(_line("", text))
    good = [row for row in rows if "error" not in row]
    pruned = [row for row in good[1:] if list_in(dict_in(row, "tokens"), "stages")]
    if pruned:
        beside = min(pruned, key=_likeness)
        console.print()
        print_fitted(_parts(good[0], beside), console)
        console.print()
        console.print(_line("memory", Text(_memory(good[0], beside))))
    console.print()
    console.print(_line("verdict", Text(str(profile["verdict"]), "bold")))


def _remarks(rows: Sequence[Values]) -> Iterator[Text]:
    """What is to be said of single rows."""
    for row in rows:
        if "error" in row:
            yield Text(f"{_name(row)}: {printable(str(row['error']))}", "yellow")
        elif row.get("input") != rows[0].get("input"):
            shown = dict_in(row, "input")
            size = ", ".join(
                f"{shown[what]:,} {what.replace('_', ' ')}"
                for what in ("frames", "tiles", "visual_tokens")
                if shown[what]
            )
            told = f"* {_name(row)} is shown {size}, and so is the unpruned model that it is beside"
            yield Text(told)
    if any(row.get("measured") in ("shared", "scaled") for row in rows):
        yield Text("~ not run itself, but summed or scaled from layers of other rows")
    if any(row.get("seconds") for row in rows):
        yield Text(
            "faster: times as fast as unpruned, the median of the passes; in the passes: the "
            "least and the most; roofline: at this machine's ceilings"
        )


def _likeness(row: Values) -> tuple[bool, float]:
    """How far a row is from the one that the verdict speaks of: of the keeps, near 0.3."""
    return row["preset"] is not None, abs((cast("float | None", row["keep"]) or 0.0) - 0.3)


def show_warnings(profile: Values, console: Console) -> None:
    """Prints what the reader should know before believing a figure."""
    for one in list_in(profile, "warnings"):
        show_warning(str(one), console)


def _line(label: str, text: Text) -> Table:
    lines = labelled()
    lines.add_row(label, text)
    return lines


def _facts(profile: Values, rows: Sequence[Values]) -> Table:
    """Which model, on which input, where, and how it was measured."""
    model, machine = dict_in(profile, "model"), dict_in(profile, "machine")
    shown, measured = dict_in(profile, "input"), dict_in(profile, "measured")
    lines = labelled()
    lines.add_row("model", Text(model_fact(model)))
    tokens = f"{shown['visual_tokens']:,} visual tokens, {shown['text_tokens']:,} of text"
    lines.add_row("input", Text(f"{_shown(shown)}: {tokens}"))
    threads = number_in(machine, "threads")
    where = f"{printable(str(machine['name']))}, " + (
        f"{threads:.0f} thread{'s' if threads != 1 else ''}" if threads else str(machine["device"])
    )
    lines.add_row(
        "machine",
        Text(f"{where}: {si(number_in(machine, 'flops_per_second'))}FLOP/s, "
             f"{si(number_in(machine, 'bytes_per_second'))}B/s"),
    )  # fmt: skip
    lines.add_row("measured", Text(_how(measured, model)))
    bases = dict.fromkeys(
        with_options(str(row.get("stages_of")), dict_in(row, "options"))
        for row in rows
        if row.get("stages_of")
    )
    for base in bases:
        lines.add_row("rows", Text(f"at every keep: the stages of preset {printable(base)}"))
    return lines


def _shown(shown: Values) -> str:
    """What was looked at: files, or pixels that were made up."""
    if shown["decoder"] != "none":
        return read_fact(shown)
    size = f"{shown['width']} x {shown['height']}"
    if shown["frames"]:
        return f"a video of {size}, {shown['frames']} frames"
    tiles = number_in(shown, "tiles")
    return f"a picture of {size}" + (f" in {tiles:.0f} tiles" if tiles > 1 else "")


def _how(measured: Values, model: Values) -> str:
    if not measured:
        return "nothing but the machine's ceilings"
    passes = number_in(measured, "passes")
    took = duration(number_in(measured, "seconds"))
    times = f"{passes:.0f} pass{'es' if passes != 1 else ''} in {took}"
    if measured["how"] == "whole":
        return f"the whole model with random weights, {times}"
    return f"single layers with random weights, summed over all {model['layers']}, {times}"


def _name(row: Values) -> str:
    if row["preset"]:
        return printable(str(row["preset"]))
    method = row.get("method")
    name = with_options(str(method), dict_in(row, "options")) if method else "keep"
    return printable(f"{name} {row['keep']:g}")


def _rows(rows: list[Values]) -> Table:
    """Every keep and preset: what is left, and how much faster it is."""
    timed = any(row.get("seconds") for row in rows)
    table = plain_table()
    for head in ("", "layer:left"):
        table.add_column(head)
    heads = ["prefill\nFLOPs", "KV\ncache"]
    heads += ["first\ntoken", "prefill\nfaster", "in the\npasses"] if timed else []
    heads += ["roof-\nline", *(["of\nFLOPs"] if timed else [])]
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        if "error" in row:
            continue
        flops, cache = dict_in(row, "flops"), dict_in(row, "kv_cache_bytes")
        name = _name(row) + ("*" if row.get("input") != rows[0].get("input") else "")
        table.add_row(
            Text(name),
            Text(_left(row)),
            si(number_in(flops, "prefill")).strip(),
            f"{si(number_in(cache, 'kept'))}B",
            *_speeds(row, timed),
        )
    return table


def _left(row: Values) -> str:
    """ "2:958 24:146": the layers that were cut at, and the visual tokens left there."""
    tokens = dict_in(row, "tokens")
    stages = cast("list[Values]", list_in(tokens, "stages"))
    cuts = [f"{stage['layer']}:{stage['after']:,}" for stage in stages]
    return " ".join(cuts) or f"all {tokens['visual']:,}"


def _speeds(row: Values, timed: bool) -> Iterator[str]:
    compare = dict_in(row, "compare")
    limit = f"{number_in(compare, 'prefill_roofline'):.2f}x"
    if not timed:
        yield limit
        return
    about = "~" if row.get("measured") in ("shared", "scaled") else ""
    low, high = cast("list[float]", list_in(compare, "prefill_spread"))
    yield _seconds(number_in(dict_in(row, "seconds"), "first_token"))
    yield f"{about}{number_in(compare, 'prefill_speedup'):.2f}x"
    yield f"{low:.2f}-{high:.2f}"
    yield limit
    yield f"{number_in(compare, 'realised_fraction'):.0%}"


def _seconds(seconds: float) -> str:
    """Like `duration`, but whole seconds from 100 on."""
    return f"{seconds:,.0f} s" if seconds >= 99.995 else duration(seconds)


def _parts(plain: Values, row: Values) -> Table:
    """Where the time and the FLOPs go, unpruned and pruned."""
    timed = bool(row.get("seconds"))
    table = plain_table()
    table.add_column("")
    for head in ("FLOPs", _name(row)):
        table.add_column(head, justify="right")
    for head in ("seconds" if timed else "at best", _name(row)):
        table.add_column(head, justify="right")
    table.add_column("")
    total = max(sum(_took(plain, part) for part in PARTS), 1e-12)
    for part, flops in _flops_rows(plain, row):
        took = [_took(one, part) if part in NAMES else -1.0 for one in (plain, row)]
        shown = [_seconds(one) if one >= 0 else "" for one in took]
        bar = Bar(took[1] / total) if part in PARTS else ""
        table.add_row(NAMES.get(part, part), *flops, *shown, bar)
    return table


def _memory(plain: Values, row: Values) -> str:
    """The estimated peak, unpruned and pruned."""
    memory = dict_in(plain, "memory_bytes")
    weights, before = number_in(memory, "weights"), number_in(memory, "peak")
    after = number_in(dict_in(row, "memory_bytes"), "peak")
    return (
        f"weights {si(weights)}B; peak, estimated, the tower's own left out: {si(before)}B, "
        f"{_name(row)} {si(after)}B"
    )


def _flops_rows(plain: Values, row: Values) -> Iterator[tuple[str, tuple[str, str]]]:
    """Every part, with its FLOPs unpruned and pruned."""
    before, after = dict_in(plain, "flops"), dict_in(row, "flops")

    def both(key: str) -> tuple[str, str]:
        found = [number_in(flops, key) for flops in (before, after)]
        return tuple(si(one).strip() if one else "" for one in found)  # type: ignore[return-value]

    if plain.get("seconds"):
        yield "preprocess", ("", "")
    yield "vision", both("tower") if number_in(before, "projector") else both("vision")
    if number_in(before, "projector"):
        yield "  projector", both("projector")
    yield "prefill", both("prefill")
    layers = [cast("list[float]", list_in(flops, "prefill_by_layer")) for flops in (before, after)]
    yield "  a layer", (_range(layers[0]), _range(layers[1]))
    if plain.get("seconds"):
        yield "select", ("", "")
    yield "decode", both("decode")
    yield "decode_per_token", both("decode_per_token")


def _range(flops: list[float]) -> str:
    """ "1.36 T", or "40.2 G to 1.36 T"."""
    low, high = si(min(flops)).strip(), si(max(flops)).strip()
    return high if low == high else f"{low} to {high}"


def _took(row: Values, part: str) -> float:
    """Seconds of a part: measured, else at the machine's ceilings."""
    if row.get("seconds"):
        return number_in(dict_in(row, "seconds"), part)
    roof = dict_in(row, "roofline")
    if part == "preprocess":  # has no ceiling
        return 0.0
    if part == "decode":
        steps = max(number_in(dict_in(row, "tokens"), "answer") - 1, 0)
        return steps * number_in(roof, "decode_per_token")
    return number_in(roof, part)
