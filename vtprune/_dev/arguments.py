"""The command lines of the project's own tools, by the rules of `vtprune` itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


class Once(argparse.Action):
    """Stores an option's value, and refuses a second one; argparse lets the last one win."""

    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        if self.given:
            parser.error(f"{option_string} is given more than once")
        self.given = option_string is not None
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser, and parsers of its parts, whose options are given once or add up."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        for name in (None, "store"):
            self.register("action", name, Once)
