"""`tune`: the lowest keep that holds a floor, searched on some files and tested on the others."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import PresetError, VtpruneError
from vtprune.evaluation.bootstrap import fewest_files, files_needed, highest_floor
from vtprune.evaluation.damaged import DamagedFiles
from vtprune.evaluation.evaluate import answer_all, default_places, file_names, settings_head
from vtprune.evaluation.records import AnswersFile, Record
from vtprune.evaluation.runner import AskSettings
from vtprune.evaluation.search import Outcome, Records, best, find_outcomes
from vtprune.evaluation.tuning_result import (
    BEATEN,
    BELOW,
    CHOSEN,
    FAILS,
    HOLDS,
    NOT_COUNTED,
    PartSize,
    Trial,
    Tuning,
    percent,
)
from vtprune.evaluation.variants import (
    UNPRUNED,
    Variant,
    VariantList,
    list_variants,
    unpruned_variant,
)
from vtprune.inference.measuring import describe_model
from vtprune.inference.questions_file import mixed_labels
from vtprune.inference.wording import counted
from vtprune.media import AskedMedia
from vtprune.preset import load_preset, override, preset_names

if TYPE_CHECKING:
    from vtprune.inference.questions_file import Asked
    from vtprune.models.loading import Loaded, Progress
    from vtprune.preset.spec import Preset

KEEPS = (0.7, 0.5, 0.4, 0.3, 0.2, 0.1)
FLOOR = 0.98
SEARCH = 3  # one file in so many is searched on; the others are held out
NO_CANDIDATE = "random"  # the baseline of which one draw says little


@dataclass(frozen=True)
class TuningPlan:
    """What a tuning asks and tries.

    Args:
        asked: the questions, those that are searched on first.
        searched: how many those are.
        listed: the candidates.
        floor: the share of the unpruned quality that has to be kept.
        labelled: whether accuracy counts; else agreement with the unpruned model.
        seed: of the split, and of all random choices.
    """

    asked: tuple[Asked, ...]
    searched: int
    listed: VariantList
    floor: float
    labelled: bool
    seed: int = 0
    notes: tuple[str, ...] = ()

    def part(self, held_out: bool) -> tuple[Asked, ...]:
        """Return the questions that are searched on, or those held out."""
        return self.asked[self.searched :] if held_out else self.asked[: self.searched]

    def without(self, damaged: DamagedFiles, records: Records) -> tuple[TuningPlan, Records]:
        """Return the plan without the questions about damaged files, and the records' new numbers.

        Raises:
            DamagedError: no file of a part can be decoded.
        """
        asked, left = damaged.without_damaged(self.asked, records)
        searched, _ = damaged.without_damaged(self.part(False), {})
        damaged.without_damaged(self.part(True), {})
        return replace(self, asked=tuple(asked), searched=len(searched)), left

    def size(self, held_out: bool) -> PartSize:
        """Return how many questions and files a part has."""
        part = self.part(held_out)
        return PartSize(len(part), len({question.file for question in part}))


# -- the plan --------------------------------------------------------------------------------------


def plan_tuning(
    asked: Sequence[Asked],
    floor: float = FLOOR,
    keeps: Sequence[float | str] = KEEPS,
    presets: Sequence[str | Path | Mapping[str, object] | Preset] = (),
    methods: Sequence[str] = (),
    seed: int = 0,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
) -> TuningPlan:
    """Return what a tuning will ask and try.

    Candidates are the presets and methods at every keep, and the baselines uniform and downsample.

    Args:
        presets, methods: neither: all packaged presets that take a keep.
        at: where all methods cut; None: each at its own place.
        options: of every method that has such an option.

    Raises:
        VtpruneError: a candidate that can't be, a floor out of range, or too few files to show it.
    """
    if not 0 < floor < 1:
        raise VtpruneError(
            f"--floor {floor:g} is out of range",
            "above 0, below 1: 0.98 keeps 98 % of the unpruned quality; no number of questions "
            "can show that nothing is lost",
        )
    chosen = list(presets) if presets or methods else _packaged()
    listed = list_variants(methods, keeps, chosen, at, options, seed)
    variants = [
        variant
        for variant in listed.variants
        if variant.role == "asked" or variant.method != NO_CANDIDATE
    ]
    search, held_out = split(asked, seed)
    _check_files(
        {question.file for question in asked}, {question.file for question in held_out}, floor
    )
    return TuningPlan(
        asked=(*search, *held_out),
        searched=len(search),
        listed=replace(listed, variants=tuple(variants)),
        floor=floor,
        labelled=all(question.answer is not None for question in asked),
        seed=seed,
        notes=(*listed.notes, *mixed_labels(asked)),
    )


def split(asked: Sequence[Asked], seed: int = 0) -> tuple[list[Asked], list[Asked]]:
    """Split the questions: those that are searched on, about a third of the files, and the rest.

    Where a file goes follows from its name and the seed, in an order that no one chose.
    """

    def place(file: AskedMedia) -> tuple[str, str]:
        return hashlib.sha256(f"{seed} {file.name}".encode(errors="replace")).hexdigest(), str(file)

    files = sorted({question.file for question in asked}, key=place)
    first = set(files[SEARCH - 1 :: SEARCH])
    return ([question for question in asked if question.file in first],
            [question for question in asked if question.file not in first])  # fmt: skip


def _check_files(files: set[AskedMedia], held_out: set[AskedMedia], floor: float) -> None:
    """Refuse a claim that so few files can't carry, whatever the answers."""
    fewest = fewest_files(floor)
    if len(files) >= SEARCH and len(held_out) >= fewest:
        return
    enough = max(SEARCH, fewest + 1)
    while enough - enough // SEARCH < fewest:
        enough += 1
    highest = int(1000 * highest_floor(len(held_out))) / 1000
    lower = f"; or --floor {highest:g}, the most that these can show" * (len(files) >= SEARCH)
    raise VtpruneError(
        f"{counted(len(files), 'file')} can't show --floor {floor:g}: {len(held_out)} of them are "
        f"held out, and even if those lose nothing, {fewest} are the fewest that show it with 95 % "
        "confidence",
        f"ask about {enough} files or more, since questions about one file are not independent"
        f"{lower}",
    )


def _packaged() -> list[str]:
    """Return the packaged presets that take a keep."""
    names = []
    for name in preset_names():
        try:
            override(load_preset(name), 0.5)
        except PresetError:
            continue
        names.append(name)
    return names


# -- the tuning ------------------------------------------------------------------------------------


def tune(
    loaded: Loaded,
    plan: TuningPlan,
    settings: AskSettings | None = None,
    path: Path | None = None,
    on_progress: Progress | None = None,
) -> Tuning:
    """Find the lowest keep, and the best variant for it, that holds the floor.

    On the searched part every candidate runs. Of each keep the best goes on, unless one at a lower
    keep is better still; best is what keeps most of the unpruned quality, then what diverges least
    from the unpruned predictions. These are tested on the held-out part from the highest keep down,
    until the lower 95 % bound of one is below the floor; the last one before that is chosen. The
    order is fixed before the held-out part is looked at, so the 95 % hold for the choice as a
    whole: fixed-sequence testing.

    Args:
        path: where all answers are kept, one a line; what is there already is not asked again.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    settings = settings or AskSettings()
    unpruned, candidates = unpruned_variant(plan.listed.seed), plan.listed.variants
    head = settings_head(loaded, plan.asked, settings)
    damaged, all_asked = DamagedFiles(), plan.asked
    with AnswersFile(path, head, len(all_asked), all_asked) as answers:
        answer_all(loaded, plan.part(False), [unpruned, *candidates], answers, settings, damaged,
                   _named(on_progress, "searching"))  # fmt: skip
        searched = _outcomes(*plan.without(damaged, answers.records), candidates, held_out=False)
        trials = [
            Trial(outcome.variant, None if outcome.error else outcome, verdict=outcome.error)
            for outcome in searched
        ]
        order = put_in_order(trials, plan.floor)
        held_out: list[Outcome] = []
        if order:
            finalists = [trial.variant for trial in order]
            answer_all(loaded, all_asked, [unpruned, *finalists], answers, settings, damaged,
                       _named(on_progress, "confirming", plan.searched))  # fmt: skip
            plan, records = plan.without(damaged, answers.records)
            held_out = _outcomes(plan, records, finalists, held_out=True)
        else:
            plan, _ = plan.without(damaged, {})
    tested = confirm(order, held_out, plan.floor)
    results = dict(zip(map(id, order), tested, strict=True))
    trials = [results.get(id(trial), _not_tested(trial, plan.floor)) for trial in trials]
    reason, needed = explain(plan, trials, tested)
    places, _ = loaded.find_calibration()
    notes = default_places(loaded, [trial.variant for trial in trials])
    return Tuning(
        trials=tuple(trials),
        tested=tuple(tested),
        floor=plan.floor,
        quality="accuracy" if plan.labelled else "agreement",
        model=describe_model(loaded),
        places=f"{places.describe('ecl')}, {places.describe('horizon')}",
        sampling=settings.sampling,
        search=plan.size(False),
        held_out=plan.size(True),
        seed=plan.seed,
        day=datetime.date.today().isoformat(),
        media=file_names(plan.asked),
        reason=reason,
        needed=needed,
        warnings=tuple(
            dict.fromkeys([*loaded.warnings, *plan.notes, *notes, *damaged.warnings(all_asked)])
        ),
    )


def _named(on_progress: Progress | None, stage: str, less: int = 0) -> Progress | None:
    """Return the same progress under another name, counted from `less` on."""
    if on_progress is None:
        return None
    show = on_progress
    return lambda _, done, total: show(stage, max(done - less, 0), total - less)


def _outcomes(
    plan: TuningPlan, records: Records, variants: Sequence[Variant], held_out: bool
) -> list[Outcome]:
    """Return what variants did on one part.

    Raises:
        VtpruneError: accuracy is what counts, and the unpruned model has none.
    """
    first, asked = plan.searched if held_out else 0, plan.part(held_out)
    part = {(number - first, key): record for (number, key), record in records.items()}
    unpruned = [part[number, UNPRUNED] for number in range(len(asked))]
    before = [_quality(plan, record) for record in unpruned]
    if not any(before):
        raise VtpruneError(
            f"the unpruned model has none of {counted(len(asked), 'question')} right that are "
            f"{'held out' if held_out else 'searched on'}, so there is no accuracy to keep",
            "leave the answers out: agreement with the unpruned model then counts; or another "
            "--metric",
        )
    seconds = [record.first for record in unpruned]
    return find_outcomes(asked, variants, part, lambda record: _quality(plan, record), before,
                         seconds, plan.seed)  # fmt: skip


def _quality(plan: TuningPlan, record: Record) -> float:
    return (record.score or 0.0) if plan.labelled else float(record.same)


def put_in_order(trials: Sequence[Trial], floor: float) -> list[Trial]:
    """Return the candidates to test, from the highest keep down, from the search alone."""
    holding = [trial for trial in trials
               if trial.searched and trial.searched.quality.mean >= floor]  # fmt: skip
    order: list[Trial] = []
    for keep in sorted({trial.kept for trial in holding}):
        trial = max((trial for trial in holding if trial.kept == keep), key=_rank)
        if not order or _rank(trial) > max(map(_rank, order)):
            order.append(trial)
    return order[::-1]


def _rank(trial: Trial) -> tuple[float, float]:
    assert trial.searched is not None
    return trial.searched.rank


def confirm(order: Sequence[Trial], held_out: Sequence[Outcome], floor: float) -> list[Trial]:
    """Return the tested candidates with what they did on the held-out part, and their verdicts."""
    tested: list[Trial] = []
    failed = False
    for trial, outcome in zip(order, held_out, strict=True):
        if outcome.error:
            tested.append(replace(trial, verdict=outcome.error))
            failed = True
            continue
        holds = outcome.quality.lower >= floor
        verdict = NOT_COUNTED if failed else HOLDS if holds else FAILS
        failed = failed or not holds
        tested.append(replace(trial, held_out=outcome, verdict=verdict))
    holding = [number for number, trial in enumerate(tested) if trial.verdict == HOLDS]
    if holding:
        tested[holding[-1]] = replace(tested[holding[-1]], verdict=CHOSEN)
    return tested


def _not_tested(trial: Trial, floor: float) -> Trial:
    """Return a candidate that was not tested, with the reason."""
    if trial.searched is None:
        return trial
    below = trial.searched.quality.mean < floor
    return replace(trial, verdict=BELOW if below else BEATEN)


def explain(
    plan: TuningPlan, trials: Sequence[Trial], tested: Sequence[Trial]
) -> tuple[tuple[str, str], int | None]:
    """Return why nothing was chosen and what would help, and how many questions would tell."""
    if any(trial.verdict == CHOSEN for trial in tested):
        return ("", ""), None
    goal = f"{percent(plan.floor)} of the unpruned model's "
    goal += "accuracy" if plan.labelled else "answers"
    if not tested:
        ran = [trial for trial in trials if trial.searched]
        if not ran:
            return (f"no candidate can run on these questions: {trials[0].verdict}",
                    "vtprune methods says what each takes"), None  # fmt: skip
        top = best([trial.searched for trial in ran if trial.searched])
        label = next(trial.label for trial in ran if trial.searched is top)
        return (
            f"nothing keeps {goal}, searched on {plan.size(False)}: the best, {label}, keeps "
            f"{top.quality.mean:.1%}",
            "try a higher --keep, other --methods, or a lower --floor",
        ), None
    first = tested[0]
    if first.held_out is None:
        return (f"{first.label} can't run on all held-out questions: {first.verdict}",
                "leave it out: --presets and --methods name the candidates"), None  # fmt: skip
    outcome = first.held_out
    message = (f"nothing is shown to keep {goal}: {first.label}, the first to be tested, keeps "
               f"{outcome.quality.mean:.1%} on {plan.size(True)} held out, lower 95 % bound "
               f"{outcome.quality.lower:.1%}")  # fmt: skip
    files = files_needed(outcome.after, outcome.before, outcome.files, plan.floor, plan.seed)
    if files is None:
        return (message, "try a higher --keep, other --methods, or a lower --floor"), None
    times = files / plan.size(True).files
    needed = round(len(plan.asked) * times)
    all_files = round(len({question.file for question in plan.asked}) * times)
    return (
        message,
        f"too few questions: some {needed:,} questions about {all_files:,} files such as these "
        "would tell; or a lower --floor",
    ), needed
