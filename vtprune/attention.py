"""Attention of a few query rows, read on the way from any kernel that transformers has."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vtprune.errors import ModelError

CHUNK = 2**26  # elements of a score tensor that is held at once
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, eq=False)
class Rows:
    """Which attention rows of one sample are wanted, and which keys they may see.

    Args:
        queries: (R,) int64 ascending slots of this forward's sequence.
        valid: (S,) bool of its slots; False on padding.
        past: (P,) bool of the keys that the cache held before; all True where all are valid.
    """

    queries: torch.Tensor
    valid: torch.Tensor
    past: torch.Tensor


class Tap:
    """Reads attention rows while one attention module runs, whatever its kernel.

    `enter` and `leave` are to be hooked around the module's forward. Every attention module of
    transformers asks a registry for its kernel by name. While the module
    runs, the name leads to `read`, which is given the same queries and keys, with norms and rotary
    positions applied, and passes them on to the kernel. Nothing in the model is changed.

    Args:
        module: the attention module.
        kernel: the name its config has for the kernel.
        take: gets the queries (B, H, S, D), keys (B, KV, P + S, D) and the scale of the scores.

    Raises:
        ModelError: the module asks no registry.
    """

    def __init__(
        self,
        module: nn.Module,
        kernel: str,
        take: Callable[[torch.Tensor, torch.Tensor, float], None],
    ) -> None:
        self.module, self.kernel, self.take = module, kernel, take
        names = vars(sys.modules[type(module).__module__])
        registry = names.get("ALL_ATTENTION_FUNCTIONS")
        if not isinstance(registry, MutableMapping):
            raise ModelError(
                f"{type(module).__name__} does not say what its attention kernel is given",
                "use a method that reads no attention, such as entropy, dart or random",
            )
        self.registry = registry
        self.plain: Attend | None = names.get("eager_attention_forward")
        self.own: dict[str, Attend] = getattr(registry, "_local_mapping", {})
        self.before: Attend | None = None

    def enter(self, module: nn.Module, args: object) -> None:
        """A hook before the module's forward."""
        self.before = self.own.get(self.kernel)
        self.registry[self.kernel] = self.read

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """A hook after the module's forward, also after one that raised."""
        if self.before is None:
            del self.registry[self.kernel]
        else:
            self.registry[self.kernel] = self.before

    def read(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The kernel's place in the registry."""
        if module is self.module:
            scale = kwargs.get("scaling")
            self.take(query, key, float(scale) if scale else query.shape[-1] ** -0.5)  # type: ignore[arg-type]
        return self.attend()(module, query, key, value, *args, **kwargs)

    def attend(self) -> Attend:
        """The kernel that the module asked for."""
        if self.before is not None:
            return self.before
        kernels: MutableMapping[str, Attend] = getattr(self.registry, "_global_mapping", {})
        found = kernels.get(self.kernel, self.plain)
        assert found is not None
        return found


def attention_rows(
    query: torch.Tensor, key: torch.Tensor, scale: float, wanted: Sequence[Rows]
) -> list[torch.Tensor]:
    """For every sample the attention of its rows to this forward's slots, mean over heads.

    The softmax is over all keys that a row sees, those of the cache too, in float32.

    Args:
        query: (B, H, S, D), rotary positions applied.
        key: (B, KV, P + S or more, D); slots past P + S of a static cache are left out.

    Returns:
        For every sample (R, S) float32.
    """
    return [
        _rows_of_one(query[number], key[number], scale, rows) for number, rows in enumerate(wanted)
    ]


def _rows_of_one(query: torch.Tensor, key: torch.Tensor, scale: float, rows: Rows) -> torch.Tensor:
    device = query.device
    heads, num_slots, width = query.shape
    num_past = len(rows.past)
    total = num_past + num_slots
    keys = key[:, :total].float().transpose(1, 2)  # (KV, D, P + S)
    valid = torch.cat([rows.past, rows.valid]).to(device)
    slots = torch.arange(total, device=device)
    parts = []
    for part in rows.queries.to(device).split(max(1, CHUNK // (heads * total))):
        picked = query[:, part].float() * scale  # (H, r, D)
        grouped = picked.reshape(len(keys), -1, width)  # (KV, group x r, D)
        scores = (grouped @ keys).view(heads, len(part), total)
        seen = valid & (slots <= (part + num_past)[:, None])  # (r, P + S)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        parts.append(scores.softmax(-1).mean(0)[:, num_past:])
    return torch.cat(parts)
