"""The README and docs are true: commands parse, code compiles, links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from test_layers import ROOMS

import vtprune
from vtprune.cli import cli
from vtprune.cli.options import CONFIG_KEYS
from vtprune.inference import report
from vtprune.inference.report import Report
from vtprune.models import FAMILIES
from vtprune.preset import load_preset, preset_names
from vtprune.pruners import METHODS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README, ASK = PAGES["README.md"], PAGES["docs/ask.md"]
MEASURING = (
    "ask", "calibrate", "check", "compare", "evaluate", "explain", "profile", "show", "tune",
)  # fmt: skip
"""Commands with a page of their own."""
LONGEST = 120
"""Characters of a line of prose."""


def blocks(language: str) -> list[tuple[str, str]]:
    """Return page and text of every fenced block of a language."""
    pattern = rf"^( *)```{language}\n(.*?)^ *```$"
    return [
        (name, textwrap.dedent(found[2]))
        for name, text in PAGES.items()
        for found in re.finditer(pattern, text, flags=re.DOTALL | re.MULTILINE)
    ]


def shell_lines() -> Iterator[tuple[str, str]]:
    """Yield page and line of every command in shell blocks and indented blocks."""
    for name, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            yield name, line
    for name, text in PAGES.items():
        plain = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
        for found in re.findall(r"(?:^    .*\n)+", plain, flags=re.MULTILINE):
            for line in textwrap.dedent(found).replace("\\\n", " ").splitlines():
                yield name, line


def calls(program: str) -> list[tuple[str, list[str]]]:
    """Return page and arguments of every call of a program in the documents."""
    found = []
    for name, line in shell_lines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;>"):
                if " ".join(words).startswith(f"{program} "):
                    found.append((name, words[len(program.split()) :]))
                words = []
            else:
                words.append(word)
    return found


def identify(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)[:40]


def test_the_readme_is_short_and_shows_real_output_early() -> None:
    lines = README.splitlines()
    assert len(lines) < 150
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
    assert all(f"**{option.format_value(option.default)}**" in row for option in method.options)
    assert method.summary in row
    assert (method.paper or "baseline") in row


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_row_with_its_keep(name: str) -> None:
    preset = load_preset(name)
    assert f"| `{name}` | {preset.keep:g} | {preset.description} |" in README


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_a_row(model_type: str) -> None:
    assert f"`{model_type}`" in README


@pytest.mark.parametrize("name", MEASURING)
def test_every_option_of_a_command_is_on_its_page(name: str) -> None:
    """Or on the page of `vtprune ask`, which has what all commands share."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    text = PAGES[f"docs/{name}.md"] + ASK
    options = [param for param in command.params if isinstance(param, click.Option)]
    names = [name for option in options for name in option.opts]
    assert [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)] == []


def test_the_help_that_the_page_names_tells_where_the_config_file_is() -> None:
    found = re.search(r"configuration file\s+\(`vtprune (.*--help)`\s+names its place\)", ASK)
    assert found is not None
    text = CliRunner().invoke(cli, found[1].split()).stdout
    assert "vtprune/config.yaml" in text
    (keys,) = re.findall(r"can set ([^.]*)\.", " ".join(text.split()))
    assert re.findall(r"\w+", keys.replace(" and ", " ")) == list(CONFIG_KEYS)


def test_the_json_fields_of_the_page_are_those_of_a_report() -> None:
    table = ASK.partition("## The JSON")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    fields = [field for field in dataclasses.fields(Report) if field.metadata.get("json", True)]
    assert names == [field.name for field in fields]
    parts = [value for value in vars(report).values() if dataclasses.is_dataclass(value)]
    known = {field.name for part in parts for field in dataclasses.fields(part)}
    known |= {"sha256"}  # read when the JSON is made
    assert set(re.findall(r"`(\w+)`", table.partition("```")[0])) <= known


@pytest.mark.parametrize(("page", "words"), calls("vtprune"), ids=identify)
def test_every_command_parses(page: str, words: list[str]) -> None:
    first, *rest = words
    command = cli.get_command(click.Context(cli), first)
    while isinstance(command, click.Group) and rest:
        first, *rest = rest
        command = command.get_command(click.Context(command), first)
    assert command is not None, page
    assert command.make_context(first, rest).params or not rest


def test_the_pages_show_many_commands() -> None:
    assert len(calls("vtprune")) > 60
    assert len(calls("python -m")) > 5


@pytest.mark.parametrize(("page", "words"), calls("python -m"), ids=identify)
def test_every_module_that_is_run_exists(page: str, words: list[str]) -> None:
    assert words[0] == "pytest" or importlib.util.find_spec(words[0]) is not None
    for path in [word for word in words if word.startswith("tests/")]:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "vtprune._dev" in text])
def test_a_page_that_runs_what_the_wheel_lacks_says_so(page: str) -> None:
    assert page == "CHANGELOG.md" or "checkout" in PAGES[page]


CODE = blocks("python") + [(page, words[0]) for page, words in calls("python -c")]


@pytest.mark.parametrize(("page", "code"), CODE, ids=identify)
def test_python_compiles_and_its_names_exist(page: str, code: str) -> None:
    tree = ast.parse(code, page)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vtprune"):
            spec = importlib.util.find_spec(str(node.module))
            assert spec is not None
            assert spec.origin is not None
            defined = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
            names = {getattr(found, "name", None) for found in ast.walk(defined)}
            assert {alias.name for alias in node.names} <= names, ast.unparse(node)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vtprune":
            assert node.attr in vtprune.__all__, ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("vtprune."):
            called = getattr(vtprune, ast.unparse(node.func).removeprefix("vtprune."))
            inspect.signature(called).bind(*node.args, **{str(one.arg): 0 for one in node.keywords})


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page: str) -> None:
    for path in re.findall(r"`((?:vtprune|tests|docs|presets)/[\w./]+)`", PAGES[page]):
        assert "NAME" in path or (ROOT / path).exists(), path


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=identify)
def test_every_yaml_is_a_preset_or_a_config_file(page: str, text: str) -> None:
    values = yaml.safe_load(text)
    if "stages" in values or "image" in values:
        load_preset(values)
    else:
        assert set(values) <= set(CONFIG_KEYS), page


@pytest.mark.parametrize(("page", "text"), blocks("json"), ids=identify)
def test_json_is_json(page: str, text: str) -> None:
    assert json.loads(text)


def test_ci_runs_the_readmes_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -q -c constraints.txt -e ." in script
    assert "python -m pytest -q" in script
    (command,) = re.findall(r"vtprune demo samples && (vtprune ask .*)", README)
    assert 'vtprune demo "$work/samples"' in script
    file = re.search(r"samples/\S+", command)
    assert file is not None
    assert command.replace(file[0], f'"$work/{file[0]}"') in script


def anchors(text: str) -> set[str]:
    """Return the anchors that a page's headings have on GitHub."""
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", PAGES[page]):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\((\S+\.md)\)", PAGES["docs/README.md"]))
    assert listed >= {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_fit_a_window(page: str) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "    ", "!["))]
    assert [line for line in prose if len(line) > LONGEST] == []


def test_the_rooms_are_listed_in_their_order() -> None:
    rows = re.findall(
        r"^\| `vtprune/(\w+)(?:\.py|/)` \|", PAGES["docs/contributing.md"], re.MULTILINE
    )
    assert tuple(rows) == ROOMS
