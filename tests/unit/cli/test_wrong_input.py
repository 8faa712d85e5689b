"""Wrong input of every kind, to every command: one line that says so, the right code, no traceback.

The cases are made from tables: options of the commands with values that they cannot take, files
that are damaged or edited, paths and URIs that hold what they must not.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from command_line import NO_CLUSTER, refusal, run
from written_runs import made_up_config, made_up_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.main import main
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model, fingerprint_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.solve import solve_run

FORMATS = ("wint4_afp16", "wfp8_afp8", "wint8_aint8")
LONG = "x" * 300
DEEP = "[" * 30_000 + "]" * 30_000
MOST_SECONDS = 1.0
HEAVY = ("autoquant_ray.scan", "autoquant_ray.evaluate.refine", "autoquant_ray.export.checkpoint")
"""Imported before the cases: their seconds are those of torch, transformers and Ray."""
NAMELESS = re.compile(r"error: (?!Infeasible)[A-Z]\w*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True, kw_only=True)
class Folders:
    """What the cases are about; each case may change all of it."""

    run: Path
    model: Path
    data: Path
    scratch: Path

    def words(self, line: str) -> list[str]:
        """A command with the capital words replaced."""
        places = {
            "RUN": self.run,
            "MODEL": self.model,
            "DATA": self.data,
            "OUT": self.scratch / "out",
            "FILE": self.scratch / "file",
            "NONE": self.scratch / "none",
            "NO": NO_CLUSTER,
        }
        return [str(places.get(word, word)) for word in line.split()]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command that must be refused.

    Attributes:
        name: Id of the test.
        line: The command, capital words for places.
        more: Further words, taken as they are.
        change: What is done to the folders before.
        codes: Exit codes that are right.
    """

    name: str
    line: str
    more: tuple[str, ...] = ()
    change: Callable[[Folders], Any] | None = None
    codes: tuple[int, ...] = (2,)


@pytest.fixture(scope="module")
def originals(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Any, text_file: Path
) -> Folders:
    """A scored and solved run of a small model, and the model."""
    for name in HEAVY:
        importlib.import_module(name)
    root, model = tmp_path_factory.mktemp("originals"), model_folder("llama")
    plan = build_plan(
        build_skeleton(find_model(str(model))), resolve_formats(FORMATS, device="cpu"), ("lm_head",)
    )
    config = made_up_config(model, root / "run", FORMATS, disable=("lm_head",), bits=8)
    directory = made_up_run(config, plan, "llama", fingerprint_model(find_model(str(model))))
    solve_run(directory, SolveOptions(bits=8), folder="")
    solve_run(directory, SolveOptions(bits=6))
    return Folders(run=root / "run", model=model, data=text_file, scratch=root)


@pytest.fixture
def folders(originals: Folders, tmp_path: Path) -> Folders:
    """Copies that a case may change."""
    shutil.copytree(originals.run, tmp_path / "run")
    shutil.copytree(originals.model, tmp_path / "model")
    return Folders(
        run=tmp_path / "run", model=tmp_path / "model", data=originals.data, scratch=tmp_path
    )


# --- Options

COMMAND_LINES = {
    "plan": "MODEL",
    "measure-latency": "MODEL --out OUT --device cpu --address NO",
    "scan": "MODEL --data DATA --out OUT --bits 8 --device cpu --address NO",
    "solve": "RUN",
    "frontier": "RUN",
    "explain": "RUN lm_head",
    "evaluate": "RUN --address NO",
    "refine": "RUN --address NO",
    "compare": "RUN RUN",
    "export": "RUN --out OUT",
    "import": "FILE --out OUT",
    "site": "RUN",
    "demo": "",
}
NUMBERS = ("many", "", "nan", "-1", "1e400", LONG)
ANY_TEXT = {
    "--data": ("", "no-such-file", "s3://b/x?secret_key=abc", LONG, "a\0b"),
    "--out": ("", "a\0b", "s3://b/x?secret_key=abc", "gs://b/x?token=abc", "ftp://u:p@h/x"),
    "--config": ("", "no-such-file", LONG, "."),
    "--solution": ("no-such", LONG, "a\0b"),
    "--formats": ("", "no-such-format", LONG, ","),
    "--engine": ("no-such-engine", LONG),
    "--gpu": ("no-such-gpu", LONG),
    "--allow": ("x", "=", LONG, "no-such-group=wfp8_afp8"),
    "--pin": ("x", "=", LONG, "no-such-group=wfp8_afp8"),
    "--domains": ("x", "=", LONG, "a=nan"),
    "--latency": ("no-such-card", LONG, ""),
    "--address": (),
    "--against": ("no-such", LONG),
    "--name": ("a/b", "", "a\0b"),
    "--into": ("no-such", "", LONG, "s3://b/x?secret_key=abc"),
    "--workers": NUMBERS,
    "--batch": (*NUMBERS, "8", "0,8"),
    "--bytes": NUMBERS,
    "--stop-when-stable": NUMBERS,
    "--weight-cache-gib": NUMBERS[:-1],
    "--hold-out": NUMBERS,
    "--wait-for-workers": (*NUMBERS, "0", "20x"),
    "--accelerator": ("", "H 100", LONG, "a\0b"),
    "--node-label": ("", "x", "=", "x=", f"x={LONG}", "a b=c", "a=b=c"),
    "--expert-groups": NUMBERS,
    "--target-ppl-increase": NUMBERS,
}
INFINITE = {"--target-kl", "--kv-bytes-per-token", "--max-group-kl", "--bits", "--significance"}
SEEDS = {"--seed", "--data-seed"}


def bad_values(option: click.Option) -> tuple[str, ...]:
    """Values that an option cannot take."""
    flag = option.opts[0]
    if flag in ANY_TEXT:
        return ANY_TEXT[flag]
    kind = option.type
    if isinstance(kind, click.Choice):
        return ("no-such-choice", "", LONG)
    if isinstance(kind, click.IntRange | click.FloatRange) or kind in (click.INT, click.FLOAT):
        more = ("inf",) if flag in INFINITE else ()
        return (*NUMBERS, *more, *((str(2**64),) if flag in SEEDS else ()))
    return ()


def option_cases() -> Iterator[Case]:
    for name, line in COMMAND_LINES.items():
        for option in main.commands[name].params:
            if not isinstance(option, click.Option) or option.is_flag:
                continue
            flag = option.opts[0]
            for number, value in enumerate(bad_values(option)):
                words = line.split()
                if flag in words:
                    at = words.index(flag)
                    del words[at : at + 2]
                yield Case(
                    name=f"{name}{flag}-{number}",
                    line=f"{name} {' '.join(words)}",
                    more=(flag, value),
                    codes=(2, 4),
                )


# --- Damaged and edited files

WRONG_VALUES = {"null": None, "list": [1], "int": 7, "text": "x", "negative": -1, "deep": {"a": []}}
RUN_KEYS = {
    "schema_version": ("int", "negative", "text", "list", "null"),
    "run_id": ("null", "list", "int", "deep"),
    "stages": ("null", "list", "int", "text", "negative"),
    "quarantined": ("null", "int", "text", "deep", "list"),
    "config": ("list", "int", "text", "negative", "deep"),
    "model": ("null", "list", "int", "text", "deep"),
    "dataset": ("null", "list", "int", "text"),
    "fingerprints": ("null", "list", "int", "text", "deep"),
    "plan": ("list", "int", "text", "deep", "null"),
    "versions": ("list", "int", "text", "deep"),
}
INNER_KEYS = {
    ("plan", "formats"): ("null", "list", "int", "text", "deep"),
    ("plan", "modules"): ("null", "list", "int", "text", "deep"),
    ("plan", "unsearched"): ("null", "list", "int", "text", "deep"),
    ("plan", "tied_groups"): ("null", "list", "int", "text", "deep"),
    ("plan", "other_bytes"): ("null", "list", "text", "negative", "deep"),
    ("dataset", "num_shards"): ("null", "list", "text", "negative", "deep"),
    ("dataset", "num_tokens"): ("null", "list", "text", "negative", "deep"),
    ("config", "seed"): ("null", "list", "text", "negative", "deep"),
    ("config", "bits"): ("list", "text", "negative", "deep"),
    ("config", "formats"): ("null", "int", "deep"),
    ("model", "name"): ("null", "list", "int", "deep"),
    ("stages", "score"): ("null", "list", "int", "text", "deep"),
}


def edit_json(file: Path, keys: tuple[str, ...], value: Any) -> None:
    content = json.loads(file.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(content))


def run_json_cases() -> Iterator[Case]:
    places = {(key,): kinds for key, kinds in RUN_KEYS.items()} | INNER_KEYS
    for keys, kinds in places.items():
        for kind in kinds:
            yield Case(
                name=f"run.json-{'.'.join(keys)}-{kind}",
                line="solve RUN --bits 7",
                change=lambda f, k=keys, v=WRONG_VALUES[kind]: edit_json(f.run / "run.json", k, v),
            )
    for number, text in enumerate(("", "{", "[]", "null", "7", DEEP, '{"a": ' * 5000, "\0")):
        for command in ("solve RUN --bits 7", "report RUN", "explain RUN lm_head", "frontier RUN"):
            yield Case(
                name=f"run.json-{command.split()[0]}-content-{number}",
                line=command,
                change=lambda f, t=text: (f.run / "run.json").write_text(t),
            )


CONFIG_KEYS: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (0, -1, "2", None, [2], 10**9, 1.5, True),
    "num_attention_heads": (0, -1, "4", [4], 10**12),
    "num_key_value_heads": (-1, "2"),
    "hidden_size": (0, -1, "64", None, 63, 10**12),
    "intermediate_size": (-1, "96", [1], 10**15),
    "vocab_size": (0, -1, "256", None, 10**15),
    "dtype": ("float99", 7, [1], {"a": 1}),
    "rope_parameters": ({"rope_type": "no-such"}, [1], "x", 7),
    "model_type": (None, 7, [1], "no-such", LONG, {}),
    "hidden_act": ("no-such", 7, [1]),
    "architectures": ("x", 7, {"a": 1}),
}


def config_cases() -> Iterator[Case]:
    for key, values in CONFIG_KEYS.items():
        for number, value in enumerate(values):
            yield Case(
                name=f"config.json-{key}-{number}",
                line="plan MODEL",
                change=lambda f, k=key, v=value: edit_json(f.model / "config.json", (k,), v),
            )
    for number, text in enumerate(("", "{", "[]", "null", "7", '"x"', DEEP, "{}", "\0")):
        yield Case(
            name=f"config.json-content-{number}",
            line="plan MODEL",
            change=lambda f, t=text: (f.model / "config.json").write_text(t),
        )


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def damaged_file_cases() -> Iterator[Case]:
    damages: dict[str, Callable[[Path], Any]] = {
        "empty": lambda file: file.write_bytes(b""),
        "cut": cut,
        "text": lambda file: file.write_text("hello"),
        "folder": lambda file: (file.unlink(), file.mkdir()),
    }
    tables = {
        "plan.parquet": ("solve RUN --bits 7", "frontier RUN", "explain RUN lm_head", "report RUN"),
        "sensitivity.parquet": ("solve RUN --bits 7", "frontier RUN", "report RUN"),
        "manifest.json": ("explain RUN layers.0.mlp.down_proj", "report RUN"),
        "manifest.parquet": ("explain RUN layers.0.mlp.down_proj", "report RUN"),
        "resampling.parquet": ("solve RUN --bits 7", "report RUN"),
    }
    for file, commands in tables.items():
        for damage, do in damages.items():
            for command in commands:
                yield Case(
                    name=f"{file}-{damage}-{command.split()[0]}",
                    line=command,
                    change=lambda f, d=do, n=file: d(f.run / n),
                )


MANIFEST = {
    "scheme": {"auto_quantize_bits": 8},
    "layer_sensitivity": {
        "a": {"formats": ["FP8_DEFAULT_CFG", "NONE"], "scores": [1.0, 0.0], "costs": [8, 16]}
    },
}
IMPORTED = (
    "",
    "{",
    "[]",
    "7",
    DEEP,
    "{}",
    json.dumps({"layer_sensitivity": 7}),
    json.dumps(MANIFEST | {"scheme": {"auto_quantize_bits": 10**400}}),
    json.dumps(MANIFEST | {"layer_sensitivity": {"a": None}}),
    json.dumps(MANIFEST | {"model": {"id": "\ud800"}}),
    json.dumps(MANIFEST).replace("16]", "1e19]"),
    json.dumps(MANIFEST).replace("[1.0,", "[NaN,"),
    "\0",
)
ALLOCATIONS = (
    "",
    "[]",
    DEEP,
    json.dumps({"(a+)+$": {"bits": 4}}),
    json.dumps({"(?!x)y": {"bits": 4}}),
    json.dumps({"(": {"bits": 4}}),
    json.dumps({LONG * 10: {"bits": 4}}),
    json.dumps({".*mlp.*": {"bits": None}}),
    json.dumps({".*mlp.*": {"bits": "x"}}),
    json.dumps({".*mlp.*": [1]}),
    json.dumps({"bits": 4, "group_size": [1], "lm_head": 7}),
)


def file_cases() -> Iterator[Case]:
    for number, text in enumerate(IMPORTED):
        yield Case(
            name=f"import-content-{number}",
            line="import FILE --out OUT",
            change=lambda f, t=text: (f.scratch / "file").write_text(t),
        )
    for number, text in enumerate(ALLOCATIONS):
        yield Case(
            name=f"import-into-content-{number}",
            line="import FILE --into RUN",
            change=lambda f, t=text: (f.scratch / "file").write_text(t),
        )
    jobs: tuple[Any, ...] = (
        {"kind": "no-such"},
        {"kind": [1]},
        {"name": "Not A Name", "model": "m", "data": "d", "out": "o", "bits": 8},
        {"model": "m", "data": "d", "out": "s3://b/x?secret_key=abc", "bits": 8},
        {"model": "m", "data": "d", "out": "gs://b/x?token=abc", "bits": 8},
        {"model": "m", "data": "d", "out": "abfss://c@a/x?client_secret=abc", "bits": 8},
        {"model": "m", "data": "s3://b/x?secret_key=abc", "out": "o", "bits": 8},
        {"model": "m", "data": "d", "out": "o", "bits": 8, "secrets": ["A=abc"]},
        {"model": "m", "data": "d", "out": "o", "bits": float("nan")},
        {"model": "m", "data": "d", "out": "o", "bits": 8, "seed": 2**64},
        {"model": 7, "data": "d", "out": "o", "bits": 8},
        {"kind": "sweep", "name": "a", "models": [], "budgets": [4], "data": "d", "out": "o"},
        {"kind": "nightly", "name": "a", "model": "m", "data": "d", "significance": float("nan")},
        {LONG: 1},
        [1],
        7,
    )
    for number, job in enumerate(jobs):
        for command in ("run FILE", f"submit FILE --address http://{LONG}:1"):
            yield Case(
                name=f"{command.split()[0]}-job-{number}",
                line=command,
                change=lambda f, j=job: (f.scratch / "file").write_text(yaml.safe_dump(j)),
            )


def place_cases() -> Iterator[Case]:
    secrets = (
        "s3://b/x?secret_key=abc",
        "s3://key:abc@b/x",
        "gs://b/x?access_token=abc",
        "abfss://c@a.dfs.core.windows.net/x?client_secret=abc",
        "hdfs://u:abc@h/x",
        "",
        "a\0b",
        LONG,
        "x" * 5000,
    )
    commands = {
        "solve": ("--bits", "7"),
        "report": (),
        "frontier": (),
        "explain": ("lm_head",),
        "evaluate": (),
        "refine": (),
        "site": (),
        "export": ("--out", "never"),
        "compare": ("never",),
    }
    for command, more in commands.items():
        for number, place in enumerate(secrets):
            yield Case(name=f"{command}-place-{number}", line=command, more=(place, *more))
    others: tuple[tuple[str, ...], ...] = (
        ("import", "FILE", "--out", "a", "--into", "b"),
        ("import", "FILE", "--out", "OUT", "--name", "a"),
        ("import", "NONE", "--out", "OUT"),
        ("explain", "RUN", ""),
        ("explain", "RUN", LONG),
        ("explain", "RUN", "\x1b[31mred"),
        ("nightly", "NONE", "--runs", "OUT"),
        ("run", "NONE"),
        ("run", "MODEL"),
        ("plan", ""),
        ("plan", LONG),
        ("plan", "a\0b"),
        ("plan", "\x1b]0;title\x07"),
        ("solve", "RUN", "--bits", "7", "--bytes", "7MB", "--pin", "\x1b[31m=x"),
        ("site", "NONE"),
        ("no-such-command",),
        (LONG,),
    )
    for number, words in enumerate(others):
        yield Case(name=f"others-{number}", line=words[0], more=words[1:])


CASES = [
    *option_cases(),
    *run_json_cases(),
    *config_cases(),
    *damaged_file_cases(),
    *file_cases(),
    *place_cases(),
]


def test_there_are_many_cases_with_names_of_their_kind() -> None:
    assert len(CASES) >= 400
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_wrong_input_is_one_line_with_the_right_code(case: Case, folders: Folders) -> None:
    if case.change is not None:
        case.change(folders)
    more = [folders.words(w)[0] if w.isupper() and w.isalpha() else w for w in case.more]
    start = time.process_time()
    result = run(*folders.words(case.line), *more)
    seconds = time.process_time() - start
    assert result.exit_code in case.codes, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr[:2000]
    assert lines[0].startswith("error: ")
    assert len(lines[0]) <= 400
    assert lines[0].isprintable()
    assert not NAMELESS.match(lines[0]), lines[0]
    assert "abc" not in lines[0]
    assert result.stdout == ""
    assert seconds < MOST_SECONDS


@pytest.mark.parametrize("command", ["evaluate", "refine"])
def test_data_of_a_measurement_is_read_before_a_cluster_is_needed(
    command: str, folders: Folders
) -> None:
    data = folders.scratch / "data.jsonl"
    data.write_text('{"text": "w1 w2"}\n{')
    line = refusal(run(command, folders.run, "--data", data, "--address", NO_CLUSTER))
    assert "data.jsonl line 2 is not valid JSON" in line
