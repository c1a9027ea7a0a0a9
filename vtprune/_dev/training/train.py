"""Train a model of the world from nothing: `python -m vtprune._dev.training.train --out DIR`.

First the tower alone on the world's dense labels (per patch: colour, shape, digits; the heads are
thrown away), then everything on questions with a loss on answers only. Both parts resume from DIR
after an interruption.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from vtprune._dev.arguments import Parser
from vtprune._dev.training.architecture import NAMES, Architecture, architecture
from vtprune._dev.training.batches import make_batch, training_batch
from vtprune._dev.training.forward import answer_states
from vtprune._dev.training.heads import Hints
from vtprune._dev.training.hints import IGNORED
from vtprune._dev.training.packed import decoder_layer
from vtprune._dev.training.running import (
    average_gradients,
    log,
    optimisers,
    ranks,
    restore,
    schedule,
    set_rates,
    write_atomically,
)
from vtprune.demo.questions import KINDS

# How many batches of each layout the accuracy on dev is taken from.
DEV = (
    ("picture", 5),
    ("picture 2x2", 4),
    ("picture 3x3", 2),
    ("picture 260x320", 1),
    ("clip 8", 6),
    ("clip 16", 2),
)


def train_tower(subject: Architecture, model: Any, args: argparse.Namespace) -> None:
    """Pretrain the tower on patch labels; its weights go to `tower.pt`."""
    device, out = torch.device(args.device), args.out
    tower = subject.tower(model)
    state_path = out / "tower.pt"
    torch.manual_seed(args.seed)
    heads = subject.make_dense(model).to(device)
    optims = optimisers([(tower, 4e-3), (heads, 4e-3)])
    first, seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=device)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        first, seconds = state["step"], state["seconds"]
        if first >= args.tower_steps:
            return
        restore(optims, state["optimisers"])
    begin = time.monotonic() - seconds
    rank, processes = share = ranks()
    for step in range(first, args.tower_steps):
        set_rates(optims, schedule(step, args.tower_steps, 50, 0.4))
        draw = args.seed, step, subject.dense_tiles[0] // processes
        loss, right = subject.dense_loss(model, heads, draw, share, device)
        loss.backward()
        average_gradients([*tower.parameters(), *heads.parameters()])
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        if rank == 0 and ((step + 1) % 50 == 0 or step + 1 == args.tower_steps):
            log(
                out / "tower.jsonl",
                step=step + 1,
                seconds=round(time.monotonic() - begin, 1),
                loss=round(loss.item(), 4),
                right=right,
            )
        if rank == 0 and ((step + 1) % 200 == 0 or step + 1 == args.tower_steps):
            write_atomically(
                state_path,
                {
                    "tower": tower.state_dict(),
                    "heads": heads.state_dict(),
                    "optimisers": [optim.state_dict() for optim in optims],
                    "step": step + 1,
                    "seconds": time.monotonic() - begin,
                },
            )


def read_tower(path: Path, steps: int) -> dict[str, Any]:
    """A trained tower and its heads, of a file of `save_tower`, as `tower.pt` holds them."""
    parts: dict[str, dict[str, Tensor]] = {"tower": {}, "heads": {}}
    for name, value in load_file(path).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value.float()
    return {**parts, "step": steps, "seconds": 0.0}


def save_tower(state: Path, path: Path) -> None:
    """Write the tower and its heads out of a `tower.pt`, without optimisers, in float16."""
    saved = torch.load(state, map_location="cpu")
    tensors = {
        f"{part}.{name}": value.to(torch.float16).contiguous()
        for part in ("tower", "heads")
        for name, value in saved[part].items()
    }
    save_file(tensors, path, metadata={"steps": str(saved["step"])})


@torch.no_grad()
def dev_accuracy(subject: Architecture, model: Any, device: torch.device) -> dict[str, float]:
    """Accuracy by kind on fixed dev scenes.

    An answer is right where each of its tokens is the likeliest: that is what greedy decoding would
    give, without decoding.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    model.eval()
    rank, processes = ranks()
    jobs = [(name, number) for name, num in subject.dev for number in range(num)]
    for name, number in jobs[rank::processes]:
        batch = make_batch(subject, "dev", 0, number, subject.layouts[name])
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits, targets = answer_states(subject, model, batch, device, decoder_layer)
        hits = torch.zeros(batch.targets.shape, dtype=torch.bool)
        wanted = torch.from_numpy(batch.targets) != IGNORED
        hits[wanted] = (logits.argmax(-1) == targets).cpu()
        missed = wanted & ~hits
        segments = torch.from_numpy(batch.segments)
        for i, questions in enumerate(batch.questions):
            wrong = set(segments[i][missed[i]].tolist())
            for j, question in enumerate(questions, start=1):
                right[question.kind].append(j not in wrong)
    counts = torch.tensor(
        [[sum(right[kind]), len(right[kind])] for kind in KINDS], dtype=torch.float64
    )
    if processes > 1:
        distributed.all_reduce(counts)
    return {
        kind: round(float(r / max(n, 1)), 4) for kind, (r, n) in zip(KINDS, counts, strict=True)
    }


class TrainingRun:
    """The training on questions: what it has reached, one step of it, and the file it resumes from.

    Args:
        best: the best mean accuracy on dev; `snapshot/` holds the averaged weights that had it.
    """

    def __init__(self, subject: Architecture, model: Any, args: argparse.Namespace):
        self.subject, self.model, self.args, self.out = subject, model, args, args.out
        self.device = torch.device(args.device)
        tower = torch.load(self.out / "tower.pt", map_location=self.device)
        self.heads = subject.make_dense(model).to(self.device)
        self.heads.load_state_dict(tower["heads"])
        subject.start(model, self.heads, args.seed, args.tower_steps)
        start = len(subject.tokenizer.encode(subject.prefix).ids)
        width = model.config.get_text_config().hidden_size
        self.hints = Hints(width, start, subject.probes, subject.attention_hints).to(self.device)
        parts, singles = subject.groups(model)
        self.optims = optimisers(parts)
        others = [(list(self.heads.parameters()), 1e-3), (list(self.hints.parameters()), 3e-3)]
        others += [(singles, 2e-3)] if singles else []
        for parameters, rate in others:
            group = {"params": parameters, "lr": rate, "full": rate}
            self.optims.append(torch.optim.AdamW([group]))
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.step, self.best, self.begin = 0, 0.0, time.monotonic()
        self.compiled = decoder_layer
        if args.compile:
            torch._dynamo.config.cache_size_limit = 64
            self.compiled = torch.compile(decoder_layer, dynamic=False)
        if (self.out / "train.pt").exists():
            self.load(torch.load(self.out / "train.pt", map_location=self.device))

    @property
    def seconds(self) -> float:
        """How long the run has taken, interruptions left out."""
        return time.monotonic() - self.begin

    def load(self, state: dict[str, Any]) -> None:
        """Go on where a run stopped."""
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.heads.load_state_dict(state["heads"])
        self.hints.load_state_dict(state["hints"])
        restore(self.optims, state["optimisers"])
        self.step, self.best = state["step"], state["best"]
        self.begin = time.monotonic() - state["seconds"]

    def save(self) -> None:
        """Keep what `load` needs."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "heads": self.heads.state_dict(),
            "hints": self.hints.state_dict(),
            "optimisers": [optim.state_dict() for optim in self.optims],
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
        }
        write_atomically(self.out / "train.pt", state)

    def learn(self) -> tuple[str, float, list[float]]:
        """One step: what it was of, its loss, and what share of each hint was right."""
        args, model, number = self.args, self.model, self.step
        subject, share = self.subject, ranks()
        tower = subject.tower(model)
        batch = training_batch(subject, args.seed, number, share)
        model.train()
        set_rates(self.optims, schedule(number, args.steps, 100, args.decay))
        layer = self.compiled if batch.layout.name in subject.compiled else decoder_layer
        # The tower learns once the decoder reads it; from clips every second time: they cost more.
        learns = batch.layout.num_frames == 1 or number % 2 == 0
        tower.requires_grad_(number >= args.unfreeze and learns)
        hinted, right = number >= args.hints, list[float]()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            watch = self.hints.watch if hinted else None
            logits, targets = answer_states(subject, model, batch, self.device, layer, watch)
        loss = whole = F.cross_entropy(logits, targets)
        if hinted:
            hint, right = self.hints.loss(batch, model.model.language_model.layers)
            whole = loss + subject.hint_weight * hint
        whole.backward()
        if number >= args.unfreeze:
            tower.requires_grad_(True)
            draw = args.seed + 1, number, subject.dense_tiles[1] // share[1]
            dense, _ = subject.dense_loss(model, self.heads, draw, share, self.device)
            (0.3 * dense).backward()
        modules = (model, self.heads, self.hints)
        average_gradients([one for module in modules for one in module.parameters()])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in self.optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            pull = 1 - min(0.995, self.step / (self.step + 19))
            for name, value in model.state_dict().items():
                self.average[name].lerp_(value.float(), pull)
        return batch.layout.name.split()[0], loss.item(), right

    def evaluate(self) -> None:
        """Accuracy of the averaged weights on dev; a snapshot where it is the best so far."""
        model = self.model
        current = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.average)
        kinds = dev_accuracy(self.subject, model, self.device)
        mean = sum(kinds.values()) / len(kinds)
        if ranks()[0] == 0:
            if mean > self.best:
                self.best = mean
                self.subject.save(model, self.out / "snapshot")
                accuracy = {"step": self.step, "dev": mean, "kinds": kinds}
                (self.out / "snapshot.json").write_text(json.dumps(accuracy))
            log(
                self.out / "dev.jsonl",
                step=self.step,
                seconds=round(self.seconds, 1),
                mean=round(mean, 4),
                kinds=kinds,
            )
        model.load_state_dict(current)


def train(subject: Architecture, model: Any, args: argparse.Namespace) -> None:
    """Train everything on questions; the best averaged weights go to `snapshot/`."""
    run = TrainingRun(subject, model, args)
    first = ranks()[0] == 0
    losses: dict[str, list[float]] = defaultdict(list)
    hints: dict[str, list[float]] = {}
    while run.step < args.steps:
        name, loss, right = run.learn()
        losses[name].append(loss)
        if right:
            hints["clip" if name == "clip" else "picture"] = right
        if first and run.step % 20 == 0:
            means = {name: round(sum(v) / len(v), 4) for name, v in losses.items()}
            seconds = round(run.seconds, 1)
            log(args.out / "loss.jsonl", step=run.step, seconds=seconds, loss=means, hints=hints)
            losses.clear()
        if run.step % args.evaluate_every == 0 or run.step == args.steps:
            run.evaluate()
            if first:
                run.save()


def work(rank: int, args: argparse.Namespace) -> None:
    """One process: its share of every batch, one thread, gradients averaged once a step."""
    if args.processes > 1:
        torch.set_num_threads(1)
        meeting = f"file://{args.out.resolve()}/meeting"
        distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=args.processes
        )
    subject = architecture(args.architecture)
    model = subject.make_model(args.seed).to(args.device)
    if args.compile:
        subject.compile_tower(model)
    if args.tower and rank == 0 and not (args.out / "tower.pt").exists():
        write_atomically(args.out / "tower.pt", read_tower(args.tower, args.tower_steps))
    if ranks()[1] > 1:
        distributed.barrier()
    train_tower(subject, model, args)
    if ranks()[1] > 1:
        distributed.barrier()
    tower = torch.load(args.out / "tower.pt", map_location=args.device)["tower"]
    subject.tower(model).load_state_dict(tower)
    train(subject, model, args)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoints, logs and snapshots"
    )
    parser.add_argument("--architecture", choices=NAMES, default=NAMES[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, help="default: the architecture's")
    parser.add_argument("--tower", type=Path, help="a trained tower to begin with (`save_tower`)")
    parser.add_argument("--steps", type=int, help="default: the architecture's")
    parser.add_argument(
        "--unfreeze", type=int, default=100, help="the step from which the tower learns too"
    )
    parser.add_argument("--decay", type=float, help="the last part of the steps, of falling rate")
    parser.add_argument("--hints", type=int, help="the step from which hints are asked for")
    parser.add_argument("--evaluate-every", type=int, default=150)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--processes", type=int, default=2, help="CPU processes of one thread each; 1 on a GPU"
    )
    args = parser.parse_args()
    subject = architecture(args.architecture)
    defaults = zip(
        ("tower_steps", "steps", "hints", "decay"), (*subject.steps, subject.decay), strict=True
    )
    for name, value in defaults:
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "meeting").unlink(missing_ok=True)
    if args.processes == 1:
        work(0, args)
    else:
        torch.multiprocessing.spawn(work, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
