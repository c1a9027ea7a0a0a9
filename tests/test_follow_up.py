"""Second questions see what the first one left, and what that costs is counted right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from prompts import with_tensors

from vtprune import demo
from vtprune.cli import cli
from vtprune.engine import pruning
from vtprune.errors import ModelError
from vtprune.evaluation import follow_up, runner
from vtprune.evaluation.follow_up import Conversation, converse, forced_follow_up, greedy_follow_up
from vtprune.evaluation.rows import RowRecords, compare_follow_ups
from vtprune.evaluation.variants import FOLLOW_UP
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.forced_answers import (
    PromptWithAnswer,
    append_text,
    forced_logits,
    prepare_with_answers,
)
from vtprune.inference.generate import Generation
from vtprune.inference.questions_file import Asked
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, load
from vtprune.preset import load_preset

ANSWER = torch.tensor([72, 65, 80, 66])
BLIND = {
    "stages": [
        {"at": "input", "method": "uniform", "keep": 0.6},
        {"at": 2, "method": "random", "keep": 0.3},
    ]
}
CASES = [
    ("llava", "image"), ("llava_onevision", "image"), ("qwen2_5_vl", "image"),
    ("internvl", "image"), ("llava_onevision", "video"), ("qwen2_5_vl", "video"),
    ("qwen3_vl", "video"),
]  # fmt: skip


@pytest.fixture
def media_files(tmp_path: Path) -> dict[str, Path]:
    picture = tmp_path / "picture.png"
    noise = torch.randint(0, 256, (90, 150, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.to(torch.uint8).numpy()).save(picture)
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(6):
        noise = torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(clip / f"{number:03}.png")
    return {"image": picture, "video": clip}


def conversation(loaded: Loaded, file: Path) -> Conversation:
    prompts, _ = prepare_with_answers(loaded, [Asked(file, "what is it?")], Sampling(frames=4),
                         Generation(max_new_tokens=3, system="be brief"), Limits(), {})  # fmt: skip
    return converse(loaded, prompts[0], said(loaded), "and where?", "be brief")


def said(loaded: Loaded) -> torch.Tensor:
    ids = loaded.files.tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    return torch.tensor(ids)


def whole(talk: Conversation) -> PromptWithAnswer:
    """The same conversation as one prompt, to be prefilled at once."""
    longer = append_text(talk.first.tensors, talk.rest)
    return replace(with_tensors(talk.first, **longer), answer=ANSWER)


@pytest.mark.parametrize("preset", [{**BLIND}, None], ids=["pruned", "unpruned"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_blind_method_leaves_the_second_question_what_it_would_have_by_itself(
    checkpoints: Any, media_files: dict[str, Path], name: str, kind: str, preset: Any
) -> None:
    loaded = load(str(checkpoints(name)), device="cpu")
    talk = conversation(loaded, media_files[kind])
    given = {"preset": preset} if preset else {"keep": 1.0}
    with pruning(loaded.model, inputs=talk.first.without_pixels(None), **given):
        together = forced_follow_up(loaded, talk, ANSWER)
    with pruning(loaded.model, inputs=talk.first.without_pixels(None), **given):
        expected = forced_logits(loaded, whole(talk))
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


def test_a_method_that_reads_the_question_leaves_what_the_first_needs(
    checkpoints: Any, media_files: dict[str, Path]
) -> None:
    loaded = load(str(checkpoints("llava_onevision")), device="cpu")
    talk = conversation(loaded, media_files["image"])
    kept = []
    for prompt in (talk.first, whole(talk)):
        with pruning(loaded.model, keep=0.4, method="fastv", at=2) as trace:
            forced_logits(loaded, replace(prompt, answer=ANSWER[:1]))
        kept.append(list(trace.stages[0].kept[0]))
    assert kept[0] != kept[1]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_second_answer_is_what_generation_gives(
    checkpoints: Any, media_files: dict[str, Path], name: str, kind: str
) -> None:
    loaded = load(str(checkpoints(name)), device="cpu")
    talk = conversation(loaded, media_files[kind])
    with pruning(loaded.model, keep=1.0, inputs=talk.first.without_pixels(None)):
        own = greedy_follow_up(loaded, talk, 4)
    tensors = dict(whole(talk).tensors)
    ids = loaded.model.generate(**tensors, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    expected = ids[0, tensors["input_ids"].shape[1] :]
    assert own.tolist() == expected[: len(own)].tolist()


def test_a_template_that_leaves_the_answer_out_is_refused(
    checkpoints: Any, media_files: dict[str, Path]
) -> None:
    loaded = load(str(checkpoints("llava_onevision")), device="cpu")
    talk = conversation(loaded, media_files["image"])
    template = "{{ messages | length }}<image>{% for m in messages %}{{ m.role }}{% endfor %}"
    loaded.files.tokenizer.chat_template = template
    loaded.files.processor.pop("chat_template", None)
    with pytest.raises(ModelError) as told:
        converse(loaded, talk.first, said(loaded), "and where?", "be brief")
    assert "the chat template does not write the answer" in told.value.message


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_the_answer_follows_what_is_on_the_cache(
    checkpoints: Any, media_files: dict[str, Path], name: str
) -> None:
    """LLaVA-OneVision's template writes "assistant \\n" before an answer, "assistant\\n" to ask."""
    loaded = load(str(checkpoints(name)), device="cpu")
    talk = conversation(loaded, media_files["image"])
    decode = loaded.files.tokenizer.decode
    before = str(decode(talk.first.tensors["input_ids"][0]))
    after = str(decode(talk.rest))
    assert before.endswith("<|im_start|>assistant\n")
    assert after.startswith("a red circle<|im_end|>")
    assert "and where?" in after
    assert after.endswith("<|im_start|>assistant\n")


# -- what is made of it --------------------------------------------------------------------------


def row_records(values: dict[int, float], labelled: bool = True) -> RowRecords:
    """Records of questions, two about each file."""
    numbers = sorted(values)
    found = [values[number] for number in numbers]
    files = [f"{number // 2}.png" for number in numbers]
    return RowRecords(numbers, files, found if labelled else None, found, [[] for _ in found])


def test_what_asking_second_costs_is_what_it_costs_more_than_unpruned() -> None:
    rows = {
        "unpruned": row_records(dict.fromkeys(range(8), 1.0)),
        "unpruned" + FOLLOW_UP: row_records({i: float(i != 0) for i in range(8)}),  # 7 of 8
        "fastv": row_records({i: float(i != 1) for i in range(8)}),  # 7 of 8
        "fastv" + FOLLOW_UP: row_records({i: float(i > 3) for i in range(8)}),  # 4 of 8
    }
    found = compare_follow_ups("fastv", rows)
    assert found is not None
    assert (found.questions, found.quality.mean) == (8, 0.5)
    assert (found.unpruned, found.fresh) == (7 / 8, 7 / 8)
    assert found.against_unpruned.mean == pytest.approx(-3 / 8)
    assert found.against_fresh.mean == pytest.approx(-3 / 8)
    # (4 - 7) / 8 second, (7 - 8) / 8 fresh
    assert found.change.mean == pytest.approx(-2 / 8)
    told = found.to_dict(labelled=True)
    assert told["accuracy"] == 0.5
    own = compare_follow_ups("unpruned", rows)
    assert own is not None
    assert own.change.mean == own.change.low == own.change.high == 0


def test_only_questions_that_were_asked_both_ways_count() -> None:
    rows = {
        "unpruned": row_records(dict.fromkeys(range(5), 1.0), labelled=False),
        "unpruned" + FOLLOW_UP: row_records(dict.fromkeys(range(4), 1.0), labelled=False),
        "fast": row_records(dict.fromkeys(range(5), 1.0), labelled=False),
        "fast" + FOLLOW_UP: row_records({0: 1.0, 1: 0.0, 2: 1.0}, labelled=False),
    }
    found = compare_follow_ups("fast", rows)
    assert found is not None
    assert (found.questions, found.quality.mean) == (3, pytest.approx(2 / 3))
    assert found.to_dict(labelled=False)["accuracy"] is None
    del rows["fast" + FOLLOW_UP]
    assert compare_follow_ups("fast", rows) is None


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions about three files: two, two and one."""
    folder = tmp_path_factory.mktemp("second")
    lines = demo.write(folder, 12, 0)
    files = list(dict.fromkeys(line["file"] for line in lines))[:3]
    few = []
    for file, most in zip(files, (2, 2, 1), strict=True):
        few += [line for line in lines if line["file"] == file][:most]
    assert len(few) == 5
    (folder / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in few))
    return folder


def invoke(questions: Path, *args: str) -> Result:
    return CliRunner().invoke(
        cli,
        ["evaluate", str(questions / "few.jsonl"), "--methods", "fastv", "--keep", "0.2",
         "--seeds", "1", "--turns", "--answers", str(questions / "answers.jsonl"), *args],
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(questions: Path) -> dict[str, Any]:
    result = invoke(questions, "--json")
    assert result.exit_code == 0, result.output
    return {row["row"]: row for row in json.loads(result.stdout)["rows"]}


def test_every_row_says_what_its_second_questions_came_to(rows: dict[str, Any]) -> None:
    assert not [name for name in rows if FOLLOW_UP in name]
    base = rows["unpruned"]["second"]
    assert base["questions"] == 4  # a file's only question is never a second one
    assert base["accuracy"] == base["unpruned"]
    assert base["agreement"] == 1
    for name in ("fastv at ecl keep 0.2", "random at input keep 0.2", "uniform at input keep 0.2"):
        own = rows[name]["second"]
        assert own["questions"] == 4
        assert own["unpruned"] == base["unpruned"]
        gap = own["accuracy"] - own["unpruned"] - (own["fresh"] - base["fresh"])
        assert own["change"]["mean"] == pytest.approx(gap)
        assert rows[name]["questions"] == 5
    assert rows["fastv at ecl keep 0.2"]["reads_question"]


def test_second_answers_are_kept_and_not_asked_again(
    rows: dict[str, Any], questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "prepare_with_answers", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(follow_up, "converse", lambda *_: pytest.fail("asked again"))
    again = invoke(questions, "--json")
    told = {row["row"]: row for row in json.loads(again.stdout)["rows"]}
    assert told == rows


def test_the_table_has_the_second_questions(rows: dict[str, Any], questions: Path) -> None:
    result = invoke(questions)
    assert "second questions" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("fastv at ecl")
                and line.rstrip().endswith("read"))  # fmt: skip
    assert line.split()[3] == "0.2"
    assert "on the tokens that the first one left" in " ".join(result.stderr.split())


# -- who reads it --------------------------------------------------------------------------------


def test_a_preset_knows_which_of_its_methods_read_the_question() -> None:
    stages = [{"at": "input", "method": "cdpruner", "keep": 0.5}, {"at": 3, "method": "fastv"}]
    assert load_preset({"keep": 0.3, "stages": stages}).question_aware_methods() == (
        "cdpruner",
        "fastv",
    )
    stages[0]["relevance"] = "none"
    assert load_preset({"keep": 0.3, "stages": stages}).question_aware_methods() == ("fastv",)
    assert load_preset("balanced").question_aware_methods() == ()


def test_lists_say_who_reads_the_question(tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(cli, ["presets", "show", "balanced"])
    assert "question  blind: keeps the same tokens for every question" in shown.stderr
    mine = tmp_path / "mine.yaml"
    mine.write_text("keep: 0.3\nstages: [{at: 2, method: fastv}]\n")
    shown = runner.invoke(cli, ["presets", "show", str(mine)])
    assert shown.stdout == mine.read_text()
    assert "aware (fastv): keeps tokens for this question" in " ".join(shown.stderr.split())
    told = json.loads(runner.invoke(cli, ["presets", "show", str(mine), "--json"]).stdout)
    assert told["question_read_by"] == ["fastv"]
    details = runner.invoke(cli, ["methods", "cdpruner"]).stdout
    assert "question aware: keeps tokens for this question" in " ".join(details.split())
    assert "blind with relevance=none" in " ".join(details.split())
    methods = {
        one["name"]: one for one in json.loads(runner.invoke(cli, ["methods", "--json"]).stdout)
    }
    assert methods["fastv"]["reads_question"]
    assert not methods["entropy"]["reads_question"]


def test_a_report_warns_where_the_question_was_read(media_files: dict[str, Path]) -> None:
    for method, warned in (("fastv", True), ("uniform", False)):
        preset = load_preset({"keep": 0.5, "stages": [{"at": 2, "method": method}]})
        loaded = load(None, device="cpu")
        report = next(iter(answer_questions(loaded, [media_files["image"]], ["what?"], preset)))
        told = [one for one in report.warnings if "kept tokens for this question" in one]
        assert bool(told) == warned
        assert all(method in one for one in told)
