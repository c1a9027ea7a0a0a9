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
from vtprune.models.base import (
    Contents,
    Files,
    Grids,
    Media,
    PreparedMedia,
    ReadPlan,
    Sampling,
    Turn,
    VisionInputs,
    VisionTensors,
)
from vtprune.models.idefics3 import Idefics3
from vtprune.tokens.layout import box

if TYPE_CHECKING:
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


class SmolVLM(Idefics3):
    """Tiles row by row, then the whole picture; a video's frame is a picture of one tile."""

    name = "SmolVLM"
    model_types = ("smolvlm",)
    modalities = ("image", "video")
    tokens = TOKENS
    template = TEMPLATE
    shares_placeholder = True

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """Frames are squared, not split.

        Without frames or fps, the checkpoint's sampling, after start and end: 1 frame a second, at
        most 64, from the first to the last, a second at either end left out of a long video.
        """
        values = _video_values(files)
        official = functools.partial(
            _official, source=source, values=values, most=sampling.max_frames
        )
        index = frames.choose_frames(source, sampling, official)
        return ReadPlan(index, functools.partial(_square, values=values))

    def check_media(self, media: Media) -> None:
        """Pictures or one video: the official processor takes no more."""
        videos = sum(item.source.kind == "video" for item in media)
        if videos and len(media) > 1:
            raise ModelError(
                f"{videos} videos and {len(media) - videos} pictures in one question;"
                " SmolVLM takes pictures, or one video",
                "ask about them one by one",
            )

    def render(self, files: Files, media: Media, turns: Sequence[Turn]) -> str:
        """The checkpoints' own templates leave videos out; the official processor has this one."""
        if not _is_video(media):
            tokens = {"image": TOKENS["image"]}
            return prompt.render(files, media, turns, tokens, TEMPLATE)
        files = replace(files, processor={**files.processor, "chat_template": TEMPLATE})
        return super().render(files, media, turns)

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        if not _is_video(media):
            return super().vision_inputs(files, media)
        recipe = idefics3.recipe_of(_video_values(files))
        return {"video": idefics3.pixel_inputs([preprocess.normalize(media[0].pixels, recipe)])}

    def media_grids(self, files: Files, media: Media, vision: VisionInputs) -> Grids:
        if not _is_video(media):
            return super().media_grids(files, media, vision)
        side = idefics3.token_side(files.config, media[0].pixels.shape[-1])
        return {"video": [box(len(media[0].pixels), side, side)]}

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        if not _is_video(media):
            return super().placeholder_texts(files, media, grids)
        (grid,) = grids["video"]
        return {"video": [_placeholder_text(media[0], len(grid) // len(media[0].pixels))]}

    def published_files(self, side: int) -> Contents:
        edge = {"longest_edge": side}
        sampling = {"fps": 1, "max_frames": 64, "video_size": edge}
        video = {"size": edge, "max_image_size": edge, "video_sampling": sampling}
        return {**super().published_files(side), "video": video}


def _is_video(media: Media) -> bool:
    return any(item.source.kind == "video" for item in media)


def _video_values(files: Files) -> dict[str, object]:
    """Return the video preprocessor's values; its `video_sampling` goes before its own size."""
    values = preprocess.merged(files.video or files.image, idefics3.DEFAULTS)
    sampled = cast("Mapping[str, object]", values.get("video_sampling") or {})
    counts = {"fps": values.get("fps"), "max_frames": values.get("num_frames")}
    values |= preprocess.merged(counts, SAMPLING)
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


def _placeholder_text(video: PreparedMedia, count: int) -> str:
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
