"""The project's own tools: benchmarks, training, a fuzz. They run in a checkout only."""

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
if not (CHECKOUT / "pyproject.toml").is_file():  # of the tools, the wheel has this file alone
    raise ImportError(
        f"{__name__} runs in a checkout of the project only, and {CHECKOUT} is none: "
        "clone the repository, and run this command there",
        name=__name__,  # so that `python -m` prints one line, not a traceback
    )
