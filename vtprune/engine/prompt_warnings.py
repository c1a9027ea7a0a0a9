"""What a user is warned of in a prompt: inputs that are missing, positions that a model lacks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from vtprune.engine.present import Present
from vtprune.models.structure import Structure

TYPE_IDS = ("mm_token_type_ids", "token_type_ids")
"""What processors give to tell a model which tokens are visual."""


def warn_of_types(structure: Structure, given: Mapping[str, object]) -> str:
    """Return a warning where the ids are missing that tell a model which tokens are visual.

    Without them transformers (5.17 to 5.24) goes on in silence: generation counts positions as in
    text, and masks see no pictures.

    Args:
        given: the arguments of the multimodal model, by name.

    Returns:
        "" where nothing is missing.
    """
    takes = structure.seams.inner
    name = next((name for name in TYPE_IDS if name in takes), None)
    if name is None or any(given.get(one) is not None for one in TYPE_IDS):
        return ""
    if structure.one_dimensional:
        # Whether another class needs them for its masks is not known.
        lost = "its pictures are masked like text" if structure.family else ""
    else:
        lost = "" if _in_space(given.get("position_ids")) else "its pictures are placed like text"
    if not lost:
        return ""
    return (
        f"{name} is missing: {lost}, and answers are worse, pruned or not; pass what the model's "
        f"processor gives (return_{name}=True)"
    )


def _in_space(positions: object) -> bool:
    """Whether position ids, (3 or 4, B, S), differ in time, row and column."""
    if not isinstance(positions, torch.Tensor) or positions.dim() != 3:
        return False
    time, row, column = positions[-3:]
    return not (torch.equal(time, row) and torch.equal(row, column))


def warn_of_positions(
    structure: Structure, present: Present, past: int, position_ids: object
) -> str:
    """Return a warning where a prompt reaches past the positions that a model was made for.

    Args:
        present: the prompts, after any cut at the input.
        past: columns in the cache before them.
        position_ids: that the decoder is given for them; None: columns, counted from `past`.

    Returns:
        "" where it does not.
    """
    limit = structure.num_positions
    end = past + max(len(row) for row in present.columns)
    if limit is None or (structure.one_dimensional and past + present.whole_length <= limit):
        return ""
    if isinstance(position_ids, torch.Tensor):
        spatial = position_ids[-3:] if position_ids.dim() == 3 else position_ids
        end = int(spatial.amax()) + 1
    if end <= limit:
        return ""
    return (
        f"the prompt has {end:,} positions, and this model was made for {limit:,}: answers may be "
        f"wrong, pruned or not; {_way_out(structure, present, limit - past)}"
    )


def _way_out(structure: Structure, present: Present, room: int) -> str:
    """Say what would fit into `room` positions."""
    if not structure.one_dimensional:
        return "fewer frames, or smaller pictures, fit"
    keep = fitting_keep(
        [len(row) - len(left) for row, left in zip(present.columns, present.layouts, strict=True)],
        [len(layout) for layout in present.whole],
        room,
    )
    if keep <= 0:
        return "the text alone does not fit: give less of it"
    return (
        f"keep {keep:g} or less fits in a stage at the input with positions: renumber, and so do "
        "fewer frames or tiles (other cuts leave positions as they are)"
    )


def fitting_keep(text: Sequence[int], visual: Sequence[int], room: int) -> float:
    """Return the largest keep, of two decimals, with which every sample fits into `room`.

    Args:
        text: tokens of every sample that are not visual.
        visual: its visual tokens before any cut.
    """
    fits = [(room - t) / v for t, v in zip(text, visual, strict=True) if v]
    return math.floor(100 * min(fits, default=0.0)) / 100


def warn_of_choosing_anew(
    methods: Sequence[str], before: torch.Tensor | None, ids: torch.Tensor
) -> str:
    """Return a warning where a method chooses again for a prompt that has grown by its answer.

    Without a cache every step of generation is a prefill of the prompt and the answer so far, in
    which a method that reads the question finds the answer too.

    Args:
        methods: of the stages, that read the question.
        before: (B, S) ids of the last prefill without a cache; None: there was none.
        ids: (B, S + n) of this one.

    Returns:
        "" where this is another prompt.
    """
    if not methods or before is None or len(before) != len(ids):
        return ""
    length = before.shape[1]
    if ids.shape[1] <= length or not torch.equal(ids[:, :length], before):
        return ""
    return (
        f"without a cache (use_cache=False) {' and '.join(methods)} choose at every step anew, by "
        "the question and the answer so far: what is kept changes within the answer; with a cache "
        "the choice for the prompt stays"
    )
