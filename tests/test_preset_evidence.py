"""What presets rest on: checked in a file, shown, and the same as in the documents."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import save_clip, save_noise
from reports import report_of
from rich.console import Console
from test_console import REPORT

import vtprune
from vtprune.cli import cli, console
from vtprune.errors import PresetError
from vtprune.preset import load_preset, override, preset_names
from vtprune.preset.figures import MeasuredFigure, PublishedFigure, to_entry
from vtprune.pruners import METHODS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
MEASURED = {"model": "mine", "questions": 300, "right": 81.5, "source": "vtprune evaluate q.jsonl"}
PUBLISHED = {"paper": "arXiv 2512.07580", "model": "m", "benchmark": "MME", "retained": 101.5}
HORIZON_PAPER = "arXiv 2512.07580"
FIGURES = [(name, figure) for name in preset_names() for figure in load_preset(name).evidence]


def preset(*evidence: object) -> dict[str, object]:
    stages = [{"at": "input", "method": "divprune"}]
    return {"keep": 0.3, "stages": stages, "evidence": list(evidence)}


def section(source: str) -> str:
    """Return the section of a page that "docs/page.md#heading" names."""
    page, _, anchor = source.partition("#")
    for text in re.split(r"^#+ ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading = text.partition("\n")[0].lower()
        if re.sub(r"[^\w -]", "", heading).replace(" ", "-") == anchor:
            return text
    pytest.fail(f"no section {source}")


def tables(text: str) -> Iterator[list[list[str]]]:
    """Yield the tables of a section as rows of cells, their headings first."""
    for lines in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()
        ]
        yield [rows[0], *rows[2:]]


def number(cell: str) -> float | None:
    match = re.match(r"[\d.]+", cell)
    return float(match[0]) if match else None


# -- packaged presets -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_every_packaged_preset_says_what_it_rests_on(name: str) -> None:
    assert load_preset(name).evidence


@pytest.mark.parametrize(("name", "figure"), FIGURES)
def test_a_packaged_figure_is_that_of_its_page(
    name: str, figure: MeasuredFigure | PublishedFigure
) -> None:
    """A table's row of the preset, or of a method of it; or a count in the text."""
    if isinstance(figure, PublishedFigure):
        methods = {stage.method for stage in load_preset(name).every_stage()}
        papers = {str(METHODS[method].paper).rpartition(", ")[2] for method in methods}
        assert figure.paper in papers | {HORIZON_PAPER}
        return
    text = section(figure.source)
    assert f"{figure.questions:,} questions" in text
    if figure.unpruned is None:
        words = " ".join(text.split())
        assert re.search(rf"\b{round(figure.right * figure.questions / 100)} with it\b", words)
        return
    methods = {stage.method for stage in load_preset(name).every_stage()}
    media = figure.media
    for rows in tables(text):
        unpruned = next((row for row in rows if row[0].startswith("unpruned")), [])
        for row in rows:
            if not {name, *methods} & set(re.findall(r"`([\w-]+)`", row[0])):
                continue
            for heading, cell, full in zip(rows[0], row, unpruned, strict=False):
                if heading not in (f"keep {figure.keep:g}", f"{media}, {figure.keep:g}", "right"):
                    continue
                if heading == "right" and f"keep\n{figure.keep:g}" not in text:
                    continue
                if (number(cell), number(full)) == (figure.right, figure.unpruned):
                    return
    pytest.fail(f"{figure.source} has no row with {figure.score} at keep {figure.keep}")


def test_the_first_models_figures_beside_the_seconds_are_those_of_its_own_page() -> None:
    pages = "docs/results.md#the-table-on-test", "docs/second-model.md#what-was-measured-with-it"
    ours, beside = (
        {row[0].partition(",")[0] if row[0].startswith("unpruned") else row[0]: row for row in rows}
        for rows in (
            next(rows for rows in tables(section(page)) if "`entropy` at ecl" in str(rows))
            for page in pages
        )
    )
    column, other = (rows[""].index(heading) for rows, heading in
                     ((beside, "first model, keep 0.3"), (ours, "keep 0.3")))  # fmt: skip
    found = {name: row[column] for name, row in beside.items() if name and row[column] != "-"}
    assert len(found) > 25
    assert found == {name: ours[name][other] for name in found}


@pytest.mark.parametrize(("name", "figure"), FIGURES)
def test_the_page_has_every_packaged_figure(
    name: str, figure: MeasuredFigure | PublishedFigure
) -> None:
    (rows,) = tables(section("docs/presets.md#what-the-packaged-presets-rest-on"))
    listed = ""
    for row in rows[1:]:
        listed = row[0].strip("`") or listed
        keep = "" if figure.keep is None else f"{figure.keep:g}"
        if (listed, row[1], row[4]) == (name, figure.model, figure.score) and (
            row[3].replace("not said", "") == keep
        ):
            assert isinstance(figure, MeasuredFigure) or figure.paper in row[5]
            return
    pytest.fail(f"docs/presets.md has no row of {name} with {figure.score}")


def test_the_page_says_that_the_default_was_chosen_on_one_model() -> None:
    text = " ".join(section("docs/presets.md#what-the-packaged-presets-rest-on").split())
    assert "`balanced`, the default, was chosen on one model: the small embedded one" in text


def test_published_video_leaves_a_tenth_at_the_input() -> None:
    assert load_preset("published-video").keep == pytest.approx(0.1 * 23 / 28, abs=2e-4)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_published_presets_cut_pictures_and_clips(
    checkpoints: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    loaded = vtprune.load(str(checkpoints(family)))
    picture, clip = save_noise(tmp_path / "noise.png", 90, 150), save_clip(tmp_path / "clip", 6)
    pair = {"divprune", "random"}
    for name, media, methods, keep in (
        ("published-image", picture, pair, 0.5),
        ("published-video", picture, pair, 0.5),
        ("published-video", clip, {"holitom", "fastv"}, 0.5),
    ):
        report = vtprune.ask(loaded, media, "what?", preset=name, keep=keep)
        tokens = report.tokens
        assert {stage.method for stage in tokens.stages} <= methods
        assert 0 < tokens.kept_after < tokens.visual
        assert keep - 2 / tokens.visual <= tokens.keep_mean <= keep


# -- files ----------------------------------------------------------------------------------------


def test_evidence_is_read_and_written() -> None:
    loaded = load_preset(preset({"measured": MEASURED}, {"published": PUBLISHED}))
    first, second = loaded.evidence
    assert first == MeasuredFigure(**MEASURED)  # type: ignore[arg-type]
    assert second == PublishedFigure(**PUBLISHED)  # type: ignore[arg-type]
    assert loaded.to_dict()["evidence"] == [{"measured": MEASURED}, {"published": PUBLISHED}]
    assert load_preset(preset()).to_dict().get("evidence") is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "an entry of evidence is either measured or published"),
        ({"measured": MEASURED, "published": PUBLISHED}, "is either measured or published"),
        ({"guessed": MEASURED}, "unknown key 'guessed'"),
        ("balanced is good", "an entry of evidence must be a mapping of keys"),
        ({"measured": {**MEASURED, "right": 101}}, "right: 101 is not a number from 0 to 100"),
        ({"measured": {**MEASURED, "questions": 0}}, "questions: 0 is not a whole number from 1"),
        ({"measured": {**MEASURED, "model": "m" * 101}}, "model: .* is not text of 1 to 100"),
        ({"measured": {**MEASURED, "keep": 2}}, r"keep: 2 is not a number in \(0, 1\]"),
        ({"measured": {**MEASURED, "note": "n" * 301}}, "note: .* is not text of 1 to 300"),
        ({"measured": {"model": ""}}, "model: '' is not text of 1 to 100.*questions is missing"),
        ({"published": {**PUBLISHED, "retained": 0}}, "retained: 0 is not a number above 0"),
        ({"published": {**PUBLISHED, "figure": 1}}, "unknown key 'figure'"),
        ({"published": {**PUBLISHED, "paper": 7}}, "paper: 7 is not text"),
        ({"measured": {**MEASURED, "media": "tables"}}, "media: tables is not pictures or clips"),
    ],
)
def test_wrong_evidence_is_refused(entry: object, message: str) -> None:
    with pytest.raises(PresetError, match=message):
        load_preset(preset(entry))


def test_too_many_figures_are_refused() -> None:
    with pytest.raises(PresetError, match=r"evidence: .* is not a list of at most 20 figures"):
        load_preset(preset(*[{"measured": MEASURED}] * 21))


def test_evidence_goes_with_the_stages_that_it_is_of() -> None:
    balanced = load_preset("balanced")
    assert override(balanced, keep=0.5, seed=3).evidence == balanced.evidence
    assert override(balanced, options={"time": "2"}).evidence == ()
    assert override(balanced, method="random").evidence == ()


# -- shown ----------------------------------------------------------------------------------------


def test_presets_list_and_show_have_the_evidence() -> None:
    listed = CliRunner().invoke(cli, ["presets", "list"], env={"COLUMNS": "80"}).stdout
    assert all(len(line.rstrip()) <= 80 for line in listed.splitlines())
    for name, figure in FIGURES:
        media = figure.media or "both"
        row = rf"^{name} +{figure.model} +{media} .*{re.escape(figure.score)} +{figure.origin}"
        assert re.search(row, listed, flags=re.MULTILINE)
    shown = CliRunner().invoke(cli, ["presets", "show", "published-image", "--json"]).stdout
    entry, _ = json.loads(shown)["evidence"]
    assert entry["published"]["retained"] == 96.9


def shown_report(model: str, name: str) -> str:
    values: dict[str, Any] = copy.deepcopy(REPORT)
    values["model"]["name"] = model
    values["preset"]["evidence"] = [to_entry(figure) for figure in load_preset(name).evidence]
    out = io.StringIO()
    console.render(report_of(values), Console(file=out, width=80))
    return out.getvalue()


def test_a_report_names_the_figure_of_another_model_alone() -> None:
    line = "rests on  model embedded at keep 0.3: 93.8 of 95.9 % (2,000 questions)"
    assert line in shown_report("Qwen/Qwen2.5-VL-7B-Instruct", "balanced")
    assert "rests on" not in shown_report("embedded", "balanced")
    assert "rests on" not in shown_report("Qwen/Qwen2.5-VL-7B-Instruct", "published-image")
    of_clips = "model embedded at keep 0.3, clips: 47.7 of 97.3 %"  # as the report's medium is
    assert of_clips in shown_report("llava-onevision-7b", "entropy-horizon")


@pytest.mark.parametrize(("modality", "score"), [("image", "94.7"), ("video", "88.0")])
def test_a_report_names_the_figure_of_its_media(modality: str, score: str) -> None:
    values: dict[str, Any] = copy.deepcopy(REPORT)
    values["model"]["name"] = "mine"
    values["input"]["modality"] = modality
    values["preset"]["evidence"] = [to_entry(one) for one in load_preset("fast").evidence]
    out = io.StringIO()
    console.render(report_of(values), Console(file=out, width=80))
    media = {"image": "pictures", "video": "clips"}[modality]
    assert f"model embedded at keep 0.15, {media}: {score} of 97." in out.getvalue()


def test_the_page_and_the_figures_say_alike_which_media_they_are_of() -> None:
    (rows,) = tables(section("docs/presets.md#what-the-packaged-presets-rest-on"))
    said = [re.search(r"about (pictures|clips)(?! and)", row[2]) for row in rows[1:]]
    figures = [figure.media for name in preset_names_of(rows) for figure in evidence_of(name)]
    measured = [
        (match[1], media) for match, media in zip(said, figures, strict=True) if match is not None
    ]
    assert len(measured) > 5
    assert all(page == media for page, media in measured)


def preset_names_of(rows: list[list[str]]) -> list[str]:
    return [row[0].strip("`") for row in rows[1:] if row[0]]


def evidence_of(name: str) -> tuple[MeasuredFigure | PublishedFigure, ...]:
    return load_preset(name).evidence


def test_a_report_has_the_evidence_of_its_preset(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (224, 224), "red").save(tmp_path / "red.png")
    report = vtprune.ask(None, tmp_path / "red.png", "is there a red circle?", keep=0.5)
    out = json.loads(json.dumps(report.to_dict()))
    figures = [entry["measured"]["right"] for entry in out["preset"]["evidence"]]
    assert figures == [figure.right for figure in evidence_of("balanced")] == [93.8, 80.8]
    report = vtprune.ask(None, tmp_path / "red.png", "is it red?", method="random", keep=0.5)
    assert "evidence" not in report.to_dict()["preset"]  # type: ignore[operator]
