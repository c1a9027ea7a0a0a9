"""Methods, presets and models, as lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vtprune.cli.console.tables import LABEL, labelled, show_table

if TYPE_CHECKING:
    from vtprune.models.names import Alias
    from vtprune.preset import Preset, StageSpec
    from vtprune.preset.calibration import Calibration
    from vtprune.pruners import Method


def show_methods(methods: Mapping[str, Method], console: Console) -> None:
    """Prints every method with its options."""
    names = [option.name for method in methods.values() for option in method.options]
    label = max([LABEL, *map(len, names)])
    for name, method in methods.items():
        console.print(Text.assemble((name, "bold"), (f"  at {method.at} by default", "dim")))
        lines = labelled(label=label)
        lines.add_row("keeps", method.summary)
        for option in method.options:
            choices = f"{option.values} (default {option.shown(option.default)})"
            lines.add_row(option.name, Text.assemble(choices, (f"  {option.help}", "dim")))
        if method.reads_question:
            lines.add_row("question", _reader(method))
        if method.paper:
            lines.add_row("paper", method.paper)
        console.print(lines)


def show_presets(presets: Iterable[Preset], console: Console) -> None:
    """Prints every preset with its stages."""
    for preset in presets:
        keep = "" if preset.keep is None else f"  keep {preset.keep:g}"
        console.print(Text.assemble((str(preset.name), "bold"), (keep, "dim")))
        lines = labelled()
        lines.add_row("", preset.description)
        if preset.shared():
            lines.add_row("stages", _stages(preset.stages_for("image")))
        else:
            for modality in ("image", "video"):
                lines.add_row(modality, _stages(preset.stages_for(modality)))
        lines.add_row("question", question_fact(preset))
        console.print(lines)


def question_fact(preset: Preset) -> str:
    """Whether what a preset keeps depends on what is asked."""
    readers = preset.readers()
    if not readers:
        return "blind: keeps the same tokens whatever is asked"
    return f"read by {' and '.join(readers)}: a second one finds what the first left"


def _reader(method: Method) -> str:
    told = "decides what is kept: a second one finds what the first left"
    return f"{told}; not with {method.blind[0]} {method.blind[1]}" if method.blind else told


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
