"""How many visual tokens each decoder layer sees: places of cuts, cuts, and keeps in tokens.

For example, a cut at layer 2 of 4 that leaves 30 of 100 tokens: the layers see 100, 100, 30 and 30,
which is a layer average (keep) of 0.65.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from vtprune.errors import PresetError

NAMED = ("ecl", "horizon")
SLACK = 1e-6  # so that 0.3 x 10 is 3


@dataclass(frozen=True)
class CutProfile:
    """The schedule of a method that cuts several times by a rule of its own.

    Args:
        depths: where it cuts, as fractions of the decoder's layers, ascending.
        fractions: t in [0, 1] -> the fraction of the original tokens that each cut leaves; 1 at
            t = 1, none rises from cut to cut, and their layer average never falls with t.
    """

    depths: tuple[float, ...]
    fractions: Callable[[float], tuple[float, ...]]

    def layers(self, num_layers: int, lowest: int = 0) -> list[int]:
        """Return the layers of the cuts, ascending.

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


def falling_once(depths: tuple[float, float], part: float) -> CutProfile:
    """Return the schedule of two cuts, of which the second leaves `part` of the first's tokens.

    Where the first leaves all, the second leaves more, as the budget allows.
    """
    return CutProfile(depths, lambda t: (min(1.0, t / part), t))


@dataclass(frozen=True)
class Place:
    """One cut before its count is known.

    Args:
        at: as the preset says it.
        layer: the first layer that sees the shorter sequence; 0 is the language model's input.
        keep: fraction of the original tokens left, None for the free stage.
        drops_all: the method leaves nothing (`vtw`).
        lowest: the first layer that the method can cut at.
        layers: those that it can cut at; None: all from `lowest` on.
        profile: of the method's own schedule, and `part` the number of this cut in it.
    """

    at: str
    layer: int
    keep: float | None = None
    drops_all: bool = False
    lowest: int = 0
    layers: tuple[int, ...] | None = None
    profile: CutProfile | None = None
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
    """The cuts of one sample of `num_tokens` visual tokens, and warnings about them."""

    num_layers: int
    num_tokens: int
    cuts: tuple[Cut, ...]
    warnings: tuple[str, ...] = ()

    def after_pixels(self, num_input: int | None) -> Schedule:
        """Return the same cuts as stages 1, 2 ..., after a stage 0 that left `present` tokens.

        Args:
            num_input: None where the prompt holds no other tokens, so that stage 0 is no cut.
        """
        if not self.num_tokens:
            return self
        later = tuple(replace(cut, stage=cut.stage + 1) for cut in self.cuts)
        return replace(self, cuts=later if num_input is None else (Cut(0, 0, num_input), *later))

    def tokens_by_layer(self) -> list[int]:
        """Return the visual tokens that each layer sees."""
        counts = [self.num_tokens, *(cut.count for cut in self.cuts)]
        dropped = [before - after for before, after in pairwise(counts)]
        layers = [cut.layer for cut in self.cuts]
        return count_by_layer(self.num_tokens, self.num_layers, zip(layers, dropped, strict=True))

    def keep_mean(self) -> float:
        """Return the layer average of the tokens that the cuts leave."""
        return layer_average(self.tokens_by_layer(), self.num_tokens)


def count_by_layer(num_tokens: int, num_layers: int, drops: Iterable[tuple[int, int]]) -> list[int]:
    """Return the visual tokens that each decoder layer sees.

    Args:
        num_tokens: at the language model's input, before any cut.
        drops: layer, and how many tokens are gone from that layer on; in any order.
    """
    dropped = [0] * num_layers
    for layer, tokens in drops:
        if layer < num_layers:
            dropped[layer] += tokens
    return [num_tokens - total for total in accumulate(dropped)]


def layer_average(counts: Sequence[int], num_tokens: int) -> float:
    """Return the mean over the layers of the fraction of visual tokens that each sees.

    Args:
        counts: visual tokens that each layer sees.
        num_tokens: visual tokens before anything was dropped; 1.0 is returned where there are none.
    """
    return sum(counts) / (len(counts) * num_tokens) if num_tokens else 1.0


def resolve_layer(at: str, num_layers: int, ecl: int, horizon: int) -> int:
    """Return the layer that a place names, in a decoder of `num_layers`.

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
    """Return numbered places with each layer once, and warnings about those that were merged.

    Two named places that meet become one: the stage that keeps fewer tokens stays. A named place
    past the last layer is left out, unless it is the one that has to meet the budget.

    Args:
        over: the stages with a keep spend more than the budget, so that the free one keeps fewer.

    Raises:
        PresetError: layers that do not increase, or keeps that grow.
    """
    _check_keeps_fall(places)
    kept: list[tuple[int, Place]] = []
    warnings: list[str] = []
    for number, place in enumerate(places):
        if place.layer >= num_layers and place.keep is None:  # the budget moves it where it fits
            place = replace(place, layer=max(place.layers or (num_layers - 1,)))
        if place.layer >= num_layers:
            warnings.append(
                f"the {place.at} of this model is {place.layer}, past its last layer: the stage "
                "there does not cut"
            )
            continue
        if kept:
            _, before = kept[-1]
            if place.layer == before.layer and place.named and before.named:
                if place.drops_all or (place.keep is None) == (before.keep is None):
                    stronger = place
                else:
                    stronger = place if (place.keep is None) == over else before
                warnings.append(
                    f"{before.at} and {place.at} are both layer {place.layer} of this model: "
                    f"only the stage at {stronger.at}, which keeps fewer tokens, cuts"
                )
                if stronger is place:
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


def _check_keeps_fall(places: Sequence[Place]) -> None:
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


def fixed_count(keep: float, num_tokens: int) -> int:
    """Return the tokens that a stage with its own keep leaves: at least 1, unless keep is 0."""
    if keep == 0 or num_tokens == 0:
        return 0
    return max(1, math.floor(keep * num_tokens + SLACK))


def lowest_keep(tokens: int, total: int) -> str:
    """Return `tokens` of `total` as a keep, rounded up: the lowest one that an error can name."""
    return f"{math.ceil(tokens / total * 1e4) / 1e4:g}"
