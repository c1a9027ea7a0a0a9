"""Training by several processes: what they average."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn

from vtprune._dev.training.running import average_gradients


def average(rank: int, folder: str) -> None:
    """One of two processes: the first parameter has a gradient in both, the second in one."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    both, one, none = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    both.grad = torch.full((3,), float(rank))
    if rank == 1:
        one.grad = torch.full((3,), 4.0)
    average_gradients([both, one, none])
    torch.save([both.grad, one.grad, none.grad], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_a_gradient_that_only_one_process_has_counts_as_zero_in_the_other(tmp_path: Path) -> None:
    multiprocessing.spawn(average, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        both, one, none = torch.load(tmp_path / f"{rank}.pt")
        assert both.tolist() == [0.5] * 3
        assert one.tolist() == [2.0] * 3
        assert none is None
