"""Methods of the user's own: registered when they keep the contract, and used like ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner
from conftest import assert_refused, save_noise

import vtprune
from vtprune.cli import cli
from vtprune.errors import ModelError, PresetError
from vtprune.pruners import METHODS, OWN, create, reads_question
from vtprune.pruners.base import Budget, Selection, VisualTokens, select_best
from vtprune.pruners.contract import tokens_of, video

SHORT = vtprune.Generation(max_new_tokens=2)
MODULE = '''
"""A module beside the user's files."""
from dataclasses import dataclass, field
from vtprune.pruners.base import select_best

@dataclass(frozen=True)
class Loudest:
    """Tokens whose states are longest."""
    power: float = field(default=2.0, metadata={"low": 1, "high": 4, "help": "of the norm"})
    needs = ("hidden",)

    def select(self, tokens, budget):
        return select_best(tokens.states["hidden"].float().flatten(1).norm(self.power, 1), budget)

class Greedy:
    needs = ()

    def select(self, tokens, budget):
        return None
'''


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)
    OWN.clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_loudest.py").write_text(MODULE)
    save_noise(tmp_path / "good.png", 60, 90)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_loudest", None)


@dataclass(frozen=True)
class First:
    """The first tokens of every group."""

    order: str = field(default="up", metadata={"choices": ("up", "down")})
    needs: ClassVar[tuple[str, ...]] = ()

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        scores = torch.arange(len(tokens), dtype=torch.float32)
        return select_best(-scores if self.order == "up" else scores, budget)


class Attended:
    needs = ("attention",)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return select_best(tokens.states["attention"], budget)


def test_a_registered_method_is_used_like_ours(folder: Path) -> None:
    vtprune.register_method("first", First)
    given = {"keep": 0.5, "generation": SHORT}
    report = vtprune.ask(None, "good.png", "what?", method="first", **given)  # type: ignore[arg-type]
    assert report.tokens.stages[0].method == "first"
    last = vtprune.ask(None, "good.png", "what?", method="first", options={"order": "down"},
                       **given)  # type: ignore[arg-type]  # fmt: skip
    kept = [report.kept_tokens, last.kept_tokens]
    assert kept[0] is not None
    assert kept[1] is not None
    columns = kept[0].layout.columns.tolist()
    half = len(columns) // 2
    assert kept[0].stages[0].kept == frozenset(columns[:half])
    assert kept[1].stages[0].kept == frozenset(columns[-half:])
    preset = {"keep": 0.5, "stages": [{"at": "input", "method": "first", "order": "down"}]}
    same = vtprune.ask(None, "good.png", "what?", preset, generation=SHORT)
    assert same.tokens.kept_after == last.tokens.kept_after
    rows = vtprune.compare_methods(None, "good.png", "what?", ["first"], [0.5], repeats=0).rows
    assert [row.error for row in rows if row.method == "first"] == [None]


def test_what_a_class_reads_says_where_it_can_cut(folder: Path) -> None:
    vtprune.register_method("attended", Attended)
    assert (METHODS["attended"].at, METHODS["attended"].lowest) == ("ecl", 1)
    assert reads_question("attended", {})
    with pytest.raises(PresetError, match="attended reads what the layer before its cut does"):
        vtprune.load_preset({"keep": 0.5, "stages": [{"at": "input", "method": "attended"}]})


def test_a_file_never_imports_a_method(folder: Path) -> None:
    preset = folder / "own.yaml"
    preset.write_text("keep: 0.5\nstages:\n  - {at: input, method: 'own_loudest:Loudest'}\n")
    with pytest.raises(PresetError, match="unknown method 'own_loudest:Loudest'") as refused:
        vtprune.load_preset(preset)
    assert "register it first (vtprune.register_method)" in str(refused.value)
    with pytest.raises(PresetError, match="unknown method"):
        vtprune.ask(None, "good.png", "what?", method="own_loudest:Loudest")
    assert "own_loudest" not in sys.modules
    vtprune.register_method("own_loudest:Loudest", "own_loudest:Loudest")
    assert vtprune.load_preset(preset).keep == 0.5


def test_the_command_line_takes_a_class(folder: Path) -> None:
    shown = CliRunner().invoke(cli, ["methods", "own_loudest:Loudest"])
    assert shown.exit_code == 0, shown.output
    assert "Tokens whose states are longest" in shown.output
    assert "power" in shown.output
    given = ["ask", "good.png", "what?", "--method", "own_loudest:Loudest", "--keep", "0.5", "-o",
             "power=1", "--max-new-tokens", "2", "--json"]  # fmt: skip
    asked = CliRunner().invoke(cli, given)
    assert asked.exit_code == 0, asked.output
    assert '"own_loudest:Loudest"' in asked.output
    assert sys.path.count(str(folder)) == 0
    bad = CliRunner().invoke(cli, [*given, "-o", "power=9"])
    assert bad.exit_code == 1
    assert_refused(CliRunner().invoke(cli, ["methods", "own_loudest:Greedy"]), ".*no Selection")
    assert_refused(
        CliRunner().invoke(cli, ["methods", "own_loudest:None_"]), ".*has no class None_"
    )
    assert_refused(CliRunner().invoke(cli, ["methods", "nowhere_at:All"]), ".*can't be imported")


class Broken:
    needs: tuple[str, ...] = ("hidden",)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return select_best(tokens.states["hidden"].float().flatten(1).sum(1), budget)


class MoreThanItsBudget(Broken):
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return Selection(torch.arange(len(tokens)))


class NotAscending(Broken):
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return Selection(super().select(tokens, budget).index.flip(0))


class OverGroups(Broken):
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return Selection(torch.arange(budget.count))


class UnnamedStates(Broken):
    needs = ()


class UnknownStates(Broken):
    needs = ("everything",)


class InHalf(Broken):
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        states = tokens.states["hidden"].flatten(1)
        return select_best((states * states).sum(1), budget)


class OwnDraws(Broken):
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return select_best(torch.rand(len(tokens)), budget)


class Writes(Broken):
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        tokens.states["hidden"].mul_(2)
        return super().select(tokens, budget)


class Raises(Broken):
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        raise ZeroDivisionError("by zero")


class HalfMerged(Broken):
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        index = super().select(tokens, budget).index
        assign = torch.zeros(len(tokens), dtype=torch.int64)
        assign[index] = torch.arange(len(index))
        return Selection(index, assign, torch.ones(len(tokens)))


@dataclass
class Mutable(Broken):
    share: float = 0.5


@dataclass(frozen=True)
class FreeText(Broken):
    way: str = "any"


BROKEN: dict[type, str] = {
    MoreThanItsBudget: "kept .* tokens of the groups, where the budget is",
    NotAscending: "not ascending",
    OverGroups: "where the budget is",
    UnnamedStates: "reads the states 'hidden', which its needs do not name",
    UnknownStates: "needs 'everything', which is none of",
    InHalf: "chooses otherwise by bfloat16 states",
    OwnDraws: "chooses otherwise|draws from torch's own random generator|its needs do not name",
    Writes: "changed the states|chooses",
    Raises: "raised ZeroDivisionError: by zero",
    HalfMerged: "weights that do not add up to 1",
    Mutable: "its options could change",
    FreeText: "the option way has the default 'any'",
    str: "has no needs or no select",
}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_a_class_that_breaks_the_contract_is_refused(cls: type) -> None:
    with pytest.raises(PresetError, match=BROKEN[cls]):
        vtprune.register_method("broken", cls)
    assert "broken" not in METHODS


def test_names_of_ours_and_names_that_are_none_are_refused() -> None:
    with pytest.raises(PresetError, match="'random' is the name of a packaged method"):
        vtprune.register_method("random", First)
    with pytest.raises(PresetError, match="can't be a method's"):
        vtprune.register_method("a b", First)
    vtprune.register_method("first", First)
    vtprune.register_method("first", First)  # as a notebook's cell does when it runs again
    vtprune.unregister_method("first")
    with pytest.raises(PresetError, match="no method 'first' was registered"):
        vtprune.unregister_method("first")


def test_a_method_that_breaks_its_budget_later_is_refused_at_the_cut() -> None:
    class Late(First):
        """Breaks its budget on layouts that the contract does not try."""

        def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
            chosen = super().select(tokens, budget)
            return Selection(chosen.index[:-1]) if len(tokens) == 50 else chosen

    vtprune.register_method("late", Late)
    layout = video(2, 5, 5, newline=False)
    with pytest.raises(ModelError, match="method late kept"):
        create("late", {}).select(tokens_of(layout), Budget.share(9, layout.groups("all")))


def test_answers_of_changed_code_are_those_of_another_run(folder: Path) -> None:
    from vtprune.evaluation.variants import fingerprint
    from vtprune.preset import load_preset, override

    def digits() -> str:
        sys.modules.pop("own_loudest", None)
        vtprune.register_method("loudest", "own_loudest:Loudest")
        return fingerprint(override(load_preset(None), method="loudest"))

    before = digits()
    assert digits() == before
    with (folder / "own_loudest.py").open("a") as file:
        file.write("# changed\n")
    assert digits() != before
