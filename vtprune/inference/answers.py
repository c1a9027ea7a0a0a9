"""How probable a given answer is: teacher-forced, from its first token to the end of its turn."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.engine.kv_cache import fork_cache
from vtprune.inference.batching import ROWS
from vtprune.inference.gathering import Gathered, gather_for
from vtprune.inference.generation import Generation
from vtprune.inference.prompts import encode, to_device
from vtprune.inference.run import pruned
from vtprune.models.base import Sampling, Turn
from vtprune.models.seams import ROPE_INDEX, cache_argument, cache_made, check_arguments
from vtprune.models.structure import find_structure
from vtprune.preset import load_preset, override
from vtprune.tokens.layout import Grid

if TYPE_CHECKING:
    from vtprune.inference.questions_file import Asked
    from vtprune.media import Limits
    from vtprune.models.base import Inputs
    from vtprune.models.loading import Loaded
    from vtprune.preset import Preset

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question, ready for the model, with the answer whose probability is asked for.

    Args:
        asked: the question.
        tensors: the model's inputs, a batch of 1, on its device.
        media: modality and grid of the media, as `encode` gave them.
        answer: (m,) int64 ids of the answer, the end of its turn included; on the same device.
        labelled: whether it is the right answer; else it is what the unpruned model answers.
        inputs: what `tensors` were made of, which stages before the vision tower need.
        gathered: the media, for going on with the conversation.
        vision: seconds that encoding the media took, where they were encoded for its answer.
    """

    asked: Asked
    tensors: Tensors
    media: Sequence[tuple[str, Grid]]
    answer: torch.Tensor
    labelled: bool
    inputs: Inputs | None = None
    gathered: Gathered | None = None
    vision: float = 0.0

    def prepared(self, features: FeatureCache | None) -> PreparedInputs:
        """Return what `pruning` is told of the prompt.

        Args:
            features: as of PreparedInputs.
        """
        if self.inputs is None:
            return PreparedInputs(self.media, features)
        return PreparedInputs.of(self.tensors, [self.inputs], features)


@dataclass(frozen=True)
class Score:
    """How a model takes to an answer.

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
    """The score of an answer.

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


def prepare(
    loaded: Loaded,
    asked: Sequence[Asked],
    sampling: Sampling,
    generation: Generation,
    limits: Limits,
    encoded: FeatureCache,
    known: Sequence[torch.Tensor] = (),
    preset: Preset | None = None,
) -> tuple[list[Prompt], tuple[str, ...]]:
    """Questions about one file, which is read and, with `encoded`, encoded once.

    A question without an answer gets the unpruned model's own, at most
    `generation.max_new_tokens` long.

    Args:
        known: the ids of the answers, from an earlier call.
        preset: less of the file is looked at where this one downsamples; None: all of it.

    Returns:
        the prompts, and what is to be said about the file.
    """
    whole = override(load_preset(None), keep=1.0)
    gathered = gather_for(loaded, [asked[0].file], sampling, preset or whole, limits)
    pixels: dict[str, torch.Tensor] = {}
    prompts = []
    for number, one in enumerate(asked):
        inputs = encode(loaded, gathered, one.question, generation)
        tensors = to_device(loaded, {**inputs.tensors, **pixels})
        pixels = {name: value for name, value in tensors.items() if name.startswith("pixel")}
        vision = 0.0
        if known:
            answer = known[number]
        elif one.answer is None:
            runs = pruned(loaded, tensors, whole, generation, None, encoded, [inputs])
            answer, vision = runs[0].tokens, runs[0].seconds.get("vision", 0.0)
        else:
            answer = answer_ids(loaded, gathered, one, inputs.tensors["input_ids"], generation)
        answer = answer.to(tensors["input_ids"].device)
        labelled = one.answer is not None
        prompts.append(
            Prompt(one, tensors, inputs.media, answer, labelled, inputs, gathered, vision)
        )
    return prompts, gathered.warnings


def answer_ids(
    loaded: Loaded, gathered: Gathered, asked: Asked, ids: torch.Tensor, generation: Generation
) -> torch.Tensor:
    """(m,) ids of the right answer as the model would say it: what the chat template makes of it.

    The conversation with the answer in it goes on where the prompt ends, so its next tokens are the
    answer's, up to where they spell it. Where a template writes an answered turn otherwise than one
    to be answered, the answer's text is taken for itself.

    Args:
        ids: (1, S) of the prompt.
    """
    assert asked.answer is not None
    system = [Turn("system", generation.system)] if generation.system else []
    turns = [*system, Turn("user", asked.question, 1)]
    return said_ids(loaded, gathered, turns, asked.answer, ids)


def said_ids(
    loaded: Loaded, gathered: Gathered, turns: Sequence[Turn], text: str, ids: torch.Tensor
) -> torch.Tensor:
    """(m,) ids of a text as the model would say it next in a conversation; see `answer_ids`.

    Args:
        turns: the conversation so far.
        ids: (1, S) of its prompt.
    """
    told = loaded.family.encode(
        loaded.files, gathered.items, [*turns, Turn("assistant", text)]
    ).tensors["input_ids"]
    length = ids.shape[1]
    answer: list[int] = []
    if told.shape[1] > length and torch.equal(told[:, :length], ids.to(told.device)):
        rest = told[0, length:].tolist()
        wanted = letters(text)
        spelt = (k for k in range(1, len(rest) + 1) if said(loaded, rest[:k]) == wanted)
        answer = rest[: next(spelt, 0)]
    if not answer:
        answer = loaded.files.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([*answer, *end_ids(loaded)[:1]], dtype=torch.long)


def end_ids(loaded: Loaded) -> list[int]:
    """The tokens that end an answer, the tokenizer's own first; [] where generation never ends."""
    ends = getattr(loaded.model.generation_config, "eos_token_id", None)
    ends = [] if ends is None else torch.tensor(ends).flatten().tolist()
    return sorted(ends, key=lambda one: one != loaded.files.tokenizer.eos_token_id)


def said(loaded: Loaded, ids: list[int]) -> str:
    """What tokens spell, without blanks and special tokens."""
    return letters(str(loaded.files.tokenizer.decode(ids, skip_special_tokens=True)))


def letters(text: str) -> str:
    """A text without its blanks, which tokenizers move about."""
    return "".join(text.split())


def extend(tensors: Tensors, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A model's inputs, a batch of 1, with text tokens `ids`, (n,), behind them."""
    longer = dict(tensors)
    for name in ROWS:
        if name in tensors:
            row = tensors[name]
            fill = 1 if name == "attention_mask" else 0
            new = ids.to(row.dtype) if name == "input_ids" else torch.full_like(ids, fill)
            longer[name] = torch.cat([row, new[None].to(row.dtype)], dim=1)
    return longer


def places(loaded: Loaded, tensors: Tensors, start: int) -> dict[str, torch.Tensor]:
    """The argument that says where the columns from `start` on are, for models that need it.

    Models with positions in time, row and column go on wrongly from a cache when left to
    themselves: behind a video they count from its last moment, generation from the last token.

    Args:
        tensors: of the whole prompt, whose last columns are text.
    """
    locate = getattr(find_structure(loaded.model).inner, "get_rope_index", None)
    if locate is None:
        return {}
    takes = check_arguments("the model: get_rope_index", locate, ROPE_INDEX)
    found = locate(**{name: value for name, value in tensors.items() if name in takes})[0]
    return {"position_ids": found[..., start:]}  # (3, 1, n)


def predictions(loaded: Loaded, most: int) -> dict[str, int]:
    """The argument that limits logits to the last `most` positions, where the model takes it."""
    takes = inspect.signature(loaded.model.forward).parameters
    return {"logits_to_keep": most} if "logits_to_keep" in takes else {}


@torch.no_grad()
def score_whole(loaded: Loaded, prompt: Prompt) -> Score:
    """The score from one forward over prompt and answer, inside a `pruning` block.

    Right where no method looks at the text, which the answer is then a part of.
    """
    count = len(prompt.answer)
    tensors = extend(prompt.tensors, prompt.answer[:-1])
    out = loaded.model(**tensors, use_cache=False, **predictions(loaded, count))
    return score(out.logits[0, -count:], prompt.answer)


def score_forced(loaded: Loaded, prompt: Prompt) -> Score:
    """The score from a prefill of the prompt and a continuation, inside a `pruning` block."""
    return score(forced_logits(loaded, prompt), prompt.answer)


@torch.no_grad()
def forced_logits(loaded: Loaded, prompt: Prompt) -> torch.Tensor:
    """(m, V) predictions of an answer's m tokens, from a prefill of the prompt and a continuation.

    The methods see the prompt alone, as when the model answers.
    """
    out = loaded.model(**prompt.tensors, use_cache=True, **predictions(loaded, 1))
    return continued_logits(
        loaded, prompt.tensors, out.logits[0, -1:], cache_made(out), prompt.answer
    )


@torch.no_grad()
def score_each(loaded: Loaded, tensors: Tensors, answers: Sequence[torch.Tensor]) -> list[Score]:
    """The scores of several answers to one prompt, prefilled once, inside a `pruning` block.

    Args:
        tensors: the model's inputs, a batch of 1, on its device.
        answers: (m,) int64 of each.
    """
    out = loaded.model(**tensors, use_cache=True, **predictions(loaded, 1))
    first, cache = out.logits[0, -1:], cache_made(out)
    return [
        score(continued_logits(loaded, tensors, first, fork_cache(cache), answer), answer)
        for answer in answers
    ]


def continued_logits(
    loaded: Loaded, tensors: Tensors, first: torch.Tensor, cache: object, answer: torch.Tensor
) -> torch.Tensor:
    """(m, V) predictions of an answer's m tokens on the cache of its prompt, which it lengthens.

    Args:
        tensors: of the prompt.
        first: (1, V) the prefill's prediction.
    """
    if len(answer) == 1:
        return first
    forced = answer[None, :-1].to(first.device)
    whole = extend(tensors, forced[0])
    more = loaded.model(
        input_ids=forced,
        use_cache=True,
        **cache_argument(loaded.model, cache),
        **places(loaded, whole, tensors["input_ids"].shape[1]),
    )
    return torch.cat([first, more.logits[0]])
