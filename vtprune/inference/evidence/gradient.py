"""The slope of the answer's log-probability where each token is exchanged for the mean token.

The slope is taken with all tokens most of the way to their mean: where all are there, an answer
that is sure hardly moves. Three passes a part: a forward, and a gradient that costs two. The map is
what each token adds; where it takes away, it has nothing.

Differs from plain gradient maps (arXiv 1312.6034) in where it is taken; the direction is that of
occlusion by the mean token.
"""

from __future__ import annotations

import torch

from vtprune.inference.evidence.probe import BACKWARD, Probe

POINTS = (0.3,)
"""Shares of the tokens themselves at which the slope is taken."""


def gradient(probe: Probe) -> torch.Tensor:
    """Return (N, parts) slopes."""
    passes = len(probe.parts) * (1 + BACKWARD) * len(POINTS)
    probe.check_passes(passes, "gradient")
    probe.passes.expect(passes)
    weights = torch.tensor(POINTS)[:, None].expand(-1, len(probe)) * probe.present
    slopes = [probe.gradient(weights, part)[1].mean(0) for part in range(len(probe.parts))]
    return torch.stack(slopes, dim=1).clamp_min(0)
