"""YAML files that nobody has vouched for, with the line of every key."""

from __future__ import annotations

from pathlib import Path

import yaml

from vtprune.errors import PresetError

LARGEST_FILE = 65_536  # bytes of a preset; a longer one is a mistake or an attack
DEEPEST = 20  # lists and mappings inside one another; a preset has 5


def read_yaml(path: Path) -> tuple[object, dict[tuple[str | int, ...], int]]:
    """A YAML file's data, and the line of every key and item by its path.

    Raises:
        PresetError: not readable, too large, not YAML, or with anchors (which can be made to
            grow without bound).
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise PresetError(f"{path}: can't be read: {reason}", "give a YAML file") from error
    if len(raw) > LARGEST_FILE:
        raise PresetError(f"{path}: larger than {LARGEST_FILE} bytes", "give a YAML preset")
    lines: dict[tuple[str | int, ...], int] = {}
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if getattr(event, "anchor", None):
                raise PresetError(f"{path}: anchors and aliases are not allowed", "write it out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:  # PyYAML takes half a minute for 64 KB of brackets
                raise PresetError(f"{path}: nested more than {DEEPEST} deep", "give a YAML preset")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            twice = _note_lines(node, (), lines)
            if twice:
                raise PresetError(f"{path}: {'; '.join(twice)}", "keep one of the two")
        return yaml.safe_load(text), lines
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise PresetError(
            f"{path}{where}: not valid YAML: {problem}", "check the indentation and the brackets"
        ) from error


def _note_lines(
    node: yaml.Node, path: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]
) -> list[str]:
    """Fills `lines`; returns a fault for every key that is given twice, as YAML takes the last."""
    twice: list[str] = []
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inside, line = (*path, str(key.value)), key.start_mark.line + 1
            if inside in lines:
                twice.append(f"line {line}: {key.value} is given twice")
            twice += _note_lines(value, inside, lines)
            lines[inside] = line
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            twice += _note_lines(item, (*path, number), lines)
    return twice
