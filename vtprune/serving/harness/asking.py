"""A pruned model as harnesses ask it: many conversations in batches, answers and their losses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vtprune.errors import MediaError, VtpruneError
from vtprune.inference.forced_answers import Score, next_turn_ids, score_answers
from vtprune.inference.generate import Generation, generate_batches, pruned
from vtprune.inference.prepare import PreparedQuestion, prepare_turns
from vtprune.inference.prompt_media import read_media
from vtprune.media import Limits
from vtprune.models.base import Turn
from vtprune.models.loading import Loaded
from vtprune.serving.harness.conversation import Conversation, media_in, store, window
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
        asked = [self.prepare(conversation, on_device=False) for conversation in conversations]
        answers: dict[int, Answer] = {}
        batches = generate_batches(self.loaded, asked, self.preset, generation, batch_size)
        for number, run in (item for runs in batches for item in runs.items()):
            keep = run.trace.keep_mean(run.sample) if run.trace.layouts else None
            length = int(asked[number].tensors["input_ids"].shape[1])
            answers[number] = Answer(run.answer, length, len(run.tokens), keep)
        return [answers[number] for number in range(len(conversations))]

    def score(self, conversation: Conversation, texts: Sequence[str]) -> list[Score]:
        """How probable each of several answers is; the prompt is prefilled once."""
        prompt = self.prepare(conversation)
        turns, ids = self.turns(conversation), prompt.tensors["input_ids"]
        answers = [next_turn_ids(self.loaded, prompt.media, turns, text, ids) for text in texts]
        with pruned(self.loaded, self.preset, prompt.for_engine()):
            return score_answers(self.loaded, prompt.tensors, answers)

    def turns(self, conversation: Conversation) -> list[Turn]:
        """A conversation as the families take it, with the settings' system prompt."""
        turns = [message.turn() for message in conversation]
        if self.settings.system_prompt and not any(turn.role == "system" for turn in turns):
            turns.insert(0, Turn("system", self.settings.system_prompt))
        return turns

    def prepare(self, conversation: Conversation, on_device: bool = True) -> PreparedQuestion:
        """A conversation, its media read, as the model's inputs."""
        media = media_in(conversation)
        with tempfile.TemporaryDirectory(prefix="vtprune-") as folder:
            paths = store(media, Path(folder))
            sampling = window(self.sampling, media)
            gathered = read_media(self.loaded, paths, sampling, self.preset, self.limits)
        if len(gathered.items) != len(paths):
            raise MediaError(
                f"{len(paths)} media items of a question have {len(gathered.items)} pages",
                "give every page as a picture of its own",
            )
        return prepare_turns(self.loaded, gathered, self.turns(conversation), on_device=on_device)


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
