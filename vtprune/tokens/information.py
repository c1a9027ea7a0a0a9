"""The information of frames and tiles: the matrix entropy of the tokens of each."""

from __future__ import annotations

import torch

from vtprune.device import send

SMALLEST_EIGENVALUE = 1e-12


def group_information(states: torch.Tensor, group: torch.Tensor) -> list[float]:
    """Return for every group the number of directions that its tokens spread over, at least 1.

    The exponential of the von Neumann entropy of the group's Gram matrix ("effective rank"): 1
    where all tokens are alike, n where n tokens are unrelated. Rows are centred on the
    mean token of ALL groups and divided by their length, so that a blank frame among others has
    one direction, not noise around its own mean. float32.

    Args:
        states: (N, d).
        group: (N,) int64 group of each token, from 0, none empty.

    Source: the matrix entropy of arXiv 2401.17139; the effective rank of Roy and Vetterli (2007).
    """
    rows = states.float()
    rows = rows - rows.mean(dim=0, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    sizes = torch.bincount(group).tolist()
    order = send(group.argsort(stable=True), states.device)
    information = [0.0] * len(sizes)
    by_size: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        by_size.setdefault(size, []).append(number)
    parts = rows[order].split(sizes)
    for size, numbers in by_size.items():  # groups of one size at once
        stacked = torch.stack([parts[number] for number in numbers])  # (g, n, d)
        wide = stacked.transpose(1, 2)
        gram = stacked @ wide if size <= stacked.shape[2] else wide @ stacked
        values = torch.linalg.eigvalsh(gram.nan_to_num(0.0, 0.0, 0.0) / size)
        values = values.clamp_min(SMALLEST_EIGENVALUE)
        values = values / values.sum(dim=1, keepdim=True)
        spread = (-(values * values.log()).sum(dim=1)).exp().tolist()
        for number, value in zip(numbers, spread, strict=True):
            information[number] = max(1.0, value)
    return information
