"""VLMEvalKit's protocol: against the real package where there is one, else against its outline."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import save_noise

import vtprune
from vtprune.errors import VtpruneError
from vtprune.inference.generate import Generation
from vtprune.models.base import Sampling

SHORT = 4


class Outline:
    """What VLMEvalKit's BaseModel does with a message before it gives it to `generate_inner`.

    Texts and paths become {"type", "value"}; types that are not allowed are refused. Its `chat`
    does the same with every message's content, and goes on to `chat_inner`.
    """

    allowed_types = ("text", "image", "video")

    def __init__(self) -> None:
        self.dump_image_func = None

    def listed(self, message):  # type: ignore[no-untyped-def]
        pieces = message if isinstance(message, list) else [message]
        found = []
        for piece in pieces:
            if isinstance(piece, str):
                kind = {".png": "image", ".mp4": "video"}.get(Path(piece).suffix, "text")
                piece = {"type": kind, "value": piece}
            assert piece["type"] in self.allowed_types
            found.append(piece)
        return found

    def generate(self, message, dataset=None):  # type: ignore[no-untyped-def]
        return self.generate_inner(self.listed(message), dataset)  # type: ignore[attr-defined]

    def chat(self, messages, dataset=None):  # type: ignore[no-untyped-def]
        read = [{**one, "content": self.listed(one["content"])} for one in messages]
        return self.chat_inner(read, dataset=dataset)  # type: ignore[attr-defined]


def outline() -> dict[str, types.ModuleType]:
    """The modules that a model needs of VLMEvalKit."""
    names = ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.config")
    made = {name: types.ModuleType(name) for name in names}
    made["vlmeval.vlm.base"].BaseModel = Outline  # type: ignore[attr-defined]
    made["vlmeval.config"].supported_VLM = {}  # type: ignore[attr-defined]
    return made


def is_installed() -> bool:
    try:
        importlib.import_module("vlmeval.vlm.base")
    except ImportError:
        return False
    return True


@pytest.fixture(params=["outline", "installed"])
def pruned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The model's class, on the outline of VLMEvalKit and on VLMEvalKit."""
    if request.param == "installed":
        if not is_installed():
            pytest.skip("VLMEvalKit is not installed")
    else:
        for name, module in outline().items():
            monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop("vtprune.serving.harness.vlmevalkit", None)
    yield importlib.import_module("vtprune.serving.harness.vlmevalkit").Pruned
    sys.modules.pop("vtprune.serving.harness.vlmevalkit", None)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [save_noise(tmp_path / "a.png", 90, 150), save_noise(tmp_path / "b.png", 60, 64)]


def build(pruned: type, checkpoints, name: str = "llava_onevision", **options: object):  # type: ignore[no-untyped-def]
    given = {"method": "divprune", "keep": 0.4, "max_new_tokens": SHORT} | options
    return pruned(str(checkpoints(name)), **given)


def expected(model, file: Path, question: str) -> str:  # type: ignore[no-untyped-def]
    asker = model.asker
    generation = Generation(max_new_tokens=SHORT)
    reports = vtprune.answer(asker.loaded, [(file, question)], asker.preset, generation=generation)
    return reports[0].answer


def test_an_answer_is_that_of_the_library(pruned: type, checkpoints, files) -> None:  # type: ignore[no-untyped-def]
    model = build(pruned, checkpoints)
    message = [{"type": "image", "value": str(files[0])}, {"type": "text", "value": "what?"}]
    assert model.generate(message, dataset="MME") == expected(model, files[0], "what?")


def test_the_documented_runner_adds_models_that_answer(
    pruned: type, checkpoints, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    text = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    place = str(checkpoints("llava"))
    runner = tmp_path / "runner.py"
    few = f"at=1, max_new_tokens={SHORT}"
    runner.write_text(code.replace("llava-1.5-7b", place).replace("at=2", few))
    ran: list[str] = []
    run_path = runpy.run_path
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: ran.append(path))
    known = importlib.import_module("vlmeval.config").supported_VLM
    for name in ("full", "192", "128", "64"):
        monkeypatch.delitem(known, f"llava-{name}", raising=False)
    run_path(str(runner))
    assert ran == ["run.py"]
    message = [{"type": "image", "value": str(files[0])}, {"type": "text", "value": "what?"}]
    for name, keep in {"full": 1, "192": 0.3333}.items():
        own = build(pruned, checkpoints, "llava", method="entropy", at=1, norm="none", keep=keep)
        assert known[f"llava-{name}"]().generate(message) == own.generate(message)
    assert {"llava-128", "llava-64"} <= set(known)


def test_a_message_of_strings_is_taken_too(pruned: type, checkpoints, files) -> None:  # type: ignore[no-untyped-def]
    model = build(pruned, checkpoints)
    assert model.generate([str(files[1]), "what?"]) == expected(model, files[1], "what?")


def test_pictures_stand_where_the_message_has_them(pruned: type, checkpoints, files) -> None:  # type: ignore[no-untyped-def]
    model = build(pruned, checkpoints)
    values = ["is ", str(files[0]), " like ", str(files[1])]
    kinds = ["text", "image", "text", "image"]
    pieces = [{"type": kind, "value": one} for kind, one in zip(kinds, values, strict=True)]
    asked = []
    model.asker.answer = lambda conversations, _: asked.extend(conversations) or [None]
    with pytest.raises(AttributeError):
        model.generate(pieces)
    turn = asked[0][0].turn()
    assert (turn.text, turn.media, turn.places) == ("is  like ", 2, (3, 9))


def test_a_conversation_goes_on(pruned: type, checkpoints, files) -> None:  # type: ignore[no-untyped-def]
    model = build(pruned, checkpoints)
    talk = [
        {"role": "user", "content": [{"type": "image", "value": str(files[0])},
                                     {"type": "text", "value": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "noise"}]},
        {"role": "user", "content": [{"type": "text", "value": "more?"}]},
    ]  # fmt: skip
    assert model.chat(talk[:1], dataset="MMDU") == expected(model, files[0], "what?")
    assert isinstance(model.chat(talk, dataset="MMDU"), str)


@pytest.mark.parametrize(
    ("told", "sampling"),
    [
        ({"nframe": 3, "fps": None}, Sampling(frames=3)),
        ({"nframe": None, "fps": 0.5}, Sampling(fps=0.5)),
        ({}, Sampling()),
    ],
)
def test_frames_are_as_many_as_the_dataset_says(  # type: ignore[no-untyped-def]
    told: dict[str, object], sampling: Sampling, pruned: type, checkpoints, files
) -> None:
    model = build(pruned, checkpoints)
    assert model.nframe > 0, "VLMEvalKit sets what is above 0"
    assert model.fps > 0
    for name, value in told.items():
        setattr(model, name, value)
    model.generate([{"type": "text", "value": "why?"}])
    assert model.asker.sampling == sampling


def test_frames_of_the_caller_stay(pruned: type, checkpoints) -> None:  # type: ignore[no-untyped-def]
    model = build(pruned, checkpoints, frames=5)
    assert (model.nframe, model.fps) == (None, None)
    model.generate([{"type": "text", "value": "why?"}])
    assert model.asker.sampling == Sampling(frames=5)


def test_what_vlmevalkit_asks_of_a_model_is_there(pruned: type, checkpoints) -> None:  # type: ignore[no-untyped-def]
    model = build(pruned, checkpoints, use_vllm=False)
    model.set_dump_image(print)
    assert (model.is_api, model.INTERLEAVE, model.VIDEO_LLM) == (False, True, True)
    assert not model.use_custom_prompt("MME")


def test_vllm_is_refused(pruned: type, checkpoints) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(VtpruneError, match="use_vllm"):
        build(pruned, checkpoints, use_vllm=True)


def test_a_file_that_can_not_be_read_names_the_dataset(pruned: type, checkpoints) -> None:  # type: ignore[no-untyped-def]
    model = build(pruned, checkpoints)
    with pytest.raises(VtpruneError, match=r"MME: /none\.png: no such file"):
        model.generate_inner([{"type": "image", "value": "/none.png"}], "MME")
