"""Measure the embedded model on test questions: `python -m vtprune._dev.training.measure WEIGHTS`.

Everything goes the user's way: files are written, decoded, prepared by the official recipe and
answered one by one with `generate`. Beside each kind stand its chance and what the model answers to
blank and to exchanged pictures.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from vtprune._dev.arguments import Parser
from vtprune._dev.training.checkpoint import NUM_FRAMES
from vtprune._dev.training.extra_questions import names_held_out
from vtprune._dev.training.forward import normalise, resize, tiles
from vtprune.demo.questions import KINDS, Question, draw_questions
from vtprune.demo.samples import samples, write_file
from vtprune.demo.score import is_right
from vtprune.demo.world import TILE, generator, make_clip, make_picture

MANNERS = ("seen", "blank", "exchanged")


@dataclass(frozen=True)
class Answered:
    """One question about one file, and what was answered."""

    file: str
    question: Question
    answer: str

    @property
    def right(self) -> bool:
        return is_right(self.question.kind, self.question.answer, self.answer)


def read(path: Path) -> Tensor:
    """A picture (1, 3, H, W) or NUM_FRAMES frames of a clip (T, 3, 112, 112), uint8."""
    if path.suffix == ".png":
        from PIL import Image

        return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
    import av

    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    index = np.arange(0, len(frames), len(frames) / NUM_FRAMES).astype(int)
    clip = torch.from_numpy(np.stack([frames[i] for i in index])).permute(0, 3, 1, 2)
    return resize(clip.contiguous(), TILE, TILE)


def prepare(visual: Tensor, is_clip: bool) -> dict[str, Tensor]:
    """The model's inputs for one picture or clip."""
    if is_clip:
        return {"pixel_values_videos": normalise(visual)[None]}
    size = torch.tensor([visual.shape[-2:]])
    return {"pixel_values": normalise(tiles(visual)), "image_sizes": size}


@torch.no_grad()
def answer(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    visual: Tensor,
    is_clip: bool,
    questions: list[str],
) -> list[str]:
    """Answer questions about one picture or clip, each in a prompt of its own."""
    inputs = prepare(visual, is_clip)
    if is_clip:
        features = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output[0]
    else:
        features = model.model.get_image_features(**inputs).pooler_output[0]
    mark = "<video>" if is_clip else "<image>"
    seen = mark * len(features)
    prompts = [
        f"<|im_start|>user {seen}\n{question}<|im_end|><|im_start|>assistant\n"
        for question in questions
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    embeddings = model.get_input_embeddings()(batch.input_ids)
    places = batch.input_ids == tokenizer.convert_tokens_to_ids(mark)
    embeddings[places] = features.repeat(len(questions), 1)
    out = model.generate(  # type: ignore[misc]
        inputs_embeds=embeddings, attention_mask=batch.attention_mask, max_new_tokens=24
    )
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in out]


def answer_all(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    num: int,
    seed: int,
    split: str,
    manner: str,
) -> list[Answered]:
    """Answer `num` questions; `manner` says what the model is shown."""
    done: list[Answered] = []
    shown: dict[torch.Size, Tensor] = {}
    for sample in samples(num, seed, split):
        path = folder / sample.name
        if not path.exists():
            write_file(path, sample.scene)
        visual = read(path)
        if manner == "blank":
            visual = torch.full_like(visual, 128)
        if manner == "exchanged":
            # The one before of the same kind and size, which has the same number of tokens.
            key = visual.shape
            visual, shown[key] = shown.get(key, torch.full_like(visual, 128)), visual
        questions = [question.text for question in sample.questions]
        answers = answer(model, tokenizer, visual, sample.scene.is_clip, questions)
        done += [
            Answered(sample.name, q, a) for q, a in zip(sample.questions, answers, strict=True)
        ]
    return done


def interval(results: list[Answered], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """A 95 % interval of the share of right answers, files drawn with replacement."""
    by_file: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        by_file[result.file].append(result.right)
    right = np.array([sum(v) for v in by_file.values()])
    count = np.array([len(v) for v in by_file.values()])
    index = np.random.default_rng(seed).integers(len(right), size=(draws, len(right)))
    shares = right[index].sum(axis=1) / count[index].sum(axis=1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)


def guesses(num_scenes: int = 3000) -> dict[str, str]:
    """For each template, the answer that is most often right in train without looking.

    An answer may be a fixed one, or one of the template's own words ("{one}").
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(num_scenes):
        rng = generator("train", 5_000_000, index)
        size = ((112, 112), (224, 224))[index // 2 % 2]
        scene = (
            make_clip("train", 9, index)
            if index % 2
            else make_picture("train", 9, index, size=size)
        )
        for question in draw_questions(scene, rng, 4):
            counts[question.template][question.answer] += 1
            for name, word in fields(question).items():
                if word == question.answer:
                    counts[question.template]["{" + name + "}"] += 1
    return {template: count.most_common(1)[0][0] for template, count in counts.items()}


def fields(question: Question) -> dict[str, str]:
    """The words that fill a question's template: {"one": "red circle moves left", ...}."""
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(question.template))
    match = re.fullmatch(pattern, question.text)
    assert match is not None, question
    return match.groupdict()


def guess(question: Question, best: dict[str, str]) -> str:
    """The best answer without looking."""
    return best.get(question.template, "").format(**fields(question))


def table(results: dict[str, list[Answered]]) -> list[dict[str, object]]:
    """A row for each kind: share right, its interval, chance, blank, exchanged, held-out pairs."""
    best = guesses()
    rows: list[dict[str, object]] = []
    for kind in (*KINDS, "all"):
        of = {m: [r for r in rs if kind in (r.question.kind, "all")] for m, rs in results.items()}
        seen = of["seen"]
        if not seen:
            continue
        held = [r for r in seen if names_held_out(r.question)]
        low, high = interval(seen)
        lucky = [
            is_right(r.question.kind, r.question.answer, guess(r.question, best)) for r in seen
        ]
        rows.append(
            {
                "kind": kind,
                "questions": len(seen),
                "right": _share([r.right for r in seen]),
                "interval": [round(low, 4), round(high, 4)],
                "chance": _share(lucky),
                **{m: _share([r.right for r in of[m]]) for m in results if m != "seen"},
                "held_out": _share([r.right for r in held]) if held else None,
                "held_out_questions": len(held),
            }
        )
    return rows


def _share(values: list[bool]) -> float:
    return round(sum(values) / max(len(values), 1), 4)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--manners", nargs="+", choices=MANNERS, default=list(MANNERS))
    args = parser.parse_args()
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(args.weights).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.weights)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            manner: answer_all(
                model, tokenizer, Path(folder), args.num, args.seed, args.split, manner
            )
            for manner in args.manners
        }
    for row in table(results):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
