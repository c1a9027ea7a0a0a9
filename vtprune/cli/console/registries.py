"""Methods, presets and models: an overview as a table, and the details of one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vtprune.cli.console.tables import LABEL, labelled, show_facts, show_table
from vtprune.pruners import reads_question

if TYPE_CHECKING:
    from vtprune.models.names import Alias
    from vtprune.preset import Preset
    from vtprune.preset.calibration import Calibration
    from vtprune.pruners import Method

WIDE = 80  # columns of a terminal from which on it has room for hub ids
FIGURES = {
    "ecl": "entropy collapse layer",
    "horizon": "information horizon",
    "horizon_text": "information horizon of text-heavy inputs",
}


def show_methods(methods: Mapping[str, Method], console: Console) -> None:
    """Print one line for every method."""
    rows = [
        (
            name,
            method.at,
            "aware" if reads_question(name, {}, method.at) else "blind",
            method.summary,
        )
        for name, method in methods.items()
    ]
    show_table(("method", "cuts at", "question", "keeps"), rows, console)


def show_method(name: str, method: Method, explanation: str, console: Console) -> None:
    """Print what is known of one method, and its options.

    Args:
        explanation: the docstring of its file, whose last part is about the options.
    """
    console.print(Text.assemble((name, "bold"), f": {method.summary}"))
    label = max([LABEL, *(len(option.name) for option in method.options)])
    lines = labelled(label=label)
    lines.add_row("cuts at", f"{method.at} (default place)")
    lines.add_row("media", " and ".join(method.modalities))
    lines.add_row("question", _question_use(name, method))
    console.print(lines)
    console.print(Text("\noptions" if method.options else "\nno options", "dim"))
    lines = labelled(label=label)
    for option in method.options:
        values = f"{option.values} (default {option.format_value(option.default)})"
        lines.add_row(option.name, Text.assemble(values, (f"  {option.help}", "dim")))
    console.print(lines)
    text = explanation.partition("\n")[2].rpartition("\nOptions:")[0].strip()
    for paragraph in re.split(r"\n\n|\n(?=Official code:|Differences:)", text):
        console.print(Text("\n" + " ".join(paragraph.split())))


def _question_use(name: str, method: Method) -> str:
    if not reads_question(name, {}, method.at):
        return "blind: keeps the same tokens for every question"
    option, value = method.blind or ("", "")
    exception = f"; blind with {option}={value}" if option else ""
    if not method.reads_question:
        exception = "; blind at: input"
    return (
        f"aware: keeps tokens for this question; a follow-up on the same KV cache sees only "
        f"those{exception}"
    )


def show_presets(presets: Sequence[Preset], console: Console) -> None:
    """Print one line for every preset, and one for every figure that it rests on."""
    rows = [
        (
            str(preset.name),
            "" if preset.keep is None else f"{preset.keep:g}",
            preset.description.partition(";")[0],
        )
        for preset in presets
    ]
    show_table(("preset", "<keep", "description"), rows, console)
    figures = [
        (
            str(preset.name),
            figure.model,
            figure.media or "both",
            "" if figure.keep is None else f"{figure.keep:g}",
            figure.score,
            figure.origin,
        )
        for preset in presets
        for figure in preset.evidence
    ]
    console.print()
    show_table(("rests on", "model", "media", "<keep", "<of unpruned", "source"), figures, console)
    note = (
        "(media: pictures, clips or both; questions: right answers, measured here; else as "
        "published, unpruned = 100)"
    )
    console.print(Text(note, "dim"))


def question_fact(preset: Preset) -> str:
    """Return whether what a preset keeps depends on the question."""
    readers = preset.question_aware_methods()
    if not readers:
        return "blind: keeps the same tokens for every question"
    return (
        f"aware ({' and '.join(readers)}): keeps tokens for this question; a follow-up on the same "
        "KV cache sees only those"
    )


def show_models(aliases: Sequence[Alias], console: Console) -> None:
    """Print one line for every short name, with where the model can be cut."""
    rows = [
        (alias.name, alias.model_type, alias.parameters, str(alias.decoder["layers"]),
         _layer(alias.calibration, "ecl"), _layer(alias.calibration, "horizon"),
         ", ".join(alias.inputs), _gigabytes(alias, "bfloat16"), _gigabytes(alias, "4bit"),
         "yes" if alias.gated else "no", alias.hub_id)
        for alias in aliases
    ]  # fmt: skip
    headings = ("model", "family", "<size", "<layers", "<ecl", "<horizon", "input", "<bf16",
                "<4 bit", "gated", "hub id")  # fmt: skip
    most = len(headings) if console.width >= WIDE else -1  # an id is as long as a narrow line
    show_table(headings[:most], [row[:most] for row in rows], console)
    if any("default" in alias.calibration.sources.values() for alias in aliases):
        console.print(Text("(in brackets: a default, not measured for this model)", "dim"))


def show_model(alias: Alias, console: Console) -> None:
    """Print what is known of one model: its decoder, and who says where it can be cut."""
    console.print(Text.assemble((alias.name, "bold"), f": {alias.hub_id}"))
    decoder = ", ".join(f"{key} {value:,}" for key, value in alias.decoder.items())
    calibration = alias.calibration
    facts = [("family", alias.model_type), ("size", alias.parameters), ("decoder", decoder)]
    facts += [
        ("input", " and ".join(alias.inputs)),
        ("memory", f"weights about {_gigabytes(alias, 'bfloat16')} in bfloat16, "
                   f"{_gigabytes(alias, '4bit')} with --quantize 4bit"),
        ("hub", "gated: accept its license there first" if alias.gated else "not gated"),
    ]  # fmt: skip
    for name, meaning in FIGURES.items():
        if getattr(calibration, name) is not None:
            source = calibration.sources.get(name, "default")
            layer = f"layer {getattr(calibration, name)}"
            facts.append((name.partition("_")[0], f"{layer}: {meaning} ({source})"))
    show_facts(facts, console)


def _gigabytes(alias: Alias, dtype: str) -> str:
    return f"{alias.memory_bytes[dtype] / 1e9:.3g} GB"


def _layer(calibration: Calibration, name: str) -> str:
    layer = getattr(calibration, name)
    return f"({layer})" if calibration.sources.get(name) == "default" else f"{layer} "
