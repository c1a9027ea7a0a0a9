"""`vtprune demo`: sample media and questions of the embedded model's world."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vtprune.cli.help import Command
from vtprune.cli.options import Flags, takes

EPILOG = """\b
Examples:
  vtprune demo samples
  vtprune demo samples --num 20 --seed 7
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@takes("num", "seed", "json")
def demo(directory: Path, flags: Flags) -> None:
    """Write sample clips, pictures and questions to DIR.

    Each line of its questions.jsonl has a file, a question, its answer and its kind. They are of
    the world that the embedded model was trained for.
    """
    from vtprune import demo as world
    from vtprune.cli.console import printable

    questions = world.write(directory, flags.num, flags.seed or 0)
    if flags.json:
        click.echo(json.dumps(questions, indent=2))
        return
    first = questions[0]
    count = f"{len(questions)} question{'s' if len(questions) > 1 else ''}"
    named = printable(str(directory))
    click.echo(f"{named}/questions.jsonl: {count}")
    click.echo(f'try: vtprune ask {named}/{first["file"]} "{first["question"]}"')
