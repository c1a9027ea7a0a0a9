"""Options in sections of the help, and the rule for an option that is given twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import click

F = TypeVar("F", bound=Callable[..., object])


class Option(click.Option):
    """An option that is listed under a heading of its own.

    Args:
        section: the heading.
    """

    def __init__(self, *args: object, section: str = "Options", **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.section = section


def section(heading: str) -> Callable[..., Callable[[F], F]]:
    """`click.option` for options that are listed under a heading."""
    return partial(click.option, cls=Option, section=heading)


def comma_list(*names: str, **settings: object) -> Callable[..., Callable[[F], F]]:
    """An option whose values are separated by commas; given again, it adds to them."""
    return partial(click.option, *names, multiple=True, callback=_split, **settings)  # type: ignore[arg-type]


def _split(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(","))


class Command(click.Command):
    """A command that refuses an option given twice, unless the option adds up.

    Click itself lets the last value win without a word.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given: list[click.Parameter] = []
        if not ctx.resilient_parsing and (args or not self.no_args_is_help):
            given = self.make_parser(ctx).parse_args(list(args))[2]
        if any(option.is_eager for option in given):
            given = []  # --help and --version answer whatever else is there
        for option, times in Counter(given).items():
            if isinstance(option, click.Option) and times > 1 and not option.multiple:
                raise click.UsageError(
                    f"Option '{option.opts[0]}' is given {times} times; give it once.", ctx
                )
        return super().parse_args(ctx, args)


class Group(Command, click.Group):
    """A group of such commands, which is one itself."""

    command_class = Command


class SectionedCommand(Command):
    """A command whose help lists its options section by section, in order of declaration."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                section = getattr(parameter, "section", "Other")
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)
