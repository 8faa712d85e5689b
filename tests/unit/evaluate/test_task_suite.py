"""What is wrong with tasks is one line, before a model is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from scored_run import put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.main import main
from autoquant_ray.solve import solve_run

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed")
TASK: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "train",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A solved run whose model is not there: whatever loads it fails otherwise."""
    directory = put_scored_run(tmp_path_factory.mktemp("tasks") / "run", num_layers=1)
    solve_run(directory, SolveOptions(bits=6.0), folder="")
    return directory.uri


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks: on the hub, of a file that is missing, and of one that is there."""
    (tmp_path / "there.jsonl").write_text('{"question": "w1", "choices": ["w2", "w3"]}\n')
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "no.jsonl")}}
    here = data | {"dataset_kwargs": {"data_files": str(tmp_path / "there.jsonl")}}
    put(tmp_path, "of_hub", {"dataset_path": "someone/words"})
    put(tmp_path, "of_file", data)
    put(tmp_path, "review", here)
    put(tmp_path, "running", here | {"unsafe_code": True})
    group = {"group": "reviews", "task": ["review"]}
    (tmp_path / "reviews.yaml").write_text(yaml.safe_dump(group))
    return tmp_path


def put(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(TASK | {"task": name} | values))


def refused(run: str, tasks: str, folder: Path | None = None) -> str:
    words = ["evaluate", run, "--tasks", tasks]
    words += [] if folder is None else ["--tasks-dir", str(folder)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error")]
    assert len(line) <= 400
    return line


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm-eval is installed")
def test_missing_package_says_how_to_install_it(run: str) -> None:
    line = refused(run, "arc_easy")
    assert "--tasks needs the package lm-eval: pip install -e '.[tasks]'" in line


@needs_lm_eval
def test_data_that_cannot_be_read_names_the_task_and_the_remedy(run: str, folder: Path) -> None:
    line = refused(run, "of_hub", folder)
    assert "task of_hub or its data cannot be read" in line
    assert "someone/words" in line
    assert "HF_HOME" in line
    assert "--tasks-dir" in line
    assert "no.jsonl" in refused(run, "review,of_file", folder)


@needs_lm_eval
def test_folder_and_tasks_that_do_not_fit_are_refused(run: str, folder: Path) -> None:
    assert "--tasks-dir /no/where is no folder" in refused(run, "review", Path("/no/where"))
    assert "runs what is answered" in refused(run, "running", folder)
    assert "Duplicate task 'review'" in refused(run, "reviews,review", folder)


@needs_lm_eval
def test_unknown_task_names_those_near_it(run: str, folder: Path) -> None:
    """All of lm-eval's tasks are listed for this."""
    line = refused(run, "rewiew", folder)
    assert "'rewiew' is no task of lm-eval or of --tasks-dir; near it are review" in line


@needs_lm_eval
def test_suite_scores_what_is_answered(folder: Path) -> None:
    from autoquant_ray.evaluate.tasks.suite import load_suite

    suite = load_suite(("review",), str(folder), None)
    (score,) = suite.scores(lambda kind, requests: [(-float(n), True) for n in range(2)])
    assert (score.task, score.metric, score.value) == ("review", "acc", 1.0)
    assert (score.num_samples, score.of_samples) == (1, (1.0,))
    (score,) = suite.scores(lambda kind, requests: [(float(n), True) for n in range(2)])
    assert score.value == 0.0
