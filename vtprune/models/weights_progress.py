"""How many bytes of a model's weights are downloaded, loaded and read."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from vtprune.process_settings import ProcessSetting

if TYPE_CHECKING:
    from vtprune.models.loading import Progress

DOWNLOADING, LOADING, READING = (
    f"{what} weights (MB)" for what in ("downloading", "loading", "reading")
)
MB, PAGE = 1_000_000, 4096
# The bar that transformers 5.17 to 5.24 show while they give a model its weights.
TRANSFORMERS_BAR = "Loading weights"


class DownloadBar(tqdm):
    """A bar of the hub client, which shows nothing itself; see `download_bar`."""

    on_progress: ClassVar[Progress | None] = None
    expected: ClassVar[int] = 0  # bytes of all files, where it is known before each is begun
    # The client has two bars of one download by Xet: of the bytes on the disk, and of those on the
    # way, which are packed and end at a total of their own (huggingface_hub 2.4).
    furthest: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"file": io.StringIO()})  # it ends its lines there

    def display(self, *args: object, **kwargs: object) -> None:
        kind = type(self)
        if kind.on_progress and self.unit == "B" and self.total:
            kind.furthest = max(kind.furthest, int(self.n))
            kind.most = max(kind.most, int(self.total))
            total = kind.expected if kind.expected > 0 else kind.most
            kind.on_progress(DOWNLOADING, min(kind.furthest, total) // MB, total // MB)


def download_bar(on_progress: Progress | None) -> type[DownloadBar]:
    """Return a class for the bars of one checkpoint's download."""
    step = None if on_progress is None else staticmethod(on_progress)
    return type("DownloadBar", (DownloadBar,), {"on_progress": step})


@contextmanager
def count_loaded(num_bytes: Mapping[str, int], on_progress: Progress | None) -> Iterator[None]:
    """Show the bytes of the weights that transformers has given to a model of this thread.

    Args:
        num_bytes: of every weight, by its name in the checkpoint's files.
    """
    total = sum(num_bytes.values()) // MB

    def count(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        done = 0
        for name, mapping in items:
            yield name, mapping
            sources = getattr(mapping, "layer_targets", {}).values()
            done += sum(num_bytes.get(key, 0) for keys in sources for key in keys)
            assert on_progress is not None
            on_progress(LOADING, done // MB, total)

    if on_progress is None:
        yield
        return
    with _BARS_REPLACED:
        _OF_THREAD.count = count
        try:
            yield
        finally:
            _OF_THREAD.count = None


_OF_THREAD = threading.local()


@contextmanager
def _replace_bars() -> Iterator[None]:
    from transformers.utils import logging

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        count = getattr(_OF_THREAD, "count", None)
        if count is not None and kwargs.get("desc") == TRANSFORMERS_BAR:
            return count(args[0])
        return factory(*args, **kwargs) if before is None else before(factory, args, kwargs)

    before = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


_BARS_REPLACED = ProcessSetting(_replace_bars)


def read_weights_in(model: nn.Module, device: torch.device, on_progress: Progress | None) -> None:
    """Move a model to a device; on a CPU, read every page of weights that are mapped files.

    Mapped weights are read by the first forward otherwise: in silence, and as its time.
    """
    weights = list(model.parameters())
    done, total = 0, sum(weight.nbytes for weight in weights)
    with torch.no_grad():
        for weight in weights:
            if device.type != "cpu":
                weight.data = weight.data.to(device)
            elif weight.is_contiguous() and weight.numel():
                weight.detach().flatten().view(torch.uint8)[::PAGE].max()
            done += weight.nbytes
            if on_progress:
                on_progress(READING, done // MB, total // MB)
    model.to(device)
