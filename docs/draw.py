"""The README's picture: `vtprune ask FILE QUESTION --compare --json | python docs/draw.py FILE`."""

from __future__ import annotations

import io
import json
import sys

from rich.console import Console

from vtprune.cli.console import render


def main() -> None:
    report = json.load(sys.stdin)
    console = Console(
        record=True, width=96, file=io.StringIO(), force_terminal=True, highlight=False
    )
    console.print(f'$ vtprune ask {report["input"]["files"][0]} "{report["question"]}" --compare')
    console.print(report["answer"])
    render(report, console)
    console.save_svg(sys.argv[1], title="vtprune")


if __name__ == "__main__":
    main()
