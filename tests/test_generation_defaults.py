"""Of generation_config.json end and pad tokens hold; sampling and lengths are the user's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import save_noise

import vtprune
from vtprune.errors import ModelError
from vtprune.inference.generate import Generation
from vtprune.models.loading import load

FILE = "generation_config.json"


@pytest.fixture
def copy(checkpoints, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    return shutil.copytree(checkpoints("llava"), tmp_path / "model")


def change(directory: Path, **values: object) -> Path:
    path = directory / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


def answer(directory: Path, picture: Path) -> vtprune.Report:
    (report,) = vtprune.answer(
        str(directory), [(picture, "what?")], keep=0.5, generation=Generation(max_new_tokens=6)
    )
    return report


SETTINGS: dict[str, object] = {
    **{"do_sample": True, "temperature": "hot", "top_p": 0.5, "top_k": 5, "min_p": 0.1},
    **{"num_beams": 4, "num_return_sequences": 3, "max_length": 2, "max_new_tokens": 1},
    **{"min_new_tokens": 50, "max_time": 0.0, "cache_implementation": "static"},
    **{"use_cache": False, "prefill_chunk_size": 4, "return_dict_in_generate": True},
    **{"output_attentions": True, "prompt_lookup_num_tokens": 3, "stop_strings": ["a"]},
}


def test_answers_stay_greedy_whatever_the_checkpoint_samples_with(
    checkpoints, copy: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    picture = save_noise(tmp_path / "noise.png", 60, 60)
    expected = answer(checkpoints("llava"), picture)
    changed = answer(change(copy, **SETTINGS), picture)
    assert changed.answer == expected.answer
    assert changed.tokens.answer == 6


def test_several_end_tokens_hold(copy: Path, tmp_path: Path) -> None:
    picture = save_noise(tmp_path / "noise.png", 60, 60)
    change(copy, eos_token_id=list(range(300)), pad_token_id=7)
    config = load(str(copy)).model.generation_config
    assert (config.eos_token_id, config.pad_token_id) == (list(range(300)), 7)
    assert answer(copy, picture).tokens.answer == 1


def test_words_that_the_checkpoint_forbids_count(copy: Path) -> None:
    change(copy, suppress_tokens=[1, 2], repetition_penalty=1.2)
    config = load(str(copy)).model.generation_config
    assert (config.suppress_tokens, config.repetition_penalty) == ([1, 2], 1.2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>': "),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5: "),
        ({"eos_token_id": [[1]]}, r"eos_token_id is \[\[1\]\]: "),
        ({"pad_token_id": "x"}, "pad_token_id is 'x': Input should be a valid integer"),
        ({"pad_token_id": True}, "pad_token_id is True: Input should be a valid integer"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1: .* greater than 0"),
        ({"no_repeat_ngram_size": "x"}, "no_repeat_ngram_size is 'x': "),
        ({"suppress_tokens": "x"}, "suppress_tokens is 'x': Input should be a valid list"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(
    values: dict[str, object], message: str, copy: Path
) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json: {message}"):
        load(str(change(copy, **values)))


@pytest.mark.parametrize("text", ['{"eos_tok', "[1]", "\udcff"])
def test_a_file_that_is_not_json_is_named(text: str, copy: Path) -> None:
    (copy / FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"generation_config\.json of .* is not (a )?JSON"):
        load(str(copy))
