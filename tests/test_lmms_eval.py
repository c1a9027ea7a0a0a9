"""lmms-eval itself runs small tasks on local files with `--model vtprune`."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from conftest import save_clip, save_noise
from PIL import Image

import vtprune
from vtprune.errors import ModelError, VtpruneError
from vtprune.inference.generate import Generation
from vtprune.inference.prepare import encode_turns
from vtprune.inference.prompt_media import read_in_full
from vtprune.models.base import Turn

try:
    import lmms_eval.evaluator as evaluator
    from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager
except ImportError as missing:
    pytest.skip(f"lmms-eval can't be imported: {missing}", allow_module_level=True)
if not importlib.metadata.entry_points(group="lmms_eval.models", name="vtprune"):
    pytest.skip("vtprune is not installed, so lmms-eval does not find it", allow_module_level=True)

WORDS = 6  # tokens of an answer
FUNCTIONS = """
from pathlib import Path
from PIL import Image

HERE = Path(__file__).parent

def media(doc, kwargs=None):
    path = HERE / doc["file"]
    return [Image.open(path)] if path.suffix else [{"type": "video", "url": str(path)}]

def text(doc, kwargs=None):
    return doc["question"]

def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None,
           previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    noted = [*(previous_round_info or []), round_idx]
    if round_idx == 3:
        return None, None, True, previous_output, noted
    return media(doc), f"{noted} after {len(previous_output)}", False, previous_output, noted

def given(doc, results):
    return {"given": results[0]}

def together(items):
    return items
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function functions.media
doc_to_text: !function functions.{text}
doc_to_target: answer
"""
GENERATED = """
process_results: !function functions.given
generation_kwargs: {{max_new_tokens: {words}, temperature: 0, do_sample: false, num_beams: 1}}
metric_list:
  - {{metric: given, aggregation: !function functions.together, higher_is_better: true}}
"""
CHOSEN = """
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks about two pictures and a directory of pictures, which is a video."""
    folder = tmp_path_factory.mktemp("tasks")
    save_noise(folder / "a.png", 90, 150)
    save_noise(folder / "b.png", 60, 64)
    save_clip(folder / "clip", 4)
    documents = [
        {"file": file, "question": f"what is {file}?", "answer": "no", "choices": ["yes", "no"]}
        for file in ("a.png", "clip", "b.png")
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in documents))
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, kind, text in (
        ("small_answers", "generate_until", "text"),
        ("small_rounds", "generate_until_multi_round", "rounds"),
        ("small_choices", "multiple_choice", "text"),
    ):
        more = CHOSEN if kind == "multiple_choice" else GENERATED.format(words=WORDS)
        task = TASK.format(name=name, data=data, kind=kind, text=text)
        (folder / f"{name}.yaml").write_text(task + more)
    return folder


def evaluate(tasks: Path, name: str, arguments: str, **options: object) -> dict[str, object]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False, model_name="vtprune")
    return evaluator.simple_evaluate(
        model="vtprune", model_args=arguments, tasks=[name], task_manager=manager,
        bootstrap_iters=0, process_docs_parallel=1, device="cpu", **options,
    )  # fmt: skip


def given(results: dict[str, object], name: str) -> list[object]:
    return [sample["filtered_resps"][0] for sample in results["samples"][name]]  # type: ignore[index]


def model(arguments: str, simple: bool = False, batch_size: int = 1):  # type: ignore[no-untyped-def]
    return get_model("vtprune", force_simple=simple).create_from_arg_string(
        arguments, {"batch_size": batch_size, "device": "cpu"}
    )


# -- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_the_library(
    name: str, simple: bool, batch_size: int, checkpoints, tasks: Path
) -> None:  # type: ignore[no-untyped-def]
    where = checkpoints(name)
    results = evaluate(
        tasks, "small_answers", f"pretrained={where},method=divprune,keep=0.4",
        batch_size=batch_size, force_simple=simple,
    )  # fmt: skip
    items = [(tasks / file, f"what is {file}?") for file in ("a.png", "clip", "b.png")]
    stages = {"keep": 0.4, "stages": [{"at": "input", "method": "divprune"}]}
    reports = vtprune.answer(
        where, items, stages, generation=Generation(max_new_tokens=WORDS), batch_size=batch_size
    )
    assert given(results, "small_answers") == [one.answer for one in reports]


def test_what_was_kept_is_in_the_throughput(checkpoints, tasks: Path) -> None:  # type: ignore[no-untyped-def]
    from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history

    arguments = f"pretrained={checkpoints('llava_onevision')},method=uniform,keep=0.5"
    evaluate(tasks, "small_answers", arguments)
    logged = get_logged_metrics_history()[-1]
    assert logged["keep_mean"] == pytest.approx(0.5, abs=0.02)
    assert logged["total_gen_tokens"] == 3 * WORDS


@pytest.mark.parametrize("simple", [False, True])
def test_every_round_is_asked_until_the_task_ends(simple: bool, checkpoints, tasks: Path) -> None:  # type: ignore[no-untyped-def]
    where = checkpoints("llava_onevision")
    results = evaluate(
        tasks, "small_rounds", f"pretrained={where},method=divprune,keep=0.4", force_simple=simple
    )
    stages = {"keep": 0.4, "stages": [{"at": "input", "method": "divprune"}]}
    short = Generation(max_new_tokens=WORDS)
    for file, rounds in zip(
        ("a.png", "clip", "b.png"), given(results, "small_rounds"), strict=True
    ):
        asked = [f"what is {file}?", "[1] after 1", "[1, 2] after 2"]
        items = [(tasks / file, question) for question in asked]
        reports = vtprune.answer(where, items, stages, generation=short, batch_size=1)
        assert rounds == [one.answer for one in reports]


def test_choices_are_scored_on_their_loss(checkpoints, tasks: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = f"pretrained={checkpoints('llava_onevision')},method=divprune,keep=0.4"
    results = evaluate(tasks, "small_choices", arguments, force_simple=True)
    losses = [
        [float(resp[0]) for resp in sample["filtered_resps"]]
        for sample in results["samples"]["small_choices"]  # type: ignore[index]
    ]
    assert all(len(one) == 2 and min(one) > 0 for one in losses)
    right = [no < yes for yes, no in losses]
    assert results["results"]["small_choices"]["acc,none"] == sum(right) / 3  # type: ignore[index]


def test_a_loss_is_that_of_the_answer_in_the_chat_template(checkpoints, tasks: Path) -> None:  # type: ignore[no-untyped-def]
    """Against an unpruned forward over the whole conversation, answer included."""
    where = checkpoints("llava_onevision")
    asked = model(f"pretrained={where},keep=1", simple=True)
    asked.task_dict = {"t": {"test": [{}]}}
    request = Instance(
        "loglikelihood",
        ("what?", " yes", lambda _: [Image.open(tasks / "a.png")], 0, "t", "test"),
        0,
        metadata={"task": "t", "doc_id": 0, "repeats": 1},
    )
    ((loss, _),) = [unwrap_generation_output(one)[0] for one in asked.loglikelihood([request])]
    loaded, limits = asked.asker.loaded, asked.asker.limits
    gathered = read_in_full(loaded, [tasks / "a.png"], asked.asker.sampling, limits)
    prompt = encode_turns(loaded, gathered, [Turn("user", "what?", 1)]).tensors
    wanted = loaded.files.tokenizer("yes", add_special_tokens=False, return_tensors="pt").input_ids
    ids = torch.cat([prompt["input_ids"], wanted], dim=1)
    with torch.no_grad():
        logits = loaded.model(
            **{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ).logits[0, -wanted.shape[1] - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, wanted[0])
    assert loss == pytest.approx(float(expected), rel=1e-4)


# -- requests ------------------------------------------------------------------------------------


def request_of(document: dict[str, object], options: dict[str, object], messages) -> Instance:  # type: ignore[no-untyped-def]
    return Instance(
        "generate_until",
        ("", lambda _: messages, options, 0, "t", "test"),
        0,
        metadata={"task": "t", "doc_id": 0, "repeats": 1},
    )


def chat(checkpoints, **options: object):  # type: ignore[no-untyped-def]
    asked = model(f"pretrained={checkpoints('llava_onevision')},keep=0.5,method=uniform")
    asked.task_dict = {"t": {"test": [{}]}}
    return asked


def test_a_result_counts_its_tokens(checkpoints) -> None:  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": [{"type": "text", "text": "why?"}]}]
    (found,) = chat(checkpoints).generate_until([request_of({}, {"max_new_tokens": 3}, messages)])
    assert isinstance(found, GenerationResult)
    assert found.token_counts.output_tokens == 3
    assert found.token_counts.input_tokens > len("why?")


def test_a_question_that_is_repeated_is_sampled_anew(checkpoints) -> None:  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": [{"type": "text", "text": "why?"}]}]
    options = {"max_new_tokens": 12, "temperature": 1.5, "do_sample": True}
    requests = [request_of({}, options, messages)] * 2
    first = [one.text for one in chat(checkpoints).generate_until(requests)]
    again = [one.text for one in chat(checkpoints).generate_until(requests)]
    assert first == again
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("options", "temperature", "top_p", "longest"),
    [
        ({}, 0.0, 1.0, 1024),
        ({"do_sample": True, "max_new_tokens": 5}, 1.0, 1.0, 5),
        ({"do_sample": False, "temperature": 0.7}, 0.0, 1.0, 1024),
        ({"temperature": 0.7, "top_p": 0.9}, 0.7, 0.9, 1024),
        (
            {"temperature": 0, "top_p": 0, "until": None, "image_aspect_ratio": "pad"},
            0.0,
            1.0,
            1024,
        ),
    ],
)
def test_generation_is_as_the_task_says(
    options: dict[str, object], temperature: float, top_p: float, longest: int, checkpoints
) -> None:  # type: ignore[no-untyped-def]
    found = chat(checkpoints).generation(options)
    assert (found.temperature, found.top_p, found.max_new_tokens) == (temperature, top_p, longest)


def test_beams_are_refused_with_the_name_of_the_question(checkpoints) -> None:  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": [{"type": "text", "text": "why?"}]}]
    with pytest.raises(ModelError, match="t 0: num_beams 3"):
        chat(checkpoints).generate_until([request_of({}, {"num_beams": 3}, messages)])


def test_a_file_that_can_not_be_read_names_the_question(checkpoints) -> None:  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": [{"type": "video", "url": "/none.mp4"}]}]
    with pytest.raises(VtpruneError, match=r"t 0: /none\.mp4: no such file"):
        chat(checkpoints).generate_until([request_of({}, {}, messages)])


@pytest.mark.parametrize("batch_size", ["auto", 0])
def test_a_batch_size_out_of_range_is_refused(batch_size: object) -> None:
    with pytest.raises(VtpruneError, match="batch_size"):
        get_model("vtprune")(batch_size=batch_size, device="cpu")


def test_a_model_is_let_go(checkpoints) -> None:  # type: ignore[no-untyped-def]
    asked = chat(checkpoints)
    asked.clean()
    assert not hasattr(asked, "asker")


def test_families_are_asked_with_interleaved_pictures(checkpoints, tasks: Path) -> None:  # type: ignore[no-untyped-def]
    for name in tiny.MODELS:
        if "image" not in tiny.KINDS[name]:
            continue
        asked = model(f"pretrained={checkpoints(name)},keep=0.5,method=uniform")
        asked.task_dict = {"t": {"test": [{}]}}
        show = [{"type": "image", "url": Image.open(tasks / file)} for file in ("a.png", "b.png")]
        words = [{"type": "text", "text": text} for text in ("is ", " like ", "?")]
        content = [words[0], show[0], words[1], show[1], words[2]]
        messages = [{"role": "user", "content": content}]
        (found,) = asked.generate_until([request_of({}, {"max_new_tokens": 2}, messages)])
        assert found.token_counts.output_tokens == 2, name
