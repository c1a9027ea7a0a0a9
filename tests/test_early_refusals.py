"""What can be told without torch is refused before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

CODE = """
import json, os, sys
from vtprune.cli import cli
sys.stderr = open(os.devnull, "w")
told = []
for arguments in json.loads(sys.argv[1]):
    try:
        cli(arguments)
    except SystemExit as end:
        told.append([end.code, "torch" in sys.modules])
print(json.dumps(told))
"""


def cases(media: str) -> list[list[str]]:
    asking = (["ask", media, "what?"], ["show", media, "what?"], ["explain", media, "what?"])
    loading = (*asking, ["compare", media, "what?"], ["check"], ["profile"],
               ["batch", media, "-q", "what?", "--save", "a.jsonl"])  # fmt: skip
    wrong = (["--dtype", "int3"], ["--device", "gpu9"], ["--model", "llava-netx"])
    return [
        *([*command, *flags] for command in loading for flags in wrong),
        *([command, "nofile.mp4", "what?"] for command in ("ask", "show", "explain", "compare")),
        *([*command, "--method", "entropyy"] for command in asking),
        *([*command, "--model", "llava-next", "--method", "entropy", "--at", "99"]
          for command in (*asking, ["check"])),
        *([*asking[0], "--method", "entropy", *flags, "--at", "99"]
          for flags in ([], ["--model", "embedded"], ["--model", "checkpoint"])),
        *([*asking[0][:1], "https://a.example/a.png", "what?", *flags]
          for flags in ([], ["--allow-url", "b.example"])),
        *([*command, "--preset", "balansed"]
          for command in (*asking, ["check"], ["batch", media, "-q", "what?"])),
        *([*command, *flags] for command in (["compare", media, "what?"], ["evaluate", "demo"])
          for flags in (["--presets", "balansed"], ["--methods", "entropyy"], ["--save", "a.foo"])),
        ["batch", media, "-q", "what?", "--save", "a.foo"],
        *([*command, *flags] for command in (*loading, ["evaluate", "q.jsonl"])
          for flags in (["--attention", "quick"], ["--calibration", "none.yaml"])),
        *([*asking[0], *flags] for flags in (
            ["--quantize", "3bit"], ["--model", "empty"], ["--adapter", "./none"],
            ["--method", "nowhere_at.all:Method"], ["--pages", "0"], ["--decoder", "vlc"],
            ["--cache", media], ["--start", "9", "--end", "3"], ["--allow-url", "http://a/"])),
        *([*command, name, "what?"] for command in (["ask"], ["show"], ["compare", media])
          for name in ("empty", "list.txt", "https://images.example.org/a.png")),
        *([*command, *flags] for command in (["evaluate"], ["tune", "--save", "t.yaml"])
          for flags in (["none.jsonl"], ["missing.jsonl"], ["broken.jsonl"],
                        ["q.jsonl", "--columns", "file=picture"], ["q.jsonl", "--metric", "luck"],
                        ["q.jsonl", "--limit", "0"], ["q.jsonl", "--methods", "entropyy"])),
        *(["calibrate", name, "--save", "c.yaml"]
          for name in ("none.jsonl", "missing.jsonl", "broken.jsonl")),
        *(["batch", *rest] for rest in (
            ["none.png", "-q", "what?"], ["empty", "-q", "what?"], ["*.foo", "-q", "what?"],
            ["none.jsonl"], ["broken.jsonl"], ["missing.jsonl"], ["q.jsonl", "-q", "what?"],
            ["-", "-q", "what?"], ["https://a.example/a.png", "-q", "what?"],
            [media, "-q", "what?", "--ray", "127.0.0.1:1"])),
        *(["profile", *flags] for flags in (
            ["none.png"], ["--presets", "balansed"], ["--methods", "entropyy"])),
        *(["serve", *flags] for flags in (
            ["--api-key-file", "none"], ["--media-root", "none"], ["--allow-url", "http://a/"],
            ["--host", "999.1.1.1"], ["--host", "a" * 70])),
        ["explain", media, "what?", "--by", "luck"],
        ["profile", "--gpu", "RTX 4900"],
        ["serve", "--model", "llava-netx"],
    ]  # fmt: skip


def test_what_can_be_told_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    media = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(media)
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint").mkdir()
    config = {"text_config": {"num_hidden_layers": 4}}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    (tmp_path / "list.txt").write_text("words")
    for name, line in (
        ("q", {"file": "a.png", "question": "what?"}),
        ("missing", {"file": "none.png", "question": "what?"}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    (tmp_path / "broken.jsonl").write_text("{")
    asked = cases(str(media))
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(asked)], capture_output=True, text=True, check=True,
        cwd=tmp_path,
    )  # fmt: skip
    late = [arguments for arguments, told in zip(asked, json.loads(done.stdout), strict=True)
            if told != [1, False]]  # fmt: skip
    assert late == []


@pytest.mark.parametrize("name", ["llava-next", "llava-hf/llava-1.5-7b-hf", "embedded"])
def test_names_that_may_be_models_are_not_refused(name: str) -> None:
    from vtprune.models.names import may_be_model

    assert may_be_model(name)
