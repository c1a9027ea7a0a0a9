"""Damaged texts: presets, lists, requests, a checkpoint's files, answers of earlier runs."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

import vtprune
from vtprune._dev.fuzz.media import picture
from vtprune._dev.fuzz.mutations import (
    BRACKETS,
    NUMBERS,
    TEXTS,
    damage_bytes,
    damage_value,
    damage_yaml,
)
from vtprune._dev.fuzz.trials import Case
from vtprune.cli import cli
from vtprune.cli.config import load_config
from vtprune.disk_cache import DiskCache
from vtprune.evaluation.records import AnswersFile, Record
from vtprune.inference.prepare import sampling_of
from vtprune.inference.questions_file import Asked, open_questions, read_askable
from vtprune.media import Limits
from vtprune.models.loading import Loaded, load, open_model
from vtprune.models.names import embedded_weights
from vtprune.preset import load_preset, preset_directory
from vtprune.preset.calibration import packaged_models, read_calibration
from vtprune.serving.batch import BEGINNING, AnswerLines, prepare_request
from vtprune.serving.requests import read_requests

ONE_TOKEN = vtprune.Generation(max_new_tokens=1)
QUESTIONS: list[dict[str, Any]] = [
    {"file": "a.png", "question": "what is it?", "answer": "a circle", "kind": "shape"},
    {"file": "a.png", "question": "how many?", "answer": 3, "choices": ["1", "2", "3"]},
    {"files": ["a.png", "b.png"], "question": "which is red?", "answers": ["first", "the first"]},
    {"image": "b.png", "question": "colour?", "options": {"A": "red", "B": "blue"}, "answer": "B"},
]
REQUESTS: list[dict[str, Any]] = [
    {"id": 1, "file": "a.png", "question": "what is it?", "keep": 0.3},
    {"id": "x", "files": ["a.png", "b.png"], "question": "which?", "preset": "fast"},
    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": [{"type": "image", "image": "a.png"},
                                               {"type": "text", "text": "what is it?"}]}],
     "keep": {"image": 0.5}},
]  # fmt: skip
CHECKPOINT_FILES = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json",
                    "processor_config.json", "generation_config.json", "tokenizer.json",
                    "tokenizer_config.json", "chat_template.jinja", "model.safetensors",
                    "model.safetensors.index.json")  # fmt: skip
TEMPLATES = (
    "{{ 9**(9**9) }}", '{{ "x"*(10**10) }}', "{% for i in range(10**9) %}x{% endfor %}",
    "{{ raise_exception('no') }}", "{{ messages[99] }}", "{% include 'x' %}", "{{ x.y.z }}",
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ '%9999999999d' % 1 }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ messages | tojson }}", "", "\n",
    "{% if %}", "{{", "<image>" * 5000, "{{ [1, 2] | sum / 0 }}", "{{ lipsum(n=10**6) }}",
    "{{ 'a' | center(10**9) }}", "{% set ns = namespace(x=[]) %}{{ ns.x.append(ns.x) }}{{ ns.x }}",
    "{{ strftime_now('%Y' * 100000) }}", "{{ range(10**9) | list }}", "{{ 'x' | indent(10**10) }}",
)  # fmt: skip
"""What a template may do that a conversation needs not."""


class TextSubject:
    """Damaged texts.

    Args:
        given: directories of checkpoints beside the embedded one.
        only: the kinds to take; () for all.
    """

    def __init__(self, given: Sequence[Path] = (), only: Sequence[str] = ()) -> None:
        self.checkpoints = [embedded_weights(), *given]
        self.presets = [path.read_text("utf-8") for path in sorted(preset_directory().iterdir())]
        self.loaded: Loaded = load()
        self.png = _png(0)
        kinds = {
            "preset": (self.preset, 5),
            "calibration": (self.calibration, 2),
            "config file": (self.config_file, 2),
            "questions": (self.questions, 5),
            "requests": (self.requests, 4),
            "server": (self.request, 5),
            "checkpoint": (self.checkpoint, 6),
            "template": (self.template, 1),
            "answers": (self.answers, 2),
            "cache": (self.cache, 1),
            "flags": (self.flags, 2),
        }
        self.kinds = {kind: what for kind, what in kinds.items() if not only or kind in only}

    @cached_property
    def client(self) -> Any:
        """A server in this process, and its client; begun by the process that asks."""
        from fastapi.testclient import TestClient

        from vtprune.serving.app import ServerSettings, create_app

        settings = ServerSettings("tiny", load_preset("fast"), ONE_TOKEN)
        client = TestClient(create_app(self.loaded, settings), raise_server_exceptions=False)
        return client.__enter__()

    def case(self, rng: random.Random, folder: Path) -> Case:
        """Return a damaged text of some kind."""
        weights = [weight for _, weight in self.kinds.values()]
        (kind,) = rng.choices(list(self.kinds), weights)
        damage, run = self.kinds[kind][0](rng, folder)
        return Case(kind, damage, run)

    def ask(self, loaded: Loaded, folder: Path, preset: object = None) -> str:
        """Ask a model about a small picture."""
        (folder / "a.png").write_bytes(self.png)
        vtprune.ask(loaded, folder / "a.png", "what?", preset=preset, generation=ONE_TOKEN)  # type: ignore[arg-type]
        return ""

    # -- kinds -------------------------------------------------------------------------------------

    def preset(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Check a preset, and prune by it."""
        text = rng.choice(self.presets)
        damage, data = damage_text(text, yaml.safe_load(text), yaml_text, rng)
        path = folder / "mine.yaml"
        path.write_bytes(data)

        def run() -> str:
            shown = run_command("presets", "check", str(path))
            return shown or self.ask(self.loaded, folder, path)

        return damage, run

    def calibration(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Read a calibration of the embedded model."""
        text = self.loaded.decoder_config
        entry = dict(rng.choice(packaged_models()["calibrations"]))
        layers, hidden = text.num_hidden_layers, text.hidden_size
        model_type = str(self.loaded.model.config.model_type)
        entry |= {
            "model_type": model_type,
            "layers": layers,
            "hidden_size": hidden,
            "ecl": 2,
            "horizon": 3,
        }
        damage, data = damage_text(yaml_text(entry), entry, yaml_text, rng)
        path = folder / "calibration.yaml"
        path.write_bytes(data)

        def run() -> str:
            calibration = read_calibration(path, layers, model_type=model_type, hidden=hidden)
            return self.ask(replace(self.loaded, calibration=calibration), folder, "balanced")

        return damage, run

    def config_file(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Read the user's config file."""
        values = {"model": "embedded", "preset": "fast", "device": "cpu", "max_new_tokens": 4}
        damage, data = damage_text(yaml_text(values), values, yaml_text, rng)
        path = folder / "config.yaml"
        path.write_bytes(data)

        def run() -> str:
            load_config(path)
            return self.ask(self.loaded, folder, load_config(path).preset)

        return damage, run

    def questions(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Read a list of questions, and open its media."""
        damage, path = self.write_list(QUESTIONS, rng, folder)

        def run() -> str:
            open_questions(read_askable(path), Limits())
            return ""

        return damage, run

    def requests(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Read a list of requests, and prepare some of them."""
        damage, path = self.write_list(REQUESTS, rng, folder)

        def run() -> str:
            for request in read_requests(path, load_preset("fast"))[:3]:
                sampling = sampling_of(request.preset)
                prepare_request(self.loaded, request, sampling, Limits())
            return ""

        return damage, run

    def write_list(
        self, rows: list[dict[str, Any]], rng: random.Random, folder: Path
    ) -> tuple[str, Path]:
        """Write a damaged list in one of its formats, beside its pictures."""
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(self.png)
        suffix = rng.choice(("jsonl", "jsonl", "json", "csv", "tsv"))
        writer = {"jsonl": json_lines, "json": json_text}.get(
            suffix, partial(csv_text, delimiter="\t" if suffix == "tsv" else ",")
        )
        damage, data = damage_text(writer(rows), rows, writer, rng)
        path = folder / f"list.{suffix}"
        path.write_bytes(data)
        return f"{suffix} {damage}", path

    def request(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Send a request to the server."""
        url = "data:image/png;base64," + base64.b64encode(self.png).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "what?"},
        ]
        body = {
            "model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 1,
            "temperature": 0, "stop": ["x"], "vtprune": {"keep": 0.5, "seed": 1}, "stream": False,
        }  # fmt: skip
        damage, data = damage_text(json_text(body), body, json_text, rng)
        headers = {"Content-Type": "application/json"}

        def run() -> str:
            response = self.client.post("/v1/chat/completions", content=data, headers=headers)
            if response.status_code >= 500:
                raise AssertionError(f"status {response.status_code}: {response.text[:500]}")
            if response.status_code == 200:
                return ""
            error = response.json()["error"]
            return str(error["message"]) or "refused"

        return damage, run

    def checkpoint(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Load a checkpoint of which one file is damaged, and ask it."""
        source = rng.choice(self.checkpoints)
        name = rng.choice([name for name in CHECKPOINT_FILES if (source / name).is_file()])
        original = (source / name).read_bytes()
        if name.endswith(".safetensors"):
            damage, data = damage_header(original, rng)
        elif name.endswith(".json"):
            values = json.loads(original)
            damage, data = damage_text(original.decode(), values, json_text, rng)
        else:
            damage, data = damage_bytes(original, original, rng)
        return f"{name} {damage}", partial(self.load_with, source, name, data, folder)

    def template(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Ask with a chat template that does what templates need not."""
        name = "chat_template.jinja"
        source = rng.choice([each for each in self.checkpoints if (each / name).is_file()])
        text = (source / name).read_text("utf-8")
        at = rng.choice((0, len(text), text.find("{%")))
        odd = rng.choice(TEMPLATES)
        text = odd if rng.random() < 0.5 else text[:at] + odd + text[at:]
        return odd[:30], partial(self.load_with, source, name, text.encode(), folder)

    def load_with(self, source: Path, name: str, data: bytes, folder: Path) -> str:
        """Load a checkpoint with one other file, and ask it."""
        directory = folder / "checkpoint"
        directory.mkdir()
        for file in source.iterdir():
            if file.name != name:
                (directory / file.name).symlink_to(file)
        (directory / name).write_bytes(data)
        opened = open_model(str(directory))
        other_weights = name in ("config.json", "generation_config.json") or "safetensors" in name
        if other_weights or source != self.checkpoints[0]:
            return self.ask(opened.load(), folder)
        return self.ask(replace(self.loaded, files=opened.files, family=opened.family), folder)

    def answers(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Go on with a damaged file of answers, of a batch or of an evaluation."""
        path = folder / "answers.jsonl"
        if rng.random() < 0.5:
            rows = [
                {"key": f"{n:016x}", "run": "r", "question": "q", "answer": "a"} for n in range(4)
            ]
            head = b""
            go_on: Callable[[], AnswerLines | AnswersFile] = partial(AnswerLines, path, "r")
            assert json.dumps(rows[0]).encode().startswith(BEGINNING)
        else:
            rows = [asdict(Record(n, "c", "a", 1.0, True)) for n in range(4)]
            head = json.dumps({"vtprune": {}}).encode() + b"\n"
            asked = [Asked(Path("a.png"), "what?", "a")] * 4
            go_on = partial(AnswersFile, path, {}, 4, asked)
        damage, data = damage_text(json_lines(rows), rows, json_lines, rng)
        path.write_bytes(head + data)

        def run() -> str:
            with go_on():
                return ""

        return damage, run

    def cache(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Ask with a cache whose entries are damaged."""
        loaded = replace(self.loaded, cache=DiskCache(folder / "cache"))
        whole = rng.random() < 0.5

        def run() -> str:
            self.ask(loaded, folder)
            for file in sorted((folder / "cache").iterdir()):
                data = file.read_bytes()
                file.write_bytes(
                    (damage_bytes(data, data, rng) if whole else damage_header(data, rng))[1]
                )
            return self.ask(replace(loaded), folder)

        return "bytes" if whole else "header", run

    def flags(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        """Ask with odd values of options."""
        (folder / "a.png").write_bytes(self.png)
        options = ["--keep", "--preset", "--method", "--at", "-o", "--seed", "--frames", "--fps",
                   "--max-tiles", "--calibration", "--device", "--dtype", "--attention", "--model",
                   "--adapter", "--max-new-tokens", "--temperature", "--top-p", "--pages", "--dpi",
                   "--start", "--end", "--save", "--system", "--tokens", "--cache", "--allow-url",
                   "--stream", "--decode-every", "--max-pixels", "-q"]  # fmt: skip
        odd = [text for text in TEXTS if "\0" not in text and "/dev/zero" not in text]
        chosen = [f"{rng.choice(options)}={rng.choice((*odd, *map(str, NUMBERS[:-3])))}"
                  for _ in range(rng.choice((1, 1, 2)))]  # fmt: skip
        chosen = [text.replace("=", "", 1) if text[1] != "-" else text for text in chosen]
        command = ["ask", str(folder / "a.png"), "what?", "--method", "fastv", *chosen][
            : 3 + 2 * (rng.random() < 0.3)
        ]
        arguments = [text.encode("utf-8", "replace").decode() for text in [*command[:5], *chosen]]
        return " ".join(chosen)[:60], partial(run_command, *arguments)


# -- writing ---------------------------------------------------------------------------------------


def damage_text(
    text: str, value: Any, write: Callable[[Any], str], rng: random.Random
) -> tuple[str, bytes]:
    """Return a damaged text: its value changed before it is written, its lines, or its bytes."""
    way = rng.random()
    data = text.encode()
    if way < 0.25:
        return damage_bytes(data, data, rng)
    if way < 0.3:
        at = rng.choice([place for place, sign in enumerate(text) if sign in ":,[\n"] or [0]) + 1
        count, (opening, closing) = rng.choice(BRACKETS), rng.choice(("[]", "{}", "()"))
        closed = f"{opening * count}{closing * count}"
        return f"{count} brackets", f"{text[:at]}{closed}{text[at:]}".encode()
    if way < 0.45 and write is yaml_text:
        damage, changed = damage_yaml(text, rng)
        return damage, changed.encode("utf-8", "surrogatepass")
    damage, changed_value = damage_value(value, rng)
    try:
        return damage, write(changed_value).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError, AttributeError, yaml.YAMLError):  # no such text
        return damage_bytes(data, data, rng)


def damage_header(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a safetensors file whose header, or its length, is damaged."""
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        damage, header = damage_bytes(data[:end], data[:end], rng)
        return damage, header + data[end:]
    header_text = data[8:end].decode()
    damage, changed = damage_text(header_text, json.loads(header_text), json_text, rng)
    if rng.random() < 0.2:
        return f"{damage} cut", len(changed).to_bytes(8, "little") + changed + data[
            end : end + 1000
        ]
    return damage, len(changed).to_bytes(8, "little") + changed + data[end:]


def yaml_text(value: Any) -> str:
    """Return a value as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def json_text(value: Any) -> str:
    """Return a value as JSON, with NaN and infinity where it has them."""
    return json.dumps(value)


def json_lines(rows: Any) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_text(rows: Sequence[Mapping[str, object]], delimiter: str = ",") -> str:
    """Return rows as a table."""
    file = io.StringIO()
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    writer = csv.DictWriter(file, columns, delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in islice(row.items(), 100)})
    return file.getvalue()


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def run_command(*arguments: str) -> str:
    """Run a command of the command line; return what it says on standard error where it fails.

    Raises:
        Exception: what the command lets through.
    """
    result = CliRunner().invoke(cli, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stderr or "refused" if result.exit_code else ""
