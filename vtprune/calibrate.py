"""Where a model's visual tokens stop saying different things, measured on its own states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune.engine import pruning

if TYPE_CHECKING:
    from vtprune.loading import Loaded


@dataclass(frozen=True)
class Collapse:
    """The entropy collapse layer of a model.

    Args:
        curve: H_l for every layer l, of the states that enter it; 0 are the embeddings.
        layer: the l in 1..L/2 with the largest H_(l-1) - H_l.
        share: of the inputs whose own curve has its largest drop there.
    """

    curve: tuple[float, ...]
    layer: int
    share: float


def matrix_entropy(states: torch.Tensor) -> float:
    """Matrix entropy of N tokens' states, in [0, 1].

    H = - tr(S ln S) / ln min(N, d) with S = Z^T Z / N, the rows of Z centred over the tokens and of
    unit length. Source: arXiv 2401.17139, as restated for visual tokens by arXiv 2602.17196.

    Args:
        states: (N, d), any floating dtype; computed in float64.
    """
    rows = states.double()
    rows = rows - rows.mean(dim=0, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    num_tokens, width = rows.shape
    smaller = min(num_tokens, width)
    if smaller < 2:
        return 0.0
    gram = rows @ rows.T if num_tokens < width else rows.T @ rows
    eigenvalues = torch.linalg.eigvalsh(gram / num_tokens).clamp_min(1e-12)
    entropy = -(eigenvalues * eigenvalues.log()).sum() / torch.tensor(float(smaller)).log()
    return float(entropy)


@torch.no_grad()
def entropy_curves(loaded: Loaded, prompts: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """(n, L) matrix entropies: a row a prompt, a column a layer that the states enter.

    Args:
        prompts: the model's inputs, each a batch of 1, on its device.
    """
    curves = []
    for prompt in prompts:
        with pruning(loaded.model, keep=1.0) as trace:
            out = loaded.model(**prompt, output_hidden_states=True, use_cache=False)
        columns = trace.layouts[0].columns.to(out.logits.device)
        num_layers = len(loaded.model.get_decoder().layers)
        entering = out.hidden_states[:num_layers]
        curves.append([matrix_entropy(states[0, columns]) for states in entering])
    return torch.tensor(curves)


def find_collapse(curves: torch.Tensor) -> Collapse:
    """The entropy collapse layer from (n, L) curves."""
    until = curves.shape[1] // 2
    drops = (
        curves[:, :until] - curves[:, 1 : until + 1]
    )  # (n, L/2); column 0 is the drop to layer 1
    layer = int(drops.mean(dim=0).argmax()) + 1
    share = float((drops.argmax(dim=1) + 1 == layer).double().mean())
    return Collapse(tuple(curves.mean(dim=0).tolist()), layer, share)
