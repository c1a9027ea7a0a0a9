"""Methods of the user's own: a class becomes an entry of the registry, once it keeps the contract.

Registering runs the user's code. It is done by a call or by the command line's --method alone: a
preset from a file, or a client's request, can name a registered method and never imports one.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar, cast

from vtprune.errors import PresetError, VtpruneError, brief, quote
from vtprune.pruners.base import LAYER_BEFORE, Pruner, depends_on_question
from vtprune.pruners.class_path import EXAMPLE
from vtprune.pruners.contract import CONTRACT, ContractError, Subject
from vtprune.pruners.entry import Method, MethodOption

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,99}")
PLACES = ("input", "ecl", "horizon")


def entry_of(name: str, cls: type) -> Method:
    """Return the registry's entry of a class, which keeps to the contract.

    Raises:
        PresetError: it does not, or says of itself what can't be.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PresetError(
            f"the name {quote(name)} can't be a method's",
            "letters, digits and _ . : -, beginning with a letter",
        )
    options = tuple(_options(name, cls))
    summary = (inspect.getdoc(cls) or "").partition("\n")[0].strip()
    entry = Method(
        path=f"{cls.__module__}:{cls.__qualname__}",
        at=_attribute(name, cls, "at", "input", PLACES),
        summary=summary.rstrip(".")[:47],
        paper="a method of one's own",
        options=options,
        exact=_attribute(name, cls, "exact", True, (True, False)),
        modalities=_attribute(
            name, cls, "modalities", ("image", "video"),
            [("image", "video"), ("image",), ("video",)],
        ),
    )  # fmt: skip
    needs: set[str] = set()
    for values in _settings(options):
        subject = Subject(cast("Callable[[], Pruner]", partial(cls, **values)), entry.exact)
        words = "".join(f", {key} {value}" for key, value in values.items())
        try:
            for check in CONTRACT.values():
                check(subject)
        except ContractError as error:
            raise PresetError(f"method {name}{words}: it {error}", EXAMPLE) from error
        except VtpruneError:
            raise
        except Exception as error:
            raise PresetError(
                f"method {name}{words}: it raised {type(error).__name__}: {error}", EXAMPLE
            ) from error
        needs |= set(subject.create().needs)
    lowest = int(bool(needs & set(LAYER_BEFORE)))
    return dataclasses.replace(
        entry,
        at="ecl" if lowest and entry.at == "input" else entry.at,
        lowest=lowest,
        reads_question=depends_on_question(needs),
    )


def _settings(options: tuple[MethodOption, ...]) -> Iterator[dict[str, object]]:
    """Yield the default options, and each other choice of each option by itself."""
    yield {}
    for option in options:
        for choice in option.choices:
            if choice != option.default:
                yield {option.name: choice}


def _attribute(name: str, cls: type, key: str, default: T, allowed: Sequence[T]) -> T:
    """Return what a class says of itself.

    Raises:
        PresetError: a value that there is not.
    """
    value = cast("T", getattr(cls, key, default))
    if value not in allowed:
        raise PresetError(
            f"method {name}: {key} is {quote(value)}, which is none of {brief(str(allowed))}",
            EXAMPLE,
        )
    return value


def _options(name: str, cls: type) -> Iterator[MethodOption]:
    """Yield the options of a class: the fields of a frozen dataclass.

    Raises:
        PresetError: a field that is neither a choice nor a number, or a dataclass that can change.
    """
    if not callable(getattr(cls, "select", None)) or not hasattr(cls, "needs"):
        raise PresetError(f"method {name}: {cls.__qualname__} has no needs or no select", EXAMPLE)
    if not dataclasses.is_dataclass(cls):
        return
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise PresetError(
            f"method {name}: its options could change", "decorate it: @dataclass(frozen=True)"
        )
    for field in dataclasses.fields(cls):
        default, about = field.default, field.metadata
        known = {key: about.get(key) for key in ("low", "high")}
        help_text = str(about.get("help", ""))
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            yield MethodOption(field.name, float(default), (), help_text, **known)
        elif isinstance(default, str) and default in about.get("choices", ()):
            yield MethodOption(field.name, default, tuple(about["choices"]), help_text)
        else:
            raise PresetError(
                f"method {name}: the option {field.name} has the default {quote(default)}",
                "an option is a number, or a text with choices: "
                'field(default="a", metadata={"choices": ("a", "b")})',
            )
