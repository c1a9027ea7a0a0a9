"""What a cut can do besides dropping: read text and attention, merge, renumber, share unevenly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from typing import Any, ClassVar

import oracle
import pytest
import tiny
import tiny_gemma
import torch
from conftest import shared_model

import vtprune
from vtprune.engine.hooks import Hooks, this_thread
from vtprune.engine.prefill import Prefill
from vtprune.engine.readings import KernelCall, KernelTap
from vtprune.errors import ModelError, PresetError
from vtprune.models.seams import turns_by_position
from vtprune.models.structure import find_structure
from vtprune.pruners import METHODS, Method, flashvid
from vtprune.pruners.base import Budget, Selection, VisualTokens
from vtprune.tokens.information import group_information
from vtprune.tokens.quotas import weighted_quotas
from vtprune.tokens.schedule import CutProfile, Place
from vtprune.tokens.solver import solve

BY_TOKEN = [name for name, method in METHODS.items() if not method.before_tower]
MERGING = {
    "visionzip": {"contextual": "32/64"},
    "sparsevlm": {},
    "holitom": {},
    "pool": {},
    "vscan": {},
    "fastvid": {"contextual": "1"},
    "flashvid": {},
}
"""Methods that merge, with options with which they do so where tokens are few."""
ONE_DIMENSIONAL = [
    name for name in tiny.MODELS if not hasattr(shared_model(name).model, "get_rope_index")
]


@dataclass(frozen=True)
class Probe:
    """Keeps the first tokens and remembers what it was given."""

    given: ClassVar[list[VisualTokens]] = []
    needs: ClassVar[tuple[str, ...]] = ()

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        self.given.append(tokens)
        return Selection(torch.arange(len(tokens))[: budget.count])


@dataclass(frozen=True)
class Merging:
    """Keeps every third token or so, and gives each the mean of those up to the next."""

    needs: ClassVar[tuple[str, ...]] = ()

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        num, count = len(tokens), budget.count
        index = torch.arange(count) * num // count
        assign = torch.searchsorted(index, torch.arange(num), right=True) - 1
        weight = 1 / torch.bincount(assign)[assign]
        assign[-1] = -1 if num > index[-1] + 1 else assign[-1]  # one token is not merged
        sums = torch.zeros(count).index_add_(0, assign.clamp_min(0), weight * (assign >= 0))
        return Selection(index, assign, weight / sums[assign.clamp_min(0)])


@dataclass(frozen=True)
class Lazy:
    """Keeps one token, whatever it may keep."""

    needs: ClassVar[tuple[str, ...]] = ()

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return Selection(torch.zeros(1, dtype=torch.long))


def thirds() -> CutProfile:
    return CutProfile((1 / 3, 2 / 3), lambda t: (t, t * t))


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "given", [])
    monkeypatch.setattr(flashvid, "CHOSEN", 0.5)  # of two tokens a frame it would choose both
    here = __name__
    for name, extra in (
        ("probe", {}),
        ("merging", {}),
        ("lazy", {"exact": False}),
        ("strict", {"exact": True}),
        ("attentive", {"lowest": 1}),
        ("moving", {"modalities": ("video",)}),
        ("thirds", {"schedule": f"{here}:thirds", "at": "schedule"}),
    ):
        cls = {"merging": "Merging", "lazy": "Lazy", "strict": "Lazy"}.get(name, "Probe")
        entry = Method(**{"path": f"{here}:{cls}", "at": "2", "summary": name, **extra})
        monkeypatch.setitem(METHODS, name, entry)


# -- states, text and attention -------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_attention_is_what_the_eager_model_says(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_head = ("text_attention_by_head",) if attention == "sdpa" else ()
    monkeypatch.setattr(Probe, "needs", ("attention", "text_attention", *by_head))
    model, eager = shared_model(name, attention), shared_model(name, "eager")
    eager.load_state_dict(model.state_dict())
    inputs = tiny.ragged(name, model)
    with vtprune.pruning(model, {"stages": [{"at": 2, "method": "probe", "keep": 0.3}]}) as trace:
        oracle.generate(model, inputs, steps=1)
    with torch.no_grad():
        heads = eager(**inputs, output_attentions=True).attentions[1].float()  # (B, H, S, S)
    whole = heads.mean(1)  # (B, S, S)
    for number, tokens in enumerate(Probe.given):
        columns = trace.layouts[number].columns
        after = torch.arange(inputs["input_ids"].shape[1]) > columns[-1]
        expected = whole[number][after][:, columns]
        found = tokens.states["text_attention"]
        if model.config.model_type == "molmo2":  # a marker after the picture sees it both ways
            causal = oracle.both_ways(model, inputs)[number][after] < 0
            expected, found = expected[causal], found[causal]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(tokens.states["attention"], expected[-1], atol=1e-6, rtol=1e-4)
        assert expected[-1].sum() > 0.1
        if by_head and model.config.model_type != "molmo2":
            rows = heads[number][:, after][..., columns].transpose(0, 1)  # (M, H, N)
            found = tokens.states["text_attention_by_head"]
            torch.testing.assert_close(found, rows, atol=1e-6, rtol=1e-4)
    assert len(Probe.given) == 2


def test_the_attention_of_the_last_token_is_the_same_read_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shared_model("llava")
    inputs = tiny.ragged("llava", model)
    for needs in (("attention",), ("attention", "text_attention")):
        monkeypatch.setattr(Probe, "needs", needs)
        with vtprune.pruning(model, {"stages": [{"at": 2, "method": "probe", "keep": 0.3}]}):
            oracle.generate(model, inputs, steps=1)
    assert len(Probe.given) == 4
    for alone, among in zip(Probe.given[:2], Probe.given[2:], strict=True):
        torch.testing.assert_close(alone.states["attention"], among.states["attention"])


@pytest.mark.parametrize("name", tiny.MODELS)
def test_what_positions_say_are_the_scores_of_queries_and_keys_of_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probe, "needs", ("rotary", "text_rotary"))
    model = shared_model(name)
    inputs, structure = tiny.ragged(name, model), find_structure(model)
    with vtprune.pruning(model, {"stages": [{"at": 2, "method": "probe", "keep": 0.3}]}) as trace:
        oracle.generate(model, inputs, steps=1)
    attention, calls = structure.attention_module(1), list[KernelCall]()
    made = [structure.projection(1, state) for state in ("query", "key")]
    made += [getattr(attention, norm) for norm in ("q_norm", "k_norm") if hasattr(attention, norm)]
    tap = KernelTap(attention, calls.append)
    with Hooks(this_thread()) as hooks, torch.no_grad():
        for module in made:
            hooks.after(module, lambda module, args, output: torch.ones_like(output))
        hooks.replace_during(attention, tap.registry, "get_interface", tap.get_interface)
        model(**inputs)
    (call,) = calls
    scores = call.query[:, 0].float() @ call.key[:, 0].float().transpose(1, 2) * call.scale
    for number, tokens in enumerate(Probe.given):
        columns = trace.layouts[number].columns
        after = torch.arange(inputs["input_ids"].shape[1]) > columns[-1]
        expected = scores[number][after][:, columns]
        found = tokens.states["text_rotary"] @ tokens.states["rotary"].T
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert expected.std() > 1e-3 or turns_nothing(name)
    assert len(Probe.given) == 2


def turns_nothing(name: str) -> bool:
    """Whether the second layer of a tiny model has no rotary positions."""
    return not turns_by_position(find_structure(shared_model(name)).attention_module(1))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma4"])
@pytest.mark.parametrize("first", [1, 2])
def test_previous_states_are_those_that_enter_the_layer_before(
    name: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probe, "needs", ("previous", "text_previous", "hidden"))
    model, seen = shared_model(name), dict[int, torch.Tensor]()
    stages = [
        {"at": first, "method": "probe", "keep": 0.6}, {"at": 3, "method": "probe", "keep": 0.3},
    ]  # fmt: skip
    inputs = tiny.ragged(name, model)
    layers = find_structure(model).layers

    def note(number: int) -> Any:
        def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(number, kwargs.get("hidden_states", args[0] if args else None))

        return hook

    with vtprune.pruning(model, {"stages": stages}), torch.no_grad():
        handles = [
            layer.register_forward_pre_hook(note(number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        try:
            model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
    assert len(Probe.given) == 4
    for number, tokens in enumerate(Probe.given):
        before = seen[first - 1 if number < 2 else 2][number % 2]
        read = tokens.states["previous"].flatten(1)
        assert len(read) == len(tokens)
        rows = (before[None] - read[:, None]).abs().amax(-1).argmin(1)  # ascending slots
        torch.testing.assert_close(before[rows], read)
        assert rows.diff().min() > 0
        assert not torch.equal(read, tokens.states["hidden"].flatten(1))
        text = tokens.states["text_previous"].flatten(1)
        assert len(text) > 0
        torch.testing.assert_close(text, before[rows[-1] + 1 :][-len(text) :][: len(text)])


def test_no_kernel_is_left_behind_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setattr(Probe, "needs", ("attention",))
    monkeypatch.setattr(Probe, "select", lambda *_: 1 / 0)
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    expected = oracle.generate(model, inputs, steps=1)[1]
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with (
        pytest.raises(ZeroDivisionError),
        vtprune.pruning(model, {"stages": [{"at": 2, "method": "probe", "keep": 0.3}]}),
    ):
        oracle.generate(model, inputs, steps=1)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert torch.equal(oracle.generate(model, inputs, steps=1)[1], expected)


@pytest.mark.parametrize("place", ["input", 2])
def test_text_states_are_those_after_the_last_visual_token(
    place: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Probe, "needs", ("text_hidden", "hidden", "text_key", "key"))
    model = shared_model("llava")
    inputs = tiny.ragged("llava", model)
    layer = 0 if place == "input" else 2
    with vtprune.pruning(
        model, {"stages": [{"at": place, "method": "probe", "keep": 0.3}]}
    ) as trace:
        oracle.generate(model, inputs, steps=1)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        before = model.model.language_model.layers[max(layer - 1, 0)]
        keys = before.self_attn.k_proj(before.input_layernorm(states[max(layer - 1, 0)]))
    for number, tokens in enumerate(Probe.given):
        last = trace.layouts[number].columns[-1] + 1
        read = tokens.states["text_hidden"].flatten(1)
        torch.testing.assert_close(read, states[layer][number, last:])
        torch.testing.assert_close(tokens.states["text_key"].flatten(1), keys[number, last:])
        columns = trace.layouts[number].columns
        torch.testing.assert_close(tokens.states["key"].flatten(1), keys[number, columns])


def test_a_prompt_that_ends_in_a_picture_has_no_text_to_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Probe, "needs", ("text_hidden",))
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    last = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1]) + 1
    inputs = {
        key: value[:, :last] if key in ("input_ids", "attention_mask") else value
        for key, value in inputs.items()
    }
    with (
        pytest.raises(ModelError, match="no text follows the pictures"),
        vtprune.pruning(model, {"stages": [{"at": 2, "method": "probe", "keep": 0.3}]}),
        torch.no_grad(),
    ):
        model(**inputs)


def test_a_method_that_reads_attention_is_refused_at_the_input() -> None:
    model = shared_model("llava")
    for place in ("input", 0, "5%"):
        with (
            pytest.raises(PresetError, match="reads what the layer before its cut does"),
            vtprune.pruning(model, method="attentive", at=place, keep=0.5),
        ):
            pass
    with vtprune.pruning(model, method="attentive", at=1, keep=0.5):
        pass


def test_a_named_cut_of_such_a_method_never_moves_to_the_input() -> None:
    place = Place("ecl", 2, lowest=1)
    with pytest.raises(PresetError, match=r"lowest reachable keep is 0\.1[78]"):
        solve([place], 0.1, 6, 100)
    assert solve([Place("ecl", 2)], 0.1, 6, 100).cuts[0].layer == 0


def test_a_method_for_clips_is_refused_for_pictures() -> None:
    model = shared_model("llava_onevision")
    preset = {"stages": [{"at": 2, "method": "moving", "keep": 0.3}]}
    with (
        pytest.raises(PresetError, match="moving takes video input only, and"),
        vtprune.pruning(model, preset),
    ):
        oracle.generate(model, tiny.inputs("llava_onevision", model, "image"), steps=1)
    with vtprune.pruning(model, preset) as trace:
        oracle.generate(model, tiny.inputs("llava_onevision", model, "video"), steps=1)
    assert trace.stages[0].method == "moving"


# -- fewer than the budget ------------------------------------------------------------------------


def test_a_method_may_keep_fewer_only_where_its_entry_says_so() -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    with vtprune.pruning(model, {"stages": [{"at": 2, "method": "lazy", "keep": 0.5}]}) as trace:
        oracle.generate(model, inputs, steps=1)
    assert trace.stages[0].after == [1]
    assert trace.keep_mean() < 0.5
    with (
        pytest.raises(AssertionError, match="strict must meet its budget"),
        vtprune.pruning(model, {"stages": [{"at": 2, "method": "strict", "keep": 0.5}]}),
    ):
        oracle.generate(model, inputs, steps=1)


# -- merging --------------------------------------------------------------------------------------

Choice = tuple[int, int, torch.Tensor, Selection]
"""Layer, sample, the columns that a method chose from, and what it chose."""


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """Every choice that a method makes from now on."""
    made: list[Choice] = []
    cut_sample = Prefill.cut_sample

    def cut(self, sample, own, cut, group, hidden):  # type: ignore[no-untyped-def]
        method = type(group.stages[cut.stage].pruner)
        select = method.select

        def choose(pruner, tokens, budget):  # type: ignore[no-untyped-def]
            selection = select(pruner, tokens, budget)
            made.append((cut.layer, sample, tokens.layout.columns, selection))
            return selection

        with monkeypatch.context() as patch:
            patch.setattr(method, "select", choose)
            return cut_sample(self, sample, own, cut, group, hidden)

    monkeypatch.setattr(Prefill, "cut_sample", cut)
    return made


@contextmanager
def merging_by_hand(model, choices: list[Choice]) -> Iterator[None]:  # type: ignore[no-untyped-def]
    """The same states that were merged, in a model that drops no token."""

    decoder = model.get_decoder()

    def merge(module, args, kwargs, layer):  # type: ignore[no-untyped-def]
        name = "inputs_embeds" if module is decoder else "hidden_states"
        hidden = (args[0] if args else kwargs[name]).clone()
        for at, sample, columns, chosen in choices if hidden.shape[1] > 1 else []:
            if at == layer and chosen.assign is not None:
                states = hidden[sample, columns]
                for k, column in enumerate(columns[chosen.index].tolist()):
                    share = (chosen.weight * (chosen.assign == k))[:, None]
                    hidden[sample, column] = (states * share).sum(0)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, name: hidden})

    # Gemma 4 makes inputs to each layer of what its decoder is given.
    handles = [
        block.register_forward_pre_hook(partial(merge, layer=number), with_kwargs=True)
        for number, block in enumerate([decoder, *decoder.layers[1:]])
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("place", ["input", 2])
@pytest.mark.parametrize(
    "name", ["llava", "llava_onevision", "qwen2_5_vl", "gemma3", "molmo2", "gemma4"]
)
def test_merged_equals_masked_with_the_same_merged_states(
    name: str, place: str | int, choices: list[Choice]
) -> None:
    if name not in tiny.FAMILIES:
        pytest.skip("not in this transformers")
    model = shared_model(name)
    inputs = tiny.ragged(name, model)
    with vtprune.pruning(
        model, {"stages": [{"at": place, "method": "merging", "keep": 0.4}]}
    ) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=4)
    assert len(choices) == 2
    with merging_by_hand(model, choices):
        oracle.assert_masked(model, inputs, trace, tokens, logits)
    plain = oracle.masked(model, inputs, oracle.dropped(trace, inputs), tokens)
    assert (plain - logits).abs().max() > 1e-3, "the check would not notice merging"


def test_merging_leaves_the_caller_s_embeddings_alone() -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    seen: list[torch.Tensor] = []
    decoder = model.get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True, prepend=True
    )
    with vtprune.pruning(model, {"stages": [{"at": "input", "method": "merging", "keep": 0.4}]}):
        oracle.generate(model, inputs, steps=1)
    handle.remove()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    text = inputs["input_ids"][0] != model.config.image_token_id
    torch.testing.assert_close(seen[0][0, text], embeds[0, text])


# -- positions ------------------------------------------------------------------------------------

RENUMBERED = {
    "input": [{"at": "input", "method": "random", "keep": 0.3, "positions": "renumber"}],
    "layer": [{"at": 2, "method": "random", "keep": 0.3, "positions": "renumber"}],
    "keep_then_renumber": [
        {"at": "input", "method": "random", "keep": 0.6},
        {"at": 3, "method": "random", "keep": 0.2, "positions": "renumber"},
    ],
    "renumber_then_keep": [
        {"at": "input", "method": "random", "keep": 0.6, "positions": "renumber"},
        {"at": 3, "method": "random", "keep": 0.2},
    ],
    "twice": [
        {"at": 1, "method": "random", "keep": 0.6, "positions": "renumber"},
        {"at": 3, "method": "random", "keep": 0.2, "positions": "renumber"},
    ],
}


def by_hand(model, inputs, given, stages, trace, tokens) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Logits after every token of `tokens`, each from a whole forward over layers without a cache.

    Args:
        given: what the decoder is given for the prompt, visual tokens in place.
    """
    embeds, inputs_to_layers = given["inputs_embeds"], given.get("per_layer_inputs")
    decoder, structure, name = model.get_decoder(), find_structure(model), model.config.model_type
    blocks = oracle.both_ways(model, inputs)
    own = {r.layer: s for r, s in zip(trace.stages, stages, strict=True)}
    visual = set(trace.layouts[0].columns.tolist())
    logits = []
    for step in range(tokens.shape[1]):
        new = model.get_input_embeddings()(tokens[:, :step])
        hidden = torch.cat([embeds, new], dim=1)
        columns = torch.arange(hidden.shape[1])
        positions, columns_of = columns.clone(), {}
        more = {"shared_kv_states": {}} if name in tiny_gemma.MODELS else {}
        if inputs_to_layers is not None:  # Gemma 4
            by_token = [inputs_to_layers, decoder.get_per_layer_inputs(tokens[:, :step], None)]
            of_layers = decoder.project_per_layer_inputs(hidden, torch.cat(by_token, dim=1))
        for number, layer in enumerate(decoder.layers):
            if number in own:
                kept = next(set(r.kept[0]) for r in trace.stages if r.layer == number)
                stays = torch.tensor([c not in visual or c in kept for c in columns.tolist()])
                columns, positions, hidden = columns[stays], positions[stays], hidden[:, stays]
                if own[number].get("positions") == "renumber":
                    positions = torch.arange(len(columns))
            keys = columns_of.setdefault(structure.key_layers[number], columns)
            seen = (columns[:, None] >= keys[None]) & torch.isin(keys, columns)
            masks = given["attention_mask"]
            causal = isinstance(masks, dict) and masks[decoder.config.layer_types[number]] is None
            if blocks is not None and not causal:
                block = torch.nn.functional.pad(blocks[0], (0, step), value=-1)
                both = (block[columns, None] == block[keys]) & (block[keys] >= 0)
                seen |= both & torch.isin(keys, columns)
            bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            if inputs_to_layers is not None:
                more["per_layer_input"] = of_layers[:, columns, number]
            out = layer(
                hidden,
                attention_mask=bias[None, None],
                position_embeddings=structure.rotary(number, hidden, positions[None]),
                position_ids=positions[None],
                **more,
            )
            hidden = out[0] if isinstance(out, tuple) else out
        logits.append(model.lm_head(decoder.norm(hidden))[:, -1])
    return torch.stack(logits, dim=1)


def recorded(model, run: Callable[[], object]) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """What the decoder is given at prefill."""
    seen: list[dict[str, torch.Tensor]] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True, prepend=True
    )
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("stages", RENUMBERED)
@pytest.mark.parametrize("name", [*ONE_DIMENSIONAL, *tiny_gemma.MODELS])
def test_renumbered_positions_equal_a_hand_written_loop(name: str, stages: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    last = RENUMBERED[stages][-1]
    if name in tiny_gemma.MODELS and last["at"] == 3 and "positions" in last:
        with (
            pytest.raises(ModelError, match=r"renumber at layer 3: later layers of gemma4.* share"),
            vtprune.pruning(model, {"stages": RENUMBERED[stages]}),
        ):
            oracle.generate(model, inputs, steps=1)
        return
    given = recorded(model, lambda: oracle.generate(model, inputs, steps=1))
    with vtprune.pruning(model, {"stages": RENUMBERED[stages]}) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    with torch.no_grad():
        expected = by_hand(model, inputs, given, RENUMBERED[stages], trace, tokens)
    tolerance = 4e-5 if name in tiny_gemma.MODELS else 1e-5
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
    kept = [{**stage, "positions": "keep"} for stage in RENUMBERED[stages]]
    with vtprune.pruning(model, {"stages": kept}):
        other = oracle.generate(model, inputs, steps=3, force=tokens)[1]
    assert (other - logits).abs().max() > 1e-4, "the check would not notice the positions"


def test_renumbering_from_the_last_layer_on_is_refused_where_that_layer_takes_over_keys() -> None:
    name = next(iter(tiny_gemma.MODELS))
    model = shared_model(name)
    last = len(model.get_decoder().layers) - 1
    stage = {**RENUMBERED["layer"][0], "at": last}
    with (
        pytest.raises(ModelError, match=f"at layer {last}: later layers of gemma4.* share"),
        vtprune.pruning(model, {"stages": [stage]}),
    ):
        oracle.generate(model, tiny.inputs(name, model, "image"), steps=1)


@pytest.mark.parametrize("stages", RENUMBERED)
def test_renumbered_in_a_ragged_batch_is_as_alone(stages: str) -> None:
    name = "llava_onevision"
    model = shared_model(name)
    rows = tiny.two(name, model)
    with vtprune.pruning(model, {"stages": RENUMBERED[stages]}):
        tokens, together = oracle.generate(model, tiny.left_pad(name, rows), steps=4)
        alone = [
            oracle.generate(model, row, steps=4, force=tokens[[number]])[1]
            for number, row in enumerate(rows)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stages", RENUMBERED)
@pytest.mark.parametrize("given", [True, False])
def test_more_text_on_a_renumbered_cache_equals_one_token_at_a_time(
    stages: str, given: bool
) -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    more = torch.tensor([[65, 66, 67]])
    length = inputs["input_ids"].shape[1]
    with vtprune.pruning(model, {"stages": RENUMBERED[stages]}), torch.no_grad():
        stepped = oracle.generate(model, inputs, steps=4, force=torch.cat([more, more[:, :1]], 1))
        cache = model(**inputs, use_cache=True)[oracle.CACHE]
        positions = {"position_ids": torch.arange(length, length + 3)[None]} if given else {}
        out = model(input_ids=more, **{oracle.CACHE: cache}, use_cache=True, **positions)
    torch.testing.assert_close(out.logits, stepped[1][:, 1:], atol=1e-5, rtol=0)


def test_renumbering_is_refused_for_positions_of_three_numbers() -> None:
    model = shared_model("qwen2_5_vl")
    with (
        pytest.raises(ModelError, match=r"positions: renumber.*mrope"),
        vtprune.pruning(model, {"stages": RENUMBERED["layer"]}),
    ):
        pass


def test_new_pictures_on_a_renumbered_cache_are_refused() -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    with vtprune.pruning(model, {"stages": RENUMBERED["layer"]}), torch.no_grad():
        cache = model(**inputs, use_cache=True)[oracle.CACHE]
        with pytest.raises(ModelError, match="positions were renumbered"):
            model(**inputs, **{oracle.CACHE: cache}, use_cache=True)


# -- shares ---------------------------------------------------------------------------------------


def test_information_is_the_number_of_directions() -> None:
    torch.manual_seed(0)
    axes = torch.eye(8) * 5
    same = axes[:1].repeat(4, 1)  # one direction
    pair = torch.stack([axes[1], axes[1], -axes[1], -axes[1]])  # one line, both ways
    four = axes[2:6]
    states = torch.cat([same, pair, four])
    states = torch.cat([states, -states])  # the mean token is zero
    group = torch.arange(3).repeat_interleave(4).repeat(2)
    counts = group_information(states, group)
    assert counts == pytest.approx([1.0, 1.0, 4.0], abs=1e-3)
    assert group_information(states + 7, group) == pytest.approx(counts, abs=1e-3)


def test_information_of_a_group_does_not_depend_on_the_others_size() -> None:
    torch.manual_seed(0)
    states = torch.randn(30, 16)
    group = torch.tensor([0] * 10 + [1] * 13 + [2] * 7)
    mixed = torch.randperm(30)
    shuffled = group_information(states[mixed], group[mixed])
    assert group_information(states, group) == pytest.approx(shuffled, rel=1e-4)


def test_shares_follow_the_weights_and_add_up() -> None:
    assert weighted_quotas(10, [8, 8, 8], [1, 3, 4]) == [2, 4, 4]
    assert weighted_quotas(6, [8, 8], [0.2, 0.1]) == [4, 2]
    assert weighted_quotas(3, [8, 8, 8], [4, 1, 1], least=0) == [2, 1, 0]  # of 2, 0.5 and 0.5
    assert weighted_quotas(10, [8, 8, 8], [0, 0, 1]) == [1, 1, 8]
    assert weighted_quotas(10, [8, 8, 8], [0, 0, 1], least=0) == [1, 1, 8]
    assert weighted_quotas(8, [8, 8, 8], [0, 0, 1], least=0) == [0, 0, 8]
    assert weighted_quotas(2, [8, 8, 8], [1, 2, 3]) == [1, 0, 1]
    assert weighted_quotas(2, [8, 8, 8], [1, 2, 3], least=0) == [0, 1, 1]
    assert weighted_quotas(9, [3, 3, 3], [1, 1, 1]) == [3, 3, 3]


@pytest.mark.parametrize("least", [0, 1])
def test_any_shares_are_exact_and_within_their_groups(least: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(300):
        groups = int(torch.randint(1, 9, (), generator=generator))
        sizes = torch.randint(1, 12, (groups,), generator=generator).tolist()
        weights = torch.rand(groups, generator=generator).mul(10).tolist()
        count = int(torch.randint(0, sum(sizes) + 1, (), generator=generator))
        shares = weighted_quotas(count, sizes, weights, least)
        assert sum(shares) == count
        assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        if least and count >= groups:
            assert min(shares) >= 1


def test_frames_that_say_more_get_more() -> None:
    name = "llava_onevision"
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "video")
    inputs["pixel_values_videos"][:, 0] = 0.5  # a blank frame
    counts = {}
    for split in ("even", "entropy", "entropy-or-none"):
        stage = {"at": "input", "method": "random", "keep": 0.4, "per": "frame", "split": split}
        with vtprune.pruning(model, {"stages": [stage]}) as trace:
            oracle.generate(model, inputs, steps=1)
        frames = trace.kept[0].grid.frame
        counts[split] = torch.bincount(frames).tolist()
    assert sum(counts["even"]) == sum(counts["entropy"]) == sum(counts["entropy-or-none"])
    assert counts["entropy"][0] < counts["even"][0]
    assert counts["entropy"][0] >= 1
    assert counts["entropy-or-none"][0] == 0


def test_a_split_needs_frames_or_tiles() -> None:
    stage = {"at": 2, "method": "random", "keep": 0.4, "split": "entropy"}
    with pytest.raises(PresetError, match="split: entropy shares a budget over frames or tiles"):
        vtprune.engine.load_preset({"stages": [stage]})


# -- schedules of a method's own ------------------------------------------------------------------


def test_a_schedule_of_its_own_is_solved_for_the_layer_average() -> None:
    profile = thirds()
    places = [
        Place("schedule", layer, profile=profile, part=part)
        for part, layer in enumerate(profile.layers(6))
    ]
    solved = solve(places, 0.5, 6, 1000)
    # 2 + 2 t + 2 t^2 = 3 -> t = (sqrt(3) - 1) / 2 = 0.366
    assert [(cut.layer, cut.count) for cut in solved.cuts] == [(2, 366), (4, 134)]
    assert solve(places, 0.34, 6, 1000).cuts[1].count == 1
    with pytest.raises(PresetError, match=r"lowest reachable keep is 0\.334"):
        solve(places, 0.3, 6, 1000)


def test_a_schedule_of_its_own_cuts_in_the_model() -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    with vtprune.pruning(model, method="thirds", keep=0.5) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    assert [record.layer for record in trace.stages] == [2, 4]
    assert [tokens.stage for tokens in Probe.given] == [0, 1]
    assert trace.keep_mean() <= 0.5
    assert trace.keep_mean() > 0.47
    oracle.assert_masked(model, inputs, trace, tokens, logits)


def test_a_schedule_takes_no_keep_and_no_other_method_has_one() -> None:
    with pytest.raises(PresetError, match=r"keep 0\.5 for the schedule of thirds"):
        vtprune.engine.load_preset({"stages": [{"method": "thirds", "keep": 0.5}]})
    with pytest.raises(PresetError, match="probe has no schedule of its own"):
        vtprune.engine.load_preset({"stages": [{"at": "schedule", "method": "probe"}]})
    with pytest.raises(PresetError, match="2 decoder layers are too few for 2 cuts"):
        CutProfile((0.9, 0.95), lambda t: (t, t)).layers(2, 1)


# -- every method of the registry -----------------------------------------------------------------


def takes(name: str, kind: str) -> bool:
    """Whether method `name` can cut all that a prompt of this kind holds."""
    return set(METHODS[name].modalities) >= ({"video"} if kind == "video" else {"image"})


def cells(taken: bool) -> list[tuple[str, str, str]]:
    """Return every method with every family, on one kind of prompt that it takes, or does not.

    The kinds take turns, so that every method meets all of them, and so does every family.
    """
    found = []
    for (number, name), (place, family) in product(enumerate(BY_TOKEN), enumerate(tiny.MODELS)):
        kinds = [kind for kind in tiny.KINDS[family] if takes(name, kind) == taken]
        if kinds:
            found.append((name, family, kinds[(number + place) % len(kinds)]))
    return found


@pytest.mark.parametrize("taken", [True, False])
def test_every_two_of_method_family_and_kind_meet(taken: bool) -> None:
    every = [
        (name, family, kind)
        for name, family in product(BY_TOKEN, tiny.MODELS)
        for kind in tiny.KINDS[family]
        if takes(name, kind) == taken
    ]
    for one, other in combinations(range(3), 2):
        assert {(cell[one], cell[other]) for cell in cells(taken)} == {
            (cell[one], cell[other]) for cell in every
        }


def pruned_by(model, name: str, kind: str):  # type: ignore[no-untyped-def]
    """A block with one method; placeholders that both modalities share hold what `kind` says."""
    modality = "video" if kind == "video" else "image"
    options = MERGING.get(name)
    return vtprune.pruning(model, method=name, keep=0.4, options=options, modality=modality)


@pytest.mark.parametrize(("name", "family", "kind"), cells(taken=True))
def test_pruned_equals_masked_with_every_method(
    name: str, family: str, kind: str, choices: list[Choice]
) -> None:
    """For those before the vision tower see test_pixels.py and test_downsampling.py."""
    model = shared_model(family)
    inputs = tiny.ragged(family, model, kind)
    with pruned_by(model, name, kind) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    cuts = [cut for record in trace.stages for cut in zip(record.before, record.after, strict=True)]
    assert len(choices) == sum(before > after for before, after in cuts)
    assert 0.2 < trace.keep_mean() <= 0.4
    if len(trace.layouts[0]) > 4:  # of fewer, too few go to be merged
        merged = any(
            chosen.assign is not None and int((chosen.assign >= 0).sum()) > len(chosen.index)
            for *_, chosen in choices
        )
        assert merged == (name in MERGING), "the check would not notice merging"
    made = list(choices)
    with merging_by_hand(model, made):
        oracle.assert_masked(model, inputs, trace, tokens, logits)
    assert len(choices) == len(made), "the model that is compared with is not pruned"


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "gemma4"])
@pytest.mark.parametrize(
    "stage",
    [{"at": "schedule", "method": "holitom"}, {"at": 2, "method": "fastv", "rest": "merge"}],
)
def test_merging_in_a_deep_layer_equals_masked(
    stage: dict[str, object], family: str, choices: list[Choice]
) -> None:
    model = shared_model(family)
    inputs = tiny.ragged(family, model, "video")
    preset = {"keep": 0.7, "stages": [stage]}
    with vtprune.pruning(model, preset, modality="video") as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    deep = trace.stages[-1]
    assert deep.layer > 0
    made = [chosen for layer, _, _, chosen in choices if layer == deep.layer]
    assert len(made) == 2
    assert all(chosen.assign is not None and int(chosen.assign.min()) == 0 for chosen in made)
    made = list(choices)
    with merging_by_hand(model, made):
        oracle.assert_masked(model, inputs, trace, tokens, logits)


@pytest.mark.parametrize(("name", "family", "kind"), cells(taken=False))
def test_a_method_for_clips_is_refused_in_every_family(name: str, family: str, kind: str) -> None:
    model = shared_model(family)
    inputs = tiny.inputs(family, model, kind)
    message = f"^{name} takes video input only, and this input has image tokens"
    with pytest.raises(PresetError, match=message), pruned_by(model, name, kind):
        oracle.generate(model, inputs, steps=1)
