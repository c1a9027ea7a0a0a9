"""What was tried and found, and the preset file that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vtprune import __version__
from vtprune.evaluation.tuning.bound import Quality
from vtprune.inference.wording import counted
from vtprune.models.base import Sampling
from vtprune.preset.spec import Preset

CHOSEN, HOLDS, FAILS = "chosen", "holds", "fails"
NOT_COUNTED, BEATEN, BELOW = "not counted", "beaten", "below the floor"


@dataclass(frozen=True)
class Found:
    """What one way to prune did on one part of the questions.

    Args:
        quality: how much of the unpruned quality it keeps.
        agreement: the share of its answers that are the unpruned model's.
        divergence: from the unpruned predictions, mean KL over the first answer tokens.
        keep_mean: the layer average that was really kept.
        first_token_speedup: measured, the median over the questions.
    """

    quality: Quality
    agreement: float
    divergence: float
    keep_mean: float
    first_token_speedup: float

    def to_dict(self) -> dict[str, float]:
        return {
            **self.quality.to_dict(),
            "agreement": self.agreement,
            "divergence": self.divergence,
            "keep_mean": self.keep_mean,
            "first_token_speedup": self.first_token_speedup,
        }


@dataclass(frozen=True)
class Trial:
    """One way to prune at one keep.

    Args:
        name: the preset's, or the method and its place.
        preset: what is cut.
        keep: as asked; None where the preset says its keeps itself.
        searched, held_out: what it did on each part; None where it was not run there.
        verdict: "chosen"; "holds": on the held-out part too; "fails": there; "not counted": comes
            after one that failed there; "beaten": in the search, by another at a lower keep, or at
            the same; "below the floor": in the search; or why it can't run.
    """

    name: str
    preset: Preset
    keep: float | None
    searched: Found | None
    held_out: Found | None = None
    verdict: str = ""

    @property
    def kept(self) -> float:
        """The keep that was asked for; of a preset that says its own, what came out."""
        if self.keep is not None:
            return self.keep
        return self.searched.keep_mean if self.searched else 1.0

    @property
    def label(self) -> str:
        return f"{self.name} at keep {self.keep:g}" if self.keep is not None else self.name

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "keep": self.keep,
            "search": self.searched.to_dict() if self.searched else None,
            "held_out": self.held_out.to_dict() if self.held_out else None,
            "verdict": self.verdict,
            "preset": preset_data(self.preset),
        }


@dataclass(frozen=True)
class Part:
    """How many questions about how many files one part of the data has."""

    questions: int
    files: int

    def __str__(self) -> str:
        return f"{counted(self.questions, 'question')} about {counted(self.files, 'file')}"


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a tuning found.

    Args:
        trials: all that was tried, as it was asked for.
        tested: those that were tested on the held-out part, in the order that the search fixed.
        floor: the share of the unpruned quality that has to be kept.
        quality: "accuracy" or "agreement".
        model: as in a report.
        places: where `ecl` and `horizon` are in it, and who says so.
        sampling: how much of the media was looked at.
        reason: why nothing was chosen, and what would help; "" where something was.
        needed: how many questions would tell, where the sample is the limit; else None.
    """

    trials: tuple[Trial, ...]
    tested: tuple[Trial, ...]
    floor: float
    quality: str
    model: Mapping[str, object]
    places: str
    sampling: Sampling
    search: Part
    held_out: Part
    seed: int
    day: str
    reason: tuple[str, str] = ("", "")
    needed: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def chosen(self) -> Trial | None:
        return next((one for one in self.tested if one.verdict == CHOSEN), None)

    @property
    def preset(self) -> Preset | None:
        """What was chosen, looking at as much of the media as was looked at here."""
        if self.chosen is None:
            return None
        made, seen = self.chosen.preset, self.sampling
        video = replace(
            made.video, frames=seen.frames, fps=seen.fps, max_frames=seen.max_frames
        )  # fmt: skip
        return replace(
            made,
            description=f"{self.chosen.label}, found by vtprune tune",
            image=replace(made.image, max_tiles=seen.max_tiles),
            video=video,
        )

    def claim(self) -> str:
        """What the chosen one is shown to do; needs one."""
        assert self.chosen is not None
        what = "accuracy" if self.quality == "accuracy" else "answers"
        return (
            f"{self.chosen.label} keeps at least {percent(self.floor)} of the unpruned model's "
            f"{what}, with 95 % confidence"
        )

    def to_dict(self) -> dict[str, object]:
        """The JSON that `vtprune tune --json` prints."""
        return {
            "chosen": self.chosen.to_dict() if self.chosen else None,
            "claim": self.claim() if self.chosen else None,
            "preset": preset_data(self.preset) if self.preset else None,
            "floor": self.floor,
            "quality": self.quality,
            "reason": " ".join(self.reason).strip(),
            "questions_needed": self.needed,
            "model": dict(self.model),
            "search": {"questions": self.search.questions, "files": self.search.files},
            "held_out": {"questions": self.held_out.questions, "files": self.held_out.files},
            "trials": [one.to_dict() for one in self.trials],
            "tested": [one.to_dict() for one in self.tested],
            "seed": self.seed,
            "warnings": list(self.warnings),
            "version": __version__,
        }

    def to_yaml(self) -> str:
        """The preset as a file, with the evidence in front of it; needs a chosen one."""
        import yaml

        assert self.preset is not None
        head = "".join(f"# {_plain(line)}\n" for line in self.evidence())
        return head + yaml.safe_dump(preset_data(self.preset), sort_keys=False, width=10_000)

    def evidence(self) -> list[str]:
        """What was measured, line by line."""
        assert self.chosen is not None
        assert self.chosen.held_out is not None
        assert self.chosen.searched is not None
        found, before = self.chosen.held_out, self.chosen.searched
        model, seen = self.model, self.sampling
        order = ", ".join(
            f"{one.label} {_told(one.held_out)} {one.verdict}"
            for one in self.tested
            if one.held_out
        )
        lines = [
            f"{self.claim()}.",
            f"held out: {self.held_out}: {_told(found)}, {found.agreement:.1%} the same answer, "
            f"first token {found.first_token_speedup:.2f}x as fast",
            f"searched: {self.search}, other ones: {before.quality.mean:.1%}; "
            f"{counted(len(self.trials), 'candidate')}",
            f"tested on the held-out part in this order, fixed by the search, until one failed: "
            f"{order}",
            f"model: {model['name']} ({model['family']}, {model['layers']} layers, "
            f"{model['dtype']}, {model['device']}), {self.places}",
            f"vtprune {__version__}, {self.day}, seed {self.seed}",
        ]
        if seen.start is not None or seen.end is not None:
            lines.append(f"of every video only {seen.start or 0:g} s to "
                         f"{'its end' if seen.end is None else f'{seen.end:g} s'} was looked "
                         "at")  # fmt: skip
        return lines


def _told(found: Found | None) -> str:
    assert found is not None
    return f"{found.quality.mean:.1%} kept (lower bound {found.quality.lower:.1%})"


def _plain(line: str) -> str:
    """Text that can stand in a comment, whatever a model is called."""
    return re.sub(r"[^ -~]", "?", " ".join(line.split()))


def preset_data(preset: Preset) -> dict[str, object]:
    """A preset in its own schema, without what is empty."""
    return {
        key: value
        for key, value in preset.to_dict().items()
        if key != "name" and value not in (None, "")
    }


def percent(share: float) -> str:
    """ "98 %", "97.5 %"."""
    return f"{100 * share:.4g} %"
