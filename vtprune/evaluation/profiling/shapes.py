"""Models without a checkpoint: their configs by name, built without or with random weights."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vtprune.errors import ModelError
from vtprune.evaluation.profiling.published_pictures import MARKER, WORD, PublishedPictures
from vtprune.models import EMBEDDED, find_family
from vtprune.models.base import Family, Files
from vtprune.models.checkpoint import read_config, read_files
from vtprune.models.generic import placeholder_ids
from vtprune.models.loading import find_checkpoint, prepare_family, refuse_other_kinds
from vtprune.models.names import Alias, aliases, hub_id_of
from vtprune.models.skeleton import build_skeleton
from vtprune.models.structure import decoder_layers
from vtprune.models.transformers_messages import loading_errors, quiet
from vtprune.preset.calibration import packaged_models

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

FIRST = 100
"""The lowest id of a word; those below may end or pad a text."""
SECTIONS = {"text": "text_config", "vision": "vision_config", "adapter": "adapter_config"}
WIDTHS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
}
"""What `models.yaml` calls the decoder's sizes, and what a config does."""


BLOCK = 2**20  # random numbers that are drawn; more weights than that repeat them
SCALE = 0.02  # of the random weights


@dataclass(frozen=True, eq=False)
class Shape:
    """A model without weights.

    Args:
        name: as the user gave it.
        config: the whole model's.
        files: its preparation files, with a tokenizer that stands in for its own.
        family: what is known about its inputs.
        source: where the config comes from: "packaged", or the directory, file or hub id.
        warnings: what the user should know about it.
    """

    name: str
    config: PreTrainedConfig
    files: Files
    family: Family
    source: str
    warnings: tuple[str, ...] = ()


def find_shape(name: str | Path | None = None, trust_remote_code: bool = False) -> Shape:
    """Find the shape for a short name, hub id, directory or config file; None: the embedded model.

    The shapes of the published models are packaged; nothing is downloaded for them.

    Raises:
        ModelError: not found, not readable, or not a known family, with the way out.
    """
    name = None if name is None else str(name)
    if name is not None and (alias := find_alias(name)) is not None and has_config(alias):
        return packaged_shape(alias)
    where = name if name is not None and is_config_file(name) else find_checkpoint(name)
    label = name or EMBEDDED
    with quiet(), loading_errors(label):
        config = read_config(label, where, trust_remote_code)
    family = find_family(str(config.model_type))
    if not family.listed:
        return with_processor(label, config, where, trust_remote_code)
    return with_files(Shape(label, config, Files(config, stand_in(config)), family, where))


def with_processor(
    label: str, config: PreTrainedConfig, where: str, trust_remote_code: bool
) -> Shape:
    """Return the shape of a model whose checkpoint's own processor makes its inputs.

    Raises:
        ModelError: it is not there, or needs what is not installed.
    """
    from transformers import AutoTokenizer

    refuse_other_kinds(label, config, trust_remote_code)
    if Path(where).is_file():
        raise ModelError(
            f"{label}: {config.model_type} models are prepared by their checkpoint's own "
            "processor, which a config alone does not have",
            "give the checkpoint's directory; its weights are not read",
        )
    with quiet(), loading_errors(label):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        files = read_files(where, config, tokenizer)
        family, files = prepare_family(where, files, trust_remote_code)
    return Shape(label, config, files, family, where)


def find_alias(name: str) -> Alias | None:
    """Return the published model that a short name or a hub id stands for."""
    hub_id = hub_id_of(name)
    return next((alias for alias in aliases() if alias.hub_id == hub_id), None)


def has_config(alias: Alias) -> bool:
    """Return whether the config of a published model is packaged."""
    return alias.model_type in packaged_models()["families"]


def is_config_file(name: str) -> bool:
    """Return whether it names a file, which must be a config.

    Raises:
        ModelError: it is one, but holds no config.
    """
    path = Path(name)
    if not os.path.isfile(path):
        return False
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: not a model's config: not JSON", "give its config.json or its directory"
        ) from error
    if not isinstance(contents, dict) or "model_type" not in contents:
        raise ModelError(
            f"{name}: not a model's config: it has no model_type", "give its config.json"
        )
    return True


def packaged_shape(alias: Alias) -> Shape:
    """Return the shape of a published model, from the packaged sizes."""
    from transformers import CONFIG_MAPPING

    if alias.model_type not in CONFIG_MAPPING:
        import transformers

        raise ModelError(
            f"{alias.name}: transformers {transformers.__version__} has no {alias.model_type}",
            "install a newer transformers",
        )
    entry = read_entry(alias)
    fields = dict(entry["config"])
    decoder = {WIDTHS[key]: value for key, value in alias.decoder.items()}
    for section, key in SECTIONS.items():
        if section in entry:
            values = with_width(entry[section], alias.decoder["hidden"])
            fields[key] = {**decoder, **values} if section == "text" else values
    with quiet(), loading_errors(alias.name):
        config = CONFIG_MAPPING[alias.model_type](**fields, dtype=entry["dtype"])
    config.architectures = None
    if "pictures" in entry:
        tokenizer = stand_in_tokenizer({MARKER: None, **placeholder_texts(config)})
        published = PublishedPictures(alias.model_type, entry["pictures"])
        return Shape(alias.name, config, Files(config, tokenizer), published, "packaged")
    family = find_family(alias.model_type)
    return Shape(alias.name, config, published_files(family, config), family, "packaged")


def placeholder_texts(config: PreTrainedConfig) -> dict[str, int | None]:
    """Return a text for every placeholder id of a config."""
    ids = placeholder_ids(config)
    return {f"<{modality}>": number for modality, (number,) in ids.items()}


def read_entry(alias: Alias) -> dict[str, Any]:
    """Return the packaged config of a published model: its own values over its family's."""
    data = packaged_models()
    entry: dict[str, Any] = dict(data["families"][alias.model_type])
    for section, values in data["aliases"][alias.name].get("differs", {}).items():
        entry[section] = {**entry.get(section, {}), **values}
    return entry


def with_width(values: Mapping[str, object], width: int) -> dict[str, object]:
    """Return values with the decoder's width put in for "decoder"."""
    return {key: width if value == "decoder" else value for key, value in values.items()}


def published_files(family: Family, config: PreTrainedConfig) -> Files:
    """Return the preparation files of a family's published models, for the tower of this one."""
    side = getattr(config.vision_config, "image_size", 0)
    side = side[0] if isinstance(side, (list, tuple)) else side
    contents = family.published_files(int(side or 0))
    image, video = (contents.get(kind, {}) for kind in ("image", "video"))
    return Files(config, stand_in(config), image=image, video=video)


def with_files(shape: Shape) -> Shape:
    """Return a shape with the preparation files beside its config; else those of its family."""
    where = str(Path(shape.source).parent) if Path(shape.source).is_file() else shape.source
    with quiet(), loading_errors(shape.name):
        files = read_files(where, shape.config, shape.files.tokenizer)
    if files.image or files.video:
        # The prompt is laid out by the family's own template, whatever the checkpoint's says.
        processor = {key: files.processor[key] for key in files.processor if key != "chat_template"}
        return replace(shape, files=replace(files, processor=processor))
    files = published_files(shape.family, shape.config)
    note = (
        f"{shape.name}: no preprocessor_config.json beside its config; pictures are prepared as "
        f"for the published models of {shape.family.name}"
    )
    return replace(shape, files=files, warnings=(*shape.warnings, note))


def stand_in(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows the special tokens of a config's family."""
    fields = find_family(str(config.model_type)).special_tokens
    return stand_in_tokenizer(
        {text: getattr(config, field or "", None) for text, field in fields.items()}
    )


def stand_in_tokenizer(special: Mapping[str, int | None]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that gives every word one and the same id, and special tokens their own.

    Args:
        special: text of a special token -> its id; None: any that is not taken.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    taken = {number for number in special.values() if number is not None}
    free = (number for number in itertools.count(FIRST) if number not in taken)
    words = {WORD: next(free)}
    words |= {text: next(free) if number is None else number for text, number in special.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=WORD, padding_side="left")


# -- building ------------------------------------------------------------------------------------


def build_random(
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = None,
    distinct_layers: int | None = None,
) -> PreTrainedModel:
    """Return a model with random weights: as fast, and as large, as one that was trained.

    Weights repeat one block of random numbers, which takes seconds where drawing them all would
    take minutes; those of norms are 1, biases 0.

    Args:
        distinct_layers: decoder layers with weights of their own, which the others share; None is
            all.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype
    model = build_skeleton(config, attention)
    layers = decoder_layers(model)
    for number in range(distinct_layers or len(layers), len(layers)):
        share_weights(layers[number], layers[number % (distinct_layers or 1)])
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(BLOCK, generator=generator) * SCALE).to(device, dtype)
    filled: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for module in model.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                if id(param) not in filled:  # tied weights stay tied
                    values = torch.empty(param.shape, dtype=param.dtype, device=device)
                    fill(values, name, block)
                    filled[id(param)] = nn.Parameter(values, requires_grad=False)
                module.register_parameter(name, filled[id(param)])
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(device)
    return model


def share_weights(module: nn.Module, source: nn.Module) -> None:
    """Give a module the weights of another of its kind."""
    for part, other in zip(module.modules(), source.modules(), strict=True):
        for name, param in other.named_parameters(recurse=False):
            part.register_parameter(name, param)


def fill(values: torch.Tensor, name: str, block: torch.Tensor) -> None:
    """Give one weight its values, in place."""
    if values.dim() < 2 and name in ("weight", "bias"):
        values.fill_(1.0 if name == "weight" else 0.0)
        return
    flat = values.view(-1)
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK]
        part.copy_(block[: len(part)])


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Return the kind of each decoder layer: "" where all are alike."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is None or len(set(kinds)) == 1:
        return [""] * int(text.num_hidden_layers)
    return [str(kind) for kind in kinds]


def tower_kinds(config: PreTrainedConfig) -> list[str]:
    """Return the kind of each layer of the vision tower: some have windows in most layers."""
    return find_family(str(config.model_type)).tower_kinds(config)


def shallow_config(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """Return the config of a model with few layers, every kind of layer among them.

    Args:
        depth: of the decoder: the kinds follow each other, over and over. The tower gets one layer
            of each of its kinds, or as many as its features are taken from.
    """
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    kinds = list(dict.fromkeys(layer_kinds(config)))
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        cycle = kinds if len(kinds) > 1 else [text.layer_types[0]]
        text.layer_types = [cycle[number % len(cycle)] for number in range(depth)]
    if getattr(text, "rope_scaling_layers", None) is not None:
        text.rope_scaling_layers = list(range(depth))
    find_family(str(config.model_type)).shorten_tower(shallow)
    return shallow
