"""How much less probable the answer gets where a window of tokens is exchanged for the mean token.

Occlusion as of arXiv 1311.2901, on visual tokens, batched, of a video over time first. Windows
are larger, and do not overlap, where the passes ask for it.
"""

from __future__ import annotations

import torch

from vtprune.inference.evidence.probe import Probe
from vtprune.inference.evidence.windows import Cells, over_time_first


def occlusion(probe: Probe) -> torch.Tensor:
    """Return (N, parts) losses of log-probability."""
    probe.check_passes(2, "occlusion")
    base = probe.base()

    def lost(windows: torch.Tensor) -> torch.Tensor:
        probe.passes.expect(len(windows))
        return base - probe.replaced((~windows).float())

    return over_time_first(Cells.of(probe.layout), lost, probe.passes.left, probe.settings)
