"""What a tuning tries and asks: candidates, and which files are searched on and which held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import PresetError, VtpruneError
from vtprune.evaluation.tuning.bound import fewest_files, highest_floor
from vtprune.evaluation.tuning.result import Part
from vtprune.evaluation.variants import VariantList, list_variants
from vtprune.inference.questions_file import mixed_labels
from vtprune.inference.wording import counted
from vtprune.preset import load_preset, override, preset_names

if TYPE_CHECKING:
    from vtprune.inference.questions_file import Asked
    from vtprune.preset.spec import Preset

KEEPS = (0.7, 0.5, 0.4, 0.3, 0.2, 0.1)
FLOOR = 0.98
SEARCH = 3  # one file in so many is searched on; the others are held out
WITHOUT = "random"  # the baseline that is no candidate by itself: one draw of it says little


@dataclass(frozen=True)
class Plan:
    """What is asked and tried.

    Args:
        asked: the questions, those that are searched on first.
        searched: how many those are.
        lineup: the candidates.
        floor: the share of the unpruned quality that has to be kept.
        labelled: whether accuracy counts; else agreement with the unpruned model.
        seed: of the split, and of all random choices.
    """

    asked: tuple[Asked, ...]
    searched: int
    lineup: VariantList
    floor: float
    labelled: bool
    seed: int = 0
    notes: tuple[str, ...] = ()

    def part(self, held_out: bool) -> tuple[Asked, ...]:
        return self.asked[self.searched :] if held_out else self.asked[: self.searched]

    def size(self, held_out: bool) -> Part:
        part = self.part(held_out)
        return Part(len(part), len({one.file for one in part}))


def plan(
    asked: Sequence[Asked],
    floor: float = FLOOR,
    keeps: Sequence[float | str] = KEEPS,
    presets: Sequence[str | Path | Mapping[str, object] | Preset] = (),
    methods: Sequence[str] = (),
    seed: int = 0,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
) -> Plan:
    """What a tuning will ask and try.

    Candidates are the presets and methods at every keep, and the baselines uniform and downsample.

    Args:
        presets, methods: neither: all packaged presets that a keep can be given to.
        at: where all methods cut; None: each at its own place.
        options: of every method that has such an option.

    Raises:
        VtpruneError: a candidate that can't be, a floor out of range, or too few files to show it.
    """
    if not 0 < floor < 1:
        raise VtpruneError(
            f"--floor {floor:g} is out of range",
            "above 0, below 1: 0.98 keeps 98 % of the unpruned quality; no number of questions "
            "can show that nothing is lost",
        )
    chosen = list(presets) if presets or methods else _packaged()
    lineup = list_variants(methods, keeps, chosen, at, options, seed)
    variants = [one for one in lineup.variants if one.role == "asked" or one.method != WITHOUT]
    search, held = split(asked, seed)
    _check_files({one.file for one in asked}, {one.file for one in held}, floor)
    return Plan(
        asked=(*search, *held),
        searched=len(search),
        lineup=replace(lineup, variants=tuple(variants)),
        floor=floor,
        labelled=all(one.answer is not None for one in asked),
        seed=seed,
        notes=(*lineup.notes, *mixed_labels(asked)),
    )


def split(asked: Sequence[Asked], seed: int = 0) -> tuple[list[Asked], list[Asked]]:
    """The questions that are searched on, about a third of the files, and those held out.

    Which file is where follows from its name and the seed, in an order that no one chose.
    """

    def place(file: Path) -> tuple[str, str]:
        return hashlib.sha256(f"{seed} {file.name}".encode(errors="replace")).hexdigest(), str(file)

    files = sorted({one.file for one in asked}, key=place)
    first = set(files[SEARCH - 1 :: SEARCH])
    return ([one for one in asked if one.file in first],
            [one for one in asked if one.file not in first])  # fmt: skip


def _check_files(files: set[Path], held: set[Path], floor: float) -> None:
    """Refuses a claim that so few files can't carry, whatever the answers."""
    wanted = fewest_files(floor)
    if len(files) >= SEARCH and len(held) >= wanted:
        return
    whole = max(SEARCH, wanted + 1)
    while whole - whole // SEARCH < wanted:
        whole += 1
    best = int(1000 * highest_floor(len(held))) / 1000
    lower = f"; or --floor {best:g}, the most that these can show" if len(files) >= SEARCH else ""
    raise VtpruneError(
        f"{counted(len(files), 'file')} can't show --floor {floor:g}: {len(held)} of them are held "
        f"out, and even if those lose nothing, {wanted} are the fewest that show it with 95 % "
        "confidence",
        f"ask about {whole} files or more, since questions about one file are not independent"
        f"{lower}",
    )


def _packaged() -> list[str]:
    """The packaged presets that a keep can be given to."""
    found = []
    for name in preset_names():
        try:
            override(load_preset(name), 0.5)
        except PresetError:
            continue
        found.append(name)
    return found
