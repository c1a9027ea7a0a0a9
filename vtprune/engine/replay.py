"""One prompt's pass through the decoder, repeated with visual tokens replaced, masked or left out.

The vision tower runs once: what the decoder was given is noted, and given again, changed, to many
rows at once. What is around the decoder (its output head, a cap on its scores) is the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vtprune.device import send
from vtprune.engine.hooks import Hooks, this_thread
from vtprune.engine.position_ids import given_position_ids
from vtprune.engine.segments import Segments
from vtprune.errors import ModelError
from vtprune.models import seams
from vtprune.models.structure import Structure

Args = tuple[object, ...]
Kwargs = dict[str, object]
PER_TOKEN = ("deepstack_visual_embeds",)
"""Arguments of decoders with a row for every visual token of the batch."""
VISUAL = "visual_pos_masks"
"""The argument that marks them."""
ROWS_BYTES = 2**27
"""What the states of the rows of one forward may take, by a rough count."""
MOST_ROWS = 32
LONG = 2048
"""Columns of a forward above which little is held: for a gradient, states are computed anew."""
CHUNK = 1024
"""Columns of such a forward that a feed-forward network gets at once."""


@dataclass
class DecoderCall:
    """What a decoder was given for one prompt.

    Args:
        given: its arguments by name; empty until it was called.
    """

    given: Kwargs = field(default_factory=dict)


class _NotedError(Exception):
    """The decoder's call was noted, and need not go on."""


@contextmanager
def note_decoder_call(structure: Structure) -> Iterator[DecoderCall]:
    """Note the arguments of the decoder's first call inside the block, by this thread.

    The block ends there: the decoder does not run.
    """
    call = DecoderCall()

    def note(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        call.given = structure.seams.decoder.bind(args, kwargs)
        raise _NotedError

    with Hooks(this_thread()) as hooks, suppress(_NotedError):
        hooks.before(structure.decoder, note)
        yield call


@dataclass(frozen=True, eq=False)
class MaskedKeys:
    """Keys that no other token sees in the layers from one on.

    Args:
        layer: the first of them.
        columns: (B or 1, S) bool, True where masked.
    """

    layer: int
    columns: torch.Tensor


class Replay:
    """A decoder's call over one prompt, to be repeated.

    Args:
        structure: of the model.
        call: of the prompt, a batch of 1 without padding and without a cache.
        columns: (N,) int64 of its visual tokens.
        answer: columns at its end whose predictions are wanted.
        always: keys that are masked in every repetition, such as what pruning drops.
    """

    def __init__(
        self,
        structure: Structure,
        call: DecoderCall,
        columns: torch.Tensor,
        answer: int,
        always: Sequence[MaskedKeys] = (),
    ) -> None:
        embeds = call.given.get("inputs_embeds")
        if not isinstance(embeds, torch.Tensor):
            raise seams.unknown("a decoder that is given no inputs_embeds")
        self.structure, self.answer = structure, answer
        self.given = call.given | {"position_ids": given_position_ids(call.given, 0, embeds)}
        self.columns, self.always = send(columns, embeds.device), tuple(always)
        self.embeds = embeds.detach()  # (1, S, d)
        self.visual = self.embeds[0, self.columns]  # (N, d)
        self.blank = self.visual.float().mean(0, keepdim=True).to(self.visual.dtype)  # (1, d)

    @property
    def length(self) -> int:
        """Columns of prompt and answer."""
        return int(self.embeds.shape[1])

    def rows_at_once(self, length: int | None = None) -> int:
        """Return how many rows of a length fit into one forward."""
        length = length or self.length
        config = self.structure.decoder_config
        wide = 4 * self.structure.hidden_size + 2 * int(
            getattr(config, "intermediate_size", 0) or 0
        )
        if self.structure.attention == "eager" or self.always:
            wide += length * (
                2 * self.structure.num_heads if self.structure.attention == "eager" else 2
            )
        vocabulary = int(getattr(config, "vocab_size", 0) or 0)
        size = 4 * (length * wide + 2 * self.answer * vocabulary)
        return max(1, min(MOST_ROWS, ROWS_BYTES // size))

    # -- what is changed -------------------------------------------------------------------------

    def replaced(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the predictions where visual tokens are mixed with their mean.

        Args:
            weights: (B, N) share of each token itself; the rest is the mean of all.

        Returns:
            (B, m, V) logits. They have a gradient for the weights where these ask for one.
        """
        weights = weights.to(self.embeds.device, self.embeds.dtype)[..., None]  # (B, N, 1)
        mixed = self.blank + weights * (self.visual - self.blank)
        rows = self.embeds.expand(len(mixed), -1, -1)
        index = self.columns[None, :, None].expand_as(mixed)
        given = self.expanded(len(mixed)) | {"inputs_embeds": rows.scatter(1, index, mixed)}
        for name in PER_TOKEN:
            value = self.given.get(name)
            if value is not None:
                given[name] = [_mix(part, weights) for part in value]  # type: ignore[attr-defined]
        return self.run(given, len(mixed), self.always)

    def masked(self, hidden: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Return the predictions where visual tokens are masked in the layers from one on.

        Args:
            hidden: (B, N) bool, True where masked.

        Returns:
            (B, m, V) logits.
        """
        columns = torch.zeros(len(hidden), self.length, dtype=torch.bool, device=self.embeds.device)
        columns[:, self.columns] = send(hidden, columns.device)
        keys = (*self.always, MaskedKeys(layer, columns))
        return self.run(self.expanded(len(hidden)), len(hidden), keys)

    def alone(self, kept: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Return the predictions where a few visual tokens are left in the layers from one on.

        At layer 0 the others are left out of the sequence, which is the same and costs less.

        Args:
            kept: (B, N) bool, as many True in every row.

        Returns:
            (B, m, V) logits.
        """
        window = self.structure.narrowest_window
        long = window is not None and self.length > window
        if layer > 0 or long or self.has_own_masks():
            return self.masked(~kept, layer)
        rows, device = len(kept), self.embeds.device
        present = torch.ones(rows, self.length, dtype=torch.bool, device=device)
        present[:, self.columns] = send(kept, device)
        index = present.nonzero()[:, 1].view(rows, -1)  # (B, n)
        given = self.expanded(rows)
        for name, value in given.items():
            if name in PER_TOKEN and value is not None:
                chosen = send(kept, device).flatten().nonzero().squeeze(1)
                given[name] = [part[chosen] for part in value]  # type: ignore[attr-defined]
            elif isinstance(value, torch.Tensor) and value.dim() > 1:
                given[name] = _take_columns(name, value, index, self.length)
        always = [
            MaskedKeys(keys.layer, send(keys.columns, device).expand(rows, -1).gather(1, index))
            for keys in self.always
        ]
        return self.run(given, rows, always)

    def has_own_masks(self) -> bool:
        """Return whether the decoder is given masks that are ready, not which columns are valid."""
        mask = self.given.get("attention_mask")
        return isinstance(mask, Mapping) or (isinstance(mask, torch.Tensor) and mask.dim() > 2)

    # -- the forward -----------------------------------------------------------------------------

    def expanded(self, rows: int) -> Kwargs:
        """Return the decoder's arguments for so many rows of the prompt."""
        given: Kwargs = {}
        for name, value in self.given.items():
            if name in PER_TOKEN and value is not None:
                given[name] = [part.repeat(rows, 1) for part in value]  # type: ignore[attr-defined]
            else:
                given[name] = _expand(value, rows, name)
        return given

    def run(self, given: Kwargs, rows: int, masked: Sequence[MaskedKeys]) -> torch.Tensor:
        """Call the model, its decoder with these arguments, and return (B, m, V) logits.

        Raises:
            ModelError: some layers have no keys to mask.
        """
        structure = self.structure
        if any(structure.keeps_state(keys.layer) for keys in masked):
            raise ModelError(
                f"{structure.model_type}: layers that keep a state of all tokens have no keys "
                "to mask",
                "explain the unpruned model by attention, gradient, occlusion or mask, or by "
                "information from layer 0",
            )
        embeds = given["inputs_embeds"]
        assert isinstance(embeds, torch.Tensor)

        def give(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
            return (), structure.seams.decoder.give(given)

        with Hooks(this_thread()) as hooks:
            hooks.before(structure.decoder, give)
            if embeds.requires_grad and embeds.shape[0] * embeds.shape[1] > LONG:
                segments = Segments(len(structure.layers))
                for layer, arguments in zip(structure.layers, structure.seams.layers, strict=True):
                    hooks.replace(layer, "forward", functools.partial(segments.run, arguments))
            elif self.length > LONG:
                self.feed_in_chunks(hooks)
            shared: dict[object, object] = {}
            for number in range(min((keys.layer for keys in masked), default=len(structure.layers)),
                                len(structure.layers)):  # fmt: skip
                enter = functools.partial(self.enter_layer, number, masked, shared)
                hooks.before(structure.layers[number], enter)
            # A text of the same length: all that the model makes of it is replaced.
            text = torch.full(embeds.shape[:2], self.text_id, device=embeds.device)
            return structure.model(
                input_ids=text,
                attention_mask=torch.ones_like(text),
                use_cache=False,
                **self.fewer_logits(),
            ).logits[:, -self.answer :]

    @contextmanager
    def fewer_states(self) -> Iterator[None]:
        """Hold the wide states of a long prompt's feed-forward networks for a few columns at once.

        The block reaches over the backward pass, which computes them anew in a thread of its own.
        """
        with Hooks(None) as hooks:
            if self.length > LONG:
                self.feed_in_chunks(hooks)
            yield

    def feed_in_chunks(self, hooks: Hooks) -> None:
        """Give every feed-forward network and norm, which treat columns apart, a few at once."""
        for layer in self.structure.layers:
            network = seams.feed_forward(layer)
            for module in (*seams.norms(layer), *([network] if network is not None else [])):
                hooks.replace(module, "forward", _in_chunks)

    @functools.cached_property
    def text_id(self) -> int:
        """A token that stands for no visual one."""
        taken = self.structure.placeholder_ids()
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def fewer_logits(self) -> Mapping[str, int]:
        """Return the argument that limits logits to the answer's, where there is one."""
        takes = seams.Arguments(self.structure.model.forward)
        return {"logits_to_keep": self.answer} if "logits_to_keep" in takes else {}

    def enter_layer(
        self,
        number: int,
        masked: Sequence[MaskedKeys],
        shared: dict[object, object],
        module: nn.Module,
        args: Args,
        kwargs: Kwargs,
    ) -> tuple[Args, Kwargs]:
        """Give a layer a mask without the masked keys."""
        arguments = self.structure.seams.layers[number]
        given = arguments.bind(args, kwargs)
        hidden = given["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        here = [index for index, keys in enumerate(masked) if keys.layer <= number]
        mask = given.get("attention_mask")
        key = (id(mask), *here)
        if key not in shared:
            columns = functools.reduce(torch.bitwise_or, [masked[i].columns for i in here])
            shared[key] = self.mask_keys(mask, columns, hidden)
        given["attention_mask"] = shared[key]
        first = (given.pop("hidden_states"),) if args else ()
        return first, arguments.give(given)

    def mask_keys(self, mask: object, columns: torch.Tensor, hidden: torch.Tensor) -> object:
        """Return a layer's mask without some keys; a token still sees itself, so none sees nothing.

        Args:
            mask: that the layer is given.
            columns: (B or 1, S) bool.
            hidden: (B, S, d), or of the last columns alone, as transformers (5.23) gives them to
                layers that share keys.
        """
        rows, length = hidden.shape[:2]
        columns = send(columns, hidden.device)
        if self.structure.attention.startswith("flash"):
            return (~columns).to(torch.long).expand(rows, -1)
        itself = torch.eye(columns.shape[1], dtype=torch.bool, device=hidden.device)[-length:]
        unseen = columns[:, None, None, :] & ~itself
        if mask is None:
            return torch.ones_like(itself).tril(columns.shape[1] - length) & ~unseen
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            raise ModelError(
                f"{self.structure.model_type}: keys of its layers can't be masked",
                "explain by attention, gradient or occlusion",
            )
        if mask.dtype == torch.bool:
            return mask & ~unseen
        return mask.masked_fill(unseen, torch.finfo(mask.dtype).min)


def _in_chunks(forward: Callable[..., object], hidden: torch.Tensor) -> object:
    """Run a feed-forward network, which treats each column apart, on a few columns at once."""
    if hidden.dim() != 3:
        return forward(hidden)
    run = forward
    if hidden.requires_grad:
        run = functools.partial(checkpoint, forward, use_reentrant=False)
    return torch.cat([run(part) for part in hidden.split(CHUNK, dim=1)], dim=1)  # type: ignore[misc]


def _expand(value: object, rows: int, name: str) -> object:
    """Return an argument of a batch of 1 for so many rows."""
    if isinstance(value, Mapping):
        return {key: _expand(part, rows, name) for key, part in value.items()}
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    if name == "position_ids" and value.dim() == 3:  # (3 or 4, B, S): time, row and column
        return value.expand(-1, rows, -1)
    if value.shape[0] != 1:
        raise seams.unknown(f"a decoder whose {name} has {value.shape[0]} rows for one prompt")
    return value.expand(rows, *value.shape[1:])


def _mix(part: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return (B x N, d) features of each token, mixed with their mean by (B, N, 1) weights."""
    blank = part.float().mean(0, keepdim=True).to(part.dtype)
    return (blank + weights.to(part.device, part.dtype) * (part - blank)).flatten(0, 1)


def _take_columns(name: str, value: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
    """Return the columns at (B, n) `index` of an argument, if it has a value for each."""
    if name == "position_ids":  # (B, S) or (3, B, S)
        return value.gather(-1, index.expand(*value.shape[:-2], *index.shape))
    if value.shape[1] != length:
        return value
    shape = *index.shape, *(1,) * (value.dim() - 2)  # of (B, S, ...)
    return value.gather(1, index.view(shape).expand(*index.shape, *value.shape[2:]))
