"""`vtprune check` as a product: what is printed where, and how it exits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import assert_refused, save_noise

from vtprune.cli import cli
from vtprune.engine import prefill
from vtprune.evaluation.checking import check as checking
from vtprune.evaluation.checking.result import CheckedCase, CheckedMedia, CheckResult, Noise
from vtprune.inference.report import InputInfo, ModelInfo, Versions
from vtprune.models import loading

MODEL = ModelInfo(name="m", family="llava", layers=28, parameters=7_615_616_512, device="cpu",
                  dtype="bfloat16", attention="sdpa")  # fmt: skip
DRAWN = InputInfo(files=["224x112"], modality="image", frames=0, tiles=3, width=224, height=112,
                  duration=0.0, timestamps=[], decoder="none")  # fmt: skip
VERSIONS = Versions(vtprune="0.1.0", torch="2.13.0", transformers="5.23.0")
NOISE = Noise("picture", "one", "sdpa, eager", 0.125, 0.0625, 4.0)
CELL = CheckedCase("picture", "one", "input", "dynamic", True, "equal", "", (0.03, 0.06), 0.5, 2.5,
                   8, 8, (0,), (576,), (288,))  # fmt: skip
WRONG = replace(CELL, cut="layers 2, 14", cache="static", core=False, differences=(0.01, 1.5),
                outcome="DIFFERS", reason="from decoded token 1 on, by up to 1.5")  # fmt: skip
REFUSED = replace(CELL, cut="layer 2", outcome="refused", differences=(), effect=None,
                  reason="this model takes no static cache", cache="static")  # fmt: skip
RIGHT = CheckResult(MODEL, VERSIONS, [CheckedMedia("picture", DRAWN)], 8, [NOISE],
                    [CELL, replace(CELL, cache="static")], 2.0, ("be careful",))  # fmt: skip


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, checkpoints) -> list[CheckResult]:  # type: ignore[no-untyped-def]
    """What a check finds, in place of running one."""
    results: list[CheckResult] = []
    monkeypatch.setattr(checking, "check", lambda *_: results[0])
    return results


@pytest.fixture
def model(checkpoints) -> str:  # type: ignore[no-untyped-def]
    return str(checkpoints("llava_onevision"))


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, ["check", *args], prog_name="vtprune")


def row(text: str, *words: str) -> str:
    """The first line that begins with these words, blanks made one."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return next(line for line in lines if line.startswith(" ".join(words)))


def test_the_table_is_on_stdout_and_how_to_read_it_beside(
    found: list[CheckResult], model: str
) -> None:
    found.append(RIGHT)
    result = invoke("--model", model)
    assert result.exit_code == 0, result.output
    assert row(result.stdout, "picture") == "picture input one 6.0e-02 6.0e-02 1.2e-01 2.5 equal"
    assert "verdict   pruned equals masked in 2 of 2 cases" in result.stdout
    assert "differences are up to 12% of" in result.stdout
    assert row(result.stderr, "read") == "read picture made here: 224 x 112, 3 tiles"
    assert "(sdpa, eager)" in result.stderr
    assert "up to 4 times that" in " ".join(result.stderr.split())
    assert "be careful" in result.stderr
    assert "Error" not in result.stderr
    assert invoke("--model", model, "--quiet").stderr == ""


@pytest.mark.parametrize("columns", ["80", ""])
def test_the_table_is_whole_at_80_columns_and_in_pipes(
    found: list[CheckResult], model: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS")
    both = replace(WRONG, prompts="ragged", cache="dynamic", outcome="equal", reason="")
    cells = [CELL, REFUSED, both, replace(WRONG, prompts="ragged")]
    found.append(replace(RIGHT, cases=cells, noise=[NOISE, replace(NOISE, prompts="ragged")]))
    result = invoke("--model", model)
    assert max(map(len, result.stdout.splitlines())) <= 80
    line = row(result.stdout, "picture layers 2, 14")
    assert line == "picture layers 2, 14 ragged 1.5e+00 1.5e+00 1.2e-01 2.5 equal/DIFFERS"
    line = row(result.stdout, "picture layer 2 one")
    assert line == "picture layer 2 one - - 1.2e-01 - refused"


def test_a_difference_ends_with_exit_code_1_and_says_where(
    found: list[CheckResult], model: str
) -> None:
    found.append(replace(RIGHT, cases=[CELL, REFUSED, WRONG]))
    for option in ((), ("--quiet",), ("--json",)):
        result = invoke("--model", model, *option)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-2].startswith("Error: pruned does not equal masked")
        assert result.stderr.splitlines()[-1].startswith("hint: ")
    text = " ".join(invoke("--model", model).stdout.split())
    assert "note refused: picture, layer 2: this model takes no static cache" in text
    assert "note DIFFERS: picture, layers 2, 14: from decoded token 1 on, by up to 1.5" in text
    assert "verdict pruned does not equal masked in 1 of 2 cases" in text


def test_many_reasons_are_cut_short_and_the_refusals_come_first(
    found: list[CheckResult], model: str
) -> None:
    wrong = [replace(WRONG, cut=f"layer {number}", reason=f"by {number}") for number in range(20)]
    found.append(replace(RIGHT, cases=[*wrong, CELL, REFUSED]))
    result = invoke("--model", model, "--quiet")
    notes = [line for line in result.stdout.splitlines() if line.startswith("note")]
    assert len(notes) == 7
    assert "refused" in notes[0]
    assert "15 more: --json has all" in notes[-1]


def test_json_is_one_object_and_is_saved_too(
    found: list[CheckResult], model: str, tmp_path: Path
) -> None:
    found.append(replace(RIGHT, cases=[CELL, WRONG]))
    target = tmp_path / "found.json"
    result = invoke("--model", model, "--json", "--save", str(target))
    assert result.exit_code == 1
    assert result.stdout.count("\n") == 1
    told = json.loads(result.stdout)
    assert told == json.loads(target.read_text())
    assert told["verdict"] == "different"
    assert told["noise"][0]["limit"] == 0.5
    right, wrong = told["cells"]
    assert (right["difference"], right["differences"], right["kept"]) == (0.06, [0.03, 0.06], [288])
    assert (wrong["outcome"], wrong["cache"]) == ("DIFFERS", "static")


def test_a_file_of_one_s_own_is_checked_with_a_preset(model: str, tmp_path: Path) -> None:
    """Nothing is faked."""
    picture = save_noise(tmp_path / "page.png", 60, 90)
    result = invoke(str(picture), "--model", model, "--preset", "balanced", "--keep", "0.4")
    assert result.exit_code == 0, result.output
    assert re.match(r"files .*balanced one \S+e-0\d \S+e-0\d \S+e-0\d \S+ equal",
                    row(result.stdout, "files"))  # fmt: skip
    assert "pruned equals masked in 4 of 4 cases" in result.stdout
    assert row(result.stderr, "read").startswith("read page.png: image 90 x 60")


def test_an_engine_that_cuts_other_tokens_fails_the_command(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is faked but the fault."""
    right = prefill.StageRecord

    def wrong(*args, kept, **named):  # type: ignore[no-untyped-def]
        return right(*args, kept=[[column + 1 for column in row] for row in kept], **named)

    monkeypatch.setattr(prefill, "StageRecord", wrong)
    result = invoke("--model", model, "--method", "uniform", "--at", "1", "--quiet")
    assert result.exit_code == 1
    assert "DIFFERS" in result.stdout
    assert "Error: pruned does not equal masked" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("none.png",), "none.png: no such file"),
        (("--keep", "1"), "keep 1 cuts nothing"),
        (("--keep", "2"), "keep 2 is not a fraction"),
        (("--keep", "image=0.5"), "keep image=0.5 is not a fraction"),
        (("--method", "entropi"), "unknown method 'entropi'"),
        (("--method", "vtw"), "--method vtw chooses no tokens"),
        (("-o", "norm=row"), "method random has no option 'norm'"),
        (("-o", "norm"), "-o norm is not "),
        (("--at", "2"), "--at needs --method"),
        (("--preset", "fast", "--method", "random"), "--preset and --method exclude each other"),
        (("--preset", "fast", "--at", "2"), "--preset and --at exclude each other"),
        (("--preset", "fats"), "no preset 'fats'"),
        (("--seed", "-1"), "--seed -1 is out of range"),
        (("--json", "--quiet"), "--quiet and --json exclude each other"),
        (("--save", "no/found.json"), "no/found.json: can't save there"),
        (("--model", "nowhere/at/all"), "no model 'nowhere/at/all'"),
        (("--model", "./nowhere"), "./nowhere: no such directory"),
    ],
)
def test_what_can_not_be_is_said_before_a_model_is_loaded(
    args: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading.Opened, "load", lambda self: pytest.fail("a model was loaded"))
    assert_refused(invoke(*args), f"Error: {re.escape(message)}")
