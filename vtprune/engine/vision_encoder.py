"""The calls of the vision encoders: noted, made with fewer pixels, and once for the same pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch

from vtprune.device import Duration, mark, send
from vtprune.engine.attention_mask import read_prompts
from vtprune.engine.encoded_rows import join, split_call
from vtprune.engine.features_on_disk import features_key, load_features, store_features
from vtprune.engine.hooks import Hooks, ThreadState, this_thread
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.pixel_selection import PixelSelection, ReducedTower, select_pixels
from vtprune.engine.plan import PruningPlan
from vtprune.engine.readings import KernelCall, KernelTap, received
from vtprune.engine.refusals import refuse_missing_inputs, refuse_unknown_tower
from vtprune.engine.tower_attention import TowerReading, covers, find_tower
from vtprune.models.base import PIXELS
from vtprune.models.batch_layout import lay_out_batch
from vtprune.models.seams import ENCODERS, Arguments
from vtprune.pruners.base import TOWER

OF_PROMPTS = ("input_ids", "attention_mask", "position_ids")  # no sizes, however few they are
SMALL = 64  # elements of a tensor that is compared by value: sizes, grids
NOT_COMPARED = ("return_dict", "use_cache")  # of an encoder call: its features are the same
Kwargs = dict[str, object]


class EncoderHooks:
    """What the encoders of one block are called with, and what of it their towers get.

    Args:
        plan: the preset for this model.
        state: of the thread that calls an encoder.
        modality: what placeholders hold that images and videos share.
        inputs: what is known of the prompts.
    """

    def __init__(
        self,
        plan: PruningPlan,
        state: ThreadState,
        modality: str | None,
        inputs: PreparedInputs,
    ) -> None:
        self.plan, self.structure, self.state = plan, plan.structure, state
        self.modality, self.inputs = modality, inputs
        self.selection: PixelSelection | None = None
        self.config: object = plan.structure.inner.config

    @classmethod
    def outside_block(cls, plan: PruningPlan) -> EncoderHooks:
        """Return hooks for reading the tower where no block is open."""
        return cls(plan, ThreadState(), None, PreparedInputs())

    def attach(self, hooks: Hooks) -> None:
        """Put `call_encoder` in the place of the model's encoders."""
        inner = self.structure.inner
        for modality, name in ENCODERS.items():
            if hasattr(inner, name):
                arguments = Arguments(getattr(inner, name))
                hooks.replace(
                    inner, name, functools.partial(self.call_encoder, modality, arguments)
                )

    def call_encoder(
        self,
        modality: str,
        arguments: Arguments,
        encode: Callable[..., object],
        *args: object,
        **kwargs: object,
    ) -> object:
        """Return an encoder's features, new or known, and note its arguments and time."""
        state, features = self.state, self.inputs.features
        if state.encoding:  # called by the other: some models encode videos as pictures
            return encode(*args, **kwargs)
        given = with_sizes(arguments.bind(args, kwargs))
        state.calls[modality] = given
        streamed = self.inputs.streamed
        if streamed is not None and streamed.modality == modality:
            return streamed.encoded
        rows = self.rows_for(modality)
        if modality in self.inputs.encoded and rows is None and not self.plan.reads_tower:
            return self.inputs.encoded[modality]
        key = (
            ENCODERS[modality],
            None if rows is None else tuple(rows.tolist()),
            *_identities(given, self.config),
        )
        known = features.get(key) if features is not None else None
        if known and self.is_read(known[0].get(TOWER[0])):
            state.calls[modality] = dict(known[0])
            return known[1]
        started, state.encoding = mark(self.structure.device), True
        try:
            encoded = self.encode_by_row(modality, arguments, given, encode, args, kwargs)
            if encoded is None:
                with self.tapped_tower(modality, given, rows):
                    encoded = self.encode(functools.partial(encode, *args, **kwargs), rows)
        except (AttributeError, TypeError, ValueError) as error:
            refuse_missing_inputs(self.structure, modality, arguments, given, error)
            raise
        finally:
            state.encoding = False
        state.encoded += Duration.since(started, self.structure.device)
        if features is not None:
            features[key] = (given, encoded)  # the pixels stay, and so their address
        return encoded

    def encode_by_row(
        self,
        modality: str,
        arguments: Arguments,
        given: Kwargs,
        encode: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Kwargs,
    ) -> object:
        """Return the features of a batch, those of each prompt from the cache on disk or put there.

        Returns:
            None where there is no cache, or what an encoder takes or gives is of an unknown form.
        """
        cache, pixels = self.inputs.cache, self.inputs.pixels
        calls = split_call(args, kwargs, pixels) if cache and pixels else None
        if cache is None or not calls:
            return None
        parts: list[object] = []
        readings: list[TowerReading] = []
        found: set[tuple[int, str]] = set()
        for call in calls:
            of_row = arguments.bind(call.args, call.kwargs)
            rows = self.rows_for(modality, call.row)
            key = features_key(cache, modality, _features_follow(of_row, self.config), rows)
            if key is None:
                return None
            with cache.disk.entry(key):
                known = load_features(cache, key, self.structure.device)
                if known and self.is_read(known[1]):
                    features, reading = known
                    found.add((call.row, modality))
                else:
                    with self.tapped_tower(modality, of_row, rows):
                        run = functools.partial(encode, *call.args, **call.kwargs)
                        encoded = self.encode(run, rows)
                    reading = cast("TowerReading | None", of_row.get(TOWER[0]))
                    features = store_features(cache, key, encoded, reading)
            if features is None:
                return None
            parts.append(features)
            readings += [reading] if reading else []
        try:
            joined = join(parts)
        except ValueError:
            return None
        if readings:
            together = [row for reading in readings for row in reading.rows]
            given[TOWER[0]] = replace(readings[0], rows=together)
        self.state.found |= found
        return joined

    def encode(self, encode: Callable[[], object], rows: torch.Tensor | None) -> object:
        """Return what an encoder makes of the frames and tiles that stay; zeros for the others.

        Args:
            rows: (U,) bool: those that stay, of all that its vision tower would get; None: all.
        """
        if rows is None or bool(rows.all()):
            return encode()
        reduced = ReducedTower(rows)
        with Hooks(this_thread()) as hooks:
            reduced.attach(self.structure.inner, hooks)
            features = encode()
        reduced.check_ran()
        return features

    def select_pixels(self) -> PixelSelection | None:
        """Return what stays at `pixels` of the one batch to be prefilled; None: no such stage."""
        pixels = self.inputs.pixels if self.plan.preset.frame_and_tile_stage() else None
        if pixels is None or self.selection is not None:
            return self.selection
        refuse_unknown_tower(self.structure)
        started = mark(self.structure.device)
        tensors = pixels.tensors
        ids, valid = read_prompts(tensors["input_ids"], tensors.get("attention_mask"))
        vision = {modality: tensors for name, modality in PIXELS.items() if name in tensors}
        layouts, _ = lay_out_batch(
            self.structure, ids, valid, vision, self.modality, self.inputs.media
        )
        self.selection = select_pixels(self.plan, layouts, pixels.units)
        self.state.encoded += Duration.since(started, self.structure.device)
        return self.selection

    def rows_for(self, modality: str, sample: int | None = None) -> torch.Tensor | None:
        """Return which rows an encoder's vision tower is to get; None: all.

        Args:
            sample: of those of this one; None: of the whole batch's.
        """
        selection = self.select_pixels()
        if selection is None:
            return None
        encodes_videos = hasattr(self.structure.inner, ENCODERS["video"])
        return selection.rows_of(modality if encodes_videos else None, sample)

    @contextmanager
    def tapped_tower(
        self, modality: str, given: Kwargs, rows: torch.Tensor | None
    ) -> Iterator[None]:
        """Note beside an encoder call's arguments what its tower attends to, if a method asks.

        Args:
            rows: (U,) bool: those that the tower gets; None: all.
        """
        if not self.plan.reads_tower:
            yield
            return
        tower, names = find_tower(self.structure, modality, given), self.plan.tower_names
        rows_by_name: dict[str, list[torch.Tensor]] = {name: [] for name in names}

        def take(given_by: Sequence[str], call: KernelCall) -> None:
            with torch.no_grad():
                for name in given_by:
                    rows_by_name[name].extend(received(call, tower.is_by_first(name)))

        with Hooks(this_thread()) as hooks:
            for module, given_by in tower.modules(names).items():
                tap = KernelTap(module, functools.partial(take, given_by))
                hooks.replace_during(module, tap.registry, "get_interface", tap.get_interface)
            yield
        together = [torch.stack(parts) for parts in zip(*rows_by_name.values(), strict=True)]
        given[TOWER[0]] = TowerReading(tower.has_cls, together, names).among(rows)

    def is_read(self, reading: object) -> bool:
        """Return whether a reading of the tower has all that the methods need."""
        return not self.plan.reads_tower or covers(reading, self.plan.tower_names)


def with_sizes(given: Kwargs) -> Kwargs:
    """Return arguments with their sizes and grids on the CPU, which are read at once."""
    sizes = {
        name: value
        for name, value in given.items()
        if name not in OF_PROMPTS
        and isinstance(value, torch.Tensor)
        and value.numel() <= SMALL
        and value.device.type not in ("cpu", "meta")
        and not value.is_floating_point()
    }
    if not sizes:
        return given
    device = next(iter(sizes.values())).device
    read = torch.cat([send(value.flatten().long(), device) for value in sizes.values()]).cpu()
    parts = read.split([value.numel() for value in sizes.values()])
    rows = zip(sizes.items(), parts, strict=True)
    return given | {name: part.view(value.shape).to(value.dtype) for (name, value), part in rows}


def _features_follow(given: Kwargs, config: object) -> Kwargs:
    """Return the arguments of an encoder call that its features follow from.

    Where transformers' generation (5.20 to 5.24) leaves an argument out, a forward gives what the
    config says.
    """
    return {
        name: value
        for name, value in given.items()
        if name not in NOT_COMPARED
        and value is not None
        and (isinstance(value, torch.Tensor) or value != getattr(config, name, None))
    }


def _identities(given: Kwargs, config: object) -> list[object]:
    """Return what tells one encoder call from another; the pixels may be named in two ways."""
    return [
        _identity(value) if isinstance(value, torch.Tensor) else (name, repr(value))
        for name, value in _features_follow(given, config).items()
    ]


def _identity(value: torch.Tensor) -> object:
    """Return what tells one tensor from another: sizes by their values, pixels by their memory."""
    if value.numel() <= SMALL:
        return (tuple(value.shape), tuple(value.flatten().tolist()))
    return (tuple(value.shape), value.data_ptr(), value._version)
