"""What can be told without torch is refused before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
        *([*command, "--preset", "balansed"]
          for command in (*asking, ["check"], ["batch", media, "-q", "what?"])),
        *([*command, *flags] for command in (["compare", media, "what?"], ["evaluate", "demo"])
          for flags in (["--presets", "balansed"], ["--methods", "entropyy"], ["--save", "a.foo"])),
        ["batch", media, "-q", "what?", "--save", "a.foo"],
        ["profile", "--gpu", "RTX 4900"],
        ["serve", "--model", "llava-netx"],
    ]  # fmt: skip


def test_what_can_be_told_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    media = tmp_path / "a.png"
    media.write_bytes(b"a picture, as far as its name goes")
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
