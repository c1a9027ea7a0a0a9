"""From a run's trace and clock to the report's figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from vtprune import __version__
from vtprune.inference.kept_tokens import keep_record
from vtprune.inference.report import (
    CompileInfo,
    DecodeCutCount,
    DecodingInfo,
    Flops,
    InputInfo,
    KvCacheBytes,
    MemoryBytes,
    ModalitySettings,
    ModelInfo,
    Report,
    ResolvedPreset,
    ResolvedStage,
    Seconds,
    StageCount,
    TokenCounts,
    Versions,
)
from vtprune.models import cost
from vtprune.models.base import PIXELS
from vtprune.models.encoder_cost import EncoderFlops
from vtprune.preset.figures import to_entry
from vtprune.preset.spec import ModalityPreset
from vtprune.tokens.layout import MODALITIES, Layout, empty_layout

if TYPE_CHECKING:
    from vtprune.engine.trace import Trace
    from vtprune.inference.generate import Run
    from vtprune.inference.prepare import PreparedQuestion
    from vtprune.models.base import Inputs, PreparedMedia, StreamedVideo
    from vtprune.models.loading import Loaded
    from vtprune.preset import Preset

PARTS = ("load", "media", "preprocess", "vision", "select", "prefill", "decode")
"""Of the seconds of a report, in the order in which they pass; selection is in the prefill."""


def build_report(
    loaded: Loaded,
    question: PreparedQuestion,
    preset: Preset,
    run: Run,
    *,
    began: float,
    startup: float = 0.0,
    load: float = 0.0,
) -> Report:
    """Return the report of one run, without comparison.

    Args:
        began: when the work on it did, on `time.perf_counter`'s clock.
        startup: of the seconds since then, what interpreter and imports took.
        load: and what loading the model took.
    """
    total = time.perf_counter() - began
    answer_tokens, inputs, media = len(run.tokens), question.inputs, question.media
    flops, kv_bytes = compute_costs(loaded, inputs, run.trace, answer_tokens, run.sample)
    return Report(
        question=question.question,
        answer=run.answer,
        model=describe_model(loaded),
        input=describe_input(media.read, media.decoders, inputs),
        preset=resolve_preset(preset, run.trace, run.sample),
        tokens=count_tokens(run.trace, answer_tokens, run.sample, inputs.streamed),
        flops=flops,
        kv_cache_bytes=kv_bytes,
        decoding=describe_decoding(loaded, preset, run.trace, answer_tokens, run.sample),
        memory_bytes=measure_memory(loaded),
        seconds=sum_seconds({**run.seconds, "load": load}, total, startup),
        compile=describe_compiled(loaded, run),
        warnings=warnings_of(loaded, question, preset, run, flops),
        version=describe_versions(),
        kept_tokens=keep_record(loaded, question, run.trace, run.sample),
    )


def describe_versions() -> Versions:
    """Return the versions of the libraries that run."""
    import transformers

    return Versions(
        vtprune=__version__,
        torch=str(torch.__version__),
        transformers=str(transformers.__version__),
    )


def describe_model(loaded: Loaded) -> ModelInfo:
    """Return what a report says of the model."""
    model = loaded.model
    text = loaded.decoder_config
    return ModelInfo(
        name=loaded.name,
        adapter=loaded.adapter or None,
        family=str(model.config.model_type),
        layers=int(getattr(text, "num_hidden_layers", 0)),
        parameters=sum(weight.numel() for weight in model.parameters()),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(getattr(text, "_attn_implementation", "eager")),
        pruned_equals=loaded.pruned_equals,
        revision=getattr(model.config, "_commit_hash", None),
    )


def describe_compiled(loaded: Loaded, run: Run) -> CompileInfo | None:
    """Return what was compiled in a run; None where the model is not compiled."""
    compiled, cost = loaded.compiled, run.compile_cost
    if compiled is None or cost is None:
        return None
    return CompileInfo(
        backend=compiled.backend,
        mode=compiled.mode,
        layers=compiled.layers,
        tower_layers=compiled.tower_layers,
        seconds=cost.seconds,
        graphs=cost.graphs,
        recompiles=cost.recompiles,
    )


def describe_input(
    items: Sequence[PreparedMedia], decoders: Sequence[str], inputs: Inputs
) -> InputInfo:
    """Return what was read."""
    kinds = {item.source.kind for item in items}
    videos = [item for item in items if item.source.kind == "video"]
    first = items[0].source if items else None
    return InputInfo(
        files=[item.source.name for item in items],
        modality="mixed" if len(kinds) > 1 else next(iter(kinds), "text"),
        frames=sum(len(item.index) for item in videos),
        tiles=sum(inputs.tiles),
        timestamps=[round(time, 3) for item in videos for time in item.timestamps],
        decoder=", ".join(dict.fromkeys(decoders)),
        duration=sum(item.source.duration for item in videos),
        width=first.width if first else 0,
        height=first.height if first else 0,
    )


def resolve_preset(preset: Preset, trace: Trace, sample: int) -> ResolvedPreset:
    """Return the preset with its stages as they ran."""
    fitting = trace.fitting[sample] if trace.fitting else None
    return ResolvedPreset(
        name=preset.name,
        description=preset.description,
        keep=preset.keep,
        tokens=preset.tokens,
        tokens_after=preset.tokens_after,
        fit=preset.fit,
        fit_tokens=None if fitting is None else fitting.tokens,
        fit_reason=None if fitting is None else fitting.reason,
        decode=preset.decode.to_dict() if preset.decode else None,
        keep_for_turns=preset.keep_for_turns,
        seed=preset.seed,
        image=settings_of(preset.image),
        video=settings_of(preset.video),
        method=preset.method,
        changed=dict(preset.changed),
        evidence=[to_entry(figure) for figure in preset.evidence] or None,
        stages=[
            ResolvedStage(
                at=stage.at,
                layer=stage.layer,
                modality=stage.modality,
                method=stage.method,
                keep=stage.keep,
                per=stage.per,
                split=stage.split,
                positions=stage.positions,
                options=dict(stage.options),
            )
            for stage in trace.stages
            if stage.cuts[sample]
        ],
    )


def settings_of(modality: ModalityPreset) -> ModalitySettings | None:
    """Return what a preset says of a modality beside its stages; None where that is nothing."""
    if modality == ModalityPreset():
        return None
    return ModalitySettings(
        keep=modality.keep,
        max_tiles=modality.max_tiles,
        frames=modality.frames,
        fps=modality.fps,
        max_frames=modality.max_frames,
    )


def count_tokens(
    trace: Trace, answer_tokens: int, sample: int, streamed: StreamedVideo | None = None
) -> TokenCounts:
    """Return the counts of one sample, from what the engine really cut.

    Args:
        streamed: its video, if that was encoded in segments.
    """
    layout = trace.layouts[sample] if trace.layouts else empty_layout()
    kept = trace.kept[sample] if trace.layouts else layout
    present = [name for name in MODALITIES if len(layout.of_modality(name))]
    return TokenCounts(
        visual=trace.before(sample)[0] if trace.layouts else 0,
        text=trace.text[sample] if trace.text else 0,
        answer=answer_tokens,
        keep_mean=trace.keep_mean(sample),
        kept_after=len(kept),
        by_modality={name: len(kept.of_modality(name)) for name in present},
        stages=[
            StageCount(
                at=stage.at,
                layer=stage.layer,
                modality=stage.modality,
                method=stage.method,
                options=dict(stage.options),
                before=stage.modality_before[sample],
                after=stage.modality_after[sample],
            )
            for stage in trace.stages
            if stage.cuts[sample]
        ],
        by_frame=count_kept(layout, kept, "video", "frame")
        if streamed is None
        else count_streamed(streamed, kept),
        by_tile=count_kept(layout, kept, "image", "tile"),
    )


def count_streamed(streamed: StreamedVideo, kept: Layout) -> list[int]:
    """Tokens kept in each frame of a streamed video, those with none left included."""
    layout = streamed.layout
    frames = int(layout.grid.frame[layout.of_modality("video")].max()) + 1
    of_video = kept.grid.frame[kept.of_modality("video")]
    return torch.bincount(of_video, minlength=frames).tolist()


def count_kept(layout: Layout, kept: Layout, modality: str, per: str) -> list[int]:
    """Tokens kept in each frame or tile of a modality, those with none left included."""
    of_modality = layout.take(layout.of_modality(modality))
    if not len(of_modality):
        return []
    groups = of_modality.groups(per)
    present = torch.isin(of_modality.columns, kept.columns)
    counts = torch.zeros(int(groups.max()) + 1, dtype=torch.long)
    return counts.scatter_add_(0, groups, present.long()).tolist()


def compute_costs(
    loaded: Loaded, inputs: Inputs, trace: Trace, answer_tokens: int, sample: int
) -> tuple[Flops, KvCacheBytes]:
    """Return FLOPs and KV cache bytes of one sample, beside those of the whole prompt."""
    encoder = count_vision(loaded, inputs, trace, sample)
    vision = None if isinstance(encoder, cost.CostError) else encoder.total
    shape = loaded.measured_decoder
    if isinstance(shape, cost.CostError):
        flops = Flops(vision=vision, prefill=None, prefill_full=None, decode=None,
                      decode_full=None, reduction=None)  # fmt: skip
        return flops, KvCacheBytes(kept=None, full=None, state=None)
    length = int(inputs.tensors["input_ids"].shape[1])
    kept = trace.tokens_by_layer(sample) if trace.layouts else [length] * shape.layers
    full = [sum(trace.before(sample)) if trace.layouts else length] * shape.layers
    text = trace.text[sample] if trace.text else length
    prefill = cost.prefill_flops(shape, kept, text)
    prefill_full = cost.prefill_flops(shape, full, text)
    size = loaded.model.dtype.itemsize
    flops = Flops(
        vision=vision,
        prefill=prefill,
        prefill_full=prefill_full,
        decode=cost.decode_flops(shape, kept, answer_tokens, decoded_lengths(trace, sample)),
        decode_full=cost.decode_flops(shape, full, answer_tokens),
        reduction=1 - prefill / prefill_full,
    )
    return flops, KvCacheBytes(
        kept=cost.kv_bytes(shape, kept, size),
        full=cost.kv_bytes(shape, full, size),
        state=cost.state_bytes(shape, size),
    )


def decoded_lengths(trace: Trace, sample: int) -> list[tuple[int, list[int]]]:
    """Return the cuts while decoding of one sample, as `cost.decode_flops` takes them."""
    text = trace.text[sample] if trace.text else 0
    return [(cut.steps, [text + left for left in cut.visual[sample]]) for cut in trace.decoding]


def describe_decoding(
    loaded: Loaded, preset: Preset, trace: Trace, answer_tokens: int, sample: int
) -> DecodingInfo | None:
    """Return what was cut while one sample's answer was decoded; None where nothing was to be."""
    if preset.decode is None or preset.keeps_all() or not trace.layouts:
        return None
    shape, size = loaded.measured_decoder, loaded.model.dtype.itemsize
    cuts, seconds = [], sum(cut.seconds for cut in trace.decoding)
    lengths = decoded_lengths(trace, sample)
    for cut, (steps, left) in zip(trace.decoding, lengths, strict=True):
        if steps >= answer_tokens:  # the rest is of longer answers in its batch
            break
        visual = [
            count
            for count, columns in zip(cut.visual[sample], cut.columns, strict=True)
            if columns.shape[1]
        ]
        kept = full = None
        if not isinstance(shape, cost.CostError):
            before = trace.tokens_by_layer(sample)
            kept = cost.kv_bytes(shape, [tokens + steps for tokens in left], size)
            full = cost.kv_bytes(shape, [tokens + steps for tokens in before], size)
        cuts.append(
            DecodeCutCount(
                tokens=steps,
                visual_mean=sum(visual) / len(visual),
                kv_cache_bytes=kept,
                kv_cache_bytes_uncut=full,
            )
        )
    decode = preset.decode
    return DecodingInfo(every=decode.every, keep=decode.keep, cuts=cuts, seconds=seconds)


def warnings_of(
    loaded: Loaded, question: PreparedQuestion, preset: Preset, run: Run, flops: Flops
) -> tuple[str, ...]:
    """Return what the reader of a report should know before believing a figure."""
    inputs, media = question.inputs, question.media
    encoder = count_vision(loaded, inputs, run.trace, run.sample)
    notes = [*loaded.warnings, *media.warnings, *run.warnings, *uncounted(loaded, encoder)]
    notes += warn_of_late_cuts(loaded, flops.prefill, flops.prefill_full)
    if loaded.cache is not None and loaded.cache.reason:
        notes.append(f"--cache {loaded.cache.directory}: not written: {loaded.cache.reason}")
    aware: Sequence[str] = preset.question_aware_methods()
    if run.trace.decoding:
        aware = (*aware, "the cuts while decoding")
    if aware and (run.trace.stages or run.trace.decoding):
        notes.append(f"{' and '.join(aware)} kept tokens for this question; a follow-up on the "
                     "same KV cache sees only those")  # fmt: skip
    return tuple(dict.fromkeys(notes))


def warn_of_late_cuts(loaded: Loaded, pruned: float | None, full: float | None) -> list[str]:
    """Return a warning where a cut costs more than it saves, as the last layers need no cut.

    Args:
        pruned, full: FLOPs of the prefill.
    """
    shape = loaded.measured_decoder
    if isinstance(shape, cost.CostError) or shape.last_from is None:
        return []
    if pruned is None or full is None or pruned <= full:
        return []
    return [
        f"unpruned, the layers from {shape.last_from} on run only the last token of a prompt; a "
        "cut there makes them run all that are kept, and the prefill costs more than unpruned: "
        f"cut before layer {shape.last_from} (--at)"
    ]


def uncounted(loaded: Loaded, encoder: EncoderFlops | cost.CostError) -> list[str]:
    """Return a warning for each part of the model whose FLOPs are not counted."""
    warnings = []
    if isinstance(encoder, cost.CostError):
        warnings.append(f"vision FLOPs are null: {encoder.message}")
    if isinstance(loaded.measured_decoder, cost.CostError):
        reason = loaded.measured_decoder.message
        warnings.append(f"{reason}, nor are the bytes of its KV cache")
    return warnings


def count_vision(
    loaded: Loaded, inputs: Inputs, trace: Trace | None = None, sample: int = 0
) -> EncoderFlops | cost.CostError:
    """Return the FLOPs of tower and projector for what was encoded; the error where not known.

    Args:
        trace: says what went before the tower, and what came from a cache; None: nothing.
        sample: of the trace.
    """
    encoded = {PIXELS[name] for name in PIXELS if name in inputs.tensors}
    if not encoded and any(value.is_floating_point() for value in inputs.tensors.values()):
        return loaded.encoder_counter.count(inputs.tensors)  # pixels by another name
    left = {one for one in encoded if trace is None or (sample, one) not in trace.found}
    try:
        known = find_encoded(loaded, inputs, trace, sample)
    except cost.CostError as error:
        return error
    if len(known) == sum(name in inputs.tensors and PIXELS[name] in left for name in PIXELS):
        return EncoderFlops(
            sum((cost.tower_flops(shape, units) for shape, units, _ in known), 0.0),
            sum((cost.projector_flops(*arguments) for arguments in known), 0.0),
        )
    if left != encoded:
        return cost.uncounted(loaded.model.config, "a part of the media")
    whole = loaded.encoder_counter.count(inputs.tensors)
    rows = trace.encoded[sample] if trace and trace.encoded else {}
    if not rows or isinstance(whole, cost.CostError):
        return whole
    share = find_encoded_share(inputs, rows) if loaded.family.sees_steps_apart else None
    if share is None:
        return cost.uncounted(loaded.model.config, "a part of media of several sizes")
    return EncoderFlops(whole.tower * share, whole.projector * share)


def find_encoded_share(inputs: Inputs, rows: Mapping[str, Sequence[int]]) -> float | None:
    """Return the share of the frames or tiles of one size that a tower got, which sees each alone.

    Args:
        rows: modality -> how many of each media item it got.

    Returns:
        None where they are of several sizes, or their number is not known.
    """
    sizes: set[tuple[int, ...]] = set()
    total = 0
    for name in PIXELS.keys() & inputs.tensors.keys():
        modality, pixels = PIXELS[name], inputs.tensors[name]
        grid = inputs.tensors.get(f"{modality}_grid_thw")
        if grid is not None:
            total += int(grid[:, 0].sum())
            sizes |= set(map(tuple, grid[:, 1:].tolist()))
        elif "spatial_shapes" in inputs.tensors:
            total += len(pixels)
            sizes |= set(map(tuple, inputs.tensors["spatial_shapes"].tolist()))
        else:
            return None
    count = sum(map(sum, rows.values()))
    return count / total if len(sizes) == 1 or count == total else None


def compute_vision_flops(
    loaded: Loaded, inputs: Inputs, trace: Trace | None = None, sample: int = 0
) -> float:
    """Return the FLOPs of tower and projector; 0 where they are not known.

    Args:
        trace, sample: as of `count_vision`.
    """
    counted = count_vision(loaded, inputs, trace, sample)
    return 0.0 if isinstance(counted, cost.CostError) else counted.total


def find_encoded(
    loaded: Loaded, inputs: Inputs, trace: Trace | None = None, sample: int = 0
) -> list[tuple[cost.VisionShape, Sequence[Sequence[int]], int | None]]:
    """Return what the vision tower encodes of each modality: arguments of `projector_flops`."""
    given = inputs.tensors if inputs.streamed is None else inputs.streamed.shapes
    arguments: list[tuple[cost.VisionShape, Sequence[Sequence[int]], int | None]] = []
    encoded = trace.encoded[sample] if trace and trace.encoded else None
    for name, modality in PIXELS.items():
        shape = cost.vision_shape(loaded.model.config, modality)
        if name not in given or shape is None:
            continue
        if trace and (sample, modality) in trace.found:  # taken from a cache
            continue
        size = tuple(given[name].shape)
        grid = given.get(f"{modality}_grid_thw")
        pooling = given.get(f"{modality}_token_pooling")
        units: Sequence[Sequence[int]]
        if grid is not None:
            steps = encoded[modality] if encoded else grid[:, 0].tolist()
            pairs = zip(steps, grid[:, 1:].tolist(), strict=True)
            units = [(kept, *sides) for kept, sides in pairs]
        elif pooling is not None:  # (tiles, patches, values): cut into patches already
            units = [(1, 1, size[1])] * (sum(encoded[modality]) if encoded else size[0])
        elif f"{modality}_position_ids" in given:  # padded to one number of patches
            pictures = sum(encoded[modality]) if encoded else size[0]
            units = [(1, shape.merge, size[1] // shape.merge)] * pictures
        else:
            # Tensors of several pictures are filled up with tiles that are not encoded.
            filled = "image_sizes" in given and modality == "image"
            count = sum(inputs.tiles) if filled else None
            if encoded:  # one tensor may hold pictures and videos
                apart = any(PIXELS[other] == "video" for other in PIXELS if other in given)
                count = sum(
                    sum(encoded[name]) for name in MODALITIES if name == modality or not apart
                )
            units = cost.tile_units(shape, size, count)
        arguments.append((shape, units, None if pooling is None else len(pooling)))
    return arguments


def measure_memory(loaded: Loaded) -> MemoryBytes:
    """Return the bytes of the weights, and the peak of the process (on a GPU, of the device)."""
    weights = sum(weight.numel() * weight.element_size() for weight in loaded.model.parameters())
    device = loaded.model.device
    if device.type == "cuda":
        return MemoryBytes(weights=weights, peak=int(torch.cuda.max_memory_allocated(device)))
    try:
        import resource
    except ImportError:  # Windows does not tell
        return MemoryBytes(weights=weights, peak=0)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryBytes(weights=weights, peak=peak)


def sum_seconds(seconds: Mapping[str, float], total: float, startup: float) -> Seconds:
    """Return the seconds of a report.

    Args:
        seconds: of a run, by part.
    """
    return Seconds(
        **{name: seconds[name] for name in PARTS},
        first_token=seconds["preprocess"] + seconds["first_choice"],
        total=total,
        startup=startup,
    )
