"""Names of ModelOpt's presets, read from its source: importing it takes seconds and torch."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_FILE = Path("torch", "quantization", "config.py")
_VARIABLE = "choices"
"""The set of all names in that file."""


@cache
def preset_names() -> frozenset[str]:
    """All names; empty where the file does not write them out, as another version may not."""
    spec = find_spec("modelopt")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            tree = ast.parse((Path(folder) / _FILE).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in tree.body:
            if (
                isinstance(node, ast.Assign | ast.AnnAssign)
                and isinstance(node.value, ast.Set)
                and _VARIABLE in {getattr(t, "id", "") for t in _targets(node)}
            ):
                values = [getattr(element, "value", None) for element in node.value.elts]
                if all(isinstance(value, str) for value in values):
                    return frozenset(map(str, values))
    return frozenset()


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]
