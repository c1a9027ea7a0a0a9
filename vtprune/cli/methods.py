"""`vtprune methods`: the pruning methods and their options."""

from __future__ import annotations

import dataclasses
import json

import click

from vtprune.cli.help import Command
from vtprune.cli.options import Flags, takes

EPILOG = """\b
Examples:
  vtprune methods
  vtprune ask clip.mp4 "what happens?" --method entropy --at 2 -o norm=none
"""


@click.command(cls=Command, epilog=EPILOG)
@takes("json")
def methods(flags: Flags) -> None:
    """List the pruning methods and their options."""
    from vtprune.pruners import METHODS

    if flags.json:
        found = []
        for name, method in METHODS.items():
            values = dataclasses.asdict(method)
            del values["path"]
            found.append({"name": name, **values})
        click.echo(json.dumps(found, indent=2))
        return
    from vtprune.cli.console import show_methods, stdout_console

    show_methods(METHODS, stdout_console())
