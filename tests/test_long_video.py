"""Videos that are encoded in segments: what they equal, what they hold, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import save_clip, save_noise
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vtprune
from vtprune.cli import cli
from vtprune.engine import video_segments as segments
from vtprune.engine.inputs import PreparedInputs
from vtprune.errors import MediaError, ModelError, PresetError
from vtprune.inference import long_video
from vtprune.inference.generate import Generation
from vtprune.inference.long_video import Shares
from vtprune.inference.report import Report
from vtprune.inference.time_segments import time_segments
from vtprune.media import open_source, read, read_parts
from vtprune.models.base import Inputs
from vtprune.models.loading import Loaded, Opened, load
from vtprune.preset import load_preset, override
from vtprune.tokens.layout import NEWLINE, box, join, single

FEW = ("llava_onevision", "qwen2_5_vl", "internvl")
FAMILIES = (
    *FEW, "llava_next_video", "video_llava", "qwen2_vl", "qwen3_vl", "qwen3_5", "smolvlm",
    "glm4v", "molmo2", "gemma4", "qwen2_5_omni_thinker",
)  # fmt: skip
SETTINGS = {"generation": Generation(max_new_tokens=6), "sampling": vtprune.Sampling(frames=7)}
"""Seven frames: the last segment, and a pair of it, is not full."""


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip", 7)


@contextmanager
def logits_of(loaded: Loaded) -> Iterator[list[torch.Tensor]]:
    """Collect the last logits of every forward."""
    logits: list[torch.Tensor] = []
    head = loaded.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, output: logits.append(output[:, -1].clone()))
    try:
        yield logits
    finally:
        hook.remove()


def ask(loaded: Loaded, clip: Path, **options: object) -> tuple[Report, torch.Tensor]:
    with logits_of(loaded) as logits:
        report = vtprune.ask(loaded, clip, "what?", **{**SETTINGS, **options})  # type: ignore[arg-type]
    return report, torch.cat(logits)


def tiny_or_skip(checkpoints, name: str) -> Loaded:  # type: ignore[no-untyped-def]
    try:
        return load(str(checkpoints(name)))
    except (ImportError, KeyError, AttributeError) as error:
        pytest.skip(f"no {name} in this transformers: {error}")


@pytest.mark.parametrize("name", FAMILIES)
def test_segments_that_keep_all_equal_the_video_at_once(
    name: str,
    checkpoints,
    clip: Path,
    request: pytest.FixtureRequest,  # type: ignore[no-untyped-def]
) -> None:
    if name not in FEW and not request.config.getoption("--zoo"):
        pytest.skip("other families run with --zoo")
    loaded = tiny_or_skip(checkpoints, name)
    whole, expected = ask(loaded, clip, keep=1.0)
    report, logits = ask(loaded, clip, keep=1.0, stream={"frames": 2, "keep": 1.0})
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (report.answer, report.tokens) == (whole.answer, whole.tokens)
    assert report.flops == whole.flops
    assert report.input == whole.input
    stages = [{"at": "input", "method": "divprune"}]
    cut = {"preset": {"stages": stages}, "keep": 0.3}
    pruned, expected = ask(loaded, clip, **cut)
    report, logits = ask(loaded, clip, **cut, stream={"frames": 2, "keep": 1.0})
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (report.answer, report.tokens) == (pruned.answer, pruned.tokens)
    two_steps, logits = ask(loaded, clip, **cut, stream={"frames": 2})
    assert [stage.at for stage in two_steps.tokens.stages] == ["segments", "input"]
    assert two_steps.tokens.stages[0].after < whole.tokens.visual
    assert two_steps.tokens.kept_after == pruned.tokens.kept_after
    assert two_steps.tokens.visual == whole.tokens.visual


@pytest.mark.parametrize("method", ["random", "visionzip", "cdpruner", "spread", "holitom"])
def test_segments_are_cut_by_the_method_at_the_input(
    method: str, loaded: Loaded, clip: Path
) -> None:
    report, _ = ask(
        loaded, clip, method=method, at="input", keep=0.2, stream={"frames": 3, "keep": 0.5}
    )
    segment, final = report.tokens.stages
    assert segment.method == final.method == method
    assert segment.options == final.options
    assert final.before == segment.after <= 0.5 * segment.before + 1
    assert len(report.tokens.by_frame) == 7
    assert sum(report.tokens.by_frame) == report.tokens.kept_after


def test_a_preset_without_a_stage_at_the_input_has_segments_cut_by_spread(
    loaded: Loaded, clip: Path
) -> None:
    report, _ = ask(loaded, clip, method="fastv", at=2, keep=0.4, stream={"frames": 3})
    assert [(stage.at, stage.method) for stage in report.tokens.stages] == [
        ("segments", "spread"),
        ("2", "fastv"),
    ]
    assert report.tokens.keep_mean <= 0.4


def test_information_gives_more_to_segments_that_carry_more() -> None:
    equal, weighted = Shares(30, 100, False), Shares(30, 100, True)
    assert [equal.take(25) for _ in range(4)] == [7, 7, 8, 8]
    parts = [weighted.take(25, information) for information in (1.0, 9.0, 1.0, 1.0)]
    assert sum(parts) == 30
    assert parts[1] > parts[0] > parts[2]
    little = Shares(2, 100, False)
    assert sum(little.take(10) for _ in range(10)) == 2


def test_segments_share_by_information(loaded: Loaded, clip: Path) -> None:
    cut = {"method": "random", "at": "input", "keep": 0.2}
    report, _ = ask(loaded, clip, **cut, stream={"frames": 2, "keep": 0.5, "share": "information"})
    assert report.tokens.stages[0].after <= 0.5 * report.tokens.visual + 1


def test_memory_of_frames_and_features_does_not_grow_with_the_clip(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    encode = segments.SegmentEncoder.encode

    def watch(self, tensors, layout):  # type: ignore[no-untyped-def]
        features = encode(self, tensors, layout)
        held.append(sum(map(torch.Tensor.numel, (*tensors.values(), features.rows))))
        return features

    monkeypatch.setattr(segments.SegmentEncoder, "encode", watch)
    most = []
    for frames in (6, 30):
        clip = save_clip(tmp_path / f"clip-{frames}", frames)
        held.clear()
        report, _ = ask(
            loaded, clip, tokens_after=8, method="random", at="input", stream={"frames": 3},
            sampling=vtprune.Sampling(frames=frames),
        )  # fmt: skip
        assert report.input.frames == frames
        assert report.tokens.stages[0].after <= 16 + 1
        assert len(held) == frames // 3 + 1  # and one step alone, whether the tower mixes frames
        most.append(max(held))
    assert most[0] == most[1]


def test_a_second_question_does_not_encode_again(
    loaded: Loaded, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtprune.inference.answer_questions import answer_questions

    preset = override(load_preset("balanced"), method="random", at="input", keep=0.3, stream=True)
    calls: list[int] = []
    encode = segments.SegmentEncoder.encode
    monkeypatch.setattr(
        segments.SegmentEncoder,
        "encode",
        lambda self, *given: (calls.append(1), encode(self, *given))[1],
    )
    first, second = answer_questions(
        loaded, [clip], ["what?", "and where is it?"], preset, **SETTINGS
    )
    asked = len(calls)
    alone, _ = ask(loaded, clip, method="random", at="input", keep=0.3, stream=True)
    assert asked == len(calls) - asked == 2  # and one step alone
    assert (first.answer, first.tokens) == (alone.answer, alone.tokens)
    assert second.seconds.vision == 0
    other = vtprune.ask(
        loaded, clip, "and where is it?", method="random", at="input", keep=0.3, stream=True,
        **SETTINGS,
    )  # fmt: skip
    assert (second.answer, second.tokens) == (other.answer, other.tokens)


def test_features_of_segments_come_from_a_cache(checkpoints, clip: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    directory, settings = str(checkpoints("llava_onevision")), {"keep": 0.3, "stream": True}
    plain, expected = ask(load(directory), clip, **settings)
    for _ in range(2):
        report, logits = ask(load(directory, cache=tmp_path / "cache"), clip, **settings)
        assert report.tokens == plain.tokens
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_what_does_not_fit_the_memory_is_streamed_by_itself(
    loaded: Loaded, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = ask(loaded, clip, keep=0.3)
    assert not any("segments" in warning for warning in plain.warnings)
    monkeypatch.setattr(long_video, "free_memory", lambda _: 1000)
    report, _ = ask(loaded, clip, keep=0.3)
    assert any("encoded in segments of 32, as by --stream" in text for text in report.warnings)


def test_what_does_not_fit_a_gpu_beside_the_weights_is_streamed_by_itself(
    checkpoints,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    """A stand-in for a GPU: its memory is asked for, and the tensors stay on the CPU."""
    free = [10**9]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 2 * free[0]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(Loaded, "device", torch.device("cuda"))
    monkeypatch.setattr(Opened, "device", torch.device("cuda"))
    read_weights = Opened.load

    def load_and_fill(opened: Opened) -> Loaded:
        loaded = read_weights(opened)
        free[0] = 1000
        return loaded

    monkeypatch.setattr(Opened, "load", load_and_fill)
    name = str(checkpoints("llava_onevision"))
    (report,) = vtprune.answer(name, [(clip, "what?")], keep=0.3, **SETTINGS)  # type: ignore[arg-type]
    (warning,) = [text for text in report.warnings if "as by --stream" in text]
    assert "of the memory of cuda, of which 1.00 kB are free" in warning
    assert report.tokens.stages[0].at == "segments"
    loaded = load(name)
    free[0] = 10**9
    (report,) = vtprune.answer(loaded, [(clip, "what?")], keep=0.3, **SETTINGS)  # type: ignore[arg-type]
    assert report.tokens.stages[0].at != "segments"


def test_segments_of_pictures_alone_are_told_of(loaded: Loaded, picture: Path) -> None:
    warning = "--stream changes nothing: no video is among the media"
    assert warning in ask(loaded, picture, keep=0.3, stream=True)[0].warnings
    assert warning in ask(loaded, picture, method="random", keep=0.3, stream=True)[0].warnings
    preset = {"keep": 0.3, "stream": True, "stages": [{"at": "input", "method": "random"}]}
    assert warning not in ask(loaded, picture, preset=preset)[0].warnings


def test_what_was_encoded_before_is_of_one_prompt_alone() -> None:
    tensors = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
    prompt = Inputs(tensors, "?", encoded={"video": "features"})
    assert PreparedInputs.of(tensors, [prompt]).encoded == {"video": "features"}
    assert not PreparedInputs.of(tensors, [prompt, prompt]).encoded


def test_features_are_taken_with_what_layers_add_and_with_what_the_tower_gave() -> None:
    rows = torch.arange(4.0)[:, None]
    features = segments.Features(rows, (rows + 10, rows + 20), rows.expand(4, 3) + 30)
    taken = features.take(torch.tensor([1, 3]))
    assert taken.rows.tolist() == [[1], [3]]
    assert [layer.tolist() for layer in taken.layers] == [[[11], [13]], [[21], [23]]]
    assert taken.tower is not None
    assert taken.tower.tolist() == [[31] * 3, [33] * 3]


def test_features_of_layers_may_be_listed_by_picture() -> None:
    first, second = torch.zeros(2, 3), torch.ones(1, 3)
    output = BaseModelOutputWithPooling(pooler_output=[first, second])
    output["deepstack_features"] = [[first + 2, second + 2], [first + 4, second + 4]]
    features = segments.take_apart(output)
    assert torch.equal(features.rows, torch.cat([first, second]))
    assert [layer[:, 0].tolist() for layer in features.layers] == [[2, 2, 3], [4, 4, 5]]
    again = segments.put_together(features)
    assert isinstance(again, BaseModelOutputWithPooling)
    assert torch.equal(again["deepstack_features"][1][0], features.layers[1])


def test_a_token_that_is_missing_is_a_newline_or_refused() -> None:
    """Some models add a video's newline themselves, behind the features of its last segment."""
    features = segments.Features(torch.zeros(4, 2))
    patches, newline = box(1, 2, 2), single(NEWLINE, row=1, col=2)
    assert segments.fit_to_layout(features, join([patches, newline]), "m") == (features, 1)
    with pytest.raises(ModelError, match="gave 4 features, and it has 5 tokens"):
        segments.fit_to_layout(features, box(1, 1, 5), "m")


def test_a_tower_that_mixes_frames_is_refused(
    loaded: Loaded, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projector = loaded.model.model.multi_modal_projector
    forward = projector.forward
    monkeypatch.setattr(projector, "forward", lambda rows: forward(rows + rows.mean(0)))
    with pytest.raises(ModelError, match="its vision tower mixes the frames"):
        ask(loaded, clip, keep=0.3, stream=True)


def test_what_can_not_be_streamed_is_refused(loaded: Loaded, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="2 videos in one question; one can be encoded"):
        ask(loaded, [clip, save_clip(tmp_path / "other", 3)], keep=0.3, stream=True)
    with pytest.raises(PresetError, match=r"the stage at pixels \(predictable\) chooses among all"):
        ask(loaded, clip, method="predictable", keep=0.5, stream=True)
    with pytest.raises(PresetError, match="stream 'yes' is not true, false, or a mapping"):
        ask(loaded, clip, stream="yes")
    with pytest.raises(PresetError, match="share 'most' of segments is not one of equal"):
        ask(loaded, clip, stream={"share": "most"})
    with pytest.raises(PresetError, match="0 frames a segment: must be a whole number from 1 on"):
        ask(loaded, clip, stream={"frames": 0})


def test_what_needs_all_tokens_is_refused(loaded: Loaded, clip: Path) -> None:
    from vtprune.inference.answer_questions import answer_questions

    preset = override(load_preset("balanced"), method="random", at="input", keep=0.3, stream=True)
    with pytest.raises(ModelError, match="clip is encoded in segments, and the unpruned run"):
        list(answer_questions(loaded, [clip], ["what?"], preset, compare=True, **SETTINGS))
    with pytest.raises(ModelError, match="encoded in segments can't be explained"):
        vtprune.explain(loaded, clip, "what?", preset=preset)


@pytest.mark.parametrize("method", ["spread", "holitom"])
def test_a_drawing_shows_what_the_segments_dropped(method: str, loaded: Loaded, clip: Path) -> None:
    report, _ = ask(loaded, clip, method=method, at="input", keep=0.2, stream={"frames": 2})
    run = json.loads(vtprune.draw(report).json())["runs"][0]
    segments, final = report.tokens.stages
    dropped = [token["dropped_by"] for token in run["tokens"]]
    assert len(dropped) == report.tokens.visual == segments.before
    assert dropped.count(0) == segments.before - segments.after > 0
    assert dropped.count(None) == final.after
    kept = [token["frame"] for token in run["tokens"] if token["kept"]]
    assert [kept.count(frame) for frame in range(7)] == list(report.tokens.by_frame)
    assert [stage["at"] for stage in run["stages"]] == ["segments", "input"]


def test_many_questions_are_streamed_as_alone(loaded: Loaded, clip: Path, tmp_path: Path) -> None:
    other = save_clip(tmp_path / "other", 5)
    cut = {"method": "random", "at": "input", "keep": 0.3, "stream": {"frames": 2}}
    media = [clip, other]
    items = [(item, "what?") for item in media]
    reports = vtprune.answer(loaded, items, batch_size=2, **SETTINGS, **cut)  # type: ignore[arg-type]
    for report, item in zip(reports, media, strict=True):
        alone, _ = ask(loaded, item, **cut)
        assert (report.answer, report.tokens) == (alone.answer, alone.tokens)
        assert report.tokens.stages[0].at == "segments"


def test_an_optional_stage_at_pixels_is_left_out(loaded: Loaded, clip: Path) -> None:
    report, _ = ask(loaded, clip, preset="long-video", keep=0.3, stream=True)
    assert any("scenes) is left out: the frames of a streamed" in text for text in report.warnings)
    assert report.tokens.stages[0].at == "segments"


def test_a_picture_may_stand_beside_a_streamed_video(
    loaded: Loaded, clip: Path, tmp_path: Path
) -> None:
    media = [save_noise(tmp_path / "page.png", 60, 90), clip]
    cut = {"method": "random", "at": "input", "keep": 1.0}
    whole, expected = ask(loaded, media, **cut)
    report, logits = ask(loaded, media, **cut, stream={"frames": 2, "keep": 1.0})
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert report.tokens == whole.tokens


def test_the_keep_that_is_said_to_fit_the_positions_counts_from_the_whole_video(
    loaded: Loaded, clip: Path
) -> None:
    config = loaded.model.get_decoder().config

    def run(keep: float, positions: str, **options: object) -> tuple[Report, list[str]]:
        stages = [{"at": "input", "method": "uniform", "positions": positions}]
        report, _ = ask(loaded, clip, preset={"stages": stages}, keep=keep, **options)
        return report, [text for text in report.warnings if "this model was made for" in text]

    whole, _ = run(1.0, "keep")
    before = config.max_position_embeddings
    config.max_position_embeddings = whole.tokens.text + whole.tokens.visual // 2
    try:
        (warning,) = run(0.9, "keep")[1]
        stream = {"frames": 2, "keep": 0.6}
        assert run(0.3, "keep", stream=stream)[1] == [warning]
        keep = float(warning.split("keep ")[1].split()[0])
        assert 0 < keep < 0.6
        assert run(keep, "renumber", stream=stream)[1] == []
    finally:
        config.max_position_embeddings = before


def test_stream_is_a_key_of_presets() -> None:
    stages = [{"at": "input", "method": "random"}]
    preset = load_preset({"keep": 0.3, "stream": {"frames": 8}, "stages": stages})
    assert preset.stream is not None
    assert preset.to_dict()["stream"] == {"frames": 8, "share": "equal"}
    assert override(preset, stream=False).stream is None
    assert load_preset({"keep": 0.3, "stream": True, "stages": stages}).stream is not None
    changed = override(load_preset("balanced"), stream=True)
    assert dict(changed.changed)["stream"] is True
    few = override(load_preset("balanced"), stream={"frames": 8, "share": "equal"})
    assert dict(few.changed)["stream"] == {"frames": 8}


def test_parts_of_a_video_are_its_frames(clip: Path) -> None:
    source = open_source(clip)
    index = [0, 1, 1, 3, 6]
    whole = read(source, index)
    seen: list[tuple[int, int]] = []
    parts = list(
        read_parts(source, index, 2, lambda pixels: pixels, progress=lambda *at: seen.append(at))
    )
    assert [part.index for part in parts] == [(0, 1), (1, 3), (6,)]
    assert torch.equal(torch.cat([part.pictures for part in parts]), whole.pictures)
    assert sum((part.timestamps for part in parts), ()) == whole.timestamps
    assert seen[-1] == (4, 4)


# -- segments in time ------------------------------------------------------------------------------


def test_segments_in_time_have_every_frame_once(loaded: Loaded, clip: Path) -> None:
    source = open_source(clip)
    length = (source.timestamps[-1] - source.timestamps[0]) / 60
    spans = time_segments(source, length / 3, vtprune.Sampling())
    assert len(spans) == 3
    counts = [sum(start <= moment <= end for moment in source.timestamps) for start, end in spans]
    assert sum(counts) == source.num_frames
    assert spans[0][0] == source.timestamps[0]
    assert spans[-1][1] == source.timestamps[-1]
    part = time_segments(source, 1, vtprune.Sampling(start=source.timestamps[2]))
    assert part == [(source.timestamps[2], source.timestamps[-1])]
    with pytest.raises(MediaError, match=r"segments of .* minutes; 1,000 are the most"):
        time_segments(source, length / 5000, vtprune.Sampling())


def test_a_video_of_one_frame_has_one_segment_in_time(loaded: Loaded, tmp_path: Path) -> None:
    source = open_source(save_clip(tmp_path / "clip", 1))
    ((start, end),) = time_segments(source, 0.001, vtprune.Sampling())
    sampling = vtprune.Sampling(start=start, end=end)
    assert vtprune.ask(loaded, source.path, "what?", sampling=sampling).input.frames == 1


def test_every_segment_has_an_answer_and_then_the_whole(tmp_path: Path, checkpoints) -> None:  # type: ignore[no-untyped-def]
    clip = save_clip(tmp_path / "clip", 6)
    source = open_source(clip)
    minutes = (source.timestamps[-1] - source.timestamps[0]) / 60 / 2
    arguments = [
        "ask", str(clip), "what?", "--model", str(checkpoints("llava_onevision")), "--json",
        "--per-segment", "--segment", str(minutes), "--max-new-tokens", "3",
    ]  # fmt: skip
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(report.get("segment") or ()) for report in reports] == [2, 2, 0]
    times = [report["input"]["timestamps"] for report in reports]
    assert times[0] + times[1] == times[2]
    assert [report["seconds"]["load"] > 0 for report in reports] == [True, False, False]
    result = CliRunner().invoke(cli, [name for name in arguments if name != "--json"])
    assert "[0:00:00 to " in result.stdout
    assert "[all] " in result.stdout
    assert "since the question's start" in result.stderr
    assert "startup" not in result.stderr


def test_segments_in_time_are_of_one_video(clip: Path, picture: Path) -> None:
    runs = {
        "--segment changes nothing without": [str(clip), "what?", "--segment", "2"],
        "--per-segment is for one video, not 2": [
            str(clip), str(picture), "what?", "--per-segment",
        ],
        "--compare is for one answer": [str(clip), "what?", "--per-segment", "--compare"],
        "--stream-keep changes nothing without": [str(clip), "what?", "--stream-keep", "1"],
        "--compare and --stream exclude": [str(clip), "what?", "--stream", "--compare"],
    }  # fmt: skip
    for message, arguments in runs.items():
        result = CliRunner().invoke(cli, ["ask", *arguments])
        assert result.exit_code == 1
        assert message in result.stderr


@pytest.mark.parametrize(
    ("stream", "faults"),
    [
        ("'yes'", ["stream: 'yes' is not true, false or a mapping of frames, keep and share"]),
        ("[1]", ["stream: [1] is not true, false or a mapping"]),
        (
            "{frames: 0, keep: 7, share: x, frame: 1}",
            [
                "frames: 0 is not a whole number from 1 on",
                "keep: 7 is not a number in (0, 1]",
                "share: x is not one of equal, information",
                "unknown key 'frame', did you mean frames?",
            ],
        ),
    ],
)
def test_a_wrong_stream_in_a_preset_is_named(
    tmp_path: Path, stream: str, faults: list[str]
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"keep: 0.3\nstream: {stream}\nstages:\n  - {{at: input, method: spread}}\n")
    with pytest.raises(PresetError) as raised:
        load_preset(path)
    for fault in faults:
        assert f"line 2: {fault}" in raised.value.message
