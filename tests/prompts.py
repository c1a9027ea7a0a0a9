"""Prompts made of tensors alone, without media."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from vtprune.inference.forced_answers import PromptWithAnswer
from vtprune.inference.prepare import PreparedQuestion
from vtprune.inference.prompt_media import PromptMedia
from vtprune.inference.questions_file import Asked
from vtprune.models.base import Inputs

NO_MEDIA = PromptMedia((), (), (), 0.0, 0.0)


def prompt_with(tensors: Mapping[str, torch.Tensor], answer: torch.Tensor) -> PromptWithAnswer:
    """A model's inputs, a batch of 1, with an answer."""
    prepared = PreparedQuestion("?", NO_MEDIA, Inputs(dict(tensors), "?"))
    return PromptWithAnswer(Asked(Path("x"), "?"), prepared, answer, labelled=True)


def with_tensors(prompt: PromptWithAnswer, **tensors: torch.Tensor) -> PromptWithAnswer:
    """The prompt with some of its tensors replaced."""
    inputs = prompt.prepared.inputs
    inputs = replace(inputs, tensors={**inputs.tensors, **tensors})
    return replace(prompt, prepared=replace(prompt.prepared, inputs=inputs))
