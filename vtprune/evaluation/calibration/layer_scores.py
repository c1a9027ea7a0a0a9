"""Scores of answers with all visual tokens dropped from each layer on, from one shared prefill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune.engine import pruning
from vtprune.engine.inputs import FeatureCache
from vtprune.evaluation.calibration.cache_branches import branch_cache, cache_bytes, can_branch
from vtprune.evaluation.calibration.entropy import curve_of, entering_states
from vtprune.inference.forced_answers import (
    PromptWithAnswer,
    Score,
    append_text,
    empty_cache_argument,
    logits_to_keep_argument,
    position_ids_from,
    score,
    score_in_one_forward,
)
from vtprune.inference.model_inputs import TEXT_INPUTS
from vtprune.models.seams import TOKEN_TYPES, cache_argument, cache_made
from vtprune.models.structure import decoder_layers, find_structure
from vtprune.tokens.layout import PATCH, Layout

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vtprune.models.loading import Loaded
    from vtprune.models.structure import Structure

MOST_BYTES = 2**28  # of keys and values of one batch


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """A prompt up to its last visual token, prefilled once for all questions that follow it.

    Args:
        ids: (1, P) its token ids.
        cache: its KV cache, nothing cut.
        layout: of its visual tokens.
        text: (T,) int64 columns that are not visual.
        curve: the matrix entropy of the visual tokens entering every layer.
    """

    ids: torch.Tensor
    cache: Cache
    layout: Layout
    text: torch.Tensor
    curve: tuple[float, ...]

    def fits(self, prompt: PromptWithAnswer) -> bool:
        """Return whether a prompt begins with it."""
        ids, length = prompt.tensors["input_ids"], self.ids.shape[1]
        return ids.shape[1] > length and torch.equal(ids[:, :length], self.ids)


@torch.no_grad()
def open_prefix(
    loaded: Loaded, prompt: PromptWithAnswer, encoded: FeatureCache
) -> SharedPrefix | None:
    """Prefill a prompt up to its last visual token; None where the rest can't go on from that.

    All that sees a visual token has to come after all of them, so that text between them, two-way
    attention and caches with a window rule it out.
    """
    structure = find_structure(loaded.model)
    ids = prompt.tensors["input_ids"]
    wanted = torch.tensor(sorted(structure.placeholder_ids()), device=ids.device)
    columns = torch.isin(ids[0], wanted).nonzero().squeeze(1)
    length = int(columns[-1]) + 1 if len(columns) else 0
    in_one = bool(length) and length - int(columns[0]) == len(columns)
    in_one &= _is_text(structure, prompt.tensors, length)
    if structure.two_way or not in_one or length == ids.shape[1]:
        return None
    cut = {name: v[:, :length] if name in TEXT_INPUTS else v for name, v in prompt.tensors.items()}
    # Qwen-Omni counts positions of prompts alone that go on behind their last picture.
    positions = position_ids_from(loaded, prompt.tensors, 0)
    cut |= {name: value[..., :length] for name, value in positions.items()}
    with pruning(
        loaded.model, keep=1.0, threads="own", inputs=prompt.without_pixels(encoded)
    ) as trace:
        out = loaded.model(
            **cut,
            use_cache=True,
            output_hidden_states=True,
            **empty_cache_argument(loaded),
            **logits_to_keep_argument(loaded, 1),
        )
    cache = cache_made(out)
    if not can_branch(cache):
        return None
    layout = trace.layouts[0]
    curve = curve_of(entering_states(out.hidden_states, structure), layout.columns)
    text = torch.ones(length, dtype=torch.bool)
    text[layout.columns] = False
    return SharedPrefix(cut["input_ids"], cache, layout, text.nonzero().squeeze(1), curve)


def _is_text(structure: Structure, tensors: Mapping[str, torch.Tensor], first: int) -> bool:
    """Return whether a model does to all columns from `first` on what it does to text.

    Around a picture Ovis 2 embeds some tokens by the picture's table, and the processor of ERNIE
    4.5 VL gives some to the experts of pictures.
    """
    ids = tensors["input_ids"][0, first:]
    indicators = getattr(structure.config, "visual_indicator_token_ids", None) or []
    marked = torch.isin(ids, torch.tensor(indicators, dtype=ids.dtype, device=ids.device))
    if (types := tensors.get(TOKEN_TYPES)) is not None:
        marked |= types[0, first:].bool()
    return not bool(marked.any())


def drop_scores(
    loaded: Loaded,
    prompts: Sequence[PromptWithAnswer],
    prefix: SharedPrefix | None,
    encoded: FeatureCache,
) -> list[tuple[Score, ...]]:
    """Score the answers with all visual tokens dropped from layer 0, 1, ... L-1; last: unpruned.

    Args:
        prefix: that all prompts begin with; only what follows it runs for each layer, for several
            prompts at once. None: all of every prompt does.
    """
    if prefix is None:
        return [_whole_scores(loaded, prompt, encoded) for prompt in prompts]
    scores: list[tuple[Score, ...]] = []
    size = _rows_at_once(prefix.cache)
    with pruning(loaded.model, keep=1.0, threads="own"):
        for start in range(0, len(prompts), size):
            scores += _branch_scores(loaded, prompts[start : start + size], prefix)
    return scores


def _whole_scores(
    loaded: Loaded, prompt: PromptWithAnswer, encoded: FeatureCache
) -> tuple[Score, ...]:
    structure, inputs = find_structure(loaded.model), prompt.without_pixels(encoded)
    num_layers, scores = len(structure.layers), {}
    for layer in (*structure.cut_layers, num_layers):
        preset = {"stages": [{"at": layer, "method": "vtw", "keep": 0}]}
        unpruned = layer == num_layers
        with pruning(
            loaded.model,
            None if unpruned else preset,
            keep=1.0 if unpruned else None,
            threads="own",
            inputs=inputs,
        ):
            scores[layer] = score_in_one_forward(loaded, prompt)
    # Where tokens can't be dropped before a layer, they go before the next one where they can.
    return tuple(
        next(scores[n] for n in range(layer, num_layers + 1) if n in scores)
        for layer in range(num_layers + 1)
    )


def _branch_scores(
    loaded: Loaded, prompts: Sequence[PromptWithAnswer], prefix: SharedPrefix
) -> list[tuple[Score, ...]]:
    """Score prompts that share a prefix, in one batch."""
    rows = [
        _after(loaded, append_text(prompt.tensors, prompt.answer[:-1]), prefix.ids.shape[1])
        for prompt in prompts
    ]
    lengths = [row["input_ids"].shape[1] for row in rows]
    starts = [n - len(prompt.answer) for n, prompt in zip(lengths, prompts, strict=True)]
    longest, first = max(lengths), min(starts)
    # What fills a row up comes after its answer, which never sees it.
    after = {
        name: torch.cat([_fill(row[name], longest) for row in rows], dim=-2) for name in rows[0]
    }
    kept = prefix.text.expand(len(prompts), -1)
    by_layer = []
    for layer in range(len(decoder_layers(loaded.model)) + 1):
        logits = _predict(loaded, prefix, layer, kept, after, longest - first)
        by_layer.append(
            [
                score(logits[i, starts[i] - first : lengths[i] - first], prompt.answer)
                for i, prompt in enumerate(prompts)
            ]
        )
    return list(zip(*by_layer, strict=True))


def _after(
    loaded: Loaded, tensors: Mapping[str, torch.Tensor], start: int
) -> dict[str, torch.Tensor]:
    """Return the inputs of what follows a prefix that ends before column `start`."""
    return {
        "input_ids": tensors["input_ids"][:, start:],
        **position_ids_from(loaded, tensors, start),
    }


def _fill(row: torch.Tensor, length: int) -> torch.Tensor:
    """Repeat the last column up to a length."""
    return torch.cat([row, row[..., -1:].expand(*row.shape[:-1], length - row.shape[-1])], dim=-1)


@torch.no_grad()
def _predict(
    loaded: Loaded,
    prefix: SharedPrefix,
    layer: int,
    kept: torch.Tensor,
    after: Mapping[str, torch.Tensor],
    most: int,
) -> torch.Tensor:
    """Return (B, most, V) last predictions of what follows a prefix that `layer` on see in part.

    Inside a `pruning` block, which gives every layer the mask for its own keys.

    Args:
        kept: (B, n) columns of the prefix, as for `branch_cache`.
        after: of B rows.
    """
    cache = branch_cache(prefix.cache, layer, kept)
    out = loaded.model(
        **after,
        use_cache=True,
        **cache_argument(loaded.model, cache),
        **logits_to_keep_argument(loaded, most),
    )
    return out.logits[:, -most:]


def windows(layout: Layout) -> list[torch.Tensor]:
    """Return the patches' indices in every 2 x 2 window of every frame and tile."""
    patches = (layout.grid.kind == PATCH).nonzero().squeeze(1)
    grid = layout.take(patches)
    key = torch.stack(
        [grid.media, grid.grid.frame, grid.grid.tile, grid.grid.row // 2, grid.grid.col // 2]
    )
    numbers = torch.unique(key, dim=1, return_inverse=True)[1]
    return [patches[numbers == number] for number in range(int(numbers.max()) + 1)]


def token_information(
    loaded: Loaded, prompt: PromptWithAnswer, prefix: SharedPrefix, scores: Sequence[Score]
) -> torch.Tensor:
    """Return (L, W) what the text reads from each of W windows alone, from each layer on.

    I_i(V) = p(first answer token | from layer i on the text sees V alone) minus the same when it
    sees no visual token. Source: token information, arXiv 2512.07580, for windows of 2 x 2.
    Difference: there all other tokens are gone from layer i on; here they are only not seen by the
    text, so a window's own states go on as in the unpruned model, and one prefill serves all.

    Args:
        scores: of the same prompt, by `drop_scores`.
    """
    patches = windows(prefix.layout)
    after = _after(loaded, prompt.tensors, prefix.ids.shape[1])
    information = torch.zeros(len(scores) - 1, len(patches), dtype=torch.float64)
    with pruning(loaded.model, keep=1.0, threads="own"):
        for layer in range(len(information)):
            for numbers in _of_one_size(patches, _rows_at_once(prefix.cache)):
                columns = [prefix.layout.columns[patches[number]] for number in numbers]
                kept = [torch.cat([prefix.text, window]).sort().values for window in columns]
                rows = {
                    name: tensor.expand(*tensor.shape[:-2], len(numbers), -1)
                    for name, tensor in after.items()
                }
                logits = _predict(loaded, prefix, layer, torch.stack(kept), rows, 1)[:, 0]
                likely = logits.float().softmax(dim=1)[:, prompt.answer[0]]
                information[layer, numbers] = likely.double().cpu() - scores[layer].first
    return information


def _of_one_size(patches: Sequence[torch.Tensor], most: int) -> Iterator[list[int]]:
    """Yield numbers of windows of one size, at most so many at a time."""
    for count in sorted({len(window) for window in patches}):
        same = [number for number, window in enumerate(patches) if len(window) == count]
        for start in range(0, len(same), most):
            yield same[start : start + most]


def _rows_at_once(cache: Cache) -> int:
    """Return how many rows may go on from a cache in one batch."""
    return max(1, MOST_BYTES // max(1, cache_bytes(cache)))
