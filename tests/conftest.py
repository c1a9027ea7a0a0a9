"""Models shared by the whole run, and where the real media are."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))

import tiny

torch.set_num_threads(2)


@functools.cache
def shared_model(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """A tiny model; tests leave it as they found it."""
    return tiny.model(name, attention=attention)


@functools.cache
def shared_checkpoint(root: Path, name: str) -> Path:
    return tiny.build(name, root / name)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """name -> directory of a tiny checkpoint in the hub's format."""
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.partial(shared_checkpoint, root)


@pytest.fixture
def media() -> Path:
    """The real videos and pictures, where the checkout has them beside it."""
    path = Path(__file__).parents[2] / "shared" / "media"
    if not path.is_dir():
        pytest.skip("the real media set is not beside this checkout")
    return path
