"""Keep the visual tokens whose states carry the most matrix entropy across attention heads.

Idea: a token's query states, one row a head, span more directions the more the token has to say.
The entropy of the eigenvalues of their Gram matrix measures that, without any attention map, so
every attention kernel stays usable.

Why it works: the matrix entropy of all visual tokens falls sharply at one early layer (the entropy
collapse layer); past it most tokens say the same, and the score tells the few that don't.

Paper: EntropyPrune, arXiv 2602.17196.
Official code: YahongWang1/EntropyPrune (Apache-2.0).
Differences: float32 eigenvalues in place of float64 (the same tokens are chosen); the budget is a
layer average that is solved exactly, where the authors' truncation may leave one token fewer; ties
go to the earlier token. As in the authors' code, positions are kept, newline tokens of tiled
pictures are scored like patches, and tiles and frames are chosen from as a whole. `norm: row` is
not what the authors run: it divides each centred row by its length, as lines in their code that are
commented out do. The two can rank tokens in opposite order, because -sum l ln l = tau S(rho) - tau
ln tau with tau the trace.

Options:
    norm: "none" (default) takes the centred rows as they are; "row" divides each by its L2 norm,
        so that the trace is 1.
    states: "query" (default), "key", "value" or "hidden" (cut into as many rows as query heads).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vtprune.errors import ModelError
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked, select_best

SMALLEST_EIGENVALUE = 1e-10  # the released code's clamp
CHUNK = 4096  # tokens whose states are raised to float32 at once
AT_ONCE = 2**16  # tokens whose eigenvalues are; on a GPU each call makes the host wait


@dataclass(frozen=True)
class Entropy:
    norm: str = "none"
    states: str = "query"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.states,)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        states = tokens.states[self.states]  # (N, H, D)
        check_heads(states.shape[1], self.norm, self.states)
        scores = token_entropy(states, self.norm)
        return checked(select_best(scores, budget), scores, "entropy")


def check_heads(num_heads: int, norm: str, states: str) -> None:
    """Refuse states with too few heads to tell tokens apart.

    Centring leaves H - 1 directions: one head has no entropy at all, and two centred rows of unit
    length are each other's opposite for every token.
    """
    fewest = 3 if norm == "row" else 2
    if num_heads < fewest:
        raise ModelError(
            f"entropy with states: {states} and norm: {norm} needs at least {fewest} heads; "
            f"this model has {num_heads} there, and every token would score the same",
            "use states: query (the default)",
        )


def token_entropy(states: torch.Tensor, norm: str, double: bool = False) -> torch.Tensor:
    """Matrix entropy of every token, (N,) float32 (float64 if `double`).

    Args:
        states: (N, H, D), one row a head; any floating dtype, raised to float32 first, because a
            Gram matrix in bfloat16 ranks a quarter of the tokens wrongly.
        norm: "row" or "none".
        double: compute in float64, as the released code does.

    Source: arXiv 2602.17196; the H x H ("dual") Gram has the non-zero spectrum of the D x D one.
    """
    return torch.cat([_part_entropy(part, norm, double) for part in states.split(AT_ONCE)])


def _part_entropy(states: torch.Tensor, norm: str, double: bool) -> torch.Tensor:
    """Return the entropy of as many tokens as one call for eigenvalues takes."""
    gram = torch.cat([gram_matrices(part, norm, double) for part in states.split(CHUNK)])
    # LAPACK stops at a Gram matrix with NaN in it, or returns garbage: the NaN is carried by hand.
    eigenvalues = torch.linalg.eigvalsh(gram.nan_to_num(0.0, 0.0, 0.0))
    eigenvalues = eigenvalues.clamp_min(SMALLEST_EIGENVALUE)
    entropy = -(eigenvalues * eigenvalues.log()).sum(dim=-1) / math.log(gram.shape[1])
    return entropy + 0 * gram.sum(dim=(1, 2))


def gram_matrices(states: torch.Tensor, norm: str, double: bool) -> torch.Tensor:
    """(n, H, H) Gram matrices of the centred rows, over H, of (n, H, D) states."""
    rows = states.to(torch.float64 if double else torch.float32)
    rows = rows - rows.mean(dim=1, keepdim=True)
    if norm == "row":
        length = rows.norm(dim=-1, keepdim=True)
        rows = rows / length.clamp_min(torch.finfo(rows.dtype).tiny)
    return rows @ rows.transpose(1, 2) / rows.shape[1]
