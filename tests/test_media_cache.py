"""Decoded and encoded media on disk: the same answers, bit for bit, and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import save_clip, save_noise

import vtprune
from vtprune.cli import cli
from vtprune.disk_cache import SUFFIX, DiskCache
from vtprune.engine.encoded_rows import join, split_call
from vtprune.engine.features_on_disk import load_features, store_features
from vtprune.engine.inputs import PixelView
from vtprune.engine.vision_encoder import EncoderHooks
from vtprune.errors import VtpruneError
from vtprune.models.encoder_cache import EncoderCache

SHORT = vtprune.Generation(max_new_tokens=3)
HALF: dict[str, Any] = {"method": "random", "at": 1, "keep": 0.5}
FEW = ("llava_next", "qwen3_vl", "molmo2")
"""Each joins features in a way of its own; --zoo runs all."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("media")
    pictures = {name: save_noise(root / f"{name}.png", height, 60)
                for name, height in (("a", 90), ("b", 44))}  # fmt: skip
    clips = {name: save_clip(root / name, count) for name, count in (("c", 5), ("d", 4))}
    return pictures | clips


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every run of a vision tower."""
    runs: list[object] = []
    whole = EncoderHooks.encode

    def encode(self: EncoderHooks, run: Callable[[], object], rows: object) -> object:
        runs.append(rows)
        return whole(self, run, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(EncoderHooks, "encode", encode)
    return runs


@contextmanager
def logits_of(loaded: vtprune.Loaded) -> Iterator[list[torch.Tensor]]:
    """Gets what the output head gives, as it comes."""
    seen: list[torch.Tensor] = []
    head = loaded.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    try:
        yield seen
    finally:
        handle.remove()


def answer(
    model: Path, cache: Path | None, items: Any, **options: Any
) -> tuple[list[vtprune.Report], list[torch.Tensor], vtprune.Loaded]:
    """What a process of its own would answer: the model is loaded anew."""
    loaded = vtprune.load(str(model), cache=cache)
    with logits_of(loaded) as logits:
        reports = vtprune.answer(loaded, items, generation=SHORT, **{**HALF, **options})
    return reports, logits, loaded


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob(f"*{SUFFIX}"))


# -- the same answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_second_process_skips_decoder_and_tower_and_answers_the_same_bits(
    name: str, checkpoints: Callable[[str], Path], files: dict[str, Path], tmp_path: Path,
    encodes: list[object], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if name not in FEW and not request.config.getoption("--zoo"):
        pytest.skip("--zoo runs every family")
    model = checkpoints(name)
    kinds = vtprune.load(str(model)).family.modalities
    pairs = [("c", "d")] * ("video" in kinds) + [("a", "b")] * ("image" in kinds)
    for first, second in pairs if request.config.getoption("--zoo") else pairs[:1]:
        items = [(files[first], "what?"), (files[second], "which of them is it?")]
        cache = tmp_path / first
        _, alone, _ = answer(model, None, items[:1])
        _, logits, _ = answer(model, cache, items[:1])
        assert all(map(torch.equal, alone, logits))  # with and without a cache
        plain, without, _ = answer(model, None, items)
        _, logits, _ = answer(model, cache, items)  # one was there, one is new
        del encodes[:]
        with monkeypatch.context() as patch:
            patch.setattr("vtprune.inference.prompt_media.read", None)
            known, again, loaded = answer(model, cache, items)
        assert not encodes
        assert loaded.cache is not None
        assert loaded.cache.found == 4
        assert all(map(torch.equal, logits, again))
        torch.testing.assert_close(again, without, atol=2e-5, rtol=0)
        assert [report.answer for report in known] == [report.answer for report in plain]
        assert known[0].tokens == plain[0].tokens
        assert known[0].input == plain[0].input
        assert known[0].flops.vision in (0.0, None)
        unpruned, *_ = answer(model, cache, items, method=None, at=None, keep=1.0)
        assert not encodes
        assert unpruned[0].tokens.keep_mean == 1


def test_stages_at_pixels_and_methods_that_read_the_tower_have_entries_of_their_own(
    checkpoints: Callable[[str], Path], files: dict[str, Path], tmp_path: Path,
    encodes: list[object]
) -> None:  # fmt: skip
    model, items = checkpoints("llava_onevision"), [(files["c"], "what?")]
    for options in (HALF, {"method": "visionzip", "at": "input"},
                    {"method": "predictable", "at": "pixels"}):  # fmt: skip
        plain, without, _ = answer(model, None, items, **options)
        del encodes[:]
        answer(model, tmp_path, items, **options)
        assert len(encodes) == 1  # the one without the tower's attention will not do
        again, logits, _ = answer(model, tmp_path, items, **options)
        assert len(encodes) == 1
        assert all(map(torch.equal, logits, without))
        assert again[0].tokens == plain[0].tokens


def test_whatever_features_follow_from_makes_another_entry(
    checkpoints: Callable[[str], Path], files: dict[str, Path], tmp_path: Path,
    encodes: list[object]
) -> None:  # fmt: skip
    model, cache = checkpoints("llava_onevision"), tmp_path / "cache"
    picture, item = tmp_path / "p.png", (files["a"], "what?")
    picture.write_bytes(files["a"].read_bytes())

    def encoded(loaded: vtprune.Loaded, media: Path, tiles: int | None = None) -> int:
        del encodes[:]
        sampling = vtprune.Sampling(max_tiles=tiles)
        vtprune.ask(loaded, media, "what?", sampling=sampling, generation=SHORT, **HALF)
        return len(encodes)

    loaded = vtprune.load(str(model), cache=cache)
    assert encoded(loaded, item[0]) == 1
    assert encoded(loaded, picture) == 0  # the same content by another name
    assert encoded(loaded, picture, 2) == 1
    picture.write_bytes(files["b"].read_bytes())
    assert encoded(loaded, picture) == 1  # another content by the same name
    assert encoded(vtprune.load(str(model), cache=cache, dtype="bfloat16"), item[0]) == 1
    changed = vtprune.load(str(model), cache=cache)
    with torch.no_grad():
        changed.model.get_output_embeddings().weight.add_(1)
    assert encoded(changed, item[0]) == 0  # of the decoder's weights nothing follows
    changed = vtprune.load(str(model), cache=cache)
    with torch.no_grad():
        next(changed.model.model.multi_modal_projector.parameters())[0, 0] += 1e-6
    assert encoded(changed, item[0]) == 1


# -- entries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["half", "flipped", "empty", "pickle", "others"])
def test_damaged_entries_are_ignored_and_written_anew(tmp_path: Path, damage: str) -> None:
    cache = DiskCache(tmp_path)
    value = {"x": torch.arange(64.0).bfloat16()}
    cache.store("k", value, ["note"])
    path = cache.path("k")
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 1
    bad = {
        "half": data[: len(data) // 2],
        "flipped": bytes(flipped),
        "empty": b"",
        "pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.",
        "others": (2).to_bytes(8, "little") + b"{}",
    }
    path.write_bytes(bad[damage])
    assert cache.load("k") is None
    cache.store("k", value, ["note"])
    loaded = cache.load("k")
    assert loaded is not None
    assert torch.equal(loaded[0]["x"], value["x"])
    assert loaded[1] == ["note"]


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=6000)
    for number, name in enumerate("abc"):
        cache.store(name, {"x": torch.zeros(1500, dtype=torch.uint8)}, [])
        os.utime(cache.path(name), (number, number))
    assert cache.load("a")  # used now
    cache.store("d", {"x": torch.zeros(1500, dtype=torch.uint8)}, [])
    assert [name for name in "abcd" if cache.load(name)] == ["a", "c", "d"]
    cache.store("e", {"x": torch.zeros(7000, dtype=torch.uint8)}, [])
    assert cache.load("e") is None  # larger than all that may be kept
    (tmp_path / "1-2.part").write_bytes(b"x")
    os.utime(tmp_path / "1-2.part", (0, 0))
    (tmp_path / "mine.txt").write_text("stays")
    cache.store("f", {"x": torch.zeros(10)}, [])
    assert not list(tmp_path.glob("*.part"))
    assert (tmp_path / "mine.txt").exists()


def _fill(folder: Path, number: int) -> None:
    cache = DiskCache(folder, max_bytes=100_000)
    for turn in range(40):
        name = str((turn + number) % 10)
        known = cache.load(name)
        assert known is None or bool((known[0]["x"] == int(name)).all())
        cache.store(name, {"x": torch.full((8000,), int(name), dtype=torch.uint8)}, [])
    assert not cache.reason


def test_processes_at_once_read_whole_entries_only(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 100_000
    assert not list(tmp_path.glob("*.part"))


def test_threads_that_want_the_same_entry_wait_for_the_first(tmp_path: Path) -> None:
    cache, misses = DiskCache(tmp_path), []

    def work() -> None:
        with cache.entry("k"):
            if cache.load("k") is None:
                misses.append(1)
                cache.store("k", {"x": torch.zeros(3)}, [])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(misses) == 1


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_costs_the_cache_and_not_the_answer(
    checkpoints: Callable[[str], Path], files: dict[str, Path], tmp_path: Path
) -> None:
    (report,), _, _ = answer(checkpoints("llava_onevision"), tmp_path, [(files["a"], "what?")])
    assert not report.error
    assert any("not written: no space left on device" in note for note in report.warnings)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_no_folder_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(VtpruneError, match=r"--cache .*file: file exists"):
        DiskCache(tmp_path / "file")
    with pytest.raises(VtpruneError, match=r"--cache .*not a file's name"):
        DiskCache(tmp_path / "a\0b")


def test_features_of_other_forms_are_not_joined() -> None:
    with pytest.raises(ValueError, match="differ"):
        join([{"pooler_output": 1}, {"pooler_output": 2}])


def test_features_of_layers_are_joined_layer_by_layer() -> None:
    layers = [[torch.full((n, 1), n + added) for added in (0.0, 9.0)] for n in (1, 2)]
    joined = join([{"deepstack_features": of_prompt} for of_prompt in layers])
    assert isinstance(joined, dict)
    rows = [layer.flatten().tolist() for layer in joined["deepstack_features"]]
    assert rows == [[1, 2, 2], [10, 11, 11]]


# -- calls of a batch ------------------------------------------------------------------------------


def view(*rows: dict[str, torch.Tensor]) -> PixelView:
    """A batch of prompts, of which not all have all inputs."""
    tensors = {name: torch.cat([row[name] for row in rows if name in row]) for name in rows[0]}
    return PixelView(tensors, [[]] * len(rows), rows=rows)


def test_a_prompt_without_media_has_no_encoder_call() -> None:
    pixels = {"pixel_values": torch.arange(6.0).view(2, 3)}
    batch = view(pixels, {}, {"pixel_values": torch.ones(1, 3)})
    calls = split_call((), {"pixel_values": batch.tensors["pixel_values"], "scale": 2}, batch)
    assert calls is not None
    assert [call.row for call in calls] == [0, 2]
    assert torch.equal(calls[0].kwargs["pixel_values"], pixels["pixel_values"])  # type: ignore[arg-type]
    assert calls[1].kwargs["scale"] == 2


def test_a_call_of_which_a_prompt_has_only_a_part_is_not_taken_apart() -> None:
    sizes = torch.ones(1, 2, dtype=torch.long)
    batch = view({"pixel_values": torch.ones(1, 3), "image_sizes": sizes}, {"image_sizes": sizes})
    assert split_call((), dict(batch.tensors), batch) is None


def test_an_argument_by_place_is_known_by_its_memory_and_not_by_its_shape() -> None:
    first, second = torch.ones(1, 3), torch.full((1, 3), 2.0)
    batch = view(
        {"pixel_values": first, "pixel_values_videos": -first},
        {"pixel_values": second, "pixel_values_videos": -second},
    )
    calls = split_call((batch.tensors["pixel_values_videos"],), {}, batch)
    assert calls is not None
    assert [call.args[0].tolist() for call in calls] == [[[-1] * 3], [[-2] * 3]]  # type: ignore[attr-defined]
    assert split_call((torch.zeros(2, 3),), {}, batch) is None


# -- entries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple])
def test_features_come_back_in_the_kind_of_sequence_that_they_were_in(
    kind: type, tmp_path: Path
) -> None:
    cache = EncoderCache(DiskCache(tmp_path), "m")
    features = kind([torch.ones(2, 3), torch.zeros(1, 3)])
    store_features(cache, "k", features, None)
    loaded = load_features(cache, "k", torch.device("cpu"))
    assert loaded is not None
    assert type(loaded[0]) is kind
    assert [part.tolist() for part in loaded[0]] == [part.tolist() for part in features]  # type: ignore[attr-defined]


@pytest.mark.parametrize("notes", [["output"], ["output", None, 5], ["output", None, []]])
def test_entries_of_another_form_are_not_read(notes: list[object], tmp_path: Path) -> None:
    """Too few notes, names that are no list, and tensors by another name."""
    cache = EncoderCache(DiskCache(tmp_path), "m")
    cache.disk.store("k", {"x": torch.ones(2)}, notes)
    assert load_features(cache, "k", torch.device("cpu")) is None


# -- the commands ----------------------------------------------------------------------------------


def test_commands_share_a_cache(
    checkpoints: Callable[[str], Path], files: dict[str, Path], tmp_path: Path,
    encodes: list[object]
) -> None:  # fmt: skip
    model = ["--model", str(checkpoints("llava_onevision")), "--max-new-tokens", "2"]
    cached = [*model, "--cache", str(tmp_path)]
    first = CliRunner().invoke(cli, ["ask", str(files["a"]), "what?", *cached, "--json"])
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(cli, ["batch", str(files["a"]), "-q", "what?", *cached])
    assert len(encodes) == 1
    assert json.loads(second.stdout)["answer"] == json.loads(first.stdout)["answer"]
    assert "cache: 2 found, 0 added" in second.stderr
    both = CliRunner().invoke(cli, ["ask", str(files["a"]), "what?", *cached, "--compare"])
    assert "--compare and --cache exclude each other" in both.stderr
    wrong = CliRunner().invoke(cli, ["ask", str(files["a"]), "what?", "--cache-size", "0"])
    assert "--cache-size 0.0 is out of range" in wrong.stderr
