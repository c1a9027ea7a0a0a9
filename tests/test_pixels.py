"""What goes before the vision tower is as if it had been dropped at the input, in every family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from conftest import answer_together, shared_model
from PIL import Image
from torch import nn

import vtprune
from vtprune.engine.inputs import FeatureCache, PixelView, PreparedInputs
from vtprune.engine.pixel_selection import TOWERS
from vtprune.errors import ModelError, PresetError
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.generate import Generation
from vtprune.inference.measuring import count_kept
from vtprune.inference.prepare import encode as ready_inputs
from vtprune.inference.prompt_media import read_in_full
from vtprune.media import Limits
from vtprune.models import cost
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, load
from vtprune.preset import load_preset
from vtprune.pruners.predictable import Predictable
from vtprune.tokens.layout import Layout
from vtprune.tokens.units import WHOLE, Units

CASES = [(name, kind) for name in tiny.MODELS for kind in tiny.KINDS[name]]
SHARED = ("internvl", "smolvlm", "idefics3")  # pictures and videos are one tensor
SIZES = ((112, 112), (168, 56))  # whole tiles in every family, and none that are interpolated
STAGE = {"at": "pixels", "method": "predictable", "tolerance": 0}
PRESET = {"stages": [STAGE]}


# -- made-up media --------------------------------------------------------------------------------


def prompts(name: str, model, kind: str, batch: str):  # type: ignore[no-untyped-def]
    first = tiny.inputs(name, model, kind, sizes=SIZES, frames=8)
    if batch == "one":
        return first
    second = tiny.inputs(name, model, kind, seed=1, text=9, sizes=SIZES[::-1], frames=8)
    return tiny.left_pad(name, [first, second])


def modality_of(name: str, kind: str) -> str | None:
    """What shared placeholders hold; a mixed prompt of them is taken for pictures."""
    return "video" if kind == "video" else None


def layouts_of(model, inputs, modality: str | None) -> list[Layout]:  # type: ignore[no-untyped-def]
    stage = {"at": 2, "method": "random", "keep": 1.0}
    with torch.no_grad(), vtprune.pruning(model, {"stages": [stage]}, modality=modality) as trace:
        model(**inputs)
    return trace.layouts


def make_units(model, layout: Layout, seed: int = 0) -> list[Units]:  # type: ignore[no-untyped-def]
    """Media of a layout: every second frame repeats the one before, every second tile is plain."""
    generator = torch.Generator().manual_seed(seed)
    group = getattr(model.config.vision_config, "temporal_patch_size", 1)
    found = []
    for number in layout.media.unique().tolist():
        own = layout.take((layout.media == number).nonzero().squeeze(1))
        steps, tiles = int(own.grid.frame.max()) + 1, list(dict.fromkeys(own.grid.tile.tolist()))
        shape = (steps * group if own.modality[0] else len(tiles), 3, 32, 32)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if own.modality[0]:
            frames = pixels.unflatten(0, (steps, group))
            frames[1::2] = frames[::2][: steps // 2]
            found.append(Units("video", pixels, group))
        elif model.config.model_type == "molmo2":  # a token pools patches of several tiles
            pixels[1::2] = 9
            found.append(Units("image", pixels))
        else:
            plain = [row for row, tile in enumerate(tiles) if tile and tile % 2]
            pixels[plain] = 9
            regions = tuple((0.0, 0.0, 0.5, 0.5) if tile else WHOLE for tile in tiles)
            found.append(Units("image", pixels, regions=regions if len(tiles) > 1 else ()))
    return found


def prepared(view: PixelView) -> PreparedInputs:
    return PreparedInputs(pixels=view)


def shown(model, inputs, modality: str | None) -> PixelView:  # type: ignore[no-untyped-def]
    layouts = layouts_of(model, inputs, modality)
    units = [make_units(model, one, seed) for seed, one in enumerate(layouts)]
    return PixelView(inputs, units)


def shown_prompt(kind: str, batch: str):  # type: ignore[no-untyped-def]
    """The tiny LLaVA-OneVision, a prompt for it, and what its pixels show."""
    model = shared_model("llava_onevision")
    inputs = prompts("llava_onevision", model, kind, batch)
    return model, inputs, shown(model, inputs, None)


def units_that_go(rows: Sequence[Sequence[Units]]) -> list[tuple[int, Units, int]]:
    """(sample, item, number) of what repeats or is plain, told from how it was made."""
    gone = []
    for sample, row in enumerate(rows):
        for item in row:
            numbers = range(1, len(item), 2)
            if item.modality == "image":
                numbers = [n for n in range(len(item)) if item.place(n)[1] % 2]
            gone += [(sample, item, number) for number in numbers]
    return gone


@contextmanager
def counting(model) -> Iterator[list[int]]:  # type: ignore[no-untyped-def]
    """Rows that the first matrix of a vision tower gets, one number a call."""
    seen: list[int] = []
    handles = []
    for name in TOWERS:
        tower = getattr(model.model, name, None)
        if isinstance(tower, nn.Module):
            first = next(m for m in tower.modules() if isinstance(m, nn.Linear | nn.Conv2d))
            if not isinstance(first, nn.Conv2d) and "visual" in name:
                first = next(m for m in tower.modules() if hasattr(m, "proj"))
            handles.append(first.register_forward_pre_hook(lambda _, a: seen.append(len(a[0]))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# -- the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["one", "ragged"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_goes_before_the_tower_equals_the_same_tokens_dropped_at_the_input(
    name: str, kind: str, batch: str
) -> None:
    model = shared_model(name)
    inputs = prompts(name, model, kind, batch)
    modality = modality_of(name, kind)
    media = shown(model, inputs, modality)
    with vtprune.pruning(model, PRESET, modality=modality, inputs=prepared(media)) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=4)
    (stage,) = trace.stages
    assert (stage.at, stage.layer, stage.method) == ("pixels", 0, "predictable")
    gone = units_that_go(media.units)
    for sample, layout in enumerate(trace.layouts):
        held = torch.isin(layout.columns, torch.tensor(stage.kept[sample], dtype=torch.long))
        for number, item in zip(layout.media.unique().tolist(), media.units[sample], strict=True):
            own = layout.media == number
            for unit in range(len(item)):
                frame, tile = item.place(unit)
                mine = own & (layout.grid.frame == frame) & (layout.grid.tile == tile)
                goes = any(one[1] is item and one[2] == unit for one in gone)
                mine = own if len(item) == 1 else mine
                assert held[mine].tolist() == [not goes] * int(mine.sum())
    oracle.assert_masked(model, inputs, trace, tokens, logits)
    unpruned = oracle.generate(model, inputs, steps=1)[1]
    apart = (logits[:, :1] - unpruned).abs().max()
    assert apart > 0.01 if gone else apart == 0


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_tower_gets_fewer_rows(name: str, kind: str) -> None:
    model = shared_model(name)
    inputs = prompts(name, model, kind, "ragged")
    modality = modality_of(name, kind)
    media = shown(model, inputs, modality)
    with counting(model) as full:
        oracle.generate(model, inputs, steps=1)
    with counting(model) as left, vtprune.pruning(
        model, PRESET, modality=modality, inputs=prepared(media)
    ) as trace:  # fmt: skip
        oracle.generate(model, inputs, steps=2)
    assert len(full) == len(left)
    gone = units_that_go(media.units)
    rows = {one: sum(i.rows for r in media.units for i in r if i.modality == one)
            for one in ("image", "video")}  # fmt: skip
    for one in ("image", "video"):
        lost = sum(item.modality == one for _, item, _ in gone)
        encoded = sum(sum(sample[one]) for sample in trace.encoded)
        assert encoded == rows[one] - lost
    if len(full) == 1 and gone:
        total = sum(rows.values())
        assert left[0] * total == full[0] * (total - len(gone))
    assert bool(gone) == (sum(left) < sum(full))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_nothing_predictable_is_bit_identical_to_no_pruning(name: str, kind: str) -> None:
    model = shared_model(name)
    inputs = prompts(name, model, kind, "ragged")
    modality = modality_of(name, kind)
    media = shown(model, inputs, modality)
    generator = torch.Generator().manual_seed(5)
    for row in media.units:
        for item in row:  # noise, nowhere like its neighbour
            item.pixels.copy_(torch.randint(0, 256, item.pixels.shape, generator=generator))
    expected = oracle.generate(model, inputs, steps=3)[1]
    with vtprune.pruning(model, PRESET, modality=modality, inputs=prepared(media)) as trace:
        logits = oracle.generate(model, inputs, steps=3)[1]
    assert torch.equal(logits, expected)
    assert trace.stages[0].before == trace.stages[0].after


@pytest.mark.parametrize(("name", "kind"), [("llava_onevision", "mixed"), ("qwen3_vl", "mixed"),
                                            ("glm4v", "video"), ("internvl", "image")])  # fmt: skip
def test_later_stages_work_on_what_is_left(name: str, kind: str) -> None:
    model = shared_model(name)
    inputs = prompts(name, model, kind, "ragged")
    modality = modality_of(name, kind)
    media = shown(model, inputs, modality)
    stages = [
        STAGE,
        {"at": "input", "method": "entropy"},
        {"at": 3, "method": "random", "keep": 0.1},
    ]
    with vtprune.pruning(
        model, {"keep": 0.2, "stages": stages}, modality=modality, inputs=prepared(media)
    ) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=4)
    assert [(one.at, one.layer) for one in trace.stages] == [("pixels", 0), ("input", 0), ("3", 3)]
    first, second, _ = trace.stages
    assert first.after == second.before
    assert second.after < second.before
    for sample in range(2):
        assert trace.keep_mean(sample) == pytest.approx(0.2, abs=1 / len(trace.layouts[sample]))
    oracle.assert_masked(model, inputs, trace, tokens, logits)


def test_a_stage_can_act_on_one_modality_alone() -> None:
    model, inputs, media = shown_prompt("mixed", "ragged")
    preset = {"video": PRESET, "image": {"stages": [{"at": 2, "method": "random", "keep": 0.5}]}}
    with vtprune.pruning(model, preset, inputs=prepared(media)) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    assert [(one.modality, one.at) for one in trace.stages] == [("video", "pixels"), ("image", "2")]
    assert [one["image"] for one in trace.encoded] == [[5], [4]]
    assert [one["video"] for one in trace.encoded] == [[4], [4]]
    oracle.assert_masked(model, inputs, trace, tokens, logits)


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl", "molmo2"])
def test_the_kernel_does_not_matter(name: str) -> None:
    if name not in tiny.MODELS:
        pytest.skip("not in this transformers")
    model = shared_model(name, "eager")  # sdpa elsewhere
    inputs = prompts(name, model, "video", "ragged")
    media = shown(model, inputs, "video")
    with vtprune.pruning(model, PRESET, modality="video", inputs=prepared(media)) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    oracle.assert_masked(model, inputs, trace, tokens, logits)


def test_the_model_is_as_before_also_after_an_exception_in_the_tower() -> None:
    model, inputs, media = shown_prompt("video", "one")
    hooks = {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}

    def stop(module: object, args: object) -> None:
        raise RuntimeError("stop here")

    projector = model.model.multi_modal_projector
    handle = projector.register_forward_pre_hook(stop)
    with vtprune.pruning(model, PRESET, inputs=prepared(media)):
        with pytest.raises(RuntimeError, match="stop here"):
            oracle.generate(model, inputs, steps=1)
        handle.remove()
        for module in (model.model.vision_tower, projector):  # inside the block already
            assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == hooks[module]
    for module in model.modules():
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == hooks[module]


def test_features_that_are_kept_are_not_those_of_another_tolerance() -> None:
    model, inputs, media = shown_prompt("video", "one")
    encoded: FeatureCache = {}
    logits = []
    for preset in (PRESET, {"stages": [{"at": 2, "method": "random", "keep": 1.0}]}, PRESET):
        with vtprune.pruning(model, preset, inputs=PreparedInputs((), encoded, media)):
            logits.append(oracle.generate(model, inputs, steps=1)[1])
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], oracle.generate(model, inputs, steps=1)[1])
    assert len(encoded) == 2


def test_features_that_are_kept_are_those_of_the_frames_that_stayed() -> None:
    """A stage that keeps 4 of 33 tokens has features of one frame alone."""
    model, inputs, media = shown_prompt("video", "one")
    encoded: FeatureCache = {}
    logits = []
    for stage, features in (({**STAGE, "keep": 0.05}, encoded), (STAGE, encoded), (STAGE, None)):
        given = PreparedInputs((), features, media)
        with vtprune.pruning(model, {"stages": [stage]}, inputs=given):
            logits.append(oracle.generate(model, inputs, steps=1)[1])
    assert torch.equal(logits[1], logits[2])
    assert len(encoded) == 2


def test_pixels_that_were_changed_in_place_are_encoded_anew() -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    encoded: FeatureCache = {}
    for _ in range(2):
        inputs["pixel_values"].mul_(-1)
        with vtprune.pruning(model, {"stages": [{"at": 2, "method": "random", "keep": 1.0}]},
                             inputs=PreparedInputs((), encoded)):  # fmt: skip
            logits = oracle.generate(model, inputs, steps=1)[1]
        assert torch.equal(logits, oracle.generate(model, inputs, steps=1)[1])


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["all", "video"])
def test_prepared_inputs_are_refused_with_the_way_out(where: str) -> None:
    preset = PRESET if where == "all" else {"video": PRESET, "image": {"stages": [
        {"at": 2, "method": "random", "keep": 0.5}]}}  # fmt: skip
    model = shared_model("llava_onevision")
    with pytest.raises(PresetError, match="prepared inputs hold them normalised") as raised:  # noqa: SIM117
        with vtprune.pruning(model, preset):
            pass
    assert "vtprune.answer" in raised.value.hint
    with vtprune.pruning(model, preset, keep=1.0):
        pass  # no pruning, whatever the preset


def test_an_optional_stage_is_left_out_of_prepared_inputs_with_a_warning() -> None:
    model = shared_model("llava_onevision")
    inputs = prompts("llava_onevision", model, "video", "one")
    later = {"at": 2, "method": "random", "keep": 0.5}
    with vtprune.pruning(model, {"stages": [{**STAGE, "optional": True}, later]}) as trace:
        oracle.generate(model, inputs, steps=1)
    assert [stage.at for stage in trace.stages] == ["2"]
    assert any(
        "the optional stage at pixels (predictable) is left out" in w for w in trace.warnings
    )
    media = shown(model, inputs, None)
    with vtprune.pruning(
        model, {"stages": [{**STAGE, "optional": True}, later]}, inputs=prepared(media)
    ) as trace:
        oracle.generate(model, inputs, steps=1)
    assert [stage.at for stage in trace.stages] == ["pixels", "2"]


@pytest.mark.parametrize(
    "stages",
    [[{**STAGE, "optional": True}], [STAGE, {"at": 2, "method": "random", "optional": True}]],
)
def test_optional_is_for_a_stage_at_pixels_before_others(stages: list[dict[str, object]]) -> None:
    with pytest.raises(PresetError, match=r"optional: true at .* is for a stage at pixels"):
        load_preset({"stages": stages})


def test_media_of_another_prompt_are_refused() -> None:
    model = shared_model("llava_onevision")
    inputs = prompts("llava_onevision", model, "video", "one")
    other = prompts("llava_onevision", model, "image", "one")
    media = shown(model, inputs, None)
    with pytest.raises(ModelError, match="not those of the media"), vtprune.pruning(
        model, PRESET, inputs=prepared(media)
    ):  # fmt: skip
        oracle.generate(model, other, steps=1)
    pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    wrong = PixelView(inputs, [[Units("video", pixels)]])
    with pytest.raises(ModelError, match="not those of the media"), vtprune.pruning(
        model, PRESET, inputs=prepared(wrong)
    ):  # fmt: skip
        oracle.generate(model, inputs, steps=1)


def test_a_keep_below_what_always_stays_is_an_error_that_says_what_can_be_reached() -> None:
    model, inputs, media = shown_prompt("video", "one")
    match = r"keep 0\.05 can't be reached at pixels: .* always stay, 4 of 33 tokens"
    with pytest.raises(PresetError, match=match), vtprune.pruning(
        model, method="predictable", keep=0.05, inputs=prepared(media)
    ):  # fmt: skip
        oracle.generate(model, inputs, steps=1)
    match = "a budget of 2 tokens can't be reached at pixels"
    with pytest.raises(PresetError, match=match), vtprune.pruning(
        model, method="predictable", tokens=2, inputs=prepared(media)
    ):  # fmt: skip
        oracle.generate(model, inputs, steps=1)
    stage = {**STAGE, "keep": 0.05}
    with vtprune.pruning(model, {"stages": [stage]}, inputs=prepared(media)) as trace:
        oracle.generate(model, inputs, steps=1)
    assert trace.stages[0].after == [4]
    assert any("can't be reached at pixels" in one for one in trace.warnings)


# -- budgets --------------------------------------------------------------------------------------


def test_a_stage_alone_drops_whole_frames_down_to_the_keep_in_every_sample() -> None:
    """8 frames of 4 tokens and a newline; pairs are equal, so tolerance 0 leaves 16 of 33."""
    model, inputs, media = shown_prompt("video", "ragged")
    with vtprune.pruning(model, method="predictable", options={"tolerance": "0"}, keep=0.4,
                         inputs=prepared(media)) as trace:  # fmt: skip
        tokens, logits = oracle.generate(model, inputs, steps=3)
    assert trace.stages[0].after == [12, 12]  # 13 would be 0.4; whole frames, never more
    assert trace.keep_mean(0) == 12 / 33
    assert [one["video"] for one in trace.encoded] == [[3], [3]]
    oracle.assert_masked(model, inputs, trace, tokens, logits)


def test_a_keep_that_the_content_is_below_is_warned_of() -> None:
    model, inputs, media = shown_prompt("video", "one")
    with vtprune.pruning(model, method="predictable", keep=0.9, inputs=prepared(media)) as trace:
        oracle.generate(model, inputs, steps=1)
    assert trace.keep_mean() == 16 / 33
    assert any("is not reached: only 16 of 33 tokens" in one for one in trace.warnings)
    later = {"keep": 0.7, "stages": [STAGE, {"at": 2, "method": "random"}]}
    with vtprune.pruning(model, later, inputs=prepared(media)) as trace:
        oracle.generate(model, inputs, steps=1)
    assert [stage.after for stage in trace.stages] == [[16], [16]]
    assert trace.keep_mean() == 16 / 33
    assert trace.warnings == [
        "keep 0.7 asks for more than the 16 of 33 tokens that are left at the language model's "
        "input: later stages cut less, or nothing"
    ]


# -- from files -----------------------------------------------------------------------------------


@pytest.fixture
def still(tmp_path: Path) -> Path:
    """A directory of 8 pictures: the first four are equal, and so are the others."""
    folder = tmp_path / "still"
    folder.mkdir()
    for number in range(8):
        noise = torch.Generator().manual_seed(number // 4)
        pixels = torch.randint(0, 256, (48, 64, 3), generator=noise).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A white page with noise in its upper left corner."""
    pixels = torch.full((224, 224, 3), 255, dtype=torch.uint8)
    noise = torch.Generator().manual_seed(0)
    pixels[8:48, 8:48] = torch.randint(0, 256, (40, 40, 3), generator=noise).to(torch.uint8)
    path = tmp_path / "page.png"
    Image.fromarray(pixels.numpy()).save(path)
    return path


def encode(loaded: Loaded, path: Path):  # type: ignore[no-untyped-def]
    gathered = read_in_full(loaded, [path], Sampling(frames=8), Limits())
    return ready_inputs(loaded, gathered, "what?", Generation())


VIDEOS = [name for name in tiny.MODELS if "video" in tiny.KINDS[name]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "image") for name in tiny.MODELS), *((name, "video") for name in VIDEOS)],
)
def test_files_are_compared_as_the_family_prepares_them(
    name: str, kind: str, checkpoints, still: Path, page: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    inputs = encode(loaded, still if kind == "video" else page)
    (item,) = inputs.units
    group = 2 if name.startswith(("qwen", "glm")) else 1
    assert (item.modality, item.group) == (kind, group if kind == "video" else 1)
    kept = Predictable(0.0).keep(item)
    if kind == "video":
        assert kept == [0, 4 // group]
    else:
        assert item.base in kept
        assert (len(kept) < len(item)) == tiny.FAMILIES[name].tiles_apart
    with vtprune.pruning(
        loaded.model, PRESET, inputs=PreparedInputs.of(inputs.tensors, [inputs])
    ) as trace:
        tokens, logits = oracle.generate(loaded.model, inputs.tensors, steps=3)
    counts = trace.encoded[0][kind]
    assert counts == [int(item.rows_kept(kept).sum())]
    oracle.assert_masked(loaded.model, inputs.tensors, trace, tokens, logits)


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "molmo2", "qwen2_5_vl"])
def test_frames_chosen_by_scene_go_before_the_tower(name: str, checkpoints, still: Path) -> None:  # type: ignore[no-untyped-def]
    """Noise, made small, is grey: only where `scene` is a few levels is it a scene of its own."""
    if name not in tiny.MODELS:
        pytest.skip("not in this transformers")
    loaded = load(str(checkpoints(name)))
    inputs = encode(loaded, still)
    stages = [{"at": "pixels", "method": "scenes", "tolerance": 255, "scene": 5, "keep": 0.5}]
    with vtprune.pruning(
        loaded.model, {"stages": stages}, inputs=PreparedInputs.of(inputs.tensors, [inputs])
    ) as trace:
        tokens, logits = oracle.generate(loaded.model, inputs.tensors, steps=8)
    by_frame = count_kept(trace.layouts[0], trace.kept[0], "video", "frame")
    steps = len(by_frame)
    assert [count > 0 for count in by_frame] == [step in (0, steps // 2) for step in range(steps)]
    assert trace.encoded[0]["video"] == [2]
    oracle.assert_masked(loaded.model, inputs.tensors, trace, tokens, logits)


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "qwen2_5_vl", "video_llava"])
def test_pictures_and_videos_of_one_prompt_are_told_apart(
    name: str, checkpoints, still: Path, page: Path
) -> None:  # type: ignore[no-untyped-def]
    """The order of the files, of the prompt and of the tower's rows are not the same."""
    loaded = load(str(checkpoints(name)))
    gathered = read_in_full(loaded, [still, page], Sampling(frames=8), Limits())
    inputs = ready_inputs(loaded, gathered, "what?", Generation())
    with vtprune.pruning(
        loaded.model, PRESET, inputs=PreparedInputs.of(inputs.tensors, [inputs])
    ) as trace:
        tokens, logits = oracle.generate(loaded.model, inputs.tensors, steps=3)
    steps = 4 if name.startswith("qwen") else 8
    by_frame = count_kept(trace.layouts[0], trace.kept[0], "video", "frame")
    assert [count > 0 for count in by_frame] == [n in (0, steps // 2) for n in range(steps)]
    assert trace.encoded[0]["video"] == [2]
    oracle.assert_masked(loaded.model, inputs.tensors, trace, tokens, logits)


@pytest.mark.parametrize("name", VIDEOS)
def test_the_report_says_what_was_encoded(name: str, checkpoints, still: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    ask = {"sampling": Sampling(frames=8), "generation": Generation(max_new_tokens=2)}
    (report,) = vtprune.answer(loaded, [(still, "what?")], PRESET, **ask)
    (full,) = vtprune.answer(loaded, [(still, "what?")], keep=1.0, **ask)
    tokens = report.tokens
    steps = len(tokens.by_frame)
    assert [count > 0 for count in tokens.by_frame] == [
        number in (0, steps // 2) for number in range(steps)
    ]
    (stage,) = tokens.stages
    assert (stage.at, stage.layer) == ("pixels", 0)
    assert stage.before == tokens.visual == full.tokens.visual
    assert stage.after == tokens.kept_after == sum(tokens.by_frame)
    assert tokens.keep_mean == pytest.approx(tokens.kept_after / tokens.visual)
    assert stage.options == {"tolerance": 0.0}
    assert report.flops.prefill_full == full.flops.prefill_full
    share = report.flops.vision / full.flops.vision
    if name == "molmo2":  # its adapter still pools the tokens of all frames
        assert 2 / steps < share < 1
    else:
        assert share == pytest.approx(2 / steps)


def test_flops_of_what_is_encoded_are_what_torch_counts(checkpoints, still: Path) -> None:  # type: ignore[no-untyped-def]
    """Two of eight frames, in the tower and in its projector."""
    from torch.utils.flop_counter import FlopCounterMode

    loaded = load(str(checkpoints("llava_onevision")), attention="eager")
    inputs = encode(loaded, still)
    block = vtprune.pruning(
        loaded.model, PRESET, inputs=PreparedInputs.of(inputs.tensors, [inputs])
    )
    with block, torch.no_grad(), FlopCounterMode(display=False) as counter:
        loaded.model.model.get_video_features(inputs.tensors["pixel_values_videos"])
    shape = cost.vision_shape(loaded.model.config)
    assert shape is not None
    assert counter.get_total_flops() == pytest.approx(
        cost.vision_flops(shape, [(1, 4, 4)] * 2), rel=0.01
    )


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "smolvlm", "molmo2"])
def test_a_batch_gives_each_item_what_it_gets_alone(
    name: str, checkpoints, still: Path, page: Path
) -> None:  # type: ignore[no-untyped-def]
    if name not in tiny.MODELS:
        pytest.skip("not in this transformers")
    loaded = load(str(checkpoints(name)))
    items = [(still, "what?"), (page, "which?"), (still, "what happens here?")]
    preset = {"keep": 0.2, "stages": [STAGE, {"at": "input", "method": "entropy"}]}
    answer_together(
        loaded, items, preset, sampling=Sampling(frames=8), generation=Generation(max_new_tokens=4)
    )


def test_a_second_question_reuses_what_was_encoded(checkpoints, still: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    with counting(loaded.model) as rows:
        reports = list(
            answer_questions(loaded, [still], ["what?", "why?"], load_preset(PRESET),
                    sampling=Sampling(frames=8), generation=Generation(max_new_tokens=2))
        )  # fmt: skip
    assert rows == [2]
    assert reports[0].tokens.by_frame == reports[1].tokens.by_frame


def test_compare_measures_a_stage_at_pixels_too(checkpoints, still: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    with counting(loaded.model) as rows:
        (report,) = answer_questions(
            loaded, [still], ["what?"], load_preset(PRESET), sampling=Sampling(frames=8),
            generation=Generation(max_new_tokens=2), compare=True,
        )  # fmt: skip
    first, *pairs = rows
    assert first == 2  # the answer's
    assert sorted(pairs) == [2] * (len(pairs) // 2) + [8] * (len(pairs) // 2)
    assert report.compare is not None
    assert report.compare.prefill_speedup > 0


def test_tiles_that_share_tokens_are_all_encoded_with_a_warning(checkpoints, page: Path) -> None:  # type: ignore[no-untyped-def]
    """anyres_max_4: nine tiles' tokens are interpolated to four tiles' worth, across borders."""
    loaded = load(str(checkpoints("llava_onevision")))
    (report,) = vtprune.answer(
        loaded, [(page, "what?")], PRESET, generation=Generation(max_new_tokens=2)
    )
    assert report.tokens.kept_after == report.tokens.visual
    assert any("no tile of a picture can be dropped" in warning for warning in report.warnings)
