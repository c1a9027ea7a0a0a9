"""What to warn of before a prompt is prefilled: positions it has no room for, inputs it lacks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from vtprune.cuts import Batch
from vtprune.models.structure import Structure
from vtprune.spec import Preset

AXES = "mm_token_type_ids"  # which columns have a time, a row and a column of their own


def prompt_warnings(
    structure: Structure, preset: Preset, given: Mapping[str, object], batch: Batch
) -> Iterator[str]:
    """Yield what a user should know of a prompt before its answer.

    Args:
        given: the arguments of the multimodal model.
        batch: its prompts, with the cuts that are planned.
    """
    positions = given.get("position_ids")
    placed = isinstance(positions, torch.Tensor) and positions.dim() == 3
    if not structure.one_dimensional and given.get(AXES) is None and _as_text(positions):
        yield (
            f"the inputs have no {AXES}: transformers then gives pictures and videos the positions "
            "of text; pass on everything that the processor returns"
        )
    readers = preset.readers()
    if readers and given.get("use_cache") is False:
        yield (
            f"use_cache=False: every new token is a prefill of its own, so {' and '.join(readers)} "
            "chooses anew for each, by the answer so far too"
        )
    yield from _positions(structure, positions if placed else None, batch)


def _as_text(positions: object) -> bool:
    """Return whether no token has a row that is not its column, as no picture's tokens do."""
    if not isinstance(positions, torch.Tensor) or positions.dim() < 3:
        return True
    return torch.equal(positions[-1], positions[-2])


def _positions(structure: Structure, positions: object, batch: Batch) -> Iterator[str]:
    most = int(getattr(structure.decoder_config, "max_position_embeddings", 0) or 0)
    lengths = batch.valid.sum(1).tolist()
    if not most or batch.past + max(lengths) <= most:
        return
    if isinstance(positions, torch.Tensor):
        last = int(positions.max()) + 1  # a wait for the device, of prompts that are so long alone
        if last > most:
            yield (
                f"the prompt reaches position {last:,}, and the model has {most:,}: answers may be "
                "wrong; give fewer frames or smaller pictures"
            )
        return
    first = [step for step in batch.cuts.by_layer.get(0, ()) if step.stage.positions == "renumber"]
    for number, (length, layout) in enumerate(zip(lengths, batch.layouts, strict=True)):
        visual, room = len(layout), most - batch.past - (length - len(layout))
        cuts = [step.cuts[number] for step in first]
        gone = sum(len(layout.of_modality(step.group.modality)) - cut.count
                   for step, cut in zip(first, cuts, strict=True) if cut is not None)  # fmt: skip
        if visual - gone <= room:
            continue
        what = f"the prompt has {batch.past + length:,} tokens, and the model {most:,} positions"
        if room < 1:
            yield f"{what}, fewer than its text alone takes: answers may be wrong"
        else:
            fits = math.floor(1000 * room / visual) / 1000  # down: up, it would not fit
            yield (
                f"{what}: answers may be wrong, since kept tokens keep their positions; a cut at "
                f"the input with positions: renumber that keeps {fits:g} of its "
                f"{visual:,} visual tokens fits"
            )
        return
