"""What it costs to choose tokens, as a share of the prefill that it shortens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch

from vtprune._dev.bench.results import Pass, Results, Side, run_in
from vtprune.device import time_warm
from vtprune.engine.readings import AttentionRows, KernelCall, attention_rows
from vtprune.models.cost import plain_decoder, prefill_flops
from vtprune.pruners import METHODS, create, find_profile
from vtprune.pruners.base import ATTENTION, ROTARY, TOWER, Budget, VisualTokens
from vtprune.tokens.layout import Layout, box, join, lay_out
from vtprune.tokens.schedule import Place, fixed_count
from vtprune.tokens.solver import solve

# A decoder of 7B parameters with a key head for every query head: LLaVA-1.5 and LLaVA-NeXT.
HEAD_DIM, INTERMEDIATE = 128, 11008
SHAPE = plain_decoder(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=HEAD_DIM,
                      intermediate=INTERMEDIATE, vocab=32064)  # fmt: skip
TEXT = 64
QUESTION = 32  # text tokens after the last visual token
SIDES = {2880: (5, 24), 7290: (10, 27)}  # tiles or frames, and their side
DENSE = "dense prefill"


def measure_selection(
    results: Results,
    sizes: Sequence[int],
    methods: Sequence[str],
    keep: float,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[Pass]:
    """Times every method's choice among random states of a 7B decoder.

    Reading attention rows is counted where the method reads them; a schedule of several cuts
    counts each, at the tokens that the one before leaves. The prefill that it is compared with is
    the dense one's FLOPs at the rate that a matrix product of the decoder's own shape reaches in
    the same pass.
    """
    made: list[Pass] = []
    for num_tokens in sizes:
        settings = {
            "tokens": num_tokens,
            **run_in(device, dtype),
            "methods": list(methods),
            "keep": keep,
        }

        def sides(num_tokens: int = num_tokens) -> Mapping[str, Side]:
            run = {name: partial(time_choice, name, num_tokens, keep, device, dtype)
                   for name in methods}  # fmt: skip
            return {DENSE: partial(time_prefill, num_tokens, device, dtype), **run}

        made += results.measure("selection", settings, sides, repeats, device, warm_up=False)
    return made


def time_choice(
    name: str, num_tokens: int, keep: float, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of all cuts of a method, one after the other."""
    method = METHODS[name]
    whole = make_layout(num_tokens, "image" if "image" in method.modalities else "video")
    cuts = []
    for number, (before, after) in enumerate(pairwise(counts_of(name, num_tokens, keep))):
        pruner = create(*method.later) if number and method.later else create(name, {})
        layout = whole.take(torch.arange(before) * num_tokens // before)
        budget = Budget.share(after, layout.groups("all"))
        tokens = VisualTokens(layout, make_states(pruner.needs, before, device, dtype))
        read = attention_reader(pruner.needs, before, device, dtype)
        cuts.append((read, partial(pruner.select, tokens, budget)))

    def choose() -> None:
        for read, select in cuts:
            read()
            select()

    return {"seconds": time_warm(choose, device)}


def counts_of(name: str, num_tokens: int, keep: float) -> list[int]:
    """The number of tokens before the first cut of a method and after each."""
    method = METHODS[name]
    if method.at != "schedule":
        return [num_tokens, fixed_count(keep, num_tokens)]
    profile = find_profile(name)
    layers = enumerate(profile.layers(SHAPE.layers, method.lowest))
    places = [Place("schedule", layer, profile=profile, part=part) for part, layer in layers]
    return [num_tokens, *(cut.count for cut in solve(places, keep, SHAPE.layers, num_tokens).cuts)]


def time_prefill(num_tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the whole prefill at the rate of the decoder's largest matrix product."""
    total = num_tokens + TEXT
    left = torch.randn(total, SHAPE.hidden, device=device).to(dtype)
    right = torch.randn(SHAPE.hidden, INTERMEDIATE, device=device).to(dtype)
    rate = 2.0 * total * SHAPE.hidden * INTERMEDIATE / time_warm(lambda: left @ right, device)
    return {"seconds": prefill_flops(SHAPE, [total] * SHAPE.layers) / rate}


def make_layout(num_tokens: int, modality: str) -> Layout:
    """Tiles of a picture or frames of a clip, square where the number is a usual one."""
    panes, side = SIDES.get(num_tokens, (1, 0))
    if modality == "video":
        grid = box(panes, side, side) if side else box(1, 1, num_tokens)
    else:
        grid = (
            join([box(1, side, side, tile) for tile in range(panes)])
            if side
            else box(1, 1, num_tokens)
        )
    return lay_out({modality: torch.arange(num_tokens)}, {modality: [grid]})


def make_states(
    needs: Sequence[str], num_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Random states under the names that a method reads."""
    generator = torch.Generator(device).manual_seed(0)
    states = {}
    for name in needs:
        count = QUESTION if name.startswith("text_") else num_tokens
        shape: tuple[int, ...] = (count, SHAPE.heads, HEAD_DIM)
        if name == "text_attention":
            shape = (QUESTION, num_tokens)
        elif name == "text_attention_by_head":
            shape = (QUESTION, SHAPE.heads, num_tokens)
        elif name in ROTARY:
            shape = (count, HEAD_DIM)
        elif name in (*ATTENTION, *TOWER):
            shape = (num_tokens,)
        one = torch.randn(shape, generator=generator, device=device)
        if name in (*ATTENTION, *TOWER):
            one = one.softmax(-1)
        elif name not in ROTARY:
            one = one.to(dtype)
        states[name] = one
    return states


def attention_reader(
    needs: Sequence[str], num_tokens: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """Reads the attention rows that a method needs, from random queries and keys."""
    if not set(needs) & set(ATTENTION):
        return lambda: None
    total = num_tokens + TEXT
    generator = torch.Generator(device).manual_seed(1)
    query, key = (
        torch.randn(1, SHAPE.heads, total, HEAD_DIM, generator=generator, device=device).to(dtype)
        for _ in range(2)
    )
    of_question = any(name.startswith("text_attention") for name in needs)
    first = total - (QUESTION if of_question else 1)
    columns = torch.arange(total)
    rows = AttentionRows(torch.arange(first, total), columns, columns)
    call = KernelCall(query, key, HEAD_DIM**-0.5)
    return lambda: attention_rows(call, [rows])
