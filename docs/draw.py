"""Draw the README's picture: `python docs/draw.py FILE.svg MEDIA QUESTION [OPTIONS]`."""

from __future__ import annotations

import io
import os
import subprocess
import sys

from rich.console import Console
from rich.text import Text

WIDTH = 96


def main() -> None:
    """Run `vtprune ask` as in a terminal, and save what it shows."""
    target, *arguments = sys.argv[1:]
    run = subprocess.run(
        [sys.executable, "-m", "vtprune", "ask", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(WIDTH)},
    )
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    words = [f'"{word}"' if " " in word else word for word in arguments]
    console.print(f"$ vtprune ask {' '.join(words)}", highlight=False)
    console.print(Text.from_ansi(run.stdout + run.stderr))
    console.save_svg(target, title="vtprune")


if __name__ == "__main__":
    main()
