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

from vtprune.pruners.base import Budget, Selection, VisualTokens, checked
from vtprune.pruners.lazy_greedy import choose_lazily
from vtprune.pruners.similarity import (
    WHOLE,
    Similarity,
    choose_in_groups,
    cosines,
    is_lazy,
    unit_rows,
)

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
        return checked(Selection(index), torch.cat([rows.sum(dim=1), weight]), "cdpruner")


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
    weight = relevance.square()
    residual = left_over(rows.any(dim=2).float())  # (G, n) of each row's square
    if is_lazy(rows):
        chosen, gain = choose_lazily(
            (weight * residual)[0], count, Volume(rows[0], weight[0], count)
        )
        return chosen[None], gain[None]
    groups, num, width = rows.shape
    similarity = Similarity(rows, hold=count > num // 16)
    lines = torch.arange(groups, device=rows.device)
    # No more rows than they are wide are independent: after so many nothing is left of any.
    factors = rows.new_zeros(groups, min(count, width), num)
    order: list[torch.Tensor] = []
    gains: list[torch.Tensor] = []
    for step in range(count):  # few and small operations: on a GPU their launches are the cost
        gain = weight * residual
        most, picked = gain.max(dim=1)
        order.append(picked)
        gains.append(most)
        weight.scatter_(1, picked[:, None], -1.0)  # not again
        if step >= width:
            continue
        earlier = factors[:, :step]
        cosine = similarity.to(picked)[:, None]
        line = torch.baddbmm(cosine, earlier[lines, :, picked][:, None], earlier, alpha=-1)[:, 0]
        # Of a token that is spanned nothing is left but rounding: divided by infinity, it is gone.
        line *= threshold(residual[lines, picked], SPANNED, torch.inf).rsqrt()[:, None]
        factors[:, step] = line
        residual = left_over(residual.addcmul(line, line, value=-1))
    return torch.stack(order, dim=1), torch.stack(gains, dim=1)


def left_over(residual: torch.Tensor) -> torch.Tensor:
    """Return what is left of rows' squares: next to nothing, where it may be rounding."""
    return threshold(residual, SPANNED, NOTHING)


class Volume:
    """What tokens multiply the volume's square by, as `Gains`: a Cholesky factorisation whose
    columns are worked out for the tokens that are asked for.

    Args:
        rows: (n, d) of unit length, or zero.
        weight: (n,) relevance, squared.
        count: how many are chosen at most.
    """

    def __init__(self, rows: torch.Tensor, weight: torch.Tensor, count: int) -> None:
        self.rows, self.weight = rows, weight
        most = min(count, rows.shape[1])  # that are independent of those chosen before
        self.chosen: list[int] = []
        self.factor = rows.new_zeros(most, most)  # of the cosines of those, lower triangular
        self.tokens = torch.zeros(0, dtype=torch.long)
        # Of the C tokens: columns of the factor, of those chosen while they are compared too; the
        # squares that are left, (C,); and (C, C) cosines of what is left of them.
        self.columns = self.residual = self.pairs = self.factor

    def renew(self, tokens: torch.Tensor) -> torch.Tensor:
        number = len(self.chosen)
        rows = self.rows[tokens]
        self.tokens = tokens
        self.columns = torch.linalg.solve_triangular(
            self.factor[:number, :number], cosines(self.rows[self.chosen], rows), upper=False
        )
        square = rows.any(dim=1).float() - self.columns.square().sum(dim=0)
        self.residual = left_over(square)
        return self.weight[tokens] * self.residual

    def compare(self, places: torch.Tensor) -> None:
        self.tokens, self.residual = self.tokens[places], self.residual[places]
        columns, rows = self.columns[:, places], self.rows[self.tokens]
        self.pairs = cosines(rows, rows).addmm_(columns.T, columns, alpha=-1)
        self.columns = torch.cat([columns, columns.new_empty(len(places), len(places))])

    def choose(self, place: int) -> torch.Tensor:
        number, square = len(self.chosen), self.residual[place]
        if square > SPANNED and number < len(self.factor):
            line = self.pairs[place] * square.rsqrt()
            self.pairs.addr_(line, line, alpha=-1)
            self.residual = left_over(self.residual.addcmul(line, line, value=-1))
            self.factor[number, :number] = self.columns[:number, place]
            self.factor[number, number] = square.sqrt()
            self.columns[number] = line
            self.chosen.append(int(self.tokens[place]))
        return self.weight[self.tokens] * self.residual
