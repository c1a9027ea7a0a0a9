"""What the shell offers for a half-typed value; none of it imports torch."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Completion = Callable[[click.Context], list[str]]
"""What an option can be; a "<file>" or "<dir>" among them stands for paths."""
Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def models(ctx: click.Context) -> list[str]:
    """Return the short names of models, and directories."""
    from vtprune.models import FAMILIES
    from vtprune.models.names import aliases

    return [alias.name for alias in aliases() if alias.model_type in FAMILIES] + ["<dir>"]


def gpus(ctx: click.Context) -> list[str]:
    """Return the cards with a data sheet."""
    from vtprune.evaluation.profiling.gpus import gpu_names

    return gpu_names()


def presets(ctx: click.Context) -> list[str]:
    """Return the packaged presets, and files."""
    from vtprune.preset import preset_names

    return [*preset_names(), "<file>"]


def methods(ctx: click.Context) -> list[str]:
    """Return the methods."""
    from vtprune.pruners import METHODS

    return list(METHODS)


def evidence_methods(ctx: click.Context) -> list[str]:
    """Return the methods of explain."""
    from vtprune.inference.evidence import METHODS

    return list(METHODS)


def places(ctx: click.Context) -> list[str]:
    """Return the places with a name."""
    return ["pixels", "input", "ecl", "horizon"]


def method_options(ctx: click.Context) -> list[str]:
    """Return key=value for the options of the methods that are named, or of all."""
    from vtprune.pruners import METHODS

    given = ctx.params.get("methods") or (ctx.params.get("method"),)
    return [
        f"{option.name}={choice}"
        for method in [METHODS[name] for name in given if name in METHODS] or METHODS.values()
        for option in method.options
        for choice in option.choices or [option.format_value(option.default)]
    ]


def completer(values: Completion, commas: bool = False) -> Completer:
    """Return click's function for an option that can be one of `values`.

    Args:
        commas: the option is a list with commas, which goes on after those that it has.
    """

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if commas else ("", "", incomplete)
        known = values(ctx)
        items = [
            CompletionItem(f"{before}{comma}{name}")
            for name in known
            if name.startswith(last) and not name.startswith("<") and name not in before.split(",")
        ]
        paths = [name.strip("<>") for name in known if name.startswith("<") and not commas]
        return items + [CompletionItem(incomplete, type=path) for path in paths]

    return complete
