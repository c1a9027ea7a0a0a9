"""Short names of published models, and what they stand for."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vtprune.errors import ModelError, path_hint
from vtprune.models import EMBEDDED
from vtprune.preset.calibration import Calibration, find_calibration, packaged_models


@dataclass(frozen=True)
class Alias:
    """A short name for a published model.

    Args:
        name: the short name.
        hub_id: what it stands for.
        model_type: `config.model_type` of the checkpoint.
        parameters: its size as its authors give it, "7B".
        weights: their number, as its config builds it.
        decoder: the language model's sizes by the names of `cost.plain_decoder`.
        calibration: where it can be cut, defaults included.
        inputs: kinds of input that it takes, of "image" and "video".
        gated: the hub asks for its license to be accepted first.
        memory_bytes: of its weights, about: in "bfloat16" and in "4bit".
    """

    name: str
    hub_id: str
    model_type: str
    parameters: str
    weights: int
    decoder: Mapping[str, int]
    calibration: Calibration
    inputs: Sequence[str] = ()
    gated: bool = False
    memory_bytes: Mapping[str, int] = field(default_factory=dict)


def weights_memory(number: int, decoder: Mapping[str, int]) -> dict[str, int]:
    """Return about how many bytes weights take: in 4 bit embeddings and head stay as they are."""
    kept = min(number / 2, 2.0 * decoder["vocab"] * decoder["hidden"])
    four_bit = 2 * kept + (number - kept) * (4 + 32 / 64) / 8  # a float32 for every 64 weights
    return {"bfloat16": 2 * number, "4bit": int(four_bit)}


HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
GGUF = "is a GGUF file, which holds the language model without its vision tower"
GGUF_HINT = (
    "give the model's safetensors checkpoint, the one that the GGUF file was made from; --quantize "
    "4bit makes that smaller"
)
DEVICES = ("auto", "cpu", "cuda", "mps", "map")
DTYPE_NAMES = ("float32", "bfloat16", "float16")
QUANTIZED = ("4bit", "8bit")
KERNELS = ("sdpa", "eager", "flex_attention")
"""Of attention; those of flash attention have numbers."""


def check_device_name(name: str) -> None:
    """Refuse what is no device, wherever this runs.

    Raises:
        ModelError: with the names that there are.
    """
    if name.split(":")[0] not in DEVICES or not re.fullmatch(r"[a-z]+(:\d+)?", name):
        raise ModelError(f"device {name!r} is not known", f"one of {', '.join(DEVICES)}")


def check_dtype_name(name: str) -> None:
    """Refuse what is no type of weights.

    Raises:
        ModelError: with the names that there are.
    """
    if name not in ("auto", *DTYPE_NAMES):
        raise ModelError(f"dtype {name!r} is not known", f"one of auto, {', '.join(DTYPE_NAMES)}")


def check_attention_name(name: str) -> None:
    """Refuse what is no attention kernel of transformers', and no kernel's hub id.

    Raises:
        ModelError: with the names that there are.
    """
    if not (
        "/" in name or re.fullmatch(rf"(paged\|)?({'|'.join(KERNELS)}|flash_attention_\d)", name)
    ):
        raise ModelError(
            f"attention {name!r} is not known", f"one of {', '.join(KERNELS)}, flash_attention_2"
        )


def check_quantize_name(name: str) -> None:
    """Refuse what is no quantisation.

    Raises:
        ModelError: with the names that there are.
    """
    if name not in QUANTIZED:
        raise ModelError(f"quantize {name!r} is not known", f"one of {', '.join(QUANTIZED)}")


def check_directory(name: str) -> None:
    """Refuse a directory, by its path, that holds neither a model nor an adapter.

    Raises:
        ModelError: it is not there, or has no config.
    """
    if name.startswith((".", "/", "~")) and not os.path.exists(name):
        raise ModelError(f"{name}: no such directory", path_hint(os.path.expanduser(name)))
    files = [os.path.join(name, file) for file in ("config.json", "adapter_config.json")]
    if os.path.isdir(name) and not any(map(os.path.lexists, files)):
        raise ModelError(*explain_no_config(Path(name)))


def explain_no_config(directory: Path) -> tuple[str, str]:
    """Return the message and hint for a directory without config.json."""
    gguf = next(iter(sorted(directory.glob("*.gguf"))), None)
    if gguf is not None:
        return f"{directory}: {gguf.name} {GGUF}", GGUF_HINT
    snapshot = next(iter(sorted(directory.glob("snapshots/*"))), None)
    hint = "give the directory of a checkpoint: config.json, tokenizer files and weights"
    if snapshot is not None:  # the hub's cache of a model
        hub_id = "/".join(directory.name.split("--")[1:])
        hint = f"give {snapshot}" + (f", or the hub id {hub_id}" if hub_id else "")
    return f"{directory}: no config.json in this directory", hint


def check_layer(at: str, model: str | None) -> None:
    """Refuse a layer number past the last layer of a model whose layers are known.

    Args:
        model: a short name, a checkpoint's directory, or None for the embedded model.

    Raises:
        PresetError: with its layers.
    """
    from vtprune.tokens.schedule import resolve_layer

    if not re.fullmatch(r"[0-9]{1,9}", at):  # a name, a depth, or what is refused as no place
        return
    name = EMBEDDED if model is None else model
    known = None if os.path.exists(name) else packaged_models()["aliases"].get(name.lower())
    if known is not None:
        layers = known["decoder"]["layers"]
    else:
        layers = layers_of(embedded_weights() if name == EMBEDDED else Path(name))
    if layers is not None:
        resolve_layer(at, layers, 0, 0)


def layers_of(checkpoint: Path) -> int | None:
    """Return how many decoder layers a directory's config.json says, None where it does not."""
    try:
        config = json.loads((checkpoint / "config.json").read_bytes())
        config = config.get("thinker_config", config)
        layers = config.get("text_config", config).get("num_hidden_layers")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None  # what is wrong with it is said where it is read
    return layers if isinstance(layers, int) and layers > 0 else None


def embedded_weights() -> Path:
    """Return the folder of the embedded model's checkpoint, for `from_pretrained`."""
    return Path(__file__).parents[1] / "demo" / "weights"


def aliases() -> list[Alias]:
    """Return all short names, in the order of `_data/models.yaml`."""
    listed = []
    for name, entry in packaged_models()["aliases"].items():
        decoder = entry["decoder"]
        calibration, _ = find_calibration(entry["model_type"], decoder["layers"], decoder["hidden"])
        fields = {key: value for key, value in entry.items() if key != "differs"}
        fields["inputs"] = packaged_models()["inputs"].get(entry["model_type"], ())
        fields["memory_bytes"] = weights_memory(entry["weights"], decoder)
        listed.append(Alias(name, calibration=calibration, **fields))
    return listed


def hub_id_of(name: str) -> str:
    """Return the hub id that a short name stands for, in any case; anything else as it is."""
    entry = packaged_models()["aliases"].get(name.lower())
    return name if entry is None else str(entry["hub_id"])


def closest_alias(name: str) -> str | None:
    """Return the short name that a misspelt name or hub id is closest to; None: none is close."""
    names = packaged_models()["aliases"]
    spelt = {short: short for short in names}
    for short, entry in names.items():
        spelt.setdefault(entry["hub_id"].lower(), short)
        spelt.setdefault(entry["hub_id"].lower().split("/")[1], short)
    begun = [full for full in spelt if full.startswith(name.lower())] if len(name) > 5 else []
    close = begun or difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.7)
    return spelt[close[0]] if close else None


def may_be_model(name: str) -> bool:
    """Return whether a name that is no path is a short name, or has the form of a hub id."""
    if name == EMBEDDED:
        return True
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    return not looks_local and re.fullmatch(HUB_ID, hub_id_of(name)) is not None


def unknown_model(name: str) -> ModelError:
    """Return the error for a name that is no model's."""
    close = closest_alias(name)
    return ModelError(
        f"no model {name!r}: neither a directory nor a known name",
        f"did you mean {close}?"
        if close
        else "vtprune models lists the known names; a hub id has the form owner/name",
    )
