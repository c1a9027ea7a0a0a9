"""What the methods of one prefill read of the model: states, and attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vtprune.engine.attention import Call, Rows, attention_rows
from vtprune.engine.past import Past
from vtprune.engine.present import Present
from vtprune.models.structure import Structure
from vtprune.pruners.base import ATTENTION, TOWER
from vtprune.tokens.layout import Layout


class Readings:
    """What was read on the way to the next cut.

    Attributes:
        projected: query, key or value -> (B, n, H x D) of the layer before the cut.
        attention: for every sample (R, n) float32 of the layer before the cut.
        tower: for every sample (N,) float32 of the vision tower, for its tokens before any cut.
    """

    def __init__(self, structure: Structure, present: Present, past: Past) -> None:
        self.structure, self.present, self.past = structure, present, past
        self.projected: dict[str, torch.Tensor] = {}
        self.attention: list[torch.Tensor] = []
        self.tower: list[torch.Tensor] = []

    def project(self, embeds: torch.Tensor, names: Sequence[str]) -> None:
        """Keeps the states that layer 0 would compute from the uncut embeddings, (B, S, d)."""
        if not names:
            return
        with torch.no_grad():
            normed = self.structure.norm(0)(embeds)
            for name in names:
                self.projected[name] = self.structure.projection(0, name)(normed)

    def keep(self, name: str, module: nn.Module, args: object, output: torch.Tensor) -> None:
        """Keeps what a projection gives: a hook, once it has its name."""
        self.projected[name] = output.detach()

    def take_attention(self, layer: int, call: Call, all_text: bool) -> None:
        """Keeps attention rows of a layer: of all text after the pictures, or of the last token."""
        present, wanted = self.present, []
        for sample, row in enumerate(present.columns):
            text = present.text_columns(sample)
            valid = torch.zeros(present.packed.length, dtype=torch.bool)
            valid[present.slots(sample, row)] = True
            past = torch.ones(self.past.length(layer), dtype=torch.bool)
            earlier = self.past.valid(layer)
            if earlier is not None:
                past[: earlier.shape[1]] = earlier[sample]
            queries = present.slots(sample, text if all_text else text[-1:])
            wanted.append(Rows(queries, valid, past))
        self.attention = attention_rows(call, wanted)

    def read(self, sample: int, name: str, mine: Layout, hidden: torch.Tensor) -> torch.Tensor:
        """The states of one sample that a method reads by this name, as VisualTokens has them.

        Args:
            mine: the tokens that it chooses from.
            hidden: (B, n, d) states that enter the layer of the cut.
        """
        slots = self.present.slots(sample, mine.columns)
        if name in ATTENTION:
            rows = self.attention[sample]
            rows = rows[:, slots.to(rows.device, non_blocking=True)]
            return rows if name == "text_attention" else rows[-1]
        if name in TOWER:
            scores = self.tower[sample]
            place = torch.searchsorted(self.present.whole[sample].columns, mine.columns)
            return scores[place.to(scores.device, non_blocking=True)].to(hidden.device)
        if name.startswith("text_"):
            slots = self.present.slots(sample, self.present.text_columns(sample))
        name = name.removeprefix("text_")
        if name in ("hidden", "normed"):
            source, width = hidden, hidden.shape[-1] // self.structure.num_heads
        else:
            source, width = self.projected[name], self.structure.head_dim
        rows = source[sample].index_select(0, slots.to(source.device, non_blocking=True))
        if name == "normed":
            rows = self.structure.apply_final_norm(rows)
        return rows.unflatten(-1, (-1, width))

    def clear(self) -> None:
        """Forgets what was read for one cut."""
        self.projected.clear()
        self.attention = []
