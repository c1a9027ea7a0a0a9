"""The sections of the page of speed figures, one a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from vtprune._dev.bench.end_to_end import CLIPS
from vtprune._dev.bench.growth import DEPTH, FRAMES, exponent
from vtprune._dev.bench.prefill import UNPRUNED
from vtprune._dev.bench.results import Pass
from vtprune._dev.bench.selection import DENSE
from vtprune._dev.bench.tables import middle, number_of, ratios, spread, table, where
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.pruners.similarity import HELD

MILLION = 1e6
FEWEST, MOST = 2000, math.isqrt(HELD)
"""Tokens between which growth is fitted again: where what does not grow is little, and where a
device may hold all similarities of tokens at once."""
MANY_TOKENS = (
    "python -m vtprune._dev.bench selection --tokens 29989 --methods divprune,spread,cdpruner "
    "--repeats 1"
)
BUSY = 4.0  # load of the system above which single ratios say little
Groups = Sequence[Sequence[Pass]]
"""Passes, those of the same settings together."""


def prefill_section(groups: Groups) -> str:
    rows = []
    for passes in groups:
        told = passes[0].settings
        for at in told["places"]:
            promised = middle(passes, UNPRUNED, "flops") / middle(passes, at, "flops")
            measured = ratios(passes, at, "prefill")
            realised = [one / promised for one in measured]
            rows.append([
                f"{told['model']}, {int(middle(passes, at, 'visual')):,} visual tokens, "
                f"{told['dtype']}, {place(at)}",
                f"{middle(passes, UNPRUNED, 'prefill'):.2f}",
                f"{middle(passes, at, 'prefill'):.2f}",
                f"{middle(passes, at, 'select') / middle(passes, UNPRUNED, 'prefill'):.2%}",
                f"{promised:.2f}",
                spread(measured),
                spread(realised),
                decoding_of(passes, at),
                len(passes),
            ])  # fmt: skip
    first = groups[0][0].settings
    head = ["case", "unpruned, s", "pruned, s", "selection / unpruned", "by FLOPs", "measured",
            "realised", "a decoded token, ms", "passes"]  # fmt: skip
    return f"""## Prefill

`{first["method"]}`, {first["keep"]:.0%} of the visual tokens left. Realised is the measured
speed-up over that of the FLOPs
(attention as full squares). Unpruned and pruned prefills in turn, there and back, after one
warm-up each; medians of the
passes' ratios, with the least and the greatest. {where(groups)}

    python -m vtprune._dev.bench prefill --dtype float32
    python -m vtprune._dev.bench prefill --dtype bfloat16

{table(head, rows)}"""


def decoding_of(passes: Sequence[Pass], at: str) -> str:
    """A decoded token without and with the cut; of a GPU, how often its host waited for it."""
    plain, cut = (1000 * middle(passes, name, "decode_per_token") for name in (UNPRUNED, at))
    told = f"{plain:.1f}, pruned {cut:.1f}"
    if "waits" in passes[0].sides[at]:
        waits = [int(passes[0].sides[name]["waits"]) for name in (UNPRUNED, at)]
        told += f"; the host waits {waits[0]} times, pruned {waits[1]}"
    return told


def place(at: str) -> str:
    return f"at {at}" if at == "input" else f"after layer {at}"


def compiled_section(groups: Groups) -> str:
    rows, notes = [], []
    for passes in groups:
        told = passes[0].settings
        base = f"eager, {UNPRUNED}"
        for name in passes[0].sides:
            per_second = 1 / middle(passes, name, "decode_per_token")
            rows.append([
                f"{told['dtype']}: {name}",
                f"{middle(passes, name, 'prefill'):.2f}",
                spread(ratios(passes, name, "prefill", base=base)),
                f"{per_second:.1f}",
                spread(ratios(passes, name, "decode_per_token", base=base)),
                len(passes),
            ])  # fmt: skip
        eager, compiled = (
            spread(ratios(passes, f"{how}, pruned", "prefill", base=f"{how}, {UNPRUNED}"))
            for how in ("eager", "compiled")
        )
        notes.append(
            f"{told['dtype']}: the pruned prefill is {eager} times as fast as the unpruned "
            f"one, both eager; {compiled} times, both compiled."
        )
    first = groups[0][0]
    told = first.settings
    missing = {"float32", "bfloat16"} - {passes[0].settings["dtype"] for passes in groups}
    if missing:
        notes.append(f"{' and '.join(sorted(missing))}: not measured here.")
    machines = [run.machine for passes in groups for run in passes]
    if any(machine["load"] > BUSY and not machine.get("ahead") for machine in machines):
        notes.append(
            "Other work kept the machine's two processors busy while this ran: ratios of single "
            "passes spread by several times, and only what all passes agree on counts."
        )
    head = ["case", "prefill, s", "times as fast as eager unpruned", "decoded tokens a second",
            "times as fast as eager unpruned", "passes"]  # fmt: skip
    return f"""## Compiled layers

{told["model"]}, {int(first.sides[f"eager, {UNPRUNED}"]["visual"]):,} visual tokens, preset
`{told["preset"]}`, keep {told["keep"]:g}, {told["steps"]} tokens decoded after the first;
`--compile` with inductor. The compiled rows have a cache that grows, those of a static cache one
whose layers keep lengths of their own, which is what CUDA graphs need. Passes go through all rows
there and back, after one warm-up each, in which all graphs are compiled; medians of the passes'
ratios, with the least and the greatest. {where(groups)}

    python -m vtprune._dev.bench compiled --dtype float32
    python -m vtprune._dev.bench compiled --dtype bfloat16

OpenVINO is not beside it: openvino-genai installs, but takes models that were exported for it. On a
GPU, not run: `python -m vtprune._dev.bench compiled --device cuda --dtype bfloat16 --mode
reduce-overhead`, which records CUDA graphs.

{table(head, rows)}
{" ".join(notes)}"""


def end_to_end_section(groups: Groups) -> str:
    text = ""
    for passes in groups:
        told = passes[0].settings
        rows = []
        for name in passes[0].sides:
            rows.append([
                name,
                f"{middle(passes, name, 'vision'):.2f}",
                f"{middle(passes, name, 'prefill'):.2f}",
                f"{middle(passes, name, 'first_token'):.2f}",
                spread(ratios(passes, name, "prefill")),
                spread(ratios(passes, name, "first_token")),
            ])  # fmt: skip
        speed = {
            name: median(ratios(passes, name, "first_token"))
            for name in passes[0].sides
            if name != UNPRUNED
        }
        single = max((name for name in speed if "pixels" not in name), key=speed.__getitem__)
        both = max((name for name in speed if "pixels" in name), key=speed.__getitem__)
        head = ["row", "vision, s", "prefill, s", "first token, s", "prefill speed-up",
                "first-token speed-up"]  # fmt: skip
        text += f"""
{told["model"]}, {told["frames"]} frames of `{told["clip"]}`{CLIPS.get(told["clip"], "")},
{int(passes[0].sides[UNPRUNED]["visual"]):,} visual tokens, {told["dtype"]}, {number_of(passes)};
all rows leave
{told["keep"]:.0%} of the tokens in the end, the stage at the pixels {told["pixels"]:.0%}.

{table(head, rows)}
The best row of a single stage ({single}) has its first token {speed[single]:.2f} times as soon as
the unpruned model, the
best one with the stage at the pixels ({both}) {speed[both]:.2f} times: {
            speed[both] / speed[single]:.2f} times as soon as
the best single stage.
"""
    return f"""## First token of a real clip

Preparation of the frames, vision tower, prefill and first choice; random weights, the real
frames. {where(groups)}

    python -m vtprune._dev.bench end-to-end CLIP --dtype {groups[0][0].settings["dtype"]}
{text}"""


def scores_section(groups: Groups) -> str:
    rows = []
    for passes in groups:
        told = passes[0].settings
        for name in passes[0].sides:
            ours = f"{name.partition(',')[0].replace('whole attention map', 'attention')}, ours"
            rows.append([
                f"{name}; {told['tokens']:,} tokens, {told['dtype']}",
                f"{1000 * middle(passes, name, 'seconds'):.1f}",
                spread(ratios(passes, ours, "seconds", base=name)),
            ])  # fmt: skip
    return f"""## The plain published way

One layer of a 7B decoder, random states: what the last token attends to, from the map of all
tokens or from one row; matrix
entropy of every token. {where(groups)}

    python -m vtprune._dev.bench baseline

{table(["score", "ms", "times as long as ours"], rows)}"""


def kernels_section(groups: Groups) -> str:
    rows = []
    for passes in groups:
        told = passes[0].settings
        names = list(passes[0].sides)
        for name in names:
            rows.append([
                f"{told['model']}, {told['dtype']}: {name}",
                f"{middle(passes, name, 'prefill'):.2f}",
                spread(ratios(passes, name, "prefill", base=names[0])),
            ])  # fmt: skip
    keep = groups[0][0].settings["keep"]
    return f"""The same cut by attention (`fastv` after layer 2, {keep:.0%} left), in a model that
computes whole attention maps in every layer, and in one that keeps its own kernel. {where(groups)}

{table(["case", "prefill, s", "times as fast as unpruned eager"], rows)}"""


def selection_section(groups: Groups) -> str:
    alike: dict[tuple[object, ...], dict[int, Sequence[Pass]]] = {}
    for passes in groups:  # of one size the latest
        told = passes[0].settings
        key = tuple(told[name] for name in ("keep", "dtype", "device"))
        alike.setdefault(key, {})[told["tokens"]] = passes
    text = "".join(_selection_table(own) for own in alike.values())
    return f"""## Selection

What it costs to choose tokens in a decoder of 7B parameters (32 layers, 32 heads x 128, no shared
key heads), beside its dense prefill: FLOPs at the rate of its largest matrix product in the same
pass. Random states; attention rows are read where a method reads them, and a method with a
schedule of its own counts all of its cuts. {where(groups)}

    python -m vtprune._dev.bench selection
    {MANY_TOKENS}
{text}"""


def _selection_table(own: Mapping[int, Sequence[Pass]]) -> str:
    """Methods down, sizes across."""
    own = dict(sorted(own.items()))
    first = next(iter(own.values()))
    head, dense = ["method"], []
    for size, passes in own.items():
        head += [f"{size:,} tokens, ms", "of the dense prefill"]
        seconds = f"{middle(passes, DENSE, 'seconds'):.1f} s"
        dense.append(f"{seconds} at {size:,} tokens ({number_of(passes)})")
    rows = []
    for name in dict.fromkeys(name for one in own.values() for name in one[0].sides):
        cells: list[str] = []
        for passes in own.values():
            if name not in passes[0].sides:
                cells += ["-", "-"]
                continue
            share = 1 / median(ratios(passes, name, "seconds", base=DENSE))
            cells += [f"{1000 * middle(passes, name, 'seconds'):.1f}", f"{share:.2%}"]
        if name != DENSE:
            rows.append([f"`{name}`", *cells])
    told = first[0].settings
    return f"""
{told["keep"]:.0%} are kept, {told["dtype"]}, medians. Dense prefill: {", ".join(dense)}.

{table(head, rows)}"""


def growth_section(groups: Groups) -> str:
    groups = sorted(groups, key=lambda passes: passes[0].settings["frames"])
    rows, names = [], list(groups[0][0].sides)
    for passes in groups:
        told = passes[0].settings
        cells = [
            f"{1000 * middle(passes, name, figure):.1f}"
            for figure, some in (("outside_layers", names[1:]), ("prefill", names))
            for name in some
        ]
        visual = int(passes[0].sides[UNPRUNED]["visual"])
        rows.append([f"{told['frames']}", f"{visual:,}", *cells, len(passes)])
    fits = []
    for name in names[1:]:
        points = [
            (passes[0].sides[name]["visual"], middle(passes, name, "outside_layers"))
            for passes in groups
        ]
        upper = [one for one in points if FEWEST <= one[0] <= MOST]
        within = f"from {FEWEST:,} to {MOST:,} tokens"
        fits.append(f"`{name}` {exponent(points):.2f} ({exponent(upper):.2f} {within})")
    told, reached = groups[0][0].settings, groups[-1][0].settings["frames"]
    layers = find_shape(told["model"]).config.get_text_config().num_hidden_layers
    whole = middle(groups[-1], UNPRUNED, "prefill") * layers / DEPTH
    shares = [
        f"`{name}` {middle(groups[-1], name, 'outside_layers') / whole:.1%}" for name in names[1:]
    ]
    rest = f"Above {reached} frames nothing has been measured here." if reached < FRAMES[-1] else ""
    head = ["frames", "visual tokens",
            *(f"{name}: selection and hooks, ms" for name in names[1:]),
            *(f"{name}: prefill, ms" for name in names), "passes"]  # fmt: skip
    return f"""## Growth

Two decoder layers of the full width of {told["model"]}, {told["dtype"]}, 49 tokens a frame, cut
between the layers to
{told["keep"]:.0%}: k, the number kept, grows with the tokens, so linear times k would be an
exponent of 2. Selection and hooks is all of the prefill that is not inside the layers: reading
states, choosing, gathering, masks, norms. A whole model pays for a choice once: of an unpruned
prefill through its {layers} layers, as many times as long as that through {DEPTH}, it is at
{reached} frames {" and ".join(shares)}.
Fitted exponents: {", ".join(fits)}. Greedy choices, those of `divprune`, `spread`, `scope` and
`cdpruner`, work out on a CPU only what a choice may depend on: how much that is depends on how
alike the tokens are, and random states are the least alike. On other devices they hold all
similarities at once, at most {4 * HELD // 2**30} GiB, up to {MOST:,} tokens. {where(groups)}

    python -m vtprune._dev.bench growth --dtype {told["dtype"]}

{table(head, rows)}
{rest}

PLOT

"""


def decoding_section(groups: Groups) -> str:
    text = ""
    for passes in groups:
        told = passes[0].settings
        rows = [
            [name, spread([one.sides[name]["seconds"] for one in passes]),
             spread(ratios(passes, "vtprune", "seconds", base=name))]
            for name in passes[0].sides
        ]  # fmt: skip
        plain = [name for name in passes[0].sides if name not in ("vtprune", "torchcodec")]
        fastest = min(plain, key=lambda name: middle(passes, name, "seconds"))
        ratio = 1 / median(ratios(passes, "vtprune", "seconds", base=fastest))
        text += f"""
{told["frames"]} frames of a clip of {told["seconds"]} s, {told["size"]}, synthesised (H.264, 30
frames a second, a keyframe
every 250); from the path to pictures of 384 x 384, with each library's own number of threads;
{len(passes)} passes.
vtprune takes {ratio:.2f} times as long as the fastest of the others ({fastest}).

{table(["reader", "seconds", "times as long as vtprune"], rows)}"""
    return f"""## Decoding

{where(groups)}

    python -m vtprune._dev.bench decoding
{text}"""


def overlap_section(groups: Groups) -> str:
    rows = []
    for passes in groups:
        told = passes[0].settings
        for name in passes[0].sides:
            rows.append([
                f"{told['model']}, {told['frames']} frames of {told['seconds']} s, {told['size']}: "
                f"{name}",
                spread([one.sides[name]["seconds"] for one in passes]),
                spread(ratios(passes, name, "seconds", base="one after the other")),
            ])  # fmt: skip
    return f"""## Decoding while a model is loaded

From a checkpoint on disk (random weights, in the system's cache) and a clip to a model and resized
frames. Both need processors: where others keep them busy, little is saved. {where(groups)}

    python -m vtprune._dev.bench overlap

{table(["case", "seconds", "times as fast"], rows)}"""


def memory_section(groups: Groups) -> str:
    text = ""
    for (one,) in groups:
        told, figures = one.settings, dict(one.sides["vtprune"])
        frames = figures.pop("frames")
        cells = [f"{value / MILLION:.0f}" for value in figures.values()]
        text += f"""
{frames:,.0f} frames ({told["fps"]:g} a second) of a clip of {told["seconds"]:,} s,
{told["size"]}, synthesised; MB of the process
before, after opening, and after each tenth:

{table(list(figures), [cells])}"""
    return f"""## Memory of a long video

{where(groups)}

    python -m vtprune._dev.bench memory
{text}"""


SECTIONS: Mapping[str, Callable[[Groups], str]] = {
    "prefill": prefill_section,
    "compiled": compiled_section,
    "end-to-end": end_to_end_section,
    "scores": scores_section,
    "kernels": kernels_section,
    "selection": selection_section,
    "growth": growth_section,
    "decoding": decoding_section,
    "overlap": overlap_section,
    "memory": memory_section,
}
