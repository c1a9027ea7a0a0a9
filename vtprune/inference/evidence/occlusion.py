"""How much less probable the answer gets where a window of tokens is exchanged for the mean token.

Occlusion as of arXiv 1311.2901, on visual tokens, batched. Windows are single tokens where the
passes suffice, else as small as they allow.
"""

from __future__ import annotations

import torch

from vtprune.inference.evidence.probe import Probe
from vtprune.inference.evidence.windows import Cells, spread


def occlusion(probe: Probe) -> torch.Tensor:
    """Return (N, parts) losses of log-probability."""
    cells = Cells.of(probe.layout)
    probe.check_passes(2, "occlusion")
    windows = cells.fitting(probe.passes.left - 1)
    lost = probe.base() - probe.replaced((~windows).float())
    return spread(windows, lost)
