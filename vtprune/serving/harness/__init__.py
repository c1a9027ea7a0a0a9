"""Pruned models in evaluation harnesses: lmms-eval and VLMEvalKit.

lmms-eval finds `models` through its entry-point group; nothing here imports a harness before the
harness itself asks for its adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def models() -> ModelManifest:
    """What lmms-eval is told of `--model vtprune`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    adapters = "vtprune.serving.harness.lmms_eval"
    return ModelManifest(
        model_id="vtprune",
        simple_class_path=f"{adapters}.SimpleModel",
        chat_class_path=f"{adapters}.ChatModel",
    )
