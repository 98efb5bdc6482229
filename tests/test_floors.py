"""Imports run strictly down the floors of docs/design.md; read off the source, late and type-checking imports included."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import bayesgn

PACKAGE = Path(bayesgn.__file__).parent
DESIGN = PACKAGE.parent / "docs" / "design.md"

FLOORS = {
    "_psd": 0, "_parameters": 0, "_data": 0, "_files": 0, "_extras": 0, "_distributed": 0, "_canvas": 0,
    "_kalman": 1, "likelihoods": 1, "metrics": 1, "datasets": 1,
    "rules": 2, "ggn": 2,
    "models": 3, "optim": 3,
    "inference": 4, "kernel_plots": 4,
    "plots": 5, "demo": 5, "integrations": 5, "": 5,
}  # fmt: skip

# Imports inside a function that close a circle within a room. Each is one object made by the other; no circle may join them unseen.
CIRCLES = {
    ("models.weight_posterior", "models._files"),  # a posterior saves itself, a file makes a posterior
    ("inference.evidence", "inference.refit"),  # turns of tuning and refitting call back the tuning
    ("likelihoods.config", "likelihoods"),  # a config names a class that its room exports
}


USERS = ("", "demo")  # the front door opens every room, and the demo comes in by it


class Import(NamedTuple):
    source: str
    target: str
    line: int
    late: bool  # not run when the module is imported


def name_of(path: Path) -> str:
    """Dotted, without the package's own name: "models.network", "" for the front door."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    return module.partition(".")[0]


def imports_of(module: str, text: str) -> list[Import]:
    """All of bayesgn that a module imports, wherever in its text; `from room import Thing` counts as an import of the room."""
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                add([alias.name for alias in child.names if alias.name.split(".")[0] == "bayesgn"], child.lineno, late)
            elif isinstance(child, ast.ImportFrom):
                base = from_name(child)
                if base is not None and not (base == "bayesgn" and all(a.name == "__version__" for a in child.names)):
                    names = [f"{base}.{alias.name}" for alias in child.names]
                    add([n if n.partition(".")[2] in MODULES else base for n in names], child.lineno, late)
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            visit(child, late or checking or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    def from_name(node: ast.ImportFrom) -> str | None:
        if node.level == 0:
            return node.module if node.module and node.module.split(".")[0] == "bayesgn" else None
        package = ["bayesgn", *module.split(".")]
        package = package if MODULES[module].name == "__init__.py" else package[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def add(names: list[str], line: int, late: bool) -> None:
        found.extend(Import(module, name.partition(".")[2], line, late) for name in dict.fromkeys(names))

    visit(ast.parse(text), False)
    return found


IMPORTS = [i for module, path in MODULES.items() for i in imports_of(module, path.read_text())]


def test_every_module_has_a_floor():
    assert {room(module) for module in MODULES} == set(FLOORS)


def test_the_reader_of_imports_reads_all_kinds():
    text = """
import bayesgn.ggn.full, torch
from bayesgn import metrics, models
from .. import _psd
from .base import Likelihood
if TYPE_CHECKING:
    from bayesgn.inference.tuning import Tuning
def f():
    from bayesgn import __version__
    import bayesgn as bgn
"""
    found = [(i.target, i.late) for i in imports_of("likelihoods.gaussian", text)]
    wanted = [("ggn.full", False), ("metrics", False), ("models", False), ("_psd", False), ("likelihoods.base", False)]
    assert found == [*wanted, ("inference.tuning", True), ("", True)]
    assert len(IMPORTS) > 100


@pytest.mark.parametrize("name", sorted(FLOORS, key=lambda r: (FLOORS[r], r)), ids=lambda n: n or "front door")
def test_imports_run_down(name):
    wrong = [
        f"{i.source}:{i.line} (floor {FLOORS[name]}) imports {i.target or 'bayesgn'} (floor {FLOORS[room(i.target)]})"
        for i in IMPORTS
        if room(i.source) == name != room(i.target) and FLOORS[room(i.target)] >= FLOORS[name] and name not in USERS
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circles_but_the_known_ones():
    """Within a room, too: an import that leads back to its own module stands inside a function and in the list above."""
    edges: dict[str, set[str]] = {}
    for i in IMPORTS:
        edges.setdefault(i.source, set()).add(i.target)
    front_doors = {module for module, path in MODULES.items() if path.name == "__init__.py"}

    def reaches(start: str, goal: str, without: set[tuple[str, str]]) -> bool:
        seen, todo = set(), [start]
        while todo:
            at = todo.pop()
            if at == goal:
                return True
            if at not in seen and at not in front_doors - {start}:  # a room's door is imported for its names, not its modules
                seen.add(at)
                todo += [t for t in edges.get(at, ()) if (at, t) not in without]
        return False

    circles = {(i.source, i.target) for i in IMPORTS if i.source and reaches(i.target, i.source, CIRCLES - {(i.source, i.target)})}
    assert circles <= CIRCLES
    assert all(i.late for i in IMPORTS if (i.source, i.target) in CIRCLES)


def test_the_table_in_the_design_says_the_same():
    if not DESIGN.exists():
        pytest.skip("an installed package has no docs")
    rows = dict(re.findall(r"^\| (\d) \|([^|]*)\|", DESIGN.read_text(), re.M))
    table = {name.removesuffix(".py").removesuffix("/"): int(floor) for floor, cell in rows.items() for name in re.findall(r"`([\w./]+)`", cell)}
    table = {("" if name in ("__init__", "bayesgn/__init__") else name): floor for name, floor in table.items()}
    assert {name: table.get(name) for name in FLOORS} == FLOORS
