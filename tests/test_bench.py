"""The speed figures: measured in turn, resumed, and put on a page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vtprune._dev.bench import baseline, decoding, growth, memory, overlap
from vtprune._dev.bench.__main__ import main
from vtprune._dev.bench.chart import draw_growth
from vtprune._dev.bench.page import make_page
from vtprune._dev.bench.prefill import measure_prefill
from vtprune._dev.bench.results import Pass, Results, read_passes
from vtprune._dev.bench.selection import counts_of, time_choice
from vtprune.evaluation.profiling.prompts import ProfiledMedia
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.pruners import METHODS
from vtprune.pruners.entropy import token_entropy

CPU = torch.device("cpu")
MACHINE = {"name": "CPU", "threads": 1, "load": 0.5, "versions": "vtprune 1"}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "speed.jsonl", show=lambda _: None)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip-2s-96x64.mp4"
    decoding.write_clip(path, 2, 96, 64)
    return path


def page_of(passes: list[Pass], plot: str = "") -> str:
    """The page on one line, for prose that may be broken anywhere."""
    return " ".join(make_page(passes, plot).split())


class Sides:
    """Two sides that note their runs."""

    def __init__(self, fail_at: int = -1) -> None:
        self.ran: list[str] = []
        self.fail_at = fail_at

    def __call__(self):  # type: ignore[no-untyped-def]
        return {name: lambda name=name: self.run(name) for name in ("a", "b")}

    def run(self, name: str) -> dict[str, float]:
        if len(self.ran) == self.fail_at:
            raise KeyboardInterrupt
        self.ran.append(name)
        return {"seconds": float(len(self.ran))}


def test_sides_run_in_turn_there_and_back_after_a_warm_up(results: Results) -> None:
    sides = Sides()
    passes = results.measure("part", {"x": 1}, sides, 3, CPU)
    assert sides.ran == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [one.sides["a"]["seconds"] for one in passes] == [3.0, 6.0, 7.0]


def test_a_run_that_was_stopped_goes_on_where_it_ended(results: Results) -> None:
    with pytest.raises(KeyboardInterrupt):
        results.measure("part", {"x": 1}, Sides(fail_at=5), 3, CPU)
    again = Sides()
    passes = Results(results.path, lambda _: None).measure("part", {"x": 1}, again, 3, CPU)
    assert again.ran == ["a", "b", "b", "a", "a", "b"]
    assert [one.number for one in passes] == [0, 1, 2]
    Results(results.path).measure("part", {"x": 1}, lambda: pytest.fail("ran"), 3, CPU)


def test_other_settings_are_measured_anew(results: Results) -> None:
    results.measure("part", {"x": 1}, Sides(), 1, CPU)
    sides = Sides()
    results.measure("part", {"x": 2}, sides, 1, CPU, warm_up=False)
    assert sides.ran == ["a", "b"]
    assert len(read_passes(results.path)) == 2


def test_a_line_that_was_cut_off_is_left_out_and_the_next_is_whole(results: Results) -> None:
    results.measure("part", {"x": 1}, Sides(), 1, CPU)
    with results.path.open("a", encoding="utf-8") as file:
        file.write(results.path.read_text(encoding="utf-8")[:40])
    Results(results.path, lambda _: None).measure("part", {"x": 1}, Sides(), 2, CPU)
    assert [one.number for one in read_passes(results.path)] == [0, 1]


def test_prefills_are_measured_with_what_was_cut(results: Results, checkpoints) -> None:  # type: ignore[no-untyped-def]
    where, shown = str(checkpoints("llava_onevision")), ProfiledMedia("video", 40, 40, 4)
    (one,) = measure_prefill(
        results, where, shown, ["2", "input"], "entropy", 0.3, CPU, torch.float32, 1
    )
    visual = one.sides["unpruned"]["visual"]
    assert one.sides["unpruned"]["kept"] == visual
    for at in ("2", "input"):
        assert one.sides[at]["kept"] == math.floor(0.3 * visual + 1e-6)
        assert one.sides[at]["flops"] < one.sides["unpruned"]["flops"]
    assert one.sides["input"]["flops"] < one.sides["2"]["flops"]
    assert one.sides["2"]["select"] < one.sides["2"]["outside_layers"]
    assert "after layer 2" in page_of([one])


def test_growth_is_measured_for_more_and_more_frames(
    results: Results, checkpoints, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    where = str(checkpoints("llava_onevision"))
    monkeypatch.setattr(growth, "narrow_shape", lambda name, side: find_shape(name))
    passes = growth.measure_growth(
        results, where, [2, 4, 8], ["entropy"], 0.3, CPU, torch.float32, 1
    )
    visual = [one.sides["entropy"]["visual"] for one in passes]
    assert visual == sorted(set(visual))
    assert "Fitted exponents: `entropy` " in page_of(passes, "speed.png")
    page = make_page(passes, "speed.png")
    assert "\n\nAbove 8 frames nothing has been measured here.\n\n![Cost" in page
    assert "\n\nNot measured here: prefill, compiled, end-to-end, " in page
    assert "PLOT" not in page + make_page(passes)
    assert draw_growth(passes).startswith(b"\x89PNG")


def test_the_exponent_is_that_of_a_power_law() -> None:
    assert growth.exponent([(x, 3 * x**1.5) for x in (2.0, 5.0, 7.0)]) == pytest.approx(1.5)
    assert math.isnan(growth.exponent([(2.0, 1.0)]))


def test_the_plain_scores_are_ours() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, 9, 128, generator=generator) for _ in range(2))
    ours = baseline.own_attention(query, key)
    assert torch.allclose(baseline.plain_attention(query, key), ours[0][0].flatten(), atol=1e-5)  # type: ignore[index]
    states = torch.randn(5, 4, 6, generator=generator)  # the same spectrum, but for two zeros
    plain = baseline.plain_entropy(states) / math.log(4)
    assert torch.allclose(plain.float(), token_entropy(states, "row"), atol=1e-5)


def test_kernels_are_compared_on_one_cut(results: Results, checkpoints) -> None:  # type: ignore[no-untyped-def]
    where, shown = str(checkpoints("llava_onevision")), ProfiledMedia("image", 60, 40)
    (one,) = baseline.measure_kernels(results, where, shown, 0.3, CPU, torch.float32, 1)
    assert one.sides["plain: fastv, eager"]["kept"] == one.sides["ours: fastv, sdpa"]["kept"]
    assert "eager" in page_of([one])


def test_all_readers_give_the_same_frames(clip: Path) -> None:
    index = [0, 17, 31, 59]
    ours = decoding.by_vtprune(clip, index)
    assert ours.shape == (4, 3, 384, 384)
    ways = [decoding.by_pyav, decoding.by_pyav_seeking]
    ways += [decoding.by_decord] if decoding.runs("decord") else []
    for way in ways:
        assert (way(clip, index).float() - ours.float()).abs().mean() < 3, way.__name__


def test_readers_are_timed_and_the_fastest_other_is_named(results: Results, clip: Path) -> None:
    (one,) = decoding.measure_decoding(results, clip.parent, 2, 96, 64, 3, 1)
    assert {side["frames"] for side in one.sides.values()} == {3.0}
    page = page_of([one])
    assert "times as long as the fastest of the others" in page
    assert "3 frames of a clip of 2 s, 96x64" in page


def test_loading_and_decoding_are_timed_one_by_one_and_at_once(
    results: Results, checkpoints, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    where = checkpoints("llava_onevision")
    for _ in range(2):  # the second time with the files that are there
        (one,) = overlap.measure_overlap(results, str(where), clip.parent, 2, 96, 64, 3, 1)
        results = Results(results.path.with_name("again.jsonl"), lambda _: None)
    assert list(one.sides) == ["one after the other", "at once"]
    assert "## Decoding while a model is loaded" in page_of([one])


def test_memory_is_noted_after_every_tenth(results: Results, clip: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("vtprune.media.reading._CHUNK_BYTES", 1)
    (one,) = memory.measure_memory(results, clip.parent, 2, 96, 64, 30.0)
    figures = dict(one.sides["vtprune"])
    assert figures.pop("frames") == 60
    assert list(figures) == ["before", "opened", *(f"{n} %" for n in range(10, 101, 10))]
    assert all(value > 2**20 for value in figures.values())


def test_the_command_writes_results_and_the_page_is_made_of_them(
    checkpoints, tmp_path: Path, capsys, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        folder = tmp_path / "frames"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (80 * number, 20, 200)).save(folder / f"{number}.png")
    model = ["--model", str(checkpoints("llava_onevision")), "--results", "speed.jsonl",
             "--repeats", "1"]  # fmt: skip
    main(["prefill", *model, "--shown", "40x40"])
    assert "at input" in capsys.readouterr().out
    main(["end-to-end", "frames", *model, "--frames", "3"])
    told = capsys.readouterr()
    assert "pixels, uniform at input" in told.out
    assert "pass 1 of 1: unpruned" in told.err
    main(["first-token", "frames", *model[:2], "--frames", "3", "--passes", "1"])
    assert "| median of 1 clips | long-video |  |  |  |  | " in capsys.readouterr().out
    main(["page", "--results", "speed.jsonl", "--save", "speed.md"])
    page = Path("speed.md").read_text(encoding="utf-8")
    assert page.index("## Prefill") < page.index("## First token")
    assert not Path("speed.png").exists()


def test_layers_give_a_table_with_its_command(checkpoints, tmp_path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "table.md"
    model = ["--model", str(checkpoints("llava_onevision")), "--shown", "40x40"]
    main(["layers", *model, "--keep", "0.5", "--repeats", "1", "--save", str(out)])
    text = out.read_text(encoding="utf-8")
    assert "Command: `python -m vtprune._dev.bench layers --model" in text
    assert "| fast | prefill |" in text


def test_selection_is_measured_once_and_told_as_a_share_of_the_prefill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "speed.jsonl"
    asked = ["selection", "--results", str(path), "--methods", "uniform,spread,fastv", "--tokens"]
    main([*asked, "32", "--repeats", "2"])
    told = capsys.readouterr().out
    assert "32 tokens, ms" in told
    for name in ("uniform", "spread", "fastv"):
        assert f"| `{name}` |" in told
    main([*asked, "32", "--repeats", "2"])
    assert [one.number for one in read_passes(path)] == [0, 1]
    capsys.readouterr()


def test_the_page_has_a_table_of_selection_for_every_keep() -> None:
    def made(tokens: int, keep: float, **seconds: float) -> Pass:
        settings = {"tokens": tokens, "keep": keep, "dtype": "float32", "device": "cpu",
                    "methods": list(seconds)}  # fmt: skip
        sides = {name: {"seconds": one} for name, one in seconds.items()}
        return Pass("selection", settings, 0, {"dense prefill": {"seconds": 2.0}, **sides}, MACHINE)

    passes = [
        made(64, 0.3, uniform=0.001, spread=0.02),
        made(128, 0.3, uniform=0.002),
        made(64, 0.5, spread=0.04),
    ]
    page = make_page(passes)
    assert "| `uniform` | 1.0 | 0.05% | 2.0 | 0.10% |" in page
    assert "| `spread` | 20.0 | 1.00% | - | - |" in page
    assert "| `spread` | 40.0 | 2.00% |" in page
    told = " ".join(page.split())
    assert "30% are kept, float32, medians. Dense prefill: 2.0 s at 64 tokens (1 pass)" in told
    assert "50% are kept" in told


def test_a_schedule_counts_every_cut() -> None:
    """Of 32 layers, 22 with k and 10 with a quarter of it: 24.5 k = 32 x 300 of 1,000 tokens."""
    assert counts_of("uniform", 1000, 0.3) == [1000, 300]
    whole, first, second = counts_of("spread", 1000, 0.3)
    assert (whole, first) == (1000, 391)
    assert second == pytest.approx(first / 4, abs=1)
    assert len(counts_of("pyramiddrop", 1000, 0.3)) == 4


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].at != "pixels" and n != "vtw"])
def test_every_method_can_be_timed(name: str) -> None:
    assert time_choice(name, 64, 0.3, CPU, torch.float32)["seconds"] > 0


def test_the_page_has_medians_of_the_passes_ratios() -> None:
    """Speed-ups 4/1, 6/2, 8/2 = 4, 3, 4; FLOPs promise 5; realised 0.8, 0.6, 0.8."""
    settings = {"model": "m", "dtype": "float32", "method": "entropy", "keep": 0.3,
                "places": ["input"]}  # fmt: skip
    times = [(4.0, 1.0), (6.0, 2.0), (8.0, 2.0)]
    passes = [
        Pass("prefill", settings, number, {
            "unpruned": {"prefill": plain, "flops": 10.0, "visual": 1500.0,
                         "decode_per_token": 0.02, "waits": 2.0},
            "input": {"prefill": cut, "flops": 2.0, "select": 0.06, "visual": 1500.0,
                      "decode_per_token": 0.0155, "waits": 3.0},
        }, MACHINE)
        for number, (plain, cut) in enumerate(times)
    ]  # fmt: skip
    page = make_page(passes)
    assert ("| m, 1,500 visual tokens, float32, at input | 6.00 | 2.00 | 1.00% | 5.00 "
            "| 4.00 (3.00 to 4.00) | 0.80 (0.60 to 0.80) | 20.0, pruned 15.5; the host waits "
            "2 times, pruned 3 | 3 |") in page  # fmt: skip
    assert "CPU, 1 thread, vtprune 1; system load 0.5 to 0.5." in page_of(passes)
    first = [replace(one, machine={**MACHINE, "ahead": True}) for one in passes]
    assert "load 0.5 to 0.5, which this process ran ahead of." in page_of(first)
    assert "ahead of" not in page_of([passes[0], *first])
    assert json.loads(json.dumps(vars(passes[0])))["part"] == "prefill"
    prose = [line for line in page.splitlines() if not line.startswith(("|", "#", " "))]
    assert max(map(len, prose)) <= 120
