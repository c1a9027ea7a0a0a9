"""`vtprune demo`: sample media and questions of the embedded model's world."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vtprune.cli.help import Command
from vtprune.errors import VtpruneError

EPILOG = """\b
Examples:
  vtprune demo samples
  vtprune demo samples --num 20 --seed 7
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--num", default=24, show_default=True, metavar="N", help="How many questions.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Same seed, same files.")
@click.option("--json", "as_json", is_flag=True, help="Print the questions as JSON.")
def demo(directory: Path, num: int, seed: int, as_json: bool) -> None:
    """Write sample clips, pictures and questions to DIR.

    Each line of its questions.jsonl has a file, a question, its answer and its kind. They are of
    the world that the embedded model was trained for.
    """
    if num < 1:
        raise VtpruneError(f"--num {num} is out of range", "1 or more")
    if seed < 0:
        raise VtpruneError(f"--seed {seed} is out of range", "0 or more")
    from vtprune import demo as world

    questions = world.write(directory, num, seed)
    if as_json:
        click.echo(json.dumps(questions, indent=2))
        return
    first = questions[0]
    count = f"{len(questions)} question{'s' if len(questions) > 1 else ''}"
    click.echo(f"{directory / 'questions.jsonl'}: {count}")
    click.echo(f'try: vtprune ask {directory / str(first["file"])} "{first["question"]}"')
