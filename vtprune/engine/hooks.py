"""Hooks and replaced methods, each for one thread or for all: the only hooks in the project."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtprune.device import Duration

if TYPE_CHECKING:
    from vtprune.engine.plan import PlannedBatch

POINTS = "_vtprune_points"
ALL_THREADS = None
LOCK = threading.RLock()
"""Held while hooks are put on and taken off. Calls through a point take no lock."""

Hook = Callable[..., object]


class _Thread(threading.local):
    """The key of the running thread; unlike its ident, no later thread gets the same."""

    def __init__(self) -> None:
        self.key = object()


_THREAD = _Thread()


def this_thread() -> object:
    """Return the key of the running thread."""
    return _THREAD.key


class Point:
    """Where the hooks of all threads meet: before or after a module's forward, or at a method.

    PyTorch and Python have one place for all threads. What stands there, from the first hook to the
    last, calls the hooks for all threads and then those of the thread that it runs in.
    """

    def __init__(self) -> None:
        self.hooks: dict[object, tuple[Hook, ...]] = {}
        self.take_off: Callable[[], None] = _nothing

    def __deepcopy__(self, memo: object) -> Point:
        """Return itself: copies of a hooked model share its hooks, which then refuse them."""
        return self

    def here(self) -> tuple[Hook, ...]:
        """Return the hooks that the running thread's calls go through."""
        hooks = self.hooks
        return hooks.get(ALL_THREADS, ()) + hooks.get(_THREAD.key, ())

    def before(self, module: nn.Module, args: object, kwargs: object = None) -> object:
        """Run the hooks before a forward.

        PyTorch (2.11 to 2.13) notes only after it has put a hook on, and only until it takes it
        off, that the hook wants keyword arguments. A thread that calls the module at that very
        moment comes without them, but then none of the hooks here are for it.
        """
        changed = None
        for hook in self.here():
            result = hook(module, args, kwargs)
            if result is not None:
                changed = result
                args, kwargs = result  # type: ignore[misc]
        return changed

    def after(self, module: nn.Module, args: object, output: object) -> object:
        """Run the hooks after a forward; the output is None if it raised."""
        changed = None
        for hook in self.here():
            result = hook(module, args, output)
            if result is not None:
                output = changed = result
        return changed

    def call(self, original: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Call a replaced method: the hooks around it, the last one outermost."""
        function = original
        for hook in self.here():
            function = functools.partial(hook, function)
        return function(*args, **kwargs)


def _nothing() -> None:
    pass


class Hooks:
    """Hooks and replaced methods of some modules; as a `with` block they come off at its end.

    Args:
        thread: the key of the thread whose calls go through them; None: calls from all threads.
    """

    def __init__(self, thread: object | None) -> None:
        self.thread = thread
        self.held: list[tuple[object, str, Hook]] = []
        self.inner: list[Hooks] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def before(self, module: nn.Module, hook: Hook) -> None:
        """Call `hook(module, args, kwargs)` before a module's forward."""
        put_on = functools.partial(module.register_forward_pre_hook, with_kwargs=True)
        self._add(module, "before", hook, lambda point: put_on(point.before).remove)

    def after(self, module: nn.Module, hook: Hook) -> None:
        """Call `hook(module, args, output)` after a module's forward."""
        put_on = module.register_forward_hook
        self._add(module, "after", hook, lambda point: put_on(point.after).remove)

    def at_end(self, module: nn.Module, hook: Hook) -> None:
        """Call `hook(module, args, output)`, with output None if the forward raised."""
        put_on = functools.partial(module.register_forward_hook, always_call=True)
        self._add(module, "at_end", hook, lambda point: put_on(point.after).remove)

    def replace(self, owner: object, name: str, hook: Hook) -> None:
        """Call `hook(original, *args, **kwargs)` in the place of one of an object's methods."""

        def put_on(point: Point) -> Callable[[], None]:
            before = dict(vars(owner))
            original = getattr(owner, name)
            vars(owner)[name] = functools.wraps(original)(functools.partial(point.call, original))

            def take_off() -> None:
                if name in before:
                    vars(owner)[name] = before[name]
                else:
                    del vars(owner)[name]

            return take_off

        self._add(owner, f"method {name}", hook, put_on)

    def replace_during(self, module: nn.Module, owner: object, name: str, hook: Hook) -> None:
        """Replace one of an object's methods only while a module's forward runs."""
        inner = Hooks(self.thread)
        self.inner.append(inner)
        self.before(module, lambda *_: inner.replace(owner, name, hook))
        self.at_end(module, lambda *_: inner.remove())

    def _add(
        self,
        owner: object,
        kind: str,
        hook: Hook,
        put_on: Callable[[Point], Callable[[], None]],
    ) -> None:
        with LOCK:
            points: dict[str, Point] = vars(owner).setdefault(POINTS, {})
            if kind not in points:
                points[kind] = Point()
                points[kind].take_off = put_on(points[kind])
            hooks = points[kind].hooks
            hooks[self.thread] = (*hooks.get(self.thread, ()), hook)
            self.held.append((owner, kind, hook))

    def remove(self) -> None:
        """Take everything off; what no other thread has hooks on is as it was found."""
        for inner in self.inner:
            inner.remove()
        self.inner = []
        if not self.held:
            return
        with LOCK:
            for owner, kind, hook in reversed(self.held):
                points: dict[str, Point] = vars(owner)[POINTS]
                point = points[kind]
                left = tuple(other for other in point.hooks[self.thread] if other is not hook)
                if left:
                    point.hooks[self.thread] = left
                else:
                    del point.hooks[self.thread]
                if not point.hooks:
                    point.take_off()
                    del points[kind]
                if not points:
                    del vars(owner)[POINTS]
            self.held = []


def is_hooked(module: object) -> bool:
    """Return whether the running thread's calls of a module go through hooks before it."""
    return not {ALL_THREADS, this_thread()}.isdisjoint(threads_before(module))


def threads_before(module: object) -> set[object]:
    """Return the threads that have hooks before a module's forward; None stands for all of them."""
    point = vars(module).get(POINTS, {}).get("before")
    return set(point.hooks) if point else set()


class ThreadState(threading.local):
    """What a block noted of the running thread's calls: every thread sees attributes of its own.

    Transformers' generation calls the encoders, then the model, then its decoder, all in one
    thread.

    Attributes:
        calls: modality -> the arguments of its encoder's last call by name, and under the name of
            the state what its tower attended to, if a method asks.
        prefilled: the calls whose features the last prompt with visual tokens took.
        encoding: whether an encoder runs.
        encoded: how long all encoder calls since the last prefill took.
        found: (row of the batch, modality) whose features they had from the disk.
        batch: the prompts with visual tokens that the decoder is to be given; None: it is not.
        modalities: that were encoded for them, here or before the block.
        uncached: (B, S) ids of the last prompt, if that was given no cache.
        hooks: of the decoder's forward that runs.
    """

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, object]] = {}
        self.prefilled: dict[str, dict[str, object]] = {}
        self.encoding = False
        self.encoded = Duration()
        self.found: set[tuple[int, str]] = set()
        self.batch: PlannedBatch | None = None
        self.modalities: tuple[str, ...] = ()
        self.uncached: torch.Tensor | None = None
        self.hooks = Hooks(this_thread())
