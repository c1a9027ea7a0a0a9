"""Where a model can be cut, measured on its own states and answers."""

from vtprune.evaluation.calibrate.entropy import (
    Collapse,
    entropy_curve,
    entropy_curves,
    find_collapse,
    matrix_entropy,
)
from vtprune.evaluation.calibrate.horizon import Change, Horizon, find_horizon, relative_change
from vtprune.evaluation.calibrate.measure import Settings, calibrate
from vtprune.evaluation.calibrate.result import Information, Measured

__all__ = [
    "Change",
    "Collapse",
    "Horizon",
    "Information",
    "Measured",
    "Settings",
    "calibrate",
    "entropy_curve",
    "entropy_curves",
    "find_collapse",
    "find_horizon",
    "matrix_entropy",
    "relative_change",
]
