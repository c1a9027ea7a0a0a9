"""A checkpoint's own processor, put together from the parts that there are.

`AutoProcessor` fails as a whole where one part needs a package that is not there, such as videos
without torchvision. Its other parts work without it. No code of the checkpoint is run unasked.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from vtprune.errors import ModelError
from vtprune.models.checkpoint import IMAGE, PROCESSOR
from vtprune.models.transformers_messages import quiet

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from vtprune.media import Source
    from vtprune.models.base import Files, PreparedMedia

TYPES = "mm_token_type_ids"
NOT_INPUTS = ("video_metadata", "labels")
"""What processors give beside a model's inputs; PaliGemma's gives labels to train on unasked."""
TORCHVISION = "pip install torchvision"
PARTS = {"image": "image_processor", "video": "video_processor"}
"""Modality -> the part of a processor that prepares it."""


class MissingPart:
    """Stands in for a part of a processor that can't be had; says why when it is called.

    Args:
        values: what its file says, which other parts may read.
        reason: why it can't be had.
    """

    model_input_names: tuple[str, ...] = ()

    def __init__(self, values: Mapping[str, object], reason: ModelError) -> None:
        self.values, self.reason = values, reason

    def __getattr__(self, name: str) -> object:
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(name)
        return values[name]

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise self.reason


@dataclass(frozen=True, eq=False)
class Processor:
    """A checkpoint's own processor.

    Args:
        whole: transformers' processor.
        missing: name of each part that can't be had -> the reason.
        types_tokens: whether the model is told which tokens are visual, and the processor says it.
    """

    whole: ProcessorMixin
    missing: Mapping[str, ModelError]
    types_tokens: bool = False

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the processor's class prepares, of "image" and "video"."""
        parts = type(self.whole).get_attributes()
        return tuple(modality for modality, part in PARTS.items() if part in parts)

    def check(self, modality: str) -> None:
        """Refuse media whose part of the processor can't be had.

        Raises:
            ModelError: the reason.
        """
        if (reason := self.missing.get(PARTS[modality])) is not None:
            raise reason

    def tokens(self, modality: str) -> list[str]:
        """Return the texts that a chat template may write for a media item, likeliest first."""
        names = [f"{modality}_placeholder_token", f"{modality}_token", "boi_token"]
        tokens = [getattr(self.whole, name, None) for name in names]
        return [token for token in tokens if isinstance(token, str)]

    def sample(self, total: int, source: Source) -> list[int] | None:
        """Return which of a video's frames the processor takes; None where it says nothing.

        Args:
            total: the frames to choose from.
            source: which they are from.
        """
        from transformers.video_utils import VideoMetadata

        part = self.whole.video_processor
        takes = inspect.signature(part.sample_frames).parameters
        options = {
            name: getattr(part, name, None) for name in takes if name not in ("metadata", "kwargs")
        }
        if options.get("num_frames") is not None:
            options["fps"] = None
        sampled = getattr(part, "do_sample_frames", None)
        if not sampled and options.get("fps") is None and options.get("num_frames") is None:
            return None
        metadata = VideoMetadata(
            total_num_frames=total,
            fps=source.fps,
            width=source.width,
            height=source.height,
            duration=total / source.fps,
        )
        try:
            with quiet():
                index = part.sample_frames(metadata=metadata, **options)
        except Exception as error:
            raise _refused(type(part).__name__, error) from error
        return [min(max(int(number), 0), total - 1) for number in index]

    def encode(self, prompt: str, media: Sequence[PreparedMedia]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for a prompt, one placeholder a media item, and its media.

        Raises:
            ModelError: the processor does not take them.
        """
        pictures = [_picture(item) for item in media if item.source.kind == "image"]
        videos = [item for item in media if item.source.kind == "video"]
        options: dict[str, Any] = {"return_tensors": "pt"}
        if pictures:
            self.check("image")
            options["images"] = pictures
        if videos:
            self.check("video")
            options |= {
                "videos": [item.pixels for item in videos],
                "video_metadata": [_metadata(item) for item in videos],
                "do_sample_frames": False,
                "return_metadata": True,  # some read it to write timestamps
            }
            # The class of MiniMax M3 counts on frames that their reader has resized (5.17 to 5.24).
            resizes = getattr(self.whole.video_processor, "do_resize", None)
            if isinstance(resizes, bool):
                options["videos_kwargs"] = {"do_resize": resizes}
        start = getattr(self.whole.tokenizer, "bos_token", None)
        if start and prompt.startswith(start):
            options["add_special_tokens"] = False
        kind = type(self.whole).__name__
        try:
            with quiet():
                encoded = self._call(prompt, options)
        except ModelError:
            raise
        except Exception as error:
            raise _refused(kind, error) from error
        tensors = {
            name: _tensor(kind, name, value)
            for name, value in encoded.items()
            if name not in NOT_INPUTS
        }
        if "input_ids" not in tensors:
            raise ModelError(
                f"{kind} makes no input_ids of a question: the class writes down what a picture "
                "shows, and answers no questions",
                "ask a model that takes them",
            )
        if self.types_tokens and TYPES not in tensors:  # not all processors make them unasked
            rows = self.whole.create_mm_token_type_ids(tensors["input_ids"].tolist())
            tensors[TYPES] = torch.tensor(rows)
        return tensors

    def _call(self, prompt: str, options: Mapping[str, Any]) -> Mapping[str, object]:
        """Call transformers' processor; some take what is said of one video alone, not in a list.

        Nemotron-H Omni's does (5.23 and 5.24).
        """
        call = cast("Callable[..., Mapping[str, object]]", self.whole)
        try:
            return call(text=[prompt], **options)
        except AttributeError:
            metadata = options.get("video_metadata", ())
            if len(metadata) != 1:
                raise
            return call(text=[prompt], **{**options, "video_metadata": metadata[0]})


def assemble(checkpoint: str, files: Files, trust_remote_code: bool) -> Processor:
    """Put together a checkpoint's processor.

    Raises:
        ModelError: its class is not known.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    found = _find_class(checkpoint, files, trust_remote_code)
    missing: dict[str, ModelError] = {}
    parts: list[object] = []
    for name in found.get_attributes():
        if name == "tokenizer":
            parts.append(files.tokenizer)
            continue
        try:
            parts.append(_load_part(checkpoint, name, files, trust_remote_code))
        except Exception as error:
            missing[name] = _refused(f"{found.__name__} ({name})", error)
            values = {"image_processor": files.image, "video_processor": files.video}
            parts.append(MissingPart(values.get(name) or files.image, missing[name]))
    if missing:
        changes = {"check_argument_for_proper_class": _any_argument, "__repr__": _name}
        found = type(found.__name__, (found,), changes)
    try:
        with quiet():
            whole = found.from_args_and_dict(parts, dict(files.processor))
    except Exception as error:
        raise missing.get(PARTS["image"]) or _refused(found.__name__, error) from error
    classes: Mapping[type, Any] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model = classes.get(type(files.config), None)
    takes = inspect.signature(model.forward).parameters if model else ()
    return Processor(whole, missing, TYPES in takes and hasattr(whole, "create_mm_token_type_ids"))


def _any_argument(self: object, name: str, argument: object) -> None:
    """Take a stand-in for what it stands in for."""


def _name(self: object) -> str:
    """Show a processor with stand-ins, which are no configuration, in transformers' log."""
    return type(self).__name__


def _find_class(checkpoint: str, files: Files, trust_remote_code: bool) -> type[Any]:
    """Return the class that the checkpoint's files name, else the one of its model type.

    Raises:
        ModelError: there is none, or it is the checkpoint's own code.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    stored = (files.processor, files.image, files.tokenizer.init_kwargs)
    names = [values.get("processor_class") for values in stored]
    names.append(PROCESSOR_MAPPING_NAMES.get(str(files.config.model_type)))
    if trust_remote_code and "auto_map" in files.processor:
        from transformers import AutoProcessor

        return type(AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True))
    for name in names:
        if isinstance(name, str) and (found := _class_named(name)) is not None:
            return found
    named = next((name for name in names if isinstance(name, str)), None)
    raise ModelError(
        f"{files.config.model_type}: "
        + (f"transformers has no {named}" if named else "the checkpoint names no processor"),
        "take the processor_config.json of the model's own repository, or a newer transformers",
    )


def _class_named(name: str) -> type[Any] | None:
    """Return transformers' processor class of a name, also where it asks for torchvision."""
    import transformers

    found = getattr(transformers, name, None)
    if isinstance(found, type) and hasattr(found, "__mro__") and _is_whole(found):
        return found
    pattern = re.compile(rf"^class {re.escape(name)}\(", re.MULTILINE)
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/processing_*.py")):
        if pattern.search(path.read_text(encoding="utf-8")):
            module = f"transformers.models.{path.parent.name}.{path.stem}"
            try:
                return cast("type[Any]", getattr(importlib.import_module(module), name))
            except ImportError as error:
                raise _refused(name, error) from error
    return None


def _is_whole(found: type[Any]) -> bool:
    """Return whether a class is itself, and no dummy for one whose packages are missing."""
    from transformers import ProcessorMixin

    return issubclass(found, ProcessorMixin)


def _load_part(checkpoint: str, name: str, files: Files, trust_remote_code: bool) -> object:
    """Return a part of a processor, by its own auto class."""
    import transformers

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name in PARTS.values() and not files.image and not files.video:
        raise ModelError(
            f"{checkpoint}: it has no {IMAGE}, which says how pictures are prepared "
            f"(nor an image_processor in a {PROCESSOR})",
            f"take {IMAGE} from the model's own repository, or download the checkpoint again",
        )
    if name == "image_processor":
        try:
            with quiet():
                return transformers.AutoImageProcessor.from_pretrained(checkpoint, **options)
        except ImportError:  # transformers 5.17 has no fallback to Pillow of its own
            return _pillow_processor(files)
    if name.endswith("tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(checkpoint, subfolder=name, **options)
    auto: dict[str, Any] = {
        "video_processor": transformers.AutoVideoProcessor,
        "feature_extractor": transformers.AutoFeatureExtractor,
    }
    with quiet():
        return auto[name].from_pretrained(checkpoint, **options)


def _pillow_processor(files: Files) -> object:
    """Return the picture processor that needs no torchvision.

    Raises:
        ImportError: there is none.
    """
    import transformers

    name = str(files.image.get("image_processor_type", ""))
    found = getattr(transformers, f"{name.removesuffix('Fast').removesuffix('Pil')}Pil", None)
    if found is None:
        raise ImportError(f"{name or 'the picture processor'} requires torchvision")
    return found.from_dict(dict(files.image))


def _refused(kind: str, error: Exception) -> ModelError:
    """Return the error for what a part of transformers' processor raised."""
    if isinstance(error, ModelError):
        return error
    text = str(error)
    if "torchvision" in text.lower() and importlib.util.find_spec("torchvision") is None:
        return ModelError(f"{kind}: this checkpoint's own processor needs torchvision", TORCHVISION)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, ImportError):
        return ModelError(f"{kind}: {first[:300]}", "install what it names")
    return ModelError(
        f"{kind}: the checkpoint's own processor does not take this ({first[:300]})",
        "check the checkpoint's preparation files, or ask about other media",
    )


def _picture(item: PreparedMedia) -> object:
    """Return a Pillow picture of (1, 3, H, W) uint8."""
    from PIL import Image

    return Image.fromarray(item.pixels[0].permute(1, 2, 0).contiguous().numpy())


def _metadata(item: PreparedMedia) -> object:
    """Return what a processor is told of a video's frames."""
    from transformers.video_utils import VideoMetadata

    source = item.source
    return VideoMetadata(
        total_num_frames=source.num_frames,
        fps=source.fps,
        width=source.width,
        height=source.height,
        duration=source.duration,
        video_backend="vtprune",
        frames_indices=list(item.index),
    )


def _tensor(kind: str, name: str, value: object) -> torch.Tensor:
    """Return an input that a processor made, as one tensor.

    Raises:
        ModelError: it is none.
    """
    if isinstance(value, torch.Tensor):
        return value
    try:
        while isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
            if isinstance(value, torch.Tensor):
                return value[None]
        return torch.stack(list(cast("Sequence[torch.Tensor]", value)))
    except (TypeError, RuntimeError) as error:
        raise ModelError(
            f"{kind} gives {name} as {type(value).__name__}, and vtprune passes on tensors alone",
            "ask about one picture, or pictures of one size, if it gives a tensor for those",
        ) from error
