"""Checkpoints in the format of their authors' own repositories, which transformers can't load."""

from __future__ import annotations

from collections.abc import Mapping

from vtprune.errors import ModelError, brief, quote
from vtprune.models import FAMILIES, find_family

SAME_NAME = "the checkpoint of the same name with {} at its end"
TWINS: Mapping[str, str] = {
    "internvl_chat": f"{SAME_NAME.format('-hf')} (InternVL3.5: -HF), such as "
    "OpenGVLab/InternVL3-1B-hf",
    "llava_llama": "llava-hf/llava-1.5-7b-hf or llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "videollava": "LanguageBind/Video-LLaVA-7B-hf",
    "molmo": "Molmo2, such as allenai/Molmo2-8B",
    "qwen": "a later one, such as Qwen/Qwen2.5-VL-7B-Instruct",
}
"""Model type of a repository's own format -> the checkpoint in transformers' format, or the nearest
one, where one is known."""
ARCHITECTURES: Mapping[str, str] = {
    "LlavaLlamaForCausalLM": "llava_llama",
    "LlavaMistralForCausalLM": "llava_mistral",
    "LlavaQwenForCausalLM": "llava_qwen",
    "VideoLlavaLlamaForCausalLM": "videollava",
    "LlavaVicunaForCausalLM": "llava_llama",
}
"""Class of a repository's own code -> the key in TWINS: some name a model type of transformers."""


def refuse_original(name: str, config: Mapping[str, object]) -> None:
    """Refuse a checkpoint that transformers' own classes can't load, by its config.json alone.

    No code that the checkpoint brings has run by then, nor will it: such models can't be pruned.

    Args:
        name: as the user gave it.
        config: what config.json holds.

    Raises:
        ModelError: with the checkpoint to take instead, where one is known.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            f"{name}: its config.json has no model_type, so no class of transformers fits it",
            "give a checkpoint in transformers' format (vtprune models)",
        )
    classes = config.get("architectures")
    own = next((one for one in (classes if isinstance(classes, list) else [])
                if isinstance(one, str) and one in ARCHITECTURES), None)  # fmt: skip
    if find_family(model_type) is not None and own is None:
        return
    from transformers import CONFIG_MAPPING

    brings_code = isinstance(config.get("auto_map"), Mapping) and model_type not in CONFIG_MAPPING
    twin = TWINS.get(ARCHITECTURES.get(own or "", model_type), "")
    if own or brings_code or twin:
        what = f"{own or quote(model_type)} is the format of its authors' own repository"
        hint = f"take {twin}" if twin else "take a checkpoint in transformers' format"
        raise ModelError(f"{name}: {what}, which can't be pruned; its code was not run", hint)
    raise ModelError(
        f"{name}: {brief(model_type)} is not a family that can be asked",
        f"families: {', '.join(FAMILIES)} (vtprune models)",
    )
