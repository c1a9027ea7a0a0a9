"""Clips as mp4, pictures as png and their questions, written to a folder."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vtprune.demo.draw import Frame, frame
from vtprune.demo.questions import Question, draw_questions
from vtprune.demo.world import SPLITS, TILE, Scene, generator, make_clip, make_picture
from vtprune.errors import VtpruneError
from vtprune.saving import save_file

MOST_QUESTIONS = 4
FRAMES_PER_SECOND = 8
# Twice the tile, so that a codec's halved colour is still that of every pixel read.
CLIP_SIDE = 2 * TILE
CLIP_FRAMES = (16, 24, 32)
# Height and width in pixels, and how often.
PICTURE_SIZES = (
    ((112, 112), 0.3),
    ((224, 224), 0.34),
    ((336, 336), 0.1),
    ((112, 224), 0.06),
    ((224, 112), 0.06),
    ((200, 180), 0.07),
    ((260, 320), 0.07),
)


@dataclass(frozen=True)
class Sample:
    """A file to write: its name, its scene and the questions about it."""

    name: str
    scene: Scene
    questions: tuple[Question, ...]


def samples(num: int, seed: int, split: str) -> Iterator[Sample]:
    """Draw clips and pictures in turn, with `num` questions; the first asks what happens."""
    left, index = num, 0
    while left > 0:
        rng = generator(split, seed + 4_000_000, index)
        if index % 2 == 0:
            num_frames = CLIP_FRAMES[int(rng.integers(len(CLIP_FRAMES)))]
            scene = make_clip(split, seed, index, num_frames=num_frames, size=CLIP_SIDE)
        else:
            shares = np.array([share for _, share in PICTURE_SIZES])
            size = PICTURE_SIZES[int(rng.choice(len(PICTURE_SIZES), p=shares / shares.sum()))][0]
            scene = make_picture(split, seed, index, size=size)
        questions = draw_questions(scene, rng, MOST_QUESTIONS)
        if index == 0:
            others = [q for q in questions if q.kind != "what_happens"]
            questions = draw_questions(scene, rng, 1, ("what_happens",)) + others
        questions = questions[: min(left, MOST_QUESTIONS)]
        if questions:
            name = f"clip-{index:03d}.mp4" if scene.is_clip else f"picture-{index:03d}.png"
            yield Sample(name, scene, tuple(questions))
        left -= len(questions)
        index += 1


def frames_of(scene: Scene) -> Frame:
    """Draw all frames of a scene, (T, H, W, 3); a picture has one."""
    times = np.linspace(0, 1, scene.num_frames) if scene.is_clip else np.zeros(1)
    return np.stack([frame(scene, float(time)) for time in times])


def write_samples(directory: Path, num: int, seed: int, split: str) -> list[dict[str, str]]:
    """Write samples; see `vtprune.demo.write`."""
    if num < 1:
        raise VtpruneError(f"num is {num}: the number of questions must be at least 1")
    if split not in SPLITS:
        raise VtpruneError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}")
    if directory.exists() and not directory.is_dir():
        raise VtpruneError(f"{directory} is a file: samples need a folder", "name a new folder")
    lines, places = [], {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A file without a name: a run that is killed here leaves nothing behind.
        with tempfile.TemporaryFile(dir=directory) as buffer:
            for sample in samples(num, seed, split):
                data = encode(sample.scene)
                places[sample.name] = (buffer.tell(), len(data))
                buffer.write(data)
                for question in sample.questions:
                    lines.append(
                        {
                            "file": sample.name,
                            "question": question.text,
                            "answer": question.answer,
                            "kind": question.kind,
                        }
                    )
            for name, (start, length) in places.items():
                buffer.seek(start)
                save_file(directory / name, buffer.read(length), "DIR")
    except OSError as error:
        message = f"samples can't be written to {directory}: {error.strerror or error}"
        raise VtpruneError(
            message, "name another folder, or make room if the disk is full"
        ) from error
    # The list of questions goes last: it never names a file that is not there.
    text = "".join(json.dumps(line) + "\n" for line in lines)
    save_file(directory / "questions.jsonl", text.encode(), "DIR")
    return lines


def write_file(path: Path, scene: Scene) -> None:
    """Write one scene as png or mp4."""
    path.write_bytes(encode(scene))


def encode(scene: Scene) -> bytes:
    """Return one scene as png, or as mp4 with so little loss that a model reads it alike."""
    if scene.is_clip:
        return _encode_clip(frames_of(scene))
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frames_of(scene)[0]).save(file, "png", optimize=False)
    return file.getvalue()


def _encode_clip(frames: Frame) -> bytes:
    import av
    from av.video.stream import VideoStream

    try:
        av.codec.Codec("libx264", "w")
        # x264's look-ahead gives other bytes now and then; without it, the file is always the same.
        repeatable = "mbtree=0:rc-lookahead=0:scenecut=0:bframes=0"
        codec, options = "libx264", {"crf": "10", "preset": "veryfast", "threads": "1"}
        options["x264-params"] = repeatable
    except ValueError:  # av.codec.codec.UnknownCodecError: a build without H.264
        codec, options = "mpeg4", {"qscale": "2", "threads": "1"}
    file = io.BytesIO()
    with av.open(file, "w", "mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=FRAMES_PER_SECOND, options=options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
