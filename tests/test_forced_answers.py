"""How probable an answer is: its tokens, and its score under pruning."""

from __future__ import annotations

import math
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from conftest import shared_model
from PIL import Image
from prompts import prompt_with

from vtprune.engine import pruning
from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.inference.forced_answers import (
    PromptWithAnswer,
    end_of_turn_ids,
    prepare_with_answers,
    right_answer_ids,
    score,
    score_after_prefill,
    score_in_one_forward,
)
from vtprune.inference.generate import Generation
from vtprune.inference.prepare import prepare_question
from vtprune.inference.prompt_media import read_in_full
from vtprune.inference.questions_file import Asked
from vtprune.media import Limits
from vtprune.models import find_family
from vtprune.models.base import Files, Sampling
from vtprune.models.loading import Loaded, load

CASES = [(name, kind) for name in tiny.MODELS for kind in tiny.KINDS[name]]
ANSWER = torch.tensor([72, 65, 80, 66])
STAGES = [{"at": "input", "method": "uniform", "keep": 0.6}, {"at": 3, "method": "random",
          "keep": 0.2}]  # fmt: skip


def loaded_tiny(name: str) -> Loaded:
    """A tiny model without a checkpoint."""
    model = shared_model(name)
    family = find_family(model.config.model_type)
    assert family is not None
    return Loaded(name, model, Files(model.config, tiny.tokenizer(name)), family)


def prompt_of(
    loaded: Loaded, kind: str, answer: torch.Tensor = ANSWER, text: int = 6
) -> PromptWithAnswer:
    return prompt_with(tiny.inputs(loaded.name, loaded.model, kind, text=text), answer)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (90, 60), (200, 30, 30)).save(path)
    return path


def test_a_score_multiplies_over_the_tokens() -> None:
    # Odds of 1 : 2 : 5 and of 3 : 1 : 4.
    logits = torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 4.0]]).log()
    found = score(logits, torch.tensor([1, 0]))
    assert found.first == pytest.approx(2 / 8)
    assert found.probability == pytest.approx(2 / 8 * 3 / 8)
    assert not found.greedy
    assert score(logits, torch.tensor([2, 2])).greedy
    assert not score(logits, torch.tensor([2, 0])).greedy


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_forced_score_is_what_generation_would_give(name: str, kind: str) -> None:
    """Under pruning too, and with the positions that generation counts."""
    loaded = loaded_tiny(name)
    prompt = prompt_of(loaded, kind)
    with pruning(loaded.model, {"stages": STAGES}):
        found = score_after_prefill(loaded, prompt)
    with pruning(loaded.model, {"stages": STAGES}):
        steps = len(ANSWER)
        logits = oracle.generate(loaded.model, dict(prompt.tensors), steps, ANSWER[None])[1][0]
    likely = [math.log(step.softmax(0)[token]) for step, token in zip(logits, ANSWER, strict=True)]
    assert math.log(found.probability) == pytest.approx(sum(likely), abs=1e-3)
    assert math.log(found.first) == pytest.approx(likely[0], abs=1e-4)


@pytest.mark.parametrize("answer", [ANSWER, ANSWER[:1], ANSWER[:2]], ids=len)
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "gemma3"])
def test_one_forward_over_prompt_and_answer_scores_alike(name: str, answer: torch.Tensor) -> None:
    loaded = loaded_tiny(name)
    prompt = prompt_of(loaded, "image", answer)
    for preset in ({"stages": [{"at": 2, "method": "vtw", "keep": 0}]}, {"stages": STAGES}):
        with pruning(loaded.model, preset):
            whole = score_in_one_forward(loaded, prompt)
            forced = score_after_prefill(loaded, prompt)
        assert whole.probability == pytest.approx(forced.probability, rel=1e-4)
        assert whole.greedy == forced.greedy


@pytest.mark.parametrize("name", tiny.MODELS)
def test_an_answers_tokens_spell_it(name: str, checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    gathered = read_in_full(loaded, [picture], Sampling(), Limits())
    prepared = prepare_question(loaded, gathered, "what?", Generation())
    found = right_answer_ids(loaded, prepared, "Dark red.", Generation())
    assert end_of_turn_ids(loaded) == []  # tiny models never end
    assert loaded.files.tokenizer.decode(found).strip() == "Dark red."


def test_where_the_template_writes_a_blank_before_the_answer_it_counts(
    checkpoints, picture: Path
) -> None:  # type: ignore[no-untyped-def]
    """LLaVA's prompt ends with "ASSISTANT:", and its answers begin with a blank."""
    loaded = load(str(checkpoints("llava")))
    prompts, _ = prepare_with_answers(
        loaded, [Asked(picture, "what?", "Red.")], Sampling(), Generation(), Limits(), {}
    )
    assert prompts[0].labelled
    assert loaded.files.tokenizer.decode(prompts[0].answer) == " Red."


def test_the_end_of_the_turn_belongs_to_the_answer() -> None:
    loaded = load(None)
    tokenizer, model = loaded.files.tokenizer, loaded.model
    ends = end_of_turn_ids(loaded)
    assert ends == [tokenizer.eos_token_id] == [model.generation_config.eos_token_id]


def test_prompts_of_a_file_share_its_pixels_and_get_the_models_own_answers(
    checkpoints, picture: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    calls: list[int] = []
    handle = loaded.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    encoded: FeatureCache = {}
    asked = [Asked(picture, "what?"), Asked(picture, "which colour?"), Asked(picture, "?", "red")]
    short = Generation(max_new_tokens=3)
    prompts, _ = prepare_with_answers(loaded, asked, Sampling(), short, Limits(), encoded)
    again, _ = prepare_with_answers(
        loaded, asked, Sampling(), short, Limits(), {}, [one.answer for one in prompts]
    )
    handle.remove()
    assert len(calls) == 1  # the second time no answer had to be made
    assert [one.labelled for one in prompts] == [False, False, True]
    assert len(prompts[0].answer) == 3
    for one, other in zip(prompts, again, strict=True):
        assert torch.equal(one.answer, other.answer)
    with pruning(loaded.model, keep=1.0, inputs=PreparedInputs(features=encoded)):
        assert score_after_prefill(loaded, prompts[0]).greedy
