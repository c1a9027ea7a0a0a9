"""One row of a comparison, as far as it has run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vtprune.evaluation.variants import UNPRUNED, Variant, counts_after_cuts
from vtprune.inference.compare import Pair, Seconds, Side, medians, sum_up
from vtprune.inference.comparison import Row

if TYPE_CHECKING:
    from vtprune.errors import VtpruneError
    from vtprune.inference.generation import Run
    from vtprune.inference.prompts import Prompt
    from vtprune.inference.report import Report, StageCount


@dataclass(eq=False)
class Standing:
    """What is known of one row.

    Args:
        report, run, prompt: of its answer, and what was asked; None where there is none.
        error: why there is none.
        beside: the asked rows whose layers and counts it has.
        pairs: seconds of its runs, each beside one of the unpruned model.
        roofline: the speed-up that the machine's measured ceilings allow; None: not counted.
    """

    variant: Variant
    report: Report | None = None
    run: Run | None = None
    prompt: Prompt | None = None
    error: VtpruneError | None = None
    beside: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    roofline: float | None = None

    @property
    def stages(self) -> Sequence[StageCount]:
        """The cuts that were made."""
        return self.report.tokens.stages if self.report else []

    @property
    def label(self) -> str:
        return self.variant.row

    def notes(self, told: Mapping[str, int]) -> list[str]:
        """What its report warned of, or why there is none.

        Args:
            told: in how many reports a warning is; one that is in this alone names the row.
        """
        if self.error is not None:
            return [f"{self.label}: not run: {self.reason}"]
        warned = self.report.warnings if self.report else ()
        notes = [f"{self.label}: {note}" if told[note] == 1 else note for note in warned]
        left = [count for _, count in counts_after_cuts(self.stages)]
        if self.variant.role == "asked" and left and not any(left):
            notes.append(f"{self.variant.name} leaves nothing to choose from, so no random or "
                         "uniform row stands beside it")  # fmt: skip
        return notes

    @property
    def reason(self) -> str:
        """The error and the way out."""
        assert self.error is not None
        hint = f" ({self.error.hint})" if self.error.hint else ""
        return self.error.message + hint

    def side(self) -> Side:
        """What is timed."""
        assert self.prompt is not None
        return self.prompt.side(None if self.variant.role == UNPRUNED else self.variant.preset)

    def row(self, answer: str, took: Sequence[Seconds]) -> Row:
        """What comes out of it.

        Args:
            answer: of the unpruned model.
            took: seconds of its timed runs; none where nothing was measured.
        """
        entry, report, run = self.variant, self.report, self.run
        preset = report.preset.to_dict() if report else entry.preset.to_dict()
        known = Row(entry.role, entry.method or None, preset, entry.at, entry.keep,
                    dict(entry.options), tuple(self.beside))  # fmt: skip
        if report is None or run is None or self.prompt is None:
            return replace(known, error=self.reason)
        seconds = {**self.prompt.seconds, **medians(took)} if took else None
        compare = sum_up(self.pairs, answer, run, report, self.roofline) if self.pairs else None
        return replace(
            known,
            answer=run.answer,
            same_answer=run.answer == answer,
            tokens=report.tokens,
            flops=report.flops,
            kv_cache_bytes=report.kv_cache_bytes,
            seconds=seconds,
            compare=compare,
        )
