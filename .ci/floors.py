"""Write the lowest version of every dependency that pyproject.toml allows, as pip requirements.

torch keeps the version of constraints.txt: an older one for a CPU alone is on no package index.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("dev", "decord", "data", "ray")  # linters are pinned; the others want a newer numpy
PINNED = "torch"


def main() -> None:
    """Print the requirements."""
    sys.stdout.write("\n".join(floors()) + "\n")


def floors() -> list[str]:
    """Return one `name==version` for every dependency, those of most extras too.

    Raises:
        ValueError: a dependency without a lower bound.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = list(project["dependencies"])
    for name, own in extras.items():
        lines += [] if name in LEFT_OUT else own
    lowest = {}
    for requirement in map(Requirement, lines):
        own = requirement.name == project["name"]  # an extra that takes in another one
        if own or (requirement.marker and not requirement.marker.evaluate()):
            continue
        bounds = [one.version for one in requirement.specifier if one.operator in (">=", "==")]
        if len(bounds) != 1:
            raise ValueError(f"{requirement} says no lower bound")
        lowest[requirement.name] = bounds[0]
    return [f"{name}=={lowest[name]}" for name in sorted(lowest) if name != PINNED] + [pinned()]


def pinned() -> str:
    """Return the line of torch in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{PINNED}=="))


if __name__ == "__main__":
    main()
