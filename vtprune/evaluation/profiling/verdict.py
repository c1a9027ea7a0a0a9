"""What limits a pruned model here, whether pruning pays, and what would pay more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.evaluation.profiling.row_times import PassTimes
from vtprune.inference.report import Block
from vtprune.inference.wording import PAYS, counted

FEWEST_PASSES = 5  # that tell two rows apart: 1 / 2 ** 5 < 0.05
SELECTION_SHARE = 0.05  # of the pruned prefill, that selection may take
REALISED_SHARE = 0.8  # of the speed-up by FLOPs, below which something else limits
PARTS = {
    "preprocess": "preparing the pixels",
    "vision": "the vision tower",
    "prefill": "the decoder's prefill",
    "decode": "decoding",
    "around": "what generation does around the model",
}
OVERHEAD, SELECTION = "launch overhead", "selection"


@dataclass(frozen=True)
class VerdictRow:
    """One row, as far as a verdict asks.

    Args:
        name: what the row is called in a sentence.
        times: typical seconds.
        answer_tokens: of the answer that the totals are for.
        speedup: to the end of the answer, over the unpruned model on the same input.
        prefill_speedup, predicted, roofline: of the prefill: measured, by FLOPs, at the machine's
            ceilings.
        frames: of a video; 0 for a picture.
        tiles: of a picture.
        is_preset: whether it is a preset at its own keep, and not one of the keeps.
        spares_tower: whether tokens are dropped before the vision tower.
        totals: seconds to the end of the answer in every pass; none where nothing was timed.
        gains: the unpruned model's in the same pass, over them.
    """

    name: str
    times: PassTimes
    answer_tokens: int
    speedup: float
    prefill_speedup: float
    predicted: float
    roofline: float
    frames: int
    tiles: int
    is_pruned: bool
    is_preset: bool = False
    spares_tower: bool = False
    totals: tuple[float, ...] = ()
    gains: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        return self.times.total(self.answer_tokens)

    def part(self, name: str) -> float:
        """Return the seconds of one of PARTS."""
        if name == "decode":
            return self.times.decode(self.answer_tokens)
        return float(getattr(self.times, name))


@dataclass(frozen=True, kw_only=True)
class VerdictFindings(Block):
    """The parts of a verdict.

    Args:
        limited_by: what most of the time goes to once pruned: "vision", "decode", "prefill",
            "preprocess", "around", "launch overhead" or "selection".
        pays: whether the whole gets faster by pruning.
        best: the preset that takes the least time (without presets, the keep); its name.
        best_told_apart: whether the passes tell it apart from the row that the verdict is about.
    """

    limited_by: str = ""
    pays: bool = False
    best: str = ""
    best_told_apart: bool = False


def judge(rows: Sequence[VerdictRow], reference: VerdictRow) -> tuple[str, VerdictFindings]:
    """Return the verdict on measured rows: its sentences, and its parts.

    Args:
        rows: the unpruned one first.
        reference: the pruned row that the verdict is about.
    """
    unpruned = rows[0]
    pruned = [row for row in rows if row.is_pruned]
    presets = [row for row in pruned if row.is_preset]
    best = min(presets or pruned, key=lambda row: row.total)
    limit = find_limit(reference)
    pays = reference.speedup >= PAYS or best.speedup >= PAYS
    text = [say_limit(reference, limit), say_pays(reference, pays)]
    apart = told_apart(best, reference)
    if best is not reference and best.total < 0.98 * reference.total:
        first = unpruned.times.first_token / best.times.first_token
        gain = (
            f"{unpruned.total / best.total:.2f} x on the whole, {first:.2f} x to the first token"
            f"{less_media(best, unpruned)}"
        )
        name = best.name[:1].upper() + best.name[1:]
        if apart:
            text.append(f"{name} would pay more: {gain}.")
        else:
            passes = counted(len(best.totals), "pass", "passes")
            text.append(
                f"{name} took the least time, {gain}, but {passes} can't tell it apart from "
                f"{reference.name}."
            )
    text.append(suggest(unpruned, reference, limit))
    findings = VerdictFindings(limited_by=limit, pays=pays, best=best.name, best_told_apart=apart)
    return " ".join(part for part in text if part), findings


def told_apart(fast: VerdictRow, slow: VerdictRow) -> bool:
    """Whether one row takes less time than another, beyond what passes differ by.

    It has to in every one of FEWEST_PASSES or more, which chance does less than once in 20 times.
    """
    if not fast.totals:  # nothing was timed: these are the machine's ceilings
        return fast.total < slow.total
    pairs = list(zip(fast.totals, slow.totals, strict=True))
    return len(pairs) >= FEWEST_PASSES and all(one < other for one, other in pairs)


def less_media(row: VerdictRow, unpruned: VerdictRow) -> str:
    """Say of how many fewer frames or tiles a row is: that, and not its cuts, may be what pays."""
    for what, given, all_given in (
        ("frames", row.frames, unpruned.frames), ("tiles", row.tiles, unpruned.tiles),
    ):  # fmt: skip
        if given < all_given:
            return f", of {given} {what} where the unpruned model is given {all_given}"
    return ""


def find_limit(row: VerdictRow) -> str:
    """Return what most of a pruned row's time goes to; or why its prefill does not get faster."""
    largest = max(PARTS, key=row.part)
    if largest != "prefill":
        return largest
    if row.times.select > SELECTION_SHARE * row.times.prefill:
        return SELECTION
    if row.prefill_speedup < REALISED_SHARE * min(row.predicted, row.roofline):
        return OVERHEAD
    return largest


def say_limit(row: VerdictRow, limit: str) -> str:
    """Return the sentence on what limits."""
    if limit == SELECTION:
        part = row.times.select / row.times.prefill
        return (
            f"With {row.name}, selecting the tokens limits: it takes {part:.0%} of the prefill "
            "that is left."
        )
    if limit == OVERHEAD:
        return (
            f"With {row.name}, launch overhead limits: the prefill gets {row.prefill_speedup:.2f} "
            f"x faster, where its FLOPs promise {row.predicted:.2f} x."
        )
    what = PARTS[limit] + (f" {row.answer_tokens} tokens" if limit == "decode" else "")
    share = row.part(limit) / row.total
    return f"With {row.name}, {what} limits: {share:.0%} of the time to the whole answer."


def say_pays(row: VerdictRow, pays: bool) -> str:
    """Return the sentence on whether pruning pays."""
    gains = f"the prefill gets {row.prefill_speedup:.2f} x faster, the whole {row.speedup:.2f} x"
    if row.gains and min(row.gains) <= 1 < max(row.gains):
        spread = f"{min(row.gains):.2f} to {max(row.gains):.2f} x in single passes"
        return f"Whether pruning pays here is lost in the noise: {gains}, {spread}."
    return f"Pruning pays here: {gains}." if pays else f"Pruning does not pay here: {gains}."


def suggest(unpruned: VerdictRow, row: VerdictRow, limit: str) -> str:
    """Suggest fewer frames or tiles where pruning leaves the larger part of the time."""
    if limit == "vision":
        # Tower and pixels in proportion; what pruning leaves of the prefill nearly so.
        times = row.times
        halved = row.total - (times.vision + times.preprocess + times.prefill) / 2
        gain = f"would make the whole about {unpruned.total / halved:.2f} x as fast."
        why = "" if row.spares_tower else "Pruning after the vision tower can't save its time: "
        if row.frames > 3:
            return f"{why}{row.frames // 2} frames {gain}"
        if row.tiles > 3:
            return f"{why}--max-tiles {(row.tiles - 1) // 2} {gain}"
        return f"{why}a smaller picture would." if why else "A smaller picture would save more."
    if limit == "decode":
        return "A shorter answer, or a smaller model, would save more than fewer visual tokens."
    return ""
