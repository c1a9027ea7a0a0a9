"""The weights files of a checkpoint: which there are, how large, and whether they are complete.

Headers alone are read, before any weight: what is missing or half written is named by its file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from vtprune.errors import ModelError
from vtprune.models.checkpoint import download, find_file, parse
from vtprune.models.names import GGUF, GGUF_HINT

if TYPE_CHECKING:
    from vtprune.models.weights_progress import DownloadBar

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LFS_POINTER = b"version https://git-lfs"
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors format has it
AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a checkpoint.

    Args:
        files: their paths.
        num_bytes: of every weight, by its name in the files.
        dtypes: of every weight, as the format names them ("F32", "I64").
    """

    files: tuple[Path, ...]
    num_bytes: Mapping[str, int]
    dtypes: Mapping[str, str]

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(self.num_bytes.values())

    def refuse_whole_numbers(self, checkpoint: str) -> None:
        """Refuse weights of whole numbers, which only a quantised checkpoint has.

        Buffers, such as positions, may be whole numbers anywhere.

        Raises:
            ModelError: there are some; one is named.
        """
        whole = [
            name
            for name, dtype in self.dtypes.items()
            if name.endswith(".weight") and dtype.startswith(("I", "U", "BOOL"))
        ]
        if whole:
            raise ModelError(
                f"{checkpoint}: weights of whole numbers ({len(whole):,}, such as {whole[0]}: "
                f"{self.dtypes[whole[0]]}), and config.json says nothing of quantised ones",
                "config.json and the weights files are of two checkpoints: download both again",
            )


def find_weights(
    checkpoint: str, named: str | None = None, bar: type[DownloadBar] | None = None
) -> Weights:
    """Find the weights files of a directory or hub id, and read their headers.

    Args:
        named: the file of weights, or their index, that config.json names in place of the usual.
        bar: for downloads.

    Raises:
        ModelError: a file is missing, half written or not safetensors; it is named.
    """
    for name in (named,) if named else (SINGLE, INDEX):
        refuse_outside("config.json", name)
        path = find_file(checkpoint, name, bar)
        if path is not None and name.endswith(".json"):
            return _read_index(checkpoint, name, path, bar)
        if path is not None:
            return Weights((path,), *read_header(path, name))
        if os.path.islink(os.path.join(checkpoint, name)):
            raise ModelError(f"{checkpoint}: {name} is a link to a file that is not there", AGAIN)
    raise ModelError(*_explain_absent(checkpoint, named))


def _read_index(checkpoint: str, name: str, path: Path, bar: type[DownloadBar] | None) -> Weights:
    """Read the headers of all files that an index names."""
    index = parse(checkpoint, name, path.read_text(encoding="utf-8", errors="replace"))
    places = index.get("weight_map")
    files = places.values() if isinstance(places, dict) else ()
    if not files or not all(isinstance(file, str) for file in files):
        raise ModelError(f"{checkpoint}: {name} has no weight_map of weights to files", AGAIN)
    metadata = index.get("metadata")
    if not isinstance(metadata, dict):  # transformers fails on it without a word
        raise ModelError(
            f"{checkpoint}: {name} has no object named metadata", 'add "metadata": {} to it'
        )
    assert isinstance(places, dict)
    names = sorted(set(files))
    for shard in names:
        refuse_outside(name, shard)
    total = metadata.get("total_size")
    download(checkpoint, names, bar, total if isinstance(total, int) else 0)
    shards = {shard: find_file(checkpoint, shard) for shard in names}
    absent = [shard for shard, found in shards.items() if found is None]
    if absent:
        raise ModelError(
            f"{checkpoint}: {absent[0]} is missing, {len(absent)} of {len(names)} weights files "
            f"({name})",
            f"{AGAIN}; what is there already is kept",
        )
    num_bytes: dict[str, int] = {}
    dtypes: dict[str, str] = {}
    for shard, file in shards.items():
        assert file is not None
        sizes, kinds = read_header(file, shard)
        lacking = [key for key, place in places.items() if place == shard and key not in sizes]
        if lacking:
            raise ModelError(
                f"{checkpoint}: {shard} lacks the weight {lacking[0]}, which {name} places there",
                "the index and the weights files are of two checkpoints: download both again",
            )
        num_bytes |= sizes
        dtypes |= kinds
    return Weights(tuple(file for file in shards.values() if file is not None), num_bytes, dtypes)


def refuse_outside(source: str, name: str) -> None:
    """Refuse a name of a weights file that leads out of the checkpoint's directory.

    Args:
        source: the file that has the name.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    leads_out = path.is_absolute() or ".." in path.parts or ":" in name
    if leads_out or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"{source} names the weights file {name!r}: it has to be a safetensors file inside the "
            "checkpoint's directory",
            AGAIN,
        )


def read_header(path: Path, name: str) -> tuple[dict[str, int], dict[str, str]]:
    """Return the bytes and the dtype of every weight of a safetensors file.

    The file's size has to fit them.

    Args:
        name: as errors name it.

    Raises:
        ModelError: half written, or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(len(LFS_POINTER))
        if first == LFS_POINTER:
            raise ModelError(
                f"{path.parent}: {name} is a pointer of Git LFS, not the weights", "git lfs pull"
            )
        length = int.from_bytes(first[:8], "little")
        if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _damaged(path, name, f"its header ends past its {size:,} bytes")
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        ends = {key: list(map(int, entry["data_offsets"])) for key, entry in header.items()}
        num_bytes = {key: end - start for key, (start, end) in ends.items()}
        dtypes = {key: str(entry["dtype"]) for key, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, name, "its header is not that of a safetensors file") from error
    expected = 8 + length + max((end for _, end in ends.values()), default=0)
    if size != expected:
        raise _damaged(path, name, f"it has {size:,} bytes, and its header says {expected:,}")
    return num_bytes, dtypes


def _damaged(path: Path, name: str, why: str) -> ModelError:
    return ModelError(f"{path.parent}: the weights file {name} is damaged: {why}", AGAIN)


def _explain_absent(checkpoint: str, named: str | None) -> tuple[str, str]:
    """Return the message and hint for a checkpoint without a safetensors file of the usual name."""
    wanted = named or f"{SINGLE} nor {INDEX}"
    if not os.path.isdir(checkpoint):
        return (
            f"{checkpoint}: neither {wanted} is on the hub or in its local cache",
            "pickled weights and GGUF files are not loaded; an interrupted download goes on where "
            "the hub can be reached",
        )
    files = sorted(os.listdir(checkpoint))
    by_suffix = {Path(file).suffix: file for file in files}
    if ".safetensors" in by_suffix:
        return f"{checkpoint}: {by_suffix['.safetensors']} is there, but neither {wanted}", AGAIN
    pickled = next((by_suffix[suffix] for suffix in PICKLED if suffix in by_suffix), None)
    if pickled:
        return (
            f"{checkpoint}: no safetensors weights, only pickled ones ({pickled}), which are not "
            "loaded",
            "convert them: save_pretrained of transformers writes safetensors",
        )
    if ".gguf" in by_suffix:
        return f"{checkpoint}: {by_suffix['.gguf']} {GGUF}", GGUF_HINT
    return f"{checkpoint}: no weights there, neither {wanted}", AGAIN
