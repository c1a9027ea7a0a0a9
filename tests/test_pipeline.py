"""transformers' own pipeline inside a pruning block: pruned as generate is, else as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_processor
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import vtprune

PRUNED = {"method": "random", "at": "input", "keep": 0.3}
LONGEST = 4


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny_processor.build("idefics2", tmp_path_factory.mktemp("checkpoint"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ValueError as error:  # older ones need torchvision for their Pillow class too
        if "torchvision" not in str(error):
            raise
        pytest.skip("this transformers prepares no pictures without torchvision")
    return pipeline("image-text-to-text", model=model, processor=processor)


def ask(pipe: Any, question: str = "what?") -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)},
               {"type": "text", "text": question}]  # fmt: skip
    messages = [{"role": "user", "content": content}]
    (answer,) = pipe(text=messages, max_new_tokens=LONGEST, return_full_text=False)
    return str(answer["generated_text"])


def test_a_pipeline_is_pruned_inside_the_block_and_whole_outside(pipe: Any) -> None:
    before = ask(pipe)
    with vtprune.pruning(pipe.model, **PRUNED) as trace:  # type: ignore[arg-type]
        inside = ask(pipe)
        (stage,) = trace.stages
        assert stage.after[0] == int(0.3 * stage.before[0] + 1e-6)
        assert inside != before
        pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
        inputs = pipe.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": Image.fromarray(pixels)},
                                          {"type": "text", "text": "what?"}]}],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        )  # fmt: skip
        with torch.no_grad():
            ids = pipe.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        assert pipe.processor.batch_decode(new, skip_special_tokens=True) == [inside]
    assert ask(pipe) == before
