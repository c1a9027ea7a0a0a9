"""What it costs to choose tokens, as a share of the prefill that it shortens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from vtprune.attention import Call, Rows, attention_rows
from vtprune.clock import time_runs
from vtprune.cost import DecoderShape, prefill_flops
from vtprune.layout import Layout, box, join, lay_out
from vtprune.pruners import METHODS, create
from vtprune.pruners.base import ATTENTION, TOWER, Budget, VisualTokens

# A decoder of 7B parameters with a key head for every query head: LLaVA-1.5 and LLaVA-NeXT.
SHAPE = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128,
                     intermediate=11008, vocab=32064)  # fmt: skip
TEXT = 64
QUESTION = 32  # text tokens after the last visual token
SIDES = {2880: (5, 24), 7290: (10, 27)}  # tiles or frames, and their side


@dataclass(frozen=True)
class Row:
    """One method at one size; seconds are medians, `spread` is their range over the median."""

    method: str
    tokens: int
    seconds: float
    spread: float
    prefill_seconds: float

    @property
    def share(self) -> float:
        return self.seconds / self.prefill_seconds


def measure_selection(
    name: str, num_tokens: int, keep: float, repeats: int, device: torch.device, dtype: torch.dtype
) -> Row:
    """Times one choice of `keep` x `num_tokens` tokens among random states of a 7B decoder.

    Reading attention rows is counted where the method reads them; a schedule of several cuts
    counts each. The prefill that it is compared with is the dense one's FLOPs at the rate that a
    matrix product of the decoder's own shape reaches here.
    """
    pruner, method = create(name, {}), METHODS[name]
    layout = make_layout(num_tokens, "image" if "image" in method.modalities else "video")
    budget = Budget.share(max(1, int(keep * num_tokens)), layout.groups("all"))
    tokens = VisualTokens(layout, make_states(pruner.needs, num_tokens, device, dtype))
    read = attention_reader(pruner.needs, num_tokens, device, dtype)

    def choose() -> None:
        read()
        pruner.select(tokens, budget)

    times = clock(choose, repeats, device)
    cuts = 3 if method.schedule else 1
    middle = median(times)
    prefill = prefill_flops(SHAPE, [num_tokens + TEXT] * SHAPE.layers) / matmul_rate(
        num_tokens + TEXT, device, dtype
    )
    return Row(name, num_tokens, cuts * middle, (max(times) - min(times)) / middle, prefill)


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
        shape: tuple[int, ...] = (count, SHAPE.heads, SHAPE.head_dim)
        if name == "text_attention":
            shape = (QUESTION, num_tokens)
        elif name in (*ATTENTION, *TOWER):
            shape = (num_tokens,)
        one = torch.randn(shape, generator=generator, device=device)
        states[name] = one.softmax(-1) if len(shape) < 3 else one.to(dtype)
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
        torch.randn(1, SHAPE.heads, total, SHAPE.head_dim, generator=generator, device=device).to(
            dtype
        )
        for _ in range(2)
    )
    first = total - (QUESTION if "text_attention" in needs else 1)
    valid, past = torch.ones(total, dtype=torch.bool), torch.ones(0, dtype=torch.bool)
    rows = Rows(torch.arange(first, total), valid, past)
    call = Call(query, key, SHAPE.head_dim**-0.5)
    return lambda: attention_rows(call, [rows])


def clock(work: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of every run after one to warm up."""
    work()
    return time_runs(work, device, repeats)


def matmul_rate(num_tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the decoder's largest matrix product."""
    left = torch.randn(num_tokens, SHAPE.hidden, device=device).to(dtype)
    right = torch.randn(SHAPE.hidden, SHAPE.intermediate, device=device).to(dtype)
    seconds = median(clock(lambda: left @ right, 3, device))
    return 2.0 * num_tokens * SHAPE.hidden * SHAPE.intermediate / seconds


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: methods down, sizes across."""
    sizes = sorted({row.tokens for row in rows})
    prefill = {row.tokens: row.prefill_seconds for row in rows}
    heads = " | ".join(f"{size:,} tokens: ms | spread | of the prefill" for size in sizes)
    lines = [f"| method | {heads} |", "| --- |" + " ---: | ---: | ---: |" * len(sizes)]
    for name in dict.fromkeys(row.method for row in rows):
        cells = []
        for size in sizes:
            row = next((r for r in rows if r.method == name and r.tokens == size), None)
            cells.append(
                "| | "
                if row is None
                else f"{1e3 * row.seconds:.1f} | {row.spread:.0%} | {row.share:.2%}"
            )
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    dense = ", ".join(f"{prefill[size]:.1f} s at {size:,} tokens" for size in sizes)
    return "\n".join(lines) + f"\n\nDense prefill by FLOPs at the measured rate: {dense}.\n"
