"""Which columns and visual tokens of a batch are there, from cut to cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vtprune.engine.packing import pack, repack
from vtprune.errors import ModelError
from vtprune.tokens.layout import Layout


class Present:
    """A batch of prompts as it is now.

    Columns are those of this forward's input_ids.

    Args:
        whole: of every sample's visual tokens, before any cut.
        valid: (B, S) bool on the CPU: which columns hold a token.

    Attributes:
        whole_length: columns of the batch before any cut, padding included.
        layouts: of every sample's visual tokens still there.
        columns: for every sample its columns still there, text and visual.
        packed: the columns in the sequence as it is now.
        valid: (B, n) bool of its slots; None where all hold a token.
        last_cut: the sequence as it is now, in the slots of the one before.
    """

    def __init__(self, whole: Sequence[Layout], valid: torch.Tensor) -> None:
        self.whole, self.whole_length = list(whole), valid.shape[1]
        self.layouts = list(whole)
        self.columns = [row.nonzero().squeeze(1) for row in valid]
        # The batch as it came, wherever its padding is.
        self.packed = pack([torch.arange(valid.shape[1])] * len(valid))
        self.valid = None if bool(valid.all()) else valid.clone()
        self.last_cut = self.packed

    @property
    def shape(self) -> tuple[int, int]:
        """(B, n) of the sequence as it is now."""
        return len(self.columns), self.packed.length

    def slots(self, sample: int, columns: torch.Tensor) -> torch.Tensor:
        """Where a sample's columns are in the sequence as it is now."""
        held = self.packed.columns[sample]
        return torch.searchsorted(held, columns) + self.packed.length - len(held)

    def text_columns(self, sample: int) -> torch.Tensor:
        """Columns of a sample's text after its last visual token.

        Raises:
            ModelError: there is none.
        """
        visual = self.whole[sample].columns
        row = self.columns[sample]
        text = row[row > (visual[-1] if len(visual) else -1)]
        if not len(text):
            raise ModelError(
                "this method reads the question, and no text follows the pictures in the prompt",
                "put the question after the pictures, or use a method that reads no text",
            )
        return text

    def drop(self, sample: int, gone: torch.Tensor) -> None:
        """Takes tokens, at `gone` in a sample's layout, out of it and out of its columns.

        They are in the sequence up to the next `close`.
        """
        layout = self.layouts[sample]
        keep = torch.ones(len(layout), dtype=torch.bool)
        keep[gone] = False
        self.layouts[sample] = layout.take(keep.nonzero().squeeze(1))
        row = self.columns[sample]
        present = torch.ones(len(row), dtype=torch.bool)
        present[torch.searchsorted(row, layout.columns[gone])] = False
        self.columns[sample] = row[present]

    def close(self) -> None:
        """Packs what is left: the end of a cut."""
        now = pack(self.columns)
        self.last_cut = repack(self.packed, now)
        self.packed, self.valid = now, now.valid
