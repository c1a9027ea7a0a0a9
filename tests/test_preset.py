"""Presets: what is read, what is refused, and which value wins."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtprune.errors import PresetError
from vtprune.preset import (
    DEFAULT,
    Preset,
    StageSpec,
    find_preset,
    load_preset,
    override,
    parse_keep,
    preset_directory,
    preset_names,
    set_sampling,
)
from vtprune.preset.calibration import find_calibration
from vtprune.preset.yaml_file import LARGEST_FILE, read_yaml
from vtprune.pruners import METHODS, find_profile
from vtprune.tokens.schedule import Place, resolve_layer
from vtprune.tokens.solver import solve

FREE = {"stages": [{"at": "ecl", "method": "entropy"}]}
FIXED = {
    "stages": [
        {"at": 2, "method": "entropy", "keep": 0.4},
        {"at": 4, "method": "random", "keep": 0.1},
    ]
}
OWN = {
    "keep": 0.3,
    "stages": [{"at": "ecl", "method": "random"}],
    "image": {"keep": 0.5},
    "video": {"stages": [{"at": "input", "method": "uniform"}]},
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- keep -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("0.3", 0.3),
        ("1", 1.0),
        ("1e-3", 0.001),
        (" 0.3 ", 0.3),
        ("image=0.5,video=0.2", {"image": 0.5, "video": 0.2}),
        ("video=0.2", {"video": 0.2}),
        ("video=0.2, image=1", {"image": 1.0, "video": 0.2}),
    ],
)
def test_keep_is_a_fraction_or_one_a_modality(text: str, keep: float | Mapping[str, float]) -> None:
    assert parse_keep(text) == keep


@pytest.mark.parametrize(
    "text", ["0", "-0.3", "1.01", "30", "30%", "nan", "inf", "-inf", "", "a", "image=0", "video=2",
             "image=", "1e-400", "0,3"]
)  # fmt: skip
def test_a_keep_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(PresetError, match=r"keep .*is not a fraction in \(0, 1\]") as caught:
        parse_keep(text)
    assert "never a drop rate" in caught.value.hint


@pytest.mark.parametrize("text", ["audio=0.3", "=0.3", "image=0.3,", "image=0.3;video=0.2,x=1"])
def test_a_keep_for_no_modality_is_refused(text: str) -> None:
    with pytest.raises(PresetError):
        parse_keep(text)


@pytest.mark.parametrize("keep", [0, -1, 1.5, float("nan"), True, "x", [0.3], 10**400])
def test_a_keep_from_the_library_is_checked_too(keep: object) -> None:
    with pytest.raises(PresetError, match="not a fraction"):
        override(load_preset(FREE), keep=keep)  # type: ignore[arg-type]


def test_a_keep_for_an_unknown_modality_from_the_library_is_refused() -> None:
    with pytest.raises(PresetError, match="keep is given for 'audio'"):
        override(load_preset(FREE), keep={"audio": 0.3})


# -- which value wins -----------------------------------------------------------------------------


def test_without_a_preset_the_default_one_is_used() -> None:
    assert load_preset(None) == load_preset(DEFAULT)


def test_a_preset_is_taken_as_it_is() -> None:
    preset = load_preset(FREE)
    assert load_preset(preset) is preset


def test_a_modality_wins_over_the_top_level() -> None:
    preset = load_preset(OWN)
    assert (preset.keep_for("image"), preset.keep_for("video")) == (0.5, 0.3)
    assert [stage.method for stage in preset.stages_for("image")] == ["random"]
    assert [stage.method for stage in preset.stages_for("video")] == ["uniform"]
    assert not preset.shares_one_budget()


def test_a_keep_flag_wins_over_every_keep_of_the_preset() -> None:
    preset = override(load_preset(OWN), keep=0.2)
    assert (preset.keep_for("image"), preset.keep_for("video")) == (0.2, 0.2)


def test_a_keep_flag_for_one_modality_leaves_the_other() -> None:
    preset = override(load_preset(OWN), keep={"video": 0.2})
    assert (preset.keep_for("image"), preset.keep_for("video")) == (0.5, 0.2)
    assert override(load_preset(OWN), keep="image=0.9").keep_for("image") == 0.9


def test_no_flag_changes_nothing() -> None:
    preset = load_preset(OWN)
    assert override(preset) == preset


@pytest.mark.parametrize(
    ("name", "flags", "changed"),
    [
        ("balanced", {"keep": 0.3, "seed": 0}, {}),  # what it says itself
        ("balanced", {"keep": "0.2"}, {"keep": 0.2}),
        ("balanced", {"keep": {"video": 0.2}}, {"keep": {"video": 0.2}}),
        ("entropy-horizon", {"options": {"states": "key"}}, {"states": "key"}),
        ("long-video", {"keep": 0.1, "seed": 7}, {"keep": 0.1, "seed": 7}),
    ],
)
def test_what_flags_change_in_a_preset_is_noted_and_its_description_goes(
    name: str, flags: dict[str, Any], changed: dict[str, object]
) -> None:
    preset = override(load_preset(name), **flags)
    assert (preset.name, dict(preset.changed), preset.method) == (name, changed, None)
    assert bool(preset.description) is not bool(changed)
    assert override(load_preset(name), seed=7).description  # which is as true of another draw


@pytest.mark.parametrize("name", ["balanced", "long-video"])
def test_a_method_in_the_place_of_a_preset_has_no_name_of_one(name: str) -> None:
    preset = override(load_preset(name), method="dart", options={"visual_pivots": "2"}, keep=0.4)
    assert (preset.name, preset.description, preset.method) == (None, "", "dart")
    assert preset.label == "method dart"
    assert preset.video == replace(load_preset(name).video, stages=None, keep=None)
    with pytest.raises(PresetError, match=r"^method random: every image stage has its own keep"):
        Preset(None, keep=0.5, stages=(StageSpec("2", "random", keep=0.3),))


def test_how_much_was_looked_at_is_in_the_preset_that_ran() -> None:
    preset = load_preset("long-video")
    same = set_sampling(preset, frames=64)
    assert (same, same.description, same.changed) == (preset, preset.description, ())
    other = set_sampling(preset, fps=2.0, max_tiles=4)
    assert (other.video.frames, other.video.fps, other.image.max_tiles) == (None, 2.0, 4)
    assert dict(other.changed) == {"frames": None, "fps": 2.0, "max_tiles": 4}
    assert other.description == ""


def test_a_seed_flag_wins_over_the_preset_and_zero_is_the_default() -> None:
    assert load_preset(FREE).seed == 0
    preset = load_preset({**FREE, "seed": 3})
    assert (preset.seed, override(preset, seed=0).seed, override(preset).seed) == (3, 0, 3)


def test_a_method_flag_replaces_all_stages_by_one_free_one() -> None:
    preset = override(load_preset(OWN), method="entropy", options={"norm": "row"})
    options = (("norm", "row"), ("states", "query"))
    for modality in ("image", "video"):
        assert preset.stages_for(modality) == (StageSpec("ecl", "entropy", options=options),)
    assert preset.keep_for("image") == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_method_cuts_at_its_own_place_unless_told_otherwise(method: str) -> None:
    preset = load_preset(FREE)
    assert override(preset, method=method).stages_for("image")[0].at == METHODS[method].at
    other = "pixels" if METHODS[method].before_tower else 3
    assert override(preset, method=method, at=other).stages_for("image")[0].at == str(other)


PIXELS = {"at": "pixels", "method": "predictable"}


def test_a_stage_at_pixels_is_not_the_free_one() -> None:
    stages = [{**PIXELS, "tolerance": 4}, {"at": 2, "method": "entropy"}]
    preset = load_preset({"keep": 0.3, "stages": stages})
    first = preset.stages_for("video")[0]
    assert (first.at, first.keep, first.options) == ("pixels", None, (("tolerance", 4.0),))
    with pytest.raises(PresetError, match=r"every image stage has its own keep") as raised:
        load_preset({"keep": 0.3, "stages": [PIXELS, {"at": 2, "method": "random", "keep": 0.5}]})
    assert "the stage at 2 (random)" in raised.value.hint


def test_a_stage_at_pixels_needs_no_keep_and_may_have_one() -> None:
    for stage in (PIXELS, {**PIXELS, "keep": 0.5}):
        assert load_preset({"stages": [stage]}).frame_and_tile_stage() is not None
    alone = load_preset({"keep": 0.5, "stages": [PIXELS]})
    assert alone.keep_for("image") == 0.5
    assert load_preset({"keep": 1.0, "stages": [PIXELS]}).frame_and_tile_stage() is None
    assert (
        load_preset({"stages": [{"at": 2, "method": "random", "keep": 0.5}]}).frame_and_tile_stage()
        is None
    )


@pytest.mark.parametrize("where", ["top", "image", "video"])
@pytest.mark.parametrize("second", [PIXELS, {**PIXELS, "keep": 0.5}])
def test_a_stage_at_pixels_comes_first_and_once(where: str, second: object) -> None:
    stages = {"stages": [{"at": "input", "method": "random", "keep": 0.5}, second]}
    with pytest.raises(PresetError, match=r"a stage at pixels .* comes after another one"):
        load_preset(stages if where == "top" else {where: stages})


def test_a_keep_after_pixels_can_only_fall() -> None:
    stages = [{**PIXELS, "keep": 0.5}, {"at": 2, "method": "random", "keep": 0.6}]
    with pytest.raises(PresetError, match=r"keep 0\.6 at 2 comes after keep 0\.5 at pixels"):
        load_preset({"stages": stages})
    stages[1]["keep"] = 0.5
    assert len(load_preset({"stages": stages}).stages_for("image")) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_the_wrong_side_of_the_vision_tower_is_refused(method: str) -> None:
    place, told = (
        ("input", "before") if METHODS[method].before_tower else ("pixels", "chooses visual tokens")
    )
    with pytest.raises(PresetError, match=f"{method} can't cut at {place}: .*{told}"):
        load_preset({"stages": [{"at": place, "method": method}]})
    with pytest.raises(PresetError, match=f"{method} can't cut at {place}: .*{told}"):
        override(load_preset(FREE), method=method, at=place)


@pytest.mark.parametrize("extra", [{"per": "frame"}, {"positions": "renumber"}])
def test_a_stage_at_pixels_takes_nothing_that_is_about_tokens(extra: dict[str, str]) -> None:
    with pytest.raises(PresetError, match="per, split or positions for predictable at pixels"):
        load_preset({"stages": [{**PIXELS, **extra}]})


def test_without_a_keep_of_its_own_the_flag_for_pixels_drops_what_is_predictable_alone() -> None:
    preset = load_preset({"keep": 0.3, "image": {"keep": 0.2}, **FREE})
    assert override(preset, method="predictable").keep_for("image") is None
    assert override(preset, method="predictable").keep_for("video") is None
    assert override(preset, method="predictable", keep=0.4).keep_for("image") == 0.4
    assert override(preset, method="predictable", keep="video=0.4").keep_for("video") == 0.4


def test_a_number_is_read_from_a_file_and_from_a_flag(tmp_path: Path) -> None:
    path = write(tmp_path, "stages:\n  - {at: pixels, method: predictable, tolerance: 0.5}\n")
    preset = load_preset(path)
    assert preset.stages_for("image")[0].options == (("tolerance", 0.5),)
    changed = override(preset, options={"tolerance": "3"})
    assert changed.stages_for("image")[0].options == (("tolerance", 3.0),)
    assert load_preset({"stages": changed.to_dict()["stages"]}).stages == changed.stages
    path = write(tmp_path, "stages:\n  - at: pixels\n    method: predictable\n    tolerance: -2\n")
    with pytest.raises(PresetError, match="line 4: tolerance: -2 is not a value of method"):
        load_preset(path)


def test_a_place_without_a_method_is_refused() -> None:
    with pytest.raises(PresetError, match=r"a place to cut \(at\) needs a method"):
        override(load_preset(FREE), at=3)


def test_options_reach_every_stage_whose_method_has_them() -> None:
    stages = [{"at": 1, "method": "entropy"}, {"at": 4, "method": "random", "keep": 0.1}]
    preset = override(load_preset({"stages": stages}), options={"norm": "row"})
    first, second = preset.stages_for("image")
    assert dict(first.options) == {"norm": "row", "states": "query"}
    assert second.options == ()


@pytest.mark.parametrize("options", [{"nrom": "none"}, {"norm": "none", "nrom": "row"}])
def test_an_option_that_no_stage_has_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(PresetError, match="no stage of preset custom has the option nrom"):
        override(load_preset(FREE), options=options)


def test_a_value_that_an_option_cannot_take_is_refused() -> None:
    with pytest.raises(PresetError, match="norm: rows is not a value of method entropy"):
        override(load_preset(FREE), options={"norm": "rows"})


def test_an_unknown_method_names_the_closest() -> None:
    with pytest.raises(PresetError, match="unknown method 'entropie'") as caught:
        override(load_preset(FREE), method="entropie")
    assert "did you mean entropy?" in caught.value.hint


# -- no hidden defaults ---------------------------------------------------------------------------


def test_a_preset_whose_stages_all_have_a_keep_takes_no_top_level_one() -> None:
    match = "every image stage has its own keep, so keep 0.3 sets nothing"
    with pytest.raises(PresetError, match=match) as caught:
        load_preset({"keep": 0.3, **FIXED})
    assert "remove the keep of the stage at 2 (entropy)" in caught.value.hint


def test_a_preset_whose_stages_all_have_a_keep_takes_no_keep_flag() -> None:
    with pytest.raises(PresetError, match=r"keep 0\.3 sets nothing") as caught:
        override(load_preset(FIXED), keep=0.3)
    assert "the stage at 2 (entropy)" in caught.value.hint


def test_a_modality_whose_stages_all_have_a_keep_takes_none_either() -> None:
    with pytest.raises(PresetError, match="every video stage has its own keep"):
        load_preset({"video": {"keep": 0.3, **FIXED}})


def test_keep_one_fits_every_preset() -> None:
    assert override(load_preset(FIXED), keep=1.0).keep_for("image") == 1.0


@pytest.mark.parametrize("where", ["top", "image", "video"])
def test_two_stages_without_a_keep_are_refused(where: str) -> None:
    stages = {"stages": [{"at": 2, "method": "entropy"}, {"at": 9, "method": "random"}]}
    with pytest.raises(PresetError, match=r"the stages at 2 and 9 .*at most one stage can take"):
        load_preset(stages if where == "top" else {where: stages})


def test_a_modality_without_stages_is_refused_when_it_is_asked_for() -> None:
    preset = load_preset({"video": FREE})
    with pytest.raises(PresetError, match="preset custom has no stages for image"):
        preset.stages_for("image")


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_a_packaged_preset_is_what_its_checked_file_says(name: str) -> None:
    """A packaged preset is built unchecked, for speed: this is its check."""
    assert load_preset(preset_directory() / f"{name}.yaml") == load_preset(name)


def test_a_packaged_preset_is_loaded_without_pydantic() -> None:
    code = (
        "import sys, vtprune.preset as p; p.load_preset('fast'); print('pydantic' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pydantic" not in found.stdout.split()


def test_every_key_of_the_schema_is_read(tmp_path: Path) -> None:
    preset = load_preset(
        write(
            tmp_path,
            "description: all of it\nkeep: 0.3\nseed: 7\n"
            "image:\n  max_tiles: 0\n  keep: 0.5\n  stages:\n"
            "    - {at: 60%, method: entropy, norm: row, states: hidden, per: tile,"
            " split: even, positions: keep}\n"
            "video:\n  frames: 32\n  max_frames: 64\n  stages:\n"
            "    - {at: input, method: uniform, keep: 0.6, per: frame}\n"
            "    - {at: 03, method: random}\n",
        )
    )
    assert (preset.name, preset.description, preset.keep, preset.seed) == (
        "mine", "all of it", 0.3, 7,
    )  # fmt: skip
    assert (preset.image.max_tiles, preset.image.keep) == (0, 0.5)
    assert (preset.video.frames, preset.video.max_frames, preset.video.fps) == (32, 64, None)
    assert preset.image.stages == (
        StageSpec("60%", "entropy", None, "tile", options=(("norm", "row"), ("states", "hidden"))),
    )
    assert preset.video.stages is not None
    assert [(s.at, s.keep, s.per) for s in preset.video.stages] == [
        ("input", 0.6, "frame"), ("3", None, "all"),
    ]  # fmt: skip


def test_all_faults_are_shown_at_once_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "kep: 0.3\n"  # 1
        "keep: 1.5\n"
        "seed: -1\n"
        "description: [a]\n"
        "image:\n"
        "  max_tiles: many\n"  # 6
        "  frames: 3\n"
        "  stages:\n"
        "    - {method: entropy}\n"
        "    - at: pixels\n"  # 10
        "      method: entropy\n"
        "      norm: rows\n"
        "      states: keys\n"
        "      nrom: row\n"
        "      keep: 0\n"  # 15
        "      per: page\n"
        "video:\n"
        "  fps: 2\n"
        "  frames: 8\n"
        "  stages:\n"  # 20
        "    - at: middle\n"
        "      method: entropi\n"
        "    - just text\n",
    )
    with pytest.raises(PresetError) as caught:
        load_preset(path)
    message = caught.value.message
    assert message.startswith(f"{path}: ")
    for line, words in {
        1: "unknown key 'kep', did you mean keep?",
        2: "keep: 1.5 is not a number in (0, 1]",
        3: "seed: -1 is not a whole number from 0 on",
        4: "description: ['a'] is not text",
        6: "max_tiles: 'many' is not a whole number from 0 on",
        7: "unknown key 'frames'",
        9: "a stage needs at",
        10: "entropy can't cut at pixels: it chooses visual tokens, which the vision tower makes",
        12: "norm: rows is not a value of method entropy",
        13: "states: keys is not a value of method entropy",
        14: "method entropy has no option 'nrom'",
        15: "keep 0 drops every visual token",
        16: "per: page is not one of all, frame, tile",
        18: "frames and fps exclude each other",
        21: "at: middle is not a place",
        22: "unknown method 'entropi'",
        23: "a stage must be a mapping of keys",
    }.items():
        assert f"line {line}: {words}" in message
    assert "\n" not in message


def test_only_a_method_that_drops_all_takes_a_keep_of_zero_and_it_takes_no_other() -> None:
    preset = load_preset({"stages": [{"at": 2, "method": "vtw", "keep": 0}]})
    assert preset.stages_for("image")[0].keep == 0
    with pytest.raises(PresetError, match="keep 0 drops every visual token, which only vtw may do"):
        load_preset({"stages": [{"at": 2, "method": "random", "keep": 0}]})
    with pytest.raises(
        PresetError, match="vtw drops every visual token: leave keep out, or set it to 0"
    ):
        load_preset({"stages": [{"at": 2, "method": "vtw", "keep": 0.1}]})


@pytest.mark.parametrize("split", ["uneven", "positions"])
def test_values_that_are_not_there_yet_are_refused(split: str) -> None:
    key = "split" if split == "uneven" else "positions"
    with pytest.raises(PresetError, match=f"{key}: other is not one of"):
        load_preset({"stages": [{"at": 2, "method": "random", key: "other"}]})


@pytest.mark.parametrize(
    "value",
    ["", "x", "-1", "1.5", "100%", "-1%", "nan%", "%", "layer 2", "²", "٣", "true", "INPUT"],
)
def test_what_is_not_a_place_is_refused(value: str) -> None:
    with pytest.raises(PresetError, match="is not a place"):
        load_preset({"stages": [{"at": value, "method": "random"}]})


@pytest.mark.parametrize("value", [True, 1.0, None, [2], {"a": 1}])
def test_a_place_is_text_or_a_whole_number(value: object) -> None:
    with pytest.raises(PresetError, match="is not a place"):
        load_preset({"stages": [{"at": value, "method": "random"}]})


@pytest.mark.parametrize(
    "value", ["nan", ".nan", ".inf", "-.inf", "1" + 400 * "0", "true", "'0.3'", "0", "[0.3]"]
)
def test_a_keep_in_a_file_is_a_number_in_range(tmp_path: Path, value: str) -> None:
    with pytest.raises(PresetError, match=r"line 1: keep: .* is not a number in \(0, 1\]"):
        load_preset(write(tmp_path, f"keep: {value}\nstages:\n  - {{at: 2, method: random}}\n"))


@pytest.mark.parametrize("value", [".inf", "1" + 400 * "0", "0", "-1"])
def test_frames_a_second_are_a_positive_number(tmp_path: Path, value: str) -> None:
    with pytest.raises(PresetError, match=r"line 1: fps: .* is not a number above 0"):
        load_preset(write(tmp_path, f"video: {{fps: {value}}}\n"))


@pytest.mark.parametrize("stages", ["[]", "3", "{at: 2}", "text"])
def test_stages_are_a_list_of_at_least_one(tmp_path: Path, stages: str) -> None:
    with pytest.raises(
        PresetError, match=r"line 1: stages: .* is not a list of at least one stage"
    ):
        load_preset(write(tmp_path, f"stages: {stages}\n"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"mine\.yaml: a preset must be a mapping of keys"),
        ("# nothing\n", "a preset must be a mapping of keys"),
        ("- a\n", "line 1: a preset must be a mapping of keys"),
        ("image: 3\n", "line 1: image must be a mapping of keys"),
        ("keep: 0.3\nkeep: [\n", r"mine\.yaml, line 3: "),
        ("keep: &a 0.3\n", "anchors and aliases are not allowed"),
        ("keep: &a 0.3\nimage: {keep: *a}\n", "anchors and aliases are not allowed"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "anchors and aliases are not allowed"),
        ("keep: !!python/object/apply:os.system ['true']\n", "not valid YAML: could not determine"),
        ("keep: 0.3\n---\nkeep: 0.4\n", "line 2: not valid YAML: but found another document"),
        ("keep: 0.3\nseed: 1\nkeep: 0.5\n", "line 3: keep is given twice"),
        ("stages:\n- at: 2\n  method: random\n  at: 3\n", "line 4: at is given twice"),
        ("? {a: 1}\n: 2\n", "line 1"),
        ("[" * 60_000, "nested more than 20 deep"),
        ("keep: \x00\n", "not valid YAML"),
        ("keep: " + "9" * 5000 + "\n", "not valid YAML"),
        ("description: 2020-13-45\n", "not valid YAML|is not text"),
        ("keep: 0.3\n" * 10_000, f"larger than {LARGEST_FILE} bytes"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_preset_is_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(PresetError, match=match):
        load_preset(write(tmp_path, text))


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00keep", b"\x89PNG\r\n\x1a\n" + bytes(200)])
def test_a_binary_file_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "picture.yaml"
    path.write_bytes(raw)
    with pytest.raises(PresetError, match="can't be read: not UTF-8 text"):
        load_preset(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match="can't be read: Is a directory"):
        read_yaml(tmp_path)


def test_a_place_of_many_digits_is_refused_by_the_model_and_not_by_python() -> None:
    preset = load_preset({"stages": [{"at": "9" * 40, "method": "random"}]})
    with pytest.raises(PresetError, match="this model has 32 decoder layers"):
        resolve_layer(preset.stages_for("image")[0].at, 32, 2, 24)


@pytest.mark.parametrize("name", ["balancd", "", "nope/balanced", "x" * 5000, "a\0b", "/"])
def test_a_preset_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(PresetError, match="neither a packaged one nor a file") as caught:
        load_preset(name)
    assert "packaged: " + ", ".join(preset_names()) in caught.value.hint


def test_a_close_name_is_suggested() -> None:
    with pytest.raises(PresetError) as caught:
        find_preset("balancd")
    assert caught.value.hint.startswith("did you mean balanced?")


# -- packaged presets -----------------------------------------------------------------------------


def test_the_default_preset_is_packaged() -> None:
    assert DEFAULT in preset_names()


@pytest.mark.parametrize("name", preset_names())
def test_a_packaged_preset_is_described_and_short(name: str) -> None:
    assert load_preset(name).description
    assert len(find_preset(name).read_text(encoding="utf-8").splitlines()) <= 15


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_reads_what_it_writes(name: str) -> None:
    preset = load_preset(name)
    told = preset.to_dict()
    assert told.pop("name") == name
    again = load_preset(told)
    assert (again.stages, again.image, again.video) == (preset.stages, preset.image, preset.video)
    assert (again.keep, again.seed) == (preset.keep, preset.seed)


def solve_for(preset: Preset, modality: str, num_layers: int, num_tokens: int):  # type: ignore[no-untyped-def]
    calibration, _ = find_calibration("unknown", num_layers, 4096)
    places: list[Place] = []
    for stage in preset.stages_for(modality):
        if stage.at == "pixels":  # what is left there is not known here
            continue
        if stage.at == "schedule":
            profile = find_profile(stage.method)
            places += [Place(stage.at, layer, profile=profile, part=part)
                       for part, layer in enumerate(profile.layers(num_layers))]  # fmt: skip
            continue
        layer = resolve_layer(stage.at, num_layers, calibration.ecl, calibration.horizon)
        places.append(Place(stage.at, layer, stage.keep))
    return solve(places, preset.keep_for(modality), num_layers, num_tokens)


@pytest.mark.parametrize("num_layers", [6, 16, 24, 28, 32, 80])
@pytest.mark.parametrize("name", preset_names())
def test_a_packaged_preset_meets_its_keep_in_every_model_and_for_every_size(
    name: str, num_layers: int
) -> None:
    preset = load_preset(name)
    for modality, num_tokens in itertools.product(("image", "video"), (17, 64, 576, 2928, 30000)):
        schedule = solve_for(preset, modality, num_layers, num_tokens)
        keep = preset.keep_for(modality)
        assert keep is not None
        assert keep - num_layers / (num_layers * num_tokens) < schedule.keep_mean() <= keep + 1e-6


@pytest.mark.parametrize("name", preset_names())
def test_a_packaged_preset_takes_other_keeps(name: str) -> None:
    for keep in (0.15, 0.5, 0.9):
        preset = override(load_preset(name), keep=keep)
        try:
            schedule = solve_for(preset, "video", 32, 2928)
        except PresetError as error:
            assert name == "long-video"  # its first stage is fixed at one half
            assert "reachable keep" in error.message  # noqa: PT017
        else:
            assert schedule.keep_mean() == pytest.approx(keep, abs=2e-3)


@pytest.mark.parametrize(
    "places", [("4", "4"), ("6", "4"), ("input", "0"), ("60%", "60%"), ("2", "ecl", "1")]
)
def test_stages_that_no_model_has_in_that_order_are_refused(places: tuple[str, ...]) -> None:
    last = len(places) - 1
    stages = [
        {"at": at, "method": "random", **({} if number == last else {"keep": 0.5})}
        for number, at in enumerate(places)
    ]
    with pytest.raises(PresetError, match=f"{places[-1]} comes after {places[0]}"):
        load_preset({"keep": 0.3, "stages": stages})


@pytest.mark.parametrize("place", ["ecl", "horizon"])
def test_two_stages_at_one_named_place_are_refused(place: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"stages:\n  - {{at: {place}, method: random, keep: 0.5}}\n"
        f"  - {{at: {place}, method: fastv, keep: 0.2}}\n"
    )
    with pytest.raises(PresetError, match=rf"line 3: two stages cut at {place}, which is one lay"):
        load_preset(path)


def test_stages_whose_order_a_model_decides_are_taken() -> None:
    for places in (("60%", "2"), ("horizon", "3"), ("input", "1"), ("input", "0%")):
        first, second = places
        stages = [
            {"at": first, "method": "random", "keep": 0.5},
            {"at": second, "method": "random"},
        ]
        assert load_preset({"keep": 0.3, "stages": stages}).stages is not None


# -- budgets in tokens ----------------------------------------------------------------------------


def test_a_number_of_tokens_is_in_the_place_of_every_keep(tmp_path: Path) -> None:
    text = "tokens: 96\nstages:\n  - {at: ecl, method: random}\n"
    preset = load_preset(write(tmp_path, text))
    assert (preset.tokens, preset.keep, preset.keeps_all()) == (96, None, False)
    assert preset.budget_for("video", visual=192, size=64) == (0.5, None)
    assert preset.to_dict()["tokens"] == 96
    flag = override(preset, tokens_after=30)
    assert (flag.tokens, flag.tokens_after) == (None, 30)
    assert flag.budget_for("video", visual=192, size=64) == (None, 10)
    assert dict(flag.changed) == {"tokens_after": 30}
    keep = override(preset, keep=0.2)
    assert (keep.tokens, keep.keep) == (None, 0.2)
    balanced = override(load_preset("balanced"), tokens=40)
    assert (balanced.tokens, balanced.keep, dict(balanced.changed)) == (40, None, {"tokens": 40})


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True, "40", 2**63])
def test_what_is_no_number_of_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(PresetError, match=r"tokens_after .* is (not a whole number|more than)"):
        override(load_preset(None), tokens_after=tokens)


def test_two_budgets_are_refused(tmp_path: Path) -> None:
    text = "keep: 0.3\ntokens: 96\nstages:\n  - {at: ecl, method: random}\n"
    with pytest.raises(PresetError, match=r"keep 0\.3 and tokens 96 are two budgets"):
        load_preset(write(tmp_path, text))
    with pytest.raises(PresetError, match=r"keep 0\.3 and tokens 40 are two budgets"):
        override(load_preset(None), keep=0.3, tokens=40)
    with pytest.raises(PresetError, match="tokens 40 and tokens_after 50 are two budgets"):
        override(load_preset(None), tokens=40, tokens_after=50)


def test_a_number_of_tokens_needs_a_stage_that_is_free() -> None:
    stages = [{"at": "ecl", "method": "random", "keep": 0.5}]
    with pytest.raises(PresetError, match="a budget of 96 tokens sets nothing"):
        load_preset({"tokens": 96, "stages": stages})
