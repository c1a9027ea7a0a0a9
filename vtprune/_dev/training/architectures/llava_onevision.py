"""LLaVA-OneVision: the embedded model's architecture, its tiles and the course of its training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution

from vtprune._dev.training import checkpoint, hints
from vtprune._dev.training.architecture import BatchShape, Curriculum, Emphasis, HintProbe
from vtprune._dev.training.batches import Batch, patch_labels, with_numbers
from vtprune._dev.training.checkpoint import (
    END,
    PAD,
    SUFFIX,
    make_tokenizer,
    vocabulary,
    write_json,
)
from vtprune._dev.training.heads import Dense, weigh_labels
from vtprune._dev.training.hints import IGNORED, NAME_CLASSES, TOKEN_CLASSES
from vtprune._dev.training.labels import labels
from vtprune._dev.training.pixels import normalise, resize
from vtprune.demo.draw import Frame, frame
from vtprune.demo.world import COLOURS, SHAPES, TILE, Scene, generator, make_clip, make_picture

Model = LlavaOnevisionForConditionalGeneration
PATCH = 14
NUM_FRAMES = 8
SPECIALS = (*checkpoint.SPECIALS, "<image>", "<video>")
IMAGE, VIDEO = 4, 5
PINPOINTS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
CLIP_SIDE, PICTURE_SIDE = 4, 8  # tokens along a side of a pooled frame, of a base picture
# Dense labels: how much more what a patch shows weighs than that it shows nothing.
GAINS = (3.0, 3.0, 6.0, 6.0, 3.0, 3.0, None)
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
LAYOUTS = {
    layout.name: layout
    for layout in (
        BatchShape("one of several", 112, 112, 1, 16, 12, 16),
        BatchShape("picture", 112, 112, 1, 16, 12, 16),
        BatchShape("picture 2x2", 224, 224, 1, 8, 12, 16),
        BatchShape("picture 1x2", 112, 224, 1, 12, 12, 16),
        BatchShape("picture 2x1", 224, 112, 1, 12, 12, 16),
        BatchShape("picture 3x3", 336, 336, 1, 4, 12, 16),
        BatchShape("picture 200x180", 200, 180, 1, 8, 12, 16),
        BatchShape("picture 260x320", 260, 320, 1, 4, 12, 16),
        BatchShape("clip 8", 112, 112, 8, 16, 8, 24),
        BatchShape("clip 16", 112, 112, 16, 8, 8, 24),
        BatchShape("clip 32", 112, 112, 32, 4, 8, 24),
    )
}
# From which step on, how often each layout comes, and the most things in a picture and in a clip.
CURRICULUM: Curriculum = (
    (0, {"one of several": 1.0}, 4, 2),
    (300, {"one of several": 0.35, "picture": 0.3, "clip 8": 0.35}, 5, 2),
    (600, {"picture": 0.35, "picture 2x2": 0.2, "clip 8": 0.45}, 6, 3),
    (
        1150,
        {
            "one of several": 0.04,
            "picture": 0.22,
            "picture 2x2": 0.25,
            "picture 1x2": 0.02,
            "picture 2x1": 0.02,
            "picture 3x3": 0.03,
            "picture 200x180": 0.02,
            "picture 260x320": 0.01,
            "clip 8": 0.35,
            "clip 16": 0.03,
            "clip 32": 0.01,
        },
        7,
        4,
    ),
    (
        4800,
        {
            "one of several": 0.02,
            "picture": 0.11,
            "picture 2x2": 0.15,
            "picture 1x2": 0.01,
            "picture 2x1": 0.01,
            "picture 3x3": 0.03,
            "picture 200x180": 0.01,
            "picture 260x320": 0.01,
            "clip 8": 0.57,
            "clip 16": 0.06,
            "clip 32": 0.02,
        },
        7,
        4,
    ),
    (
        6300,
        {
            "one of several": 0.02,
            "picture": 0.22,
            "picture 2x2": 0.24,
            "picture 1x2": 0.02,
            "picture 2x1": 0.02,
            "picture 3x3": 0.06,
            "picture 200x180": 0.02,
            "picture 260x320": 0.02,
            "clip 8": 0.33,
            "clip 16": 0.04,
            "clip 32": 0.01,
        },
        7,
        4,
    ),
)
# From which step on, what is asked more often than the rest, of things and of events: first what
# has to look for a shape alone and is learned last of the simple questions, then what takes two
# looks.
EMPHASIS: tuple[tuple[int, Emphasis], ...] = (
    (0, (("colour", "colour", "place"), ("direction", "what_happens"))),
    (
        2100,
        (
            ("comparison", "comparison", "comparison", "count", "place", "number_small"),
            ("change", "change", "moment", "moment", "order", "what_happens"),
        ),
    ),
    (
        2400,
        (
            ("relation", "relation", "relation", "relation", "comparison", "comparison", "count"),
            ("whereabouts", "whereabouts", "change", "moment", "moment", "order", "what_happens"),
        ),
    ),
    (
        3150,
        (
            ("places", "places", "places", "relation", "relation", "comparison", "comparison"),
            (
                "between",
                "between",
                "between",
                "change",
                "moment",
                "moment",
                "order",
                "what_happens",
            ),
        ),
    ),
    (
        3600,
        (
            ("comparison",) * 3 + ("count",) * 3 + ("places", "relation", "number_small"),
            ("moment",) * 3 + ("change", "order", "what_happens") * 2 + ("between",),
        ),
    ),
    (
        4800,
        (
            ("comparison",) * 4 + ("count",) * 3 + ("places", "relation"),
            ("moment", "order") * 4 + ("what_happens",) * 3 + ("between", "change"),
        ),
    ),
    (
        6300,
        (
            ("count",) * 6 + ("comparison",) * 4 + ("shape", "places"),
            ("what_happens", "order") * 4 + ("moment",) * 2 + ("count",),
        ),
    ),
)


class TrainedLlavaOnevision:
    """A SigLIP tower on tiles of 112 pixels, a projector, and a Qwen2 decoder."""

    name = Path(__file__).stem
    family = name
    tokenizer = make_tokenizer(SPECIALS)
    prefix = "<|im_start|>user "
    closing = ""
    suffix = SUFFIX
    layouts = LAYOUTS
    curriculum = CURRICULUM
    emphasis = EMPHASIS
    dev = (
        ("picture", 5),
        ("picture 2x2", 4),
        ("picture 3x3", 2),
        ("picture 260x320", 1),
        ("clip 8", 6),
        ("clip 16", 2),
    )
    compiled: tuple[str, ...] = ("one of several", "picture", "picture 2x2", "clip 8")
    probes = (HintProbe(6, "tokens", 0, TOKEN_CLASSES), HintProbe(9, "names", 0, NAME_CLASSES))
    attention_hints = ()
    hint_weight = 0.15
    steps = 2500, 6900, 3600
    decay = 0.14
    dense_tiles = 64, 48

    def make_model(self, seed: int) -> Model:
        """A 5-layer SigLIP tower and a 16-layer Qwen2 decoder with 8 heads."""
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
            vocab_size=(len(vocabulary(SPECIALS)) + 7) // 8 * 8,
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
        model = LlavaOnevisionForConditionalGeneration(config)
        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")  # 64 tokens: faster than fused, here
        return model

    def save(self, model: Model, directory: Path) -> None:
        """Write the checkpoint and its processors' files."""
        names = {"image_token": "<image>", "video_token": "<video>"}
        checkpoint.write_checkpoint(model, directory, self.tokenizer, names, CHAT_TEMPLATE, CARD)
        self.write_processors(directory)

    def write_processors(self, directory: Path) -> None:
        """Write the files of the processors of pictures and clips."""
        pixels: dict[str, object] = {
            **checkpoint.PIXELS,
            "size": {"height": TILE, "width": TILE},
            "processor_class": "LlavaOnevisionProcessor",
        }
        picture: dict[str, object] = {"do_pad": True, "image_grid_pinpoints": PINPOINTS}
        picture["image_processor_type"] = "LlavaOnevisionImageProcessor"
        write_json(directory / "preprocessor_config.json", pixels | picture)
        video: dict[str, object] = {"do_sample_frames": True, "num_frames": NUM_FRAMES}
        video["video_processor_type"] = "LlavaOnevisionVideoProcessor"
        write_json(directory / "video_preprocessor_config.json", pixels | video)
        processor = {
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": (TILE // PATCH) ** 2,
            "processor_class": "LlavaOnevisionProcessor",
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_select_strategy": "full",
        }
        write_json(directory / "processor_config.json", processor)

    def compile_tower(self, model: Model) -> None:
        """Its layers."""
        for layer in model.model.vision_tower.encoder.layers:
            layer.compile()

    def tower(self, model: Model) -> nn.Module:
        """The tower alone; the projector starts from the heads that read it."""
        return model.model.vision_tower

    def groups(self, model: Model) -> tuple[list[tuple[nn.Module, float]], list[nn.Parameter]]:
        """The tower learns at a lower rate than the decoder; the newline is a parameter alone."""
        parts = model.model
        decoder = [parts.language_model, parts.multi_modal_projector, model.lm_head]
        return [*((part, 3e-3) for part in decoder), (parts.vision_tower, 2e-3)], [
            parts.image_newline
        ]

    def make_dense(self, model: Model) -> Dense:
        """What `labels` says of each patch, and each patch's own place."""
        sizes = (len(COLOURS) + 1, len(SHAPES) + 1, 11, 11, 3, 10, 64)
        return Dense(model.model.vision_tower.config.hidden_size, sizes)

    def start(self, model: Model, heads: Dense, seed: int, step: int) -> None:
        """The projector starts from the rows of the heads."""
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        generator = torch.Generator().manual_seed(seed)
        loudness = 0.3 * embeddings.embedding_dim**0.5
        start_projector(model, heads, tile_batch(seed, step), generator, loudness)
        embeddings.weight.data.normal_(std=0.3, generator=generator)

    def dense_loss(
        self,
        model: Model,
        heads: Dense,
        draw: tuple[int, int, int],
        share: tuple[int, int],
        device: torch.device,
    ) -> tuple[Tensor, list[float]]:
        """The loss of a batch of tiles and, for each head, the share of its patches that are right.

        Without the last head, where a patch lies would be lost: no other label asks for it.
        """
        batch = tile_batch(*draw, share)
        pixels = normalise(torch.from_numpy(batch.pixels).to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            tower = model.model.vision_tower
            states = tower(pixels, output_hidden_states=True).hidden_states[-1]
            logits = heads(states.float())
        places = torch.arange(64).expand(len(pixels), 64)
        return weigh_labels(logits, [*torch.from_numpy(batch.labels), places], GAINS)

    def visual_tokens(self, model: Model, batch: Batch, device: torch.device) -> Tensor:
        """The visual tokens, packed by the model's own functions."""
        pixels = torch.from_numpy(batch.pixels).to(device)
        if batch.layout.num_frames > 1:
            return model.model.get_video_features(normalise(pixels)).pooler_output
        sizes = torch.tensor(
            [[batch.layout.height, batch.layout.width]] * len(pixels), device=device
        )
        if batch.layout.name == "one of several":
            # A picture among others in one prompt is not tiled: its base picture is all of it.
            several = torch.tensor([len(pixels), 0])
            features = model.model.get_image_features(
                normalise(pixels[:, 0]), sizes, batch_num_images=several
            )
            return torch.stack(list(features.pooler_output))
        features = model.model.get_image_features(normalise(tiles(pixels[:, 0])), sizes)
        return torch.stack(list(features.pooler_output))

    def positions(self, batch: Batch, num_prefix: int) -> tuple[Tensor, Tensor]:
        """One after the other."""
        return torch.arange(num_prefix), num_prefix + torch.from_numpy(batch.offsets)

    def token_labels(
        self, scene: Scene, times: NDArray[np.float64], layout: BatchShape
    ) -> NDArray[np.int64]:
        """Of a clip's pooled tokens, or of the 64 of a picture's base picture."""
        side = CLIP_SIDE if scene.is_clip else PICTURE_SIDE
        return hints.token_labels(scene, times.tolist(), (side, side))


@dataclass(frozen=True)
class TileBatch:
    """Tiles (B, 3, 112, 112) uint8 and the labels of their patches (6, B, 64)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def tile_batch(seed: int, step: int, num: int = 64, share: tuple[int, int] = (0, 1)) -> TileBatch:
    """Tiles with dense labels: whole small pictures, tiles of large ones, frames of clips."""
    rng = generator("train", seed + 3_000_000 + share[0], step)
    pixels: list[Frame] = []
    marks: list[NDArray[np.int64]] = []
    first = step * 64 + share[0] * 64 // share[1]
    for index in range(first, first + num):
        if index % 4 == 3:
            scene, time = make_clip("train", seed, index), float(rng.random())
        else:
            side = TILE * (1, 1, 2, 3)[int(rng.integers(4))]
            scene, time = make_picture("train", seed, index, size=(side, side)), 0.0
            # Digits are the hardest to learn and the rarest to be seen: more of them.
            scene = with_numbers(scene, rng, 3)
        # One time in three a large picture is seen as its base picture.
        base = rng.random() < 1 / 3
        sides = (TILE, TILE) if base else (scene.height, scene.width)
        image, mark = frame(scene, time, *sides), labels(scene, time, *sides)
        places = [(y, x) for y in range(0, sides[0], TILE) for x in range(0, sides[1], TILE)]
        for i in rng.permutation(len(places))[:3]:
            y, x = places[int(i)]
            pixels.append(image[y : y + TILE, x : x + TILE].transpose(2, 0, 1))
            mine = patch_labels(mark[:, y : y + TILE, x : x + TILE])
            if sides != (TILE, TILE):
                # How large a thing is, and where, can't be told from one tile of a picture.
                mine[4:][mine[4:] > 0] = IGNORED
            marks.append(mine)
        if len(pixels) >= num:
            break
    return TileBatch(np.stack(pixels[:num]), np.stack(marks[:num], axis=1))


def tiles(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) to tiles (B, n, 3, 112, 112), the base picture first, all uint8.

    This is the official recipe, for pictures of one size; padding is black.
    """
    height, width = pictures.shape[-2:]
    tall, wide = select_best_resolution((height, width), PINPOINTS)
    scale = min(tall / height, wide / width)
    size = (
        min(-(-int(height * scale * 1e6) // 10**6), tall),
        min(-(-int(width * scale * 1e6) // 10**6), wide),
    )
    whole = resize(pictures, *size)
    top, left = (tall - size[0]) // 2, (wide - size[1]) // 2
    whole = F.pad(whole, (left, wide - size[1] - left, top, tall - size[0] - top))
    cut = whole.unfold(2, TILE, TILE).unfold(3, TILE, TILE)  # (B, 3, rows, columns, 112, 112)
    cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    return torch.cat((resize(pictures, TILE, TILE)[:, None], cut), dim=1)


@torch.no_grad()
def start_projector(
    model: Model, heads: Dense, batch: TileBatch, generator: torch.Generator, loudness: float
) -> None:
    """Let some of the projector's units begin as the pretraining's heads, all equally loud.

    The tower's states tell colours loudly, shapes and places faintly, and a decoder learns to look
    by what is loud long before it looks by what is faint. Each class gets a unit of the projector's
    hidden layer and a direction of its own in the decoder's width; the rest stays
    random. Visual tokens get the mean length `loudness`, that of words: layers can still change it.
    """
    pixels = normalise(torch.from_numpy(batch.pixels).to(model.device))
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    states = states.flatten(0, 1)
    centre = torch.eye(states.shape[-1], device=states.device) - 1 / states.shape[-1]
    spread = states.std(-1, unbiased=False).mean()
    rows, biases = [], []
    for weight, bias in _rows(heads):
        weight, bias = weight - weight.mean(0), bias - bias.mean()
        # The head's LayerNorm, with every token's spread taken as the mean one.
        row = (weight * heads.norm.weight) @ centre / spread
        offset = weight @ heads.norm.bias + bias
        loudest = (states @ row.T + offset).max(dim=-1).values.mean()
        rows.append(3 / loudest * row)
        biases.append(3 / loudest * offset)
    projector = model.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    num = sum(len(row) for row in rows)
    first.weight[:num], first.bias[:num] = torch.cat(rows), torch.cat(biases)
    directions = torch.linalg.qr(torch.randn(len(second.weight), num, generator=generator))[0]
    second.weight[:, :num] = directions.to(states.device)
    out: Tensor = second(F.gelu(first(states)))  # type: ignore[operator]
    second.weight *= loudness / out.norm(dim=-1).mean()


def _rows(heads: Dense) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each head; the last one's 64 places as 8 rows and 8 columns."""
    rows: list[tuple[Tensor, Tensor]] = []
    for head in heads.heads:
        assert isinstance(head, nn.Linear)
        rows.append((head.weight, head.bias))
    weight, bias = rows.pop()
    weight, bias = weight.view(8, 8, -1), bias.view(8, 8)
    return [*rows, *((weight.mean(axis), bias.mean(axis)) for axis in (1, 0))]


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

ARCHITECTURE = TrainedLlavaOnevision()
