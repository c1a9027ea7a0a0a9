"""Untrusted YAML files, with the line of every key."""

from __future__ import annotations

from pathlib import Path

import yaml

from vtprune.errors import PresetError, brief, brief_path, list_faults, path_fault, path_hint
from vtprune.small_files import read_small

LARGEST_FILE = 65_536  # bytes of a preset; a longer one is a mistake or an attack
DEEPEST = 20  # lists and mappings inside one another; a preset has 5
WAY_OUT = "check the indentation and the brackets"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose every failure has a line.

    PyYAML 6.0 lets errors of Python through where a value does not fit its tag: IndexError for
    `!!int ""`, KeyError for `!!bool x`, AttributeError for `!!timestamp x`, ValueError for the
    30th of February.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            value: object = super().construct_object(node, deep)
            return value
        except yaml.YAMLError:
            raise
        except Exception as error:
            kind = str(node.tag).rpartition(":")[2]
            problem = f"{brief(node.value)} is not a value of type {kind}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def read_yaml(path: Path) -> tuple[object, dict[tuple[str | int, ...], int]]:
    """Return a YAML file's data, and the line of every key and item by its path.

    Raises:
        PresetError: not readable, too large, not YAML, or with anchors (which can be made to grow
            without bound).
    """
    name = brief_path(path)
    try:
        raw = read_small(path, LARGEST_FILE)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PresetError(
            f"{name}: can't be read: {path_fault(error)}", path_hint(path, "give a YAML file")
        ) from error
    if len(raw) > LARGEST_FILE:
        raise PresetError(f"{name}: larger than {LARGEST_FILE} bytes", "give a YAML file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PresetError(
            f"{name}, line {line}: can't be read: not UTF-8 text", "give a YAML file"
        ) from error
    lines: dict[tuple[str | int, ...], int] = {}
    try:
        _check_shape(text, name)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            twice = [] if node is None else _note_lines(node, (), lines)
            if twice:
                raise PresetError(f"{name}: {list_faults(twice)}", "keep one of the two")
            return (None if node is None else loader.construct_document(node)), lines
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{error.character:04X} is not allowed"
        raise PresetError(f"{name}, line {line}: not valid YAML: {problem}", WAY_OUT) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise PresetError(f"{name}{location}: not valid YAML: {problem}", WAY_OUT) from error


def _check_shape(text: str, name: str) -> None:
    """Refuse anchors, and what is nested too deep.

    Raises:
        PresetError: with the line.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        assert event.start_mark is not None
        location = f"{name}, line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None):
            raise PresetError(f"{location}: anchors and aliases are not allowed", "write it out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:  # PyYAML takes half a minute for 64 KB of brackets
            raise PresetError(f"{location}: nested more than {DEEPEST} deep", "give a YAML file")


def _note_lines(
    node: yaml.Node, path: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]
) -> list[str]:
    """Fill `lines`; return a fault for every key that is given twice: YAML would take the last."""
    twice: list[str] = []
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inside, line = (*path, str(key.value)), key.start_mark.line + 1
            if inside in lines:
                twice.append(f"line {line}: {brief(key.value)} is given twice")
            twice += _note_lines(value, inside, lines)
            lines[inside] = line
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            twice += _note_lines(item, (*path, number), lines)
    return twice
