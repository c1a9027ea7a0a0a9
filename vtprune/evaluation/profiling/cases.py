"""How a profile is made, and its inputs: one for every way in which presets sample the media."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError
from vtprune.evaluation.profiling.inputs import Case, make_case
from vtprune.evaluation.profiling.rows import PlannedRow, is_preset, plan_row
from vtprune.evaluation.profiling.shown import Shown
from vtprune.evaluation.variants import UNPRUNED, Variant
from vtprune.inference.prompts import sampling_of
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.preset import Preset
from vtprune.tokens.layout import MODALITIES

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress

TEXT_TOKENS, ANSWER_TOKENS, SECONDS, REPEATS = 64, 32, 60.0, 5


@dataclass(frozen=True)
class Options:
    """How a profile is made.

    Args:
        device, dtype, attention: as for loading a model.
        text_tokens: all tokens of the prompt that are not visual.
        answer_tokens: of the answer that decoding is counted for.
        seconds: that measuring may take.
        repeats: the most passes over all rows.
        timed: whether anything is run; else tokens, FLOPs, bytes and the roofline only.
        how: "whole", "layers", or "auto": the whole model where it fits memory and budget.
        calibration: a file that says where ecl and horizon are.
        sampling: how much of the media, before what a preset or the family says.
        limits: of what is read.
    """

    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None
    text_tokens: int = TEXT_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    seconds: float = SECONDS
    repeats: int = REPEATS
    timed: bool = True
    how: str = "auto"
    calibration: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)


class Cases:
    """The inputs of a profile: one for every way in which its presets sample the media.

    Args:
        made: the first is that of the rows without a preset.
    """

    def __init__(
        self, loaded: Loaded, shown: Shown, options: Options, on_progress: Progress | None
    ) -> None:
        self.loaded, self.what, self.options = loaded, shown, options
        self.on_progress = on_progress
        self.made: list[Case] = []
        self.of: dict[object, Case] = {}
        self.find(Sampling())

    def plan(self, variant: Variant) -> PlannedRow:
        """A row on its input."""
        sampling = sampling_of(variant.preset) if is_preset(variant) else Sampling()
        preset = variant.preset
        smaller = variant.role != UNPRUNED and any(
            preset.downsampling_stage(one) for one in MODALITIES
        )
        try:
            case = self.find(sampling)
            if smaller:
                case = self.find(sampling, preset, case)
        except VtpruneError as error:
            return PlannedRow(variant, self.made[0], error=error.message)
        return plan_row(self.loaded, case, variant)

    def find(
        self, sampling: Sampling, preset: Preset | None = None, larger: Case | None = None
    ) -> Case:
        """The input for a sampling; one for all that cost the same.

        Args:
            preset: that makes it smaller; None: nothing does.
            larger: as it was before that.
        """
        sampling = overridden(sampling, self.options.sampling)
        key = (sampling, preset)
        if key not in self.of:
            case = make_case(self.loaded, self.what, sampling, self.options.text_tokens, preset,
                             self.options.limits, self.on_progress, larger)  # fmt: skip
            same = next((one for one in self.made if one.key == case.key), None)
            if same is None:
                self.made.append(case)
            self.of[key] = same or case
        return self.of[key]

    @property
    def warnings(self) -> list[str]:
        return [note for case in self.made for note in case.warnings]


def overridden(sampling: Sampling, flags: Sampling) -> Sampling:
    """What a preset says, under the flags: their frames replace a preset's fps and cap."""
    if flags.frames is not None:
        sampling = replace(sampling, frames=flags.frames, fps=None, max_frames=None)
    if flags.max_tiles is not None:
        sampling = replace(sampling, max_tiles=flags.max_tiles)
    return sampling
