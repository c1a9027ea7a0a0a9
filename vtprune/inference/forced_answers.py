"""How probable a given answer is: teacher-forced, from its first token to the end of its turn."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.engine.kv_cache import fork_cache
from vtprune.inference.generate import Generation, generate
from vtprune.inference.model_inputs import TEXT_INPUTS, Tensors
from vtprune.inference.prepare import PreparedQuestion, prepare_question, turns_of
from vtprune.inference.prompt_media import PromptMedia, read_media
from vtprune.models.base import Sampling, Turn
from vtprune.models.seams import (
    POSITIONS,
    ROPE_INDEX,
    ROPE_INPUTS,
    cache_argument,
    cache_made,
    check_arguments,
    makes_cache,
)
from vtprune.models.structure import find_structure
from vtprune.preset import Preset

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vtprune.inference.questions_file import Asked
    from vtprune.media import Limits
    from vtprune.models.loading import Loaded


@dataclass(frozen=True, eq=False)
class PromptWithAnswer:
    """A question, ready for the model, with the answer whose probability is asked for.

    Args:
        asked: the question.
        prepared: it and its media, as the model's inputs on its device.
        answer: (m,) int64 ids of the answer, the end of its turn included; on the same device.
        labelled: whether it is the right answer; else it is what the unpruned model answers.
        vision: seconds that encoding the media took, where they were encoded for its answer.
    """

    asked: Asked
    prepared: PreparedQuestion
    answer: torch.Tensor
    labelled: bool
    vision: float = 0.0

    @property
    def tensors(self) -> Tensors:
        """The model's inputs, a batch of 1, on its device."""
        return self.prepared.tensors

    def for_engine(self, features: FeatureCache | None) -> PreparedInputs:
        """Return what `pruning` is told of the prompt."""
        return self.prepared.for_engine(features)

    def without_pixels(self, features: FeatureCache | None) -> PreparedInputs:
        """Return it for blocks that are given other tensors, such as a part of the prompt."""
        return PreparedInputs(self.prepared.inputs.media, features)


@dataclass(frozen=True)
class Score:
    """How probable an answer is.

    Args:
        probability: of the whole answer, the product over its tokens.
        first: of its first token.
        greedy: whether it is what greedy decoding gives, token for token.
        loss: nats a token: minus the mean of the tokens' log-probabilities.
    """

    probability: float
    first: float
    greedy: bool
    loss: float = 0.0


def score(logits: torch.Tensor, answer: torch.Tensor) -> Score:
    """Return the score of an answer.

    Args:
        logits: (m, V), the predictions of its m tokens.
        answer: (m,) int64.
    """
    answer = answer.to(logits.device)
    taken = logits.float().log_softmax(dim=1).gather(1, answer[:, None]).squeeze(1).cpu().double()
    greedy = bool((logits.argmax(dim=1) == answer).all())
    return Score(
        float(taken.sum().exp()), float(taken[0].exp()), greedy, max(-float(taken.mean()), 0.0)
    )


def prepare_with_answers(
    loaded: Loaded,
    asked: Sequence[Asked],
    sampling: Sampling,
    generation: Generation,
    limits: Limits,
    features: FeatureCache,
    known_answers: Sequence[torch.Tensor] = (),
    preset: Preset | None = None,
) -> tuple[list[PromptWithAnswer], tuple[str, ...]]:
    """Prepare questions about one file, which is read and, with `features`, encoded once.

    A question without an answer gets the unpruned model's own, at most
    `generation.max_new_tokens` long.

    Args:
        known_answers: the ids of the answers, from an earlier call.
        preset: less of the file is taken where this one downsamples; None: all of it.

    Returns:
        the prompts, and warnings about the file.
    """
    media = read_media(loaded, [asked[0].file], sampling, preset, limits)
    prompts: list[PromptWithAnswer] = []
    for number, question in enumerate(asked):
        before = prompts[-1].prepared if prompts else None
        prepared = prepare_question(loaded, media, question.question, generation, before)
        vision = 0.0
        if known_answers:
            answer = known_answers[number]
        elif question.answer is None:
            unpruned = Preset("unpruned", keep=1.0)
            (run,) = generate(loaded, [prepared], unpruned, generation, features=features)
            answer, vision = run.tokens, run.seconds["vision"]
        else:
            answer = right_answer_ids(loaded, prepared, question.answer, generation)
        answer = answer.to(prepared.tensors["input_ids"].device)
        labelled = question.answer is not None
        prompts.append(PromptWithAnswer(question, prepared, answer, labelled, vision))
    return prompts, media.warnings


def right_answer_ids(
    loaded: Loaded, prepared: PreparedQuestion, answer: str, generation: Generation
) -> torch.Tensor:
    """Return (m,) ids of the right answer to a question, as `next_turn_ids` gives them."""
    turns = turns_of(prepared.question, prepared.media, generation)
    return next_turn_ids(loaded, prepared.media, turns, answer, prepared.tensors["input_ids"])


def next_turn_ids(
    loaded: Loaded, media: PromptMedia, turns: Sequence[Turn], text: str, ids: torch.Tensor
) -> torch.Tensor:
    """Return (m,) ids of a text as the model would say it next in a conversation.

    The chat template is given the conversation with the text in it, which goes on where the prompt
    ends: its next tokens are the text's, up to where they spell it. Where a template writes an
    answered turn otherwise than one to be answered, the text is tokenized by itself.

    Args:
        turns: the conversation so far.
        ids: (1, S) of its prompt.
    """
    turns = [*turns, Turn("assistant", text)]
    answered = loaded.family.encode(loaded.files, media.items, turns).tensors["input_ids"]
    length = ids.shape[1]
    answer: list[int] = []
    if answered.shape[1] > length and torch.equal(answered[:, :length], ids.to(answered.device)):
        rest = answered[0, length:].tolist()
        wanted = without_blanks(text)
        spelt = (k for k in range(1, len(rest) + 1) if spelling(loaded, rest[:k]) == wanted)
        answer = rest[: next(spelt, 0)]
    if not answer:
        answer = loaded.files.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([*answer, *end_of_turn_ids(loaded)[:1]], dtype=torch.long)


def end_of_turn_ids(loaded: Loaded) -> list[int]:
    """Return the tokens that end an answer, the tokenizer's own first; [] where none does."""
    ends = getattr(loaded.model.generation_config, "eos_token_id", None)
    ends = [] if ends is None else torch.tensor(ends).flatten().tolist()
    return sorted(ends, key=lambda token: token != loaded.files.tokenizer.eos_token_id)


def spelling(loaded: Loaded, ids: list[int]) -> str:
    """Return what tokens spell, without blanks and special tokens."""
    return without_blanks(str(loaded.files.tokenizer.decode(ids, skip_special_tokens=True)))


def without_blanks(text: str) -> str:
    """Return a text without its blanks, which tokenizers move about."""
    return "".join(text.split())


def append_text(tensors: Tensors, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a model's inputs, a batch of 1, with text tokens `ids`, (n,), behind them."""
    longer = dict(tensors)
    for name in TEXT_INPUTS:
        if name in tensors:
            row = tensors[name]
            fill = 1 if name == "attention_mask" else 0
            new = ids.to(row.dtype) if name == "input_ids" else torch.full_like(ids, fill)
            longer[name] = torch.cat([row, new[None].to(row.dtype)], dim=1)
    return longer


def position_ids_from(loaded: Loaded, tensors: Tensors, start: int) -> dict[str, torch.Tensor]:
    """Return the argument with the position ids of the columns from `start` on, or none.

    Models with positions in time, row and column go on wrongly from a cache when left to
    themselves: behind a video they count from its last moment, generation from the last token.

    Args:
        tensors: of the whole prompt, whose last columns are text.
    """
    locate = getattr(find_structure(loaded.model).inner, POSITIONS, None)
    if locate is None:
        return {}
    takes = check_arguments(f"the model: {POSITIONS}", locate, ROPE_INDEX)
    named = {ROPE_INPUTS.get(name, name): value for name, value in tensors.items()}
    position_ids = locate(**{name: value for name, value in named.items() if name in takes})[0]
    return {"position_ids": position_ids[..., start:]}  # (3, 1, n)


def logits_to_keep_argument(loaded: Loaded, most: int) -> dict[str, int]:
    """Return the argument that limits logits to the last `most` positions, where there is one."""
    takes = inspect.signature(loaded.model.forward).parameters
    return {"logits_to_keep": most} if "logits_to_keep" in takes else {}


def empty_cache_argument(loaded: Loaded) -> dict[str, object]:
    """Return the argument with an empty cache as generation makes it; {} for models that do."""
    structure = find_structure(loaded.model)
    if makes_cache(structure.decoder):
        return {}
    from transformers import DynamicCache

    text_config = structure.config.get_text_config(decoder=True)
    return cache_argument(loaded.model, DynamicCache(config=text_config))


@torch.no_grad()
def prefill(loaded: Loaded, tensors: Tensors) -> tuple[torch.Tensor, Cache]:
    """Return (1, V) predictions of a prompt's first new token, and the cache to go on with.

    Args:
        tensors: the model's inputs, a batch of 1, on its device.
    """
    out = loaded.model(
        **tensors,
        use_cache=True,
        **empty_cache_argument(loaded),
        **logits_to_keep_argument(loaded, 1),
    )
    return out.logits[0, -1:], cache_made(out)


@torch.no_grad()
def score_in_one_forward(loaded: Loaded, prompt: PromptWithAnswer) -> Score:
    """Return the score from one forward over prompt and answer, inside a `pruning` block.

    Right where no method looks at the text, which the answer is then a part of.
    """
    count = len(prompt.answer)
    tensors = append_text(prompt.tensors, prompt.answer[:-1])
    out = loaded.model(**tensors, use_cache=False, **logits_to_keep_argument(loaded, count))
    return score(out.logits[0, -count:], prompt.answer)


def score_after_prefill(loaded: Loaded, prompt: PromptWithAnswer) -> Score:
    """Return the score from a prefill and a continuation, inside a `pruning` block."""
    return score(forced_logits(loaded, prompt), prompt.answer)


@torch.no_grad()
def forced_logits(loaded: Loaded, prompt: PromptWithAnswer, stepwise: bool = False) -> torch.Tensor:
    """Return (m, V) predictions of an answer's m tokens, from a prefill and a continuation.

    The methods see the prompt alone, as when the model answers.

    Args:
        stepwise: a forward for each token, as in decoding, so that cuts made meanwhile count.
    """
    first, cache = prefill(loaded, prompt.tensors)
    return continued_logits(loaded, prompt.tensors, first, cache, prompt.answer, stepwise)


@torch.no_grad()
def score_answers(loaded: Loaded, tensors: Tensors, answers: Sequence[torch.Tensor]) -> list[Score]:
    """Return the scores of several answers to one prompt, prefilled once, inside a `pruning` block.

    Args:
        tensors: the model's inputs, a batch of 1, on its device.
        answers: (m,) int64 of each.
    """
    first, cache = prefill(loaded, tensors)
    return [
        score(continued_logits(loaded, tensors, first, fork_cache(cache), answer), answer)
        for answer in answers
    ]


def continued_logits(
    loaded: Loaded,
    tensors: Tensors,
    first: torch.Tensor,
    cache: object,
    answer: torch.Tensor,
    stepwise: bool = False,
) -> torch.Tensor:
    """Return (m, V) predictions of an answer's m tokens on the KV cache of its prompt.

    The cache gets longer.

    Args:
        tensors: of the prompt.
        first: (1, V) the prefill's prediction.
        stepwise: as of `forced_logits`.
    """
    if len(answer) == 1:
        return first
    forced = answer[None, :-1].to(first.device)
    tensors_with_answer = append_text(tensors, forced[0])
    positions = position_ids_from(loaded, tensors_with_answer, tensors["input_ids"].shape[1])
    return torch.cat([first, logits_on_cache(loaded, forced, cache, positions, stepwise)])


def logits_on_cache(
    loaded: Loaded, ids: torch.Tensor, cache: object, positions: Tensors, stepwise: bool
) -> torch.Tensor:
    """Return (n, V) logits of text on a cache, which gets longer.

    Args:
        ids: (1, n).
        positions: the argument with their position ids, or none.
        stepwise: a forward for each token.
    """
    rows = []
    for first in range(ids.shape[1]) if stepwise else (0,):
        part = slice(first, first + 1 if stepwise else None)
        output = loaded.model(
            input_ids=ids[:, part],
            use_cache=True,
            **cache_argument(loaded.model, cache),
            **{name: value[..., part] for name, value in positions.items()},
        )
        rows.append(output.logits[0])
    return torch.cat(rows)
