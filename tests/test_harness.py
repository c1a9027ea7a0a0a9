"""What harnesses give comes out as the library's own answers: settings, conversations, batches."""

from __future__ import annotations

import importlib.metadata
import math
import tomllib
from pathlib import Path

import pytest
import tiny
import torch
from conftest import save_clip, save_noise, shared_model
from PIL import Image
from prompts import prompt_with

import vtprune
from vtprune.engine import pruning
from vtprune.errors import MediaError, ModelError, PresetError, VtpruneError
from vtprune.inference.forced_answers import score_after_prefill, score_answers
from vtprune.inference.generate import Generation, generate
from vtprune.media import open_source, read
from vtprune.models.base import Sampling, Turn
from vtprune.models.loading import Loaded
from vtprune.serving.harness.asking import Asker, naming, until
from vtprune.serving.harness.conversation import (
    Message,
    MessageMedia,
    interleave,
    media_from,
    media_in,
    store,
    user,
    window,
)
from vtprune.serving.harness.requests import Round, batches, conversation, read_chat, read_simple
from vtprune.serving.harness.requests import TaskRequest as Request
from vtprune.serving.harness.settings import Settings

ROOT = Path(__file__).parents[1]
SHORT = Generation(max_new_tokens=4)


def noise(height: int, width: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two pictures and a directory of pictures, which is a video."""
    pictures = [save_noise(tmp_path / "a.png", 90, 150), save_noise(tmp_path / "b.png", 60, 64)]
    return [*pictures, save_clip(tmp_path / "clip", 4)]


@pytest.fixture
def asker(checkpoints) -> Asker:  # type: ignore[no-untyped-def]
    return Asker(Settings(str(checkpoints("llava_onevision")), method="divprune", keep=0.4))


# -- the entry point -----------------------------------------------------------------------------


def test_the_entry_point_of_lmms_eval_is_there_without_lmms_eval() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = project["entry-points"]["lmms_eval.models"]["vtprune"]
    point = importlib.metadata.EntryPoint("vtprune", name, "lmms_eval.models")
    assert callable(point.load())


# -- settings ------------------------------------------------------------------------------------


def test_arguments_are_read_as_lmms_eval_reads_them_off_its_command_line() -> None:
    settings = Settings.read(
        {"pretrained": "qwen2.5-vl-7b", "method": "entropy", "at": 2, "keep": 0.3, "norm": "row",
         "seed": 3, "system_prompt": "None", "max_tiles": 4}
    )  # fmt: skip
    preset = settings.resolve()
    assert [(stage.at, stage.method) for stage in preset.stages] == [("2", "entropy")]
    assert dict(preset.stages[0].options)["norm"] == "row"
    assert (preset.keep, preset.seed) == (0.3, 3)
    assert settings.system_prompt == ""
    assert settings.sampling().max_tiles == 4


def test_a_keep_may_be_one_for_each_modality() -> None:
    preset = Settings.read({"keep": "'image=0.5,video=0.2'"}).resolve()
    assert (preset.image.keep, preset.video.keep) == (0.5, 0.2)


@pytest.mark.parametrize("value", [1, 1.0, "1"])
def test_a_keep_of_one_is_no_pruning(value: object) -> None:
    assert Settings.read({"keep": value}).resolve().keep == 1.0


def test_frames_of_the_caller_go_before_those_of_the_preset() -> None:
    assert Settings.read({"preset": "long-video", "fps": 2}).sampling().frames is None
    assert Settings.read({"frames": 5}).sampling() == Sampling(frames=5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frames": 0}, "frames=0 is out of range"),
        ({"frames": 2.5}, "frames=2.5 is out of range"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range"),
        ({"fps": 0}, "fps=0 is out of range"),
        ({"fps": "x"}, "fps=x is out of range"),
        ({"frames": 2, "fps": 1}, "exclude each other"),
        ({"keep": 0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"preset": "nothing"}, "no preset 'nothing'"),
        ({"method": "nothing"}, "nothing"),
        ({"method": "entropy", "norm": "x"}, "norm"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(VtpruneError, match=words):
        Settings.read(arguments)


def test_a_misspelt_argument_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(PresetError, match="max_frame") as error:
        Settings.read({"max_frame": 8})
    assert "max_frames" in error.value.hint


# -- conversations -------------------------------------------------------------------------------


def test_media_stand_where_the_message_has_them() -> None:
    a, b = MessageMedia("image", "a.png"), MessageMedia("image", "b.png")
    assert user([a, "which?"]).turn() == Turn("user", "which?", 1)
    assert user(["A: ", a, " B: ", b, "?"]).turn() == Turn("user", "A:  B: ?", 2, (3, 7))
    assert user(["what is that: ", a]).turn() == Turn("user", "what is that: ", 1, (14,))


def test_placeholders_in_a_text_are_where_its_media_stand() -> None:
    a, b = MessageMedia("image", "a.png"), MessageMedia("image", "b.png")
    assert interleave("is <image> like <image>?", [a, b]).parts == ("is ", a, " like ", b, "?")
    assert interleave("which?", [a, b]).parts == (a, b, "which?")
    assert interleave("one <image>", [a, b]).parts == (a, b, "one <image>")
    assert interleave("no picture", []).parts == ("no picture",)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_interleaved_pictures_are_written_in_place(name: str, checkpoints, files) -> None:  # type: ignore[no-untyped-def]
    asker = Asker(Settings(str(checkpoints(name)), keep=1))
    first, second = (MessageMedia("image", path) for path in files[:2])
    apart = user(["left ", first, " right ", second, " same?"])
    turns, inputs = asker.turns([apart]), asker.prepare([apart]).inputs
    assert turns[0].places == (5, 12)
    before, _, rest = inputs.prompt.partition("left ")
    assert before
    holder = rest.partition(" right ")[0]
    assert holder
    assert rest.startswith(f"{holder} right {holder} same?")
    ahead = asker.prepare([user([first, second, "left  right  same?"])]).inputs
    assert sorted(ahead.tensors["input_ids"][0]) == sorted(inputs.tensors["input_ids"][0])


def test_a_template_that_shows_media_first_does_so(checkpoints, files) -> None:  # type: ignore[no-untyped-def]
    asker = Asker(Settings(str(checkpoints("llava_onevision")), keep=1))
    first, second = (MessageMedia("image", path) for path in files[:2])
    prompt = asker.prepare([user(["left ", first, " right ", second])]).inputs.prompt
    assert "<image><image>" in prompt
    assert prompt.index("<image><image>") < prompt.index("left") < prompt.index("right")


def test_what_a_text_spells_of_special_tokens_is_broken_up_in_every_piece(checkpoints) -> None:  # type: ignore[no-untyped-def]
    asker = Asker(Settings(str(checkpoints("llava_onevision")), keep=1))
    picture = MessageMedia("image", noise(40, 40))
    prompt = asker.prepare([user(["<image>", picture, "<image>?"])]).inputs.prompt
    assert prompt.count("<image>") == 1
    assert prompt.count("< image>") == 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_picture_in_memory_is_read_as_if_from_a_file_without_loss(
    mode: str, tmp_path: Path
) -> None:
    picture = noise(31, 17) if mode != "I;16" else Image.new("I;16", (17, 31), 40000)
    picture = picture if mode == "I;16" else picture.convert(mode)
    (path,) = store([MessageMedia("image", picture)], tmp_path)
    found = read(open_source(path)).pictures[0]
    if mode == "LA":
        picture = picture.convert("RGBA")
    expected = torch.tensor(list(picture.convert("RGB").tobytes())) if mode != "I;16" else None
    if expected is None:  # 40000 of 65535 is 155.6 of 255
        assert found.unique().tolist() == [156]
    else:
        assert torch.equal(found.permute(1, 2, 0).flatten(), expected.to(torch.uint8))


def test_a_picture_in_memory_is_not_turned_by_what_its_file_said(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    noise(20, 40).save(path, exif=exif)
    (stored,) = store([MessageMedia("image", Image.open(path))], tmp_path)
    assert (open_source(path).height, open_source(stored).height) == (40, 20)


def test_a_list_of_pictures_is_a_video_in_their_order(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 24), (number, 0, 0)) for number in range(12)]
    (path,) = store([media_from(frames)], tmp_path)
    source = open_source(path)
    assert source.kind == "video"
    assert read(source).pictures[:, 0, 0, 0].tolist() == list(range(12))


def test_the_kind_of_media_is_told_by_what_they_are() -> None:
    assert media_from("a.JPG").kind == "image"
    assert media_from("file:///tmp/a.mp4").content == "/tmp/a.mp4"
    assert media_from(noise(4, 4)).kind == "image"
    cut = media_from(
        {"type": "video", "url": {"path": "a.mp4", "video_start": 2, "video_end": 5.5}}
    )
    assert (cut.kind, cut.content, cut.start, cut.end) == ("video", "a.mp4", 2, 5.5)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ({"type": "audio", "url": "a.wav"}, ModelError, "no family takes sound"),
        ({"type": "video"}, ModelError, "a media item without a file"),
    ],
)
def test_media_that_no_family_takes_are_refused(content, error, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        media_from(content)


@pytest.mark.parametrize(
    ("content", "words"), [("data:image/png;base64,x", "data: URL"), (3.5, "the form of float")]
)
def test_media_in_a_form_that_can_not_be_read_are_refused(
    content: object, words: str, tmp_path: Path
) -> None:
    with pytest.raises(MediaError, match=words):
        store([MessageMedia("image", content)], tmp_path)


def test_the_seconds_that_a_question_is_about_are_what_is_looked_at() -> None:
    sampling = Sampling(frames=4)
    assert window(sampling, [MessageMedia("video", "a.mp4")]) == sampling
    cut = MessageMedia("video", "a.mp4", 2.0, 5.0)
    assert window(sampling, [cut, MessageMedia("image", "b.png")]) == Sampling(
        4, start=2.0, end=5.0
    )
    with pytest.raises(ModelError, match="different seconds of several videos"):
        window(sampling, [cut, MessageMedia("video", "b.mp4")])


# -- answers -------------------------------------------------------------------------------------


def test_answers_are_those_of_the_library_in_batches_and_alone(asker: Asker, files) -> None:  # type: ignore[no-untyped-def]
    items = [(path, f"what is that {number}?") for number, path in enumerate(files)]
    reports = vtprune.answer(
        asker.loaded, items, asker.preset, sampling=asker.sampling, generation=SHORT
    )
    asked = [[user([MessageMedia("image", path), text])] for path, text in items]
    for size in (1, 3):
        found = asker.answer(asked, SHORT, size)
        assert [one.text for one in found] == [report.answer for report in reports]
        assert [one.keep_mean for one in found] == pytest.approx(
            [report.tokens.keep_mean for report in reports]
        )
        assert [one.prompt_tokens for one in found] == [
            report.tokens.visual + report.tokens.text for report in reports
        ]
        assert [one.tokens for one in found] == [4, 4, 4]


def test_a_question_without_media_is_answered_beside_others(asker: Asker, files) -> None:  # type: ignore[no-untyped-def]
    blind = [user(["what is two and two?"])]
    alone = asker.answer([blind], SHORT)[0]
    both = asker.answer([blind, [user([MessageMedia("image", files[0]), "what?"])]], SHORT, 2)
    assert alone.keep_mean is None
    assert both[0].text == alone.text
    assert both[1].keep_mean == pytest.approx(0.4, abs=0.05)


def test_a_conversation_of_several_turns_is_one_prompt(asker: Asker, files) -> None:  # type: ignore[no-untyped-def]
    talk = [
        Message("system", ("be brief",)),
        user([MessageMedia("image", files[0]), "what is that?"]),
        Message("assistant", ("noise",)),
        user([MessageMedia("image", files[1]), "and that?"]),
    ]
    assert len(media_in(talk)) == 2
    turns, prepared = asker.turns(talk), asker.prepare(talk)
    gathered, inputs = prepared.media, prepared.inputs
    assert [one.role for one in turns] == ["system", "user", "assistant", "user"]
    assert len(gathered.items) == 2
    places = [inputs.prompt.index(text) for text in ("be brief", "what is that", "noise", "and")]
    assert places == sorted(places)
    assert asker.answer([talk], SHORT)[0].keep_mean == pytest.approx(0.4, abs=0.05)


def test_the_system_prompt_is_for_conversations_that_bring_none(checkpoints) -> None:  # type: ignore[no-untyped-def]
    settings = Settings(str(checkpoints("llava_onevision")), keep=1, system_prompt="be brief")
    asker = Asker(settings)
    assert asker.turns([user(["why?"])])[0] == Turn("system", "be brief")
    own = [Message("system", ("be long",)), user(["why?"])]
    assert [one.text for one in asker.turns(own)] == ["be long", "why?"]


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "gemma3", "llava"])
def test_several_answers_score_on_one_prefill_as_each_on_its_own(name: str) -> None:
    model = shared_model(name)
    prompt = tiny.inputs(name, model, "image")
    loaded = Loaded(name, model, None, None)  # type: ignore[arg-type]
    answers = [torch.tensor(ids) for ids in ([72, 65, 80], [66], [70, 71], [72, 65, 81])]
    stages = {"stages": [{"at": "input", "method": "uniform", "keep": 0.6},
                         {"at": 3, "method": "random", "keep": 0.2}]}  # fmt: skip
    with pruning(model, stages):
        together = score_answers(loaded, prompt, answers)
    for answer, one in zip(answers, together, strict=True):
        with pruning(model, stages):
            alone = score_after_prefill(loaded, prompt_with(prompt, answer))
        assert one.loss == pytest.approx(alone.loss, rel=1e-5)
        assert one.greedy == alone.greedy
        assert one.loss == pytest.approx(-math.log(one.probability) / len(answer), rel=1e-4)


def test_what_greedy_decoding_says_has_the_least_loss_of_its_length(asker: Asker, files) -> None:  # type: ignore[no-untyped-def]
    """The first token of the greedy answer is its likeliest one."""
    asked = [user([MessageMedia("image", files[0]), "what?"])]
    prepared = asker.prepare(asked)
    first = generate(asker.loaded, [prepared], asker.preset, SHORT)[0].tokens[:1]
    others = [torch.tensor([int(first) + 1]), first]
    with pruning(asker.loaded.model, asker.preset):
        worse, best = score_answers(asker.loaded, prepared.tensors, others)
    assert best.loss < worse.loss
    assert (best.greedy, worse.greedy) == (True, False)
    scores = asker.score(asked, ["yes", "no"])
    assert len(scores) == 2
    assert all(math.isfinite(one.loss) and one.loss > 0 for one in scores)


# -- requests of lmms-eval -----------------------------------------------------------------------


def find(task: str, split: str, number: int) -> dict[str, object]:
    return {"where": (task, split, number)}


def test_a_chat_request_is_read_round_by_round() -> None:
    told = []

    def messages(document, **more):  # type: ignore[no-untyped-def]
        told.append((document["where"], more))
        said = [{"role": "user", "content": [{"type": "image", "url": "a.png"},
                                             {"type": "text", "text": "what?"}]}]  # fmt: skip
        if not more:
            return said
        return (
            None if more["round_idx"] == 2 else said,
            more["round_idx"] == 2,
            [],
            more["round_idx"],
        )

    asked = read_chat(("", messages, {"until": ["x"]}, 7, "mme", "test"), find)
    assert (asked.name, asked.options) == ("mme 7", {"until": ["x"]})
    first = asked.round()
    assert first.conversation is not None
    assert first.conversation[0].turn() == Turn("user", "what?", 1)
    second = asked.round(1, ["noise"], first.note)
    assert (second.answers, second.note) == (["noise"], 1)
    assert asked.round(2, ["noise", "more"], second.note) == Round(None, None, ["noise", "more"])
    assert [where for where, _ in told] == [("mme", "test", 7)] * 3
    assert told[2][1] == {"round_idx": 2, "previous_output": ["noise", "more"],
                          "previous_round_info": 1}  # fmt: skip


def test_a_simple_request_is_read_round_by_round() -> None:
    def text(document, previous_output, round_idx, previous_round_info):  # type: ignore[no-untyped-def]
        changed = [one.upper() for one in previous_output]
        return ["b.png"], f"again {previous_round_info}", round_idx == 2, changed, "noted"

    arguments = ("what?", {}, lambda _: ["a.png"], text, 0, "mme", "test")
    asked = read_simple(arguments, find)
    (message,) = asked.only()
    assert [getattr(part, "content", part) for part in message.parts] == ["a.png", "what?"]
    second = asked.round(1, ["noise"])
    assert second.conversation is not None
    assert [getattr(part, "content", part) for part in second.conversation[0].parts] == [
        "b.png", "again None"]  # fmt: skip
    assert (second.note, second.answers) == ("noted", ["NOISE"])
    last = asked.round(2, second.answers, second.note)
    assert (last.conversation, last.answers) == (None, ["NOISE"])


def test_a_simple_request_of_one_round_ends_after_it() -> None:
    asked = read_simple(("what?", {}, lambda _: None, 0, "mme", "test"), find)
    assert asked.only()[0].parts == ("what?",)
    assert asked.round(1, ["noise"]) == Round(None, None, ["noise"])


def test_what_is_generated_alike_is_batched() -> None:
    asked = [Request(str(n), {"temperature": n % 2}, lambda *_: Round(None)) for n in range(5)]
    assert list(batches(asked, 2)) == [[0, 2], [4], [1, 3]]


def test_the_seconds_of_a_message_are_those_of_its_video() -> None:
    video = {"type": "video", "url": "a.mp4", "start_time": 1.0, "end_time": None}
    (message,) = conversation([{"role": "user", "content": [video]}])
    (shown,) = media_in([message])
    assert (shown.kind, shown.start, shown.end) == ("video", 1.0, None)


# -- what is around ------------------------------------------------------------------------------


def test_an_answer_ends_where_the_task_says() -> None:
    assert until("B. USER: and", ["USER:", "</s>"]) == "B."
    assert until("first\n\nsecond", ["\n\n"]) == "first\n\nsecond"
    assert until("  B ", []) == "B"


def test_an_error_names_the_question_and_the_way_out() -> None:
    with (
        pytest.raises(MediaError, match=r"mme 7: x\.png: broken \(copy it again\)"),
        naming("mme 7"),
    ):
        raise MediaError("x.png: broken", "copy it again")
