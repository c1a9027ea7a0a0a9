"""The entropy collapse layer: where the matrix entropy of a model's visual tokens falls most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vtprune.device import with_float64
from vtprune.engine import pruning
from vtprune.engine.inputs import PreparedInputs
from vtprune.errors import ModelError
from vtprune.evaluation.bootstrap import draw_files, shares_of_draws
from vtprune.models.seams import fold_streams, main_stream
from vtprune.models.structure import find_structure

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded
    from vtprune.models.structure import Structure

MOST_TOKENS = 1024  # of an input whose entropy is taken


@dataclass(frozen=True)
class EntropyCollapse:
    """The entropy collapse layer of a model.

    Args:
        curve: H_l for every layer l, of the states that enter it; 0 are the embeddings.
        layer: the l in 1..L/2 with the largest H_(l-1) - H_l.
        share: of the inputs whose own curve has its largest drop there.
        draws: layer -> share of the draws of inputs, with replacement, that give it; the layer
            itself first, then the others by their shares.
    """

    curve: tuple[float, ...]
    layer: int
    share: float
    draws: Mapping[int, float] = field(default_factory=dict)

    @property
    def drop(self) -> float:
        """H_(l-1) - H_l at the layer; not above 0 where entropy does not fall at all."""
        return self.curve[self.layer - 1] - self.curve[self.layer]

    def certainty(self) -> str:
        """Return the share of draws with this layer, and other layers' shares, in words."""
        first, *others = [
            f"{share:.0%}" if layer == self.layer else f"{layer} in {share:.0%}"
            for layer, share in self.draws.items()
            if share >= 0.05 or layer == self.layer
        ] or [""]
        return f"in {first} of draws" + (f" (layer {', '.join(others)})" if others else "")


def matrix_entropy(states: torch.Tensor) -> float:
    """Return the matrix entropy of N tokens' states, in [0, 1].

    H = - tr(S ln S) / ln min(N, d) with S = Z^T Z / N, the rows of Z centred over the tokens and of
    unit length. Source: arXiv 2401.17139, as restated for visual tokens by arXiv 2602.17196.

    Args:
        states: (N, d), any floating dtype; computed in float64.

    Raises:
        ModelError: the states hold NaN or infinity.
    """
    rows = states.to(with_float64(states.device)).double()
    if not bool(rows.isfinite().all()):
        raise ModelError(
            "the model's states hold NaN or infinity, so they have no entropy",
            "try --dtype float32 or bfloat16",
        )
    rows = rows - rows.mean(dim=0, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    num_tokens, width = rows.shape
    smaller = min(num_tokens, width)
    if smaller < 2:
        return 0.0
    gram = rows @ rows.T if num_tokens < width else rows.T @ rows
    eigenvalues = torch.linalg.eigvalsh(gram / num_tokens).clamp_min(1e-12)
    return float(-(eigenvalues * eigenvalues.log()).sum()) / math.log(smaller)


def entering_states(hidden: Sequence[torch.Tensor], structure: Structure) -> list[torch.Tensor]:
    """Return the states that enter each layer, (1, S, d), of those that a model gave.

    Of decoders with several states a token, that one which layers attend with.
    """
    config = structure.decoder_config
    return [
        states if states.dim() == 3 else main_stream(fold_streams(states, config), config)
        for states in hidden[: len(structure.layers)]
    ]


def curve_of(entering: Sequence[torch.Tensor], columns: torch.Tensor) -> tuple[float, ...]:
    """Return the matrix entropy of the visual tokens entering every layer.

    Of more than MOST_TOKENS, so many evenly spaced ones are taken: eigenvalues of N x N cost N^3.

    Args:
        entering: (1, S, d) states that enter each layer.
        columns: (N,) of the visual tokens.
    """
    count = min(len(columns), MOST_TOKENS)
    columns = columns[torch.arange(count) * len(columns) // max(count, 1)]
    return tuple(matrix_entropy(states[0, columns.to(states.device)]) for states in entering)


@torch.no_grad()
def entropy_curve(
    loaded: Loaded,
    prompt: Mapping[str, torch.Tensor],
    inputs: PreparedInputs | None = None,
) -> tuple[float, ...]:
    """Return the matrix entropy of a prompt's visual tokens entering every layer.

    Args:
        prompt: the model's inputs, a batch of 1, on its device.
        inputs: as for `pruning`.
    """
    with pruning(loaded.model, keep=1.0, threads="own", inputs=inputs) as trace:
        out = loaded.model(**prompt, output_hidden_states=True, use_cache=False)
    entering = entering_states(out.hidden_states, find_structure(loaded.model))
    return curve_of(entering, trace.layouts[0].columns)


def find_collapse(curves: torch.Tensor, seed: int = 0) -> EntropyCollapse:
    """Find the entropy collapse layer from (n, L) curves, and how sure it is.

    Args:
        seed: of the draws of inputs.
    """
    until = curves.shape[1] // 2
    drops = (
        curves[:, :until] - curves[:, 1 : until + 1]
    )  # (n, L/2); column 0 is the drop to layer 1
    layer = int(drops.mean(dim=0).argmax()) + 1
    share = float((drops.argmax(dim=1) + 1 == layer).double().mean())
    found = draw_files(drops.double().numpy(), seed).argmax(axis=1) + 1
    return EntropyCollapse(tuple(curves.mean(dim=0).tolist()), layer, share,
                           shares_of_draws(found.tolist(), layer))  # fmt: skip
