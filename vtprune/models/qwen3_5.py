"""Qwen3.5, also of the later numbers of its line: Qwen3-VL's inputs, features at one place only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtprune.models import cost
from vtprune.models.base import Family
from vtprune.models.patches import tower_shape
from vtprune.models.qwen3_vl import TEMPLATE as CHAT
from vtprune.models.qwen3_vl import Qwen3VL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The larger checkpoints think before they answer unless they are asked not to.
TEMPLATE = CHAT.removesuffix("{% endif %}") + (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


class Qwen35(Qwen3VL):
    """Qwen3-VL's pictures and videos; no layer of the tower but the last goes to the decoder."""

    name = "Qwen3.5"
    model_types = ("qwen3_5", "qwen3_5_moe")
    template = TEMPLATE

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        tower = getattr(config, "vision_config", None)
        hidden = cost.size_of(tower, "hidden_size")
        intermediate = cost.size_of(tower, "intermediate_size")
        return tower_shape(config, hidden, intermediate, cost.size_of(tower, "out_hidden_size"))

    def shorten_tower(self, config: PreTrainedConfig) -> None:
        Family.shorten_tower(self, config)
