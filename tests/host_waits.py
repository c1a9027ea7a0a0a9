"""How often pruning makes the host wait for a GPU, counted on a device that is not there.

`python tests/host_waits.py` counts, and writes the tables of docs/reliability.md.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from oracle import generate
from other_device import Devices, Wait, devices, move
from transformers import PreTrainedModel

import vtprune
from vtprune.engine.trace import Trace
from vtprune.pruners import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
MARK = "<!-- counted by python tests/host_waits.py -->"
FAMILY = "llava_onevision"
FRAMES = 10
STEPS = 2
BY_TOKEN = tuple(name for name, method in METHODS.items() if not method.units and not method.media)
"""The methods that choose among tokens; the others choose pixels, before there are any."""
MORE = {
    "entropy": (2, "torch's solver of eigenvalues reads whether it succeeded"),
    "holitom": (2, "how many tokens are clustered follows from the runs that stand still"),
    "fastvid": (2, "how many tokens are clustered follows from the segments"),
    "flashvid": (3, "how many trees are clustered follows from the segments and links"),
}
"""Waits in selection of a method that reads more than once in a cut, and why it does."""
NOTHING = ("random", "uniform", "pool", "vtw")
"""The methods that read nothing."""


@dataclass(frozen=True)
class Run:
    """One pruned generation.

    Args:
        trace: of it.
        ids: (B, T) of the answer.
        logits: (B, T, V).
        waits: of the host.
    """

    trace: Trace
    ids: torch.Tensor
    logits: torch.Tensor
    waits: tuple[Wait, ...] = ()

    @property
    def ours(self) -> list[Wait]:
        """Those that vtprune asked for."""
        return [wait for wait in self.waits if wait.place]

    @property
    def before_layers(self) -> list[Wait]:
        """While the prompt is laid out and planned."""
        inside = [*self.in_selection, *self.between_layers]
        return [wait for wait in self.ours if wait.forward < 2 and wait not in inside]

    @property
    def in_selection(self) -> list[Wait]:
        """While tokens are chosen, or what they are chosen by is read."""
        return [wait for wait in self.ours if wait.inside("cut", "take_attention", "keep")]

    @property
    def between_layers(self) -> list[Wait]:
        """In the layers of the prompt, but not for a selection."""
        names = "enter_layer", "add_to_kept_tokens", "lengthen", "scale_queries", "bias_attention"
        inside = [wait for wait in self.ours if wait.inside(*names)]
        return [wait for wait in inside if wait.forward < 2 and wait not in self.in_selection]

    def in_step(self, first: int, last: int = STEPS) -> list[Wait]:
        """In some of the decoding steps, numbered from 1."""
        return [wait for wait in self.ours if first <= wait.forward - 1 <= last]


@functools.cache
def shared(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)  # of weights that a tiny model leaves as they are made
    return tiny.model(name, dtype=dtype)


def there(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, on the device."""
    return move(copy.deepcopy(model), "cuda:0")


def modality(name: str, method: str = "random") -> str:
    """What a prompt of a model shows: a video where it and the method take one."""
    takes = set(tiny.KINDS[name]) & set(METHODS[method].modalities)
    return "video" if "video" in takes else "image"


def prune(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    /,
    steps: int = STEPS,
    noted: Devices | None = None,
    **options: object,
) -> Run:
    """Generate `steps` tokens after the first one in a `pruning` block with some options."""
    counted = noted.count_forwards(model) if noted else None
    with vtprune.pruning(model, **options) as trace:
        ids, logits = generate(model, dict(inputs), steps + 1)
    if noted is None or counted is None:
        return Run(trace, ids, logits)
    counted.remove()
    return Run(trace, ids.held, logits.held, tuple(noted.waits))  # type: ignore[attr-defined]


def waits_in_selection(method: str, cuts: int) -> int:
    """Return how often the host may wait while a method chooses in so many cuts: exactly that."""
    if method in NOTHING:
        return 0
    return MORE[method][0] if method in MORE else cuts


def on_both(
    name: str,
    inputs: Mapping[str, torch.Tensor],
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> tuple[Run, Run]:
    """Return one generation as run on the CPU, and on the device."""
    here = prune(shared(name, dtype), inputs, steps, **options)
    with devices() as noted:
        remote = {key: value.to("cuda:0") for key, value in inputs.items()}
        return here, prune(on_device(name, dtype), remote, steps, noted, **options)


@functools.cache
def on_device(name: str, dtype: torch.dtype) -> PreTrainedModel:
    with devices():
        return there(shared(name, dtype))


@functools.cache
def runs_of(method: str) -> tuple[Run, Run]:
    """Return a method's runs, at its own place."""
    inputs = tiny.inputs(FAMILY, shared(FAMILY), modality(FAMILY, method), frames=FRAMES)
    return on_both(FAMILY, inputs, method=method, keep=keep_of(method))


def keep_of(method: str) -> float:
    """A keep that a method's own places can reach."""
    return 0.5 if METHODS[method].drops_all else 0.4


@functools.cache
def runs_in(name: str) -> tuple[Run, Run]:
    """Return a family's runs, with cuts that read the tower, and attention between layers."""
    inputs = tiny.inputs(name, shared(name), modality(name))
    # The tower of Gemma 4's videos can't be read.
    first = "divprune" if name.startswith("gemma4") else "visionzip"
    stages = [{"at": "input", "method": first, "keep": 0.7}, {"at": "60%", "method": "fastv"}]
    return on_both(name, inputs, 2, preset={"stages": stages}, keep=0.6)


# -- the tables ------------------------------------------------------------------------------------


def by_method() -> str:
    """Return the table of the waits of every method."""
    lines = [
        "| method | cuts | before the layers | in selection | between layers | first step | later |"
        " more than one in a cut |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in BY_TOKEN:
        run = runs_of(method)[1]
        cells = [
            f"`{method}`", len(run.trace.stages), len(run.before_layers), len(run.in_selection),
            len(run.between_layers), len(run.in_step(1, 1)), len(run.in_step(2)),
            MORE.get(method, (0, ""))[1],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def by_family() -> str:
    """Return the table of the waits in every family."""
    lines = [
        "| model | before the layers | in selection | between layers | first step | later |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in tiny.FAMILIES:
        run = runs_in(name)[1]
        cells = [
            name, len(run.before_layers), len(run.in_selection), len(run.between_layers),
            len(run.in_step(1, 1)), len(run.in_step(2)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def tables() -> str:
    return f"{by_method()}\n\n{by_family()}"


def main() -> None:
    """Put the tables into the page, in the place of those that are there."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    after = rest.partition(MARK)[2]
    PAGE.write_text(f"{before}{MARK}\n{tables()}\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
