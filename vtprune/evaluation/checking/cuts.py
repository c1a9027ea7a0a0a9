"""The cuts that are checked, each as a preset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from vtprune.errors import PresetError
from vtprune.preset import Preset, load_preset, override
from vtprune.preset.spec import PIXELS, StageSpec
from vtprune.pruners import METHODS, find_method
from vtprune.tokens.layout import MODALITIES

FIRST = 2  # the layer of the single cut, where there are as many
LEFT = 0.5  # the share of the visual tokens that a cut leaves where no keep is given
EVERY = 3  # decoded tokens from one cut while decoding to the next
SECOND = 0.2  # the share of it, or of keep, that the second of two cuts leaves


@dataclass(frozen=True)
class CheckOptions:
    """The cuts that a check was asked for.

    Args:
        keep: layer average of the kept fraction; None: the preset's, or half of the visual tokens
            after each cut, which models of any depth can reach.
        method: that selects tokens in the usual cuts.
        at: the one place where it cuts; None: at the input, at one layer and at two.
        options: of the method, or of the preset's stages.
        preset: that is checked in place of the usual cuts; None: those.
        seed: of all random choices.
    """

    keep: float | None = None
    method: str = "random"
    at: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    preset: str | None = None
    seed: int = 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the method can cut."""
        if self.preset is not None:
            return MODALITIES
        return find_method(self.method).modalities


@dataclass(frozen=True)
class CheckedCut:
    """One way to cut.

    Args:
        name: where it cuts, or the preset's name.
        preset: the same, for the engine.
        core: whether the verdict needs it.
    """

    name: str
    preset: Preset
    core: bool = True


def choose_cuts(
    options: CheckOptions, num_layers: int, modalities: Iterable[str]
) -> list[CheckedCut]:
    """Return the cuts to check in a model of `num_layers`.

    Args:
        modalities: of the inputs.

    Raises:
        PresetError: a method, option or keep that does not fit, or has no masked counterpart.
    """
    if options.preset is not None:
        preset = override(load_preset(options.preset), keep=options.keep, options=options.options,
                          seed=options.seed)  # fmt: skip
        refuse_uncheckable(preset, modalities)
        return [CheckedCut(preset.label, preset)]
    entry = find_method(options.method)
    if not entry.chooses:
        raise PresetError(
            f"--method {options.method} chooses no tokens, so it can't make the cuts of a check",
            "give a method that does, such as random, or check a preset with --preset FILE",
        )
    keep = LEFT if options.keep is None else options.keep
    if keep == 1:
        raise PresetError("keep 1 cuts nothing, so there is nothing to check", "--keep 0.5")
    first, second = min(FIRST, num_layers - 1), num_layers // 2
    place = str(max(first, 1)) if options.at is None else options.at
    single = override(Preset(), keep=options.keep, method=options.method, at=place,
                      options=options.options, seed=options.seed)  # fmt: skip
    if options.keep is None:
        stages = (replace(stage, keep=LEFT) for stage in single.stages_for("image"))
        single = replace(single, stages=tuple(stages))
    if options.at is not None:
        return [CheckedCut(f"at {single.stages_for('image')[0].at}", single)]
    (stage,) = single.stages_for("image")

    def cut(name: str, *stages: StageSpec, core: bool = True) -> CheckedCut:
        return CheckedCut(name, replace(single, stages=stages), core)

    cuts = []
    if not entry.lowest:
        cuts.append(cut("input", replace(stage, at="input")))
    if first:
        cuts.append(cut(f"layer {first}", stage))
    if second > first:
        deep = replace(stage, at=str(second), keep=keep * SECOND)
        cuts.append(cut(f"layers {first}, {second}", stage, deep, core=False))
    pixels = load_preset({"stages": [{"at": PIXELS, "method": "predictable", "keep": keep}]})
    decode = load_preset({"decode": {"every": EVERY, "keep": LEFT}})
    return [
        *cuts,
        CheckedCut(PIXELS, pixels, core=False),
        CheckedCut("decoding", decode, core=False),
    ]


def refuse_uncheckable(preset: Preset, modalities: Iterable[str]) -> None:
    """Refuse a preset that has no masked counterpart.

    Raises:
        PresetError: with the stage.
    """
    for stage in [stage for kind in modalities for stage in preset.stages_for(kind)]:
        if METHODS[stage.method].media:
            raise PresetError(
                f"preset {preset.name}: {stage.method} makes the media smaller, and the model with "
                "all of them, masked, sees other pictures",
                "check a preset that drops tokens, frames or tiles",
            )
        if stage.positions == "renumber":
            raise PresetError(
                f"preset {preset.name}: positions: renumber at {stage.at} moves the kept tokens, "
                "and a masked model keeps them where they were",
                "check it with positions: keep; renumbered positions are tested with a loop over "
                "the layers",
            )


def media_preset(options: CheckOptions) -> Preset:
    """Return the preset that says how frames and tiles are sampled."""
    return Preset() if options.preset is None else load_preset(options.preset)
