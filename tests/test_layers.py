"""Imports point only down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyroem

PACKAGE = Path(pyroem.__file__).parent

# From bottom to top; a layer is a set of modules or packages that may use those below it only
# (a package's own modules may use one another).
LAYERS: list[set[str]] = [
    {"constraints", "errors", "interrupt", "progress", "text", "threads"},
    {"models"},
    {"semiring"},
    {"_pyro"},
    {"structure", "families", "datasets", "sampling", "blocks"},
    {"checks", "statistics"},
    {"chains"},
    {"reading"},
    {"mstep"},
    {"estep", "whole"},
    {"streaming", "distributed"},
    {"symmetry"},
    {"axes"},
    {"problem"},
    {"renaming"},
    {"diagnose", "clustering", "batch", "redrawn", "shards", "derivatives", "matching"},
    {"guesses", "loop", "sequences", "uncertainty"},
    {"together", "given", "imputation", "moves", "components", "curves", "simulation"},
    {"race", "constrained"},
    {"starts", "accelerate", "stored", "profiles"},
    {"checkpoint", "verdict"},
    {"explain"},
    {"fit"},
    {"solver", "implicit", "mcmc", "comparison", "resampled"},
    {"em", "gradient", "stepwise"},
    {"variational"},
    {"api", "compare", "selection"},
    {"bootstrap"},
    {"plot", "estimators", "benchmark"},
    {"report"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
FACES = {"plot", "report", "cli", "estimators", "__main__"}
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a module within the package."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def layer_of(name: str) -> str:
    return name.split(".")[0] or "__init__"


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when the module is imported."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node):
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def imports(path: Path, everywhere: bool = False) -> Iterator[str]:
    """The modules that a module imports when it is imported, or anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else statements(tree.body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            assert node.module is not None
            for alias in node.names:
                # Only our own names: beside an installed package lie those of others.
                inner = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
                is_module = node.module.split(".")[0] == PACKAGE.name and (
                    inner.is_dir() or inner.with_suffix(".py").exists()
                )
                yield f"{node.module}.{alias.name}" if is_module else node.module


def own_imports(path: Path) -> set[str]:
    found = {n for n in imports(path) if n.split(".")[0] == "pyroem"}
    return {n.removeprefix("pyroem").removeprefix(".") for n in found}


every_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


def test_every_module_has_a_layer() -> None:
    assert {layer_of(name_of(path)) for path in MODULES} == set(LEVEL)
    assert sum(map(len, LAYERS)) == len(LEVEL)


@every_module
def test_imports_point_down(path: Path) -> None:
    own = layer_of(name_of(path))
    for imported in own_imports(path):
        layer = layer_of(imported)
        if layer == own and path.parent != PACKAGE:
            continue  # within one package
        assert LEVEL[layer] < LEVEL[own], f"{name_of(path)} imports {imported or 'pyroem'}"


@every_module
def test_nothing_below_imports_a_face(path: Path) -> None:
    own = layer_of(name_of(path))
    if own in FACES:
        return
    assert not {layer_of(n) for n in own_imports(path)} & FACES


def test_packages_have_no_cycles_within() -> None:
    graph = {name_of(p): own_imports(p) for p in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done or name not in graph:
            return
        for imported in graph[name]:
            if imported != name:
                visit(imported, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@every_module
def test_only_one_place_touches_pyros_internals(path: Path) -> None:
    own = layer_of(name_of(path))
    if own == "_pyro":
        return
    allowed = {"pyro.ops.einsum.util"} if own == "semiring" else set()
    for name in imports(path, everywhere=True):
        if name.split(".")[0] != "pyro" or name in allowed:
            continue
        public = (
            "pyro",
            "pyro.distributions",
            "pyro.optim",
            "pyro.infer",
            "pyro.infer.autoguide",
            "pyro.ops",
        )
        assert name in public, f"{name_of(path)} imports {name}"
    text = path.read_text(encoding="utf-8")
    for call in ("get_param_store()._", "pyro.ops.", "pyro.poutine."):
        if own != "semiring":
            assert call not in text, f"{name_of(path)} uses {call}"


def test_models_are_plain_pyro_programs() -> None:
    for path in (PACKAGE / "models").glob("*.py"):
        for name in imports(path, everywhere=True):
            plain = ("pyro", "torch", "collections", "functools", "typing", "math")
            own = name.startswith(("pyroem.models.", "pyroem.constraints"))
            assert name.split(".")[0] in plain or own, name


def test_heavy_and_optional_packages_are_left_to_the_faces() -> None:
    optional = {"matplotlib", "rich", "sklearn", "pandas", "hmmlearn"}
    for path in MODULES:
        if layer_of(name_of(path)) not in FACES:
            assert not {n.split(".")[0] for n in imports(path)} & optional, path.name
