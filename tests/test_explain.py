"""What an answer rests on: maps that point there, exact passes, JSON, bounds, errors."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from browser import screenshot
from click.testing import CliRunner, Result
from conftest import shared_model
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

import vtprune
from vtprune import VtpruneError
from vtprune.cli import cli
from vtprune.demo.questions import draw_questions
from vtprune.demo.regions import boxes_at, find_region
from vtprune.demo.samples import Sample, samples, write_file
from vtprune.demo.world import generator, make_picture
from vtprune.engine import pruning
from vtprune.engine.answer_attention import AnswerAttention
from vtprune.engine.replay import MaskedKeys, Replay, note_decoder_call
from vtprune.engine.segments import Segments
from vtprune.engine.trace import Trace
from vtprune.errors import ModelError
from vtprune.inference.evidence import METHODS, MapSettings
from vtprune.inference.evidence.answer_parts import split_answer
from vtprune.inference.evidence.ask import UNPRUNED, ExplainedAnswer, answer_to_explain
from vtprune.inference.evidence.explain import map_run
from vtprune.inference.evidence.explanation import ExplainedRun, evidence_kept
from vtprune.inference.evidence.probe import Passes
from vtprune.inference.evidence.windows import Cells, over_time_first, spread, starts
from vtprune.inference.forced_answers import append_text
from vtprune.inference.generate import Generation, generate
from vtprune.inference.prepare import prepare_question
from vtprune.inference.prompt_media import read_media
from vtprune.inference.wording import name_sources
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, load
from vtprune.models.seams import Arguments, feed_forward
from vtprune.models.structure import find_structure
from vtprune.preset import Preset, load_preset, override
from vtprune.tokens.layout import box, join, lay_out, single

ONES = MapSettings("information")
ATTACK = "</script><img src=x onerror=alert(1)>{{ 7*7 }}"


@functools.cache
def embedded() -> Loaded:
    return load()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Sample]]:
    folder = tmp_path_factory.mktemp("scenes")
    drawn = []
    for index in range(4):
        scene = make_picture("dev", 3, index, most_things=4)
        questions = draw_questions(scene, generator("dev", 5, index), 1, ("colour", "shape"))
        drawn.append(Sample(f"picture-{index}.png", scene, tuple(questions)))
        write_file(folder / drawn[-1].name, scene)
    return [(folder / one.name, one) for one in drawn]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sample]:
    one = next(s for s in samples(4, 3, "dev") if s.scene.is_clip)
    path = tmp_path_factory.mktemp("clip") / one.name
    write_file(path, one.scene)
    return path, one


def answered(path: Path, question: str, preset: Preset = UNPRUNED, frames: int | None = None,
             loaded: Loaded | None = None, attention: bool = True) -> ExplainedAnswer:  # fmt: skip
    loaded = loaded or embedded()
    media = read_media(loaded, [path], Sampling(frames=frames), None, Limits())
    generation = Generation(max_new_tokens=24)
    prepared = prepare_question(loaded, media, question, generation)
    return answer_to_explain(loaded, prepared, preset, generation, {}, attention)


# -- exactness -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_answer(clip: tuple[Path, Sample]) -> ExplainedAnswer:
    return answered(clip[0], "what happens?", frames=4)


def test_the_replay_gives_the_probability_of_generation(one_answer: ExplainedAnswer) -> None:
    probe = one_answer.probe(Passes(99))
    prepared, run = one_answer.prepared, one_answer.run
    tensors = append_text(prepared.tensors, run.tokens[:-1])
    with torch.no_grad():
        logits = embedded().model(**tensors).logits[:, -len(run.tokens) :]
    torch.testing.assert_close(probe.base(), probe.score(logits)[0], atol=1e-5, rtol=1e-4)


def test_rows_of_a_batch_are_what_they_are_alone(one_answer: ExplainedAnswer) -> None:
    probe = one_answer.probe(Passes(99))
    windows = Cells.of(probe.layout).windows(2, 1)[:6]
    together = probe.replaced((~windows).float())
    apart = torch.cat([probe.replaced((~row[None]).float()) for row in windows])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    assert float((together - probe.base()).abs().max()) > 0.01


def test_long_prompts_get_the_same_gradient_with_less_held(
    one_answer: ExplainedAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = one_answer.probe(Passes(99))
    weights = torch.full((1, len(probe)), 0.5)
    expected = probe.gradient(weights)
    monkeypatch.setattr("vtprune.engine.replay.LONG", 1)
    monkeypatch.setattr("vtprune.engine.replay.CHUNK", 16)
    layer = probe.replay.structure.layers[0]
    network, lengths = feed_forward(layer), []
    assert network is not None
    hook = network.down_proj.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    torch.testing.assert_close(probe.gradient(weights), expected)
    hook.remove()
    assert max(lengths) == 16
    assert "forward" not in vars(layer)
    assert "forward" not in vars(network)


def test_a_long_video_is_encoded_in_segments_and_explained_alike(
    checkpoints: Callable[[str], Path], clip: tuple[Path, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("qwen2_5_vl", "internvl"):
        loaded = load(str(checkpoints(name)))
        maps, largest = [], []
        for at_once in (32, 3):
            monkeypatch.setattr("vtprune.inference.evidence.ask.AT_ONCE", at_once)
            monkeypatch.setattr("vtprune.inference.evidence.ask.SEGMENT", 2)
            with note_encoder_rows(loaded) as rows:
                explanation = vtprune.explain(
                    loaded, clip[0], "what?", method="random", keep=0.5,
                    sampling=Sampling(frames=8), generation=Generation(max_new_tokens=2),
                )  # fmt: skip
            maps.append([run.maps[0].shares for run in explanation.runs])
            largest.append(max(rows))
        assert largest[1] * 4 == largest[0], name
        for whole, segments in zip(*maps, strict=True):
            torch.testing.assert_close(whole, segments, atol=1e-4, rtol=1e-3)


@contextmanager
def note_encoder_rows(loaded: Loaded) -> Iterator[list[int]]:
    """Note how many patches each call of the vision tower gets."""
    names = ("visual", "vision_tower")
    tower = next(
        module for name, module in find_structure(loaded.model).inner.named_children()
        if name in names
    )  # fmt: skip
    rows: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        rows.append(len(pixels))

    hook = tower.register_forward_pre_hook(note, with_kwargs=True)
    yield rows
    hook.remove()


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma4"])
def test_segments_of_layers_give_every_kind_of_model_its_gradient(
    name: str, checkpoints: Callable[[str], Path], clip: tuple[Path, Sample],
    pictures: list[tuple[Path, Sample]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    loaded = load(str(checkpoints(name)))
    path = pictures[0][0] if name == "gemma4" else clip[0]
    probe = answered(path, "what?", frames=2, loaded=loaded, attention=False).probe(Passes(99))
    weights = torch.full((1, len(probe)), 0.5)
    expected = probe.gradient(weights)
    monkeypatch.setattr("vtprune.engine.replay.LONG", 1)
    torch.testing.assert_close(probe.gradient(weights), expected)
    assert bool((expected[1] != 0).all())


def test_one_input_of_a_segment_is_held() -> None:
    layers = [torch.nn.Tanh() for _ in range(9)]
    segments, states = Segments(len(layers)), torch.randn(3, requires_grad=True)
    arguments, calls = Arguments(lambda hidden_states: None), []

    def run(layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            calls.append(layer)
            return layer(hidden_states)

        output = segments.run(arguments, forward, states)
        assert isinstance(output, torch.Tensor)
        return output

    output = states
    for number, layer in enumerate(layers):
        output = run(layer, output)
        if number == 4:
            output = output * 2  # the decoder works on the states between two layers
    assert sorted(segments.inputs) == [0, 3, 5, 6]
    expected = states
    for number, layer in enumerate(layers):
        expected = layer(expected) * (2 if number == 4 else 1)
    assert torch.equal(output, expected)
    slopes = [torch.autograd.grad(one.sum(), states)[0] for one in (output, expected)]
    assert torch.equal(*slopes)
    assert len(calls) == 9 + 9 + 5  # forward, gradient, and the inputs that were not held
    assert not segments.inputs


def test_states_that_were_changed_between_two_layers_begin_a_segment() -> None:
    """As a decoder does that adds visual features to them in place."""

    def square(hidden_states: torch.Tensor) -> torch.Tensor:
        return 0.5 * (hidden_states * hidden_states)

    run = functools.partial(Segments(4).run, Arguments(square), square)
    slopes = []
    for layer in (square, run):
        first = states = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
        for number in range(4):
            states = layer(states)  # type: ignore[assignment]
            if number == 0:
                states.add_(1)
        slopes.append(torch.autograd.grad(states.sum(), first)[0])
    assert torch.equal(*slopes)


def replay_of(name: str, model: PreTrainedModel | None = None) -> Replay:
    """A picture's pass through the decoder, of which the last two predictions are wanted."""
    model = model or shared_model(name)
    structure, inputs = find_structure(model), tiny.inputs(name, model, "image")
    with note_decoder_call(structure) as call, torch.no_grad():
        model(**inputs, use_cache=False)
    marks = torch.isin(inputs["input_ids"][0], torch.tensor([*structure.placeholder_ids()]))
    return Replay(structure, call, marks.nonzero().squeeze(1), 2)


def test_a_masked_token_is_seen_by_itself_alone() -> None:
    """A prompt may begin with one, which then has nothing else to see."""
    replay = replay_of("llava")
    columns, hidden = torch.tensor([[True, False, True, False]]), torch.zeros(1, 4, 8)
    mask = replay.mask_keys(None, columns, hidden)
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    assert isinstance(mask, torch.Tensor)
    assert mask[0, 0].int().tolist() == expected
    causal = torch.ones(1, 1, 4, 4).tril()
    for given in (causal.bool(), causal.log().clamp_min(-1e9)):
        again = replay.mask_keys(given, columns, hidden)
        assert isinstance(again, torch.Tensor)
        assert (again[0, 0] > -1 if given.is_floating_point() else again[0, 0]).tolist() == (
            mask[0, 0].tolist()
        )


@torch.no_grad()
def test_a_window_counts_the_tokens_that_are_left_out() -> None:
    """Left out of the sequence, they would let others back into the window."""
    model = tiny.model("llava_next_mistral")
    model.get_decoder().config.sliding_window = 16
    replay = replay_of("llava_next_mistral", model)
    kept = torch.ones(1, len(replay.columns), dtype=torch.bool)
    kept[0, ::2] = False
    alone = replay.alone(kept)
    torch.testing.assert_close(alone, replay.masked(~kept), atol=1e-5, rtol=1e-4)
    model.get_decoder().config.sliding_window = None
    wide = replay_of("llava_next_mistral", model)
    assert float((wide.alone(kept) - alone).abs().max()) > 1e-4


@torch.no_grad()
def test_keys_that_pruning_drops_between_layers_are_masked_from_there_on_too() -> None:
    replay = replay_of("llava")
    columns = torch.zeros(1, replay.length, dtype=torch.bool)
    columns[:, replay.columns[:5]] = True
    nothing = torch.zeros(1, len(replay.columns), dtype=torch.bool)
    five = nothing.clone()
    five[:, :5] = True
    expected = replay.masked(five, layer=2)
    replay.always = (MaskedKeys(2, columns),)
    assert torch.equal(replay.masked(nothing, layer=0), expected)


@torch.no_grad()
def test_a_model_that_collects_its_states_is_replayed_alike() -> None:
    """Transformers' hooks that collect them read the first argument by place."""
    model = tiny.model("llava")
    replay = replay_of("llava", model)
    masked = torch.zeros(1, len(replay.columns), dtype=torch.bool)
    masked[0, :5] = True
    expected = replay.masked(masked)
    model.get_decoder().config.output_hidden_states = True
    assert torch.equal(replay_of("llava", model).masked(masked), expected)


def test_the_text_of_a_replay_has_no_placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = replay_of("llava")
    monkeypatch.setattr(type(replay.structure), "placeholder_ids", lambda _: {0, 1, 3})
    assert replay.text_id == 2


def test_leaving_tokens_out_equals_masking_them(one_answer: ExplainedAnswer) -> None:
    probe = one_answer.probe(Passes(99))
    kept = Cells.of(probe.layout).windows(2, 1)[3:6]
    with torch.no_grad():
        short, long = probe.replay.alone(kept), probe.replay.masked(~kept)
        full = probe.replay.replaced(torch.ones(1, len(probe)))
    torch.testing.assert_close(short, long, atol=1e-4, rtol=1e-4)
    assert float((short - full).abs().max()) > 0.1


@pytest.mark.parametrize("at", ["input", "5"])
def test_the_pruned_replay_equals_the_engine(clip: tuple[Path, Sample], at: str) -> None:
    preset = override(load_preset("balanced"), keep=0.6, method="random", at=at)
    pruned = answered(clip[0], "what happens?", preset, frames=4, attention=False)
    probe, ids = pruned.probe(Passes(99)), pruned.run.tokens
    tensors = append_text(pruned.prepared.tensors, ids[:-1])
    with torch.no_grad(), pruning(embedded().model, preset, inputs=pruned.prepared.for_engine()):
        logits = embedded().model(**tensors).logits[:, -len(ids) :]
    torch.testing.assert_close(probe.base(), probe.score(logits)[0], atol=1e-4, rtol=1e-3)
    assert float((probe.base() - answered(clip[0], "what happens?", frames=4).probe(
        Passes(9)).base()).abs().max()) > 0  # fmt: skip


def test_attention_read_while_answering_is_that_of_eager(clip: tuple[Path, Sample]) -> None:
    answer = answered(clip[0], "what happens?", frames=2)
    model = load(attention="eager").model
    tensors = append_text(answer.prepared.tensors, answer.run.tokens[:-1])
    with torch.no_grad():
        out = model(**tensors, output_attentions=True)
    rows = torch.stack([one[0].mean(0) for one in out.attentions]).mean(0)
    expected = rows[-len(answer.run.tokens) :][:, answer.layout.columns]
    assert answer.attention is not None
    torch.testing.assert_close(answer.attention, expected, atol=1e-5, rtol=1e-3)


def test_dropped_tokens_get_no_attention_past_their_cut(clip: tuple[Path, Sample]) -> None:
    preset = override(load_preset("balanced"), keep=0.3, method="random", at="input")
    answer = answered(clip[0], "what happens?", preset, frames=2)
    kept = torch.isin(answer.layout.columns, answer.run.trace.kept[0].columns)
    assert answer.attention is not None
    assert bool((answer.attention[:, ~kept] == 0).all())
    assert bool((answer.attention[:, kept] > 0).all())


def test_a_window_s_row_is_of_the_last_keys() -> None:
    layout = lay_out({"image": torch.tensor([2, 3, 6])}, {"image": [box(1, 1, 3)]})
    reading = AnswerAttention()
    reading.layers[10] = [0]
    reading.sums[10] = [torch.arange(10.0), torch.arange(100.0, 105.0)]  # the next: keys 6 to 10
    rows = reading.to_visual(Trace(layouts=[layout]), 10)
    assert rows.tolist() == [[2, 3, 6], [0, 0, 100]]


def test_the_attention_of_a_batch_is_not_read() -> None:
    call = SimpleNamespace(query=torch.zeros(2, 1, 1, 4))
    with pytest.raises(ModelError, match="one prompt at a time"):
        AnswerAttention().take(0, call)  # type: ignore[arg-type]


def test_explaining_changes_neither_answer_nor_model(clip: tuple[Path, Sample]) -> None:
    media = read_media(embedded(), [clip[0]], Sampling(frames=2), None, Limits())
    generation = Generation(max_new_tokens=24)
    prepared = prepare_question(embedded(), media, "what happens?", generation)
    before = vars(embedded().model).keys()
    for method in ("attention", "information"):
        answer = answer_to_explain(embedded(), prepared, UNPRUNED, generation, {})
        map_run(answer, MapSettings(method, 12))
        (run,) = generate(embedded(), [prepared], UNPRUNED, generation)
        assert torch.equal(run.tokens, answer.run.tokens)
    assert vars(embedded().model).keys() == before


# -- pointing ------------------------------------------------------------------------------------


def hits(run: ExplainedRun, sample: Sample) -> bool:
    """Whether the map's highest token is one on the thing that is asked about."""
    (region,) = find_region(sample.scene, sample.questions[0]) or ()
    shares = run.maps[0].shares.clone()
    shares[torch.tensor([place.box is None for place in run.places])] = 0
    box = run.places[int(shares.argmax())].box
    assert box is not None
    return any(
        box[0] < right and box[2] > left and box[1] < bottom and box[3] > top
        for left, top, right, bottom in boxes_at(sample.scene, region, 0.0)
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_points_at_what_is_asked_about(
    method: str, pictures: list[tuple[Path, Sample]]
) -> None:
    right = []
    dear = method in ("occlusion", "mask", "hierarchical")
    for path, sample in pictures[: 3 if dear else 4]:
        (question,) = sample.questions
        answer = answered(path, question.text)
        assert answer.run.answer == question.answer
        passes = 50 if dear else 60
        right.append(hits(map_run(answer, MapSettings(method, passes)), sample))
    assert sum(right) >= len(right) - 1, right  # by chance about one in ten


# -- windows, parts, evidence kept ----------------------------------------------------------------


def test_windows_cover_every_patch_and_no_newline() -> None:
    grid = join([box(1, 3, 5), single(1, row=0, col=5)])
    layout = lay_out({"image": torch.arange(16)}, {"image": [grid]})
    windows = Cells.of(layout).windows(2, 1)
    assert len(windows) == 2 * 4
    assert bool(windows[:, :15].any(0).all())
    assert not bool(windows[:, 15].any())
    assert starts(5, 2, 2) == [0, 2, 3]
    fitted = Cells.of(layout).places(4, ONES)
    assert len(fitted) <= 4
    assert torch.equal(spread(fitted, fitted.float().sum(1, keepdim=True))[15], torch.zeros(1))


def test_windows_that_are_asked_for_are_tried(one_answer: ExplainedAnswer) -> None:
    picture = Cells.of(lay_out({"image": torch.arange(36)}, {"image": [box(1, 6, 6)]}))
    counts = {
        (size, stride): len(picture.places(99, MapSettings("occlusion", 99, size, stride)))
        for size, stride in ((1, None), (2, 1), (2, 2), (3, 2), (None, 2))
    }
    assert counts == {(1, None): 36, (2, 1): 25, (2, 2): 9, (3, 2): 9, (None, 2): 9}
    small = map_run(one_answer, MapSettings("information", 256, window=2, stride=2))
    late = map_run(one_answer, MapSettings("information", 256, window=2, stride=2, from_layer=3))
    assert small.passes == late.passes
    assert not torch.allclose(small.maps[0].shares, late.maps[0].shares)


def test_windows_of_a_video_are_of_whole_frames_and_through_all_frames() -> None:
    layout = lay_out({"video": torch.arange(64)}, {"video": [box(16, 2, 2)]})
    cells = Cells.of(layout)
    assert torch.equal(cells.places(9, ONES).sum(1), torch.full((4,), 16))
    assert len(cells.places(2, ONES)) == 1
    assert torch.equal(cells.times(16).sum(1), torch.full((16,), 4))
    assert torch.equal(
        cells.times(5).sum(0), torch.ones(64)
    )  # runs of frames, where passes are few
    assert len(cells.times(5)) <= 5
    assert len(cells.times(1)) == 0
    picture = lay_out({"image": torch.arange(16)}, {"image": [box(1, 4, 4)]})
    assert len(Cells.of(picture).times(9)) == 0


def test_evidence_of_a_video_lies_where_time_and_place_meet() -> None:
    layout = lay_out({"video": torch.arange(64)}, {"video": [box(4, 4, 4)]})
    cells = Cells.of(layout)
    wanted = (cells.time == 2) & (cells.row == 1) & (cells.col == 3)

    def effect_of(windows: torch.Tensor) -> torch.Tensor:
        assert len(windows) <= 30
        return (windows & wanted).any(1, keepdim=True).float()

    values = over_time_first(cells, effect_of, 30, ONES)
    assert torch.equal(values[:, 0] > 0, wanted)


def test_an_answer_is_split_into_sentences_and_events() -> None:
    tokenizer = embedded().files.tokenizer
    text = "red circle moves left, then number 50 flashes"
    ids = torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"],
                        tokenizer.eos_token_id])  # fmt: skip
    parts = split_answer(tokenizer, ids)
    assert [part.text for part in parts] == ["red circle moves left", "number 50 flashes"]
    assert [parts[0].first, parts[-1].end] == [0, len(ids) - 1]
    assert parts[0].end == parts[1].first
    (empty,) = split_answer(tokenizer, ids[-1:])
    assert (empty.text, empty.first, empty.end) == ("", 0, 1)


def test_evidence_kept_is_an_average_over_the_layers(clip: tuple[Path, Sample]) -> None:
    preset = override(load_preset("balanced"), keep=0.5, method="random", at="4")
    answer = answered(clip[0], "what happens?", preset, frames=2, attention=True)
    run = map_run(answer, MapSettings("attention"), preset)
    shares = torch.arange(1.0, len(answer.layout) + 1)
    kept = evidence_kept(shares, answer.layout, run.kept.stages, run.kept.num_layers)
    (stage,) = run.kept.stages
    index = [n for n, column in enumerate(answer.layout.columns.tolist()) if column in stage.kept]
    after = float(shares[index].sum() / shares.sum())
    assert kept.after == pytest.approx(after)
    layers = run.kept.num_layers
    assert kept.mean == pytest.approx((4 + (layers - 4) * after) / layers)


# -- the library and the command ------------------------------------------------------------------


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


def test_the_command_prints_answer_table_and_json(
    pictures: list[tuple[Path, Sample]], tmp_path: Path
) -> None:
    path = str(pictures[0][0])
    saved = [tmp_path / name for name in ("a.png", "a.html", "a.json")]
    saves = [word for one in saved for word in ("--save", str(one))]
    result = invoke("explain", path, "what is there?", "--keep", "0.4", *saves)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert "of the unpruned answer's evidence on 4" in " ".join(result.stderr.split())
    assert sorted(tmp_path.iterdir()) == sorted(saved)
    assert Image.open(saved[0]).width >= 640
    data = json.loads(saved[2].read_text())
    assert "small embedded demonstration model" in " ".join(data["warnings"])
    assert [run["name"] for run in data["runs"]] == ["unpruned", "balanced"]
    tokens = data["runs"][0]["maps"][0]["tokens"]
    assert sum(token["share"] for token in tokens) == pytest.approx(1, abs=1e-3)
    side = data["media"][0]["width"]
    base = [one for one in tokens if one["tile"] == 0 and one["kind"] == "patch"]
    across = max(one["col"] for one in base) + 1
    if data["media"][0]["height"] == side:  # a square picture is resized without a margin
        for one in base:
            assert one["box"][0] == pytest.approx(one["col"] * side / across, abs=0.6)
    region = data["runs"][0]["maps"][0]["region"]
    assert 0 < region["share"] <= 1
    assert set(data["evidence_kept"]) == {"mean", "after"}
    unplaced = sum(token["share"] for token in tokens if token["box"] is None)
    assert unplaced > 0.01
    for text in (result.stderr, saved[1].read_text()):
        assert f"{unplaced:.0%} of the evidence, on tokens of no place" in " ".join(text.split())


def test_nothing_of_a_name_or_question_becomes_markup(
    pictures: list[tuple[Path, Sample]], tmp_path: Path
) -> None:
    path = tmp_path / "<b>&{{ 1 }}\u202egnp.png"
    path.write_bytes(pictures[0][0].read_bytes())
    page = tmp_path / "page.html"
    result = invoke("explain", str(path), ATTACK, "--save", str(page), "--by", "attention", "-q")
    assert result.exit_code == 2  # -q is no flag of a command that asks one question
    result = invoke("explain", str(path), ATTACK, "--save", str(page), "--by", "attention")
    assert result.exit_code == 0, result.stderr
    text = page.read_text()
    assert "<img src=x" not in text
    assert "<b>" not in text
    assert "gnp.png" in text
    assert "202e" not in text  # it would turn what stands behind it
    assert text.count("</script>") == 2
    assert "://" not in text


def test_a_clip_is_explained_over_time(clip: tuple[Path, Sample]) -> None:
    explanation = vtprune.explain(
        None, clip[0], "what happens?", by="gradient", sampling=Sampling(frames=4)
    )
    (run,) = explanation.runs
    for one in run.maps:
        moments = run.moments(one)
        assert len(moments) == 4
        assert sum(moment.share for moment in moments) <= 1.001
        region = run.region(one)
        assert region is not None
        assert region.seconds
    assert explanation.kept is None
    assert vtprune.draw(explanation).png().startswith(b"\x89PNG")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_lights_what_carries_the_answer(tmp_path: Path) -> None:
    file, page = tmp_path / "red.png", tmp_path / "evidence.html"
    Image.new("RGB", (320, 240), (200, 40, 40)).save(file)
    explanation = vtprune.explain(None, file, "what is there?", by="attention")
    (run,) = explanation.runs
    shares = torch.zeros(len(run.places))
    lit = [n for n, place in enumerate(run.places) if place.box and place.tile == 0][:2]
    shares[lit] = 0.5  # two tokens of the base picture alone
    maps = tuple(replace(one, shares=shares) for one in run.maps)
    vtprune.draw(replace(explanation, runs=(replace(run, maps=maps),))).save(page)
    seen = screenshot(page, tmp_path / "shot.png")
    orange = tuple(0.6 * a + 0.4 * b for a, b in zip((200, 40, 40), (255, 80, 0), strict=True))
    near = {
        name: sum(count for colour, count in seen.items()
                  if all(abs(a - b) < 12 for a, b in zip(colour, wanted, strict=True)))
        for name, wanted in (("lit", orange), ("dim", (80, 16, 16)))
    }  # fmt: skip
    boxes = [run.places[n].box for n in lit]
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in boxes if box is not None)
    pictures = len({place.tile > 0 for place in run.places if place.box is not None})
    assert min(near.values()) > 500
    assert near["lit"] / sum(near.values()) == pytest.approx(
        area / (pictures * 320 * 240), abs=0.01
    )


def test_a_page_of_32_frames_and_several_events_is_below_3_megabytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(32):
        noise = torch.rand(27, 48, 3, generator=generator).mul(255).byte().numpy()
        Image.fromarray(noise).resize((640, 360)).save(tmp_path / f"{number:02}.png")
    explanation = vtprune.explain(
        None, tmp_path, "what happens?", by="attention", sampling=Sampling(frames=32)
    )
    run = explanation.runs[0]
    several = replace(run, maps=run.maps[:1] * 4)
    page = vtprune.draw(replace(explanation, runs=(several, several))).html()
    assert len(page) < 3_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "magic"], "explain by 'magic' is unknown"),
        (["--by", "information", "--from-layer", "99"], "layer 99 is none of the"),
        (["--from-layer", "2"], "--from-layer changes nothing by relevance"),
        (["--by", "mask", "--window", "2"], "--window changes nothing by mask"),
        (["--by", "attention", "--stride", "1"], "--stride changes nothing by attention"),
        (["--by", "information", "--stride", "2"], "windows of 1 at stride 2 leave tokens between"),
        (["--by", "occlusion", "--window", "1", "--passes", "9"], "windows of 1 at stride 1 take"),
        (["--seed", "1"], "--seed changes nothing without pruning"),
        (["--by", "mask", "--passes", "5"], "mask takes at least"),
        (["--by", "occlusion", "--passes", "1"], "occlusion takes at least"),
        (["--by", "occlusion", "--method", "pool"], "merges tokens, which masking can't repeat"),
    ],
)
def test_what_can_not_be_explained_says_why(
    pictures: list[tuple[Path, Sample]], options: list[str], message: str
) -> None:
    result = invoke("explain", str(pictures[0][0]), "what is there?", *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_compare_says_what_every_row_keeps_of_the_evidence(
    pictures: list[tuple[Path, Sample]],
) -> None:
    given = ("compare", str(pictures[0][0]), "what is there?", "--methods", "vtw", "--keep", "0.5")
    rows = json.loads(invoke(*given, "--no-measure", "--evidence", "--json").stdout)["rows"]
    kept = {row["method"]: row.get("evidence_kept") for row in rows}
    assert kept["unpruned"] == 1
    assert kept["vtw"] == pytest.approx(0.5, abs=0.05)  # none from the middle layer on
    assert 0 < kept["random"] < 1
    assert kept["downsample"] is None
    table = invoke(*given, "--no-measure", "--evidence")
    assert "evidence" in table.stdout.splitlines()[0]
    assert "evidence" not in invoke(*given, "--no-measure").stdout


def test_a_warning_names_what_it_comes_from() -> None:
    rows = [("a", ["all", "two"]), ("b", ["all", "two"]), ("c", ["all", "one", "one"])]
    assert name_sources(rows) == ["all", "a, b: two", "c: one"]
    many = [(str(number), ["four"] * (number < 4)) for number in range(5)]
    assert name_sources(many) == ["0, 1, 2, 1 more: four"]
    own = [("hawk", ["hawk kept them"]), ("fast", ["fast: left out"]), ("dart at 2", ["dart cut"])]
    assert name_sources(own) == ["hawk kept them", "fast: left out", "dart cut"]
    assert name_sources([("fast", ["hawk kept them"]), ("b", [])]) == ["fast: hawk kept them"]


def test_passes_are_bounded(one_answer: ExplainedAnswer) -> None:
    for method in ("gradient", "information", "hierarchical"):
        done: list[int] = []
        passes = Passes(30, lambda stage, at, total, done=done: done.append(at))  # type: ignore[misc]
        make = getattr(import_module(f"vtprune.inference.evidence.{method}"), method)
        make(one_answer.probe(passes, MapSettings(method)))
        assert 0 < passes.done <= 30, method
        assert done[-1] == passes.done


def test_a_text_alone_has_nothing_to_explain() -> None:
    with pytest.raises(VtpruneError, match="is empty"):
        vtprune.explain(None, [], "what?")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("qwen2_vl", "eager"),
        ("qwen3_vl", "sdpa"),
        ("gemma3", "sdpa"),
        ("llava_onevision", "eager"),
        ("gemma4_unified", "sdpa"),
        ("gemma4_unified", "eager"),
    ],
)
def test_every_kind_of_model_is_replayed_exactly(
    name: str, attention: str, checkpoints: Callable[[str], Path], clip: tuple[Path, Sample],
    pictures: list[tuple[Path, Sample]],
) -> None:  # fmt: skip
    loaded = load(str(checkpoints(name)), attention=attention)
    path = pictures[0][0] if name == "gemma3" else clip[0]
    answer = answered(path, "what?", frames=4, loaded=loaded)
    probe, ids = answer.probe(Passes(99)), answer.run.tokens
    assert answer.attention is not None
    assert answer.attention.shape == (len(ids), len(probe))
    assert 0 < float(answer.attention.sum(1).max()) <= 1
    tensors = append_text(answer.prepared.tensors, ids[:-1])
    with torch.no_grad():
        logits = loaded.model(**tensors).logits[:, -len(ids) :]
        ones = probe.replay.replaced(torch.ones(2, len(probe)))
        torch.testing.assert_close(ones, logits.expand(2, -1, -1), atol=1e-4, rtol=1e-3)
        kept = torch.zeros(2, len(probe), dtype=torch.bool)
        kept[0, :3] = kept[1, 3:6] = True
        short, long = probe.replay.alone(kept), probe.replay.masked(~kept)
    torch.testing.assert_close(short, long, atol=1e-4, rtol=1e-3)
    assert float((short - logits).abs().max()) > 1e-4
