"""Names of the package, the benchmarks and the tests are names of things."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import autoquant_ray

ROOT = Path(__file__).parents[2]
FOLDERS = (Path(autoquant_ray.__file__).parent, ROOT / "benchmarks", ROOT / "tests")
FILLERS = {"one", "own", "found", "known", "told"}


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every name that a module binds; of attributes, those that it sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias):
            yield node.lineno, node.asname or node.name
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.lineno, node.rest


def test_names_are_names_of_things() -> None:
    wrong = [
        f"{file.relative_to(folder.parent)}:{line} binds {name!r}"
        for folder in FOLDERS
        for file in sorted(folder.rglob("*.py"))
        for line, name in bound_names(ast.parse(file.read_text(encoding="utf-8")))
        if name in FILLERS
    ]
    assert not wrong, "\n".join(wrong)


def test_every_way_to_bind_a_name_is_seen() -> None:
    source = """
import a as one
def own(found, *known, told=1, **rest):
    self.one = 1
    self.own: int = 2
    (found, known) = found
    with a as told: pass
    try: pass
    except E as one: pass
    if own := 1: pass
    for known in a: [told for told in a]
    match a:
        case [*found]: pass
        case {**own}: pass
        case B() as one: pass
class told: pass
"""
    names = [name for _, name in bound_names(ast.parse(source)) if name in FILLERS]
    counts = {name: names.count(name) for name in FILLERS}
    assert counts == {"one": 4, "own": 4, "found": 3, "known": 3, "told": 4}
    assert not [n for _, n in bound_names(ast.parse("one.own(found=known)")) if n in FILLERS]
