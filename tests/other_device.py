"""CUDA devices that are not there: tensors that say they are on one, held by the CPU.

`with devices() as there:` makes "cuda:0" of this process, `devices(2)` "cuda:1" as well. Every
tensor that is made on them or copied to them is a `Remote`: it says its device, and holds a tensor
of the CPU that does the work. What CUDA refuses is refused: tensors of two devices in one operation
(but for single numbers and indices from the CPU), `numpy()`, another device's generator. What makes
a host wait for CUDA (PyTorch 2.4 to 2.13) is noted, with the lines that asked for it:

- values that Python is given: `item()`, `tolist()`, `bool()`, `int()`, an index that is a number;
- operations whose result's size or success depends on values: `nonzero`, boolean indices, `unique`,
  `bincount`, `equal`, counts of `repeat_interleave`, eigenvalues;
- copies to the host and to the device, unless they are `non_blocking`; hidden ones too: indices and
  lists from the CPU, a number that is written to places by index, one for `where`;
- `torch.cuda.synchronize()`, and an event that is waited for before the host has waited for
  anything later. Until then a copy to the host that is `non_blocking` holds something else.

Arithmetic is the CPU's, in the tensors' own dtype, so that results can be held against a CPU's bit
for bit. A GPU's kernels round otherwise; nothing here says anything of them, or of time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.hooks import RemovableHandle

import vtprune

aten = torch.ops.aten
OURS = str(Path(vtprune.__file__).parent)
MEMORY = 2**33
"""Bytes of each device."""
READS = {
    aten._local_scalar_dense: "item",
    aten.equal: "equal",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten._unique: "unique",
    aten._unique2: "unique",
    aten.unique_dim: "unique",
    aten.unique_consecutive: "unique",
    aten.unique_dim_consecutive: "unique",
    aten.bincount: "bincount",
    aten.multinomial: "multinomial",
    aten._linalg_check_errors: "linalg",
    aten._linalg_eigh: "linalg",
    aten._linalg_svd: "linalg",
    aten.linalg_eig: "linalg",
    aten.repeat_interleave: "repeat_interleave",
}
"""Operations whose kernels on CUDA read the device: for a value, for the size of what they give, or
for whether they failed."""
VALUES = {
    torch.Tensor.item: "item",
    torch.Tensor.tolist: "tolist",
    torch.Tensor.__bool__: "bool",
    torch.Tensor.__int__: "item",
    torch.Tensor.__index__: "item",
    torch.Tensor.__float__: "item",
}
"""What gives Python's own values."""
WHOLE = {
    functional.scaled_dot_product_attention: functional.scaled_dot_product_attention,
    torch.Tensor.contiguous: torch.Tensor.contiguous,
    torch.Tensor.__invert__: torch.Tensor.__invert__,
    torch.Tensor.copy_: aten.copy_.default,
    torch.Tensor.nonzero: aten.nonzero.default,
}
"""Functions that ask CUDA itself before they come to an operation, and what stands for them."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
FILLED = {aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_}
"""Operations that read the number that they fill in, where it is on the device."""
COPIES = {aten.copy_, aten._to_copy, aten._copy_from}
NUMBERS_TOO = {aten.where, aten.fill_, aten.fill, *FILLED}
"""Operations that take a number from the CPU beside those that go element by element."""


@dataclass(frozen=True)
class Wait:
    """One wait of the host for a device.

    Args:
        kind: the operation, or "to host" and "to device" for copies.
        stack: what called what, the innermost frame first: (file, line, function).
        forward: the number of the model's forward, from 1 (the prompt's); 0 before it.
    """

    kind: str
    stack: tuple[tuple[str, int, str], ...]
    forward: int

    @property
    def place(self) -> str | None:
        """The line of vtprune that asked for it; None where other code did."""
        file, line, _ = self.stack[0]
        return f"{file.removeprefix(OURS + '/')}:{line}" if file.startswith(OURS) else None

    def inside(self, *functions: str) -> bool:
        """Return whether a function of vtprune of one of these names was running."""
        return any(name in functions for file, _, name in self.stack if file.startswith(OURS))


@dataclass
class Devices:
    """What was noted on the devices.

    Args:
        waits: of the host, in their order.
        forward: that is counted into `Wait.forward`.
    """

    waits: list[Wait] = field(default_factory=list)
    forward: int = 0

    def wait(self, kind: str) -> None:
        """Note that the host waits."""
        self.waits.append(Wait(kind, _stack(), self.forward))

    def count_forwards(self, model: nn.Module) -> RemovableHandle:
        """Note from here on in which of a model's forwards the host waits."""
        self.waits.clear()
        self.forward = 0

        def count(module: nn.Module, args: object) -> None:
            self.forward += 1

        return model.register_forward_pre_hook(count)


NOTED: list[Devices] = []
"""Those of the blocks that are open."""
SKIPPED = (str(Path(torch.__file__).parent), __file__)


def _stack() -> tuple[tuple[str, int, str], ...]:
    frame, frames = sys._getframe(1), []
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(SKIPPED):
            frames.append((file, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(frames)


@dataclass
class Queue:
    """What the devices were given and need not have done: all is done where the host waits.

    Args:
        waits: of the host so far.
        copies: to the host: the tensor there, and what it will hold.
    """

    waits: int = 0
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def finish(self) -> None:
        self.waits += 1
        copies, self.copies = self.copies, []
        for here, value in copies:
            here.copy_(value)


QUEUE = Queue()


class Event:
    """In the place of `torch.cuda.Event`: noted once the host has waited for anything after it."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing

    def record(self, stream: object = None) -> None:
        self.waits, self.seconds = QUEUE.waits, time.perf_counter()

    def query(self) -> bool:
        return self.waits < QUEUE.waits

    def synchronize(self) -> None:
        if not self.query():
            _wait("event")

    def elapsed_time(self, last: Event) -> float:
        if not (self.timed and last.timed and self.query() and last.query()):
            raise RuntimeError("an event that takes no time, or that is still to come")
        return 1000 * (last.seconds - self.seconds)


def _wait(kind: str) -> None:
    QUEUE.finish()
    for devices in NOTED:
        devices.wait(kind)


class Remote(torch.Tensor):
    """A tensor on a device that is not there."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Remote:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Remote({self.held!r}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What does not come to be an operation, or comes too late."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs["device"] = _indexed(kwargs["device"])
        place = args[1] if func is torch.Tensor.to and len(args) > 1 else None
        if isinstance(place, (str, int, torch.device)):
            args = (args[0], _indexed(place), *args[2:])
        if func is torch.device and isinstance(args[0], int):
            return torch.device("cuda", args[0])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            target = kwargs.pop("device")
            return func(*tree_map_only(Remote, _number, args), **kwargs).to(target)
        if not args or not isinstance(args[0], Remote):
            return func(*args, **kwargs)
        if func in VALUES:
            _wait(VALUES[func])
            return func(args[0].held)
        if func is torch.Tensor.data_ptr:
            return func(args[0].held)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError(
                f"can't convert {args[0].device} device type tensor to numpy. Use Tensor.cpu() to "
                "copy the tensor to host memory first."
            )
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return _index(func, *args)
        if func in WHOLE:
            return _run(WHOLE[func], args, kwargs)
        return func(*args, **kwargs)


def _number(tensor: Remote) -> torch.Tensor:
    """Return one of the tensors that a list of numbers was made of."""
    _wait("item")
    return tensor.held


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


# -- one operation ---------------------------------------------------------------------------------


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what CUDA does with an operation: refuse, note, work it out, and say where that is."""
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    remote = [leaf for leaf in leaves if isinstance(leaf, Remote)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else _indexed(wanted)
    away = wanted is not None and wanted.type == "cuda"
    if not remote and not away:
        return func(*args, **kwargs)
    packet = getattr(func, "overloadpacket", func)
    if packet in COPIES:
        return _copy(func, packet, args, kwargs, wanted)
    if (generator := kwargs.get("generator")) is not None and generator.device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    where = wanted or _common_device(func, packet, args, leaves, remote)
    _note(packet, args)
    held, unwrapped = _unwrap(args, kwargs)
    if wanted is not None:
        unwrapped["device"] = "cpu"
    if packet is aten.histc and not held[0].is_floating_point():  # a CPU counts only those
        return Remote(func(held[0].float(), *held[1:], **unwrapped).to(held[0].dtype), where)
    before = {id(leaf.held): leaf for leaf in remote}
    result = func(*held, **unwrapped)

    def give(part: torch.Tensor) -> torch.Tensor:
        if where.type != "cuda":
            return part
        same = before.get(id(part))
        if same is None:
            return Remote(part, where)
        if same.shape != part.shape:  # changed in place: what says the device says the shape too
            with no_dispatch():
                func(*args, **kwargs)
        return same

    return tree_map_only(torch.Tensor, give, result)


def _unwrap(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, Remote) else leaf, (args, kwargs))


def _indexed(device: torch.device | str | int) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", 0)
    return device


def _common_device(
    func: Any, packet: Any, args: tuple[Any, ...], leaves: list[torch.Tensor], remote: list[Remote]
) -> torch.device:
    """Return the device of an operation's tensors.

    Raises:
        RuntimeError: they are on several, as CUDA has it.
    """
    where = remote[0].device
    if packet in INDEXING:
        where = args[0].device
        for index in args[1]:
            if index is None or index.device == where:
                continue
            if index.device.type != "cpu":
                raise RuntimeError(
                    f"indices should be either on cpu or on the same device as the indexed tensor "
                    f"({where})"
                )
            _wait("to device")  # CUDA copies them
        leaves = [args[0], *args[2:3]]
    number = packet in INDEXING | NUMBERS_TOO or torch.Tag.pointwise in getattr(func, "tags", ())
    for leaf in leaves:
        if leaf.device == where:
            continue
        in_place = leaf is args[0] and str(packet).endswith("_")
        if number and not leaf.dim() and leaf.device.type == "cpu" and not in_place:
            continue
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{where} and {leaf.device}! ({func})"
        )
    return where


def _note(packet: Any, args: tuple[Any, ...]) -> None:
    """Note an operation that makes the host wait."""
    if packet in READS:
        if packet is aten.repeat_interleave and not isinstance(args[-1], torch.Tensor):
            return
        _wait(READS[packet])
    if packet in INDEXING:
        _note_index([index for index in args[1] if index is not None], args[2:3])
    if packet is aten.where and any(part.device.type == "cpu" for part in args):
        _wait("to device")  # CUDA copies numbers from the CPU
    if packet in FILLED and isinstance(args[-1], Remote):
        _wait("item")


def _note_index(indices: list[torch.Tensor], value: Sequence[Any]) -> None:
    """Note an index by tensors; with a value, it is written there."""
    masks = [index for index in indices if index.dtype == torch.bool]
    number = bool(value) and not getattr(value[0], "ndim", 0) and not isinstance(value[0], Remote)
    if masks and not (number and len(masks) == len(indices)):  # a number is filled in by a mask
        _wait("boolean index")
    elif number and not masks:
        _wait("to device")


def _index(func: Any, tensor: torch.Tensor, index: Any, *value: Any) -> Any:
    """Read or write a part of a tensor, as `tensor[index]` does."""
    where = tensor.device
    parts = list(index) if isinstance(index, tuple) else [index]
    for part in parts:
        if isinstance(part, list):
            _wait("to device")  # a tensor is made of it on the CPU, and copied
        if not isinstance(part, torch.Tensor):
            continue
        single = not part.dim() and part.dtype not in (torch.bool, torch.uint8)
        if single and part.device.type != "cpu":
            _wait("item")
        elif not single and part.device != where:
            if part.device.type != "cpu":
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    f"({where})"
                )
            _wait("to device")
    tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.dim()]
    lists = any(isinstance(part, list) for part in parts)
    for given in value:
        if isinstance(given, torch.Tensor) and given.dim() and given.device != where:
            if tensors or lists:
                raise RuntimeError(f"values are on {given.device}, and what they go into {where}")
            _wait("to device" if where.type == "cuda" else "to host")
        elif isinstance(given, Remote) and where.type == "cpu":
            _wait("to host")
    if where.type == "cuda" and tensors:
        _note_index(tensors, value)
    held = [part.held if isinstance(part, Remote) else part for part in (*parts, tensor, *value)]
    parts, rest = held[: len(parts)], held[len(parts) :]
    index = tuple(parts) if isinstance(index, tuple) else parts[0]
    numbers = where.type == "cuda" and value and not tensors and not isinstance(value[0], Remote)
    if numbers and not rest[0][index].dim():  # into one place: copied, not filled in
        _wait("to device")
    result = func(rest[0], index, *rest[1:])
    return result if value or where.type != "cuda" else Remote(result, where)


def _copy(
    func: Any,
    packet: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wanted: torch.device | None,
) -> torch.Tensor:
    """Copy inside a device, from one to another, or from or to the host."""
    if packet is aten._to_copy:
        source, target = args[0].device, wanted or args[0].device
        non_blocking = kwargs.get("non_blocking", False)
    else:
        source, target = args[1].device, args[0].device
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    numbers = packet is not aten._to_copy and source.type == "cpu" and not args[1].dim()
    if source.type == "cuda" and target.type == "cpu":
        if non_blocking and packet is aten._to_copy:
            value = func(*_unwrap(args[:1], {})[0], **(kwargs | {"device": target}))
            value = value.clone()  # what the device does later does not change it
            here = value * torch.nan if value.is_floating_point() else ~value
            QUEUE.copies.append((here, value))
            return here
        _wait("to host")
    elif source.type == "cpu" and target.type == "cuda" and not non_blocking and not numbers:
        _wait("to device")
    held, unwrapped = _unwrap(args, kwargs)
    if wanted is not None:
        unwrapped["device"] = "cpu"
    result = func(*held, **unwrapped)
    if packet is not aten._to_copy:
        return args[0]
    return Remote(result, target) if target.type == "cuda" else result


# -- torch.cuda ------------------------------------------------------------------------------------


@contextmanager
def devices(count: int = 1, free: int = MEMORY) -> Iterator[Devices]:
    """Have CUDA devices inside the block.

    Args:
        count: how many.
        free: bytes that each says are free.
    """
    torch._C._ensureCUDADeviceGuardSet()
    noted = Devices()
    properties = SimpleNamespace(total_memory=MEMORY, name="a device that is not here")
    fakes: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: _wait("synchronize"),
        "current_stream": lambda device=None: None,
        "Event": Event,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (free, MEMORY),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "max_memory_allocated": lambda device=None: MEMORY - free,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_device_capability": lambda device=None: (9, 0),
    }
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        NOTED.append(noted)
        try:
            yield noted
        finally:
            NOTED.remove(noted)


def move(module: nn.Module, device: str) -> nn.Module:
    """Put a module's weights on a device, as `to` does; return it."""
    moved: dict[int, torch.Tensor] = {}  # weights that several modules share stay so
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    copy = tensor.detach().to(device)
                    if isinstance(tensor, nn.Parameter):
                        copy = nn.Parameter(copy, requires_grad=False)
                    moved[id(tensor)] = copy
                tensors[name] = moved[id(tensor)]  # type: ignore[assignment]
    return module
