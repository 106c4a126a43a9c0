"""docs/api.md has every public name, and no other, and says where it is."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()


def public() -> set[str]:
    """Every name in the `__all__` of fastscore and of the modules under it, read without importing them."""
    names = set()
    for path in (ROOT / "fastscore").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= {f"{module}.{name}" for name in ast.literal_eval(node.value)}
    return names


def defined(path: Path) -> set[str]:
    """What a file defines at its top level."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {ast.unparse(target) for target in node.targets}
    return names


def test_every_public_name_has_a_row_that_says_where_it_is() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| \S.*\S \| \[`([\w./]+)`\]\(\.\./([\w./]+)\) \|$", PAGE, re.MULTILINE)
    assert len(rows) == sum(line.startswith("| `") for line in PAGE.splitlines())
    assert sorted(name for name, _, _ in rows) == sorted(public())
    for name, shown, path in rows:
        assert shown == path
        last = name.rpartition(".")[2]
        assert last in defined(ROOT / path) or Path(path).parts[-2:] == (last, "__init__.py"), name
