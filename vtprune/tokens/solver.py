"""From a kept fraction to how many tokens every cut leaves; with `quotas` the only rounding.

For example, keep 0.3 over 10 layers and 100 tokens, with one free cut at layer 2, leaves 12 tokens:
2 x 100 + 8 x 12 = 296, the most that is not above 0.3 x 10 x 100 = 300.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.errors import PresetError
from vtprune.tokens.schedule import (
    SLACK,
    Cut,
    Place,
    Schedule,
    fixed_count,
    lowest_keep,
    merge_places,
)


def solve(
    places: Sequence[Place],
    keep: float | None,
    num_layers: int,
    num_tokens: int,
    num_input: int | None = None,
    most_after: int | None = None,
) -> Schedule:
    """Return the number of tokens that every stage of one sample leaves.

    Args:
        places: the stages in order; at most one without a keep.
        keep: the layer average to meet through that stage; None where every stage has a keep.
        num_layers: decoder layers L.
        num_tokens: visual tokens N before any cut; all fractions are of these.
        num_input: tokens at the language model's input, where others were dropped before the vision
            tower; None for all. Where the budget is more than they can fill, all of them are kept.
        most_after: in place of `keep`: the tokens that the first cut of the stage without a keep
            leaves, where there are more.

    Raises:
        PresetError: the average can't be reached; the message says what can.
    """
    enough = most_after is not None and most_after >= num_tokens
    if not num_tokens or enough or (keep is not None and keep >= 1):
        return Schedule(num_layers, num_tokens, ())
    num_input = num_tokens if num_input is None else num_input
    fixed = tuple(
        Cut(number, place.layer, min(fixed_count(place.keep, num_tokens), num_input))
        for number, place in enumerate(places)
        if place.keep is not None
    )
    spent = sum(Schedule(num_layers, num_input, fixed).tokens_by_layer())
    over = keep is not None and spent > keep * num_layers * num_tokens + SLACK
    numbered, warnings = merge_places(places, num_layers, over)
    counts = [
        None if place.keep is None else min(fixed_count(place.keep, num_tokens), num_input)
        for _, place in numbered
    ]
    layers = [place.layer for _, place in numbered]
    if None in counts and (keep is not None or most_after is not None):
        free = counts.index(None)
        stages = [place for _, place in numbered]
        solver = _Solver(stages, layers, counts, num_layers, num_tokens, num_input)
        if most_after is not None:
            keep = solver.keep_that_leaves(free, most_after)
        assert keep is not None
        budget = keep * num_layers * num_tokens
        if numbered[free][1].profile:
            warnings += solver.follow_profile(budget, keep)
        elif numbered[free][1].drops_all:
            paid = solver.layer_to_drop_all(free, budget, keep)
            layers[free] = solver.possible_before(free, paid, keep)
            counts[free] = 0
            if layers[free] < paid:
                warnings.append(
                    f"keep {keep:g} pays for all tokens up to layer {paid}, before which this "
                    f"model can't drop any: they go before layer {layers[free]}"
                )
            if layers[free] == num_layers:
                warnings.append(solver.below_keep_warning(keep))
        else:
            warnings += solver.place_free(free, budget, keep)
    cuts = tuple(
        Cut(number, layer, count if count is not None else num_tokens)
        for (number, _), layer, count in zip(numbered, layers, counts, strict=True)
        if layer < num_layers
    )
    return Schedule(num_layers, num_tokens, cuts, tuple(warnings))


@dataclass
class _Solver:
    """Find the free stage's count; changes `layers` and `counts` in place."""

    places: list[Place]
    layers: list[int]
    counts: list[int | None]
    num_layers: int
    num_tokens: int
    num_input: int

    @property
    def uncut_total(self) -> int:
        """Return the sum over the layers of their tokens, if nothing were cut."""
        return self.num_layers * self.num_tokens

    def total(self, counts: Sequence[int | None], layers: Sequence[int]) -> int:
        """Return the sum over the layers of their tokens; a None count adds nothing."""
        bounds = [*layers, self.num_layers]
        uncut = layers[0] * self.num_input
        return uncut + sum(
            (count or 0) * (bounds[i + 1] - bounds[i]) for i, count in enumerate(counts)
        )

    def free_count(self, free: int, layer: int, budget: float) -> int:
        """Return the tokens that the free stage leaves when it cuts at `layer`."""
        layers = [*self.layers[:free], layer, *self.layers[free + 1 :]]
        until = layers[free + 1] if free + 1 < len(layers) else self.num_layers
        counts = [None if i == free else count for i, count in enumerate(self.counts)]
        left = budget - self.total(counts, layers)
        return math.floor(left / (until - layer) + SLACK)

    def possible(self, free: int, first: int, last: int) -> list[int]:
        """Return the layers from `first` to `last` that the free stage can cut at."""
        layers = self.places[free].layers
        return [n for n in range(first, last + 1) if layers is None or n in layers]

    def bounds(self, free: int) -> tuple[int, int]:
        """Return the fewest and the most tokens that the free stage may leave."""
        after = self.counts[free + 1] if free + 1 < len(self.counts) else 1
        before = self.counts[free - 1] if free else self.num_input
        assert after is not None
        assert before is not None
        return max(after, 1), before

    def place_free(self, free: int, budget: float, keep: float) -> list[str]:
        """Set the free stage's count; move its cut, or raise later counts, where it must."""
        lowest, highest = self.bounds(free)
        named = self.layers[free]
        count = self.free_count(free, named, budget)
        if lowest <= count <= highest:
            self.counts[free] = count
            return []
        if count > highest:
            return self.raise_later(free, budget, keep, highest)
        first = max(self.layers[free - 1] + 1 if free else 0, self.places[free].lowest)
        if self.places[free].named:
            earlier = self.possible(free, first, named - 1)
            for layer in reversed(earlier):
                count = self.free_count(free, layer, budget)
                if count >= lowest:
                    self.layers[free] = layer
                    self.counts[free] = min(count, highest)
                    return [
                        f"the cut at {self.places[free].at} moved from layer {named} to {layer}: "
                        f"keep {keep:g} can't be reached from layer {named} on"
                    ]
            self.layers[free] = min(earlier, default=named)
        self.counts[free] = lowest
        reach = lowest_keep(self.total(self.counts, self.layers), self.uncut_total)
        raise PresetError(
            f"keep {keep:g} can't be reached with a cut at {self.places[free].at} "
            f"(layer {named} of {self.num_layers}) and {self.num_tokens} visual tokens: "
            f"the lowest reachable keep is {reach}",
            "raise keep, cut earlier (at: input), or give later stages a smaller keep",
        )

    def raise_later(self, free: int, budget: float, keep: float, highest: int) -> list[str]:
        """Let later stages at named places keep more, where the free one can't spend the budget."""
        self.counts[free] = highest
        fixed = list(self.counts)
        low, high = 0, self.num_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.total(self._raised(fixed, free, middle), self.layers) <= budget + SLACK:
                low = middle
            else:
                high = middle - 1
        raised_counts = self._raised(fixed, free, low)
        reached = self.total(raised_counts, self.layers)
        most = self.total(self._raised(fixed, free, self.num_tokens), self.layers)
        short = most < math.floor(budget + SLACK) and reached == most
        if short and self.num_input == self.num_tokens:
            reach = most / self.uncut_total
            raise PresetError(
                f"keep {keep:g} can't be reached: the stages around {self.places[free].at} "
                f"leave less; the highest reachable keep is {math.floor(reach * 1e4) / 1e4:g}",
                "lower keep, or give the other stages a larger keep",
            )
        self.counts[:] = raised_counts
        if short:
            return [self.below_keep_warning(keep)]
        raised = [i for i, count in enumerate(raised_counts) if count != fixed[i]]
        if not raised:  # what is left is less than one token in each of the later layers
            return []
        names = ", ".join(self.places[i].at for i in raised)
        return [f"keep {keep:g} leaves more than the stages at {names} ask for: they keep more"]

    def _raised(self, counts: Sequence[int | None], free: int, level: int) -> list[int | None]:
        raised_counts: list[int | None] = list(counts)
        for i in range(free + 1, len(raised_counts)):
            if self.places[i].named and not self.places[i].drops_all:
                raised_counts[i] = min(max(raised_counts[i] or 0, level), raised_counts[i - 1] or 0)
        return raised_counts

    def follow_profile(self, budget: float, keep: float) -> list[str]:
        """Set the counts of a method's own schedule to the most that the budget allows."""
        low, high = 0.0, 1.0
        lowest = self._on_profile(low)
        if self.total(lowest, self.layers) > budget + SLACK:
            reach = lowest_keep(self.total(lowest, self.layers), self.uncut_total)
            sooner = ", or name a place to cut at once: --at 1" if self.layers[0] > 1 else ""
            raise PresetError(
                f"keep {keep:g} can't be reached by the method's own schedule, whose first cut is "
                f"at layer {self.layers[0]} of {self.num_layers}: the lowest reachable keep is "
                f"{reach}",
                f"raise keep{sooner}",
            )
        for _ in range(40):  # halves the interval; then t is exact to 1e-12
            middle = (low + high) / 2
            if self.total(self._on_profile(middle), self.layers) <= budget + SLACK:
                low = middle
            else:
                high = middle
        self.counts[:] = self._on_profile(low)
        short = self.total(self._on_profile(1.0), self.layers) < math.floor(budget + SLACK)
        return [self.below_keep_warning(keep)] if short else []

    def _on_profile(self, t: float) -> list[int | None]:
        """Return all counts, with those of the profile at t between the counts before and after."""
        counts = list(self.counts)
        most = self.num_input
        for i, place in enumerate(self.places):
            if place.profile:
                least = max((c for c in self.counts[i + 1 :] if c is not None), default=1)
                share = place.profile.fractions(t)[place.part]
                counts[i] = min(max(math.floor(share * self.num_tokens + SLACK), least, 1), most)
            most = min(most, counts[i] or 0)
        return counts

    def keep_that_leaves(self, free: int, count: int) -> float:
        """Return the layer average at which the first cut of the free stage leaves `count`.

        Raises:
            PresetError: it leaves nothing, or fewer than a later stage.
        """
        place = self.places[free]
        if place.drops_all:
            raise PresetError(
                f"{count} tokens after the cut: the method drops all of them",
                "give a layer average: --keep, or --tokens",
            )
        if place.profile:
            low, high = 0.0, 1.0
            for _ in range(40):
                middle = (low + high) / 2
                left = self._on_profile(middle)[free]
                low, high = (middle, high) if (left or 0) <= count else (low, middle)
            return self.total(self._on_profile(low), self.layers) / self.uncut_total
        least, most = self.bounds(free)
        if count < least:
            raise PresetError(
                f"{count} tokens after the cut at {place.at} are fewer than the {least} that a "
                "later stage leaves",
                "give that stage a smaller keep, or leave more",
            )
        counts = list(self.counts)
        counts[free] = min(count, most)
        return self.total(counts, self.layers) / self.uncut_total

    def layer_to_drop_all(self, free: int, budget: float, keep: float) -> int:
        """Return the first layer at which a free stage can drop all tokens within the budget."""
        before = self.counts[free - 1] if free else self.num_input
        start = self.layers[free - 1] if free else 0
        spent = self.total([*self.counts[:free], 0], [*self.layers[:free], start])
        assert before is not None
        layer = start + math.floor((budget - spent) / max(before, 1) + SLACK)
        if layer <= start and free:
            raise self.spent(keep)
        last = self.num_layers - (self.num_input == self.num_tokens)
        return min(max(layer, 0), last)

    def possible_before(self, free: int, layer: int, keep: float) -> int:
        """Return the last layer up to a given one at which the free stage can drop all tokens."""
        if layer == self.num_layers:
            return layer
        possible = self.possible(free, self.layers[free - 1] + 1 if free else 0, layer)
        if not possible:
            raise self.spent(keep)
        return possible[-1]

    @staticmethod
    def spent(keep: float) -> PresetError:
        """Return the error of a budget that other stages use up."""
        return PresetError(
            f"keep {keep:g} is spent before the stage that drops all tokens",
            "raise keep, or lower the keep of the stages before it",
        )

    def below_keep_warning(self, keep: float) -> str:
        """Return the warning for keeps above what is left at the language model's input."""
        return (
            f"keep {keep:g} asks for more than the {self.num_input} of {self.num_tokens} tokens "
            "that are left at the language model's input: later stages cut less, or nothing"
        )
