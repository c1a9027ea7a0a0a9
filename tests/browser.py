"""Pages in headless Chromium: their pixels, and whether they fit a phone."""

from __future__ import annotations

import html
import subprocess
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

CHROMIUM = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--virtual-time-budget=3000")  # fmt: skip


def screenshot(page: Path, shot: Path) -> Mapping[tuple[int, int, int], int]:
    """The colours of a page, each with its number of pixels."""
    run("--window-size=800,900", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as image:
        counts = image.convert("RGB").getcolors(1_000_000) or []
    return {colour: count for count, colour in counts if isinstance(colour, tuple)}


def width_on_a_phone(page: Path, width: int = 390) -> int:
    """The pixels that a page takes in a window of a width."""
    text = page.read_text(encoding="utf-8")
    size = "document.documentElement.scrollWidth"
    ask = f"<script>onload = () => parent.postMessage({size}, '*')</script></body>"
    inner, outer = page.with_name("inner.html"), page.with_name("outer.html")
    inner.write_text(text.replace("</body>", ask), encoding="utf-8")
    source = html.escape(inner.as_uri())
    outer.write_text(
        f'<iframe src="{source}" width={width} height=800 frameborder=0></iframe>'
        "<script>onmessage = (event) => document.body.append('width ' + event.data)</script>"
    )
    seen = run("--dump-dom", outer.as_uri())
    return int(seen.rpartition("width ")[2].split("<")[0])


def run(*args: str) -> str:
    """What Chromium prints."""
    done = subprocess.run([*CHROMIUM, *args], check=True, capture_output=True, timeout=60)
    return done.stdout.decode()
