"""What a training run needs besides its losses: rates, optimisers, logs, several processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import distributed, nn

from vtprune._dev.training.muon import Muon


def optimisers(groups: list[tuple[nn.Module, float]]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW at half its rate for all else."""
    matrices: list[dict[str, object]] = []
    others: list[dict[str, object]] = []
    for module, rate in groups:
        for name, parameter in module.named_parameters():
            plain = parameter.ndim != 2 or "embed" in name or "head" in name
            rate_here = rate / 2 if plain else rate
            group = {"params": [parameter], "lr": rate_here, "full": rate_here}
            (others if plain else matrices).append(group)
    adam = torch.optim.AdamW(_merge(others), betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(_merge(matrices)), adam]


def _merge(groups: list[dict[str, object]]) -> list[dict[str, object]]:
    """One group a learning rate."""
    merged: dict[object, dict[str, object]] = {}
    for group in groups:
        kept = merged.setdefault(
            group["full"], {"params": [], "lr": group["lr"], "full": group["full"]}
        )
        kept["params"] += group["params"]  # type: ignore[operator]
    return list(merged.values())


def restore(optims: list[torch.optim.Optimizer], saved: list[dict[str, object]]) -> None:
    """Load optimiser states, but keep the learning rates of the present code."""
    for optim, state in zip(optims, saved, strict=True):
        rates = [group["full"] for group in optim.param_groups]
        optim.load_state_dict(state)
        for group, rate in zip(optim.param_groups, rates, strict=True):
            group["full"] = rate


def set_rates(optimisers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["full"] * factor


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up, constant, then linear to 2 % over the last `decay` of the steps."""
    left = (steps - step) / max(steps * decay, 1)
    return min(1.0, (step + 1) / warmup, max(left, 0.02))


def write_atomically(path: Path, state: dict[str, object]) -> None:
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def log(path: Path, **fields: object) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")
    sys.stdout.write(json.dumps(fields) + "\n")


def ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of every process's gradients, in one message.

    A parameter that has a gradient in some processes only, such as that of a head none of whose
    labels came up, counts as zero in the others.
    """
    if ranks()[1] == 1:
        return
    listed = list(parameters)
    has = torch.tensor([p.grad is not None for p in listed], dtype=torch.uint8)
    distributed.all_reduce(has, distributed.ReduceOp.MAX)
    used = [p for p, any_has in zip(listed, has.tolist(), strict=True) if any_has]
    gradients = []
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= ranks()[1]
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
