"""Seconds of a vision tower with all its layers, from one with few."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtprune.device import now
from vtprune.evaluation.profiling.build import tower_kinds
from vtprune.evaluation.profiling.clock import Lap, LayerClock
from vtprune.models.structure import find_structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.engine.inputs import FeatureCache
    from vtprune.models.loading import Loaded


@contextmanager
def towers_timed(
    inner: nn.Module, paths: Sequence[str], device: torch.device
) -> Iterator[list[LayerClock]]:
    """Inside, the layers of the vision towers at `paths` are timed."""
    with ExitStack() as stack:
        clocks = []
        for path in paths:
            layers = inner.get_submodule(path)
            assert isinstance(layers, nn.ModuleList)
            clocks.append(stack.enter_context(LayerClock(device).on(list(layers))))
        yield clocks


def whole_tower(
    seconds: float, forwards: Sequence[Sequence[Lap]], own: Sequence[str], kinds: Sequence[str]
) -> float:
    """What the whole tower would have taken.

    Args:
        seconds: that the short one took.
        forwards: its layers' laps.
        own: what kind of layer each of its own is.
        kinds: what kind each of the whole tower's is.
    """
    for laps in forwards:
        of_kind = {
            kind: fmean(lap.seconds for lap in laps if own[lap.layer] == kind)
            for kind in set(kinds)
        }
        seconds += sum(of_kind[kind] for kind in kinds) - sum(lap.seconds for lap in laps)
    return seconds


def time_short_tower(
    loaded: Loaded, config: PreTrainedConfig, paths: Sequence[str], encoded: FeatureCache
) -> tuple[float, float]:
    """(seconds of the whole tower, seconds that were spent) on what it was given before.

    Args:
        loaded: the model with a short tower.
        config: of the whole model.
    """
    device = loaded.model.device
    with towers_timed(find_structure(loaded.model).inner, paths, device) as clocks:
        spent = time_encoders(loaded, encoded)
        forwards = [laps for clock in clocks for laps in clock.forwards()]
    own = tower_kinds(loaded.model.config)
    return whole_tower(spent, forwards, own, tower_kinds(config)), spent


def time_encoders(loaded: Loaded, encoded: FeatureCache) -> float:
    """Seconds of the vision tower on what it was given before."""
    inner = find_structure(loaded.model).inner
    started = now(loaded.model.device)
    with torch.no_grad():
        for key, (given, _) in encoded.items():
            assert isinstance(key, tuple)
            assert isinstance(given, Mapping)
            encode = getattr(inner, key[0])
            takes = set(inspect.signature(encode).parameters) - {"kwargs"}
            values = {name: value for name, value in given.items() if name in takes}
            more = given.get("kwargs")
            encode(**values, **(more if isinstance(more, dict) else {}))
    return now(loaded.model.device) - started
