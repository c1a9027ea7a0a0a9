"""Keep the visual tokens that the prompt's last token attends to most, in one early layer.

Idea: the last token of the prompt is about to write the answer; what it looks at in the layer
before the cut is what the later layers get to see.

Why it works: past the first layers attention to visual tokens is thin and stays on the same few, so
that one row of one early layer tells them from the rest.

Paper: FastV, arXiv 2403.06764.
Official code: pkunlp-icler/FastV (no licence).
Differences: only that row is computed, from the queries and keys of whichever kernel the model has,
where the authors' code switches a layer to eager attention and averages its whole map over the
heads; it then takes the last token's row, as here, though the paper defines the score as the mean
over all tokens that attend. The budget is a layer average that is solved exactly; the authors' code
keeps a count after layer 2. As in the authors' code, positions are kept, and all tiles are ranked
together. The default place is the model's entropy collapse layer in place of layer 2 of every
model: the two are the same for the paper's LLaVA-1.5-7B, and the place exists in decoders of any
depth and moves to an earlier layer where a small budget asks for it. Ties go to the earlier token.

Options:
    rest: "drop" (default) or "merge": each of the others becomes part of the kept token of its
        group whose state is most similar (cosine), which is the mean of all its parts. That is
        HoliTom's part inside the language model (arXiv 2505.21334), where half of the tokens stay
        at layer 18 of 28.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.device import send
from vtprune.pruners.base import (
    Budget,
    Selection,
    VisualTokens,
    checked,
    merged_into,
    select_best,
)
from vtprune.pruners.similarity import most_alike, unit_rows


@dataclass(frozen=True)
class FastV:
    rest: str = "drop"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("attention",) if self.rest == "drop" else ("attention", "hidden")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        attention = tokens.states["attention"]
        selection = select_best(attention, budget)
        if self.rest == "drop":
            return checked(selection, attention, "fastv")
        rows = unit_rows(tokens.states["hidden"])
        index = send(selection.index, rows.device)
        target = most_alike(rows, index, send(budget.group, rows.device))
        merged = merged_into(target, index, selection.scores)
        return checked(merged, attention, "fastv")
