"""The order of a tuning: the search on some files, the test on the others."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError
from vtprune.evaluation.answering import Settings, answer_all
from vtprune.evaluation.records import Book
from vtprune.evaluation.run import head_of
from vtprune.evaluation.tuning.candidates import Plan
from vtprune.evaluation.tuning.result import Tuned
from vtprune.evaluation.tuning.verdicts import (
    Records,
    confirm,
    fallen,
    put_in_order,
    say_why,
    search,
)
from vtprune.evaluation.variants import UNPRUNED, repeat_variants
from vtprune.inference.figures import describe_model
from vtprune.inference.wording import counted

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress


def tune(
    loaded: Loaded,
    plan: Plan,
    settings: Settings | None = None,
    path: Path | None = None,
    on_progress: Progress | None = None,
) -> Tuned:
    """The lowest keep, and the best way to prune for it, that holds the floor.

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
    settings = settings or Settings()
    cells = repeat_variants(plan.lineup, seeds=1)
    with Book(path, head_of(loaded, plan.asked, settings), len(plan.asked)) as book:
        answer_all(
            loaded, plan.part(False), cells, book, settings, _named(on_progress, "searching")
        )
        _check_answers(plan, book.records, held_out=False)
        trials = search(plan, cells, book.records)
        order = put_in_order(trials, plan.floor)
        own = [cells[0], *(cells[1 + trials.index(one)] for one in order)]
        if order:
            report = _named(on_progress, "confirming", plan.searched)
            answer_all(loaded, plan.asked, own, book, settings, report)
            _check_answers(plan, book.records, held_out=True)
    shifted = {(number - plan.searched, cell): one for (number, cell), one in book.records.items()}
    tested = confirm(order, own, plan, shifted)
    results = dict(zip(map(trials.index, order), tested, strict=True))
    found = tuple(results.get(number, fallen(one, plan.floor)) for number, one in enumerate(trials))
    reason, needed = say_why(plan, found, tested, own, shifted)
    known, notes = loaded.known_places()
    return Tuned(
        trials=found,
        tested=tuple(tested),
        floor=plan.floor,
        quality="accuracy" if plan.labelled else "agreement",
        model=describe_model(loaded).to_dict(),
        places=f"ecl {known.ecl}, horizon {known.horizon} ({known.origin})",
        sampling=settings.sampling,
        search=plan.size(False),
        held_out=plan.size(True),
        seed=plan.seed,
        day=datetime.date.today().isoformat(),
        reason=reason,
        needed=needed,
        warnings=tuple(dict.fromkeys([*loaded.warnings, *plan.notes, *notes])),
    )


def _named(on_progress: Progress | None, stage: str, less: int = 0) -> Progress | None:
    """The same progress under another name, counted from `less` on."""
    if on_progress is None:
        return None
    show = on_progress
    return lambda _, done, total: show(stage, max(done - less, 0), total - less)


def _check_answers(plan: Plan, records: Records, held_out: bool) -> None:
    """Refuses accuracy as the yardstick where the unpruned model has none."""
    part = plan.part(held_out)
    first = plan.searched if held_out else 0
    numbers = range(first, first + len(part))
    if plan.labelled and not any(records[number, UNPRUNED].score for number in numbers):
        raise VtpruneError(
            f"the unpruned model has none of {counted(len(part), 'question')} right that are "
            f"{'held out' if held_out else 'searched on'}, so there is no accuracy to keep",
            "leave the answers out: agreement with the unpruned model then counts; or another "
            "--metric",
        )
