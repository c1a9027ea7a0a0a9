"""What a checkpoint's preparation files may say, checked before pixels are made by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vtprune.errors import ModelError, quote

CORRECT = "correct the file, or download the checkpoint again"
Positive = Annotated[float, Field(gt=0)]
Size = Positive | list[Positive] | dict[str, Positive | None]


class PreparationValues(BaseModel):
    """The fields that several families read; others are left to the family."""

    model_config = ConfigDict(extra="ignore")

    size: Size | None = None
    crop_size: Size | None = None
    max_image_size: Size | None = None
    patch_size: Size | None = None
    merge_size: Positive | None = None
    temporal_patch_size: Positive | None = None
    pooling_kernel_size: Size | None = None
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    rescale_factor: Positive | None = None
    image_mean: float | list[float] | None = None
    image_std: Positive | list[Positive] | None = None
    image_grid_pinpoints: (
        list[Annotated[list[Positive], Field(min_length=2, max_length=2)]] | None
    ) = None


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


def wrong_value(
    checkpoint: str, file: str, values: Mapping[str, object], error: ValidationError
) -> ModelError:
    """Return the error for a checkpoint's file with a value that its schema does not take."""
    fault = error.errors()[0]
    field = str(fault["loc"][0])
    return ModelError(
        f"{checkpoint}: {file}: {field} is {quote(values[field])}: {fault['msg']}", CORRECT
    )
