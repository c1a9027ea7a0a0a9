"""Cards by their data sheets: peak FLOP/s by dtype, memory and its bandwidth. Without torch."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from vtprune.errors import ModelError, brief

NOISE = re.compile(r"nvidia|geforce|tesla|instinct|radeon|amd\b|generation|gpu|[^a-z0-9]")
FORM = re.compile(r"sxm[2-6]")
BY_CAPACITY = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Gpu:
    """A card by its data sheet.

    Args:
        name: with its maker's.
        memory: bytes.
        bandwidth: bytes a second of its memory.
        peak: dtype -> FLOP/s of dense matrix products.
        source: pages that have the figures of its data sheet.
    """

    name: str
    memory: int
    bandwidth: float
    peak: Mapping[str, float]
    source: str

    def peak_of(self, dtype: str) -> float:
        """Return the peak FLOP/s of a dtype.

        Raises:
            ModelError: its data sheet has none.
        """
        if dtype not in self.peak:
            raise ModelError(
                f"{self.name}: its data sheet has no peak of {dtype}",
                f"--dtype {' or '.join(name for name in BY_CAPACITY[1:] if name in self.peak)}",
            )
        return self.peak[dtype]


def gpu_names() -> list[str]:
    """Return the names of all cards."""
    return list(_packaged())


def find_gpu(name: str) -> Gpu:
    """Return the card for a name, in any case, with or without its maker.

    Raises:
        ModelError: no such card, or several; with the nearest names.
    """
    packaged = _packaged()
    keys = {
        _key(spelt): title
        for title, entry in packaged.items()
        for spelt in (title, *entry.get("also", ()))
    }
    wanted = _key(name)
    chosen = keys.get(wanted)
    if chosen is None:
        parts = set(name.lower().replace("-", " ").split()) - {"nvidia", "amd"}
        titles = [title for title in packaged if parts <= set(title.lower().split())]
        if len(titles) > 1:
            raise ModelError(f"--gpu {brief(name)} is several cards", f"one of {_list(titles)}")
        if not titles:
            close = [keys[key] for key in difflib.get_close_matches(wanted, keys, n=6, cutoff=0.5)]
            nearest = list(dict.fromkeys(close))[:4]
            raise ModelError(
                f"--gpu {brief(name)}: there is no data sheet of such a card",
                f"did you mean {_list(nearest)}?" if nearest else f"one of {_list(gpu_names())}",
            )
        chosen = titles[0]
    entry = packaged[chosen]
    return Gpu(
        name=f"{entry['maker']} {chosen}",
        memory=int(entry["memory"] * 1e9),
        bandwidth=entry["bandwidth"] * 1e9,
        peak={dtype: peak * 1e12 for dtype, peak in entry["peak"].items()},
        source=entry["source"],
    )


@functools.cache
def _packaged() -> dict[str, dict[str, Any]]:
    text = resources.files("vtprune").joinpath("_data/gpus.yaml").read_text(encoding="utf-8")
    gpus: dict[str, dict[str, Any]] = yaml.safe_load(text)["gpus"]
    return gpus


def _key(name: str) -> str:
    """Return a name without case, makers and blanks."""
    return NOISE.sub("", FORM.sub("sxm", name.lower()))


def _list(names: list[str]) -> str:
    return ", ".join(names)
