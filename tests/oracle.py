"""The unpruned model with the dropped tokens masked as keys: what pruning has to equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from packaging.version import Version
from transformers import LogitsProcessor, PreTrainedModel

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""The argument of layers and the field of outputs that holds the cache."""


class Force(LogitsProcessor):
    """Makes generation choose given tokens, so that logits can be compared step by step."""

    def __init__(self, tokens: torch.Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        step = input_ids.shape[1] - self.prompt
        return forced.scatter(1, self.tokens[:, step : step + 1], 0.0)


def generate(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    steps: int = 8,
    force: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens (B, steps) and the raw logits of every step (B, steps, V)."""
    length = inputs["input_ids"].shape[1]
    processors = [Force(force, length)] if force is not None else None
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=processors,
            disable_compile=True,
            **kwargs,
        )
    return out.sequences[:, length:], torch.stack(out.logits, dim=1)


def both_ways(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """(B, S) number of the block whose tokens see each other both ways; -1 for none."""
    if model.config.model_type == "gemma3":  # each picture is one
        visual = inputs["token_type_ids"] == 1
        starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        return torch.where(visual, starts.cumsum(1) - 1, -1)
    if model.config.model_type == "molmo2":  # all pictures together are one, markers included
        return torch.where(inputs["mm_token_type_ids"] == 1, 0, -1)
    return None


def masked(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    drops: Sequence[tuple[int, Sequence[Sequence[int]]]],
    force: torch.Tensor,
) -> torch.Tensor:
    """Logits (B, steps, V) of the unpruned model that can't see dropped columns.

    Args:
        drops: (first layer, for every sample the columns that it and later layers do not see).
        force: (B, steps) tokens to go on with.
    """
    given = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    blocks = both_ways(model, inputs)
    hooks = []
    for number, layer in enumerate(model.get_decoder().layers):
        hidden_from = [columns for first, columns in drops if first <= number]
        if not hidden_from:
            continue

        def mask(module, args, kwargs, columns=hidden_from[-1]):  # type: ignore[no-untyped-def]
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = kwargs.get(CACHE)
            index = module.self_attn.layer_idx
            past = cache.layers[index].get_seq_length() if index < len(cache.layers) else 0
            batch, length = hidden.shape[:2]
            total = past + length
            seen = torch.ones(batch, 1, length, total, dtype=torch.bool).tril(past)
            if blocks is not None and not past:
                same = (blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, None]
                seen |= same[:, None]
            seen[:, :, :, : given.shape[1]] &= given.bool()[:, None, None, :]
            for row, gone in enumerate(columns):
                seen[row, :, :, list(gone)] = False
            # A query that sees nothing is never read; it sees itself so that it stays finite.
            own = torch.arange(length)
            seen[:, :, own, past + own] = True
            blocked = torch.finfo(hidden.dtype).min
            bias = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, blocked)
            return args, {**kwargs, "attention_mask": bias}

        hooks.append(layer.register_forward_pre_hook(mask, with_kwargs=True))
    try:
        return generate(model, inputs, force.shape[1], force)[1]
    finally:
        for hook in hooks:
            hook.remove()


def dropped(
    trace: object, inputs: dict[str, torch.Tensor], past: int = 0
) -> list[tuple[int, list[list[int]]]]:
    """What a trace says was dropped, as `masked` wants it.

    Args:
        past: columns in the cache before the prompt.
    """
    gone = []
    before = [set((layout.columns + past).tolist()) for layout in trace.layouts]
    for record in trace.stages:
        present = [set(row) for row in record.kept]
        gone.append((record.layer, [sorted(b - p) for b, p in zip(before, present, strict=True)]))
    return gone


def assert_masked(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    trace: object,
    tokens: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """What a pruned generation gave is what masking the tokens that it dropped gives."""
    expected = masked(model, inputs, dropped(trace, inputs), tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
