"""Adapters (LoRA and its kin): found, checked, loaded into a model and merged into its weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from vtprune.errors import ModelError
from vtprune.models.devices import need
from vtprune.models.files import find_file
from vtprune.models.wrappers import refuse_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_ID = r"[\w.-]+/[\w.-]+"
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Args:
        name: as the user gave it.
        directory: that holds its config and its weights.
        base: the model that its config names; "" where it names none.
    """

    name: str
    directory: Path
    base: str


def is_adapter(name: str) -> bool:
    """Whether a directory or hub id holds an adapter, and not a model."""
    return find_file(name, CONFIG) is not None


def find_adapter(name: str) -> Adapter:
    """Find an adapter in a directory or on the hub, and check all of it but its weights.

    Raises:
        ModelError: not an adapter, pickled, of a kind that can't be used, or peft is missing.
    """
    config = find_file(name, CONFIG) if os.path.isdir(name) or re.fullmatch(HUB_ID, name) else None
    if config is None:
        raise ModelError(
            f"no adapter {name!r}: neither a directory with {CONFIG}, nor one on the hub or in its "
            "local cache",
            "--adapter takes the directory that save_pretrained of peft wrote",
        )
    need("peft", f"the adapter {name}", "pip install 'vtprune[adapters]'")
    if find_file(name, WEIGHTS) is None:
        if find_file(name, PICKLED) is not None:
            raise ModelError(
                f"{name}: its weights are pickled ({PICKLED}), which are not loaded",
                f"save them as {WEIGHTS}: save_pretrained of peft does",
            )
        raise ModelError(f"{name}: no {WEIGHTS} there", "copy all files of the adapter")
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"{name}: {CONFIG} is not a JSON object", "copy the adapter's files again"
        ) from error
    refuse_kind(name, config.parent)
    return Adapter(name, config.parent, str(base or ""))


def refuse_kind(name: str, directory: Path) -> None:
    """Refuse an adapter that changes more than weights, or that peft does not know."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # whatever peft says of a config that it can't read
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(
            f"{name}: its {CONFIG} can't be read by peft: {first}",
            "was it written by a newer peft? pip install -U peft",
        ) from error
    refuse_adapter(name, config)


def attach(model: PreTrainedModel, adapter: Adapter) -> list[str]:
    """Load an adapter into a model, and merge it into the weights where that is exact.

    Returns:
        What the user should know.

    Raises:
        ModelError: its weights are not those of this model.
    """
    # Sizes that do not match are an error of ours below, not transformers' own.
    info = model.load_adapter(str(adapter.directory), ignore_mismatched_sizes=True)
    for keys, what in (
        (info.missing_keys, "lacks weights for"),
        (info.unexpected_keys, "has weights for parts that this model does not have, such as"),
        ({str(one[0]) for one in info.mismatched_keys}, "has weights of another size for"),
    ):
        if keys:
            raise ModelError(
                f"{adapter.name}: it {what} {min(keys)}: it is another model's adapter",
                f"it names the base model {adapter.base!r}; give that with --model",
            )
    if merge(model):
        return []
    return [
        f"the adapter {adapter.name} can't be merged into these weights: it runs beside them, and "
        "its FLOPs are not counted"
    ]


def merge(model: PreTrainedModel) -> bool:
    """Add an adapter's weights to those of the model, so that it costs nothing any more.

    Weights that two modules share (tied embeddings, replicated layers) and quantised ones stay as
    they are: what is added to one would change the other, or be rounded.

    Returns:
        Whether that was done.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if getattr(model, "is_quantized", False) or shares_weights(model, layers):
        return False
    try:
        for layer in layers:
            with onload_layer(layer):
                layer.merge(safe_merge=True)
    except (NotImplementedError, ValueError):  # a kind that has no merged form
        for layer in layers:
            if layer.merged:
                layer.unmerge()
        return False
    return True


def shares_weights(model: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether another module uses a weight of one of these layers."""
    uses: dict[int, int] = {}
    for _, weight in model.named_parameters(remove_duplicate=False):
        uses[id(weight)] = uses.get(id(weight), 0) + 1
    return any(uses[id(weight)] > 1 for layer in layers for weight in layer.parameters())
