"""What a checkpoint's preparation files may say, checked before pixels are made by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vtprune.errors import ModelError, VtpruneError, quote
from vtprune.media import Source

if TYPE_CHECKING:
    from vtprune.models.base import Family, Files

CORRECT = "correct the file, or download the checkpoint again"
TRIED = Source(Path("a picture"), "image", 96, 64, 1, (), 0.0, 0.0, "memory", ())
TRIED_VIDEO = replace(
    TRIED, kind="video", num_frames=4, timestamps=(0.0, 0.5, 1.0, 1.5), fps=2.0, duration=2.0
)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Size = Count | Annotated[list[Count], Field(min_length=2, max_length=2)] | dict[str, Count | None]
Pinpoints = list[Annotated[list[Count], Field(min_length=2, max_length=2)]]


class PreparationValues(BaseModel):
    """The fields that several families read; others are left to the family."""

    model_config = ConfigDict(extra="ignore")

    size: Size | None = None
    crop_size: Size | None = None
    max_image_size: Size | None = None
    patch_size: Size | None = None
    merge_size: Count | None = None
    temporal_patch_size: Count | None = None
    pooling_kernel_size: Size | None = None
    min_pixels: Count | None = None
    max_pixels: Count | None = None
    rescale_factor: Positive | None = None
    image_mean: float | list[float] | None = None
    image_std: Positive | list[Positive] | None = None
    image_grid_pinpoints: Pinpoints | None = None


def check_preparation(checkpoint: str, file: str, values: Mapping[str, object]) -> None:
    """Refuse a preparation file with a value that pixels can't be made by.

    Raises:
        ModelError: names the file and the field.
    """
    try:
        PreparationValues.model_validate(values)
    except ValidationError as error:
        raise wrong_value(checkpoint, file, values, error) from error
    size = values.get("size")
    if isinstance(size, dict) and (not size or len({"height", "width"} & size.keys()) == 1):
        raise ModelError(
            f"{checkpoint}: {file}: size is {quote(size)}: a height and a width, or an edge",
            CORRECT,
        )
    for field in ("image_mean", "image_std"):
        numbers = values.get(field)
        if isinstance(numbers, list) and len(numbers) not in (1, 3):
            raise ModelError(
                f"{checkpoint}: {file}: {field} has {len(numbers)} numbers, not one for each of "
                "3 colours",
                CORRECT,
            )


def try_preparation(checkpoint: str, family: Family, files: Files) -> None:
    """Prepare a small picture, and a short clip, by a checkpoint's files.

    Raises:
        ModelError: that fails; a family's code runs with the files that it was written for.
    """
    from vtprune.models.base import Sampling

    if not family.listed:
        return  # a processor of the checkpoint's own
    for source in (TRIED, TRIED_VIDEO):
        if source.kind in family.modalities:
            try:
                plan = family.plan(files, source, Sampling(), 1)
                shape = (len(plan.index), 3, source.height, source.width)
                plan.transform(torch.zeros(shape, dtype=torch.uint8))
            except VtpruneError:
                raise
            except Exception as error:
                raise ModelError(
                    f"{checkpoint}: no {source.kind} can be prepared by its config.json and "
                    f"preprocessor_config.json ({type(error).__name__}: {error})",
                    CORRECT,
                ) from error


def wrong_value(
    checkpoint: str, file: str, values: Mapping[str, object], error: ValidationError
) -> ModelError:
    """Return the error for a checkpoint's file with a value that its schema does not take."""
    faults = error.errors()
    field = str(faults[0]["loc"][0])
    of_field = [fault for fault in faults if fault["loc"][0] == field]
    # Of what a field may be, that kind says most which the value is of.
    fits = (fault for fault in of_field if not fault["type"].endswith(("_type", "_parsing")))
    fault = next(fits, faults[0])
    return ModelError(
        f"{checkpoint}: {file}: {field} is {quote(values[field])}: {fault['msg']}", CORRECT
    )
