"""A checkpoint's own files: its config, and what says how inputs are prepared.

Many models were published twice: for the code of their repository, and converted to transformers'
classes. The first kind would be loaded by running Python code that it brings, or with weights that
fit no class; it is refused before either.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import try_to_load_from_cache
from transformers.utils.hub import cached_file, cached_files

from vtprune.errors import ModelError, quote
from vtprune.models import FAMILIES, PARTS, find_family
from vtprune.models.base import Family, Files
from vtprune.models.names import aliases
from vtprune.models.preparation_values import CORRECT, check_preparation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from vtprune.models.weights_progress import DownloadBar

IMAGE, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
PROCESSOR = "processor_config.json"
LARGEST_TEXT = 2**28
"""Bytes of a file of a checkpoint that is no weights; tokenizers of many words have 30 MB."""
_NO_ERRORS: Mapping[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
OF_TOKENIZERS = (
    TOKENIZER, TOKENIZER_CONFIG, "vocab.json", "special_tokens_map.json", "added_tokens.json",
    *TEMPLATES,
)  # fmt: skip
TOKEN_KEYS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special", "__type"}
OF_ALL = ("dtype", "quantization_config")
"""Fields of its config that may stand for all of its models."""


def read_files(
    checkpoint: str | Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path | None = None,
) -> Files:
    """Read what a directory or hub id says about preparing inputs; absent files are {}.

    Of files that are in the directory of an adapter too, the adapter's count.

    The processor's chat template, a file of its own or a key of processor_config.json, is
    `processor["chat_template"]`.

    Raises:
        ModelError: a file is not JSON.
    """
    places = (checkpoint,) if adapter is None else (adapter, checkpoint)
    processor = dict(read_json(places, PROCESSOR))
    templates = ((place, name) for place in places for name in TEMPLATES)
    for place, name in templates:
        text = _read(place, name)
        if text is not None:
            is_json = name.endswith(".json")
            template = parse(place, name, text).get("chat_template") if is_json else text
            processor["chat_template"] = template
            break
    image = processor.get("image_processor") or read_json(places, IMAGE)
    video = processor.get("video_processor") or read_json(places, VIDEO)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"{checkpoint}: tokenizer_config.json: model_max_length is "
            f"{quote(tokenizer.model_max_length)}, not a number",
            CORRECT,
        )
    pinpoints = {"image_grid_pinpoints": getattr(config, "image_grid_pinpoints", None)}
    check_preparation(str(checkpoint), "config.json", pinpoints)
    for part, file, values in (("image", IMAGE, image), ("video", VIDEO, video)):
        if isinstance(values, dict):
            file = PROCESSOR if processor.get(f"{part}_processor") else file
            check_preparation(str(checkpoint), file, values)
    return Files(
        config=config,
        tokenizer=tokenizer,
        image=cast("Mapping[str, object]", image),
        video=cast("Mapping[str, object]", video),
        processor=processor,
    )


def read_tokenizer(place: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a directory or hub id.

    Raises:
        ModelError: a file is damaged; a token that it adds has a key that there is not: the
            tokenizers library would print a line about it among the answers, and leave it out.
    """
    from transformers import AutoTokenizer

    added: list[tuple[str, object]] = []
    config = read_json((place,), TOKENIZER_CONFIG).get("added_tokens_decoder")
    if isinstance(config, dict):
        added += [(TOKENIZER_CONFIG, token) for token in config.values()]
    text = _read(place, TOKENIZER) or ""
    found = re.search(r'"added_tokens"\s*:\s*', text)  # the rest of the file may be large
    with suppress(ValueError, RecursionError):  # which transformers then says
        tokens = json.JSONDecoder().raw_decode(text, found.end())[0] if found else ()
        added += [(TOKENIZER, token) for token in tokens if isinstance(tokens, list)]
    for file, token in added:
        for key in token.keys() - TOKEN_KEYS if isinstance(token, dict) else ():
            raise ModelError(
                f"{place}: {file}: an added token has the unknown key {quote(key)}", CORRECT
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (json.JSONDecodeError, UnicodeDecodeError):
        _name_damaged(place)
        raise
    return cast("PreTrainedTokenizerBase", tokenizer)


def _name_damaged(place: str | Path) -> None:
    """Raise for the first file of a tokenizer that is damaged: transformers does not name it."""
    for name in OF_TOKENIZERS:
        path = find_file(place, name)
        if path is None:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(
                f"{name} of {place} is not text in UTF-8: {error}", "download the checkpoint again"
            ) from error
        if path.suffix == ".json":
            parse(place, name, text)


def warn_of_missing(name: str, family: Family, files: Files) -> list[str]:
    """Return a warning where a checkpoint does not say how its media are to be prepared.

    A family of its own has defaults; a processor of the checkpoint is refused without its files. A
    video's file alone may be missing: that of pictures, or the family's, serves older checkpoints.

    Args:
        name: as the user gave it.
    """
    if files.image or not family.listed:
        return []
    height, width = family.largest(files)
    absent = IMAGE if files.video or "video" not in family.modalities else f"{IMAGE} and no {VIDEO}"
    return [
        f"{name} has no {absent}: sizes, means and tiles are the defaults of {family.name} "
        f"(pictures up to {width} x {height} pixels), which its weights may not have been trained "
        "with; take the file from the model's own repository"
    ]


def find_file(
    checkpoint: str | Path, name: str, bar: type[DownloadBar] | None = None
) -> Path | None:
    """Find a file of a directory or hub id, in the hub's cache or on the hub; None: not there.

    Args:
        bar: for a download.

    Raises:
        ModelError: a text that is far too large; a folder, pipe or device of that name.
    """
    if os.path.isdir(checkpoint):
        path = Path(checkpoint) / name
        if not os.path.isfile(path):
            if os.path.exists(path):
                raise ModelError(f"{checkpoint}: {name} is no regular file", CORRECT)
            return None
        size = os.path.getsize(path)
        if path.suffix in (".json", ".jinja") and size > LARGEST_TEXT:
            raise ModelError(
                f"{checkpoint}: {name} has {size:,} bytes, more than {LARGEST_TEXT:,}", CORRECT
            )
        return path
    cached = cached_file(str(checkpoint), name, **_NO_ERRORS, tqdm_class=bar)
    return None if cached is None else Path(cached)


def download(
    checkpoint: str, names: Sequence[str], bar: type[DownloadBar] | None, num_bytes: int = 0
) -> None:
    """Download files of a hub id that are not in its cache, several at once.

    Args:
        num_bytes: of all of them, 0 where it isn't known.
    """
    if os.path.isdir(checkpoint):
        return
    if bar is not None:
        cached = (try_to_load_from_cache(checkpoint, name) for name in names)
        bar.expected = num_bytes - sum(os.path.getsize(p) for p in cached if isinstance(p, str))
    cached_files(checkpoint, list(names), **_NO_ERRORS, tqdm_class=bar)


def _read(checkpoint: str | Path, name: str) -> str | None:
    path = find_file(checkpoint, name)
    return None if path is None else path.read_text(encoding="utf-8", errors="replace")


def read_json(places: Sequence[str | Path], name: str) -> Mapping[str, object]:
    """Return the JSON file of the first place that has it; {} where none does."""
    for place in places:
        text = _read(place, name)
        if text is not None:
            return parse(place, name, text)
    return {}


def parse(checkpoint: str | Path, name: str, text: str) -> Mapping[str, object]:
    """Return the JSON object of a checkpoint's file.

    Raises:
        ModelError: it is none.
    """
    try:
        contents = json.loads(text)
    except ValueError as error:
        raise ModelError(
            f"{name} of {checkpoint} is not JSON: {error}", "download the checkpoint again"
        ) from error
    if not isinstance(contents, dict):
        raise ModelError(f"{name} of {checkpoint} is not a JSON object", "download it again")
    return contents


def read_config(name: str, checkpoint: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Read a checkpoint's config; of one of several models, that of the one that can be asked.

    Args:
        name: as the user gave it.
        checkpoint: its directory, config.json or hub id.

    Raises:
        ModelError: it is for its authors' own code; a converted one is named where one is known.
    """
    from transformers import AutoConfig

    path = Path(checkpoint) if Path(checkpoint).is_file() else find_file(checkpoint, "config.json")
    if path is not None:
        refuse_original(name, _parse_config(path), trust_remote_code)
    config = cast(
        "PreTrainedConfig",
        AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code),
    )
    if config.model_type not in PARTS:
        return config
    part = cast("PreTrainedConfig", getattr(config, PARTS[config.model_type]))
    for field in OF_ALL:
        if getattr(part, field, None) is None and getattr(config, field, None) is not None:
            setattr(part, field, getattr(config, field))
    return part


def _parse_config(path: Path) -> Mapping[str, object]:
    """Return the contents of a config.json; {} where it is none, which transformers then says."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def refuse_original(name: str, config: Mapping[str, object], trust_remote_code: bool) -> None:
    """Refuse a checkpoint whose class transformers does not have.

    Raises:
        ModelError: it is for its authors' own code.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type") or "")
    named = config.get("architectures")
    classes = list(map(str, named)) if isinstance(named, list) else []
    # Those of the families all have this ending; so have subclasses, whose weights fit them.
    fit = [
        kind.endswith("ForConditionalGeneration") or kind in dir(transformers) for kind in classes
    ]
    has_class = model_type in CONFIG_MAPPING and (not classes or any(fit) or model_type in PARTS)
    asked_for = trust_remote_code and "auto_map" in config and model_type in FAMILIES
    if has_class or not model_type or asked_for:
        return
    if model_type in FAMILIES and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{name}: transformers {transformers.__version__} has no {model_type}",
            "install a newer transformers",
        )
    kind = " ".join([model_type, *(f"({kind})" for kind in classes[:1])])
    raise ModelError(
        f"{name}: {kind} is a checkpoint for its authors' own code, not for a class of "
        f"transformers {transformers.__version__}",
        _way_out(name, [model_type, *classes]),
    )


def _way_out(name: str, kinds: list[str]) -> str:
    """Return a hint that names the same model in transformers' format, as far as it is known."""
    families = [find_family(model_type) for model_type in FAMILIES]
    converted = [family.model_types[0] for family in families if family.original_kinds & {*kinds}]
    later = [family.model_types[0] for family in families if family.earlier_kinds & {*kinds}]
    listed = [alias for alias in aliases() if alias.model_type in FAMILIES]
    for alias in listed:
        same_type = not converted or alias.model_type in converted
        if same_type and _short(alias.hub_id) == _short(name):
            return f"the same model in transformers' format: --model {alias.hub_id}"
    examples = [
        next(alias.hub_id for alias in listed if alias.model_type == model_type)
        for model_type in converted[:2] or later
    ]
    if not examples:
        return f"give one in transformers' format, of {', '.join(FAMILIES)} (vtprune models)"
    kind = "one in transformers' format" if converted else "a later model of these authors"
    return f"give {kind}, such as {' or '.join(examples)} (vtprune models)"


def _short(name: str) -> str:
    """Return what names of one model in both formats have in common."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"-v(?=1\.5)", "-", last.removesuffix("-hf"))
