"""Several methods on one question, each beside the same unpruned model and the same baselines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import ModelError, PresetError, VtpruneError
from vtprune.evaluation.standing import Standing
from vtprune.evaluation.variants import (
    KEEPS,
    Variant,
    VariantList,
    counts_after_cuts,
    list_variants,
    matched_baselines,
    unpruned_variant,
)
from vtprune.inference.compare import PAIRS, measure_ceilings, roofline_speedup, time_pairs
from vtprune.inference.comparison import Comparison
from vtprune.inference.gathering import Gathered, gather, gather_for
from vtprune.inference.generation import Generation
from vtprune.inference.prompts import Prompt, as_sampled, ready, sampling_of
from vtprune.inference.run import Media, find_loaded, finish, pruned
from vtprune.media import Limits, Source
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, Progress
from vtprune.models.upstream import quiet
from vtprune.tokens.layout import MODALITIES

if TYPE_CHECKING:
    from torch import nn

    from vtprune.engine.inputs import FeatureCache
    from vtprune.preset import Preset


def compare_methods(
    model: nn.Module | Loaded | str | Path | None,
    media: Media | Sequence[Source],
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
    """Answers one question with every method at every keep, and times each beside no pruning.

    In it are always the unpruned model, the baselines at every keep, and `random` and `uniform`
    again at the layers and counts of every asked row that cuts past the input. All rows look at the
    same pictures and answer greedily. A row that can't be run has the reason in place of figures.

    Args:
        model: a loaded transformers model, a name as for `load`, or None for the embedded one.
        media: a file or several.
        methods: each at its own place, or at `at`.
        keeps: layer averages of the kept fraction.
        presets: beside the methods; each at every keep, or once if its stages say all their keeps.
        options: of every method that has such an option.
        seed: of all random choices; None: the presets' own, else 0.
        sampling: how much of the media all rows look at; None: what the presets agree on, else the
            family's own.
        repeats: pairs of runs a row, unpruned and pruned in ABBA order after a warm-up; 0: answers
            and counts alone, for which the vision tower runs once.

    Raises:
        VtpruneError: nothing of what was asked is valid, the media can't be read, or the unpruned
            model can't answer.
    """
    began = time.perf_counter()
    lineup = list_variants(methods, keeps, presets, at, options, seed)
    paths = [media] if isinstance(media, (str, Path)) else list(media)
    loads = model is None or isinstance(model, (str, Path))
    return run_lineup(
        find_loaded(model), paths, question, lineup, sampling=sampling, generation=generation,
        limits=limits, repeats=repeats, since=began if loads else None, on_progress=on_progress,
    )  # fmt: skip


def run_lineup(
    loaded: Loaded,
    paths: Sequence[str | Path | Source],
    question: str,
    lineup: VariantList,
    *,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    repeats: int = PAIRS,
    since: float | None = None,
    startup: float = 0.0,
    on_progress: Progress | None = None,
) -> Comparison:
    """Runs the rows of a comparison; as `compare_methods`.

    Args:
        sampling: how much of the media; None: as the lineup says, else the family's own.
        since, startup: as in `run.ask`.
    """
    began = time.perf_counter() if since is None else since
    if repeats < 0:
        raise PresetError(f"repeats {repeats} is out of range", "5 or more; 0 does not measure")
    greedy = (generation or Generation()).greedy
    sampling = sampling or sampling_of(lineup.media)
    gathered = gather(loaded, paths, sampling, limits or Limits(), on_progress)
    again = partial(gather_for, loaded, gathered.sources, sampling, limits=limits or Limits())
    prompt = ready(loaded, gathered, question, greedy)
    table = _Contest(loaded, prompt, again, question, sampling, greedy, on_progress)
    table.answer_all([unpruned_variant(lineup.seed), *lineup.variants])
    notes = list(lineup.notes)
    if repeats:
        table.measure_all(repeats)
    if 0 < repeats < PAIRS:
        times = "once" if repeats == 1 else f"{repeats} times"
        notes.append(f"every row was timed {times}: medians of fewer than {PAIRS} pairs are rough")
    load = 0.0 if since is None else loaded.seconds
    seconds = {"startup": startup, "load": load, "total": time.perf_counter() - began}
    return table.result(notes, repeats, seconds)


class _Contest:
    """One question, ready for the model, and its rows in order."""

    def __init__(
        self,
        loaded: Loaded,
        prompt: Prompt,
        gather_for: Callable[[Preset], Gathered],
        question: str,
        sampling: Sampling,
        generation: Generation,
        on_progress: Progress | None,
    ) -> None:
        self.loaded, self.prompt, self.gather_for = loaded, prompt, gather_for
        self.question, self.sampling, self.generation = question, sampling, generation
        self.on_progress = on_progress
        self.encoded: FeatureCache = {}
        self.rows: list[Standing] = []

    @property
    def base(self) -> Standing:
        return self.rows[0]

    # -- answers ---------------------------------------------------------------------------------

    def answer_all(self, entries: Sequence[Variant]) -> None:
        """Runs every entry, then the baselines beside those that cut past the input."""
        for number, entry in enumerate(entries):
            self.show("answering", number, len(entries))
            self.rows.append(self.answer(entry))
            if self.base.error is not None:
                raise self.base.error
        asked = [row for row in self.rows if row.variant.role == "asked"]
        for number, row in enumerate(asked):
            self.show("answering beside", number, len(asked))
            self.stand_beside(row)

    def answer(self, entry: Variant) -> Standing:
        """One row; an error that a user can act on is its result."""
        try:
            if entry.error is not None:
                raise entry.error
            prompt = self.prompt_for(entry.preset)
            run = pruned(self.loaded, prompt.inputs.tensors, entry.preset, self.generation,
                         encoded=self.encoded, prompts=[prompt.inputs])[0]  # fmt: skip
        except VtpruneError as error:
            return Standing(entry, error=error)
        run = replace(run, seconds={**run.seconds, **prompt.seconds})
        preset = as_sampled(entry.preset, self.sampling)
        report = finish(self.loaded, prompt.gathered, prompt.inputs, self.question, preset, run,
                        time.perf_counter())  # fmt: skip
        return Standing(entry, report, run, prompt)

    def prompt_for(self, preset: Preset) -> Prompt:
        """What a row is asked: the same as all others, unless it is to look at less."""
        if not any(preset.downsampling_stage(modality) for modality in MODALITIES):
            return self.prompt
        return ready(self.loaded, self.gather_for(preset), self.question, self.generation)

    def stand_beside(self, row: Standing) -> None:
        """Puts `random` and `uniform` at a row's own layers and counts right after it.

        One that is there already, for another row or because it was asked for, is not run again.
        """
        place = self.rows.index(row) + 1
        for entry in matched_baselines(row.variant, row.stages) if row.report else ():
            if entry.method == row.variant.method:
                continue
            same = next((one for one in self.rows
                         if one.report and one.variant.method == entry.method
                         and counts_after_cuts(one.stages) == entry.counts), None)  # fmt: skip
            if same is None:
                same = self.answer(entry)
                if same.report and counts_after_cuts(same.stages) != entry.counts:
                    message = f"it could not be given the counts of {row.variant.name}"
                    same = Standing(entry, error=ModelError(message))
                self.rows.insert(place, same)
                place += 1
            same.beside.append(row.variant.name)

    # -- times -----------------------------------------------------------------------------------

    def measure_all(self, repeats: int) -> None:
        """Times every row that has run beside the unpruned model, the vision tower included."""
        assert self.base.run is not None
        length = len(self.base.run.tokens)
        ceilings = measure_ceilings(self.loaded.model.device, self.loaded.model.dtype)
        rows = [row for row in self.rows[1:] if row.run is not None]
        steps = 2 * repeats + 1
        for number, row in enumerate(rows):
            assert row.run is not None
            row.roofline = roofline_speedup(self.loaded, row.run, ceilings)

            def show(done: int, before: int = number * steps) -> None:
                self.show("measuring", before + done, len(rows) * steps)

            with quiet():
                row.pairs = time_pairs(
                    self.loaded, self.base.side(), row.side(), self.generation, length, repeats,
                    show,
                )  # fmt: skip

    def show(self, stage: str, done: int, total: int) -> None:
        if self.on_progress:
            self.on_progress(stage, done, total)

    # -- what comes out --------------------------------------------------------------------------

    def result(self, notes: Sequence[str], pairs: int, seconds: Mapping[str, float]) -> Comparison:
        """All rows, and what the reader should know of any of them."""
        base = self.base
        assert base.report is not None
        assert base.run is not None
        told = Counter(note for row in self.rows if row.report for note in row.report.warnings)
        own = [note for row in self.rows for note in row.notes(told)]
        took = {id(row): [pair.pruned for pair in row.pairs] for row in self.rows}
        took[id(base)] = [pair.unpruned for row in self.rows for pair in row.pairs]
        return Comparison(
            question=self.question,
            model=base.report.model,
            input=base.report.input,
            rows=tuple(row.row(base.run.answer, took[id(row)]) for row in self.rows),
            pairs=pairs,
            seconds=seconds,
            warnings=tuple(dict.fromkeys([*notes, *own])),
            version=base.report.version,
        )
