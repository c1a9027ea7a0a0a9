"""Media are decoded while the weights are read, and what goes wrong is told as before."""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import vtprune
from vtprune.errors import MediaError, ModelError, PresetError
from vtprune.inference import prompt_media
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.generate import Generation
from vtprune.inference.prompt_media import load_with_media, read_media
from vtprune.media import Limits
from vtprune.models import loading
from vtprune.models.base import Sampling
from vtprune.models.llava_onevision import LlavaOnevision
from vtprune.models.loading import load, open_model
from vtprune.preset import load_preset, override

PRESET = override(load_preset("balanced"), keep=0.4)
SHORT = Generation(max_new_tokens=4)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A directory of numbered pictures, which is a video."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (64, 48), (40 * number, 20, 200)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def damaged(clip: Path) -> Path:
    """The clip with a picture that opens, and does not decode."""
    file = clip / "004.png"
    Image.effect_noise((64, 48), 90).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:-400])
    return clip


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose weights must not be read."""
    monkeypatch.setattr(loading, "read_weights", lambda *_: pytest.fail("weights were read"))


def both(where: Path, *paths: Path, preset=PRESET, **options):  # type: ignore[no-untyped-def]
    """A model, and one prompt's media."""
    loaded, gathered = load_with_media(
        open_model(str(where)), paths, Sampling(), preset, Limits(), **options
    )
    return loaded, gathered


def readers() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("media")]


@pytest.mark.parametrize("method", ["random", "downsample"])
def test_what_is_read_meanwhile_is_what_is_read_afterwards(checkpoints, clip, method) -> None:  # type: ignore[no-untyped-def]
    where = checkpoints("llava_onevision")
    preset = override(load_preset("balanced"), keep=0.5, method=method)
    loaded, gathered = both(where, clip, preset=preset)
    after = read_media(loaded, [clip], Sampling(), preset, Limits())
    assert torch.equal(gathered.items[0].pixels, after.items[0].pixels)
    assert (gathered.items[0].index, gathered.full_size) == (after.items[0].index, after.full_size)
    reports = answer_questions(loaded, gathered, ["what?"], preset, generation=SHORT)
    expected = answer_questions(loaded, [clip], ["what?"], preset, generation=SHORT)
    assert [one.answer for one in reports] == [one.answer for one in expected]


def test_decoding_goes_on_while_the_weights_are_read(checkpoints, clip, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    read_weights, decoded = loading.read_weights, threading.Event()

    def wait_for_decoding(*arguments: object) -> object:
        assert decoded.wait(60), "nothing was decoded while the weights were read"
        return read_weights(*arguments)  # type: ignore[arg-type]

    def note(self, stage: str, done: int, total: int) -> None:  # type: ignore[no-untyped-def]
        decoded.set()

    monkeypatch.setattr(loading, "read_weights", wait_for_decoding)
    monkeypatch.setattr("vtprune.inference.prompt_media._BackgroundReader.note", note)
    both(checkpoints("llava_onevision"), clip)


def test_the_total_is_what_passed_and_not_the_sum_of_parts_that_overlap(
    checkpoints, clip, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    read_weights = loading.read_weights

    def slowly(*arguments: object) -> object:
        time.sleep(0.5)
        return read_weights(*arguments)  # type: ignore[arg-type]

    read_planned = prompt_media.read_planned

    def read_slowly(*arguments: object) -> object:
        time.sleep(0.5)
        gathered = read_planned(*arguments)  # type: ignore[arg-type]
        return replace(gathered, media_seconds=gathered.media_seconds + 0.5)

    monkeypatch.setattr(loading, "read_weights", slowly)
    monkeypatch.setattr(prompt_media, "read_planned", read_slowly)
    began = time.perf_counter()
    loaded, gathered = both(checkpoints("llava_onevision"), clip)
    (report,) = answer_questions(loaded, gathered, ["what?"], PRESET, generation=SHORT, since=began)
    whole = time.perf_counter() - began
    took = report.seconds
    parts = took.load + took.media + took.first_token + took.decode
    assert min(took.load, took.media) >= 0.5
    assert whole - 0.2 < took.total <= whole
    assert took.total < parts - 0.2


def test_a_file_that_can_not_be_opened_is_told_before_the_weights_are_read(
    checkpoints, no_weights, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MediaError, match=r"none\.mp4: no such file"):
        both(checkpoints("llava_onevision"), tmp_path / "none.mp4")


def test_a_kind_that_the_model_does_not_take_is_told_before_the_weights_are_read(
    checkpoints, no_weights, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match="takes image input, no video"):
        both(checkpoints("llava"), clip)


def test_a_budget_out_of_reach_is_told_before_the_weights_are_read(
    checkpoints, no_weights, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    preset = override(load_preset("balanced"), keep=0.01, method="downsample")
    with pytest.raises(PresetError, match="can't be reached by downsample"):
        both(checkpoints("llava_onevision"), clip, preset=preset)


def test_a_file_that_does_not_decode_is_told_and_no_thread_is_left(checkpoints, damaged) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MediaError, match=r"004\.png: .*(truncated|damaged)"):
        both(checkpoints("llava_onevision"), damaged)
    assert not readers()


def test_of_a_model_and_a_file_that_are_damaged_the_model_is_told(
    checkpoints, damaged, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    def fail(*_: object) -> None:
        raise ModelError("weights are missing")

    monkeypatch.setattr(loading, "read_weights", fail)
    with pytest.raises(ModelError, match="weights are missing"):
        both(checkpoints("llava_onevision"), damaged)
    assert not readers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError])
def test_decoding_stops_when_the_load_does(checkpoints, clip, monkeypatch, error) -> None:  # type: ignore[no-untyped-def]
    begun, stopped, transformed = threading.Event(), threading.Event(), []
    plan = LlavaOnevision.plan

    def slow_plan(self, *arguments):  # type: ignore[no-untyped-def]
        made = plan(self, *arguments)

        def transform(pixels: torch.Tensor) -> torch.Tensor:
            if pixels.is_meta or not pixels.any():  # how large a frame will be
                return made.transform(pixels)
            transformed.append(len(pixels))
            begun.set()
            assert stopped.wait(60)
            return made.transform(pixels)

        return replace(made, transform=transform)

    def fail(*_: object) -> None:
        assert begun.wait(60)
        raise error("stop")

    monkeypatch.setattr(LlavaOnevision, "plan", slow_plan)
    monkeypatch.setattr(loading, "read_weights", fail)
    monkeypatch.setattr("vtprune.inference.prompt_media.Event", lambda: stopped)
    monkeypatch.setattr("vtprune.media.reading._CHUNK_BYTES", 1)
    with pytest.raises(error, match="stop"):
        both(checkpoints("llava_onevision"), clip)
    assert not readers()
    assert transformed == [1]


def test_warnings_are_shown_afterwards_as_they_were_before(checkpoints, clip) -> None:  # type: ignore[no-untyped-def]
    before = list(warnings.filters)
    both(checkpoints("llava_onevision"), clip)
    assert warnings.filters == before


def test_progress_is_told_by_the_thread_that_asked(checkpoints, clip, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("vtprune.inference.prompt_media._POLL_SECONDS", 0.01)
    monkeypatch.setattr("vtprune.media.reading._CHUNK_BYTES", 1)
    slow, told = threading.Event(), []
    read = prompt_media.read_planned

    def read_slowly(chosen, limits, note):  # type: ignore[no-untyped-def]
        gathered = read(chosen, limits, note)
        assert slow.wait(60)
        return gathered

    def show(*reached: object) -> None:
        told.append((threading.current_thread(), reached))
        slow.set()

    monkeypatch.setattr("vtprune.inference.prompt_media.read_planned", read_slowly)
    both(checkpoints("llava_onevision"), clip, on_progress=show)
    assert {one for one, _ in told} == {threading.current_thread()}
    assert told[-1][1] == ("decoding clip", 6, 6)


def test_a_library_call_with_a_name_answers_as_with_the_loaded_model(checkpoints, clip) -> None:  # type: ignore[no-untyped-def]
    where = str(checkpoints("llava_onevision"))
    items = [(clip, "what?"), (clip / "001.png", "which colour?")]
    by_name = vtprune.answer(where, items, keep=0.4, generation=SHORT)
    loaded = vtprune.answer(load(where), items, keep=0.4, generation=SHORT)
    assert [one.answer for one in by_name] == [one.answer for one in loaded]
