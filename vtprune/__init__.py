"""Visual token pruning for multimodal LLMs on stock transformers, without retraining.

import vtprune

report = vtprune.ask(None, "clip.mp4", "what moves?", keep=0.3)
print(report.answer, report.tokens.kept_after)

with vtprune.pruning(model, preset="balanced", keep=0.3) as trace:
    output = model.generate(**inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vtprune.errors import DamagedError, MediaError, ModelError, PresetError, VtpruneError

if TYPE_CHECKING:
    from vtprune.engine import pruning
    from vtprune.engine.inputs import PreparedInputs
    from vtprune.engine.trace import StageRecord, Trace
    from vtprune.evaluation.calibration.result import CalibrationResult
    from vtprune.evaluation.captions.result import CaptionTest
    from vtprune.evaluation.compare import compare_methods
    from vtprune.evaluation.comparison import Comparison, ComparisonRow
    from vtprune.evaluation.evaluate import Evaluation
    from vtprune.evaluation.library import (
        calibrate,
        evaluate,
        evaluate_captions,
        evaluate_needles,
        reproduce,
        tune,
    )
    from vtprune.evaluation.needles.planting import NeedlePlan
    from vtprune.evaluation.needles.result import NeedleTest
    from vtprune.evaluation.profiling.profile import ProfileOptions, profile
    from vtprune.evaluation.profiling.result import Profile
    from vtprune.evaluation.reproduction.reproduce import Reproduction
    from vtprune.evaluation.tuning_result import Tuning
    from vtprune.inference.evidence.explain import explain
    from vtprune.inference.evidence.explanation import Explanation
    from vtprune.inference.generate import Generation
    from vtprune.inference.library import answer, ask
    from vtprune.inference.report import (
        CompareResult,
        CompareSeconds,
        CompileInfo,
        FailedReport,
        Flops,
        InputInfo,
        KvCacheBytes,
        MemoryBytes,
        ModalitySettings,
        ModelInfo,
        Report,
        ResolvedPreset,
        ResolvedStage,
        Seconds,
        StageCount,
        TokenCounts,
        Versions,
    )
    from vtprune.inference.streaming import AnswerStream, stream
    from vtprune.media import Clip, Limits
    from vtprune.models.base import Sampling
    from vtprune.models.compiling import compile_model
    from vtprune.models.loading import Loaded, load
    from vtprune.pictures.drawing import Drawing, draw
    from vtprune.preset import Preset, load_preset
    from vtprune.preset.calibration import Calibration
    from vtprune.pruners import register_method, unregister_method
    from vtprune.pruners.base import Budget, Selection, VisualTokens

__version__ = "0.1.0"

_REPORT = "vtprune.inference.report"

# Found on first use, so that `import vtprune` and the command line start without torch.
_LAZY = {
    "AnswerStream": "vtprune.inference.streaming",
    "Budget": "vtprune.pruners.base",
    "Calibration": "vtprune.preset.calibration",
    "CalibrationResult": "vtprune.evaluation.calibration.result",
    "CaptionTest": "vtprune.evaluation.captions.result",
    "Clip": "vtprune.media",
    "CompareResult": _REPORT,
    "CompareSeconds": _REPORT,
    "Comparison": "vtprune.evaluation.comparison",
    "ComparisonRow": "vtprune.evaluation.comparison",
    "CompileInfo": _REPORT,
    "Drawing": "vtprune.pictures.drawing",
    "Evaluation": "vtprune.evaluation.evaluate",
    "Explanation": "vtprune.inference.evidence.explanation",
    "FailedReport": _REPORT,
    "Flops": _REPORT,
    "Generation": "vtprune.inference.generate",
    "InputInfo": _REPORT,
    "KvCacheBytes": _REPORT,
    "Limits": "vtprune.media",
    "Loaded": "vtprune.models.loading",
    "MemoryBytes": _REPORT,
    "ModalitySettings": _REPORT,
    "ModelInfo": _REPORT,
    "NeedlePlan": "vtprune.evaluation.needles.planting",
    "NeedleTest": "vtprune.evaluation.needles.result",
    "PreparedInputs": "vtprune.engine.inputs",
    "Preset": "vtprune.preset",
    "Profile": "vtprune.evaluation.profiling.result",
    "ProfileOptions": "vtprune.evaluation.profiling.profile",
    "Report": _REPORT,
    "Reproduction": "vtprune.evaluation.reproduction.reproduce",
    "ResolvedPreset": _REPORT,
    "ResolvedStage": _REPORT,
    "Sampling": "vtprune.models.base",
    "Seconds": _REPORT,
    "Selection": "vtprune.pruners.base",
    "StageCount": _REPORT,
    "StageRecord": "vtprune.engine.trace",
    "TokenCounts": _REPORT,
    "Trace": "vtprune.engine.trace",
    "Tuning": "vtprune.evaluation.tuning_result",
    "Versions": _REPORT,
    "VisualTokens": "vtprune.pruners.base",
    "answer": "vtprune.inference.library",
    "ask": "vtprune.inference.library",
    "calibrate": "vtprune.evaluation.library",
    "compare_methods": "vtprune.evaluation.compare",
    "compile_model": "vtprune.models.compiling",
    "draw": "vtprune.pictures.drawing",
    "evaluate": "vtprune.evaluation.library",
    "evaluate_captions": "vtprune.evaluation.library",
    "evaluate_needles": "vtprune.evaluation.library",
    "explain": "vtprune.inference.evidence.explain",
    "load": "vtprune.models.loading",
    "load_preset": "vtprune.preset",
    "profile": "vtprune.evaluation.profiling.profile",
    "pruning": "vtprune.engine",
    "register_method": "vtprune.pruners",
    "reproduce": "vtprune.evaluation.library",
    "stream": "vtprune.inference.streaming",
    "tune": "vtprune.evaluation.library",
    "unregister_method": "vtprune.pruners",
}

__all__ = [
    "AnswerStream",
    "Budget",
    "Calibration",
    "CalibrationResult",
    "CaptionTest",
    "Clip",
    "CompareResult",
    "CompareSeconds",
    "Comparison",
    "ComparisonRow",
    "CompileInfo",
    "DamagedError",
    "Drawing",
    "Evaluation",
    "Explanation",
    "FailedReport",
    "Flops",
    "Generation",
    "InputInfo",
    "KvCacheBytes",
    "Limits",
    "Loaded",
    "MediaError",
    "MemoryBytes",
    "ModalitySettings",
    "ModelError",
    "ModelInfo",
    "NeedlePlan",
    "NeedleTest",
    "PreparedInputs",
    "Preset",
    "PresetError",
    "Profile",
    "ProfileOptions",
    "Report",
    "Reproduction",
    "ResolvedPreset",
    "ResolvedStage",
    "Sampling",
    "Seconds",
    "Selection",
    "StageCount",
    "StageRecord",
    "TokenCounts",
    "Trace",
    "Tuning",
    "Versions",
    "VisualTokens",
    "VtpruneError",
    "answer",
    "ask",
    "calibrate",
    "compare_methods",
    "compile_model",
    "draw",
    "evaluate",
    "evaluate_captions",
    "evaluate_needles",
    "explain",
    "load",
    "load_preset",
    "profile",
    "pruning",
    "register_method",
    "reproduce",
    "stream",
    "tune",
    "unregister_method",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'vtprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
