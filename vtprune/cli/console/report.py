"""What one question cost, as `vtprune ask` shows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.facts import model_fact, read_fact
from vtprune.cli.console.formats import duration, left_of, si
from vtprune.cli.console.tables import Bar, fitted, labelled, warning
from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import Values, counted_in, dict_in, list_in, number_in
from vtprune.inference.wording import PAYS, with_options


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
    memory = _peak(dict_in(report, "memory_bytes"))
    groups = [
        [] if before else [_facts(report)],
        [_prompt(dict_in(report, "tokens")), _shares(report), memory],
        [_seconds(dict_in(report, "seconds"), first=not before)],
    ]
    if report.get("compare"):
        compare = dict_in(report, "compare")
        answer = compare.get("pruned_answer", report["answer"])
        groups.append([_speed(compare), _verdict(compare, str(answer))])
    said = list_in(before or {}, "warnings")
    groups.append([warning(str(one)) for one in list_in(report, "warnings") if one not in said])
    for group in groups:
        if group:
            console.print()
        for table in group:
            console.print(fitted(table, console))


def _facts(report: Values) -> Table:
    """What was read, by which model, cut by what."""
    model, preset = dict_in(report, "model"), dict_in(report, "preset")
    lines = labelled()
    lines.add_row("read", Text(read_fact(dict_in(report, "input"))))
    lines.add_row("model", Text(model_fact(model)))
    label, what = _what_ran(preset, dict_in(report, "tokens"))
    lines.add_row(label, Text(f"{what}{_asked(preset)}, seed {preset['seed']}"))
    return lines


def _what_ran(preset: Values, tokens: Values) -> tuple[str, str]:
    """ "preset", "balanced", with what was changed in it; or "method", "entropy (norm=none)"."""
    if preset["name"]:
        changed = {
            key: value
            for key, value in dict_in(preset, "changed").items()
            if key not in ("keep", "seed")  # which stand in the same line
        }
        return "preset", printable(with_options(str(preset["name"]), changed))
    stages = cast("list[Values]", list_in(tokens, "stages"))
    options = dict_in(stages[0], "options") if stages else {}
    return "method", with_options(str(preset["method"]), options)


def _asked(preset: Values) -> str:
    """The keep that was asked for, as ", keep 0.3 on average over the layers"."""
    top = preset.get("keep")
    own = {name: dict_in(preset, name).get("keep", top) for name in ("image", "video")}
    if own["image"] == own["video"]:
        keeps = "" if own["image"] is None else f"{own['image']:g}"
    else:
        keeps = ", ".join(f"{name} {keep:g}" for name, keep in own.items() if keep is not None)
    return f", keep {keeps} on average over the layers" if keeps else ""


def _prompt(tokens: Values) -> Table:
    """How long the prompt and the answer are."""
    lines = labelled()
    lines.add_row(
        "prompt",
        f"{tokens['visual']:,} visual tokens, {tokens['text']:,} of text; the answer has "
        f"{tokens['answer']:,}",
    )
    return lines


def _shares(report: Values) -> Table:
    """Tokens, compute and memory: what is left of what there would be unpruned."""
    lines = labelled("left", "right", "left", "right")
    sections = {"tokens": _token_rows, "compute": _compute_rows, "memory": _memory_rows}
    for section, rows in sections.items():
        label = section
        for item, left, whole, unit in rows(report):
            if left is None:
                lines.add_row(label, Text(item), "-", "", "")
            elif whole is None:
                lines.add_row(label, Text(item), f"{si(left)}{unit}", "", "")
            else:
                share, told = left / whole if whole else 1.0, left_of(left, whole, unit)
                lines.add_row(label, Text(item), told, Bar(share), f"{share:.1%}")
            label = ""
        if section == "tokens":
            for group in ("frame", "tile"):
                left_in = cast("list[int]", list_in(dict_in(report, "tokens"), f"by_{group}"))
                if len(left_in) > 1:
                    lines.add_row("", f"left in a {group}", f"{min(left_in)} to {max(left_in)}")
    return lines


Row = tuple[str, float | None, float | None, str]
"""What, what is left (None: not counted), of what (None: not in the report), unit."""


def _token_rows(report: Values) -> Iterable[Row]:
    tokens = dict_in(report, "tokens")
    total = number_in(tokens, "visual")
    whole = {"all": total}  # visual tokens of each modality before any cut
    for stage in cast("list[Values]", list_in(tokens, "stages")):
        modality, at, layer = (str(stage[key]) for key in ("modality", "at", "layer"))
        whole.setdefault(modality, number_in(stage, "before"))
        name = f"{stage['method']}, {_place(at, layer)}"
        if modality != "all":
            name = f"{modality}: {name}"
        yield name, number_in(stage, "after"), whole[modality], ""
    yield "layer average", number_in(tokens, "keep_mean") * total, total, ""
    left = dict_in(tokens, "by_modality")
    if len(left) > 1:
        for modality in left:
            yield (
                f"{modality}, of what is left",
                number_in(left, modality),
                number_in(tokens, "kept_after"),
                "",
            )


def _place(at: str, layer: str) -> str:
    """Where a stage cut, and by which name it was put there."""
    if at in ("pixels", "input"):
        return at
    if at == "schedule":  # the method's own, which says nothing more than its layers
        return "input" if layer == "0" else f"layer {layer}"
    return f"layer {layer}" + ("" if at == layer else f" ({at})")


def _compute_rows(report: Values) -> Iterable[Row]:
    flops = dict_in(report, "flops")
    vision = counted_in(flops, "vision")
    left = whole = vision
    # Of a tower that was given less, what all of it would have been is not in the report.
    stages = cast("list[Values]", list_in(dict_in(report, "tokens"), "stages"))
    early = any(stage["at"] == "pixels" for stage in stages)
    yield "vision", vision, None if early else vision, "FLOP"
    for part in ("prefill", "decode"):
        pruned, full = counted_in(flops, part), counted_in(flops, f"{part}_full")
        left, whole = _add(left, pruned), _add(whole, full)
        yield part, pruned, full, "FLOP"
    yield "total", left, None if early else whole, "FLOP"


def _add(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _memory_rows(report: Values) -> Iterable[Row]:
    cache = dict_in(report, "kv_cache_bytes")
    yield "KV cache", counted_in(cache, "kept"), counted_in(cache, "full"), "B"


def _peak(memory: Values) -> Table:
    """The most memory that was in use."""
    weights, peak = number_in(memory, "weights"), number_in(memory, "peak")
    lines = labelled()
    lines.add_row("", f"weights {si(weights)}B, peak {si(peak)}B")
    return lines


def _seconds(seconds: Values, first: bool) -> Table:
    """Seconds by part, in the order in which they pass.

    Args:
        first: of the questions, which has paid for what all share.
    """
    took = {part: duration(number_in(seconds, part)) for part in seconds}
    shared = ("startup", "load", "media") if first else ()
    parts = (*shared, "preprocess", "vision")
    before = ", ".join(f"{part} {took[part]}" for part in parts if part in took)
    lines = labelled()
    lines.add_row("time", before)
    lines.add_row(
        "",
        Text.assemble(
            f"prefill {took['prefill']} (selection {took['select']}), decode {took['decode']}, ",
            "first token ", (took["first_token"], "bold"),
        ),
    )  # fmt: skip
    span = "the command's start" if first else "the question's start"
    lines.add_row("", Text.assemble("total ", (took["total"], "bold"), f" since {span}"))
    return lines


def _speed(compare: Values) -> Table:
    """Measured speed-ups, beside what the FLOPs promise."""
    seconds = dict_in(compare, "seconds")
    lines = labelled("left", "right", "right")
    lines.add_row("compare", *(Text(head, "dim") for head in ("medians", "unpruned", "speed-up")))
    for part in ("prefill", "first_token", "total"):
        name = part.replace("_", " ") + (" without loading" if part == "total" else "")
        speedup = Text(f"{number_in(compare, f'{part}_speedup'):.2f} x", "bold")
        lines.add_row("", name, duration(number_in(seconds, part)), speedup)
    return lines


def _verdict(compare: Values, answer: str) -> Table:
    """What was predicted, both answers, and whether pruning pays."""
    measured, whole = number_in(compare, "prefill_speedup"), number_in(compare, "total_speedup")
    lines = labelled()
    if compare["prefill_predicted"] is None:
        lines.add_row("", "prefill predicted from FLOPs: - (they are not counted)")
    else:
        lines.add_row(
            "",
            f"prefill predicted from FLOPs: {number_in(compare, 'prefill_predicted'):.2f} x, of "
            f"which {number_in(compare, 'realised_fraction'):.0%} is realised; roofline estimate: "
            f"{number_in(compare, 'prefill_roofline'):.2f} x",
        )
    if compare["same_answer"]:
        greedy = "greedy " if "pruned_answer" in compare else ""
        lines.add_row("", f"the unpruned {greedy}answer is the same")
    else:
        lines.add_row("", Text.assemble(("unpruned  ", "dim"), printable(str(compare["answer"]))))
        lines.add_row("", Text.assemble(("pruned    ", "dim"), printable(answer)))
    if measured < PAYS:
        lines.add_row("", Text(f"pruning does not pay here: {measured:.2f} x", "yellow"))
    elif whole < PAYS:
        told = f"pruning does not pay here: prefill {measured:.2f} x, the whole {whole:.2f} x"
        lines.add_row("", Text(told, "yellow"))
    return lines
