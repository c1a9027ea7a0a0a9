"""The command line: a command's module is imported when it runs, or when its help is asked for."""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
import threading
from difflib import get_close_matches
from types import FrameType
from typing import cast

import click

from vtprune import __version__
from vtprune.cli.help import Group
from vtprune.cli.startup import process_start
from vtprune.errors import LONGEST, LONGEST_HINT, VtpruneError, brief, brief_path, one_line

COMMANDS: dict[str, tuple[str, str]] = {
    "ask": ("vtprune.cli.ask:ask", "Answer a question about pictures or videos."),
    "show": ("vtprune.cli.show:show", "Draw which visual tokens were kept."),
    "batch": ("vtprune.cli.batch:batch", "Answer many questions about many files."),
    "serve": ("vtprune.cli.serve:serve", "Serve one model to OpenAI-style clients."),
    "explain": ("vtprune.cli.explain:explain", "Show which places carry the answer."),
    "compare": ("vtprune.cli.compare:compare", "Compare methods and presets on one question."),
    "profile": (
        "vtprune.cli.profile:profile",
        "Measure what pruning saves on this machine, without a model's weights.",
    ),
    "calibrate": (
        "vtprune.cli.calibrate:calibrate",
        "Find the layers where a model can be cut, on your own questions.",
    ),
    "evaluate": (
        "vtprune.cli.evaluate:evaluate",
        "Ask many questions with and without pruning: does the answer survive?",
    ),
    "tune": (
        "vtprune.cli.tune:tune",
        "Find the lowest keep that holds on your own questions, and write it as a preset.",
    ),
    "reproduce": (
        "vtprune.cli.reproduce:reproduce",
        "Run a published table, and put its figures beside those that come out here.",
    ),
    "check": (
        "vtprune.cli.check:check",
        "Prove on this machine that a pruned model equals the masked one.",
    ),
    "presets": ("vtprune.cli.presets:presets", "List, show and check presets."),
    "models": (
        "vtprune.cli.models:models",
        "List the models with a short name, or show one of them.",
    ),
    "methods": ("vtprune.cli.methods:methods", "List the pruning methods, or explain one of them."),
    "demo": ("vtprune.cli.demo:demo", "Write sample clips, pictures and questions to DIR."),
}
"""Name -> where the command lives, and the line about it in the group's help."""

INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT and SIGTERM, as a shell reports them

EPILOG = """\b
Examples:
  vtprune demo samples
  vtprune ask samples/clip-000.mp4 "what happens?" --keep 0.3
  vtprune ask page.png "what is the total?" --model qwen2.5-vl-7b --compare
  vtprune compare samples/clip-000.mp4 "what happens?" --methods entropy
  vtprune profile --model llava-next

\b
Shell completion (bash; zsh and fish likewise):
  eval "$(_VTPRUNE_COMPLETE=bash_source vtprune)"
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM: work stops as at Ctrl-C, with nothing left half-written."""


class LazyGroup(Group):
    """Commands by name; an error in one of them is printed as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        return cast("click.Command", getattr(importlib.import_module(module), name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = get_close_matches(args[0], COMMANDS, n=1)
            also = f" Did you mean {close[0]}?" if close else ""
            raise click.UsageError(f"No such command {brief(args[0])!r}.{also}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.ClickException as error:
            _shorten(error)
            raise

    def invoke(self, ctx: click.Context) -> object:
        try:
            _check_directory()
            return super().invoke(ctx)
        except click.ClickException as error:
            _shorten(error)
            raise
        except (click.Abort, click.exceptions.Exit):
            raise
        except VtpruneError as error:
            if ctx.params.get("traceback") and error.__cause__ is not None:
                raise
            _say(error)
            ctx.exit(1)
        except KeyboardInterrupt as stopped:
            click.echo(err=True)  # ends the line with the terminal's ^C
            terminated = isinstance(stopped, Terminated)
            for note in getattr(stopped, "__notes__", ["stopped: nothing is kept"] * terminated):
                click.echo(one_line(note, LONGEST), err=True)
            ctx.exit(TERMINATED if terminated else INTERRUPTED)
        except BrokenPipeError:
            raise  # the reader has gone; click ends silently with exit code 1
        except OSError as error:
            _say(_explain(error))
            ctx.exit(1)
        except MemoryError:
            hint = "give smaller media, fewer frames (--frames 8) or --max-tiles 4"
            _say(VtpruneError("out of memory", hint))
            ctx.exit(1)
        except Exception as error:
            if ctx.params.get("traceback"):
                raise
            hint = "this is a bug; please report it with what `vtprune --traceback ...` prints"
            _say(VtpruneError(f"internal: {type(error).__name__}: {error}", hint))
            ctx.exit(1)


def _check_directory() -> None:
    """Refuse a current directory that was removed, in which torch's libraries abort.

    Raises:
        VtpruneError: with the way out.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise VtpruneError(
            "the current directory was removed, and torch can't be loaded without one",
            "change to another directory first: cd ~",
        ) from error


def _explain(error: OSError) -> VtpruneError:
    """Return the error for what the system refused, wherever it did."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        hint = "check the path, its permissions and the disk"
        return VtpruneError(f"{brief_path(error.filename)}: {reason}", hint)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return VtpruneError(f"can't write: {reason}", "make room, or send the output elsewhere")
    return VtpruneError(
        f"the system refused to read or write: {reason}", "check files, permissions and disk"
    )


def _shorten(error: click.ClickException) -> None:
    """Cut click's own message, which holds what was typed, so that it fits beside the usage."""
    vars(error)["message"] = one_line(error.message, LONGEST - LONGEST_HINT)  # final, says click


def _say(error: VtpruneError) -> None:
    for label, text in (("Error", error.message), ("hint", error.hint)):
        if text:
            click.echo(f"{label}: {' '.join(text.split())}", err=True)


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="vtprune %(version)s")
@click.option("--traceback", is_flag=True, help="Show the traceback of an error.")
def cli(traceback: bool) -> None:
    """Ask multimodal LLMs about pictures and videos with fewer visual tokens.

    Prunes the visual tokens of stock transformers models at inference, without retraining, and
    reports what was kept, what it cost and how long it took.
    """


def main() -> None:
    """Run the command line on this process's arguments, and end the process."""
    began = process_start()
    _open_closed_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what can't be shown or read is a "?"
    cli(prog_name="vtprune", obj=began)


def _terminate(number: int, frame: FrameType | None) -> None:
    """End at the first SIGTERM like at Ctrl-C, at a second one at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


def _open_closed_streams() -> None:
    """Give standard streams that the caller closed to the null device.

    A file opened later would get their numbers, and what a library writes to them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
            if name == "stdout":
                _say(VtpruneError("standard output is closed", "vtprune ... > answer.txt"))
                sys.exit(1)
