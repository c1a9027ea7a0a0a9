"""Downloads of weights from a hub, here a server on this machine: bytes, and their total."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vtprune.models import weights_progress
from vtprune.models.weights import INDEX, find_weights
from vtprune.models.weights_progress import DOWNLOADING, download_bar

COMMIT = "a" * 40
SHARDS = [f"model-{number:05}-of-00012.safetensors" for number in range(1, 13)]
"""More than the client downloads at once, so that it doesn't know the total when it begins."""


class Hub(BaseHTTPRequestHandler):
    """The answers of a hub that has one repository.

    Args:
        folder: its files.
    """

    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        name = self.path.rpartition("/")[2]
        body = b""
        if self.path.startswith("/api/"):
            files = [
                {
                    "type": "file",
                    "path": file.name,
                    "rfilename": file.name,
                    "size": file.stat().st_size,
                    "oid": file.name,
                }
                for file in self.folder.iterdir()
            ]
            about = {"id": "org/name", "sha": COMMIT, "siblings": files}
            body = json.dumps(files if "/tree/" in self.path else about).encode()
        elif (self.folder / name).is_file():
            body = (self.folder / name).read_bytes()
        self.send_response(200 if body else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Error-Code", "" if body else "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD  # noqa: N815


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository of weights in several files, on a hub; its folder."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for number, shard in enumerate(SHARDS):
        save_file({f"weight{number}": torch.ones(1000)}, folder / shard)
    places = {f"weight{number}": shard for number, shard in enumerate(SHARDS)}
    index = {"metadata": {"total_size": 4000 * len(SHARDS)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants + "ENDPOINT", endpoint)
    monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(weights_progress, "MB", 1)
    yield folder
    server.shutdown()
    server.server_close()


def shown_by_download() -> list[tuple[int, int]]:
    shown: list[tuple[str, int, int]] = []
    weights = find_weights("org/name", bar=download_bar(lambda *step: shown.append(step)))
    assert weights.total == 4000 * len(SHARDS)
    assert {stage for stage, _, _ in shown} <= {DOWNLOADING}
    return [(done, total) for _, done, total in shown if total > 4000]  # not the index's own


def test_bytes_of_all_files_are_counted_against_the_total_of_their_index(
    hub: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = shown_by_download()
    sizes = {shard: (hub / shard).stat().st_size for shard in SHARDS}
    assert min(total for _, total in shown) >= 4000 * len(SHARDS)
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert len({done for done, _ in shown}) > 1
    assert max(total for _, total in shown) <= sum(sizes.values())
    assert capfd.readouterr() == ("", "")

    links = tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT
    for shard in SHARDS[:2]:
        (links / shard).resolve().unlink()
        (links / shard).unlink()
    totals = [total for _, total in shown_by_download()]
    assert totals
    assert max(totals) <= 2 * sizes[SHARDS[0]]
    assert shown_by_download() == []
