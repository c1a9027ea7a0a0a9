"""A video asked about segment by segment in time, and then as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from vtprune.errors import MediaError
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.generate import Generation
from vtprune.inference.report import Report
from vtprune.media import Limits, Source
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, Progress
from vtprune.preset import Preset

MOST = 1000  # segments of one video
INSTANT = 1e-6  # seconds, so that no frame is in two segments

Span = tuple[float, float]
"""Seconds at which a segment begins and ends."""


def time_segments(source: Source, minutes: float, sampling: Sampling) -> list[Span]:
    """Return the segments of a video, between start and end; those without a frame left out.

    Raises:
        MediaError: a picture, or more than `MOST` segments.
    """
    if source.kind != "video":
        raise MediaError(
            f"{source.name} is a picture, which has no segments", "leave --per-segment out"
        )
    first = source.timestamps[0] if sampling.start is None else sampling.start
    stop = max(source.timestamps[-1], first + INSTANT)  # a video of one frame takes no time
    last = stop if sampling.end is None else sampling.end
    length = 60 * minutes
    count = max(1, math.ceil((last - first) / length - INSTANT))
    if count > MOST:
        raise MediaError(
            f"{source.name}: {count:,} segments of {minutes:g} minutes; {MOST:,} are the most",
            f"give longer ones: --segment {math.ceil((last - first) / 60 / MOST * 10) / 10:g}",
        )
    starts = [first + number * length for number in range(count)]
    spans = [(start, start + length - INSTANT) for start in starts[:-1]] + [(starts[-1], last)]
    return [
        (start, end)
        for start, end in spans
        if any(start <= moment <= end for moment in source.timestamps)
    ]


def answer_by_segment(
    loaded: Loaded,
    source: Source,
    questions: Sequence[str],
    preset: Preset,
    minutes: float,
    *,
    sampling: Sampling,
    generation: Generation,
    limits: Limits,
    since: float | None = None,
    startup: float = 0.0,
    on_segment: Callable[[Span | None], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    on_question: Callable[[int, str], None] | None = None,
    on_progress: Progress | None = None,
) -> Iterator[Report]:
    """Answer questions about each segment of a video, and then about all of it.

    Args:
        minutes: of a segment.
        on_segment: hears of each before it is answered; of None before the video as a whole.
        loaded, questions, preset, sampling, generation, limits, since, startup, on_text,
        on_question, on_progress: as of `answer_questions`.

    Yields:
        a report a question and segment, its times in `segment`; then one a question.

    Raises:
        MediaError, ModelError, PresetError: with the way out.
    """
    for span in [*time_segments(source, minutes, sampling), None]:
        if on_segment:
            on_segment(span)
        part = sampling if span is None else replace(sampling, start=span[0], end=span[1])
        for report in answer_questions(
            loaded, [source], questions, preset, sampling=part, generation=generation,
            limits=limits, since=since, startup=startup, on_text=on_text, on_question=on_question,
            on_progress=on_progress,
        ):  # fmt: skip
            yield report if span is None else replace(report, segment=(span[0], span[1]))
        since, startup = None, 0.0  # later spans load nothing
