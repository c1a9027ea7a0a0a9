"""What a tuning claims follows from its sample, and nothing else is claimed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_forced_answers import loaded_tiny

from vtprune.errors import PresetError, VtpruneError
from vtprune.evaluation import bootstrap, tune
from vtprune.evaluation.bootstrap import (
    Quality,
    fewest_files,
    files_needed,
    highest_floor,
    measure_quality,
)
from vtprune.evaluation.damaged import DamagedFiles
from vtprune.evaluation.records import AnswersFile, Record
from vtprune.evaluation.runner import AskSettings
from vtprune.evaluation.tune import TuningPlan, plan_tuning, split
from vtprune.evaluation.tuning_result import Tuning
from vtprune.evaluation.variants import UNPRUNED, Variant
from vtprune.inference.questions_file import Asked
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded
from vtprune.preset import load_preset, preset_names
from vtprune.preset.figures import MeasuredFigure

# -- the bound -----------------------------------------------------------------------------------


def by_file(kept: int, lost: int) -> tuple[list[float], list[float], list[str]]:
    """Files with one question each, of which some lose it."""
    values = [1.0] * kept + [0.0] * lost
    return values, [1.0] * len(values), [str(i) for i in range(len(values))]


def test_files_that_lose_nothing_show_what_the_rule_of_three_allows() -> None:
    found = measure_quality(*by_file(100, 0))
    assert found.mean == 1
    assert found.lower == pytest.approx(0.05 ** (1 / 100))  # 0.9705, about 1 - 3 / 100


@pytest.mark.parametrize(
    ("lost", "whole", "lower"),
    [(1, 200, 0.9765), (3, 60, 0.8758), (5, 200, 0.9482)],  # Clopper-Pearson, from tables
)
def test_yes_or_no_by_file_has_the_exact_bound(lost: int, whole: int, lower: float) -> None:
    assert measure_quality(*by_file(whole - lost, lost)).lower == pytest.approx(lower, abs=0.0015)


def test_many_questions_about_few_files_show_little() -> None:
    many = [1.0] * 400
    files = [str(i % 10) for i in range(400)]
    assert measure_quality(many, many, files).lower == pytest.approx(0.05 ** (1 / 10))  # 0.741
    assert measure_quality(many, many, [str(i) for i in range(400)]).lower > 0.99


def test_what_is_lost_on_one_file_together_counts_as_one_loss() -> None:
    files = [str(i // 4) for i in range(400)]
    together, apart = [1.0] * 400, [1.0] * 400
    together[:4] = [0.0] * 4
    apart[::100] = [0.0] * 4
    one, four = (
        measure_quality(together, [1.0] * 400, files),
        measure_quality(apart, [1.0] * 400, files),
    )
    assert one.mean == four.mean == 0.99
    assert one.lower < four.lower - 0.004


def test_accuracy_is_measured_over_that_of_the_unpruned_model() -> None:
    # Right before: 60 of 80, after: 57, all of them among the 60: 57 / 60 = 0.95.
    before = [1.0] * 60 + [0.0] * 20
    after = [1.0] * 57 + [0.0] * 23
    files = [str(i) for i in range(80)]
    found = measure_quality(after, before, files)
    assert found.mean == pytest.approx(0.95)
    assert found.lower == pytest.approx(measure_quality(*by_file(57, 3)).lower, abs=0.005)


def test_answers_that_pruning_corrects_count_for_it() -> None:
    before = [1.0] * 60 + [0.0] * 20
    after = [1.0] * 57 + [0.0] * 3 + [1.0] * 6 + [0.0] * 14
    found = measure_quality(after, before, [str(i) for i in range(80)])
    assert found.mean == pytest.approx(63 / 60)
    assert found.lower < 1 < found.mean


def test_no_quality_to_begin_with_shows_nothing() -> None:
    assert measure_quality([1.0, 0.0], [0.0, 0.0], ["a", "b"]).lower == 0


def test_the_bound_holds_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 1 to 6 questions, a tenth of them bad for half of theirs: 95 % are kept."""
    monkeypatch.setattr(bootstrap, "BOUND_DRAWS", 1000)
    rng = np.random.default_rng(1)
    wrong = 0
    for trial in range(200):
        sizes = rng.integers(1, 7, 40)
        chance = np.where(rng.random(40) < 0.1, 0.5, 1.0)
        files = np.repeat(np.arange(40), sizes)
        after = (rng.random(len(files)) < chance[files]).astype(float).tolist()
        names = [str(file) for file in files]
        wrong += measure_quality(after, [1.0] * len(after), names, trial).lower > 0.95
    assert wrong <= 10  # 5 %


def test_the_fewest_files_are_those_that_show_it_if_none_loses() -> None:
    # log 0.05 / log 0.98 = 148.3, log 0.05 / log 0.95 = 58.4
    assert fewest_files(0.98) == 149
    assert fewest_files(0.95) == 59
    assert highest_floor(149) >= 0.98 > highest_floor(148)


def test_files_needed_are_those_that_put_the_bound_at_the_floor() -> None:
    needed = files_needed(*by_file(99, 1), 0.98)
    assert needed is not None
    # As many again of the same: 400 files with 4 losses have a bound of 0.977, 600 with 6 of 0.980.
    assert 500 < needed < 700
    found = measure_quality(*by_file(needed - round(needed / 100), round(needed / 100)))
    assert found.lower == pytest.approx(0.98, abs=0.001)
    assert files_needed(*by_file(98, 2), 0.98) is None
    assert files_needed(*by_file(50, 0), 0.98) == pytest.approx(149, abs=2)


# -- the plan ------------------------------------------------------------------------------------


def asked_about(num: int, each: int = 1, answer: str | None = None) -> list[Asked]:
    return [
        Asked(Path(f"clip-{i}.mp4"), f"question {k}", answer) for i in range(num)
        for k in range(each)
    ]  # fmt: skip


def test_no_file_is_searched_on_and_held_out() -> None:
    asked = asked_about(30, each=3)
    search, held = split(asked)
    assert len({one.file for one in search}) == 10
    assert not {one.file for one in search} & {one.file for one in held}
    assert sorted(map(repr, search + held)) == sorted(map(repr, asked))


def test_the_split_follows_from_names_and_seed_alone() -> None:
    asked = asked_about(30)
    moved = [Asked(Path("elsewhere") / one.file, one.question) for one in reversed(asked)]
    names = [{one.file.name for one in split(part)[0]} for part in (asked, moved)]
    assert names[0] == names[1]
    assert {one.file.name for one in split(asked, 1)[0]} != names[0]


def test_candidates_are_the_packaged_presets_and_two_baselines() -> None:
    made = plan_tuning(asked_about(30), 0.8, [0.5])
    names = {one.method or one.preset.name for one in made.listed.variants}
    assert names == {*preset_names(), "uniform", "downsample"}


def test_presets_and_methods_can_be_named() -> None:
    made = plan_tuning(asked_about(30), 0.8, [0.5], ["fast"], ["random"])
    names = [one.method or one.preset.name for one in made.listed.variants]
    assert names == ["random", "fast", "uniform", "downsample"]


@pytest.mark.parametrize("floor", [0.0, 1.0, 1.5, -1.0, float("nan")])
def test_a_floor_out_of_range_is_refused(floor: float) -> None:
    with pytest.raises(VtpruneError, match="is out of range") as caught:
        plan_tuning(asked_about(300), floor)
    assert "above 0, below 1" in caught.value.hint


def test_files_too_few_for_the_floor_are_refused_before_anything_runs() -> None:
    with pytest.raises(VtpruneError, match=r"30 files can't show --floor 0\.98: 20 of") as told:
        plan_tuning(asked_about(30, each=50), 0.98)
    assert "149 are the fewest" in told.value.message
    # 223 - 74 = 149; 0.05^(1/20) = 0.8609
    assert told.value.hint.startswith("ask about 223 files or more")
    assert "--floor 0.86, the most that these can show" in told.value.hint
    assert plan_tuning(asked_about(30), 0.86).size(True).files == 20
    with pytest.raises(VtpruneError, match="222 files can't show"):
        plan_tuning(asked_about(222), 0.98)
    assert plan_tuning(asked_about(223), 0.98).size(True).files == 149


def test_two_files_leave_nothing_to_search_on() -> None:
    with pytest.raises(VtpruneError, match="2 files can't show") as told:
        plan_tuning(asked_about(2), 0.04)
    assert told.value.hint.startswith("ask about 3 files")


def test_answers_to_some_questions_only_are_left_aside_and_that_is_said() -> None:
    asked = [*asked_about(20), *asked_about(10, answer="red")]
    made = plan_tuning(asked, 0.5, [0.5])
    assert not made.labelled
    assert any("10 of 30 questions have a right answer" in note for note in made.notes)


def test_what_can_not_be_tried_is_refused() -> None:
    with pytest.raises(PresetError, match=r"keep 1\.5 is not a fraction"):
        plan_tuning(asked_about(30), 0.5, [1.5])
    with pytest.raises(PresetError, match="unknown method 'entropi'"):
        plan_tuning(asked_about(30), 0.5, [0.5], methods=["entropi"])


# -- the search and the test ---------------------------------------------------------------------

Rule = Callable[[int, Asked, Variant], Any]


class Answerer:
    """Answers by a rule in place of a model: whether a cell's answer is the unpruned one."""

    def __init__(self, rule: Rule, right: Callable[[Asked], bool] = lambda _: True) -> None:
        self.rule, self.right = rule, right
        self.asked: list[tuple[int, str]] = []

    def answer_all(
        self,
        loaded: Loaded,
        asked: Sequence[Asked],
        cells: Sequence[Variant],
        book: AnswersFile,
        settings: AskSettings,
        damaged: DamagedFiles,
        on_progress: Any = None,
    ) -> None:
        for number, one in enumerate(asked):
            for cell in cells:
                if not book.has(number, cell.key):
                    self.asked.append((number, cell.key))
                    book.add([self.record(number, one, cell)])
            if on_progress:
                on_progress("answering", number + 1, len(asked))

    def record(self, number: int, asked: Asked, cell: Variant) -> Record:
        right = self.right(asked)
        if cell.key == UNPRUNED:
            score = None if asked.answer is None else float(right)
            return Record(number, cell.key, "yes", score, same=True, first=2.0)
        kept = self.rule(number, asked, cell)
        if isinstance(kept, str):
            return Record(number, cell.key, error=kept)
        keep = cell.keep or 0.25
        score = None if asked.answer is None else float(right and kept)
        return Record(number, cell.key, "yes" if kept else "no", score, same=bool(kept),
                      divergence=1 - keep, keep_mean=keep, first=2 * keep)  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return loaded_tiny("llava_onevision")


def tuned(
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    made: TuningPlan,
    answerer: Answerer,
    **given: Any,
) -> Tuning:
    monkeypatch.setattr(tune, "answer_all", answerer.answer_all)
    return tune.tune(loaded, made, **given)


def down_to(keep: float, name: str = "fast") -> Rule:
    """Nothing is lost by one preset down to a keep; all others lose every third answer."""

    def rule(number: int, asked: Asked, cell: Variant) -> bool:
        own = cell.preset.name == name and (cell.keep or 1) >= keep
        return own or (hash(asked.question) % 3 != 0 and int(asked.file.stem[5:]) % 3 != 0)

    return rule


def test_the_lowest_keep_that_loses_nothing_is_found(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = plan_tuning(asked_about(230), 0.98, [0.7, 0.5, 0.3, 0.1], ["balanced", "fast"])
    found = tuned(loaded, monkeypatch, made, Answerer(down_to(0.3)))
    assert found.chosen is not None
    assert (found.chosen.name, found.chosen.variant.keep) == ("fast", 0.3)
    assert found.chosen.held_out is not None
    assert found.chosen.held_out.quality == Quality(1.0, highest_floor(154))
    assert found.chosen.held_out.first_token_speedup == pytest.approx(1 / 0.3)
    path = tmp_path / "mine.yaml"
    path.write_text(found.to_yaml())
    preset = load_preset(path)
    assert preset.keep == 0.3
    assert preset.stages == load_preset("fast").stages
    (figure,) = preset.evidence
    assert isinstance(figure, MeasuredFigure)
    assert (figure.questions, figure.right, figure.unpruned, figure.keep) == (154, 100, 100, 0.3)
    assert figure.note == "right: as the unpruned model answers"
    text = path.read_text()
    assert "# fast at keep 0.3 keeps at least 98 % of the unpruned model's answers" in text
    assert "held out: 154 questions about 154 files: 100.0% kept (lower bound 98.1%)" in text
    assert "searched: 76 questions about 76 files" in text
    assert "ecl 2 (default), horizon 4 (default)" in text
    (warning,) = [one for one in found.warnings if "by default" in one]
    assert warning.startswith("horizon 4 by default")  # neither preset cuts at ecl
    told = found.to_dict()
    assert told["reason"] == ""
    assert told["claim"] in text


def test_the_order_is_fixed_by_the_search_and_a_failure_ends_it(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_tuning(asked_about(230), 0.98, [0.7, 0.5, 0.3, 0.1], ["fast"], ["entropy"])
    searched = {one.file for one in made.part(False)}
    bad = {one.file for one in made.part(True)[:9]}

    def rule(number: int, asked: Asked, cell: Variant) -> bool:
        name, keep = cell.name, cell.keep
        if name == "entropy":
            return True  # divergence rises as keep falls: each keep is better than those below
        if keep == 0.5 and name == "fast":
            return True
        return asked.file in searched and name == "fast"

    both = tuned(loaded, monkeypatch, made, Answerer(rule))
    assert [one.label for one in both.tested] == [
        "entropy at ecl at keep 0.7", "entropy at ecl at keep 0.5", "entropy at ecl at keep 0.3",
        "entropy at ecl at keep 0.1",
    ]  # fmt: skip

    def worse(number: int, asked: Asked, cell: Variant) -> bool:
        keep = cell.keep
        return cell.name == "entropy" and not (keep == 0.3 and asked.file in bad)

    found = tuned(loaded, monkeypatch, made, Answerer(worse))
    # Keep 0.1 loses nothing, but comes after one that fails.
    assert [one.verdict for one in found.tested] == ["holds", "chosen", "fails", "not counted"]


def test_what_a_lower_keep_beats_is_not_tested(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_tuning(asked_about(60), 0.8, [0.7, 0.5, 0.3], ["fast"])
    lost = {made.part(False)[0].file}

    def rule(number: int, asked: Asked, cell: Variant) -> bool:
        return cell.name == "fast" and not (cell.keep == 0.5 and asked.file in lost)

    answerer = Answerer(rule)
    found = tuned(loaded, monkeypatch, made, answerer)
    assert [one.variant.keep for one in found.tested] == [0.7, 0.3]
    assert {one.verdict for one in found.trials if one.label == "fast at keep 0.5"} == {"beaten"}
    assert {one.verdict for one in found.trials if one.name == "uniform at input"} == {
        "below the floor"
    }
    held = {key for number, key in answerer.asked if number >= made.searched}
    assert len(held) == 3  # unpruned and the two that are tested


def test_a_floor_that_nothing_holds_is_said_with_the_best(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_tuning(asked_about(230), 0.98, [0.7, 0.5], ["fast"])
    found = tuned(loaded, monkeypatch, made, Answerer(lambda *_: False))
    assert found.chosen is None
    assert found.tested == ()
    message, hint = found.reason
    assert message.startswith("nothing keeps 98 % of the unpruned model's answers, searched on 76")
    assert "keeps 0.0%" in message
    assert "lower --floor" in hint
    assert found.needed is None


def test_a_sample_that_is_the_limit_says_how_many_would_tell(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_tuning(asked_about(230, each=2), 0.98, [0.5], ["fast"])
    lost = made.part(True)[0].file  # 1 of 154 files: the bound is 0.9695
    found = tuned(loaded, monkeypatch, made, Answerer(
        lambda number, asked, cell: asked.file != lost))  # fmt: skip
    assert found.chosen is None
    assert [one.verdict for one in found.tested] == ["fails"]
    assert "99.4% on 308 questions about 154 files held out" in found.reason[0]
    assert found.needed is not None
    assert 800 < found.needed < 1300
    assert "too few questions: some" in found.reason[1]


def test_a_loss_below_the_floor_asks_for_no_more_questions(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_tuning(asked_about(230), 0.98, [0.5], ["fast"])
    lost = {one.file for one in made.part(True)[:20]}
    found = tuned(loaded, monkeypatch, made, Answerer(
        lambda number, asked, cell: asked.file not in lost))  # fmt: skip
    assert found.needed is None
    assert "too few" not in found.reason[1]


def test_with_right_answers_accuracy_over_the_unpruned_models_counts(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_tuning(asked_about(60, answer="red"), 0.8, [0.5], ["fast"])
    half = {one.file for part in (made.part(False), made.part(True)) for one in part[::2]}

    def in_half(*told: Any) -> bool:
        """Only every second is right unpruned, and pruning changes the others alone."""
        return next(one for one in told if isinstance(one, Asked)).file in half

    found = tuned(loaded, monkeypatch, made, Answerer(in_half, in_half))
    assert found.quality == "accuracy"
    assert found.chosen is not None
    assert found.chosen.held_out is not None
    assert found.chosen.held_out.quality.mean == 1
    assert found.chosen.held_out.agreement == 0.5
    assert "of the unpruned model's accuracy" in found.claim()


def test_a_model_that_is_never_right_has_no_accuracy_to_keep(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_tuning(asked_about(60, answer="red"), 0.8, [0.5], ["fast"])
    with pytest.raises(VtpruneError, match="has none of 20 questions right that are sea") as told:
        tuned(loaded, monkeypatch, made, Answerer(lambda *_: True, lambda _: False))
    assert "leave the answers out" in told.value.hint
    searched = {one.file for one in made.part(False)}
    with pytest.raises(VtpruneError, match="has none of 40 questions right that are held out"):
        tuned(loaded, monkeypatch, made, Answerer(
            lambda *_: True, lambda asked: asked.file in searched))  # fmt: skip


def test_a_candidate_that_can_not_run_is_left_out_with_its_reason(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_tuning(asked_about(60), 0.8, [0.5], ["fast", "balanced"])

    def rule(number: int, asked: Asked, cell: Variant) -> Any:
        return "no such budget" if cell.name == "balanced" else cell.name == "fast"

    found = tuned(loaded, monkeypatch, made, Answerer(rule))
    assert found.chosen is not None
    assert found.chosen.name == "fast"
    assert {one.name: one.verdict for one in found.trials}["balanced"] == "no such budget"
    every = tuned(loaded, monkeypatch, made, Answerer(lambda *_: "no such budget"))
    assert every.reason[0] == "no candidate can run on these questions: no such budget"


def test_a_candidate_that_fails_to_run_on_the_held_out_part_ends_the_test(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_tuning(asked_about(60), 0.8, [0.7, 0.5], ["fast"])
    last = made.part(True)[-1].file

    def rule(number: int, asked: Asked, cell: Variant) -> Any:
        if asked.file == last and cell.keep == 0.7:
            return "too large"
        return True

    found = tuned(loaded, monkeypatch, made, Answerer(rule))
    assert [one.verdict for one in found.tested] == ["too large", "not counted"]
    assert "can't run on all held-out questions: too large" in found.reason[0]


def test_a_preset_with_keeps_of_its_own_stands_where_it_really_keeps(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"stages": [{"at": "input", "method": "random", "keep": 0.25}]}
    made = plan_tuning(asked_about(60), 0.8, [0.5], [own])
    found = tuned(loaded, monkeypatch, made, Answerer(lambda *_: True))
    assert [one.label for one in found.tested] == ["uniform at input at keep 0.5", "custom"]
    assert found.chosen is not None
    assert found.chosen.kept == 0.25
    assert found.preset is not None
    told: Any = found.to_dict()["preset"]
    assert load_preset(told) == replace(found.preset, name="custom")


def test_the_file_looks_at_as_much_of_the_media_as_was_looked_at(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = plan_tuning(asked_about(60), 0.8, [0.5], ["document"])
    settings = AskSettings(sampling=Sampling(frames=12, max_tiles=3, start=1.5))

    def rule(number: int, asked: Asked, cell: Variant) -> bool:
        return cell.name == "document"

    found = tuned(loaded, monkeypatch, made, Answerer(rule), settings=settings)
    path = tmp_path / "mine.yaml"
    path.write_text(found.to_yaml())
    preset = load_preset(path)
    assert (preset.image.max_tiles, preset.video.frames) == (3, 12)
    assert "# of every video only 1.5 s to its end was looked at" in path.read_text()


def test_a_models_name_can_not_leave_the_comment(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = plan_tuning(asked_about(60), 0.8, [0.5], ["fast"])
    odd = replace(loaded, name="a\nkeep: 0.9\x07é")
    found = tuned(odd, monkeypatch, made, Answerer(lambda *_: True))
    path = tmp_path / "mine.yaml"
    path.write_text(found.to_yaml())
    assert load_preset(path).keep == 0.5
    assert "# model: a keep: 0.9?? (" in path.read_text()


def test_answers_that_are_there_are_not_asked_again(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = plan_tuning(asked_about(60), 0.8, [0.7, 0.5], ["fast"])
    first, again = Answerer(down_to(0.5)), Answerer(down_to(0.5))
    path = tmp_path / "answers.jsonl"
    one = tuned(loaded, monkeypatch, made, first, path=path)
    two = tuned(loaded, monkeypatch, made, again, path=path)
    assert len(first.asked) > 60
    assert again.asked == []
    assert one.to_dict() == two.to_dict()
    other = plan_tuning(asked_about(60), 0.8, [0.7, 0.5], ["fast"], seed=1)
    with pytest.raises(VtpruneError, match="answers of another evaluation"):
        tuned(loaded, monkeypatch, other, again, path=path)


def test_progress_is_counted_on_each_part(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan_tuning(asked_about(60), 0.8, [0.5], ["fast"])
    shown: list[tuple[str, int, int]] = []
    tuned(loaded, monkeypatch, made, Answerer(lambda *_: True),
          on_progress=lambda *told: shown.append(told))  # fmt: skip
    assert ("searching", 20, 20) in shown
    assert ("confirming", 0, 40) in shown
    assert shown[-1] == ("confirming", 40, 40)


def test_the_searched_share_is_a_third() -> None:
    assert tune.SEARCH == 3
