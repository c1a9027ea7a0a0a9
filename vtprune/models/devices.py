"""Where a model's weights go, and in which numbers."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from vtprune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEVICES = ("auto", "cpu", "cuda", "mps", "map")
QUANTIZED = ("4bit", "8bit")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def find_device(name: str) -> torch.device:
    """Return the device for a name.

    Raises:
        ModelError: not a device, or not there.
    """
    kind = name.split(":")[0]
    if kind not in DEVICES or not re.fullmatch(r"[a-z]+(:\d+)?", name):
        raise ModelError(f"device {name!r} is not known", f"one of {', '.join(DEVICES)}")
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name in ("auto", "map"):
        return torch.device(next((kind for kind, available in has.items() if available), "cpu"))
    device = torch.device(name)
    available = has.get(kind, True)
    if kind == "cuda" and available and device.index is not None:
        available = device.index < torch.cuda.device_count()
    if not available:
        raise ModelError(f"device {name}: this machine has no such device", "use --device auto")
    return device


def find_dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """Return the dtype to load a model in.

    Raises:
        ModelError: not a dtype.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ModelError(f"dtype {name!r} is not known", f"one of auto, {', '.join(DTYPES)}")
    dtype = getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, torch.float32)
    assert isinstance(dtype, torch.dtype)
    return torch.bfloat16 if dtype == torch.float16 and device.type == "cpu" else dtype


def loading_options(device: str, quantize: str | None) -> dict[str, object]:
    """Return the arguments of `from_pretrained` for a device and a quantisation.

    Raises:
        ModelError: a package is missing, or the value is not known.
    """
    options: dict[str, object] = {}
    if device == "map" or quantize:
        need("accelerate", "a device map", "pip install 'vtprune[devices]'")
        options["device_map"] = "auto" if device in ("map", "auto") else device
    if quantize:
        if quantize not in QUANTIZED:
            raise ModelError(
                f"quantize {quantize!r} is not known", f"one of {', '.join(QUANTIZED)}"
            )
        need("bitsandbytes", f"loading {quantize} weights", "pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantize}": True})
    return options


def need(package: str, what: str, hint: str) -> None:
    """Refuse to go on where `package` is not installed."""
    if find_spec(package) is None:
        raise ModelError(f"{what} needs the package {package}, which is not installed", hint)
