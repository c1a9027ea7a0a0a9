"""Published tables: as data, their budgets, and `vtprune reproduce`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import assert_refused

import vtprune
from vtprune import demo
from vtprune.cli import cli
from vtprune.errors import VtpruneError
from vtprune.evaluation.reproduction.reproduce import count_budgets, put_beside
from vtprune.evaluation.reproduction.tables import load_table, table_names
from vtprune.models.names import hub_id_of

COUNTED = [name for name in table_names() if any(row.left for row in load_table(name).rows)]


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["reproduce", *map(str, args)])


@pytest.mark.parametrize("name", table_names())
def test_a_table_names_its_model_and_where_it_is_from(name: str) -> None:
    table = load_table(name)
    assert table.paper
    assert table.source
    assert table.model == "embedded" or "/" in hub_id_of(table.model)
    assert len({row.name for row in table.rows}) == len(table.rows)
    assert all(row.left or row.retained for row in table.rows)


def test_the_published_counts_are_all_of_the_page() -> None:
    """The counts of docs/reproduce.md, and what the authors' code does with positions."""
    text = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text(encoding="utf-8")
    lines = {cells[3].strip(): cells[-2].strip() for line in text.splitlines()
             if len(cells := line.split("|")) == 8}  # fmt: skip
    names = (
        "entropyprune-llava-1.5",
        "horizon-llava-1.5",
        "schedules-llava-1.5",
        "vscan-llava-1.5",
    )
    for row in [row for name in names for row in load_table(name).rows if row.left]:
        counts = ", ".join(f"{count} from {layer}" for layer, count in row.left.items())
        cuts = [stage.positions for stage in row.preset.every_stage() if stage.method != "vtw"]
        assert set(cuts) <= {{"renumbered": "renumber", "kept": "keep"}[lines[counts]]}, row.name


def test_clips_are_renumbered_at_the_input_and_not_deep_down() -> None:
    """As by the embeddings that HoliTom and FlashVID make, and by the indices that they keep."""
    for row in load_table("video-llava-onevision").rows[:2]:
        assert [stage.positions for stage in row.preset.every_stage()] == ["renumber", "keep"]


@pytest.mark.parametrize("name", COUNTED)
def test_a_tables_rows_leave_the_published_counts(name: str) -> None:
    table = load_table(name)
    result = put_beside(table, table.model, count_budgets(table, table.model))
    for row in result.rows:
        assert row.errors == ()
        if name == "entropyprune-llava-next" and "average" in row.published.name:
            assert row.left == {2: 146}  # of 2,928 tokens; published of 2,880
        elif row.published.left:
            assert row.left == row.published.left, row.published.name
        if row.published.flops is not None:
            assert row.flops == pytest.approx(row.published.flops, abs=0.05)
    if table.tokens is not None:
        assert result.tokens == table.tokens
        assert result.warnings == ()


def test_without_arguments_the_tables_are_listed() -> None:
    listed = run()
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:] if line[0] != " "] == (
        table_names()
    )
    assert {one["name"] for one in json.loads(run("--json").stdout)} == set(table_names())


def test_a_table_alone_gives_budgets_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(
        "vtprune.evaluation.profiling.profile.measure_machine",
        lambda *_: pytest.fail("counts are the same on every machine"),
    )
    shown = run("entropyprune-llava-1.5")
    assert shown.exit_code == 0, shown.output
    line = next(one for one in shown.stdout.splitlines() if "EntropyPrune 128" in one)
    assert line.split() == ["EntropyPrune", "128", "98", "from", "2", "the", "same", "-68.2%",
                            "-68.2%"]  # fmt: skip
    assert all(len(one) <= 80 for one in shown.stdout.splitlines())
    assert "576 visual tokens: budgets alone" in shown.stderr


def test_budgets_at_layers_by_default_say_so() -> None:
    shown = run("horizon-qwen2.5-vl", "--model", "qwen2-vl-2b", "--json")
    warnings = json.loads(shown.stdout)["warnings"]
    assert [warning.split(",")[0] for warning in warnings] == [
        "ecl 2 by default",
        "horizon 21 by default",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    lines = demo.write(folder, 12, 0)
    text = "".join(json.dumps(line) + "\n" for line in [lines[1], lines[5], lines[9]])
    (folder / "q.jsonl").write_text(text, encoding="utf-8")
    table = {
        "title": "a stand-in",
        "paper": "nobody's",
        "source": "made up",
        "model": "embedded",
        "benchmark": "three questions",
        "rows": [
            {
                "row": "all",
                "preset": {"keep": 1, "stages": [{"at": "input", "method": "divprune"}]},
                "retained": 97.5,
            },
            {
                "row": "few",
                "preset": {"stages": [{"at": "input", "method": "uniform", "keep": 0.02}]},
                "retained": 10,
            },
        ],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    return folder


def test_the_scores_of_a_list_stand_beside_the_published_ones(folder: Path) -> None:
    saved = folder / "r.csv"
    shown = run(folder / "mine.yaml", folder / "q.jsonl", "--json", "--save", saved)
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    whole, few = result["rows"]
    assert (whole["row"], whole["published"]["retained"]) == ("all", 97.5)
    assert whole["here"]["retained"] == 100
    assert whole["difference"] == 2.5
    assert whole["here"]["interval"] is None  # of three files
    row = next(one for one in result["evaluation"]["rows"] if one["preset"] == "few")
    assert few["here"]["retained"] == pytest.approx(100 * row["relative"])
    assert few["here"]["kept"] == row["keep_mean"]
    assert few["here"]["retained"] < 100
    with saved.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == ["all", "few"]
    assert float(lines[0]["here_retained"]) == 100


def test_the_stand_in_table_runs_on_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("embedded", "demo", "--limit", 8, "--seeds", 1)
    assert shown.exit_code == 0, shown.output
    published = {row.name: row.retained for row in load_table("embedded").rows}
    for name in published:
        line = [one for one in shown.stdout.splitlines() if one.startswith(name)][-1]
        assert float(line.split()[1]) == published[name]
    assert "8 questions about" in shown.stderr


def test_what_is_no_table_is_refused(folder: Path) -> None:
    assert_refused(run("horizon-lava-1.5"), r"Error: no table 'horizon-lava-1.5'")
    assert "did you mean horizon-llava-1.5?" in run("horizon-lava-1.5").stderr
    data = yaml.safe_load((folder / "mine.yaml").read_text())
    bad = folder / "bad.yaml"
    bad.write_text(yaml.safe_dump({**data, "rows": [{"row": "a", "retained": -1}], "rank": 1}))
    for words in ("preset is missing", "retained: -1", "unknown key 'rank'"):
        assert words in run(bad).stderr
    bad.write_text(yaml.safe_dump({**data, "rows": [{**data["rows"][0], "preset": {"keep": 2}}]}))
    assert_refused(run(bad), r"Error: bad.yaml, row all: .*keep")


def test_a_wrong_list_is_refused_before_budgets_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "vtprune.evaluation.reproduction.reproduce.count_budgets",
        lambda *_, **__: pytest.fail("budgets were counted"),
    )
    (tmp_path / "wrong.jsonl").write_text('{"file": "none.png", "question": "what?"}\n')
    for listed in (tmp_path / "none.jsonl", tmp_path / "wrong.jsonl"):
        assert_refused(run("entropyprune-llava-1.5", listed), r"Error: .*none\.")
        with pytest.raises(VtpruneError, match=r"none\."):
            vtprune.reproduce("entropyprune-llava-1.5", listed)
    assert_refused(run("embedded", "demo", "--seeds", 0), "Error: seeds 0 is out of range")


@pytest.mark.parametrize(
    "option",
    [
        "--limit 3",
        "--seeds 3",
        "--answers 3",
        "--frames 3",
        "--metric 3",
        "--dtype float32",
        "--compile",
    ],
)
def test_options_of_questions_are_refused_without_any(option: str) -> None:
    name = option.split()[0]
    for table in ((), ("entropyprune-llava-1.5",)):
        refused = run(*table, *option.split())
        assert_refused(refused, f"Error: {name} changes nothing without QUESTIONS.jsonl")


@pytest.mark.parametrize("option", ["--seed 3", "--model qwen2.5-vl-7b"])
def test_options_of_a_table_are_refused_without_one(option: str) -> None:
    name = option.split()[0]
    assert_refused(run(*option.split()), f"Error: {name} changes nothing without TABLE")
