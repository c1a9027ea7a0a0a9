"""Follow-up questions: in the conversation of the first, on the tokens that its prefill kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from vtprune.errors import ModelError, VtpruneError
from vtprune.evaluation.records import Record
from vtprune.evaluation.runner import UNPRUNED_PRESET, FileRunner, Forced
from vtprune.evaluation.variants import UNPRUNED, Variant
from vtprune.inference.forced_answers import (
    PromptWithAnswer,
    append_text,
    end_of_turn_ids,
    logits_on_cache,
    logits_to_keep_argument,
    position_ids_from,
    prefill,
    spelling,
    without_blanks,
)
from vtprune.models.base import Turn
from vtprune.models.seams import cache_argument
from vtprune.preset.spec import Preset

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded


@dataclass(frozen=True, eq=False)
class Conversation:
    """Two questions about one file.

    Args:
        first: the first question, whose prefill is pruned as when it stands alone.
        rest: (n,) int64 ids of what follows: the unpruned model's answer to it, as the chat
            template writes that, and the second question, up to where its answer begins.
        spoken: how many of those are of the answer.
    """

    first: PromptWithAnswer
    rest: torch.Tensor
    spoken: int


def converse(
    loaded: Loaded, first: PromptWithAnswer, answer: torch.Tensor, question: str, system: str = ""
) -> Conversation:
    """Return the conversation that goes on with a second question.

    Where a template writes an answered question otherwise than one to be answered, what is on the
    cache counts: the answer's own tokens follow it, and then what the template writes after them.

    Args:
        answer: (k,) int64 ids of the answer to the first question.

    Raises:
        ModelError: the chat template leaves the answer out.
    """
    spoken = [token for token in answer.tolist() if token not in end_of_turn_ids(loaded)]
    text = str(loaded.files.tokenizer.decode(spoken, skip_special_tokens=True)).strip()
    turns = [Turn("system", system)] if system else []
    turns += [
        Turn("user", first.asked.question, len(first.prepared.media.items)),
        Turn("assistant", text),
        Turn("user", question),
    ]
    encoded = loaded.family.encode(loaded.files, first.prepared.media.items, turns)
    both, prompt = encoded.tensors["input_ids"][0], first.tensors["input_ids"][0]
    ids, before = both.tolist(), prompt.tolist()
    length = min(len(ids), len(before))
    same = next((i for i in range(length) if ids[i] != before[i]), length)
    if same == len(before):
        rest = both[same:]
        count = len(spoken) if rest[: len(spoken)].tolist() == spoken else 0
        return Conversation(first, rest.to(prompt.device), count)
    spelt = without_blanks(text)
    ends = (end for end in range(same + 1, len(ids)) if spelling(loaded, ids[same:end]) == spelt)
    end = next(ends, None) if spelt else None
    if end is None:
        raise ModelError(
            "the chat template does not write the answer to the first question as it is, so a "
            "follow-up question can't go on from its KV cache",
            "leave out --turns",
        )
    rest = torch.tensor(spoken + ids[end:], device=prompt.device)
    return Conversation(first, rest, len(spoken))


@torch.no_grad()
def forced_follow_up(
    loaded: Loaded, conversation: Conversation, answer: torch.Tensor, stepwise: bool = False
) -> torch.Tensor:
    """Return (m, V) predictions of a second answer's m tokens, inside a `pruning` block.

    Args:
        stepwise: a forward for each token of both answers, so that cuts while decoding count.
    """
    first, rest = conversation.first.tensors, conversation.rest
    _, cache = prefill(loaded, first)
    more = torch.cat([rest, answer[:-1].to(rest.device)])
    positions = position_ids_from(loaded, append_text(first, more), first["input_ids"].shape[1])
    borders = [0, conversation.spoken, len(rest), len(more)] if stepwise else [0, len(more)]
    rows = []
    for number, (start, end) in enumerate(pairwise(borders)):
        if start == end:
            continue
        part = {name: value[..., start:end] for name, value in positions.items()}
        answered = stepwise and number != 1
        rows.append(logits_on_cache(loaded, more[None, start:end], cache, part,
                                    answered))  # fmt: skip
    return torch.cat(rows)[-len(answer) :]


@torch.no_grad()
def greedy_follow_up(
    loaded: Loaded, conversation: Conversation, longest: int, stepwise: bool = False
) -> torch.Tensor:
    """Return (m,) int64, the second answer by greedy decoding, inside a `pruning` block.

    Not by `generate`, which would take the new tokens to follow each other where a video's do not.

    Args:
        stepwise: as of `forced_follow_up`.
    """
    ends = set(end_of_turn_ids(loaded))
    first, ids = conversation.first.tensors, conversation.rest
    _, cache = prefill(loaded, first)
    positions = position_ids_from(loaded, append_text(first, ids), first["input_ids"].shape[1])
    spoken = conversation.spoken
    if stepwise and spoken:
        part = {name: value[..., :spoken] for name, value in positions.items()}
        logits_on_cache(loaded, ids[None, :spoken], cache, part, True)
        ids = ids[spoken:]
        positions = {name: value[..., spoken:] for name, value in positions.items()}
    answer: list[int] = []
    while True:
        output = loaded.model(
            input_ids=ids[None],
            use_cache=True,
            **cache_argument(loaded.model, cache),
            **positions,
            **logits_to_keep_argument(loaded, 1),
        )
        answer.append(int(output.logits[0, -1].argmax()))
        if answer[-1] in ends or len(answer) == longest:
            return torch.tensor(answer)
        positions = {name: value[..., -1:] + 1 for name, value in positions.items()}
        ids = ids.new_tensor(answer[-1:])


def follow_up_records(
    runner: FileRunner, place: int, number: int, variants: Sequence[Variant]
) -> list[Record]:
    """Return the records of one question as a follow-up of the one before it about the file.

    The first question of a file follows its last. The first answer is the unpruned model's under
    every variant, so that nothing but the kept tokens on the cache differs.

    Args:
        place: of the question among those about the file.
        variants: those that miss it.
    """
    unpruned, unpruned_answer = _follow_up(runner, place, UNPRUNED_PRESET, None)
    records = []
    for variant in variants:
        try:
            if variant.error is not None:
                raise variant.error
            forced, answer = unpruned, unpruned_answer
            if variant.role != UNPRUNED:
                forced, answer = _follow_up(runner, place, variant.preset, unpruned_answer)
            records.append(runner.record(place, number, variant, runner.text(answer),
                                         unpruned_answer, forced, unpruned))  # fmt: skip
        except VtpruneError as error:
            records.append(Record(number, variant.key, error=error.message))
    return records


def _follow_up(
    runner: FileRunner, place: int, preset: Preset, unpruned: torch.Tensor | None
) -> tuple[Forced, torch.Tensor]:
    """Ask a follow-up under a preset; return the forced predictions, and the answer's ids.

    Args:
        unpruned: ids of the unpruned model's answer; None for the unpruned model itself.
    """
    loaded, generation, before = runner.loaded, runner.settings.generation, place - 1
    conversation = converse(
        loaded,
        runner.sampled(preset).prompts[before],
        runner.full.prompts[before].answer,
        runner.asked[place].question,
        generation.system,
    )
    longest = generation.max_new_tokens
    with runner.block(conversation.first, preset) as trace:
        stepwise = preset.decode is not None
        expected = unpruned
        if expected is None:
            expected = greedy_follow_up(loaded, conversation, longest)
        logits = forced_follow_up(loaded, conversation, expected, stepwise)
        forced = Forced(logits, trace.keep_mean())
        follows = forced.follows(expected)
        answer = expected
        if not follows:
            answer = greedy_follow_up(loaded, conversation, longest, stepwise)
    return forced, answer
