"""Commands whose help lists options in sections, and that refuse an option given twice."""

from __future__ import annotations

from collections import Counter

import click


class Option(click.Option):
    """An option that is listed under a heading of its own.

    Args:
        section: the heading.
    """

    def __init__(self, *args: object, section: str = "Options", **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.section = section


class Command(click.Command):
    """A command with its options section by section, in order of declaration.

    It refuses an option given twice, unless the option adds up: click itself lets the last value
    win without a word.
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

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                heading = getattr(parameter, "section", "Other")
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class Group(Command, click.Group):
    """A group of such commands, which is one itself."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)
