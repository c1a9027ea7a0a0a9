"""A conversation as token ids, by the checkpoint's chat template."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from vtprune.errors import ModelError
from vtprune.models.template_trial import try_template
from vtprune.models.transformers_messages import quiet
from vtprune.tokens.layout import Grid

if TYPE_CHECKING:
    from vtprune.models.base import Files, PreparedMedia, Turn


def render(
    files: Files,
    media: Sequence[PreparedMedia],
    turns: Sequence[Turn],
    tokens: Mapping[str, str],
    default: str,
) -> str:
    """Return the conversation as text, one placeholder a media item, ready for the model's answer.

    Args:
        tokens: modality -> text of its placeholder.
        default: the template where the checkpoint has none.

    Raises:
        ModelError: the template does not write every media item.
    """
    prompt = write(files, media, turns, tokens.values(), default)
    for modality, token in tokens.items():
        check_count(prompt, token, modality, media)
    return prompt


def check_count(prompt: str, token: str, modality: str, media: Sequence[PreparedMedia]) -> None:
    """Refuse a rendered prompt without one placeholder for each media item of a modality.

    Raises:
        ModelError: the template does not write every media item.
    """
    num_media = sum(item.source.kind == modality for item in media)
    if prompt.count(token) != num_media:
        raise ModelError(
            f"the checkpoint's chat template wrote {prompt.count(token)} of {num_media}"
            f" {modality} placeholders ({token})",
            "take the chat template of the model's own repository",
        )


def write(
    files: Files,
    media: Sequence[PreparedMedia],
    turns: Sequence[Turn],
    placeholders: Iterable[str],
    default: str,
) -> str:
    """Return the conversation as the chat template writes it, ready for the model's answer.

    The processor's template goes before the tokenizer's, as in transformers. Special tokens that
    the conversation itself spells out, placeholders above all, are broken up by a space.

    Args:
        placeholders: their texts.
        default: the template where the checkpoint has none.

    Raises:
        ModelError: the template refuses the conversation, or can't be run.
    """
    kinds = iter([item.source.kind for item in media])
    special = _special(files, placeholders)
    messages, form = [], []
    for turn in turns:
        content, done = [], 0
        for place in turn.places or (0,) * turn.media:
            if place > done:
                content.append({"type": "text", "text": _broken_up(special, turn.text[done:place])})
            content.append({"type": next(kinds)})
            done = place
        if done < len(turn.text) or not turn.places:
            content.append({"type": "text", "text": _broken_up(special, turn.text[done:])})
        messages.append({"role": turn.role, "content": content})
        form.append((turn.role, *(part["type"] for part in content)))
    assert next(kinds, None) is None, "every media item belongs to a turn"
    template = files.processor.get("chat_template")
    template = template or (None if files.tokenizer.chat_template else default)
    rendering = functools.partial(
        files.tokenizer.apply_chat_template,
        cast("list[dict[str, str]]", messages),
        chat_template=cast("str | None", template),
        tokenize=False,
        add_generation_prompt=True,
    )
    render = cast("Callable[[], str]", rendering)
    try_template((str(template or files.tokenizer.chat_template), *form), render)
    try:
        return render()
    except Exception as error:  # whatever the template's own code runs into
        raise ModelError(
            f"the checkpoint's chat template does not take this conversation ({error})",
            "take the chat template of the model's own repository, or ask in another form",
        ) from error


def in_prompt_order(
    text: str, media: Sequence[PreparedMedia], tokens: Mapping[str, str]
) -> list[PreparedMedia]:
    """Return the media items in the order of their placeholders in a rendered prompt."""
    left: dict[str, list[PreparedMedia]] = {}
    for item in media:
        left.setdefault(tokens[item.source.kind], []).append(item)
    pattern = "|".join(re.escape(token) for token in left)
    return [left[match[0]].pop(0) for match in re.finditer(pattern, text)] if left else []


def _broken_up(special: re.Pattern[str], text: str) -> str:
    return special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def _special(files: Files, placeholders: Iterable[str]) -> re.Pattern[str]:
    added = files.tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special} | set(placeholders)
    longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in longest_first))


def encode(
    files: Files,
    prompt: str,
    tokens: Mapping[str, str],
    ids: Mapping[str, tuple[int, ...]],
    grids: Mapping[str, Sequence[Grid]],
    replacements: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the prompt as `input_ids` and `attention_mask`, (1, L), placeholders expanded.

    Special tokens are added as by the official processors: the tokenizer's own, but no second
    start token where the template has written it.

    Args:
        tokens: modality -> text of its placeholder.
        ids: modality -> token ids of its placeholder.
        grids: modality -> the grid of each of its media items, in the order of the prompt.
        replacements: modality -> the text that each of its placeholders becomes, timestamps and
            markers included; for the others the placeholder is repeated.

    Raises:
        ModelError: the tokenizer does not know a placeholder as one token.
    """
    texts = {
        tokens[modality]: iter(
            (replacements or {}).get(modality) or [tokens[modality] * len(grid) for grid in items]
        )
        for modality, items in grids.items()
    }
    if texts:
        pattern = "|".join(re.escape(token) for token in texts)
        prompt = re.sub(pattern, lambda match: next(texts[match[0]]), prompt)
    start = files.tokenizer.bos_token
    with quiet():  # of prompts above model_max_length, which says little of what a model reads
        encoded = files.tokenizer(
            prompt,
            add_special_tokens=not (start is not None and prompt.startswith(str(start))),
            return_tensors="pt",
        )
    input_ids = cast(torch.Tensor, encoded["input_ids"])
    for modality in grids:
        count = int(torch.isin(input_ids, torch.tensor(ids[modality])).sum())
        alike = [items for name, items in grids.items() if ids[name] == ids[modality]]
        num_tokens = sum(len(grid) for items in alike for grid in items)
        if count != num_tokens:
            raise ModelError(
                f"the tokenizer made {count} of {num_tokens} placeholders of"
                f" {tokens[modality]}; the model's config has id {ids[modality][0]} for it",
                "take the tokenizer of the model's own repository",
            )
    return {
        "input_ids": input_ids,
        "attention_mask": cast(torch.Tensor, encoded["attention_mask"]),
    }
