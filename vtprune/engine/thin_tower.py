"""A vision tower that gets fewer frames and tiles than it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import torch
from torch import nn

from vtprune.engine.thinning import other_media
from vtprune.errors import ModelError
from vtprune.models.adapters import running_module
from vtprune.models.seams import unknown

Kwargs = dict[str, object]
Before = Callable[
    [nn.Module, tuple[object, ...], Kwargs], tuple[tuple[object, ...], Kwargs]
]  # fmt: skip
After = Callable[[nn.Module, object, object], object]
TOWERS = ("vision_tower", "image_tower", "video_tower", "vision_model", "visual")
PROJECTORS = ("multi_modal_projector", "connector")
FULL = ("pooler_output", "deepstack_features")
"""What is read of the output of a tower that takes grids: one row a token."""


@dataclass
class Thinned:
    """One call of an encoder that gets fewer rows than it was called with.

    Args:
        rows: (U,) bool: those that it gets.
        tokens: (N,) bool: those of their tokens; set by a tower that takes grids.
        ran: whether a tower was called.
    """

    rows: torch.Tensor
    tokens: torch.Tensor | None = None
    ran: bool = False

    def hooks(self, inner: nn.Module) -> list[tuple[nn.Module, Before, After]]:
        """(module, forward pre-hook with keyword arguments, forward hook) of towers and projectors.

        Args:
            inner: the multimodal model.
        """
        found: list[tuple[nn.Module, Before, After]] = []
        for name in (*TOWERS, *PROJECTORS):
            module = getattr(inner, name, None)
            if not isinstance(module, nn.Module):
                continue
            module = running_module(module)
            takes = inspect.signature(module.forward).parameters
            if name in TOWERS:
                found.append((module, self.before_tower, self.after_tower))
            elif len(takes) == 1:  # Molmo2's takes numbers of patches, which count all of them
                found.append((module, self.before_projector, self.after_projector))
        return found

    def check_ran(self) -> None:
        """Raises a ModelError where the tower's hooks did not run."""
        if not self.ran:
            raise ModelError(
                "the vision tower is not called as a module, so nothing goes before it (compiled?)",
                "load the model uncompiled, or cut at the input",
            )

    def before_tower(
        self, tower: nn.Module, args: tuple[object, ...], kwargs: Kwargs
    ) -> tuple[tuple[object, ...], Kwargs]:
        """A tower's arguments by name, without the rows that go.

        Raises:
            ModelError: they are not those of the media.
        """
        self.ran = True
        given = {**inspect.signature(tower.forward).bind_partial(*args).arguments, **kwargs}
        if "grid_thw" in given:
            return (), self.drop_steps(tower, given)
        rows = [one for one in given.values() if isinstance(one, torch.Tensor)]
        if not rows or len(rows[0]) != len(self.rows):
            raise other_media()
        return (), {name: self.drop(value) for name, value in given.items()}

    def drop_steps(self, tower: nn.Module, given: Kwargs) -> Kwargs:
        """Likewise, of patches one after the other with a grid (steps, rows, columns) an item.

        Every step attends to itself alone, so a step is a row.
        """
        grid = given["grid_thw"]
        assert isinstance(grid, torch.Tensor)
        shapes, rows = grid.cpu(), self.rows
        steps = shapes[:, 0]
        sizes = (shapes[:, 1] * shapes[:, 2]).repeat_interleave(steps)  # patches of each row
        if len(sizes) != len(rows):
            raise other_media()
        self.tokens = rows.repeat_interleave(sizes // int(tower.spatial_merge_size) ** 2)  # type: ignore[arg-type]
        patches = rows.repeat_interleave(sizes)
        changed: Kwargs = {}
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and name != "grid_thw":
                if len(value) != len(patches):
                    raise ModelError(
                        f"the vision tower is given {name}, which counts all frames",
                        "leave it to the model, or cut at the input",
                    )
                value = take(value, patches)
            changed[name] = value
        left = torch.stack([own.sum() for own in rows.split(steps.tolist())])
        short = torch.cat([left[:, None], shapes[:, 1:]], dim=1)[left > 0]
        return {**changed, "grid_thw": short.to(grid)}

    def after_tower(self, tower: nn.Module, args: object, output: object) -> object:
        """A tower's output at its full length; rows that went are zero.

        Of a tower that takes grids only what is read of it: the rest may be in another order.
        """
        if self.tokens is None:
            return self.restore(output, self.rows)
        given = [name for name in FULL if getattr(output, name, None) is not None]
        if not given:
            raise unknown(f"the output of the vision tower has no {' or '.join(FULL)}")
        for name in given:
            setattr(output, name, self.restore(getattr(output, name), self.tokens))
        return output

    def before_projector(
        self, projector: nn.Module, args: tuple[object, ...], kwargs: Kwargs
    ) -> tuple[tuple[object, ...], Kwargs]:
        """A projector's argument, without the rows that go."""
        changed = {name: self.drop(value) for name, value in kwargs.items()}
        return tuple(self.drop(one) for one in args), changed

    def after_projector(self, projector: nn.Module, args: object, output: object) -> object:
        """A projector's output at its full length."""
        return self.restore(output, self.rows)

    def drop(self, value: object) -> object:
        """The rows that stay, of a tensor that has them all."""
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == len(self.rows):
            return take(value, self.rows)
        return value

    def restore(self, value: object, rows: torch.Tensor) -> object:
        """All of `rows`, of tensors that have those that stay."""
        if isinstance(value, MutableMapping):
            for name in list(value):
                value[name] = self.restore(value[name], rows)
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(self.restore(one, rows) for one in value)
        if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != int(rows.sum()):
            return value
        full = value.new_zeros(len(rows), *value.shape[1:])
        return full.index_copy(0, rows.nonzero().squeeze(1).to(value.device), value)


def take(value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of `value` that are True in `rows`."""
    return value.index_select(0, rows.nonzero().squeeze(1).to(value.device))
