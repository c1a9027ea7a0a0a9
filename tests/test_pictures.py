"""Drawings of what was kept: the PNG's pixels, the page, the JSON, the commands that write them."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import tiny
import torch
from browser import screenshot, width_on_a_phone
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw

import vtprune
from vtprune import Report, VtpruneError, demo
from vtprune.cli import cli
from vtprune.inference.generate import Generation
from vtprune.inference.prompt_media import shrink
from vtprune.inference.report import FailedReport
from vtprune.models.base import Sampling
from vtprune.pictures.contact_sheet import arrange, caption_lines, draw_panel, split_rows
from vtprune.pictures.drawing import SHEET, Drawing, DrawnRun, Panel, scaled
from vtprune.pictures.lettering import (
    draw_text,
    fit_lines,
    font,
    font_of,
    has_glyph,
    legible,
    text_width,
)
from vtprune.pictures.miniature import draw_miniature

ATTACK = "</script><img src=x onerror=alert(1)>{{ 7*7 }}"
Checkpoints = Callable[[str], Path]


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "page.png"
    Image.linear_gradient("L").resize((320, 240)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of 20 numbered pictures, which is read as a video."""
    folder = tmp_path_factory.mktemp("clip")
    for number in range(20):
        Image.new("RGB", (200, 100), (60 + 9 * number, 180, 90)).save(folder / f"{number:03}.png")
    return folder


def ask(checkpoint: Path, media: Path, question: str = "what?", frames: int | None = None,
        **pruned: object) -> Report:  # fmt: skip
    return vtprune.ask(
        str(checkpoint), media, question, sampling=Sampling(frames=frames),
        generation=Generation(max_new_tokens=2), **({"keep": 0.4, "method": "random"} | pruned),
    )  # type: ignore[arg-type]  # fmt: skip


def test_kept_tokens_are_clear_and_dropped_ones_dim(
    checkpoints: Checkpoints, picture: Path
) -> None:
    drawing = vtprune.draw(ask(checkpoints("qwen2_5_vl"), picture))
    run = drawing.runs[0]
    drawing.read_pictures([panel.key for panel in run.panels])
    (panel,) = run.panels
    behind = drawing.picture(run, panel)
    drawn = draw_panel(run, panel, behind, len(run.stages))
    fates = set()
    for token in panel.tokens:
        assert token.place.box is not None
        left, top, right, bottom = scaled(token.place.box, run.kept.media[0], behind.size)
        middle = (left + right) // 2, (top + bottom) // 2
        clear, shown = behind.getpixel(middle), drawn.getpixel(middle)
        assert isinstance(clear, tuple)
        assert isinstance(shown, tuple)
        if token.dropped_by is None:
            assert shown == clear
        else:
            assert sum(shown) <= 0.5 * sum(clear) + 6
        fates.add(token.dropped_by)
    assert len(fates) > 1


def test_merged_tokens_are_tinted_in_the_colour_of_what_they_went_into(
    checkpoints: Checkpoints, picture: Path
) -> None:
    run = vtprune.draw(ask(checkpoints("qwen2_5_vl"), picture, method="pool")).runs[0]
    merged = [token for token in run.tokens if token.merged_into is not None]
    assert merged
    kept = {token.place.column for token in run.tokens if token.dropped_by is None}
    assert {token.merged_into for token in merged} <= kept
    (panel,) = run.panels
    grey = Image.new("RGB", (320, 240), (128, 128, 128))
    colours = draw_panel(run, panel, grey, 1).getcolors(100_000)
    assert colours is not None
    assert any(max(c) - min(c) > 20 for _, c in colours if isinstance(c, tuple))


def test_tokens_have_the_scores_that_their_method_ranked_them_by(
    checkpoints: Checkpoints, picture: Path
) -> None:
    drawing = vtprune.draw(ask(checkpoints("qwen2_5_vl"), picture, method="fastv"))
    (run,) = drawing.runs
    kept = [token.scores[0] for token in run.tokens if token.dropped_by is None]
    dropped = [token.scores[0] for token in run.tokens if token.dropped_by is not None]
    assert dropped
    assert len({*kept, *dropped}) > 1
    assert min(score or 0.0 for score in kept) >= max(score or 0.0 for score in dropped)
    (values,) = drawing.to_dict()["runs"]  # type: ignore[misc]
    assert values["tokens"][0]["scores"] == [pytest.approx(run.tokens[0].scores[0], rel=1e-4)]
    without = vtprune.draw(ask(checkpoints("qwen2_5_vl"), picture, method="divprune")).runs[0]
    assert all(token.scores == (None,) for token in without.tokens)


def test_counts_of_the_drawing_are_the_reports(checkpoints: Checkpoints, clip: Path) -> None:
    report = ask(checkpoints("qwen2_5_vl"), clip, frames=8)
    run = vtprune.draw(report).runs[0]
    last = len(run.stages)
    assert [panel.count(last) for panel in run.panels] == report.tokens.by_frame
    assert sum(token.present(last) for token in run.tokens) == report.tokens.kept_after


def test_the_json_has_every_token_with_its_box_and_seconds(
    checkpoints: Checkpoints, clip: Path
) -> None:
    report = ask(checkpoints("qwen2_5_vl"), clip, frames=8)
    values = json.loads(json.dumps(vtprune.draw(report).to_dict()))
    (run,) = values["runs"]
    assert values["schema"] == 1
    assert len(run["tokens"]) == report.tokens.visual
    assert sum(token["kept"] for token in run["tokens"]) == report.tokens.kept_after
    for token in run["tokens"]:
        left, top, right, bottom = token["box"]
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 100
        assert token["seconds"] == [run["media"][0]["seconds"][run["media"][0]["frames"].index(n)]
                                    for n in token["frames"]]  # fmt: skip
        assert (token["dropped_by"] is None) == token["kept"]


def test_a_long_clip_is_a_sheet_of_the_frames_with_most_and_fewest_tokens(
    checkpoints: Checkpoints, clip: Path
) -> None:
    report = ask(checkpoints("internvl"), clip, frames=20)
    drawing = vtprune.draw(report)
    counts = {panel.key: panel.count(1) for panel in drawing.runs[0].panels}
    keys = drawing.sheet()
    assert len(keys) == SHEET
    assert keys == sorted(keys)
    left_out = [count for key, count in counts.items() if key not in keys]
    order = sorted((counts[key] for key in keys), reverse=True)
    assert order[SHEET // 2 - 1] >= max(left_out)
    assert order[SHEET // 2] <= min(left_out)
    assert len(vtprune.draw(report, all_frames=True).sheet()) == 20
    small, large = drawing.png(), vtprune.draw(report, all_frames=True).png()
    sizes = [Image.open(io.BytesIO(one)).size for one in (small, large)]
    assert sizes[0][0] * sizes[0][1] < sizes[1][0] * sizes[1][1]


def test_frames_with_as_many_tokens_at_the_end_are_chosen_by_those_before() -> None:
    run = SimpleNamespace(stages=[None, None], panels=[])
    for number, before in enumerate([3, 9, 3, 1, 3, 9, *[3] * 20, 1, 9, 9, 9, 9, 1, 1, 1, 1]):
        counts = (16, before, 0)
        run.panels.append(SimpleNamespace(key=(0, number, False), count=counts.__getitem__))
    chosen = [number for _, number, _ in Drawing([cast("DrawnRun", run)]).sheet()]
    assert chosen == [1, 3, 5, 26, 27, 28, 29, 30, 31, 32, 33, 34]


@pytest.mark.parametrize("count", [1, 5, 40, 200])
def test_a_sheet_of_many_frames_is_no_strip(count: int) -> None:
    rows = [(cast("Panel", None), Image.new("RGB", (320, 180)))] * count
    blocks = split_rows(rows, 2)
    assert sum(map(len, blocks)) == count
    width, height = 660 * len(blocks), 210 * max(map(len, blocks))
    assert height <= 1200 or 1.2 < width / height < 3.5
    sheets = arrange([Image.new("RGB", (640, 900))] * count)
    assert count < 4 or 1.2 < sheets.width / sheets.height < 3.5


def test_long_strips_keep_pixels_across() -> None:
    sizes = {(6435, 910): (2546, 360), (1200, 1800): (600, 900), (50, 10_000): (18, 3600)}
    for size, smaller in sizes.items():
        pixels = torch.zeros(1, 3, *size, dtype=torch.uint8)
        assert shrink(pixels, 900).shape[2:] == smaller


@pytest.mark.parametrize(
    "name", [name for name in ("llava_next", "internvl", "gemma3", "molmo2") if name in tiny.MODELS]
)
def test_pictures_in_tiles_are_drawn_in_every_format(
    checkpoints: Checkpoints, picture: Path, tmp_path: Path, name: str
) -> None:
    drawing = vtprune.draw(ask(checkpoints(name), picture))
    for suffix in (".png", ".html", ".json"):
        drawing.save(tmp_path / f"kept{suffix}")
        assert (tmp_path / f"kept{suffix}").stat().st_size > 500
    tiled = [panel.tiled for panel in drawing.runs[0].panels]
    assert tiled == ([False, True] if name != "gemma3" else [False])


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]


def test_no_name_question_or_answer_becomes_markup(
    checkpoints: Checkpoints, picture: Path, tmp_path: Path
) -> None:
    file = tmp_path / "<img src=x onerror=alert(1)>.png"
    file.write_bytes(picture.read_bytes())
    report = ask(checkpoints("llava"), picture)
    plain = vtprune.draw(report).html().decode()
    attacked = replace(ask(checkpoints("llava"), file), question=ATTACK, answer=ATTACK)
    page = vtprune.draw(attacked).html().decode()
    tags, plain_tags = Tags(), Tags()
    tags.feed(page)
    plain_tags.feed(plain)
    assert tags.tags == plain_tags.tags
    assert tags.values == plain_tags.values
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert text is not None
    assert json.loads(text[1])["question"] == ATTACK
    assert json.loads(text[1])["files"] == [file.name]


def test_the_page_needs_no_network(checkpoints: Checkpoints, picture: Path) -> None:
    page = vtprune.draw(ask(checkpoints("llava"), picture)).html().decode()
    assert "http:" not in page
    assert "https:" not in page
    assert "default-src 'none'" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_draws_kept_tokens_clear_and_dropped_ones_dim(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    file, page, shot = (tmp_path / name for name in ("red.png", "kept.html", "shot.png"))
    Image.new("RGB", (320, 240), (200, 40, 40)).save(file)
    report = ask(checkpoints("llava"), file, keep=0.5, method="uniform")
    drawing = vtprune.draw(report)
    drawing.save(page)
    seen_colours = screenshot(page, shot)
    near = {
        name: sum(count for seen, count in seen_colours.items()
                  if all(abs(a - b) < 12 for a, b in zip(seen, colour, strict=True)))
        for name, colour in (("clear", (200, 40, 40)), ("dim", (60, 12, 12)))
    }  # fmt: skip
    kept = sum(token.dropped_by is None for token in drawing.runs[0].tokens)
    assert min(near.values()) > 1000
    share = near["clear"] / sum(near.values())
    assert share == pytest.approx(kept / len(drawing.runs[0].tokens), abs=0.05)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_pages_fit_a_phone(checkpoints: Checkpoints, clip: Path, tmp_path: Path) -> None:
    long = "x" * 200
    report = replace(ask(checkpoints("internvl"), clip, frames=20), question=long, answer=long)
    page = tmp_path / "kept.html"
    vtprune.draw([report, report]).save(page)
    assert width_on_a_phone(page) == 390
    explanation = vtprune.explain(None, clip, long, by="attention", keep=0.5)
    maps = tuple(replace(one, text=long) for one in explanation.runs[0].maps)
    runs = (replace(explanation.runs[0], maps=maps), explanation.runs[1])
    vtprune.draw(replace(explanation, runs=runs)).save(page)
    assert width_on_a_phone(page) == 390


@pytest.mark.parametrize(
    "text", ["что происходит", "这是什么", "😀 👨\u200d👩", "\x1b[31m\x00", "\udcff", "\u202egnp"]
)
def test_a_caption_in_any_script_is_drawn_without_missing_glyphs(text: str) -> None:
    sheet = Image.new("RGB", (400, 40), "white")
    draw_text(ImageDraw.Draw(sheet), (4, 4), text, (0, 0, 0), 15)
    assert sheet.getextrema() == ((0, 255),) * 3
    shown = legible(text, 15)
    assert all(font_of(character, 15) for character in shown)
    assert not {"\x1b", "\x00", "\udcff", "\u202e"} & set(shown)
    assert all(text_width(line, 15) <= 200 for line in fit_lines(text * 30, 15, 200))


def test_a_font_lacks_what_it_draws_as_a_box() -> None:
    assert has_glyph(font(15), "a")
    assert not has_glyph(font(15), "漢")


def test_a_page_of_32_frames_is_below_3_megabytes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(32):
        noise = torch.rand(27, 48, 3, generator=generator).mul(255).byte().numpy()
        Image.fromarray(noise).resize((640, 360)).save(tmp_path / f"{number:02}.png")
    report = ask(checkpoints("internvl"), tmp_path, frames=32)
    assert len(vtprune.draw(report).html()) < 3_000_000


def test_several_methods_stand_side_by_side(checkpoints: Checkpoints, picture: Path) -> None:
    checkpoint = checkpoints("llava")
    reports = [ask(checkpoint, picture, method=method) for method in ("random", "uniform")]
    drawing = vtprune.draw(reports)
    assert [run.method for run in drawing.runs] == ["random", "uniform"]
    text = re.search(r'application/json">(.*?)</script>', drawing.html().decode(), re.DOTALL)
    assert text is not None
    assert len(json.loads(text[1])["runs"]) == 2
    alone, both = (Image.open(io.BytesIO(of.png())) for of in (vtprune.draw(reports[0]), drawing))
    assert (both.width, both.height) == (2 * alone.width, alone.height)


def test_an_unpruned_run_is_drawn_whole(checkpoints: Checkpoints, picture: Path) -> None:
    run = vtprune.draw(ask(checkpoints("llava"), picture, keep=1.0, method="random")).runs[0]
    assert all(token.dropped_by is None for token in run.tokens)
    assert vtprune.draw(ask(checkpoints("llava"), picture, keep=1.0)).png()


def test_the_miniature_has_a_cell_a_token(checkpoints: Checkpoints, picture: Path) -> None:
    drawing = vtprune.draw(ask(checkpoints("llava"), picture))
    run = drawing.runs[0]
    title, *lines = draw_miniature(drawing, run).splitlines()
    kept = sum(token.dropped_by is None for token in run.panels[0].tokens)
    assert title.startswith(f"picture {kept}/")
    text = "".join(lines)
    assert text.count("█") * 2 + text.count("▀") + text.count("▄") == kept


def test_a_trace_is_drawn_with_the_files_of_its_prompt(
    checkpoints: Checkpoints, picture: Path
) -> None:
    model = tiny.model("llava")
    inputs = tiny.inputs("llava", model, "image")
    with vtprune.pruning(model, {"stages": [{"at": 2, "method": "random", "keep": 0.5}]}) as trace:
        model.generate(**inputs, max_new_tokens=1)
    drawing = vtprune.draw(trace, picture)
    assert sum(token.dropped_by is None for token in drawing.runs[0].tokens) == 8
    assert drawing.runs[0].tokens[0].place.box == (0.0, 0.0, 80.0, 60.0)
    assert drawing.png()
    assert drawing.html()
    with pytest.raises(VtpruneError, match="1 media items, and 2 files"):
        vtprune.draw(trace, [picture, picture])


def test_what_can_not_be_drawn_is_refused(checkpoints: Checkpoints, picture: Path) -> None:
    report = ask(checkpoints("llava"), picture)
    with pytest.raises(VtpruneError, match="no report"):
        vtprune.draw([])
    with pytest.raises(VtpruneError, match="no visual tokens whose places are known"):
        vtprune.draw(replace(report, kept_tokens=None))
    with pytest.raises(VtpruneError, match="boo"):
        vtprune.draw(FailedReport("?", [], VtpruneError("boo", "")))
    with pytest.raises(VtpruneError, match=r"kept.txt: its suffix"):
        vtprune.draw(report).save("kept.txt")


def test_a_report_to_dict_has_no_drawing(checkpoints: Checkpoints, picture: Path) -> None:
    report = ask(checkpoints("llava"), picture)
    assert report.kept_tokens is not None
    assert "kept_tokens" not in report.to_dict()
    assert isinstance(DrawnRun.of(report), DrawnRun)


# -- the commands ----------------------------------------------------------------------------------


def test_show_writes_its_files_and_nothing_else(
    checkpoints: Checkpoints, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = str(checkpoints("llava"))
    args = ["show", str(picture), "what?", "--model", checkpoint, "--max-new-tokens", "2"]
    result = invoke(*args, "--keep", "0.4", "--save", "kept.png", "--save", "kept.html",
                    "--save", "kept.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kept.html", "kept.json", "kept.png",
    ]  # fmt: skip
    assert "written   kept.png" in result.stderr
    assert Image.open("kept.png").width > 300
    again = invoke(*args, "--keep", "0.4", "--json")
    assert json.loads(again.stdout) == json.loads(Path("kept.json").read_text())


def test_show_without_a_file_prints_a_miniature(checkpoints: Checkpoints, picture: Path) -> None:
    result = invoke("show", str(picture), "what?", "--model", str(checkpoints("llava")),
                    "--max-new-tokens", "2", "--methods", "random,uniform")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.count("picture ") == 2
    assert result.stdout.startswith("random: ")


def test_show_draws_presets_side_by_side(checkpoints: Checkpoints, picture: Path) -> None:
    args = ("show", str(picture), "what?", "--model", str(checkpoints("llava")),
            "--max-new-tokens", "2", "--keep", "0.4", "--json")  # fmt: skip
    result = invoke(*args, "--methods", "random", "--presets", "balanced,fast")
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [run["method"] or run["preset"] for run in runs] == ["random", "balanced", "fast"]
    refused = invoke(*args, "--presets", "balanced", "--preset", "fast")
    assert refused.exit_code == 1
    assert "--preset and --presets exclude each other" in refused.stderr


def test_ask_draws_what_it_kept(checkpoints: Checkpoints, picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept.png"
    args = ["ask", str(picture), "--model", str(checkpoints("llava")), "--max-new-tokens", "2",
            "--show", str(file), "--quiet"]  # fmt: skip
    result = invoke(*args, "-q", "what?")
    assert result.exit_code == 0, result.output
    assert Image.open(file).width > 300
    result = invoke(*args, "-q", "what?", "-q", "how many?")
    assert result.exit_code == 1
    assert "Error: --show draws one question, not 2" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--save", "kept.gif"], "--save kept.gif: its suffix names no format of this command"),
        (["--methods", "random", "--method", "fastv"], "--method and --methods exclude each other"),
        (["--methods", "random", "-o", "norm=row"], "-o and --methods exclude each other"),
        (["--methods", "rndom"], "rndom"),
        (["--methods", "random,random"], "method random is named 2 times"),
        (["--presets", "fast,fast"], "preset fast is named 2 times"),
    ],
)
def test_what_show_refuses(picture: Path, args: list[str], message: str) -> None:
    result = invoke("show", str(picture), "what?", *args)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


def test_boxes_of_a_downsampled_picture_are_in_its_own_pixels(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = tmp_path / "large.png"
    Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(path)
    report = ask(checkpoints("qwen2_5_vl"), path, method="downsample", keep=0.3)
    boxes = [token.place.box for token in vtprune.draw(report).runs[0].tokens]
    assert len(boxes) < report.tokens.visual
    assert max(box[2] for box in boxes if box) == pytest.approx(640, abs=3)
    assert max(box[3] for box in boxes if box) == pytest.approx(480, abs=3)


def test_a_caption_says_what_is_not_drawn_and_who_chose_the_frames(tmp_path: Path) -> None:
    clip = tmp_path / demo.write(tmp_path, 1, 0)[0]["file"]
    reports = [
        vtprune.ask(None, clip, "what happens?", method=method, keep=0.3,
                    sampling=Sampling(frames=16))
        for method in ("uniform", "random")
    ]  # fmt: skip
    first, second = (vtprune.draw(report).runs[0] for report in reports)
    lines = [text for text, _ in caption_lines(second, 12, 2000, "uniform")]
    kept = sum(t.dropped_by is None for t in second.tokens if t.place.box is None)
    assert (
        f"not drawn: tokens of no place, such as ends of rows: {kept} of 1 kept to the end" in lines
    )
    assert lines[-1].endswith("the fewest tokens kept by uniform")
    assert not any("kept by" in text for text, _ in caption_lines(first, 12, 2000))
