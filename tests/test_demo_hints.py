"""What training's hints say of names and visual tokens, on scenes made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vtprune._dev.training.checkpoint import SPECIALS, make_tokenizer
from vtprune._dev.training.hints import (
    DETAILS,
    DIGIT_CLASSES,
    HOLDS,
    IGNORED,
    NAME_CLASSES,
    TOKEN_CLASSES,
    VERBS,
    name_labels,
    names_of,
    sizes,
    things_of_tokens,
    token_labels,
)
from vtprune.demo.world import Event, Number, Scene, Thing, make_clip, make_picture

NONE = (IGNORED,) * 5


def thing(name: str, row: int, column: int, size: str = "large") -> Thing:
    colour, shape = name.split()
    return Thing(colour, shape, size, row, column, (column + 0.5) / 3, (row + 0.5) / 3, 0.14)


PICTURE = Scene(
    (thing("red star", 2, 1), thing("red ring", 0, 0, "small"), thing("blue star", 0, 2)),
    (), (), 112, 112, 1, 0,
)  # fmt: skip
CLIP = Scene(
    (thing("red star", 0, 0), thing("blue ring", 2, 2), thing("green cross", 2, 0)),
    (Number("42", True, 0, 2, 5 / 6, 1 / 6, 0.17),),
    (
        Event("moves", 0, 0, 0.1, 0.3, "right", 1),
        Event("turns", 1, 1, 0.4, 0.6, "cyan"),
        Event("flashes", 0, 2, 0.7, 0.9),
    ),
    112, 112, 5, 0,
)  # fmt: skip


def test_a_name_in_a_picture_tells_its_cell_and_size() -> None:
    assert names_of(PICTURE) == {
        ("red", "star"): (7, 1, *[IGNORED] * 5, 0),
        ("red", "ring"): (0, 0, *[IGNORED] * 5, 1),
        ("blue", "star"): (2, 1, *[IGNORED] * 5, 2),
    }


def test_a_name_that_two_things_have_tells_nothing() -> None:
    twice = Scene((thing("red star", 0, 0), thing("red star", 1, 1)), (), (), 112, 112, 1, 0)
    assert names_of(twice) == {}


def test_a_name_in_a_clip_tells_what_its_thing_does_and_when() -> None:
    moves, turns = VERBS.index("moves"), VERBS.index("turns")
    cyan, right = DETAILS.index("cyan"), DETAILS.index("right")
    assert names_of(CLIP) == {
        ("red", "star"): (0, IGNORED, moves, 1, right, IGNORED, IGNORED, 0),
        ("blue", "ring"): (8, IGNORED, turns, 2, cyan, IGNORED, IGNORED, 1),
        ("cyan", "ring"): (8, IGNORED, turns, 2, cyan, IGNORED, IGNORED, 1),
        ("green", "cross"): (6, IGNORED, 0, 0, 0, IGNORED, IGNORED, 2),
        ("large", "number"): (2, *[IGNORED] * 4, 4, 2, 3),
    }


def test_labels_stand_at_the_word_that_completes_a_name() -> None:
    encoded = make_tokenizer(SPECIALS).encode("is the red star above the blue cross?")
    rows = name_labels(encoded.tokens, [1] * len(encoded.tokens), names_of(PICTURE))
    assert [row != (IGNORED,) * 12 for row in rows] == [word == "star" for word in encoded.tokens]
    assert rows[encoded.tokens.index("star")][:2] == (7, 1)


def test_a_second_name_tells_how_its_thing_lies_to_the_first() -> None:
    words = ["red", "star", "red", "ring", "red", "star", "blue", "star"]
    rows = name_labels(words, [1, 1, 1, 1, 2, 2, 2, 2], names_of(PICTURE))
    assert [row[8:] for row in rows[1::2]] == [
        (IGNORED,) * 4,
        (0, 0, 0, IGNORED),  # the small ring is above the star, left of it and smaller
        (IGNORED,) * 4,  # another question
        (0, 2, 1, IGNORED),
    ]
    words = ["red", "star", "green", "cross"]
    assert name_labels(words, [1] * 4, names_of(CLIP))[3][8:] == (IGNORED,) * 4


@pytest.mark.parametrize(
    ("relation", "holds"),
    [
        ("above", 0), ("below", 1), ("left of", 0), ("right of", 1),
        ("larger than", 1), ("smaller than", 0),
    ],
)  # fmt: skip
def test_a_second_name_tells_whether_what_is_asked_holds(relation: str, holds: int) -> None:
    words = f"is the red star {relation} the red ring ?".split()
    rows = name_labels(words, [1] * len(words), names_of(PICTURE))
    assert rows[words.index("ring")][HOLDS] == holds  # the small ring is above, left and smaller
    words = ["is", "the", "red", "star", "above", "the", "blue", "star", "?"]
    assert name_labels(words, [1] * 9, names_of(PICTURE))[7][HOLDS] == 0
    words = ["is", "the", "red", "star", "larger", "than", "the", "blue", "star", "?"]
    assert name_labels(words, [1] * 10, names_of(PICTURE))[8][HOLDS] == IGNORED  # of one size


def test_tokens_of_a_picture_tell_the_size_of_what_they_show() -> None:
    seen = things_of_tokens(PICTURE, [0.0], (8, 8))
    found = sizes(PICTURE, seen).reshape(8, 8)
    assert (found[1, 1], found[1, 6], found[4, 4]) == (0, 1, IGNORED)
    assert (sizes(CLIP, things_of_tokens(CLIP, [0.0], (4, 4))) == IGNORED).all()


def test_things_of_a_picture_are_numbered_in_reading_order() -> None:
    # Of a base picture of 8 x 8 tokens, a cell's centre is in row and column 1, 4 or 6.
    marks = token_labels(PICTURE, [0.0], (8, 8)).reshape(8, 8, 5)
    assert marks[1, 1].tolist() == [IGNORED, IGNORED, 1, 1, 1]  # the first red, ring, thing
    assert marks[1, 6].tolist() == [IGNORED, IGNORED, 1, 1, 2]  # the first blue, the first star
    assert marks[6, 4].tolist() == [IGNORED, IGNORED, 2, 2, 3]  # the second red, the second star
    assert marks[4, 4].tolist() == list(NONE)


def test_tokens_of_a_clip_tell_what_has_happened_so_far() -> None:
    marks = token_labels(CLIP, np.linspace(0, 1, 5).tolist(), (4, 4)).reshape(5, 4, 4, 5)
    moves, turns, flashes = (VERBS.index(verb) for verb in ("moves", "turns", "flashes"))
    assert marks[0, 0, 0, :2].tolist() == [0, 0]  # nothing yet
    # At 0.25 the star is three quarters of the way to the middle of the top row.
    assert marks[1, 0, 1, :2].tolist() == [moves, 1]
    assert marks[2, 3, 3, :2].tolist() == [turns, 2]  # at 0.5, the middle of the turn
    assert marks[1, 3, 3, :2].tolist() == [0, 0]
    assert marks[2, 0, 3, 0] == IGNORED
    assert marks[3, 0, 3, :2].tolist() == [flashes, 3]
    assert marks[4, 0, 3, :2].tolist() == [flashes, 3]  # and is remembered
    assert (marks[..., 2:] == IGNORED).all()


def test_where_a_thing_vanished_is_remembered() -> None:
    event = Event("vanishes", 0, 1, 0.4, 0.6)
    scene = Scene((thing("red star", 0, 0),), (), (event,), 112, 112, 3, 0)
    marks = token_labels(scene, [0.0, 0.5, 1.0], (4, 4)).reshape(3, 4, 4, 5)
    assert marks[0, 0, 0, :2].tolist() == [0, 0]
    assert marks[2, 0, 0, :2].tolist() == [VERBS.index("vanishes"), 2]


def test_tokens_tell_which_thing_or_number_they_show() -> None:
    marks = things_of_tokens(CLIP, [0.0, 0.8], (4, 4)).reshape(2, 4, 4)
    assert marks[0].tolist() == [  # the number does not show yet
        [0, IGNORED, IGNORED, IGNORED],
        [IGNORED] * 4,
        [IGNORED] * 4,
        [2, IGNORED, IGNORED, 1],
    ]
    # The star has gone to the middle of the top row: its centre is on the line of two tokens.
    assert marks[1, 0, 2:].tolist() == [0, 3]
    assert marks[1, 0, 0] == IGNORED
    assert marks[1, 1:].tolist() == marks[0, 1:].tolist()


@pytest.mark.parametrize("index", range(20))
def test_labels_are_classes_of_their_heads(index: int) -> None:
    for scene in (make_clip("dev", 0, index), make_picture("dev", 0, index, size=(200, 180))):
        times = np.linspace(0, 1, 8) if scene.is_clip else np.zeros(1)
        marks = token_labels(scene, times.tolist(), (4, 6))
        names = np.array(list(names_of(scene).values()) or [(IGNORED,) * 8])
        num = len(scene.things) + len(scene.numbers)
        of_names = (*NAME_CLASSES, *DIGIT_CLASSES, num)
        for labels, classes in ((marks, TOKEN_CLASSES), (names, of_names)):
            known = labels != IGNORED
            assert (labels >= 0)[known].all()
            assert (labels < np.array(classes)).all()
