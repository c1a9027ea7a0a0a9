"""A pruned model as harnesses ask it: many conversations in batches, answers and their losses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vtprune.engine import pruning
from vtprune.engine.inputs import PreparedInputs
from vtprune.errors import MediaError, VtpruneError
from vtprune.inference.answers import Score, said_ids, score_each
from vtprune.inference.batching import collate, group_alike
from vtprune.inference.gathering import Gathered, gather_for
from vtprune.inference.generation import Generation
from vtprune.inference.memory import fitting_errors
from vtprune.inference.prompts import encode_turns, to_device
from vtprune.inference.run import pad_id, pruned
from vtprune.media import Limits
from vtprune.models.base import Inputs, Turn
from vtprune.models.loading import Loaded
from vtprune.models.upstream import quiet
from vtprune.serving.harness.conversation import Conversation, shown_in, store, window
from vtprune.serving.harness.settings import Settings


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Args:
        text: special tokens left out.
        prompt_tokens: of its prompt, before anything was cut.
        tokens: of the answer, the end of its turn included.
        keep_mean: the layer average of the fraction of visual tokens present; None without media.
    """

    text: str
    prompt_tokens: int
    tokens: int
    keep_mean: float | None


class Asker:
    """A model under a preset, loaded once.

    Args:
        device: in place of the settings' own.
    """

    def __init__(self, settings: Settings, device: str | None = None) -> None:
        self.settings = settings
        self.preset = settings.resolve()
        self.sampling = settings.sampling()
        most = settings.max_pixels or Limits().max_pixels
        self.limits = Limits(most, settings.allow_partial)
        self.loaded: Loaded = settings.load(device)

    def answer(
        self, conversations: Sequence[Conversation], generation: Generation, batch_size: int = 1
    ) -> list[Answer]:
        """The answers to conversations that end with what a user says, in left-padded batches."""
        asked = [self.prepare(one)[2] for one in conversations]
        answers: dict[int, Answer] = {}
        for numbers in group_alike([one.tensors for one in asked], batch_size):
            rows = [asked[number] for number in numbers]
            batch = collate([one.tensors for one in rows], pad_id(self.loaded))
            tensors = to_device(self.loaded, batch)
            runs = pruned(self.loaded, tensors, self.preset, generation, prompts=rows)
            for number, run in zip(numbers, runs, strict=True):
                keep = run.trace.keep_mean(run.sample) if run.trace.layouts else None
                length = int(asked[number].tensors["input_ids"].shape[1])
                answers[number] = Answer(run.answer, length, len(run.tokens), keep)
        return [answers[number] for number in range(len(conversations))]

    def score(self, conversation: Conversation, texts: Sequence[str]) -> list[Score]:
        """How probable each of several answers is; the prompt is prefilled once."""
        turns, gathered, inputs = self.prepare(conversation)
        ids = inputs.tensors["input_ids"]
        said = [said_ids(self.loaded, gathered, turns, text, ids) for text in texts]
        tensors = to_device(self.loaded, inputs.tensors)
        block = pruning(
            self.loaded.model,
            self.preset,
            threads="own",
            calibration=self.loaded.calibration,
            inputs=PreparedInputs.of(tensors, [inputs]),
        )
        with quiet(), block as trace, fitting_errors(self.loaded, self.preset, trace):
            return score_each(self.loaded, tensors, said)

    def prepare(self, conversation: Conversation) -> tuple[list[Turn], Gathered, Inputs]:
        """A conversation, its media read, and the model's inputs."""
        media = shown_in(conversation)
        turns = [one.turn() for one in conversation]
        if self.settings.system_prompt and not any(one.role == "system" for one in turns):
            turns.insert(0, Turn("system", self.settings.system_prompt))
        with tempfile.TemporaryDirectory(prefix="vtprune-") as folder:
            paths = store(media, Path(folder))
            sampling = window(self.sampling, media)
            gathered = gather_for(self.loaded, paths, sampling, self.preset, self.limits)
        if len(gathered.items) != len(paths):
            raise MediaError(
                f"{len(paths)} media items of a question have {len(gathered.items)} pages",
                "give every page as a picture of its own",
            )
        return turns, gathered, encode_turns(self.loaded, gathered, turns)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors that name the question, and the way out, which harnesses do not show by themselves."""
    try:
        yield
    except VtpruneError as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise type(error)(f"{what}: {error.message}{hint}", error.hint) from error


def until(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first of the texts that end it.

    Blanks alone end none: harnesses give the empty line between examples where a task says
    nothing, and a chat model ends its turn itself.
    """
    for stop in stops:
        if stop.strip():
            text = text.split(stop, 1)[0]
    return text.strip()
