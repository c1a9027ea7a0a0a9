"""One question after the other, each in every cell, on features that were encoded once a file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtprune.engine import pruning
from vtprune.engine.inputs import FeatureCache
from vtprune.errors import DamagedError, VtpruneError
from vtprune.evaluation.predicted import loss_and_divergence
from vtprune.evaluation.records import Book, Record
from vtprune.evaluation.scoring import score
from vtprune.evaluation.second import second_records
from vtprune.evaluation.variants import UNPRUNED, Variant, matched_baselines
from vtprune.inference.answers import Prompt, forced_logits, prepare
from vtprune.inference.figures import count_tokens
from vtprune.inference.generation import Generation, generate
from vtprune.inference.memory import fitting_errors
from vtprune.inference.questions_file import Asked
from vtprune.inference.report import StageCount
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.models.upstream import quiet
from vtprune.preset.spec import Preset
from vtprune.tokens.layout import MODALITIES

if TYPE_CHECKING:
    from vtprune.engine.trace import Trace
    from vtprune.models.loading import Loaded, Progress

Scorer = Callable[[Asked, str], float]


@dataclass(frozen=True)
class Settings:
    """How questions are asked.

    Args:
        sampling: how much of the media is looked at.
        generation: greedy; its length is that of the longest answer.
        score: how right an answer is, where the right one is known.
        metric: what `score` goes by: answers that were scored by another are not gone on with.
    """

    sampling: Sampling = field(default_factory=Sampling)
    generation: Generation = field(default_factory=lambda: Generation(max_new_tokens=64))
    limits: Limits = field(default_factory=Limits)
    score: Scorer | None = None
    metric: str = "auto"

    def rate(self, asked: Asked, given: str) -> float | None:
        """How right an answer is; None where nobody knows."""
        if asked.answer is None:
            return None
        if self.score is not None:
            return self.score(asked, given)
        return score(asked.answer, given, asked.choices)


def answer_all(
    loaded: Loaded,
    asked: Sequence[Asked],
    cells: Sequence[Variant],
    book: Book,
    settings: Settings,
    on_progress: Progress | None = None,
    broken: dict[Path, DamagedError] | None = None,
) -> None:
    """Fills the book: every question in every cell that it does not hold yet.

    Files follow each other; each is read and encoded once. The unpruned model answers first: every
    cell is compared with that answer, token by token, and generates one of its own only where
    greedy decoding leaves it.

    Args:
        broken: takes the files that open but can't be decoded, whose questions are left out; None:
            the first such file ends it.

    Raises:
        VtpruneError: a file that can't be read, or a question the unpruned model can't answer.
    """
    files: dict[Path, list[int]] = {}
    for number, one in enumerate(asked):
        files.setdefault(one.file, []).append(number)
    turns = any(cell.follow_up for cell in cells)
    done = 0
    for numbers in files.values():
        missing = {number: _missing(book, number, cells, len(numbers)) for number in numbers}
        wanted = [number for number in numbers if missing[number]]
        if wanted:
            own = numbers if turns else wanted
            try:
                file = AskedFile(loaded, [asked[number] for number in own], settings)
            except DamagedError as error:
                if broken is None:
                    raise
                broken[asked[numbers[0]].file] = error
                wanted = []
            for count, number in enumerate(wanted):
                _show(on_progress, done + count, len(asked))
                book.add(file.records(own.index(number), number, missing[number], cells))
        done += len(numbers)
        _show(on_progress, done, len(asked))


def _missing(book: Book, number: int, cells: Sequence[Variant], together: int) -> list[Variant]:
    """The cells that a question has no record of; a file's only question is never a second one."""
    return [
        cell for cell in cells
        if not book.has(number, cell.key) and (together > 1 or not cell.follow_up)
    ]  # fmt: skip


def _show(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress:
        on_progress("answering", done, total)


@dataclass(eq=False)
class _Looked:
    """The questions about one file, as it is looked at: in full, or less of it.

    Args:
        vision: seconds that encoding what is looked at took.
    """

    prompts: Sequence[Prompt]
    vision: float = 0.0


@dataclass(frozen=True, eq=False)
class _Given:
    """What one cell gave: the predictions of the unpruned answer's tokens, and the clock."""

    logits: torch.Tensor
    trace: Trace
    prefill: float
    first: float


class AskedFile:
    """The questions about one file, on features that are encoded once."""

    def __init__(self, loaded: Loaded, asked: Sequence[Asked], settings: Settings) -> None:
        self.loaded, self.asked, self.settings = loaded, asked, settings
        self.encoded: FeatureCache = {}
        prompts = self.prepare()
        self.full = _Looked(prompts, max(prompt.vision for prompt in prompts))
        self.less: dict[Preset, _Looked | VtpruneError] = {}

    def prepare(
        self, known: Sequence[torch.Tensor] = (), preset: Preset | None = None
    ) -> list[Prompt]:
        """The questions, with the unpruned model's answers."""
        unlabelled = [Asked(one.file, one.question) for one in self.asked]
        settings = self.settings
        with quiet():
            return prepare(self.loaded, unlabelled, settings.sampling, settings.generation,
                           settings.limits, self.encoded, known, preset)[0]  # fmt: skip

    def look(self, preset: Preset) -> _Looked:
        """The questions as a cell is asked them: about less of the file where it downsamples.

        Raises:
            VtpruneError: its budget can't be met.
        """
        smaller = any(preset.downsamples(modality) for modality in MODALITIES)
        if not smaller and preset.at_pixels() is None:
            return self.full
        if preset not in self.less:
            try:
                known = [prompt.answer for prompt in self.full.prompts]
                prompts = self.prepare(known, preset) if smaller else self.full.prompts
                self.less[preset] = _Looked(prompts)
            except VtpruneError as error:
                self.less[preset] = error
        found = self.less[preset]
        if isinstance(found, VtpruneError):
            raise found
        return found

    def block(self, prompt: Prompt, preset: Preset) -> AbstractContextManager[Trace]:
        """What prunes a prompt about this file."""
        return pruning(
            self.loaded.model,
            preset,
            threads="own",
            calibration=self.loaded.calibration,
            inputs=prompt.prepared(self.encoded),
        )

    def records(
        self, place: int, number: int, missing: Sequence[Variant], cells: Sequence[Variant]
    ) -> list[Record]:
        """The records of one question in the cells that miss it."""
        alone = [cell for cell in missing if not cell.follow_up]
        second = [cell for cell in missing if cell.follow_up]
        found = self.ask(place, number, alone, cells) if alone else []
        return found + (second_records(self, place, number, second) if second else [])

    def ask(
        self, place: int, number: int, missing: Sequence[Variant], cells: Sequence[Variant]
    ) -> list[Record]:
        """The records of one question, asked alone."""
        asked, answer = self.asked[place], self.full.prompts[place].answer
        base = self.force(self.full, place, Preset(name=UNPRUNED, keep=1.0))
        unpruned = self.text(answer)
        stages: dict[str, Sequence[StageCount]] = {}
        parents = {cell.matches.key for cell in missing if cell.matches}
        records = []
        for cell in [c for c in cells if c in missing or c.key in parents]:
            try:
                preset = self.preset(cell, stages)
                looked = self.look(preset)
                given = base if cell.key == UNPRUNED else self.force(looked, place, preset)
                stages[cell.key] = _stages(given.trace)
                prompt = looked.prompts[place]
                made = functools.partial(self.record, prompt, asked, base, unpruned)
                record = made(number, cell, given, preset)
            except VtpruneError as error:
                if cell.key == UNPRUNED:
                    raise
                record = Record(number, cell.key, error=error.message)
            if cell in missing:
                records.append(record)
        return records

    def preset(self, cell: Variant, stages: Mapping[str, Sequence[StageCount]]) -> Preset:
        """What a cell cuts of this question.

        Raises:
            VtpruneError: it stands beside a cell that cut nothing past the input.
        """
        if cell.error is not None:
            raise cell.error
        if cell.matches is None:
            return cell.preset
        parent = stages.get(cell.matches.key, ())
        for baseline in matched_baselines(cell, parent):
            if baseline.method == cell.method:
                return baseline.preset
        raise VtpruneError("no matching cut: the compared method cuts only at the input")

    def force(self, looked: _Looked, place: int, preset: Preset) -> _Given:
        """One prefill, and the unpruned answer's tokens after it."""
        prompt = looked.prompts[place]
        with (
            quiet(),
            self.block(prompt, preset) as trace,
            fitting_errors(self.loaded, preset, trace),
        ):
            logits = forced_logits(self.loaded, prompt)
        seconds = trace.seconds
        looked.vision = max(looked.vision, seconds.get("vision", 0.0))
        prefill = seconds.get("prefill", 0.0)
        return _Given(logits, trace, prefill, prefill + looked.vision)

    def record(
        self,
        prompt: Prompt,
        asked: Asked,
        base: _Given,
        unpruned: str,
        number: int,
        cell: Variant,
        given: _Given,
        preset: Preset,
    ) -> Record:
        """What one cell made of one question."""
        answer = unpruned
        if not bool((given.logits.argmax(-1).cpu() == prompt.answer.cpu()).all()):
            answer = self.generated(prompt, preset)
        loss, divergence = loss_and_divergence(given.logits, base.logits, prompt.answer)
        return Record(
            question=number,
            cell=cell.key,
            answer=answer,
            score=self.settings.rate(asked, answer),
            same=answer == unpruned,
            loss=loss,
            divergence=divergence,
            keep_mean=given.trace.keep_mean() if given.trace.layouts else 1.0,
            prefill=given.prefill,
            first=given.first,
        )

    def generated(self, prompt: Prompt, preset: Preset) -> str:
        """A cell's own greedy answer."""
        with quiet(), self.block(prompt, preset) as trace:
            run = generate(self.loaded, prompt.tensors, self.settings.generation, trace)[0]
        return run.answer

    def text(self, ids: torch.Tensor) -> str:
        decoded = self.loaded.files.tokenizer.decode(ids, skip_special_tokens=True)
        return str(decoded).strip()


def _stages(trace: Trace) -> Sequence[StageCount]:
    return count_tokens(trace, 0, 0).stages
