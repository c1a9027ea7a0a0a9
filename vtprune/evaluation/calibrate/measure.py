"""The order of a calibration: every file once, then what all of them say together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.evaluation.calibrate.entropy import entropy_curve, find_collapse
from vtprune.evaluation.calibrate.horizon import Horizon, find_horizon, quality, relative_change
from vtprune.evaluation.calibrate.propose import SELECTORS, Schedule, Search, Tried, schedules
from vtprune.evaluation.calibrate.result import Information, Measured
from vtprune.evaluation.calibrate.withdrawal import drop_scores, open_prefix, token_information
from vtprune.inference.answers import Prompt, Score, prepare
from vtprune.inference.generation import Generation
from vtprune.inference.memory import FEWER, memory_told
from vtprune.inference.questions_file import Asked
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.models.upstream import quiet
from vtprune.preset.calibration import Calibration

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress

ENOUGH_INPUTS = 50  # for an entropy collapse layer
GROUPS = ("general", "text-heavy")


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one file said."""

    asked: Sequence[Asked]
    answers: Sequence[torch.Tensor]
    scores: Sequence[tuple[Score, ...]]
    curve: tuple[float, ...]
    information: torch.Tensor | None


@dataclass(frozen=True)
class Settings:
    """How a calibration is done.

    Args:
        sampling: how much of the media is looked at.
        generation: of the unpruned model's answers, for questions without one.
        windows: inputs whose token information is measured.
        keep: a budget to propose schedules for; None for none.
        methods: that the schedules select tokens by; () takes the usual ones.
        options: of every one of them that has such an option.
        seed: of the bootstrap.
    """

    sampling: Sampling = field(default_factory=Sampling)
    generation: Generation = field(default_factory=lambda: Generation(max_new_tokens=64))
    limits: Limits = field(default_factory=Limits)
    windows: int = 0
    keep: float | None = None
    methods: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


def calibrate(
    loaded: Loaded,
    asked: Sequence[Asked],
    source: str = "",
    settings: Settings | None = None,
    on_progress: Progress | None = None,
) -> Measured:
    """Finds the entropy collapse layer and the information horizon of a model.

    Every file is read, encoded and prefilled once; the answers to all questions about it are then
    scored with all visual tokens dropped from each layer on. Files follow each other, so memory
    does not grow with their number.

    Args:
        source: what the questions are called in the calibration.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    files = _by_file(asked)
    if settings.keep is not None:  # a method that is not known is told before anything runs
        _candidates(loaded, settings, Calibration(1, 1, None, {}, "default"))
    chosen = {n * len(files) // settings.windows for n in range(settings.windows)}
    warnings = list(loaded.warnings)
    labelled = sum(one.answer is not None for one in asked)
    if 0 < labelled < len(asked):
        warnings.append(
            f"{labelled} of {len(asked)} questions have a right answer: its probability counts, "
            "and agreement for the others, which weigh more; better ask them apart"
        )
    seen = []
    for number, own in enumerate(files):
        _show(on_progress, "calibrating", number, len(files))
        with _fitting(loaded, own[0].file):
            seen.append(_see(loaded, own, settings, number in chosen, warnings))
    measured = _conclude(loaded, seen, source, settings, warnings)
    tried: tuple[Tried, ...] = ()
    if settings.keep is not None:
        tried = _try(loaded, seen, settings, measured.calibration(), on_progress)
    return replace(measured, tried=tried, seconds=time.perf_counter() - started)


def _by_file(asked: Sequence[Asked]) -> list[list[Asked]]:
    files: dict[Path, list[Asked]] = {}
    for one in asked:
        files.setdefault(one.file, []).append(one)
    return list(files.values())


def _show(on_progress: Progress | None, stage: str, done: int, total: int) -> None:
    if on_progress:
        on_progress(stage, done, total)


@contextmanager
def _fitting(loaded: Loaded, file: Path) -> Iterator[None]:
    """Upstream's chatter off; running out of memory names the file and the way out."""
    told = f"out of memory on {loaded.model.device} with {file}"
    with quiet(), memory_told(lambda: (told, FEWER)):
        yield


def _see(
    loaded: Loaded, asked: Sequence[Asked], settings: Settings, look: bool, warnings: list[str]
) -> _Seen:
    """All that one file has to say."""
    encoded: FeatureCache = {}
    prompts, notes = prepare(
        loaded, asked, settings.sampling, settings.generation, settings.limits, encoded
    )
    warnings += [note for note in notes if note not in warnings]
    prefix = open_prefix(loaded, prompts[0], encoded)
    first = prompts[0]
    curve = (
        prefix.curve
        if prefix
        else entropy_curve(loaded, first.tensors, PreparedInputs(first.media, encoded))
    )
    alike = [prefix is not None and prefix.fits(prompt) for prompt in prompts]
    together = [prompt for prompt, fits in zip(prompts, alike, strict=True) if fits]
    shared = iter(drop_scores(loaded, together, prefix, encoded))
    scores = [
        next(shared)
        if fits  # else the question comes before its pictures
        else drop_scores(loaded, [one], prefix and open_prefix(loaded, one, encoded), encoded)[0]
        for one, fits in zip(prompts, alike, strict=True)
    ]
    information = None
    if look and prefix:
        information = token_information(loaded, first, prefix, scores[0])
    elif look:
        warnings.append(
            f"{first.asked.file}: token information needs visual tokens without text in between"
        )
    return _Seen(asked, [one.answer for one in prompts], scores, curve, information)


def _conclude(
    loaded: Loaded, seen: Sequence[_Seen], source: str, settings: Settings, warnings: list[str]
) -> Measured:
    """What all files say together."""
    collapse = find_collapse(torch.tensor([one.curve for one in seen]))
    if len(seen) < ENOUGH_INPUTS:
        warnings.append(
            f"the entropy collapse layer is of {len(seen)} inputs; {ENOUGH_INPUTS} or more are "
            "wanted"
        )
    if collapse.drop <= 0:
        warnings.append("entropy does not fall in the first half of the layers: no ecl is in sight")
    rows = [(a, s) for one in seen for a, s in zip(one.asked, one.scores, strict=True)]
    horizons = {}
    for group in GROUPS:
        own = [(a, s) for a, s in rows if a.text_heavy == (group == "text-heavy")]
        if own:
            horizons[group] = _horizon(own, settings.seed)
    config = loaded.model.get_decoder().config
    model = {"name": loaded.name, "family": loaded.family.name,
             "model_type": str(loaded.model.config.model_type),
             "layers": len(collapse.curve), "hidden_size": int(config.hidden_size)}  # fmt: skip
    return Measured(
        model=model,
        source=source,
        questions=len(rows),
        labelled=sum(asked.answer is not None for asked, _ in rows),
        inputs=len(seen),
        collapse=collapse,
        horizons=horizons,
        information=_information(seen),
        keep=settings.keep,
        warnings=tuple(dict.fromkeys(warnings)),
        day=date.today().isoformat(),
    )


def _horizon(rows: Sequence[tuple[Asked, tuple[Score, ...]]], seed: int) -> Horizon:
    worth = np.array([[quality(asked, one) for one in scores] for asked, scores in rows])
    exact = np.array([[one.greedy for one in scores] for _, scores in rows])
    files = [str(asked.file) for asked, _ in rows]
    change = relative_change(worth[:, -1].tolist(), worth[:, :-1], files, seed)
    return find_horizon(change, exact.mean(axis=0)[:-1].tolist())


def _information(seen: Sequence[_Seen]) -> Information | None:
    found = [one.information for one in seen if one.information is not None]
    if not found:
        return None
    mean = torch.cat(found, dim=1).mean(dim=1)
    largest = torch.stack([one.abs().amax(dim=1) for one in found]).mean(dim=0)
    return Information(tuple(mean.tolist()), tuple(largest.tolist()), len(found))


def _candidates(loaded: Loaded, settings: Settings, known: Calibration) -> list[Schedule]:
    assert settings.keep is not None
    num_layers = len(loaded.model.get_decoder().layers)
    selectors = settings.methods or SELECTORS
    return schedules(settings.keep, num_layers, known, selectors, settings.options)


def _try(
    loaded: Loaded,
    seen: Sequence[_Seen],
    settings: Settings,
    known: Calibration,
    on_progress: Progress | None,
) -> tuple[Tried, ...]:
    """The table of proposals, from a second reading of the files."""
    assert settings.keep is not None
    search = Search(loaded, settings.keep, known, _candidates(loaded, settings, known))
    for number, one in enumerate(seen):
        _show(on_progress, "trying schedules", number, len(seen))
        encoded: FeatureCache = {}
        with _fitting(loaded, one.asked[0].file):
            prompts: list[Prompt] = prepare(
                loaded, one.asked, settings.sampling, settings.generation, settings.limits,
                encoded, one.answers,
            )[0]  # fmt: skip
            for prompt in prompts:
                search.prompt(prompt, encoded)
    before = [scores[-1] for one in seen for scores in one.scores]
    return tuple(search.table(before, [asked for one in seen for asked in one.asked]))
