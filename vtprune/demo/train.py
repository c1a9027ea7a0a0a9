"""Train the embedded model from nothing: `python -m vtprune.demo.train --out DIR`.

First the tower alone on the world's dense labels (per patch: colour, shape, digits; the heads are
thrown away), then everything on questions with a loss on answers only. Both parts resume from DIR
after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from .batches import (
    LAYOUTS,
    PREFIX,
    Batch,
    TileBatch,
    make_batch,
    tile_batch,
    training_batch,
)
from .checkpoint import PINPOINTS, make_model, make_tokenizer, save
from .hints import IGNORED, NAME_CLASSES, TOKEN_CLASSES
from .muon import Muon
from .packed import decoder_layer, read_packed
from .questions import KINDS
from .world import COLOURS, SHAPES, TILE

COMPILED = ("one of several", "picture", "picture 2x2", "clip 8")
# How many batches of each layout the accuracy on dev is taken from.
DEV = (
    ("picture", 5),
    ("picture 2x2", 4),
    ("picture 3x3", 2),
    ("picture 260x320", 1),
    ("clip 8", 6),
    ("clip 16", 2),
)
# The layers after which the hints are asked for, at visual tokens and at names.
TOKEN_LAYER, NAME_LAYER = 6, 9
Layer = Callable[..., Tensor]


def tiles(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) to tiles (B, n, 3, 112, 112), the base picture first, all uint8.

    This is the official recipe, for pictures of one size; padding is black.
    """
    height, width = pictures.shape[-2:]
    tall, wide = select_best_resolution((height, width), PINPOINTS)
    scale = min(tall / height, wide / width)
    size = (
        min(-(-int(height * scale * 1e6) // 10**6), tall),
        min(-(-int(width * scale * 1e6) // 10**6), wide),
    )
    whole = resize(pictures, *size)
    top, left = (tall - size[0]) // 2, (wide - size[1]) // 2
    whole = F.pad(whole, (left, wide - size[1] - left, top, tall - size[0] - top))
    cut = whole.unfold(2, TILE, TILE).unfold(3, TILE, TILE)  # (B, 3, rows, columns, 112, 112)
    cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    return torch.cat((resize(pictures, TILE, TILE)[:, None], cut), dim=1)


def resize(pictures: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased, on uint8, as the processors do."""
    if pictures.shape[-2:] == (height, width):
        return pictures
    return F.interpolate(pictures, (height, width), mode="bicubic", antialias=True)


def normalise(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def visual_tokens(
    model: LlavaOnevisionForConditionalGeneration, batch: Batch, device: torch.device
) -> Tensor:
    """The visual tokens (B, N, D) of a batch, packed by the model's own functions."""
    pixels = torch.from_numpy(batch.pixels).to(device)
    if batch.layout.num_frames > 1:
        return model.model.get_video_features(normalise(pixels)).pooler_output
    sizes = torch.tensor([[batch.layout.height, batch.layout.width]] * len(pixels), device=device)
    if batch.layout.name == "one of several":
        # A picture among others in one prompt is not tiled: the model sees its base picture only.
        several = torch.tensor([len(pixels), 0])
        features = model.model.get_image_features(
            normalise(pixels[:, 0]), sizes, batch_num_images=several
        )
        return torch.stack(list(features.pooler_output))
    features = model.model.get_image_features(normalise(tiles(pixels[:, 0])), sizes)
    return torch.stack(list(features.pooler_output))


def answer_states(
    model: LlavaOnevisionForConditionalGeneration,
    batch: Batch,
    device: torch.device,
    layer: Layer,
    watch: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) and targets (n,) at every answer token of a batch, row by row."""
    visual = visual_tokens(model, batch, device)
    embed = model.get_input_embeddings()
    start = torch.tensor(make_tokenizer().encode(PREFIX).ids, device=device)
    prefix = torch.cat((embed(start).expand(len(visual), -1, -1), visual.float()), dim=1)
    tokens = torch.from_numpy(batch.tokens).to(device)
    targets = torch.from_numpy(batch.targets).to(device)
    states = read_packed(model.model.language_model, prefix, embed(tokens), layer, watch)
    wanted = targets != IGNORED
    return model.lm_head(states[wanted]).float(), targets[wanted]


class Hints(nn.Module):
    """Heads on the decoder's states in the middle: what `hints` says of names and visual tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, size) for size in sizes)
            for sizes in (TOKEN_CLASSES, NAME_CLASSES)
        )
        self.states: list[Tensor] = []

    def watch(self, number: int, states: Tensor) -> None:
        """Keep what comes out of the two layers that are asked."""
        if number in (TOKEN_LAYER, NAME_LAYER):
            self.states.append(states)

    def loss(self, batch: Batch, start: int) -> tuple[Tensor, list[float]]:
        """The mean loss of the heads that a batch has labels for, and each head's share of right.

        `start` is the position of the first visual token; what was watched is forgotten.
        """
        early, late = self.states
        self.states = []
        marks, names = torch.from_numpy(batch.marks), torch.from_numpy(batch.names).flatten(1, 2)
        asked = (early[:, start : start + marks.shape[1]], late[:, -names.shape[1] :])
        losses, right = [], []
        for norm, heads, states, labels in zip(
            self.norms, self.heads, asked, (marks, names), strict=True
        ):
            for i, head in enumerate(heads):  # type: ignore[arg-type]
                label = labels[..., i].to(states.device)
                wanted = label != IGNORED
                if not wanted.any():
                    right.append(-1.0)
                    continue
                logits = head(norm(states[wanted].float())).float()
                losses.append(F.cross_entropy(logits, label[wanted]))
                right.append(round(float((logits.argmax(-1) == label[wanted]).float().mean()), 3))
        return torch.stack(losses).mean(), right


class Dense(nn.Module):
    """Heads on the tower's patches: what `draw.labels` says of them, and each patch's own place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        sizes = (len(COLOURS) + 1, len(SHAPES) + 1, 11, 11, 3, 10, 64)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, states: Tensor) -> list[Tensor]:
        states = self.norm(states)
        return [head(states) for head in self.heads]

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each head; the last one's 64 places as 8 rows and 8 columns."""
        rows: list[tuple[Tensor, Tensor]] = []
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            rows.append((head.weight, head.bias))
        weight, bias = rows.pop()
        weight, bias = weight.view(8, 8, -1), bias.view(8, 8)
        return [*rows, *((weight.mean(axis), bias.mean(axis)) for axis in (1, 0))]


def dense_loss(
    tower: nn.Module, heads: Dense, batch: TileBatch, device: torch.device
) -> tuple[Tensor, list[float]]:
    """The loss of a batch of tiles and, for each head, the share of its patches that are right.

    Without the last head, where a patch lies would be lost: no other label asks for it.
    """
    pixels = normalise(torch.from_numpy(batch.pixels).to(device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        states = tower(pixels, output_hidden_states=True).hidden_states[-1]
        logits = heads(states.float())
    places = torch.arange(64).expand(len(pixels), 64)
    labels = [*torch.from_numpy(batch.labels), places]
    losses, right = [], []
    for i, (head, label) in enumerate(zip(logits, labels, strict=True)):
        label = label.to(device)
        shown = label > 0 if i < 6 else torch.ones_like(label, dtype=torch.bool)
        loss = F.cross_entropy(head.float().flatten(0, 1), label.flatten(), reduction="none")
        # Patches that show something weigh as much as all the ground together.
        weight = (0.3 + (6.0 if i in (2, 3) else 3.0) * shown.flatten()) if i < 6 else 0.3
        losses.append((loss * weight).mean())
        hits = (head.argmax(-1) == label) & shown
        right.append(round(float(hits.sum() / shown.sum().clamp(min=1)), 4))
    return torch.stack(losses).sum(), right


@torch.no_grad()
def start_projector(
    model: LlavaOnevisionForConditionalGeneration, heads: Dense, batch: TileBatch, seed: int
) -> None:
    """Let some of the projector's units begin as the pretraining's heads, all equally loud.

    The tower's states tell colours loudly, shapes and places faintly, and a decoder learns to look
    by what is loud long before it looks by what is faint. Each class gets a unit of the projector's
    hidden layer and a direction of its own in the decoder's width; the rest stays random.
    """
    pixels = normalise(torch.from_numpy(batch.pixels).to(model.device))
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    states = states.flatten(0, 1)
    centre = torch.eye(states.shape[-1], device=states.device) - 1 / states.shape[-1]
    spread = states.std(-1, unbiased=False).mean()
    rows, biases = [], []
    for weight, bias in heads.rows():
        weight, bias = weight - weight.mean(0), bias - bias.mean()
        # The head's LayerNorm, with every token's spread taken as the mean one.
        row = (weight * heads.norm.weight) @ centre / spread
        offset = weight @ heads.norm.bias + bias
        loudest = (states @ row.T + offset).max(dim=-1).values.mean()
        rows.append(3 / loudest * row)
        biases.append(3 / loudest * offset)
    projector = model.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    num = sum(len(row) for row in rows)
    first.weight[:num], first.bias[:num] = torch.cat(rows), torch.cat(biases)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(len(second.weight), num, generator=generator))[0]
    second.weight[:, :num] = directions.to(states.device)
    # Visual tokens and words as loud as each other, not beyond what layers can change.
    width = len(second.weight)
    out: Tensor = second(F.gelu(first(states)))  # type: ignore[operator]
    second.weight *= 0.3 * width**0.5 / out.norm(dim=-1).mean()
    model.get_input_embeddings().weight.normal_(std=0.3, generator=generator)  # type: ignore[operator]


def optimisers(groups: list[tuple[nn.Module, float]]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW at half its rate for all else."""
    matrices: list[dict[str, object]] = []
    others: list[dict[str, object]] = []
    for module, rate in groups:
        for name, parameter in module.named_parameters():
            plain = parameter.ndim != 2 or "embed" in name or "head" in name
            rate_here = rate / 2 if plain else rate
            group = {"params": [parameter], "lr": rate_here, "full": rate_here}
            (others if plain else matrices).append(group)
    adam = torch.optim.AdamW(_merge(others), betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(_merge(matrices)), adam]


def _merge(groups: list[dict[str, object]]) -> list[dict[str, object]]:
    """One group a learning rate."""
    merged: dict[object, dict[str, object]] = {}
    for group in groups:
        kept = merged.setdefault(
            group["full"], {"params": [], "lr": group["lr"], "full": group["full"]}
        )
        kept["params"] += group["params"]  # type: ignore[operator]
    return list(merged.values())


def restore(optims: list[torch.optim.Optimizer], saved: list[dict[str, object]]) -> None:
    """Load optimiser states, but keep the learning rates of the present code."""
    for optim, state in zip(optims, saved, strict=True):
        rates = [group["full"] for group in optim.param_groups]
        optim.load_state_dict(state)
        for group, rate in zip(optim.param_groups, rates, strict=True):
            group["full"] = rate


def set_rates(optimisers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["full"] * factor


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up, constant, then linear to 2 % over the last `decay` of the steps."""
    left = (steps - step) / max(steps * decay, 1)
    return min(1.0, (step + 1) / warmup, max(left, 0.02))


def write_atomically(path: Path, state: dict[str, object]) -> None:
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def log(path: Path, **fields: object) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")
    sys.stdout.write(json.dumps(fields) + "\n")


def train_tower(
    model: LlavaOnevisionForConditionalGeneration, out: Path, args: argparse.Namespace
) -> None:
    """Pretrain the tower on patch labels; its weights go to `tower.pt`."""
    device = torch.device(args.device)
    tower = model.model.vision_tower
    state_path = out / "tower.pt"
    torch.manual_seed(args.seed)
    heads = Dense(tower.config.hidden_size).to(device)
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
        batch = tile_batch(args.seed, step, 64 // processes, share)
        set_rates(optims, schedule(step, args.tower_steps, 50, 0.4))
        loss, right = dense_loss(tower, heads, batch, device)
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


@torch.no_grad()
def dev_accuracy(
    model: LlavaOnevisionForConditionalGeneration, device: torch.device
) -> dict[str, float]:
    """Accuracy by kind on fixed dev scenes.

    An answer is right where each of its tokens is the likeliest: that is what greedy decoding would
    give, without decoding.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    model.eval()
    rank, processes = ranks()
    jobs = [(name, number) for name, num in DEV for number in range(num)]
    for name, number in jobs[rank::processes]:
        batch = make_batch("dev", 0, number, LAYOUTS[name])
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits, targets = answer_states(model, batch, device, decoder_layer)
        hits = torch.zeros(batch.targets.shape, dtype=torch.bool)
        wanted = torch.from_numpy(batch.targets) != IGNORED
        hits[wanted] = (logits.argmax(-1) == targets).cpu()
        rows = (hits | ~wanted).all(-1)
        for i, questions in enumerate(batch.questions):
            for j, question in enumerate(questions):
                right[question.kind].append(bool(rows[i, j]))
    counts = torch.tensor(
        [[sum(right[kind]), len(right[kind])] for kind in KINDS], dtype=torch.float64
    )
    if processes > 1:
        distributed.all_reduce(counts)
    return {
        kind: round(float(r / max(n, 1)), 4) for kind, (r, n) in zip(KINDS, counts, strict=True)
    }


def train(
    model: LlavaOnevisionForConditionalGeneration, out: Path, args: argparse.Namespace
) -> None:
    """Train everything on questions; the best averaged weights go to `snapshot/`."""
    device = torch.device(args.device)
    parts = model.model
    decoder = [
        (parts.language_model, 3e-3),
        (parts.multi_modal_projector, 3e-3),
        (model.lm_head, 3e-3),
    ]
    optims = optimisers([*decoder, (parts.vision_tower, 2e-3)])
    newline = torch.optim.AdamW([{"params": [parts.image_newline], "lr": 2e-3, "full": 2e-3}])
    optims.append(newline)
    heads = Dense(parts.vision_tower.config.hidden_size).to(device)
    heads.load_state_dict(torch.load(out / "tower.pt", map_location=device)["heads"])
    start_projector(model, heads, tile_batch(args.seed, args.tower_steps), args.seed)
    group = {"params": list(heads.parameters()), "lr": 1e-3, "full": 1e-3}
    optims.append(torch.optim.AdamW([group]))
    hints = Hints(model.config.text_config.hidden_size).to(device)
    group = {"params": list(hints.parameters()), "lr": 3e-3, "full": 3e-3}
    optims.append(torch.optim.AdamW([group]))
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, seconds, best = 0, 0.0, 0.0
    state_path = out / "train.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device)
        model.load_state_dict(state["model"])
        average = state["average"]
        heads.load_state_dict(state["heads"])
        hints.load_state_dict(state["hints"])
        restore(optims, state["optimisers"])
        step, seconds, best = state["step"], state["seconds"], state["best"]
    begin = time.monotonic() - seconds
    compiled = torch.compile(decoder_layer, dynamic=False) if args.compile else decoder_layer
    torch._dynamo.config.cache_size_limit = 64
    losses: dict[str, list[float]] = defaultdict(list)
    told: dict[str, list[float]] = {}
    start = len(make_tokenizer().encode(PREFIX).ids)
    rank, processes = share = ranks()
    for number in range(step, args.steps):
        batch = training_batch(args.seed, number, share)
        model.train()
        set_rates(optims, schedule(number, args.steps, 100, args.decay))
        layer = compiled if batch.layout.name in COMPILED else decoder_layer
        # The tower learns once the decoder reads it; from clips every second time: they cost more.
        tower = number >= args.unfreeze and (batch.layout.num_frames == 1 or number % 2 == 0)
        parts.vision_tower.requires_grad_(tower)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            watch = hints.watch if number >= args.hints else None
            logits, targets = answer_states(model, batch, device, layer, watch)
        loss = F.cross_entropy(logits, targets)
        if number >= args.hints:
            hint, told["clip" if batch.layout.num_frames > 1 else "picture"] = hints.loss(
                batch, start
            )
            (loss + args.hint_weight * hint).backward()
        else:
            loss.backward()
        if number >= args.unfreeze:
            parts.vision_tower.requires_grad_(True)
            extra = tile_batch(args.seed + 1, number, 48 // processes, share)
            (0.3 * dense_loss(parts.vision_tower, heads, extra, device)[0]).backward()
        average_gradients([*model.parameters(), *heads.parameters(), *hints.parameters()])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        losses[batch.layout.name.split()[0]].append(loss.item())
        with torch.no_grad():
            pull = 1 - min(0.995, (number + 1) / (number + 20))
            for name, value in model.state_dict().items():
                average[name].lerp_(value.float(), pull)
        done = number + 1
        if rank == 0 and done % 20 == 0:
            means = {name: round(sum(v) / len(v), 4) for name, v in losses.items()}
            log(
                out / "loss.jsonl",
                step=done,
                seconds=round(time.monotonic() - begin, 1),
                loss=means,
                hints=told,
            )
            losses.clear()
        if done % args.evaluate_every == 0 or done == args.steps:
            current = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(average)
            accuracy = dev_accuracy(model, device)
            mean = sum(accuracy.values()) / len(accuracy)
            if mean > best and rank == 0:
                best = mean
                save(model, out / "snapshot")
                (out / "snapshot.json").write_text(
                    json.dumps({"step": done, "dev": mean, "kinds": accuracy})
                )
            model.load_state_dict(current)
            if rank > 0:
                continue
            took = round(time.monotonic() - begin, 1)
            log(out / "dev.jsonl", step=done, seconds=took, mean=round(mean, 4), kinds=accuracy)
            write_atomically(
                state_path,
                {
                    "model": current,
                    "average": average,
                    "heads": heads.state_dict(),
                    "hints": hints.state_dict(),
                    "optimisers": [optim.state_dict() for optim in optims],
                    "step": done,
                    "seconds": time.monotonic() - begin,
                    "best": best,
                },
            )


def ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of every process's gradients, in one message."""
    if ranks()[1] == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= ranks()[1]
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def work(rank: int, args: argparse.Namespace) -> None:
    """One process: its share of every batch, one thread, gradients averaged once a step."""
    if args.processes > 1:
        torch.set_num_threads(1)
        meeting = f"file://{args.out.resolve()}/meeting"
        distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=args.processes
        )
    model = make_model(args.seed).to(args.device)
    model.model.vision_tower.set_attn_implementation("eager")  # 64 tokens: faster than fused, here
    if args.compile:
        for layer in model.model.vision_tower.encoder.layers:
            layer.compile()
    train_tower(model, args.out, args)
    if ranks()[1] > 1:
        distributed.barrier()
    tower = torch.load(args.out / "tower.pt", map_location=args.device)["tower"]
    model.model.vision_tower.load_state_dict(tower)
    train(model, args.out, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoints, logs and snapshots"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument(
        "--unfreeze", type=int, default=100, help="the step from which the tower learns too"
    )
    parser.add_argument(
        "--decay", type=float, default=0.2, help="the last part of the steps, of falling rate"
    )
    parser.add_argument(
        "--hints", type=int, default=3600, help="the step from which hints are asked for"
    )
    parser.add_argument("--hint-weight", type=float, default=0.3)
    parser.add_argument("--evaluate-every", type=int, default=150)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--processes", type=int, default=2, help="CPU processes of one thread each; 1 on a GPU"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "meeting").unlink(missing_ok=True)
    if args.processes == 1:
        work(0, args)
    else:
        torch.multiprocessing.spawn(work, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
