"""The embedded model's world: scenes of coloured shapes and numbers, drawn at random by a seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

SPLITS = ("train", "dev", "test")
COLOURS = {
    "red": (225, 40, 40),
    "orange": (250, 145, 20),
    "yellow": (245, 230, 60),
    "green": (40, 170, 60),
    "cyan": (70, 220, 225),
    "blue": (50, 80, 230),
    "purple": (165, 50, 200),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
MOMENTS = ("at the start", "in the middle", "at the end")
# Never drawn in train or dev, drawn more often than others in test.
HELD_OUT = frozenset(
    {("purple", "star"), ("cyan", "cross"), ("orange", "ring"), ("white", "triangle")}
)
TILE = 112
SLOT_STARTS = (0.07, 0.34, 0.61)
EVENT_LENGTH = 0.22


@dataclass(frozen=True)
class Thing:
    """A coloured shape; `x`, `y` in fractions of the picture, `radius` of its shorter side."""

    colour: str
    shape: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Number:
    """A written number; `height` is that of its digits, as a fraction of the shorter side."""

    digits: str
    large: bool
    row: int
    column: int
    x: float
    y: float
    height: float


@dataclass(frozen=True)
class Event:
    """What happens to one thing (or to number 0, when it flashes) between two times in [0, 1].

    `detail` is the direction of a move or the colour that a thing turns.
    """

    verb: str
    thing: int
    slot: int
    start: float
    end: float
    detail: str = ""
    steps: int = 0

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2


@dataclass(frozen=True)
class Scene:
    """A picture (one frame, no events) or a clip, as state; `draw.frame` makes pixels of it."""

    things: tuple[Thing, ...]
    numbers: tuple[Number, ...]
    events: tuple[Event, ...]
    height: int
    width: int
    num_frames: int
    background: int

    @property
    def is_clip(self) -> bool:
        return self.num_frames > 1


def generator(split: str, seed: int, index: int) -> np.random.Generator:
    """Return the random generator of one scene, seeded by a hash of (split, seed, index)."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}")
    digest = hashlib.sha256(f"{split}/{seed}/{index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def with_article(name: str) -> str:
    """Return "a red circle", "an orange ring"."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def describe_event(scene: Scene, event: Event) -> str:
    """Return an event in words: "red circle moves left", "a blue square appears"."""
    if event.verb == "flashes":
        return f"number {scene.numbers[0].digits} flashes"
    name = scene.things[event.thing].name
    if event.verb == "appears":
        return f"{with_article(name)} appears"
    return f"{name} {event.verb} {event.detail}".rstrip()


def what_happens(scene: Scene) -> str:
    """Return a clip's events in order, as one sentence."""
    return ", then ".join(describe_event(scene, event) for event in scene.events)


def make_picture(
    split: str, seed: int, index: int, *, size: tuple[int, int] = (TILE, TILE), most_things: int = 7
) -> Scene:
    """Draw a picture of `size` (height, width): things and numbers in the cells of a 3 x 3 grid."""
    rng = generator(split, seed, index)
    height, width = size
    cells = [(int(cell) // 3, int(cell) % 3) for cell in rng.permutation(9)]
    colours, shapes = _draw_palette(rng)
    names = [
        _draw_pair(rng, split, colours, shapes)
        for _ in range(int(rng.integers(1, most_things + 1)))
    ]
    things = tuple(_draw_thing(rng, *name, *cells.pop(), height, width) for name in names)
    numbers = []
    if cells and rng.random() < 0.5:
        numbers.append(draw_number(rng, True, *cells.pop(), height, width))
    if cells and min(height, width) >= 2 * TILE - 40 and rng.random() < 0.6:
        numbers.append(draw_number(rng, False, *cells.pop(), height, width))
    return Scene(things, tuple(numbers), (), height, width, 1, int(rng.integers(2**31)))


def make_clip(
    split: str,
    seed: int,
    index: int,
    *,
    num_frames: int = 16,
    size: int = TILE,
    most_things: int = 4,
    most_events: int = 3,
) -> Scene:
    """Draw a clip of 1 to `most_events` events, each in another third of the clip."""
    rng = generator(split, seed, index)
    cells = [(int(cell) // 3, int(cell) % 3) for cell in rng.permutation(9)]
    names: list[tuple[str, str]] = []
    count = int(rng.integers(1, most_things + 1))
    while len(names) < count:
        name = _draw_pair(rng, split, list(COLOURS), list(SHAPES))
        if name not in names:
            names.append(name)
    things = [_draw_thing(rng, *name, *cells.pop(), size, size, "large") for name in names]
    numbers: list[Number] = []
    events: list[Event] = []
    slots = sorted(int(s) for s in rng.permutation(3)[: int(rng.integers(1, most_events + 1))])
    untouched = [int(i) for i in rng.permutation(count)]
    for slot in slots:
        start = SLOT_STARTS[slot] + 0.03 * float(rng.random())
        verbs = rng.choice(5, size=5, replace=False, p=[0.36, 0.18, 0.16, 0.2, 0.1])
        for verb in (("moves", "appears", "vanishes", "turns", "flashes")[int(v)] for v in verbs):
            if verb == "flashes":
                if numbers or not cells:
                    continue
                numbers.append(draw_number(rng, True, *cells.pop(), size, size))
                events.append(Event(verb, 0, slot, start, start + EVENT_LENGTH))
                break
            if not untouched:
                continue
            thing = untouched[-1]
            detail, steps = "", 0
            if verb == "moves":
                detail, steps = _draw_move(rng, things[thing], cells)
                if not steps:
                    continue
            if verb == "turns":
                detail = _draw_new_colour(rng, split, things[thing], names)
                names.append((detail, things[thing].shape))
            untouched.pop()
            events.append(Event(verb, thing, slot, start, start + EVENT_LENGTH, detail, steps))
            break
    background = int(rng.integers(2**31))
    return Scene(tuple(things), tuple(numbers), tuple(events), size, size, num_frames, background)


def things_at(scene: Scene, time: float) -> list[Thing]:
    """Return the things in view at `time` in [0, 1], with their places and colours then."""
    things = list(scene.things)
    hidden = set()
    for event in scene.events:
        if event.verb == "moves":
            thing = things[event.thing]
            down, right = DIRECTIONS[event.detail]
            part = min(max((time - event.start) / (event.end - event.start), 0.0), 1.0)
            x, y = thing.x + right * part * event.steps / 3, thing.y + down * part * event.steps / 3
            row, column = thing.row, thing.column
            if part >= 0.5:
                row, column = row + down * event.steps, column + right * event.steps
            things[event.thing] = replace(thing, x=x, y=y, row=row, column=column)
        elif event.verb == "turns" and time >= event.middle:
            things[event.thing] = replace(things[event.thing], colour=event.detail)
        elif event.verb == ("appears" if time < event.middle else "vanishes"):
            hidden.add(event.thing)
    return [thing for i, thing in enumerate(things) if i not in hidden]


def numbers_at(scene: Scene, time: float) -> list[Number]:
    """Return the numbers in view at `time` in [0, 1]."""
    for event in scene.events:
        if event.verb == "flashes" and not event.start <= time <= event.end:
            return []
    return list(scene.numbers)


def _draw_palette(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Draw the colours and shapes to choose from: often few, so that some come twice."""
    colours, shapes = list(COLOURS), list(SHAPES)
    if rng.random() < 0.5:
        shapes = [shapes[i] for i in rng.permutation(6)[: int(rng.integers(1, 4))]]
    if rng.random() < 0.35:
        colours = [colours[i] for i in rng.permutation(8)[: int(rng.integers(2, 4))]]
    return colours, shapes


def _draw_pair(
    rng: np.random.Generator, split: str, colours: list[str], shapes: list[str]
) -> tuple[str, str]:
    """Draw a colour and a shape; a held-out pair in test alone, there one time in six."""
    if split == "test" and rng.random() < 1 / 6:
        return sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
    while True:
        pair = colours[int(rng.integers(len(colours)))], shapes[int(rng.integers(len(shapes)))]
        if pair not in HELD_OUT:
            return pair
        if all((colour, shape) in HELD_OUT for colour in colours for shape in shapes):
            colours, shapes = list(COLOURS), list(SHAPES)


def _draw_thing(
    rng: np.random.Generator,
    colour: str,
    shape: str,
    row: int,
    column: int,
    height: int,
    width: int,
    size: str = "",
) -> Thing:
    size = size or ("small", "large")[int(rng.integers(2))]
    low, high = (0.24, 0.28) if size == "small" else (0.40, 0.46)
    radius = float(rng.uniform(low, high)) / 3
    x, y = _draw_centre(rng, row, column, radius, radius, height, width)
    return Thing(colour, shape, size, row, column, x, y, radius)


def draw_number(
    rng: np.random.Generator, large: bool, row: int, column: int, height: int, width: int
) -> Number:
    digits = str(int(rng.integers(10, 100)))
    shorter = min(height, width)
    tall = float(rng.uniform(0.165, 0.18)) if large else float(rng.uniform(9.0, 11.0)) / shorter
    # From its centre, the plate under two digits is 0.93 of their height wide and 0.65 high.
    x, y = _draw_centre(rng, row, column, 0.93 * tall, 0.65 * tall, height, width)
    if not large:
        x, y = (
            _inside_tile(x, 0.95 * tall, shorter, width),
            _inside_tile(y, 0.67 * tall, shorter, height),
        )
    return Number(digits, large, row, column, x, y, tall)


def _draw_centre(
    rng: np.random.Generator, row: int, column: int, rx: float, ry: float, height: int, width: int
) -> tuple[float, float]:
    """Draw a centre that keeps the object in its cell; rx, ry are fractions of the shorter side."""
    shorter = min(height, width)
    room_x = max(0.5 - 3 * rx * shorter / width, 0.0)
    room_y = max(0.5 - 3 * ry * shorter / height, 0.0)
    x = (column + 0.5 + float(rng.uniform(-room_x, room_x))) / 3
    y = (row + 0.5 + float(rng.uniform(-room_y, room_y))) / 3
    return x, y


def _inside_tile(centre: float, half: float, shorter: int, length: int) -> float:
    """Move a centre so that a small number lies within one tile, not across two."""
    tiles = max(round(length / TILE), 1)
    reach = half * shorter / length
    first, last = int((centre - reach) * tiles), int((centre + reach) * tiles)
    if first == last:
        return centre
    border = last / tiles
    return border - reach - 1e-3 if centre < border else border + reach + 1e-3


def _draw_move(
    rng: np.random.Generator, thing: Thing, cells: list[tuple[int, int]]
) -> tuple[str, int]:
    """Draw a direction and 1 or 2 steps, and take the cells; 0 steps where no cell is free."""
    for direction in (list(DIRECTIONS)[i] for i in rng.permutation(4)):
        down, right = DIRECTIONS[direction]
        path = [(thing.row + down * s, thing.column + right * s) for s in (1, 2)]
        steps = 2 if all(cell in cells for cell in path) else int(path[0] in cells)
        if steps:
            for cell in path[:steps]:
                cells.remove(cell)
            return direction, steps
    return "", 0


def _draw_new_colour(
    rng: np.random.Generator, split: str, thing: Thing, names: list[tuple[str, str]]
) -> str:
    while True:
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        pair = (colour, thing.shape)
        if pair not in names and (split == "test" or pair not in HELD_OUT):
            return colour
