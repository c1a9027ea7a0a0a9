"""`vtprune check`'s own working: it passes what is right, and fails whatever is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from conftest import save_noise, shared_model
from test_cli_check import MODEL, VERSIONS
from torch import nn
from transformers import PreTrainedConfig

from vtprune.engine import decoder, prefill, sequence
from vtprune.errors import ModelError, PresetError
from vtprune.evaluation.checking import check as checking
from vtprune.evaluation.checking import oracle, result
from vtprune.evaluation.checking.check import check
from vtprune.evaluation.checking.cuts import CheckedCut, CheckOptions, choose_cuts
from vtprune.evaluation.checking.inputs import (
    draw_clip,
    draw_media,
    draw_picture,
    gather_files,
    make_batches,
)
from vtprune.evaluation.checking.oracle import attention_kernel, kernel_of, other_kernel
from vtprune.evaluation.checking.result import CheckedCase, CheckResult
from vtprune.media import Limits, open_source
from vtprune.models import loading
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded
from vtprune.tokens.layout import MODALITIES

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm", "molmo2")
EIGHT = [name for name in FAMILIES if name in tiny.MODELS]


@pytest.fixture(scope="module")
def loaded(checkpoints) -> Loaded:  # type: ignore[no-untyped-def]
    return loading.load(str(checkpoints("llava_onevision")), device="cpu")


def run(
    loaded: Loaded, cuts: int | None = None, kinds: Sequence[str] = MODALITIES, **wanted: object
) -> CheckResult:
    """A check of the first few of the usual cuts."""
    media = draw_media(loaded, Sampling(), kinds)
    num_layers = len(loaded.model.get_decoder().layers)
    return check(loaded, media, choose_cuts(CheckOptions(**wanted), num_layers, kinds)[:cuts])  # type: ignore[arg-type]


def outcomes(checked: CheckResult, **where: str) -> set[str]:
    """The outcomes of the cells with these values."""
    return {
        cell.outcome
        for cell in checked.cases
        if all(getattr(cell, name) == value for name, value in where.items())
    }


# -- what is right --------------------------------------------------------------------------------


def test_every_case_of_a_model_that_is_right_is_equal(loaded: Loaded) -> None:
    checked = run(loaded)
    assert checked.verdict == "equal", checked.claim()
    places = [cell.place for cell in checked.cases]
    assert len(set(places)) == len(places) == 2 * 5 * 2 * 2
    for cell in checked.cases:
        assert cell.outcome == "equal", cell
        assert len(cell.differences) == checked.steps + 1 == 9
        assert 0 < cell.difference < 1e-5 < cell.limit < 0.05 < cell.effect  # type: ignore[operator]
        assert cell.same_tokens == cell.decided > 0
        assert len(cell.kept) == (1 if cell.prompts == "one" else 2)
        assert all(kept < whole for kept, whole in zip(cell.kept, cell.visual, strict=True))
    layers = {cell.cut: cell.layers for cell in checked.cases}
    assert layers == {
        "input": (0,),
        "layer 2": (2,),
        "layers 2, 3": (2, 3),
        "pixels": (0,),
        "decoding": (),
    }
    core = {(cell.cut, cell.prompts, cell.cache) for cell in checked.cases if cell.core}
    assert core == {("input", "one", "dynamic"), ("layer 2", "one", "dynamic")}
    assert {one.source for one in checked.noise} == {"sdpa, eager"}


@pytest.mark.parametrize("name", EIGHT)
def test_every_family_can_be_checked(checkpoints, name: str) -> None:  # type: ignore[no-untyped-def]
    loaded = loading.load(str(checkpoints(name)), device="cpu")
    checked = run(loaded, cuts=2, kinds=loaded.family.modalities[-1:])
    assert checked.verdict == "equal", checked.claim()
    assert outcomes(checked) == {"equal"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_held_against_its_own_noise(checkpoints, dtype: str) -> None:  # type: ignore[no-untyped-def]
    path = str(checkpoints("llava_onevision"))
    half = loading.load(path, device="cpu", dtype=dtype)
    checked = run(half, cuts=1, kinds=["image"])
    assert checked.verdict == "equal", checked.claim()
    for one in checked.noise:
        assert one.measured > 100 * torch.finfo(torch.float32).eps
        assert one.limit == result.FACTORS[dtype] * max(one.measured, one.step)
    assert max(cell.difference for cell in checked.cases) > 1e-4  # type: ignore[type-var]


def test_files_are_shown_in_one_prompt(loaded: Loaded, tmp_path: Path) -> None:
    paths = [save_noise(tmp_path / "a.png", 60, 90), save_noise(tmp_path / "b.png", 90, 60)]
    sources = [open_source(path, Limits()) for path in paths]
    media = gather_files(loaded, sources, Sampling(), Limits())
    checked = check(loaded, media, choose_cuts(CheckOptions(), 6, ["image"])[:2])
    assert checked.verdict == "equal", checked.claim()
    (shown,) = checked.inputs
    assert shown.media.files == [str(path) for path in paths]
    assert {cell.input for cell in checked.cases} == {"files"}


# -- what is wrong --------------------------------------------------------------------------------


def test_positions_that_are_off_by_one_are_noticed(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sequence.SequenceState.decoder_arguments

    def wrong(self, given, embeds):  # type: ignore[no-untyped-def]
        made = right(self, given, embeds)
        if made is given:  # no cut at the input
            return made
        positions = made["position_ids"].clone()
        positions[..., -1] += 1
        return {**made, "position_ids": positions}

    monkeypatch.setattr(sequence.SequenceState, "decoder_arguments", wrong)
    checked = run(loaded, cuts=2, kinds=["image"])
    assert checked.verdict == "different"
    assert outcomes(checked, cut="input") == {"DIFFERS"}
    assert outcomes(checked, cut="layer 2") == {"equal"}
    assert "pruned does not equal masked in 4 of 8 cases" in checked.claim()
    assert all("from the prompt on, by up to" in one.reason for one in checked.cases if one.reason)


def test_one_kept_token_that_is_another_than_the_trace_says_is_noticed(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = prefill.StageRecord

    def wrong(*args, kept, **named):  # type: ignore[no-untyped-def]
        rows = [[*row[:-1], min(set(range(row[0], row[-1])) - set(row))] for row in kept]
        return right(*args, kept=[sorted(row) for row in rows], **named)

    monkeypatch.setattr(prefill, "StageRecord", wrong)
    checked = run(loaded, cuts=2, kinds=["video"])
    assert outcomes(checked) == {"DIFFERS"}
    assert not checked.proven


def test_masks_of_a_static_cache_that_are_not_made_anew_are_noticed(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder.Continuation, "needs_masks", lambda self: False)
    checked = run(loaded, cuts=2, kinds=["image"])
    assert outcomes(checked, prompts="one", cache="dynamic") == {"equal"}
    assert outcomes(checked, cut="layer 2", cache="static") == {"DIFFERS"}
    cell = next(one for one in checked.cases if one.outcome == "DIFFERS")
    assert cell.reason.startswith("from decoded token 1 on")
    assert checked.verdict == "different"


def test_text_that_is_dropped_is_noticed(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped and masked alike, which alone would be equal."""
    right = oracle.dropped

    def wrong(trace):  # type: ignore[no-untyped-def]
        return [(layer, [[0, *row] for row in rows]) for layer, rows in right(trace)]

    monkeypatch.setattr(oracle, "dropped", wrong)
    checked = run(loaded, cuts=1, kinds=["image"])
    assert {cell.reason for cell in checked.cases} == {
        f"{rows} tokens that are no visual ones were dropped" for rows in (1, 2)
    }
    assert checked.verdict == "different"


def test_a_pruned_run_that_fails_is_a_difference(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("tensors\nof two sizes")

    monkeypatch.setattr(prefill.Prefill, "cut", fail)
    checked = run(loaded, cuts=1, kinds=["image"])
    assert checked.verdict == "different"
    assert {one.reason for one in checked.cases} == {
        "the pruned model fails: RuntimeError: tensors of two sizes"
    }


def test_a_token_that_the_noise_can_t_flip_is_a_difference() -> None:
    masked = torch.tensor([[[5.0, 0.0, 0.0], [1.0, 0.9, 0.0]]])
    pruned = torch.tensor([[[0.0, 5.0, 0.0], [0.9, 1.0, 0.0]]])
    assert checking.compare_tokens(pruned, masked, margin=0.5) == (1, 0)
    assert checking.compare_tokens(masked, masked, margin=0.5) == (1, 1)


def test_what_is_no_number_is_infinitely_far() -> None:
    ours = torch.tensor([[[1.0, -torch.inf], [2.0, torch.nan]]])
    theirs = torch.tensor([[[1.5, -torch.inf], [2.0, 0.0]]])
    assert checking.largest(ours, theirs).tolist() == [0.5, torch.inf]


# -- what can't be compared -----------------------------------------------------------------------


def test_a_refused_cache_is_a_row_with_the_reason(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = checking.run_pruned

    def refuse(reference, cut, cache, encoded):  # type: ignore[no-untyped-def]
        if cache == "static":
            raise ModelError("this model takes no static cache", "use another")
        return right(reference, cut, cache, encoded)

    monkeypatch.setattr(checking, "run_pruned", refuse)
    checked = run(loaded, cuts=2, kinds=["image"])
    assert outcomes(checked, cache="static") == {"refused"}
    assert outcomes(checked, cache="dynamic") == {"equal"}
    assert checked.proven


def test_what_the_unpruned_model_can_t_do_either_is_refused(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = oracle.generate

    def fail(*args: object, **named: object) -> object:
        if named.get("cache_implementation") == "static":
            raise NotImplementedError("no such cache")
        return right(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(oracle, "generate", fail)
    checked = run(loaded, cuts=2, kinds=["image"])
    assert {one.reason for one in checked.cases if one.cache == "static"} == {
        "the unpruned model fails with a static cache too: NotImplementedError: no such cache"
    }
    assert checked.proven


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"method": "pool"}, "dropped tokens were merged into kept ones, which no mask can do"),
        ({"method": "random", "at": "9"}, "at: 9: this model has 6 decoder layers, 0 to 5"),
    ],
)
def test_where_all_that_matters_is_refused_nothing_is_proven(
    loaded: Loaded, wanted: dict[str, str], reason: str
) -> None:
    checked = run(loaded, cuts=2, kinds=["image"], **wanted)
    assert outcomes(checked) == {"refused"}
    assert checked.verdict == "not proven"
    assert reason in checked.claim()
    assert checked.failure()[0].startswith("nothing is proven")


def test_a_cut_at_pixels_that_drops_nothing_is_no_failure(checkpoints) -> None:  # type: ignore[no-untyped-def]
    loaded = loading.load(str(checkpoints("llava")), device="cpu")
    checked = run(loaded, kinds=["image"])
    assert outcomes(checked, cut="pixels") == {"no cut"}
    assert checked.proven


def test_a_cut_that_changes_less_than_the_limit_proves_nothing(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(result.FACTORS, "float32", 1e8)
    checked = run(loaded, cuts=1, kinds=["image"])
    assert outcomes(checked) == {"too small"}
    assert checked.verdict == "not proven"
    assert "--dtype float32" in checked.failure()[1]


def test_a_reference_that_does_not_hold_for_a_model_is_no_difference(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its layers read their mask in another way."""
    right = oracle._Blocking.add_mask

    def wrong(self, mask, hidden, total):  # type: ignore[no-untyped-def]
        return right(self, mask, hidden, total) + torch.linspace(0, 1, total)

    monkeypatch.setattr(oracle._Blocking, "add_mask", wrong)
    checked = run(loaded, cuts=1, kinds=["image"])
    assert outcomes(checked) == {"refused"}
    assert "a loop over its layers that leaves nothing out, differs from itself" in checked.claim()


def test_without_a_check_nothing_is_proven() -> None:
    checked = CheckResult(MODEL, VERSIONS, [], 8, [], [], 0.0)
    assert (checked.verdict, checked.claim()) == ("not proven", "nothing was compared")
    cell = CheckedCase(
        "clip", "one", "input", "dynamic", True, "equal", differences=(1e-6,), limit=1e-5
    )
    assert replace(checked, cases=[cell]).proven
    assert not replace(checked, cases=[replace(cell, core=False)]).proven


# -- the noise ------------------------------------------------------------------------------------


@contextmanager
def kernels(model: nn.Module, decoder: str, tower: str) -> Iterator[None]:
    """A model whose parts have kernels of their own."""
    model.get_decoder().set_attn_implementation(decoder)  # type: ignore[operator]
    model.model.vision_tower.set_attn_implementation(tower)  # type: ignore[union-attr, operator]
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]


def stop(kernel: str) -> None:
    assert kernel == "eager"
    raise RuntimeError("stop here")


def test_every_part_has_its_own_kernel_again_also_after_an_exception() -> None:
    model = shared_model("llava_onevision")
    with kernels(model, "sdpa", "eager"):
        with pytest.raises(RuntimeError, match="stop here"), attention_kernel(model, "eager"):
            stop(kernel_of(model))
        assert kernel_of(model) == "sdpa"
        assert model.model.vision_tower.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="'none' does not run here"), attention_kernel(
        model, "none"
    ):  # fmt: skip
        pass
    assert (kernel_of(model), other_kernel(model)) == ("sdpa", "eager")


def test_a_model_with_one_kernel_is_held_against_another_batch_size(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, name: str) -> None:
        if name == "eager":
            raise ValueError("no such kernel")

    monkeypatch.setattr(type(loaded.model), "set_attn_implementation", refuse)
    checked = run(loaded, cuts=1, kinds=["image"])
    assert {one.source for one in checked.noise} == {"batch sizes"}
    assert checked.proven


# -- the oracle -----------------------------------------------------------------------------------


def test_the_oracle_refuses_layers_and_masks_that_it_does_not_know() -> None:
    hidden = torch.zeros(1, 3, 8)
    block = oracle._Blocking([[1]], oracle._Columns(PreTrainedConfig()))
    with pytest.raises(ModelError, match="Linear takes no hidden_states and attention_mask"):
        block(nn.Linear(8, 8), (hidden,), {"mask": None})
    with pytest.raises(ModelError, match="takes no mask a query"):
        block(nn.Linear(8, 8), (hidden,), {"attention_mask": torch.ones(1, 3)})


def test_the_oracle_hides_columns_of_a_window_s_cache() -> None:
    """Of 6 columns the cache holds the last 4; column 3 is the second of them."""
    columns = oracle._Columns(PreTrainedConfig())
    columns.total = 6
    block = oracle._Blocking([[0, 3]], columns)
    given = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    _, changed = block(nn.Identity(), (torch.zeros(1, 1, 8),), {"attention_mask": given})
    bias = changed["attention_mask"]
    assert (bias[0, 0, 0] == 0).tolist() == [True, False, True, True]  # type: ignore[index]


# -- inputs and cuts ------------------------------------------------------------------------------


def test_the_ragged_batch_is_two_prompts_of_different_length(loaded: Loaded) -> None:
    for material in draw_media(loaded, Sampling(), MODALITIES):
        one, ragged = make_batches(loaded, material)
        first, second = (row.tensors["input_ids"].shape[1] for row in ragged.rows)
        assert first != second
        assert ragged.tensors["attention_mask"].sum(1).tolist() == [first, second]
        assert torch.equal(one.tensors["input_ids"][0], ragged.tensors["input_ids"][0, -first:])


def test_the_pictures_have_a_plain_tile_and_the_clip_still_frames(loaded: Loaded) -> None:
    wide, square = (draw_picture(loaded, Sampling(), square).items[0] for square in (False, True))
    assert wide.source.width == 2 * wide.source.height == 2 * square.source.width
    plain = [bool((tile == tile[:, :1, :1]).all()) for tile in wide.pixels]
    assert plain.count(True) == 1
    clip = draw_clip(loaded, Sampling()).items[0]
    same = [torch.equal(*pair) for pair in zip(clip.pixels[:-1], clip.pixels[1:], strict=True)]
    assert same == [True, True, True, False, True, True, True]
    assert len(draw_clip(loaded, Sampling(frames=4)).items[0].index) == 4


def test_a_method_of_clips_alone_is_not_checked_on_pictures(checkpoints) -> None:  # type: ignore[no-untyped-def]
    loaded = loading.load(str(checkpoints("llava")), device="cpu")
    with pytest.raises(ModelError, match="takes image input, and this method cuts video tokens"):
        draw_media(loaded, Sampling(), CheckOptions(method="evs").modalities)


def names(cuts: Sequence[CheckedCut]) -> list[str]:
    return [cut.name for cut in cuts]


def test_the_usual_cuts_fit_the_model_and_the_method() -> None:
    usual = choose_cuts(CheckOptions(seed=3), 28, MODALITIES)
    assert names(usual) == ["input", "layer 2", "layers 2, 14", "pixels", "decoding"]
    assert [cut.core for cut in usual] == [True, True, False, False, False]
    assert {cut.preset.seed for cut in usual[:3]} == {3}
    assert names(choose_cuts(CheckOptions(method="fastv"), 28, MODALITIES)) == names(usual)[1:]
    assert names(choose_cuts(CheckOptions(), 2, MODALITIES)) == [
        "input", "layer 1", "pixels", "decoding",
    ]  # fmt: skip
    for depth in (3, 4, 7):  # where the average over the layers could not be a half
        for usual_cut in choose_cuts(CheckOptions(), depth, MODALITIES):
            keeps = [stage.keep for stage in usual_cut.preset.stages_for("image")]
            assert keeps in ([[]] if usual_cut.name == "decoding" else [[0.5], [0.5, 0.1]])
    (one,) = choose_cuts(
        CheckOptions(method="entropy", at="60%", options={"norm": "none"}), 28, ["image"]
    )
    assert one.preset.to_dict()["stages"][0]["norm"] == "none"  # type: ignore[index]
    (one,) = choose_cuts(CheckOptions(preset="balanced", keep=0.2), 28, MODALITIES)
    assert (one.preset.name, one.preset.keep, one.core) == ("balanced", 0.2, True)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"keep": 1.0}, "keep 1 cuts nothing"),
        ({"method": "vtw"}, "--method vtw chooses no tokens"),
        ({"method": "downsample"}, "--method downsample chooses no tokens"),
        ({"method": "entropi"}, "unknown method 'entropi'"),
        ({"options": {"norm": "row"}}, "method random has no option 'norm'"),
        ({"at": "middle"}, "at: middle is not a place"),
        ({"preset": "fats"}, "no preset 'fats'"),
    ],
)
def test_cuts_that_can_t_be_checked_are_errors(wanted: dict[str, object], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        choose_cuts(CheckOptions(**wanted), 28, MODALITIES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{at: input, method: uniform, positions: renumber}", "moves the kept tokens"),
        ("{at: pixels, method: downsample}", "downsample makes the media smaller"),
    ],
)
def test_presets_without_a_masked_counterpart_are_errors(
    tmp_path: Path, stage: str, message: str
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"keep: 0.5\nstages: [{stage}]\n")
    with pytest.raises(PresetError, match=message):
        choose_cuts(CheckOptions(preset=str(path)), 28, MODALITIES)


# -- decoders whose layers keep a state -----------------------------------------------------------


def test_a_hybrid_decoder_equals_the_loop_over_its_layers(checkpoints) -> None:  # type: ignore[no-untyped-def]
    checked = run(loading.load(str(checkpoints("qwen3_5")), device="cpu"))
    assert checked.verdict == "equal", checked.claim()
    assert checked.claim().startswith("pruned equals the loop over the layers in ")
    assert checked.to_dict()["model"]["pruned_equals"] == "layer loop"  # type: ignore[index]
    assert {noise.source for noise in checked.noise} == {"sdpa, eager, loop"}


def test_a_state_made_of_padding_is_seen(checkpoints, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The fault: padding that a cut makes is taken for tokens by layers with a state."""
    state = sequence.SequenceState
    monkeypatch.setattr(state, "_replace_token_mask", lambda *_: None)
    hybrid = loading.load(str(checkpoints("qwen3_5")), device="cpu")
    checked = run(hybrid, cuts=2)
    assert checked.verdict == "different"
    assert outcomes(checked, prompts="ragged", cut="layer 2") == {"DIFFERS"}
