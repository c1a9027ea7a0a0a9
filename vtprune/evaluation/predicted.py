"""How the predictions of the unpruned answer's tokens change under pruning."""

from __future__ import annotations

import torch
from torch.nn import functional as F

FIRST = 8  # answer tokens whose predictions are compared


def loss_and_divergence(
    logits: torch.Tensor, base: torch.Tensor, answer: torch.Tensor
) -> tuple[float, float]:
    """Minus the tokens' mean log-probability, and the first tokens' mean KL divergence.

    Args:
        logits, base: (m, V) predictions of the answer's m tokens, pruned and unpruned.
        answer: (m,) int64.
    """
    likely = logits.float().log_softmax(-1)
    taken = likely.gather(1, answer.to(likely.device)[:, None]).mean()
    before = base[:FIRST].float().log_softmax(-1)
    gap = F.kl_div(likely[:FIRST], before, log_target=True, reduction="batchmean")
    return -float(taken), max(float(gap), 0.0)
