"""Models, made-up media and the surroundings that the whole run shares."""

from __future__ import annotations

import functools
import inspect
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from PIL import Image
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))

import tiny

import vtprune
from vtprune.inference.report import Report

if "mix_stderr" in inspect.signature(CliRunner).parameters:  # click 8.1: apart, as from 8.2 on
    CliRunner.__init__ = functools.partialmethod(CliRunner.__init__, mix_stderr=False)

torch.set_num_threads(1)  # tiny models; the workers share the cores


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


@pytest.fixture(scope="module")
def loaded(checkpoints) -> vtprune.Loaded:  # type: ignore[no-untyped-def]
    """A tiny LLaVA-OneVision with its preparation files."""
    return vtprune.load(str(checkpoints("llava_onevision")))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_noise(tmp_path / "good.png", 60, 90)


@pytest.fixture(scope="session", autouse=True)
def on_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The hub is not asked, and the config file of whoever runs the tests is not read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")  # of processes that a test starts
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test may write a config file of its own."""
    from vtprune.cli.config import config_path

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = config_path()
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes: writes fail half-way.

    Modules are not cached meanwhile: Python 3.11 takes a half-written file for a whole one, and
    every later import of the module fails.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # of decoders
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be put in its place."""

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)


def assert_refused(result: Result, message: str) -> None:
    """A command ended with one error line, `message` at its start, at most one hint, and no more.

    Args:
        message: a regular expression.
    """
    assert result.exit_code == 1
    assert re.match(message, result.stderr)
    assert len(result.stderr.splitlines()) <= 2
    assert result.stdout == ""


def answer_together(
    loaded: object, items: Sequence[tuple[object, str]], *args: object, **options: object
) -> list[Report]:
    """The reports of a batch, each of which, but for times, is what its item gets alone."""
    import vtprune

    together = vtprune.answer(loaded, items, *args, **options)
    for item, report in zip(items, together, strict=True):
        (alone,) = vtprune.answer(loaded, [item], *args, **options)
        for block in ("answer", "tokens", "flops", "input", "preset"):
            assert getattr(report, block) == getattr(alone, block), block
    return together


def save_noise(path: Path, height: int, width: int) -> Path:
    """A picture of noise, the same one for the same size."""
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.to(torch.uint8).numpy()).save(path)
    return path


def save_clip(folder: Path, num_frames: int) -> Path:
    """A directory of numbered pictures, which is a video of one frame a second, ever redder."""
    folder.mkdir()
    for number in range(num_frames):
        red = 240 * number // num_frames
        Image.new("RGB", (64, 48), (red, 20, 200)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def media() -> Path:
    """The real videos and pictures, where the checkout has them beside it."""
    path = Path(__file__).parents[2] / "shared" / "media"
    if not path.is_dir():
        pytest.skip("the real media set is not beside this checkout")
    return path


# -- docs/correctness.md, written by the tests that it speaks of ---------------------------------

CELL = "test_pruned_equals_masked_at_prefill_and_decode"
INTRODUCTION = """\
Written by `python -m pytest tests/test_engine.py --correctness-table docs/correctness.md` in a
checkout. A cell holds if the pruned logits equal those of the unpruned model with the dropped
tokens masked as keys, to 1e-5 in float32, at prefill and over 8 decode steps, for a cut at the
input, at one layer, at two layers, and at the input and a layer, with a dynamic and with a static
cache. `ragged` is a left-padded batch of two prompts of different length.
[`vtprune check`](check.md) does the same on your machine.

The cases that hold, by release of transformers (Molmo2 came with 5.23), and the table of the last
run:
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--correctness-table",
        metavar="FILE",
        help="try pruned = masked in all ways, and write which cells hold",
    )

    parser.addoption("--ray", action="store_true", help="run batches on a Ray cluster of two nodes")
    parser.addoption(
        "--zoo", action="store_true", help="try every image-text-to-text class of transformers"
    )
    parser.addoption(
        "--compiled", action="store_true", help="compile layers in every way, which takes minutes"
    )


def pytest_configure(config: pytest.Config) -> None:
    target = config.getoption("--correctness-table")
    if target and not hasattr(config, "workerinput"):
        config.pluginmanager.register(CorrectnessTable(Path(target)), "correctness-table")


class CorrectnessTable:
    """Collects the oracle test's cells, in one process or from all workers, and writes them."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.cells: dict[tuple[str, str], dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if CELL not in report.nodeid or (report.when != "call" and report.passed):
            return
        name, kind, schedule, *rest = report.nodeid.partition("[")[2].rstrip("]").split("-")
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        cell = {"passed": "yes", "skipped": f"skipped: {reason}"}.get(report.outcome, "**NO**")
        self.cells.setdefault((name, kind), {})["-".join([schedule, *rest])] = cell

    def pytest_sessionfinish(self) -> None:
        if not self.cells:
            return
        own = [cell for cells in self.cells.values() for cell in cells.values()]
        held = f"- transformers {transformers.__version__}: {own.count('yes'):,} of {len(own):,}"
        before = self.target.read_text(encoding="utf-8") if self.target.exists() else ""
        others = [
            line
            for line in before.splitlines()
            if line.startswith("- transformers ") and line.split(":")[0] != held.split(":")[0]
        ]
        columns = ("sdpa, one", "sdpa, ragged", "eager, one", "eager, ragged")
        rows = [
            "# Pruned equals masked",
            "",
            *INTRODUCTION.splitlines(),
            "",
            *sorted([*others, held]),
            "",
            f"| model | prompt | {' | '.join(columns)} |",
            "| --- " * (len(columns) + 2) + "|",
        ]
        for (name, kind), cells in sorted(self.cells.items()):
            shown = []
            for column in columns:
                attention, batch = column.split(", ")
                own = {
                    cell for key, cell in cells.items() if f"-{attention}-{batch}-" in f"-{key}-"
                }
                shown.append("; ".join(sorted(own)) or "not run")
            rows.append(f"| {name} | {kind} | {' | '.join(shown)} |")
        self.target.write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture
def chromium() -> str:
    """The browser; without one the test is skipped."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium")
    return found
