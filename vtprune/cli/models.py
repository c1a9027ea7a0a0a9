"""`vtprune models`: the models with a short name."""

from __future__ import annotations

import dataclasses
import json

import click

from vtprune.cli.help import Command
from vtprune.cli.options import Flags, takes

EPILOG = """\b
Examples:
  vtprune models
  vtprune models --json
"""


@click.command(cls=Command, epilog=EPILOG)
@takes("json")
def models(flags: Flags) -> None:
    """List the models with a short name, and where they can be cut.

    Any other checkpoint of the same families works by its hub id or directory. ecl is the entropy
    collapse layer, horizon the layer from which visual tokens are not needed any more.
    """
    from vtprune.models import FAMILIES
    from vtprune.models.names import aliases

    found = [alias for alias in aliases() if alias.model_type in FAMILIES]
    if flags.json:
        click.echo(json.dumps([dataclasses.asdict(alias) for alias in found], indent=2))
        return
    from vtprune.cli.console import show_models, stdout_console

    show_models(found, stdout_console())
