"""What is put on a model's modules, to be taken off together: the only hooks in the project."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from vtprune.attention import Tap

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Hooks:
    """Hooks and replaced methods of some modules; as a `with` block they come off at its end."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.replaced: list[tuple[nn.Module, str, object]] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def before(self, module: nn.Module, hook: Callable[..., object]) -> None:
        """Calls `hook(module, args, kwargs)` before a module's forward."""
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., object]) -> None:
        """Calls `hook(module, args, output)` after a module's forward."""
        self.handles.append(module.register_forward_hook(hook))

    def at_end(self, module: nn.Module, hook: Callable[..., object]) -> None:
        """Calls `hook(module, args, kwargs, output)`, with output None if the forward raised."""
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=True)
        self.handles.append(handle)

    def around(self, tap: Tap) -> None:
        """Reads the attention of a tap's module in every forward."""
        self.handles += [
            tap.module.register_forward_pre_hook(tap.enter),
            tap.module.register_forward_hook(tap.leave, always_call=True),
        ]

    def replace(self, module: nn.Module, name: str, function: Callable[..., object]) -> None:
        """Puts `function` in the place of one of a module's methods."""
        self.replaced.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = function

    def remove(self) -> None:
        """Takes everything off; the modules are as they were found."""
        for handle in self.handles:
            handle.remove()
        for module, name, before in reversed(self.replaced):
            if before is None:
                del module.__dict__[name]
            else:  # another method of this one object, which was there before the block
                module.__dict__[name] = before
        self.handles, self.replaced = [], []
