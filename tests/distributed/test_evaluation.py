"""``evaluate``: against the model that ``mtq.quantize`` makes of the manifest; and its resume."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from autoquant_ray import load_quantization_config

NUM_CALIBRATION = 6
FORMATS = "wint4_afp16:max,wint8_aint8,kv_fp8,kv_nvfp4"
RIVALS = ("--num-random", "3", "--workers")


@pytest.fixture(scope="module")
def scanned(
    tmp_path_factory: pytest.TempPathFactory, run_command: Any, scan_arguments: Any
) -> Path:
    run: Path = tmp_path_factory.mktemp("scanned") / "run"
    extra = ("--samples", NUM_CALIBRATION, "--shard-samples", "1", "--workers", "1")
    extra += ("--formats", FORMATS, "--kv-bytes-per-token", "100")  # one cache in each format
    done = run_command(*scan_arguments(run, *extra))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def evaluated(scanned: Path, run_command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(scanned, run)
    done = run_command("evaluate", run, *RIVALS, "1")
    assert done.returncode == 0, done.stderr
    return run


def rows_of(run: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in pq.read_table(run / "evaluation.parquet").to_pylist()}


@torch.no_grad()
def measure(
    folder: Path, run: Path, samples: list[list[int]], calibration: Any
) -> dict[str, float]:
    """Mean KL and both perplexities, by transformers and ``mtq.quantize`` alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = load_quantization_config(json.loads((run / "manifest.json").read_text()))

    def forward_loop(quantized: Any) -> None:
        for sample in calibration:
            quantized(input_ids=torch.tensor([sample]), use_cache=False)

    def log_probabilities(sample: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([sample]), use_cache=False).logits[0, :-1]
        return torch.log_softmax(logits.double(), dim=-1)

    before = [log_probabilities(sample) for sample in samples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(model, config, forward_loop)
    after = [log_probabilities(sample) for sample in samples]
    targets = torch.cat([torch.tensor(sample[1:]) for sample in samples])[:, None]
    log_p, log_q = torch.cat(before), torch.cat(after)
    return {
        "kl_mean": float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()),
        "perplexity": float(torch.exp(-log_q.gather(1, targets).mean())),
        "reference_perplexity": float(torch.exp(-log_p.gather(1, targets).mean())),
    }


def test_solution_equals_the_manifest_quantized_by_modelopt(
    evaluated: Path, model_folder: Any
) -> None:
    """The manifest tells ``mtq.quantize`` everything; the data is what the scan has not seen."""
    (held_out,) = (evaluated / "evaluation").glob("*/samples")
    tables = [pq.read_table(path) for path in sorted(held_out.iterdir())]
    samples = [tokens for table in tables for tokens in table["tokens"].to_pylist()]
    used = [
        tokens
        for path in sorted((evaluated / "samples").iterdir())
        for tokens in pq.read_table(path)["tokens"].to_pylist()
    ]
    assert len(samples) == 6
    assert not {tuple(tokens) for tokens in samples} & {tuple(tokens) for tokens in used}
    chosen = set(pq.read_table(evaluated / "manifest.parquet")["format"].to_pylist())
    assert {"kv_fp8", "kv_nvfp4"} < chosen
    expected = measure(model_folder("llama"), evaluated, samples, used)
    row = rows_of(evaluated)["solution"]
    assert expected["kl_mean"] > 0
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-3), name
    assert row["num_tokens"] == sum(len(sample) - 1 for sample in samples)
    assert row["num_samples"] == 6


def test_rivals_keep_the_budget(evaluated: Path) -> None:
    rows = rows_of(evaluated)
    assert {"solution", "modelopt", "random 1", "random 2", "random 3"} <= set(rows)
    assert "uniform wint4_afp16:max" in rows
    for row in rows.values():
        assert row["effective_bits"] <= 8 + 1e-9
        assert row["kl_p50"] <= row["kl_p95"] <= row["kl_p99"]
        assert 0 <= row["top1_agreement"] <= 1
    assert rows["solution"]["kl_above_solution"] == 0


def test_report_shows_it(evaluated: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (evaluated / name).read_text()
        assert "Predicted and measured loss" in text
        assert f"{rows_of(evaluated)['solution']['kl_mean']:.4g}" in text
        assert "shuffled scores, mean of 3" in text


def test_two_workers_give_the_same_bytes(
    scanned: Path, evaluated: Path, run_command: Any, tmp_path: Path
) -> None:
    shutil.copytree(scanned, tmp_path / "run")
    done = run_command("evaluate", tmp_path / "run", *RIVALS, "2")
    assert done.returncode == 0, done.stderr
    expected = (evaluated / "evaluation.parquet").read_bytes()
    assert (tmp_path / "run" / "evaluation.parquet").read_bytes() == expected


def test_killed_evaluation_goes_on(
    scanned: Path, evaluated: Path, start_command: Any, run_command: Any, watch: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scanned, run)

    def parts() -> dict[str, int]:
        paths = (run / "evaluation").glob("*/*/shard-*.parquet")
        return {str(p): p.stat().st_mtime_ns for p in paths if p.parent.name != "samples"}

    with start_command("evaluate", run, *RIVALS, "1") as process:
        watch.wait_for(lambda: len(parts()) > 0, process)
        process.kill()
    before = parts()
    done = run_command("evaluate", run, *RIVALS, "1")
    assert done.returncode == 0, done.stderr
    after = parts()
    assert {name: after[name] for name in before} == before
    expected = (evaluated / "evaluation.parquet").read_bytes()
    assert (run / "evaluation.parquet").read_bytes() == expected


@pytest.mark.parametrize("is_cut", [True, False])
def test_lost_samples_are_made_again(
    is_cut: bool, evaluated: Path, run_command: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    lost = list((run / "evaluation").glob("*/*/shard-000001.parquet"))
    assert len(lost) > 2
    for path in lost:  # samples, and what was measured on them
        path.write_bytes(path.read_bytes()[:-30]) if is_cut else path.unlink()
    done = run_command("evaluate", run, *RIVALS, "1")
    assert done.returncode == 0, done.stderr
    expected = (evaluated / "evaluation.parquet").read_bytes()
    assert (run / "evaluation.parquet").read_bytes() == expected


def test_evaluation_asked_to_stop_keeps_the_shard_in_flight(
    scanned: Path, evaluated: Path, run_command: Any, start_command: Any, watch: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scanned, run)

    def measured() -> list[int]:
        done = watch.events(run, "shard_done")
        return [event["shard"] for event in done if event["stage"] == "evaluate"]

    with start_command("evaluate", run, *RIVALS, "1", "--address", "local") as evaluation:
        watch.wait_for(measured, evaluation)
        evaluation.send_signal(signal.SIGTERM)
        _, stderr = evaluation.communicate()
    assert evaluation.returncode == 130, stderr
    (request,) = watch.events(run, "stop_requested")
    kept = measured()
    assert set(request["shards"]) <= set(kept)
    assert 2 <= len(kept) < NUM_CALIBRATION
    assert f"evaluate has {len(kept)} of {NUM_CALIBRATION} shards more" in stderr.splitlines()[-1]
    assert "run the same command again" in stderr.splitlines()[-1]
    again = run_command("evaluate", run, *RIVALS, "1")
    assert again.returncode == 0, again.stderr
    assert sorted(measured()) == list(range(NUM_CALIBRATION))
    name = "evaluation.parquet"
    assert (run / name).read_bytes() == (evaluated / name).read_bytes()


def test_changed_model_and_wrong_names_are_refused(
    evaluated: Path, run_command: Any, tmp_path: Path, model_folder: Any
) -> None:
    done = run_command("evaluate", evaluated, "--solution", "bits-4.00")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "bits-4.00" in done.stderr
    done = run_command("evaluate", evaluated, "--against", "best")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "'best' is unknown; known: uniform, modelopt, modelopt-shapley, random" in done.stderr
    done = run_command("evaluate", evaluated, "--data", tmp_path / "none.txt")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "none.txt" in done.stderr


def test_solve_refines_within_the_budget(scanned: Path, run_command: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scanned, run)
    limit = ("--kv-bytes-per-token", "100")
    done = run_command("solve", run, "--bits", "7", *limit, "--refine", "8", "--json")
    assert done.returncode == 0, done.stderr
    solution = json.loads(done.stdout)
    assert solution["name"] == "bits-7.00-kv-100-refined"
    assert solution["kv_bytes_per_token"] <= 100
    assert solution["effective_bits"] <= 7 * (1 + 1e-9)
    assert 0 < solution["refinement"]["num_trials"] <= 8
    folder = run / "solutions" / solution["name"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["refinement"] == solution["refinement"]
    rows = {row["name"]: row for row in pq.read_table(run / "evaluation.parquet").to_pylist()}
    assert rows["solution"]["solution"] == solution["name"]
    assert rows["solution"]["kl_mean"] == solution["refinement"]["kl_after"]
    assert rows["unrefined"]["kl_mean"] == solution["refinement"]["kl_before"]


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    return done.stderr


def test_calibration_text_is_never_measured_as_unseen(
    scanned: Path, run_command: Any, tmp_path: Path, text_file: Path
) -> None:
    """The run's own data, given by name, is still what the scan has seen."""
    run = tmp_path / "run"
    shutil.copytree(scanned, run)
    done = run_command("evaluate", run, "--data", text_file, "--against", "none")
    assert done.returncode == 0, done.stderr
    assert rows_of(run)["solution"]["num_samples"] == 12 - NUM_CALIBRATION
    assert "--seq-len and the form of --data must be" in refusal(
        run_command("evaluate", run, "--pack", "true")
    )
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text_file.read_bytes())
    for said in ("", "again"):  # the samples are written once
        done = run_command("evaluate", run, "--data", copy, "--against", "none")
        assert done.returncode == 0, done.stderr
        count = NUM_CALIBRATION
        expected = f"{count} of {count} samples of {copy} are among those that the scan"
        assert expected in done.stderr, said


def test_refined_allocation_is_measured_on_what_chose_nothing(
    scanned: Path, run_command: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scanned, run)
    done = run_command("refine", run, "--trials", "3", "--json")
    assert done.returncode == 0, done.stderr
    kl_after = json.loads(done.stdout)["refinement"]["kl_after"]
    done = run_command("evaluate", run, "--solution", "scan-refined", "--against", "none")
    assert done.returncode == 0, done.stderr
    assert rows_of(run)["solution"]["kl_mean"] == kl_after
    for option in (("--samples", "5"), ("--split", "test")):  # a text file has no splits
        other = run_command("evaluate", run, "--solution", "scan-refined", *option)
        assert "was chosen on this data cut in another way" in refusal(other)


def test_refinement_orders_changes_alike_with_two_workers(
    scanned: Path, run_command: Any, tmp_path: Path
) -> None:
    """Changes are predicted on the second part of the shards, which the search does not measure."""
    runs = [tmp_path / name for name in ("one", "two")]
    for run, workers in zip(runs, ("1", "2"), strict=True):
        shutil.copytree(scanned, run)
        done = run_command("refine", run, "--trials", "8", "--workers", workers)
        assert done.returncode == 0, done.stderr
    parts = sorted(path.relative_to(runs[0]) for path in runs[0].glob("evaluation/*/*/flips/*"))
    assert [path.name for path in parts] == ["shard-000004.parquet"]
    solution = Path("solutions/scan-refined/manifest.parquet")
    for name in (*parts, solution, Path("evaluation.parquet")):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    rows = pq.read_table(runs[0] / parts[0]).to_pylist()
    plan = pq.read_table(runs[0] / "plan.parquet").to_pylist()
    searched = {row["group"] for row in plan if row["is_searched"]}
    assert {row["group"] for row in rows} == searched
    names = {"wint4_afp16:max", "wint8_aint8", "kv_fp8", "kv_nvfp4", "none"}
    assert {row["format"] for row in rows} == names
    assert any(row["slope"] for row in rows if row["partner"] is None)
    pairs = {(row["group"], row["partner"]) for row in rows if row["partner"] is not None}
    assert all(a.rpartition(".")[0] == b.rpartition(".")[0] for a, b in pairs)
    assert any("gate_proj" in a and "down_proj" in b for a, b in pairs)


def test_audit_measures_pairs_and_solves_again(
    scanned: Path, run_command: Any, tmp_path: Path
) -> None:
    """Four of six shards choose, the others tell; two workers give the same bytes."""
    arguments = ("--audit", "4", "--against", "none", "--json", "--workers")
    runs = [tmp_path / name for name in ("one", "two")]
    for run, workers in zip(runs, ("1", "2"), strict=True):
        shutil.copytree(scanned, run)
        done = run_command("evaluate", run, *arguments, workers)
        assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    for name in ("audit.parquet", "evaluation.parquet", "solutions/scan-audited/manifest.parquet"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    pairs = pq.read_table(runs[1] / "audit.parquet").to_pylist()
    scores = {
        (row["group"], row["format"]): row["score"]
        for row in pq.read_table(runs[1] / "sensitivity.parquet").to_pylist()
    }
    assert len({(pair["group"], pair["format"]) for pair in pairs}) == 4
    for pair in pairs:
        assert pair["predicted"] == scores[pair["group"], pair["format"]]
        assert 0.3 < pair["ratio"] < 3
        assert pair["num_samples"] == 4
    folder = runs[1] / "solutions" / "scan-audited"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["audit"] == printed["audit"]
    assert printed["audit"]["num_pairs"] == 4
    for report in ("report.md", "report.html"):
        assert "Predicted and measured scores" in (folder / report).read_text()
    rows = {row["name"]: row for row in printed["rows"]}
    assert list(rows) == ["solution", "unaudited"]
    assert rows["solution"]["num_samples"] == 2
