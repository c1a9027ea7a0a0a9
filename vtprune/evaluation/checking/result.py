"""The result of a check: its cases, the noise of the unpruned model, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from vtprune.inference.report import HostInfo, InputInfo, ModelInfo, Versions, describe_host
from vtprune.inference.wording import counted

FACTORS = {"float32": 20.0, "float16": 8.0, "bfloat16": 4.0}
"""dtype -> so many times the noise are equal: docs/check.md has what was measured."""
DECIDED = 2
"""A step is decided where the likeliest token is ahead of the next by so many times the noise."""
STRICTEST = min(FACTORS.values())
RULES = {"masked": "masked", "layer loop": "the loop over the layers"}
"""What pruning has to equal, as reports name it -> in a sentence."""
EQUAL, DIFFERS, BLIND = "equal", "DIFFERS", "too small"
NO_CUT, REFUSED = "no cut", "refused"


@dataclass(frozen=True)
class Noise:
    """By how much the logits of the unpruned model differ from themselves.

    Args:
        input, prompts: as of CheckedBatch.
        source: what was changed: "sdpa, eager" for two kernels, or "batch sizes"; and "loop" where
            that is what pruning has to equal.
        measured: the largest difference.
        step: the spacing of the dtype's numbers at the largest logit.
        factor: so many times the noise are equal.
    """

    input: str
    prompts: str
    source: str
    measured: float
    step: float
    factor: float

    @property
    def value(self) -> float:
        """The noise: no less than one step of the dtype."""
        return max(self.measured, self.step)

    @property
    def limit(self) -> float:
        """The most that pruned logits may differ by from what they have to equal."""
        return self.factor * self.value


@dataclass(frozen=True)
class CheckedCase:
    """One comparison of the pruned model with what it has to equal.

    Args:
        input, prompts: as of CheckedBatch.
        cut: its name.
        cache: "dynamic" or "static".
        core: whether the verdict needs it.
        outcome: "equal", "DIFFERS", "too small" (the cut changes less than the limit, so that the
            comparison could not fail), "no cut" or "refused".
        reason: of a refusal, or what differs.
        differences: the largest, of all samples and tokens, at the prompt and every decoded token.
        limit: the largest difference that counts as equal.
        effect: the largest difference that the cut makes to the unpruned model.
        decided: steps of all samples at which the likeliest token is ahead by more than the noise.
        same_tokens: those of them at which the pruned model chooses the same.
        layers: where it was cut; 0 is the input.
        visual, kept: visual tokens of each sample before the first cut, and after the last.
    """

    input: str
    prompts: str
    cut: str
    cache: str
    core: bool
    outcome: str
    reason: str = ""
    differences: tuple[float, ...] = ()
    limit: float | None = None
    effect: float | None = None
    decided: int = 0
    same_tokens: int = 0
    layers: tuple[int, ...] = ()
    visual: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()

    @property
    def difference(self) -> float | None:
        """The largest difference; None where nothing was compared."""
        return max(self.differences, default=None)

    @property
    def place(self) -> str:
        """The case in words."""
        return f"{self.input}, {self.cut}, {self.prompts}, {self.cache} cache"


@dataclass(frozen=True)
class CheckedMedia:
    """The media of one input.

    Args:
        input: as of CheckedBatch.
        media: as in a report.
    """

    input: str
    media: InputInfo

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return {"input": self.input, **self.media.to_dict()}


@dataclass(frozen=True)
class CheckResult:
    """A check of one model.

    Args:
        model, version, host: as of a report.
        inputs: one for every input: its media.
        steps: decoded tokens that were compared, after the prompt.
        noise: one for every input and batch.
        cases: in the order in which they ran.
        warnings: what to know before believing a figure.
    """

    model: ModelInfo
    version: Versions
    inputs: Sequence[CheckedMedia]
    steps: int
    noise: Sequence[Noise]
    cases: Sequence[CheckedCase]
    seconds: float
    warnings: Sequence[str] = field(default=())
    host: HostInfo = field(default_factory=describe_host)

    @property
    def verdict(self) -> str:
        """ "equal", "different", or "not proven"."""
        if any(case.outcome == DIFFERS for case in self.cases):
            return "different"
        core = [case for case in self.cases if case.core]
        return "equal" if core and all(case.outcome == EQUAL for case in core) else "not proven"

    @property
    def proven(self) -> bool:
        return self.verdict == "equal"

    @property
    def rule(self) -> str:
        """What pruning has to equal, in a sentence."""
        return RULES[self.model.pruned_equals or "masked"]

    def claim(self) -> str:
        """Return the verdict in a sentence."""
        compared = [case for case in self.cases if case.difference is not None]
        if self.verdict == "different":
            wrong = [case for case in self.cases if case.outcome == DIFFERS]
            failed = [case for case in wrong if case.difference is None]
            total = counted(len(compared) + len(failed), "case")
            return (
                f"pruned does not equal {self.rule} in {len(wrong)} of {total}; the first is "
                f"{wrong[0].place}: {wrong[0].reason}"
            )
        if self.verdict == "not proven":
            missing = [case for case in self.cases if case.core and case.outcome != EQUAL]
            if not missing:
                return "nothing was compared"
            return f"not proven: {missing[0].place}: {missing[0].reason}"
        same = [case for case in compared if case.outcome == EQUAL]
        worst = max(same, key=lambda case: (case.difference or 0) / (case.limit or 1))
        return (
            f"pruned equals {self.rule} in {len(same)} of {counted(len(compared), 'case')}: "
            f"differences are up to {(worst.difference or 0) / (worst.limit or 1):.0%} of their "
            "limits"
        )

    def failure(self) -> tuple[str, str]:
        """Return message and hint of a check that proves nothing."""
        if self.verdict == "different":
            return (
                f"pruned does not equal {self.rule} with this model on this machine",
                "don't rely on pruned answers here, and report what --json prints (docs/check.md)",
            )
        if any(case.core and case.outcome == BLIND for case in self.cases):
            hint = "check with --dtype float32, or cut more with a lower --keep"
        else:
            hint = "the table says why; docs/check.md says what can be done"
        return "nothing is proven: the cuts that matter could not be compared", hint

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return {
            "verdict": self.verdict,
            "claim": self.claim(),
            "model": self.model.to_dict(),
            "version": self.version.to_dict(),
            "host": self.host.to_dict(),
            "inputs": [media.to_dict() for media in self.inputs],
            "steps": self.steps,
            "noise": [
                {**asdict(noise), "value": noise.value, "limit": noise.limit}
                for noise in self.noise
            ],
            "cells": [{**asdict(case), "difference": case.difference} for case in self.cases],
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }
