"""Prunes inside an unpatched transformers model: the only hooks in the project."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtprune.attention import Call, Tap, received
from vtprune.caches import (
    CacheState,
    Continued,
    cache_length,
    continue_from,
    unmark_cache,
)
from vtprune.catalog import Calibration
from vtprune.clock import now
from vtprune.errors import ModelError
from vtprune.layout import MODALITIES, Grid
from vtprune.models.batch_layout import lay_out_batch
from vtprune.models.structure import DEEPSTACK, find_structure
from vtprune.packing import gather, gather_marked, valid_columns
from vtprune.plan import Plan
from vtprune.prefill import Prefill, start_prefill
from vtprune.preset import Keep, Preset, load_preset, override
from vtprune.pruners.base import TOWER
from vtprune.thin_tower import Thinned
from vtprune.thinning import Thinning, choose_units, refuse_pixels
from vtprune.tower import Reading, find_tower, read_scores
from vtprune.trace import Trace
from vtprune.units import Shown

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
MARK = "_vtprune_session"
SMALL = 64  # elements of a tensor that is compared by value: sizes, grids
Kwargs = dict[str, object]
Encoded = dict[object, tuple[Kwargs, object]]


@contextmanager
def pruning(
    model: PreTrainedModel,
    preset: str | Path | Mapping[str, object] | Preset | None = None,
    keep: Keep | None = None,
    seed: int | None = None,
    *,
    method: str | None = None,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    modality: str | None = None,
    calibration: Calibration | None = None,
    encoded: Encoded | None = None,
    media: Sequence[tuple[str, Grid]] = (),
    shown: Shown | None = None,
) -> Iterator[Trace]:
    """Drops visual tokens in every forward of `model` inside the block, and only there.

    Args:
        model: any supported transformers model, loaded by the caller, left as it was found.
        preset: packaged name, path, mapping in the preset schema, or a Preset; None: "balanced".
        keep: layer average of the kept fraction, for all modalities or by modality.
        seed: of all random choices; None: the preset's.
        method: replaces the preset's stages by one free stage of this method, cutting at `at`.
        at: the place of that stage; None: the method's own.
        options: of that stage, or of every stage whose method has such an option.
        modality: what placeholders hold that images and videos share; None: images, unless the
            model's inputs tell.
        calibration: where `ecl` and `horizon` are; None: the packaged one of this model.
        encoded: what the vision tower made of pixel tensors, kept by the caller from block to
            block, so that the same tensors are encoded once.
        media: modality and grid of each media item of the prompts, in order, as `encode` gave them,
            for placeholders that images and videos share.
        shown: the inputs and media of the one batch that is to be prefilled, which stages at
            `pixels` need; None: there are none.

    Yields:
        The trace, filled by each prefill.

    Raises:
        ModelError: a model or a case that can't be pruned, with the reason.
        PresetError: a preset that is not valid or a keep that can't be reached.
    """
    resolved = override(load_preset(preset), keep, method, at, options, seed)
    if modality not in (None, *MODALITIES):
        raise ModelError(f"modality {modality!r} is not one of {', '.join(MODALITIES)}")
    session = _Session(model, resolved, modality, calibration, encoded, media, shown)
    try:
        session.attach()
        yield session.trace
    finally:
        session.detach()


class _Session:
    """The hooks of one block, and what they share."""

    def __init__(
        self,
        model: PreTrainedModel,
        preset: Preset,
        modality: str | None,
        calibration: Calibration | None,
        encoded: Encoded | None,
        media: Sequence[tuple[str, Grid]],
        shown: Shown | None,
    ) -> None:
        refuse_pixels(preset, shown)
        self.model = model
        self.modality = modality
        self.media = media
        self.shown = shown if preset.at_pixels() else None
        self.whole = list(shown.whole) if shown else []
        self.thinning: Thinning | None = None
        self.trace = Trace()
        self.structure = find_structure(model)
        self.plan = Plan(preset, self.structure, calibration, self.trace)
        self.inner, self.decoder = self.structure.inner, self.structure.decoder
        self.inner_signature = inspect.signature(self.inner.forward)
        self.decoder_signature = inspect.signature(self.decoder.forward)
        self.vision: dict[str, dict[str, object]] = {}
        self.modalities: tuple[str, ...] = ()
        self.vision_seconds = 0.0
        self.select_seconds = 0.0
        self.encoded = encoded
        self.encoding = False
        self.pending: Prefill | None = None
        self.running: Prefill | None = None
        self.started = 0.0
        self.handles: list[RemovableHandle] = []
        self.layer_handles: list[RemovableHandle] = []
        self.wrapped: list[tuple[nn.Module, str]] = []

    # -- on and off ------------------------------------------------------------------------------

    def attach(self) -> None:
        """Puts the hooks on."""
        if MARK in self.inner.__dict__:
            raise ModelError(
                "this model is being pruned already by an enclosing block",
                "leave that block first; one preset can hold several stages",
            )
        self.inner.__dict__[MARK] = self
        for name in ("get_image_features", "get_video_features"):
            if hasattr(self.inner, name):
                self.wrap(self.inner, name, self.recording(name))
        if hasattr(self.decoder, DEEPSTACK):
            self.wrap(self.decoder, DEEPSTACK, self.adding())
        self.handles = [
            self.model.register_forward_pre_hook(self.refuse_columns, with_kwargs=True),
            self.inner.register_forward_pre_hook(self.see_inputs, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self.start_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(
                self.end_decoder, with_kwargs=True, always_call=True
            ),
        ]

    def detach(self) -> None:
        """Takes everything off; the model is as it was found."""
        self.unhook_layers()
        for handle in self.handles:
            handle.remove()
        if self.inner.__dict__.get(MARK) is self:
            del self.inner.__dict__[MARK]
            for module, name in self.wrapped:
                del module.__dict__[name]
        self.encoded, self.vision, self.pending, self.running = None, {}, None, None

    def wrap(self, module: nn.Module, name: str, function: Callable[..., object]) -> None:
        module.__dict__[name] = function
        self.wrapped.append((module, name))

    def unhook_layers(self) -> None:
        for handle in self.layer_handles:
            handle.remove()
        self.layer_handles = []

    def recording(self, name: str) -> Callable[..., object]:
        """The model's own encoder call, whose arguments and time are noted on the way."""
        encode = getattr(self.inner, name)
        signature = inspect.signature(encode)
        modality = "image" if "image" in name else "video"

        @functools.wraps(encode)
        def encode_and_note(*args: object, **kwargs: object) -> object:
            if self.encoding:  # called by the other: some models encode videos as pictures
                return encode(*args, **kwargs)
            given = dict(signature.bind_partial(*args, **kwargs).arguments)
            self.vision[modality] = given
            rows = self.rows_for(modality)
            key = (name, None if rows is None else tuple(rows.tolist()),
                   *(_identity(value) for value in given.values()))  # fmt: skip
            known = self.encoded.get(key) if self.encoded is not None else None
            if known and (not self.plan.reads_tower or TOWER[0] in known[0]):
                self.vision[modality] = known[0]
                return known[1]
            started, self.encoding = self.now(), True
            try:
                with self.tapped_tower(modality, given, rows):
                    features = self.encode(functools.partial(encode, *args, **kwargs), rows)
            finally:
                self.encoding = False
            self.vision_seconds += self.now() - started
            if self.encoded is not None:
                self.encoded[key] = (given, features)  # the pixels stay, and so their address
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
        handles: list[RemovableHandle] = []
        try:
            for module, before, after in thinned.hooks(self.inner):
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
            features = encode()
        finally:
            for handle in handles:
                handle.remove()
        thinned.check_ran()
        return features

    def thin(self) -> Thinning | None:
        """What stays at `pixels` of the one batch that is to be prefilled; None: no such stage."""
        if self.shown is None or self.thinning is not None:
            return self.thinning
        started = self.now()
        tensors = self.shown.tensors
        ids = tensors["input_ids"]
        valid = valid_columns(tensors.get("attention_mask"), *ids.shape)
        names = {"video" if "video" in name else "image" for name in PIXELS if name in tensors}
        layouts, _ = lay_out_batch(
            self.structure, ids.cpu(), valid, dict.fromkeys(names, tensors), self.modality,
            self.media,
        )  # fmt: skip
        self.thinning = choose_units(self.plan, layouts, self.shown.units)
        self.vision_seconds += self.now() - started
        return self.thinning

    def rows_for(self, modality: str) -> torch.Tensor | None:
        """Which rows an encoder's vision tower is to get; None: all."""
        thinning = self.thin()
        if thinning is None:
            return None
        own = hasattr(self.inner, "get_video_features")
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

        handles = self.put_on(Tap(tower.attention, tower.kernel, take))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        given[TOWER[0]] = reading.among(rows)

    def put_on(self, tap: Tap) -> list[RemovableHandle]:
        """Reads the attention of a tap's module in every forward, until the hooks are removed."""
        return [
            tap.module.register_forward_pre_hook(tap.enter),
            tap.module.register_forward_hook(tap.leave, always_call=True),
        ]

    def adding(self) -> Callable[..., torch.Tensor]:
        """The decoder's own adding of features to states (deepstack), for the tokens still there.

        It runs after a layer with the marks and features of the uncut sequence.
        """
        add = getattr(self.decoder, DEEPSTACK)

        @functools.wraps(add)
        def add_to_those_left(
            hidden_states: torch.Tensor, visual_pos_masks: torch.Tensor, visual_embeds: torch.Tensor
        ) -> torch.Tensor:
            if self.running is not None and self.running.done:
                visual_pos_masks, visual_embeds = gather_marked(
                    visual_pos_masks, visual_embeds, self.running.packed
                )
            return add(hidden_states, visual_pos_masks, visual_embeds)

        return add_to_those_left

    def now(self) -> float:
        return now(self.structure.device)

    # -- before the decoder ----------------------------------------------------------------------

    def refuse_columns(self, module: nn.Module, args: tuple[object, ...], kwargs: Kwargs) -> None:
        if kwargs.get("labels") is not None:
            raise ModelError(
                "labels were given, but a pruned prompt has fewer positions than labels",
                "compute the loss from the logits of the answer, without labels",
            )
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            raise ModelError(
                "logits_to_keep names columns, which are not the same after a cut",
                "give a number: the last positions are always there",
            )

    def see_inputs(self, module: nn.Module, args: tuple[object, ...], kwargs: Kwargs) -> None:
        """Notes where visual tokens sit in this forward, if it is a prompt that has any."""
        self.pending = None
        if torch.compiler.is_compiling():
            raise ModelError(
                "this model's forward is being compiled, and hooks do not run in a compiled graph",
                "pass disable_compile=True to generate",
            )
        ids = kwargs.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.shape[1] < 2:
            return  # decoding: nothing to see, and no time to lose
        given = dict(self.inner_signature.bind_partial(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", None) or {})  # type: ignore[call-overload]
        pixels = [name for name in PIXELS if given.get(name) is not None]
        encoded = given.get("mm_encoder_outputs") or {}
        assert isinstance(encoded, Mapping)
        shown = {name for name, features in encoded.items() if features is not None}
        shown |= {"video" if "video" in name else "image" for name in pixels}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if not isinstance(ids, torch.Tensor):
            if shown or (isinstance(embeds, torch.Tensor) and embeds.shape[1] > 1):
                raise ModelError(
                    "the prompt was given as inputs_embeds, which don't say what is visual",
                    "pass input_ids and pixel values",
                )
            return
        if ids.shape[1] < 2:
            return  # decoding
        if not shown:
            self.refuse_lone_placeholders(ids, given)
            return
        for name in pixels:  # encoded inside this forward, so not recorded yet
            self.vision["video" if "video" in name else "image"] = given
        vision = {name: noted for name, noted in self.vision.items() if name in shown}
        self.modalities = tuple(vision)
        self.pending = self.see_prompt(ids, given, vision)

    def refuse_lone_placeholders(self, ids: torch.Tensor, given: Kwargs) -> None:
        """Visual tokens without pictures: a piece of a prompt that was cut up.

        Further tokens on a cache that was pruned may hold a copied placeholder; that is text.
        """
        if isinstance(getattr(given.get("past_key_values"), "_vtprune", None), CacheState):
            return
        wanted = torch.tensor(sorted(self.structure.placeholder_ids()), device=ids.device)
        if bool(torch.isin(ids, wanted).any()):
            raise ModelError(
                "visual tokens without their pictures are in this forward",
                "prefill in one piece: leave prefill_chunk_size unset",
            )

    def see_prompt(
        self, ids: torch.Tensor, given: Kwargs, vision: Mapping[str, Mapping[str, object]]
    ) -> Prefill:
        """Lays out the visual tokens of a prompt and plans its cuts."""
        past = cache_length(given.get("past_key_values"))
        batch, length = ids.shape
        valid = valid_columns(given.get("attention_mask"), batch, length, past)
        layouts, warnings = lay_out_batch(
            self.structure, ids.cpu(), valid, vision, self.modality, self.media
        )
        for warning in warnings:
            self.trace.warn(warning)
        state = getattr(given.get("past_key_values"), "_vtprune", None)
        if past and isinstance(state, CacheState) and state.renumbered:
            raise ModelError(
                "new pictures on top of a cached conversation whose positions were renumbered",
                "ask about them in a new conversation, or leave positions: keep",
            )
        if past and self.structure.two_way:
            raise ModelError(
                f"{self.structure.model_type}: new pictures on top of a cached conversation",
                "ask about them in a new conversation",
            )
        columns = [row.nonzero().squeeze(1) for row in valid]
        thinning = self.thin()
        gone = None
        if thinning is not None:
            gone = thinning.gone_of(layouts)
            self.trace.encoded = thinning.encoded()
        return start_prefill(self.plan, layouts, columns, length, past, gone, self.whole)

    # -- the decoder -----------------------------------------------------------------------------

    def start_decoder(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Kwargs
    ) -> tuple[tuple[object, ...], Kwargs] | None:
        """Cuts at the input, and puts on the layer hooks that this forward needs."""
        self.running, self.pending = self.pending, None
        given: Kwargs = {**self.decoder_signature.bind_partial(*args).arguments, **kwargs}
        embeds = given.get("inputs_embeds")
        if not isinstance(embeds, torch.Tensor):
            return None
        cache = given.get("past_key_values")
        if not cache_length(cache):
            unmark_cache(cache)  # it was emptied since
        if self.running is not None:
            self.started, self.select_seconds = self.now(), 0.0
            return (), self.start_prefill(self.running, embeds, given)
        state = getattr(cache, "_vtprune", None)
        if isinstance(state, CacheState) and cache_length(cache):
            return (), self.start_continuation(state, embeds, given)
        return None

    def start_prefill(self, prefill: Prefill, embeds: torch.Tensor, given: Kwargs) -> Kwargs:
        prefill.begin(given)
        if prefill.shortens:
            self.refuse_windows(prefill.past + embeds.shape[1])
        if prefill.reads_tower:
            vision = {name: self.vision[name] for name in self.modalities}
            prefill.tower = read_scores(self.structure, vision, self.trace.layouts)
        if 0 in prefill.layers:
            for name in prefill.projections(0):
                prefill.states[name] = self.first_states(embeds, name)
            embeds = self.timed_cut(prefill, 0, embeds)
            given = prefill.shorten_inputs(given, embeds)
        else:
            given = prefill.fit_mask(given, embeds)
        later = [layer for layer in prefill.layers if layer > 0]
        for layer in later:
            for name in prefill.projections(layer):
                module = self.structure.projection(layer - 1, name)
                keep = functools.partial(self.keep_states, prefill, name)
                self.layer_handles.append(module.register_forward_hook(keep))
            if prefill.reads_attention(layer):
                self.tap(prefill, layer)
        first = prefill.first_changed
        if first is not None:
            self.hook_layers(first, functools.partial(self.enter_layer, prefill))
        return given

    def tap(self, prefill: Prefill, layer: int) -> None:
        """Reads the attention of the layer before a cut."""

        def take(call: Call) -> None:
            started = self.now()
            with torch.no_grad():
                prefill.take_attention(layer, call)
            self.select_seconds += self.now() - started

        module = self.structure.attention_module(layer - 1)
        self.layer_handles += self.put_on(Tap(module, self.structure.attention, take))

    def hook_layers(
        self, first: int, enter: Callable[..., tuple[tuple[object, ...], Kwargs]]
    ) -> None:
        """Calls `enter(number, module, args, kwargs)` before every layer from `first` on."""
        for number in range(first, len(self.structure.layers)):
            hook = functools.partial(enter, number)
            handle = self.structure.layers[number].register_forward_pre_hook(hook, with_kwargs=True)
            self.layer_handles.append(handle)

    def refuse_windows(self, length: int) -> None:
        """A window counts original columns in the model, but kept ones in a shorter cache."""
        window = self.structure.narrowest_window
        if window is not None and length > window:
            raise ModelError(
                f"the prompt has {length} tokens, and layers of this model see the last {window} "
                "only (sliding window): dropping tokens would widen what they see",
                "ask with fewer frames or tiles, or with --keep 1",
            )

    def first_states(self, embeds: torch.Tensor, name: str) -> torch.Tensor:
        """(B, S, H x D) states that layer 0 would compute from the uncut embeddings."""
        with torch.no_grad():
            normed = self.structure.norm(0)(embeds)
            states = self.structure.projection(0, name)(normed)
        assert isinstance(states, torch.Tensor)
        return states

    def keep_states(
        self, prefill: Prefill, name: str, module: nn.Module, args: object, output: torch.Tensor
    ) -> None:
        prefill.states[name] = output.detach()

    def timed_cut(self, prefill: Prefill, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Cuts; gives the states back, those of kept tokens with what was merged into them."""
        started = self.now()
        with torch.no_grad():
            hidden = prefill.cut(layer, hidden)
        self.select_seconds += self.now() - started
        return hidden

    def enter_layer(
        self,
        prefill: Prefill,
        number: int,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: Kwargs,
    ) -> tuple[tuple[object, ...], Kwargs]:
        """Cuts before a layer where it is time, and gives it what fits the shorter sequence."""
        hidden = _hidden(args, kwargs)
        if number in prefill.layers:
            hidden = self.timed_cut(prefill, number, hidden)
            hidden = gather(hidden, prefill.last_cut.index)
        changed = prefill.shorten_layer(kwargs, number, hidden)
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def start_continuation(self, state: CacheState, embeds: torch.Tensor, given: Kwargs) -> Kwargs:
        """Decoding, or more text, on a cache that was cut."""
        window = self.structure.narrowest_window
        if window is not None and cache_length(given["past_key_values"]) >= window:
            self.trace.warn(
                f"the answer has gone past the model's sliding window of {window} tokens: from "
                "there on its layers see further back than without pruning"
            )
        continued = continue_from(state, self.structure, given, embeds)
        given = continued.place(given, embeds.shape[1])
        first = continued.first_layer()
        if first is not None:
            self.hook_layers(first, functools.partial(self.continue_layer, continued))
        if continued.replace_input:
            given["attention_mask"] = continued.input_mask()
        return given

    def continue_layer(
        self,
        continued: Continued,
        number: int,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: Kwargs,
    ) -> tuple[tuple[object, ...], Kwargs]:
        return args, continued.change(number, kwargs, _hidden(args, kwargs))

    def end_decoder(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Kwargs, output: object
    ) -> None:
        """Takes the layer hooks off; after a prefill, writes the trace and marks the cache."""
        self.unhook_layers()
        prefill, self.running = self.running, None
        if prefill is None or output is None:  # None: the forward raised
            return
        seconds = {
            "vision": self.vision_seconds,
            "select": self.select_seconds,
            "prefill": self.now() - self.started,
        }
        self.vision_seconds = 0.0
        prefill.end(getattr(output, "past_key_values", None))
        self.trace.seconds = seconds


def _hidden(args: tuple[object, ...], kwargs: Kwargs) -> torch.Tensor:
    """The states that enter a layer, however it was called."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, torch.Tensor)
    return hidden


def _identity(value: object) -> object:
    """What tells one argument of an encoder call from another: for pixels their memory."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() <= SMALL:
        return (tuple(value.shape), tuple(value.flatten().tolist()))
    return (tuple(value.shape), value.data_ptr(), value._version)
