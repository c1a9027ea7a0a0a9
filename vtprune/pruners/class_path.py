"""The class that "package.module:Class" names, for a method of one's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vtprune.errors import PresetError, quote

EXAMPLE = "docs/methods.md shows a method of one's own"


def load_class(path: str) -> type:
    """Return the class that "module:Class" names; modules in the working directory are found too.

    Raises:
        PresetError: it can't be imported, or is no class.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise PresetError(
            f"the method {quote(path)} is no class", "write package.module:Class, or give the class"
        )
    try:
        with _working_directory():
            value = getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise PresetError(f"module {module} has no class {name}", "check its name") from error
    except Exception as error:
        raise PresetError(
            f"{module} can't be imported: {type(error).__name__}: {error}",
            "it is looked for in the working directory and in PYTHONPATH",
        ) from error
    if not inspect.isclass(value):
        raise PresetError(f"{path} is {quote(value)}, and no class", EXAMPLE)
    return value


def class_digest(cls: type) -> str:
    """Return the name of a class and a digest of its module's source, or of its own code alone."""
    digest = hashlib.sha256()
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    try:
        digest.update(Path(file or "").read_bytes())
    except OSError:  # typed at a prompt
        for name, value in sorted(vars(cls).items()):
            code = getattr(value, "__code__", None)
            digest.update(
                f"{name} {code and (code.co_code, code.co_consts, code.co_names)}".encode()
            )
    return f"{cls.__module__}:{cls.__qualname__} {digest.hexdigest()[:16]}"


def check_module(path: str) -> None:
    """Refuse a class whose module, or the package that it is in, is not there.

    Raises:
        PresetError: before `load_class` imports it, which may take seconds.
    """
    package = path.partition(":")[0].partition(".")[0]
    with _working_directory():
        exists = bool(package) and importlib.util.find_spec(package) is not None
    if not exists:
        raise PresetError(
            f"{quote(path)} can't be imported: there is no module {quote(package)}",
            "it is looked for in the working directory and in PYTHONPATH",
        )


@contextmanager
def _working_directory() -> Iterator[None]:
    """Look for modules in the working directory too, last."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
