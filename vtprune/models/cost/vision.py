"""What a vision tower and its projector cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower and its projector that their cost depends on.

    Args:
        layers: number of tower layers that run.
        hidden: width of the tower; its heads together are as wide.
        intermediate: width of its MLP.
        patch: pixels along a side of a patch.
        inputs: values that make one patch: channels x (frames x) height x width.
        projector: (in, out) of each matrix that a projected token goes through, whatever merges
            its patches included.
        gated: whether the MLP has a gate.
        merge: patches along a side of the block that makes one projected token; what is left over
            at the edges is dropped.
        extra: tokens of the tower beside the patches (CLS), one set for each frame or tile.
        projects_extra: whether the projector takes those too.
        window: patches along a side of a window of local attention; 0 for none.
        full_layers: layers with full attention, where the others have windows.
        pooling: whether an attention-pooling head runs (its output is not used).
        overlapping: whether projected tokens are taken from tiles that overlap, so that the
            number of tiles does not say how many there are.
    """

    layers: int
    hidden: int
    intermediate: int
    patch: int
    inputs: int
    projector: tuple[tuple[int, int], ...]
    gated: bool = False
    merge: int = 1
    extra: int = 0
    projects_extra: bool = False
    window: int = 0
    full_layers: int = 0
    pooling: bool = False
    overlapping: bool = False


def tile_units(
    shape: VisionShape, pixels: Sequence[int], num_units: int | None = None
) -> list[tuple[int, int, int]]:
    """The units of `vision_flops` for tiles or frames of one size, each encoded on its own.

    Args:
        shape: the tower's shape.
        pixels: shape of the pixel values, (..., 3, H, W).
        num_units: tiles really encoded, where the tensor is padded with empty ones, which models
            leave out; None for all.
    """
    *leading, _, height, width = pixels
    count = math.prod(leading) if num_units is None else num_units
    return [(1, height // shape.patch, width // shape.patch)] * count


def vision_flops(
    shape: VisionShape, units: Sequence[Sequence[int]], tokens: int | None = None
) -> float:
    """FLOPs of vision tower and projector.

    Args:
        shape: their shape.
        units: one (frames, rows, columns) of patches for each thing encoded: `tile_units` of the
            pixel values' shape, or Qwen's `image_grid_thw.tolist()`, `video_grid_thw.tolist()`.
            Attention stays within one frame of one unit.
        tokens: projected tokens; needed where tiles overlap.

    Raises:
        ValueError: tiles overlap, and the number of tokens is not given.
    """
    return tower_flops(shape, units) + projector_flops(shape, units, tokens)


def tower_flops(shape: VisionShape, units: Sequence[Sequence[int]]) -> float:
    """`vision_flops` of the tower alone."""
    return sum(frames * _frame_flops(shape, rows, cols) for frames, rows, cols in units)


def projector_flops(
    shape: VisionShape, units: Sequence[Sequence[int]], tokens: int | None = None
) -> float:
    """`vision_flops` of the projector alone."""
    if tokens is None:
        if shape.overlapping:
            raise ValueError("tiles overlap; give the number of projected tokens")
        extra = shape.extra if shape.projects_extra else 0
        tokens = sum(
            frames * ((rows // shape.merge) * (cols // shape.merge) + extra)
            for frames, rows, cols in units
        )
    return 2.0 * tokens * sum(width * out for width, out in shape.projector)


def _frame_flops(shape: VisionShape, rows: int, cols: int) -> float:
    """FLOPs of the tower for one frame or tile of rows x cols patches."""
    patches = rows * cols
    tokens = patches + shape.extra
    hidden, mlp = shape.hidden, (3 if shape.gated else 2) * shape.hidden * shape.intermediate
    embedding = 2.0 * patches * shape.inputs * hidden
    linear = 2.0 * tokens * (4 * hidden**2 + mlp) * shape.layers
    full = shape.full_layers if shape.window else shape.layers
    pairs = full * tokens**2
    if shape.window:
        pairs += (shape.layers - full) * _squares(rows, shape.window) * _squares(cols, shape.window)
    pooling = 0.0
    if shape.pooling:  # one learned query attends to all tokens, then an MLP
        pooling = 2.0 * (2 * hidden**2 + 2 * tokens * hidden**2 + mlp) + 4.0 * tokens * hidden
    return embedding + linear + 4.0 * pairs * hidden + pooling


def _squares(length: int, window: int) -> int:
    """Sum of the squared lengths of the windows along a side; the last one may be shorter."""
    whole, rest = divmod(length, window)
    return whole * window**2 + rest**2
