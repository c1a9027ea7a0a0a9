"""An answer with what its maps are made of: its attention, and the decoder's call over it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vtprune.engine.answer_attention import read_answer_attention
from vtprune.engine.inputs import FeatureCache
from vtprune.engine.replay import MaskedKeys, Replay, note_decoder_call
from vtprune.errors import ModelError
from vtprune.inference.evidence import MapSettings
from vtprune.inference.evidence.answer_parts import AnswerPart, split_answer
from vtprune.inference.evidence.probe import Passes, Probe
from vtprune.inference.forced_answers import append_text, logits_to_keep_argument
from vtprune.inference.generate import Generation, Run, generate, pruned
from vtprune.inference.long_video import StreamPlan, encode_segments
from vtprune.media import Limits
from vtprune.models.base import PIXELS, ReadPlan
from vtprune.models.batch_layout import lay_out_batch
from vtprune.models.structure import find_structure
from vtprune.preset import Preset, StreamSpec
from vtprune.tokens.layout import Layout

if TYPE_CHECKING:
    from vtprune.engine.trace import Trace
    from vtprune.inference.prepare import PreparedQuestion
    from vtprune.models.loading import Loaded

UNPRUNED = Preset("unpruned", keep=1.0)
AT_ONCE = 32
"""Frames of a video that a vision encoder gets at once; of a longer one it gets SEGMENT by SEGMENT.

Its work on many frames takes more memory than any map.
"""
SEGMENT = 8


@dataclass(frozen=True, eq=False)
class ExplainedAnswer:
    """An answer, and what was read while it was generated.

    Args:
        loaded: the model.
        prepared: the prompt.
        run: the answer.
        parts: of it.
        features: the vision encoders' features.
        attention: (m, N) of the answer's tokens to the visual ones; None where it was not read.
    """

    loaded: Loaded
    prepared: PreparedQuestion
    run: Run
    parts: list[AnswerPart]
    features: FeatureCache
    attention: torch.Tensor | None = None

    @property
    def layout(self) -> Layout:
        """The visual tokens before any cut."""
        return self.run.trace.layouts[0]

    def attended(self) -> torch.Tensor | None:
        """Return (N, parts) mean attention of the tokens of each part; None if it was not read."""
        if self.attention is None:
            return None
        rows = self.attention
        parts = [rows[part.first : part.end] for part in self.parts]
        return torch.stack([part.mean(0) if len(part) else rows[-1] for part in parts], dim=1)

    def probe(self, passes: Passes, settings: MapSettings | None = None) -> Probe:
        """Return the probe of this answer; the vision tower does not run again.

        Raises:
            ModelError: what pruning did can't be repeated by masking.
        """
        loaded, prepared = self.loaded, self.prepared
        structure = find_structure(loaded.model)
        answer = self.run.tokens.to(prepared.tensors["input_ids"].device)
        inputs = prepared.for_engine(self.features)
        tensors = append_text(prepared.tensors, answer[:-1])
        with (
            pruned(loaded, UNPRUNED, inputs),
            note_decoder_call(structure) as call,
            torch.no_grad(),
        ):
            loaded.model(**tensors, use_cache=False, **logits_to_keep_argument(loaded, len(answer)))
        always = masked_by_pruning(self.run.trace, int(tensors["input_ids"].shape[1]))
        replay = Replay(structure, call, self.layout.columns, len(answer), always)
        present = torch.ones(len(self.layout), dtype=torch.bool)
        for keys in always:
            if keys.layer == 0:
                present &= ~keys.columns[0, self.layout.columns].cpu()
        edges = [(part.first, part.end) for part in self.parts]
        settings = settings or MapSettings()
        return Probe(
            replay, self.layout, self.run.tokens, edges, present, passes, settings, self.attended()
        )


def encode_in_segments(loaded: Loaded, prepared: PreparedQuestion) -> PreparedQuestion:
    """Return a question with the features of its long video, a few frames encoded at once.

    As it was where it has no long video or other media too, or where its encoder mixes frames.
    """
    media, inputs = prepared.media, prepared.inputs
    item = media.items[0]
    if len(media.items) > 1 or media.stream is not None or len(item.index) <= AT_ONCE:
        return prepared
    structure = find_structure(loaded.model)
    names = [name for name in PIXELS if name in inputs.tensors]
    ids = inputs.tensors["input_ids"]
    vision = {PIXELS[name]: inputs.tensors for name in names}
    valid = torch.ones(ids.shape, dtype=torch.bool)
    transform = item.transform or torch.clone  # not called: the frames are decoded
    plan = StreamPlan(
        item.source, ReadPlan(item.index, transform), StreamSpec(SEGMENT, keep=1.0), UNPRUNED,
        Limits(), decoded=item,
    )  # fmt: skip
    try:
        (layout,), _ = lay_out_batch(structure, ids.cpu(), valid, vision, None, inputs.media)
        video = encode_segments(loaded, structure, plan, media, layout, ids[0, :0], names)
    except ModelError:  # at once, as any other
        return prepared
    return replace(prepared, inputs=replace(inputs, encoded={video.modality: video.encoded}))


def answer_to_explain(
    loaded: Loaded,
    prepared: PreparedQuestion,
    preset: Preset,
    generation: Generation,
    features: FeatureCache,
    attention: bool = True,
) -> ExplainedAnswer:
    """Answer a question, and read what its maps are made of.

    Args:
        attention: read the attention of the answer.

    Raises:
        ModelError: the prompt has no visual tokens, or its video was encoded in segments.
    """
    if prepared.inputs.streamed is not None:
        raise ModelError(
            "a video that is encoded in segments can't be explained: maps need all its tokens",
            "give fewer frames, and a preset without stream",
        )
    structure = find_structure(loaded.model)
    rows = None
    if attention:
        with read_answer_attention(structure) as reading:
            (run,) = generate(loaded, [prepared], preset, generation, features=features)
        length = prepared.tensors["input_ids"].shape[1]
    else:
        (run,) = generate(loaded, [prepared], preset, generation, features=features)
    if not run.trace.layouts or not len(run.trace.layouts[0]):
        raise ModelError("the prompt has no visual tokens to explain the answer by")
    if attention:
        rows = reading.to_visual(run.trace, length)
    parts = split_answer(loaded.files.tokenizer, run.tokens)
    return ExplainedAnswer(loaded, prepared, run, parts, features, rows)


def masked_by_pruning(trace: Trace, length: int) -> list[MaskedKeys]:
    """Return the keys that each stage of a pruned run dropped, as masks over prompt and answer.

    Raises:
        ModelError: the run merged tokens, or gave kept ones other positions.
    """
    columns = trace.layouts[0].columns
    masks = []
    for stage in trace.stages:
        if stage.merged[0] or stage.positions == "renumber":
            what = "merges tokens" if stage.merged[0] else "renumbers the kept tokens"
            raise ModelError(
                f"{stage.method} {what}, which masking can't repeat",
                "explain by attention, or with a method that only drops tokens",
            )
        if stage.layer == 0 and len(stage.kept[0]) == len(columns):
            continue  # it made the media smaller before
        dropped = torch.zeros(1, length, dtype=torch.bool)
        dropped[0, columns[~torch.isin(columns, torch.tensor(stage.kept[0], dtype=torch.long))]] = (
            True
        )
        masks.append(MaskedKeys(stage.layer, dropped))
    return masks
