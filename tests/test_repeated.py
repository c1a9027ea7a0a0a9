"""What a picture repeats of the one before it goes: by hand, and in every family."""

from __future__ import annotations

import math
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from conftest import answer_together, shared_model
from PIL import Image, ImageDraw

import vtprune
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.pixel_selection import PixelSelection, select_pixels
from vtprune.engine.plan import PruningPlan
from vtprune.engine.trace import Trace
from vtprune.errors import PresetError
from vtprune.inference.generate import Generation
from vtprune.inference.prepare import encode as ready_inputs
from vtprune.inference.prompt_media import read_in_full
from vtprune.media import Limits
from vtprune.models import splitting
from vtprune.models.base import Sampling
from vtprune.models.loading import load
from vtprune.models.structure import find_structure
from vtprune.preset import load_preset, override
from vtprune.pruners.repeated import Repeated, patch_changes, smallest_threshold
from vtprune.tokens.layout import NEWLINE, Layout, box, join, lay_out, single
from vtprune.tokens.units import Units

PRESET = {"stages": [{"at": "pixels", "method": "repeated"}]}


# -- by hand --------------------------------------------------------------------------------------


def grey(level: int = 100) -> torch.Tensor:
    return torch.full((1, 3, 32, 32), level, dtype=torch.uint8)


def keep(pictures: list[torch.Tensor], most: int | None = None, **options: float):  # type: ignore[no-untyped-def]
    media = [Units("image", pixels) for pixels in pictures]
    grids = [[(4, 4)]] * len(media)
    masks = Repeated(**options).keep_patches(media, grids, [[16]] * len(media), most)
    return [of_item[0].flatten().nonzero().flatten().tolist() for of_item in masks]


def test_the_patches_that_changed_stay() -> None:
    """One pixel of 64 levels is 4 in its block of 16, in the patch at row 1, column 2 of 4."""
    dot = grey()
    dot[0, 1, 8, 20] += 64
    assert keep([grey(), grey(), dot], tolerance=3.9) == [list(range(16)), [], [6]]
    assert keep([grey(), grey(), dot], tolerance=4) == [list(range(16)), [], []]


def test_a_slow_change_is_compared_with_what_was_last_kept() -> None:
    assert keep([grey(10), grey(12), grey(13), grey(14)], tolerance=2) == [
        list(range(16)), [], list(range(16)), [],
    ]  # fmt: skip


def test_a_picture_is_compared_with_the_last_one_of_its_size() -> None:
    wide = torch.full((1, 3, 32, 64), 100, dtype=torch.uint8)
    assert keep([grey(), wide, grey()]) == [list(range(16)), list(range(16)), []]


def test_patches_that_do_not_fill_a_picture_evenly_keep_their_neighbours() -> None:
    new, old = torch.zeros(1, 3, 30, 30), torch.zeros(1, 3, 30, 30)
    new[..., 29, 29] = 160
    assert patch_changes(new, old, (4, 4)).nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_a_budget_takes_the_least_changed_first() -> None:
    changed = grey()
    changed[0, :, :8, :8] += 50
    changed[0, :, 8:16, :8] += 20
    assert keep([grey(), changed]) == [list(range(16)), [0, 4]]
    assert keep([grey(), changed], most=17) == [list(range(16)), [0]]
    assert keep([grey(), changed], most=3) == [list(range(16)), []]
    levels = [[torch.tensor([[math.inf, 3.0]]), torch.tensor([[2.0]])]]
    assert smallest_threshold(levels, [[2, 5]], 4) == 2
    assert smallest_threshold(levels, [[2, 5]], 7) == 0


def test_tiles_are_compared_each_with_its_own() -> None:
    tiles = torch.cat([grey(1), grey(2), grey(3)])
    second = tiles.clone()
    second[1, :, 30:, 30:] = 90
    regions = splitting.regions(1, 2)
    media = [Units("image", pixels, regions=regions) for pixels in (tiles, second)]
    (_, masks) = Repeated().keep_patches(media, [[(2, 2), (1, 1), (2, 2)]] * 2, [[4, 9, 4]] * 2, 99)
    assert [mask.tolist() for mask in masks] == [[[False] * 2] * 2, [[True]], [[False] * 2] * 2]


def with_a_newline(keep: float | None = None) -> tuple[PixelSelection, list[str]]:
    """Two pictures of 4 x 4 patches and a newline; two patches of the second one changed."""
    changed = grey()
    changed[0, :, :8, :8] += 50
    changed[0, :, 8:16, :8] += 20
    grid = join([box(1, 4, 4), single(NEWLINE, row=3, col=4)])
    layout = lay_out({"image": torch.arange(34)}, {"image": [grid, grid]})
    units = [Units("image", pixels) for pixels in (grey(), changed)]
    return select(layout, units, keep)


def select(
    layout: Layout, units: list[Units], keep: float | None = None
) -> tuple[PixelSelection, list[str]]:
    """What a stage at `pixels` keeps, and its warnings."""
    trace, structure = Trace(), find_structure(shared_model("llava_onevision"))
    preset = load_preset(PRESET)
    plan = PruningPlan(override(preset, keep=keep) if keep else preset, structure, None, trace)
    return select_pixels(plan, [layout], [units]), trace.warnings


def test_a_newline_stays_where_any_patch_of_its_picture_does() -> None:
    selection, _ = with_a_newline()
    assert selection.dropped[0].tolist() == [*range(18, 21), *range(22, 33)]


def test_newlines_count_in_the_budget() -> None:
    """20 of 34 tokens are left; 19 are 16 patches, one that changed, and two newlines."""
    selection, warnings = with_a_newline(0.56)
    assert selection.dropped[0].tolist() == list(range(18, 33))
    assert warnings == []


def test_a_keep_that_is_just_met_is_not_warned_of() -> None:
    selection, warnings = with_a_newline(0.59)  # 20 of 34
    assert len(selection.dropped[0]) == 14
    assert warnings == []
    assert "only 20 of 34" in with_a_newline(0.62)[1][0]  # 21


def test_a_picture_that_repeats_nothing_is_encoded_whole_with_the_tile_that_has_no_tokens() -> None:
    """So that its features are those without pruning, bit for bit: the tile is padding."""
    grid = join([box(1, 2, 2), box(1, 2, 2, tile=1)])
    layout = lay_out({"image": torch.arange(8)}, {"image": [grid]})
    tiles = torch.cat([grey(1), grey(2), grey(3)])
    selection, _ = select(layout, [Units("image", tiles, regions=splitting.regions(1, 2))])
    assert selection.rows_of("image").tolist() == [True, True, True]


# -- in every family ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screens(tmp_path_factory) -> list[Path]:  # type: ignore[no-untyped-def]
    """Three screenshots: windows with text; a menu opens in the second, the third is the second."""
    folder = tmp_path_factory.mktemp("screens")
    picture = Image.new("RGB", (224, 224), (236, 236, 240))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 224, 16), fill=(40, 44, 52))
    draw.rectangle((16, 32, 208, 208), fill="white", outline="black")
    for line in range(9):
        draw.text((24, 40 + 18 * line), f"line {line}: value {line * 37}", fill="black")
    paths = [folder / f"{number}.png" for number in range(3)]
    picture.save(paths[0])
    draw.rectangle((4, 16, 60, 60), fill=(250, 250, 210), outline="black")
    draw.text((8, 20), "Open", fill="black")
    picture.save(paths[1])
    picture.save(paths[2])
    return paths


@pytest.mark.parametrize(
    "name",
    ["gemma3", "internvl", "llava_next", "llava_onevision", "molmo2", "qwen2_5_vl", "smolvlm"],
)
def test_what_a_screenshot_repeats_goes_and_the_rest_is_as_masked(
    name: str, checkpoints, screens: list[Path]
) -> None:  # type: ignore[no-untyped-def]
    if name not in tiny.MODELS:
        pytest.skip("not in this transformers")
    loaded = load(str(checkpoints(name)))
    gathered = read_in_full(loaded, screens, Sampling(), Limits())
    inputs = ready_inputs(loaded, gathered, "what changed?", Generation())
    prepared = PreparedInputs.of(inputs.tensors, [inputs])
    with vtprune.pruning(loaded.model, PRESET, inputs=prepared, modality="image") as trace:
        tokens, logits = oracle.generate(loaded.model, inputs.tensors, steps=8)
    of_picture = [int((trace.layouts[0].media == number).sum()) for number in range(3)]
    kept = torch.bincount(trace.kept[0].media, minlength=3).tolist()
    assert kept[0] == of_picture[0]
    assert 0 < sum(kept[1:]) <= of_picture[1]  # what changed, once
    rows = trace.encoded[0]["image"]
    assert rows[0] >= rows[1] > 0
    assert rows[2] == 0  # the tower is spared a picture that shows nothing new
    oracle.assert_masked(loaded.model, inputs.tensors, trace, tokens, logits)
    goes_whole = name == "molmo2"  # its tokens pool patches of tiles that overlap
    assert (sum(kept[1:]) == of_picture[1]) == goes_whole
    unpruned = oracle.generate(loaded.model, inputs.tensors, steps=1)[1]
    assert (logits[:, :1] - unpruned).abs().max() > 1e-4


def test_a_keep_takes_more_and_one_that_is_met_already_is_warned_of(
    checkpoints, screens: list[Path]
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("qwen2_5_vl")))
    settings = {"generation": Generation(max_new_tokens=2)}
    question = [(screens, "what changed?")]
    (report,) = vtprune.answer(loaded, question, method="repeated", keep=0.36, **settings)
    assert (report.tokens.visual, report.tokens.kept_after) == (192, 68)  # of 73; two are alike
    (report,) = vtprune.answer(loaded, question, method="repeated", keep=0.9, **settings)
    assert report.tokens.kept_after == 73
    assert any("is not reached: only 73 of 192 tokens" in text for text in report.warnings)
    with pytest.raises(PresetError, match="can't be reached at pixels"):
        vtprune.answer(loaded, question, method="repeated", keep=0.2, **settings)


def test_a_batch_gives_each_prompt_what_it_gets_alone(checkpoints, screens: list[Path]) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("internvl")))
    items = [(screens, "what changed?"), (screens[:2], "which?"), (screens[1:], "why?")]
    answer_together(loaded, items, PRESET, generation=Generation(max_new_tokens=4))
