"""The runner: questions under many variants, on features that are encoded once a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from vtprune.engine.inputs import FeatureCache
from vtprune.errors import VtpruneError
from vtprune.evaluation.records import NeedleKept, Record
from vtprune.evaluation.scoring import score_answers
from vtprune.evaluation.variants import UNPRUNED, Variant, matched_baselines
from vtprune.inference.forced_answers import PromptWithAnswer, forced_logits, prepare_with_answers
from vtprune.inference.generate import Generation, generate, pruned
from vtprune.inference.kept_tokens import KeptTokens, keep_record
from vtprune.inference.measuring import count_tokens
from vtprune.inference.questions_file import Asked
from vtprune.media import AskedMedia, Limits
from vtprune.models.base import Sampling
from vtprune.models.transformers_messages import quiet
from vtprune.preset.spec import Preset
from vtprune.tokens.layout import MODALITIES

if TYPE_CHECKING:
    from vtprune.engine.trace import Trace
    from vtprune.inference.report import StageCount
    from vtprune.models.loading import Loaded
    from vtprune.preset.calibration import Calibration

COMPARED_TOKENS = 8  # of an answer, whose predictions are compared by their KL divergence
UNPRUNED_PRESET = Preset(name=UNPRUNED, keep=1.0)
Scorer = Callable[[Asked, str], float]
NeedleMeasure = Callable[[Asked, KeptTokens], NeedleKept | None]


@dataclass(frozen=True)
class AskSettings:
    """How questions are asked.

    Args:
        sampling: frames and tiles of the media.
        generation: greedy; its length is that of the longest answer.
        score: how right an answer is, where the right one is known.
        metric: the name of what `score` goes by; answers of another are not gone on with.
        needle: says how much of a question's needle a run kept; None: nothing was planted.
    """

    sampling: Sampling = field(default_factory=Sampling)
    generation: Generation = field(default_factory=lambda: Generation(max_new_tokens=64))
    limits: Limits = field(default_factory=Limits)
    score: Scorer | None = None
    metric: str = "auto"
    needle: NeedleMeasure | None = None

    def rate(self, asked: Asked, answer: str) -> float | None:
        """Return how right an answer is; None where nobody knows."""
        if asked.answer is None:
            return None
        if self.score is not None:
            return self.score(asked, answer)
        return score_answers(asked.right_answers, answer, asked.choices, self.metric)


def group_by_file(asked: Sequence[Asked]) -> list[list[int]]:
    """Return the numbers of the questions about each file, file by file."""
    files: dict[AskedMedia, list[int]] = {}
    for number, question in enumerate(asked):
        files.setdefault(question.file, []).append(number)
    return list(files.values())


@dataclass(frozen=True, eq=False)
class Forced:
    """What a model gave whose answer was forced to the unpruned model's tokens.

    Args:
        logits: (m, V) predictions of the answer's m tokens.
        keep_mean: layer average of the kept fraction.
        stages: the cuts, as a report has them.
        prefill, first: seconds of the prefill, and from the resized media to the first token.
        needle: how much of the question's needle was kept; None without one.
    """

    logits: torch.Tensor
    keep_mean: float
    stages: Sequence[StageCount] = ()
    prefill: float = 0.0
    first: float = 0.0
    needle: NeedleKept | None = None

    def follows(self, answer: torch.Tensor) -> bool:
        """Return whether greedy decoding gives the tokens of `answer`, (m,) int64."""
        return torch.equal(self.logits.argmax(-1).cpu(), answer.cpu())


@dataclass(eq=False)
class SampledFile:
    """The questions about a file, as much of it as a variant samples.

    Args:
        vision: seconds of the vision tower.
    """

    prompts: Sequence[PromptWithAnswer]
    vision: float = 0.0


class FileRunner:
    """Runs the questions about one file under any variant, on features that are encoded once.

    Args:
        asked: the questions.
        right_answers: force the right answers, where they are known; else the unpruned model's.
        known: the answers' token ids, from an earlier runner.
    """

    def __init__(
        self,
        loaded: Loaded,
        asked: Sequence[Asked],
        settings: AskSettings,
        right_answers: bool = False,
        known: Sequence[torch.Tensor] = (),
    ) -> None:
        self.loaded, self.asked, self.settings = loaded, asked, settings
        self.right_answers = right_answers
        self.features: FeatureCache = {}
        self.notes: tuple[str, ...] = ()
        prompts = self._prepare(known)
        self.full = SampledFile(prompts, max(prompt.vision for prompt in prompts))
        self.smaller: dict[Preset, SampledFile | VtpruneError] = {}

    def _prepare(
        self, known: Sequence[torch.Tensor] = (), preset: Preset | None = None
    ) -> list[PromptWithAnswer]:
        asked, settings = self.asked, self.settings
        if not self.right_answers:
            asked = [Asked(each.file, each.question) for each in asked]
        with quiet():
            prompts, notes = prepare_with_answers(
                self.loaded, asked, settings.sampling, settings.generation, settings.limits,
                self.features, known, preset,
            )  # fmt: skip
        self.notes = self.notes or notes
        return prompts

    def sampled(self, preset: Preset) -> SampledFile:
        """Return the questions about as much of the file as a preset samples.

        Raises:
            VtpruneError: its budget can't be met.
        """
        downsamples = any(preset.downsampling_stage(modality) for modality in MODALITIES)
        if not downsamples and preset.frame_and_tile_stage() is None:
            return self.full
        if preset not in self.smaller:
            try:
                answers = [prompt.answer for prompt in self.full.prompts]
                prompts = self._prepare(answers, preset) if downsamples else self.full.prompts
                self.smaller[preset] = SampledFile(prompts)
            except VtpruneError as error:
                self.smaller[preset] = error
        sampled = self.smaller[preset]
        if isinstance(sampled, VtpruneError):
            raise sampled
        return sampled

    @contextmanager
    def block(
        self, prompt: PromptWithAnswer, preset: Preset, calibration: Calibration | None = None
    ) -> Iterator[Trace]:
        """Prune what runs inside; running out of memory names what would fit."""
        inputs = prompt.for_engine(self.features)
        with pruned(self.loaded, preset, inputs, calibration) as trace:
            yield trace

    def force(self, place: int, preset: Preset, calibration: Calibration | None = None) -> Forced:
        """Prefill a prompt under a preset, and force the answer's tokens after it.

        Args:
            place: of the question among those about the file.
        """
        sampled = self.sampled(preset)
        prompt = sampled.prompts[place]
        with self.block(prompt, preset, calibration) as trace:
            logits = forced_logits(self.loaded, prompt, stepwise=preset.decode is not None)
        sampled.vision = max(sampled.vision, trace.seconds.get("vision", 0.0))
        prefill = trace.seconds.get("prefill", 0.0)
        stages = count_tokens(trace, 0, 0).stages
        return Forced(logits, trace.keep_mean(), stages, prefill, prefill + sampled.vision,
                      self._needle_kept(place, prompt, trace))  # fmt: skip

    def _needle_kept(self, place: int, prompt: PromptWithAnswer, trace: Trace) -> NeedleKept | None:
        if self.settings.needle is None:
            return None
        kept = keep_record(self.loaded, prompt.prepared, trace, 0)
        return None if kept is None else self.settings.needle(self.asked[place], kept)

    def answer(
        self, place: int, number: int, missing: set[str], variants: Sequence[Variant]
    ) -> list[Record]:
        """Return the records of one question, asked alone.

        Args:
            place: of the question among those about the file.
            number: of the question among all.
            missing: keys of the variants that it has no record of.
            variants: all, of which matched baselines need others.
        """
        unpruned = self.force(place, UNPRUNED_PRESET)
        stages: dict[str, Sequence[StageCount]] = {}
        compared = {variant.matches.key for variant in variants
                    if variant.matches and variant.key in missing}  # fmt: skip
        records = []
        for variant in variants:
            if variant.key not in missing | compared:
                continue
            try:
                preset = self.preset_of(variant, stages)
                is_unpruned = variant.role == UNPRUNED
                forced = unpruned if is_unpruned else self.force(place, preset)
                stages[variant.key] = forced.stages
                prompt = self.sampled(preset).prompts[place]
                answer = self.text(prompt.answer)
                if not forced.follows(prompt.answer):
                    answer = self.generated(prompt, preset)
                record = self.record(place, number, variant, answer, prompt.answer, forced,
                                     unpruned)  # fmt: skip
            except VtpruneError as error:
                if variant.role == UNPRUNED:
                    raise
                record = Record(number, variant.key, error=error.message)
            if variant.key in missing:
                records.append(record)
        return records

    def preset_of(self, variant: Variant, stages: Mapping[str, Sequence[StageCount]]) -> Preset:
        """Return what a variant cuts of this question.

        Args:
            stages: of the variants that ran, by their keys.

        Raises:
            VtpruneError: it can't run, or matches a variant without cuts past the input.
        """
        if variant.error is not None:
            raise variant.error
        if variant.matches is None:
            return variant.preset
        for baseline in matched_baselines(variant, stages.get(variant.matches.key, ())):
            if baseline.method == variant.method:
                return baseline.preset
        raise VtpruneError("no matching cut: the compared method cuts only at the input")

    def generated(self, prompt: PromptWithAnswer, preset: Preset) -> str:
        """Return the greedy answer under a preset."""
        run = generate(self.loaded, [prompt.prepared], preset, self.settings.generation,
                       features=self.features)[0]  # fmt: skip
        return run.answer

    def text(self, ids: torch.Tensor) -> str:
        """Return the text of an answer's token ids."""
        decoded = self.loaded.files.tokenizer.decode(ids, skip_special_tokens=True)
        return str(decoded).strip()

    def record(
        self,
        place: int,
        number: int,
        variant: Variant,
        answer: str,
        unpruned_answer: torch.Tensor,
        forced: Forced,
        unpruned: Forced,
    ) -> Record:
        """Return what is kept of one question under one variant.

        Args:
            answer: of the variant.
            unpruned_answer: (m,) token ids, which were forced.
        """
        loss, divergence = loss_and_divergence(forced.logits, unpruned.logits, unpruned_answer)
        return Record(
            question=number,
            cell=variant.key,
            answer=answer,
            score=self.settings.rate(self.asked[place], answer),
            same=answer == self.text(unpruned_answer),
            loss=loss,
            divergence=divergence,
            keep_mean=forced.keep_mean,
            prefill=forced.prefill,
            first=forced.first,
            needle=forced.needle,
        )


def loss_and_divergence(
    logits: torch.Tensor, unpruned: torch.Tensor, answer: torch.Tensor
) -> tuple[float, float]:
    """Return minus the tokens' mean log-probability, and the first tokens' mean KL divergence.

    Args:
        logits, unpruned: (m, V) predictions of the answer's m tokens.
        answer: (m,) int64.
    """
    likely = logits.float().log_softmax(-1)
    taken = likely.gather(1, answer.to(likely.device)[:, None]).mean()
    before = unpruned[:COMPARED_TOKENS].float().log_softmax(-1)
    gap = F.kl_div(likely[:COMPARED_TOKENS], before, log_target=True, reduction="batchmean")
    return -float(taken), max(float(gap), 0.0)
