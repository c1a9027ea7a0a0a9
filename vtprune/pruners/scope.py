"""Keep attended visual tokens that, together, are similar to all others.

Idea: every token is covered as far as it is similar to the kept one that is most alike to it. Each
step keeps the token with the largest product of what it adds to the coverage of all tokens and of
what the vision tower attends to it.

Why it works: attention alone keeps neighbours on the main object, and coverage alone keeps any
patch of a wide background; their product asks for tokens that matter and stand for others that are
not yet stood for.

Paper: SCOPE, arXiv 2510.24214.
Official code: kinredon/SCOPE.
Differences: tokens are compared behind the projector, as they enter the language model, where the
authors compare what the tower gives. A tower without a CLS token gives the attention that its
patches receive in the mean. Tokens of all pictures and frames are chosen from together unless the
stage says `per: tile` or `per: frame`; the authors handle each tile by itself. As in their code,
attention is multiplied as it is. Positions are kept, where theirs are renumbered.
Ties go to the earlier token; a state that is zero covers nothing. Float32. What a token would add
never grows, so that few are looked at again in each step, with the same choices. The cosines of all
pairs are held at once up to 16,384 tokens; past that they are worked out where they are asked for.

Options:
    segment: "none" (default) or the most tokens that are chosen from together, as in `divprune`;
        kept are the choices that added most in their segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked
from vtprune.pruners.lazy_greedy import ACTIVE, choose_lazily
from vtprune.pruners.similarity import (
    ANYWAY,
    WHOLE,
    choose_in_groups,
    cosines,
    is_small,
    unit_rows,
)

FEW = 64  # tokens whose gains are worked out with each choice: of all tokens' coverage each


@dataclass(frozen=True)
class Scope:
    segment: str | float = WHOLE

    needs = ("tower_attention", "hidden")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        rows = unit_rows(tokens.states["hidden"])
        attention = send(tokens.states["tower_attention"], rows.device)

        def choose(
            part: torch.Tensor, numbers: torch.Tensor, count: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            groups = zip(part, attention[numbers], strict=True)
            chosen = [cover_greedily(*group, count) for group in groups]
            return torch.stack([c[0] for c in chosen]), torch.stack([c[1] for c in chosen])

        index = choose_in_groups(rows, budget, choose, self.segment)
        return checked(Selection(index), torch.cat([attention, rows.sum(dim=1)]), "scope")


def cover_greedily(
    rows: torch.Tensor, attention: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens in the order of choice, (count,) int64, and what each added, (count,).

    Args:
        rows: (n, d) of unit length, or zero.
        attention: (n,) that each receives, at least 0.
    """
    if is_small(len(rows), rows.device):
        return cover_step_by_step(rows, attention, count)
    coverage = Coverage(rows, attention)
    parts = torch.arange(len(rows), device=rows.device).split(ACTIVE)
    bound = torch.cat([coverage.renew(part) for part in parts])
    order, added = choose_lazily(bound, count, coverage, min(FEW, ACTIVE))
    return send(order, rows.device), send(added, rows.device)


def cover_step_by_step(
    rows: torch.Tensor, attention: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `cover_greedily` does, all gains worked out in every step and none read."""
    similar = cosines(rows, rows).clamp_min_(0)
    covered, taken = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    order, added = [], []
    for _ in range(count):
        gain = attention * (similar - covered).clamp_min_(0).sum(dim=1)
        most, place = (gain.nan_to_num_() + taken).max(dim=0, keepdim=True)
        order.append(place)
        added.append(most)
        taken.index_fill_(0, place, -torch.inf)
        covered = torch.maximum(covered, similar.index_select(0, place)[0])
    return torch.cat(order), torch.cat(added)


class Coverage:
    """What tokens add to the coverage of all, times their attention, as `Gains`.

    Args:
        rows: (n, d) of unit length, or zero.
        attention: (n,) that each receives, at least 0.
    """

    def __init__(self, rows: torch.Tensor, attention: torch.Tensor) -> None:
        self.rows, self.weight = rows, attention
        self.covered = rows.new_zeros(len(rows))
        self.held = self.similar(rows) if len(rows) ** 2 <= ANYWAY else None
        self.tokens = torch.zeros(0, dtype=torch.long)
        self.reach = rows[:0]  # (C, n) of the tokens that are compared

    def similar(self, rows: torch.Tensor) -> torch.Tensor:
        """Return cosines with all, zero in place of negative ones: these cover nothing."""
        return cosines(rows, self.rows).clamp_min_(0)

    def gain(self) -> torch.Tensor:
        return self.weight[self.tokens] * (self.reach - self.covered).clamp_min_(0).sum(dim=1)

    def renew(self, tokens: torch.Tensor) -> torch.Tensor:
        self.tokens = tokens
        self.reach = self.similar(self.rows[tokens]) if self.held is None else self.held[tokens]
        return self.gain()

    def compare(self, places: torch.Tensor) -> None:
        self.tokens, self.reach = self.tokens[places], self.reach[places]

    def choose(self, place: int) -> torch.Tensor:
        self.covered = torch.maximum(self.covered, self.reach[place])
        return self.gain()
