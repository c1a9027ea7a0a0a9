"""The README says what is there, and its commands are those that are run in CI."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vtprune.cli import cli
from vtprune.cli.ask import ask
from vtprune.cli.config import KEYS
from vtprune.models import FAMILIES
from vtprune.preset import load_preset, preset_names
from vtprune.pruners import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_command_and_its_output_stand_before_line_25() -> None:
    lines = README.splitlines()
    command = next(i for i, line in enumerate(lines) if "pip install" in line)
    output = next(i for i, line in enumerate(lines) if i > command and line == "```text")
    assert output < 25
    assert lines[output + 1].strip()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_row_with_its_place_options_and_paper(name: str) -> None:
    method = METHODS[name]
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    assert f"`{method.at}`" in row
    assert all(f"`{option.name}`" in row for option in method.options)
    assert all(f"**{option.shown(option.default)}**" in row for option in method.options)
    assert method.summary in row
    assert (method.paper or "baseline") in row


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_row_with_its_keep(name: str) -> None:
    preset = load_preset(name)
    assert f"| `{name}` | {preset.keep:g} | {preset.description} |" in README


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_a_row(model_type: str) -> None:
    assert f"`{model_type}`" in README


@pytest.mark.parametrize(
    "option", [p for p in ask.params if isinstance(p, click.Option)], ids=lambda o: str(o.name)
)
def test_every_option_of_ask_has_a_row(option: click.Option) -> None:
    for name in option.opts:
        assert f"`{name}`" in README, name


def test_the_help_that_the_readme_names_tells_where_the_config_file_is() -> None:
    found = re.search(r"configuration file \(`vtprune (.*--help)` names its place\)", README)
    assert found is not None
    told = CliRunner().invoke(cli, found[1].split()).stdout
    assert "vtprune/config.yaml" in told
    (keys,) = re.findall(r"can set ([^.]*)\.", " ".join(told.split()))
    assert re.findall(r"\w+", keys.replace(" and ", " ")) == list(KEYS)


def test_the_readmes_commands_parse() -> None:
    """Every `vtprune ...` line of the README is one that the command line takes."""
    shown = re.findall(r"(?:^|&& |\| )(vtprune [^\n#&|]+)", README, flags=re.MULTILINE)
    assert len(shown) > 5
    for line in shown:
        words = shlex.split(line)[1:]
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None, line
        context = (
            command.make_context(words[0], words[1:], resilient_parsing=False)
            if words[0] not in ("presets",)
            else None
        )
        assert context is None or context.params, line


def test_ci_runs_the_readmes_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -q -c constraints.txt -e ." in script
    assert 'vtprune ask "$work/samples/clip-000.mp4" "what happens?" --keep 0.3' in script
    assert "python -m pytest -q" in script


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_every_link_of_the_readme_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
