"""The trainer's optimiser: orthogonalised momentum for matrices, AdamW for all else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices to (B, rows, columns), roughly: Newton-Schulz in bfloat16."""
    x = matrices.to(torch.bfloat16)
    wide = x.shape[-1] >= x.shape[-2]
    x = x if wide else x.transpose(-1, -2)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x if wide else x.transpose(-1, -2)


def _orthogonalise_together(matrices: Tensor) -> Tensor:
    """`orthogonalise`, a part of the matrices by each process, in float32."""
    if not distributed.is_initialized():
        return orthogonalise(matrices).float()
    turned = torch.zeros_like(matrices)
    share = slice(distributed.get_rank(), None, distributed.get_world_size())
    if len(matrices[share]):
        turned[share] = orthogonalise(matrices[share]).float()
    distributed.all_reduce(turned)
    return turned


class Muon(Optimizer):
    """Muon (Keller Jordan, 2024), its update scaled to AdamW's, matrices of one shape together.

    Several processes with the same gradients share the matrices: each turns its part of them.

    Args:
        parameters: matrices; each group may have its own `lr`.
        lr: learning rate, of AdamW's size.
        momentum: Nesterov momentum.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.02,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(torch.lerp(parameter.grad, state["momentum"], group["momentum"]))
                turned = _orthogonalise_together(torch.stack(updates))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for parameter, update in zip(parameters, turned, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-scale)
