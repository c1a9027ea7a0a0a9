"""What pruning has to equal: the oracle of `vtprune check`, and what only tests ask of it."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from vtprune.engine.trace import Trace
from vtprune.evaluation.checking import oracle
from vtprune.evaluation.checking.oracle import Force, generate, masked, masking

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""The argument of layers and the field of outputs that holds the cache."""


__all__ = ["Force", "assert_masked", "both_ways", "dropped", "generate", "masked", "masking"]


def both_ways(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """(B, S) number of the block whose tokens see each other both ways; -1 for none."""
    kind = model.config.model_type
    if kind.startswith(("gemma3", "gemma4")):  # each picture is one
        visual = inputs["token_type_ids" if kind == "gemma3" else "mm_token_type_ids"] == 1
        starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        return torch.where(visual, starts.cumsum(1) - 1, -1)
    if model.config.model_type == "molmo2":  # all pictures together are one, markers included
        return torch.where(inputs["mm_token_type_ids"] == 1, 0, -1)
    return None


def dropped(
    trace: Trace, inputs: dict[str, torch.Tensor], past: int = 0
) -> list[tuple[int, list[list[int]]]]:
    """What a trace says was dropped, as `masked` wants it."""
    return oracle.dropped(trace, past)


def assert_masked(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    trace: Trace,
    tokens: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """What a pruned generation gave is what masking the tokens that it dropped gives."""
    expected = masked(model, inputs, oracle.dropped(trace), tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
