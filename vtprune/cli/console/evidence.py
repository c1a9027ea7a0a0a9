"""The tables of `vtprune explain`: what each part of an answer rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtprune.cli.console.tables import show_facts, show_table, show_warning
from vtprune.pictures.evidence import (
    kept_line,
    passes_words,
    region_words,
    run_line,
    unplaced_words,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.inference.evidence.explanation import EvidenceMap, ExplainedRun, Explanation

MOMENTS = 3
"""The most moments of a video that a row names."""


def show_explanation(explanation: Explanation, console: Console) -> None:
    """Print a row for each part of the answer of each run, and what pruning kept."""
    for run in explanation.runs:
        if len(explanation.runs) > 1:
            show_facts([("model", run_line(run))], console)
        rows = [
            (
                evidence.text or "(empty)",
                "-" if evidence.probability is None else f"{evidence.probability:.2f}",
                moments_words(run, evidence),
                region_words(run, evidence),
            )
            for evidence in run.maps
        ]
        videos = any(row[2] for row in rows)
        headings = ["answer", "<probability", "when", "where"]
        columns = [n for n in range(4) if n != 2 or videos]
        show_table([headings[n] for n in columns], [[r[n] for n in columns] for r in rows], console)
        if unplaced := unplaced_words(run):
            show_facts([("no place", unplaced)], console)
    facts = [("by", f"{explanation.by}, {passes_words(explanation.runs[-1])}")]
    if explanation.kept is not None:
        facts.append(("evidence", kept_line(explanation)))
    show_facts(facts, console)
    for text in explanation.warnings:
        show_warning(text, console)


def moments_words(run: ExplainedRun, evidence: EvidenceMap) -> str:
    """Return the moments with the most evidence, a line each in their order; "" without a video."""
    moments = sorted(run.moments(evidence), key=lambda moment: -moment.share)[:MOMENTS]
    moments.sort(key=lambda moment: (moment.media, moment.frame))
    return ",\n".join(
        f"{moment.seconds[0]:.2f} s {moment.share:.0%}" for moment in moments if moment.share > 0
    )
