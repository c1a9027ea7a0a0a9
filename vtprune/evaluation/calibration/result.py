"""The result of a calibration, and the files that hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from vtprune import __version__
from vtprune.errors import VtpruneError
from vtprune.evaluation.bootstrap import FEWEST_FILES
from vtprune.evaluation.calibration.entropy import EntropyCollapse
from vtprune.evaluation.calibration.horizon import Horizon
from vtprune.evaluation.calibration.schedules import TriedSchedule
from vtprune.inference.provenance import file_digests
from vtprune.inference.questions_file import faults_of
from vtprune.inference.report import HostInfo, describe_host
from vtprune.inference.wording import counted
from vtprune.models import EMBEDDED
from vtprune.preset.calibration import Calibration, write_calibration


@dataclass(frozen=True)
class TokenInformation:
    """What the text reads from single 2 x 2 windows of visual tokens, by layer.

    Args:
        mean: over windows and inputs, of I_i(V).
        largest: over inputs the mean of the largest |I_i(V)|; near 0 past the horizon.
        inputs: how many were looked at.
    """

    mean: tuple[float, ...]
    largest: tuple[float, ...]
    inputs: int


@dataclass(frozen=True)
class CalibrationSample:
    """What a calibration was measured on, without anything that is the user's own.

    Args:
        revision: commit of the checkpoint on the hub; None of a directory.
        versions: of this project, torch and transformers.
        modalities: "image", "video" or "mixed" -> files.
        kinds: of the questions, as the list calls them.
        seed: of the draws of files.
    """

    revision: str | None
    versions: Mapping[str, object]
    modalities: Mapping[str, int]
    kinds: tuple[str, ...]
    seed: int


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """The result of a calibration.

    Args:
        model: name, family, layers, hidden_size.
        source: what was asked, by its name.
        labelled: questions with a right answer; for the others, agreement counts.
        collapse: the entropy collapse layer, on `inputs` files.
        horizons: "general" and "text-heavy", those there are questions for.
        information: of 2 x 2 windows; None where it was not measured.
        keep: the budget of the proposals; None without.
        tried: the schedules, the best first.
        seconds: that it took.
        warnings: what to know before believing a figure.
        day: when, as YYYY-MM-DD.
        failed, host, media: as of an evaluation.
        sample: what it was measured on, for `contribution`.
    """

    model: Mapping[str, object]
    source: str
    questions: int
    labelled: int
    inputs: int
    collapse: EntropyCollapse
    horizons: Mapping[str, Horizon]
    information: TokenInformation | None = None
    keep: float | None = None
    tried: tuple[TriedSchedule, ...] = ()
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    day: str = ""
    failed: Mapping[int, VtpruneError] = field(default_factory=dict)
    host: HostInfo = field(default_factory=describe_host)
    media: Sequence[str] = ()
    sample: CalibrationSample | None = None

    @property
    def num_layers(self) -> int:
        return len(self.collapse.curve)

    def quality(self) -> str:
        """Return what the answers were measured by."""
        unlabelled = self.questions - self.labelled
        if not unlabelled:
            return "probability of the right answers"
        if not self.labelled:
            return "agreement with the unpruned model's answers"
        return f"probability of {self.labelled} right answers, agreement on {unlabelled} others"

    def about(self) -> str:
        """Return version, day, model and questions."""
        return f"vtprune {__version__}, {self.day}, {self.model['name']}, {self.source}"

    def calibration(self) -> Calibration:
        """Return the calibration; a horizon that was not found lies past the last layer."""
        about = f"measured: {self.about()}"
        agree = f"{counted(self.inputs, 'input')}, {self.collapse.share:.0%} agree"
        fall = "" if self.collapse.drop > 0 else ", no fall found"
        sources = {"ecl": f"{about}, {agree}, {self.collapse.certainty()}{fall}"}
        layers: dict[str, int | None] = {"horizon": None, "horizon_text": None}
        for figure, group in (("horizon", "general"), ("horizon_text", "text-heavy")):
            instead = group not in self.horizons
            if instead and figure == "horizon_text":
                continue
            horizon = self.horizons["text-heavy" if instead else group]
            asked = f"{horizon.asked()}{', text-heavy ones' if instead else ''}"
            layers[figure] = self.num_layers if horizon.layer is None else horizon.layer
            missing = "" if horizon.layer is not None else f", not found: {horizon.reason()}"
            certainty = f", {horizon.certainty()}" if horizon.certainty() else ""
            sources[figure] = f"{about}, {asked}, {self.quality()}{certainty}{missing}"
        assert layers["horizon"] is not None
        return Calibration(
            self.collapse.layer, layers["horizon"], layers["horizon_text"], sources, "file"
        )

    def best(self) -> TriedSchedule | None:
        """Return the schedule that loses least; None without any that meets the budget."""
        return self.tried[0] if self.tried and self.tried[0].change else None

    def too_few(self) -> str:
        """Return why the schedules can't be told apart; "" where there are files enough."""
        best = self.best()
        if best is None or best.change is None or best.change.files >= FEWEST_FILES:
            return ""
        return (
            f"{counted(best.change.files, 'file')} can't tell schedules apart: {FEWEST_FILES} are "
            "the fewest"
        )

    def proposal(self) -> str:
        """Return the best schedule and what it loses, on one line; "" without one."""
        best = self.best()
        if best is None or best.change is None:
            return ""
        reached = [schedule for schedule in self.tried if schedule.change]
        text = (
            f"best of {len(reached)} schedules at keep {self.keep:g}: {best.schedule.name}, "
            f"{best.change.mean[0]:+.1%}"
        )
        if self.too_few():
            return f"{text}; {self.too_few()}"
        alike = sum(not schedule.apart for schedule in reached) - 1
        others = f"; {counted(alike, 'other')} can't be told apart from it" if alike else ""
        return f"{text} (lower 95 % bound {best.change.lower[0]:+.1%}){others}"

    def calibration_text(self) -> str:
        """Return the calibration as a file."""
        model = self.model
        return write_calibration(
            self.calibration(), str(model["model_type"]), self.num_layers,
            int(str(model["hidden_size"])), self.proposal(),
        )  # fmt: skip

    def contribution(self) -> str:
        """Return the entry for `calibrations` of `_data/models.yaml`, with what it was measured on.

        It names no file, and of a checkpoint that is a directory no path. A layer that was not
        found is left out.

        Raises:
            VtpruneError: none was found.
        """
        import yaml

        assert self.sample is not None
        sample = self.sample
        found = {
            "ecl": self.collapse.layer if self.collapse.drop > 0 else None,
            "horizon": self.found("general"),
            "horizon_text": self.found("text-heavy"),
        }
        layers = {figure: layer for figure, layer in found.items() if layer is not None}
        if not layers:
            raise VtpruneError(
                "there is nothing to contribute: no layer was found",
                "measure more files, or questions with right answers",
            )
        named = sample.revision is not None or self.model["name"] == EMBEDDED
        name = str(self.model["name"]) if named else "a checkpoint of one's own"
        files = ", ".join(
            f"{count} {modality}" for modality, count in sorted(sample.modalities.items())
        )
        about = f"{name}, {counted(self.inputs, 'file')} ({files})"
        certainties = {"ecl": self.collapse.certainty()}
        for figure, group in (("horizon", "general"), ("horizon_text", "text-heavy")):
            if group in self.horizons:
                horizon = self.horizons[group]
                certainties[figure] = ", ".join(
                    filter(None, (horizon.asked(), horizon.certainty()))
                )
        measured = {
            "model": name,
            "revision": sample.revision,
            **sample.versions,
            "day": self.day,
            "files": dict(sample.modalities),
            "questions": self.questions,
            "right_answers": self.labelled,
            "kinds": list(sample.kinds),
            "seed": sample.seed,
        }
        entry = {
            "model_type": self.model["model_type"],
            "layers": self.num_layers,
            "hidden_size": self.model["hidden_size"],
            **layers,
            "sources": {
                figure: f"contributed ({about}; {certainties[figure]})" for figure in layers
            },
            "measured": measured,
        }
        return yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=10_000)

    def found(self, group: str) -> int | None:
        """Return the horizon of a group of questions; None where there is none."""
        return self.horizons[group].layer if group in self.horizons else None

    def preset_text(self) -> str:
        """Return the best schedule as a preset's file; needs a `best`."""
        import yaml

        best = self.best()
        assert best is not None
        data = {
            "description": f"{self.proposal()} ({self.about()})",
            "keep": self.keep,
            "stages": [dict(stage) for stage in best.schedule.stages],
        }
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
        return (
            "# ecl and horizon are those of the calibration that the schedule was found with.\n"
            + text
        )

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        values = asdict(replace(self, failed={})) | {"failed": faults_of(self.failed)}
        values["collapse"]["drop"] = self.collapse.drop
        values["collapse"]["draws"] = {
            str(layer): share for layer, share in self.collapse.draws.items()
        }
        values["quality"] = self.quality()
        values["proposal"], values["too_few"] = self.proposal(), self.too_few()
        for group, horizon in self.horizons.items():
            values["horizons"][group]["reason"] = horizon.reason()
        known = self.calibration()
        values["calibration"] = {"ecl": known.ecl, "horizon": known.horizon,
                                 "horizon_text": known.horizon_text,
                                 "sources": dict(known.sources)}  # fmt: skip
        values["version"] = __version__
        values["host"], values["media"] = self.host.to_dict(), file_digests(self.media)
        return values
