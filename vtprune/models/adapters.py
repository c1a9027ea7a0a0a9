"""Adapters (LoRA and its kin), and the model inside what PEFT or others wrap around it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from vtprune.errors import ModelError
from vtprune.models.checkpoint import find_file
from vtprune.models.devices import need
from vtprune.models.names import HUB_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LEAVE_OUT = "leave it out: adapters that change weights alone, such as LoRA, can be used"
# What PEFT changes beside weights, by its own names for the kinds of adapters (0.21).
BESIDE_WEIGHTS = {
    "ADAPTION_PROMPT": "adds prompts inside its attention layers",
    "SHADOW": "runs a second network beside the decoder, token by token",
    "XLORA": "weighs its adapters by a forward of their own",
}


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
    """Return whether a directory or hub id holds an adapter, and not a model."""
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
        ({str(key[0]) for key in info.mismatched_keys}, "has weights of another size for"),
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
    """Return whether another module uses a weight of one of these layers."""
    uses: dict[int, int] = {}
    for _, weight in model.named_parameters(remove_duplicate=False):
        uses[id(weight)] = uses.get(id(weight), 0) + 1
    return any(uses[id(weight)] > 1 for layer in layers for weight in layer.parameters())


def unwrap(model: object) -> object:
    """Return the transformers model inside `model`, and anything else as it is.

    A PEFT model, `DistributedDataParallel`, an `nn.Module` of the user's own: each holds a
    transformers model, and each runs it as a module, so that hooks on its parts run too.

    Raises:
        ModelError: it holds several, is compiled, or changes more than weights.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module):
        return model
    inside: PreTrainedModel | None = None
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            inside = module
            break
        refuse_compiled([module])
        refuse_adapters(module)
    if inside is None:
        return model
    parts = set(inside.modules())
    others = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module not in parts
    ]
    if others:
        names = sorted({type(module).__name__ for module in (inside, *others)})
        raise ModelError(
            f"{type(model).__name__} holds several transformers models ({', '.join(names)})",
            "give pruning() the multimodal model itself",
        )
    return inside


def refuse_compiled(modules: Iterable[nn.Module]) -> None:
    """Refuse compiled modules, in which hooks do not run.

    Raises:
        ModelError: names the first one.
    """
    from torch._dynamo.eval_frame import OptimizedModule

    for module in modules:
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        # `module.forward = torch.compile(module.forward)`
        compiled |= hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        if isinstance(module, OptimizedModule) or compiled:
            raise ModelError(
                f"{type(module).__name__} is compiled, and hooks do not run in a compiled graph",
                "leave it uncompiled, and let vtprune compile its layers: --compile, "
                "load(..., compile=True) or vtprune.compile_model(model)",
            )


def refuse_adapters(wrapper: nn.Module) -> None:
    """Refuse a PEFT model whose adapters do more than change weights.

    Raises:
        ModelError: an active adapter adds tokens, or depends on where tokens are.
    """
    configs = getattr(wrapper, "peft_config", None)
    if not isinstance(configs, dict):
        return
    active = getattr(wrapper, "active_adapters", None) or getattr(wrapper, "active_adapter", ())
    for name in [active] if isinstance(active, str) else cast("Iterable[str]", active):
        config = configs.get(name)
        refuse_adapter(repr(name), config)


def refuse_adapter(name: str, config: object) -> None:
    """Refuse an adapter by its PEFT config.

    Raises:
        ModelError: it adds tokens, or depends on where tokens are.
    """
    kind = getattr(config, "peft_type", "")
    kind = str(getattr(kind, "value", kind))
    reason = BESIDE_WEIGHTS.get(kind)
    if getattr(config, "is_prompt_learning", False):
        reason = "puts tokens of its own before the prompt"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "acts from a place in the prompt on, which a cut would move"
    if reason:
        raise ModelError(f"the adapter {name} ({kind}) {reason}", LEAVE_OUT)


def running_module(module: nn.Module) -> nn.Module:
    """Return the copy that runs of a module of which PEFT keeps copies (`modules_to_save`)."""
    copies = getattr(module, "modules_to_save", None)
    original = getattr(module, "original_module", None)
    if not isinstance(copies, nn.ModuleDict) or not isinstance(original, nn.Module):
        return module
    active = [name for name in module.active_adapters if name in copies]  # type: ignore[union-attr]
    return original if module.disable_adapters or not active else copies[active[0]]
