"""`vtprune presets`: list, show and check presets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from vtprune.cli import complete
from vtprune.cli.help import Group
from vtprune.cli.options import Flags, takes
from vtprune.cli.results import LIST_TEXT, list_and_save
from vtprune.errors import VtpruneError, brief_path

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.preset import Preset

EPILOG = """\b
Examples:
  vtprune presets list
  vtprune presets show balanced > mine.yaml
  vtprune presets check mine.yaml
  vtprune ask clip.mp4 "what happens?" --preset mine.yaml
"""


@click.group(cls=Group, epilog=EPILOG)
def presets() -> None:
    """List, show and check presets.

    A preset is a packaged name or a YAML file. It says which methods prune, at which layers, and
    what fraction of the visual tokens they keep.
    """


@presets.command("list", epilog="\b\nExample:\n  vtprune presets list --json")
@takes("json", "saves", save=LIST_TEXT)
def list_(flags: Flags) -> None:
    """List the packaged presets."""
    from vtprune.preset import load_preset, preset_names

    packaged = [load_preset(name) for name in preset_names()]

    def show(console: Console) -> None:
        from vtprune.cli.console import show_presets

        show_presets(packaged, console)

    list_and_save([_to_dict(preset) for preset in packaged], flags, show)


@presets.command(epilog="\b\nExample:\n  vtprune presets show balanced")
@click.argument("name", shell_complete=complete.completer(complete.presets))
@takes("json")
def show(name: str, flags: Flags) -> None:
    """Print the YAML of a preset.

    Standard error says whether it is question-aware.
    """
    from vtprune.preset import find_preset, load_preset

    preset = load_preset(name)  # so that what is printed is a preset
    if flags.json:
        click.echo(json.dumps(_to_dict(preset), indent=2))
        return
    from vtprune.cli.console import printable, show_facts, stderr_console

    click.echo(printable(find_preset(name).read_text(encoding="utf-8")), nl=False)
    from vtprune.cli.console.registries import question_fact

    show_facts([("question", question_fact(preset))], stderr_console())


def _to_dict(preset: Preset) -> dict[str, object]:
    """Return the preset, and which of its methods are question-aware."""
    return {**preset.to_dict(), "question_read_by": list(preset.question_aware_methods())}


@presets.command(epilog="\b\nExample:\n  vtprune presets check mine.yaml")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@takes("json")
def check(files: tuple[str, ...], flags: Flags) -> None:
    """Check preset files, and name every fault with its line."""
    from vtprune.preset import load_preset

    faults = []
    for file in files:
        try:
            load_preset(file)
        except VtpruneError as error:
            faults.append(error)
            if flags.json:
                click.echo(json.dumps({"file": file, "ok": False, "error": error.message}))
            else:
                click.echo(f"Error: {error.message}", err=True)
        else:
            click.echo(
                json.dumps({"file": file, "ok": True}) if flags.json else f"{brief_path(file)}: ok"
            )
    if faults and flags.json:
        raise click.exceptions.Exit(1)
    if faults:
        click.echo(f"hint: {faults[-1].hint}", err=True)
        raise click.exceptions.Exit(1)
