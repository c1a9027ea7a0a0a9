"""How probable the answer is from a window of tokens alone, above what it is without any.

Token information: what the text can read from these tokens and no others, at the model's input or
from a layer on, in which they have seen each other. At the input the other tokens are left out of
the sequence, so that a pass is as short as text and window.
"""

from __future__ import annotations

import torch

from vtprune.inference.evidence.probe import Probe
from vtprune.inference.evidence.windows import Cells, over_time_first


def information(probe: Probe) -> torch.Tensor:
    """Return (N, parts) probabilities, of a video over time first."""
    probe.check_passes(2, "information")
    none = probe.alone(torch.zeros(1, len(probe), dtype=torch.bool)).exp()

    def gained(windows: torch.Tensor) -> torch.Tensor:
        probe.passes.expect(len(windows))
        return probe.alone(windows).exp() - none

    return over_time_first(Cells.of(probe.layout), gained, probe.passes.left, probe.settings)
