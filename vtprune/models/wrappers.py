"""The transformers model inside what others wrapped around it: PEFT, data parallelism, a module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from torch import nn

from vtprune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAY_OUT = "leave it out: adapters that change weights alone, such as LoRA, can be used"
# What PEFT changes beside weights, by its own names for the kinds of adapters (0.21).
BESIDE_WEIGHTS = {
    "ADAPTION_PROMPT": "adds prompts inside its attention layers",
    "SHADOW": "runs a second network beside the decoder, token by token",
    "XLORA": "weighs its adapters by a forward of their own",
}


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
        if isinstance(module, OptimizedModule) or compiled:
            raise ModelError(
                f"{type(module).__name__} is compiled, and hooks do not run in a compiled graph",
                "prune the model before compiling it",
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
        raise ModelError(f"the adapter {name} ({kind}) {reason}", WAY_OUT)


def running_module(module: nn.Module) -> nn.Module:
    """Return the copy that runs of a module of which PEFT keeps copies (`modules_to_save`)."""
    copies = getattr(module, "modules_to_save", None)
    original = getattr(module, "original_module", None)
    if not isinstance(copies, nn.ModuleDict) or not isinstance(original, nn.Module):
        return module
    active = [name for name in module.active_adapters if name in copies]  # type: ignore[union-attr]
    return original if module.disable_adapters or not active else copies[active[0]]
