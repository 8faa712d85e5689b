"""Job files: what they may hold, what is refused with one line, and the id that they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autoquant_ray.cli.main import main
from autoquant_ray.config.files import read_yaml
from autoquant_ray.errors import ConfigError
from autoquant_ray.jobs.file import NightlyJob, ScanJob, SweepJob, load_job, make_job
from autoquant_ray.jobs.names import check_run_id

SCAN = {"model": "m", "data": "d.txt", "out": "runs/My Model", "bits": 6}
SWEEP = {
    "kind": "sweep",
    "name": "sweep",
    "models": ["a/Small", "a/Large"],
    "budgets": [6, "2.5GiB", 4.5],
    "out": "runs/",
    "data": "d.txt",
}
NIGHTLY = {"kind": "nightly", "name": "night", "model": "m", "data": "d.txt", "bits": 6}
SECRET = "hf-s3cr3t"


def refusal(values: dict[str, Any]) -> str:
    """The line with which a job's content is refused."""
    with pytest.raises(ConfigError) as caught:
        make_job(values, "job.yaml")
    text = str(caught.value)
    assert text.startswith("job.yaml: ")
    assert len(text.splitlines()) == 1
    return text


def run(*arguments: Any) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_scan_job_takes_its_name_from_its_run(job_file: Any) -> None:
    job = load_job(str(job_file(SCAN)))
    assert isinstance(job, ScanJob)
    assert job.name == "my-model"
    assert job.config().bits == 6


def test_sweep_job_gives_each_model_a_run_and_each_budget() -> None:
    job = make_job(SWEEP, "job.yaml")
    assert isinstance(job, SweepJob)
    budgets = job.budget_fields()
    assert budgets == [{"bits": 6.0}, {"bytes": 2.5 * 2**30}, {"bits": 4.5}]
    config = job.config("a/Large", budgets[1])
    assert (config.model, config.out) == ("a/Large", "runs/large")
    assert (config.bits, config.bytes) == (None, 2.5 * 2**30)


def test_nightly_job_scans_into_the_given_run() -> None:
    job = make_job(NIGHTLY | {"keep": 3}, "job.yaml")
    assert isinstance(job, NightlyJob)
    assert (job.keep, job.baseline) == (3, None)
    assert job.config(out="runs/night-1").out == "runs/night-1"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (SCAN | {"bist": 4}, "bist: unknown key; closest: bits"),
        (SCAN | {"scan": {"bits": 4}}, "scan: unknown key"),
        (SCAN | {"samples": "many"}, "samples: "),
        (SCAN | {"engine": "tgi"}, "`engine` 'tgi' is unknown; known: vllm, sglang, trtllm"),
        (SCAN | {"gpu": "h100"}, "`gpu` h100 needs an engine"),
        (SCAN | {"bits": True}, "bits: must not be yes, no, true or false"),
        (SCAN | {"name": "No Spaces; touch x"}, "name: use lower case"),
        (SCAN | {"name": 7}, "name: "),
        (SCAN | {"kind": "scna"}, "kind: 'scna' is unknown; known: scan, sweep, nightly"),
        (SCAN | {"kind": ["scan"]}, "kind: ['scan'] is unknown"),
        ({"model": "m", "data": "d"}, "out is missing"),
        ({**SWEEP, "name": None}, "name: "),
        (SCAN | {"models": ["m"]}, "models: unknown key; closest: model"),
        (SWEEP | {"model": "m"}, "model: a sweep job sets it itself"),
        (SWEEP | {"models": "m"}, "models: "),
        (SWEEP | {"models": []}, "models: "),
        (SWEEP | {"models": ["a/M", "b/m"]}, "models: two models have the same last part"),
        (SWEEP | {"out": ""}, "out: "),
        (SWEEP | {"budgets": [17]}, "17 is not above 0 and at most 16 bits; bytes have a unit"),
        (SWEEP | {"budgets": [4, float("nan")]}, "nan is not above 0"),
        (SWEEP | {"budgets": [6, True]}, "True is neither a number of bits nor a text"),
        (SWEEP | {"budgets": [6, None]}, "None is neither a number of bits nor a text"),
        (SWEEP | {"budgets": ["4.5"]}, "'4.5' has no unit; write bits without quotes"),
        (SWEEP | {"budgets": ["much"]}, "'much' is not a byte count"),
        (SWEEP | {"budgets": [4, 4.0]}, "a budget is named twice"),
        (SWEEP | {"samples": 0}, "samples: "),
        (NIGHTLY | {"out": "x"}, "out: a nightly job sets it itself"),
        (NIGHTLY | {"keep": 0}, "keep: "),
        (NIGHTLY | {"significance": 1}, "significance: "),
        ({key: value for key, value in NIGHTLY.items() if key != "model"}, "model is missing"),
    ],
)
def test_job_with_a_wrong_value_is_refused(values: dict[str, Any], expected: str) -> None:
    assert expected in refusal(values)


@pytest.mark.parametrize(
    ("secrets", "expected"),
    [
        ([f"HF_TOKEN={SECRET}"], "HF_TOKEN=... is not the name"),
        (["HF_TOKEN", SECRET], "entry 2 is not the name"),
        ([f"{SECRET}=x"], "entry 1 is not the name"),
        (f"HF_TOKEN={SECRET}", "secrets: "),
        ({"HF_TOKEN": SECRET}, "secrets: "),
        ([{"HF_TOKEN": SECRET}], "secrets.0: "),
        ([["HF_TOKEN", SECRET]], "secrets.0: "),
    ],
)
def test_secret_in_a_job_file_is_refused_and_not_repeated(secrets: Any, expected: str) -> None:
    line = refusal(SCAN | {"secrets": secrets})
    assert expected in line
    assert SECRET not in line


def test_run_id_is_the_name_and_a_digest_of_the_content() -> None:
    job = make_job(SCAN, "job.yaml")
    assert job.run_id.startswith("my-model-")
    assert check_run_id(job.run_id) == job.run_id
    assert make_job(dict(reversed(SCAN.items())), "other.yaml").run_id == job.run_id
    assert make_job(SCAN | {"kind": "scan", "secrets": []}, "job.yaml").run_id == job.run_id
    others = [SCAN | {"bits": 5}, SCAN | {"secrets": ["A"]}, SWEEP, SWEEP | {"budgets": [6]}]
    assert len({make_job(other, "job.yaml").run_id for other in others} | {job.run_id}) == 5


def test_run_id_of_a_custom_format_with_number_keys() -> None:
    quantizer = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
    custom = {"formats": ["mine"], "custom_formats": {"mine": {"weight": quantizer}}}
    assert make_job(SCAN | custom, "job.yaml").run_id.startswith("my-model-")


def test_job_at_another_address_keeps_its_content() -> None:
    job = make_job(SCAN | {"address": "local"}, "job.yaml")
    assert isinstance(job, ScanJob)
    assert job.at("auto").config() == job.config().model_copy(update={"address": "auto"})
    assert job.at(None).config().address == "local"


@pytest.mark.parametrize(
    "text", ["../other", "a/b", "a\\b", "a..b", "", ".hidden", "a b", "a;b", "a\n", "x" * 101]
)
def test_run_id_that_could_be_a_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a run id"):
        check_run_id(text)


# --- the command


def one_line(result: Result) -> str:
    """The line with which a command refused; its exit code is checked."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_run_refuses_a_missing_or_empty_secret_before_anything(
    job_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SET", "x")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    secrets = {"secrets": ["SET", "EMPTY", "UNSET"]}
    line = one_line(run("run", job_file(SCAN | secrets | {"model": "/no/such/model"})))
    assert "environment variable EMPTY, UNSET, which is not set here" in line


def test_run_of_a_nightly_job_needs_the_folder_of_its_runs(job_file: Any) -> None:
    path = job_file(NIGHTLY)
    assert "give the folder of its runs with --runs DIR" in one_line(run("run", path))


def test_run_refuses_a_run_id_that_is_a_path(job_file: Any) -> None:
    line = one_line(run("run", job_file(SCAN), "--run-id", "../other"))
    assert "'../other' is not a run id" in line


def test_run_refuses_a_job_file_that_does_not_exist(tmp_path: Path) -> None:
    assert "does not exist" in one_line(run("run", tmp_path / "none.yaml"))


def test_run_refuses_an_unknown_key(job_file: Any) -> None:
    assert "bist: unknown key" in one_line(run("run", job_file(SCAN | {"bist": 1})))


def test_run_of_a_sweep_names_every_model_that_failed_and_keeps_its_id(
    job_file: Any, tmp_path: Path
) -> None:
    models = [str(tmp_path / "none"), str(tmp_path / "neither")]
    values = SWEEP | {"models": models, "out": str(tmp_path / "runs")}
    result = run("run", job_file(values), "--address", "local", "--json")
    assert result.exit_code == 2
    shown = json.loads(result.stdout)
    assert shown["run_id"] == make_job(values, "job.yaml").run_id
    assert [row["model"] for row in shown["rows"]] == [models[0]] * 3 + [models[1]] * 3
    assert all("does not exist" in row["error"] for row in shown["rows"])


def test_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("bits: 6\nbits: 5\n")
    with pytest.raises(ConfigError, match="'bits' is given twice") as refused:
        read_yaml(str(file))
    assert "\n" not in str(refused.value)


def test_all_that_is_wrong_is_said_with_the_file_once(job_file: Any) -> None:
    """However long its path is."""
    wrong = {"samples": -1, "seq_len": "many", "seed": -3}
    path = job_file(SCAN | wrong)
    line = one_line(run("run", path))
    assert line.count(str(path)) == 1
    assert all(f"{name}: Input should be" in line for name in wrong)
