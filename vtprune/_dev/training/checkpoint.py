"""What checkpoints of all architectures share: tokenizer, weights, files of the hub's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.demo.questions import KINDS
from vtprune.demo.world import COLOURS, DIRECTIONS, MOMENTS, PLACES, SHAPES

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

# The first special tokens of every architecture.
SPECIALS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
PAD, END = 0, 3
END_TOKEN = SPECIALS[END]
# The prompt between a question and its answer.
SUFFIX = "<|im_end|><|im_start|>assistant\n"
# The other words of the world's questions and answers; `tests/test_demo.py` holds them complete.
WORDS = (
    "a above an and appear appears are assistant at below chapter circles colour color count "
    "crosses do does down end first flash flashes happens how image in is it large larger last "
    "left line many middle move moves no not nothing number object objects of one or picture "
    "right rings row shape small smaller squares stars start system than the then there to "
    "triangles turn turns two up user vanish vanishes video way what when where which yes you i "
    "answer question clip"
)

# What every architecture's preparation does to pixels.
PIXELS: Mapping[str, object] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def vocabulary(specials: Sequence[str]) -> dict[str, int]:
    """Special tokens, the world's words, then every ASCII character alone and inside a word."""
    words = set(WORDS.split()) | set(COLOURS) | set(SHAPES) | set(DIRECTIONS)
    for phrase in (*MOMENTS, *(place for row in PLACES for place in row)):
        words |= set(phrase.split())
    characters = sorted({chr(code).lower() for code in range(33, 127)})
    words -= set(characters)
    tokens = [*specials, *sorted(words), *characters, *("##" + c for c in characters)]
    return {token: i for i, token in enumerate(tokens)}


def make_tokenizer(specials: Sequence[str]) -> Tokenizer:
    """Words whole, a number digit by digit ("4", "##7"), anything else letter by letter."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.WordPiece(vocabulary(specials), unk_token="<unk>", max_input_chars_per_word=64)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def write_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: Tokenizer,
    names: Mapping[str, str],
    template: str,
    card: str,
    pad: str = SPECIALS[PAD],
    unknown: str = SPECIALS[1],
) -> None:
    """Write weights in float16 (loaded as float32), config, tokenizer, chat template and card.

    Args:
        names: the tokenizer's names of special tokens: {"image_token": "<image>"}.
        card: the model's card, with {kinds} where the kinds of question stand.
        pad: the token that fills rows.
        unknown: the token for what the tokenizer has no token for.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name not in tied
    }
    save_file(state, str(directory / "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict()
    config.update(dtype="float32", architectures=[type(model).__name__])
    for part in ("text_config", "vision_config"):
        config[part]["dtype"] = "float32"
    write_json(directory / "config.json", config)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tokenizer.token_to_id(END_TOKEN),
        pad_token_id=tokenizer.token_to_id(pad),
    ).save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=4096,
        padding_side="left",
        pad_token=pad,
        unk_token=unknown,
        eos_token=END_TOKEN,
        extra_special_tokens=dict(names),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    kinds = ", ".join(f"`{kind}`" for kind in KINDS)
    (directory / "README.md").write_text(card.format(kinds=kinds), encoding="utf-8")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
