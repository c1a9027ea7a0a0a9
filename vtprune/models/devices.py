"""Where a model's weights go, and in which numbers."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from vtprune.errors import ModelError, VtpruneError
from vtprune.models.names import check_device_name, check_dtype_name, check_quantize_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
    check_device_name(name)
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
    check_dtype_name(name)
    if name in DTYPES:
        return DTYPES[name]
    dtype = getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, torch.float32)
    assert isinstance(dtype, torch.dtype)
    return torch.bfloat16 if dtype == torch.float16 and device.type == "cpu" else dtype


def loading_options(
    device: str, quantize: str | None, quantized: bool = False
) -> dict[str, object]:
    """Return the arguments of `from_pretrained` for a device and a quantisation.

    Args:
        quantized: the checkpoint's weights are: they go to their device as they are read.

    Raises:
        ModelError: a package is missing, or the value is not known.
    """
    options: dict[str, object] = {}
    if device == "map" or quantize or quantized:
        need("accelerate", "a device map", "pip install 'vtprune[devices]'")
        options["device_map"] = "auto" if device in ("map", "auto") else device
    if quantize:
        check_quantize_name(quantize)
        need("bitsandbytes", f"loading {quantize} weights", "pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantize}": True})
    return options


def check_quantized(name: str, config: PreTrainedConfig, quantize: str | None) -> list[str]:
    """Check, before weights are read, that transformers can load quantised ones here.

    Args:
        name: of the model, as the user gave it.
        quantize: what the user asks for.

    Returns:
        a warning where they are widened to bfloat16 instead, which transformers only logs.

    Raises:
        ModelError: they need a package or device that is not there, or are of an unknown kind.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    values = quantization_of(config)
    if values is None:
        return []
    method = str(values.get("quant_method") or "bitsandbytes")
    quantized = f"{name}: its weights are quantised ({method})"
    way_out = "give the model's checkpoint that is not quantised"
    if quantize:
        raise ModelError(f"{quantized} already", f"leave --quantize out, or {way_out}")
    try:
        if not AutoHfQuantizer.supports_quant_method(values):
            raise ModelError(f"{quantized}, which this transformers does not know", way_out)
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(values), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except VtpruneError:
        raise
    except ImportError as error:
        raise ModelError(
            f"{quantized}: {first_line(error)}", f"install what it names, or {way_out}"
        ) from error
    except Exception as error:  # each kind has its own checks, and its own errors
        raise ModelError(f"{quantized}: {first_line(error)}", way_out) from error
    need("accelerate", f"loading {method} weights", "pip install 'vtprune[devices]'")
    if getattr(quantizer.quantization_config, "dequantize", False):
        return [
            f"the {method} weights of {name} are widened to bfloat16 as they are loaded, and "
            "take that memory: this machine has no device or kernel for them"
        ]
    return []


def quantization_of(config: PreTrainedConfig) -> dict[str, object] | None:
    """Return what a checkpoint's config says of quantised weights; None where it says nothing."""
    for part in (config, config.get_text_config(decoder=True)):
        values = getattr(part, "quantization_config", None)
        if values is not None:
            return dict(values) if isinstance(values, dict) else dict(values.to_dict())
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, with the next after a colon; else its kind."""
    first, *later = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if first.endswith(":"):
        first = " ".join([first, *later[:1]])
    return first[:300] or type(error).__name__


def need(package: str, what: str, hint: str) -> None:
    """Refuse to go on where `package` is not installed."""
    if find_spec(package) is None:
        raise ModelError(f"{what} needs the package {package}, which is not installed", hint)
