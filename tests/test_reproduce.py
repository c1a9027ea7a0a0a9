"""The commands that reproduce the papers' tables can be run, and their budgets are the papers'."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vtprune.cli import cli
from vtprune.models.names import hub_id_of
from vtprune.pruners import METHODS, find_profile
from vtprune.serving.harness.settings import Settings
from vtprune.tokens.schedule import Place
from vtprune.tokens.solver import solve

DOCS = Path(__file__).parents[1] / "docs" / "reproduce.md"
TEXT = DOCS.read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]
PROFILES = [line for line in LINES if line.startswith("vtprune profile")]
EVALUATIONS = [line for line in LINES if line.startswith("lmms-eval")]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if re.match(r"\| [^|]+ \| 0\.\d+ \|", line)
]
"""Model, keep, tokens, left, FLOPs, and the name in papers, of each row of the table of budgets."""
NAMES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if re.search(r"\| (kept|renumbered) \|$", line)
]
"""Method, name, tokens left by layer, layer average, keep and positions of a published budget."""


def test_there_are_commands_of_every_kind() -> None:
    assert (len(PROFILES), len(EVALUATIONS)) == (6, 8)


@pytest.mark.parametrize("row", NAMES, ids=[" ".join(row[:2]) for row in NAMES])
def test_a_published_name_has_its_layer_average(row: list[str]) -> None:
    cuts = [(int(layer), int(count)) for count, layer in re.findall(r"(\d+) from (\d+)", row[2])]
    ends = [layer for layer, _ in cuts[1:]] + [32]
    total = 576 * cuts[0][0] + sum(
        count * (end - layer) for (layer, count), end in zip(cuts, ends, strict=True)
    )
    assert float(row[3]) == pytest.approx(total / 32, abs=0.051)
    assert 0 <= float(row[4]) - total / (32 * 576) <= 1e-4 + 1e-9
    assert row[5] in ("kept", "renumbered")


def test_the_published_names_are_those_of_all_schedules() -> None:
    assert len(NAMES) == 24
    assert {row[1] for row in NAMES if row[0] == "SparseVLM"} == {"192", "128", "96", "64"}


@pytest.mark.parametrize("name", [row for row in NAMES if row[0] in ("SparseVLM", "PyramidDrop")])
def test_a_method_has_its_published_counts_at_the_keep_of_the_page(name: list[str]) -> None:
    method = METHODS[name[0].lower()]
    profile = find_profile(name[0].lower())
    layers = profile.layers(32, method.lowest)
    places = [
        Place("schedule", layer, profile=profile, part=part) for part, layer in enumerate(layers)
    ]
    solved = solve(places, float(name[4]), 32, 576)
    left = ", ".join(f"{cut.count} from {cut.layer}" for cut in solved.cuts)
    assert left == name[2]


@pytest.mark.parametrize("line", PROFILES)
def test_a_budgets_command_parses(line: str) -> None:
    words = shlex.split(line)[1:]
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    assert command.make_context(words[0], words[1:]).params["no_measure"]


@pytest.mark.parametrize("line", PROFILES)
def test_a_budgets_command_gives_the_table(line: str) -> None:
    """Tokens left and FLOPs, in the order of the commands and their keeps."""
    done = CliRunner().invoke(cli, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    asked = [float(one) for one in re.findall(r"--keep ([\d.,]+)", line)[0].split(",")]
    wanted = {float(row[1]): row for row in ROWS_OF[line]}
    rows = {row["keep"]: row for row in report["rows"] if row["preset"] is None}
    for keep in asked:
        tokens, left, flops = wanted[keep][2:5]
        assert int(tokens.replace(",", "")) == report["input"]["visual_tokens"]
        assert int(left) == rows[keep]["tokens"]["kept_after"]
        assert float(flops.strip("-% ")) == pytest.approx(
            100 * rows[keep]["flops"]["reduction"], abs=0.05
        )


def rows_of() -> dict[str, list[list[str]]]:
    """The rows of the table that belong to each command, which have as many as it has keeps."""
    found, rest = {}, list(ROWS)
    for line in PROFILES:
        count = len(re.findall(r"--keep ([\d.,]+)", line)[0].split(","))
        found[line], rest = rest[:count], rest[count:]
    assert not rest
    return found


ROWS_OF = rows_of()


@pytest.mark.parametrize("line", EVALUATIONS)
def test_an_evaluations_arguments_are_those_of_the_model(line: str) -> None:
    words = shlex.split(line)
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--model"] == "vtprune"
    assert int(options["--batch_size"]) >= 1
    given: dict[str, object] = dict(one.split("=", 1) for one in options["--model_args"].split(","))
    settings = Settings.read({**given, "at": given.get("at")})
    assert "/" in hub_id_of(settings.pretrained), "a short name that vtprune models lists"
    preset = settings.resolve()
    assert preset.keep == float(str(given["keep"]))
    if settings.method:
        assert settings.method in METHODS
        assert preset.stages[0].at == given["at"]


@pytest.mark.parametrize("line", EVALUATIONS)
def test_an_evaluations_tasks_are_lmms_evals(line: str) -> None:
    try:
        from lmms_eval.tasks import TaskManager
    except ImportError as missing:
        pytest.skip(f"lmms-eval can't be imported: {missing}")
    named = re.findall(r"--tasks (\S+)", line)[0].split(",")
    assert set(named) <= set(TaskManager().all_tasks)


def test_the_accuracy_is_marked_as_not_run() -> None:
    assert "not run here" in TEXT


def test_the_runner_of_vlmevalkit_names_what_there_is() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    calls = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "partial"
    ]
    (call,) = calls
    given = {
        str(word.arg): ast.literal_eval(word.value)
        for word in call.keywords
        if isinstance(word.value, ast.Constant)
    }
    for keep in (1, 0.3333, 0.2222, 0.1111):
        assert Settings.read({**given, "keep": keep}).resolve().keep == keep
