"""What the shell offers for a half-typed value; none of it imports torch."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def complete_model(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The short names of models, and directories."""
    from vtprune.models import FAMILIES
    from vtprune.models.names import aliases

    names = [alias.name for alias in aliases() if alias.model_type in FAMILIES]
    return [*_starting(names, incomplete), CompletionItem(incomplete, type="dir")]


def complete_preset(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The packaged presets, and files."""
    from vtprune.preset import preset_names

    return [*_starting(preset_names(), incomplete), CompletionItem(incomplete, type="file")]


def complete_method(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The methods."""
    from vtprune.pruners import METHODS

    return _starting(list(METHODS), incomplete)


def complete_methods(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The methods, after those that are listed already."""
    from vtprune.pruners import METHODS

    return _going_on(list(METHODS), incomplete)


def complete_presets(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The packaged presets, after those that are listed already."""
    from vtprune.preset import preset_names

    return _going_on(preset_names(), incomplete)


def complete_option(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """key=value for the options of the method that is named, or of all."""
    from vtprune.pruners import METHODS

    given = ctx.params.get("methods") or (ctx.params.get("method"),)
    methods = [METHODS[name] for name in given if name in METHODS] or METHODS.values()
    pairs = [
        f"{option.name}={choice}"
        for method in methods
        for option in method.options
        for choice in option.choices or [option.shown(option.default)]
    ]
    return _starting(pairs, incomplete)


def complete_place(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The places with a name."""
    return _starting(["pixels", "input", "ecl", "horizon"], incomplete)


def _going_on(names: list[str], incomplete: str) -> list[CompletionItem]:
    """One more name for a list with commas."""
    before, comma, last = incomplete.rpartition(",")
    named = before.split(",")
    return [
        CompletionItem(f"{before}{comma}{name}")
        for name in names
        if name.startswith(last) and name not in named
    ]


def _starting(names: list[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
