"""Names of files are written once: in ``runs/names.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoquant_ray
from autoquant_ray.runs import names
from autoquant_ray.runs.names import last_part, part_name
from autoquant_ray.runs.schemas import SCHEMAS, schema_of

PACKAGE = Path(autoquant_ray.__file__).parent
FILES = {value for value in vars(names).values() if isinstance(value, str) and "." in value[1:]}


def literals_of(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each string constant that is no docstring; of an f-string, its parts."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.lineno, node.value


def test_names_of_files_are_constants_everywhere() -> None:
    assert {"run.json", "sensitivity.parquet", "manifest.json", "report.html"} <= FILES
    offenders = [
        f"{file.relative_to(PACKAGE)}:{line}: {text!r}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != Path(names.__file__)
        for line, text in literals_of(file)
        if text.rpartition("/")[2] in FILES  # texts for people have words around the name
        or (text.endswith(".parquet") and " " not in text and len(text) > len(".parquet"))
    ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("plan.parquet", "plan.parquet"),
        ("solutions/bits-4.50/manifest.parquet", "manifest.parquet"),
        ("scores/manifest.parquet", "manifest.parquet"),
        (part_name("scores", 12), "scores"),
        (part_name("scores", 1_234_567), "scores"),
        (part_name("evaluation/key/allocation", 3), "evaluation"),
        (part_name("evaluation/key/samples", 3), "samples"),
    ],
)
def test_schema_is_that_of_the_file_or_of_the_folder_of_parts(name: str, key: str) -> None:
    assert schema_of(name) is SCHEMAS[key]


@pytest.mark.parametrize(
    ("uri", "last"),
    [
        ("/data/runs/night/", "night"),
        ("s3://bucket/runs/night?endpoint_override=localhost:9000", "night"),
        ("run", "run"),
        ("/", ""),
    ],
)
def test_last_part_of_a_place(uri: str, last: str) -> None:
    assert last_part(uri) == last
