"""`vtprune methods`: the pruning methods and their options."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli import complete
from vtprune.cli.help import Command
from vtprune.cli.options import Flags, register_named, takes
from vtprune.cli.results import LIST_TEXT, list_and_save

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.pruners import Method

EPILOG = """\b
Examples:
  vtprune methods
  vtprune methods entropy
  vtprune ask clip.mp4 "what happens?" --method entropy --at 2 -o norm=none
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("name", required=False, shell_complete=complete.completer(complete.methods))
@takes("json", "saves", save=LIST_TEXT)
def methods(name: str | None, flags: Flags) -> None:
    """List the pruning methods, or explain one of them.

    A question-aware method keeps tokens for the question asked; a question-blind one keeps the
    same tokens for every question. NAME shows a method's idea, paper, differences from the
    official code, and options; package.module:Class checks one of your own.
    """
    from vtprune.pruners import METHODS, find_method

    register_named(filter(None, [name]))
    if name is None:
        listed = {one: find_method(one) for one in METHODS}
        values: object = [_to_dict(one, method) for one, method in listed.items()]
    else:
        method = find_method(name)
        values = _to_dict(name, method)

    def show(console: Console) -> None:
        from vtprune.cli.console import show_method, show_methods

        if name is None:
            show_methods(METHODS, console)
        else:
            show_method(name, method, _docstring(name, method), console)

    list_and_save(values, flags, show)


def _to_dict(name: str, method: Method) -> dict[str, object]:
    values = dataclasses.asdict(method)
    del values["path"]
    return {"name": name, **values}


def _docstring(name: str, method: Method) -> str:
    """Return the docstring of a method's file, without importing it and so torch."""
    from vtprune.pruners import OWN

    if name in OWN:
        return inspect.getdoc(OWN[name]) or ""
    spec = find_spec(method.path.partition(":")[0])
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
