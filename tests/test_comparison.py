"""A comparison as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from reports import compare_of, tokens_of
from rich.console import Console

from vtprune.cli.console.comparison import show_comparison, show_notes
from vtprune.evaluation.comparison import COLUMNS, Comparison, ComparisonRow
from vtprune.inference.report import Flops, InputInfo, KvCacheBytes, ModelInfo, Versions

SECONDS = {"vision": 0.3, "prefill": 0.62, "decode": 0.1, "first_token": 0.9, "total": 1.1}


def row(role: str, method: str, after: list[tuple[str, int, int]], **values: Any) -> ComparisonRow:
    """A row that kept so many of 129 tokens of 16 layers; `after`: (place, layer, count)."""
    before, stages = 129, []
    for at, layer, count in after:
        stages.append({"at": at, "layer": layer, "modality": "all", "method": method,
                       "options": {}, "before": before, "after": count})  # fmt: skip
        before = count
    tokens = {"visual": 129, "text": 8, "answer": 4, "keep_mean": 0.3 if after else 1.0,
              "kept_after": before, "by_modality": {"video": before}, "stages": stages,
              "by_frame": [], "by_tile": []}  # fmt: skip
    prefill = 0.6e9 if after else 1.8e9
    flops = {"vision": 1.2e9, "prefill": prefill, "prefill_full": 1.8e9, "decode": 4e7,
             "decode_full": 4e7, "reduction": 1 - prefill / 1.8e9}  # fmt: skip
    seconds = {"media": 0.1, "preprocess": 0.01, "vision": 0.3, "select": 0.02, "prefill": 0.26,
               "decode": 0.1, "first_token": 0.61, "total": 0.81}  # fmt: skip
    compare = {"answer": "red cross", "same_answer": False, "seconds": SECONDS,
               "prefill_speedup": 2.4, "prefill_predicted": 3.0, "prefill_roofline": 2.8,
               "realised_fraction": 0.8, "first_token_speedup": 1.5,
               "total_speedup": 1.2}  # fmt: skip
    defaults: dict[str, Any] = {
        "at": ", ".join(at for at, _, _ in after), "keep": 0.3, "answer": "blue cross",
        "same_answer": False, "tokens": tokens_of(tokens), "flops": Flops(**flops),
        "seconds": seconds,
        "kv_cache_bytes": KvCacheBytes(kept=600_000, full=1_800_000),
        "compare": compare_of(compare) if after else None,
    }  # fmt: skip
    return ComparisonRow(role, method, {"name": method, "stages": stages}, **{**defaults, **values})


COMPARISON = Comparison(
    question="what?",
    model=ModelInfo(name="embedded", family="llava_onevision", layers=16, parameters=7_140_000,
                    device="cpu", dtype="float32", attention="sdpa"),
    input=InputInfo(files=["/data/clip.mp4"], modality="video", frames=8, tiles=0,
                    timestamps=[0.0, 0.4, 0.8], decoder="decord", duration=3.0, width=224,
                    height=224),
    rows=(
        row("unpruned", "unpruned", [], keep=1.0, answer="red cross", same_answer=True),
        row("asked", "entropy", [("ecl", 2, 33)]),
        row("baseline", "random", [("2", 2, 33)], beside=("entropy",), answer="red cross",
            same_answer=True),
        row("baseline", "uniform", [("input", 0, 38)]),
    ),
    pairs=5,
    seconds={"startup": 3.0, "load": 2.0, "total": 9.0},
    warnings=("careful",),
    version=Versions(vtprune="0.1.0", torch="2.13.0", transformers="5.23.0"),
)  # fmt: skip
FAILED = ComparisonRow(
    "asked", "reader", {"name": "reader"}, "input", 0.3, error="it reads text (ask)"
)
PRESET = replace(
    row("asked", "", [("ecl", 2, 75), ("horizon", 12, 6)]), method=None, preset={"name": "mine"},
    keep=None,
)  # fmt: skip


def with_vision(row: ComparisonRow, flops: float) -> ComparisonRow:
    """The row as if its vision tower took so many FLOPs."""
    assert row.flops is not None
    return replace(row, flops=replace(row.flops, vision=flops))


def shown(comparison: Comparison, width: int = 120) -> str:
    file = io.StringIO()
    show_comparison(comparison, Console(file=file, width=width, highlight=False))
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n"))


def notes(comparison: Comparison, width: int = 100) -> str:
    file = io.StringIO()
    show_notes(comparison, Console(file=file, width=width, highlight=False))
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n"))


def test_table_at_120_columns() -> None:
    assert (
        shown(COMPARISON)
        == """\
          cuts at  kept    mean   FLOPs  prefill  first token  realised  same  answer
unpruned            129  100.0%  1.80 G   0.26 s       0.61 s             yes  red cross

keep 0.3
entropy   2 (ecl)    33   30.0%   33.3%   2.40 x       1.50 x       80%    no  blue cross
  random  2          33   30.0%   33.3%   2.40 x       1.50 x       80%   yes  red cross
uniform   input      38   30.0%   33.3%   2.40 x       1.50 x       80%    no  blue cross
"""
    )


def test_answers_follow_the_table_on_a_narrow_terminal() -> None:
    assert (
        shown(COMPARISON, 80)
        == """\
                                                   first
          cuts at  kept    mean   FLOPs  prefill   token  realised  same
unpruned            129  100.0%  1.80 G   0.26 s  0.61 s             yes

keep 0.3
entropy   2          33   30.0%   33.3%   2.40 x  1.50 x       80%    no
  random  2          33   30.0%   33.3%   2.40 x  1.50 x       80%   yes
uniform   input      38   30.0%   33.3%   2.40 x  1.50 x       80%    no

answer    red cross
          unpruned; random at 2, keep 0.3
answer    blue cross
          entropy at 2, keep 0.3; uniform at input, keep 0.3
"""
    )


def test_a_row_that_failed_shows_why() -> None:
    text = shown(replace(COMPARISON, rows=(*COMPARISON.rows, FAILED)))
    line = next(line for line in text.splitlines() if line.startswith("reader"))
    assert line.split() == ["reader", "input", *"-------", *["it", "reads", "text", "(ask)"]]
    narrow = shown(replace(COMPARISON, rows=(*COMPARISON.rows, FAILED)), 80)
    assert narrow.endswith("not run   it reads text (ask)\n          reader at input, keep 0.3\n")


def test_a_preset_with_keeps_of_its_own_stands_apart() -> None:
    text = shown(replace(COMPARISON, rows=(*COMPARISON.rows, PRESET)))
    heading, line = text.splitlines()[-2:]
    assert heading == "own keeps"
    assert line.startswith("mine       2 (ecl), 12 (horizon)  75, 6")


def test_without_measuring_there_are_no_columns_of_times() -> None:
    rows = tuple(replace(one, seconds=None, compare=None) for one in COMPARISON.rows)
    text = shown(replace(COMPARISON, rows=rows, pairs=0))
    assert text.splitlines()[0].split() == [
        "cuts", "at", "kept", "mean", "FLOPs", "same", "answer",
    ]  # fmt: skip
    told = notes(replace(COMPARISON, rows=rows, pairs=0))
    assert "speed-up" not in told


def test_the_tower_has_a_column_where_some_row_spares_it() -> None:
    rows = (*COMPARISON.rows[:3], with_vision(COMPARISON.rows[3], 0.3e9))
    found = replace(COMPARISON, rows=rows)
    assert "vision" not in shown(COMPARISON)
    assert "vision" in shown(found).splitlines()[0]
    assert "25.0%" in shown(found).splitlines()[-1]
    assert "vision, FLOPs: of tower and prefill" in notes(found)


def test_names_are_whole_at_80_columns() -> None:
    spared = with_vision(row("baseline", "downsample", [("pixels", 0, 38)]), 4e8)
    beside = row("baseline", "uniform", [("2", 2, 33)], beside=("entropy",))
    lines = shown(replace(COMPARISON, rows=(*COMPARISON.rows, beside, spared)), 80).splitlines()
    end = lines.index("", lines.index("keep 0.3"))
    names = [line.split()[0] for line in lines[lines.index("keep 0.3") + 1 : end]]
    assert names == ["entropy", "random", "uniform", "uniform", "downsample"]
    assert max(map(len, lines)) <= 80


def test_notes_say_what_was_read_and_how_to_read_the_table() -> None:
    assert (
        notes(COMPARISON)
        == """
read      clip.mp4: video 224 x 224, 3.00 s, 8 frames at 0.0, 0.4, 0.8 s (decord)
model     embedded: 7.14 M parameters, 16 layers, cpu, float32
table     kept: tokens after each cut; mean: kept fraction over the layers
          FLOPs: of the prefill, relative to the unpruned model's
          prefill, first token: speed-ups, medians of 5 pairs of runs
          realised: prefill speed-up as a share of what the FLOPs predict
warning   careful
"""
    )


@pytest.mark.parametrize(
    ("prefill", "total", "line"),
    [
        (1.02, 1.2, "pruning does not pay here: 1.02 x at best"),
        (1.8, 1.01, "pruning does not pay here: prefill 1.80 x, the whole 1.01 x at best"),
    ],
)
def test_pruning_that_does_not_pay_is_said(prefill: float, total: float, line: str) -> None:
    asked = COMPARISON.rows[1]
    assert asked.compare is not None
    slow = replace(asked.compare, prefill_speedup=prefill, total_speedup=total)
    rows = (COMPARISON.rows[0], replace(asked, compare=slow), *COMPARISON.rows[2:])
    assert line in notes(replace(COMPARISON, rows=rows))
    assert "does not pay" not in notes(COMPARISON)


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    long = replace(PRESET, answer="word " * 60)
    found = replace(COMPARISON, rows=(*COMPARISON.rows, long, FAILED), warnings=("word " * 60,))
    for text in (shown(found, width), notes(found, width)):
        assert max(len(line) for line in text.splitlines()) <= width


def test_control_characters_do_not_reach_the_terminal() -> None:
    odd = replace(COMPARISON.rows[1], answer="\x1b[2Jblue", preset={"name": "\x07"}, method=None)
    failed = replace(FAILED, error="\x1b]0;x\x07")
    found = replace(COMPARISON, rows=(*COMPARISON.rows, odd, failed), warnings=("\x1b[2J",))
    for text in (shown(found), shown(found, 80), notes(found)):
        assert "\x1b" not in text
        assert "\x07" not in text


# JSON and CSV


def test_the_json_has_these_fields() -> None:
    told = COMPARISON.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert set(told) == {
        "question", "model", "input", "rows", "pairs", "seconds", "warnings", "version", "host",
    }  # fmt: skip
    base, asked, beside = told["rows"][:3]  # type: ignore[index]
    fields = {"role", "method", "preset", "at", "keep", "answer", "same_answer", "tokens", "flops",
              "kv_cache_bytes", "seconds"}  # fmt: skip
    assert set(base) == fields
    assert set(asked) == fields | {"compare"}
    assert set(beside) == fields | {"compare", "beside"}
    assert set(FAILED.to_dict()) == {"role", "method", "preset", "at", "keep", "error"}
    assert (PRESET.to_dict()["method"], PRESET.to_dict()["keep"]) == (None, None)


def test_the_csv_has_every_column_in_every_line() -> None:
    found = replace(COMPARISON, rows=(*COMPARISON.rows, PRESET, FAILED))
    lines = list(csv.reader(io.StringIO(found.to_csv())))
    assert tuple(lines[0]) == COLUMNS
    assert {len(line) for line in lines} == {len(COLUMNS)}
    cells = [dict(zip(COLUMNS, line, strict=True)) for line in lines[1:]]
    assert [one["method"] for one in cells] == [
        "unpruned", "entropy", "random", "uniform", "", "reader",
    ]  # fmt: skip
    assert cells[1]["stages"] == "2:33"
    assert (cells[4]["preset"], cells[4]["stages"], cells[4]["keep"]) == ("mine", "2:75 12:6", "")
    assert cells[2]["beside"] == "entropy"
    assert (cells[1]["prefill_speedup"], cells[0]["prefill_speedup"]) == ("2.4", "")
    assert (cells[5]["error"], cells[5]["prefill_flops"]) == ("it reads text (ask)", "")


def test_every_line_of_the_csv_says_what_was_asked_of_which_model() -> None:
    found = replace(COMPARISON, input=replace(COMPARISON.input, files=["/data/a.png", "b b.png"]))
    for line in csv.DictReader(io.StringIO(found.to_csv())):
        assert (line["model"], line["device"], line["dtype"]) == ("embedded", "cpu", "float32")
        assert line["file"] == "/data/a.png; b b.png"
        assert (line["question"], line["repeats"]) == ("what?", "5")


def test_loading_is_in_no_row_but_beside_them() -> None:
    told = COMPARISON.to_dict()
    assert told["seconds"] == {"startup": 3.0, "load": 2.0, "total": 9.0}
    assert not any("load" in row["seconds"] for row in told["rows"])  # type: ignore[attr-defined]
    lines = list(csv.DictReader(io.StringIO(COMPARISON.to_csv())))
    assert "load_seconds" not in lines[0]
    # 0.1 of media, 0.61 to the first token, 0.1 of decoding
    assert [float(line["total_seconds"]) for line in lines] == [0.81] * 4


def test_the_options_of_a_method_are_in_its_name_and_in_every_format() -> None:
    asked = COMPARISON.rows[1]
    assert asked.tokens is not None
    stage = replace(asked.tokens.stages[0], options={"norm": "none", "states": "query"})
    tokens = replace(asked.tokens, stages=[stage])
    odd = replace(asked, options={"norm": "none"}, tokens=tokens)
    found = replace(COMPARISON, rows=(COMPARISON.rows[0], odd))
    assert "entropy (norm=none)" in shown(found)
    assert found.to_dict()["rows"][1]["options"] == {"norm": "none"}  # type: ignore[index]
    line = list(csv.DictReader(io.StringIO(found.to_csv())))[1]
    assert (line["method"], line["options"]) == ("entropy", "norm=none states=query")


def test_an_answer_of_several_lines_stays_one_cell() -> None:
    odd = replace(COMPARISON.rows[1], answer='one,\n"two"')
    lines = list(csv.DictReader(io.StringIO(replace(COMPARISON, rows=(odd,)).to_csv())))
    assert [line["answer"] for line in lines] == ['one,\n"two"']
