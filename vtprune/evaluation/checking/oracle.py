"""The unpruned model with the dropped tokens masked as keys: what pruning has to equal.

Nothing here is shared with the engine: the unpruned model runs on all tokens, at their original
positions, with the masks that transformers makes for it, and each layer past a cut gets its mask
with the dropped columns blocked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import LogitsProcessor

from vtprune.engine.hooks import ALL_THREADS, Hooks
from vtprune.errors import ModelError
from vtprune.models.seams import fold_streams
from vtprune.models.structure import decoder_layers, find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vtprune.engine.trace import Trace

# All names inside transformers (5.17 to 5.24) that a check relies on.
KERNEL = "_attn_implementation"  # of a config: its attention kernel
HIDDEN = "hidden_states"  # a layer's states, its first argument
MASK = "attention_mask"  # a layer's mask: None, or (B, 1, n, keys), bool or added to the scores
CHOICE = "prev_topk_indices"  # which keys the layer before chose, which it gives beside its states
BLOCKS = (
    "block_states"  # of a layer: each token's states after earlier blocks of layers (Inkling 2)
)
DISTANCE = "relative_distance"  # of a layer: how far keys are before queries, (n, n)
BOUNDARY = "is_block_boundary"  # of such a layer: whether a block begins with it
BIAS = "rel_logits_proj"  # of attention: what is told the places of queries and keys (Inkling)
EMBEDDINGS = "position_embeddings"  # a layer's (..., n, D), or a tuple of such

LaterDrops = Sequence[tuple[int, Sequence[Sequence[Sequence[int]]]]]
"""(decoded tokens of before, for every layer and sample the columns that later ones do not see)."""
Drops = Sequence[tuple[int, Sequence[Sequence[int]]]]
"""(first layer, for every sample the columns that it and later layers do not see)."""


class Force(LogitsProcessor):
    """Makes generation choose given tokens, so that logits can be compared step by step.

    Args:
        tokens: (B, steps).
        prompt: columns of the prompt.
    """

    def __init__(self, tokens: torch.Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        step = input_ids.shape[1] - self.prompt
        return forced.scatter(1, self.tokens[:, step : step + 1], 0.0)


def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    steps: int = 8,
    force: torch.Tensor | None = None,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate greedily, or the tokens `force`; all rows get exactly `steps` tokens.

    Args:
        force: (B, steps) tokens to choose.
        options: of transformers' generate.

    Returns:
        New tokens (B, steps), and the logits that each was chosen from (B, steps, V).
    """
    length = inputs["input_ids"].shape[1]
    if force is not None:
        options["logits_processor"] = [Force(force, length)]
    call = cast("Callable[..., object]", model.generate)  # a union upstream
    with torch.no_grad():
        out = call(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
            **{"num_beams": 1, **options},
        )
    return out.sequences[:, length:], torch.stack(out.logits, dim=1)  # type: ignore[attr-defined]


def masked(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    drops: Drops,
    force: torch.Tensor,
    later: LaterDrops = (),
    **options: object,
) -> torch.Tensor:
    """Return the logits (B, steps, V) of the unpruned model that can't see the dropped columns.

    Args:
        drops: no later entry may drop less than one before it.
        later: what goes while the answer is decoded, in place of them.
        force: (B, steps) tokens to choose.
        options: of transformers' generate; the cache has to be a growing one.
    """
    with masking(model, drops, later=later, prompt=inputs["input_ids"].shape[1]):
        return generate(model, inputs, force.shape[1], force, **options)[1]


@contextmanager
def masking(
    model: PreTrainedModel,
    drops: Drops,
    layers: Sequence[nn.Module] | None = None,
    later: LaterDrops = (),
    prompt: int = 0,
) -> Iterator[None]:
    """Block dropped columns in the masks of one generation's forwards.

    Args:
        layers: of the decoder; None: as it names them.
        later: what goes while the answer is decoded; layers of which nothing goes are left alone.
        prompt: columns of the prompt.
    """
    layers = list(decoder_layers(model)) if layers is None else layers
    columns = _Columns(find_decoder(model).config)
    with Hooks(ALL_THREADS) as hooks:
        hooks.before(layers[0], columns.count)
        for number, layer in enumerate(layers):
            hidden_from = [dropped for first, dropped in drops if first <= number]
            since = [(prompt + steps, by_layer[number]) for steps, by_layer in later]
            if hidden_from or any(map(any, (rows for _, rows in since))):
                first = hidden_from[-1] if hidden_from else ()
                hooks.before(layer, _Blocking(first, columns, since))
        yield


class _Columns:
    """How many columns the first layer has had, which all later ones see too.

    Args:
        config: of the decoder.
    """

    def __init__(self, config: object) -> None:
        self.config, self.total = config, 0

    def count(self, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Add the columns of a forward: a pre-hook of the first layer."""
        hidden = args[0] if args else kwargs.get(HIDDEN)
        if isinstance(hidden, torch.Tensor):
            self.total += fold_streams(hidden, self.config).shape[1]


class _Blocking:
    """A pre-hook of one layer that blocks columns in its mask.

    Args:
        dropped: for every sample its columns.
        columns: up to this forward's end.
        later: (columns, for every sample what forwards that end past those do not see).
    """

    def __init__(
        self,
        dropped: Sequence[Sequence[int]],
        columns: _Columns,
        later: Sequence[tuple[int, Sequence[Sequence[int]]]] = (),
    ) -> None:
        self.dropped, self.columns, self.later = dropped, columns, later

    def __call__(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        hidden = args[0] if args else kwargs.get(HIDDEN)
        if MASK not in kwargs or not isinstance(hidden, torch.Tensor):
            raise ModelError(
                f"{type(layer).__name__} takes no {HIDDEN} and {MASK}, so its keys can't be masked",
                "check with a transformers version that vtprune is tested with",
            )
        total = self.columns.total
        passed = [rows for end, rows in self.later if total > end]
        dropped = passed[-1] if passed else self.dropped
        bias = self.add_mask(kwargs[MASK], fold_streams(hidden, self.columns.config), total)
        start = total - bias.shape[-1]  # a cache of a sliding window holds the last columns
        for row, columns in enumerate(dropped):
            held = [column - start for column in columns if start <= column < total]
            bias[row, :, :, held] = torch.finfo(bias.dtype).min
        # A query that sees nothing is never read; it sees itself so that it stays finite. Layers
        # that keep no keys may get the last queries alone.
        queries = torch.arange(bias.shape[-2], device=bias.device)
        bias[:, :, queries, bias.shape[-1] - bias.shape[-2] + queries] = 0
        return args, {**kwargs, MASK: bias}

    def add_mask(self, mask: object, hidden: torch.Tensor, total: int) -> torch.Tensor:
        """Return a new (B, 1, n, keys) mask that is added to the scores."""
        rows, length = hidden.shape[:2]
        if mask is None:  # transformers leaves a mask out where it is causal and nothing is padded
            mask = hidden.new_ones(rows, 1, length, total, dtype=torch.bool).tril(total - length)
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            raise ModelError(
                "this attention kernel takes no mask a query, so its keys can't be masked",
                "check with --attention sdpa or eager",
            )
        mask = mask.expand(rows, -1, -1, -1)
        if mask.dtype != torch.bool:
            return mask.to(hidden.dtype, copy=True)
        bias = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device)
        return bias.masked_fill_(~mask, torch.finfo(bias.dtype).min)


# -- decoders whose layers keep a state -----------------------------------------------------------


def looped(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    drops: Sequence[tuple[int, Sequence[int]]],
    steps: int,
    **options: object,
) -> torch.Tensor:
    """Return the logits (1, steps, V) of a loop over the layers, without any cache.

    The prompt and the tokens chosen after it go through the layers at once: those before a cut run
    on all tokens, those from it on over what is left, with the original position ids. So their
    states are made of those tokens alone, and being causal it gives every step.

    Args:
        inputs: one prompt without padding, and behind it the chosen tokens but the last.
        drops: (first layer, the columns that it and later layers do not get).
        options: of the model's forward.
    """
    layers = decoder_layers(model)
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def note(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        calls.append((args if not calls else (), kwargs))

    with torch.no_grad():
        with Hooks(ALL_THREADS) as hooks:
            for layer in layers:
                hooks.before(layer, note)
            model(**inputs, use_cache=False, **options)
        chosen: object = None
        (args, kwargs), left = calls[0], torch.arange(inputs["input_ids"].shape[1])
        hidden = args[0] if args else kwargs[HIDDEN]
        assert isinstance(hidden, torch.Tensor)
        blocks = None
        if hasattr(layers[0], BOUNDARY):
            blocks = hidden.new_zeros(*hidden.shape[:2], 0, hidden.shape[2])
        for number, (layer, (_, kwargs)) in enumerate(zip(layers, calls, strict=True)):
            for columns in [columns for first, columns in drops if first == number]:
                stays = ~torch.isin(left, torch.tensor(columns, dtype=torch.long))
                hidden, left = hidden[:, stays.to(hidden.device)], left[stays]
                blocks = None if blocks is None else blocks[:, stays.to(blocks.device)]
            given = {
                name: _of_columns(name, value, left)
                for name, value in kwargs.items()
                if name not in (HIDDEN, CHOICE)
            }
            if CHOICE in kwargs:
                given[CHOICE] = chosen
            entering = hidden
            if blocks is not None:
                given[BLOCKS] = blocks
            with _distances(layer, left):
                output = layer(hidden, **given)
            if blocks is not None and getattr(layer, BOUNDARY):
                blocks = torch.cat([blocks, entering[:, :, None]], dim=2)
            hidden, chosen = _states(output), output[-1] if isinstance(output, tuple) else None

        def give(_: nn.Module, args: object, output: object) -> object:
            states = _states(output).clone()
            states[:, left.to(states.device)] = hidden
            return (states, *output[1:]) if isinstance(output, tuple) else states

        def give_blocks(
            _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            assert blocks is not None
            assert isinstance(args[0], torch.Tensor)
            all_tokens = args[0].clone()
            all_tokens[:, left.to(all_tokens.device)] = blocks
            return (all_tokens, *args[1:]), kwargs

        with Hooks(ALL_THREADS) as hooks:
            hooks.after(layers[-1], give)
            if blocks is not None:
                hooks.before(model.get_decoder().final_input, give_blocks)
            output = model(**inputs, use_cache=False, **options)
    logits: torch.Tensor = output.logits
    return logits[:, -steps:]


@contextmanager
def _distances(layer: nn.Module, columns: torch.Tensor) -> Iterator[None]:
    """Let a layer whose attention is biased by distances count them between these columns.

    Full layers scale their queries and the bias by the logarithm of their place, from a number on.
    """
    attention = getattr(layer, "self_attn", None)
    module = getattr(attention, BIAS, None)
    if not isinstance(attention, nn.Module) or not isinstance(module, nn.Module):
        yield
        return
    places = columns.to(next(module.parameters()).device)
    slots = torch.arange(len(places), device=places.device)
    norm = getattr(attention, "q_norm", None)
    floor: float | None = None
    if norm is not None:
        floor = attention.config.log_scaling_n_floor  # type: ignore[assignment, union-attr]

    def scale(at: torch.Tensor) -> torch.Tensor:
        if floor is None or attention.is_sliding:
            return torch.ones(len(at), device=at.device)
        logs = ((at + 1).float() / floor).clamp(min=1.0).log()
        return 1.0 + attention.config.log_scaling_alpha * logs  # type: ignore[operator, union-attr]

    ratio = scale(places) / scale(slots)

    def place(
        _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        return (args[0], places, places), kwargs

    def scale_bias(_: nn.Module, args: object, bias: torch.Tensor) -> torch.Tensor:
        return bias * ratio[:, None]  # (B, H, n, n)

    def scale_queries(_: nn.Module, args: object, queries: torch.Tensor) -> torch.Tensor:
        return queries * ratio[:, None, None]  # (B, n, H, D)

    with Hooks(ALL_THREADS) as hooks:
        hooks.before(module, place)
        hooks.after(module, scale_bias)
        if norm is not None:  # else it scales by position ids (Inkling 2)
            hooks.after(norm, scale_queries)
        yield


def _states(output: object) -> torch.Tensor:
    """Return the states that a layer gives, of a tuple or alone."""
    states = output[0] if isinstance(output, tuple) else output
    assert isinstance(states, torch.Tensor)
    return states


def _of_columns(name: str, value: object, columns: torch.Tensor) -> object:
    """Return what a layer was given for all columns, for some of them."""
    if isinstance(value, tuple):
        return tuple(_of_columns(name, part, columns) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    columns = columns.to(value.device)
    if name == MASK and value.dim() == 4:
        return value[:, :, columns][..., columns]
    if name == DISTANCE:
        return value[columns][:, columns]
    if name == EMBEDDINGS:
        return value[..., columns, :]
    return value[..., columns]  # position ids, masks of tokens


def kernel_of(model: PreTrainedModel) -> str:
    """Return the attention kernel of a model's decoder."""
    return str(getattr(find_decoder(model).config, KERNEL, "eager"))


def other_kernel(model: PreTrainedModel) -> str:
    """Return an attention kernel that a model's decoder does not use."""
    return "sdpa" if kernel_of(model) == "eager" else "eager"


@contextmanager
def attention_kernel(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run all parts of a model with another attention kernel.

    Raises:
        ModelError: a part has no such kernel.
    """
    from transformers import PreTrainedModel

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [getattr(part.config, KERNEL) for part in parts]
    try:
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            raise ModelError(f"attention {name!r} does not run here: {error}") from error
        if kernel_of(model) != name:  # transformers only warns where a model can't change it
            raise ModelError(f"{type(model).__name__} can't change its attention kernel")
        yield
    finally:
        for part, kernel in zip(parts, before, strict=True):  # a part after what it is a part of
            part.set_attn_implementation(kernel)


def dropped(trace: Trace, past: int = 0) -> list[tuple[int, list[list[int]]]]:
    """Return what a trace says was dropped, as `masked` takes it.

    Args:
        past: columns in the cache before the prompt.
    """
    drops = []
    before = [set((layout.columns + past).tolist()) for layout in trace.layouts]
    for record in trace.stages:
        present = [set(row) for row in record.kept]
        drops.append((record.layer, [sorted(b - p) for b, p in zip(before, present, strict=True)]))
    return drops


def dropped_later(trace: Trace) -> list[tuple[int, list[list[list[int]]]]]:
    """Return what a trace says was dropped while decoding, as `masked` takes it."""
    later = []
    visual = [layout.columns.tolist() for layout in trace.layouts]
    for cut in trace.decoding:
        by_layer: list[list[list[int]]] = []
        for layer, columns in enumerate(cut.columns):
            if not columns.shape[1]:  # a layer without keys
                by_layer.append([[] for _ in visual])
                continue
            left = [set(cut.left(sample, layer)) for sample in range(len(visual))]
            by_layer.append([
                [column for column in row if column not in stays]
                for row, stays in zip(visual, left, strict=True)
            ])  # fmt: skip
        later.append((cut.steps, by_layer))
    return later
