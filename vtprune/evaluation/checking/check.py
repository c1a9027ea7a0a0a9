"""`check`: pruned equals masked, or the loop over the layers, case by case."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from vtprune.engine import pruning
from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.engine.trace import Trace
from vtprune.errors import ModelError, VtpruneError
from vtprune.evaluation.checking import oracle
from vtprune.evaluation.checking.cuts import CheckedCut
from vtprune.evaluation.checking.inputs import CheckedBatch, CheckedInput, make_batches
from vtprune.evaluation.checking.oracle import attention_kernel, kernel_of, other_kernel
from vtprune.evaluation.checking.result import (
    BLIND,
    DECIDED,
    DIFFERS,
    EQUAL,
    FACTORS,
    NO_CUT,
    REFUSED,
    STRICTEST,
    CheckedCase,
    CheckedMedia,
    CheckResult,
    Noise,
)
from vtprune.inference.forced_answers import append_text, logits_to_keep_argument
from vtprune.inference.measuring import describe_input, describe_model, describe_versions
from vtprune.inference.out_of_memory import FEWER, as_memory_error, is_out_of_memory
from vtprune.inference.prepare import batch_on_device
from vtprune.models.structure import LAYER_LOOP
from vtprune.models.transformers_messages import quiet

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress

STEPS = 8  # decoded tokens that are compared, after the prompt
DYNAMIC, STATIC = CACHES = ("dynamic", "static")
"""Named in every run: a checkpoint's generation config may ask for another."""


@dataclass(eq=False)
class UnprunedRun:
    """The unpruned model on one batch, with which the pruned one is compared.

    Args:
        tokens: (B, STEPS + 1) that it chooses; every other run is forced to choose them.
        logits: (B, STEPS + 1, V) float32 on the CPU.
        expected: what pruning has to equal, by what was dropped.
    """

    loaded: Loaded
    batch: CheckedBatch
    tokens: torch.Tensor
    logits: torch.Tensor
    noise: Noise
    expected: dict[str, torch.Tensor] = field(default_factory=dict)

    def without(self, drops: oracle.Drops, later: oracle.LaterDrops = ()) -> torch.Tensor:
        """Return the logits without the dropped columns, which are computed once.

        They are masked as keys; where layers keep a state, a loop over the layers leaves them out.

        Args:
            later: what goes while decoding, which is masked in any case: states are left alone.
        """
        key = repr((drops, later))
        if key not in self.expected:
            loops = self.loaded.pruned_equals == LAYER_LOOP and not later
            logits = self.looped(drops) if loops else self.masked(drops, later)
            self.expected[key] = logits.float().cpu()
        return self.expected[key]

    def masked(self, drops: oracle.Drops, later: oracle.LaterDrops = ()) -> torch.Tensor:
        """Return the logits with the dropped columns masked as keys."""
        model = self.loaded.model
        # Flash kernels take no mask a query.
        flash = kernel_of(model) not in ("sdpa", "eager")
        with attention_kernel(model, "sdpa") if flash else nullcontext():
            return oracle.masked(
                model, self.batch.tensors, drops, self.tokens, later, cache_implementation=DYNAMIC
            )

    def looped(self, drops: oracle.Drops) -> torch.Tensor:
        """Return the logits of a loop over the layers, for each prompt by itself."""
        width, rows = self.batch.tensors["input_ids"].shape[1], []
        for number, (row, tokens) in enumerate(zip(self.batch.rows, self.tokens, strict=True)):
            prompt = batch_on_device(self.loaded, (row,))
            padding = width - prompt["input_ids"].shape[1]
            logits = oracle.looped(
                self.loaded.model,
                append_text(prompt, tokens[:-1]),
                [(first, [c - padding for c in columns[number]]) for first, columns in drops],
                len(tokens),
                **logits_to_keep_argument(self.loaded, len(tokens)),
            )
            rows.append(logits)
        return torch.cat(rows)

    def difference_to_itself(self) -> float:
        """Return how much the model differs from itself where nothing is masked or left out."""
        nothing: list[list[int]] = [[] for _ in self.batch.rows]
        return float(largest(self.without([(0, nothing)]), self.logits).max())


def check(
    loaded: Loaded,
    checked_inputs: Sequence[CheckedInput],
    cuts: Sequence[CheckedCut],
    on_progress: Progress | None = None,
) -> CheckResult:
    """Compare the pruned model with what it has to equal on every input, batch, cut and cache.

    Raises:
        ModelError: the unpruned model can't answer these prompts, or does not fit in memory.
    """
    started = time.perf_counter()
    warnings = [*loaded.warnings]
    noise: list[Noise] = []
    cases: list[CheckedCase] = []
    inputs: list[CheckedMedia] = []
    total = 2 * len(checked_inputs) * (1 + len(cuts) * len(CACHES))
    done = 0

    def show() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress("checking", done, total)

    with quiet(), as_memory_error(lambda: (f"out of memory on {loaded.model.device}", FEWER)):
        for checked_input in checked_inputs:
            batches = make_batches(loaded, checked_input)
            read, decoders = checked_input.first.read, checked_input.first.decoders
            media = describe_input(read, decoders, batches[0].rows[0])
            inputs.append(CheckedMedia(checked_input.name, media))
            warnings += checked_input.first.warnings
            for batch in batches:
                unpruned = run_unpruned(loaded, batch)
                noise.append(unpruned.noise)
                show()
                for case in check_batch(unpruned, cuts):
                    cases.append(case)
                    show()
    return CheckResult(
        model=describe_model(loaded),
        version=describe_versions(),
        inputs=inputs,
        steps=STEPS,
        noise=noise,
        cases=cases,
        seconds=time.perf_counter() - started,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def run_unpruned(loaded: Loaded, batch: CheckedBatch) -> UnprunedRun:
    """Run the unpruned model on a batch, and measure its noise."""
    model = loaded.model
    length = STEPS + 1
    tokens, logits = oracle.generate(
        model, batch.tensors, length, min_new_tokens=length, cache_implementation=DYNAMIC
    )
    logits = logits.float().cpu()
    kernel, other = kernel_of(model), other_kernel(model)
    try:
        with attention_kernel(model, other):
            other_logits = oracle.generate(
                model, batch.tensors, length, tokens, cache_implementation=DYNAMIC
            )[1]
        source = f"{kernel}, {other}"
    except (ModelError, RuntimeError) as error:
        if not isinstance(error, ModelError) and not is_out_of_memory(error):
            raise
        doubled = batch_on_device(loaded, (*batch.rows, *batch.rows))
        forced = torch.cat([tokens, tokens])
        other_logits = oracle.generate(
            model, doubled, length, forced, cache_implementation=DYNAMIC
        )[1][: len(tokens)]
        source = "batch sizes"
    measured = float(largest(other_logits.float().cpu(), logits).max())
    step = torch.finfo(model.dtype).eps * float(logits[logits.isfinite()].abs().max())
    factor = FACTORS.get(str(model.dtype).removeprefix("torch."), STRICTEST)
    noise = Noise(batch.input, batch.prompts, source, measured, step, factor)
    unpruned = UnprunedRun(loaded, batch, tokens, logits, noise)
    if loaded.pruned_equals == LAYER_LOOP:  # it runs all tokens at once, and each prompt alone
        measured = max(measured, unpruned.difference_to_itself())
        unpruned.noise = replace(noise, source=f"{source}, loop", measured=measured)
    return unpruned


def check_batch(unpruned: UnprunedRun, cuts: Sequence[CheckedCut]) -> Iterator[CheckedCase]:
    """Yield the cases of one batch: every cut with every cache."""
    encoded: FeatureCache = {}
    for cut in cuts:
        for cache in CACHES:
            yield check_case(unpruned, cut, cache, encoded)


def check_case(
    unpruned: UnprunedRun, cut: CheckedCut, cache: str, encoded: FeatureCache
) -> CheckedCase:
    """Run the pruned model once, and compare it with what it has to equal."""
    batch, limit = unpruned.batch, unpruned.noise.limit
    core = cut.core and batch.prompts == "one" and cache == DYNAMIC

    def case(outcome: str, reason: str = "", **values: object) -> CheckedCase:
        named = {"input": batch.input, "prompts": batch.prompts, "cut": cut.name, "cache": cache}
        return CheckedCase(**named, core=core, outcome=outcome, reason=reason, **values)  # type: ignore[arg-type]

    try:
        trace, logits = run_pruned(unpruned, cut, cache, encoded)
    except VtpruneError as error:
        return case(REFUSED, error.message)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if fails_unpruned(unpruned, cache):
            return case(REFUSED, f"the unpruned model fails with a {cache} cache too: {failure}")
        return case(DIFFERS, f"the pruned model fails: {failure}")
    if any(any(record.merged) for record in trace.stages):
        return case(REFUSED, "dropped tokens were merged into kept ones, which no mask can do")
    drops, later = oracle.dropped(trace), oracle.dropped_later(trace)
    if (
        later
        and unpruned.loaded.pruned_equals == LAYER_LOOP
        and any(map(any, (c for _, c in drops)))
    ):
        return case(
            REFUSED,
            "cuts of the prompt and while decoding together, where layers keep a state, have no "
            "counterpart to compare with",
        )
    by_layer = [(0, rows) for _, layers in later for rows in layers]
    if not any(columns for _, rows in (*drops, *by_layer) for columns in rows):
        return case(NO_CUT, "nothing of this input can be dropped there")
    if text := count_text(unpruned, [*drops, *by_layer]):
        return case(DIFFERS, f"{text} tokens that are no visual ones were dropped")
    try:
        expected = unpruned.without(drops, later)
        effect = float(largest(expected, unpruned.logits).max())
        differences = largest(logits, expected)
        decided, same = compare_tokens(logits, expected, DECIDED * unpruned.noise.value)
        outcome, reason = EQUAL, ""
        if bool((differences > limit).any()) or same < decided:
            outcome, reason = explain(unpruned, differences, decided - same)
        elif effect <= limit:
            outcome = BLIND
            reason = (
                f"the cut changes the logits by {effect:.1e}, less than the limit of {limit:.1e}"
            )
    except VtpruneError as error:
        return case(REFUSED, error.message)
    return case(
        outcome,
        reason,
        differences=tuple(differences.tolist()),
        limit=limit,
        effect=effect,
        decided=decided,
        same_tokens=same,
        layers=tuple(dict.fromkeys(record.layer for record in trace.stages)),
        visual=tuple(map(len, trace.layouts)),
        kept=kept_of(trace),
    )


def kept_of(trace: Trace) -> tuple[int, ...]:
    """Return the visual tokens of each sample after the last cut, of the layer with most."""
    if not trace.decoding:
        return tuple(map(len, trace.kept))
    return tuple(map(max, trace.decoding[-1].visual))


def run_pruned(
    unpruned: UnprunedRun, cut: CheckedCut, cache: str, encoded: FeatureCache
) -> tuple[Trace, torch.Tensor]:
    """Run the model with the cut; the trace, and (B, STEPS + 1, V) float32 on the CPU."""
    loaded, batch = unpruned.loaded, unpruned.batch
    block = pruning(
        loaded.model,
        cut.preset,
        calibration=loaded.calibration,
        inputs=PreparedInputs.of(batch.tensors, batch.rows, encoded),
    )
    with block as trace:
        logits = oracle.generate(
            loaded.model, batch.tensors, STEPS + 1, unpruned.tokens, cache_implementation=cache
        )[1]
    return trace, logits.float().cpu()


def count_text(unpruned: UnprunedRun, drops: oracle.Drops) -> int:
    """Return how many dropped columns hold another token than a placeholder of visual features."""
    loaded, ids = unpruned.loaded, unpruned.batch.tensors["input_ids"].tolist()
    placeholders = loaded.family.placeholders(loaded.files.config)
    visual = {token for tokens in placeholders.values() for token in tokens}
    return sum(
        row[column] not in visual
        for _, rows in drops
        for row, columns in zip(ids, rows, strict=True)
        for column in columns
    )


def fails_unpruned(unpruned: UnprunedRun, cache: str) -> bool:
    """Return whether the unpruned model fails with this cache."""
    tensors, tokens = unpruned.batch.tensors, unpruned.tokens
    try:
        oracle.generate(unpruned.loaded.model, tensors, STEPS + 1, tokens,
                        cache_implementation=cache)  # fmt: skip
    except Exception:
        return True
    return False


def explain(unpruned: UnprunedRun, differences: torch.Tensor, flipped: int) -> tuple[str, str]:
    """Return the outcome and the reason of a case that is not equal.

    Args:
        differences: the largest of each step.
        flipped: decided steps at which another token would be chosen.
    """
    limit = unpruned.noise.limit
    plain = unpruned.difference_to_itself()
    if plain > limit:
        return REFUSED, (
            f"this model with a mask that hides nothing, or a loop over its layers that leaves "
            f"nothing out, differs from itself by {plain:.1e}: that does not say what pruning "
            "should give"
        )
    wrong = (differences > limit).nonzero().flatten().tolist()
    if not wrong:
        return DIFFERS, f"another token is chosen at {flipped} steps where the noise is too small"
    where = f"decoded token {wrong[0]} on" if wrong[0] else "the prompt on"
    return DIFFERS, f"from {where}, by up to {float(differences.max()):.1e} (limit {limit:.1e})"


def largest(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute difference of each step, (steps,); infinity for what is NaN.

    Args:
        ours, theirs: (B, steps, V).
    """
    apart = torch.where(ours == theirs, 0.0, (ours - theirs).abs())
    return apart.nan_to_num(nan=torch.inf).amax(dim=(0, 2))


def compare_tokens(ours: torch.Tensor, theirs: torch.Tensor, margin: float) -> tuple[int, int]:
    """Return the steps at which the likeliest of `theirs` is ahead by more than a margin, and those
    of them at which it is also the likeliest of `ours`.

    Args:
        ours, theirs: (B, steps, V).
    """
    first, second = theirs.topk(2, dim=-1).values.unbind(-1)
    decided = first - second > margin
    same = ours.argmax(-1) == theirs.argmax(-1)
    return int(decided.sum()), int((decided & same).sum())
