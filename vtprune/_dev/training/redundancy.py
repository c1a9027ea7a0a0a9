"""How redundant the embedded world is: `python -m vtprune._dev.training.redundancy OUT`.

Accuracy by kind of question against keep for `entropy` with both norms at the layer that it really
cuts, and for `random` and `uniform` at that layer and its counts, and at the input. Beside it, how
far apart the entropy's scores are and how alike its two norms rank the tokens. A killed run goes
on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from vtprune._dev.arguments import Parser
from vtprune._dev.training.asking import AskingJob, Part, Records, questions
from vtprune.demo.questions import KINDS
from vtprune.evaluation.rows import EvaluationRow, make_rows
from vtprune.evaluation.variants import Variant, list_variants, repeat_variants
from vtprune.inference.questions_file import Asked
from vtprune.preset import load_preset

if TYPE_CHECKING:
    import torch

    from vtprune.models.loading import Loaded

KEEPS = (0.5, 0.3, 0.2, 0.1, 0.05)
NORMS = ("row", "none")
SEEDS = 5  # of each random row


def norm_cells(
    layer: int, keeps: Sequence[float] = KEEPS, seeds: int = SEEDS
) -> tuple[Variant, ...]:
    """Entropy at `layer` with either norm, what stands beside it there, and at the input."""
    stages = {norm: [{"at": layer, "method": "entropy", "norm": norm}] for norm in NORMS}
    presets = [
        replace(load_preset({"stages": stages[norm]}), name=f"norm {norm}") for norm in NORMS
    ]
    cells = repeat_variants(list_variants([], keeps, presets), seeds, matched=True)
    # Both norms cut to the same counts: what stands beside one stands beside the other.
    again = f"norm {NORMS[1]}"
    return tuple(
        cell for cell in cells if cell.name != "downsample" and not (
            cell.matches and cell.matches.name == again)
    )  # fmt: skip


def table(rows: Sequence[EvaluationRow], layer: int) -> Iterator[str]:
    """Accuracy by kind, in percent, a line a row, in Markdown."""
    shown = [kind for kind in KINDS if kind in rows[0].by_kind]
    yield f"| keep | tokens chosen by | all | {' | '.join(f'`{kind}`' for kind in shown)} |"
    yield "| --- " * (len(shown) + 3) + "|"
    ordered = sorted(rows, key=lambda row: (-(row.keep or 1), row.role != "asked"))
    for row in ordered:
        # A layer average that the layers before the cut have spent alone can't be had.
        if row.accuracy is None:
            continue
        shares = [row.accuracy.mean, *(row.by_kind[kind] for kind in shown)]
        cells = [f"{100 * share:.0f}" for share in shares]
        keep = "1" if row.role == "unpruned" else f"{row.keep:g}"
        yield f"| {keep} | {label(row, layer)} | {' | '.join(cells)} |"


def label(row: EvaluationRow, layer: int) -> str:
    """What chose, and where."""
    if row.role == "unpruned":
        return "nothing pruned"
    if row.preset:
        return f"`entropy`, `norm: {row.preset.split()[1]}`, at layer {layer}"
    return f"`{row.method}` at {f'layer {layer}' if ' beside ' in row.name else 'input'}"


def compare_norms(
    loaded: Loaded, asked: Sequence[Asked], layer: int
) -> tuple[dict[str, float], float]:
    """Spread of each norm's scores, and their rank agreement: means over the questions' media.

    Args:
        layer: the cut that the scores would be for, 1 or more.

    Returns:
        Standard deviation over mean by norm; Spearman's correlation of the two.
    """
    import torch

    from vtprune.engine import pruning
    from vtprune.inference.generate import Generation
    from vtprune.inference.model_inputs import to_device
    from vtprune.inference.prepare import encode
    from vtprune.inference.prompt_media import read_in_full
    from vtprune.media import Limits
    from vtprune.models.base import Sampling

    decoder = loaded.model.get_decoder()
    heads, kept = decoder.config.num_attention_heads, dict[str, torch.Tensor]()
    spreads: dict[str, list[float]] = {norm: [] for norm in NORMS}
    agreements = []

    def note(module: object, given: object, query: torch.Tensor) -> None:
        kept["query"] = query

    handle = decoder.layers[layer - 1].self_attn.q_proj.register_forward_hook(note)
    try:
        for one in asked:
            gathered = read_in_full(loaded, [one.file], Sampling(), Limits())
            inputs = encode(loaded, gathered, one.question, Generation())
            with torch.no_grad(), pruning(loaded.model, keep=1.0) as trace:
                loaded.model(**to_device(loaded, inputs.tensors), use_cache=False)
            states = kept["query"][0, trace.layouts[0].columns].unflatten(-1, (heads, -1))
            spread, agreement = rank(states)
            agreements.append(agreement)
            for norm in NORMS:
                spreads[norm].append(spread[norm])
    finally:
        handle.remove()
    return {norm: fmean(values) for norm, values in spreads.items()}, fmean(agreements)


def rank(states: torch.Tensor) -> tuple[dict[str, float], float]:
    """Spread of both norms' scores of states (N, H, D), and Spearman's correlation of the two."""
    import torch

    from vtprune.pruners.entropy import token_entropy

    scores = [token_entropy(states, norm) for norm in NORMS]
    spread = {norm: float(own.std() / own.mean().abs())
              for norm, own in zip(NORMS, scores, strict=True)}  # fmt: skip
    ranks = torch.stack([own.argsort().argsort().double() for own in scores])
    return spread, float(torch.corrcoef(ranks)[0, 1])


def report(asked: Sequence[Asked], cells: Sequence[Variant], records: Records, layer: int) -> str:
    """The table, and which keeps can't be had past the input."""
    rows = make_rows(asked, cells, records)
    lines = [*table(rows, layer)]
    missing = sorted({f"{row.keep:g}" for row in rows if row.accuracy is None}, reverse=True)
    if missing:
        lines += ["", f"Keep {' and '.join(missing)} can't be had by a cut at layer {layer}: the "
                  "layers before it have spent more."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of files, answers and what goes on")
    parser.add_argument("--model", help="a checkpoint; default: the packaged one")
    parser.add_argument("--layer", type=int, help="where entropy cuts; default: the model's ecl")
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--seed", type=int, default=0, help="of the files and questions")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    from vtprune.models.loading import load
    from vtprune.models.structure import find_structure

    loaded = load(args.model)
    known, notes = loaded.find_calibration()
    layer = known.ecl if args.layer is None else args.layer
    depth = len(find_structure(loaded.model).layers)
    if not 1 <= layer < depth:
        parser.error(f"--layer {layer} is out of range: 1 to {depth - 1}")
    if args.layer is None:
        sys.stderr.write("".join(f"{note}\n" for note in notes))
    asked = questions(args.out, args.split, args.questions, args.seed)
    cells = norm_cells(layer)
    part = Part(f"layer-{layer}", tuple(range(len(asked))), cells)
    records = AskingJob(args.out, asked, (part,), args.model, args.processes).run()
    spread, agreement = compare_norms(loaded, asked[::8], layer)
    spreads = ", ".join(f"{norm} {value:.3f}" for norm, value in spread.items())
    sys.stdout.write(
        f"{report(asked, cells, records, layer)}\n\n"
        f"Standard deviation of the scores over their mean: {spreads}. "
        f"Rank agreement of the norms: {agreement:.2f}.\n"
    )


if __name__ == "__main__":
    main()
