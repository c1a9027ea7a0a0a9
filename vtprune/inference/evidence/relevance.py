"""The answer's attention to each token, weighted by the slope of the answer's probability there.

Attention says where the answer looks, and spends much on tokens that say nothing; the slope says
what it would miss. A token has what both give it. Three passes a part, as gradient takes; the
attention costs none.

Attention weighted by gradients is an idea of arXiv 2103.15679. Differs: the slope is by the visual
token at the model's input (see gradient), not by the attention weight, so that one gradient does.
"""

from __future__ import annotations

import torch

from vtprune.inference.evidence.gradient import gradient
from vtprune.inference.evidence.probe import Probe


def relevance(probe: Probe) -> torch.Tensor:
    """Return (N, parts) products."""
    assert probe.attention is not None
    return probe.attention * gradient(probe)
