"""Second questions, in the conversation of the first and on the tokens that its prefill left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune.errors import ModelError, VtpruneError
from vtprune.evaluation.predicted import loss_and_divergence
from vtprune.evaluation.records import Record
from vtprune.evaluation.variants import UNPRUNED, Variant
from vtprune.inference.answers import Prompt, end_ids, extend, letters, places, predictions, said
from vtprune.inference.memory import fitting_errors
from vtprune.models.base import Turn
from vtprune.models.seams import cache_argument, cache_made
from vtprune.models.upstream import quiet
from vtprune.preset.spec import Preset

if TYPE_CHECKING:
    from vtprune.evaluation.answering import AskedFile
    from vtprune.models.loading import Loaded


@dataclass(frozen=True, eq=False)
class Conversation:
    """Two questions about one file.

    Args:
        first: the first one, whose prefill is pruned as when it stands alone.
        rest: (n,) int64 ids of what follows: the unpruned model's answer to it, as the chat
            template writes that, and the second question, up to where its answer begins.
    """

    first: Prompt
    rest: torch.Tensor


def converse(
    loaded: Loaded, first: Prompt, answer: torch.Tensor, question: str, system: str = ""
) -> Conversation:
    """The conversation that goes on with a second question.

    Where a template writes an answered question otherwise than one to be answered, what is on the
    cache counts: the answer's own tokens follow it, and then what the template writes after them.

    Args:
        answer: (k,) int64 ids of the answer to the first one.

    Raises:
        ModelError: the chat template leaves the answer out.
    """
    assert first.gathered is not None
    spoken = [one for one in answer.tolist() if one not in end_ids(loaded)]
    text = str(loaded.files.tokenizer.decode(spoken, skip_special_tokens=True)).strip()
    turns = [Turn("system", system)] if system else []
    turns += [
        Turn("user", first.asked.question, len(first.gathered.items)),
        Turn("assistant", text),
        Turn("user", question),
    ]
    told = loaded.family.encode(loaded.files, first.gathered.items, turns).tensors["input_ids"][0]
    ids = first.tensors["input_ids"]
    rest, before = told.tolist(), ids[0].tolist()
    same = next(
        (place for place, pair in enumerate(zip(rest, before, strict=False)) if len({*pair}) > 1),
        min(len(rest), len(before)),
    )
    if same == len(before):
        return Conversation(first, told[same:].to(ids.device))
    wanted = letters(text)
    ends = (end for end in range(same + 1, len(rest)) if said(loaded, rest[same:end]) == wanted)
    end = next(ends, None) if wanted else None
    if end is None:
        raise ModelError(
            "the chat template does not write the answer to the first question as it is, so a "
            "second one can't go on from its cache",
            "leave out --turns",
        )
    return Conversation(first, torch.tensor(spoken + rest[end:], device=ids.device))


@torch.no_grad()
def forced_second(loaded: Loaded, talk: Conversation, answer: torch.Tensor) -> torch.Tensor:
    """(m, V) predictions of a second answer's m tokens, inside a `pruning` block."""
    out = loaded.model(**talk.first.tensors, use_cache=True, **predictions(loaded, 1))
    start, count = talk.first.tensors["input_ids"].shape[1], len(answer)
    more = torch.cat([talk.rest, answer[:-1].to(talk.rest.device)])
    whole = extend(talk.first.tensors, more)
    made = loaded.model(
        input_ids=more[None],
        use_cache=True,
        **cache_argument(loaded.model, cache_made(out)),
        **places(loaded, whole, start),
        **predictions(loaded, count),
    )
    logits = made.logits[0, -count:]
    assert isinstance(logits, torch.Tensor)
    return logits


@torch.no_grad()
def greedy_second(loaded: Loaded, talk: Conversation, most: int) -> torch.Tensor:
    """(m,) int64 the second answer by greedy decoding, at most so long, inside a `pruning` block.

    Not by `generate`, which would take the new tokens to follow each other where a video's do not.
    """
    ends = set(end_ids(loaded))
    out = loaded.model(**talk.first.tensors, use_cache=True, **predictions(loaded, 1))
    start = talk.first.tensors["input_ids"].shape[1]
    where = places(loaded, extend(talk.first.tensors, talk.rest), start)
    ids, found = talk.rest, list[int]()
    while True:
        out = loaded.model(
            input_ids=ids[None],
            use_cache=True,
            **cache_argument(loaded.model, cache_made(out)),
            **where,
            **predictions(loaded, 1),
        )
        found.append(int(out.logits[0, -1].argmax()))
        if found[-1] in ends or len(found) == most:
            return torch.tensor(found)
        where = {name: value[..., -1:] + 1 for name, value in where.items()}
        ids = talk.rest.new_tensor(found[-1:])


@dataclass(frozen=True, eq=False)
class _Given:
    """A second answer, and the predictions of the unpruned one's tokens."""

    answer: torch.Tensor
    logits: torch.Tensor
    keep_mean: float


def second_records(
    file: AskedFile, place: int, number: int, cells: Sequence[Variant]
) -> list[Record]:
    """The records of one question as the second of a conversation, after the one before it.

    The first question of a file comes after its last. The first answer is the unpruned model's in
    every cell, so that nothing but the tokens on the cache differs.

    Args:
        place: of the question among those about the file.
        cells: those that are missing.
    """
    base = _give(file, place, Preset(name=UNPRUNED, keep=1.0), None)
    records = []
    for cell in cells:
        try:
            if cell.error is not None:
                raise cell.error
            given = base
            if cell.role != UNPRUNED:
                given = _give(file, place, cell.preset, base.answer)
            records.append(_record(file, place, number, cell.key, given, base))
        except VtpruneError as error:
            records.append(Record(number, cell.key, error=error.message))
    return records


def _give(file: AskedFile, place: int, preset: Preset, unpruned: torch.Tensor | None) -> _Given:
    """The second answer under a preset.

    Args:
        unpruned: the unpruned model's; None for itself.
    """
    settings, before = file.settings, place - 1
    talk = converse(
        file.loaded,
        file.look(preset).prompts[before],
        file.full.prompts[before].answer,
        file.asked[place].question,
        settings.generation.system,
    )
    most = settings.generation.max_new_tokens
    block = file.block(talk.first, preset)
    with quiet(), block as trace, fitting_errors(file.loaded, preset, trace):
        wanted = greedy_second(file.loaded, talk, most) if unpruned is None else unpruned
        logits = forced_second(file.loaded, talk, wanted)
        answer = wanted
        if not torch.equal(logits.argmax(-1).cpu(), wanted):
            answer = greedy_second(file.loaded, talk, most)
    return _Given(answer, logits, trace.keep_mean() if trace.layouts else 1.0)


def _record(
    file: AskedFile, place: int, number: int, key: str, given: _Given, base: _Given
) -> Record:
    loss, divergence = loss_and_divergence(given.logits, base.logits, base.answer)
    text = file.text(given.answer)
    return Record(
        question=number,
        cell=key,
        answer=text,
        score=file.settings.rate(file.asked[place], text),
        same=text == file.text(base.answer),
        loss=loss,
        divergence=divergence,
        keep_mean=given.keep_mean,
    )
