"""Checkpoints for their authors' own code, told from those in transformers' format by config.json.

Many models were published twice: for the code of their repository, and converted to transformers'
classes. The first kind would be loaded by running Python code that it brings, or with weights that
fit no class; it is refused before either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vtprune.errors import ModelError
from vtprune.models import FAMILIES
from vtprune.models.files import find_file
from vtprune.models.names import aliases

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LLAVA = ("llava", "llava_next", "llava_next_video", "video_llava")
CONVERTED: dict[str, tuple[str, ...]] = {
    "internvl_chat": ("internvl",),
    "InternVLChatModel": ("internvl",),
    "llava_llama": _LLAVA,
    "LlavaLlamaForCausalLM": _LLAVA,
    "llava_mistral": ("llava_next",),
    "LlavaMistralForCausalLM": ("llava_next",),
    "llava_qwen": ("llava_onevision",),
    "LlavaQwenForCausalLM": ("llava_onevision",),
}
"""Model type or class of authors' own code -> the families of its converted checkpoints."""
LATER: dict[str, tuple[str, ...]] = {
    "qwen": ("qwen2_vl",),
    "QWenLMHeadModel": ("qwen2_vl",),
    "molmo": ("molmo2",),
    "MolmoForCausalLM": ("molmo2",),
}
"""Likewise -> families of the same authors' later models, where none of its own are converted."""


def read_config(name: str, where: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Read a checkpoint's config.

    Args:
        name: as the user gave it.
        where: its directory, config.json or hub id.

    Raises:
        ModelError: it is for its authors' own code; a converted one is named where one is known.
    """
    from transformers import AutoConfig

    path = Path(where) if Path(where).is_file() else find_file(where, "config.json")
    if path is not None:
        refuse_original(name, _parse(path), trust_remote_code)
    return cast(
        "PreTrainedConfig",
        AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code),
    )


def _parse(path: Path) -> Mapping[str, object]:
    """The contents of a config.json; {} where it is none, which transformers then says."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def refuse_original(name: str, config: Mapping[str, object], trust_remote_code: bool) -> None:
    """Refuse a checkpoint whose class transformers does not have.

    Raises:
        ModelError: it is for its authors' own code.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type") or "")
    named = config.get("architectures")
    classes = [str(one) for one in named] if isinstance(named, list) else []
    # Those of the families all have this ending; so have subclasses, whose weights fit them.
    fit = [one.endswith("ForConditionalGeneration") or one in dir(transformers) for one in classes]
    known = model_type in CONFIG_MAPPING and (not classes or any(fit))
    asked_for = trust_remote_code and "auto_map" in config and model_type in FAMILIES
    if known or not model_type or asked_for:
        return
    if model_type in FAMILIES and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{name}: transformers {transformers.__version__} has no {model_type}",
            "install a newer transformers",
        )
    kind = " ".join([model_type, *(f"({one})" for one in classes[:1])])
    raise ModelError(
        f"{name}: {kind} is a checkpoint for its authors' own code, not for a class of "
        f"transformers {transformers.__version__}",
        _way_out(name, [model_type, *classes]),
    )


def _way_out(name: str, kinds: list[str]) -> str:
    """The same model in transformers' format, as far as the catalog has it."""
    converted = next((CONVERTED[kind] for kind in kinds if kind in CONVERTED), ())
    listed = [alias for alias in aliases() if alias.model_type in FAMILIES]
    for alias in listed:
        fits = not converted or alias.model_type in converted
        if fits and _short(alias.hub_id) == _short(name):
            return f"the same model in transformers' format: --model {alias.hub_id}"
    examples = [
        next(alias.hub_id for alias in listed if alias.model_type == family)
        for family in converted[:2] or next((LATER[kind] for kind in kinds if kind in LATER), ())
    ]
    if not examples:
        return f"give one in transformers' format, of {', '.join(FAMILIES)} (vtprune models)"
    kind = "one in transformers' format" if converted else "a later model of these authors"
    return f"give {kind}, such as {' or '.join(examples)} (vtprune models)"


def _short(name: str) -> str:
    """What names of one model in both formats have in common."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"-v(?=1\.5)", "-", last.removesuffix("-hf"))
