"""The licences of dependencies, as a table: `python -m vtprune._dev.licences`.

From what is installed here: what the package requires, with its extras, and what those require. The
table between the markers of docs/security.md is made of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

from vtprune._dev import CHECKOUT

PAGE = CHECKOUT / "docs" / "security.md"
BEGIN, END = "<!-- licences -->", "<!-- end of licences -->"
EXTRAS = ("adapters", "data", "decord", "devices", "pdf", "ray", "serve")
COPYLEFT = re.compile(r"\b(A?GPL|LGPL|MPL|EUPL|CDDL|EPL|GNU|Mozilla)", re.IGNORECASE)
OWN = "vtprune"


def dependencies(name: str = OWN, extras: tuple[str, ...] = EXTRAS) -> dict[str, Distribution]:
    """Return what a package requires and is installed, and what that requires."""
    found: dict[str, Distribution] = {}
    waiting = [(name, extras)]
    while waiting:
        wanted, options = waiting.pop()
        for requirement in _required(wanted, options):
            key = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if key in found or key.startswith(("nvidia-", "cuda-")):
                continue
            try:
                found[key] = distribution(requirement.name)
            except PackageNotFoundError:
                continue
            waiting.append((requirement.name, tuple(requirement.extras)))
    return dict(sorted(found.items()))


def _required(name: str, extras: tuple[str, ...]) -> Iterator[Requirement]:
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def licence(package: Distribution) -> str:
    """Return a package's licence as its metadata say it, on one line; "not said" for nothing."""
    data = package.metadata
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in data.get_all("Classifier") or ()
        if text.startswith("License ::")
    ]
    said, named = ("".join(data.get_all(key) or ()) for key in ("License-Expression", "License"))
    first = named.strip().partition("\n")[0]
    return said or ", ".join(classifiers) or first[:60] or "not said"


def table() -> str:
    """Return the licences as a table of Markdown."""
    rows = ["| package | licence, as its metadata say it |", "| --- | --- |"]
    rows += [f"| {name} | {licence(package)} |" for name, package in dependencies().items()]
    return "\n".join(rows)


def main() -> None:
    text = PAGE.read_text("utf-8")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", "utf-8")
    sys.stdout.write(f"{len(dependencies())} packages\n")


if __name__ == "__main__":
    main()
