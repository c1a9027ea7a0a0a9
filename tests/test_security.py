"""What the pages of security and reliability say is so."""

from __future__ import annotations

import csv
import io
import json
import xml.dom.minidom
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from vtprune._dev import licences, reliability
from vtprune._dev.fuzz.trials import MOST_MEMORY, MOST_SECONDS, SCREEN, CaseTrial
from vtprune._dev.lines import read_lines
from vtprune._dev.reliability import (
    BEGIN,
    COUNTS,
    END,
    PAGE,
    CountRow,
    count_log,
    table,
    write_page,
)
from vtprune.cli import cli
from vtprune.cli.console.table_files import record, to_csv, to_latex, to_markdown
from vtprune.cli.console.tables import plain_table, print_fitted
from vtprune.cli.console.terminal import stdout_console
from vtprune.errors import CONTROLS
from vtprune.inference.csv_file import csv_text
from vtprune.pictures.chart import new_figure, to_bytes

SECURITY = Path(__file__).parents[1] / "docs" / "security.md"


def test_no_copyleft_among_the_dependencies_is_unnamed() -> None:
    prose = SECURITY.read_text("utf-8").partition(licences.BEGIN)[0]
    named = licences.dependencies()
    assert {"torch", "transformers", "av", "pillow", "tqdm"} <= named.keys()
    for name, package in named.items():
        if licences.COPYLEFT.search(licences.licence(package)):
            assert f"`{name}`" in prose, f"{name}: {licences.licence(package)}"


def test_the_table_of_licences_has_every_package_that_is_required() -> None:
    listed = SECURITY.read_text("utf-8").partition(licences.BEGIN)[2].partition(licences.END)[0]
    direct = {name for name in licences.dependencies() if f"| {name} |" in listed}
    assert {"torch", "transformers", "av", "pillow", "jinja2", "pydantic", "rich"} <= direct


@pytest.mark.parametrize("licence", ["GPL-3.0", "LGPLv2+", "AGPL", "MPL-2.0 AND MIT", "GNU GPL"])
def test_copyleft_is_known_by_its_names(licence: str) -> None:
    assert licences.COPYLEFT.search(licence)
    assert not licences.COPYLEFT.search("Apache-2.0 AND BSD-3-Clause AND MIT")


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1", "'+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-cmd|x", "'-cmd|x"),
        ("-0.5", "-0.5"),
        ("- none", "- none"),
        ("a=b", "a=b"),
        (-0.5, "-0.5"),
        ("\r\x1b=1", "'=1"),
    ],
)
def test_no_cell_is_a_formula(text: object, cell: str) -> None:
    for row in ({"name": text}, {text: ""}):
        rows = list(csv.reader(io.StringIO(csv_text([row]))))
        assert rows in ([["name"], [cell]], [[cell], [""]])


STEERING = 'a\x1b[31m\x9b2J\u202e\u2066[bold red]x[/]<b>&"'
STEERS_NOT = 'a[31m2J[bold red]x[/]<b>&"'


@pytest.mark.parametrize("add", ["heading", "cell", "line"])
def test_no_table_steers_a_terminal_or_who_reads_its_file(
    add: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever forgets to clean a text."""

    def show(console: Console) -> None:
        table = plain_table()
        table.add_column(STEERING if add == "heading" else "name")
        table.add_row(STEERING if add == "cell" else "a")
        print_fitted(table, console)
        if add == "line":
            console.print(STEERING)

    monkeypatch.setenv("COLUMNS", "100")
    show(stdout_console())
    recorded = record(show)
    files = to_csv(recorded), to_markdown(recorded), to_latex(recorded)
    for text in (capsys.readouterr().out, *files):
        assert not CONTROLS.search(text)
    assert STEERS_NOT in next(csv.reader(files[0].splitlines()[add == "cell" :])) or add == "line"


def test_a_chart_holds_any_text() -> None:
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot([0, 1], label=f"{STEERING}\udcff")
    axes.set_title(STEERING)
    axes.legend()
    text = to_bytes(figure, "svg").decode()
    assert not CONTROLS.search(text)
    assert "a[31m2J[bold red]x" in text
    assert xml.dom.minidom.parseString(text).documentElement.tagName == "svg"


@pytest.mark.parametrize("columns", ["0", "00", "²", "9" * 30])
def test_tables_are_whole_at_no_columns(columns: str) -> None:
    shown = CliRunner().invoke(cli, ["methods"], env={"COLUMNS": columns}).stdout
    assert shown == CliRunner().invoke(cli, ["methods"], env={"COLUMNS": "80"}).stdout
    assert "entropy" in shown


# -- counts ----------------------------------------------------------------------------------------


def test_the_page_has_the_table_of_its_counts() -> None:
    counts = [CountRow(**line) for line in read_lines(COUNTS)]
    assert f"{BEGIN}\n{table(counts)}\n{END}" in PAGE.read_text("utf-8")
    assert not any(count.findings for count in counts)


def test_logs_become_counts(tmp_path: Path) -> None:
    trials = [
        CaseTrial(0, "moving.png", "cut", "taken", cpu=1.0, memory=5),
        CaseTrial(1, "png", "cut", "refused", "Error: no"),
        CaseTrial(2, "png", "cut", "raised", "KeyError: 3"),
        CaseTrial(3, "preset", "cut", "refused", "Error: no"),
    ]
    assert count_log([vars(trial) for trial in trials]) == [
        CountRow("media", "png", 3, 1, 1, 1, 1.0, 5),
        CountRow("text", "preset", 1, 0, 0, 1),
    ]
    run = {"command": "batch", "seed": 0, "kills": 3, "moments": [], "fault": "", "seconds": 1.0}
    killed = count_log([run, {**run, "fault": "lost"}])
    assert killed == [CountRow("kills", "batch", 6, 1, 2, 0)]
    page = tmp_path / "page.md"
    page.write_text(f"a\n{BEGIN}\nold\n{END}\nb\n")
    write_page(killed, page)
    assert page.read_text() == f"a\n{BEGIN}\n{table(killed)}\n{END}\nb\n"
    assert page != reliability.PAGE


def test_one_command_runs_all_that_is_counted_and_goes_on_with_its_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"command": "tune", "seed": 0, "kills": 97, "moments": [], "fault": "", "seconds": 1.0}
    whole = {**run, "command": "batch", "kills": 101}
    commands: list[list[str]] = []

    def log_a_run(command: list[str], check: bool) -> None:
        commands.append(command[2:])
        if command[2:4] == ["vtprune._dev.kills", "tune"]:
            with (tmp_path / "tune.jsonl").open("a") as log:
                log.write(json.dumps({**run, "seed": 1, "kills": 8}) + "\n")

    monkeypatch.setattr(reliability.subprocess, "run", log_a_run)
    for name, value in (("COUNTS", tmp_path / "counts"), ("PAGE", tmp_path / "page.md")):
        monkeypatch.setattr(reliability, name, value)
    monkeypatch.setattr(write_page, "__defaults__", (tmp_path / "page.md",))
    (tmp_path / "page.md").write_text(f"{BEGIN}\n{END}\n")
    (tmp_path / "tune.jsonl").write_text(json.dumps(run) + "\n")
    (tmp_path / "batch.jsonl").write_text(json.dumps(whole) + "\n")
    reliability.main(["--measure", str(tmp_path)])
    given = {tuple(command[:4]): command[4:] for command in commands}
    assert given == {
        ("vtprune._dev.fuzz", "media", "--count", "10000"): ["--save", f"{tmp_path}/media.jsonl"],
        ("vtprune._dev.fuzz", "text", "--count", "5000"): ["--save", f"{tmp_path}/text.jsonl"],
        **{
            ("vtprune._dev.kills", name, "--count", count): [
                *("--seed", seed, "--save", f"{tmp_path}/{name}.jsonl")
            ]
            for name, count, seed in (
                *((name, "100", "0") for name in ("evaluate", "calibrate", "serve")),
                ("tune", "3", "1"),
            )
        },
    }
    assert "| kills: tune | 105 | 2 |" in (tmp_path / "page.md").read_text()
    assert "| **kills, all** | 206 |" in (tmp_path / "page.md").read_text()


def test_the_page_names_the_bounds_of_a_finding() -> None:
    text = " ".join(PAGE.read_text("utf-8").split())
    assert f"more than {MOST_SECONDS:.0f} s of processor time" in text
    assert f"more than {MOST_MEMORY / 1e9} GB" in text
    assert f"{SCREEN[1]} lines of {SCREEN[0]} columns" in text
