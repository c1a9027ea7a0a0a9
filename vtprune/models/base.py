"""A model family, with defaults for most of what it says, and the data that it works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

import torch

from vtprune.disk_cache import DiskCache
from vtprune.errors import ModelError
from vtprune.media.times import parse_time
from vtprune.models import prompt
from vtprune.models.turns import Turn as Turn
from vtprune.tokens.layout import Grid, Layout
from vtprune.tokens.units import WHOLE, FullSizeCounts, Region, Units

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from vtprune.media import Source
    from vtprune.models.anyres import Plane
    from vtprune.models.compiling import CompileCost
    from vtprune.models.cost import VisionShape
    from vtprune.models.processor import Processor
    from vtprune.preset.spec import StageSpec

PIXELS = {"pixel_values": "image", "pixel_values_images": "image", "pixel_values_videos": "video"}
"""A tensor of a model's inputs -> what it holds; where both share one, they are encoded alike."""


class Time:
    """A field of seconds that takes text too: mm:ss or h:mm:ss."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> float | None:
        return None if instance is None else instance.__dict__[self.name]

    def __set__(self, instance: object, value: float | str | None) -> None:
        seconds = parse_time(value) if isinstance(value, str) else value
        instance.__dict__[self.name] = seconds


@dataclass(frozen=True)
class Sampling:
    """How many frames and tiles of the media to take; None leaves it to the family.

    >>> vtprune.Sampling(frames=16, start=2.0, end="1:30")

    Args:
        frames: number of frames of a video, evenly from the first to the last.
        fps: frames a second instead.
        max_frames: the most frames, for `fps` and for the family's own sampling.
        start: when the part of a video begins that is sampled: seconds, "mm:ss" or "h:mm:ss".
        end: when it ends.
        max_tiles: the most tiles of a picture, the base picture not counted.

    Raises:
        MediaError: text that is no time.
    """

    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    start: Time = Time()
    end: Time = Time()
    max_tiles: int | None = None


@dataclass(frozen=True)
class Files:
    """The config, tokenizer and preparation files of a checkpoint.

    Args:
        config: the model's config.
        tokenizer: its tokenizer, chat template included where the checkpoint has one.
        image: contents of preprocessor_config.json (or of "image_processor" in
            processor_config.json), {} where absent.
        video: contents of video_preprocessor_config.json (or "video_processor"), {} where absent.
        processor: contents of processor_config.json, {} where absent.
        assembled: the checkpoint's own processor, for a family that prepares inputs with it.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image: Mapping[str, object] = field(default_factory=dict)
    video: Mapping[str, object] = field(default_factory=dict)
    processor: Mapping[str, object] = field(default_factory=dict)
    assembled: Processor | None = None


@dataclass(frozen=True)
class ReadPlan:
    """Which frames of a source to read, and how to resize them.

    Args:
        index: the frame numbers to read, ascending; (0,) for a picture.
        transform: (n, 3, H, W) uint8 on the CPU -> (m, ...) tensor; called on each chunk, results
            are joined along the first dimension. Resizes by the family's official recipe.
        regions: of a picture in tiles, the part of it that each of the transform's rows shows;
            empty where tokens of its tiles depend on each other.
        warnings: what the user should know of it.
    """

    index: tuple[int, ...]
    transform: Callable[[torch.Tensor], torch.Tensor]
    regions: tuple[Region, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreparedMedia:
    """One media item after decoding and resizing.

    Args:
        source: the file it came from.
        pixels: the output of the plan's transform.
        index: the frame numbers that were read.
        timestamps: their times in seconds; () for a picture.
        regions: the plan's.
        transform: the plan's, which says from where in the source the pixels come; None where that
            is not asked.
        thumbnails: (n, 3, h, w) uint8, the frames read as they are in the source, smaller; None
            where they are not asked for.
    """

    source: Source
    pixels: torch.Tensor
    index: tuple[int, ...] = ()
    timestamps: tuple[float, ...] = ()
    regions: tuple[Region, ...] = ()
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    thumbnails: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class StreamedVideo:
    """A video that was encoded in segments, each of them cut before the next one was encoded.

    Args:
        modality: of the encoder that took it.
        encoded: its output for the kept tokens, which the model gets in the place of pixels.
        tower: (K, V) that those receive of the tower's attention, by the names of `TOWER`; None:
            not read.
        layout: of all N visual tokens of the prompt.
        index: (K,) int64 of the prompt's kept visual tokens among them.
        shapes: the model's inputs by name without their values, as of the whole video at once.
        stage: what cut the segments.
        seconds: "media", "preprocess", "vision" and "select" that segments took.
        warnings: what the reader should know.
        compile_cost: what was compiled meanwhile; None: nothing.
    """

    modality: str
    encoded: object
    tower: torch.Tensor | None
    layout: Layout
    index: torch.Tensor
    shapes: Mapping[str, torch.Tensor]
    stage: StageSpec
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    compile_cost: CompileCost | None = None


@dataclass(frozen=True)
class Inputs:
    """A model's inputs for one prompt.

    Args:
        tensors: keyword arguments for `model.generate` (batch of 1), on the CPU, float32 pixels.
        prompt: the text that was tokenized, placeholders not expanded.
        tiles: tiles of each picture, the base picture included; 1 for an untiled one.
        media: modality and grid of each media item in the order of the prompt, where the tensors
            don't say it, such as when pictures and videos share their placeholders.
        units: the frames or tiles of each media item that the vision tower encodes one by one.
        full_size: token counts had the media not been made smaller; None where they were not.
        streamed: of a video that was encoded in segments; None of any other prompt.
        encoded: modality -> an encoder's output for all of the prompt, that was made before.
    """

    tensors: dict[str, torch.Tensor]
    prompt: str
    tiles: tuple[int, ...] = ()
    media: tuple[tuple[str, Grid], ...] = ()
    units: tuple[Units, ...] = ()
    full_size: FullSizeCounts | None = None
    streamed: StreamedVideo | None = None
    encoded: Mapping[str, object] = field(default_factory=dict)


Media = Sequence[PreparedMedia]
Tensors = dict[str, torch.Tensor]
"""Inputs of a model by name."""
VisionTensors = dict[str, Tensors]
"""Modality -> the vision tower's inputs that a family prepared."""
Grids = dict[str, list[Grid]]
"""Modality -> the grids of its media items."""
Contents = dict[str, dict[str, object]]
"""Modality -> the contents of its preparation file."""
VisionInputs = Mapping[str, Mapping[str, object]]
"""Modality -> the arguments by name that the model's get_image_features / get_video_features
was called with (pixel values, grids, sizes), as recorded, or as given to forward."""


class Family:
    """One model family: transformers' inputs in; inputs, grids and FLOPs out. Holds no state.

    A family's file sets the attributes and overrides what differs from the defaults. `grids` and
    `vision_shape` serve the engine and the figures, on any user's own inputs; the other methods
    prepare inputs for `vtprune ask`; the last ones build a model of the same shape for
    `vtprune profile`.

    Attributes:
        name: as its authors write it.
        model_types: its values of `config.model_type`.
        modalities: what it takes, of "image" and "video".
        listed: whether it has a file of its own, which knows all about it.
        tokens: modality -> text of the placeholder that the chat template writes.
        template: the chat template for a checkpoint that has none.
        shares_placeholder: whether videos have the placeholder id of pictures.
        lists_media: whether the inputs have to say which media item has which tokens, since the
            tensors don't.
        special_tokens: text of every special token that a prompt needs -> the config's field with
            its id; None where any id will do.
        original_kinds: model types and classes of its authors' own code, of the checkpoints that
            were converted to transformers' format.
        earlier_kinds: likewise, of earlier models of the same authors that were not.
        part_of_another: whether it is published as a part of a model with a `generate` of its own.
        tower_depth: what the vision tower's config calls its number of layers.
        overlapping_tiles: whether the tiles of a picture overlap.
        sees_steps_apart: whether its vision tower is known to look at each frame, or step of a few,
            and each tile by itself.
    """

    name: str
    model_types: tuple[str, ...]
    modalities: tuple[str, ...] = ("image",)
    listed: ClassVar[bool] = True
    tokens: ClassVar[Mapping[str, str]] = {"image": "<image>"}
    template: ClassVar[str] = ""
    shares_placeholder: ClassVar[bool] = False
    lists_media: ClassVar[bool] = False
    special_tokens: ClassVar[Mapping[str, str | None]] = {"<image>": "image_token_id"}
    original_kinds: ClassVar[frozenset[str]] = frozenset()
    earlier_kinds: ClassVar[frozenset[str]] = frozenset()
    part_of_another: ClassVar[bool] = False
    tower_depth: ClassVar[str] = "num_hidden_layers"
    overlapping_tiles: ClassVar[bool] = False
    sees_steps_apart: bool = True

    # -- where visual tokens sit, and what they cost ------------------------------------------

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """Return modality -> token ids that stand for its features in `input_ids`.

        Two modalities with the same ids share them: which it is follows from the vision inputs.
        """
        ids: dict[str, tuple[int, ...]] = {"image": (int(config.image_token_id),)}
        if "video" in self.modalities:
            shared = self.shares_placeholder
            ids["video"] = ids["image"] if shared else (int(config.video_token_id),)
        return ids

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """Return modality -> one grid a media item, in the order of the prompts of the whole batch.

        The engine adds the batch's `input_ids`, (B, S), to what each encoder was called with.
        Where images and videos share placeholders, `vision` has only the one they are taken for.
        """
        raise NotImplementedError

    def planes(
        self, config: PreTrainedConfig, arguments: Mapping[str, object]
    ) -> list[Plane | None] | None:
        """Return how the tiles of each picture lie that are laid together and cut to the picture.

        Args:
            arguments: the arguments of the encoder call, by name.

        Returns:
            None for a picture without such tiles, and for a call without such pictures.
        """
        return None

    def spans(self, files: Files, item: PreparedMedia) -> tuple[Region, Region]:
        """Return what the rows and columns of tokens divide evenly, in fractions of the pixels.

        Returns:
            of the base picture, or of a frame, and of all tiles laid together; past the edges
            blocks are filled up.
        """
        return WHOLE, WHOLE

    def frames_a_step(self, config: PreTrainedConfig) -> int:
        """Return how many frames of a video the vision tower encodes together."""
        return int(getattr(config.vision_config, "temporal_patch_size", 1))

    def vision_shape(self, config: object, modality: str) -> VisionShape | None:
        """Return the sizes of vision tower and projector that their FLOPs follow from.

        Args:
            config: the whole model's; any object with its fields.
            modality: "image" or "video": what goes through them.

        Returns:
            None for a tower that is not known, so that its cost is left out, not guessed.

        Raises:
            CostError: a known tower's config lacks a size.
        """
        return None

    # -- preparing inputs -----------------------------------------------------------------------

    def largest(self, files: Files) -> tuple[int, int]:
        """Return (height, width) of the largest picture that is not made smaller."""
        raise NotImplementedError

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> ReadPlan:
        """Plan what to read of `source` in a prompt of `num_media` media items of its kind.

        Raises:
            ModelError: it is a video, and this family takes pictures only.
        """
        self.check_kind(source)
        if source.kind == "image":
            return self.plan_image(files, source, sampling, alone=num_media <= 1)
        return self.plan_video(files, source, sampling)

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """Plan what to read of a picture, and how it is resized and cut into tiles.

        Args:
            alone: whether it is the only picture of the prompt.
        """
        raise NotImplementedError

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """Plan which frames to read of a video, and how they are resized."""
        raise NotImplementedError

    def encode(self, files: Files, media: Sequence[PreparedMedia], turns: Sequence[Turn]) -> Inputs:
        """Return the model's inputs for a conversation about `media`.

        Raises:
            ModelError: the family does not take these media in one question, or the checkpoint's
                chat template or tokenizer does not fit it.
        """
        self.check_media(media)
        text = self.render(files, media, turns)
        media = prompt.in_prompt_order(text, media, self.tokens)
        vision = self.vision_inputs(files, media)
        grids = self.media_grids(files, media, vision)
        texts = self.placeholder_texts(files, media, grids)
        ids = self.placeholders(files.config)
        tensors = prompt.encode(files, text, self.tokens, ids, grids, texts)
        tensors |= self.token_types(files, tensors["input_ids"], media)
        for tower_inputs in vision.values():
            tensors |= tower_inputs
        tiles = tuple(len(item.pixels) for item in media if item.source.kind == "image")
        remaining = {modality: iter(items) for modality, items in grids.items()}
        laid = tuple((item.source.kind, next(remaining[item.source.kind])) for item in media)
        return Inputs(tensors, text, tiles, laid if self.lists_media else ())

    def check_kind(self, source: Source) -> None:
        """Refuse a video where the family takes pictures only."""
        if source.kind not in self.modalities:
            raise ModelError(
                f"{source.path} is a video; {self.name} takes pictures only",
                "take a model for videos, such as LLaVA-OneVision or Qwen2.5-VL",
            )

    def check_media(self, media: Media) -> None:
        """Refuse media that the family does not take in one question."""
        for item in media:
            self.check_kind(item.source)

    def render(self, files: Files, media: Media, turns: Sequence[Turn]) -> str:
        """Return the conversation as text, one placeholder a media item."""
        return prompt.render(files, media, turns, self.tokens, self.template_for(files))

    def template_for(self, files: Files) -> str:
        """Return the chat template for a checkpoint that has none."""
        return self.template

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        """Return modality -> the vision tower's inputs, for the modalities that there are."""
        raise NotImplementedError

    def media_grids(self, files: Files, media: Media, vision: VisionInputs) -> Grids:
        """Return modality -> the grid of each of its media items, in the order of the prompt."""
        return self.grids(files.config, vision)

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        """Return modality -> the text that each of its placeholders becomes in the prompt.

        Markers and timestamps included; for a modality that is left out the placeholder is
        repeated, once for every token.
        """
        return {}

    def token_types(self, files: Files, input_ids: torch.Tensor, media: Media) -> Tensors:
        """Return the inputs that say which tokens are visual, where the model takes such."""
        return {}

    # -- a model of the same shape, without a checkpoint ----------------------------------------

    def published_files(self, side: int) -> Contents:
        """Return "image" and "video" -> the preparation files of the published models.

        Values that cost nothing (such as the means of pixels) are left out.

        Args:
            side: of the pictures that the vision tower takes, in pixels.
        """
        return {}

    def tower_kinds(self, config: PreTrainedConfig) -> list[str]:
        """Return the kind of each layer of the vision tower; layers of one kind cost the same."""
        return [""] * int(getattr(config.vision_config, self.tower_depth))

    def shorten_tower(self, config: PreTrainedConfig) -> None:
        """Leave as few layers in the vision tower's config as there are kinds, or are read."""
        layers = getattr(config, "vision_feature_layer", -1)
        layers = [layers] if isinstance(layers, int) else cast("Sequence[int]", layers)
        read = max(layer + 1 if layer >= 0 else -layer - 1 for layer in layers)
        self.set_tower_depth(config, read)

    def set_tower_depth(self, config: PreTrainedConfig, read: int) -> None:
        """Give the tower `read` layers, or one of every kind where these are more."""
        depth = max(read, len(set(self.tower_kinds(config))))
        setattr(config.vision_config, self.tower_depth, depth)


class Preparable(Protocol):
    """What can prepare inputs: a model, with its weights or before they are read."""

    @property
    def family(self) -> Family: ...

    @property
    def files(self) -> Files: ...

    @property
    def cache(self) -> DiskCache | None: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...
