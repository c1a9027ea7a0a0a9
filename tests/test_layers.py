"""Modules import downward only, and what is light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# fmt: off
LAYERS = (
    ("errors", "process_wide", "saving", "telling", "csv_file", "startup", "arguments"),
    ("clock", "capacity", "layout", "schedule", "solving", "quotas", "packing", "information",
     "cost", "trace", "report", "batching", "comparison", "units", "chart"),
    ("pruners", "spec", "yaml_file", "schema", "preset", "catalog", "config", "media", "models",
     "lineup", "questions_file"),
    ("attention", "footprint", "tower", "plan", "caches", "past", "present", "positions", "cuts",
     "reading", "records", "shortening", "prefill", "thinning", "thin_tower", "hooks", "encoding",
     "prompt_warnings", "refusals", "thread_state", "decoder", "engine"),
    ("calibrate", "adapters", "originals", "loading", "devices", "upstream", "generation", "memory",
     "figures", "compare", "downsampling", "gathering", "ahead", "prompts", "run", "evaluation",
     "standing", "contest", "answers", "profiling", "tuning", "harness", "checking"),
    ("console", "speed_chart", "profile_chart"),
    ("cli",),
    ("__main__",),
)
# fmt: on
"""The first part of a module's name after "vtprune", from the bottom up; a part imports from its
own layer and from those below."""
BESIDE = ("demo", "bench")
"""Made by nothing, and imported by nothing but the loader and the command line."""
WITHIN = {
    "schedule": {"errors"},
    "solving": {"errors", "schedule"},
    "quotas": set(),
    "layout": set(),
    "cost": {"errors"},
    "units": set(),
    "report": set(),
    "csv_file": set(),
    "startup": set(),
    "comparison": {"csv_file", "telling"},
    "spec": {"errors", "pruners"},
    "schema": {"errors", "pruners", "spec"},
    "yaml_file": {"errors"},
    "preset": {"errors", "pruners", "schema", "spec", "yaml_file"},
    "lineup": {"errors", "preset", "pruners", "spec", "telling"},
    "catalog": {"errors", "yaml_file"},
    "pruners": {"capacity", "errors", "layout", "quotas", "schedule", "units"},
    "media": {"errors", "process_wide"},
    "questions_file": {"errors", "media", "telling"},
    "models": {"errors", "layout", "media", "units"},
    "console": {"telling"},
    "chart": set(),
}
"""What the parts that everything rests on may import, apart from themselves."""
LIGHT = (
    "vtprune",
    "vtprune.errors",
    "vtprune.schedule",
    "vtprune.solving",
    "vtprune.cost",
    "vtprune.report",
    "vtprune.comparison",
    "vtprune.spec",
    "vtprune.schema",
    "vtprune.preset",
    "vtprune.lineup",
    "vtprune.pruners",
    "vtprune.models",
    "vtprune.catalog",
    "vtprune.config",
    "vtprune.questions_file",
    "vtprune.console",
    "vtprune.console.comparison",
    "vtprune.demo",
    "vtprune.harness",
    "vtprune.cli",
    "vtprune.cli.asking",
    "vtprune.cli.check",
    "vtprune.cli.complete",
    "vtprune.cli.flags",
    "vtprune.cli.help",
    "vtprune.cli.profile",
    "vtprune.cli.options",
    "vtprune.cli.output",
    "vtprune.cli.results",
)
HEAVY = ("torch", "transformers", "numpy", "av", "decord", "PIL", "safetensors")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "vtprune").rglob("*.py"))}


def imported_from(node: ast.ImportFrom, path: Path) -> str:
    """The full name of the module that a `from` import names."""
    if not node.level:
        return str(node.module)
    package = path.relative_to(ROOT).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def imports(path: Path) -> set[str]:
    """Full names of what a file imports anywhere, but not for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {inside for part in node.body for inside in ast.walk(part)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = imported_from(node, path)
            found |= {f"{source}.{alias.name}" for alias in node.names} & set(MODULES) or {source}
    return found


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def part(module: str) -> str:
    """What follows "vtprune." in a module's name, up to the next dot; "" for the package itself."""
    return [*module.split("."), ""][1]


def parts_imported(module: str) -> set[str]:
    own = {name for name in IMPORTS[module] if name.split(".")[0] == "vtprune"}
    return {part(name) for name in own} - {"", part(module)}


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def test_every_module_has_its_layer() -> None:
    known = {name for names in LAYERS for name in names} | set(BESIDE) | {""}
    assert {part(module) for module in MODULES} == known


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) not in ("", *BESIDE)])
def test_a_module_imports_from_its_own_layer_and_below(module: str) -> None:
    above = {
        name for name in parts_imported(module) - set(BESIDE) if layer(name) > layer(part(module))
    }
    assert not above


@pytest.mark.parametrize("name", WITHIN)
def test_a_part_rests_on_little(name: str) -> None:
    for module in MODULES:
        if part(module) == name:
            assert parts_imported(module) <= WITHIN[name], module


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module in done:
            return
        for name in sorted(top_level(module)):
            visit(name, (*way, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def top_level(module: str) -> set[str]:
    """Modules of this project that are imported as soon as `module` is."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            source = imported_from(node, MODULES[module])
            names = {f"{source}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= names or ({source} & set(MODULES))
    return found - {module}


def test_the_demo_world_is_imported_by_the_loader_and_its_commands_alone() -> None:
    users = {name for name in MODULES if "demo" in parts_imported(name)}
    assert users <= {"vtprune.loading", "vtprune.cli.demo", "vtprune.cli.asking"}


@pytest.mark.parametrize(
    "module", [name for name in MODULES if part(name) == "pruners" and name != "vtprune.pruners"]
)
def test_a_method_never_sees_a_model(module: str) -> None:
    outside = {name.split(".")[0] for name in IMPORTS[module]} - {"vtprune"}
    assert outside - set(sys.stdlib_module_names) <= {"torch"}
    assert not parts_imported(module) & {"models", "engine", "plan", "prefill", "cuts", "caches"}


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "models"])
def test_a_family_never_sees_a_method(module: str) -> None:
    assert not parts_imported(module) & {"pruners", "schedule", "preset", "plan", "engine"}


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("decord", ("media", "bench")),
        ("av", ("media", "demo", "bench")),
        ("PIL", ("media", "models", "demo")),
        ("rich", ("console",)),
        ("click", ("cli",)),
    ],
)
def test_a_library_is_imported_in_one_place(library: str, allowed: tuple[str, ...]) -> None:
    users = {
        module
        for module, names in IMPORTS.items()
        if library in {name.split(".")[0] for name in names} and part(module) not in allowed
    }
    assert not users


HOOKS = {"register_forward_pre_hook", "register_forward_hook"}


def test_the_oracle_shares_no_code_with_the_engine() -> None:
    engine = next(names for names in LAYERS if "engine" in names)
    assert parts_imported("vtprune.checking.oracle") & set(engine) == {"hooks"}


def test_hooks_are_put_on_in_one_place_and_by_the_engine_and_its_oracle_alone() -> None:
    users = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in HOOKS and part(module) not in BESIDE
    }
    assert users == {"vtprune.hooks"}
    assert {name for name in MODULES if "hooks" in parts_imported(name)} == {
        "vtprune.engine",
        "vtprune.encoding",
        "vtprune.decoder",
        "vtprune.prefill",
        "vtprune.thread_state",
        "vtprune.checking.oracle",
    }


def test_nothing_but_the_console_and_the_command_line_writes() -> None:
    users = {
        part(module)
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    }
    assert users <= {"console", "cli", *BESIDE}  # training is a script of its own


def test_what_is_light_imports_nothing_heavy() -> None:
    script = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module(name)
    heavy = [one for one in {HEAVY!r} if one in sys.modules]
    if heavy:
        sys.exit(f"{{name}} imports {{', '.join(heavy)}}")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
