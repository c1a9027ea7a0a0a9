"""Keep the visual tokens that the question asks for, by what each attention head counts.

Idea: in each head of the first layer, score the visual tokens by the products of their keys with
the mean query of the question, without rotary positions; scale each head's scores to unit length
over the tokens; add them up, each head by its weight.

Why it works: without positions no place in the prompt is favoured; at one scale no head drowns the
others; and heads that do without pictures can count for less.

Paper: HAWK, arXiv 2604.07812.
Official code: peppery77/HAWK, Apache-2.0.
Differences: weights of heads are measured once for a model, by what it loses when a head is
switched off; the authors published those of Qwen2.5-VL-7B. Equal weights, the default, are ours and
not the paper's, and so the default for every model. The question is all text behind the last visual
token, the template's included, where the authors' code leaves out the marker behind the pictures
and what follows the end of the question. Where one key serves several query heads, each of them has
scores. The norms that some decoders put on queries and keys (Qwen3-VL) are left out. Scores are of
the tokens that a stage chooses from; past the input, of the layer before the cut. Positions are
kept, as in the paper. Ties go to the earlier token. Float32.

Options:
    heads: "equal" (default) weights, or "qwen2.5-vl-7b" for the published ones of that model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import cast

import torch

from vtprune.device import send
from vtprune.errors import ModelError
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked, select_best

EQUAL = "equal"


@dataclass(frozen=True)
class Hawk:
    heads: str = EQUAL

    needs = ("key", "text_query")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        keys = tokens.states["key"].float()  # (N, KV, D)
        queries = send(tokens.states["text_query"].float(), keys.device)  # (M, H, D)
        weights = torch.ones(queries.shape[1])
        if self.heads != EQUAL:
            weights = head_weights(self.heads, queries.shape[1])
        scores = score(keys, queries, send(weights, keys.device))
        return checked(select_best(scores, budget), scores, "hawk")


def score(keys: torch.Tensor, queries: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return (N,) float32 scores of the visual tokens.

    The division by the root of D is left out: heads are scaled to unit length.

    Args:
        keys: (N, KV, D) of the visual tokens; every H / KV query heads share one.
        queries: (M, H, D) of the question.
        weights: (H,) of the query heads.
    """
    mean = queries.mean(dim=0).unflatten(0, (keys.shape[1], -1))  # (KV, H / KV, D)
    by_head = torch.einsum("nkd,kgd->nkg", keys, mean).flatten(1)  # (N, H)
    length = by_head.norm(dim=0).clamp_min(torch.finfo(by_head.dtype).tiny)
    return (by_head / length) @ weights


def head_weights(model: str, num_heads: int) -> torch.Tensor:
    """Return (H,) the published weights of a model's heads.

    Raises:
        ModelError: they are those of another number of heads.
    """
    text = resources.files("vtprune").joinpath("_data/head_weights.json").read_text("utf-8")
    weights = cast("list[float]", json.loads(text)[model]["weights"])
    if len(weights) != num_heads:
        raise ModelError(
            f"heads: {model}: hawk has {len(weights)} weights of heads for it, and this model has "
            f"{num_heads} query heads",
            f"-o heads={EQUAL}",
        )
    return torch.tensor(weights)
