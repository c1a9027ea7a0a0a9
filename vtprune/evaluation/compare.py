"""`compare`: methods and presets on one question, each timed against the unpruned model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import ModelError, PresetError, VtpruneError
from vtprune.evaluation.comparison import Comparison, ComparisonRow
from vtprune.evaluation.variants import (
    KEEPS,
    UNPRUNED,
    Variant,
    VariantList,
    counts_after_cuts,
    list_variants,
    matched_baselines,
    unpruned_variant,
)
from vtprune.inference.compare import (
    PAIRS,
    Pair,
    SecondsByPart,
    Side,
    medians,
    roofline_speedup,
    sum_up,
    time_pairs,
)
from vtprune.inference.evidence import MapSettings
from vtprune.inference.evidence.ask import UNPRUNED as UNPRUNED_PRESET
from vtprune.inference.evidence.ask import answer_to_explain
from vtprune.inference.evidence.explain import kept_of_maps, map_run
from vtprune.inference.evidence.explanation import ExplainedRun
from vtprune.inference.generate import Generation, generate
from vtprune.inference.measuring import build_report
from vtprune.inference.prepare import PreparedQuestion, prepare_question, sampling_of, with_sampling
from vtprune.inference.prompt_media import Media, PromptMedia, read_in_full, read_media
from vtprune.inference.roofline import measure_ceilings
from vtprune.inference.wording import name_sources
from vtprune.media import Limits, Medium, media_list
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, Progress, find_loaded
from vtprune.models.transformers_messages import quiet
from vtprune.tokens.layout import MODALITIES

if TYPE_CHECKING:
    from torch import nn

    from vtprune.engine.inputs import FeatureCache
    from vtprune.inference.generate import Run
    from vtprune.inference.report import Report, StageCount
    from vtprune.preset import Preset


def compare_methods(
    model: nn.Module | Loaded | str | Path | None,
    media: Media,
    question: str,
    methods: Sequence[str] = (),
    keeps: Sequence[float | str] = KEEPS,
    *,
    presets: Sequence[str | Path | Mapping[str, object] | Preset] = (),
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    repeats: int = PAIRS,
    on_progress: Progress | None = None,
) -> Comparison:
    """Answer one question with every method at every keep, and time each against no pruning.

    >>> import vtprune
    >>> comparison = vtprune.compare_methods(None, "clip.mp4", "what moves?", ["entropy"], [0.3])
    >>> for row in comparison.rows:
    ...     print(row.role, row.method, row.keep, row.answer)

    Always among the rows are the unpruned model, the baselines at every keep, and the matched
    baselines of every row that cuts past the input: `random` and `uniform` at its layers and
    counts. All rows see the same media and decode greedily. A row that can't be run has the reason
    in place of figures.

    Args:
        model: a loaded transformers model, a name as for `load`, or None for the embedded one.
        media: an item or several, as of `ask`.
        methods: each at its own place, or at `at`.
        keeps: layer averages of the kept fraction.
        presets: each at every keep, or once if its stages set all their keeps.
        options: of every method that has such an option.
        seed: of all random choices; None: the presets' own, else 0.
        sampling: frames and tiles of all rows; None: what the presets agree on, else the family's
            own.
        repeats: pairs of runs a row, unpruned and pruned in ABBA order after a warm-up; 0: answers
            and counts alone, for which the vision tower runs once.

    Raises:
        VtpruneError: nothing of what was asked is valid, the media can't be read, or the unpruned
            model can't answer.
    """
    began = time.perf_counter()
    listed = list_variants(methods, keeps, presets, at, options, seed)
    paths = media_list(media)
    loads = model is None or isinstance(model, (str, Path))
    return run_comparison(
        find_loaded(model), paths, question, listed, sampling=sampling, generation=generation,
        limits=limits, repeats=repeats, since=began if loads else None, on_progress=on_progress,
    )  # fmt: skip


def run_comparison(
    loaded: Loaded,
    paths: Sequence[Medium],
    question: str,
    listed: VariantList,
    *,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    repeats: int = PAIRS,
    since: float | None = None,
    startup: float = 0.0,
    evidence: bool = False,
    on_progress: Progress | None = None,
) -> Comparison:
    """Run the variants of a comparison, as `compare_methods` does.

    Args:
        sampling: frames and tiles; None: as the list of variants says, else the family's own.
        since, startup: as in `answer_questions`.
        evidence: map what the unpruned answer rests on, and say what every row keeps of it.
    """
    began = time.perf_counter() if since is None else since
    if repeats < 0:
        raise PresetError(f"repeats {repeats} is out of range", "5 or more; 0 does not measure")
    greedy = (generation or Generation()).greedy
    sampling = sampling or sampling_of(listed.media)
    gathered = read_in_full(loaded, paths, sampling, limits or Limits(), on_progress)
    read_again = partial(read_media, loaded, gathered.sources, sampling, limits=limits or Limits())
    prompt = prepare_question(loaded, gathered, question, greedy)
    rows = _Rows(loaded, prompt, read_again, question, sampling, greedy, on_progress)
    rows.answer_all([unpruned_variant(listed.seed), *listed.variants])
    if evidence:
        rows.map_evidence()
    notes = list(listed.notes)
    if repeats:
        rows.time_all(repeats)
    if 0 < repeats < PAIRS:
        times = "once" if repeats == 1 else f"{repeats} times"
        notes.append(f"every row was timed {times}: medians of fewer than {PAIRS} pairs are rough")
    load = 0.0 if since is None else loaded.seconds
    seconds = {"startup": startup, "load": load, "total": time.perf_counter() - began}
    return rows.result(notes, repeats, seconds)


@dataclass(eq=False)
class _Row:
    """A row of a comparison while it runs.

    Args:
        report, run, prompt: of its answer; None where it could not run.
        error: why not.
        matches: names of the rows whose layers and counts it has.
        pairs: seconds of its timed runs, each with one of the unpruned model.
        roofline: the speed-up that the machine's measured ceilings allow; None: not counted.
        evidence: the maps of the unpruned answer; None: not asked for.
    """

    variant: Variant
    report: Report | None = None
    run: Run | None = None
    prompt: PreparedQuestion | None = None
    error: VtpruneError | None = None
    matches: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    roofline: float | None = None
    evidence: ExplainedRun | None = None

    @property
    def stages(self) -> Sequence[StageCount]:
        """The cuts that were made."""
        return self.report.tokens.stages if self.report else []

    @property
    def reason(self) -> str:
        """The error and the way out."""
        assert self.error is not None
        hint = f" ({self.error.hint})" if self.error.hint else ""
        return self.error.message + hint

    def warnings(self) -> list[str]:
        """Return what to know of this row alone: why it could not run, or has no baselines."""
        if self.report is None:
            return [f"{self.variant.row}: not run: {self.reason}"]
        notes = []
        kept = [count for _, count in counts_after_cuts(self.stages)]
        if self.variant.role == "asked" and kept and not any(kept):
            notes.append(f"{self.variant.name} keeps no token to choose, so it has no matched "
                         "baselines")  # fmt: skip
        return notes

    def evidence_kept(self) -> float | None:
        """Return the share of the unpruned answer's evidence that is kept; None if it is unknown,
        as where the tokens are of smaller media."""
        kept = self.report.kept_tokens if self.report else None
        if self.evidence is None or kept is None:
            return None
        if len(kept.layout) != len(self.evidence.kept.layout):
            return None
        return kept_of_maps(self.evidence, kept).mean

    def side(self) -> Side:
        """Return what is timed."""
        assert self.prompt is not None
        return Side(self.prompt, None if self.variant.role == UNPRUNED else self.variant.preset)

    def result(self, unpruned_answer: str, runs: Sequence[SecondsByPart]) -> ComparisonRow:
        """Return the row with its figures.

        Args:
            runs: seconds of its timed runs; none where nothing was timed.
        """
        variant, report, run = self.variant, self.report, self.run
        preset = report.preset.to_dict() if report else variant.preset.to_dict()
        row = ComparisonRow(variant.role, variant.method or None, preset, variant.at, variant.keep,
                            dict(variant.options), tuple(self.matches))  # fmt: skip
        if report is None or run is None or self.prompt is None:
            return replace(row, error=self.reason)
        compare = None
        if self.pairs:
            compare = sum_up(self.pairs, unpruned_answer, run, report, self.roofline)
        return replace(
            row,
            answer=run.answer,
            same_answer=run.answer == unpruned_answer,
            tokens=report.tokens,
            evidence_kept=self.evidence_kept(),
            flops=report.flops,
            kv_cache_bytes=report.kv_cache_bytes,
            seconds={**self.prompt.seconds, **medians(runs)} if runs else None,
            compare=compare,
        )


class _Rows:
    """The rows of a comparison, the unpruned model's first.

    Args:
        prompt: the question about all of the media.
        read_media: reads as much of the media as a preset samples.
        generation: greedy.
    """

    def __init__(
        self,
        loaded: Loaded,
        prompt: PreparedQuestion,
        read_media: Callable[[Preset], PromptMedia],
        question: str,
        sampling: Sampling,
        generation: Generation,
        on_progress: Progress | None,
    ) -> None:
        self.loaded, self.prompt, self.gather_for = loaded, prompt, read_media
        self.question, self.sampling, self.generation = question, sampling, generation
        self.on_progress = on_progress
        self.features: FeatureCache = {}
        self.rows: list[_Row] = []

    @property
    def unpruned(self) -> _Row:
        """The row of the unpruned model."""
        return self.rows[0]

    def show(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        if self.on_progress:
            self.on_progress(stage, done, total)

    def answer_all(self, variants: Sequence[Variant]) -> None:
        """Run every variant, then the matched baselines of those that cut past the input."""
        for number, variant in enumerate(variants):
            self.show("answering", number, len(variants))
            self.rows.append(self.answer(variant))
            if self.unpruned.error is not None:
                raise self.unpruned.error
        asked = [row for row in self.rows if row.variant.role == "asked"]
        for number, row in enumerate(asked):
            self.show("answering matched baselines", number, len(asked))
            self.add_matched_baselines(row)

    def answer(self, variant: Variant) -> _Row:
        """Run one variant; an error that a user can act on is its result."""
        try:
            if variant.error is not None:
                raise variant.error
            prompt = self.prompt_for(variant.preset)
            run = generate(self.loaded, [prompt], variant.preset, self.generation,
                           features=self.features)[0]  # fmt: skip
        except VtpruneError as error:
            return _Row(variant, error=error)
        preset = with_sampling(variant.preset, self.sampling)
        report = build_report(self.loaded, prompt, preset, run, began=time.perf_counter())
        return _Row(variant, report, run, prompt)

    def prompt_for(self, preset: Preset) -> PreparedQuestion:
        """Return the prompt that all variants share, or one with less of the media."""
        if not any(preset.downsampling_stage(modality) for modality in MODALITIES):
            return self.prompt
        media = self.gather_for(preset)
        return prepare_question(self.loaded, media, self.question, self.generation)

    def add_matched_baselines(self, row: _Row) -> None:
        """Insert `random` and `uniform` at a row's layers and counts right after it.

        One that is there already, for another row or because it was asked for, is not run again.
        """
        place = self.rows.index(row) + 1
        for variant in matched_baselines(row.variant, row.stages) if row.report else ():
            if variant.method == row.variant.method:
                continue
            baseline = next((other for other in self.rows
                             if other.report and other.variant.method == variant.method
                             and counts_after_cuts(other.stages) == variant.counts),
                            None)  # fmt: skip
            if baseline is None:
                baseline = self.answer(variant)
                if baseline.report and counts_after_cuts(baseline.stages) != variant.counts:
                    message = f"{variant.method} can't be given the counts of {row.variant.name}"
                    baseline = _Row(variant, error=ModelError(message))
                self.rows.insert(place, baseline)
                place += 1
            baseline.matches.append(row.variant.name)

    def map_evidence(self) -> None:
        """Map what the unpruned answer rests on, for all rows."""
        answer = answer_to_explain(
            self.loaded, self.prompt, UNPRUNED_PRESET, self.generation, self.features
        )
        maps = map_run(answer, MapSettings(), on_progress=self.on_progress)
        for row in self.rows:
            row.evidence = maps

    def time_all(self, repeats: int) -> None:
        """Time every row in turn with the unpruned model, the vision tower included."""
        assert self.unpruned.run is not None
        length = len(self.unpruned.run.tokens)
        ceilings = measure_ceilings(self.loaded.model.device, self.loaded.model.dtype)
        rows = [row for row in self.rows[1:] if row.run is not None]
        steps = 2 * repeats + 1
        for number, row in enumerate(rows):
            assert row.run is not None
            row.roofline = roofline_speedup(self.loaded, row.run, ceilings)

            def show(done: int, before: int = number * steps) -> None:
                self.show("measuring", before + done, len(rows) * steps)

            with quiet():
                row.pairs = time_pairs(self.loaded, self.unpruned.side(), row.side(),
                                       self.generation, length, repeats, show)  # fmt: skip

    def result(self, notes: Sequence[str], pairs: int, seconds: Mapping[str, float]) -> Comparison:
        """Return all rows, and what to know before believing a figure."""
        report, run = self.unpruned.report, self.unpruned.run
        assert report is not None
        assert run is not None
        reports = [(row.variant.row, row.report) for row in self.rows if row.report]
        warnings = name_sources([(name, report.warnings) for name, report in reports])
        warnings += [note for row in self.rows for note in row.warnings()]
        rows = [
            row.result(run.answer, [pair.pruned for pair in row.pairs]) for row in self.rows[1:]
        ]
        unpruned_runs = [pair.unpruned for row in self.rows for pair in row.pairs]
        return Comparison(
            question=self.question,
            model=report.model,
            input=report.input,
            rows=(self.unpruned.result(run.answer, unpruned_runs), *rows),
            pairs=pairs,
            seconds=seconds,
            warnings=tuple(dict.fromkeys([*notes, *warnings])),
            version=report.version,
        )
