"""What answers take from a checkpoint's generation_config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vtprune.models.checkpoint import read_json
from vtprune.models.preparation_values import wrong_value

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"


class GenerationDefaults(BaseModel):
    """The fields that count: which tokens end and fill, and which are not to be written.

    Sampling, beams, lengths and caches are the user's choice: answers are greedy unless a
    temperature is given.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None  # of an encoder-decoder
    repetition_penalty: float | None = Field(default=None, gt=0)
    no_repeat_ngram_size: int | None = Field(default=None, ge=0)
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    bad_words_ids: list[list[int]] | None = None


def read_generation_config(checkpoint: str) -> GenerationConfig | None:
    """Return what counts of a checkpoint's generation_config.json; None where there is none.

    Raises:
        ModelError: it is not JSON, or a field has a wrong value; both are named.
    """
    from transformers import GenerationConfig

    values = read_json((checkpoint,), FILE)
    if not values:
        return None
    try:
        defaults = GenerationDefaults.model_validate(values)
    except ValidationError as error:
        raise wrong_value(checkpoint, FILE, values, error) from error
    return GenerationConfig(**defaults.model_dump(exclude_none=True))
