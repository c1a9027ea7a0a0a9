"""Keep diverse visual tokens that are relevant to the question.

Idea: a determinantal point process over the tokens, whose kernel is relevance x cosine similarity x
relevance: a set is the likelier, the larger the volume that its states, each as long as it is
relevant, span. The set is found greedily: each step takes the token that adds most to the volume.

Why it works: similarity alone keeps the same tokens whatever is asked, and relevance alone keeps
copies of one region; the determinant weighs both at once.

Paper: CDPruner, arXiv 2506.10967; greedy search: Chen, Zhang and Zhou, arXiv 1709.05135.
Official code: Theia-4869/CDPruner (looked at only where its issues quote it).
Differences: the paper takes relevance from CLIP's text tower, and the authors' code negates it,
which its author found to fit CLIP alone; there is no text tower here. Relevance is the mean cosine
between a visual token and the text tokens after the last visual one, both as they enter the layer
of the cut, then scaled to (0, 1] over the tokens of the sample as in the authors' code. The
template's tokens after the question count as text. (OpenVINO's port weights by exp(relevance / 2),
does not negate it, and takes it from the mean of all embeddings that are not visual.) Positions are
kept, where the authors' code renumbers them (`positions: renumber`). All tokens of a prompt are
chosen from together, where the authors' code chooses in each tile of LLaVA-NeXT by itself, as `per:
tile` does here. Where a token lies in the span of those kept (what is left of its square is under
1e-5), the more relevant comes first; ties go to the earlier. Float32.

Options:
    relevance: "text" (default), or "none" for a process that reads no text.
    segment: "none" (default) or the most tokens that are chosen from together, as in `divprune`;
        kept are the choices that added most to the volume of their segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import threshold

from vtprune.pruners.base import Budget, Selection, VisualTokens, check_finite
from vtprune.pruners.similarity import WHOLE, Similarity, choose_in_groups, unit_rows

SPANNED = 1e-5  # of a unit row's square: no more than this is rounding
NOTHING = 1e-20  # in its place: the gain is then below that of any row that is not spanned
LEAST = 1e-6  # relevance of the least relevant token, before scaling; the released code's


@dataclass(frozen=True)
class CDPruner:
    relevance: str = "text"
    segment: str | float = WHOLE

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "text_hidden") if self.relevance == "text" else ("hidden",)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        rows = unit_rows(tokens.states["hidden"])
        weight = torch.ones_like(rows[:, 0])
        if self.relevance == "text":
            weight = text_relevance(rows, tokens.states["text_hidden"])
        index = choose_in_groups(
            rows,
            budget,
            lambda part, numbers, count: largest_volume(part, weight[numbers], count),
            self.segment,
        )
        check_finite(torch.cat([rows.sum(dim=1), weight]), "cdpruner")
        return Selection(index)


def text_relevance(rows: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """(N,) float32 in (0, 1], 1 for the most relevant token; all 1 where all are as relevant.

    Args:
        rows: (N, d) unit rows of the visual tokens.
        text: (M, H, D) states of the text tokens.
    """
    mean = rows @ unit_rows(text).mean(dim=0)  # the mean of the cosines
    least, most = mean.aminmax()
    return (mean - least + LEAST) / (most - least + LEAST)


def largest_volume(
    rows: torch.Tensor, relevance: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(G, count) int64 tokens of each group, in the order of choice, and (G, count) by what each
    multiplied the square of the volume, falling.

    One step of a pivoted Cholesky factorisation each. Relevance scales rows and columns of the
    kernel, so the factors are those of the cosines alone, and a token's gain is its relevance
    squared x what is left of its row. Holds (G, count, n) factors.

    Args:
        rows: (G, n, d) of unit length, or zero.
        relevance: (G, n), above 0.
    """
    groups, num, _ = rows.shape
    similarity = Similarity(rows, hold=count > num // 16)
    lines = torch.arange(groups, device=rows.device)
    weight = relevance.square()
    residual = threshold(rows.any(dim=2).float(), SPANNED, NOTHING)  # (G, n) of each row's square
    factors = rows.new_zeros(groups, count, num)
    order: list[torch.Tensor] = []
    gains: list[torch.Tensor] = []
    for step in range(count):  # few and small operations: on a GPU their launches are the cost
        gain = weight * residual
        most, picked = gain.max(dim=1)
        order.append(picked)
        gains.append(most)
        earlier = factors[:, :step]
        cosine = similarity.to(picked, gain)[:, None]
        line = torch.baddbmm(cosine, earlier[lines, :, picked][:, None], earlier, alpha=-1)[:, 0]
        # Of a token that is spanned nothing is left but rounding: divided by infinity, it is gone.
        line *= threshold(residual[lines, picked], SPANNED, torch.inf).rsqrt()[:, None]
        factors[:, step] = line
        residual = threshold(residual.addcmul(line, line, value=-1), SPANNED, NOTHING)
        weight.scatter_(1, picked[:, None], -1.0)  # not again
    return torch.stack(order, dim=1), torch.stack(gains, dim=1)
