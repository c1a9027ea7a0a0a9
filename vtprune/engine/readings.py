"""What methods read of the model on the way to a cut: states, and attention of any kernel."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from vtprune.device import send
from vtprune.engine.attention_mask import attended, sees
from vtprune.engine.sequence import SequenceState
from vtprune.errors import ModelError
from vtprune.models.seams import (
    KERNEL,
    check_values,
    main_stream,
    rotary_rows,
    turns_by_position,
    unknown,
)
from vtprune.models.structure import Structure
from vtprune.pruners.base import ATTENTION, PROJECTED, ROTARY, TOWER
from vtprune.tokens.layout import Layout

CHUNK = 2**26  # elements of a score tensor that is held at once
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class Readings:
    """What was read on the way to the next cut.

    Attributes:
        projected: query, key or value -> (B, n, H, D) of the layer before the cut.
        previous: (B, n, d) states that enter the layer before the cut; None: not read.
        attention: for every sample (R, n) float32 of the layer before the cut; (R, H, n) where a
            method reads it head by head.
        rotary: (B or 1, n, R) float32 rows of the layer before the cut, for what positions alone
            say; None: not read.
        tower: for every sample (N, V) float32 of the vision tower, by the names of `TOWER`, for its
            tokens before any cut.
    """

    def __init__(self, structure: Structure, sequence: SequenceState) -> None:
        self.structure, self.sequence = structure, sequence
        self.projected: dict[str, torch.Tensor] = {}
        self.previous: torch.Tensor | None = None
        self.rotary: torch.Tensor | None = None
        self.attention: list[torch.Tensor] = []
        self.tower: list[torch.Tensor] = []

    def project(self, embeds: torch.Tensor, names: Sequence[str]) -> None:
        """Keep the states that layer 0 would compute from the uncut embeddings, (B, S, d)."""
        if not names:
            return
        with torch.no_grad():
            normed = self.structure.norm(0)(embeds)
            for name in names:
                self.keep(0, name, None, None, self.structure.projection(0, name)(normed))

    def keep(
        self, layer: int, name: str, module: object, args: object, output: torch.Tensor
    ) -> None:
        """Keep what a projection gives: a hook, once it has its layer and name.

        Raises:
            ModelError: it gives something else than (B, n, H x D).
        """
        if output.dim() != 3:  # Inkling 2, in 5.24
            raise ModelError(
                f"{self.structure.model_type}: the {name} projection of layer {layer} gives more "
                "than a matrix does",
                "use a method without states, such as random or uniform",
            )
        states = self.structure.without_gate(layer, name, output.detach())
        self.projected[name] = states.unflatten(-1, (-1, self.structure.head_dim(layer)))

    def take_rotary(self, layer: int, embeddings: object) -> None:
        """Keep what rotary positions alone say in a layer, by the embeddings that it is given.

        Raises:
            ModelError: they are of a form that is not known.
        """
        module = self.structure.attention_module(layer)
        width = self.structure.head_dim(layer)
        rows = rotary_rows(embeddings, width, turns_by_position(module))
        self.rotary = rows * float(getattr(module, "scaling", width**-0.5)) ** 0.5

    def take_attention(
        self, layer: int, call: KernelCall, all_text: bool, by_head: bool = False
    ) -> None:
        """Keep attention rows of a layer: of all text after the pictures, or of the last token."""
        sequence, wanted = self.sequence, []
        keys, window = sequence.key_columns(layer), self.structure.window(layer)
        own, starts = sequence.query_columns(), sequence.chunk_starts(layer)
        for sample in range(len(own)):
            text = sequence.text_columns(sample)
            queries = sequence.slots(sample, text if all_text else text[-1:])
            start = None if starts is None else starts[sample : sample + 1]
            wanted.append(AttentionRows(queries, own[sample], keys[sample], window, start))
        self.attention = attention_rows(call, wanted, by_head)

    def read(self, sample: int, name: str, tokens: Layout, hidden: torch.Tensor) -> torch.Tensor:
        """Return the states of one sample that a method reads by this name, as in VisualTokens.

        Args:
            tokens: that it chooses from.
            hidden: (B, n, d) states that enter the layer of the cut.
        """
        slots = self.sequence.slots(sample, tokens.columns)
        if name in ATTENTION:
            rows = self.attention[sample]
            rows = rows[..., send(slots, rows.device)]
            if name == "text_attention_by_head":
                return rows
            rows = rows if rows.dim() == 2 else rows.mean(1)
            return rows if name == "text_attention" else rows[-1]
        if name in TOWER:
            scores = self.tower[sample][:, TOWER.index(name)]
            index = torch.searchsorted(
                self.sequence.original_layouts[sample].columns, tokens.columns
            )
            return send(scores[send(index, scores.device)], hidden.device)
        if name.startswith("text_"):
            slots = self.sequence.slots(sample, self.sequence.text_columns(sample))
        name = name.removeprefix("text_")
        if name in ROTARY:
            assert self.rotary is not None
            rows = self.rotary[min(sample, len(self.rotary) - 1)]
            return rows[send(slots, rows.device)]
        source = self.projected.get(name)
        if source is None:
            entering = self.previous if name == "previous" else hidden
            assert entering is not None
            source = main_stream(entering, self.structure.decoder_config)
        rows = source[sample].index_select(0, send(slots, source.device))
        if name in PROJECTED:
            return rows
        if name == "normed":
            rows = self.structure.apply_final_norm(rows)
        return rows.unflatten(-1, (self.structure.num_heads, -1))

    def clear(self) -> None:
        """Forget what was read for one cut."""
        self.projected.clear()
        self.previous = self.rotary = None
        self.attention = []


# -- attention, read from any kernel that transformers has ---------------------------------------


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """The attention rows of one sample that are read, and the keys that they may see.

    Args:
        queries: (R,) int64 ascending slots of this forward's sequence.
        columns: (S,) original columns of its slots; -1 for padding.
        keys: (K,) original columns of the layer's keys, those of a cache first; -1 for those that
            no query sees.
        window: the columns that a query sees up to itself; None: all.
        start: (1,) where the first chunk of so many columns begins; None: the window slides.
    """

    queries: torch.Tensor
    columns: torch.Tensor
    keys: torch.Tensor
    window: int | None = None
    start: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class KernelCall:
    """What an attention kernel is given.

    Args:
        query: (B, H, S, D), norms and rotary positions applied.
        key: (B, KV, W, D) likewise; those of a cache before them, free slots of one behind them.
        scale: of the scores.
        mask: (B or 1, 1 or H, S, W), bool (True attends) or added to the scores; None: as causal as
            the module is.
        bounds: (n + 1,) where each of n sequences begins that lie one after the other in one row,
            and the end; None: each row is one.
        bias: (B, H, S, W) that is added to the scores (Inkling); None: nothing.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    mask: torch.Tensor | None = None
    bounds: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def read_call(
    query: torch.Tensor, key: torch.Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> KernelCall:
    """Return what an attention kernel is given.

    Args:
        args, kwargs: what follows query, key and value in its call.

    Raises:
        ModelError: an argument that its softmax may depend on is not known, or missing.
    """
    given = {**dict(zip(("attention_mask",), args, strict=False)), **kwargs}
    check_values("an attention kernel", given, KERNEL)
    scale, mask = given.get("scaling"), given.get("attention_mask")
    bounds, bias = given.get("cu_seq_lens_k"), given.get("position_bias")
    if not isinstance(scale, float) or "attention_mask" not in given or len(args) > 1:
        raise unknown("an attention kernel is given no scaling or no attention_mask by these names")
    if given.get("softcap") is not None:
        raise ModelError(
            "attention whose scores are capped (softcap) can't be read",
            "use a method that reads no attention, such as entropy, dart or random",
        )
    return KernelCall(
        query,
        key,
        scale,
        mask if isinstance(mask, torch.Tensor) else None,
        bounds if isinstance(bounds, torch.Tensor) else None,
        bias if isinstance(bias, torch.Tensor) else None,
    )


class KernelTap:
    """Read attention while one attention module runs, whatever its kernel.

    Every attention module of transformers (5.17 to 5.24) asks a registry for its kernel.
    `get_interface` is to be put around the registry's method of that name while the module runs, no
    longer: compiled layers run uncompiled meanwhile. What it returns is given the same queries and
    keys, with norms and rotary positions applied, and passes them on to the kernel. Nothing in the
    model is changed, neither its attention nor a kernel of the registry, which all models share.

    Args:
        module: the attention module.
        take: gets what the kernel is given.

    Raises:
        ModelError: the module asks no registry.
    """

    def __init__(self, module: nn.Module, take: Callable[[KernelCall], None]) -> None:
        self.module, self.take = module, take
        registry = vars(sys.modules[type(module).__module__]).get("ALL_ATTENTION_FUNCTIONS")
        if not hasattr(registry, "get_interface"):
            raise ModelError(
                f"{type(module).__name__} does not say what its attention kernel is given",
                "use a method that reads no attention, such as entropy, dart or random",
            )
        self.registry: object = registry

    def get_interface(
        self, original: Callable[..., Attend], *args: object, **kwargs: object
    ) -> Attend:
        """Return the kernel that a module asks for, with the reading before it."""
        return functools.partial(self.read, original(*args, **kwargs))

    def read(
        self,
        attend: Attend,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend as the kernel does, and take what it is given where the module is the tap's."""
        if module is self.module:
            self.take(read_call(query, key, args, kwargs))
        return attend(module, query, key, value, *args, **kwargs)


def attention_rows(
    call: KernelCall, wanted: Sequence[AttentionRows], by_head: bool = False
) -> list[torch.Tensor]:
    """Return for every sample its rows' attention to this forward's slots, mean over heads.

    The softmax is over all keys that a row sees, those of the cache too, in float32. Slots past K
    of a static cache are left out, and so is the call's mask: a row sees its window before it.

    Returns:
        For every sample (R, S) float32; (R, H, S) where they are wanted head by head.
    """
    return [
        _rows_of_one(
            call.query[number],
            call.key[number],
            call.scale,
            rows,
            None if call.bias is None else call.bias[number],
            by_head,
        )
        for number, rows in enumerate(wanted)
    ]


def _rows_of_one(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    rows: AttentionRows,
    bias: torch.Tensor | None,
    by_head: bool,
) -> torch.Tensor:
    device, heads = query.device, query.shape[0]
    held = send(rows.keys[-key.shape[1] :], device)  # a cache with a window holds the last ones
    keys = key[:, : len(held)].float().transpose(1, 2)  # (KV, D, K)
    columns = send(rows.columns, device)
    own = torch.searchsorted(held.cummax(0).values, columns).clamp_max(len(held) - 1)  # (S,)
    start = None if rows.start is None else send(rows.start, device)
    parts = []
    for part in send(rows.queries, device).split(max(1, CHUNK // (heads * len(held)))):
        seen = sees(columns[part][None], held[None], rows.window, start)[0]  # (r, K)
        added = None if bias is None else bias[:, part, : len(held)]
        attention = _softmax(query[:, part], keys, scale, seen, added)  # (H, r, K)
        parts.append(attention[..., own].transpose(0, 1) if by_head else attention.mean(0)[:, own])
    return torch.cat(parts)


def last_row(call: KernelCall) -> torch.Tensor:
    """Return (W,) float32 attention of the first sample's last query, mean over heads."""
    query, seen = call.query[0, :, -1:], None
    if call.mask is not None and call.mask.dim() == 4:
        seen = attended(call.mask[0, :, -1:]).any(0)  # (1, W), of any head
    keys = call.key[0].float().transpose(1, 2)
    return _softmax(query, keys, call.scale, seen).mean(0)[0]


def read_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    seen: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (B, W) float32 attention of one query of every sample, mean over heads.

    The scores are products in the model's own type, so that no key is copied into another.

    Args:
        query: (B, H, D).
        key: (B, KV, W, D).
        seen: (B or 1, W) bool; None: all.
        bias: (B, H, W) added to the scores; None: nothing.
    """
    batch, heads, width = query.shape
    grouped = query.view(batch, key.shape[1], -1, width)  # (B, KV, group, D)
    scores = (grouped @ key.transpose(2, 3)).float().view(batch, heads, -1) * scale
    if bias is not None:
        scores = scores + bias.float()
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, : scores.shape[-1]], -torch.inf)
    return scores.softmax(-1).mean(1)


def received(call: KernelCall, by_first: bool) -> list[torch.Tensor]:
    """Return for every sequence of an encoder the attention that each of its tokens receives.

    It is the mean over the heads, and over the queries that see the token; float32.

    Args:
        by_first: of the first query (a CLS token) alone.

    Returns:
        (S,) each.
    """
    attention = []
    for number in range(len(call.query)):
        query, key, seen = call.query[number], call.key[number], None
        if call.mask is not None:
            mask = call.mask[min(number, len(call.mask) - 1)].amax(0)  # (S, S), of any head
            seen = attended(mask)
            seen = seen & seen.diagonal()[:, None]  # padding does not count as a query
        bounds = [0, query.shape[1]] if call.bounds is None else call.bounds.tolist()
        for first, end in pairwise(bounds):
            part = slice(first, end)
            inside = None if seen is None else seen[part, part]
            attention.append(_received(query[:, part], key[:, part], call.scale, inside, by_first))
    return attention


def _received(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    seen: torch.Tensor | None,
    by_first: bool,
) -> torch.Tensor:
    """Return (S,) of one sequence; `seen` is (S, S) bool, None where all is seen."""
    heads, length, _ = query.shape
    keys = key.float().transpose(1, 2)  # (KV, D, S)
    total = keys.new_zeros(length)
    num_rows = 1 if by_first else length
    step = max(1, CHUNK // (heads * length))
    for first in range(0, num_rows, step):
        part = slice(first, min(first + step, num_rows))
        visible = None if seen is None else seen[part]
        rows = _softmax(query[:, part], keys, scale, visible).mean(0)  # (r, S)
        total += rows.sum(0) if visible is None else (rows * visible).sum(0)
    return total / (num_rows if seen is None else seen[:num_rows].sum(0).clamp_min(1))


def _softmax(
    query: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    seen: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (H, r, T) float32 attention of queries (H, r, D) to keys (KV, D, T).

    Args:
        seen: (r, T) bool, the keys that each query sees; None: all.
        bias: (H, r, T) added to the scores; None: nothing.
    """
    heads, rows, width = query.shape
    grouped = (query.float() * scale).reshape(len(keys), -1, width)  # (KV, group x r, D)
    scores = (grouped @ keys).view(heads, rows, -1)
    if bias is not None:
        scores = scores + bias.float()
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)
