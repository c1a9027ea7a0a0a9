"""Needles: what is planted, which of their tokens are kept, and what `evaluate --needle` says."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import assert_refused, save_clip, save_noise
from PIL import Image
from transformers import AutoTokenizer

import vtprune
from vtprune import demo
from vtprune.cli import cli
from vtprune.cli.console.needles import show_needles
from vtprune.cli.console.terminal import stdout_console
from vtprune.demo.needles import has_world_words_alone
from vtprune.errors import MediaError, VtpruneError
from vtprune.evaluation.bootstrap import Estimate
from vtprune.evaluation.needles import result
from vtprune.evaluation.needles.kinds import KINDS
from vtprune.evaluation.needles.measure import NeedleTokens, measure_needles
from vtprune.evaluation.needles.planting import Needle, NeedlePlan, plant_needles
from vtprune.evaluation.needles.result import NeedleFigures, NeedleTest
from vtprune.evaluation.runner import AskSettings
from vtprune.evaluation.variants import list_variants, repeat_variants
from vtprune.inference.generate import Generation
from vtprune.inference.kept_tokens import KeptTokens
from vtprune.inference.prepare import Sampling
from vtprune.inference.questions_file import Asked
from vtprune.media import Limits, open_source, read
from vtprune.models.names import embedded_weights
from vtprune.pictures.needles import lay, noise_patch, round_piece, written_number


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures and a clip of eight frames."""
    folder = tmp_path_factory.mktemp("files")
    clip = save_clip(folder / "clip", 8)
    return [save_noise(folder / "a.png", 96, 128), save_noise(folder / "b.png", 80, 80), clip]


@pytest.fixture(scope="module")
def planted(loaded: vtprune.Loaded, files: list[Path]) -> list[Needle]:
    plan = NeedlePlan(sizes=(0.2, 0.5), count=3, frames=2)
    needles, notes = plant_needles(loaded, files, plan, Sampling(frames=4), Limits())
    assert notes == []
    return needles


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, args)])


def test_a_patch_has_the_mean_colour_of_what_it_covers() -> None:
    below = np.full((40, 40, 3), (60, 120, 180), np.uint8)
    patch = noise_patch(np.random.default_rng(0), below)
    assert np.abs(patch.pixels.reshape(-1, 3).mean(0) - (60, 120, 180)).max() < 4
    assert patch.pixels.std() > 20


def test_a_sticker_changes_what_it_covers_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    number = written_number("47", 20)
    changed = lay(picture, number, 10, 30)
    height, width = number.size
    assert width == 20
    assert (changed[10 : 10 + height, 30 : 30 + width] == number.pixels).all()
    changed[10 : 10 + height, 30 : 30 + width] = picture[10 : 10 + height, 30 : 30 + width]
    assert (changed == picture).all()
    piece = round_piece(rng, picture, 16)
    assert piece.size == (16, 16)
    assert piece.alpha[0, 0] == 0
    assert piece.alpha[8, 8] == 1


def test_a_needle_is_in_its_box_and_its_frames_alone(planted: list[Needle]) -> None:
    assert {needle.kind for needle in planted} == set(KINDS)
    for needle in planted:
        source = needle.asked.file
        before = read(open_source(needle.base)).pictures.int()
        after = read(source).pictures.int()  # type: ignore[arg-type]
        first, last = needle.frames or (0, 0)
        left, top, right, bottom = map(int, needle.box)
        inside = np.s_[first : last + 1, :, top:bottom, left:right]
        assert (after[inside] != before[inside]).any(), needle
        after[inside] = before[inside]
        assert (after == before).all(), needle
        if needle.size is not None:
            shorter = min(before.shape[-2:])
            assert right - left == round(needle.size * shorter)


def test_a_needle_of_a_clip_is_in_as_many_sampled_frames_as_planned(planted: list[Needle]) -> None:
    spans = [needle.frames for needle in planted if needle.frames]
    assert spans
    for first, last in spans:
        assert sum(first <= number <= last for number in (0, 2, 5, 7)) == 2


def test_the_files_take_turns(planted: list[Needle]) -> None:
    for kind in ("patch", "digit", "object"):
        bases = [needle.base for needle in planted if needle.kind == kind]
        assert {bases.count(base) for base in bases} == {2}


def test_the_seed_says_what_is_planted(loaded: vtprune.Loaded, files: list[Path]) -> None:
    def plant(seed: int) -> list[tuple[object, ...]]:
        plan = NeedlePlan(("digit",), (0.3,), 2, seed=seed)
        needles, _ = plant_needles(loaded, files, plan, Sampling(frames=4), Limits())
        return [(each.asked.answer, each.box, str(each.asked.file)) for each in needles]

    assert plant(0) == plant(0)
    assert plant(0) != plant(1)


def test_a_file_that_does_not_open_is_left_out_and_named(
    loaded: vtprune.Loaded, files: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    plan = NeedlePlan(kinds=("digit",), sizes=(0.3,), count=2)
    needles, notes = plant_needles(loaded, [broken, *files], plan, Sampling(), Limits())
    assert len(needles) == 2
    assert [note for note in notes if "broken.mp4" in note and note.startswith("left out: ")]
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        plant_needles(loaded, [broken], plan, Sampling(), Limits())


def test_a_file_that_can_not_be_decoded_is_left_out_and_named(
    loaded: vtprune.Loaded, files: list[Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(files[0].read_bytes()[:4000])
    plan = NeedlePlan(kinds=("digit", "object"), sizes=(0.3,), count=3)
    needles, notes = plant_needles(loaded, [cut, *files], plan, Sampling(), Limits())
    assert len(needles) == 6
    assert not any("cut.png" in needle.base for needle in needles)
    assert [note for note in notes if "cut.png: the picture is damaged" in note]


def test_a_run_goes_on_in_another_folder(planted: list[Needle], files: list[Path]) -> None:
    """The questions' names, by which an answers file knows its own, have no folders."""
    names = [needle.asked.file.name for needle in planted]
    assert len(set(names)) == len(names)
    assert not any(str(files[0].parent) in name for name in names)


def test_the_answer_to_where_is_the_cell_that_the_needle_is_in(planted: list[Needle]) -> None:
    where = [needle for needle in planted if needle.kind in ("patch", "object")]
    for needle in where:
        source = needle.asked.file
        left, top, right, bottom = needle.box
        row = int(3 * (top + bottom) / 2 / source.height)  # type: ignore[union-attr]
        column = int(3 * (left + right) / 2 / source.width)  # type: ignore[union-attr]
        words = (("top", "", "bottom")[row] + " " + ("left", "", "right")[column]).strip()
        assert needle.asked.answer == (words or "centre")


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_kept_tokens_are_those_of_a_drawing(
    loaded: vtprune.Loaded, planted: list[Needle], method: str
) -> None:
    """The share after the last cut, counted again from the JSON of `vtprune show`."""
    needles = [needle for needle in planted if needle.size == 0.5][:4]
    variants = repeat_variants(list_variants([method], [0.4], at=1), 1)
    settings = AskSettings(Sampling(frames=4), Generation(max_new_tokens=2))
    test = measure_needles(loaded, needles, variants, settings)
    row = next(row for row in test.rows if row.method == method and row.at == "1")
    shares = []
    for needle in needles:
        report = vtprune.ask(loaded, needle.asked.file, "what is it?", method=method, at=1,
                             keep=0.4, sampling=settings.sampling,
                             generation=settings.generation)  # fmt: skip
        (drawn,) = vtprune.draw(report).to_dict()["runs"]  # type: ignore[misc,has-type]
        left, top, right, bottom = needle.box
        first, last = needle.frames or (0, 0)
        meeting = [
            token
            for token in drawn["tokens"]
            if token["box"] is not None
            and token["box"][0] < right and left < token["box"][2]
            and token["box"][1] < bottom and top < token["box"][3]
            and (not token["frames"] or any(first <= one <= last for one in token["frames"]))
        ]  # fmt: skip
        assert meeting
        shares.append(sum(token["kept"] for token in meeting) / len(meeting))
    figures = row.figures[None, None]
    assert figures.tokens_to_end == pytest.approx(np.mean(shares))
    # before layer 1 all of them are there
    layers = drawn["layers"]
    mean = (1 + (layers - 1) * np.mean(shares)) / layers
    assert figures.tokens.mean == pytest.approx(mean)
    assert figures.found == np.mean([share > 0 for share in shares])
    assert test.rows[0].figures[None, None].tokens.mean == 1


def test_smaller_media_have_a_share_of_the_unpruned_models_tokens(
    loaded: vtprune.Loaded, planted: list[Needle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 4 tokens that meet it, then one of 1 token; and one that does not show it."""
    from vtprune.evaluation.needles import measure
    from vtprune.tokens.layout import empty_layout

    class Layout(list[int]):
        columns = None

    shown: list[bool] = []
    needle = planted[0]
    monkeypatch.setattr(measure, "find_places", lambda kept: list(shown))
    monkeypatch.setattr(Needle, "meets", lambda self, place: place)
    tokens = NeedleTokens([needle])

    def kept_of(*meets: bool) -> object:
        shown[:] = meets
        kept = KeptTokens(empty_layout(), (), (), (), 4)
        object.__setattr__(kept, "layout", Layout(range(len(meets))))
        return tokens(needle.asked, kept)

    assert kept_of(True, True, True, True, False) == result_of(4, 1.0)
    assert kept_of(True, False) == result_of(4, 0.25)
    tokens = NeedleTokens([needle])
    assert kept_of(False, False) is None


def result_of(tokens: int, share: float) -> object:
    from vtprune.evaluation.records import NeedleKept

    return NeedleKept(tokens, share, share, 1.0)


def figures_of(size: float, found: float) -> NeedleFigures:
    even = Estimate(0.5, 0.4, 0.6)
    return NeedleFigures(None, size, 10, 0, 3.0, even, 0.5, found, None, even)


@pytest.mark.parametrize(
    ("found", "smallest"),
    [
        ({0.1: 0.95, 0.2: 0.9, 0.3: 1.0}, 0.1),
        ({0.1: 0.95, 0.2: 0.8, 0.3: 0.9}, 0.3),  # a gap: what is smaller does not count
        ({0.1: 1.0, 0.2: 1.0, 0.3: 0.89}, None),
    ],
)
def test_the_smallest_size_is_that_from_which_on_nine_of_ten_are_kept(
    found: dict[float, float], smallest: float | None
) -> None:
    figures = {(None, size): figures_of(size, share) for size, share in found.items()}
    assert result._smallest(figures) == smallest  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kinds": ("stain",)}, "needle kind stain is unknown"),
        ({"sizes": (0.1, 1.5)}, "needle size 1.5 is out of range"),
        ({"sizes": (0.1, 0.1)}, "needle sizes has one of them twice"),
        ({"count": 0}, "needle count 0 is out of range"),
    ],
)
def test_a_plan_that_can_not_be_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(VtpruneError, match=message):
        NeedlePlan(**values)  # type: ignore[arg-type]


def test_kinds_that_the_files_do_not_allow_are_left_out_or_refused(
    loaded: vtprune.Loaded, files: list[Path]
) -> None:
    needles, notes = plant_needles(
        loaded, files[:1], NeedlePlan(sizes=(0.3,), count=1), Sampling(), Limits()
    )
    assert {needle.kind for needle in needles} == {"patch", "digit"}
    assert notes == [
        "no needles of kind object: it is taken from another file, and there is one",
        "no needles of kind frame: it is taken from another file, and there is one",
    ]
    with pytest.raises(VtpruneError, match="needle kind frame: it is of clips"):
        plant_needles(loaded, files[:2], NeedlePlan(("frame",)), Sampling(), Limits())


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    demo.write(folder, 12, 0)
    return folder


OPTIONS = ("--needle", "--needle-sizes", "0.1,0.3", "--needle-count", 1, "--needle-frames", 4,
           "--max-new-tokens", 8,
           "--presets", "balanced", "--keep", 0.3, "--seeds", 1)  # fmt: skip


@pytest.fixture(scope="module")
def whole(samples: Path) -> Result:
    return run(samples / "questions.jsonl", *OPTIONS, "--answers", samples / "a.jsonl", "--save",
               samples / "n.csv", "--save", samples / "n.png", "--json")  # fmt: skip


def test_the_command_gives_tokens_and_answers_by_kind_and_size(
    whole: Result, samples: Path
) -> None:
    assert whole.exit_code == 0, whole.output
    found = json.loads(whole.stdout)
    assert found["needles"] == 3 * 2 + 1  # a frame has no sizes
    unpruned, balanced = found["rows"][:2]
    assert (unpruned["row"], balanced["preset"]) == ("unpruned", "balanced")
    assert unpruned["smallest"] == 0.1
    cells = {(cell["kind"], cell["size"]): cell for cell in balanced["figures"]}
    assert set(cells) >= {(None, None), (None, 0.1), ("digit", 0.3), ("frame", None)}
    assert cells["digit", 0.3]["needles"] == 1
    assert 0 < cells[None, None]["tokens"] < 1
    assert cells[None, None]["tokens_to_end"] < cells[None, None]["tokens"]
    low, high = cells[None, 0.3]["tokens_interval"]
    assert low <= cells[None, 0.3]["tokens"] <= high
    assert cells["patch", None]["right"] is None  # the world has no word for it
    assert cells["digit", None]["right"] is not None
    assert "keep a token through half of the layers" in balanced["sentence"]
    with (samples / "n.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row["figures"]) for row in found["rows"])
    assert (samples / "n.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_goes_on_from_its_answers(whole: Result, samples: Path) -> None:
    lines = (samples / "a.jsonl").read_text().splitlines()
    (samples / "half.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    again = run(
        samples / "questions.jsonl", *OPTIONS, "--answers", samples / "half.jsonl", "--json"
    )
    first, second = json.loads(whole.stdout)["rows"], json.loads(again.stdout)["rows"]
    assert [row["figures"] for row in first] == [row["figures"] for row in second]
    head = (samples / "half.jsonl").read_text().splitlines()
    assert len(head) == len(lines)


def test_the_tables_fit_a_terminal(
    whole: Result, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(samples / "questions.jsonl", *OPTIONS, "--answers", samples / "a.jsonl")
    assert shown.exit_code == 0, shown.output
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    for words in ("tokens of the needles that are kept", "details   balanced 0.3 keeps", "frame"):
        assert words in shown.stdout
    assert "planted   7 needles in" in shown.stderr


def test_without_labels_any_model_is_asked(checkpoints, files: list[Path]) -> None:  # type: ignore[no-untyped-def]
    model = checkpoints("llava_onevision")
    shown = run(*files[:2], "--model", model, "--needle", "--needle-kinds", "digit,object",
                "--needle-sizes", 0.4, "--needle-count", 1, "--methods", "random", "--keep", 0.5,
                "--max-new-tokens", 2, "--seeds", 1, "--json")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)["rows"]
    assert {cell["kind"] for cell in rows[0]["figures"]} == {None, "digit", "object"}
    assert all(0 <= cell["same"] <= 1 for cell in rows[1]["figures"])


def test_the_worlds_questions_are_for_a_tokenizer_of_its_words(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = shutil.copytree(embedded_weights(), tmp_path / "words")
    assert has_world_words_alone(AutoTokenizer.from_pretrained(folder))
    saved = json.loads((folder / "tokenizer.json").read_bytes())
    saved["model"]["vocab"]["patch"] = len(saved["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    assert not has_world_words_alone(AutoTokenizer.from_pretrained(folder))
    assert not has_world_words_alone(AutoTokenizer.from_pretrained(checkpoints("llava_onevision")))


def test_what_does_not_fit_needles_is_refused(
    samples: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune.models.loading.load", lambda *_, **__: pytest.fail("loaded"))
    questions = samples / "questions.jsonl"
    assert_refused(run("none.png", "--needle"), r"Error: none\.png: no such file")
    assert_refused(run(files[0], "--needle", "-q", "what?"),
                   "Error: -q changes nothing with --needle")  # fmt: skip
    assert_refused(run(files[0], "--needle", "--metric", "anls"),
                   "Error: --metric changes nothing with --needle")  # fmt: skip
    assert_refused(run(questions, "--needle", "--turns"), "Error: --turns and --needle exclude")
    assert_refused(run(questions, "--needle", "--needle-sizes", "small"),
                   "Error: --needle-sizes small are not all numbers")  # fmt: skip
    assert_refused(run(questions, questions), "Error: 2 lists of questions are given")
    assert_refused(run(questions, files[0], "--needle"), "Error: .* has its own files")


def test_a_row_that_could_not_run_says_why(planted: list[Needle], loaded: vtprune.Loaded) -> None:
    needles = planted[:2]
    listed = list_variants(["random"], [0.5])
    test = measure_needles(loaded, needles, repeat_variants(listed, 1),
                           AskSettings(generation=Generation(max_new_tokens=2)))  # fmt: skip
    assert any(row.errors for row in test.rows)  # downsampling can't reach it
    assert "not run" in shown_of(test)


def shown_of(test: NeedleTest) -> str:
    console = stdout_console()
    with console.capture() as capture:
        show_needles(test, console)
    return capture.get()


def test_a_figure_of_fewer_needles_has_a_star(
    planted: list[Needle], loaded: vtprune.Loaded
) -> None:
    """`evs` takes clips alone, and of the picture no right answer is known."""
    clip = next(each for each in planted if each.kind == "digit" and each.frames)
    picture = next(each for each in planted if each.size == clip.size and not each.frames)
    unknown = replace(picture, asked=replace(picture.asked, answer=None))
    variants = repeat_variants(list_variants(["evs"], [0.5]), 1)
    settings = AskSettings(generation=Generation(max_new_tokens=2))
    test = measure_needles(loaded, [clip, unknown], variants, settings)
    unpruned, evs = (row.figures[None, clip.size] for row in test.rows[:2])
    assert (unpruned.needles, unpruned.labelled) == (2, 1)
    assert (evs.needles, evs.labelled) == (1, 1)
    by_size, by_kind = shown_of(test).split("by kind")
    tokens, right, same = re.split("right answers|answers that", by_size)
    assert "n=2" in tokens
    assert "n=1" in right
    starred = [re.search(r"^evs at input .*\)\*$", part.replace(" \n", "\n"), re.MULTILINE)
               for part in (tokens, right, same)]  # fmt: skip
    assert [match is not None for match in starred] == [True, False, True]
    assert re.search(r"not run +evs at input 0\.5 \(1 of 2 needles\):", by_kind)


def test_an_asked_needle_is_a_question_with_choices(planted: list[Needle]) -> None:
    digit = next(needle.asked for needle in planted if needle.kind == "digit")
    frame = next(needle.asked for needle in planted if needle.kind == "frame")
    assert isinstance(digit, Asked)
    assert digit.answer is not None
    assert digit.answer.isdigit()
    assert frame.answer in frame.choices
    assert Image.fromarray(frame.file._frames[0]).size == (64, 48)  # type: ignore[union-attr]
