"""A long video in a prompt: decoded, resized, encoded and cut segment by segment.

What is held at once is a segment's frames and features, and the features of the tokens that the
segments before it kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from vtprune.device import Duration, clock, free_memory, mark
from vtprune.engine.fitting import ANSWER_TOKENS, HEADROOM, PromptSize, fit_tokens
from vtprune.engine.video_segments import (
    Features,
    SegmentEncoder,
    check_apart,
    fit_to_layout,
    join_features,
    put_together,
)
from vtprune.errors import ModelError, PresetError, format_bytes
from vtprune.inference.model_inputs import TEXT_INPUTS, to_device
from vtprune.media import Frames, Limits, Source, read_parts
from vtprune.models.base import (
    PIXELS,
    Inputs,
    Preparable,
    PreparedMedia,
    ReadPlan,
    StreamedVideo,
    Turn,
)
from vtprune.models.batch_layout import lay_out_batch
from vtprune.models.cost import CostError
from vtprune.models.seams import prompt_positions
from vtprune.models.structure import Structure, find_structure
from vtprune.preset import Preset, StageSpec, StreamSpec
from vtprune.pruners import find_profile, reads_question
from vtprune.tokens.layout import MODALITIES, Layout
from vtprune.tokens.schedule import Place, fixed_count
from vtprune.tokens.units import FullSizeCounts

if TYPE_CHECKING:
    from vtprune.inference.prompt_media import MediaPlan, PromptMedia
    from vtprune.models.loading import Loaded, Progress

FALLBACK = "spread"
"""What cuts segments under a preset without a stage at the input."""
OVERSAMPLING = 2.0
"""How many times as much the segments keep as the preset keeps of the whole video, for the cut over
all of them to choose from."""


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """How the video of a prompt is encoded in segments.

    Args:
        source: the video.
        read: which frames of it, and how each is resized.
        spec: of the segments.
        preset: that prunes.
        limits: of what is read.
        on_progress: gets the stage, the frames done and all frames.
        warnings: what the reader should know of it.
        decoded: the frames, where they are decoded and resized already.
    """

    source: Source
    read: ReadPlan
    spec: StreamSpec
    preset: Preset
    limits: Limits
    on_progress: Progress | None = None
    warnings: tuple[str, ...] = ()
    decoded: PreparedMedia | None = None

    def segments(self, size: int) -> Iterator[Frames]:
        """Yield the frames of each segment, of `size` or fewer, decoded now or already.

        Raises:
            MediaError: the video can't be read.
        """
        index, item = self.read.index, self.decoded
        if item is None:
            yield from read_parts(self.source, index, size, self.read.transform, self.limits)
            return
        rows = len(item.pixels) // len(index)  # of a frame
        for first in range(0, len(index), size):
            part = slice(first, first + size)
            pixels = item.pixels[first * rows : (first + size) * rows]
            yield Frames(pixels, index[part], item.timestamps[part], self.source.decoder, ())

    @property
    def stage(self) -> StageSpec:
        """What cuts a segment: the preset's stage at the input, else `FALLBACK`."""
        stages = () if self.preset.keeps_all() else self.preset.stages_for("video")
        for stage in stages:
            scheduled = stage.at == "schedule" and find_profile(stage.method).depths[0] == 0
            if stage.at in ("input", "0") or scheduled:
                return replace(stage, at="input", keep=None, positions="keep")
        return StageSpec.from_dict({"at": "input", "method": FALLBACK})

    @property
    def reads_question(self) -> bool:
        """Whether segments are cut for the question, so that another one needs them anew."""
        return reads_question(self.stage.method, dict(self.stage.options))


def plan_stream(
    media_plan: MediaPlan, preset: Preset | None, limits: Limits, on_progress: Progress | None
) -> StreamPlan | None:
    """Return how the video of a prompt is streamed; None where it is encoded at once.

    Raises:
        ModelError: it was asked for, and can't be.
    """
    videos = [number for number, view in enumerate(media_plan.views) if view.source.kind == "video"]
    if preset is None or not videos:
        return None
    spec, warnings, model = preset.stream, tuple[str, ...](), media_plan.model
    stage = preset.frame_and_tile_stage()
    if stage is not None and stage.optional:
        stage = None  # it is left out
    if spec is None:
        if len(videos) > 1 or stage is not None or not model.family.listed:
            return None
        source, plan = media_plan.views[videos[0]].source, media_plan.plans[videos[0]]
        lack = lacking_memory(model, source, plan)
        if lack is None:
            return None
        spec = StreamSpec()
        warnings = (f"{lack}: they were encoded in segments of {spec.frames}, as by --stream",)
    if len(videos) > 1:
        raise ModelError(
            f"{len(videos)} videos in one question; one can be encoded in segments",
            "ask about them one by one, or leave --stream out",
        )
    if stage is not None:
        raise PresetError(
            f"{preset.label}: the stage at pixels ({stage.method}) chooses among all frames, and a "
            "streamed video never holds them at once",
            "leave --stream out, or use a preset without that stage, such as balanced",
        )
    number = videos[0]
    return StreamPlan(
        media_plan.views[number].source, media_plan.plans[number], spec,
        preset.without_optional_stages(), limits, on_progress, warnings,
    )  # fmt: skip


def frame_shape(source: Source, plan: ReadPlan) -> torch.Tensor:
    """Return one resized frame, without what is in it.

    Raises:
        ModelError: the family's resizing needs pixels.
    """
    try:
        return plan.transform(
            torch.empty((1, 3, source.height, source.width), dtype=torch.uint8, device="meta")
        )
    except (NotImplementedError, RuntimeError, TypeError):  # by Pillow
        return plan.transform(torch.zeros((1, 3, source.height, source.width), dtype=torch.uint8))


def lacking_memory(model: Preparable, source: Source, plan: ReadPlan) -> str | None:
    """Return which memory is too small for all frames of a video at once; None: they fit.

    Before the weights are read, what they will take counts as free.
    """
    host = torch.device("cpu")
    encoded = bytes_encoded(model, source, plan)
    needed = {host: bytes_read(source, plan)}
    if model.device.type == "cuda":
        needed[model.device] = encoded
    else:
        needed[host] += encoded
    for device, count in needed.items():
        free = free_memory(device)
        if count > HEADROOM * free:
            where = f"of the memory of {device}" if device != host else "of memory"
            return (
                f"encoding all {len(plan.index):,} frames at once would take {format_bytes(count)} "
                f"{where}, of which {format_bytes(free)} are free"
            )
    return None


def bytes_read(source: Source, plan: ReadPlan) -> int:
    """Return what the frames of a video take at once, resized and normalised."""
    frame = frame_shape(source, plan)
    return len(plan.index) * frame.numel() * (frame.element_size() + 2 * 4)


def bytes_encoded(model: Preparable, source: Source, plan: ReadPlan) -> int:
    """Return an estimate of what a vision encoder that is given all frames at once takes.

    Pixels, and what the layers hold of a patch while one of them runs: its states, queries, keys
    and values, or what the feed-forward network makes of them.
    """
    pixels = len(plan.index) * frame_shape(source, plan).numel()
    values = pixels
    with suppress(CostError):
        tower = model.family.vision_shape(model.files.config, "video")
        if tower is not None:
            layer = max(7 * tower.hidden, 3 * tower.hidden + 2 * tower.intermediate)
            values += pixels // tower.inputs * layer
    return values * model.dtype.itemsize


def unread_video(plan: StreamPlan, source: Source) -> PreparedMedia:
    """Return a video as a prompt takes it, its frames without what is in them."""
    frame = frame_shape(plan.source, plan.read)
    shape = (len(plan.read.index) * len(frame), *frame.shape[1:])
    pixels = torch.empty(shape, dtype=frame.dtype, device="meta")
    times = tuple(plan.source.timestamps[number] for number in plan.read.index)
    return PreparedMedia(source, pixels, plan.read.index, times, transform=plan.read.transform)


# -- the prompt ------------------------------------------------------------------------------------


def stream_inputs(
    loaded: Loaded,
    media: PromptMedia,
    turns: Sequence[Turn],
    inputs: Inputs,
    after: StreamedVideo | None = None,
) -> Inputs:
    """Return the inputs of a prompt whose video is encoded in segments: those of its kept tokens.

    Args:
        inputs: the inputs of the whole prompt, the pixels of the video without what is in them.
        after: of an earlier question about the same media.

    Raises:
        ModelError: the family or the model can't be given a video in segments.
    """
    plan = media.stream
    assert plan is not None
    structure = find_structure(loaded.model)
    layout, names = lay_out_prompt(structure, inputs)
    ids = inputs.tensors["input_ids"]
    refuse_windows(structure, ids.shape[1])
    stream = after
    if stream is None or plan.reads_question:
        text = ids[0, int(layout.columns[-1]) + 1 :]
        compiled = loaded.compiled
        before = None if compiled is None else compiled.cost
        stream = encode_segments(loaded, structure, plan, media, layout, text, names)
        if compiled is not None and before is not None:
            stream = replace(stream, compile_cost=compiled.cost.since(before))
    else:
        stream = replace(stream, seconds={}, compile_cost=None)
    stream = replace(stream, layout=layout, shapes=inputs.tensors)
    kept = torch.ones(ids.shape[1], dtype=torch.bool)
    kept[layout.columns] = False
    kept[layout.columns[stream.index]] = True
    columns = kept.nonzero().squeeze(1)
    tensors = {name: value for name, value in inputs.tensors.items() if value.device.type != "meta"}
    positions = prompt_positions(loaded.model, structure.inner, tensors)
    tensors |= {name: value[:, columns] for name, value in tensors.items() if name in TEXT_INPUTS}
    tensors["position_ids"] = positions.index_select(-1, columns)
    tensors[names[0]] = torch.zeros(1)
    left = layout.take(stream.index)
    numbers = layout.media.unique().tolist()
    grids = tuple(
        (MODALITIES[int(layout.modality[layout.media == number][0])],
         left.grid.take((left.media == number).nonzero().squeeze(1)))
        for number in numbers
    )  # fmt: skip
    sizes = {name: len(layout.of_modality(name)) for name in MODALITIES}
    full_size = inputs.full_size or FullSizeCounts({name: n for name, n in sizes.items() if n})
    return replace(inputs, tensors=tensors, media=grids, full_size=full_size, streamed=stream)


def lay_out_prompt(structure: Structure, inputs: Inputs) -> tuple[Layout, list[str]]:
    """Return where the visual tokens of the whole prompt sit, and the names of its video's pixels.

    Raises:
        ModelError: pictures share an encoder with the video.
    """
    names = [
        name
        for name in PIXELS
        if name in inputs.tensors and inputs.tensors[name].device.type == "meta"
    ]
    if not names:
        raise ModelError(
            f"{structure.model_type}: its inputs do not hold a video's pixels by themselves, so it "
            "can't be encoded in segments",
            "leave --stream out, and give fewer frames",
        )
    ids = inputs.tensors["input_ids"]
    valid = torch.ones(ids.shape, dtype=torch.bool)
    vision = {PIXELS[name]: inputs.tensors for name in PIXELS if name in inputs.tensors}
    (layout,), _ = lay_out_batch(structure, ids, valid, vision, None, inputs.media)
    return layout, names


def refuse_windows(structure: Structure, columns: int) -> None:
    """Refuse layers whose windows would count the columns of the whole prompt.

    Raises:
        ModelError: the prompt is longer than a window, or attention counts distances.
    """
    window = structure.narrowest_window
    if structure.distance_layers or (window is not None and columns > window):
        raise ModelError(
            f"{structure.model_type}: its attention counts all {columns:,} columns of the prompt, "
            "and a streamed video leaves some of them out",
            "leave --stream out, and give fewer frames",
        )


# -- segments --------------------------------------------------------------------------------------


@dataclass
class Shares:
    """How many tokens each segment keeps, of what all of them may keep together.

    Args:
        count: tokens that all segments may keep.
        total: tokens of all segments.
        by_information: more to segments whose tokens differ more.
    """

    count: int
    total: int
    by_information: bool
    seen: list[float] = field(default_factory=list)

    def take(self, size: int, information: float = 1.0) -> int:
        """Return how many of its tokens the next segment keeps.

        By information it has its share of what is left, if the segments to come carry as much as
        those before on average.
        """
        weight = 1.0
        if self.by_information:
            self.seen.append(information)
            weight = information / (sum(self.seen) / len(self.seen))
        later = self.total - size
        share = self.count * weight * size / max(weight * size + later, 1e-9)
        kept = min(size, self.count, max(1, math.floor(share + 1e-6))) if later else (
            min(size, self.count)
        )  # fmt: skip
        self.count -= kept
        self.total = later
        return kept


def encode_segments(
    loaded: Loaded,
    structure: Structure,
    plan: StreamPlan,
    media: PromptMedia,
    layout: Layout,
    text: torch.Tensor,
    names: Sequence[str],
) -> StreamedVideo:
    """Encode and cut the segments of a prompt's video.

    Args:
        layout: of all visual tokens of the prompt.
        text: (M,) ids behind the last of them.
        names: of the inputs that hold the video's pixels.
    """
    encoder = SegmentEncoder(
        structure, plan.stage, plan.preset.seed, loaded.calibration, text, loaded.encoder_cache
    )
    number = next(n for n, item in enumerate(media.items) if item.source.kind == "video")
    item = media.items[number]
    video = layout.of_modality("video")
    if not len(video):  # placeholders that pictures share, and no picture is there
        video = torch.arange(len(layout))
    group = loaded.family.frames_a_step(loaded.files.config)
    size = -(-plan.spec.frames // group) * group
    shares = Shares(
        segment_budget(plan, structure, layout, len(video), int(text.shape[0])),
        len(video),
        plan.spec.share == "information",
    )
    kept: list[Features] = []
    index: list[torch.Tensor] = []
    seconds, selecting = {"media": 0.0, "preprocess": 0.0}, Duration()
    frames_of_token, done, tail = layout.grid.frame[video], 0, 0
    notes: tuple[str, ...] = ()
    tail_scores: torch.Tensor | None = None
    started, total = clock(), len(plan.read.index)
    for part in plan.segments(size):
        seconds["media"] += clock() - started
        started = clock()
        segment = replace(item, pixels=part.pictures, index=part.index, timestamps=part.timestamps)
        tensors = segment_tensors(loaded, segment)
        steps = done // group, -(-(done + len(part.index)) // group)
        of_segment = video[(frames_of_token >= steps[0]) & (frames_of_token < steps[1])]
        part_layout = layout.take(of_segment)
        seconds["preprocess"] += clock() - started
        features, tail = fit_to_layout(
            encoder.encode(tensors, part_layout), part_layout.grid, structure.model_type
        )
        if not kept and len(part.index) > group:
            check_frames_apart(loaded, encoder, segment, features, part_layout, group)
        if tail:  # what the rest of the model adds is always kept
            if features.tower is not None:
                tail_scores = features.tower[-tail:]
                features = replace(features, tower=features.tower[:-tail])
            of_segment, part_layout = (
                of_segment[:-tail],
                part_layout.take(torch.arange(len(of_segment) - tail)),
            )
        began = mark(structure.device)
        weight = encoder.information(features) if shares.by_information else 1.0
        cut, chosen = encoder.cut(features, part_layout, shares.take(len(features), weight))
        selecting += Duration.since(began, structure.device)
        kept.append(cut)
        index.append(of_segment[chosen])
        done += len(part.index)
        notes = part.warnings
        if plan.on_progress:
            plan.on_progress(f"encoding {plan.source.path.name}", done, total)
        del part, tensors, features, segment
        started = clock()
    seconds |= {"vision": encoder.vision.seconds, "select": selecting.seconds}
    others = torch.ones(len(layout), dtype=torch.bool)
    others[video[: len(video) - tail]] = False
    chosen = torch.cat([*index, others.nonzero().squeeze(1)]).sort().values
    joined = join_features(kept)
    if tail_scores is not None and joined.tower is not None:
        joined = replace(joined, tower=torch.cat([joined.tower, tail_scores]))
    stage = replace(plan.stage, at="segments")
    return StreamedVideo(
        PIXELS[names[0]], put_together(joined), joined.tower, layout, chosen, {}, stage, seconds,
        (*plan.warnings, *notes, *encoder.trace.warnings),
    )  # fmt: skip


def segment_tensors(loaded: Loaded, segment: PreparedMedia) -> dict[str, torch.Tensor]:
    """Return what the vision tower is given for a segment, on the model's device.

    Raises:
        ModelError: the family's own processor makes its inputs, of whole prompts.
    """
    try:
        vision = loaded.family.vision_inputs(loaded.files, [segment])
    except NotImplementedError:
        raise ModelError(
            f"{loaded.family.name}: the checkpoint's own processor prepares whole prompts, so a "
            "video can't be encoded in segments",
            "leave --stream out, and give fewer frames",
        ) from None
    (tensors,) = vision.values()
    return to_device(loaded, tensors)


def check_frames_apart(
    loaded: Loaded,
    encoder: SegmentEncoder,
    segment: PreparedMedia,
    features: Features,
    layout: Layout,
    group: int,
) -> None:
    """Refuse a tower that mixes frames: the second step of a segment is encoded alone too."""
    step = slice(group, 2 * group)
    alone = replace(
        segment,
        pixels=segment.pixels[step],
        index=segment.index[step],
        timestamps=segment.timestamps[step],
    )
    frames = layout.grid.frame
    second = (frames == int(frames[0]) + 1).nonzero().squeeze(1)
    second = second[second < len(features)]
    apart = encoder.encode(segment_tensors(loaded, alone), layout.take(second))
    count = min(len(apart), len(second))
    check_apart(
        apart.take(torch.arange(count)), features.take(second[:count]),
        encoder.structure.model_type,
    )  # fmt: skip


def segment_budget(
    plan: StreamPlan, structure: Structure, layout: Layout, video: int, text: int
) -> int:
    """Return how many tokens the segments' cuts leave of a video together.

    Args:
        layout: of all visual tokens of the prompt.
        video: tokens of the video.
        text: tokens of text.
    """
    keep, preset = plan.spec.keep, plan.preset
    if keep is None:
        if preset.keeps_all():
            keep = 1.0
        elif preset.fit is not None:
            size = PromptSize(text, len(layout), ANSWER_TOKENS)
            places = [Place("input", 0)]
            fitting = fit_tokens(preset.fit, structure, [places], size)
            keep = OVERSAMPLING * fitting.tokens / max(len(layout), 1)
        else:
            keep = preset.keep_before_tower("video", len(layout))
            if keep is None:
                keep = next((s.keep for s in preset.stages_for("video") if s.keep), 1.0)
            keep *= OVERSAMPLING
    return max(1, fixed_count(min(keep, 1.0), video))
