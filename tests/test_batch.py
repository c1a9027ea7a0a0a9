"""Batches of requests: what they mean, their lines, kills, full memory, and bad files."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import save_noise
from PIL import Image

import vtprune
from vtprune import demo
from vtprune._dev import kills
from vtprune.cli import cli
from vtprune.errors import VtpruneError
from vtprune.inference.generate import Generation, Run
from vtprune.inference.messages import read_messages
from vtprune.media import open_sources
from vtprune.models.base import Sampling, Turn
from vtprune.serving import batch as batch_module
from vtprune.serving.batch import (
    AnswerLines,
    BatchSettings,
    Counts,
    prepare_request,
    run_batch,
    turns_over,
)
from vtprune.serving.requests import HINT, Request, find_files, read_requests, requests_about

SHORT = BatchSettings(generation=Generation(max_new_tokens=4), batch_size=4)
PRESET = vtprune.load_preset({"keep": 0.4, "stages": [{"at": 2, "method": "random"}]})


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, ["batch", *args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of different sizes, in two folders, a damaged one, and what is no picture."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "more").mkdir()
    for number in range(6):
        place = root / "more" if number > 3 else root
        save_noise(place / f"{number}.png", 40 + 20 * number, 60)
    save_noise(root / "10.png", 50, 50)
    (root / "bad.png").write_bytes((root / "1.png").read_bytes()[:200])
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.png").write_bytes((root / "1.png").read_bytes())
    return root


def run(
    loaded: vtprune.Loaded,
    requests: Sequence[Any],
    path: Path | None = None,
    settings: BatchSettings = SHORT,
    identity: str = "r",
) -> tuple[list[Any], Counts]:
    texts: list[str] = []
    with AnswerLines(path, identity, texts.append) as lines:
        counts = run_batch(loaded, requests, lines, settings)
    return [json.loads(line) for line in (path.read_text().splitlines() if path else texts)], counts


def test_a_folder_means_its_media_in_natural_order(folder: Path) -> None:
    files, num_others = find_files([str(folder)])
    names = [os.path.relpath(file, folder) for file in files]
    assert names == ["0.png", "1.png", "2.png", "3.png", "10.png", "bad.png",
                     os.path.join("more", "4.png"), os.path.join("more", "5.png")]  # fmt: skip
    assert num_others == 1
    assert len(find_files([str(folder / "?.png"), str(folder / "1.png")])[0]) == 4
    for name in ("none.png", "*.mp4"):
        with pytest.raises(vtprune.MediaError, match=r"no such file|no file matches"):
            find_files([str(folder / name)])


def test_answers_in_batches_are_those_alone(loaded: vtprune.Loaded, folder: Path) -> None:
    files = [str(folder / f"{number}.png") for number in (0, 1, 2, 3, 10)]
    requests = requests_about(files, ["what?", "which of them is it then?"], PRESET)
    lines, counts = run(loaded, requests)
    assert (counts.answered, counts.failed) == (10, 0)
    for line in lines:
        alone = vtprune.ask(loaded, line["files"], line["question"], preset=PRESET,
                            generation=SHORT.generation)  # fmt: skip
        assert line["answer"] == alone.answer
        assert line["tokens"]["kept_after"] == alone.tokens.kept_after
        assert line["tokens"]["keep_mean"] == pytest.approx(alone.tokens.keep_mean)


def test_a_bad_file_has_an_error_in_its_line_and_ends_nothing(
    loaded: vtprune.Loaded, folder: Path
) -> None:
    requests = requests_about(find_files([str(folder)])[0], ["what?"], PRESET)
    lines, counts = run(loaded, requests)
    assert (counts.answered, counts.failed) == (7, 1)
    (failed,) = [line for line in lines if line["error"]]
    assert failed["files"] == [str(folder / "bad.png")]
    assert "bad.png" in failed["error"]
    assert failed["answer"] is None


def test_lines_are_in_the_order_of_the_requests_where_that_is_asked(
    loaded: vtprune.Loaded, folder: Path
) -> None:
    requests = requests_about(find_files([str(folder)])[0], ["what?"], PRESET)
    lines, _ = run(loaded, requests, settings=replace(SHORT, in_order=True))
    assert [line["key"] for line in lines] == [request.key for request in requests]


def test_a_run_goes_on_where_it_was_and_only_with_its_own_lines(
    loaded: vtprune.Loaded, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    requests = requests_about(find_files([str(folder)])[0], ["what?"], PRESET)
    first, _ = run(loaded, requests[:3], path)
    half = path.read_text() + path.read_text()[: len(path.read_text()) // 7]
    path.write_text(half)
    lines, counts = run(loaded, requests, path)
    assert (counts.before, counts.answered + counts.failed) == (3, 5)
    assert lines[:3] == first
    assert sorted(line["key"] for line in lines) == sorted(request.key for request in requests)
    kept = path.read_bytes()
    with pytest.raises(VtpruneError, match="line 1: answered by another model, preset, settings"):
        run(loaded, requests, path, identity="other")
    assert path.read_bytes() == kept


def test_keys_stay_when_requests_are_added_and_tell_equal_ones_apart(folder: Path) -> None:
    files = find_files([str(folder)])[0]
    few = requests_about(files[1:], ["what?"], PRESET)
    more = requests_about(files, ["what?"], PRESET)
    assert [request.key for request in few] == [request.key for request in more[1:]]
    twice = requests_about([files[0]], ["what?", "what?"], PRESET)
    assert twice[0].key != twice[1].key
    other = requests_about(files, ["what?"], vtprune.load_preset("fast"))
    assert {request.key for request in other}.isdisjoint(request.key for request in more)


def test_a_batch_gets_smaller_when_memory_runs_out(
    loaded: vtprune.Loaded, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    whole = batch_module.generate

    def generate(loaded: vtprune.Loaded, questions: Sequence[Any], *args: Any) -> list[Run]:
        sizes.append(len(questions))
        if len(questions) > 1:
            from vtprune.inference.out_of_memory import as_memory_error

            with as_memory_error(lambda: ("out of memory", "")):
                raise torch.OutOfMemoryError("too much")
        return whole(loaded, questions, *args)

    monkeypatch.setattr(batch_module, "generate", generate)
    files = [str(folder / f"{number}.png") for number in range(4)]
    lines, counts = run(loaded, requests_about(files, ["what?"], PRESET))
    assert counts.answered == len(lines) == 4
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert "memory ran out with 4 requests in a batch: 2 from there on" in counts.notes[0]


def test_what_is_read_ahead_of_the_model_is_bounded_by_bytes(
    loaded: vtprune.Loaded, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(folder / f"{number}.png") for number in (0, 1, 2, 3)] * 6
    requests = requests_about([files[0], str(folder / "bad.png"), *files], ["what?"], PRESET)
    settings = replace(SHORT, workers=3)
    begun: list[str] = []
    whole = batch_module.prepare

    def prepare(loaded: vtprune.Loaded, request: Request, settings: BatchSettings) -> Any:
        begun.append(request.key)
        return whole(loaded, request, settings)

    monkeypatch.setattr(batch_module, "prepare", prepare)
    sizes = [batch_module.bytes_of(whole(loaded, request, SHORT)) for request in requests]
    assert sizes[1] == 0 < min(sizes[2:])

    readings: list[batch_module.Reading] = []

    class Reading(batch_module.Reading):
        def __init__(self, *args: Any) -> None:
            readings.append(self)
            super().__init__(*args)

    monkeypatch.setattr(batch_module, "Reading", Reading)

    def got_as_far_as_it_may() -> bool:
        reading = readings[-1]
        with reading.lock:
            full = reading.held >= batch_module.MOST_AHEAD_BYTES
            full = full or len(reading.queue) >= reading.size or len(begun) == len(requests)
            return full and not reading.running

    def chunks(most: int) -> tuple[list[int], list[int], int]:
        """Return the sizes of the chunks, the order, and the most bytes begun and not answered."""
        monkeypatch.setattr(batch_module, "MOST_AHEAD_BYTES", most)
        begun.clear()
        lengths, order, answered, peak = [], [], 0, 0
        with ThreadPoolExecutor(settings.workers) as pool:
            for chunk in batch_module.read_ahead(pool, loaded, requests, settings):
                deadline = time.monotonic() + 60
                while not got_as_far_as_it_may():  # the time that a model takes
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                peak = max(peak, sum(sizes[: len(begun)]) - answered)
                numbers = [number for number, _, _ in chunk]
                answered += sum(sizes[number] for number in numbers)
                lengths.append(len(numbers))
                order += numbers
        return lengths, order, peak

    most = 4 * max(sizes)
    lengths, order, peak = chunks(most)
    assert order == list(range(len(requests)))
    assert len(set(begun)) == len(requests)
    assert max(lengths) < 8
    assert most // 2 < peak <= most + settings.workers * max(sizes)
    free_lengths, order, free_peak = chunks(10**12)
    assert free_lengths == [16, 10]
    assert order == list(range(len(requests)))
    assert free_peak == sum(sizes) > 2 * peak
    lengths, order, _ = chunks(2)  # each is over the bound when it is alone
    assert order == list(range(len(requests)))
    assert max(lengths) <= 2


def test_a_request_that_fails_in_a_batch_fails_alone(
    loaded: vtprune.Loaded, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = batch_module.generate

    def generate(loaded: vtprune.Loaded, questions: Sequence[Any], *args: Any) -> list[Run]:
        if any(question.question == "boo" for question in questions):
            raise KeyError("boo")
        return whole(loaded, questions, *args)

    monkeypatch.setattr(batch_module, "generate", generate)
    lines, counts = run(loaded, requests_about([str(folder / "1.png")], ["a", "boo", "c"], PRESET))
    assert (counts.answered, counts.failed) == (2, 1)
    assert {line["question"]: line["error"] for line in lines if line["error"]} == {
        "boo": "internal KeyError: 'boo'"
    }


def test_requests_have_their_own_keep_preset_and_messages(
    loaded: vtprune.Loaded, folder: Path, tmp_path: Path
) -> None:
    os.symlink(folder / "1.png", tmp_path / "a.png")
    os.symlink(folder / "2.png", tmp_path / "b.png")
    parts = [{"type": "text", "text": "first "}, {"type": "image", "image": "a.png"},
             {"type": "image_url", "image_url": {"url": "b.png"}},
             {"type": "text", "text": "which?"}]  # fmt: skip
    rows = [
        {"id": "one", "file": "a.png", "question": "what?"},
        {"id": 2, "files": ["a.png", "b.png"], "question": "which?", "keep": 0.9},
        {"messages": [{"role": "system", "content": "be brief"},
                      {"role": "user", "content": parts}], "preset": "fast"},
    ]  # fmt: skip
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    requests = read_requests(path, PRESET)
    assert requests[2].turns == (
        Turn("system", "be brief"),
        Turn("user", "first which?", 2, (6, 6)),
    )
    lines, counts = run(loaded, requests, settings=replace(SHORT, in_order=True))
    assert counts.answered == 3
    assert [line.get("id") for line in lines] == ["one", 2, None]
    assert lines[1]["tokens"]["keep_mean"] > 0.85
    assert lines[0]["tokens"]["keep_mean"] < 0.45
    assert lines[2]["preset"] == "fast"
    assert [len(line["files"]) for line in lines] == [1, 2, 2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "line 2: not JSON"),
        ("[1]", "line 2: a line must be a mapping"),
        ('{"file": "a.png"}', "line 2: needs file or files, and question; or messages"),
        ('{"file": "a.png", "files": ["a.png"], "question": "?"}', "line 2: needs file or files"),
        ('{"file": "a.png", "question": " "}', "line 2: question"),
        ('{"file": "a.png", "question": "what?", "kep": 1}', "'kep', did you mean keep"),
        ('{"file": "a.png", "question": "what?", "keep": 2}', "line 2: .*keep 2"),
        ('{"file": "a.png", "question": "what?", "preset": "non"}', "line 2: .*preset"),
        ('{"file": "a.png", "question": "?", "keep": [1]}', r"keep: \[1\] is not a fraction"),
        ('{"file": "a.png", "question": "?", "keep": {"image": "x"}}', "keep: 'x' is not a"),
        ('{"file": "a.png", "question": "?", "id": [1]}', r"id: \[1\] is not a text or a whole nu"),
        ('{"file": "a.png", "question": "?", "files": 3}', "files: 3 is not 1 to 64 texts"),
        ('{"messages": [], "file": "a.png"}', "exclude each other"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no picture and no video"),
        ('{"messages": [{"role": "boss", "content": "hi"}]}', "role 'boss' is none of"),
        ('{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', "of a known"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}', "the last one is of the assis"),
    ],
)  # fmt: skip
def test_wrong_requests_are_named(folder: Path, tmp_path: Path, line: str, reason: str) -> None:
    os.symlink(folder / "1.png", tmp_path / "a.png")
    path = tmp_path / "requests.jsonl"
    good = '{"file": "a.png", "question": "what?"}\n'
    path.write_text(good + line)
    first, second = read_requests(path, PRESET)
    assert first.fault == ""
    assert re.search(f"^line 2: .*{reason.removeprefix('line 2: ')}", second.fault)
    path.write_text(line)
    with pytest.raises(VtpruneError, match=r"requests\.jsonl: line 1: "):
        read_requests(path, PRESET)  # nothing in it is a request


def test_the_list_that_demo_writes_is_one_of_requests(tmp_path: Path) -> None:
    demo.write(tmp_path, 6, 0)
    labelled = {"file": next(tmp_path.glob("*.png")).name, "question": "q?", "answers": ["yes"]}
    (tmp_path / "more.jsonl").write_text(json.dumps({**labelled, "choices": ["yes", "no"]}))
    requests = read_requests(tmp_path / "questions.jsonl", PRESET)
    assert len(requests) == 6
    assert not any(request.fault for request in requests)
    with pytest.raises(VtpruneError, match="unknown key 'choices'"):  # they would change the prompt
        read_requests(tmp_path / "more.jsonl", PRESET)


def test_a_wrong_line_of_a_list_is_an_error_in_its_line(
    loaded: vtprune.Loaded, folder: Path, tmp_path: Path
) -> None:
    os.symlink(folder / "1.png", tmp_path / "a.png")
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"id": 7, "file": "a.png", "question": "what?", "keep": 2}\n'
        '{"file": "a.png", "question": "what?"}\n'
    )
    lines, counts = run(loaded, read_requests(path, PRESET))
    assert (counts.answered, counts.failed) == (1, 1)
    wrong = next(line for line in lines if line["error"])
    assert (wrong["id"], wrong["files"], wrong["question"]) == (7, ["a.png"], "what?")
    assert re.match("line 1: .*keep 2", wrong["error"])
    assert wrong["hint"] == HINT
    (tmp_path / "requests.csv").write_text("file,text\na.png,what?\n,\n")
    good, wrong_row = read_requests(tmp_path / "requests.csv", PRESET, columns={"question": "text"})
    assert not good.fault
    assert "--columns" in wrong_row.hint


def test_a_table_of_requests_has_columns_and_may_hold_its_pictures(
    loaded: vtprune.Loaded, folder: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    picture = (folder / "1.png").read_bytes()
    table = pyarrow.table({"picture": [{"bytes": picture, "path": None}], "text": ["what?"]})
    parquet.write_table(table, tmp_path / "requests.parquet")
    columns = {"file": "picture", "question": "text"}
    (line,), counts = run(
        loaded, read_requests(tmp_path / "requests.parquet", PRESET, columns=columns)
    )
    (alone,), _ = run(loaded, requests_about([str(folder / "1.png")], ["what?"], PRESET))
    assert counts.failed == 0
    assert line["answer"] == alone["answer"]
    assert Path(line["files"][0]).name.startswith("requests.parquet#")


def test_a_file_of_a_list_that_is_missing_is_an_error_in_its_line(
    loaded: vtprune.Loaded, folder: Path, tmp_path: Path
) -> None:
    os.symlink(folder / "1.png", tmp_path / "a.png")
    path = tmp_path / "requests.jsonl"
    lines = [{"file": name, "question": "what?"} for name in ("none.png", "a.png")]
    path.write_text("\n".join(map(json.dumps, lines)))
    answers, counts = run(loaded, read_requests(path, PRESET))
    assert (counts.answered, counts.failed) == (1, 1)
    assert {line["files"][0][-8:]: line["error"] is None for line in answers} == {
        "none.png": False, str(tmp_path / "a.png")[-8:]: True,
    }  # fmt: skip
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(VtpruneError, match=r"none\.png.*no such file"):
        read_requests(path, PRESET)


def test_media_in_messages_of_others_and_too_many_are_refused() -> None:
    def resolve(kind: str, reference: str) -> str:
        return reference

    picture = {"type": "image", "image": "a.png"}
    with pytest.raises(VtpruneError, match="a message of the system has a media item"):
        read_messages([{"role": "system", "content": [picture]}], resolve)
    with pytest.raises(VtpruneError, match="more than 64 pictures"):
        read_messages([{"role": "user", "content": [picture] * 65}], resolve)
    with pytest.raises(VtpruneError, match="more than 400,000 characters"):
        read_messages([{"role": "user", "content": "x" * 400_001}], resolve)
    with pytest.raises(VtpruneError, match="more than 256"):
        read_messages([{"role": "user", "content": "x"}] * 257, resolve)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_lines_and_goes_on(
    checkpoints: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    args = (str(folder), "-q", "what?", "--model", str(checkpoints("llava_onevision")),
            "--max-new-tokens", "2", "--save", str(path))  # fmt: skip
    result = invoke(*args, "--keep", "0.4")
    assert result.exit_code == 0, result.output
    assert "answered  7 of 8" in result.stderr
    assert "failed    1: the lines with an error say why" in result.stderr
    assert "note      1 other files in the folders are left out" in result.stderr
    assert len(path.read_text().splitlines()) == 8
    again = invoke(*args, "--keep", "0.4", "--json")
    assert json.loads(again.stdout)["before"] == 8
    other = invoke(*args, "--keep", "0.4", "--frames", "3")
    assert other.exit_code == 1
    assert "answered by another model, preset, settings or version" in other.stderr
    kept = path.read_bytes()
    for changed in (["--keep", "0.5"], ["--preset", "fast"], ["--method", "random"]):
        other = invoke(*args, *changed)
        assert other.exit_code == 1
        assert "answered by another model, preset, settings or version" in other.stderr
    assert path.read_bytes() == kept


def test_without_a_file_the_lines_are_printed(
    checkpoints: Callable[[str], Path], folder: Path
) -> None:
    model = str(checkpoints("llava_onevision"))
    result = invoke(str(folder / "1.png"), "-q", "what?", "--model", model,
                    "--max-new-tokens", "2", "--quiet")  # fmt: skip
    assert json.loads(result.stdout)["question"] == "what?"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["a.png"], "Missing option '-q'"),
        (["a.png", "-q", "what?"], "a.png: no such file"),
        (["r.jsonl", "-q", "what?"], "has its own files and questions"),
        (["a.png", "-q", "what?", "--save", "x.csv"], "its suffix names no format"),
        (["a.png", "-q", "what?", "--save", "x.jsonl", "--save", "y.jsonl"], "--save is given twi"),
        (["a.png", "-q", "what?", "--batch-size", "0"], "--batch-size"),
    ],
)  # fmt: skip
def test_the_command_says_what_is_wrong(
    args: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert result.exit_code in (1, 2)
    assert reason in result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_run_loses_and_doubles_nothing(
    checkpoints: Callable[[str], Path], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "answers.jsonl"
    args = ["batch", str(folder), "-q", "what?", "-q", "which?", "-q", "where?", "--model",
            str(checkpoints("llava_onevision")), "--keep", "0.4", "--max-new-tokens", "2",
            "--batch-size", "1", "--save", str(path)]  # fmt: skip
    attention = torch.nn.functional.scaled_dot_product_attention

    def killed_after_some(*args: Any, **options: Any) -> torch.Tensor:
        if path.exists() and path.read_bytes().count(b"\n") > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return attention(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", killed_after_some)
        process = kills.start(args, tmp_path)
    assert kills.wait(process, 60) == -signal.SIGKILL
    held = path.read_bytes().count(b"\n")
    assert 0 < held < 24
    assert CliRunner().invoke(cli, args).exit_code == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == 24


def test_pages_are_media_items_wherever_their_file_is_named(
    loaded: vtprune.Loaded, tmp_path: Path
) -> None:
    picture, pages = save_noise(tmp_path / "a.png", 40, 60), tmp_path / "pages.tif"
    more = [Image.new("RGB", (60, 40), (red, 0, 0)) for red in (80, 160)]
    Image.new("RGB", (60, 40)).save(pages, save_all=True, append_images=more)
    turns = (Turn("user", "first then", 2, (5, 10)), Turn("user", "and", 1))
    request = Request((str(picture), str(pages), str(pages)), turns, PRESET)
    first, second = turns_over(request, open_sources(request.files))
    assert (first.media, first.places) == (4, (5, 10, 10, 10))
    assert (second.media, second.places) == (3, ())
    prepared = prepare_request(loaded, request, Sampling(), vtprune.Limits())
    assert len(prepared.media.items) == 7
