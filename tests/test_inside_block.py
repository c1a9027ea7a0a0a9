"""What works inside a block, and what is refused: the table of docs/library.md.

`python tests/test_inside_block.py` writes the table anew.
"""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import vtprune
from vtprune.engine.trace import Trace
from vtprune.errors import ModelError

DOC = Path(__file__).parents[1] / "docs" / "library.md"
BEGIN, END = "<!-- inside a block -->\n", "<!-- end of inside a block -->\n"
NAME, STEPS = "llava_onevision", 6
STAGES = {
    "stages": [
        {"at": "input", "method": "random", "keep": 0.7},
        {"at": 2, "method": "random", "keep": 0.4},
    ]
}
Batch = dict[str, torch.Tensor]
RIGHT = "right: the tokens of the model with the dropped ones masked"
HUB = "refused by transformers: it would run code from the hub, which vtprune does not know"
BOTH = ("do_sample", "num_beams", "num_return_sequences")
"""The options that say what is generated; the others say how."""


def block(model: PreTrainedModel) -> AbstractContextManager[Trace]:
    return vtprune.pruning(model, STAGES)


@functools.cache
def another() -> PreTrainedModel:
    """A model with the same weights, outside of all blocks."""
    return tiny.model(NAME)


def generation(**options: object) -> Callable[[PreTrainedModel, Batch], None]:
    """Generate pruned, and with the dropped tokens masked: the same tokens."""

    def check(model: PreTrainedModel, inputs: Batch) -> None:
        length, given = inputs["input_ids"].shape[1], {"do_sample": False, **options}
        with torch.no_grad(), block(model) as trace:
            torch.manual_seed(0)
            pruned = model.generate(**inputs, max_new_tokens=STEPS, **given)
        plain = {name: value for name, value in given.items() if name in BOTH}
        with torch.no_grad(), oracle.masking(another(), oracle.dropped(trace, {}), prompt=length):
            torch.manual_seed(0)
            masked = another().generate(**inputs, max_new_tokens=STEPS, **plain)
            assert torch.equal(pruned, masked)

    return check


def assisted(model: PreTrainedModel, inputs: Batch) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=model.config.get_text_config().vocab_size,
    )  # fmt: skip
    generation(assistant_model=LlamaForCausalLM(config).eval())(model, inputs)


def copied_outside(model: PreTrainedModel, inputs: Batch) -> None:
    made = copy.deepcopy(model)
    answers = []
    for one in (model, made):
        with torch.no_grad(), block(one):
            answers.append(one(**inputs).logits)
    assert torch.equal(*answers)


def copied_inside(model: PreTrainedModel, inputs: Batch) -> None:
    with torch.no_grad(), block(model):
        copy.deepcopy(model)(**inputs)


def compiled(model: PreTrainedModel, inputs: Batch) -> None:
    with torch.no_grad(), block(torch.compile(model)):
        pass


def gradients(model: PreTrainedModel, inputs: Batch) -> None:
    grads = []
    with block(model) as trace:
        model(**inputs).logits[:, -1].square().sum().backward()
    with oracle.masking(another(), oracle.dropped(trace, {})):
        another()(**inputs).logits[:, -1].square().sum().backward()
    for one in (model, another()):
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
        one.zero_grad(set_to_none=True)
    assert grads[0].keys() == grads[1].keys()
    assert any(float(grad.abs().max()) > 0.01 for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-4, rtol=1e-3)


def labels(model: PreTrainedModel, inputs: Batch) -> None:
    with block(model):
        model(**inputs, labels=inputs["input_ids"])


def embeddings(model: PreTrainedModel, inputs: Batch) -> None:
    with block(model):
        model(inputs_embeds=torch.randn(1, 12, tiny.WIDTH))


def nested(model: PreTrainedModel, inputs: Batch) -> None:
    with block(model), block(model):
        pass


def pickled(model: PreTrainedModel, inputs: Batch) -> None:
    with torch.no_grad(), block(model) as trace:
        model(**inputs)
    preset, error = vtprune.load_preset("balanced"), ModelError("a", "b")
    again = pickle.loads(pickle.dumps([trace, preset, error]))
    assert again[0].stages == trace.stages
    assert again[1] == preset
    assert (again[2].message, again[2].hint) == ("a", "b")


CASES: dict[str, tuple[Callable[[PreTrainedModel, Batch], None], str]] = {
    "greedy": (generation(), RIGHT),
    "sampling, several sequences": (generation(do_sample=True, num_return_sequences=3), RIGHT),
    "beam search": (generation(num_beams=3), RIGHT),
    "beam search, several sequences": (generation(num_beams=3, num_return_sequences=2), RIGHT),
    "prompt lookup": (generation(prompt_lookup_num_tokens=3), RIGHT),
    "an assistant model": (assisted, RIGHT),
    "contrastive search": (generation(penalty_alpha=0.6, top_k=4), HUB),
    "DoLa": (generation(dola_layers="low"), HUB),
    "groups of beams": (generation(num_beams=4, num_beam_groups=2, diversity_penalty=0.5), HUB),
    "a static cache": (generation(cache_implementation="static", disable_compile=True), RIGHT),
    "no cache": (generation(use_cache=False), RIGHT),
    "`prefill_chunk_size`": (generation(prefill_chunk_size=8), "refused: only 4 of 76 visual"),
    "gradients": (gradients, "right: those of the model with the dropped tokens masked"),
    "`labels`": (labels, "refused: labels were given"),
    "`inputs_embeds`": (embeddings, "refused: the prompt was given as inputs_embeds"),
    "`torch.compile(model)`": (compiled, "refused: OptimizedModule is compiled"),
    "a deep copy made outside a block": (copied_outside, "right: pruned as the model is"),
    "a deep copy made in the block": (copied_inside, "refused: this is a copy of a model"),
    "a block in a block": (nested, "refused: this model is being pruned already"),
    "pickling a trace, a report, a preset, an error": (pickled, "right: the same again"),
}


def outcome(case: str) -> str:
    """What the table says of a case: that it is right, or the error that refuses it."""
    model = tiny.model(NAME)
    check, _ = CASES[case]
    try:
        check(model, tiny.inputs(NAME, model, "image", text=12))
    except ModelError as error:
        return f"refused: {error.message}; {error.hint}"
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        return HUB
    return CASES[case][1]


def table() -> str:
    rows = [f"| {case} | {outcome(case)} |\n" for case in CASES]
    return "".join(["| in a block | |\n| --- | --- |\n", *rows])


def documented() -> str:
    return DOC.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


@pytest.mark.parametrize("case", CASES)
def test_what_a_block_meets_is_right_or_refused_as_the_docs_say(case: str) -> None:
    found = outcome(case)
    assert found.startswith(CASES[case][1])
    assert f"| {case} | {found} |\n" in documented()


def test_the_docs_have_these_cases_and_no_others() -> None:
    assert re.findall(r"^\| (.+?) \|", documented(), re.MULTILINE)[2:] == list(CASES)


def test_a_report_is_the_same_after_pickling(loaded: vtprune.Loaded, picture: Path) -> None:
    few = vtprune.Generation(max_new_tokens=2)
    report = vtprune.ask(loaded, picture, "what?", keep=0.5, generation=few)
    again = pickle.loads(pickle.dumps(report))
    assert type(again) is type(report)
    assert again.to_dict() == report.to_dict()


if __name__ == "__main__":
    before, _, rest = DOC.read_text(encoding="utf-8").partition(BEGIN)
    DOC.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
