"""Imports point down: a package of fastscore imports what stands below it, and nothing imports in a circle."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import fastscore

ROOT = Path(fastscore.__file__).parent
# from the bottom; names on one floor do not import each other
FLOORS = (("wording",), ("interrupts", "ops", "files", "rng", "progress", "arguments",
           "default_device", "garbage"),
          ("tables", "batches", "plots"), ("modules", "fingerprints"),
          ("graph", "taps"), ("fastpath",), ("scoring",), ("recovery",), ("pruning",), ("integrations",), ("cli",),
          ("__init__", "__main__"))
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


@functools.cache
def imports() -> dict[str, set[str]]:
    """File of the library -> the files of the library that it imports, in functions too; dotted, from its top."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) \
                else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for target in (target.removeprefix("fastscore.") for target in targets if target.startswith("fastscore.")):
                found[name] |= {known for known in (target, target.rpartition(".")[0], f"{target}.__init__")
                                if known in names}
    return found


def test_imports_point_down() -> None:
    """From one package or top-level file to another, only to a lower floor."""
    edges = {(name, target) for name, targets in imports().items() for target in targets}
    rooms = {(name, target, name.split(".")[0], target.split(".")[0]) for name, target in edges}
    assert len(edges) > 100
    assert not [f"{name} -> {target}" for name, target, room, below in sorted(rooms)
                if room != below and FLOOR[room] <= FLOOR[below]]


def test_no_circle() -> None:
    """Between files, within a package too."""
    assert len(list(TopologicalSorter(imports()).static_order())) > 50
