"""Help texts in sections, for a command with many options."""

from __future__ import annotations

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


class SectionedCommand(click.Command):
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
