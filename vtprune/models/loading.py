"""Load a model by name: the embedded one, an alias, a hub id or a directory."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vtprune.disk_cache import DEFAULT_BYTES, DiskCache
from vtprune.errors import ModelError, format_bytes
from vtprune.models import EMBEDDED, FAMILIES, find_family
from vtprune.models.adapters import (
    CONFIG,
    Adapter,
    attach,
    find_adapter,
    is_adapter,
    unwrap,
)
from vtprune.models.base import Family, Files
from vtprune.models.checkpoint import read_config
from vtprune.models.compiling import (
    CompiledModel,
    check_backend,
    check_compiler,
    compile_model,
    compiled_model,
)
from vtprune.models.cost import CostError, DecoderShape
from vtprune.models.devices import (
    check_quantized,
    find_device,
    find_dtype,
    loading_options,
    quantization_of,
)
from vtprune.models.encoder_cache import EncoderCache, open_encoder_cache
from vtprune.models.encoder_cost import EncoderCounter
from vtprune.models.generation_defaults import read_generation_config
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.names import (
    GGUF,
    GGUF_HINT,
    HUB_ID,
    embedded_weights,
    explain_no_config,
    hub_id_of,
    may_be_model,
    unknown_model,
)
from vtprune.models.seams import check_version
from vtprune.models.skeleton import BUILDING
from vtprune.models.structure import (
    find_decoder,
    find_structure,
    pruned_equals,
    refuse_other_generation,
)
from vtprune.models.transformers_messages import loading_errors, quiet
from vtprune.models.weights import Weights, find_weights
from vtprune.models.weights_memory import little_memory
from vtprune.models.weights_progress import count_loaded, download_bar, read_weights_in
from vtprune.preset.calibration import Calibration, find_calibration, read_calibration

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

EMBEDDED_WARNING = (
    "this is the small embedded demonstration model: it knows coloured shapes, digits and moving "
    "objects only; name a real one with --model (vtprune models)"
)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A loaded model with its tokenizer, preparation files and family.

    Args:
        name: as the user gave it.
        model: the transformers model, in eval mode.
        adapter: the name of the adapter that was loaded into it; None where there is none.
        cache: of media that were decoded and encoded; None for none.
        files: its checkpoint's tokenizer and preparation files.
        family: its family.
        calibration: from the user's file; None: the packaged one is used.
        seconds: the time that loading took.
        warnings: what the user should know about this model.
    """

    name: str
    model: PreTrainedModel
    files: Files
    family: Family
    calibration: Calibration | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    adapter: str | None = None
    cache: DiskCache | None = None

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return self.model.dtype

    @property
    def compiled(self) -> CompiledModel | None:
        """What of the model is compiled; None: nothing is."""
        return compiled_model(self.model)

    @functools.cached_property
    def encoder_cache(self) -> EncoderCache | None:
        """The cache for its vision encoders; None: it has none, or can't be pruned.

        Raises:
            ModelError: some of their weights are not in memory.
        """
        if self.cache is None or self.pruned_equals is None:
            return None
        return open_encoder_cache(self.cache, find_structure(self.model))

    @property
    def decoder_config(self) -> PreTrainedConfig:
        """The language model's config; of the whole model, where it names no decoder of its own."""
        decoder = getattr(self.model, "get_decoder", lambda: None)()
        config = getattr(decoder, "config", None) or self.model.config.get_text_config(decoder=True)
        return cast("PreTrainedConfig", config)

    @functools.cached_property
    def pruned_equals(self) -> str | None:
        """What a pruned answer equals, as reports name it; None: this model can't be pruned."""
        return pruned_equals(self.model)

    @functools.cached_property
    def measured_decoder(self) -> DecoderShape | CostError:
        """What the language model's cost depends on; the error where it can't be counted.

        Measured once: an adapter that is added later is not counted.
        """
        try:
            return measure_decoder(self.model)
        except CostError as error:
            return error.with_traceback(None)

    @functools.cached_property
    def encoder_counter(self) -> EncoderCounter:
        """What counts the FLOPs of vision encoders whose sizes no family knows."""
        return EncoderCounter(self.model)

    @property
    def decoder_shape(self) -> DecoderShape:
        """What the language model's cost depends on.

        Raises:
            CostError: its layers are of a kind that can't be counted.
        """
        if isinstance(self.measured_decoder, CostError):
            raise self.measured_decoder
        return self.measured_decoder

    def find_calibration(
        self, used: Collection[str] = ("ecl", "horizon")
    ) -> tuple[Calibration, list[str]]:
        """Return the calibration from the user's file, else the packaged one or defaults.

        Args:
            used: the figures that are asked for.

        Returns:
            the calibration, and a warning for each of the figures used that is a default.
        """
        if self.calibration is not None:
            return self.calibration, []
        structure = find_structure(self.model)
        return find_calibration(
            structure.model_type, len(structure.layers), structure.hidden_size, used
        )


@dataclass(frozen=True, eq=False)
class Opened:
    """A model whose weights are not read yet: all that preparing its inputs needs.

    Args:
        name: as the user gave it; None for the embedded one.
        checkpoint: its directory or hub id.
        family: its family.
        files: its checkpoint's tokenizer and preparation files.
        target, dtype, options: the device, dtype and arguments for reading its weights.
        adapter: to be loaded into it.
        seconds: the time that opening took.
        warnings: what the user should know of its files.
        cache: as of Loaded.
        compile: as of `load`.
    """

    name: str | None
    checkpoint: str
    family: Family
    files: Files
    target: torch.device
    dtype: torch.dtype
    options: Mapping[str, object]
    calibration: Path | None
    trust_remote_code: bool
    seconds: float
    on_progress: Progress | None = None
    adapter: Adapter | None = None
    warnings: tuple[str, ...] = ()
    cache: DiskCache | None = None
    compile: bool | str = False

    @property
    def device(self) -> torch.device:
        """Where its inputs will go."""
        return self.target

    def load(self) -> Loaded:
        """Read the weights, and return the loaded model.

        Raises:
            ModelError: not complete or too large; the calibration is another model's.
        """
        started = time.perf_counter()
        with quiet(), loading_errors(self.name or EMBEDDED):
            model, notes = read_weights(
                self.checkpoint,
                self.files.config,
                self.dtype,
                self.options,
                self.trust_remote_code,
                self.on_progress,
            )
            if "device_map" not in self.options:
                read_weights_in(model, self.target, self.on_progress)
        notes = [*self.warnings, *notes]
        ends = model.generation_config
        if self.family.part_of_another and ends is not None and ends.eos_token_id is None:
            # The whole model ends its thinker's answers by an argument of its own `generate`.
            ends.eos_token_id = self.files.tokenizer.eos_token_id
        if self.name is None:
            notes.append(EMBEDDED_WARNING)
        if self.adapter is not None:
            with quiet(), loading_errors(self.adapter.name):
                notes += attach(model, self.adapter)
        calibration = None
        if self.calibration is not None:
            text = cast("PreTrainedConfig", find_decoder(model).config)
            calibration = read_calibration(
                self.calibration,
                text.num_hidden_layers,
                model_type=str(self.files.config.model_type),
                hidden=text.hidden_size,
            )
        if self.compile:
            compiled = compile_model(model, mode=None if self.compile is True else self.compile)
            notes += compiled.notes()
        if self.on_progress:
            self.on_progress("loading", 1, 1)
        seconds = self.seconds + time.perf_counter() - started
        files = replace(self.files, config=model.config)
        return Loaded(
            self.name or EMBEDDED, model, files, self.family, calibration, seconds, tuple(notes),
            None if self.adapter is None else self.adapter.name, self.cache,
        )  # fmt: skip


def load(
    name: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
    quantize: str | None = None,
    calibration: Path | None = None,
    trust_remote_code: bool = False,
    cache: str | Path | None = None,
    cache_bytes: int = DEFAULT_BYTES,
    compile: bool | str = False,
    on_progress: Progress | None = None,
) -> Loaded:
    """Load a model, its tokenizer and its preparation files; safetensors only.

    >>> import vtprune
    >>> loaded = vtprune.load("qwen2.5-vl-7b", device="cuda", dtype="bfloat16")
    >>> report = vtprune.ask(loaded, "clip.mp4", "what moves?", keep=0.3)

    Args:
        name: a directory, an alias (`vtprune models`) or a hub id, also one that holds an adapter;
            None: the embedded model, or the adapter's own base model.
        adapter: a directory or hub id that holds an adapter (LoRA and its kin) for the model.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps", or "map": spread
            over all there are, by transformers' own device map.
        dtype: "auto" (the checkpoint's; bfloat16 for a float16 one on a CPU), "float32",
            "bfloat16" or "float16".
        attention: a transformers kernel; None leaves the choice to transformers.
        quantize: "4bit" or "8bit", by transformers' own bitsandbytes configuration; None leaves the
            weights as the checkpoint has them.
        calibration: a YAML file with the model's entropy collapse layer and information horizon.
        trust_remote_code: run Python code that the checkpoint brings.
        cache: a folder in which decoded and encoded media are kept for later questions.
        cache_bytes: the most that it may take.
        compile: compile the layers of decoder and vision tower with inductor; a string is a mode of
            `torch.compile`, of which "reduce-overhead" records CUDA graphs.

    Raises:
        ModelError: not found, not complete, not supported, or too large, with the way out.
    """
    return open_model(
        name, adapter=adapter, device=device, dtype=dtype, attention=attention, quantize=quantize,
        calibration=calibration, trust_remote_code=trust_remote_code, cache=cache,
        cache_bytes=cache_bytes, compile=compile, on_progress=on_progress,
    ).load()  # fmt: skip


def open_model(
    name: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
    quantize: str | None = None,
    calibration: Path | None = None,
    trust_remote_code: bool = False,
    cache: str | Path | None = None,
    cache_bytes: int = DEFAULT_BYTES,
    compile: bool | str = False,
    on_progress: Progress | None = None,
) -> Opened:
    """Read all of a checkpoint but its weights; the arguments are those of `load`."""
    check_version()
    started = time.perf_counter()
    media_cache = None if cache is None else DiskCache(Path(cache), cache_bytes)
    target = find_device(device)
    if compile:  # before minutes of reading
        check_backend("inductor", None if compile is True else compile)
        check_compiler(target, "inductor")
    name, tuned = find_base(
        None if name is None else str(name), None if adapter is None else str(adapter)
    )
    checkpoint = find_checkpoint(name)
    if on_progress:
        on_progress("loading", 0, 1)
    with quiet(), loading_errors(name or EMBEDDED):
        config = read_config(name or EMBEDDED, checkpoint, trust_remote_code)
        refuse_other_kinds(name or EMBEDDED, config, trust_remote_code)
        if calibration is not None:
            check_calibration(calibration, config)
        chosen = find_dtype(dtype, config, target)
        notes = check_quantized(name or EMBEDDED, config, quantize)
        quantized = quantization_of(config) is not None
        options = loading_options(device, quantize, quantized) | {"attn_implementation": attention}
        directory = None if tuned is None else tuned.directory
        has_tokenizer = directory is not None and (directory / "tokenizer_config.json").is_file()
        from vtprune.models.checkpoint import read_files, read_tokenizer, warn_of_missing
        from vtprune.models.preparation_values import try_preparation

        place = directory if directory is not None and has_tokenizer else checkpoint
        tokenizer = read_tokenizer(place, trust_remote_code)
        files = read_files(checkpoint, config, tokenizer, directory)
        family, files = prepare_family(checkpoint, files, trust_remote_code)
        try_preparation(name or EMBEDDED, family, files)
        notes = [*notes, *warn_of_missing(name or EMBEDDED, family, files)]
    return Opened(
        name, checkpoint, family, files, target, chosen, options, calibration, trust_remote_code,
        time.perf_counter() - started, on_progress, tuned, tuple(notes), media_cache, compile,
    )  # fmt: skip


def refuse_other_kinds(name: str, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Refuse a model that takes no pictures with a question.

    Raises:
        ModelError: transformers has no class for its type that does.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    own_code = trust_remote_code and "AutoModelForImageTextToText" in getattr(
        config, "auto_map", {}
    )
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not own_code:
        raise ModelError(
            f"{name}: transformers has no class for {config.model_type} that takes pictures with a "
            "question (AutoModelForImageTextToText)",
            f"families: {', '.join(FAMILIES)} (vtprune models)",
        )


def check_calibration(path: Path, config: PreTrainedConfig) -> None:
    """Refuse a calibration that can't be read or is of another model, before weights are read.

    Raises:
        PresetError: what is wrong with it, as far as the config says how large the decoder is.
    """
    text = config.get_text_config(decoder=True)
    read_calibration(
        path,
        getattr(text, "num_hidden_layers", None),
        model_type=str(config.model_type),
        hidden=getattr(text, "hidden_size", None),
    )


def prepare_family(checkpoint: str, files: Files, trust_remote_code: bool) -> tuple[Family, Files]:
    """Return a checkpoint's family, and its files with its own processor where that is needed.

    Raises:
        ModelError: the family needs the processor, and it can't be had.
    """
    model_type = str(files.config.model_type)
    family = find_family(model_type)
    if family.listed:
        return family, files
    from vtprune.models.generic import GenericFamily
    from vtprune.models.processor import assemble

    processor = assemble(checkpoint, files, trust_remote_code)
    return GenericFamily(model_type, processor.modalities), replace(files, assembled=processor)


def adopt(wrapped: nn.Module) -> Loaded:
    """Return a model that the caller has loaded, with the tokenizer and files of its checkpoint.

    Args:
        wrapped: a transformers model, or what holds one, such as a PEFT model.

    Raises:
        ModelError: its family is not known, or its checkpoint is not found again.
    """
    from vtprune.models.checkpoint import read_files, read_tokenizer

    model = cast("PreTrainedModel", unwrap(wrapped))
    checkpoint = str(getattr(model.config, "_name_or_path", "") or "")
    if not checkpoint:
        raise ModelError(
            f"{model.config.model_type}: its tokenizer and preparation files can't be found",
            "load it by name or directory: vtprune.answer('DIR', ...)",
        )
    with quiet(), loading_errors(checkpoint):
        tokenizer = read_tokenizer(checkpoint)
        files = read_files(checkpoint, model.config, tokenizer)
        family, files = prepare_family(checkpoint, files, trust_remote_code=False)
    return Loaded(checkpoint, model, files, family)


def find_loaded(model: nn.Module | Loaded | str | Path | None) -> Loaded:
    """Return a model that is loaded already, or load it by name; None is the embedded one."""
    if model is None or isinstance(model, (str, Path)):
        return load(model)
    return model if isinstance(model, Loaded) else adopt(model)


def find_base(name: str | None, adapter: str | None) -> tuple[str | None, Adapter | None]:
    """Find the model that is to be loaded, and the adapter for it.

    Args:
        name: as the user gave it: a model, or an adapter, which names its base model.
        adapter: as the user gave it.

    Raises:
        ModelError: two adapters, or a base model that is not there.
    """
    with quiet():
        tuned = None if adapter is None else find_adapter(adapter)
        if name is not None and may_be_adapter(name) and is_adapter(name):
            if tuned is not None:
                raise ModelError(
                    f"{name} is an adapter, and {adapter} is another one: one can be loaded",
                    "merge them, or give the base model with --model",
                )
            tuned, name = find_adapter(name), None
    if tuned is None or name is not None:
        return None if name == EMBEDDED else name, tuned
    way_out = f"give its base model: --model MODEL --adapter {tuned.name}"
    if not tuned.base:
        raise ModelError(f"{tuned.name}: {CONFIG} names no base model", way_out)
    try:
        find_checkpoint(tuned.base)
    except ModelError as error:
        raise ModelError(
            f"{tuned.name}: its base model {tuned.base!r} ({CONFIG}) is not there", way_out
        ) from error
    return tuned.base, tuned


def may_be_adapter(name: str) -> bool:
    """Return whether a name is a directory's, or a hub id that is not a listed model's."""
    return os.path.isdir(name) or (hub_id_of(name) == name and bool(re.fullmatch(HUB_ID, name)))


def find_checkpoint(name: str | None) -> str:
    """Return a directory or hub id for what the user named.

    Raises:
        ModelError: neither, with the closest alias.
    """
    if name is None or name == EMBEDDED:
        path = embedded_weights()
        if not (path / "config.json").is_file():
            raise ModelError("the embedded model is not in this installation", "name a --model")
        return str(path)
    if os.path.isdir(name):
        if not os.access(name, os.R_OK | os.X_OK):
            raise ModelError(f"{name}: can't be read: no permission", "chmod u+rx, or copy it")
        if not os.path.isfile(os.path.join(name, "config.json")):
            if is_adapter(name):
                raise ModelError(
                    f"{name}: an adapter, where a model is needed",
                    "give its base model's directory",
                )
            raise ModelError(*explain_no_config(Path(name)))
        return name
    if os.path.isfile(name) and name.lower().endswith(".gguf"):
        raise ModelError(f"{name}: {GGUF}", GGUF_HINT)
    if not may_be_model(name):
        raise unknown_model(name)
    return hub_id_of(name)


def read_weights(
    checkpoint: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    options: Mapping[str, object],
    trust_remote_code: bool,
    on_progress: Progress | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model with its weights, all of them, and what the user should know of them.

    Raises:
        ModelError: the files are not complete, or lack weights, which would be left random.
    """
    from transformers import AutoModelForImageTextToText

    _refuse_other_generation(config)
    named = getattr(config, "transformers_weights", None)
    generation_config = read_generation_config(checkpoint)
    weights = find_weights(checkpoint, named, download_bar(on_progress))
    if quantization_of(config) is None:
        weights.refuse_whole_numbers(checkpoint)
    _refuse_larger(checkpoint, config, weights)
    with BUILDING, count_loaded(weights.num_bytes, on_progress), little_memory(weights):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            generation_config=generation_config,
            **options,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an error of ours below, not a report that nobody sees
        )
    model, info = loaded  # transformers types this call as if it gave the model alone
    return cast("PreTrainedModel", model.eval()), check_loaded(checkpoint, type(model), info)


def _refuse_larger(checkpoint: str, config: PreTrainedConfig, weights: Weights) -> None:
    """Refuse a config of a far larger model, for whose weights memory would be taken.

    A decoder's layer has matrices of its width squared, and each word a vector; half a byte a
    number is the least that is stored.

    Raises:
        ModelError: its weights can't be in files of this size.
    """
    text = config.get_text_config(decoder=True)
    sizes = (getattr(text, name, 0) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    layers, width, words = (size if isinstance(size, int) else 0 for size in sizes)
    least = (layers * width + words) * width // 2
    if least > weights.total:
        raise ModelError(
            f"{checkpoint}: config.json says {layers:,} layers of width {width:,} and {words:,} "
            f"words, more than {format_bytes(least)}; the weights files hold "
            f"{format_bytes(weights.total)}",
            "config.json and the weights are of two models: download both again",
        )


def _refuse_other_generation(config: PreTrainedConfig) -> None:
    """Refuse a class whose answers are not written token by token, before its weights are read.

    Raises:
        ModelError: it is one.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    classes: Mapping[type, Any] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = classes.get(type(config), None)
    if kind is None:
        return
    model_type, way_out = str(config.model_type), "take a model of vtprune models"
    refuse_other_generation(model_type, kind, way_out)
    if not kind.can_generate():  # PI0 moves robots
        raise ModelError(f"{model_type}: {kind.__name__} writes no text", way_out)


def check_loaded(checkpoint: str, model: type, info: Mapping[str, Collection[Any]]) -> list[str]:
    """Return a warning for weights that the model has no place for.

    Args:
        info: what transformers says of the weights that it loaded.

    Raises:
        ModelError: weights are missing or have another shape, and would be left random.
    """
    mismatched = sorted(
        (str(key), tuple(has), tuple(wants)) for key, has, wants in info["mismatched_keys"]
    )
    if mismatched:
        key, has, wants = mismatched[0]
        raise ModelError(
            f"{checkpoint}: {len(mismatched)} weights have another shape than config.json says, "
            f"such as {key}: {list(has)}, expected {list(wants)}",
            "config.json and the weights are of two models: download both again",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{checkpoint}: {len(missing)} weights are missing, such as {missing[0]}",
            "download the checkpoint again",
        )
    unexpected = sorted(info["unexpected_keys"])
    if not unexpected:
        return []
    return [
        f"{len(unexpected)} weights of {checkpoint}, such as {unexpected[0]}, have no place in "
        f"{model.__name__} and are left out"
    ]
