"""LLaVA-1.5: one square a picture, whatever the language model; and what its successors share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.errors import ModelError
from vtprune.models import cost, frames, preprocess
from vtprune.models.base import (
    Contents,
    Family,
    Files,
    Grids,
    Media,
    ReadPlan,
    Sampling,
    Tensors,
    VisionInputs,
    VisionTensors,
)
from vtprune.tokens.layout import CLS, Grid, box, join, single

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

CLIP: Mapping[str, object] = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": preprocess.CLIP_MEAN,
    "image_std": preprocess.CLIP_STD,
}
SIGLIP: Mapping[str, object] = {
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
BOTH = {"image": "<image>", "video": "<video>"}
BOTH_IDS = {"<image>": "image_token_id", "<video>": "video_token_id"}

# The chat formats of the official checkpoints, one a language model; pictures, videos, then text.
_PARTS = (
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + _PARTS
    + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<<SYS>>\n' }}" + _PARTS + "{{ '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}" + _PARTS + "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' }}" + _PARTS + "{{ '</s> ' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + _PARTS
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Llava(Family):
    """A picture is resized and cropped to a square, also beside others; no video."""

    name = "LLaVA-1.5"
    model_types = ("llava",)
    original_kinds = frozenset({"llava_llama", "LlavaLlamaForCausalLM"})

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """side x side patches, the tower's first token too where the config keeps it.

        With a Pixtral tower, each picture's own rows and columns; its row ends are text.
        """
        if "image" not in vision:
            return {}
        tower_inputs = vision["image"]
        if tower_inputs.get("image_sizes") is not None:
            patch = config.vision_config.patch_size
            sizes = torch.as_tensor(tower_inputs["image_sizes"]).tolist()
            return {"image": [box(1, rows // patch, cols // patch) for rows, cols in sizes]}
        strategy = tower_inputs.get("vision_feature_select_strategy")
        strategy = strategy or config.vision_feature_select_strategy
        grid = square_grid(config, all_tokens=strategy == "full")
        return {"image": [grid] * len(cast(torch.Tensor, tower_inputs["pixel_values"]))}

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """Two matrices, on the features of one layer or of several side by side."""
        shape = cost.clip_or_siglip(config)
        if shape is None:
            return None
        layer = getattr(config, "vision_feature_layer", -1)
        num_layers = 1 if isinstance(layer, int) else len(layer)
        out = cost.text_width(config)
        return replace(
            shape,
            projector=((num_layers * shape.hidden, out), (out, out)),
            projects_extra=getattr(config, "vision_feature_select_strategy", "default") == "full",
        )

    def largest(self, files: Files) -> tuple[int, int]:
        return preprocess.unchanged_size(self.picture_recipe(files))

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """Resized and cropped; max_tiles does not apply."""
        if files.config.vision_config.model_type == "pixtral":
            raise ModelError(
                "pictures for a Pixtral tower are not prepared here",
                "prepare them with the checkpoint's own processor and prune with vtprune.pruning",
            )
        padded = bool(files.image.get("do_pad")) and _processor(files).startswith("Llava")
        resize = preprocess.finish_square if padded else preprocess.finish
        return ReadPlan((0,), functools.partial(resize, recipe=self.picture_recipe(files)))

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        """Pictures, and for successors with videos those; each a tensor of its own."""
        pictures = [item for item in media if item.source.kind == "image"]
        videos = [item for item in media if item.source.kind == "video"]
        vision: VisionTensors = {}
        if pictures:
            vision["image"] = self.picture_inputs(files, pictures)
        if videos:
            pixels = frames.stack_videos(videos, self.video_recipe(files), self.name)
            vision["video"] = {"pixel_values_videos": pixels}
        return vision

    def picture_inputs(self, files: Files, pictures: Media) -> Tensors:
        """Return the vision tower's inputs for the pictures of a prompt."""
        recipe = self.picture_recipe(files)
        pixels = [preprocess.normalize(picture.pixels, recipe) for picture in pictures]
        return {"pixel_values": torch.cat(pixels)}

    def picture_recipe(self, files: Files) -> preprocess.Recipe:
        """By the preprocessor's class: LLaVA's and CLIP's have the same defaults."""
        defaults = SIGLIP if _processor(files).startswith("Siglip") else CLIP
        return preprocess.recipe_over(files.image, defaults)

    def video_recipe(self, files: Files) -> preprocess.Recipe:
        """A checkpoint without a file for videos has that for pictures serve both."""
        return preprocess.recipe_over(files.video or files.image, CLIP)

    def template_for(self, files: Files) -> str:
        """Return the official format of the language model."""
        if "<|im_start|>" in files.tokenizer.get_vocab():
            return CHATML
        return MISTRAL if files.config.text_config.model_type == "mistral" else VICUNA

    def published_files(self, side: int) -> Contents:
        edges = {"height": side, "width": side}
        cropped: dict[str, object] = {"size": {"shortest_edge": side}, "crop_size": edges}
        return dict.fromkeys(self.modalities, cropped)


def square_grid(config: PreTrainedConfig, all_tokens: bool) -> Grid:
    """Return the tokens of one square picture.

    Args:
        all_tokens: whether the tower's first token is among them: its CLS token, where it has one.
            LLaVA's "default" leaves it out.
    """
    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    patches = box(1, side, side)
    if str(tower.model_type).startswith("siglip"):  # has no CLS: "default" loses the first patch
        return patches if all_tokens else patches.take(torch.arange(1, side**2))
    return join([single(CLS), patches]) if all_tokens else patches


def _processor(files: Files) -> str:
    return str(files.image.get("image_processor_type", ""))
