"""The registry of methods and their options; a method is imported when it is created."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, cast

from vtprune.errors import PresetError, brief, quote
from vtprune.pruners.entry import Method, MethodOption, Value

if TYPE_CHECKING:
    from vtprune.pruners.base import PatchPruner, Pruner, UnitPruner
    from vtprune.tokens.schedule import CutProfile

COMPARED = MethodOption(
    "states", "hidden", ("hidden", "query", "key", "value"), "states to compare"
)

SEGMENT = MethodOption(
    "segment", "none", ("none",), "most tokens that are chosen from together", 64
)

METHODS: dict[str, Method] = {
    "entropy": Method(
        path="vtprune.pruners.entropy:Entropy",
        at="ecl",
        summary="states that differ most across attention heads",
        paper="EntropyPrune, arXiv 2602.17196",
        options=(
            MethodOption("norm", "none", ("none", "row"),
                   "none: as the authors run it; row: each head's row scaled to unit length"),
            MethodOption("states", "query", ("query", "key", "value", "hidden"), "states to score"),
        ),
    ),
    "divprune": Method(
        path="vtprune.pruners.divprune:DivPrune",
        at="input",
        summary="tokens farthest from each other",
        paper="DivPrune, arXiv 2503.02175",
        options=(COMPARED, SEGMENT),
    ),
    "spread": Method(
        path="vtprune.pruners.spread:Spread",
        at="schedule",
        summary="tokens farthest apart in state, time and place",
        paper="this project; the choice is DivPrune's, arXiv 2503.02175",
        options=(
            MethodOption("time", 1.0, (),
                         "weight of time, where the states' cosine has weight 1", 0, 4),
            MethodOption("space", 0.1, (), "weight of rows and columns", 0, 4),
            COMPARED,
            SEGMENT,
        ),
        schedule="vtprune.pruners.spread:schedule",
    ),
    "dart": Method(
        path="vtprune.pruners.dart:Dart",
        at="ecl",
        summary="tokens least similar to a few pivot tokens",
        paper="DART, arXiv 2502.11494",
        options=(
            MethodOption("visual_pivots", "4", ("1", "2", "4", "8", "16"),
                   "number of visual tokens as pivots"),
            MethodOption("text_pivots", "4", ("0", "1", "2", "4", "8", "16"),
                   "number of text tokens as pivots; 0: question-blind"),
        ),
        reads_question=True,
        blind=("text_pivots", "0"),
    ),
    "cdpruner": Method(
        path="vtprune.pruners.cdpruner:CDPruner",
        at="input",
        summary="diverse tokens that match the question",
        paper="CDPruner, arXiv 2506.10967",
        options=(
            MethodOption("relevance", "text", ("text", "none"),
                         "none: diversity alone, question-blind"),
            SEGMENT,
        ),
        reads_question=True,
        blind=("relevance", "none"),
    ),
    "hawk": Method(
        path="vtprune.pruners.hawk:Hawk",
        at="input",
        summary="tokens whose keys match the question, by head",
        paper="HAWK, arXiv 2604.07812",
        options=(
            MethodOption("heads", "equal", ("equal", "qwen2.5-vl-7b"),
                         "weights of the heads: equal, or the published ones of a model"),
        ),
        reads_question=True,
    ),
    "fastv": Method(
        path="vtprune.pruners.fastv:FastV",
        at="ecl",
        summary="tokens the last prompt token attends to most",
        paper="FastV, arXiv 2403.06764",
        options=(
            MethodOption("rest", "drop", ("drop", "merge"),
                   "merge: into the most similar kept token, as HoliTom does in a deep layer"),
        ),
        lowest=1,
        reads_question=True,
    ),
    "pyramiddrop": Method(
        path="vtprune.pruners.pyramiddrop:PyramidDrop",
        at="schedule",
        summary="as fastv, fewer after each quarter of layers",
        paper="PyramidDrop, arXiv 2410.17247",
        lowest=1,
        schedule="vtprune.pruners.pyramiddrop:schedule",
        reads_question=True,
    ),
    "sparsevlm": Method(
        path="vtprune.pruners.sparsevlm:SparseVLM",
        at="schedule",
        summary="tokens question words attend to; rest clustered",
        paper="SparseVLM, arXiv 2410.04417",
        options=(
            MethodOption("ratio", "budget", ("budget", "rank"),
                   "rank: fewer than the budget where the attention's rank is low"),
            MethodOption("recycle", "clusters", ("clusters", "none"),
                   "clusters: merge the best of the dropped tokens into a few"),
        ),
        exact=False,
        lowest=1,
        schedule="vtprune.pruners.sparsevlm:schedule",
        reads_question=True,
    ),
    "sparsevlm-plus": Method(
        path="vtprune.pruners.sparsevlm_plus:SparseVLMPlus",
        at="schedule",
        summary="as sparsevlm, less what positions alone give",
        paper="SparseVLM+ v2.0, arXiv 2410.04417",
        lowest=1,
        schedule="vtprune.pruners.sparsevlm_plus:schedule",
        reads_question=True,
    ),
    "v2drop": Method(
        path="vtprune.pruners.v2drop:V2Drop",
        at="schedule",
        summary="tokens that a layer changes most, ever fewer",
        paper="V2Drop, arXiv 2509.01552",
        lowest=1,
        schedule="vtprune.pruners.v2drop:schedule",
    ),
    "visionzip": Method(
        path="vtprune.pruners.visionzip:VisionZip",
        at="input",
        summary="tokens the vision tower attends to; rest merged",
        paper="VisionZip, arXiv 2412.04467",
        options=(
            MethodOption("contextual", "10/64", ("10/64", "20/64", "32/64", "none"),
                   "share of the budget for merged tokens"),
        ),
    ),
    "vispruner": Method(
        path="vtprune.pruners.vispruner:VisPruner",
        at="input",
        summary="tokens the tower attends to; few copies of rest",
        paper="VisPruner, arXiv 2412.01818",
        options=(
            MethodOption("important", 0.5, (), "part of the budget that is kept by attention",
                         0, 1),
        ),
    ),
    "scope": Method(
        path="vtprune.pruners.scope:Scope",
        at="input",
        summary="attended tokens that are similar to all others",
        paper="SCOPE, arXiv 2510.24214",
        options=(SEGMENT,),
    ),
    "vscan": Method(
        path="vtprune.pruners.vscan:VScan",
        at="schedule",
        summary="by early and last tower layers; deep: as fastv",
        paper="VScan, arXiv 2505.22654",
        options=(
            MethodOption("local", 0.5, (), "part of the budget that is kept window by window",
                         0, 1),
        ),
        schedule="vtprune.pruners.vscan:schedule",
        later=("fastv", {}),
    ),
    "hiprune": Method(
        path="vtprune.pruners.hiprune:HiPrune",
        at="input",
        summary="attended tokens of middle and last tower layers",
        paper="HiPrune, arXiv 2508.00553",
        options=(
            MethodOption("objects", 0.1, (),
                         "part of the budget for what the middle layer attends to and neighbours",
                         0, 1),
        ),
    ),
    "evs": Method(
        path="vtprune.pruners.evs:Evs",
        at="input",
        summary="tokens that changed most since the frame before",
        paper="EVS, arXiv 2510.14624",
        modalities=("video",),
    ),
    "dycoke": Method(
        path="vtprune.pruners.dycoke:DyCoke",
        at="input",
        summary="one frame of four, and what changed since",
        paper="DyCoke, arXiv 2411.15024",
        modalities=("video",),
    ),
    "holitom": Method(
        path="vtprune.pruners.holitom:HoliTom",
        at="input",
        summary="static runs merged over time, cluster centres",
        paper="HoliTom, arXiv 2505.21334",
        options=(
            MethodOption("similar", "budget", ("budget",),
                   "cosine above which a token repeats the one in the frame before; budget: 0.65 "
                   "up to keep 0.1, 0.8 above", 0, 1),
        ),
        modalities=("video",),
        schedule="vtprune.pruners.holitom:schedule",
        later=("fastv", {"rest": "merge"}),
    ),
    "fastvid": Method(
        path="vtprune.pruners.fastvid:FastVid",
        at="input",
        summary="attended tokens, anchors of similar frames",
        paper="FastVID, arXiv 2503.11187",
        options=(
            MethodOption("contextual", 0.4, (), "part of the budget for anchors, which the rest "
                         "is merged into", 0, 1),
        ),
        modalities=("video",),
    ),
    "flashvid": Method(
        path="vtprune.pruners.flashvid:FlashVid",
        at="schedule",
        summary="attended unlike tokens, trees over time",
        paper="FlashVID, arXiv 2602.08024",
        options=(
            MethodOption("similar", 0.8, (), "least cosine of a link to the frame before", 0, 1),
        ),
        modalities=("video",),
        schedule="vtprune.pruners.flashvid:schedule",
        later=("fastv", {}),
    ),
    "vidcom2": Method(
        path="vtprune.pruners.vidcom2:VidCom2",
        at="input",
        summary="tokens unlike their frame's and video's mean",
        paper="VidCom2, arXiv 2505.14454",
        modalities=("video",),
    ),
    "predictable": Method(
        path="vtprune.pruners.predictable:Predictable",
        at="pixels",
        summary="frames and tiles that others don't predict",
        paper="baseline; for patches: PixelPrune",
        options=(
            MethodOption("tolerance", 2.0, (),
                   "largest mean difference, in levels of 255, of any 16 x 16 block of a dropped "
                   "frame or tile; 0: only bit-identical ones", 0, 255),
        ),
        units=True,
    ),
    "scenes": Method(
        path="vtprune.pruners.scenes:Scenes",
        at="pixels",
        summary="frames that show a change, one of every scene",
        paper="this project",
        options=(
            MethodOption("tolerance", 2.0, (),
                   "largest mean difference, in levels of 255, of any of the 16 x 16 cells of a "
                   "dropped frame from the last kept one; a budget raises it", 0, 255),
            MethodOption("scene", 30.0, (),
                   "mean difference, in levels of 255, from the frame before where a scene "
                   "changes and a frame is kept", 0, 255),
            MethodOption("time", 0.0, (),
                   "levels of difference that the whole length of the video counts as where a "
                   "budget is met: 0 for change alone", 0, 4096),
        ),
        modalities=("video",),
        units=True,
    ),
    "repeated": Method(
        path="vtprune.pruners.repeated:Repeated",
        at="pixels",
        summary="patches that the picture before does not show",
        paper="this project",
        options=(
            MethodOption("tolerance", 2.0, (),
                   "largest mean difference, in levels of 255, of any 4 x 4 block of a dropped "
                   "patch from its place in the picture before; 0: only bit-identical ones",
                   0, 255),
        ),
        modalities=("image",),
        units=True,
        patches=True,
    ),
    "random": Method(
        path="vtprune.pruners.random:Random",
        at="horizon",
        summary="a uniform random draw",
        paper="baseline; past the information horizon: arXiv 2512.07580",
    ),
    "uniform": Method(
        path="vtprune.pruners.uniform:Uniform",
        at="input",
        summary="a regular sub-grid of every frame",
    ),
    "pool": Method(
        path="vtprune.pruners.pool:Pool",
        at="input",
        summary="the mean of every window of tokens",
        exact=False,
    ),
    "downsample": Method(
        path="vtprune.pruners.downsample:Downsample",
        at="pixels",
        summary="every token of smaller pictures or fewer frames",
        exact=False,
        media=True,
    ),
    "vtw": Method(
        path="vtprune.pruners.vtw:Withdraw",
        at="horizon",
        summary="no visual token after the cut",
        paper="VTW, arXiv 2405.05803",
        drops_all=True,
    ),
}  # fmt: skip


OWN: dict[str, type] = {}
"""The classes of the user's own methods, by the names they are registered by."""

BASELINES = ("random", "uniform", "downsample")
"""The methods that every other one is compared with."""


def find_method(name: str) -> Method:
    """Return the registry's entry for `name`.

    Raises:
        PresetError: there is none; the hint lists those there are.
    """
    if name not in METHODS:
        close = get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        if re.fullmatch(
            r"[\w.]+:\w+", name
        ):  # never imported here: names come from files and clients too
            hint = "register it first (vtprune.register_method), or name it by --method; "
        raise PresetError(
            f"unknown method {quote(name)}",
            f"{hint}methods: {', '.join(METHODS)} (vtprune methods)",
        )
    return METHODS[name]


def register_method(name: str, method: type | str) -> None:
    """Add a method of one's own, once it keeps to the contract that all methods keep to.

    >>> import vtprune
    >>> vtprune.register_method("loudest", "my_package.loudest:Loudest")
    >>> report = vtprune.ask(None, "clip.mp4", "what moves?", method="loudest", keep=0.3)

    Args:
        name: that calls, flags and presets know it by.
        method: the class, or "module:Class", which is imported. It has `needs`, the names of the
            states that it reads, and `select(tokens, budget)`, which gives a `vtprune.Selection`.
            The fields of a frozen dataclass are its options: numbers, or texts with
            `metadata={"choices": ...}`. It may say `at` (its place: "input", "ecl" or "horizon"),
            `exact` (False: it may keep less than its budget) and `modalities`.

    Raises:
        PresetError: the class breaks the contract, with how; or the name is a packaged method's.
    """
    from vtprune.pruners.class_path import load_class
    from vtprune.pruners.own_methods import entry_of

    if name in METHODS and name not in OWN:
        raise PresetError(f"{quote(name)} is the name of a packaged method", "choose another name")
    cls = load_class(method) if isinstance(method, str) else method
    METHODS[name], OWN[name] = entry_of(name, cls), cls


def unregister_method(name: str) -> None:
    """Take a method of one's own out of the registry.

    Raises:
        PresetError: there is none of that name.
    """
    if name not in OWN:
        raise PresetError(f"no method {quote(name)} was registered", ", ".join(OWN))
    del METHODS[name], OWN[name]


def check_options(name: str, options: Mapping[str, object]) -> dict[str, Value]:
    """Return all options of method `name`: the given values, checked, over the defaults.

    Raises:
        PresetError: an option that the method does not have, or a value it can't take.
    """
    method = find_method(name)
    by_name = {option.name: option for option in method.options}
    values: dict[str, Value] = {}
    for key, value in options.items():
        if key not in by_name:
            has = f"it has {', '.join(by_name)}" if by_name else "it has no options"
            raise PresetError(f"method {name} has no option {quote(key)}", has)
        checked = by_name[key].check(value)
        if checked is None:
            raise PresetError(
                f"{key}: {brief(value)} is not a value of method {name}", _choose_from(by_name[key])
            )
        values[key] = checked
    return {option.name: values.get(option.name, option.default) for option in method.options}


def _choose_from(option: MethodOption) -> str:
    if not option.takes_number:
        return f"choose from {', '.join(option.choices)}"
    return f"give {option.values}"


def reads_question(name: str, options: Mapping[str, object], at: str = "") -> bool:
    """Return whether method `name` keeps tokens for the question, with these options.

    Args:
        at: the place of its cut; at "schedule", later cuts count too.
    """
    method = METHODS[name]
    if at == "schedule" and method.later and reads_question(*method.later):
        return True
    if method.blind is None:
        return method.reads_question
    option, value = method.blind
    return check_options(name, options)[option] != value


def create(name: str, options: Mapping[str, object]) -> Pruner:
    """Create the method `name` with its options."""
    return cast("Pruner", _create(name, options))


def create_units(name: str, options: Mapping[str, object]) -> UnitPruner:
    """Create the method `name`, which acts at `pixels`, with its options."""
    return cast("UnitPruner", _create(name, options))


def create_patches(name: str, options: Mapping[str, object]) -> PatchPruner:
    """Create the method `name`, which drops patches at `pixels`, with its options."""
    return cast("PatchPruner", _create(name, options))


def _create(name: str, options: Mapping[str, object]) -> object:
    checked = check_options(name, options)
    if name in OWN:
        from vtprune.pruners.contract import CheckedPruner

        return CheckedPruner(name, OWN[name](**checked), METHODS[name].exact)
    module, cls = find_method(name).path.split(":")
    return getattr(importlib.import_module(module), cls)(**checked)


def find_profile(name: str) -> CutProfile:
    """Return the schedule of method `name`, for `at: schedule`."""
    module, function = METHODS[name].schedule.split(":")
    return cast("CutProfile", getattr(importlib.import_module(module), function)())
