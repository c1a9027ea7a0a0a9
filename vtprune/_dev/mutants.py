"""Change the code, one slip at a time, and see whether its tests find it.

`python -m vtprune._dev.mutants vtprune/tokens/quotas.py --tests tests/test_layout.py --count 20
--save LOG` draws changes of the functions of the files, makes each alone in a copy of the checkout,
and runs the tests there. What is left over is for a reader: it may change nothing at all. Without
`--save` the changes are listed. Texts of messages, annotations and defaults stay as they are.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtprune._dev import CHECKOUT
from vtprune._dev.arguments import Parser
from vtprune._dev.lines import read_lines

COMPARISONS: Mapping[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
OPERATORS: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip
CALLS = {
    "min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "any": "all", "all": "any",
    "sorted": "list", "reversed": "list", "clamp_min": "clamp_max", "clamp_max": "clamp_min",
    "amax": "amin", "amin": "amax", "argmax": "argmin", "argmin": "argmax",
}  # fmt: skip
LEFT_OUT = ("clamp_min", "clamp_max", "nan_to_num", "nonzero", "abs", "square", "sqrt", "exp",
            "log", "float")  # fmt: skip
"""Calls of methods that a change leaves out."""
LONGEST_NAME = 12
"""Characters of texts that are names, which are changed too."""
LEAST_SECONDS = 20.0
"""The tests have them, and thrice the time that they take without a change."""


@dataclass(frozen=True)
class CodeChange:
    """A change of a file.

    Args:
        number: among the changes of its file.
        place: the line, and the function that it is in.
        what: the code, and what comes in its place.
    """

    file: str
    number: int
    place: str
    what: str


@dataclass(frozen=True)
class ChangeTrial:
    """How the tests met a change: "found", "hung" (which finds it too) or "left"."""

    change: CodeChange
    outcome: str
    seconds: float


# -- changes ---------------------------------------------------------------------------------------


def _with(node: Any, **fields: object) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _put(items: Sequence[Any], index: int, *new: Any) -> list[Any]:
    return [*items[:index], *new, *items[index + 1 :]]


def replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield what a slip could put in the place of a node, each with a word for it."""
    match node:
        case ast.Compare():
            for index, operator in enumerate(node.ops):
                for other in COMPARISONS[type(operator)]:
                    yield other.__name__, _with(node, ops=_put(node.ops, index, other()))
        case ast.BinOp() | ast.AugAssign():
            if (new := OPERATORS.get(type(node.op))) is not None:
                yield new.__name__, _with(node, op=new())
            if isinstance(node, ast.AugAssign):
                yield "=", ast.Assign([node.target], node.value)
        case ast.BoolOp():
            either = ast.Or if isinstance(node.op, ast.And) else ast.And
            yield either.__name__, _with(node, op=either())
            for index in range(len(node.values)):
                yield f"without part {index}", _with(node, values=_put(node.values, index))
        case ast.UnaryOp():
            yield "without the sign", node.operand
        case ast.If() | ast.IfExp() | ast.While():
            yield "the other way", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.comprehension():
            for index, test in enumerate(node.ifs):
                turned = ast.UnaryOp(ast.Not(), test)
                yield "the other way", _with(node, ifs=_put(node.ifs, index, turned))
                yield "always", _with(node, ifs=_put(node.ifs, index))
        case ast.Constant(value=bool() | None):
            yield "another", _with(node, value=0 if node.value is None else not node.value)
        case ast.Constant(value=int() | float()):
            for by in (1, -1):
                yield f"{by:+}", _with(node, value=node.value + by)  # type: ignore[operator]
        case ast.Constant(value=str(text)) if len(text) < LONGEST_NAME and text.isidentifier():
            yield "another name", _with(node, value=f"XX{text}")
        case ast.Return(value=ast.AST()) | ast.Assign():
            if not isinstance(node.value, ast.Constant):
                yield "None", _with(node, value=ast.Constant(None))
        case ast.Break():
            yield "continue", ast.Continue()
        case ast.Continue():
            yield "break", ast.Break()
        case ast.Call():
            yield from _calls(node)
        case ast.Slice():
            for end in ("lower", "upper"):
                if getattr(node, end) is not None:
                    yield f"without {end}", _with(node, **{end: None})


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    function = node.func
    field = "id" if isinstance(function, ast.Name) else "attr"
    name = getattr(function, field, "")
    if name in CALLS:
        yield CALLS[name], _with(node, func=_with(function, **{field: CALLS[name]}))
    if isinstance(function, ast.Attribute) and name in LEFT_OUT:
        yield "without the call", function.value
    for index, argument in enumerate(node.args):
        if len(node.args) > 1 and not isinstance(argument, (ast.Starred, ast.Constant)):
            nothing = ast.Constant(None)
            yield f"argument {index} None", _with(node, args=_put(node.args, index, nothing))
    for index, keyword in enumerate(node.keywords):
        yield f"without {keyword.arg}=", _with(node, keywords=_put(node.keywords, index))


def _inside(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Yield the nodes in functions, each with the function's name."""
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return
    children: list[Any] = [*ast.iter_child_nodes(node)]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        name = getattr(node, "name", "lambda")
        function = f"{function}.{name}" if function else name
        children = node.body if isinstance(node.body, list) else [node.body]
    elif isinstance(node, ast.ClassDef):
        children = node.body
    elif function:
        yield node, function
        if isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            children = [node.left]  # `is None` is changed as a whole
    for child in children:
        yield from _inside(child, function)


def _sites(tree: ast.AST) -> list[tuple[ast.AST, ast.AST, str, str]]:
    """Return each node that is changed, its replacement, its place and the change in words."""
    sites = []
    for node, function in _inside(tree):
        for word, new in replacements(node):
            shown = node.test if isinstance(node, (ast.If, ast.While)) else node
            text = " ".join(ast.unparse(shown).split())[:90]
            sites.append(
                (node, new, f"{getattr(node, 'lineno', 0)} {function}", f"{text} -> {word}")
            )
    return sites


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def list_changes(file: str, source: str) -> list[CodeChange]:
    """Return all changes of a file."""
    sites = _sites(ast.parse(source))
    return [CodeChange(file, number, *words) for number, (_, _, *words) in enumerate(sites)]


def changed_source(source: str, number: int) -> str:
    """Return a file's source with one of its changes."""
    tree = ast.parse(source)
    old, new, *_ = _sites(tree)[number]
    return ast.unparse(ast.fix_missing_locations(_Replace(old, new).visit(tree)))


# -- trials ----------------------------------------------------------------------------------------


def run_tests(checkout: Path, tests: Sequence[str], seconds: float | None) -> str:
    """Return how the tests of a checkout end: "left" (none fails), "found" or "hung"."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return "hung"
    return "found" if ended.returncode else "left"


def try_changes(
    changes: Sequence[CodeChange], tests: Sequence[str], log: Path
) -> list[ChangeTrial]:
    """Run the tests with each change that a log does not have yet, and add it there.

    Raises:
        SystemExit: the tests fail without a change.
    """
    done = {(line["change"]["file"], line["change"]["number"]) for line in read_lines(log)}
    with tempfile.TemporaryDirectory() as name, log.open("a", encoding="utf-8") as lines:
        checkout = Path(name, "checkout")
        shutil.copytree(CHECKOUT, checkout, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        began = time.monotonic()
        if run_tests(checkout, tests, None) != "left":
            sys.exit("the tests fail, or there are none, without any change")
        limit = LEAST_SECONDS + 3 * (time.monotonic() - began)
        for change in changes:
            if (change.file, change.number) in done:
                continue
            path = checkout / change.file
            source, began = path.read_text("utf-8"), time.monotonic()
            path.write_text(changed_source(source, change.number), "utf-8")
            outcome = run_tests(checkout, tests, limit)
            path.write_text(source, "utf-8")
            trial = ChangeTrial(change, outcome, round(time.monotonic() - began, 1))
            lines.write(json.dumps(asdict(trial)) + "\n")
            lines.flush()
    return [
        ChangeTrial(CodeChange(**line["change"]), line["outcome"], line["seconds"])
        for line in read_lines(log)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", help="of vtprune, as git names them")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="files, or tests of them")
    parser.add_argument("--count", type=int, help="changes to draw; none: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--save", type=Path, help="the log: a change a line")
    args = parser.parse_args(arguments)
    changes = [
        change
        for file in args.files
        for change in list_changes(file, (CHECKOUT / file).read_text("utf-8"))
    ]
    if args.count is not None:
        count = min(args.count, len(changes))
        changes = random.Random(args.seed).sample(changes, count)
    shown = changes
    if args.save:
        trials = try_changes(changes, args.tests, args.save)
        outcomes = Counter(trial.outcome for trial in trials)
        shown = [trial.change for trial in trials if trial.outcome == "left"]
        sys.stdout.write(", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()) + "\n")
    for change in shown:
        sys.stdout.write(f"{change.file}:{change.place}: {change.what}\n")


if __name__ == "__main__":
    main()
