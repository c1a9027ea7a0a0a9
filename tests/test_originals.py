"""Checkpoints of original repositories are refused by config.json; none of their code runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtprune.errors import ModelError
from vtprune.loading import open_model

CODE = 'from pathlib import Path\nPath(__file__).with_name("ran").touch()\nclass Config: pass\n'


def checkpoint(folder: Path, config: dict[str, object]) -> Path:
    """A directory whose code would leave a mark if it ran."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text(CODE)
    return folder


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("model_type", "classes", "twin"),
    [
        ("internvl_chat", ["InternVLChatModel"], "OpenGVLab/InternVL3-1B-hf"),
        ("llava_qwen", ["LlavaQwenForCausalLM"], "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        ("llava", ["LlavaLlamaForCausalLM"], "llava-hf/llava-1.5-7b-hf"),
        ("llava_mistral", [], "llava-hf/llava-v1.6-mistral-7b-hf"),
        ("qwen", ["QWenLMHeadModel"], "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("minicpmv", ["MiniCPMV"], "take a checkpoint in transformers' format"),
        ("NVLM_D", ["NVLM_D_Model"], "take a checkpoint in transformers' format"),
        ("phi3_v", ["Phi3VForCausalLM"], "take a checkpoint in transformers' format"),
        ("somebody_s_own", None, "take a checkpoint in transformers' format"),
    ],
)
def test_no_code_of_an_original_repository_runs(
    tmp_path: Path, model_type: str, classes: list[str] | None, twin: str, trust: bool
) -> None:
    code = {"AutoConfig": "configuration.Config", "AutoModel": "configuration.Config"}
    config = {"model_type": model_type, "architectures": classes, "auto_map": code}
    with pytest.raises(ModelError, match="authors' own repository, which can't be pruned") as found:
        open_model(str(checkpoint(tmp_path, config)), trust_remote_code=trust)
    assert twin in found.value.hint
    assert not (tmp_path / "ran").exists()


def test_another_class_of_transformers_is_no_original(tmp_path: Path) -> None:
    config = {"model_type": "paligemma", "auto_map": {"AutoConfig": "configuration.Config"}}
    with pytest.raises(ModelError, match="paligemma is not a family that can be asked"):
        open_model(str(checkpoint(tmp_path, config)), trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_a_config_without_a_model_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"its config\.json has no model_type"):
        open_model(str(checkpoint(tmp_path, {})))
