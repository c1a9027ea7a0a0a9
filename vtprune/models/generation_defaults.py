"""What answers take from a checkpoint's generation_config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vtprune.models.checkpoint import read_json
from vtprune.models.preparation_values import wrong_value

if TYPE_CHECKING:
    from transformers import GenerationConfig

TokenId = Annotated[int, Field(ge=-1, lt=2**31)]  # -1: none, in some files
FILE = "generation_config.json"


class GenerationDefaults(BaseModel):
    """The fields that count: which tokens end and fill, and which are not to be written.

    Sampling, beams, lengths and caches are the user's choice: answers are greedy unless a
    temperature is given.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    decoder_start_token_id: TokenId | None = None  # of an encoder-decoder
    repetition_penalty: float | None = Field(default=None, gt=0)
    no_repeat_ngram_size: int | None = Field(default=None, ge=0)
    suppress_tokens: list[TokenId] | None = None
    begin_suppress_tokens: list[TokenId] | None = None
    bad_words_ids: list[list[TokenId]] | None = None


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
