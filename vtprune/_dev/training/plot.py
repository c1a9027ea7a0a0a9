"""Draw the training's curves: `python -m vtprune._dev.training.plot OUT PICTURE`."""

from __future__ import annotations

from pathlib import Path

from vtprune._dev.arguments import Parser
from vtprune._dev.lines import read_lines
from vtprune.demo.questions import CLIP_KINDS, PICTURE_KINDS
from vtprune.pictures.chart import SMALL, new_figure, to_bytes


def lines(path: Path) -> list[dict[str, dict[str, float]]]:
    """A log's entries, one a step: what an interrupted run did twice counts once, as done last."""
    by_step = {entry["step"]: entry for entry in read_lines(path)}
    return [entry for _, entry in sorted(by_step.items())]


def draw(out: Path, picture: Path) -> None:
    """Loss on train, accuracy on dev by kind, against steps."""
    figure = new_figure(15, 5.2)
    left, middle, right = figure.subplots(1, 3)
    loss, dev = lines(out / "loss.jsonl"), lines(out / "dev.jsonl")
    for name, label in (("picture", "pictures"), ("clip", "clips")):
        points = [(entry["step"], entry["loss"][name]) for entry in loss if name in entry["loss"]]
        left.plot(*zip(*points, strict=True), label=label, linewidth=1)
    left.set(title="loss on answers (train)", xlabel="step", yscale="log")
    left.legend()
    for axes, kinds, title in (
        (middle, PICTURE_KINDS, "dev accuracy: pictures (and clips)"),
        (right, CLIP_KINDS, "dev accuracy: clips"),
    ):
        for kind in kinds:
            axes.plot(
                [e["step"] for e in dev], [e["kinds"][kind] for e in dev], label=kind, linewidth=1.2
            )
        axes.set(title=title, xlabel="step", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=SMALL, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)
    picture.write_bytes(to_bytes(figure))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the training's folder")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    draw(args.out, args.picture)


if __name__ == "__main__":
    main()
