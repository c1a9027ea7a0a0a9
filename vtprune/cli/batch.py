"""`vtprune batch`: many questions about many files, a line an answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune import __version__
from vtprune.cli.flags import (
    STDIN,
    cache_from,
    check_address,
    generation_from,
    limits_from,
    loading_from,
    preset_from,
    read_question,
    sampling_from,
)
from vtprune.cli.help import Command
from vtprune.cli.options import CACHE, DECODE, MAX_NEW_TOKENS, MEDIA, MODEL, ONE_WAY, Flags, takes
from vtprune.cli.results import check_saves, to_json
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.inference.generate import Generation
    from vtprune.preset import Preset
    from vtprune.serving.batch import Counts
    from vtprune.serving.requests import Request

LINES = (".jsonl",)
EPILOG = """\b
Examples:
  vtprune batch clips -q "what happens?" --keep 0.3 --save answers.jsonl
  vtprune batch "scans/*.png" -q "total?" -q "which date?" --save a.jsonl
  vtprune batch requests.jsonl --model qwen2.5-vl-7b --save answers.jsonl
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="FILES|DIR|REQUESTS.jsonl")
@takes(
    *ONE_WAY,
    *DECODE,
    *MODEL,
    *MEDIA,
    *CACHE,
    "question",
    "columns",
    "system",
    "max_new_tokens",
    "temperature",
    "top_p",
    "batch_size",
    "workers",
    "ray",
    "in_order",
    "json",
    "saves",
    "quiet",
    default_words={
        "preset": "balanced",
        "max_new_tokens": str(MAX_NEW_TOKENS),
        "saves": "lines on standard output",
    },
    save=[("a line an answer", ".jsonl")],
)
@click.version_option(__version__, "-V", "--version", message="vtprune %(version)s")
def batch(inputs: tuple[str, ...], flags: Flags) -> None:
    """Answer many questions about many files.

    Asks every -q about every file: those that are named, all media files of a folder and of the
    folders in it, or what a pattern matches. Or answers the lines of REQUESTS.jsonl: file or files,
    and question; or messages; and where wanted id, keep and preset. A line of --save is one answer,
    or says why there is none. Killed and started again, the same command goes on.
    """
    from vtprune.cli import output
    from vtprune.cli.config import load_config

    user = load_config()
    if len(flags.saves) > 1:
        raise VtpruneError("--save is given twice", "the answers go to one file")
    check_saves(flags.saves, LINES, inputs)
    path = flags.saves[0] if flags.saves else None
    preset = preset_from(flags, user)
    system = flags.system if flags.system is not None else user.system or ""
    if flags.ray:
        from vtprune.serving.ray_address import check_cluster

        check_cluster(flags.ray)
    requests, notes = _requests(inputs, flags, preset, system)
    with output.importing(flags.quiet):
        from vtprune.models.loading import load
        from vtprune.serving.batch import AnswerLines, BatchSettings, Counts, run_batch, run_id

    generation = generation_from(flags, user, seed=preset.seed)
    settings = BatchSettings(
        lambda each: sampling_from(each, flags),
        generation,
        limits_from(flags),
        flags.batch_size,
        flags.workers,
        flags.in_order,
    )
    loading = loading_from(flags, user)
    # Ray prints on standard output: while it runs, that is another stream.
    write = None if flags.json else partial(output.print_line, stream=sys.stdout)
    with (
        output.libraries_silenced(),
        AnswerLines(path, run_id(_same(loading, flags, generation, preset)), write) as lines,
    ):
        if all(request.key in lines.keys for request in requests):
            counts = Counts(len(requests), before=len(requests))
        else:
            with output.progress_line(flags.quiet) as show:
                if flags.ray:
                    from vtprune.serving.on_ray import run_on_ray

                    everywhere = {**loading, **cache_from(flags)}
                    counts = run_on_ray(flags.ray, everywhere, requests, lines, settings, show)
                else:
                    loaded = load(**loading, **cache_from(flags), on_progress=show)
                    counts = run_batch(loaded, requests, lines, settings, show)
    counts.notes = [*notes, *counts.notes]
    _print(flags, counts, path)


def _requests(
    inputs: Sequence[str], flags: Flags, preset: Preset, system: str
) -> tuple[list[Request], list[str]]:
    """Return the requests, and notes about what was left out.

    Raises:
        VtpruneError: a list that is not alone, no question, or files that are not there.
    """
    from vtprune.inference.tables import is_list
    from vtprune.media.addresses import ADDRESS
    from vtprune.serving.requests import find_files, read_requests, requests_about

    lists = [name for name in inputs if is_list(name)]
    if lists:
        if len(inputs) > 1 or flags.question:
            raise VtpruneError(
                f"{lists[0]} has its own files and questions", "give it alone, without files and -q"
            )
        from vtprune.cli.asking import columns_from
        from vtprune.serving.requests import KEYS

        requests = read_requests(lists[0], preset, system, columns_from(flags, KEYS))
        if flags.ray and any(not isinstance(file, str) for each in requests for file in each.files):
            raise VtpruneError(
                f"{lists[0]} holds its media, and --ray sends paths to its workers",
                "save them as files, or leave --ray out",
            )
        return requests, []
    if not flags.question:
        raise click.UsageError(
            "Missing option '-q', or give a REQUESTS.jsonl.", click.get_current_context()
        )
    if STDIN in inputs:
        raise VtpruneError(
            "batch reads no file from standard input",
            "save it to a file first, or ask about it alone: vtprune ask - QUESTION",
        )
    for name in filter(ADDRESS.match, inputs):
        check_address(name, flags.allow_url)
    files, num_others = find_files(inputs)
    notes = [f"{num_others:,} other files in the folders are left out"] if num_others else []
    questions = [read_question(text) for text in flags.question]
    return requests_about(files, questions, preset, system), notes


def _same(
    loading: object, flags: Flags, generation: Generation, preset: Preset
) -> dict[str, object]:
    """Return what the answers of one file have in common, beside each request's own preset."""
    from vtprune.evaluation.variants import fingerprint

    return {
        "preset": fingerprint(preset),
        "version": __version__,
        "loading": loading,
        "generation": generation,
        "media": [(name, getattr(flags, name)) for name in MEDIA],
    }


def _print(flags: Flags, counts: Counts, path: Path | None) -> None:
    """Print the counts: as JSON, or as lines on standard error."""
    from vtprune.cli.console import printable

    if flags.json:
        click.echo(to_json({**counts.to_dict(), "file": None if path is None else str(path)}))
        return
    if flags.quiet:
        return
    total = counts.answered + counts.failed
    rate = f", {total / counts.seconds:.2f} a second" if total and counts.seconds else ""
    earlier = f", {counts.before:,} before" if counts.before else ""
    click.echo(f"answered  {counts.answered:,} of {counts.requests:,}{earlier}{rate}", err=True)
    if counts.failed:
        click.echo(f"failed    {counts.failed:,}: the lines with an error say why", err=True)
    for note in counts.notes:
        click.echo(f"note      {printable(note)}", err=True)
    if path is not None:
        click.echo(f"written   {printable(str(path))}", err=True)
