"""Where a model can be cut: entropy, what is lost by layer, the bound, and the search."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import family_table
import numpy as np
import pytest
import tiny
import tiny_processor
import torch
import yaml
import zoo
from conftest import save_noise
from matplotlib.figure import Figure
from PIL import Image
from prompts import with_tensors
from test_forced_answers import CASES, loaded_tiny, prompt_of
from transformers import PreTrainedModel

from vtprune import __version__
from vtprune.errors import ModelError, PresetError, VtpruneError
from vtprune.evaluation.bootstrap import (
    DRAWS,
    Change,
    Gap,
    drawn_changes,
    relative_change,
    relative_gap,
)
from vtprune.evaluation.calibration.calibrate import CalibrationSettings, calibrate, score_variant
from vtprune.evaluation.calibration.chart import draw_change, plot
from vtprune.evaluation.calibration.entropy import (
    curve_of,
    entropy_curve,
    find_collapse,
    matrix_entropy,
)
from vtprune.evaluation.calibration.horizon import (
    find_horizon,
    horizon_interval,
    quality,
    questions_needed,
)
from vtprune.evaluation.calibration.layer_scores import (
    drop_scores,
    open_prefix,
    token_information,
    windows,
)
from vtprune.evaluation.calibration.result import (
    CalibrationResult,
    CalibrationSample,
    TokenInformation,
)
from vtprune.evaluation.calibration.schedules import (
    CandidateSchedule,
    TriedSchedule,
    list_schedules,
    rank_schedules,
)
from vtprune.evaluation.runner import AskSettings, FileRunner
from vtprune.inference.forced_answers import PromptWithAnswer, Score
from vtprune.inference.generate import Generation
from vtprune.inference.questions_file import Asked
from vtprune.models import FAMILIES
from vtprune.models.loading import Loaded, load
from vtprune.preset import calibration as calibrations
from vtprune.preset import load_preset
from vtprune.preset.calibration import Calibration, read_calibration
from vtprune.tokens.layout import NEWLINE, Layout, box, join, single

EVERY_KIND = ("granite4_vision", "glm5_next", "qwen2_5_omni_thinker", "ernie4_5_vl_moe")
"""Without a cache of its own, with layers where nothing can be cut, positions of the whole prompt,
tokens around a picture that are not as text.
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames and "calibrated" in metafunc.function.__name__:
        rows = family_table.read_table().values()
        asked = [row.model_type for row in rows if row.how == "asked"]
        asked = [kind for kind in asked if kind not in FAMILIES or kind in tiny.FAMILIES]
        metafunc.parametrize("kind", asked if metafunc.config.getoption("--zoo") else EVERY_KIND)


# -- entropy --------------------------------------------------------------------------------------

CROSS = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]


@pytest.mark.parametrize(
    ("rows", "entropy"),
    [
        (CROSS, 1.0),  # eigenvalues 1/2, 1/2
        (CROSS[:2], 0.0),  # 1, 0
        (CROSS[:2] + CROSS, -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))),
        ([[3.0, 4.0]] * 5, 0.0),  # all the same: nothing is left once they are centred
        ([[3.0, 4.0]], 0.0),
    ],
)
def test_matrix_entropy_is_that_of_the_eigenvalues(rows: list[list[float]], entropy: float) -> None:
    found = matrix_entropy(torch.tensor(rows))
    assert found == pytest.approx(entropy, abs=1e-9)
    moved = matrix_entropy(7 * torch.tensor(rows) + torch.tensor([5.0, -2.0]))
    assert moved == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_matrix_entropy_is_the_same_by_tokens_and_by_dimensions(shape: tuple[int, int]) -> None:
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    rows = states - states.mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).clamp_min(1e-300)
    whole = -(eigenvalues * eigenvalues.log()).sum() / math.log(6)
    assert matrix_entropy(states) == pytest.approx(float(whole), abs=1e-9)


def test_states_with_nan_have_no_entropy() -> None:
    with pytest.raises(ModelError, match="NaN or infinity"):
        matrix_entropy(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


def test_the_collapse_layer_has_the_largest_mean_drop_in_the_first_half() -> None:
    curves = torch.tensor(
        [
            [0.9, 0.9, 0.5, 0.5, 0.5, 0.1],  # to layer 2; the drop to layer 5 is too late
            [0.9, 0.6, 0.5, 0.5, 0.5, 0.5],  # to layer 1
            [0.9, 0.9, 0.6, 0.5, 0.5, 0.5],  # to layer 2
        ]
    )
    found = find_collapse(curves)
    assert found.layer == 2
    assert found.share == pytest.approx(2 / 3)
    assert found.drop == pytest.approx(0.8 - 1.6 / 3)


def test_a_curve_has_a_value_for_every_layer_that_states_enter() -> None:
    loaded = loaded_tiny("llava_onevision")
    prompt = prompt_of(loaded, "image")
    curve = entropy_curve(loaded, prompt.tensors)
    assert len(curve) == tiny.LAYERS
    assert all(0 < entropy < 1 for entropy in curve)
    prefix = open_prefix(loaded, prompt, {})
    assert prefix is not None
    assert prefix.curve == pytest.approx(curve, abs=1e-5)


def test_of_many_tokens_evenly_spaced_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor(CROSS).repeat_interleave(5, dim=0) + 3  # each of the four comes five times
    states = torch.cat([rows, torch.full((4, 2), 9.0)])[None]
    monkeypatch.setattr("vtprune.evaluation.calibration.entropy.MOST_TOKENS", 4)
    assert curve_of([states], torch.arange(20)) == pytest.approx((1.0,))


# -- what is lost by layer ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_dropping_from_a_shared_prefix_equals_pruning_the_whole_prompt(
    name: str, kind: str
) -> None:
    loaded = loaded_tiny(name)
    prompt = prompt_of(loaded, kind)
    prefix = open_prefix(loaded, prompt, {})
    assert (prefix is not None) == (kind in tiny.FAMILIES[name].unbroken)
    if prefix is None:
        return
    fast = drop_scores(loaded, [prompt], prefix, {})[0]
    slow = drop_scores(loaded, [prompt], None, {})[0]
    assert len(fast) == len(slow) == tiny.LAYERS + 1
    for one, other in zip(fast, slow, strict=True):
        assert one.probability == pytest.approx(other.probability, rel=1e-3)
        assert one.first == pytest.approx(other.first, rel=1e-4)
        assert one.greedy == other.greedy
    assert fast[0].first != pytest.approx(fast[-1].first, rel=1e-2)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_questions_on_one_prefix_score_as_they_do_alone(name: str) -> None:
    loaded = loaded_tiny(name)
    first = prompt_of(loaded, "image")
    ids = first.tensors["input_ids"]
    more = torch.tensor([[40, 41, 42]])
    longer = {
        key: torch.cat([value, more if key == "input_ids" else torch.full_like(more, fill)], dim=1)
        for key, fill in (("input_ids", 0), ("attention_mask", 1), ("mm_token_type_ids", 0))
        if (value := first.tensors.get(key)) is not None
    }
    second = replace(with_tensors(first, **longer), answer=torch.tensor([50]))
    prefix = open_prefix(loaded, first, {})
    assert prefix is not None
    assert prefix.fits(second)
    assert not prefix.fits(with_tensors(first, input_ids=ids + 1))
    together = drop_scores(loaded, [first, second], prefix, {})
    for prompt, scores in zip((first, second), together, strict=True):
        alone = drop_scores(loaded, [prompt], None, {})[0]
        for one, other in zip(scores, alone, strict=True):
            assert one.probability == pytest.approx(other.probability, rel=1e-3)


def test_a_prefix_is_as_it_was_after_its_branches_have_grown() -> None:
    loaded = loaded_tiny("llava_onevision")
    prompt = prompt_of(loaded, "image")
    prefix = open_prefix(loaded, prompt, {})
    assert prefix is not None
    before = [(one.keys, one.keys.clone()) for one in prefix.cache.layers]
    first = drop_scores(loaded, [prompt], prefix, {})
    assert all(one.keys is held for one, (held, _) in zip(prefix.cache.layers, before, strict=True))
    assert all(torch.equal(held, copy) for held, copy in before)
    assert drop_scores(loaded, [prompt], prefix, {}) == first


# -- token information ----------------------------------------------------------------------------


def test_windows_are_2_by_2_patches_of_one_frame() -> None:
    grid = join([box(2, 3, 4), single(NEWLINE, frame=1, row=2, col=4)])  # 3 rows: half windows
    count = len(grid)
    zeros = torch.zeros(count, dtype=torch.long)
    found = windows(Layout(torch.arange(count) + 5, zeros, zeros, grid))
    assert [one.tolist() for one in found] == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9], [10, 11],
        [12, 13, 16, 17], [14, 15, 18, 19], [20, 21], [22, 23],
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [("llava_onevision", "video"), ("qwen2_5_vl", "image")])
def test_a_windows_information_is_that_of_masking_all_else(name: str, kind: str) -> None:
    loaded = loaded_tiny(name)
    prompt = prompt_of(loaded, kind)
    prefix = open_prefix(loaded, prompt, {})
    assert prefix is not None
    scores = drop_scores(loaded, [prompt], prefix, {})[0]
    told = token_information(loaded, prompt, prefix, scores)
    cells = windows(prefix.layout)
    assert told.shape == (tiny.LAYERS, len(cells))
    for layer, number in ((0, 1), (2, len(cells) - 1), (5, 0)):
        window = prefix.layout.columns[cells[number]]
        seen = first_token(loaded.model, prompt, prefix.layout.columns, window, layer)
        none = first_token(loaded.model, prompt, prefix.layout.columns, window[:0], layer)
        assert float(told[layer, number]) == pytest.approx(seen - none, abs=1e-6)


def first_token(
    model: PreTrainedModel,
    prompt: PromptWithAnswer,
    visual: torch.Tensor,
    kept: torch.Tensor,
    layer: int,
) -> float:
    """Its probability when from `layer` on the text sees only `kept` of the visual columns."""
    length = prompt.tensors["input_ids"].shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for row in range(int(visual[-1]) + 1, length):
        seen[row, visual] = torch.isin(visual, kept)
    bias = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)

    def mask(module, args, kwargs):  # type: ignore[no-untyped-def]
        return args, {**kwargs, "attention_mask": bias}

    layers = model.get_decoder().layers[layer:]
    handles = [one.register_forward_pre_hook(mask, with_kwargs=True) for one in layers]
    with torch.no_grad():
        logits = model(**prompt.tensors, use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return float(logits.softmax(0)[prompt.answer[0]])


# -- the bound ------------------------------------------------------------------------------------


def test_the_change_is_that_of_the_sums() -> None:
    found = relative_change([0.5, 0.25], np.array([[0.5, 0.2], [0.25, 0.4]]), ["a", "b"])
    assert found.mean == pytest.approx((0.0, -0.2))
    assert found.lower[0] == 0  # nothing changed in any file
    assert found.lower[1] < -0.2
    assert (found.questions, found.files) == (2, 2)


def test_the_bound_counts_files_and_not_questions() -> None:
    rng = np.random.default_rng(0)
    files = [str(i) for i in range(40) for _ in range(10)]
    noise = np.repeat(rng.normal(0, 0.2, 40), 10)  # ten alike questions a file
    after = (0.5 + noise)[:, None]
    by_file = relative_change([0.5] * 400, after, files)
    by_question = relative_change([0.5] * 400, after, [str(i) for i in range(400)])
    gap = [one.mean[0] - one.lower[0] for one in (by_file, by_question)]
    # 1.645 standard errors of 40 files, of 0.2 / 0.5 each
    assert gap[0] == pytest.approx(1.645 * 0.4 / math.sqrt(40), rel=0.2)
    assert gap[0] / gap[1] == pytest.approx(math.sqrt(10), rel=0.15)


def test_the_bound_is_below_the_truth_in_95_of_100_trials() -> None:
    rng = np.random.default_rng(1)
    below = 0
    for trial in range(300):
        after = (0.5 + rng.normal(0, 0.1, 60))[:, None]
        below += relative_change([0.5] * 60, after, [str(i) for i in range(60)], trial).lower[0] < 0
    assert 275 <= below <= 297


def test_one_file_has_no_bound() -> None:
    assert relative_change([0.5, 0.5], np.array([[0.5], [0.5]]), ["a", "a"]).lower == (-1.0,)


def change(mean: Sequence[float], lower: Sequence[float], files: int = 50) -> Change:
    return Change(tuple(mean), tuple(lower), 2 * files, files)


def test_the_horizon_is_where_no_later_layer_is_below_one_per_cent() -> None:
    lower = [-0.5, -0.004, -0.02, -0.01, 0.0]  # layer 1 alone is not enough: 2 fails
    found = find_horizon(change([-0.4, 0.0, -0.015, 0.0, 0.0], lower), [0.0] * 5)
    assert found.layer == 3
    assert found.needed is None  # layer 2 loses more than 1 %: no number would help
    assert found.reason() == ""


def test_what_lies_open_before_the_horizon_is_said() -> None:
    found = find_horizon(change([-0.4, 0.0, 0.0], [-0.5, -0.02, 0.0]), [0.0] * 3)
    assert (found.layer, found.needed) == (2, 400)  # twice the precision: 4 x 100
    assert found.reason() == "layer 1 is left open; about 400 questions would tell"


def test_a_horizon_that_can_not_be_told_says_how_many_would() -> None:
    found = find_horizon(change([-0.4, -0.005], [-0.5, -0.02]), [0.0] * 2)
    # From -0.5 %, only 0.5 % are left to -1 %: three times the precision.
    assert (found.layer, found.needed) == (None, 900)
    assert found.reason() == "100 questions can't tell; about 900 questions would tell"


def test_tokens_that_are_needed_to_the_end_are_no_matter_of_number() -> None:
    found = find_horizon(change([-0.4, -0.03], [-0.5, -0.04]), [0.0] * 2)
    assert (found.layer, found.needed) == (None, None)
    assert found.reason() == "dropping them at the last layer alone loses 3.0%"


def test_few_files_tell_no_horizon_however_equal_their_answers() -> None:
    found = find_horizon(change([0.0, 0.0], [0.0, 0.0], files=4), [1.0, 1.0])
    assert (found.layer, found.needed) == (None, 20)
    assert found.reason() == "4 files can't tell, 10 are the fewest; about 20 questions would tell"


def test_a_gain_counts_as_no_change_for_how_many_would_tell() -> None:
    assert questions_needed(change([0.05], [-0.02]), 0) == 4900


# -- the search -----------------------------------------------------------------------------------

KNOWN = Calibration(2, 10, None, {}, "file")


def test_schedules_split_a_budget_between_tokens_and_layers() -> None:
    found = list_schedules(0.25, 16, KNOWN, ("entropy", "uniform"))
    assert [one.name for one in found] == [
        "entropy at ecl",
        "entropy at ecl, random at horizon",
        "entropy at ecl, none from layer 7",
        "entropy at ecl, none from horizon (10)",
        "entropy at ecl, none from layer 13",
        "uniform at input",
        "uniform at input, random at horizon",
        "uniform at input, none from layer 7",
        "uniform at input, none from horizon (10)",
        "uniform at input, none from layer 13",
        "all, none from layer 4",
    ]
    found += list_schedules(0.25, 16, KNOWN, ("spread", "pyramiddrop"))
    assert [one.name for one in found[11:]] == [
        "spread, its own schedule",
        "spread at input",
        "spread at input, random at horizon",
        "spread at input, none from layer 7",
        "spread at input, none from horizon (10)",
        "spread at input, none from layer 13",
        "pyramiddrop, its own schedule",
        "all, none from layer 4",
    ]
    for one in found:
        load_preset({"keep": 0.25, "stages": list(one.stages)})


def test_schedules_cut_where_the_model_can_be_cut() -> None:
    """Not before layers 4, 7, 10 and 13; entropy reads what every fourth layer attends to."""
    forbidden = (4, 7, 10, 13)

    def layers_to_cut(stage: Mapping[str, object]) -> list[int]:
        layers = [layer for layer in range(16) if layer not in forbidden]
        return [n for n in layers if n % 4 == 1] if stage["method"] == "entropy" else layers

    found = list_schedules(0.25, 16, KNOWN, ("entropy", "uniform"), None, layers_to_cut)
    assert [one.name for one in found] == [
        "entropy at ecl",
        "entropy at ecl, random at horizon",
        "entropy at ecl, none from layer 6",
        "entropy at ecl, none from layer 9",
        "entropy at ecl, none from horizon (11)",
        "entropy at ecl, none from layer 12",
        "uniform at input",
        "uniform at input, random at horizon",
        "uniform at input, none from layer 6",
        "uniform at input, none from layer 9",
        "uniform at input, none from horizon (11)",
        "uniform at input, none from layer 12",
        "all, none from layer 3",
    ]


def test_without_a_right_answer_agreement_is_what_counts() -> None:
    told = Score(probability=0.25, first=0.5, greedy=True)
    assert quality(Asked(Path("a"), "what?", "red"), told) == 0.25
    assert quality(Asked(Path("a"), "what?"), told) == 1.0
    assert quality(Asked(Path("a"), "what?"), replace(told, greedy=False)) == 0.0


def test_a_horizon_that_was_not_found_is_in_no_schedule() -> None:
    found = list_schedules(0.25, 16, replace(KNOWN, horizon=16), ("entropy",))
    assert not any("horizon" in one.name for one in found)


@pytest.mark.parametrize("method", ["vtw", "predictable", "downsample"])
def test_a_method_that_chooses_nothing_is_no_selector(method: str) -> None:
    with pytest.raises(PresetError, match=f"method {method} chooses no tokens") as caught:
        list_schedules(0.25, 16, KNOWN, (method,))
    assert method not in str(caught.value.hint)


@pytest.fixture
def asked(tmp_path: Path) -> list[Asked]:
    """Two questions on each of three pictures, one of them about text."""
    found = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (90, 60), (80 * number, 30, 200)).save(path)
        found += [Asked(path, "what?", "red"), Asked(path, "which number?", kind="ocr")]
    return found


def tried_on(
    loaded: Loaded,
    asked: list[Asked],
    schedules: list[CandidateSchedule],
    keep: float,
    known: Calibration,
) -> tuple[TriedSchedule, ...]:
    """What schedules do on questions about one file."""
    runner = FileRunner(loaded, asked, AskSettings(), right_answers=True)
    variants = [schedule.variant(keep) for schedule in schedules]
    records = [
        score_variant(runner, number, number, variant, known)
        for number in range(len(asked))
        for variant in variants
    ]
    before = [
        quality(one, drop_scores(loaded, [prompt], None, {})[0][-1])
        for one, prompt in zip(asked, runner.full.prompts, strict=True)
    ]
    return rank_schedules(schedules, variants, asked, records, before)


def test_every_schedule_meets_its_budget_and_the_best_comes_first(
    checkpoints, asked: list[Asked]
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    known = Calibration(1, 4, None, {}, "file")
    schedules = list_schedules(0.5, tiny.LAYERS, known)
    table = tried_on(loaded, asked[:1], schedules, 0.5, known)
    assert len(table) == len(schedules)
    prompt = FileRunner(loaded, asked[:1], AskSettings(), right_answers=True).full.prompts[0]
    visual = 4 / len(open_prefix(loaded, prompt, {}).layout)  # type: ignore[union-attr]
    assert all(0.5 - visual < one.keep_mean <= 0.5 + 1e-9 for one in table)
    means = [one.change.mean[0] for one in table if one.change]
    assert means == sorted(means, reverse=True)
    assert not any(one.apart for one in table)  # one file can't tell


@pytest.mark.parametrize("files", [12, 5])
def test_what_keeps_no_answer_is_told_apart_from_what_keeps_some(files: int) -> None:
    names = [str(number) for number in range(files)]
    none, all_ = np.zeros((files, 1)), np.ones((files, 1))
    gap = relative_gap([1.0] * files, all_, none, names)
    assert gap == (Gap(1.0, 1.0, 1.0) if files >= 10 else Gap(1.0))
    for same in (none, all_):
        gap = relative_gap([1.0] * files, same, same, names)
        assert gap == (Gap(0.0, 0.0, 0.0) if files >= 10 else Gap(0.0))


def test_a_gap_has_the_interval_that_drawing_files_gives() -> None:
    rng = np.random.default_rng(0)
    names = [str(number // 2) for number in range(60)]
    before, best = np.full(60, 0.8), np.full((60, 1), 0.7)
    gains = np.repeat(rng.normal(0.1, 0.2, 30), 2)  # the two questions about a file agree
    gap = relative_gap(before.tolist(), best, best - gains[:, None], names)
    assert gap.mean == pytest.approx(gains.mean() / 0.8)
    assert gap.low is not None
    assert gap.high is not None
    # 30 means of independent files: 1.96 standard errors to each side.
    half = 1.96 * gains.std(ddof=1) / np.sqrt(30) / 0.8
    assert gap.mean - gap.low == pytest.approx(half, rel=0.15)
    assert gap.high - gap.mean == pytest.approx(half, rel=0.15)


@pytest.mark.parametrize("files", [2, 9, 10])
def test_of_few_files_it_is_said_that_they_are_too_few_and_not_that_schedules_are_alike(
    files: int,
) -> None:
    few = files < 10
    gaps = [Gap(0.0), Gap(0.6)] if few else [Gap(0.0, 0.0, 0.0), Gap(0.6, 0.4, 0.8)]
    tried = tuple(
        TriedSchedule(
            CandidateSchedule(name, ()), 0.3, Change((mean,), (-0.9,), 2 * files, files), gap, apart
        )
        for name, mean, gap, apart in zip("ab", (-0.1, -0.7), gaps, (False, not few), strict=True)
    )
    found = measured(tried=tried, keep=0.3)
    told = found.proposal()
    assert "can't be told apart" not in told
    assert (f"{files} files can't tell schedules apart: 10 are the fewest" in told) is few
    assert ("lower 95 % bound" in told) is not few
    assert bool(found.to_dict()["too_few"]) is few


def test_a_schedule_that_can_not_meet_the_budget_comes_last_with_the_reason(
    checkpoints, asked: list[Asked]
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    known = Calibration(1, 5, None, {}, "file")
    others = list_schedules(0.3, tiny.LAYERS, known, ("random",))
    stuck = CandidateSchedule("stuck", ({"at": 4, "method": "random"},))
    table = tried_on(loaded, asked[:1], [stuck, *others], 0.3, known)
    assert table[-1].schedule.name == "stuck"
    assert "keep 0.3 can't be reached" in table[-1].unreachable


# -- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_onevision", "gemma3"])
def test_a_calibration_is_written_as_it_is_read(
    name: str, checkpoints, asked: list[Asked], tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    shown: list[tuple[str, int, int]] = []
    asking = AskSettings(generation=Generation(max_new_tokens=2))
    settings = CalibrationSettings(asking, keep=0.5, windows=1)
    found = calibrate(loaded, asked, "mine.jsonl", settings, lambda *one: shown.append(one))
    assert ("calibrating", 2, 3) in shown
    assert (found.questions, found.labelled, found.inputs) == (6, 3, 3)
    assert {one.change.questions for one in found.horizons.values()} == {3}
    assert found.quality() == "probability of 3 right answers, agreement on 3 others"
    assert (found.information is None) == (name == "gemma3")
    assert any("3 inputs; 50 or more are wanted" in one for one in found.warnings)
    assert any("3 of 6 questions have a right answer" in one for one in found.warnings)
    path = tmp_path / "c.yaml"
    path.write_text(found.calibration_text(), encoding="utf-8")
    config = loaded.model.get_decoder().config
    read = read_calibration(
        path, tiny.LAYERS, model_type=loaded.model.config.model_type, hidden=config.hidden_size
    )
    assert read == found.calibration()
    assert read.horizon == read.horizon_text == tiny.LAYERS  # three files can't tell
    about = f"measured: vtprune {__version__}, {found.day}, "
    assert all(source.startswith(about) for source in read.sources.values())
    assert "3 questions on 3 files" in read.sources["horizon"]
    assert "not found: 3 files can't tell" in read.sources["horizon_text"]
    best = tmp_path / "best.yaml"
    best.write_text(found.preset_text(), encoding="utf-8")
    preset = load_preset(best)
    assert preset.keep == 0.5
    assert preset.description.startswith("best of ")


def test_every_file_is_encoded_once_to_measure_and_once_to_try_schedules(
    checkpoints, asked: list[Asked]
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    calls: list[int] = []
    tower = loaded.model.model.vision_tower
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    labelled = [replace(one, answer="red") for one in asked]
    calibrate(loaded, labelled)
    assert len(calls) == 3
    calibrate(loaded, labelled, settings=CalibrationSettings(keep=0.5, methods=("random",)))
    assert len(calls) == 3 + 6
    handle.remove()


def test_every_class_is_calibrated_and_its_schedules_run(kind: str, tmp_path: Path) -> None:
    """With --zoo on a tiny checkpoint of all that are asked; what follows a shared prefix too."""
    if kind not in zoo.MODEL_TYPES or zoo.is_broken(kind):
        pytest.skip("this transformers has no such class, or can't run it")
    needs = family_table.read_table()[kind].torchvision
    if needs.startswith("yes"):
        pytest.importorskip("torchvision")
    if "timm" in needs:
        pytest.importorskip("timm")
    build = tiny.build if kind in tiny.FAMILIES else tiny_processor.build
    loaded = load(str(build(kind, tmp_path / "checkpoint")))
    about = [Asked(save_noise(tmp_path / "noise.png", 90, 150), "what is it?", "a red ball")]
    asking = AskSettings(generation=Generation(max_new_tokens=3))
    settings = CalibrationSettings(asking, keep=0.5, methods=("entropy", "random"))
    found = calibrate(loaded, about, settings=settings)
    assert len(found.tried) >= 3
    assert [(one.schedule.name, one.unreachable) for one in found.tried if not one.change] == []
    (prompt,) = FileRunner(loaded, about, asking, right_answers=True).full.prompts
    if (prefix := open_prefix(loaded, prompt, {})) is not None:
        fast, slow = (drop_scores(loaded, [prompt], one, {})[0] for one in (prefix, None))
        for here, there in zip(fast, slow, strict=True):
            assert here.probability == pytest.approx(there.probability, rel=1e-3)


def measured(**values: object) -> CalibrationResult:
    """A calibration of 4 layers."""
    lower = {"general": [-0.5, -0.02, -0.005, 0.0], "text-heavy": [-0.5, -0.4, -0.3, -0.005]}
    horizons = {
        group: find_horizon(change([-0.4, 0.0, 0.0, 0.0], ends), [0.1, 0.9, 1.0, 1.0])
        for group, ends in lower.items()
    }
    collapse = find_collapse(torch.tensor([[0.9, 0.5, 0.4, 0.4]]))
    model = {"name": "m", "model_type": "llava", "layers": 4, "hidden_size": 64}
    plain = {"model": model, "source": "s", "questions": 200, "labelled": 200, "inputs": 50,
             "collapse": collapse, "horizons": horizons, "day": "2026-01-01",
             "sample": CalibrationSample("abc123", {"vtprune": "0.1"}, {"image": 30, "video": 20},
                              ("colour", "ocr"), 3)}  # fmt: skip
    return CalibrationResult(**{**plain, **values})  # type: ignore[arg-type]


def test_draws_of_inputs_say_how_sure_the_collapse_layer_is() -> None:
    """Three inputs of four fall to layer 1, one much more to layer 2: it wins where drawn often."""
    curves = torch.tensor([[0.9, 0.6, 0.6, 0.6, 0.6]] * 3 + [[0.9, 0.9, 0.2, 0.2, 0.2]])
    found = find_collapse(curves)
    assert (found.layer, list(found.draws)) == (1, [1, 2])
    # layer 2 wins with 2 or more of 4 draws: 0.7 k > 0.3 (4 - k), of chance 1/4 each
    chance = 1 - 0.75**4 - 4 * 0.25 * 0.75**3
    assert found.draws[2] == pytest.approx(chance, abs=0.03)
    assert (
        found.certainty() == f"in {found.draws[1]:.0%} of draws (layer 2 in {found.draws[2]:.0%})"
    )
    assert find_collapse(curves, seed=1).draws != found.draws


def test_draws_of_files_say_between_which_layers_a_horizon_is() -> None:
    drawn = np.full((1000, 4), -0.5)
    drawn[:, 3] = 0.0  # 3 in all
    drawn[:30, 3] = -0.02  # but for 3 %, in which there is none
    drawn[30:500, 1:] = 0.0  # and 1 in nearly half
    assert horizon_interval(drawn) == (1, 4)
    found = find_horizon(change([-0.5] * 4, [-0.6] * 4), [0.0] * 4, drawn)
    assert found.certainty() == "layer 1 to none in 95 % of draws"
    assert horizon_interval(drawn[500:]) == (3, 3)
    assert find_horizon(change([0.0] * 4, [0.0] * 4, files=9), [1.0] * 4, drawn).certainty() == ""


def test_the_interval_holds_the_horizon_of_the_files_themselves() -> None:
    """Answers that the last layer alone needs, a little noise in the layers before it."""
    rng = np.random.default_rng(0)
    after = np.clip(0.9 + rng.normal(0, 0.05, (64, 3)) * [1, 0.2, 0.02], 0, 1)
    drawn = drawn_changes([0.9] * 64, after, [str(number) for number in range(64)])
    assert drawn.shape == (DRAWS, 3)
    assert drawn.mean(0) == pytest.approx(after.mean(0) / 0.9 - 1, abs=2e-3)
    low, high = horizon_interval(drawn)
    assert low == 0
    assert high == 1


def test_a_contribution_is_an_entry_of_the_packaged_calibrations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = measured(source="/home/me/secret.jsonl", media=["/home/me/a.png"])
    (entry,) = yaml.safe_load(found.contribution())
    assert (entry["ecl"], entry["horizon"], entry["horizon_text"]) == (1, 2, 3)
    assert entry["measured"] == {
        "model": "m", "revision": "abc123", "vtprune": "0.1", "day": "2026-01-01",
        "files": {"image": 30, "video": 20}, "questions": 200, "right_answers": 200,
        "kinds": ["colour", "ocr"], "seed": 3,
    }  # fmt: skip
    assert "secret" not in found.contribution()
    assert "/" not in found.contribution()
    packaged = {**calibrations.packaged_models(), "calibrations": [entry]}
    monkeypatch.setattr(calibrations, "packaged_models", lambda: packaged)
    known, notes = calibrations.find_calibration("llava", 4, 64)
    assert (known.ecl, known.horizon, known.origin, notes) == (1, 2, "packaged", [])
    assert known.sources["ecl"].startswith("contributed (m, 50 files (30 image, 20 video); in 100%")


def test_a_contribution_leaves_out_what_was_not_found_and_a_checkpoints_path() -> None:
    flat = find_collapse(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    sample = replace(measured().sample, revision=None)
    model = {"name": "/home/me/model", "model_type": "llava", "layers": 4, "hidden_size": 64}
    found = measured(collapse=flat, sample=sample, model=model)
    (entry,) = yaml.safe_load(found.contribution())
    assert "ecl" not in entry
    assert "/home" not in found.contribution()
    assert entry["measured"]["model"] == "a checkpoint of one's own"
    none = {"general": find_horizon(change([-0.4, -0.03], [-0.5, -0.04]), [0.0] * 2)}
    with pytest.raises(VtpruneError, match="nothing to contribute"):
        measured(collapse=flat, horizons=none).contribution()


def test_each_group_has_its_horizon() -> None:
    known = measured().calibration()
    assert (known.ecl, known.horizon, known.horizon_text) == (1, 2, 3)
    assert known.sources["horizon"].endswith(
        "m, s, 100 questions on 50 files, probability of the right answers"
    )
    assert known.sources["ecl"].endswith("m, s, 50 inputs, 100% agree, in 100% of draws")


def test_a_group_without_questions_is_left_out_or_stands_in() -> None:
    horizons = measured().horizons
    general = measured(horizons={"general": horizons["general"]}).calibration()
    assert (general.horizon, general.horizon_text) == (2, None)
    assert "horizon_text" not in general.sources
    text = measured(horizons={"text-heavy": horizons["text-heavy"]}).calibration()
    assert (text.horizon, text.horizon_text) == (3, 3)
    assert "text-heavy ones" in text.sources["horizon"]


def test_the_picture_has_a_panel_for_each_curve() -> None:
    two = Image.open(io.BytesIO(plot(measured())))
    told = TokenInformation((0.1, 0.0, 0.0, 0.0), (0.5, 0.1, 0.0, 0.0), 3)
    three = Image.open(io.BytesIO(plot(measured(information=told))))
    assert (two.format, three.height) == ("PNG", two.height * 3 // 2)


def test_the_picture_shows_both_horizons_and_the_bound() -> None:
    axes = Figure().subplots()
    draw_change(axes, measured())
    labels = axes.get_legend_handles_labels()[1]
    assert [one for one in labels if "horizon" in one] == ["horizon: layer 2", "horizon: layer 3"]
    assert axes.get_lines()[0].get_ydata() == pytest.approx([-0.4, 0.0, 0.0, 0.0])
    assert axes.get_ylim()[0] == -0.3  # what lies below is cut off


def test_a_method_that_is_not_known_is_told_before_anything_runs(
    checkpoints, asked: list[Asked]
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    with pytest.raises(PresetError, match="unknown method 'entropie'"):
        calibrate(
            loaded,
            asked,
            settings=CalibrationSettings(keep=0.5, methods=("entropie",)),
            on_progress=lambda *_: pytest.fail("it began"),
        )


def test_running_out_of_memory_names_the_file(
    checkpoints, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("vtprune.evaluation.calibration.calibrate.open_prefix", full)
    loaded = load(str(checkpoints("llava_onevision")))
    with pytest.raises(ModelError, match=r"out of memory on cpu with .*0\.png"):
        calibrate(
            loaded,
            asked,
            settings=CalibrationSettings(AskSettings(generation=Generation(max_new_tokens=1))),
        )
