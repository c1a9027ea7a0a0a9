"""How much pruning costs the embedded model: `python -m vtprune.demo.redundancy DIR`.

Accuracy by kind of question against keep, for every method at its own place and, at the same layer
and counts, for the baselines, which also stand at the input. With it the entropy curve over the
layers, the accuracy when all visual tokens go at a layer, and how the two norms of the entropy rank
tokens. Resumable: what is in DIR is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vtprune.batching import collate
from vtprune.calibrate import Collapse, entropy_curves, find_collapse
from vtprune.catalog import Calibration
from vtprune.demo import write
from vtprune.demo.questions import KINDS
from vtprune.demo.score import score
from vtprune.encoding import Encoded
from vtprune.engine import pruning
from vtprune.loading import Loaded, load
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.preset import load_preset, override
from vtprune.prompts import encode, to_device
from vtprune.pruners.entropy import token_entropy
from vtprune.run import Generation, gather, pad_id, pruned
from vtprune.upstream import quiet

KEEPS = (0.5, 0.3, 0.2, 0.1, 0.05)
SEEDS = 5
BATCH = 16
CURVES = 60  # prompts whose states are looked at
LONGEST = 48  # tokens of an answer


@dataclass(frozen=True)
class Cell:
    """One way to prune: its name in the tables, its stage, its keep and seed."""

    name: str
    stage: Mapping[str, object]
    keep: float | None
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.name}|{self.keep}|{self.seed}"


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the model."""

    file: str
    kind: str
    answer: str
    tensors: Mapping[str, torch.Tensor]


def cells(num_layers: int) -> list[Cell]:
    """The unpruned model, every method at every keep, and dropping all at every layer."""
    made = [Cell("unpruned", {"at": "input", "method": "random"}, 1.0)]
    for keep in KEEPS:
        for norm in ("row", "none"):
            stage = {"at": "ecl", "method": "entropy", "norm": norm}
            made.append(Cell(f"entropy ({norm}) at ecl", stage, keep))
        for place in ("ecl", "input"):
            made.append(Cell(f"uniform at {place}", {"at": place, "method": "uniform"}, keep))
            for seed in range(SEEDS):
                stage = {"at": place, "method": "random"}
                made.append(Cell(f"random at {place}", stage, keep, seed))
    for layer in range(num_layers):
        made.append(Cell(f"drop all at {layer}", {"at": layer, "method": "vtw", "keep": 0}, None))
    return made


def prompts(loaded: Loaded, folder: Path, lines: Sequence[Mapping[str, str]]) -> Iterator[Prompt]:
    """Every question as the model's inputs; files are read once."""
    read: dict[str, object] = {}
    for line in lines:
        if line["file"] not in read:
            read = {line["file"]: gather(loaded, [folder / line["file"]], Sampling(), Limits())}
        inputs = encode(loaded, read[line["file"]], line["question"], Generation())  # type: ignore[arg-type]
        yield Prompt(line["file"], line["kind"], line["answer"], inputs.tensors)


def batches(items: Sequence[Prompt]) -> list[list[Prompt]]:
    """Prompts of like length together, and clips apart from pictures."""
    ordered = sorted(items, key=lambda one: ("pixel_values_videos" in one.tensors,
                                             one.tensors["input_ids"].shape[1]))  # fmt: skip
    groups: dict[object, list[Prompt]] = defaultdict(list)
    for one in ordered:
        video = one.tensors.get("pixel_values_videos")
        groups[None if video is None else video.shape[1]].append(one)
    return [
        group[start : start + BATCH]
        for group in groups.values()
        for start in range(0, len(group), BATCH)
    ]


def answer_cell(
    loaded: Loaded, batch: Sequence[Prompt], tensors: Mapping[str, torch.Tensor], cell: Cell,
    encoded: Encoded,
) -> list[float]:  # fmt: skip
    """The score of every prompt of a batch under one way to prune."""
    preset = override(load_preset({"stages": [cell.stage]}), cell.keep, seed=cell.seed)
    runs = pruned(loaded, tensors, preset, Generation(LONGEST), encoded=encoded)
    return [score(one.kind, one.answer, run.answer) for one, run in zip(batch, runs, strict=True)]


@torch.no_grad()
def rank_norms(loaded: Loaded, items: Sequence[Prompt], layer: int) -> dict[str, float]:
    """Spread of each norm's scores, and their rank agreement, over the states before a layer."""
    kept: dict[str, torch.Tensor] = {}
    projection = loaded.model.get_decoder().layers[layer - 1].self_attn.q_proj
    handle = projection.register_forward_hook(lambda *call: kept.update(query=call[2]))
    spreads: dict[str, list[float]] = {"row": [], "none": []}
    agreements = []
    heads = loaded.model.get_decoder().config.num_attention_heads
    try:
        for one in items:
            with pruning(loaded.model, keep=1.0) as trace:
                loaded.model(**to_device(loaded, one.tensors), use_cache=False)
            states = kept["query"][0, trace.layouts[0].columns].unflatten(-1, (heads, -1))
            scores = {norm: token_entropy(states, norm) for norm in spreads}
            for norm, values in scores.items():
                spreads[norm].append(float(values.std() / values.mean().abs()))
            ranks = [values.argsort().argsort().double() for values in scores.values()]
            agreements.append(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    finally:
        handle.remove()
    return {
        "spread_row": float(np.mean(spreads["row"])),
        "spread_none": float(np.mean(spreads["none"])),
        "rank_agreement": float(np.mean(agreements)),
    }


def calibrated(loaded: Loaded, items: Sequence[Prompt]) -> tuple[Loaded, Collapse]:
    """The model with the entropy collapse layer of its own curves."""
    with quiet():
        curves = entropy_curves(loaded, [to_device(loaded, one.tensors) for one in items])
    found = find_collapse(curves)
    num_layers = len(loaded.model.get_decoder().layers)
    own = Calibration(found.layer, num_layers - 1, None, {}, "measured")
    return replace(loaded, calibration=own), found


def measure(folder: Path, split: str, num: int, seed: int, weights: str | None) -> None:
    """Fills `folder` with results.jsonl, a line a batch, and states.json."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = write(folder / "samples", num, seed, split)
    loaded = load(weights)
    items = list(prompts(loaded, folder / "samples", lines))
    step = max(1, len(items) // CURVES)
    loaded, collapse = calibrated(loaded, items[::step][:CURVES])
    states = {"curve": collapse.curve, "ecl": collapse.layer, "share": collapse.share,
              **rank_norms(loaded, items[::step][:CURVES], collapse.layer)}  # fmt: skip
    (folder / "states.json").write_text(json.dumps(states, indent=2))
    results = folder / "results.jsonl"
    done = len(results.read_text().splitlines()) if results.exists() else 0
    ways = cells(len(loaded.model.get_decoder().layers))
    for number, batch in enumerate(batches(items)):
        if number < done:
            continue
        tensors = to_device(loaded, collate([one.tensors for one in batch], pad_id(loaded)))
        encoded: Encoded = {}
        scores = {cell.key: answer_cell(loaded, batch, tensors, cell, encoded) for cell in ways}
        line = {"files": [one.file for one in batch], "kinds": [one.kind for one in batch],
                "scores": scores}  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{number + 1} batches, {sum(s == 1 for s in scores['unpruned|1.0|0'])} of "
              f"{len(batch)} right unpruned", flush=True)  # fmt: skip


def summarise(folder: Path) -> str:
    """The tables, in Markdown."""
    scores: dict[str, list[float]] = defaultdict(list)
    kinds: list[str] = []
    for text in (folder / "results.jsonl").read_text().splitlines():
        line = json.loads(text)
        kinds += line["kinds"]
        for key, values in line["scores"].items():
            scores[key] += values
    right = {key: np.array(values) == 1 for key, values in scores.items()}
    by_cell: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for key, values in right.items():
        name, keep, _ = key.split("|")
        by_cell[name, keep].append(values)
    kind = np.array(kinds)
    shown = [one for one in KINDS if (kind == one).any()]
    head = f"| keep | method | all | {' | '.join(shown)} |"
    rows = [head, "| --- | --- " + "| --- " * (len(shown) + 1) + "|"]
    drops = []
    for (name, keep), runs in by_cell.items():
        mean = np.mean(runs, axis=0)
        cells_ = [f"{mean.mean():.1%}", *(f"{mean[kind == one].mean():.1%}" for one in shown)]
        row = f"| {keep} | {name} | {' | '.join(cells_)} |"
        if name.startswith("drop all at "):
            drops.append(row.replace(f"| {keep} | drop all at ", "| "))
        else:
            rows.append(row)
    counts = " | ".join(str(int((kind == one).sum())) for one in shown)
    rows.append(f"|  | questions | {len(kind)} | {counts} |")
    head = f"| all dropped from layer | all | {' | '.join(shown)} |"
    return "\n".join([*rows, "", head, "| --- " * (len(shown) + 2) + "|", *drops])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", help="a checkpoint; default: the packaged one")
    parser.add_argument("--summary", action="store_true", help="print the tables of what is there")
    args = parser.parse_args()
    if not args.summary:
        measure(args.folder, args.split, args.questions, args.seed, args.weights)
    print(summarise(args.folder))


if __name__ == "__main__":
    main()
