"""The calls of the vision encoders: noted, done with less, and once for the same pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vtprune.device import now
from vtprune.engine.attention import Call, Tap, received
from vtprune.engine.hooks import Hooks, this_thread
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.packing import valid_columns
from vtprune.engine.plan import Plan
from vtprune.engine.thin_tower import Thinned
from vtprune.engine.thinning import Thinning, choose_units
from vtprune.engine.thread_state import ThreadState
from vtprune.engine.tower import Reading, find_tower
from vtprune.models.base import PIXELS
from vtprune.models.batch_layout import lay_out_batch
from vtprune.models.seams import ENCODERS, Arguments
from vtprune.pruners.base import TOWER

SMALL = 64  # elements of a tensor that is compared by value: sizes, grids
ASIDE = ("return_dict", "use_cache")  # of an encoder call: its features are the same
Kwargs = dict[str, object]
Encode = Callable[..., object]


class Encoding:
    """What the encoders of one block are called with, and what of it their towers get.

    Args:
        plan: the preset for this model.
        state: of the thread that calls an encoder.
        modality: what placeholders hold that images and videos share.
        inputs: what is known of the prompts.
    """

    def __init__(
        self,
        plan: Plan,
        state: ThreadState,
        modality: str | None,
        inputs: PreparedInputs,
    ) -> None:
        self.plan, self.structure, self.state = plan, plan.structure, state
        self.modality, self.media = modality, inputs.media
        self.pixels = inputs.pixels if plan.preset.frame_and_tile_stage() else None
        self.features = inputs.features
        self.thinning: Thinning | None = None

    def attach(self, hooks: Hooks) -> None:
        """Puts the noting calls in the place of the model's own."""
        for modality, name in ENCODERS.items():
            if hasattr(self.structure.inner, name):
                hooks.replace(self.structure.inner, name, self.recording(modality, name))

    def recording(self, modality: str, name: str) -> Callable[..., object]:
        """Return what goes around an encoder call: its arguments and time are noted on the way."""
        arguments = Arguments(getattr(self.structure.inner, name))
        state = self.state

        def encode_and_note(encode: Encode, *args: object, **kwargs: object) -> object:
            if state.encoding:  # called by the other: some models encode videos as pictures
                return encode(*args, **kwargs)
            given = arguments.bind(args, kwargs)
            state.calls[modality] = given
            rows = self.rows_for(modality)
            key = (
                name,
                None if rows is None else tuple(rows.tolist()),
                *_identities(given, self.structure.inner.config),
            )
            known = self.features.get(key) if self.features is not None else None
            if known and (not self.plan.reads_tower or TOWER[0] in known[0]):
                state.calls[modality] = known[0]
                return known[1]
            started, state.encoding = now(self.structure.device), True
            try:
                with self.tapped_tower(modality, given, rows):
                    features = self.encode(functools.partial(encode, *args, **kwargs), rows)
            finally:
                state.encoding = False
            state.seconds += now(self.structure.device) - started
            if self.features is not None:
                self.features[key] = (given, features)  # the pixels stay, and so their address
            return features

        return encode_and_note

    def encode(self, encode: Callable[[], object], rows: torch.Tensor | None) -> object:
        """What an encoder makes of the frames and tiles that stay; zeros for the others.

        Args:
            rows: (U,) bool: those that stay, of all that its vision tower would get; None: all.
        """
        if rows is None or bool(rows.all()):
            return encode()
        thinned = Thinned(rows)
        with Hooks(this_thread()) as hooks:
            for module, before, after in thinned.hooks(self.structure.inner):
                hooks.before(module, before)
                hooks.after(module, after)
            features = encode()
        thinned.check_ran()
        return features

    def thin(self) -> Thinning | None:
        """What stays at `pixels` of the one batch that is to be prefilled; None: no such stage."""
        if self.pixels is None or self.thinning is not None:
            return self.thinning
        started = now(self.structure.device)
        tensors = self.pixels.tensors
        ids = tensors["input_ids"]
        valid = valid_columns(tensors.get("attention_mask"), *ids.shape)
        names = {modality for name, modality in PIXELS.items() if name in tensors}
        layouts, _ = lay_out_batch(
            self.structure, ids.cpu(), valid, dict.fromkeys(names, tensors), self.modality,
            self.media,
        )  # fmt: skip
        self.thinning = choose_units(self.plan, layouts, self.pixels.units)
        self.state.seconds += now(self.structure.device) - started
        return self.thinning

    def rows_for(self, modality: str) -> torch.Tensor | None:
        """Which rows an encoder's vision tower is to get; None: all."""
        thinning = self.thin()
        if thinning is None:
            return None
        own = hasattr(self.structure.inner, ENCODERS["video"])
        return thinning.rows(modality if own else None)

    @contextmanager
    def tapped_tower(
        self, modality: str, given: Kwargs, rows: torch.Tensor | None
    ) -> Iterator[None]:
        """Notes beside an encoder call's arguments what its tower attends to, if a method asks.

        Args:
            rows: (U,) bool: those that the tower gets; None: all.
        """
        if not self.plan.reads_tower:
            yield
            return
        tower = find_tower(self.structure, modality, given)
        reading = Reading(tower.has_cls, [])

        def take(call: Call) -> None:
            with torch.no_grad():
                reading.rows.extend(received(call, tower.has_cls))

        with Hooks(this_thread()) as hooks:
            tap = Tap(tower.attention, take)
            hooks.replace(tap.registry, "get_interface", tap.get_interface)
            yield
        given[TOWER[0]] = reading.among(rows)


def _identities(given: Kwargs, config: object) -> list[object]:
    """What tells one encoder call from another, by what its features depend on.

    The same pixels come in more than one way: where transformers' generation leaves an argument
    out, a forward gives what the config says, and the pixels may be named otherwise.
    """
    return [
        _identity(value) if isinstance(value, torch.Tensor) else (name, repr(value))
        for name, value in given.items()
        if name not in ASIDE
        and value is not None
        and (isinstance(value, torch.Tensor) or value != getattr(config, name, None))
    ]


def _identity(value: torch.Tensor) -> object:
    """What tells one tensor from another: sizes by their values, pixels by their memory."""
    if value.numel() <= SMALL:
        return (tuple(value.shape), tuple(value.flatten().tolist()))
    return (tuple(value.shape), value.data_ptr(), value._version)
