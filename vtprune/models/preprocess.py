"""The official torchvision preprocessing, in plain torch, bit for bit on a CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn import functional

from vtprune.errors import ModelError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Numbers as in PIL.Image.Resampling, which the preprocessor files use.
MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
BILINEAR = 2
OTHER_MODES = {1: "LANCZOS", 4: "BOX", 5: "HAMMING"}


@dataclass(frozen=True)
class Recipe:
    """How a preprocessor file says that pixels are resized and normalised.

    Args:
        size: {"height", "width"}, {"shortest_edge"}, or both edges.
        crop: (height, width) of the centre crop; None for none.
        resample: number of the interpolation, as PIL counts.
        mean, std: one value a colour, for pixels in 0..1; None leaves the pixels as they are.
        scale: what pixels are multiplied by before that; None for no rescaling.
    """

    size: Mapping[str, int]
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    scale: float | None
    do_resize: bool = True


def merged(values: Mapping[str, object], defaults: Mapping[str, object]) -> dict[str, object]:
    """`values` over `defaults`; null counts as absent, as in transformers."""
    return {**defaults, **{key: value for key, value in values.items() if value is not None}}


def read_recipe(values: Mapping[str, object]) -> Recipe:
    """Return the recipe of a preprocessor file's contents, the class's defaults already merged in.

    Raises:
        ModelError: it asks for an interpolation that has no equal here.
    """
    resample = cast(int, values.get("resample", 3))
    if resample not in MODES:
        name = OTHER_MODES.get(resample, str(resample))
        known_modes = ", ".join(f"{number} ({mode})" for number, mode in MODES.items())
        raise ModelError(
            f"the checkpoint's preprocessor asks for resample {name}; known are {known_modes}",
            "set resample to 3 in its preprocessor_config.json",
        )
    crop = _edges(values["crop_size"], square=True) if values.get("do_center_crop") else None
    normalized = values.get("do_normalize", True)
    return Recipe(
        size=_edges(values["size"], square=False),
        crop=(crop["height"], crop["width"]) if crop else None,
        resample=resample,
        mean=_by_colour(values["image_mean"]) if normalized else None,
        std=_by_colour(values["image_std"]) if normalized else None,
        scale=cast(float, values.get("rescale_factor", 1 / 255))
        if values.get("do_rescale", True)
        else None,
        do_resize=bool(values.get("do_resize", True)),
    )


def recipe_over(values: Mapping[str, object], defaults: Mapping[str, object]) -> Recipe:
    """Return the recipe of a preprocessor file's contents over its class's defaults."""
    return read_recipe(merged(values, defaults))


def _by_colour(numbers: object) -> tuple[float, ...]:
    """`image_mean` or `image_std`, one value a colour; a file may have one number for all."""
    if isinstance(numbers, int | float):
        return (float(numbers),) * 3
    return tuple(cast(Sequence[float], numbers))


def _edges(size: object, square: bool) -> dict[str, int]:
    """`size` as a mapping; older files have one number, or (height, width)."""
    if isinstance(size, int):
        return {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(size, Sequence):
        return {"height": int(size[0]), "width": int(size[1])}
    return {
        key: int(value)
        for key, value in cast(Mapping[str, int | None], size).items()
        if value is not None
    }


def output_size(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) that a picture is resized to by a preprocessor's `size`."""
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    short, long = min(height, width), max(height, width)
    edge: float = size["shortest_edge"]
    if "longest_edge" in size and long / short * edge > size["longest_edge"]:
        edge = size["longest_edge"] * short / long
        new = (round(edge), int(edge * long / short))
    else:
        new = (int(edge), int(edge * long / short))
    return (new[1], new[0]) if width <= height else new


def unchanged_size(recipe: Recipe) -> tuple[int, int]:
    """Return (height, width) of the picture that a recipe leaves as it is."""
    if recipe.crop is not None:
        return recipe.crop
    edge = recipe.size.get("shortest_edge", 0)
    return recipe.size.get("height", edge), recipe.size.get("width", edge)


def resize(pixels: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> (n, 3, *size) uint8, antialiased, as torchvision's v2 resize does.

    Bicubic interpolates the integers themselves: resizing floats and rounding gives other pixels.
    Bilinear has an integer kernel only on AVX2 and AVX512; elsewhere it is float, then rounded.
    """
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    mode = MODES[resample]
    if mode == "nearest-exact":
        return functional.interpolate(pixels, size, mode=mode)
    capability = torch.backends.cpu.get_cpu_capability()
    if mode == "bicubic" or capability in ("AVX2", "AVX512"):
        return functional.interpolate(pixels, size, mode=mode, antialias=True)
    floats = functional.interpolate(pixels.float(), size, mode=mode, antialias=True)
    return floats.round_().to(torch.uint8)


def resize_pil(pixels: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> (n, 3, *size) uint8 by Pillow, whose filters are not torch's."""
    from PIL import Image

    if tuple(pixels.shape[-2:]) == size:
        return pixels
    resized = [
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).resize(size[::-1], resample)
        for picture in pixels
    ]
    arrays = [
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in resized
    ]
    return torch.stack(arrays).view(-1, *size, 3).permute(0, 3, 1, 2).contiguous()


def center_crop(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(n, 3, H, W) -> (n, 3, *size), black where the picture is smaller."""
    missing = [max(want - have, 0) for want, have in zip(size, pixels.shape[-2:], strict=True)]
    if any(missing):
        (top, left), (bottom, right) = [
            [edge // 2 for edge in missing],
            [(edge + 1) // 2 for edge in missing],
        ]
        pixels = functional.pad(pixels, (left, right, top, bottom))
    top = (pixels.shape[-2] - size[0]) // 2
    left = (pixels.shape[-1] - size[1]) // 2
    return pixels[..., top : top + size[0], left : left + size[1]]


def pad_to(pixels: torch.Tensor, size: tuple[int, int], colour: Sequence[int]) -> torch.Tensor:
    """(n, 3, H, W) -> (n, 3, *size), the picture in the middle of a plain `colour`."""
    height, width = pixels.shape[-2:]
    if (height, width) == size:
        return pixels
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas = torch.tensor(colour, dtype=pixels.dtype).view(1, -1, 1, 1)
    canvas = canvas.expand(pixels.shape[0], -1, *size).clone()
    canvas[..., top : top + height, left : left + width] = pixels
    return canvas


def finish(pixels: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Resize and centre crop by the recipe's own sizes; (n, 3, H, W) uint8 stays uint8."""
    if recipe.do_resize:
        height, width = pixels.shape[-2:]
        pixels = resize(pixels, output_size(height, width, recipe.size), recipe.resample)
    return pixels if recipe.crop is None else center_crop(pixels, recipe.crop)


def finish_square(pixels: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Pad to a square with the mean colour, then `finish`; (n, 3, H, W) uint8 stays uint8."""
    edge = max(pixels.shape[-2:])
    background = [int(value * 255) for value in recipe.mean or (0.0, 0.0, 0.0)]
    return finish(pad_to(pixels, (edge, edge), background), recipe)


def normalize(pixels: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> float32; the rescaling is folded into mean and deviation."""
    if recipe.mean is None or recipe.std is None:
        return pixels if recipe.scale is None else pixels.float() * recipe.scale
    factor = 1.0 if recipe.scale is None else 1.0 / recipe.scale
    mean = torch.tensor(recipe.mean, dtype=torch.float32) * factor
    std = torch.tensor(recipe.std, dtype=torch.float32) * factor
    mean, std = mean.to(pixels.device), std.to(pixels.device)
    return pixels.float().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def normalize_singly(pixels: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> float32, rescaled first: how the processors without torch do it."""
    if recipe.scale is not None:
        pixels = (pixels.double() * recipe.scale).float()
    if recipe.mean is None or recipe.std is None:
        return pixels
    mean = torch.tensor(recipe.mean, dtype=torch.float32)
    std = torch.tensor(recipe.std, dtype=torch.float32)
    mean, std = mean.to(pixels.device), std.to(pixels.device)
    return pixels.float().sub(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def patchify(pixels: torch.Tensor, patch: int, merge: int, temporal: int) -> torch.Tensor:
    """(n, 3, H, W) -> (patches, 3 * temporal * patch * patch), in the order of Qwen's towers.

    Frames go in groups of `temporal`, the last one repeated to fill its group; patches that are
    merged into one token, merge x merge of them, are neighbours in the result.
    """
    missing = -pixels.shape[0] % temporal
    if missing:
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
    num_frames, channels, height, width = pixels.shape
    rows, cols = height // (merge * patch), width // (merge * patch)
    blocks = pixels.reshape(
        num_frames // temporal, temporal, channels, rows, merge, patch, cols, merge, patch
    )
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(
        -1, channels * temporal * patch * patch
    )


def check_aspect(height: int, width: int) -> None:
    """Refuse a picture of which one side is more than 200 times the other, as Qwen does."""
    ratio = max(height, width) / min(height, width)
    if ratio > 200:
        raise ModelError(
            f"a picture of {width} x {height} is {ratio:.0f} times as long as wide;"
            " this model takes at most 200",
            "cut it into parts",
        )


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return Qwen's size of a picture: multiples of `factor`, the area within limits, aspect kept.

    Raises:
        ModelError: one side is more than 200 times the other, which Qwen refuses.
    """
    check_aspect(height, width)
    rows, cols = round(height / factor), round(width / factor)
    if rows * cols * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        cols = max(1, math.floor(width / shrink / factor))
    elif rows * cols * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        cols = math.ceil(width * grow / factor)
    return rows * factor, cols * factor
