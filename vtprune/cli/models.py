"""`vtprune models`: the models with a short name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from vtprune.cli import complete
from vtprune.cli.help import Command
from vtprune.cli.options import Flags, takes
from vtprune.cli.results import LIST_TEXT, list_and_save
from vtprune.errors import ModelError, quote

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """\b
Examples:
  vtprune models
  vtprune models qwen2.5-vl-7b
  vtprune models --json
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("name", required=False, shell_complete=complete.completer(complete.models))
@takes("json", "saves", save=LIST_TEXT)
def models(name: str | None, flags: Flags) -> None:
    """List the models with a short name, or show one of them.

    Any other checkpoint works by its hub id or directory: of the same families, or of another class
    of transformers, through its own processor; one that can't be pruned answers at keep 1. ecl is
    the entropy collapse layer, horizon the information horizon: the layer from which on visual
    tokens are not needed. NAME shows who measured them, and the decoder's sizes.
    """
    from vtprune.models import FAMILIES
    from vtprune.models.names import aliases, closest_alias

    listed = [alias for alias in aliases() if alias.model_type in FAMILIES]
    if name is not None:
        chosen = [alias for alias in listed if name.lower() in (alias.name, alias.hub_id.lower())]
        if not chosen:
            close = closest_alias(name)
            hint = f"did you mean {close}? " if close else ""
            raise ModelError(f"no short name {quote(name)}", f"{hint}vtprune models lists them")
        listed = chosen
    values = [dataclasses.asdict(alias) for alias in listed]

    def show(console: Console) -> None:
        from vtprune.cli.console import show_model, show_models

        if name is None:
            show_models(listed, console)
        else:
            show_model(listed[0], console)

    list_and_save(values if name is None else values[0], flags, show)
