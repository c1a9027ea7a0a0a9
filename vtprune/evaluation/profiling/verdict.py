"""What limits a case, whether pruning pays here, and what would pay more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vtprune.inference.wording import PAYS, counted

FEWEST_PASSES = 5  # that tell two rows apart: 1 / 2 ** 5 < 0.05
MUCH = 0.05  # of the pruned prefill, that choosing may take
SLOW = 0.8  # of the speed-up that the FLOPs promise, below which something else limits
PARTS = {
    "preprocess": "preparing the pixels",
    "vision": "the vision tower",
    "prefill": "the decoder's prefill",
    "decode": "decoding",
    "around": "what generation does around the model",
}
OVERHEAD, SELECTION = "launch overhead", "selection"


@dataclass(frozen=True)
class Facts:
    """One row's seconds, as far as a verdict asks.

    Args:
        name: how the row is called in the verdict's text.
        tokens: visual, before any cut.
        seconds: by part, and `select`, `first_token`, `total`.
        speedup: of the whole, beside the unpruned model on the same input.
        prefill_speedup, predicted, roofline: of the prefill: measured, by FLOPs, at the machine's
            ceilings.
        frames: of a video; 0 for a picture.
        tiles: of a picture.
        pruned: whether it is cut at all.
        named: whether it is a preset's, and not one of the keeps.
        thinned: whether something goes before the vision tower.
        totals: seconds of the whole in every pass; none where nothing was timed.
        gains: the unpruned model's, on the same input and in the same pass, over them.
    """

    name: str
    tokens: int
    seconds: Mapping[str, float]
    speedup: float
    prefill_speedup: float
    predicted: float
    roofline: float
    frames: int
    tiles: int
    pruned: bool
    named: bool = False
    thinned: bool = False
    totals: tuple[float, ...] = ()
    gains: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        return self.seconds["total"]

    @property
    def shares(self) -> dict[str, float]:
        """Of the total, by part."""
        return {part: self.seconds[part] / self.total for part in PARTS}


@dataclass(frozen=True)
class Verdict:
    """The end of a profile.

    Args:
        text: in sentences.
        limit: what most of the time goes to once pruned: "vision", "decode", "prefill",
            "preprocess", "around", "launch overhead" or "selection".
        pays: whether the whole gets faster by pruning.
        best: the preset that takes the least time (without presets, the keep); its name.
        apart: whether the passes tell it apart from the row that is spoken of.
    """

    text: str
    limit: str
    pays: bool
    best: str
    apart: bool = False


def judge(rows: Sequence[Facts], reference: Facts, answer_tokens: int) -> Verdict:
    """The verdict on measured rows.

    Args:
        rows: the unpruned one first.
        reference: the pruned row that is spoken of.
        answer_tokens: of the answer that the totals are for.
    """
    plain = rows[0]
    pruned = [row for row in rows if row.pruned]
    presets = [row for row in pruned if row.named]
    best = min(presets or pruned, key=lambda row: row.total)
    limit = find_limit(reference)
    pays = reference.speedup >= PAYS or best.speedup >= PAYS
    text = [say_limit(reference, limit, answer_tokens), say_pays(reference, pays)]
    apart = told_apart(best, reference)
    if best is not reference and best.total < 0.98 * reference.total:
        first = plain.seconds["first_token"] / best.seconds["first_token"]
        gain = (
            f"{plain.total / best.total:.2f} x on the whole, {first:.2f} x to the first token"
            f"{looks_at_less(best, plain)}"
        )
        if apart:
            text.append(f"{capital(best.name)} would pay more: {gain}.")
        else:
            passes = counted(len(best.totals), "pass", "passes")
            text.append(
                f"{capital(best.name)} took the least time, {gain}, but {passes} can't tell it "
                f"apart from {reference.name}."
            )
    text.append(suggest_less(plain, reference, limit))
    return Verdict(" ".join(part for part in text if part), limit, pays, best.name, apart)


def told_apart(fast: Facts, slow: Facts) -> bool:
    """Whether one row takes less time than another, beyond what passes differ by.

    It has to in every one of FEWEST_PASSES or more, which chance does less than once in 20 times.
    """
    if not fast.totals:  # nothing was timed: these are the machine's ceilings
        return fast.total < slow.total
    pairs = list(zip(fast.totals, slow.totals, strict=True))
    return len(pairs) >= FEWEST_PASSES and all(one < other for one, other in pairs)


def looks_at_less(row: Facts, plain: Facts) -> str:
    """Of what a row is shown less; that, and not its cuts, may be what pays."""
    for what in ("frames", "tiles"):
        shown, whole = getattr(row, what), getattr(plain, what)
        if shown < whole:
            return f", of {shown} {what} where the unpruned model is shown {whole}"
    return ""


def find_limit(row: Facts) -> str:
    """What most of a pruned row's time goes to; or why its prefill does not get faster."""
    largest = max(PARTS, key=lambda part: row.seconds[part])
    if largest != "prefill":
        return largest
    if row.seconds["select"] > MUCH * row.seconds["prefill"]:
        return SELECTION
    if row.prefill_speedup < SLOW * row.predicted and row.prefill_speedup < SLOW * row.roofline:
        return OVERHEAD
    return largest


def say_limit(row: Facts, limit: str, answer_tokens: int) -> str:
    share = row.shares
    told = f"With {row.name}, "
    if limit == SELECTION:
        part = row.seconds["select"] / row.seconds["prefill"]
        return f"{told}choosing the tokens limits: it takes {part:.0%} of the prefill that is left."
    if limit == OVERHEAD:
        return (
            f"{told}launch overhead limits: the prefill gets {row.prefill_speedup:.2f} x faster, "
            f"where its FLOPs promise {row.predicted:.2f} x."
        )
    what = PARTS[limit] + (f" {answer_tokens} tokens" if limit == "decode" else "")
    return f"{told}{what} limits: {share[limit]:.0%} of the time to the whole answer."


def say_pays(row: Facts, pays: bool) -> str:
    told = f"the prefill gets {row.prefill_speedup:.2f} x faster, the whole {row.speedup:.2f} x"
    if row.gains and min(row.gains) <= 1 < max(row.gains):
        spread = f"{min(row.gains):.2f} to {max(row.gains):.2f} x in single passes"
        return f"Whether pruning pays here is lost in the noise: {told}, {spread}."
    return f"Pruning pays here: {told}." if pays else f"Pruning does not pay here: {told}."


def suggest_less(plain: Facts, row: Facts, limit: str) -> str:
    """Fewer frames or tiles, where pruning leaves the larger part of the time."""
    if limit == "vision":
        # Tower and pixels in proportion; what pruning leaves of the prefill nearly so.
        halved = row.total - (row.seconds["vision"] + row.seconds["preprocess"]
                              + row.seconds["prefill"]) / 2  # fmt: skip
        gain = f"would make the whole about {plain.total / halved:.2f} x as fast."
        why = "" if row.thinned else "Pruning after the vision tower can't save its time: "
        if row.frames > 3:
            return f"{why}{row.frames // 2} frames {gain}"
        if row.tiles > 3:
            return f"{why}--max-tiles {(row.tiles - 1) // 2} {gain}"
        return f"{why}a smaller picture would." if why else "A smaller picture would save more."
    if limit == "decode":
        return "A shorter answer, or a smaller model, would save more than fewer visual tokens."
    return ""


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
