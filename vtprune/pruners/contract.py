"""What every method keeps to, on made-up tokens: the check of one's own methods, and of ours.

Each check takes a `Subject`, and raises ContractError with what the method did.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from vtprune.errors import ModelError, VtpruneError, quote
from vtprune.pruners.base import (
    ATTENTION,
    ROTARY,
    STATES,
    TOWER,
    Budget,
    Pruner,
    Selection,
    VisualTokens,
)
from vtprune.tokens.layout import NEWLINE, Layout, box, join, lay_out, single

HEADS, WIDTH, TEXT = 4, 8, 6
READABLE = (*STATES, *(f"text_{name}" for name in STATES), *ATTENTION, *ROTARY, *TOWER)
"""The states that a method may need."""
SCOPES = ("all", "frame", "tile")


class ContractError(Exception):
    """What a method did that no method may do."""


@dataclass(frozen=True)
class Subject:
    """A method under check.

    Args:
        create: makes it, with its default options.
        exact: it keeps the whole budget; otherwise it may keep less.
        drops_all: it keeps nothing.
        thorough: try every budget, and not some of them.
    """

    create: Callable[[], Pruner]
    exact: bool = True
    drops_all: bool = False
    thorough: bool = False

    def budgets(self, layout: Layout) -> Iterator[tuple[str, Budget]]:
        """Yield budgets over a layout, with words for each."""
        total = len(layout)
        some = {1, 2, total // 3, total // 2, total - 1, total} - {0}
        counts = range(1, total + 1) if self.thorough else sorted(some)
        for per, count in itertools.product(SCOPES, [0] if self.drops_all else counts):
            if count <= total:
                budget = Budget.share(count, layout.groups(per))
                yield f"{count} of {total} tokens, per {per}", budget

    def a_budget(self, layout: Layout, per: str = "all") -> Budget:
        """Return a budget of about a third of the tokens."""
        count = 0 if self.drops_all else max(len(layout) // 3, 1)
        return Budget.share(count, layout.groups(per))


def video(frames: int = 4, rows: int = 3, cols: int = 5, newline: bool = True) -> Layout:
    """Return the layout of a video, with a newline token at its end."""
    grid = box(frames, rows, cols)
    if newline:
        grid = join([grid, single(NEWLINE, frame=frames - 1, row=rows - 1, col=cols)])
    return lay_out({"video": torch.arange(7, 7 + len(grid))}, {"video": [grid]})


def tiles(sizes: tuple[tuple[int, int], ...] = ((4, 4), (2, 6), (6, 1), (1, 1))) -> Layout:
    """Return the layout of a picture in tiles of several sizes."""
    grid = join([box(1, rows, cols, tile=tile) for tile, (rows, cols) in enumerate(sizes)])
    return lay_out({"image": torch.arange(len(grid))}, {"image": [grid]})


def flat(count: int) -> Layout:
    """Return the layout of a picture of one row."""
    return lay_out({"image": torch.arange(count)}, {"image": [box(1, 1, count)]})


def layouts() -> dict[str, Layout]:
    """Return the layouts that methods are checked on."""
    return {"video": video(), "tiles": tiles(), "flat": flat(37), "one": flat(1)}


def tokens_of(layout: Layout, seed: int = 0) -> VisualTokens:
    """Return all that a method can read, made up."""
    generator = torch.Generator().manual_seed(11)
    count = len(layout)
    shapes = dict.fromkeys(STATES, (count, HEADS, WIDTH))
    shapes |= {f"text_{name}": (TEXT, HEADS, WIDTH) for name in STATES}
    states = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    rows = torch.randn(TEXT, count + 9, generator=generator).softmax(-1)[:, :count]
    states |= {"text_attention": rows, "attention": rows[-1].clone()}
    states |= {name: torch.rand(count, generator=generator) for name in TOWER}
    by_head = torch.randn(TEXT, HEADS, count + 9, generator=generator).softmax(-1)
    states |= {"text_attention_by_head": by_head[..., :count]}
    lengths = zip(ROTARY, (count, TEXT), strict=True)
    states |= {name: torch.randn(num, WIDTH, generator=generator) for name, num in lengths}
    return VisualTokens(layout, states, seed)


# -- one selection ---------------------------------------------------------------------------------


def selection_fault(selection: object, budget: Budget, exact: bool) -> str:
    """Return what is wrong with a selection under a budget; "" where nothing is."""
    if not isinstance(selection, Selection):
        return f"gave {quote(selection)}, which is no Selection"
    index, count = selection.index, len(budget.group)
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        return "gave an index that is no (K,) int64 tensor"
    kept = index.tolist()
    if kept != sorted(set(kept)):
        return "gave an index that is not ascending, or names a token twice"
    if kept and not 0 <= kept[0] <= kept[-1] < count:
        return f"gave an index outside of the {count} tokens"
    quota = budget.quota.tolist()
    held = torch.bincount(budget.group.cpu()[index.cpu()], minlength=len(quota)).tolist()
    if exact and held != quota:
        return f"kept {held} tokens of the groups, where the budget is {quota}"
    if any(have > most for have, most in zip(held, quota, strict=True)):
        return f"kept {held} tokens of the groups, more than the budget of {quota}"
    if any(most and not have for have, most in zip(held, quota, strict=True)):
        return "kept nothing of a group that may keep something"
    return _merge_fault(selection, count)


def _merge_fault(selection: Selection, count: int) -> str:
    """Return what is wrong with what a selection merges."""
    assign, weight, num_kept = selection.assign, selection.weight, len(selection.index)
    if assign is None or weight is None:
        return "" if assign is weight else "gave one of assign and weight without the other"
    if assign.dtype != torch.int64 or not assign.shape == weight.shape == (count,):
        return "gave assign or weight of another type or shape than (N,)"
    if assign[selection.index].tolist() != list(range(num_kept)):
        return "merged a kept token into another one"
    if not set(assign.tolist()) <= set(range(-1, num_kept)):
        return "merged tokens into one that is not kept"
    used = assign >= 0
    shares = weight[used].float().cpu()
    sums = torch.zeros(num_kept).index_add_(0, assign[used].cpu(), shares)
    if bool((shares < 0).any()) or not torch.allclose(sums, torch.ones(num_kept), atol=1e-4):
        return "gave weights that do not add up to 1 in every kept token"
    return ""


@dataclass(frozen=True)
class CheckedPruner:
    """A method of the user's own, held to its budget at every cut.

    Args:
        name: as it is registered.
    """

    name: str
    pruner: Pruner
    exact: bool

    @property
    def needs(self) -> tuple[str, ...]:
        """The states that it reads."""
        return tuple(self.pruner.needs)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """Return its selection.

        Raises:
            ModelError: it is none that the budget allows, or the method failed.
        """
        try:
            selection = self.pruner.select(tokens, budget)
            fault = selection_fault(selection, budget, self.exact)
        except VtpruneError:
            raise
        except Exception as error:
            fault = f"raised {type(error).__name__}: {error}"
            raise ModelError(f"method {self.name} {fault}", "mend its select") from error
        if fault:
            raise ModelError(f"method {self.name} {fault}", "mend its select")
        return selection


# -- the contract ----------------------------------------------------------------------------------


def needs_known_states(subject: Subject) -> None:
    """Check that the states that it needs are those that there are."""
    needs = subject.create().needs
    if not isinstance(needs, tuple):
        raise ContractError(f"needs is {quote(needs)}, but must be a tuple of names")
    for need in needs:
        if need not in READABLE:
            raise ContractError(f"needs {quote(need)}, which is none of {', '.join(READABLE)}")


def keeps_its_budget(subject: Subject) -> None:
    """Check every group's quota, order and uniqueness, and the merged shares."""
    for layout in layouts().values():
        tokens = tokens_of(layout)
        for words, budget in subject.budgets(layout):
            selection = subject.create().select(tokens, budget)
            if subject.drops_all:
                if len(selection.index):
                    raise ContractError(f"kept {len(selection.index)} tokens, and keeps none")
                continue
            if fault := selection_fault(selection, budget, subject.exact):
                raise ContractError(f"{fault} ({words})")


def can_keep_all(subject: Subject) -> None:
    """Check that under a budget of all tokens all are kept."""
    if subject.drops_all:
        return
    for layout in layouts().values():
        budget = Budget.share(len(layout), layout.groups("all"))
        kept = subject.create().select(tokens_of(layout), budget).index.tolist()
        if kept != list(range(len(layout))):
            raise ContractError(f"kept {len(kept)} of {len(layout)} tokens where all fit")


def takes_tokens_that_are_alike(subject: Subject) -> None:
    """Check that it chooses where all states are the same."""
    tokens = tokens_of(video())
    for value, per in itertools.product((0.0, 1.0), ("all", "frame")):
        alike = {name: torch.full_like(own, value) for name, own in tokens.states.items()}
        budget = subject.a_budget(tokens.layout, per)
        selection = subject.create().select(replace(tokens, states=alike), budget)
        if not subject.drops_all and (fault := selection_fault(selection, budget, subject.exact)):
            raise ContractError(f"{fault}, where all states are {value:g}")


def computes_in_full_precision(subject: Subject) -> None:
    """Check that bfloat16 states give what the same values in float32 give."""
    tokens = tokens_of(video())
    half = {name: own.bfloat16() for name, own in tokens.states.items() if own.dim() == 3}
    full = {name: own.float() for name, own in half.items()}
    for count in [0] if subject.drops_all else range(5, len(tokens), 7):
        budget = Budget.share(count, tokens.layout.groups("all"))
        chosen = [
            subject.create()
            .select(replace(tokens, states={**tokens.states, **states}), budget)
            .index.tolist()
            for states in (half, full)
        ]
        if chosen[0] != chosen[1]:
            raise ContractError(
                "chooses otherwise by bfloat16 states than by the same values in float32: begin "
                "with .float()"
            )


def repeats_itself(subject: Subject) -> None:
    """Check that the same seed gives the same choice."""
    layout = video()
    first, second = (
        subject.create().select(tokens_of(layout, 3), subject.a_budget(layout, "frame")).index
        for _ in range(2)
    )
    if not torch.equal(first, second):
        raise ContractError(
            "chooses otherwise under the same seed: draw by a generator of tokens.seed"
        )


def leaves_its_input(subject: Subject) -> None:
    """Check that states and the process-wide random state are as before."""
    tokens = tokens_of(video())
    before = {name: value.clone() for name, value in tokens.states.items()}
    state = torch.random.get_rng_state()
    subject.create().select(tokens, subject.a_budget(tokens.layout))
    changed = [
        name for name, value in tokens.states.items() if not torch.equal(before[name], value)
    ]
    if changed:
        raise ContractError(f"changed the states {', '.join(changed)} that it was given")
    if not torch.equal(state, torch.random.get_rng_state()):
        torch.random.set_rng_state(state)
        raise ContractError(
            "draws from torch's own random generator: draw by a generator of tokens.seed"
        )


def reads_what_it_names(subject: Subject) -> None:
    """Check that it reads no other states than `needs`."""
    pruner, everything = subject.create(), tokens_of(video())
    only = replace(everything, states={name: everything.states[name] for name in pruner.needs})
    budget = subject.a_budget(everything.layout)
    try:
        by_named = pruner.select(only, budget).index
    except KeyError as error:
        raise ContractError(f"reads the states {error}, which its needs do not name") from error
    if not torch.equal(by_named, pruner.select(everything, budget).index):
        raise ContractError("chooses by states that its needs do not name")


CONTRACT: Mapping[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        needs_known_states,
        keeps_its_budget,
        reads_what_it_names,
        can_keep_all,
        takes_tokens_that_are_alike,
        computes_in_full_precision,
        repeats_itself,
        leaves_its_input,
    )
}
"""What every method is checked for, in this order."""
