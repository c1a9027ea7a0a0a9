"""Weights are mapped and not copied, and what is shown while they load is counted in bytes."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_moe import EXPERTS
from tiny_base import TEXT
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedModel,
    core_model_loading,
)
from transformers.utils import logging

from vtprune.errors import ModelError
from vtprune.models import weights_progress
from vtprune.models.loading import load
from vtprune.models.weights import SINGLE, find_weights
from vtprune.models.weights_progress import DOWNLOADING, LOADING, READING, download_bar

Shown = list[tuple[str, int, int]]


@pytest.fixture
def in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny checkpoints have less than a megabyte."""
    monkeypatch.setattr(weights_progress, "MB", 1)


def shown_by(directory: Path, **options: str) -> Shown:
    shown: Shown = []
    load(str(directory), on_progress=lambda *step: shown.append(step), **options)
    return shown


def steps_of(shown: Shown, stage: str) -> list[int]:
    totals = {total for name, _, total in shown if name == stage}
    assert len(totals) == 1
    steps = [done for name, done, _ in shown if name == stage]
    assert steps == sorted(steps)
    assert steps[-1] == totals.pop()
    return steps


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "gemma3"])
def test_every_byte_of_the_files_is_counted(name: str, dtype: str, checkpoints, in_bytes) -> None:  # type: ignore[no-untyped-def]
    directory = checkpoints(name)
    shown = shown_by(directory, dtype=dtype)
    weights = find_weights(str(directory))
    assert steps_of(shown, LOADING)[-1] == weights.total
    assert len(steps_of(shown, LOADING)) > len(weights.num_bytes) / 2
    narrowed = dtype == "bfloat16"
    assert steps_of(shown, READING)[-1] == weights.total / (2 if narrowed else 1)


def test_two_threads_count_their_own_weights(checkpoints, in_bytes) -> None:  # type: ignore[no-untyped-def]
    names = ["llava", "qwen2_vl"]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(shown_by, [checkpoints(name) for name in names]))
    for name, shown in zip(names, both, strict=True):
        assert steps_of(shown, LOADING)[-1] == find_weights(str(checkpoints(name))).total


def test_loading_in_several_threads_leaves_transformers_as_it_was(checkpoints) -> None:  # type: ignore[no-untyped-def]
    before = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(shown_by, [checkpoints("llava")] * 8))
    assert PreTrainedModel.tie_weights is before


def test_a_hook_of_the_users_own_for_bars_is_put_back(checkpoints) -> None:  # type: ignore[no-untyped-def]
    def own(factory, args, kwargs):  # type: ignore[no-untyped-def]
        return factory(*args, **kwargs)

    logging.set_tqdm_hook(own)
    try:
        shown_by(checkpoints("llava"))
        assert logging.set_tqdm_hook(None) is own
    finally:
        logging.set_tqdm_hook(None)


def test_a_download_shows_bytes_and_their_total() -> None:
    shown: Shown = []
    kind = download_bar(lambda *step: shown.append(step))
    with kind(total=30_000_000, unit="B", mininterval=0, desc="model.safetensors") as bar:
        bar.update(12_000_000)
        bar.update(18_000_000)
    list(kind(range(3), total=3))  # of files, not of bytes
    assert shown[0] == (DOWNLOADING, 0, 30)
    assert (DOWNLOADING, 12, 30) in shown
    assert shown[-1] == (DOWNLOADING, 30, 30)


def test_a_download_by_xet_never_goes_back_and_ends_at_its_total() -> None:
    """The client's own reporter, with bytes on the way before and after those on the disk."""
    module = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
    for expected in (0, 30_000_000):
        shown: Shown = []
        kind = download_bar(lambda *step, shown=shown: shown.append(step))
        kind.expected = expected
        with module.XetDownloadProgressReporter(
            reconstruction_desc="", total=30_000_000, log_level=0, tqdm_class=kind
        ) as reporter:
            for on_disk, on_way in ((0, 5), (4, 12), (20, 18), (30, 18)):
                report = SimpleNamespace(
                    total_bytes=30_000_000, total_bytes_completed=on_disk * 10**6,
                    total_transfer_bytes_completed=on_way * 10**6,
                    total_bytes_completion_rate=None, total_transfer_bytes_completion_rate=None,
                )  # fmt: skip
                reporter.update_progress(report, {})
                for bar in (reporter.transfer_bar, reporter.reconstruction_bar):
                    bar.refresh()  # tqdm itself does so ten times a second
        assert {total for _, _, total in shown} == {30}
        assert [done for _, done, _ in shown] == sorted(done for _, done, _ in shown)
        assert {5, 12, 20, 30} <= {done for _, done, _ in shown}
        assert shown[-1] == (DOWNLOADING, 30, 30)


def test_downloads_get_that_bar(monkeypatch: pytest.MonkeyPatch, checkpoints) -> None:  # type: ignore[no-untyped-def]
    asked = {}

    def fake(checkpoint: str, name: str, **options: object) -> str:
        asked[name] = options["tqdm_class"]
        return str(checkpoints("llava") / name)

    monkeypatch.setattr("vtprune.models.checkpoint.cached_file", fake)
    bar = download_bar(None)
    assert find_weights("owner/name", bar=bar).total
    assert asked == {SINGLE: bar}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_and_not_copied(checkpoints) -> None:  # type: ignore[no-untyped-def]
    directory = checkpoints("llava_onevision")
    model = load(str(directory)).model
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(directory / SINGLE)):
            start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
            ranges.append(range(start, end))
    mapped = [
        weight.nbytes
        for weight in model.parameters()
        if any(weight.data_ptr() in places for places in ranges)
    ]
    assert sum(mapped) == sum(weight.nbytes for weight in model.parameters())


def save_experts(directory: Path, **sizes: int) -> Path:
    """Save a checkpoint that stores its experts singly, as their authors do."""
    fields = tiny.FAMILIES["llava"].config(partial(tiny.token, "llava"))
    text = {**TEXT, **EXPERTS, "model_type": "qwen3_moe", "head_dim": 16, "pad_token_id": None}
    text |= sizes
    config = CONFIG_MAPPING[fields.pop("model_type")](**{**fields, "text_config": text})
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    tiny.tokenizer("llava", True).save_pretrained(directory)
    tiny.write_files("llava", directory)
    return directory


def test_experts_are_read_one_layer_after_the_other(tmp_path: Path, monkeypatch, in_bytes) -> None:  # type: ignore[no-untyped-def]
    save_experts(tmp_path)
    num_bytes = find_weights(str(tmp_path)).num_bytes
    assert any(".experts.5." in name for name in num_bytes)
    copied: list[int] = []
    copy = core_model_loading._materialize_copy

    def counted(tensor, *args, **kwargs):  # type: ignore[no-untyped-def]
        copied.append(tensor[...].nbytes)
        return copy(tensor, *args, **kwargs)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", counted)
    ahead: list[int] = []

    def watch(stage: str, done: int, total: int) -> None:
        if stage == LOADING:
            ahead.append(sum(copied) - done)

    load(str(tmp_path), dtype="bfloat16", on_progress=watch)
    assert sum(copied) == sum(num_bytes.values())
    assert max(ahead) <= 0
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def mapped_bytes() -> int:
    """Bytes of files that are in this process's memory."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssFile:")[1].split()[0])


LARGE = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 3}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_copied_of_a_file_is_dropped(dtype: str, tmp_path: Path) -> None:
    directory = save_experts(tmp_path, **LARGE)
    num_bytes = find_weights(str(directory)).num_bytes
    experts = sum(count for name, count in num_bytes.items() if ".experts." in name)
    mapped = [mapped_bytes()]
    model = load(
        str(directory), dtype=dtype, on_progress=lambda *step: mapped.append(mapped_bytes())
    ).model
    others = sum(num_bytes.values()) - experts
    assert experts > 4 * others
    assert max(mapped) - mapped[0] < others + experts / 3
    plain = AutoModelForImageTextToText.from_pretrained(directory, dtype=getattr(torch, dtype))
    weights = dict(plain.named_parameters())
    for path, weight in model.named_parameters():
        assert torch.equal(weight, weights[path]), path
    save = tmp_path / "saved"
    model.save_pretrained(save)  # experts singly again
    assert find_weights(str(save)).num_bytes.keys() == num_bytes.keys()


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    weights = load_file(save_experts(tmp_path) / SINGLE)
    key = next(key for key in weights if ".experts.2.up_proj" in key)
    weights[key] = weights[key][:1].contiguous()  # of one row, which would fit every row
    save_file(weights, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"experts of .*layers\.0\.mlp.* several shapes: \[24, 64\]"
    ):
        load(str(tmp_path))


def test_weights_of_an_odd_layout_are_read_too() -> None:
    module = torch.nn.Module()
    module.register_parameter("scalar", torch.nn.Parameter(torch.tensor(1.0)))
    module.register_parameter("empty", torch.nn.Parameter(torch.zeros(0, 3)))
    module.register_parameter("turned", torch.nn.Parameter(torch.zeros(3, 2).T))
    weights_progress.read_weights_in(module, torch.device("cpu"), None)
    assert module.scalar == 1
