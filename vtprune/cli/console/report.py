"""What one question cost, as `vtprune ask` shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.facts import model_fact, read_fact
from vtprune.cli.console.tables import Bar, fitted, labelled, warning
from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import duration, left_of, si
from vtprune.inference.wording import PAYS, counted, with_options
from vtprune.preset.calibration import packaged_models
from vtprune.preset.figures import figure_of

if TYPE_CHECKING:
    from vtprune.inference.report import (
        CompareResult,
        CompileInfo,
        DecodeCutCount,
        MemoryBytes,
        Report,
        ResolvedPreset,
        Seconds,
        TokenCounts,
    )


def show_question(number: int, total: int, question: str, console: Console) -> None:
    """Heads an answer with its question."""
    console.print(Text.assemble((f"[{number}/{total}] ", "dim"), (printable(question), "bold")))


def render(report: Report, console: Console, before: Report | None = None) -> None:
    """Prints what one question cost.

    Args:
        console: where to.
        before: the report of the question before, about the same media; what that said of them,
            of the model and as a warning is not said again.
    """
    groups = [
        [] if before else [_facts(report)],
        [_prompt(report.tokens), _shares(report), _peak(report.memory_bytes)],
        [_seconds(report.seconds, not before, report.compile)],
    ]
    if report.compare:
        groups.append([_speed(report.compare), _verdict(report.compare, report.answer)])
    warned = before.warnings if before else ()
    groups.append([warning(text) for text in report.warnings if text not in warned])
    for group in groups:
        if group:
            console.print()
        for table in group:
            console.print(fitted(table, console))


def _facts(report: Report) -> Table:
    """Return the lines of the media read, the model, and the preset or method that pruned."""
    lines = labelled()
    lines.add_row("read", Text(read_fact(report.input)))
    lines.add_row("model", Text(model_fact(report.model)))
    label, name = _what_ran(report.preset, report.tokens)
    lines.add_row(label, Text(f"{name}{_asked(report.preset)}, seed {report.preset.seed}"))
    if text := _rests_on(report):
        lines.add_row("rests on", Text(printable(text)))
    return lines


def _rests_on(report: Report) -> str | None:
    """Return what a preset rests on where that is not the model that answered.

    A figure of the media that were asked about is named before one of others.
    """
    figures = [figure_of(entry) for entry in report.preset.evidence or ()]
    aliases = packaged_models()["aliases"] if figures else {}
    hub_ids = [aliases.get(figure.model.lower(), {}).get("hub_id") for figure in figures]
    if not figures or report.model.name in (*hub_ids, *(figure.model for figure in figures)):
        return None
    asked = {"image": "pictures", "video": "clips"}.get(report.input.modality)
    first = next((one for one in figures if one.media in (None, asked)), figures[0])
    keep = "" if first.keep is None else f" at keep {first.keep:g}"
    media = "" if first.media is None else f", {first.media}"
    return f"model {first.model}{keep}{media}: {first.score} ({first.origin})"


def _what_ran(preset: ResolvedPreset, tokens: TokenCounts) -> tuple[str, str]:
    """ "preset", "balanced", with what was changed in it; or "method", "entropy (norm=none)"."""
    if preset.name:
        changed = {
            key: value
            for key, value in preset.changed.items()
            if key
            not in ("keep", "tokens", "tokens_after", "fit", "seed")  # which are in the same line
        }
        return "preset", printable(with_options(preset.name, changed))
    options = tokens.stages[0].options if tokens.stages else {}
    return "method", with_options(str(preset.method), options)


def _asked(preset: ResolvedPreset) -> str:
    """The budget that was asked for, as ", keep 0.3 on average over the layers"."""
    if preset.tokens is not None:
        return f", at most {counted(preset.tokens, 'visual token')} on average over the layers"
    if preset.tokens_after is not None:
        return f", at most {counted(preset.tokens_after, 'visual token')} after the first cut"
    if preset.fit is not None and preset.fit_tokens is not None:
        most = counted(preset.fit_tokens, "visual token")
        return f", fit {preset.fit}: at most {most} past the first cut ({preset.fit_reason})"
    keeps = {name: preset.keep_for(name) for name in ("image", "video")}
    if keeps["image"] == keeps["video"]:
        text = "" if keeps["image"] is None else f"{keeps['image']:g}"
    else:
        text = ", ".join(f"{name} {keep:g}" for name, keep in keeps.items() if keep is not None)
    return f", keep {text} on average over the layers" if text else ""


def _prompt(tokens: TokenCounts) -> Table:
    """How long the prompt and the answer are."""
    lines = labelled()
    lines.add_row(
        "prompt",
        f"{tokens.visual:,} visual tokens, {tokens.text:,} of text; the answer has "
        f"{tokens.answer:,}",
    )
    return lines


def _shares(report: Report) -> Table:
    """Tokens, compute and memory: what is left of what there would be unpruned."""
    lines = labelled("left", "right", "left", "right")
    sections = {"tokens": _token_rows, "compute": _compute_rows, "memory": _memory_rows}
    for section, rows in sections.items():
        label = section
        for item, left, full, unit in rows(report):
            if left is None:
                lines.add_row(label, Text(item), "-", "", "")
            elif full is None:
                lines.add_row(label, Text(item), f"{si(left)}{unit}", "", "")
            else:
                share = left / full if full else 1.0
                lines.add_row(label, Text(item), left_of(left, full, unit), Bar(share),
                              f"{share:.1%}")  # fmt: skip
            label = ""
        if section == "tokens":
            tokens = report.tokens
            for group, kept in (("frame", tokens.by_frame), ("tile", tokens.by_tile)):
                if len(kept) > 1:
                    lines.add_row("", f"left in a {group}", f"{min(kept)} to {max(kept)}")
    return lines


ShareRow = tuple[str, float | None, float | None, str]
"""What, what is left (None: not counted), of what (None: not in the report), unit."""


def _token_rows(report: Report) -> Iterable[ShareRow]:
    tokens = report.tokens
    before = {"all": tokens.visual}  # visual tokens of each modality before any cut
    for stage in tokens.stages:
        before.setdefault(stage.modality, stage.before)
        name = f"{stage.method}, {_place(stage.at, stage.layer)}"
        if stage.modality != "all":
            name = f"{stage.modality}: {name}"
        yield name, stage.after, before[stage.modality], ""
    yield "layer average", tokens.keep_mean * tokens.visual, tokens.visual, ""
    for last in _last_cut(report):
        name = f"average, {last.tokens} tokens decoded"
        yield name, last.visual_mean, tokens.visual, ""
    if len(tokens.by_modality) > 1:
        for modality, kept in tokens.by_modality.items():
            yield f"{modality}, of what is left", kept, tokens.kept_after, ""


def _last_cut(report: Report) -> Sequence[DecodeCutCount]:
    """Return the last cut while decoding; none where there was none."""
    return () if report.decoding is None else report.decoding.cuts[-1:]


def _place(at: str, layer: int) -> str:
    """Where a stage cut, and by which name it was put there."""
    if at in ("pixels", "input"):
        return at
    if at == "schedule":  # the method's own, which says nothing more than its layers
        return f"layer {layer}" if layer else "input"
    return f"layer {layer}" + ("" if at == str(layer) else f" ({at})")


def _compute_rows(report: Report) -> Iterable[ShareRow]:
    flops = report.flops
    # Of a tower that was given less, what all of it would have been is not in the report.
    early = any(stage.at == "pixels" for stage in report.tokens.stages)
    yield "vision", flops.vision, None if early else flops.vision, "FLOP"
    yield "prefill", flops.prefill, flops.prefill_full, "FLOP"
    yield "decode", flops.decode, flops.decode_full, "FLOP"
    left = _add(flops.vision, flops.prefill, flops.decode)
    full = None if early else _add(flops.vision, flops.prefill_full, flops.decode_full)
    yield "total", left, full, "FLOP"


def _add(*counts: float | None) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _memory_rows(report: Report) -> Iterable[ShareRow]:
    yield "KV cache", report.kv_cache_bytes.kept, report.kv_cache_bytes.full, "B"
    for last in _last_cut(report):
        name = f"after {last.tokens} tokens"
        yield name, last.kv_cache_bytes, last.kv_cache_bytes_uncut, "B"


def _peak(memory: MemoryBytes) -> Table:
    """The most memory that was in use."""
    lines = labelled()
    lines.add_row("", f"weights {si(memory.weights)}B, peak {si(memory.peak)}B")
    return lines


def _seconds(seconds: Seconds, first: bool, compiled: CompileInfo | None) -> Table:
    """Seconds by part, in the order in which they pass.

    Args:
        first: of the questions about these media, which has paid for reading them; where it has
            paid for start-up and loading too, its total is from the command's start.
        compiled: what compiling took; None where nothing is compiled.
    """
    loaded = ("startup", "load") if seconds.startup else ()
    parts = (*loaded, *(("media",) if first else ()), "preprocess", "vision")
    lines = labelled()
    lines.add_row("time", ", ".join(f"{part} {duration(getattr(seconds, part))}" for part in parts))
    lines.add_row(
        "",
        Text.assemble(
            f"prefill {duration(seconds.prefill)} (selection {duration(seconds.select)}), "
            f"decode {duration(seconds.decode)}, first token ",
            (duration(seconds.first_token), "bold"),
        ),
    )
    span = "the command's start" if loaded else "the question's start"
    lines.add_row("", Text.assemble("total ", (duration(seconds.total), "bold"), f" since {span}"))
    if compiled is not None:
        lines.add_row(
            "",
            f"compiling {duration(compiled.seconds)}, in the total only: {compiled.graphs} graphs, "
            f"{compiled.recompiles} of them again",
        )
    return lines


def _speed(compare: CompareResult) -> Table:
    """Measured speed-ups, beside what the FLOPs promise."""
    lines = labelled("left", "right", "right")
    lines.add_row("compare", *(Text(head, "dim") for head in ("medians", "unpruned", "speed-up")))
    for part, seconds in (
        ("prefill", compare.seconds.prefill),
        ("first_token", compare.seconds.first_token),
        ("total", compare.seconds.total),
    ):
        name = part.replace("_", " ") + (" without loading" if part == "total" else "")
        speedup = Text(f"{compare.speedup(part):.2f} x", "bold")
        lines.add_row("", name, duration(seconds), speedup)
    return lines


def _verdict(compare: CompareResult, answer: str) -> Table:
    """What was predicted, both answers, and whether pruning pays."""
    prefill, total = compare.prefill_speedup, compare.total_speedup
    lines = labelled()
    if compare.prefill_predicted is None:
        lines.add_row("", "prefill predicted from FLOPs: - (they are not counted)")
    else:
        lines.add_row(
            "",
            f"prefill predicted from FLOPs: {compare.prefill_predicted:.2f} x, of which "
            f"{compare.realised_fraction:.0%} is realised; roofline estimate: "
            f"{compare.prefill_roofline:.2f} x",
        )
    sampled = compare.pruned_answer is not None
    if compare.same_answer:
        lines.add_row("", f"the unpruned {'greedy ' if sampled else ''}answer is the same")
    else:
        pruned = compare.pruned_answer if compare.pruned_answer is not None else answer
        lines.add_row("", Text.assemble(("unpruned  ", "dim"), printable(compare.answer)))
        lines.add_row("", Text.assemble(("pruned    ", "dim"), printable(pruned)))
    if prefill < PAYS:
        lines.add_row("", Text(f"pruning does not pay here: {prefill:.2f} x", "yellow"))
    elif total < PAYS:
        verdict = f"pruning does not pay here: prefill {prefill:.2f} x, the whole {total:.2f} x"
        lines.add_row("", Text(verdict, "yellow"))
    return lines
