"""The command line: a command's module is imported when it runs, or when its help is asked for."""

from __future__ import annotations

import importlib
import io
import sys
from typing import cast

import click

from vtprune import __version__
from vtprune.errors import VtpruneError

COMMANDS: dict[str, tuple[str, str]] = {
    "ask": ("vtprune.cli.ask:ask", "Answer a question about pictures or videos."),
    "compare": ("vtprune.cli.compare:compare", "Compare methods and presets on one question."),
    "profile": (
        "vtprune.cli.profile:profile",
        "Tell what pruning saves on this machine, without a model's weights.",
    ),
    "calibrate": (
        "vtprune.cli.calibrate:calibrate",
        "Find the layers where a model can be cut, on questions of yours.",
    ),
    "evaluate": (
        "vtprune.cli.evaluate:evaluate",
        "Ask many questions with and without pruning: does the answer survive?",
    ),
    "tune": (
        "vtprune.cli.tune:tune",
        "Find the lowest keep that your own questions bear, and write it as a preset.",
    ),
    "check": (
        "vtprune.cli.check:check",
        "Prove on this machine that a pruned model equals the masked one.",
    ),
    "presets": ("vtprune.cli.presets:presets", "List, show and check presets."),
    "models": (
        "vtprune.cli.models:models",
        "List the models with a short name, and where they can be cut.",
    ),
    "methods": ("vtprune.cli.methods:methods", "List the pruning methods and their options."),
    "demo": ("vtprune.cli.demo:demo", "Write sample clips, pictures and questions to DIR."),
}
"""Name -> where the command lives, and the line about it in the group's help."""

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

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


class LazyGroup(click.Group):
    """Commands by name, and one line for whatever goes wrong in them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        return cast("click.Command", getattr(importlib.import_module(module), name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except VtpruneError as error:
            _say(error.message, error.hint)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo(err=True)  # ends the line with the terminal's ^C
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            raise  # the reader has gone; click ends silently with exit code 1
        except MemoryError:
            _say("out of memory", "give smaller media, fewer frames (--frames 8) or --max-tiles 4")
            ctx.exit(1)
        except Exception as error:
            if ctx.params.get("traceback"):
                raise
            _say(
                f"internal: {type(error).__name__}: {error}",
                "this is a bug; please report it with what `vtprune --traceback ...` prints",
            )
            ctx.exit(1)


def _say(message: str, hint: str) -> None:
    for label, text in (("Error", message), ("hint", hint)):
        if text:
            click.echo(f"{label}: {click.unstyle(' '.join(text.split()))}", err=True)


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="vtprune %(version)s")
@click.option("--traceback", is_flag=True, help="Show the traceback of an internal error.")
def cli(traceback: bool) -> None:
    """Ask multimodal LLMs about pictures and videos with fewer visual tokens.

    Prunes the visual tokens of stock transformers models at inference, without retraining, and
    reports what was kept, what it cost and how long it took.
    """


def main() -> None:
    """Runs the command line on this process's arguments, and ends the process."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what can't be shown or read is a "?"
    cli(prog_name="vtprune")
