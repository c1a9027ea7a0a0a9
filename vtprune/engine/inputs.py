"""What is known of a block's prompts beyond the tensors that the model is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vtprune.models.base import Inputs, StreamedVideo
from vtprune.models.encoder_cache import EncoderCache
from vtprune.tokens.layout import Grid
from vtprune.tokens.units import FullSizeCounts, Units

FeatureCache = dict[object, tuple[dict[str, object], object]]
"""What identifies a call of a vision encoder -> its arguments by name, and the features it gave."""


@dataclass(frozen=True, eq=False)
class PixelView:
    """One batch of prompts, and the pixels that its inputs were made of.

    Args:
        tensors: the model's inputs by name.
        units: for every row of the batch the frames and tiles of its media items; those that the
            same encoder takes, in the order of the prompt.
        full_size: the token counts of every row had its media not been made smaller; empty where
            they were not.
        rows: the inputs of every row by name, as they were before they were joined.
    """

    tensors: Mapping[str, torch.Tensor]
    units: Sequence[Sequence[Units]]
    full_size: Sequence[FullSizeCounts] = ()
    rows: Sequence[Mapping[str, torch.Tensor]] = ()


@dataclass(frozen=True, eq=False)
class PreparedInputs:
    """What the maker of a model's inputs knows of them, and a block can't read from the tensors.

    A block does without; stages at `pixels` do not. `vtprune.answer` and the command line fill it.

    Args:
        media: modality and grid of each media item of all prompts, in order, for placeholders that
            images and videos share; empty: it follows from the model's inputs.
        features: the encoders' features, filled by the block. Blocks that are given the same
            dictionary encode the same pixel tensors once.
        pixels: of the one batch that is to be prefilled; None: not known.
        answer_tokens: that may follow, for a budget that has to fit; None: not known.
        streamed: of the one prompt whose video was encoded in segments; None of any other.
        cache: the encoders' features on disk; each prompt is encoded alone then, so that they do
            not follow from its batch. None: they are not kept.
        encoded: modality -> an encoder's output for the one prompt, that was made before. Where the
            tower's attention is read or pixels are left out, the encoder runs again.
    """

    media: Sequence[tuple[str, Grid]] = ()
    features: FeatureCache | None = None
    pixels: PixelView | None = None
    cache: EncoderCache | None = None
    answer_tokens: int | None = None
    streamed: StreamedVideo | None = None
    encoded: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, torch.Tensor],
        prompts: Sequence[Inputs],
        features: FeatureCache | None = None,
        cache: EncoderCache | None = None,
        answer_tokens: int | None = None,
    ) -> PreparedInputs:
        """Return what is known of a batch whose rows were prepared here.

        Args:
            tensors: of the batch, on the model's device.
            prompts: its rows; empty: nothing is known of them.
            features, cache, answer_tokens: as of the class.
        """
        if not prompts:
            return cls(features=features, answer_tokens=answer_tokens)
        full_size = [row.full_size for row in prompts if row.full_size]
        view = PixelView(
            tensors, [row.units for row in prompts], full_size, [row.tensors for row in prompts]
        )
        media = [item for row in prompts for item in row.media]
        encoded = prompts[0].encoded if len(prompts) == 1 else {}
        return cls(media, features, view, cache, answer_tokens, prompts[0].streamed, encoded)
