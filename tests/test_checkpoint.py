"""A checkpoint's files: what they may say; those for other code are refused before it runs."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from conftest import assert_refused, save_noise
from transformers import CONFIG_MAPPING

import vtprune
from vtprune.cli import cli
from vtprune.errors import ModelError, PresetError
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.models import FAMILIES, find_family
from vtprune.models.checkpoint import read_files, refuse_original, warn_of_missing
from vtprune.models.loading import load, open_model
from vtprune.models.names import aliases

ORIGINALS = {
    # As the authors' config.json say it: model type, class, whether Python code comes with it.
    "InternVL3-8B": ("internvl_chat", "InternVLChatModel", True),
    "InternVL3_5-1B": ("internvl_chat", "InternVLChatModel", True),
    "llava-onevision-qwen2-7b-ov": ("llava", "LlavaQwenForCausalLM", False),
    "llava-v1.5-7b": ("llava_llama", "LlavaLlamaForCausalLM", False),
    "llava-v1.6-mistral-7b": ("llava_mistral", "LlavaMistralForCausalLM", False),
    "Video-LLaVA-7B": ("llava", "LlavaLlamaForCausalLM", False),
    "my-mpt": ("llava", "LlavaMptForCausalLM", False),
    "my-finetune": ("llava_qwen", "LlavaQwenForCausalLM", False),
    "my-internvl": ("internvl_chat", "InternVLChatModel", True),
    "Qwen-VL-Chat": ("qwen", "QWenLMHeadModel", True),
    "Molmo-7B-D-0924": ("molmo", "MolmoForCausalLM", True),
    "MiniCPM-V-2_6": ("minicpmv", "MiniCPMV", True),
    "MiniCPM-o-2_6": ("minicpmo", "MiniCPMO", True),
    "Phi-3.5-vision-instruct": ("phi3_v", "Phi3VForCausalLM", True),
    "cogvlm2-llama3-chat-19B": ("cogvlm", "CogVLMForCausalLM", True),
    "deepseek-vl2": ("deepseek_vl_v2", "DeepseekVLV2ForCausalLM", False),
    "Ovis1.6-Gemma2-9B": ("ovis", "Ovis", True),
    "NVLM-D-72B": ("NVLM_D", "NVLM_D_Model", True),
    "VideoLLaMA3-7B": ("videollama3_qwen2", "Videollama3Qwen2ForCausalLM", True),
    "h2ovl-mississippi-2b": ("h2ovl_chat", "H2OVLChatModel", True),
    "Kimi-VL-A3B-Instruct": ("kimi_vl", "KimiVLForConditionalGeneration", True),
}
SAME = {
    "InternVL3-8B": "OpenGVLab/InternVL3-8B-hf",
    "InternVL3_5-1B": "OpenGVLab/InternVL3_5-1B-HF",
    "llava-onevision-qwen2-7b-ov": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "Video-LLaVA-7B": "LanguageBind/Video-LLaVA-7B-hf",
}
LIKE = {
    "my-finetune": "one in transformers' format, such as llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "my-internvl": "one in transformers' format, such as OpenGVLab/InternVL3-1B-hf",
    "Qwen-VL-Chat": "a later model of these authors, such as Qwen/Qwen2-VL-2B-Instruct",
    "Molmo-7B-D-0924": "a later model of these authors, such as allenai/Molmo2-4B",
}


def original(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint's directory, and a file that its Python code writes if it is run."""
    model_type, kind, has_code = ORIGINALS[name]
    directory, trace = tmp_path / name, tmp_path / "ran"
    directory.mkdir()
    config: dict[str, object] = {"model_type": model_type, "architectures": [kind]}
    if has_code:
        config["auto_map"] = {"AutoConfig": "brought.Config", "AutoModel": "brought.Model"}
        code = f"open({str(trace)!r}, 'w').close()\nraise SystemExit(3)\n"
        (directory / "brought.py").write_text(code)
    (directory / "config.json").write_text(json.dumps(config))
    return directory, trace


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_checkpoint_for_other_code_is_refused_before_that_runs(
    name: str, trusted: bool, tmp_path: Path
) -> None:
    directory, trace = original(name, tmp_path)
    with pytest.raises(ModelError, match="is a checkpoint for its authors' own code") as caught:
        open_model(str(directory), trust_remote_code=trusted)
    assert not trace.exists()
    model_type, kind, _ = ORIGINALS[name]
    assert caught.value.message.startswith(f"{directory}: {model_type} ({kind}) is a checkpoint")
    if name in SAME:
        wanted = f"the same model in transformers' format: --model {SAME[name]}"
    else:
        wanted = LIKE.get(name, f"in transformers' format, of {', '.join(FAMILIES)}")
    assert wanted in caught.value.hint


def test_the_command_line_and_profile_refuse_it_alike(tmp_path: Path) -> None:
    directory, trace = original("InternVL3-8B", tmp_path)
    picture = save_noise(tmp_path / "noise.png", 60, 60)
    for args in (["ask", str(picture), "what?"], ["profile"]):
        result = CliRunner().invoke(cli, [*args, "--model", str(directory)])
        assert_refused(result, rf"Error: {directory}: internvl_chat \(InternVLChatModel\) is a ch")
        assert "--model OpenGVLab/InternVL3-8B-hf" in result.stderr
    with pytest.raises(ModelError, match="authors' own code"):
        find_shape(str(directory / "config.json"))
    assert not trace.exists()


def test_converted_checkpoints_that_bring_code_too_are_loaded_without_it(
    checkpoints, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    directory = shutil.copytree(checkpoints("internvl"), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "brought.Config"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "brought.py").write_text("raise SystemExit(3)\n")
    assert load(str(directory)).family.name == "InternVL"


@pytest.mark.parametrize(
    "config",
    [{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
     {"model_type": "qwen2_vl", "architectures": ["TunedQwen2VLForConditionalGeneration"]},
     {"model_type": "llava"}, {"model_type": "llava", "architectures": None}, {},
     {"model_type": "molmo2", "architectures": ["Molmo2ForConditionalGeneration"],
      "auto_map": {"AutoConfig": "a.B"}}],
)  # fmt: skip
def test_checkpoints_in_transformers_format_are_not_refused(config: dict[str, object]) -> None:
    if str(config.get("model_type", "llava")) not in CONFIG_MAPPING:
        with pytest.raises(ModelError, match="has no molmo2") as caught:
            refuse_original("DIR", config, trust_remote_code=False)
        assert caught.value.hint == "install a newer transformers"
        return
    refuse_original("DIR", config, trust_remote_code=False)


def test_what_is_named_in_its_place_has_a_short_name() -> None:
    listed = {alias.model_type for alias in aliases()}
    for model_type in FAMILIES:
        family = find_family(model_type)
        assert family is not None
        if family.original_kinds or family.earlier_kinds:
            assert family.model_types[0] in listed


BAD_VALUES = {
    "size": ("x", [1], {"height": -3, "width": 2}, {"shortest_edge": 1e-30}, {}, {"height": 8}),
    "crop_size": (0,),
    "image_mean": ("x", [0, 0, 0, 0]),
    "image_std": ([0, 0, 0],),
    "patch_size": (0,),
    "max_pixels": ("q", 0),
    "image_grid_pinpoints": ([[1]], [[56, -112]]),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_VALUES.items() for value in values]
)
def test_a_bad_preparation_file_is_named_with_its_field(
    field: str, value: object, inside: bool, tmp_path: Path
) -> None:
    directory = tiny.describe("llava_next", tmp_path)
    file = "processor_config.json" if inside else "preprocessor_config.json"
    values = json.loads((directory / "preprocessor_config.json").read_text()) | {field: value}
    written = {"image_processor": values} if inside else values
    (directory / file).write_text(json.dumps(written))
    config, tokenizer = tiny.config("llava_next"), tiny.tokenizer("llava_next", True)
    with pytest.raises(ModelError, match=rf"{file}: {field} (is|has) "):
        read_files(directory, config, tokenizer)


def test_a_calibration_of_another_model_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model_type: llava\nlayers: 3\nhidden_size: 8\necl: 1\nhorizon: 2\n")
    with pytest.raises(PresetError, match=r"line 2: layers: 3, but the model's is 16; line 3: hid"):
        open_model(None, calibration=path)


def test_a_prompt_above_the_tokenizers_own_length_is_read_in_silence(
    checkpoints, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    directory = shutil.copytree(checkpoints("llava"), tmp_path / "model")
    values = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(values | {"model_max_length": 3}))
    model = vtprune.load(str(directory))
    said: list[str] = []
    handler = logging.StreamHandler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    logging.getLogger("transformers").addHandler(handler)
    try:
        vtprune.ask(model, picture, "what is it?", generation=vtprune.Generation(max_new_tokens=1))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert said == []


MISFITS: list[tuple[str, str, str, object, str]] = [
    ("smolvlm", "preprocessor_config.json", "size", 56, "no image can be prepared by"),
    ("llava", "preprocessor_config.json", "crop_size", {"width": 56}, "no image can be prepared"),
    ("llava", "tokenizer_config.json", "model_max_length", "auto", "is 'auto', not a number"),
    ("llava", "generation_config.json", "pad_token_id", 10**30, "pad_token_id is 1000000"),
    ("llava_next", "config.json", "image_grid_pinpoints", [[56, 56, 56]], "config.json: image_gr"),
    ("llava", "preprocessor_config.json", "crop_size", 112, "does not run on what its own files"),
    ("qwen2_vl", "config.json", "mrope_section", [3, 3], "does not run on what its own files"),
]


@pytest.mark.parametrize(("name", "file", "field", "value", "message"), MISFITS)
def test_files_that_do_not_fit_are_told_from_a_bug(
    name: str, file: str, field: str, value: object, message: str, checkpoints, picture: Path
) -> None:  # type: ignore[no-untyped-def]
    directory = shutil.copytree(checkpoints(name), picture.parent / "model")
    values = json.loads((directory / file).read_text())
    holder = values["text_config"]["rope_parameters"] if field == "mrope_section" else values
    holder[field] = value
    (directory / file).write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message):
        vtprune.ask(vtprune.load(str(directory)), picture, "what?")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_an_added_token_with_an_unknown_key_is_named_and_nothing_is_printed(
    file: str, checkpoints, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    directory = shutil.copytree(checkpoints("llava"), tmp_path / "model")
    values = json.loads((directory / file).read_text())
    token = {"content": "<x>", "specia": True}
    if file == "tokenizer.json":
        values["added_tokens"].append({"id": 9, **token})
    else:
        values["added_tokens_decoder"] = {"9": token}
    (directory / file).write_text(json.dumps(values))
    capfd.readouterr()
    with pytest.raises(ModelError, match=rf"{file}: an added token has the unknown key 'specia'"):
        open_model(str(directory))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_missing_preparation_file_is_warned_of_with_what_is_taken(
    name: str, tmp_path: Path
) -> None:
    config, tokenizer = tiny.config(name), tiny.tokenizer(name, True)
    family = find_family(config.model_type)
    files = read_files(tiny.describe(name, tmp_path), config, tokenizer)
    assert warn_of_missing("some-model", family, files) == []
    (tmp_path / "preprocessor_config.json").unlink()
    files = read_files(tmp_path, config, tokenizer)
    height, width = family.largest(files)
    (warning,) = warn_of_missing("some-model", family, files)
    assert warning.startswith("some-model has no preprocessor_config.json")
    assert f"{width} x {height} pixels" in warning
    assert ("video_preprocessor_config.json" in warning) == (
        "video" in family.modalities and not files.video
    )


def test_the_report_warns_of_it(tmp_path: Path) -> None:
    directory = tiny.build("llava", tmp_path)
    (directory / "preprocessor_config.json").unlink()
    assert any("has no preprocessor_config.json" in text for text in load(str(directory)).warnings)


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("preprocessor_config.json", "image_std", [0, 0, 0], "image_std is .* greater than 0"),
        (
            "preprocessor_config.json",
            "size",
            {"height": 0, "width": 9},
            "size is .* greater than 0",
        ),
        ("preprocessor_config.json", "size", "big", "size is 'big': .* a valid integer"),
        ("config.json", "hidden_size", "a", "field 'hidden_size': .*expected int"),
    ],
)
def test_a_wrong_value_is_refused_with_the_rule_that_it_breaks(
    file: str, key: str, value: object, message: str, checkpoints, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    directory = shutil.copytree(checkpoints("llava"), tmp_path / "model")
    values = json.loads((directory / file).read_text())
    (values["text_config"] if file == "config.json" else values)[key] = value
    (directory / file).write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message):
        load(str(directory))


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("tokenizer.json", b'{"version": "1', r"tokenizer\.json of .* is not JSON: Unterminated"),
        ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja of .* is not text in UTF-8"),
        ("tokenizer.json", None, r"no tokenizer\.json, and no other tokenizer"),
    ],
)
def test_a_damaged_file_of_the_tokenizer_is_named(
    file: str, data: bytes | None, message: str, checkpoints, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    directory = shutil.copytree(checkpoints("llava"), tmp_path / "model")
    if data is None:
        (directory / file).unlink()
    else:
        (directory / file).write_bytes(data)
    with pytest.raises(ModelError, match=message):
        open_model(str(directory))
