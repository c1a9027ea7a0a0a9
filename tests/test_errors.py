"""Messages: one line, never longer than a screen, and no file or flag makes an internal error."""

from __future__ import annotations

import errno
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from vtprune.cli import cli
from vtprune.cli.config import load_config
from vtprune.errors import (
    LONGEST,
    LONGEST_HINT,
    LONGEST_VALUE,
    MOST_FAULTS,
    PresetError,
    VtpruneError,
    brief,
    brief_path,
    list_faults,
    one_line,
    path_fault,
    path_hint,
    quote,
    shorten,
)
from vtprune.inference.questions_file import read_questions
from vtprune.preset import load_preset, override, preset_directory
from vtprune.preset.calibration import read_calibration
from vtprune.pruners import METHODS, check_options

MEGABYTE = "x" * 10**6


def rows(text: str) -> int:
    """Rows that text takes on a terminal of 80 columns, none of its characters being wide."""
    return sum(max(1, math.ceil(len(line) / 80)) for line in text.splitlines())


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("norm", "'norm'"),
        (0.3, "0.3"),
        (None, "None"),
        ([1, 2], "[1, 2]"),
        ("\x1b[2J\u202e", r"'\x1b[2J\u202e'"),
        ("a" * 100, "'" + "a" * 27 + "..." + "a" * 28 + "'"),
        (10**5000, "a number of about 5,001 digits"),
        (-(10**5000), "a number of about 5,001 digits"),
        ({"a": {"b": {"c": 1}}}, "{'a': {'b': {...}}}"),
    ],
    ids=range(9),
)
def test_a_value_is_shown_as_python_writes_it_but_short(value: object, shown: str) -> None:
    assert quote(value) == shown


@pytest.mark.parametrize(
    "value", [MEGABYTE, [MEGABYTE] * 9, {MEGABYTE: 1}, b"x" * 10**6, 2**99999], ids=range(5)
)
def test_a_value_of_any_size_is_shown_short(value: object) -> None:
    assert len(quote(value)) <= LONGEST_VALUE
    assert len(brief(value)) <= LONGEST_VALUE


def test_a_text_is_shown_as_it_was_given() -> None:
    assert brief("two  words") == "two  words"
    assert brief("\x1b]0;title\x07") == r"\x1b]0;title\x07"
    assert brief(True) == "True"


def test_a_path_is_cut_in_the_middle() -> None:
    shown = brief_path(Path("/data") / ("x" * 300) / "mine.yaml")
    assert re.fullmatch(r"/data/x+\.\.\.x+/mine\.yaml", shown)
    assert brief_path(Path("a\nb.yaml")) == "a b.yaml"


def test_columns_count_not_characters() -> None:
    assert shorten("日" * 50, 100) == "日" * 50
    assert shorten("日" * 51, 100) == "日" * 24 + "..." + "日" * 24


def test_a_line_end_becomes_a_space_and_what_is_not_seen_its_escape() -> None:
    assert one_line("a \n\t b\r\nc  d\x00\xa0\u2028", 80) == r"a b c  d\x00\xa0\u2028"


# -- lists ----------------------------------------------------------------------------------------


def test_a_list_of_faults_ends_after_twenty() -> None:
    faults = [f"line {number}: unknown key 'k{number}'" for number in range(6000)]
    listed = list_faults(faults)
    assert listed.startswith("line 0: unknown key 'k0'; line 1: ")
    assert listed.endswith("line 19: unknown key 'k19'; and 5,980 more")
    assert list_faults(faults[:MOST_FAULTS]).count(";") == MOST_FAULTS - 1
    assert list_faults(faults[:2], 7).endswith("'k1'; and 7 more")
    assert list_faults(["same", "same", "other"]) == "same; other"


def test_long_faults_share_the_room_that_short_ones_leave() -> None:
    listed = list_faults(["short", "a" * 5000, "also short", "b" * 5000]).split("; ")
    assert (listed[0], listed[2]) == ("short", "also short")
    assert len(listed[1]) == len(listed[3]) > 600
    assert listed[1].endswith("a...")


def test_a_message_fits_a_screen_with_its_hint() -> None:
    error = VtpruneError(f"start {MEGABYTE} end", f"try {MEGABYTE}")
    assert error.message.startswith("start x")
    assert error.message.endswith("x end")
    assert len(error.hint) <= LONGEST_HINT
    assert len(error.message) + len(error.hint) <= LONGEST
    assert str(error) == error.message
    assert rows(f"Error: {error.message}\nhint: {error.hint}") <= 24


# -- the command line -----------------------------------------------------------------------------


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "code", "rule"),
    [
        (["-o", MEGABYTE], 1, "is not KEY=VALUE"),
        (["--method", "entropy", "-o", f"norm={MEGABYTE}"], 1, "is not a value of method entropy"),
        (["--method", "entropy", "-o", f"{MEGABYTE}=1"], 1, "method entropy has no option 'xxx"),
        (["-o", f"{MEGABYTE}=1"], 1, "no stage of preset balanced has the option xxx"),
        (["--keep", MEGABYTE], 1, r"is not a fraction in (0, 1]"),
        (["--keep", "1" * 10**6], 1, r"is not a fraction in (0, 1]"),
        (["--keep", f"{MEGABYTE}=0.3"], 1, "which is not image or video"),
        (["--method", MEGABYTE], 1, "unknown method 'xxx"),
        (["--method", "entropy", "--at", MEGABYTE], 1, "is not a place"),
        (["--method", "entropy", "--at", "1" * 10**6], 1, "is not a place"),
        (["--preset", MEGABYTE], 1, "neither a packaged one nor a file"),
        (["--seed", "1" * 4000], 1, "--seed a number of about 4,000 digits is out of range"),
        (["--frames", MEGABYTE], 2, "is not a valid integer"),
        ([f"--{MEGABYTE}"], 2, "No such option"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, list) else "",
)
def test_a_megabyte_on_the_command_line_is_refused_on_a_screen(
    tmp_path: Path, arguments: list[str], code: int, rule: str
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(picture)
    result = invoke("ask", str(picture), "what?", *arguments)
    assert result.exit_code == code
    assert rule in result.stderr
    assert "internal" not in result.stderr
    assert rows(result.stderr) <= 24


@pytest.mark.parametrize(
    "arguments", [[f"--{MEGABYTE}"], [MEGABYTE], ["presets", MEGABYTE]], ids=range(3)
)
def test_a_megabyte_in_place_of_a_command_is_refused_on_a_screen(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "No such" in result.stderr
    assert rows(result.stderr) <= 24


def test_what_steers_a_terminal_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('"\\e[2J": 1\nkeep: "\\e]0;x\\a"\n', encoding="utf-8")
    for arguments in (
        ["presets", "check", str(path)], ["presets", "show", "\x1b[2J\u202e"], ["\x1b[2J"],
        ["ask", "\x1b[2J.mp4", "what?"],
    ):  # fmt: skip
        result = invoke(*arguments)
        assert result.exit_code
        assert "\x1b" not in result.output + result.stderr
        assert "\u202e" not in result.stderr
        assert r"\x1b[2J" in result.stderr


def test_a_preset_of_six_thousand_unknown_keys_is_refused_on_a_screen(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text("".join(f"key{number}: 1\n" for number in range(6000)), encoding="utf-8")
    result = invoke("presets", "check", str(path))
    assert result.exit_code == 1
    assert "line 1: unknown key 'key0'" in result.stderr
    assert "and 5,980 more" in result.stderr
    assert rows(result.stderr) <= 24


# -- what YAML lets through -----------------------------------------------------------------------

VALUES = {
    '!!int ""': "'' is not a value of type int",
    '!!int "x"': "x is not a value of type int",
    "!!int 1:x": "1:x is not a value of type int",
    "!!bool xyz": "xyz is not a value of type bool",
    "!!float x": "x is not a value of type float",
    "!!timestamp x": "x is not a value of type timestamp",
    "2020-13-45": "2020-13-45 is not a value of type timestamp",
    "!!binary a": "failed to decode base64 data",
    "!!binary é": "failed to convert base64 data into ascii",
    "!!python/name:os.system x": "could not determine a constructor",
    "!mine x": "could not determine a constructor",
    "!!omap x": "expected a sequence",
    "1" * 5000: "is not a value of type int",
    "\x00": r"the character U\+0000 is not allowed",
    "\x1b": r"the character U\+001B is not allowed",
    "[" * 10_000: "nested more than 20 deep",
    "&a [1]": "anchors and aliases are not allowed",
    "*a": "anchors and aliases are not allowed",
    "{<<: x}": "expected a mapping or list of mappings for merging",
    "{? [1]: 2}": "found unhashable key",
    "'": "found unexpected end of stream",
}
"""Value -> what is said of it."""


@pytest.mark.parametrize(("value", "problem"), VALUES.items(), ids=[key[:20] for key in VALUES])
def test_a_bad_yaml_value_is_named_with_its_file_and_line(
    tmp_path: Path, value: str, problem: str
) -> None:
    for read in (load_preset, load_config, lambda path: read_calibration(path, 8)):
        path = tmp_path / "mine.yaml"
        path.write_text(f"# first\nseed: {value}\n", encoding="utf-8")
        wanted = problem if value != '!!int ""' else " is not a value of type int"
        with pytest.raises(VtpruneError, match=rf"mine\.yaml, line [23]: .*{wanted}") as caught:
            read(path)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("9223372036854775808", "9223372036854775808 is more than 9223372036854775807"),
        ("0x" + "f" * 5000, r"a number of about 6,02\d digits is more than 9223372036854775807"),
        ("-1", "-1 is not a whole number from 0 on"),
        ("true", "True is not a whole number from 0 on"),
        ("1.0", "1.0 is not a whole number from 0 on"),
        (".nan", "nan is not a whole number from 0 on"),
        ("'7'", "'7' is not a whole number from 0 on"),
    ],
)
def test_a_seed_that_is_none_is_named_with_its_line(tmp_path: Path, value: str, rule: str) -> None:
    path = tmp_path / "mine.yaml"
    stages = "stages:\n  - {at: 2, method: random}\n"
    path.write_text(f"{stages}seed: {value}\n", encoding="utf-8")
    with pytest.raises(PresetError, match=rf"mine\.yaml: line 3: seed: {rule}"):
        load_preset(path)
    path.write_text(f"{stages}seed: 9223372036854775807\n", encoding="utf-8")
    assert load_preset(path).seed == 2**63 - 1


@pytest.mark.parametrize("seed", [2**63, 10**5000, -1, True, 1.0], ids=range(5))
def test_a_seed_that_is_none_is_refused_in_a_call(seed: object) -> None:
    with pytest.raises(PresetError, match=r"^seed .* is (more than|not a whole number)"):
        override(load_preset("balanced"), seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", [10**5000, [10**5000], {"a": 10**5000}, b"x", object()], ids=range(5)
)
def test_a_mapping_of_any_values_is_refused_with_its_faults(value: object) -> None:
    for preset in (
        {"seed": value}, {"keep": value}, {"description": value}, {"stages": value},
        {"image": value}, {"stages": [{"at": value, "method": "random"}]},
        {"stages": [{"at": 2, "method": value}]}, {"stages": [value]},
        {"stages": [{"at": 2, "method": "random", "per": value}]},
        {"stages": [{"at": 2, "method": "entropy", "norm": value}]},
        {"stages": [{"at": "pixels", "method": "predictable", "tolerance": value}]},
    ):  # fmt: skip
        with pytest.raises(PresetError) as caught:
            load_preset(preset)
        listed = ", ".join(METHODS)  # its length is that of what there is
        assert len(caught.value.message.replace(listed, "")) < 160


@pytest.mark.parametrize("method", ["random\n", " random", "Random"])
def test_a_method_is_named_exactly(method: str) -> None:
    with pytest.raises(PresetError, match="unknown method"):
        load_preset({"stages": [{"at": 2, "method": method}]})


def test_a_number_is_an_option_beside_words() -> None:
    for value, taken in (("budget", "budget"), ("0.7", 0.7), (1, 1.0), (0, 0.0)):
        assert check_options("holitom", {"similar": value}) == {"similar": taken}
    for value in ("", "x", "1.1", -0.1, True, None, "nan"):
        with pytest.raises(
            PresetError, match=r"similar: .* is not a value of method holitom"
        ) as no:
            check_options("holitom", {"similar": value})
        assert no.value.hint == "give budget | a number from 0 to 1"
    assert METHODS["entropy"].options[0].values == "none | row"


def test_a_byte_order_mark_is_passed_over_and_bad_bytes_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: a\n")
    assert load_config(path).model == "a"
    path.write_bytes(b"model: a\ndevice: \xff\n")
    with pytest.raises(VtpruneError, match=r"mine\.yaml, line 2: can't be read: not UTF-8 text"):
        load_config(path)
    path.write_bytes(b'{"file": "a"}\n\n\xed\xa0\x80')
    with pytest.raises(VtpruneError, match=r"mine\.yaml, line 3: can't be read: not UTF-8 text"):
        read_questions(path)


# -- mutated files --------------------------------------------------------------------------------

PIECES = [
    *(key.encode() for key in VALUES if len(key) < 100), b"0x" + b"f" * 5000, b"1" * 5000,
    b"[" * 300, b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"\xed\xa0\x80", b"\r", b"\t",
    b'"\\ud800"', b".nan", b".inf", b"1e400", b"-1", b"true", b"~", b"---\n", b"- ", b": ", b"'",
    b"a" * 3000, b"\xe6\x97\xa5" * 800, b"keep: 0.3\nkeep: 0.4", b"{}", b"[]", b"1:59:59", b"1_000",
    b'"' + b"k" * 3000 + b'": 1,', b"null", b"NaN", b"\\", b'"choices": [1],',
]  # fmt: skip
CALIBRATION = b"""model_type: llava
layers: 8
hidden_size: 64
ecl: 2
horizon: 6
sources: {ecl: "measured: 50 pictures"}
"""
CONFIG = b"model: a\npreset: balanced\ndevice: cpu\nmax_new_tokens: 5\n"
QUESTIONS = b'{"file": "a.png", "question": "what?", "choices": ["a"], "kind": "colour"}\n' * 3
READERS: dict[str, tuple[list[bytes], Callable[[Path], object]]] = {
    "preset": (
        [path.read_bytes() for path in sorted(preset_directory().glob("*.yaml"))],
        lambda path: load_preset(path).to_dict(),
    ),
    "calibration": ([CALIBRATION], lambda path: read_calibration(path, 8, hidden=64)),
    "config": ([CONFIG], load_config),
    "questions": ([QUESTIONS], read_questions),
}


def mutate(raw: bytes, draw: random.Random) -> bytes:
    """A file with one to four changes: a value replaced, a piece put in or taken out, a byte."""
    changed = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        kind, place = draw.random(), draw.randrange(len(changed) + 1)
        values = [found.end() for found in re.finditer(rb": ", bytes(changed))]
        if kind < 0.4 and values:
            start = draw.choice(values)
            rest = re.match(rb"[^,}\n]*", bytes(changed[start:]))
            assert rest is not None
            changed[start : start + rest.end()] = draw.choice(PIECES)
        elif kind < 0.7:
            changed[place:place] = draw.choice(PIECES)
        elif kind < 0.85:
            del changed[place : place + draw.randint(1, 12)]
        elif changed:
            changed[min(place, len(changed) - 1)] = draw.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("kind", READERS)
def test_a_mutated_file_is_read_or_refused_on_a_screen(kind: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    seeds, read = READERS[kind]
    path = tmp_path / "mine.txt"
    refused: list[VtpruneError] = []
    for _ in range(150):
        path.write_bytes(mutate(draw.choice(seeds), draw))
        try:
            read(path)
        except VtpruneError as error:
            refused.append(error)
    assert len(refused) > 75
    for error in refused:
        assert error.message.isprintable()
        assert rows(f"Error: {error.message}\nhint: {error.hint}") <= 24


def test_a_wrong_path_is_told_the_nearest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part that is not there is what was misspelt; what follows it has to be there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips" / "day").mkdir(parents=True)
    (tmp_path / "clips" / "day" / "walk.mp4").write_bytes(b"")
    right = os.path.join("clips", "day", "walk.mp4")
    for wrong in ("clip/day/walk.mp4", "clips/dy/walk.mp4", "clips/day/wolk.mp4"):
        assert path_hint(wrong) == f"did you mean {right}?"
    assert path_hint(str(tmp_path / "clips" / "dayx")).endswith(os.path.join("clips", "day?"))
    for other in (right, "clip/day/none.mp4", "zzz.mp4", "a\0b", "x" * 5000, ""):
        assert path_hint(other, "look") == "look"


@pytest.mark.parametrize("refuse", [open, os.stat, os.mkdir, os.scandir, os.path.realpath])
def test_what_is_no_name_is_refused_in_the_same_words(refuse: Callable[[str], object]) -> None:
    """Python's own differ: an embedded null byte, or "stat: embedded null character in path"."""
    for name in ("a\0b", "a\ud800b"):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            refuse(name)
        assert path_fault(raised.value) == "not a file's name"
    with pytest.raises(OSError, match="too long") as too_long:
        os.stat("x" * 5000)
    assert path_fault(too_long.value) == os.strerror(errno.ENAMETOOLONG)


def test_every_path_of_a_command_is_told_the_nearest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "clips" / "walk.mp4", "PNG")
    for name in ("asked.jsonl", "mine.yaml", "secret.key"):
        (tmp_path / "clips" / name).write_text("x")
    for arguments in (
        ["ask", "clip/walk.mp4", "what?"],
        ["batch", "clip", "-q", "what?"],
        ["batch", "clips/aked.jsonl"],
        ["evaluate", "clips/aked.jsonl"],
        ["ask", "clips/walk.mp4", "what?", "--preset", "clips/mne.yaml"],
        ["ask", "clips/walk.mp4", "what?", "--calibration", "clips/mne.yaml"],
        ["ask", "clips/walk.mp4", "what?", "--model", "./clps"],
        ["ask", "clips/walk.mp4", "what?", "--save", "clps/a.json"],
        ["profile", "--video", "clips/wlk.mp4"],
        ["serve", "--media-root", "clps"],
        ["serve", "--api-key-file", "clips/secret.ky"],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert (result.exit_code, "hint: did you mean clips" in result.stderr) == (1, True), (
            arguments, result.stderr,
        )  # fmt: skip
