"""Modules import downward only, and what is light stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vtprune.models import FAMILIES

ROOT = Path(__file__).parents[1]
ROOMS = (
    "errors",
    "process_settings",
    "saving",
    "small_files",
    "disk_cache",
    "device",
    "tokens",
    "media",
    "pruners",
    "preset",
    "models",
    "engine",
    "inference",
    "pictures",
    "evaluation",
    "serving",
    "demo",
    "cli",
)
"""The folders and files of the package; each imports only from those before it."""
BESIDE = ("_dev", "__main__")
"""Scripts, which may import everything and which nothing imports."""
LIGHT = (
    "vtprune",
    "vtprune.errors",
    "vtprune.tokens.schedule",
    "vtprune.tokens.solver",
    "vtprune.models.cost",
    "vtprune.inference.report",
    "vtprune.evaluation.comparison",
    "vtprune.preset.spec",
    "vtprune.preset.schema",
    "vtprune.preset",
    "vtprune.preset.calibration",
    "vtprune.evaluation.variants",
    "vtprune.pruners",
    "vtprune.models",
    "vtprune.models.names",
    "vtprune.cli.config",
    "vtprune.inference.questions_file",
    "vtprune.cli.console",
    "vtprune.cli.console.comparison",
    "vtprune.demo",
    "vtprune.serving.harness",
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
    """Full names of what a file imports anywhere, inside functions and for type checking too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
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


def test_every_module_has_its_room() -> None:
    assert {part(module) for module in MODULES} == {*ROOMS, *BESIDE, ""}


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) in ROOMS])
def test_a_room_imports_only_rooms_before_it(module: str) -> None:
    before = ROOMS[: ROOMS.index(part(module))]
    assert parts_imported(module) <= set(before)


def test_only_the_command_line_uses_the_demo_world() -> None:
    assert {part(name) for name in MODULES if "demo" in parts_imported(name)} <= {"cli", "_dev"}


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


@pytest.mark.parametrize(
    "module", [name for name in MODULES if part(name) == "pruners" and name != "vtprune.pruners"]
)
def test_a_method_never_sees_a_model(module: str) -> None:
    outside = {name.split(".")[0] for name in IMPORTS[module]} - {"vtprune"}
    assert outside - set(sys.stdlib_module_names) <= {"torch"}


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "models"])
def test_a_family_never_sees_a_method(module: str) -> None:
    assert "pruners" not in parts_imported(module)


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("decord", ("media", "_dev")),
        ("av", ("media", "demo", "_dev")),
        ("PIL", ("media", "models", "pictures", "demo", "_dev")),
        ("rich", ("cli",)),
        ("click", ("cli", "_dev")),
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
    used = IMPORTS["vtprune.evaluation.checking.oracle"]
    assert {name for name in used if part(name) == "engine"} == {
        "vtprune.engine.hooks",
        "vtprune.engine.trace",  # what it reads: which tokens a block kept
    }


def test_hooks_are_put_on_in_one_place_and_by_the_engine_and_its_oracle_alone() -> None:
    users = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in HOOKS and part(module) not in BESIDE
    }
    assert users == {"vtprune.engine.hooks"}
    assert {name for name in MODULES if "vtprune.engine.hooks" in IMPORTS[name]} == {
        "vtprune.engine.answer_attention",
        "vtprune.engine.block",
        "vtprune.engine.decoder",
        "vtprune.engine.decoding",
        "vtprune.engine.kv_cache",
        "vtprune.engine.late_checks",
        "vtprune.engine.pixel_selection",
        "vtprune.engine.position_ids",
        "vtprune.engine.refusals",
        "vtprune.engine.replay",
        "vtprune.engine.vision_encoder",
        "vtprune.evaluation.checking.oracle",
    }


def test_the_packaged_model_is_named_in_one_place() -> None:
    naming = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == "embedded" and part(module) in ROOMS
    }
    assert naming == {"vtprune.models"}


def test_nothing_but_the_console_and_the_command_line_writes() -> None:
    users = {
        part(module)
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    }
    assert users <= {"cli", *BESIDE}


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


def test_the_projects_own_tools_say_that_they_run_in_a_checkout_only(tmp_path: Path) -> None:
    installed = tmp_path / "vtprune" / "_dev"
    installed.mkdir(parents=True)
    (tmp_path / "vtprune" / "__init__.py").touch()
    (installed / "__init__.py").write_bytes((ROOT / "vtprune/_dev/__init__.py").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "vtprune._dev.bench"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 1
    assert "vtprune._dev runs in a checkout of the project only" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_family_is_named_in_its_own_file_alone() -> None:
    """Model types stand in the family's file, the registry and the data; nowhere else."""
    for model_type, path in FAMILIES.items():
        own = path.split(":")[0]
        naming = {name for name, file in MODULES.items() if f'"{model_type}"' in file.read_text()}
        assert naming <= {own, "vtprune.models"}
