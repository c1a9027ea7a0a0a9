"""The result of a tuning, and the preset file that holds its evidence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from vtprune import __version__
from vtprune.errors import VtpruneError
from vtprune.evaluation.search import Outcome
from vtprune.evaluation.variants import Variant
from vtprune.inference.provenance import file_digests
from vtprune.inference.questions_file import faults_of
from vtprune.inference.report import HostInfo, ModelInfo, describe_host
from vtprune.inference.wording import counted
from vtprune.models.base import Sampling
from vtprune.preset.figures import LONGEST_NAME, MeasuredFigure
from vtprune.preset.spec import Preset

CHOSEN, HOLDS, FAILS = "chosen", "holds", "fails"
NOT_COUNTED, BEATEN, BELOW = "not counted", "beaten", "below the floor"


@dataclass(frozen=True, eq=False)
class Trial:
    """One candidate of a tuning.

    Args:
        variant: what is tried.
        searched, held_out: what it did on each part; None where it could not run or was not run.
        verdict: "chosen"; "holds": on the held-out part too; "fails": there; "not counted": comes
            after one that failed there; "beaten": in the search, by another at a lower keep, or at
            the same; "below the floor": in the search; or why it can't run.
    """

    variant: Variant
    searched: Outcome | None
    held_out: Outcome | None = None
    verdict: str = ""

    @property
    def name(self) -> str:
        """The preset's name, or the method and its place."""
        variant = self.variant
        return f"{variant.name} at {variant.at}" if variant.method else variant.name

    @property
    def kept(self) -> float:
        """The keep that was asked for; of a preset that sets its own, what came out."""
        if self.variant.keep is not None:
            return self.variant.keep
        return self.searched.keep_mean if self.searched else 1.0

    @property
    def label(self) -> str:
        """The name with the keep."""
        keep = self.variant.keep
        return self.name if keep is None else f"{self.name} at keep {keep:g}"

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return {
            "name": self.name,
            "keep": self.variant.keep,
            "search": self.searched.to_dict() if self.searched else None,
            "held_out": self.held_out.to_dict() if self.held_out else None,
            "verdict": self.verdict,
            "preset": preset_data(self.variant.preset),
        }


@dataclass(frozen=True)
class PartSize:
    """One part of the questions: searched on, or held out."""

    questions: int
    files: int

    def __str__(self) -> str:
        return f"{counted(self.questions, 'question')} about {counted(self.files, 'file')}"

    def to_dict(self) -> dict[str, int]:
        """Return it as JSON has it."""
        return {"questions": self.questions, "files": self.files}


@dataclass(frozen=True, eq=False)
class Tuning:
    """The result of a tuning.

    Args:
        trials: all candidates, as they were asked for.
        tested: those that were tested on the held-out part, in the order that the search fixed.
        floor: the share of the unpruned quality that has to be kept.
        quality: "accuracy" or "agreement".
        model: as in a report.
        places: where `ecl` and `horizon` are in it, and who says so.
        sampling: frames and tiles of the media.
        reason: why nothing was chosen, and what would help; "" where something was.
        needed: how many questions would tell, where the sample is the limit; else None.
        file: where the chosen preset was written; None: nowhere.
        failed, host, media: as of an evaluation.
    """

    trials: tuple[Trial, ...]
    tested: tuple[Trial, ...]
    floor: float
    quality: str
    model: ModelInfo
    places: str
    sampling: Sampling
    search: PartSize
    held_out: PartSize
    seed: int
    day: str
    reason: tuple[str, str] = ("", "")
    needed: int | None = None
    warnings: tuple[str, ...] = ()
    file: str | None = None
    failed: Mapping[int, VtpruneError] = field(default_factory=dict)
    host: HostInfo = field(default_factory=describe_host)
    media: Sequence[str] = ()

    @property
    def chosen(self) -> Trial | None:
        """The candidate with the lowest keep that holds the floor; None where none does."""
        return next((trial for trial in self.tested if trial.verdict == CHOSEN), None)

    @property
    def preset(self) -> Preset | None:
        """The chosen candidate's preset, with the sampling and the figure of its tuning."""
        if self.chosen is None:
            return None
        preset, sampling = self.chosen.variant.preset, self.sampling
        video = replace(preset.video, frames=sampling.frames, fps=sampling.fps,
                        max_frames=sampling.max_frames)  # fmt: skip
        return replace(
            preset,
            description=f"{self.chosen.label}, found by vtprune tune",
            image=replace(preset.image, max_tiles=sampling.max_tiles),
            video=video,
            evidence=() if self.chosen.held_out is None else (self.figure(self.chosen.held_out),),
        )

    def figure(self, outcome: Outcome) -> MeasuredFigure:
        """Return what was measured on the held-out part, as a preset has it."""
        assert self.chosen is not None
        same = None if self.quality == "accuracy" else "right: as the unpruned model answers"
        return MeasuredFigure(
            self.model.name[-LONGEST_NAME:],
            self.held_out.questions,
            round(100 * fmean(outcome.after), 1),
            "vtprune tune, held-out part",
            round(100 * fmean(outcome.before), 1),
            self.chosen.variant.keep,
            same,
        )

    def claim(self) -> str:
        """Return what was shown of the chosen variant; there must be one."""
        assert self.chosen is not None
        what = "accuracy" if self.quality == "accuracy" else "answers"
        return (
            f"{self.chosen.label} keeps at least {percent(self.floor)} of the unpruned model's "
            f"{what}, with 95 % confidence"
        )

    def to_dict(self) -> dict[str, object]:
        """Return the JSON that `vtprune tune --json` prints."""
        return {
            "chosen": self.chosen.to_dict() if self.chosen else None,
            "claim": self.claim() if self.chosen else None,
            "preset": preset_data(self.preset) if self.preset else None,
            "floor": self.floor,
            "quality": self.quality,
            "reason": " ".join(self.reason).strip(),
            "questions_needed": self.needed,
            "model": self.model.to_dict(),
            "search": self.search.to_dict(),
            "held_out": self.held_out.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "tested": [trial.to_dict() for trial in self.tested],
            "seed": self.seed,
            "failed": faults_of(self.failed),
            "warnings": list(self.warnings),
            "version": __version__,
            "host": self.host.to_dict(),
            "media": file_digests(self.media),
            "file": self.file,
        }

    def to_yaml(self) -> str:
        """Return the chosen preset as a file, with the evidence in front of it."""
        import yaml

        assert self.preset is not None
        head = "".join(f"# {_plain(line)}\n" for line in self.evidence())
        return head + yaml.safe_dump(preset_data(self.preset), sort_keys=False, width=10_000)

    def evidence(self) -> list[str]:
        """Return what was measured, line by line; needs a chosen candidate."""
        assert self.chosen is not None
        assert self.chosen.held_out is not None
        assert self.chosen.searched is not None
        held_out, searched = self.chosen.held_out, self.chosen.searched
        model, sampling = self.model, self.sampling
        order = ", ".join(
            f"{trial.label} {_kept(trial.held_out)} {trial.verdict}"
            for trial in self.tested
            if trial.held_out
        )
        lines = [
            f"{self.claim()}.",
            f"held out: {self.held_out}: {_kept(held_out)}, {held_out.agreement:.1%} the same "
            f"answer, first token {held_out.first_token_speedup:.2f}x as fast",
            f"searched: {self.search}, other ones: {searched.quality.mean:.1%}; "
            f"{counted(len(self.trials), 'candidate')}",
            f"tested on the held-out part in this order, fixed by the search, until one failed: "
            f"{order}",
            f"model: {model.name} ({model.family}, {model.layers} layers, {model.dtype}, "
            f"{model.device}), {self.places}",
            f"vtprune {__version__}, {self.day}, seed {self.seed}",
        ]
        if sampling.start is not None or sampling.end is not None:
            end = "its end" if sampling.end is None else f"{sampling.end:g} s"
            lines.append(f"of every video only {sampling.start or 0:g} s to {end} was looked at")
        return lines


def _kept(outcome: Outcome) -> str:
    return f"{outcome.quality.mean:.1%} kept (lower bound {outcome.quality.lower:.1%})"


def _plain(line: str) -> str:
    """Return text that can stand in a comment, whatever a model is called."""
    return re.sub(r"[^ -~]", "?", " ".join(line.split()))


def preset_data(preset: Preset) -> dict[str, object]:
    """Return a preset in its own schema, without what is empty."""
    return {
        key: value
        for key, value in preset.to_dict().items()
        if key != "name" and value not in (None, "")
    }


def percent(share: float) -> str:
    """ "98 %", "97.5 %"."""
    return f"{100 * share:.4g} %"
