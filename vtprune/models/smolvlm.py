"""SmolVLM and SmolVLM2: Idefics3's split pictures, and video frames behind their times."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch

from vtprune.errors import ModelError
from vtprune.models import frames, idefics3, preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import Grid, box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<image>", "video": "<video>"}
TEMPLATE = "{{ '<|im_start|>' }}" + idefics3.MESSAGES
SAMPLING: Mapping[str, object] = {"fps": 1, "max_frames": 64}
SKIPPED = 1
"""Seconds at either end that the frames of a long video leave out."""
ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class SmolVLM:
    """Tiles row by row, then the whole picture; a video's frame is a picture of one tile."""

    name = "SmolVLM"
    model_types = ("smolvlm",)
    modalities = ("image", "video")

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """One token for both."""
        return {"image": (config.image_token_id,), "video": (config.image_token_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """Which tiles are one picture is told from the markers between them in `input_ids`.

        As a video, all blocks of a prompt are its frames.
        """
        return idefics3.block_grids(config, vision)

    def largest(self, files: Files) -> tuple[int, int]:
        edge = idefics3.edge_of(preprocess.merged(files.image, idefics3.DEFAULTS), "size")
        return edge, edge

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """A picture as in Idefics3; a video's frames are squared, not split.

        Without frames or fps, the checkpoint's sampling, after start and end: 1 frame a second, at
        most 64, from the first to the last, a second at either end left out of a long video.
        """
        if source.kind == "image":
            return idefics3.plan_picture(files, source, sampling)
        values = _video_values(files)
        official = functools.partial(
            _official, source=source, values=values, most=sampling.max_frames
        )
        index = frames.chosen(source, sampling, official)
        return Plan(index, functools.partial(_square, values=values))

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The inputs; pictures or one video, since the official processor takes no more."""
        videos = [one for one in media if one.source.kind == "video"]
        if not videos:
            tokens = {"image": TOKENS["image"]}
            text = prompt.render(files, media, turns, tokens, TEMPLATE)
            ids = {"image": (files.config.image_token_id,)}
            return idefics3.encode_pictures(files, media, text, ids)
        if len(media) > 1:
            raise ModelError(
                f"{len(videos)} videos and {len(media) - len(videos)} pictures in one question;"
                " SmolVLM takes pictures, or one video",
                "ask about them one by one",
            )
        # The checkpoints' own templates leave videos out; the official processor has this one.
        files = replace(files, processor={**files.processor, "chat_template": TEMPLATE})
        text = prompt.render(files, media, turns, TOKENS, TEMPLATE)
        (video,) = videos
        side = idefics3.token_side(files.config, video.pixels.shape[-1])
        grid = box(len(video.pixels), side, side)
        written = {"video": [_written(video, side**2)]}
        ids = {"video": (files.config.image_token_id,)}
        tensors = prompt.encode(files, text, TOKENS, ids, {"video": [grid]}, written)
        recipe = idefics3.recipe_of(_video_values(files))
        tensors |= idefics3.pixel_inputs([preprocess.normalize(video.pixels, recipe)])
        return Inputs(tensors, text, (), (("video", grid),))


def _video_values(files: Files) -> dict[str, object]:
    """The video preprocessor's values; its `video_sampling` goes before its own size."""
    values = preprocess.merged(files.video or files.image, idefics3.DEFAULTS)
    sampled = cast("Mapping[str, object]", values.get("video_sampling") or {})
    own = {"fps": values.get("fps"), "max_frames": values.get("num_frames")}
    values |= preprocess.merged(own, SAMPLING)
    values |= {key: sampled[key] for key in SAMPLING if key in sampled}
    if "video_size" in sampled:
        values["size"] = sampled["video_size"]
    return values


def _official(
    between: list[int], source: Source, values: Mapping[str, object], most: int | None
) -> list[int]:
    """`fps` frames a second up to the most, evenly; repeated ones once."""
    fps, limit = cast(float, values["fps"]), cast(int, values["max_frames"])
    total = len(between)
    duration = total / source.fps
    count = max(min(round(fps * duration), limit, most or limit), 1)
    first, last = 0, total - 1
    if duration - 2 * SKIPPED > limit * fps:
        first = int(SKIPPED * source.fps)
        last = min(int(total - SKIPPED * source.fps), total - 1)
    if first >= last:
        first, last = 0, total - 1
    step = (last - first) / max(count - 1, 1)
    # As numpy's linspace: the last is the end itself.
    picked = [int(number * step + first) for number in range(count)]
    if count > 1:
        picked[-1] = last
    return [between[number] for number in dict.fromkeys(picked)]


def _square(pixels: torch.Tensor, values: Mapping[str, object]) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> (n, 3, h, h): to the longest edge, then to a square.

    Lanczos is Pillow's, as for pictures (`Idefics3.plan` says why, and how far torchvision's is
    from it). The only official processor of videos takes torchvision's: bicubic before 0.27.
    """
    recipe = idefics3.recipe_of(values)
    if not recipe.do_resize:
        return pixels
    longest = min(idefics3.LARGEST, idefics3.edge_of(values, "size"))
    height, width = pixels.shape[-2:]
    size = idefics3.longest_to(height, width, longest)
    edge = idefics3.edge_of(values, "max_image_size")
    lanczos = recipe.resample == idefics3.LANCZOS
    resize = preprocess.resize_pil if lanczos else preprocess.resize
    return resize(resize(pixels, size, recipe.resample), (edge, edge), recipe.resample)


def _written(video: Prepared, count: int) -> str:
    """A video in the prompt: how long it is, then its frames behind their times."""
    source = video.source
    duration = timedelta(seconds=int(source.num_frames / source.fps))
    intro = (
        f"You are provided the following series of {in_words(len(video.pixels))} frames from a"
        f" {duration} [H:MM:SS] video.\n"
    )
    blocks = [
        f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{idefics3.whole_block(count)}"
        for time in frames.seconds(video)
    ]
    return intro + "".join(blocks) + "\n\n"


def in_words(number: int) -> str:
    """A whole number below a million in English, as the prompts of the training write it."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{ONES[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    if not rest:
        return f"{in_words(thousands)} thousand"
    joint = ", " if rest >= 100 else " and "
    return f"{in_words(thousands)} thousand{joint}{in_words(rest)}"
