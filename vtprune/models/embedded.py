"""The embedded model: where its weights are."""

from __future__ import annotations

from pathlib import Path


def weights_path() -> Path:
    """Return the packaged checkpoint's folder, for `from_pretrained`."""
    return Path(__file__).parents[1] / "demo" / "weights"
