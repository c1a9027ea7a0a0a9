"""Where a model can be cut: its entropy collapse layer and information horizon, with sources."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vtprune.errors import PresetError, quote
from vtprune.preset.yaml_file import read_yaml

DEFAULT_ECL = 2
DEFAULT_HORIZON = 0.75  # of the layers
FIGURES = ("ecl", "horizon", "horizon_text")
REQUIRED = ("model_type", "layers", "hidden_size", "ecl", "horizon")


@dataclass(frozen=True)
class Calibration:
    """The named places to cut at in one model; layers are 0-based.

    Args:
        ecl: entropy collapse layer, the first layer that sees the shortened sequence, 0..L-1.
        horizon: information horizon, the layer from which visual tokens are not needed, 0..L.
        horizon_text: the same for text-heavy inputs (OCR, documents); None where not known.
        sources: figure -> where it comes from: "paper (...)", "released code (...)",
            "third party (...)", "measured: ..." or "default".
        origin: "packaged", "file" or "default".
    """

    ecl: int
    horizon: int
    horizon_text: int | None
    sources: Mapping[str, str]
    origin: str

    def describe(self, figure: str) -> str:
        """Return where "ecl" or "horizon" is, and who says so: "ecl 2 (default)"."""
        source = "default" if self.sources.get(figure) == "default" else self.origin
        return f"{figure} {getattr(self, figure)} ({source})"


def find_calibration(
    model_type: str, layers: int, hidden: int, used: Collection[str] = ("ecl", "horizon")
) -> tuple[Calibration, list[str]]:
    """Return the packaged calibration of a model, with defaults for what nobody published.

    Args:
        model_type: `config.model_type`.
        layers: number of decoder layers.
        hidden: width of the decoder.
        used: the figures that are asked for.

    Returns:
        the calibration, and a warning for each of the figures used that is a default; apart, so
        that rows that use one and rows that use both say each once.
    """
    model = (model_type, layers, hidden)
    entry: Mapping[str, Any] = {}
    for packaged in packaged_models()["calibrations"]:
        if (packaged["model_type"], packaged["layers"], packaged["hidden_size"]) == model:
            entry = packaged
    # An entropy collapse layer is looked for in 1..L/2, which is short of 2 in a tiny model.
    default = {"ecl": min(DEFAULT_ECL, layers // 2), "horizon": int(DEFAULT_HORIZON * layers)}
    missing = {figure: layer for figure, layer in default.items() if figure not in entry}
    calibration = Calibration(
        ecl=entry.get("ecl", default["ecl"]),
        horizon=entry.get("horizon", default["horizon"]),
        horizon_text=entry.get("horizon_text"),
        sources={**entry.get("sources", {}), **dict.fromkeys(missing, "default")},
        origin="packaged" if entry else "default",
    )
    return calibration, [
        f"{figure} {layer} by default, not measured: none is published for {model_type} with "
        f"{layers} layers of width {hidden}; --calibration FILE sets it"
        for figure, layer in missing.items()
        if figure in used
    ]


def read_calibration(
    path: str | Path,
    layers: int | None = None,
    *,
    model_type: str | None = None,
    hidden: int | None = None,
) -> Calibration:
    """Read the calibration in a file.

    Args:
        path: a YAML file with model_type, layers, hidden_size, ecl, horizon and, optionally,
            horizon_text and sources.
        layers: decoder layers of the model that it is for; None leaves them unchecked.
        model_type: that model's `config.model_type`; None leaves it unchecked.
        hidden: that model's width; None leaves it unchecked.

    Raises:
        PresetError: the file can't be read, has unknown keys or bad values, or is of another model;
            everything that is wrong is named with its line.
    """
    from vtprune.preset.schema import CalibrationSchema  # pydantic takes a tenth of a second
    from vtprune.preset.validation import find_faults, report

    data, lines = read_yaml(Path(path))
    faults = find_faults(CalibrationSchema, data)
    values = data if isinstance(data, dict) else {}
    model = {"model_type": model_type, "layers": layers, "hidden_size": hidden}
    last = {"ecl": layers - 1, "horizon": layers, "horizon_text": layers} if layers else {}
    bad = {place[:1] for place, _ in faults}
    for key, value in () if () in bad else values.items():
        if (key,) in bad:
            continue
        if model.get(key) not in (None, value):
            faults.append(((key,), f"{key}: {quote(value)}, but the model's is {model[key]}"))
        if key in last and value is not None and value > last[key]:
            rule = f"a layer from 0 to {last[key]}"
            faults.append(((key,), f"{key}: {quote(value)} is not {rule}"))
    if faults:
        faults.sort(key=lambda fault: lines.get(fault[0], 0))
        raise PresetError(report(path, faults, lines), f"needed: {', '.join(REQUIRED)}")
    sources = values.get("sources") or {}
    return Calibration(
        ecl=values["ecl"],
        horizon=values["horizon"],
        horizon_text=values.get("horizon_text"),
        sources={
            figure: sources.get(figure) or f"file {path}"
            for figure in FIGURES
            if values.get(figure) is not None
        },
        origin="file",
    )


def write_calibration(
    calibration: Calibration, model_type: str, layers: int, hidden: int, comment: str = ""
) -> str:
    """Return a calibration as the text of a file.

    Args:
        comment: lines to put before it.
    """
    import yaml

    values = (model_type, layers, hidden, calibration.ecl, calibration.horizon)
    data: dict[str, object] = dict(zip(REQUIRED, values, strict=True))
    if calibration.horizon_text is not None:
        data["horizon_text"] = calibration.horizon_text
    data["sources"] = dict(calibration.sources)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return head + text


@functools.cache  # every `pruning` block asks
def packaged_models() -> Mapping[str, Any]:
    """Return what `_data/models.yaml` has of published models: names, configs, calibrations."""
    import yaml

    text = resources.files("vtprune").joinpath("_data/models.yaml").read_text(encoding="utf-8")
    # The loader in C takes a hundredth of a second, the one in Python a tenth.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data: dict[str, Any] = yaml.load(text, Loader=loader)
    return data
