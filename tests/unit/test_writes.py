"""Every place in the package that writes: by module, and why nobody reads half of it.

A new one makes this fail: write through :class:`~autoquant_ray.runs.directory.RunDirectory`, or
explain here why that is not needed. What is only deleted is not listed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoquant_ray

ROOT = Path(autoquant_ray.__file__).parent

WRITERS = {
    *("mkdir", "makedirs", "create_dir", "rename", "renames", "symlink_to", "symlink", "touch"),
    *("write_text", "write_bytes", "write_json", "write_table", "write_tables", "write_all"),
    *("write", "writelines", "truncate", "ftruncate", "tofile", "write_dataset", "write_csv"),
    *("open_output_stream", "open_append_stream", "ParquetWriter", "new_file", "copy_file"),
    *("save_file", "save_pretrained", "savez", "extractall", "extract", "copyfile", "copytree"),
    *("copy2", "copyfileobj", "move", "mkdtemp", "mkstemp", "TemporaryDirectory"),
    *("NamedTemporaryFile", "hardlink_to"),
}
"""Names of functions and methods that write, besides ``open`` and ``replace``."""

RUN = "through RunDirectory or its Place: a file appears whole, under its name"
SCRATCH = "a temporary folder of this process, which nobody else reads"
EXPORT = "in the temporary folder beside the export, renamed at its end (written_beside)"
PART = "under a temporary name beside its place, renamed"
IS_IT = "this is how files appear whole"
STREAM = "no file: the terminal, a stream, or a function of that name which writes through others"

WRITES: dict[str, dict[str, str]] = {
    "allocate/frontier.py": {"directory.write_table": RUN},
    "cli/edge.py": {"os.open": "the null device"},
    "cli/export.py": {
        "path.parent.mkdir": "the folder of a recipe, there or not",
        "part.write_text": PART,
        "part.replace": PART,
    },
    "compare/history.py": {"folder.write_table": RUN},
    "compare/nightly.py": {"directory.write_json": RUN, "directory.write_text": RUN},
    "compare/site_page.py": {"place.write_text": RUN},
    "data/template_text.py": {"write_text": STREAM},
    "distributed/forks/workers.py": {
        "tempfile.TemporaryDirectory": SCRATCH,
        "draft.write_text": PART,
        "draft.rename": PART,
        "os.open": "the null device",
    },
    "evaluate/audit_pairs.py": {"directory.write_table": RUN},
    "evaluate/evaluate.py": {"directory.write_table": RUN},
    "evaluate/held_out.py": {
        "tempfile.TemporaryDirectory": SCRATCH,
        "directory.write_bytes": RUN,
        "directory.write_json": RUN,
    },
    "evaluate/measurement.py": {
        "directory.write_table": RUN,
        "self.state.directory.write_table": RUN,
    },
    "evaluate/shapley.py": {"directory.write_table": RUN},
    "export/carried.py": {"(folder / file).write_text": EXPORT},
    "export/compressed_tensors.py": {"file.write_text": EXPORT},
    "export/folder.py": {
        "target.parent.mkdir": "where the export goes, there or not",
        "tempfile.mkdtemp": EXPORT,
        "folder.rename": EXPORT,
        "folder.mkdir": "of finished parts; what is in it is whole",
        "save_file": "a part, renamed when it is whole; a checkpoint's file: " + EXPORT,
        "unfinished.rename": PART,
        "(out / INDEX).write_text": EXPORT,
    },
    "export/model.py": {"files.write": PART, "loaded.model.save_pretrained": EXPORT},
    "export/modelopt.py": {"(folder / name).write_text": EXPORT},
    "export/other_files.py": {
        "(folder / CARD).write_text": EXPORT,
        "(folder / CONFIG).write_text": EXPORT,
        "load_tokenizer(TokenizerRef.of(ref, '')).save_pretrained": EXPORT,
        "shutil.copyfile": EXPORT,
        "shutil.copytree": EXPORT,
    },
    "imports/modelopt.py": {"directory.write_table": RUN},
    "jobs/cluster.py": {"tempfile.TemporaryDirectory": SCRATCH, "write": STREAM},
    "jobs/latency_card.py": {"place.write": RUN},
    "jobs/package.py": {
        "(folder / _JOB_FILE).write_text": SCRATCH,
        "archive.extractall": SCRATCH,
        "shutil.copytree": SCRATCH,
    },
    "report/__init__.py": {"directory.write_text": RUN},
    "runs/directory.py": {
        "self._place.write": RUN,
        "self._place.write_all": RUN,
        "self.write_bytes": RUN,
        "self.write_text": RUN,
        "pq.ParquetWriter": "into the temporary file of Place.filled",
        "writer.write_table": "into the temporary file of Place.filled",
    },
    "runs/filesystems.py": {
        "tempfile.TemporaryDirectory": SCRATCH,
        "self.write": RUN,
        "temporary.write_bytes": IS_IT,
        "stack.enter_context(beside).write_bytes": IS_IT,
        "self._temporary.parent.mkdir": "of the temporary file",
        "beside.rename": IS_IT,
        "os.replace": IS_IT,
        "filesystem.open_output_stream": "of an object store: an upload is whole or not there",
        "stream.write": "of an object store: the whole content at once",
        "os.makedirs": "before a line is appended",
        "open": "appends lines of events; half a line is cut off when the next is written",
        "os.truncate": "cuts half a line of events off",
    },
    "runs/lease.py": {"directory.write_json": RUN, "self._directory.write_json": RUN},
    "runs/parquet_bytes.py": {"pq.write_table": "into memory"},
    "runs/state.py": {"self.directory.write_json": RUN},
    "scan.py": {"tempfile.TemporaryDirectory": SCRATCH},
    "score/loading.py": {"tempfile.TemporaryDirectory": SCRATCH},
    "solve.py": {"directory.write_json": RUN, "directory.write_table": RUN},
    "stages/calibrate.py": {"directory.write_table": RUN},
    "stages/domain_scores.py": {"directory.write_table": RUN},
    "stages/fit.py": {"directory.write_tables": RUN, "state.directory.write_table": RUN},
    "stages/samples.py": {
        "scratch.write_table": SCRATCH,
        "self._scratch.write_table": SCRATCH,
        "state.directory.write_bytes": RUN,
    },
    "stages/score.py": {"directory.write_table": RUN, "state.directory.write_table": RUN},
    "stages/shards.py": {"work.write": STREAM},
    "tracking/mlflow_runs.py": {
        "tempfile.TemporaryDirectory": SCRATCH,
        "path.parent.mkdir": SCRATCH,
        "path.write_bytes": SCRATCH,
    },
}
"""Module -> what it calls -> why that is safe."""


def writes(tree: ast.AST) -> Iterator[str]:
    """What is called in a module and writes, as its source has it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        if (
            name in WRITERS
            or (name == "open" and _opens_for_writing(node, called))
            or (name == "replace" and _renames(node, called))
        ):
            yield called


def _opens_for_writing(call: ast.Call, called: str) -> bool:
    if called == "os.open":
        return any(flag in ast.unparse(call) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    texts = (a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return any(len(text) <= 3 and set(text) & set("wax+") for text in texts)


def _renames(call: ast.Call, called: str) -> bool:
    """``os.replace(a, b)`` or ``path.replace(b)``; texts take two arguments, dates keywords."""
    is_of_path = "." in called and len(call.args) == 1 and not call.keywords
    return called == "os.replace" or is_of_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("open(path, 'w')", ["open"]),
        ("open(path, mode='ab')", ["open"]),
        ("path.open('x')", ["path.open"]),
        ("open(path, 'rb'); open('w.txt'); place.open(name)", []),
        ("os.open(p, os.O_RDONLY); os.open(p, os.O_RDWR | os.O_CREAT)", ["os.open"]),
        ("os.replace(a, b); a.replace(b); text.replace('a', 'b'); day.replace(hour=1)", 2),
        ("pq.write_table(t, p); fs.open_output_stream(p)", 2),
    ],
)
def test_what_writes_is_seen(source: str, expected: list[str] | int) -> None:
    seen = list(writes(ast.parse(source)))
    assert (len(seen) if isinstance(expected, int) else seen) == expected


def test_every_write_of_the_package_is_explained() -> None:
    seen = {
        (path.relative_to(ROOT).as_posix(), called)
        for path in ROOT.rglob("*.py")
        for called in writes(ast.parse(path.read_text()))
    }
    explained = {(module, called) for module, calls in WRITES.items() for called in calls}
    assert sorted(seen - explained) == []
    assert sorted(explained - seen) == []
