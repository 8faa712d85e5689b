"""What every command does on a run at which another process is at work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import COMMANDS, JOBS_COMMANDS, NO_CLUSTER, refusal, run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import lease
from autoquant_ray.runs.names import LOCK
from autoquant_ray.solve import solve_run

MANIFEST = {
    "scheme": {"auto_quantize_bits": 16},
    "layer_sensitivity": {
        "a": {"formats": ["FP8_DEFAULT_CFG", "NONE"], "scores": [1.0, 0.0], "costs": [8, 16]}
    },
}
REFUSED = {
    "scan": "MODEL --data DATA --out RUN --overwrite --bits 8 --address NO --device cpu",
    "scan to go on": "MODEL --data DATA --out RUN --resume --bits 8 --address NO --device cpu",
    "run": "SCAN --address NO",
    "solve": "RUN --bits 6",
    "report": "RUN",
    "frontier": "RUN",
    "frontier within a loss": "RUN --target-kl 0.5",
    "evaluate": "RUN --data DATA --address NO",
    "refine": "RUN --data DATA --address NO",
    "import": "MANIFEST --out RUN --overwrite",
    "import into": "ALLOCATION --into RUN",
}
"""These write into the run."""
READ = {
    "explain": "RUN lm_head",
    "compare": "RUN RUN",
    "site": "RUNS",
    "plan": "MODEL",
    "export": "RUN --format recipe --tool auto-round --out FILE",
}
"""These only read it, or write beside it."""
ELSEWHERE = {
    "demo": "is a scan",
    "doctor": "knows no run",
    "measure-latency": "its files are of accelerators, in no run",
    "nightly": "its runs are scans; the lease of a night's job is tested with them",
    "submit": "a cluster's job",
    "jobs": "a cluster's jobs",
} | dict.fromkeys(JOBS_COMMANDS, "a cluster's jobs")


@pytest.fixture
def words(
    make_run: Any, model_folder: Any, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> dict[str, str]:
    """What the capital words of the tables stand for."""
    monkeypatch.setattr("autoquant_ray.runs.lease.BRIEF_WAIT_S", 0.0)
    model = model_folder("llama")
    directory: RunDirectory = make_run(folder=model, disable=())
    solve_run(directory, SolveOptions(bits=8), folder="")
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    groups = directory.read_table("plan.parquet").column("module_names").to_pylist()
    layers = {name: {"bits": 16} for names in groups for name in names}
    (tmp_path / "allocation.json").write_text(json.dumps(layers))
    scan = {
        "name": "held",
        "model": str(model),
        "data": str(text_file),
        "out": directory.uri,
        "bits": 8,
        "device": "cpu",
    }
    (tmp_path / "scan.yaml").write_text(yaml.safe_dump(scan))
    return {
        "RUN": directory.uri,
        "RUNS": str(tmp_path),
        "MODEL": str(model),
        "DATA": str(text_file),
        "MANIFEST": str(tmp_path / "manifest.json"),
        "ALLOCATION": str(tmp_path / "allocation.json"),
        "SCAN": str(tmp_path / "scan.yaml"),
        "NO": NO_CLUSTER,
        "FILE": str(tmp_path / "recipe"),
    }


@pytest.fixture
def held(words: dict[str, str]) -> Iterator[Path]:
    """The run, while somebody else holds it."""
    with lease(RunDirectory(words["RUN"])):
        yield Path(words["RUN"])


def files(folder: Path) -> dict[str, bytes]:
    """All files of a run but the claims."""
    paths = (path for path in folder.rglob("*") if path.is_file() and LOCK not in path.parts)
    return {str(path): path.read_bytes() for path in paths}


def command(name: str, line: str, words: dict[str, str]) -> Any:
    return run(name.split()[0], *(words.get(word, word) for word in line.split()))


def test_every_command_is_in_a_table() -> None:
    names = {name.split()[0] for name in {**REFUSED, **READ, **ELSEWHERE}}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("name", REFUSED)
def test_command_that_writes_into_a_held_run_is_refused(
    name: str, held: Path, words: dict[str, str]
) -> None:
    before = files(held)
    line = refusal(command(name, REFUSED[name], words))
    assert f"{held} is in use by process " in line
    assert "start again" in line
    assert files(held) == before


@pytest.mark.parametrize("name", READ)
def test_command_that_reads_a_held_run_works(name: str, held: Path, words: dict[str, str]) -> None:
    before = files(held)
    result = command(name, READ[name], words)
    assert result.exit_code == 0, result.output
    assert files(held) == before


@pytest.mark.parametrize("name", ["solve", "report", "frontier", "import", "import into"])
def test_command_that_was_refused_works_once_the_run_is_free(
    name: str, words: dict[str, str]
) -> None:
    result = command(name, REFUSED[name], words)
    assert result.exit_code == 0, result.output
    assert not (Path(words["RUN"]) / LOCK).exists()
