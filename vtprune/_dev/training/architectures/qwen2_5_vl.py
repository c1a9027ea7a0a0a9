"""Qwen2.5-VL: the second model's architecture, its patches and the course of its training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vtprune._dev.training import checkpoint, hints
from vtprune._dev.training.architecture import (
    AttentionHint,
    BatchShape,
    Curriculum,
    Emphasis,
    HintProbe,
)
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
from vtprune._dev.training.hints import (
    DIGIT_CLASSES,
    DIGITS,
    HOLDS,
    NAME_CLASSES,
    RELATION,
    RELATION_CLASSES,
    TOKEN_CLASSES,
)
from vtprune._dev.training.labels import labels
from vtprune._dev.training.packed import rms_norm, rotate
from vtprune._dev.training.pixels import normalise, resize
from vtprune.demo.draw import Frame, frame
from vtprune.demo.samples import CLIP_FRAMES, FRAMES_PER_SECOND
from vtprune.demo.world import COLOURS, SHAPES, TILE, Scene, generator, make_clip, make_picture
from vtprune.models.preprocess import patchify, smart_resize

Model = Qwen2_5_VLForConditionalGeneration
PATCH, MERGE, TEMPORAL = 14, 2, 2
SIDE = PATCH * MERGE  # pixels along a side of a token
WINDOW = 2  # tokens along a side of a window
NUM_FRAMES = 8
# With more, the last frames of a clip would lie after a short question, where transformers'
# releases count an answer's positions differently.
TOKENS_PER_SECOND = 3
# Pixels of a picture, and of a frame of a clip.
IMAGE_PIXELS, VIDEO_PIXELS = (168**2, 336**2), (56**2, TILE**2)
MOST_ROWS = 12
STILL = 1e-6  # radians a position
CELLS = 3  # along a side: the world's words for places
PLACE_CLASSES = (MOST_ROWS, MOST_ROWS, CELLS**2)  # row, column and cell of a token
# Where what `token_labels` says of a token begins among its columns, after TOKEN_CLASSES.
PLACE = len(TOKEN_CLASSES)
SHOWN = PLACE + len(PLACE_CLASSES)  # the number of what it shows
SIZE = SHOWN + 1  # of what it shows
SPECIALS = (
    *checkpoint.SPECIALS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
)  # fmt: skip
START, STOP, IMAGE, VIDEO = 4, 5, 6, 7
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }} {% if message['content'] is string %}
{{- '\n' + message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ '\n' + part['text'] }}
{%- else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}
{%- endif %}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif -%}
"""
# Dense labels of a patch, colour, shape, tens and units: how much more what it shows weighs.
DENSE = (len(COLOURS) + 1, len(SHAPES) + 1, 11, 11)
GAINS = (3.0, 3.0, 6.0, 6.0)
LAYOUTS = {
    layout.name: layout
    for layout in (
        BatchShape("picture", 112, 112, 1, 16, 14, 24, 6),
        BatchShape("picture 2x2", 224, 224, 1, 12, 14, 24, 6),
        BatchShape("picture 1x2", 112, 224, 1, 12, 14, 24, 6),
        BatchShape("picture 2x1", 224, 112, 1, 12, 14, 24, 6),
        BatchShape("picture 3x3", 336, 336, 1, 6, 14, 24, 6),
        BatchShape("picture 200x180", 200, 180, 1, 12, 14, 24, 6),
        BatchShape("picture 260x320", 260, 320, 1, 8, 14, 24, 6),
        BatchShape("clip 8", 112, 112, 8, 16, 12, 24, 5),
        BatchShape("clip 16", 112, 112, 16, 8, 12, 24, 5),
    )
}
# From which step on, how often each layout comes, and the most things in a picture and in a clip.
CURRICULUM: Curriculum = (
    (0, {"picture": 0.65, "clip 8": 0.35}, 4, 2),
    (400, {"picture": 0.35, "picture 2x2": 0.2, "clip 8": 0.45}, 6, 3),
    (
        900,
        {
            "picture": 0.19,
            "picture 2x2": 0.19,
            "picture 1x2": 0.02,
            "picture 2x1": 0.02,
            "picture 3x3": 0.03,
            "picture 200x180": 0.03,
            "picture 260x320": 0.02,
            "clip 8": 0.44,
            "clip 16": 0.06,
        },
        7,
        4,
    ),
)
# From which step on, what is asked more often than the rest, of things and of events.
EMPHASIS: tuple[tuple[int, Emphasis], ...] = (
    (0, (("colour", "colour", "place"), ("direction", "what_happens"))),
    (
        600,
        (
            ("comparison",) * 3 + ("count",) * 3 + ("places", "relation", "number_small"),
            ("moment", "order") * 2 + ("what_happens",) * 2 + ("change", "between"),
        ),
    ),
    (
        1350,
        (
            ("place", "number_large") * 3 + ("number_small",) * 2 + ("comparison", "count"),
            ("moment", "order") * 2 + ("what_happens",) * 2 + ("change", "between"),
        ),
    ),
    (
        2400,
        (
            ("comparison",) * 4 + ("count",) * 3 + ("number_large", "number_small", "place") * 2,
            ("what_happens", "order") * 4 + ("moment",) * 3 + ("count", "number_small"),
        ),
    ),
    (
        4100,
        (
            ("comparison",) * 5 + ("count", "shape", "number_small") * 3 + ("relation",),
            ("what_happens", "order", "moment") * 4 + ("count", "number_small"),
        ),
    ),
)


class TrainedQwen25VL:
    """A tower of windows on patches of 14 pixels, a merger of 2 x 2 of them, and a decoder."""

    name = Path(__file__).stem
    family = name
    tokenizer = make_tokenizer(SPECIALS)
    prefix = "<|im_start|>user <|vision_start|>"
    closing = "<|vision_end|>"
    suffix = SUFFIX
    layouts = LAYOUTS
    curriculum = CURRICULUM
    emphasis = EMPHASIS
    dev = (
        ("picture", 5),
        ("picture 2x2", 5),
        ("picture 3x3", 2),
        ("picture 260x320", 1),
        ("clip 8", 7),
        ("clip 16", 2),
    )
    compiled = ("picture", "picture 2x2", "clip 8")
    probes = (
        HintProbe(1, "tokens", PLACE, PLACE_CLASSES),
        HintProbe(7, "tokens", 0, TOKEN_CLASSES),
        HintProbe(12, "names", 0, (*NAME_CLASSES, *DIGIT_CLASSES)),
        HintProbe(3, "names", 0, NAME_CLASSES[:1]),
        HintProbe(3, "names", DIGITS, DIGIT_CLASSES),
        HintProbe(2, "tokens", SIZE, (2,)),
        HintProbe(15, "names", RELATION, RELATION_CLASSES),
        HintProbe(17, "names", HOLDS, (2,)),
    )
    attention_hints = tuple(AttentionHint(layer, 0, SHOWN) for layer in (3, 9))
    hint_weight = 0.3
    steps = 1500, 6000, 0
    decay = 0.15
    dense_tiles = 64, 32

    def make_model(self, seed: int) -> Model:
        """A 6-layer tower, two of them with full attention, and 20 layers of 24 query heads."""
        vision = {
            "depth": 6,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "tokens_per_second": TOKENS_PER_SECOND,
            "window_size": WINDOW * SIDE,
            "fullatt_block_indexes": [2, 5],
            "out_hidden_size": 384,
        }
        text = {
            "vocab_size": (len(vocabulary(SPECIALS)) + 7) // 8 * 8,
            "hidden_size": 384,
            "intermediate_size": 256,
            "num_hidden_layers": 20,
            "num_attention_heads": 24,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": rope_parameters(),
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": END,
            "pad_token_id": PAD,
        }  # fmt: skip
        config = Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=STOP,
            tie_word_embeddings=False,
        )
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)

    def save(self, model: Model, directory: Path) -> None:
        """Write the checkpoint and its processors' files."""
        names = {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        }
        checkpoint.write_checkpoint(model, directory, self.tokenizer, names, CHAT_TEMPLATE, CARD)
        common: dict[str, object] = {
            **checkpoint.PIXELS,
            "patch_size": PATCH,
            "merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "processor_class": "Qwen2_5_VLProcessor",
        }
        for file, kind, (least, most) in (
            ("preprocessor_config.json", "image_processor_type", IMAGE_PIXELS),
            ("video_preprocessor_config.json", "video_processor_type", VIDEO_PIXELS),
        ):
            size = {"shortest_edge": least, "longest_edge": most}
            is_image = kind.startswith("image")
            class_name = "Qwen2VLImageProcessor" if is_image else "Qwen2VLVideoProcessor"
            sampling = {} if is_image else {"do_sample_frames": True, "num_frames": NUM_FRAMES}
            content = common | {"size": size, kind: class_name} | sampling
            write_json(directory / file, content)
        write_json(directory / "processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})

    def compile_tower(self, model: Model) -> None:
        """Nothing: a step spends a tenth of its time here, in many shapes."""

    def tower(self, model: Model) -> nn.Module:
        """The tower and its merger: what it makes are the decoder's visual tokens."""
        return model.model.visual

    def groups(self, model: Model) -> tuple[list[tuple[nn.Module, float]], list[nn.Parameter]]:
        """The tower learns at a lower rate than the decoder."""
        parts = [(part, 3e-3) for part in (model.model.language_model, model.lm_head)]
        return [*parts, (model.model.visual, 2e-3)], []

    def make_dense(self, model: Model) -> Dense:
        """What `labels` says of the 4 patches of a token, in both of its frames."""
        width = model.config.get_text_config().hidden_size
        return Dense(width, DENSE, TEMPORAL * MERGE**2)

    @torch.no_grad()
    def start(self, model: Model, heads: Dense, seed: int, step: int) -> None:
        """Visual tokens and words as loud as each other, not beyond what layers can change."""
        batch = pair_batch(seed, step)
        tokens = read_frames(model, torch.from_numpy(batch.pixels))
        last = model.model.visual.merger.mlp[-1]
        assert isinstance(last, nn.Linear)
        gain = 0.3 * tokens.shape[-1] ** 0.5 / tokens.norm(dim=-1).mean()
        last.weight.mul_(gain)
        last.bias.mul_(gain)
        generator = torch.Generator().manual_seed(seed)
        embeddings = model.get_input_embeddings()
        embeddings.weight.normal_(std=0.3, generator=generator)  # type: ignore[operator, union-attr]

    def dense_loss(
        self,
        model: Model,
        heads: Dense,
        draw: tuple[int, int, int],
        share: tuple[int, int],
        device: torch.device,
    ) -> tuple[Tensor, list[float]]:
        """The loss of a batch of pairs of frames and the share of each label that is right."""
        batch = pair_batch(*draw, share)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = heads(read_frames(model, torch.from_numpy(batch.pixels).to(device)).float())
        return weigh_labels(logits, list(torch.from_numpy(batch.labels)), GAINS)

    def visual_tokens(self, model: Model, batch: Batch, device: torch.device) -> Tensor:
        """Every grid of a batch is of one size: a pair of frames, or a picture twice."""
        pixels = torch.from_numpy(batch.pixels).to(device)
        size = resized(batch.layout)
        frames = resize(pixels.flatten(0, 1), *size)
        if batch.layout.num_frames == 1:
            frames = frames.repeat_interleave(TEMPORAL, dim=0)
        tokens = read_frames(model, frames.unflatten(0, (-1, TEMPORAL)))
        return tokens.reshape(len(pixels), -1, tokens.shape[-1])

    def positions(self, batch: Batch, num_prefix: int) -> tuple[Tensor, Tensor]:
        """Of time, height and width, as `get_rope_index` gives them."""
        rows, columns = grid_of(batch.layout)
        steps = -(-batch.layout.num_frames // TEMPORAL)
        first = num_prefix - 1 - steps * rows * columns
        time = (torch.arange(steps) * interval(batch)).long()
        grids = torch.meshgrid(time, torch.arange(rows), torch.arange(columns), indexing="ij")
        visual = first + torch.stack([grid.flatten() for grid in grids])
        text = torch.arange(first).expand(3, -1)
        stop = first + max(rows, columns)
        before = torch.cat((text, visual, torch.full((3, 1), stop)), dim=1)
        return before, stop + 1 + torch.from_numpy(batch.offsets)

    def token_labels(
        self, scene: Scene, times: NDArray[np.float64], layout: BatchShape
    ) -> NDArray[np.int64]:
        """Of every token: what has happened there or its ordinals; its row, column and cell; what
        it shows, and its size."""
        grid = grid_of(layout)
        seen = times[TEMPORAL - 1 :: TEMPORAL].tolist() if scene.is_clip else [0.0]
        history = hints.token_labels(scene, seen, grid)
        places = np.indices(grid).reshape(2, -1).T
        down, across = (CELLS * (2 * places + 1) // (2 * np.array(grid))).T
        marks = np.column_stack((places, CELLS * down + across))
        things = hints.things_of_tokens(scene, seen, grid)
        own = np.column_stack((things, hints.sizes(scene, things)))
        return np.concatenate((history, np.tile(marks, (len(seen), 1)), own), axis=1)


def rope_parameters() -> dict[str, object]:
    """Of a head's eight frequencies one each for time, height and width, and five that don't turn.

    The usual ones turn nearly all of a head within a question's distance from its picture, so that
    little of it is left to compare words with visual tokens wherever they are. A real checkpoint's
    heads are eight times as wide, and most of their frequencies are as good as still.
    """
    turns = (0.6, STILL, 0.45, STILL, STILL, 0.45, STILL, STILL)
    factors = [1 / turn for turn in turns]
    return {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 4096,
        "mrope_section": [2, 3, 3],
    }


def resized(layout: BatchShape) -> tuple[int, int]:
    """Height and width that the official preparation gives a picture, or a frame."""
    limits = IMAGE_PIXELS if layout.num_frames == 1 else VIDEO_PIXELS
    return smart_resize(layout.height, layout.width, SIDE, *limits)


def grid_of(layout: BatchShape) -> tuple[int, int]:
    """Rows and columns of tokens."""
    height, width = resized(layout)
    return height // SIDE, width // SIDE


def interval(batch: Batch) -> float:
    """Positions from one pair of frames to the next: a batch's clips are of one length."""
    length = CLIP_FRAMES[batch.number % len(CLIP_FRAMES)] / FRAMES_PER_SECOND
    return TOKENS_PER_SECOND * TEMPORAL * length / batch.layout.num_frames


def read_frames(model: Model, frames: Tensor) -> Tensor:
    """The tokens (G, n, D) of pairs of frames (G, 2, 3, H, W), uint8, all of one size.

    As the stock tower makes them, with windows as a mask; `tests/test_demo_architectures.py` holds
    the two equal.
    """
    visual = model.model.visual
    count, (height, width) = len(frames), frames.shape[-2:]
    patches = patchify(normalise(frames.flatten(0, 1)), PATCH, MERGE, TEMPORAL)
    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1)).float()
    x = x.unflatten(0, (count, -1))
    places = _places(height // PATCH, width // PATCH).to(x.device)
    cos, sin = _turns(places, model.config.vision_config)
    windows = places // (WINDOW * MERGE)
    together = (windows[:, None] == windows).all(-1)
    for number, block in enumerate(visual.blocks):
        mask = None if number in visual.fullatt_block_indexes else together
        x = tower_layer(x, block, cos, sin, mask)
    tokens: Tensor = visual.merger(x.flatten(0, 1))
    return tokens.unflatten(0, (count, -1))


def tower_layer(x: Tensor, block: Any, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    """One layer of the tower over x (G, n, D); a patch sees those that `mask` (n, n) has."""
    attention, mlp = block.attn, block.mlp
    heads = attention.num_heads
    qkv = attention.qkv(rms_norm(x, block.norm1.weight, 1e-6)).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.unbind(-3)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    x = x + attention.proj(out.transpose(1, 2).flatten(-2))
    return x + mlp(rms_norm(x, block.norm2.weight, 1e-6))


def _places(rows: int, columns: int) -> Tensor:
    """Row and column (n, 2) of each patch, the patches of a token next to each other."""
    grid = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1
    )
    blocks = grid.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, 2)
    return blocks.transpose(1, 2).reshape(-1, 2)


def _turns(places: Tensor, config: object) -> tuple[Tensor, Tensor]:
    """Cosine and sine (n, 1, head width): half the frequencies of the row, half of the column."""
    half = config.hidden_size // config.num_heads // 2  # type: ignore[attr-defined]
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, device=places.device) / half)
    angles = (places[..., None] * frequencies).flatten(1)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class PairBatch:
    """Pairs of frames (B, 2, 3, 112, 112) uint8 and the labels of their patches (4, B, 16, 8).

    A token's 8 are those of its 4 patches in the first frame, then in the second.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def pair_batch(seed: int, step: int, num: int = 64, share: tuple[int, int] = (0, 1)) -> PairBatch:
    """Parts of pictures as a picture's preparation resizes them, and frames of clips in pairs."""
    rng = generator("train", seed + 3_000_000 + share[0], step)
    pixels: list[Frame] = []
    marks: list[NDArray[np.int64]] = []
    first = step * 64 + share[0] * 64 // share[1]
    for index in range(first, first + num):
        if index % 3 == 2:
            scene = make_clip("train", seed, index)
            time = float(rng.random())
            times = [time, min(time + float(rng.uniform(0.05, 0.14)), 1.0)]
            frames = np.stack([frame(scene, t) for t in times]).transpose(0, 3, 1, 2)
            shown = np.stack([labels(scene, t) for t in times])
        else:
            # Digits are the hardest to learn and the rarest to be seen, small ones above all.
            many = index % 6 in (1, 3)
            side = TILE if many else TILE * (1, 2, 2, 3)[int(rng.integers(4))]
            scene = make_picture("train", seed, index, size=(side, side))
            scene = with_numbers(scene, rng, 9 if many else 3, only_small=many)
            image = torch.from_numpy(frame(scene, 0.0).transpose(2, 0, 1).copy())[None]
            large = (side, side) if many else smart_resize(side, side, SIDE, *IMAGE_PIXELS)
            frames = resize(image, *large).numpy().repeat(TEMPORAL, axis=0)
            shown = labels(scene, 0.0, *large)[None].repeat(TEMPORAL, axis=0)
        # Windows lie on a grid of their own size; a part begins where a window does.
        most = (frames.shape[-1] - TILE) // (WINDOW * SIDE)
        y, x = (WINDOW * SIDE * int(rng.integers(most + 1)) for _ in range(2))
        part = slice(y, y + TILE), slice(x, x + TILE)
        pixels.append(np.ascontiguousarray(frames[:, :, part[0], part[1]]))
        marks.append(_token_marks(shown[:, : len(DENSE), part[0], part[1]]))
    return PairBatch(np.stack(pixels), np.stack(marks, axis=1))


def _token_marks(shown: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels (2, kinds, 112, 112) to (kinds, tokens, 2 x patches of a token)."""
    side = TILE // SIDE
    patches = np.stack([patch_labels(of_frame) for of_frame in shown])
    blocks = patches.reshape(TEMPORAL, len(DENSE), side, MERGE, side, MERGE)
    return blocks.transpose(1, 2, 4, 0, 3, 5).reshape(len(DENSE), side**2, -1)


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# vtprune's second demonstration model

A Qwen2.5-VL model of 14 million parameters (tower of 6 layers with windows, 2 x 2 merger; decoder
of 20 layers with 24 query heads), trained from nothing on vtprune's own generated world of coloured
shapes, written numbers and moving objects. What was chosen on the first model is tested on it.

It answers questions about that world and knows nothing else: do not use it for real pictures.
Kinds of question: {kinds}.

Trained by `python -m vtprune._dev.training.train --architecture qwen2_5_vl`; the recipe and what
was reached are in the project's `docs/second-model.md`. Weights are stored in float16 and load as
float32.

Licence: Apache-2.0, as the project. No data of others was used.
"""
ARCHITECTURE = TrainedQwen25VL()
