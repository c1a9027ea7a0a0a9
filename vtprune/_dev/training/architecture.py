"""What a training run has to know of one architecture; `architectures` has a module for each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vtprune.demo.world import Scene

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from vtprune._dev.training.batches import Batch
    from vtprune._dev.training.heads import Dense

MODULES = pkgutil.iter_modules([str(Path(__file__).parent / "architectures")])
NAMES = tuple(sorted(module.name for module in MODULES))
Layer = Callable[..., "Tensor"]


@dataclass(frozen=True)
class BatchShape:
    """What a batch holds: pictures of (height, width), or clips of `num_frames` frames of that.

    `questions` is the number of questions a scene, drawn for `rows` rows of `length` tokens, or
    each for a row of its own where `rows` is 0.
    """

    name: str
    height: int
    width: int
    num_frames: int
    scenes: int
    questions: int
    length: int
    rows: int = 0


@dataclass(frozen=True)
class HintProbe:
    """Heads on what comes out of one layer of the decoder.

    Args:
        at: "tokens", the visual tokens, or "names", the questions' tokens.
        first: the first column of the labels that the heads are for.
        classes: of each head.
    """

    layer: int
    at: str
    first: int
    classes: tuple[int, ...]


@dataclass(frozen=True)
class AttentionHint:
    """Heads of attention that look from a name at what it names.

    Args:
        layer: of the decoder.
        key_head: all query heads of this one look.
        column: the label of a visual token that says what it shows.
    """

    layer: int
    key_head: int
    column: int


Emphasis = tuple[tuple[str, ...], tuple[str, ...]]
Curriculum = tuple[tuple[int, dict[str, float], int, int], ...]


class Architecture(Protocol):
    """One architecture: its model and files, its inputs, its course of training.

    Attributes:
        family: the name of vtprune's family that reads its checkpoints.
        tokenizer: text to tokens; `checkpoint.END_TOKEN` ends an answer.
        prefix: the prompt before the visual tokens.
        closing: the prompt between the visual tokens and the question.
        suffix: the prompt between the question and its answer.
        layouts: the shapes of batches, by their names.
        curriculum: from which step on, how often each layout comes, and the most things in a
            picture and in a clip.
        emphasis: from which step on, what is asked more often than the rest, of things and of
            events.
        dev: how many batches of each layout the accuracy on dev is taken from.
        compiled: the layouts that pay for a compiled decoder layer.
        probes: where hints are asked for.
        attention_hints: which heads of attention are told where to look.
        hint_weight: how much the loss of hints weighs beside that of answers.
        steps: of the tower alone, of everything, and the one from which hints are asked for.
        decay: the last part of the steps, of falling rate.
        dense_tiles: how many tiles with dense labels a step of the tower alone has, and a later
            one.
    """

    name: str
    family: str
    tokenizer: Tokenizer
    prefix: str
    closing: str
    suffix: str
    layouts: Mapping[str, BatchShape]
    curriculum: Curriculum
    emphasis: tuple[tuple[int, Emphasis], ...]
    dev: tuple[tuple[str, int], ...]
    compiled: tuple[str, ...]
    probes: tuple[HintProbe, ...]
    attention_hints: tuple[AttentionHint, ...]
    hint_weight: float
    steps: tuple[int, int, int]
    decay: float
    dense_tiles: tuple[int, int]

    def make_model(self, seed: int) -> Any:
        """The untrained model, of transformers' class."""

    def save(self, model: Any, directory: Path) -> None:
        """Write a checkpoint in the hub's format, with all that its users need."""

    def compile_tower(self, model: Any) -> None:
        """Compile what the tower repeats."""

    def tower(self, model: Any) -> nn.Module:
        """What is trained on dense labels, before the decoder learns."""

    def groups(self, model: Any) -> tuple[list[tuple[nn.Module, float]], list[nn.Parameter]]:
        """Parts with their learning rates, and what no part has."""

    def make_dense(self, model: Any) -> Dense:
        """The heads that dense labels are predicted by."""

    def start(self, model: Any, heads: Dense, seed: int, step: int) -> None:
        """Make the decoder's start from what the tower has learned."""

    def dense_loss(
        self,
        model: Any,
        heads: Dense,
        draw: tuple[int, int, int],
        share: tuple[int, int],
        device: torch.device,
    ) -> tuple[Tensor, list[float]]:
        """The loss on tiles drawn by (seed, step, number), and the share of each label right."""

    def visual_tokens(self, model: Any, batch: Batch, device: torch.device) -> Tensor:
        """The visual tokens (B, N, D) of a batch, as official preparation and model make them."""

    def positions(self, batch: Batch, num_prefix: int) -> tuple[Tensor, Tensor]:
        """Positions of a prompt before its question, (P,) or (3, P), and of rows, (B, R, L)."""

    def token_labels(
        self, scene: Scene, times: NDArray[np.float64], layout: BatchShape
    ) -> NDArray[np.int64]:
        """Labels of the first visual tokens of a scene, a column for each head of the probes."""


def architecture(name: str) -> Architecture:
    """The architecture of a name."""
    module = importlib.import_module(f"vtprune._dev.training.architectures.{name}")
    found: Architecture = module.ARCHITECTURE
    return found
