"""Training batches: scenes of one layout as pixels, their questions as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vtprune._dev.training.architecture import Architecture, BatchShape, Emphasis
from vtprune._dev.training.checkpoint import END_TOKEN
from vtprune._dev.training.extra_questions import EXTRA_KINDS, TRAINING_MAKERS
from vtprune._dev.training.hints import IGNORED, name_labels, names_of
from vtprune.demo.draw import Frame, frame
from vtprune.demo.questions import CLIP_KINDS, KINDS, PICTURE_KINDS, Question, draw_questions
from vtprune.demo.world import Scene, draw_number, generator, make_clip, make_picture


@dataclass(frozen=True)
class Batch:
    """Scenes as pixels and questions as tokens.

    `pixels` (B, T, 3, H, W) uint8; `tokens` and `targets` (B, R, L): a target is the token to be
    predicted AFTER its position, or -100; `segments` (B, R, L) is 1 at the tokens of a scene's
    first question, and so on, and 0 at padding; `offsets` (B, R, L) is a token's place in its
    question. `names` (B, R, L, 12) and `marks` (B, N, ...) are the hints at the questions' tokens
    and at the first N visual tokens. `number` is the batch's.
    """

    layout: BatchShape
    number: int
    pixels: NDArray[np.uint8]
    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    segments: NDArray[np.int64]
    offsets: NDArray[np.int64]
    questions: list[list[Question]]
    names: NDArray[np.int64]
    marks: NDArray[np.int64]


class TestSplitError(ValueError):
    """The trainer asked for the test split."""

    __test__ = False  # not a test, whatever its name


def check_split(split: str) -> str:
    """The split, unless it is test, which training may not see."""
    if split not in ("train", "dev"):
        raise TestSplitError(f"split is {split!r}: the trainer may draw from train and dev only")
    return split


class Encoder:
    """Questions to token rows, by the tokenizer that is shipped."""

    def __init__(self, architecture: Architecture) -> None:
        self.tokenizer, self.suffix = architecture.tokenizer, architecture.suffix
        end = self.tokenizer.token_to_id(END_TOKEN)
        assert end is not None
        self.end = end

    def words(self, row: Sequence[int]) -> list[str]:
        """The tokens of a row as words, without what says that one begins a word."""
        return [self.tokenizer.decode([token]).strip() for token in row]

    def encode(self, question: Question) -> tuple[list[int], list[int]]:
        """Tokens and targets of one question with its answer."""
        asked = self.tokenizer.encode(question.text + self.suffix).ids
        answer = [*self.tokenizer.encode(question.answer).ids, self.end]
        return asked + answer[:-1], [IGNORED] * (len(asked) - 1) + answer

    def pack(
        self, questions: Sequence[Question], layout: BatchShape
    ) -> tuple[NDArray[np.int64], list[Question]]:
        """Rows (4, R, L) of tokens, targets, segments and offsets, and the questions in them.

        Each question goes to the first row with room for it, and is left out where none has.
        """
        shape = layout.rows or layout.questions, layout.length
        out = np.zeros((4, *shape), dtype=np.int64)
        out[1] = IGNORED
        used = [0] * shape[0]
        packed: list[Question] = []
        for question in questions:
            tokens, targets = self.encode(question)
            num = len(tokens)
            if num > layout.length:
                text = question.text
                raise ValueError(f"{text!r} needs {num} tokens, a row has {layout.length}")
            free = [
                row
                for row, taken in enumerate(used)
                if taken + num <= layout.length and (layout.rows or not taken)
            ]
            if not free:
                continue
            packed.append(question)
            place = slice(used[free[0]], used[free[0]] + num)
            out[:, free[0], place] = tokens, targets, [len(packed)] * num, list(range(num))
            used[free[0]] += num
        return out, packed


def frame_times(num_frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """When a clip's frames are taken: first to last, or in equal steps that leave out the last."""
    if num_frames == 1:
        return np.zeros(1)
    if rng.random() < 0.5:
        return np.linspace(0, 1, num_frames)
    return np.arange(num_frames) / num_frames * float(rng.uniform(1.0, 1.07))


def to_pixels(scene: Scene, times: NDArray[np.float64], rng: np.random.Generator) -> Frame:
    """Frames (T, 3, H, W), every third clip with its colour at half resolution, as codecs do."""
    frames = np.stack([frame(scene, float(time)) for time in times])
    if scene.is_clip and rng.random() < 0.35:
        frames = _halve_colour(frames)
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))


def _halve_colour(frames: Frame) -> Frame:
    """Brightness as it is, colour averaged over 2 x 2 pixels."""
    values = frames.astype(np.float32)
    grey = values @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    colour = values - grey[..., None]
    count, height, width, _ = colour.shape
    colour = colour.reshape(count, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4))
    colour = colour.repeat(2, axis=1).repeat(2, axis=2)
    return np.clip(grey[..., None] + colour + 0.5, 0, 255).astype(np.uint8)


def make_scene(
    split: str, seed: int, index: int, layout: BatchShape, most: tuple[int, int]
) -> Scene:
    if layout.num_frames > 1:
        return make_clip(
            split,
            seed,
            index,
            num_frames=layout.num_frames,
            most_things=most[1],
            most_events=min(most[1], 3),
        )
    size = layout.height, layout.width
    return make_picture(split, seed, index, size=size, most_things=most[0])


def make_batch(
    architecture: Architecture,
    split: str,
    seed: int,
    number: int,
    layout: BatchShape,
    most: tuple[int, int] = (7, 4),
    emphasis: Emphasis | None = None,
    share: tuple[int, int] = (0, 1),
) -> Batch:
    """Batch `number` of a layout; `most` is the most things in a picture and in a clip.

    `emphasis` are kinds to ask more often, of things and of events, beside the training's own
    kinds; None asks the kinds of dev and test evenly.
    `share` (rank, processes) is the part of its scenes that one of several processes takes.
    """
    check_split(split)
    encoder = Encoder(architecture)
    pixels, rows, asked, named, marks = [], [], [], [], []
    for index in range(number * 64 + share[0], number * 64 + layout.scenes, share[1]):
        scene = make_scene(split, seed, index, layout, most)
        rng = generator(split, seed + 1_000_000, index)
        times = frame_times(layout.num_frames, rng)
        pixels.append(to_pixels(scene, times, rng))
        marks.append(architecture.token_labels(scene, times, layout))
        kinds: tuple[str, ...] = KINDS
        if emphasis is not None:
            kinds = (*PICTURE_KINDS, *emphasis[0], *EXTRA_KINDS)
            if scene.is_clip:
                kinds += (*CLIP_KINDS, *emphasis[1])
        questions = draw_questions(scene, rng, layout.questions, kinds, TRAINING_MAKERS)
        packed, questions = encoder.pack(questions, layout)
        rows.append(packed)
        asked.append(questions)
        names = names_of(scene)
        named.append(
            [
                name_labels(encoder.words(row), of, names)
                for row, of in zip(packed[0].tolist(), packed[2].tolist(), strict=True)
            ]
        )
    tokens, targets, segments, offsets = np.stack(rows, axis=1)
    return Batch(
        layout,
        number,
        np.stack(pixels),
        tokens,
        targets,
        segments,
        offsets,
        asked,
        np.array(named),
        np.stack(marks),
    )


def training_batch(
    architecture: Architecture, seed: int, step: int, share: tuple[int, int] = (0, 1)
) -> Batch:
    """The batch of one step, whatever came before: an interrupted run goes on with the same."""
    rng = generator("train", seed + 2_000_000, step)
    _, shares, most_picture, most_clip = [row for row in architecture.curriculum if step >= row[0]][
        -1
    ]
    names = list(shares)
    layout = architecture.layouts[
        names[int(rng.choice(len(names), p=np.array(list(shares.values()))))]
    ]
    emphasis = [asked for first, asked in architecture.emphasis if step >= first][-1]
    most = most_picture, most_clip
    return make_batch(architecture, "train", seed, step, layout, most, emphasis, share)


def with_numbers(
    scene: Scene, rng: np.random.Generator, num: int, only_small: bool = False
) -> Scene:
    """A picture with up to `num` more numbers, large and small, in its free cells."""
    taken = {(thing.row, thing.column) for thing in scene.things}
    taken |= {(number.row, number.column) for number in scene.numbers}
    cells = [(row, column) for row in range(3) for column in range(3)]
    free = [cell for cell in cells if cell not in taken]
    more = tuple(
        draw_number(
            rng, not only_small and bool(rng.integers(2)), *free[int(i)], scene.height, scene.width
        )
        for i in rng.permutation(len(free))[:num]
    )
    return replace(scene, numbers=scene.numbers + more)


def patch_labels(marks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels (6, 112, 112) to (6, 64): what covers most of a patch, if a tenth is covered."""
    num = len(marks)
    patches = marks.reshape(num, 8, 14, 8, 14).transpose(0, 1, 3, 2, 4).reshape(num * 64, 196)
    cells = (np.arange(num * 64)[:, None] * 12 + patches).ravel()
    counts = np.bincount(cells, minlength=num * 64 * 12).reshape(num, 64, 12)[..., 1:]
    return np.where(counts.max(axis=-1) >= 20, counts.argmax(axis=-1) + 1, 0)
