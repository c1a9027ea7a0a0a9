"""One flag means one thing in every command, and none that is given twice is lost."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from vtprune._dev.arguments import Parser
from vtprune.cli import COMMANDS, cli
from vtprune.cli.options import FIELDS, method_options

ROOT = Path(__file__).parents[1]


def leaves() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, by its words."""
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from (((name, child), own) for child, own in command.commands.items())
        else:
            yield (name,), command


LEAVES = dict(leaves())
OPTIONS = {
    (words, option): param
    for words, command in [((), cli), *LEAVES.items()]
    for param in command.params
    if isinstance(param, click.Option)
    for option in param.opts[:1]
}


def of_commands(*names: str) -> dict[tuple[str, ...], click.Option]:
    return {words: param for (words, option), param in OPTIONS.items() if option in names}


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="vtprune")


def example(param: click.Option) -> list[str]:
    """The option with a value that its type takes."""
    if param.is_flag:
        return [param.opts[0]]
    return [param.opts[0], {"integer": "3", "float": "0.5"}.get(param.type.name, "a=b")]


@pytest.mark.parametrize("key", OPTIONS, ids=lambda key: " ".join([*key[0], key[1]]))
def test_an_option_that_is_given_twice_adds_or_is_refused(key: tuple[tuple[str, ...], str]) -> None:
    words, option = key
    param = OPTIONS[key]
    if param.is_eager:
        return  # --version and --help end the command
    if param.multiple:
        given = [*example(param), *example(param)]
        context = LEAVES[words].make_context(words[-1], given, resilient_parsing=True)
        assert len(context.params[str(param.name)]) == 2
        return
    result = invoke(*words, *example(param), *example(param), "x")
    assert f"Error: Option '{option}' is given 2 times; give it once.\n" in result.stderr
    assert result.exit_code == 2


def test_o_is_an_option_of_the_method_everywhere() -> None:
    found = of_commands("-o")
    assert {words[0] for words in found} >= {"ask", "compare", "profile", "evaluate", "tune",
                                             "calibrate"}  # fmt: skip
    for words, param in found.items():
        assert (param.name, param.metavar, param.opts) == ("option", "KEY=VALUE", ["-o"]), words


@pytest.mark.parametrize("words", of_commands("-o"), ids=" ".join)
def test_an_o_that_names_a_file_is_told_of_save_and_writes_nothing(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("q.jsonl", "a.png"):
        (tmp_path / name).write_text('{"file": "a.png", "question": "what?"}\n')
    given: dict[str, list[str]] = {"ask": ["a.png", "what?"], "compare": ["a.png", "what?"]}
    given |= {"profile": [], "serve": []}
    needs = ["--save", "s.yaml"] if words[0] in ("tune", "calibrate") else []
    for value in ("out.csv", "-", "/tmp/mine.yaml"):
        result = invoke(*words, *given.get(words[0], ["q.jsonl"]), *needs, "-o", value)
        assert result.exit_code == 1, result.output
        assert f"Error: -o {value} is not KEY=VALUE\n" in result.stderr
        assert "--save FILE writes the result" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "q.jsonl"]


def test_save_is_where_the_result_goes_everywhere() -> None:
    found = of_commands("--save")
    assert {words[0] for words in found} >= {"ask", "compare", "profile", "evaluate", "tune",
                                             "calibrate"}  # fmt: skip
    for words, param in found.items():
        assert (param.multiple, param.metavar) == (True, "FILE"), words
        assert "in the format of its suffix: ." in str(param.help)


def test_one_way_to_prune_has_singular_flags_and_many_rows_have_lists() -> None:
    one, many = of_commands("--method"), of_commands("--methods")
    assert one
    assert many
    both = one.keys() & many.keys()
    assert [param.name for words, param in many.items() if words in both] == ["methods"]
    many = {words: param for words, param in many.items() if words not in both}  # not `show`
    for words in one:
        assert not OPTIONS[words, "--keep"].multiple
        assert not OPTIONS[words, "--preset"].multiple
        assert ((words, "--presets") in OPTIONS) == (words in both)
    for words, param in many.items():
        assert param.multiple, words
        for option in ("--presets", "--keep"):
            assert (words, option) not in OPTIONS or OPTIONS[words, option].multiple
        assert (words, "--preset") not in OPTIONS


@pytest.mark.parametrize("option", ["-o", "--save", "--keep", "--seed", "--at", "--model"])
def test_a_flag_looks_alike_in_every_command(option: str) -> None:
    found = of_commands(option)
    assert len(found) > 1
    assert len({param.type.name for param in found.values()}) == 1
    assert len({str(param.metavar).removesuffix(",...") for param in found.values()}) == 1


SHARED = Counter(str(param.name) for param in OPTIONS.values() if param.name != "saves")


@pytest.mark.parametrize("name", [name for name, times in SHARED.items() if times > 1])
def test_an_option_has_one_help_and_one_section(name: str) -> None:
    found = [param for param in OPTIONS.values() if param.name == name]
    assert len({str(param.help).partition("  [default")[0] for param in found}) == 1
    assert all(str(param.help).count("[default: ") <= 1 for param in found)
    assert len({getattr(param, "section", "Other") for param in found}) == 1


def test_every_declared_option_is_taken_by_a_command() -> None:
    assert {str(param.name) for param in OPTIONS.values()} >= set(FIELDS)


def test_lists_with_commas_add_up() -> None:
    command = LEAVES["compare",]
    words = ["--methods", "a", "--methods", "b, c", "--keep", "0.5", "--keep", "0.3,0.1", "x"]
    params = command.make_context("compare", words).params
    assert params["methods"] == ("a", "b", "c")
    assert params["keeps"] == ("0.5", "0.3", "0.1")
    assert command.make_context("compare", ["x"]).params["keeps"] == ("0.5", "0.3", "0.1")


def test_options_of_a_method_add_up_by_key() -> None:
    assert method_options(["norm=none", " states = key "]) == {"norm": "none", "states": "key"}


def test_a_tool_of_the_project_refuses_an_option_twice(capsys: pytest.CaptureFixture[str]) -> None:
    def parser() -> Parser:
        made = Parser(prog="tool")
        made.add_argument("file")
        part = made.add_subparsers().add_parser("part")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--save", action="append")
        return made

    found = parser().parse_args(["x", "part", "--seed", "1", "--save", "a", "--save", "b"])
    assert (found.file, found.seed, found.save) == ("x", 1, ["a", "b"])
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["x", "part", "--seed", "1", "--seed", "2"])
    assert stopped.value.code == 2
    assert "--seed is given more than once" in capsys.readouterr().err


def commands_shown() -> Iterator[tuple[str, str]]:
    """Every `vtprune ...` line of a help text; tests/test_docs.py has those of the documents."""
    for words, command in [((), cli), *LEAVES.items()]:
        for line in str(command.epilog).replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|\| )(vtprune .*)", line.strip())
            if found:
                yield f"{' '.join(words)} --help", found[1].partition(" > ")[0]


SHOWN = list(commands_shown())


@pytest.mark.parametrize(("where", "line"), SHOWN, ids=[line for _, line in SHOWN])
def test_every_command_that_is_shown_parses(where: str, line: str) -> None:
    first, *words = shlex.split(line)[1:]
    command = cli.get_command(click.Context(cli), first)
    while isinstance(command, click.Group):
        first, *words = words
        command = command.get_command(click.Context(command), first)
    assert command is not None, where
    context = command.make_context(first, words)
    if pairs := context.params.get("option"):
        method_options(pairs)
