"""Weights files as people have them: in shards, tied, under older names, incomplete, pickled."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import assert_refused, save_noise, shared_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from vtprune.cli import cli
from vtprune.errors import ModelError
from vtprune.models.loading import find_checkpoint, load, open_model
from vtprune.models.weights import INDEX, SINGLE, find_weights

NAMES = [
    name
    for name in ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "molmo2", "smolvlm")
    if name != "molmo2" or name in CONFIG_MAPPING  # not in the oldest transformers
]


def write_shards(source: Path, target: Path, num: int = 3) -> Path:
    """A copy of a checkpoint with its weights in `num` files and an index."""
    shutil.copytree(source, target)
    weights = load_file(target / SINGLE)
    (target / SINGLE).unlink()
    places = {
        key: f"model-{k % num + 1:05}-of-{num:05}.safetensors" for k, key in enumerate(weights)
    }
    for file in sorted(set(places.values())):
        shard = {key: weight for key, weight in weights.items() if places[key] == file}
        save_file(shard, target / file, metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (target / INDEX).write_text(json.dumps(index))
    return target


def change_index(directory: Path, change: Callable[[dict[str, object]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the weights of a checkpoint of one file."""
    weights = load_file(directory / SINGLE)
    change(weights)
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})
    return directory


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    expected = dict(second.named_parameters(remove_duplicate=False))
    weights = dict(first.named_parameters(remove_duplicate=False))
    assert weights.keys() == expected.keys()
    for path, weight in weights.items():
        assert torch.equal(weight, expected[path]), path


@pytest.fixture
def copy(checkpoints, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    return shutil.copytree(checkpoints("llava"), tmp_path / "model")


@pytest.fixture
def sharded(checkpoints, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    return write_shards(checkpoints("llava"), tmp_path / "sharded")


# -- what is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shards_and_both_layouts_of_names_give_the_same_weights(
    name: str, checkpoints, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    expected = shared_model(name)
    directory = write_shards(checkpoints(name), tmp_path / "sharded")
    assert find_weights(str(directory)).total == find_weights(str(checkpoints(name))).total
    assert_same_weights(load(str(directory)).model, expected)
    shutil.rmtree(directory)
    # save_pretrained writes the names that the authors published; these are the classes' own.
    shutil.copytree(checkpoints(name), directory)
    save_file(expected.state_dict(), directory / SINGLE, metadata={"format": "pt"})
    loaded = load(str(directory))
    assert_same_weights(loaded.model, expected)
    assert loaded.warnings == ()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_tied_weights_need_no_output_head(name: str, tmp_path: Path) -> None:
    directory = tiny.build(name, tmp_path / "tied", tie_word_embeddings=True)
    assert not any("lm_head" in key for key in load_file(directory / SINGLE))
    model = load(str(write_shards(directory, tmp_path / "sharded"))).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / str(number))
    assert_same_weights(load(str(snapshot)).model, shared_model("llava"))
    shard = snapshot / "model-00002-of-00003.safetensors"
    shard.resolve().rename(blobs / "2.incomplete")
    with pytest.raises(ModelError, match=rf"{shard.name} is missing, 1 of 3 weights files"):
        load(str(snapshot))


def test_a_directory_of_the_cache_names_its_snapshot(tmp_path: Path) -> None:
    directory = tmp_path / "models--owner--name"
    (directory / "snapshots" / "0123").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"no config\.json in this directory") as caught:
        find_checkpoint(str(directory))
    assert caught.value.hint == f"give {directory}/snapshots/0123, or the hub id owner/name"


def test_weights_of_whole_numbers_are_refused_but_buffers_are_not(
    checkpoints, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    directory = tmp_path / "rounded"
    shutil.copytree(checkpoints("llava"), directory)
    weights = load_file(directory / SINGLE)
    positions = {"model.language_model.rotary_emb.position_ids": torch.arange(9)}
    save_file(weights | positions, directory / SINGLE, metadata={"format": "pt"})
    load(str(directory))
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = weights[name].to(torch.int64)
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"weights of whole numbers \(1, such as {name}: I64\)"):
        load(str(directory))


# -- files that are not complete ------------------------------------------------------------------

SHARD = "model-00002-of-00003.safetensors"


def cut_short(directory: Path) -> None:
    (directory / SHARD).write_bytes((directory / SHARD).read_bytes()[:-100])


def cut_in_header(directory: Path) -> None:
    (directory / SHARD).write_bytes((directory / SHARD).read_bytes()[:60])


def place(name: str) -> Callable[[Path], None]:
    def change(index: dict[str, object]) -> None:
        places = index["weight_map"]
        assert isinstance(places, dict)
        places[next(iter(places))] = name

    return functools.partial(change_index, change=change)


def add_weight(index: dict[str, object]) -> None:
    places = index["weight_map"]
    assert isinstance(places, dict)
    places["model.extra.weight"] = SHARD


def write(name: str, contents: bytes | str) -> Callable[[Path], object]:
    data = contents.encode() if isinstance(contents, str) else contents
    return lambda directory: (directory / name).write_bytes(data)


def link_to_nothing(directory: Path) -> None:
    (directory / SHARD).unlink()
    (directory / SHARD).symlink_to("../gone")


Breaking = Callable[[Path], object]
BROKEN: Mapping[str, tuple[Breaking, str, str]] = {
    "missing": (lambda path: (path / SHARD).unlink(), rf"{SHARD} is missing, 1 of 3", "is kept"),
    "half written": (
        cut_short,
        rf"file {SHARD} is damaged: it has [\d,]+ bytes, and its header says [\d,]+",
        "again",
    ),
    "half a header": (
        cut_in_header, rf"{SHARD} is damaged: its header ends past its 60 bytes", "again",
    ),
    "empty": (write(SHARD, ""), rf"{SHARD} is damaged: its header ends past its 0 bytes", "again"),
    "text": (
        write(SHARD, b"\4\0\0\0\0\0\0\0nullxxxx"), rf"{SHARD} is damaged: its header is not",
        "again",
    ),
    "pointer": (
        write(SHARD, "version https://git-lfs.github.com/spec/v1\n"),
        rf"{SHARD} is a pointer of Git LFS", "git lfs pull",
    ),
    "link to nothing": (link_to_nothing, rf"{SHARD} is missing", "again"),
    "index cut": (write(INDEX, '{"metadata": {}, "wei'), rf"{INDEX} of .* is not JSON", "again"),
    "index of nothing": (write(INDEX, '{"metadata": {}}'), rf"{INDEX} has no weight_map", "again"),
    "index of numbers": (
        write(INDEX, '{"metadata": {}, "weight_map": {"a": 1}}'), "has no weight_map", "again",
    ),
    "index without metadata": (
        functools.partial(change_index, change=lambda index: index.pop("metadata")),
        rf"{INDEX} has no object named metadata", '"metadata": {}',
    ),
    "index of another": (
        functools.partial(change_index, change=add_weight),
        rf"{SHARD} lacks the weight model\.extra\.weight", "both again",
    ),
    "up": (
        place("../other.safetensors"),
        rf"{INDEX} names the weights file '\.\./other\.safetensors': it has to be", "again",
    ),
    "absolute": (place("/etc/x.safetensors"), "the weights file '/etc/x.safetensors'", "again"),
    "pickle": (place("pytorch_model.bin"), "the weights file 'pytorch_model.bin'", "again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_an_incomplete_checkpoint_names_the_file(kind: str, sharded: Path) -> None:
    change, message, hint = BROKEN[kind]
    change(sharded)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(sharded))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ("pytorch_model.bin", r"only pickled ones \(pytorch_model.bin\), which are not loaded"),
        ("model-Q4_K_M.gguf", "model-Q4_K_M.gguf is a GGUF file, which holds the language model"),
        ("model-00001-of-00002.safetensors", "is there, but neither model.safetensors nor"),
        ("notes.txt", "no weights there, neither model.safetensors nor"),
        ("model.safetensors.incomplete", "no weights there, neither"),
    ],
)
def test_a_checkpoint_without_its_weights_says_what_is_there(
    left: str, message: str, copy: Path
) -> None:
    (copy / SINGLE).rename(copy / left)
    with pytest.raises(ModelError, match=message):
        load(str(copy))


def test_a_dangling_link_is_named(copy: Path) -> None:
    (copy / SINGLE).unlink()
    (copy / SINGLE).symlink_to("../blobs/gone")
    with pytest.raises(
        ModelError, match=r"model\.safetensors is a link to a file that is not there"
    ):
        load(str(copy))


def test_the_command_line_names_the_file(sharded: Path, tmp_path: Path) -> None:
    (sharded / SHARD).unlink()
    picture = save_noise(tmp_path / "noise.png", 60, 60)
    result = CliRunner().invoke(cli, ["ask", str(picture), "what?", "--model", str(sharded)])
    assert_refused(result, rf"Error: {sharded}: {SHARD} is missing, 1 of 3 weights files")


def test_a_gguf_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model\.gguf: is a GGUF file, which holds") as caught:
        open_model(str(file))
    assert "safetensors checkpoint" in caught.value.hint
    with pytest.raises(ModelError, match=r"model\.gguf is a GGUF file"):
        open_model(str(tmp_path))


# -- weights of another model ---------------------------------------------------------------------


def test_a_weight_of_a_wrong_shape_is_named_with_both_shapes(copy: Path) -> None:
    def widen(weights: dict[str, torch.Tensor]) -> None:
        key = "language_model.model.layers.2.mlp.up_proj.weight"
        weights[key] = torch.zeros(weights[key].shape[0], 8)

    expected = (
        r"1 weights have another shape than config.json says, such as "
        r"model.language_model.layers.2.mlp.up_proj.weight: \[\d+, 8\], expected \[\d+, 64\]"
    )
    with pytest.raises(ModelError, match=expected):
        load(str(rewrite(copy, widen)))


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_config_of_a_far_larger_model_takes_no_memory(copy: Path, field: str) -> None:
    values = json.loads((copy / "config.json").read_text())
    values["text_config"][field] = 2**20
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"config\.json says .* words, more than .* hold .* MB"):
        load(str(copy))


def test_weights_of_another_model_are_refused(checkpoints, copy: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copy(checkpoints("qwen2_vl") / SINGLE, copy / SINGLE)
    with pytest.raises(ModelError, match=r"\d+ weights (are missing|have another shape)"):
        load(str(copy))


def test_weights_without_a_place_are_named(copy: Path) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["value_head.weight"] = torch.zeros(3)

    loaded = load(str(rewrite(copy, add)))
    assert loaded.warnings == (
        f"1 weights of {copy}, such as value_head.weight, have no place in "
        "LlavaForConditionalGeneration and are left out",
    )
    assert_same_weights(loaded.model, shared_model("llava"))
