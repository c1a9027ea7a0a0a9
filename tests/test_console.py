"""What a report looks like on a terminal."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest
from reports import report_of
from rich.console import Console

from vtprune.cli import console, output
from vtprune.cli.console import values
from vtprune.models import FAMILIES
from vtprune.models.names import aliases
from vtprune.preset import load_preset, preset_names
from vtprune.pruners import METHODS

REPORT: dict[str, Any] = {
    "question": "what happens?",
    "answer": "A red circle moves to the right.",
    "model": {
        "name": "llava-onevision-7b", "family": "llava_onevision", "layers": 28,
        "parameters": 8_030_348_832, "device": "cuda:0", "dtype": "bfloat16", "attention": "sdpa",
    },
    "input": {
        "files": ["/data/clip.mp4"], "modality": "video", "frames": 32, "tiles": 0,
        "timestamps": [i * 1.355 for i in range(32)], "decoder": "decord", "duration": 42.03,
        "width": 1280, "height": 720,
    },
    "preset": {"name": "balanced", "keep": 0.3, "seed": 0, "method": None, "changed": {}},
    "tokens": {
        "visual": 6272, "text": 45, "answer": 12, "keep_mean": 0.3, "kept_after": 313,
        "by_modality": {"video": 313},
        "stages": [
            {"at": "ecl", "layer": 2, "modality": "all", "method": "entropy",
             "options": {"norm": "row"}, "before": 6272, "after": 2212},
            {"at": "horizon", "layer": 21, "modality": "all", "method": "random", "options": {},
             "before": 2212, "after": 313},
        ],
        "by_frame": [10] * 32, "by_tile": [],
    },
    "flops": {
        "vision": 12.3e12, "prefill": 33.5e12, "prefill_full": 105.7e12, "decode": 0.2e12,
        "decode_full": 0.23e12, "reduction": 0.683,
    },
    "kv_cache_bytes": {"kept": 108_000_000, "full": 360_000_000, "state": 0},
    "memory_bytes": {"weights": 16_100_000_000, "peak": 18_400_000_000},
    "seconds": {
        "startup": 6.25, "load": 8.31, "media": 0.42, "preprocess": 0.081, "vision": 0.31,
        "select": 0.0093, "prefill": 0.52, "decode": 0.4, "first_token": 0.95, "total": 16.4,
    },
    "warnings": [],
    "version": {"vtprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
}  # fmt: skip
COMPARE = {
    "answer": "A red circle moves right.", "same_answer": False,
    "seconds": {"vision": 0.3, "prefill": 1.1, "decode": 0.4, "first_token": 1.6, "total": 2.2},
    "prefill_speedup": 2.11, "prefill_predicted": 3.16, "prefill_roofline": 2.8,
    "realised_fraction": 0.668, "first_token_speedup": 1.68, "total_speedup": 1.47,
}  # fmt: skip


def rendered(report: Mapping[str, object], width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    console.render(
        report_of(report), Console(file=file, width=width, highlight=False, markup=False)
    )
    file.flush()
    return "\n".join(line.rstrip() for line in raw.getvalue().decode(encoding).split("\n"))


def test_what_a_tower_that_was_given_less_would_have_cost_is_not_told() -> None:
    stage = {"at": "pixels", "layer": 0, "modality": "all", "method": "downsample", "options": {},
             "before": 6272, "after": 313}  # fmt: skip
    report = {**REPORT, "tokens": {**REPORT["tokens"], "stages": [stage]}}
    lines = rendered(report).splitlines()
    shown = {name: next(line for line in lines if name in line) for name in ("vision ", "prefill ")}
    assert shown["vision "].split() == ["compute", "vision", "12.3", "TFLOP"]
    assert "33.5 of 106 TFLOP" in shown["prefill "]
    assert next(line for line in lines if "total" in line).split() == ["total", "46.0", "TFLOP"]


def test_report_at_80_columns() -> None:
    assert (
        rendered(REPORT)
        == """
read      clip.mp4: video 1280 x 720, 42.03 s, 32 frames at 0.0, 1.4 ... 42.0 s
          (decord)
model     llava-onevision-7b: 8.03 B parameters, 28 layers, cuda:0, bfloat16,
          sdpa
preset    balanced, keep 0.3 on average over the layers, seed 0

prompt    6,272 visual tokens, 45 of text; the answer has 12
tokens    entropy, layer 2 (ecl)          2,212 of 6,272  █████░░░░░░░░░   35.3%
          random, layer 21 (horizon)        313 of 6,272  █░░░░░░░░░░░░░    5.0%
          layer average                   1,882 of 6,272  ████░░░░░░░░░░   30.0%
          left in a frame                       10 to 10
compute   vision                      12.3 of 12.3 TFLOP  ██████████████  100.0%
          prefill                      33.5 of 106 TFLOP  ████░░░░░░░░░░   31.7%
          decode                        200 of 230 GFLOP  ████████████░░   87.0%
          total                        46.0 of 118 TFLOP  █████░░░░░░░░░   38.9%
memory    KV cache                         108 of 360 MB  ████░░░░░░░░░░   30.0%
          weights 16.1 GB, peak 18.4 GB

time      startup 6.25 s, load 8.31 s, media 0.42 s, preprocess 81 ms, vision
          0.31 s
          prefill 0.52 s (selection 9.3 ms), decode 0.40 s, first token 0.95 s
          total 16.40 s since the command's start
"""
    )


def test_comparison_shows_speed_ups_and_both_answers() -> None:
    text = rendered({**REPORT, "compare": COMPARE}, width=100)
    assert (
        text[text.index("compare") :]
        == """compare   medians                unpruned  speed-up
          prefill                  1.10 s    2.11 x
          first token              1.60 s    1.68 x
          total without loading    2.20 s    1.47 x
          prefill predicted from FLOPs: 3.16 x, of which 67% is realised; roofline estimate: 2.80 x
          unpruned  A red circle moves right.
          pruned    A red circle moves to the right.
"""
    )


def test_same_answer_is_said_once() -> None:
    text = rendered({**REPORT, "compare": {**COMPARE, "same_answer": True}})
    assert "the unpruned answer is the same" in text
    assert "A red circle" not in text


@pytest.mark.parametrize(
    ("prefill", "total", "line"),
    [
        (1.04, 1.2, "pruning does not pay here: 1.04 x"),
        (0.8, 0.9, "pruning does not pay here: 0.80 x"),
        (1.8, 1.01, "pruning does not pay here: prefill 1.80 x, the whole 1.01 x"),
    ],
)
def test_pruning_that_does_not_pay_is_said(prefill: float, total: float, line: str) -> None:
    compare = {**COMPARE, "prefill_speedup": prefill, "total_speedup": total}
    assert line in rendered({**REPORT, "compare": compare})


def test_pruning_that_pays_is_not_called_useless() -> None:
    assert "does not pay" not in rendered({**REPORT, "compare": COMPARE})


def test_bars_are_ascii_where_the_terminal_is() -> None:
    text = rendered(REPORT, encoding="ascii")
    assert "#####........." in text


def test_warnings_come_last() -> None:
    text = rendered({**REPORT, "warnings": ["one", "two"]})
    assert text.endswith("\nwarning   one\nwarning   two\n")


def test_a_further_question_says_only_what_is_new() -> None:
    first = {**REPORT, "warnings": ["old"]}
    file = io.StringIO()
    second = {**first, "warnings": ["old", "new"]}
    console.render(report_of(second), Console(file=file), report_of(first))
    assert file.getvalue().startswith("\nprompt ")
    assert "warning   new" in file.getvalue()
    assert "old" not in file.getvalue()


def test_stages_of_one_modality_are_shares_of_its_tokens() -> None:
    stages = [
        {"at": "input", "layer": 0, "modality": "video", "method": "uniform", "before": 400,
         "after": 100},
        {"at": "2", "layer": 2, "modality": "image", "method": "entropy", "before": 800,
         "after": 400},
    ]  # fmt: skip
    tokens = {**REPORT["tokens"], "visual": 1200, "stages": stages}
    text = " ".join(rendered({**REPORT, "tokens": tokens}).split())
    assert "video: uniform, input 100 of 400" in text
    assert "image: entropy, layer 2 400 of 800" in text


@pytest.mark.parametrize(
    ("preset", "told"),
    [
        ({"keep": 0.3}, "balanced, keep 0.3 on average over the layers, seed 0"),
        ({"keep": None}, "balanced, seed 0"),
        (
            {"keep": 0.3, "image": {"keep": 0.5}},
            "balanced, keep image 0.5, video 0.3 on average over the layers, seed 0",
        ),
        (
            {"keep": None, "video": {"keep": 0.2}},
            "balanced, keep video 0.2 on average over the layers, seed 0",
        ),
        (
            {"keep": None, "tokens": 1, "changed": {"stream": {"frames": 32, "share": "equal"}}},
            "balanced (stream.frames=32, stream.share=equal), at most 1 visual\n"
            "          token on average over the layers, seed 0",
        ),
    ],
)
def test_the_keep_that_was_asked_for_is_shown(preset: dict[str, object], told: str) -> None:
    text = rendered({**REPORT, "preset": {"name": "balanced", "seed": 0, **preset}})
    assert f"preset    {told}\n" in text


def test_mixed_media_show_what_is_left_of_each() -> None:
    tokens = {**REPORT["tokens"], "kept_after": 400, "by_modality": {"image": 100, "video": 300}}
    text = " ".join(rendered({**REPORT, "tokens": tokens}).split())
    assert "image, of what is left 100 of 400" in text
    assert "video, of what is left 300 of 400" in text


def test_tokens_left_in_frames_and_tiles_are_a_range() -> None:
    tokens = {**REPORT["tokens"], "by_frame": [9, 12, 10], "by_tile": [3, 0]}
    text = " ".join(rendered({**REPORT, "tokens": tokens}).split())
    assert "left in a frame 9 to 12 left in a tile 0 to 3" in text


def test_a_picture_has_tiles_and_no_frames() -> None:
    source = {
        "files": ["page.png"], "modality": "image", "frames": 0, "tiles": 5, "timestamps": [],
        "decoder": "pillow", "duration": 0.0, "width": 1700, "height": 2200,
    }  # fmt: skip
    line = rendered({**REPORT, "input": source}).splitlines()[1]
    assert line == "read      page.png: image 1700 x 2200, 5 tiles (pillow)"


def test_a_prompt_without_visual_tokens_is_shown() -> None:
    tokens = {**REPORT["tokens"], "visual": 0, "stages": [], "keep_mean": 1.0}
    text = " ".join(rendered({**REPORT, "tokens": tokens}).split())
    assert "layer average 0 of 0" in text


def test_control_characters_do_not_reach_the_terminal() -> None:
    source = {**REPORT["input"], "files": ["/data/\x1b[2Jclip.mp4"]}
    compare = {**COMPARE, "answer": "\x1b]0;title\x07done"}
    text = rendered({**REPORT, "input": source, "compare": compare})
    assert "\x1b" not in text
    assert "\x07" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = rendered({**REPORT, "compare": COMPARE, "warnings": ["word " * 60]}, width)
    assert max(len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (7, "7.00 "), (999, "999 "), (999.6, "1.00 k"), (3.347e12, "3.35 T"),
     (95.8e6, "95.8 M"), (4e18, "4.00e+03 P")],
)  # fmt: skip
def test_numbers_have_three_digits_and_a_prefix(number: float, text: str) -> None:
    assert values.si(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 ms"), (0.0093, "9.3 ms"), (0.00996, "10 ms"), (0.0994, "99 ms"),
     (0.0996, "0.10 s"), (12.345, "12.35 s")],
)  # fmt: skip
def test_seconds_are_at_their_own_scale(seconds: float, text: str) -> None:
    assert values.duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_on_a_terminal_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    seconds = iter([0, 2, 6])  # the wait before the first frame counts
    monkeypatch.setattr("vtprune.cli.console.terminal.time.monotonic", lambda: next(seconds))
    line = console.ProgressLine(Console(file=file, width=80, force_terminal=True))
    line.update("decoding clip.mp4", 0, 8)
    line.update("decoding clip.mp4", 2, 8)
    monkeypatch.undo()
    line.stop()
    assert "decoding clip.mp4" in file.getvalue()
    assert "2 of 8" in file.getvalue()
    assert "0:00:12 left" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize(("file", "silent"), [(io.StringIO(), False), (Terminal(), True)])
def test_progress_is_silent_without_a_terminal_and_when_quiet(
    file: io.StringIO, silent: bool
) -> None:
    line = console.ProgressLine(Console(file=file, force_terminal=True), silent=silent)
    line.update("loading", 0, 1)
    line.stop()
    assert file.getvalue() == ""


def test_without_a_terminal_a_plain_line_shows_at_most_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([0, 3, 10, 12, 19, 25, 35])
    monkeypatch.setattr("vtprune.cli.console.terminal.time.monotonic", lambda: next(seconds))
    file = io.StringIO()
    line = console.ProgressLine(Console(file=file, width=80))
    for done in range(1, 5):  # at 3, 10, 12 and 19 seconds
        line.update("loading weights (MB)", 1000 * done, 15_000)
    line.update("checking", 0, 1)  # at 25
    line.update("checking", 0, 1)  # at 35
    assert file.getvalue().splitlines() == [
        "loading weights (MB) 2,000 of 15,000, 143 a second, 0:01:31 left", "checking", "checking",
    ]  # fmt: skip


def test_a_plain_line_has_the_rate_of_its_own_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0, 5, 20, 100, 140])
    monkeypatch.setattr("vtprune.cli.console.terminal.time.monotonic", lambda: next(seconds))
    file = io.StringIO()
    line = console.ProgressLine(Console(file=file, width=80))
    line.update("loading", 1, 9)
    line.update("loading", 9, 9)
    line.update("answering", 40, 200)  # that many are in the file already
    line.update("answering", 60, 200)
    assert file.getvalue().splitlines() == [
        "loading 9 of 9, 0.53 a second, 0:00:00 left",
        "answering 40 of 200",
        "answering 60 of 200, 0.50 a second, 0:04:40 left",
    ]


def test_no_color_means_no_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console.render(report_of(REPORT), console.stderr_console())
    assert "clip.mp4" in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()


def shown(show: Any, values: Any, width: int = 80) -> str:
    file = io.StringIO()
    show(values, Console(file=file, width=width, highlight=False, markup=False))
    return file.getvalue()


def test_every_method_is_one_line_and_its_details_name_its_options() -> None:
    rows = shown(console.show_methods, METHODS).splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [[name, METHODS[name].at] for name in METHODS]
    for name, method in METHODS.items():
        details = shown(lambda one, to, name=name: console.show_method(name, one, "", to), method)
        assert details.startswith(f"{name}: {method.summary}")
        for option in method.options:
            assert f"(default {option.format_value(option.default)})" in details
            assert f"\n{option.name} " in details


def test_every_preset_is_one_line() -> None:
    presets = [load_preset(name) for name in preset_names()]
    rows = shown(console.show_presets, presets).partition("\n\n")[0].splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [
        [preset.name, f"{preset.keep:g}"] for preset in presets
    ]
    assert "farthest-point selection over features" in rows[1]


def test_every_model_is_shown_and_guesses_are_marked() -> None:
    found = [alias for alias in aliases() if alias.model_type in FAMILIES]
    text = shown(console.show_models, found)
    facts, *others = text.split("\n\n")  # what 80 columns don't hold is in a table of its own
    rows = {line.split()[0]: line.split()[1:] for line in facts.splitlines()}
    assert rows["qwen2.5-vl-7b"][:4] == ["qwen2_5_vl", "7B", "28", "1"]
    assert len(rows) == len(found) + 1
    assert rows["llava-onevision-7b"][3] == "(2)"
    assert all(alias.name in "".join(others) for alias in found)


def test_a_model_is_shown_with_who_measured_it() -> None:
    alias = next(alias for alias in aliases() if alias.name == "qwen2.5-vl-7b")
    text = " ".join(shown(console.show_model, alias).split())
    assert text.startswith("qwen2.5-vl-7b: Qwen/Qwen2.5-VL-7B-Instruct")
    assert "layer 1: entropy collapse layer (released code (arXiv 2602.17196" in text


def test_a_long_import_is_told_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "IMPORT_SECONDS", 0.05)
    for terminal, quiet, told in ((True, False, True), (True, True, False), (False, False, False)):
        written = io.StringIO()
        console = Console(file=written, force_terminal=terminal, width=80, legacy_windows=False)
        monkeypatch.setattr(written, "isatty", lambda shown=terminal: shown)
        monkeypatch.setattr(output, "stderr_console", lambda shown=console: shown)
        with output.importing(quiet):
            time.sleep(0.3)
        assert (output.IMPORTING in written.getvalue()) == told
        before = len(written.getvalue())
        time.sleep(0.15)
        assert len(written.getvalue()) == before  # nothing comes afterwards
        with output.importing(quiet):
            pass  # a short one is not told
        assert len(written.getvalue()) == before
