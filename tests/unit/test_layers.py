"""The floors of the house: which package may import which, and who may load torch or Ray.

One table says it all, default deny: a module may import its own package and packages on lower
floors, nothing else. Imports inside functions and for type checkers count like any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import autoquant_ray

PACKAGE = Path(autoquant_ray.__file__).parent
ROOT = PACKAGE.name

FLOORS: tuple[tuple[str, ...], ...] = (
    ("arrays", "errors", "modelopt_api", "modelopt_export", "notebook", "version", "wording"),
    ("formats",),
    ("serving",),
    ("config",),
    ("runs",),
    ("models",),
    ("data", "plan", "quantize.backends"),
    ("quantize", "allocate.knapsack", "distributed"),
    ("allocate", "calibrate", "distributed.forks", "quantize.gptq", "score.drawing", "score.rerun"),
    (
        "allocate.certainty",
        "allocate.constrained",
        "report.charts",
        "report.task_scores",
        "score",
        "tracking",
    ),
    ("report", "export"),
    ("checkpoint_limits", "stages"),
    ("solve",),
    ("imports", "scan", "evaluate.tasks"),
    ("evaluate",),
    ("jobs",),
    ("compare",),
    ("api", "cli"),
    ("__init__", "__main__"),
)
"""Rooms and top-level modules, from the ground floor up."""

TORCH_PACKAGES = {
    "quantize",
    "quantize.backends",
    "quantize.gptq",
    "calibrate",
    "score",
    "score.drawing",
    "score.rerun",
}
TORCH_FILES = {
    "evaluate.divergence",
    "evaluate.flip_estimator",
    "evaluate.runner",
    "export.compressed_tensors",
    "export.model",
    "export.modelopt",
    "export.parts",
    "modelopt_api",
    "modelopt_export",
}
"""Where torch is imported when the module is; elsewhere only inside the functions that need it."""
TORCH_INSIDE_FUNCTIONS = {"models", "plan", "distributed", "distributed.forks", "export", "cli"}
DOORS = ("modelopt_api", "modelopt_export")
"""The modules that import ModelOpt."""
RAY_PACKAGES = {"distributed", "stages", "scan", "evaluate", "jobs"}
"""Where Ray may be imported, anywhere in a module."""

MAX_FILES = 20
MAX_LINES = 400


def modules() -> dict[str, Path]:
    """Name below the package -> file, of every module."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__") or "__init__": file for name, file in names.items()}


MODULES = modules()


def imports_of(name: str) -> Iterator[tuple[str, bool]]:
    """Full names of what a module imports; whether that happens when the module is imported."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name} has a relative import"
                yield from ((f"{child.module}.{alias.name}", at_once) for alias in child.names)
            else:
                is_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
                    isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                )
                yield from visit(child, at_once and not is_later)

    yield from visit(ast.parse(MODULES[name].read_text(encoding="utf-8")), True)


def imported_modules(name: str) -> set[str]:
    """Modules of the package that a module imports, itself left out."""
    names = set()
    for full, _ in imports_of(name):
        if full.partition(".")[0] != ROOT:
            continue
        path = full.partition(".")[2] or "__init__"
        while path not in MODULES and "." in path:
            path = path.rpartition(".")[0]
        names.add(path if path in MODULES else "__init__")
    return names - {name}


def room_of(name: str) -> str:
    """The package that a module lives in; a top-level module is a room by itself."""
    is_package = MODULES[name].name == "__init__.py"
    return name if is_package or "." not in name else name.rpartition(".")[0]


FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def test_every_module_lives_on_a_floor_of_the_table() -> None:
    assert {room_of(name) for name in MODULES} == set(FLOOR_OF)
    assert len(FLOOR_OF) == sum(map(len, FLOORS)), "a room stands on two floors"


def test_imports_go_to_lower_floors_only() -> None:
    wrong = [
        f"{name} (floor {FLOOR_OF[room_of(name)]}) imports {other} (floor {FLOOR_OF[there]})"
        for name in MODULES
        for other in sorted(imported_modules(name))
        if (there := room_of(other)) != room_of(name) and FLOOR_OF[there] >= FLOOR_OF[room_of(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_form_no_circle() -> None:
    left = {name: imported_modules(name) for name in MODULES}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"circles among {sorted(left)}"


def test_imports_are_found_at_all() -> None:
    """The rules above mean something only if imports inside functions and of types are seen."""
    assert "distributed.failure" in imported_modules("distributed.pool")
    assert ("ray.get", True) not in imports_of("allocate.search")
    assert any(full.startswith("ray") for full, _ in imports_of("distributed.pool"))
    lazy = [full for full, at_once in imports_of("cli.main") if not at_once]
    assert "autoquant_ray.solve.solve_run" in lazy


def test_torch_is_imported_where_the_table_says() -> None:
    wrong = []
    for name in MODULES:
        for full, at_once in imports_of(name):
            if full.partition(".")[0] != "torch":
                continue
            room = room_of(name)
            may_at_once = room in TORCH_PACKAGES or name in TORCH_FILES
            if not (may_at_once or (not at_once and room in TORCH_INSIDE_FUNCTIONS)):
                wrong.append(f"{name} imports {full}")
    assert not wrong, "\n".join(wrong)


def test_modelopt_is_imported_by_its_door_only() -> None:
    wrong = [
        f"{name} imports {full}"
        for name in MODULES
        for full, _ in imports_of(name)
        if full.partition(".")[0] == "modelopt" and name not in DOORS
    ]
    assert not wrong, "\n".join(wrong)


def test_the_door_to_modelopt_is_imported_where_torch_may_be() -> None:
    """It imports torch itself."""
    wrong = [
        f"{name} imports {full}"
        for name in MODULES
        for full, at_once in imports_of(name)
        if full.startswith(tuple(f"{ROOT}.{door}" for door in DOORS)) and at_once
        if room_of(name) not in TORCH_PACKAGES and name not in TORCH_FILES
    ]
    assert not wrong, "\n".join(wrong)


def test_ray_is_imported_where_the_table_says() -> None:
    wrong = [
        f"{name} imports {full}"
        for name in MODULES
        for full, _ in imports_of(name)
        if full.partition(".")[0] == "ray" and room_of(name) not in RAY_PACKAGES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_pickle() -> None:
    wrong = [
        f"{name} imports {full}"
        for name in MODULES
        for full, _ in imports_of(name)
        if full.partition(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"}
    ]
    assert not wrong, "\n".join(wrong)


def test_folders_and_files_hold_one_subject() -> None:
    counts: dict[Path, int] = {}
    for file in MODULES.values():
        counts[file.parent] = counts.get(file.parent, 0) + 1
    full = [
        f"{folder.name}: {count} files" for folder, count in counts.items() if count > MAX_FILES
    ]
    lengths = {name: len(file.read_text("utf-8").splitlines()) for name, file in MODULES.items()}
    long = [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > MAX_LINES]
    assert not full + long, "\n".join(full + long)


def test_every_package_says_what_lives_there() -> None:
    silent = [
        name
        for name, file in MODULES.items()
        if file.name == "__init__.py"
        and len((ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").splitlines()) < 2
    ]
    assert not silent


def test_packages_say_they_import_what_the_table_lets_them() -> None:
    wrong = []
    for room, file in (
        (name, file) for name, file in MODULES.items() if file.name == "__init__.py"
    ):
        text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
        imported = re.search(r"Imports (.*?)\.(\s|$)", text, re.DOTALL)
        names = re.findall(r"``([\w.]+)``", imported[1] if imported else "")
        wrong += [f"{room}: {n}" for n in names if FLOOR_OF.get(n, 0) >= FLOOR_OF[room]]
        files = {name.partition(".")[0] for name in TORCH_FILES}
        if room in TORCH_PACKAGES | files and "torch" not in text.replace("No torch", ""):
            wrong.append(f"{room} does not say that it imports torch")
        if room in RAY_PACKAGES and not re.search(r"(?<!no )(?<!No )(?<!never )\bRay\b", text):
            wrong.append(f"{room} does not say that it imports Ray")
    assert not wrong, "\n".join(wrong)


def test_contributing_shows_the_table() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    described = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert sorted(described) == sorted(FLOOR_OF)
    floors = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    listed = [tuple(re.sub("`", "", names).split(" · ")) for _, names in reversed(floors)]
    assert listed == list(FLOORS)
    assert [int(number) for number, _ in floors] == list(range(len(FLOORS), 0, -1))
