"""The embedded model: its world, its samples, its weights."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from vtprune.demo import write
from vtprune.demo.questions import CLIP_KINDS, KINDS, Question, draw_questions
from vtprune.demo.score import events, score
from vtprune.demo.world import (
    COLOURS,
    HELD_OUT,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    generator,
    make_clip,
    make_picture,
    numbers_at,
    things_at,
)
from vtprune.errors import VtpruneError
from vtprune.models.names import embedded_weights

PAIR = f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"


def scenes(split: str, num: int) -> list[Scene]:
    """Clips and pictures of one to nine tiles, in turn."""
    sizes = ((112, 112), (224, 224), (336, 336), (200, 180))
    return [
        make_clip(split, 0, i) if i % 2 else make_picture(split, 0, i, size=sizes[i // 2 % 4])
        for i in range(num)
    ]


def asked(split: str, num: int) -> list[tuple[Scene, Question]]:
    return [
        (scene, question)
        for i, scene in enumerate(scenes(split, num))
        for question in draw_questions(scene, generator(split, 1, i), 12)
    ]


def test_the_same_seed_gives_the_same_scene() -> None:
    assert scenes("dev", 20) == scenes("dev", 20)


def test_another_split_seed_or_index_gives_another_scene() -> None:
    variants = [
        make_picture(split, seed, index)
        for split in ("train", "dev", "test")
        for seed in (0, 1)
        for index in range(30)
    ]
    assert len({repr(scene) for scene in variants}) == len(variants)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'validation': it must be one of train, dev"):
        generator("validation", 0, 0)


def test_held_out_pairs_are_never_in_train_or_dev_but_are_in_test() -> None:
    def pairs(split: str) -> set[tuple[str, str]]:
        return {
            (thing.colour, thing.shape)
            for scene in scenes(split, 400)
            for time in (0.0, 0.5, 1.0)
            for thing in [*scene.things, *things_at(scene, time)]
        }

    assert not HELD_OUT & pairs("train")
    assert not HELD_OUT & pairs("dev")
    assert pairs("test") >= HELD_OUT


def test_every_kind_of_question_is_drawn() -> None:
    assert {question.kind for _, question in asked("test", 60)} == set(KINDS)


def test_a_picture_is_asked_nothing_about_events() -> None:
    kinds = {question.kind for scene, question in asked("test", 60) if not scene.is_clip}
    assert not kinds & set(CLIP_KINDS)


def test_every_answer_follows_from_the_state_of_the_scene() -> None:
    for scene, question in asked("test", 240):
        assert question.answer == solve(scene, question.text), question


def test_things_never_overlap_and_stay_inside() -> None:
    for scene in scenes("test", 200):
        for time in np.linspace(0, 1, 9):
            things = things_at(scene, float(time))
            side = min(scene.height, scene.width)
            for i, one in enumerate(things):
                radius = one.radius * side
                assert radius <= one.x * scene.width <= scene.width - radius
                assert radius <= one.y * scene.height <= scene.height - radius
                for other in things[i + 1 :]:
                    across, down = (one.x - other.x) * scene.width, (one.y - other.y) * scene.height
                    assert math.hypot(across, down) >= radius + other.radius * side, (scene, time)


def test_a_number_stays_in_its_cell_and_a_small_one_in_one_tile() -> None:
    for scene in scenes("test", 300):
        for number in scene.numbers:
            half = 0.93 * number.height * min(scene.height, scene.width) / scene.width
            left, right = number.x - half, number.x + half
            assert number.column / 3 - 0.01 <= left <= right <= (number.column + 1) / 3 + 0.01
            if not number.large:
                tiles = round(scene.width / 112)
                assert int(left * tiles) == int(right * tiles)


def test_a_moment_is_long_enough_for_eight_frames() -> None:
    from vtprune._dev.training.batches import frame_times

    rng = np.random.default_rng(0)
    for scene in scenes("test", 100):
        for event in scene.events:
            times = frame_times(8, rng)
            assert any(event.start <= time <= event.end for time in times)


@pytest.mark.parametrize(
    ("kind", "expected", "given", "value"),
    [
        ("colour", "red", " Red.", 1.0),
        ("colour", "red", "blue", 0.0),
        ("number_small", "47", "4 7", 0.0),
        ("change", "it turns blue", "turns blue", 0.0),
        ("what_happens", "red ring moves left", "a red ring moves left", 1.0),
        (
            "what_happens",
            "red ring moves left, then a blue star appears",
            "a blue star appears, then red ring moves left",
            0.5,
        ),
        ("what_happens", "red ring moves left", "", 0.0),
        (
            "what_happens",
            "red ring moves left, then a blue star appears",
            "the red ring moves left and the blue star appears.",
            1.0,
        ),
    ],
)
def test_score(kind: str, expected: str, given: str, value: float) -> None:
    assert score(kind, expected, given) == value


def test_events_are_named_in_order() -> None:
    answer = "red ring moves left, then number 47 flashes"
    assert events(answer) == ["red ring moves left", "number 47 flashes"]


def test_write_gives_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    lines = write(tmp_path / "one", num=6, seed=3)
    assert write(tmp_path / "two", num=6, seed=3) == lines
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    two = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert one == two


def test_write_gives_other_questions_for_another_seed(tmp_path: Path) -> None:
    assert write(tmp_path, num=4, seed=0) != write(tmp_path, num=4, seed=1)


def test_write_names_what_it_wrote(tmp_path: Path) -> None:
    lines = write(tmp_path, num=10)
    read = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert read == lines
    assert len(lines) == 10
    assert set(lines[0]) == {"file", "question", "answer", "kind"}
    files = [line["file"] for line in lines]
    assert {path.name for path in tmp_path.iterdir()} == {*files, "questions.jsonl"}
    assert max(files.count(file) for file in files) <= 4
    assert {Path(file).suffix for file in files} == {".mp4", ".png"}


@pytest.mark.parametrize("num", [1, 5])
def test_the_first_clip_is_asked_what_happens(tmp_path: Path, num: int) -> None:
    first = write(tmp_path, num=num)[0]
    assert (first["file"], first["question"]) == ("clip-000.mp4", "what happens?")


def test_write_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(VtpruneError, match="taken is a file: samples need a folder"):
        write(tmp_path / "taken")


def test_write_refuses_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(VtpruneError, match="samples can't be written to"):
        write(tmp_path / "taken" / "below")


def test_write_refuses_no_questions(tmp_path: Path) -> None:
    with pytest.raises(VtpruneError, match="num is 0: the number of questions must be at least 1"):
        write(tmp_path, num=0)


def test_write_leaves_nothing_behind_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtprune.demo import samples

    def fail(scene: Scene) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "encode", fail)
    with pytest.raises(VtpruneError, match="No space left on device"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_trainer_is_refused_the_test_split() -> None:
    from vtprune._dev.training.architecture import architecture
    from vtprune._dev.training.batches import TestSplitError, make_batch

    subject = architecture("llava_onevision")
    with pytest.raises(TestSplitError, match="the trainer may draw from train and dev only"):
        make_batch(subject, "test", 0, 0, subject.layouts["picture"])


def test_every_word_of_the_world_is_one_token() -> None:
    from vtprune._dev.training.checkpoint import SPECIALS, make_tokenizer

    tokenizer = make_tokenizer(SPECIALS)
    for _, question in asked("test", 200):
        for text in (question.text, question.answer):
            words = re.findall(r"[a-z]+|\d|[^\w\s]", text)
            assert len(tokenizer.encode(text).ids) == len(words), text
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    "text", ["", "Ünïcode 漢字 \x00 🙂", "a" * 500, "<image> <video>", "1234567890"]
)
def test_any_text_has_tokens(text: str) -> None:
    from vtprune._dev.training.checkpoint import SPECIALS, make_tokenizer

    make_tokenizer((*SPECIALS, "<image>", "<video>")).encode(text)


def test_the_checkpoint_is_small_and_has_the_shape_that_pruning_needs() -> None:
    assert sum(path.stat().st_size for path in embedded_weights().iterdir()) < 30 * 2**20
    config = json.loads((embedded_weights() / "config.json").read_text())
    text = config["text_config"]
    assert config["model_type"] == "llava_onevision"
    assert text["num_hidden_layers"] >= 16
    assert text["num_attention_heads"] >= 8
    assert text["num_key_value_heads"] >= 4


def test_the_weights_answer_far_above_chance(tmp_path: Path) -> None:
    from vtprune._dev.training.measure import answer_all

    answered = answer_all(None, tmp_path, 20, 7, "test", "seen")
    # Without looking, about a quarter is right.
    assert sum(each.right for each in answered) / len(answered) > 0.6


def test_a_template_s_words_are_told_from_a_question() -> None:
    from vtprune._dev.training.measure import fields, guess

    question = Question(
        text="what happens first, red ring moves left or number 4 flashes?",
        answer="number 4 flashes",
        kind="order",
        template="what happens first, {one} or {other}?",
    )
    assert fields(question) == {"one": "red ring moves left", "other": "number 4 flashes"}
    assert guess(question, {question.template: "{one}"}) == "red ring moves left"
    assert guess(question, {}) == ""


def test_the_curves_of_a_training_are_drawn_as_the_last_run_left_them(tmp_path: Path) -> None:
    from vtprune._dev.training.plot import draw, lines

    losses = [(1, 3.0), (2, 2.0), (2, 1.0)]  # step 2 was done twice
    text = [json.dumps({"step": step, "loss": {"picture": loss}}) for step, loss in losses]
    (tmp_path / "loss.jsonl").write_text("\n".join(text))
    seen = {"step": 2, "kinds": dict.fromkeys(KINDS, 0.5)}
    (tmp_path / "dev.jsonl").write_text(json.dumps(seen))
    assert [one["loss"]["picture"] for one in lines(tmp_path / "loss.jsonl")] == [3.0, 1.0]
    draw(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_chat_template_takes_several_inputs_a_system_message_and_turns() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(embedded_weights())
    text = {"type": "text", "text": "what happens?"}
    messages = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [text, {"type": "video"}, {"type": "image"}, {"type": "image"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "nothing"}]},
        {"role": "user", "content": "why?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system \nbe brief<|im_end|>"
        "<|im_start|>user <image><image><video>\nwhat happens?<|im_end|>"
        "<|im_start|>assistant \nnothing<|im_end|>"
        "<|im_start|>user \nwhy?<|im_end|>"
        "<|im_start|>assistant\n"
    )


# What follows answers a question anew, from its words and the scene alone.


def named(scene: Scene, words: str) -> Thing:
    """The one thing that the words name, as it is at first."""
    (thing,) = [t for t in scene.things if f"{t.colour} {t.shape}" in words]
    return thing


def place(thing: Thing, scene: Scene) -> str:
    """Where a thing is, by its pixels alone."""
    return PLACES[int(thing.y * 3)][int(thing.x * 3)]


def phrases(scene: Scene) -> list[str]:
    """The events in order, told from what is to be seen before and after each."""
    told = []
    for event in sorted(scene.events, key=lambda event: event.start):
        before, after = things_at(scene, event.start - 0.02), things_at(scene, event.end + 0.02)
        if event.verb == "flashes":
            (number,) = numbers_at(scene, event.middle)
            assert numbers_at(scene, 0.0) == numbers_at(scene, 1.0) == []
            told.append(f"number {number.digits} flashes")
            continue
        old = [thing for thing in before if thing not in after]
        new = [thing for thing in after if thing not in before]
        if not old:
            article = "an" if new[0].colour == "orange" else "a"
            told.append(f"{article} {new[0].colour} {new[0].shape} appears")
        elif not new:
            told.append(f"{old[0].colour} {old[0].shape} vanishes")
        elif old[0].colour != new[0].colour:
            told.append(f"{old[0].colour} {old[0].shape} turns {new[0].colour}")
        else:
            x, y = new[0].x - old[0].x, new[0].y - old[0].y
            way = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
            told.append(f"{old[0].colour} {old[0].shape} moves {way}")
    return told


def solve(scene: Scene, text: str) -> str:
    """The right answer."""
    told = phrases(scene)
    times = [sorted(scene.events, key=lambda e: e.start)[i].middle for i in range(len(told))]
    if text == "what happens?":
        return ", then ".join(told)
    if text in ("what happens first?", "what happens last?"):
        return told[0 if "first" in text else -1]
    if match := re.fullmatch(r"what happens first, (.+) or (.+)\?", text):
        return min(match.groups(), key=told.index)
    if match := re.fullmatch(r"what is the (large|small) number\?", text):
        (number,) = [n for n in scene.numbers if n.large == (match[1] == "large")]
        return number.digits
    if text == "what number flashes?":
        return scene.numbers[0].digits
    if text.startswith("when does"):
        if "number" in text:
            (index,) = [i for i, phrase in enumerate(told) if "number" in phrase]
        else:
            name = re.search(PAIR, text)
            assert name is not None
            (index,) = [i for i, p in enumerate(told) if re.sub("^an? ", "", p).startswith(name[0])]
        return ("at the start", "in the middle", "at the end")[int(times[index] * 3)]
    if match := re.fullmatch(rf"which way does the {PAIR} move\?", text):
        (phrase,) = [p for p in told if p.startswith(f"{match[1]} {match[2]} moves")]
        return phrase.split()[-1]
    if match := re.fullmatch(rf"what colour does the {PAIR} turn\?", text):
        (phrase,) = [p for p in told if p.startswith(f"{match[1]} {match[2]} turns")]
        return phrase.split()[-1]
    if match := re.fullmatch(rf"what does the {PAIR} do\?", text):
        of = [p for p in told if re.sub("^an? ", "", p).startswith(f"{match[1]} {match[2]} ")]
        if not of:
            return "nothing"
        return "it " + re.sub("^an? ", "", of[0]).split(" ", 2)[2]
    if match := re.fullmatch(r"how many objects are there at the (start|end)\?", text):
        return str(len(things_at(scene, 0.0 if match[1] == "start" else 1.0)))
    if text == "how many objects are there?":
        return str(len(scene.things))
    if match := re.fullmatch(r"how many (\w+)( objects)? are there\?", text):
        word = match[1]
        return str(sum(word == t.colour or word.startswith(t.shape) for t in scene.things))
    if match := re.fullmatch(rf"is there an? {PAIR}\?", text):
        seen = {
            (t.colour, t.shape) for time in np.linspace(0, 1, 41) for t in things_at(scene, time)
        }
        return "yes" if match.groups() in seen else "no"
    if match := re.fullmatch(rf"is the ({PAIR}) (.+) the ({PAIR})\?", text):
        one, other = named(scene, match[1]), named(scene, match[5])
        true = {
            "left of": one.column < other.column,
            "right of": one.column > other.column,
            "above": one.row < other.row,
            "below": one.row > other.row,
            "larger than": one.radius > other.radius * 1.2,
            "smaller than": one.radius < other.radius / 1.2,
        }[match[4]]
        return "yes" if true else "no"
    if match := re.fullmatch(r"what (colour|shape) is the object at the (.+)\?", text):
        (thing,) = [t for t in scene.things if place(t, scene) == match[2]]
        return thing.colour if match[1] == "colour" else thing.shape
    if match := re.fullmatch(r"what colour is the (\w+)\?", text):
        (thing,) = [t for t in scene.things if t.shape == match[1]]
        return thing.colour
    if match := re.fullmatch(r"what shape is the (\w+) object\?", text):
        (thing,) = [t for t in scene.things if t.colour == match[1]]
        return thing.shape
    assert text.startswith("where is the")
    return place(named(scene, text), scene)
