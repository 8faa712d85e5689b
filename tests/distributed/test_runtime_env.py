"""What a job file brings to workers reaches their processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

NAME, VALUE = "AUTOQUANT_TEST_COLOUR", "blue green"


@pytest.fixture
def job(tmp_path: Path, model_folder: Any, text_file: Path, job_file: Any) -> Any:
    """A job file of a small scan into ``run``."""

    def write(runtime_env: dict[str, Any]) -> Path:
        places = {"model": str(model_folder("llama")), "data": str(text_file)}
        values = {"formats": ["wint4_afp16:max", "wint8_aint8"], "bits": 8, "shard_samples": 1}
        values |= places | {"out": str(tmp_path / "run"), "workers": 1, "address": "local"}
        path: Path = job_file(values | {"runtime_env": runtime_env})
        return path

    return write


def test_workers_have_the_variables_and_the_folder_of_the_job(
    job: Any, tmp_path: Path, start_command: Any, watch: Any
) -> None:
    code, run = tmp_path / "code", tmp_path / "run"
    code.mkdir()
    (code / "mine.txt").write_text("here")
    brings = {"env_vars": {NAME: VALUE}, "working_dir": str(code)}
    with start_command("run", job(brings)) as scan:
        watch.wait_for(lambda: watch.events(run, "worker_ready"), scan)
        worker = psutil.Process(watch.events(run, "worker_ready")[0]["pid"])
        with worker.oneshot():
            environment, folder = worker.environ(), Path(worker.cwd())
        assert (folder / "mine.txt").read_text() == "here"
        _, stderr = scan.communicate()
    assert scan.returncode == 0, stderr
    assert environment[NAME] == VALUE


def test_environment_that_cannot_be_set_up_is_a_cluster_error(job: Any, run_command: Any) -> None:
    done = run_command("run", job({"working_dir": "https://127.0.0.1:9/nobody-listens.zip"}))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the runtime_env cannot be set up on a node: ")
    assert "127.0.0.1" in last
    assert "Traceback" not in done.stderr
    assert len(last) <= 400
