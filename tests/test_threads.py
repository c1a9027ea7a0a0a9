"""Calls at once from several threads give what they give alone."""

from __future__ import annotations

import copy
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
from conftest import save_clip, save_noise, shared_model
from transformers import PreTrainedModel, TextIteratorStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

import vtprune
from vtprune.device import Duration
from vtprune.engine.hooks import POINTS, Hooks
from vtprune.engine.trace import DecodeCut, Trace
from vtprune.errors import ModelError, VtpruneError
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.generate import Generation
from vtprune.models.loading import load
from vtprune.preset import load_preset, override
from vtprune.process_settings import WARNINGS_OFF, ProcessSetting

THREADS, EACH = 4, 25
PRESETS = {
    "fastv": [{"at": 2, "method": "fastv", "keep": 0.3}],
    "visionzip": [{"at": "input", "method": "visionzip", "keep": 0.4}],
    "sparsevlm": [{"at": 3, "method": "sparsevlm", "keep": 0.4}],
    "two": [
        {"at": 1, "method": "entropy", "keep": 0.5, "positions": "keep"},
        {"at": 4, "method": "random", "keep": 0.1},
    ],
    "input": [{"at": "input", "method": "random", "keep": 0.3}],
    "input and layer": [
        {"at": "input", "method": "dart", "keep": 0.6, "per": "tile"},
        {"at": 3, "method": "uniform", "keep": 0.2},
    ],
}
LAYER_TWO = {"stages": [{"at": 2, "method": "random", "keep": 0.3}]}
ORDERS = [(0, 1, 2), (2, 1, 0), (1, 2, 0)]
Answer = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads take turns far more often than they would by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def at_once(tasks: Sequence[Callable[[], object]]) -> list[Any]:
    """What tasks give that run at once, each in a thread of its own."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        start = threading.Barrier(len(tasks))

        def begin(task: Callable[[], object]) -> object:
            start.wait(60)
            return task()

        return [one.result(120) for one in [pool.submit(begin, task) for task in tasks]]


def in_thread(task: Callable[[], object]) -> Any:
    """What a task gives in a thread of its own."""
    return at_once([task])[0]


def prompts(name: str, model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Prompts of different length, alone and in a ragged batch."""
    return [
        tiny.inputs(name, model, "image"),
        tiny.ragged(name, model, "image"),
        tiny.inputs(name, model, "several", seed=1, text=3),
        tiny.inputs(name, model, "text", text=9),
    ]


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], static: bool) -> Answer:
    options = {"cache_implementation": "static"} if static else {}
    return oracle.generate(model, inputs, steps=2, **options)


def assert_same(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    assert len(answers) == len(expected)
    for (tokens, logits), (right, right_logits) in zip(answers, expected, strict=True):
        assert torch.equal(tokens, right)
        torch.testing.assert_close(logits, right_logits, atol=1e-5, rtol=0)


def own(model: PreTrainedModel, preset: object) -> AbstractContextManager[Trace]:
    """A block that prunes the calls of its thread alone; None: no block."""
    if preset is None:
        return nullcontext(Trace())
    return vtprune.pruning(model, preset, threads="own")  # type: ignore[arg-type]


def marks(model: PreTrainedModel) -> object:
    """All that a block could leave behind, apart from what transformers itself leaves."""
    modules, its_own = list(model.modules()), ("rope_deltas", "_previous_max_cache_length")
    return (
        [
            {name: id(value) for name, value in vars(one).items() if name not in its_own}
            for one in modules
        ],
        [(list(one._forward_hooks), list(one._forward_pre_hooks)) for one in modules],
        [one.config.to_dict() for one in modules if hasattr(one, "config")],
        dict(vars(ALL_ATTENTION_FUNCTIONS)),
        dict(ALL_ATTENTION_FUNCTIONS),
    )


# -- the same answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("no block", "qwen3_vl"),
        ("one block", "qwen3_vl"),
        ("own blocks", "internvl"),
        ("own blocks beside none", "qwen3_vl"),
    ],
)
def test_each_of_100_answers_is_what_it_is_alone(way: str, name: str) -> None:
    """`no block` is the control: stock transformers is safe, so that what differs is ours."""
    model = shared_model(name, "eager" if name == "internvl" else "sdpa")
    asked, presets = prompts(name, model), [{"stages": one} for one in PRESETS.values()]
    if name == "internvl":
        del presets[1]  # its tower has no CLS token and is read in the other ways
    jobs = [(asked[n % 4], presets[n % len(presets)], n % 3 == 0) for n in range(THREADS + EACH)]
    if way == "no block":
        jobs = [(inputs, None, static) for inputs, _, static in jobs]
    elif way == "one block":
        jobs = [(inputs, presets[0], static) for inputs, _, static in jobs]
    elif way == "own blocks beside none":
        jobs = [(a, None if n % 2 else preset, s) for n, (a, preset, s) in enumerate(jobs)]

    def answer(job: tuple[Any, Any, bool]) -> Answer:
        inputs, preset, static = job
        with own(model, preset):
            return generate(model, inputs, static)

    expected = [answer(job) for job in jobs]
    before = marks(model)
    block: AbstractContextManager[object] = nullcontext()
    if way == "one block":
        block = vtprune.pruning(model, presets[0])
        jobs = [(inputs, None, static) for inputs, _, static in jobs]
    numbers = [range(first, first + EACH) for first in range(THREADS)]
    with block:
        found = at_once([lambda rows=rows: [answer(jobs[n]) for n in rows] for rows in numbers])
    for rows, answers in zip(numbers, found, strict=True):
        assert_same(answers, [expected[n] for n in rows])
    assert marks(model) == before


def test_a_streamer_gives_the_pruned_answer_of_a_thread() -> None:
    name = "llava_onevision"
    model, inputs = shared_model(name), tiny.inputs(name, shared_model(name), "image")
    tokenizer = tiny.tokenizer(name)
    with vtprune.pruning(model, LAYER_TWO) as trace:
        expected = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    stages = trace.stages
    unpruned = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert not torch.equal(expected, unpruned)
    with vtprune.pruning(model, LAYER_TWO) as trace:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {**inputs, "max_new_tokens": 12, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(expected)
    assert trace.stages == stages


def test_blocks_open_and_close_at_any_moment_while_others_generate() -> None:
    name = "llava_onevision"
    model = shared_model(name)
    asked, presets = prompts(name, model)[:3], [{"stages": one} for one in PRESETS.values()]
    expected = {}
    for number, inputs in enumerate(asked):
        for place, preset in enumerate([None, *presets]):
            with own(model, preset) as trace:
                expected[number, place] = generate(model, inputs, False), trace.stages
    before = marks(model)

    def work(seed: int) -> int:
        draw, count = random.Random(seed), 0
        for _ in range(5):
            place = draw.randrange(len(presets) + 1)
            with own(model, [None, *presets][place]) as trace:
                for _ in range(draw.randrange(4)):  # none: opened and closed at once
                    number = draw.randrange(len(asked))
                    answer, stages = expected[number, place]
                    assert_same([generate(model, asked[number], False)], [answer])
                    assert trace.stages == stages
                    count += 1
        return count

    assert sum(at_once([lambda seed=seed: work(seed) for seed in range(4)])) > 15
    assert marks(model) == before


@pytest.mark.parametrize("preset", ["fastv", "visionzip"])
def test_an_exception_in_one_thread_does_not_disturb_the_others(preset: str) -> None:
    name = "qwen3_vl"
    model, block = shared_model(name), {"stages": PRESETS[preset]}
    inputs = tiny.inputs(name, model, "image")
    with own(model, block):
        expected = generate(model, inputs, False)
    before = marks(model)
    failing = threading.local()

    def stop(*_: object) -> None:
        if getattr(failing, "here", False):
            raise RuntimeError("stop here")

    places = [model.model.visual.blocks[1], model.get_decoder().layers[3], model.lm_head]

    def fail() -> None:
        failing.here = True
        for _ in range(3):
            with pytest.raises(RuntimeError, match="stop here"):
                generate(model, inputs, False)
            with pytest.raises(ModelError, match="labels"):
                model(**inputs, labels=inputs["input_ids"])

    def answer() -> list[Answer]:
        return [generate(model, inputs, False) for _ in range(3)]

    for place in places:
        handle = place.register_forward_pre_hook(stop)
        try:
            with vtprune.pruning(model, block):
                _, first, _, second = at_once([fail, answer, fail, answer])
        finally:
            handle.remove()
        assert_same([*first, *second], [expected] * 6)
    assert marks(model) == before


def test_a_thread_that_is_interrupted_leaves_nothing_behind() -> None:
    """Ctrl-C ends a forward without the hooks that PyTorch runs after other exceptions."""
    name = "llava_onevision"
    model, inputs = shared_model(name), tiny.inputs(name, shared_model(name), "image")
    expected = generate(model, inputs, False)
    with own(model, LAYER_TWO):
        pruned = generate(model, inputs, False)
    before = marks(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with vtprune.pruning(model, LAYER_TWO):
        handle = model.get_decoder().layers[4].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs, False)
        handle.remove()
        assert_same([generate(model, inputs, False)], [pruned])
        handle = model.get_decoder().layers[4].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs, False)
        handle.remove()
    assert marks(model) == before
    assert_same([generate(model, inputs, False)], [expected])


@pytest.mark.parametrize(("name", "threads"), [("qwen2_5_vl", "all"), ("glm4v", "own")])
def test_turns_and_hand_written_decoding_are_placed_by_the_thread_s_prompt(
    name: str, threads: str
) -> None:
    """Models with mrope keep the last prompt's offset on themselves, whoever's it is."""
    model = shared_model(name)
    sizes = [(60, 80), (130, 120), (200, 160), (270, 200)]
    asked = [tiny.inputs(name, model, "image", sizes=(size,), text=4) for size in sizes]

    def answer(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), own(model, LAYER_TWO if threads == "own" else None):
            first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, torch.tensor([[66, 67, 68]])], dim=1)
            cache = first.past_key_values
            second = model.generate(
                input_ids=ids, past_key_values=cache, max_new_tokens=2, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            out = model(**inputs, use_cache=True)
            new = torch.tensor([[65]])
            third = model(input_ids=new, past_key_values=out.past_key_values, use_cache=True)
        return torch.cat([*second.logits, third.logits[:, -1]])

    whole = vtprune.pruning(model, LAYER_TWO) if threads == "all" else nullcontext()
    with whole:
        expected = [answer(inputs) for inputs in asked]
        found = at_once([lambda one=one: [answer(one) for _ in range(3)] for one in asked])
    for answers, right in zip(found, expected, strict=True):
        for logits in answers:
            torch.testing.assert_close(logits, right, atol=1e-5, rtol=0)


# -- whose blocks --------------------------------------------------------------------------------


def test_two_presets_and_an_unpruned_thread_meet_in_one_prefill() -> None:
    """All are in their decoders at the same time, between the cuts and what follows them."""
    name = "llava_onevision"
    model, inputs = shared_model(name), tiny.ragged(name, shared_model(name), "image")
    presets = [None, LAYER_TWO, {"stages": PRESETS["visionzip"]}, {"stages": PRESETS["fastv"]}]
    expected = []
    for preset in presets:
        with own(model, preset) as trace:
            expected.append((generate(model, inputs, False), trace.stages))
    together = threading.Barrier(len(presets), timeout=60)
    layers = model.get_decoder().layers

    def meet(*_: object) -> None:
        together.wait()

    handles = [layers[number].register_forward_pre_hook(meet) for number in (1, 3)]

    def answer(preset: object) -> tuple[Answer, object]:
        with own(model, preset) as trace:
            return generate(model, inputs, False), trace.stages

    try:
        found = at_once([lambda preset=preset: answer(preset) for preset in presets])
    finally:
        for handle in handles:
            handle.remove()
    for (right, stages), (made, cut) in zip(expected, found, strict=True):
        assert_same([made], [right])
        assert cut == stages


def test_every_thread_s_calls_are_pruned_and_with_own_the_opener_s_alone() -> None:
    name = "llava_onevision"
    model, inputs = shared_model(name), tiny.inputs(name, shared_model(name), "image")
    unpruned = generate(model, inputs, False)
    with own(model, LAYER_TWO):
        pruned = generate(model, inputs, False)
        assert_same([in_thread(lambda: generate(model, inputs, False))], [unpruned])
    with vtprune.pruning(model, LAYER_TWO):
        assert_same([in_thread(lambda: generate(model, inputs, False))], [pruned])
    assert_same([in_thread(lambda: generate(model, inputs, False))], [unpruned])


@pytest.mark.parametrize("outer", ["all", "own"])
@pytest.mark.parametrize("inner", ["all", "own"])
def test_a_block_in_a_block_of_the_same_thread_is_refused(outer: str, inner: str) -> None:
    model = shared_model("llava_onevision")
    with vtprune.pruning(model, LAYER_TWO, threads=outer):
        with pytest.raises(ModelError, match="enclosing block") as raised:  # noqa: SIM117
            with vtprune.pruning(model, LAYER_TWO, threads=inner):
                pass
        assert 'threads="own"' in raised.value.hint
    with vtprune.pruning(model, LAYER_TWO, threads=inner):
        pass


@pytest.mark.parametrize("inner", ["all", "own"])
def test_a_block_beside_one_for_all_threads_is_refused(inner: str) -> None:
    model = shared_model("llava_onevision")

    def enter() -> None:
        with vtprune.pruning(model, LAYER_TWO, threads=inner):
            pass

    with (
        vtprune.pruning(model, LAYER_TWO),
        pytest.raises(ModelError, match="another thread's block for all threads"),
    ):
        in_thread(enter)
    in_thread(enter)


def test_a_block_for_all_threads_beside_one_of_another_thread_is_refused() -> None:
    model = shared_model("llava_onevision")

    def enter() -> None:
        with vtprune.pruning(model, LAYER_TWO):
            pass

    with (
        own(model, LAYER_TWO),
        pytest.raises(ModelError, match='other threads have blocks with threads="own"'),
    ):
        in_thread(enter)
    in_thread(enter)


def test_other_threads_than_all_and_own_are_refused() -> None:
    model = shared_model("llava_onevision")
    with pytest.raises(ModelError, match="threads 'mine' is not one of all, own"):  # noqa: SIM117
        with vtprune.pruning(model, LAYER_TWO, threads="mine"):
            pass


@pytest.mark.parametrize("order", ORDERS)
def test_the_model_is_as_before_once_all_blocks_are_closed_in_any_order(
    order: Sequence[int],
) -> None:
    """Each is opened in a thread of its own and closed in this one."""
    name = "qwen3_vl"
    model, inputs = shared_model(name), tiny.inputs(name, shared_model(name), "image")
    expected = generate(model, inputs, False)
    before = marks(model)
    blocks = [ExitStack() for _ in order]
    pools = [ThreadPoolExecutor(1) for _ in order]
    for block, pool, preset in zip(blocks, pools, PRESETS.values(), strict=False):
        entered = pool.submit(block.enter_context, own(model, {"stages": preset}))
        entered.result(60)
        pool.submit(generate, model, inputs, False).result(60)
    for number in order:
        assert marks(model) != before
        blocks[number].close()
        assert_same([pools[number].submit(generate, model, inputs, False).result(60)], [expected])
    for pool in pools:
        pool.shutdown()
    assert marks(model) == before
    assert not any(POINTS in vars(module) for module in model.modules())


def test_a_method_that_was_replaced_before_is_put_back() -> None:
    """As accelerate does, which sets a module's `forward` as an attribute of its own."""
    owner = torch.nn.Linear(1, 1)
    owner.forward = earlier = lambda states: states + 1  # type: ignore[method-assign]
    hooks = Hooks(None)
    hooks.replace(owner, "forward", lambda forward, states: 10 * forward(states))
    assert owner(torch.ones(1)).tolist() == [20]
    hooks.remove()
    assert owner.forward is earlier


# -- a block that is left while a thread generates -----------------------------------------------


def held_at(layer: torch.nn.Module) -> tuple[threading.Event, threading.Event, Any]:
    """Events that tell that a forward has come to a layer, and let it go on; and the hook."""
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert go_on.wait(60)

    return reached, go_on, layer.register_forward_pre_hook(wait)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_forward_ends_as_it_began_and_the_next_is_refused(attention: str) -> None:
    name = "qwen3_vl"
    model = shared_model(name, attention)
    inputs = tiny.ragged(name, model, "image")

    def prefill() -> Any:
        with torch.no_grad():
            return model(**inputs, use_cache=True)

    with vtprune.pruning(model, LAYER_TWO) as trace:
        expected = prefill().logits
    stages, before = trace.stages, marks(model)
    reached, go_on, handle = held_at(model.get_decoder().layers[4])
    with ThreadPoolExecutor(1) as pool:
        with vtprune.pruning(model, LAYER_TWO) as trace:
            running = pool.submit(prefill)
            assert reached.wait(60)
        go_on.set()
        out = running.result(60)
    handle.remove()
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=0)
    assert trace.stages == stages
    assert marks(model) == before
    with pytest.raises(ModelError, match="pruned in a block that has been left"):
        decode(model, out.past_key_values)


def test_a_generation_that_began_before_a_block_ends_unpruned() -> None:
    name = "llava_onevision"
    model, inputs = shared_model(name), tiny.inputs(name, shared_model(name), "image")
    expected = generate(model, inputs, False)
    reached, go_on, handle = held_at(model.get_decoder().layers[4])
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, model, inputs, False)
        assert reached.wait(60)
        with vtprune.pruning(model, LAYER_TWO) as trace:
            go_on.set()
            assert_same([running.result(60)], [expected])
    handle.remove()
    assert trace.prefills == 0


def test_a_generation_whose_block_is_left_is_refused_where_it_would_go_wrong() -> None:
    name = "llava_onevision"
    model, inputs = shared_model(name), tiny.ragged(name, shared_model(name), "image")
    reached, go_on, handle = held_at(model.get_decoder().layers[4])
    with ThreadPoolExecutor(1) as pool:
        with vtprune.pruning(model, LAYER_TWO):
            running = pool.submit(generate, model, inputs, True)
            assert reached.wait(60)
        go_on.set()
        with pytest.raises(ModelError, match="pruned in a block that has been left"):
            running.result(60)
    handle.remove()


def decode(model: PreTrainedModel, cache: Any) -> torch.Tensor:
    """Logits of a further token of every row, on a cache that another block may have left."""
    new = torch.full((cache.layers[0].keys.shape[0], 1), 65)
    with torch.no_grad():
        return model(input_ids=new, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("preset", ["input", "fastv", "renumbered"])
@pytest.mark.parametrize("static", [False, True])
def test_a_pruned_cache_goes_on_outside_of_blocks_rightly_or_not_at_all(
    kind: str, attention: str, preset: str, static: bool
) -> None:
    name = "llava"
    model = shared_model(name, attention)
    inputs = (tiny.inputs if kind == "one" else tiny.ragged)(name, model, "image")
    stages = PRESETS["fastv" if preset == "fastv" else "input"]
    if preset == "renumbered":
        stages = [{**stages[0], "positions": "renumber"}]

    def start() -> Any:
        options = {}
        if static:
            from transformers import StaticCache

            config = model.get_decoder().config
            options["past_key_values"] = StaticCache(config=config, max_cache_len=400)
        return model(**inputs, use_cache=True, **options).past_key_values

    with torch.no_grad(), vtprune.pruning(model, {"stages": stages}):
        right, cache, copied = decode(model, start()), start(), copy.deepcopy(start())
    alone = kind == "one" and preset != "renumbered"
    alone &= preset == "input" or (attention == "sdpa" and not static)
    for one in (cache, copied):
        if alone:
            torch.testing.assert_close(decode(model, one), right, atol=1e-5, rtol=0)
            continue
        with pytest.raises(ModelError, match="pruned in a block that has been left") as raised:
            decode(model, one)
        assert "keep the block open" in raised.value.hint
        with vtprune.pruning(model, keep=1.0):  # in a new block it goes on
            torch.testing.assert_close(decode(model, one), right, atol=1e-5, rtol=0)


# -- copies of a model ---------------------------------------------------------------------------


def test_copies_and_replicas_of_a_model_that_is_being_pruned_are_refused() -> None:
    name = "llava_onevision"
    model, inputs = tiny.model(name), tiny.inputs(name, shared_model(name), "image")
    with torch.no_grad(), vtprune.pruning(model, LAYER_TWO):
        made = [copy.deepcopy(model), copy.copy(model)]
        made[1]._modules = {**model._modules, "model": model.model._replicate_for_data_parallel()}
        for one in made:
            with pytest.raises(ModelError, match=r"DataParallel\)"):
                one(**inputs)


# -- what the whole process shares ---------------------------------------------------------------


PLANS: list[tuple[object, float | None]] = [
    ("balanced", 0.3),
    ({"stages": [{"at": 2, "method": "fastv", "keep": 0.2}]}, None),
    ({"stages": [{"at": "pixels", "method": "predictable", "keep": 0.7}]}, None),
    ({"stages": [{"at": "input", "method": "visionzip", "keep": 0.5}]}, None),
    ({"stages": [{"at": "pixels", "method": "downsample"}]}, 0.5),
]


def test_questions_asked_at_once_of_one_loaded_model_are_answered_as_alone(
    checkpoints: Any, tmp_path: Path
) -> None:
    loaded = load(str(checkpoints("qwen2_5_vl")))
    picture, clip = save_noise(tmp_path / "p.png", 60, 90), save_clip(tmp_path / "clip", 4)
    state = list(warnings.filters), logging.get_verbosity(), logging.is_progress_bar_enabled()
    random_state = torch.random.get_rng_state()

    def answer(number: int) -> list[object]:
        preset, keep = PLANS[number % len(PLANS)]
        preset = override(load_preset(preset), keep)  # type: ignore[arg-type]
        # Every other answer is drawn, and each by a seed of its own.
        generation = Generation(3, temperature=float(number % 2), seed=number)
        try:
            if number % 3:
                asked = [(picture, "what?"), (clip, "who is there?")][: number % 3]
                reports = vtprune.answer(loaded, asked, preset, generation=generation)
            else:
                reports = list(
                    answer_questions(loaded, [clip], ["what?"], preset, generation=generation)
                )
        except VtpruneError as error:
            return [error.message]
        return [
            report.error.message if report.error else (report.answer, report.tokens, report.flops)
            for report in reports
        ]

    expected = [answer(number) for number in range(15)]
    assert sum(isinstance(one[0], tuple) for one in expected) > 10
    numbers = [[(first * 4 + n) % 15 for n in range(EACH)] for first in range(THREADS)]
    found = at_once([lambda rows=rows: [answer(n) for n in rows] for rows in numbers])
    for rows, answers in zip(numbers, found, strict=True):
        assert answers == [expected[n] for n in rows]
    assert (list(warnings.filters), logging.get_verbosity(), logging.is_progress_bar_enabled()) == (
        state
    )
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_what_the_process_shares_is_put_back_by_the_thread_that_leaves_last() -> None:
    filters = list(warnings.filters)
    first_in, first_out = threading.Event(), threading.Event()

    def first() -> None:
        with WARNINGS_OFF:
            first_in.set()
            time.sleep(0.05)
        first_out.set()

    def second() -> list[object]:
        assert first_in.wait(60)
        with WARNINGS_OFF:
            assert first_out.wait(60)
            return list(warnings.filters)

    _, inside = at_once([first, second])
    assert inside != filters
    assert list(warnings.filters) == filters


def test_a_change_that_fails_is_tried_again_by_the_next_thread() -> None:
    tries: list[int] = []

    def make() -> AbstractContextManager[None]:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("not yet")
        return nullcontext()

    change = ProcessSetting(make)
    with pytest.raises(RuntimeError, match="not yet"), change:
        pass
    with change, change:
        pass
    assert len(tries) == 2


# -- traces --------------------------------------------------------------------------------------


def test_a_trace_is_of_one_prefill_never_of_two() -> None:
    name = "llava_onevision"
    model = shared_model(name)
    asked = [tiny.inputs(name, model, "image", text=text) for text in (3, 8)]
    done = threading.Event()
    mixed: list[object] = []
    with vtprune.pruning(model, LAYER_TWO) as trace:

        def watch() -> None:
            while not done.is_set():
                one = trace.snapshot()
                if one.stages:
                    columns = one.kept[0].columns.tolist()
                    same = one.stages[-1].kept[0] == columns
                    visual = len(one.layouts[0])
                    same &= one.stages[0].before[0] == visual == one.visual_by_layer[0][0]
                    same &= set(columns) <= set(one.layouts[0].columns.tolist())
                    mixed.extend([] if same else [one])

        watcher = threading.Thread(target=watch)
        watcher.start()
        at_once([lambda one=one: [generate(model, one, False) for _ in range(8)] for one in asked])
        done.set()
        watcher.join()
    assert not mixed
    assert trace.prefills == 16
    assert len(trace.warnings) == len(set(trace.warnings))


def test_a_snapshot_is_not_changed_by_later_steps() -> None:
    trace = Trace()
    trace.warn("first")
    before = trace.snapshot()
    trace.warn("second")
    trace.decoding.append(DecodeCut(1, (torch.tensor([[-1, 0, 2]]),), [[1]], Duration()))
    assert (before.warnings, before.decoding) == (["first"], [])
    assert trace.decoding[0].left(0, 0) == [0, 2]  # without the padding


def test_a_prefill_that_raises_leaves_the_trace_of_the_last_one_that_ended() -> None:
    name = "llava_onevision"
    model, inputs = shared_model(name), tiny.inputs(name, shared_model(name), "image")
    with vtprune.pruning(model, LAYER_TWO) as trace:
        generate(model, inputs, False)
        before = trace.snapshot()
        handle = model.get_decoder().layers[4].register_forward_pre_hook(_stop)
        with pytest.raises(RuntimeError, match="stop here"):
            generate(model, tiny.inputs(name, model, "video", frames=8), False)
        handle.remove()
    assert (trace.stages, trace.layouts, trace.kept) == (
        before.stages, before.layouts, before.kept,
    )  # fmt: skip
    assert trace.begun is not None
    assert len(trace.begun.layouts[0]) != len(trace.layouts[0])


def _stop(*_: object) -> None:
    raise RuntimeError("stop here")
