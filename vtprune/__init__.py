"""Visual token pruning for multimodal LLMs on stock transformers, without retraining."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.engine import pruning
    from vtprune.engine.trace import Trace
    from vtprune.evaluation.compare import compare_methods
    from vtprune.evaluation.comparison import Comparison
    from vtprune.evaluation.profiling.profile import profile
    from vtprune.inference.report import Report
    from vtprune.inference.run import answer
    from vtprune.preset import Preset, load_preset

__version__ = "0.1.0"

# Found on first use, so that `import vtprune` and the command line start without torch.
_LAZY = {
    "Comparison": "vtprune.evaluation.comparison",
    "Preset": "vtprune.preset",
    "Report": "vtprune.inference.report",
    "Trace": "vtprune.engine.trace",
    "answer": "vtprune.inference.run",
    "compare_methods": "vtprune.evaluation.compare",
    "load_preset": "vtprune.preset",
    "profile": "vtprune.evaluation.profiling.profile",
    "pruning": "vtprune.engine",
}

__all__ = [
    "Comparison",
    "Preset",
    "Report",
    "Trace",
    "VtpruneError",
    "answer",
    "compare_methods",
    "load_preset",
    "profile",
    "pruning",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'vtprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
