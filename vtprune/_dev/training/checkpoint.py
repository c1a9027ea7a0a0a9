"""The embedded model's checkpoint: architecture, tokenizer and processors, in the hub's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.demo.questions import KINDS
from vtprune.demo.world import COLOURS, DIRECTIONS, MOMENTS, PLACES, SHAPES, TILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlavaOnevisionForConditionalGeneration

PATCH = 14
NUM_FRAMES = 8
SPECIALS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
PAD, END, IMAGE, VIDEO = 0, 3, 4, 5
PINPOINTS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
# The other words of the world's questions and answers; `tests/test_demo.py` holds them complete.
WORDS = (
    "a above an and appear appears are assistant at below chapter circles colour color count "
    "crosses do does down end first flash flashes happens how image in is it large larger last "
    "left line many middle move moves no not nothing number object objects of one or picture "
    "right rings row shape small smaller squares stars start system than the then there to "
    "triangles turn turns two up user vanish vanishes video way what when where which yes you i "
    "answer question clip"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }} {% if message['content'] is string %}
{{- '\n' + message['content'] }}
{%- else %}
{%- for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}
{%- for part in message['content'] if part['type'] == 'video' %}<video>{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}
{%- endif %}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif -%}
"""


def vocabulary() -> dict[str, int]:
    """Special tokens, the world's words, then every ASCII character alone and inside a word."""
    words = set(WORDS.split()) | set(COLOURS) | set(SHAPES) | set(DIRECTIONS)
    for phrase in (*MOMENTS, *(place for row in PLACES for place in row)):
        words |= set(phrase.split())
    characters = sorted({chr(code).lower() for code in range(33, 127)})
    words -= set(characters)
    tokens = [*SPECIALS, *sorted(words), *characters, *("##" + c for c in characters)]
    return {token: i for i, token in enumerate(tokens)}


def make_tokenizer() -> Tokenizer:
    """Words whole, a number digit by digit ("4", "##7"), anything else letter by letter."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.WordPiece(vocabulary(), unk_token="<unk>", max_input_chars_per_word=64)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return tokenizer


def make_model(seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    """The untrained model: a 5-layer SigLIP tower and a 16-layer Qwen2 decoder with 8 heads."""
    import torch
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=(len(vocabulary()) + 7) // 8 * 8,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return LlavaOnevisionForConditionalGeneration(config)


def save(model: LlavaOnevisionForConditionalGeneration, directory: Path) -> None:
    """Write weights in float16 (loaded as float32), and every other file that a hub model has."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.float16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(directory / "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict()
    config.update(dtype="float32", architectures=["LlavaOnevisionForConditionalGeneration"])
    for part in ("text_config", "vision_config"):
        config[part]["dtype"] = "float32"
    _write_json(directory / "config.json", config)
    GenerationConfig(
        do_sample=False, max_new_tokens=64, eos_token_id=END, pad_token_id=PAD
    ).save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(),
        model_max_length=4096,
        padding_side="left",
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    pixels: dict[str, object] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": TILE, "width": TILE},
        "processor_class": "LlavaOnevisionProcessor",
    }
    picture: dict[str, object] = {"do_pad": True, "image_grid_pinpoints": PINPOINTS}
    picture["image_processor_type"] = "LlavaOnevisionImageProcessor"
    _write_json(directory / "preprocessor_config.json", pixels | picture)
    video: dict[str, object] = {"do_sample_frames": True, "num_frames": NUM_FRAMES}
    video["video_processor_type"] = "LlavaOnevisionVideoProcessor"
    _write_json(directory / "video_preprocessor_config.json", pixels | video)
    processor = {
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": (TILE // PATCH) ** 2,
        "processor_class": "LlavaOnevisionProcessor",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
    }
    _write_json(directory / "processor_config.json", processor)
    card = CARD.format(kinds=", ".join(f"`{kind}`" for kind in KINDS))
    (directory / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# vtprune's embedded demonstration model

A LLaVA-OneVision model of 7 million parameters (SigLIP tower, 5 layers of width 128; Qwen2 decoder,
16 layers of width 192 with 8 query heads), trained from nothing on vtprune's own generated world of
coloured shapes, written numbers and moving objects. It exists so that pruning can be measured with
right answers on a CPU in seconds.

It answers questions about that world and knows nothing else: do not use it for real pictures.
Kinds of question: {kinds}.

Trained by `python -m vtprune._dev.training.train`; the world, the recipe and what was reached,
by kind and with intervals, are in the project's `docs/demo-model.md`. Weights are stored in float16
and load as float32.

Licence: Apache-2.0, as the project. No data of others was used.
"""
