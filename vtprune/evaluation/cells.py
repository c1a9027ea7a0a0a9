"""Which cells an evaluation has: every preset and method at every keep, and the baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vtprune.errors import PresetError
from vtprune.evaluation.lineup import DRAWN, UNPRUNED, Entry, Lineup, line_up, unpruned
from vtprune.preset.spec import Preset
from vtprune.pruners import find_profile
from vtprune.tokens.layout import MODALITIES

KEEPS = (0.5, 0.3, 0.1)
SEEDS = 5  # of a random row; fewer say little about it
SECOND = ", asked second"


@dataclass(frozen=True)
class Cell:
    """One way to prune, run over all questions.

    Args:
        key: tells cells apart; the same from run to run as long as the same is cut.
        row: the row of the table that it belongs to: several seeds are one row.
        entry: what is cut.
        beside: the key of the cell whose layers and counts this one has, question by question.
        second: each question is asked as the second of a conversation, on the tokens that the
            first one left.
    """

    key: str
    row: str
    entry: Entry
    beside: str = ""
    second: bool = False


def lay_cells(
    lineup: Lineup, seeds: int = SEEDS, beside: bool = False, turns: bool = False
) -> list[Cell]:
    """The cells of an evaluation, the unpruned one first.

    Args:
        seeds: how many each row with a random choice is run with.
        beside: random and uniform again at the layers and counts of every asked row that cuts
            past the input.
        turns: each question again as a second one, in all rows but those that stand beside others.

    Raises:
        PresetError: fewer than one seed.
    """
    if seeds < 1:
        raise PresetError(f"seeds {seeds} is out of range", f"{SEEDS} or more; 1 is a glance")
    cells = [Cell(UNPRUNED, UNPRUNED, unpruned(lineup.seed))]
    for entry in lineup.entries:
        row = _row(entry)
        key = f"{row} #{fingerprint(entry.preset)}"
        cells += _seeded(Cell(key, row, entry), seeds)
        if not beside or entry.role != "asked":
            continue
        for name in DRAWN:
            own = f"{name} beside {row}"
            stand_in = Entry("baseline", name, Preset(None), entry.keep, entry.at)
            first = _seeded(Cell(key, row, entry), seeds)[0].key
            cells += _seeded(Cell(f"{name} beside {key}", own, stand_in, beside=first), seeds)
    if not turns:
        return cells
    return cells + [
        replace(cell, key=cell.key + SECOND, row=cell.row + SECOND, second=True)
        for cell in cells if not cell.beside
    ]  # fmt: skip


def fingerprint(preset: Preset) -> str:
    """A few digits that change with anything that a preset cuts."""
    stages = [stage for modality in MODALITIES for stage in preset.stages_for(modality)]
    profiles = [find_profile(stage.method) for stage in stages if stage.at == "schedule"]
    own = [(profile.depths, profile.fractions(0.1)) for profile in profiles]
    told = f"{replace(preset, description='')} {own}"
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def _row(entry: Entry) -> str:
    keep = "" if entry.keep is None else f" keep {entry.keep:g}"
    return f"{entry.name} at {entry.at}{keep}"


def _seeded(cell: Cell, seeds: int) -> list[Cell]:
    """The cell once for every seed, where chance has a part in it."""
    if not draws(cell.entry):
        return [cell]
    return [
        replace(
            cell,
            key=f"{cell.key} seed {number}",
            entry=replace(cell.entry, preset=replace(cell.entry.preset, seed=number)),
        )
        for number in range(cell.entry.preset.seed, cell.entry.preset.seed + seeds)
    ]


def draws(entry: Entry) -> bool:
    """Whether chance decides alone what a row keeps: then one seed says little."""
    if entry.method:
        return entry.method == "random"
    preset = entry.preset
    groups = (preset.stages, preset.image.stages, preset.video.stages)
    stages = [stage for group in groups for stage in group or ()]
    return bool(stages) and all(stage.method == "random" for stage in stages)


def cells_of(
    methods: Sequence[str],
    keeps: Sequence[float | str],
    presets: Sequence[str | Path | Mapping[str, object] | Preset],
    *,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
    seeds: int = SEEDS,
    beside: bool = False,
    turns: bool = False,
) -> tuple[Lineup, list[Cell]]:
    """The rows and cells of what was asked for.

    Raises:
        PresetError: every fault of it.
    """
    lineup = line_up(methods, keeps, presets, at, options, seed)
    return lineup, lay_cells(lineup, seeds, beside, turns)
