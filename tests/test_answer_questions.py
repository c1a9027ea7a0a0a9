"""From files on disk to answers and reports, through the real loading path."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import answer_together, save_clip, save_noise

import vtprune
from vtprune import device as capacity
from vtprune.engine.trace import Trace
from vtprune.errors import MediaError, ModelError, PresetError
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.generate import Generation
from vtprune.inference.out_of_memory import explain, explain_out_of_memory
from vtprune.models import cost
from vtprune.models.base import Sampling
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.loading import Loaded, load
from vtprune.preset import load_preset, override

SHORT = Generation(max_new_tokens=4)
BLOCKS = {
    "question", "answer", "model", "input", "preset", "tokens", "flops", "kv_cache_bytes",
    "memory_bytes", "seconds", "warnings", "version", "host",
}  # fmt: skip
FIELDS = {
    "model": {"name", "family", "layers", "parameters", "device", "dtype", "attention",
              "pruned_equals"},
    "input": {"files", "modality", "frames", "tiles", "timestamps", "decoder", "duration",
              "width", "height", "sha256"},
    "tokens": {"visual", "text", "answer", "keep_mean", "kept_after", "by_modality", "stages",
               "by_frame", "by_tile"},
    "flops": {"vision", "prefill", "prefill_full", "decode", "decode_full", "reduction"},
    "kv_cache_bytes": {"kept", "full", "state"},
    "memory_bytes": {"weights", "peak"},
    "seconds": {"startup", "load", "media", "preprocess", "vision", "select", "prefill", "decode",
                "first_token", "total"},
    "version": {"vtprune", "torch", "transformers"},
    "compare": {"answer", "same_answer", "seconds", "prefill_speedup", "prefill_predicted",
                "prefill_roofline", "realised_fraction", "first_token_speedup", "total_speedup",
                "pairs"},
}  # fmt: skip


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_noise(tmp_path / "picture.png", 90, 150)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip", 6)


def ask(loaded: Loaded, path: Path, questions=("what?",), preset="balanced", **options):  # type: ignore[no-untyped-def]
    options.setdefault("generation", SHORT)
    keep = options.pop("keep", None)
    resolved = override(load_preset(preset), keep)
    return list(answer_questions(loaded, [path], list(questions), resolved, **options))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_picture_is_answered_with_every_field_of_the_report(
    name: str, checkpoints, picture: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    report = ask(loaded, picture, keep=0.4)[0].to_dict()
    assert report.keys() == BLOCKS
    for block, fields in FIELDS.items():
        if block in report:
            assert report[block].keys() == fields, block
    json.loads(json.dumps(report, allow_nan=False))
    tokens = report["tokens"]
    assert tokens["kept_after"] == tokens["stages"][-1]["after"]
    assert sum(tokens["by_modality"].values()) == sum(tokens["by_tile"]) == tokens["kept_after"]
    assert tokens["keep_mean"] == pytest.approx(0.4, abs=2 / tokens["visual"])
    assert [one["layer"] for one in report["preset"]["stages"]] == [
        one["layer"] for one in tokens["stages"]
    ]


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if "video" in tiny.KINDS[name]])
def test_a_video_is_answered_and_its_frames_are_reported(
    name: str, checkpoints, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    report = ask(loaded, clip, keep=0.4, sampling=Sampling(frames=4))[0].to_dict()
    assert report["input"]["frames"] == 4
    assert report["input"]["timestamps"] == [0.0, 2.0, 3.0, 5.0]
    assert (report["input"]["width"], report["input"]["height"]) == (64, 48)
    assert sum(report["tokens"]["by_frame"]) == report["tokens"]["kept_after"]


def test_the_flops_are_those_of_the_counts_that_were_cut(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    preset = {"stages": [{"at": 2, "method": "random", "keep": 0.25}]}
    report = ask(loaded, picture, preset=preset)[0].to_dict()
    shape = measure_decoder(loaded.model)
    visual, text = report["tokens"]["visual"], report["tokens"]["text"]
    left = math.floor(0.25 * visual + 1e-6)
    counts = [text + visual] * 2 + [text + left] * 4
    assert report["flops"]["prefill"] == cost.prefill_flops(shape, counts)
    assert report["kv_cache_bytes"]["kept"] == cost.kv_bytes(shape, counts, 4)
    full = cost.prefill_flops(shape, [text + visual] * 6)
    assert report["flops"]["reduction"] == pytest.approx(1 - report["flops"]["prefill"] / full)


def test_several_questions_encode_the_media_once(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    calls = []
    tower = loaded.model.model.vision_tower
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    reports = ask(loaded, picture, questions=("what?", "where is it?"))
    handle.remove()
    assert len(calls) == 1
    assert [one.question for one in reports] == ["what?", "where is it?"]
    assert reports[1].seconds.vision == reports[1].seconds.media == 0
    alone = ask(loaded, picture, questions=("where is it?",))
    assert reports[1].answer == alone[0].answer


def test_pieces_of_the_answer_make_up_the_answer(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    pieces: list[str] = []
    generation = Generation(max_new_tokens=12)
    report = ask(loaded, picture, on_text=pieces.append, generation=generation)[0]
    assert "".join(pieces).strip() == report.answer


def test_sampling_depends_on_the_seed_alone(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    state = torch.random.get_rng_state()
    answers = [
        ask(loaded, picture, generation=Generation(12, temperature=1.0, seed=seed))[0].answer
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_report_says_what_ran_under_flags(checkpoints, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    preset = override(load_preset("long-video"), keep=0.5, seed=3)
    told = next(
        answer_questions(
            loaded, [clip], ["what?"], preset, sampling=Sampling(frames=4), generation=SHORT
        )
    ).to_dict()["preset"]
    assert isinstance(told, dict)
    assert (told["name"], told["method"], told["description"]) == ("long-video", None, "")
    assert (told["keep"], told["seed"], told["video"]["frames"]) == (0.5, 3, 4)
    assert told["changed"] == {"keep": 0.5, "seed": 3, "frames": 4}


def test_a_report_of_a_method_has_no_presets_name(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    preset = override(load_preset("balanced"), 0.4, "entropy", 2, {"norm": "none"})
    told = next(answer_questions(loaded, [picture], ["what?"], preset, generation=SHORT))
    assert (told.preset.name, told.preset.method) == (None, "entropy")
    assert (told.preset.description, told.preset.changed) == ("", {})
    assert told.preset.stages[0].options["norm"] == "none"
    whole = next(
        answer_questions(loaded, [picture], ["what?"], override(preset, 1.0), generation=SHORT)
    )
    assert (whole.preset.method, whole.preset.stages) == ("entropy", [])


def test_a_comparison_beside_a_sampled_answer_is_of_two_greedy_ones(
    checkpoints, picture: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    greedy = {keep: ask(loaded, picture, keep=keep)[0].answer for keep in (0.4, 1.0)}
    hot = Generation(SHORT.max_new_tokens, temperature=5.0, seed=1)
    for keep in (0.4, 1.0):
        report = ask(loaded, picture, keep=keep, compare=True, generation=hot)[0]
        assert report.answer != greedy[keep], "the check would not notice"
        assert report.compare is not None
        assert report.compare.answer == greedy[1.0]
        assert report.compare.pruned_answer == greedy[keep]
        assert report.compare.same_answer is (greedy[keep] == greedy[1.0])
        assert any("the answer was sampled; the comparison holds a greedy" in note
                   for note in report.warnings)  # fmt: skip
    plain = ask(loaded, picture, keep=0.4, compare=True)[0]
    assert plain.compare is not None
    assert plain.compare.pruned_answer is None
    assert "pruned_answer" not in plain.compare.to_dict()
    assert not any("sampled" in note for note in plain.warnings)


def test_compare_measures_both_and_says_what_was_realised(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    report = ask(loaded, picture, compare=True, keep=0.4)[0].to_dict()
    beside = report["compare"]
    assert beside.keys() == FIELDS["compare"]
    predicted = report["flops"]["prefill_full"] / report["flops"]["prefill"]
    assert beside["prefill_predicted"] == pytest.approx(predicted)
    assert beside["realised_fraction"] == pytest.approx(beside["prefill_speedup"] / predicted)
    same = ask(loaded, picture, compare=True, keep=1.0)[0].to_dict()["compare"]
    assert same["same_answer"]
    assert same["prefill_predicted"] == 1


def test_keep_one_reports_no_stage(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    report = ask(loaded, picture, keep=1.0)[0].to_dict()
    assert report["tokens"]["stages"] == report["preset"]["stages"] == []
    assert report["tokens"]["keep_mean"] == 1
    assert report["tokens"]["kept_after"] == report["tokens"]["visual"]
    assert report["flops"]["reduction"] == 0


def test_a_library_call_answers_with_a_loaded_model(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    model = loaded.model
    reports = vtprune.answer(
        model, [(picture, "what?"), ([picture, picture], "which?")], keep=0.5, generation=SHORT
    )
    assert [one.question for one in reports] == ["what?", "which?"]
    assert len(reports[1].input.files) == 2
    assert reports[1].tokens.visual > 0


def test_every_prompt_of_a_batch_gets_the_same_number_of_tokens(
    checkpoints, picture: Path, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    items = [([picture, picture], "which?"), (clip, "what happens?")]
    settings = {"method": "random", "at": 1, "generation": SHORT}
    first, second = vtprune.answer(loaded, items, tokens_after=20, **settings)
    assert first.tokens.visual != second.tokens.visual
    assert first.tokens.kept_after == second.tokens.kept_after == 20
    assert first.preset.tokens_after == 20
    first, second = vtprune.answer(loaded, items, tokens=20, **settings)
    for report in (first, second):
        assert 19 <= report.tokens.keep_mean * report.tokens.visual <= 20.01
    report = vtprune.ask(loaded, clip, "what?", tokens=10**6, generation=SHORT)
    assert report.tokens.keep_mean == 1


def test_a_number_of_tokens_that_can_not_be_reached_is_named(checkpoints, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    with pytest.raises(
        PresetError, match=r"a budget of 3 of 25 visual tokens: keep 0\.12 can.t be"
    ):
        vtprune.ask(loaded, clip, "what?", tokens=3, method="random", at=2, generation=SHORT)


@pytest.mark.parametrize("method", ["predictable", "downsample"])
def test_a_number_of_tokens_is_left_before_the_vision_tower(
    method: str, checkpoints, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    whole = vtprune.ask(loaded, clip, "what?", keep=1.0, generation=SHORT).tokens.visual
    for name in ("tokens", "tokens_after"):
        report = vtprune.ask(
            loaded, clip, "what?", method=method, generation=SHORT, **{name: whole // 2}
        )
        assert 0 < report.tokens.kept_after <= whole // 2
        assert report.tokens.visual == whole


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "glm4v", "molmo2"])
def test_a_batch_gives_each_item_what_it_gets_alone(
    name: str, attention: str, checkpoints, picture: Path, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    if name not in tiny.MODELS:
        pytest.skip("not in this transformers")
    loaded = load(str(checkpoints(name)), attention=attention)
    items = [(picture, "what?"), (clip, "what happens here?"), ([picture, picture], "which?")]
    answer_together(loaded, items, "balanced", 0.4, sampling=Sampling(frames=4), generation=SHORT)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_the_attention_kernel_changes_no_answer(
    name: str, checkpoints, picture: Path, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    """With a cut between layers, where eager attention always has a mask that must fit."""
    cut = {"stages": [{"at": 2, "method": "uniform", "keep": 0.3}]}
    items = [(picture, "what?"), (clip, "what happens here?")]
    answers = []
    for attention in ("sdpa", "eager"):
        loaded = load(str(checkpoints(name)), attention=attention)
        for batch_size in (1, 2):
            reports = vtprune.answer(loaded, items, cut, generation=SHORT, batch_size=batch_size)
            answers.append([report.answer for report in reports])
    assert all(one == answers[0] for one in answers)


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_model_that_does_not_exist_is_named_with_a_way_out() -> None:
    with pytest.raises(ModelError, match="no model 'llava-nxt'") as raised:
        load("llava-nxt")
    assert "llava-next" in raised.value.hint
    with pytest.raises(ModelError, match="neither a directory"):
        load("./nothing/here")


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(str(tmp_path))


def test_a_hub_id_that_is_not_cached_says_so() -> None:
    with pytest.raises(ModelError, match="not in the local cache, and the hub can't be reached"):
        load("nobody/nothing-of-the-kind")


def copy_checkpoint(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_half_downloaded_weights_are_refused(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    broken = copy_checkpoint(checkpoints("llava_onevision"), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="damaged"):
        load(str(broken))


def test_missing_weights_are_not_left_random(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    broken = copy_checkpoint(checkpoints("llava_onevision"), tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(key for key in weights if "layers.3" in key)
    del weights[name]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        load(str(broken))


def test_pickled_weights_are_not_loaded(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    pickled = copy_checkpoint(checkpoints("llava_onevision"), tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        load(str(pickled))


def test_a_family_that_can_not_be_asked_is_refused_with_the_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="no class for llama that takes pictures") as raised:
        load(str(tmp_path))
    assert "qwen2_5_vl" in raised.value.hint


def test_a_device_map_spreads_the_model_and_prunes_alike(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("accelerate", reason="device maps need accelerate")
    spread = load(str(checkpoints("llava_onevision")), device="map")
    plain = load(str(checkpoints("llava_onevision")))
    assert ask(spread, picture)[0].tokens == ask(plain, picture)[0].tokens


def test_what_a_package_is_missing_for_is_said(checkpoints, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("vtprune.models.devices.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package accelerate") as raised:
        load(str(checkpoints("llava_onevision")), device="map")
    assert "devices" in raised.value.hint
    monkeypatch.setattr(
        "vtprune.models.devices.find_spec", lambda name: name == "accelerate" or None
    )
    with pytest.raises(ModelError, match="loading 4bit weights needs the package bitsandbytes"):
        load(str(checkpoints("llava_onevision")), quantize="4bit")


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"quantize": "3bit"}, "quantize '3bit' is not known|needs the package accelerate"),
        ({"device": "tpu"}, "device 'tpu' is not known"),
        ({"device": "cuda:99"}, "this machine has no such device"),
        ({"dtype": "int3"}, "dtype 'int3' is not known"),
        ({"attention": "no_such_kernel"}, "no_such_kernel|can't be loaded"),
    ],
)
def test_options_of_loading_are_checked(checkpoints, option: dict[str, str], match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match=match):
        load(str(checkpoints("llava_onevision")), **option)


def test_a_video_is_refused_where_the_family_takes_none(checkpoints, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_next")))
    with pytest.raises(ModelError, match="takes image input, no video"):
        ask(loaded, clip)


def test_an_empty_question_is_refused(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_next")))
    with pytest.raises(ModelError, match="question is empty"):
        ask(loaded, picture, questions=("  ",))


def test_a_missing_file_is_named(checkpoints) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_next")))
    with pytest.raises(MediaError, match=r"nothing\.png"):
        ask(loaded, Path("nothing.png"))


def test_running_out_of_memory_names_a_keep_or_a_frame_count(checkpoints) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    preset = load_preset("balanced")
    with (
        pytest.raises(ModelError, match="out of memory") as raised,
        explain_out_of_memory(loaded, preset, Trace()),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "--frames" in raised.value.hint
    inputs = tiny.inputs("llava_onevision", loaded.model, "video")
    with torch.no_grad(), vtprune.pruning(loaded.model, keep=0.5) as trace:
        loaded.model(**inputs)
    message, hint = explain(loaded, preset, trace)
    assert "visual tokens" in message
    assert "--keep 0.15 or --frames 2" in hint
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory(loaded, preset, trace):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("told", [True, False])
def test_memory_that_is_not_told_is_not_taken_for_none(
    told: bool, checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    pages = {"SC_PHYS_PAGES": 1_000_000, "SC_PAGE_SIZE": 4096} if told else {}

    def sysconf(name: str) -> int:
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    cpu = torch.device("cpu")
    monkeypatch.setattr(capacity, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(capacity, "CONTAINER", tmp_path / "limit")
    monkeypatch.setattr(capacity.os, "sysconf", sysconf, raising=False)
    assert capacity.free_memory(cpu) == (2_048_000_000 if told else sys.maxsize)
    assert capacity.total_memory(cpu) == (4_096_000_000 if told else None)
    for limit, most in (("max", 4_096_000_000 if told else None), ("1000", 1000)):
        (tmp_path / "limit").write_text(f"{limit}\n")
        assert capacity.total_memory(cpu) == most
    loaded = load(str(checkpoints("llava")))
    with torch.no_grad(), vtprune.pruning(loaded.model, keep=0.5) as trace:
        loaded.model(**tiny.inputs("llava", loaded.model, "image"))
    assert explain(loaded, load_preset("balanced"), trace)[1] == "try --keep 0.15"


def test_an_answer_past_the_last_position_is_warned_of(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    prompt = ask(loaded, picture, generation=Generation(1))[0].tokens
    config = loaded.model.get_decoder().config
    config.max_position_embeddings = prompt.visual + prompt.text + 2
    for length, warned in ((2, False), (4, True)):
        report = ask(loaded, picture, generation=Generation(length))[0]
        assert any("the answer ends at position" in note for note in report.warnings) is warned
