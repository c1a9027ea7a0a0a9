"""Training batches: scenes of one layout as pixels, their questions as tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vtprune._dev.training.checkpoint import END, make_tokenizer
from vtprune._dev.training.extra_questions import EXTRA_KINDS, TRAINING_MAKERS
from vtprune._dev.training.hints import IGNORED, name_labels, names_of, token_labels
from vtprune._dev.training.labels import labels
from vtprune.demo.draw import Frame, frame
from vtprune.demo.questions import CLIP_KINDS, KINDS, PICTURE_KINDS, Question, draw_questions
from vtprune.demo.world import TILE, Scene, draw_number, generator, make_clip, make_picture

PREFIX = "<|im_start|>user "
SUFFIX = "<|im_end|><|im_start|>assistant\n"


@dataclass(frozen=True)
class BatchShape:
    """What a batch holds: pictures of (height, width), or clips of `num_frames` frames of one tile.

    `questions` is the number of questions a scene, `length` the tokens each is padded to.
    """

    name: str
    height: int
    width: int
    num_frames: int
    scenes: int
    questions: int
    length: int


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
CURRICULUM: tuple[tuple[int, dict[str, float], int, int], ...] = (
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
Emphasis = tuple[tuple[str, ...], tuple[str, ...]]
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


@dataclass(frozen=True)
class Batch:
    """Scenes as pixels and questions as tokens.

    `pixels` (B, T, 3, H, W) uint8; `tokens` and `targets` (B, Q, L): a target is the token to be
    predicted AFTER its position, or -100; `questions` are those of each scene. `names` (B, Q, L, 5)
    and `marks` (B, N, 5) are the hints at the questions' tokens and at the first N visual tokens.
    """

    layout: BatchShape
    pixels: NDArray[np.uint8]
    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
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

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.prefix = self.tokenizer.encode(PREFIX).ids

    def row(self, question: Question, length: int) -> tuple[list[int], list[int]]:
        """Tokens and targets of one question with its answer, padded to `length`."""
        asked = self.tokenizer.encode(question.text + SUFFIX).ids
        answer = [*self.tokenizer.encode(question.answer).ids, END]
        tokens = asked + answer[:-1]
        targets = [IGNORED] * (len(asked) - 1) + answer
        if len(tokens) > length:
            raise ValueError(f"{question.text!r} needs {len(tokens)} tokens, a row has {length}")
        room = length - len(tokens)
        return tokens + [0] * room, targets + [IGNORED] * room


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
    encoder = Encoder()
    pixels, tokens, targets, asked, named, marks = [], [], [], [], [], []
    for index in range(number * 64 + share[0], number * 64 + layout.scenes, share[1]):
        scene = make_scene(split, seed, index, layout, most)
        rng = generator(split, seed + 1_000_000, index)
        times = frame_times(layout.num_frames, rng)
        pixels.append(to_pixels(scene, times, rng))
        marks.append(token_labels(scene, times))
        kinds: tuple[str, ...] = KINDS
        if emphasis is not None:
            kinds = (*PICTURE_KINDS, *emphasis[0], *EXTRA_KINDS)
            if scene.is_clip:
                kinds += (*CLIP_KINDS, *emphasis[1])
        questions = draw_questions(scene, rng, layout.questions, kinds, TRAINING_MAKERS)
        rows = [encoder.row(question, layout.length) for question in questions]
        empty = [0] * layout.length, [IGNORED] * layout.length
        rows += [empty] * (layout.questions - len(rows))
        tokens.append([row[0] for row in rows])
        targets.append([row[1] for row in rows])
        asked.append(questions)
        names = names_of(scene)
        named.append([name_labels(row[0], names) for row in rows])
    return Batch(
        layout,
        np.stack(pixels),
        np.array(tokens),
        np.array(targets),
        asked,
        np.array(named),
        np.stack(marks),
    )


def training_batch(seed: int, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
    """The batch of one step, whatever came before: an interrupted run goes on with the same."""
    rng = generator("train", seed + 2_000_000, step)
    _, shares, most_picture, most_clip = [row for row in CURRICULUM if step >= row[0]][-1]
    names = list(shares)
    layout = LAYOUTS[names[int(rng.choice(len(names), p=np.array(list(shares.values()))))]]
    emphasis = [asked for first, asked in EMPHASIS if step >= first][-1]
    most = most_picture, most_clip
    return make_batch("train", seed, step, layout, most, emphasis, share)


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


def with_numbers(scene: Scene, rng: np.random.Generator, num: int) -> Scene:
    """A picture with up to `num` more numbers, large and small, in its free cells."""
    taken = {(thing.row, thing.column) for thing in scene.things}
    taken |= {(number.row, number.column) for number in scene.numbers}
    cells = [(row, column) for row in range(3) for column in range(3)]
    free = [cell for cell in cells if cell not in taken]
    more = tuple(
        draw_number(rng, bool(rng.integers(2)), *free[int(i)], scene.height, scene.width)
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
