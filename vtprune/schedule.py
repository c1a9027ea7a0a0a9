"""From a kept fraction to how many tokens are there from which layer on; the only rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vtprune.errors import PresetError

NAMED = ("ecl", "horizon")
SLACK = 1e-6  # so that 0.3 x 10 is 3


@dataclass(frozen=True)
class Profile:
    """The schedule of a method that cuts several times by a rule of its own.

    Args:
        depths: where it cuts, as fractions of the decoder's layers, ascending.
        fractions: t in [0, 1] -> the fraction of the original tokens that each cut leaves; 1 at
            t = 1, none rises from cut to cut, and their layer average never falls with t.
    """

    depths: tuple[float, ...]
    fractions: Callable[[float], tuple[float, ...]]

    def layers(self, num_layers: int, lowest: int = 0) -> list[int]:
        """The layers of the cuts, each after the one before.

        Raises:
            PresetError: the decoder is too shallow.
        """
        layers: list[int] = []
        for depth in self.depths:
            after = layers[-1] + 1 if layers else lowest
            layers.append(max(math.floor(depth * num_layers + SLACK), after))
        if layers[-1] >= num_layers:
            raise PresetError(
                f"{num_layers} decoder layers are too few for {len(layers)} cuts",
                "name a place: --at ecl, or a layer number",
            )
        return layers


@dataclass(frozen=True)
class Place:
    """One cut before its count is known.

    Args:
        at: as the preset says it.
        layer: the first layer that sees the shorter sequence; 0 is the language model's input.
        keep: fraction of the original tokens left, None for the free stage.
        drops_all: the method leaves nothing (`vtw`).
        lowest: the first layer that the method can cut at.
        profile: of the method's own schedule, and `part` the number of this cut in it.
    """

    at: str
    layer: int
    keep: float | None = None
    drops_all: bool = False
    lowest: int = 0
    profile: Profile | None = None
    part: int = 0

    @property
    def named(self) -> bool:
        return self.at in NAMED


@dataclass(frozen=True)
class Cut:
    """One cut of one sample: which stage, at which layer, how many tokens it leaves."""

    stage: int
    layer: int
    count: int


@dataclass(frozen=True)
class Schedule:
    """The cuts of one sample of `num_tokens` visual tokens, and what had to be said about them."""

    num_layers: int
    num_tokens: int
    cuts: tuple[Cut, ...]
    warnings: tuple[str, ...] = ()

    def after_pixels(self, present: int | None) -> Schedule:
        """The same cuts as those of stages 1, 2 ..., and stage 0, which left `present` tokens.

        Args:
            present: None: what it left is all that the prompt holds, so that there is no cut.
        """
        if not self.num_tokens:
            return self
        later = tuple(replace(cut, stage=cut.stage + 1) for cut in self.cuts)
        return replace(self, cuts=later if present is None else (Cut(0, 0, present), *later))

    def tokens_by_layer(self) -> list[int]:
        """Visual tokens that each layer sees."""
        return tokens_by_layer(self.num_tokens, self.num_layers, self.cuts)

    def keep_mean(self) -> float:
        """The average over the layers of the fraction of tokens present."""
        if not self.num_tokens:
            return 1.0
        return sum(self.tokens_by_layer()) / (self.num_layers * self.num_tokens)


def tokens_by_layer(num_tokens: int, num_layers: int, cuts: Sequence[Cut]) -> list[int]:
    """Tokens that each of `num_layers` layers sees, with `cuts` in order."""
    present = num_tokens
    counts = []
    for layer in range(num_layers):
        for cut in cuts:
            if cut.layer == layer:
                present = cut.count
        counts.append(present)
    return counts


def resolve_layer(at: str, num_layers: int, ecl: int, horizon: int) -> int:
    """The layer that a place names, in a decoder of `num_layers`.

    A horizon may lie past the last layer: then no layer can do without visual tokens.

    Raises:
        PresetError: not a place, or past the last layer.
    """
    if at in ("pixels", "input"):
        return 0
    if at in NAMED:
        return min(ecl, num_layers - 1) if at == "ecl" else min(horizon, num_layers)
    if at.endswith("%"):
        depth = math.floor(float(at[:-1]) / 100 * num_layers + SLACK)
        return min(depth, num_layers - 1)  # 99.999999% rounds up to the end
    layer = int(at)
    if layer >= num_layers:
        raise PresetError(
            f"at: {layer}: this model has {num_layers} decoder layers, 0 to {num_layers - 1}",
            f'a depth such as "{round(100 * min(layer, 99) / max(layer + 1, 100))}%", ecl or '
            "horizon fits any model",
        )
    return layer


def merge_places(
    places: Sequence[Place], num_layers: int, over: bool = False
) -> tuple[list[tuple[int, Place]], list[str]]:
    """Numbered places in order, each layer once.

    Two named places that meet become one: the stage that keeps fewer tokens stays. A named place
    past the last layer is left out, unless it is the one that has to meet the budget.

    Args:
        over: the stages with a keep spend more than the budget, so that the free one keeps fewer.

    Raises:
        PresetError: layers that do not increase, or keeps that grow.
    """
    fixed = [
        (place.at, place.keep or 0.0)
        for place in places
        if place.keep is not None or place.drops_all
    ]
    for (earlier, most), (at, keep) in pairwise(fixed):
        if keep > most:
            raise PresetError(
                f"keep {keep:g} at {at} comes after keep {most:g} at {earlier}: tokens that were "
                "cut can't come back",
                "a stage's keep is a fraction of the original tokens and can only fall",
            )
    kept: list[tuple[int, Place]] = []
    warnings: list[str] = []
    for number, place in enumerate(places):
        if place.layer >= num_layers and place.keep is None:
            place = replace(place, layer=num_layers - 1)  # the budget moves it where it fits
        if place.layer >= num_layers:
            warnings.append(
                f"no layer of this model can do without visual tokens (its {place.at} is "
                f"{place.layer}): the stage there does not cut"
            )
            continue
        if kept:
            _, before = kept[-1]
            if place.layer == before.layer and place.named and before.named:
                if place.drops_all or (place.keep is None) == (before.keep is None):
                    stays = place
                else:
                    stays = place if (place.keep is None) == over else before
                warnings.append(
                    f"{before.at} and {place.at} are both layer {place.layer} of this model: "
                    f"only the stage at {stays.at}, which keeps fewer tokens, cuts"
                )
                if stays is place:
                    kept[-1] = (number, place)
                continue
            if place.layer <= before.layer:
                raise PresetError(
                    f"stages must cut at increasing layers: {place.at} (layer {place.layer}) "
                    f"comes after {before.at} (layer {before.layer})",
                    "put the earlier layer first, or drop one of the two",
                )
        kept.append((number, place))
    return kept, warnings


def fixed_count(keep: float, num_tokens: int) -> int:
    """Tokens that a stage with its own keep leaves: at least one, unless keep is 0."""
    if keep == 0 or num_tokens == 0:
        return 0
    return max(1, math.floor(keep * num_tokens + SLACK))


def solve(
    places: Sequence[Place],
    keep: float | None,
    num_layers: int,
    num_tokens: int,
    present: int | None = None,
) -> Schedule:
    """Counts for every stage of one sample.

    Args:
        places: the stages in order; at most one without a keep.
        keep: the layer average to meet through that stage; None where every stage has a keep.
        num_layers: decoder layers L.
        num_tokens: visual tokens N before any cut; all fractions are of these.
        present: those that are there at the input, since others went before the vision tower; None
            for all. Where the budget is more than they can fill, all of them are kept.

    Raises:
        PresetError: the average can't be reached; the message says what can.
    """
    if not num_tokens or (keep is not None and keep >= 1):
        return Schedule(num_layers, num_tokens, ())
    present = num_tokens if present is None else present
    fixed = [
        Cut(number, place.layer, min(fixed_count(place.keep, num_tokens), present))
        for number, place in enumerate(places)
        if place.keep is not None
    ]
    spent = sum(tokens_by_layer(present, num_layers, fixed))
    over = keep is not None and spent > keep * num_layers * num_tokens + SLACK
    numbered, warnings = merge_places(places, num_layers, over)
    counts = [
        None if place.keep is None else min(fixed_count(place.keep, num_tokens), present)
        for _, place in numbered
    ]
    layers = [place.layer for _, place in numbered]
    if None in counts and keep is not None:
        free = counts.index(None)
        budget = keep * num_layers * num_tokens
        stages = [place for _, place in numbered]
        solver = _Solver(stages, layers, counts, num_layers, num_tokens, present)
        if numbered[free][1].profile:
            warnings += solver.follow_profile(budget, keep)
        elif numbered[free][1].drops_all:
            layers[free] = solver.layer_to_drop_all(free, budget, keep)
            counts[free] = 0
            if layers[free] == num_layers:
                warnings.append(solver.all_stay(keep))
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
    """Finds the free stage's count; changes `layers` and `counts`, which it shares."""

    places: list[Place]
    layers: list[int]
    counts: list[int | None]
    num_layers: int
    num_tokens: int
    present: int

    def total(self, counts: Sequence[int | None], layers: Sequence[int]) -> int:
        """Sum over the layers of tokens present; a None count adds nothing."""
        bounds = [*layers, self.num_layers]
        whole = layers[0] * self.present
        return whole + sum(
            (count or 0) * (bounds[i + 1] - bounds[i]) for i, count in enumerate(counts)
        )

    def free_count(self, free: int, layer: int, budget: float) -> int:
        """Tokens that the free stage leaves when it cuts at `layer`."""
        layers = [*self.layers[:free], layer, *self.layers[free + 1 :]]
        until = layers[free + 1] if free + 1 < len(layers) else self.num_layers
        counts = [None if i == free else count for i, count in enumerate(self.counts)]
        left = budget - self.total(counts, layers)
        return math.floor(left / (until - layer) + SLACK)

    def bounds(self, free: int) -> tuple[int, int]:
        """Fewest and most tokens that the free stage may leave."""
        after = self.counts[free + 1] if free + 1 < len(self.counts) else 1
        before = self.counts[free - 1] if free else self.present
        assert after is not None
        assert before is not None
        return max(after, 1), before

    def place_free(self, free: int, budget: float, keep: float) -> list[str]:
        """Sets the free stage's count; moves its cut or lifts later ones where it must."""
        lowest, highest = self.bounds(free)
        asked = self.layers[free]
        count = self.free_count(free, asked, budget)
        if lowest <= count <= highest:
            self.counts[free] = count
            return []
        if count > highest:
            return self.lift_later(free, budget, keep, highest)
        first = max(self.layers[free - 1] + 1 if free else 0, self.places[free].lowest)
        if self.places[free].named:
            for layer in range(asked - 1, first - 1, -1):
                count = self.free_count(free, layer, budget)
                if count >= lowest:
                    self.layers[free] = layer
                    self.counts[free] = min(count, highest)
                    return [
                        f"the cut at {self.places[free].at} moved from layer {asked} to {layer}: "
                        f"keep {keep:g} can't be reached from layer {asked} on"
                    ]
            self.layers[free] = first
        self.counts[free] = lowest
        reach = self.total(self.counts, self.layers) / (self.num_layers * self.num_tokens)
        raise PresetError(
            f"keep {keep:g} can't be reached with a cut at {self.places[free].at} "
            f"(layer {asked} of {self.num_layers}) and {self.num_tokens} visual tokens: "
            f"the lowest reachable keep is {math.ceil(reach * 1e4) / 1e4:g}",
            "raise keep, cut earlier (at: input), or give later stages a smaller keep",
        )

    def lift_later(self, free: int, budget: float, keep: float, highest: int) -> list[str]:
        """All of the budget can't be spent before the next stage: later named ones keep more."""
        self.counts[free] = highest
        fixed = list(self.counts)
        low, high = 0, self.num_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.total(self._lifted(fixed, free, middle), self.layers) <= budget + SLACK:
                low = middle
            else:
                high = middle - 1
        lifted = self._lifted(fixed, free, low)
        reached = self.total(lifted, self.layers)
        most = self.total(self._lifted(fixed, free, self.num_tokens), self.layers)
        short = most < math.floor(budget + SLACK) and reached == most
        if short and self.present == self.num_tokens:
            reach = most / (self.num_layers * self.num_tokens)
            raise PresetError(
                f"keep {keep:g} can't be reached: the stages around {self.places[free].at} "
                f"leave less; the highest reachable keep is {math.floor(reach * 1e4) / 1e4:g}",
                "lower keep, or give the other stages a larger keep",
            )
        self.counts[:] = lifted
        if short:
            return [self.all_stay(keep)]
        raised = [i for i, count in enumerate(lifted) if count != fixed[i]]
        if not raised:  # what is left is less than one token in each of the later layers
            return []
        names = ", ".join(self.places[i].at for i in raised)
        return [f"keep {keep:g} leaves more than the stages at {names} ask for: they keep more"]

    def _lifted(self, counts: Sequence[int | None], free: int, level: int) -> list[int | None]:
        lifted: list[int | None] = list(counts)
        for i in range(free + 1, len(lifted)):
            if self.places[i].named and not self.places[i].drops_all:
                lifted[i] = min(max(lifted[i] or 0, level), lifted[i - 1] or 0)
        return lifted

    def follow_profile(self, budget: float, keep: float) -> list[str]:
        """Sets the counts of a method's own schedule: the most that the budget allows."""
        low, high = 0.0, 1.0
        lowest = self._on_profile(low)
        if self.total(lowest, self.layers) > budget + SLACK:
            reach = self.total(lowest, self.layers) / (self.num_layers * self.num_tokens)
            raise PresetError(
                f"keep {keep:g} can't be reached by the method's own schedule, whose first cut is "
                f"at layer {self.layers[0]} of {self.num_layers}: the lowest reachable keep is "
                f"{math.ceil(reach * 1e4) / 1e4:g}",
                "raise keep, or name a place to cut at once: --at 1",
            )
        for _ in range(40):  # halves the interval; then t is exact to 1e-12
            middle = (low + high) / 2
            if self.total(self._on_profile(middle), self.layers) <= budget + SLACK:
                low = middle
            else:
                high = middle
        self.counts[:] = self._on_profile(low)
        short = self.total(self._on_profile(1.0), self.layers) < math.floor(budget + SLACK)
        return [self.all_stay(keep)] if short else []

    def _on_profile(self, t: float) -> list[int | None]:
        """All counts, those of the profile's cuts at t, never above an earlier or below a later."""
        counts = list(self.counts)
        most = self.present
        for i, place in enumerate(self.places):
            if place.profile:
                least = max((c for c in self.counts[i + 1 :] if c is not None), default=1)
                share = place.profile.fractions(t)[place.part]
                counts[i] = min(max(math.floor(share * self.num_tokens + SLACK), least, 1), most)
            most = min(most, counts[i] or 0)
        return counts

    def layer_to_drop_all(self, free: int, budget: float, keep: float) -> int:
        """The layer from which on a free stage may drop everything within the budget."""
        before = self.counts[free - 1] if free else self.present
        start = self.layers[free - 1] if free else 0
        spent = self.total([*self.counts[:free], 0], [*self.layers[:free], start])
        assert before is not None
        layer = start + math.floor((budget - spent) / max(before, 1) + SLACK)
        if layer <= start and free:
            raise PresetError(
                f"keep {keep:g} is spent before the stage that drops all tokens",
                "raise keep, or lower the keep of the stages before it",
            )
        last = self.num_layers - (self.present == self.num_tokens)
        return min(max(layer, 0), last)

    def all_stay(self, keep: float) -> str:
        """What is said where the tokens that were not dropped before the tower don't fill keep."""
        return (
            f"keep {keep:g} asks for more than the {self.present} of {self.num_tokens} tokens that "
            "the stage at pixels has left: later stages cut less, or nothing"
        )


def weighted_quotas(
    count: int, sizes: Sequence[int], weights: Sequence[float], least: int = 1
) -> list[int]:
    """Shares `count` over groups of `sizes` tokens in proportion to `weights`.

    What a group can't use goes to the others by the same weights; largest remainder, ties to the
    earlier. The shares add up to `count`.

    Args:
        weights: not negative, finite; all zero: equal shares.
        least: every group gets so many (0 or 1) where `count` allows; else evenly spaced groups.
    """
    assert 0 <= count <= sum(sizes)
    if least and count < len(sizes):
        return quotas(count, sizes)
    shares = [min(least, size) for size in sizes]
    if sum(weights) <= 0:
        weights = [1.0] * len(sizes)
    open_groups = [i for i, size in enumerate(sizes) if shares[i] < size]
    while (left := count - sum(shares)) > 0:
        # The shares that would be exact, over groups that have room; full groups leave the round.
        total = sum(weights[i] for i in open_groups)
        each = {
            i: left * (weights[i] / total if total > 0 else 1 / len(open_groups))
            for i in open_groups
        }
        full = [i for i in open_groups if each[i] >= sizes[i] - shares[i]]
        if full:
            for i in full:
                shares[i] = sizes[i]
            open_groups = [i for i in open_groups if i not in full]
            continue
        for i in open_groups:
            shares[i] += math.floor(each[i])
        rest = count - sum(shares)
        by_remainder = sorted(open_groups, key=lambda i: (-(each[i] - math.floor(each[i])), i))
        for i in by_remainder[:rest]:
            shares[i] += 1
    return shares


def quotas(count: int, sizes: Sequence[int]) -> list[int]:
    """Shares `count` over groups of `sizes` tokens: equal, remainders to the earlier groups.

    What a group can't use is handed on; every group gets at least one where `count` allows, else
    evenly spaced groups get one each. The shares add up to `count`.
    """
    assert 0 <= count <= sum(sizes)
    if 0 < count < len(sizes):
        chosen = {(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)}
        return [int(i in chosen) for i in range(len(sizes))]
    shares = [0] * len(sizes)
    while count:
        open_groups = [i for i, size in enumerate(sizes) if shares[i] < size]
        each = count // len(open_groups)
        if not each:  # all that are open have the same so far
            open_groups, each = open_groups[:count], 1
        for i in open_groups:
            given = min(each, sizes[i] - shares[i])
            shares[i] += given
            count -= given
    return shares
