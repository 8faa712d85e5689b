"""Two runs of the same model must not look like a drift, and one changed layer must."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from autoquant_ray.allocate.options import solve_options
from autoquant_ray.calibrate.files import maxima_rows
from autoquant_ray.cli.main import main
from autoquant_ray.compare.drift import render_drift
from autoquant_ray.compare.runs import compare_runs
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.data.texts import DataSpec, read_texts
from autoquant_ray.errors import StoreError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import CALIBRATION, part_name
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.solve import solve_run

FORMATS = ("wint4_afp16", "wint8_aint8")
NUM_SHARDS, SHARD_SAMPLES = 6, 8
NUM_TRIALS = 20

Scan = Callable[..., RunDirectory]


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 lines of uneven length, each about one of five topics: shards differ from each other."""
    draw = np.random.default_rng(0)
    lines = []
    for _ in range(600):
        words = draw.integers(0, 256) + np.arange(3 + 40 * draw.integers(0, 5))
        chosen = draw.choice(words, size=draw.integers(4, 40)) % 256
        lines.append(" ".join(f"w{word}" for word in chosen))
    path = tmp_path_factory.mktemp("topics") / "topics.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def scan(
    make_model: Any,
    make_spec: Any,
    write_run: Any,
    topics: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Scan:
    """Scan a small model in this process; returns the finished run."""

    def build(
        data_seed: int | None = 0, model: Any = None, fingerprint: str = "model", **changes: Any
    ) -> RunDirectory:
        model = copy.deepcopy(make_model("llama") if model is None else model)
        config = ScanConfig(
            model="llama",
            data=str(topics),
            out=str(tmp_path_factory.mktemp("runs") / "run"),
            device="cpu",
            dtype="float32",
            data_seed=data_seed,
            **{"formats": FORMATS, "disable": ("lm_head",), "bits": 6} | changes,
        )
        plan = build_plan(model, resolve_formats(config.formats, device="cpu"), config.disable)
        spec = make_spec(plan, labels="model", step_tokens=2048, seed=config.seed)
        scorer = Scorer(spec, model=model)
        shards = first_samples(config)
        calibrations = [scorer.calibrate(shard) for shard in shards]
        merged = merge_calibrations(calibrations)
        scores = [
            scorer.score(shard, number * SHARD_SAMPLES, merged)
            for number, shard in enumerate(shards)
        ]
        weights = tmp_path_factory.mktemp("weights")
        model.save_pretrained(weights)
        directory: RunDirectory = write_run(
            config, plan, identity(fingerprint, shards), scores, weights=weights
        )
        for number, of_shard in enumerate(calibrations):
            rows = maxima_rows(of_shard)
            directory.write_table(part_name(CALIBRATION, number), rows)
        solve_run(directory, solve_options(config), folder="")
        return directory

    return build


def first_samples(config: ScanConfig) -> list[list[list[int]]]:
    """The shards of a config, of the words ``w17`` -> token 17."""
    spec = DataSpec(source=config.data, num_samples=1, seq_len=64, shuffle_seed=config.data_seed)
    texts = read_texts(spec)
    return [
        [[int(word[1:]) for word in next(texts).split()] for _ in range(SHARD_SAMPLES)]
        for _ in range(NUM_SHARDS)
    ]


def identity(fingerprint: str, shards: list[list[list[int]]]) -> dict[str, Any]:
    num_tokens = sum(len(sample) for shard in shards for sample in shard)
    return {
        "model": {"name": "llama", "fingerprint": fingerprint},
        "dataset": {
            "name": "topics.txt",
            "max_samples": 48,
            "seq_len": 64,
            "source_fingerprint": "data",
            "counts": {"read": 48, "used": 48, "empty": 0, "too_short": 0, "cut": 0},
            "num_shards": NUM_SHARDS,
            "num_samples": NUM_SHARDS * SHARD_SAMPLES,
            "num_tokens": num_tokens,
            "tokens_sha256": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        },
        "fingerprints": {"model": fingerprint, "data": "data"},
    }


@pytest.fixture(scope="module")
def first(scan: Scan) -> RunDirectory:
    return scan(0)


def perturbed(model: Any, name: str, how: str) -> Any:
    """A copy with one linear layer changed."""
    changed = copy.deepcopy(model)
    weight_OI = changed.get_submodule(name).weight.data
    if how == "multiplied":
        weight_OI.mul_(3)
    else:
        torch.manual_seed(1)
        weight_OI.add_(torch.randn_like(weight_OI) * weight_OI.std())
    return changed


# ---- the verdict -------------------------------------------------------------------------------


def test_same_run_twice_is_same(scan: Scan, first: RunDirectory) -> None:
    comparison = compare_runs(first, scan(0))
    assert comparison.verdict == "same"
    assert not comparison.moved
    assert not comparison.format_changes
    assert set(comparison.spearman.values()) == {1.0}


def test_other_subsets_of_the_data_are_no_drift(scan: Scan) -> None:
    """Static integer inputs too, whose maxima move more than the error bars say."""
    formats = ("wint4_afp16", "wint8_afp16", "wint8_aint8")
    verdicts = []
    for trial in range(NUM_TRIALS):
        runs = [scan(seed, formats=formats) for seed in (2 * trial, 2 * trial + 1)]
        comparison = compare_runs(*runs)
        assert comparison.test == "unpaired"
        verdicts.append(comparison.verdict)
    assert verdicts.count("drift") <= 1, verdicts
    assert "same" not in verdicts


def test_other_label_draws_on_the_same_data_are_no_drift(scan: Scan, first: RunDirectory) -> None:
    comparison = compare_runs(first, scan(0, seed=5))
    assert comparison.verdict == "noise"
    assert comparison.test == "paired"
    assert [change.name for change in comparison.changes] == ["seed"]


@pytest.mark.parametrize("how", ["multiplied", "noised"])
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
)
@pytest.mark.parametrize("data_seed", [0, 1], ids=["same data", "other data"])
def test_perturbed_layer_is_a_drift_that_names_it(
    scan: Scan, first: RunDirectory, make_model: Any, name: str, how: str, data_seed: int
) -> None:
    changed = scan(data_seed, perturbed(make_model("llama"), name, how), "other")
    comparison = compare_runs(first, changed)
    assert comparison.verdict == "drift"
    assert comparison.changed_weights == [name]
    assert f"The weights of 1 group(s) changed: {name}." in comparison.reasons
    assert "model" in {change.kind for change in comparison.changes}


# ---- what it says ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drifted(scan: Scan, make_model: Any) -> RunDirectory:
    model = perturbed(make_model("llama"), "model.layers.0.mlp.down_proj", "multiplied")
    return scan(0, model, "other")


def command(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["compare", *(str(argument) for argument in arguments)])


def test_regret_is_the_price_of_the_first_allocation_under_the_second_scores(
    first: RunDirectory, drifted: RunDirectory
) -> None:
    comparison = compare_runs(first, drifted)
    assert comparison.regret is not None
    rows = {
        (row["group"], row["format"]): row["score"]
        for row in drifted.read_table("sensitivity.parquet").to_pylist()
    }
    allocations = [
        {row["group"]: row["format"] for row in run.read_table("manifest.parquet").to_pylist()}
        for run in (first, drifted)
    ]
    kept_nats, own_nats = (
        sum(0.0 if name == "none" else rows[group, name] for group, name in allocation.items())
        for allocation in allocations
    )
    assert comparison.regret.kept_nats == pytest.approx(kept_nats)
    assert comparison.regret.own_nats == pytest.approx(own_nats)
    assert comparison.regret.nats == pytest.approx(kept_nats - own_nats, abs=1e-12)
    assert comparison.regret.nats >= 0
    solution = drifted.read_json("manifest.json")["solution"]
    assert comparison.regret.own_nats == pytest.approx(solution["predicted_kl_nats"])
    changed = {group for group in allocations[0] if allocations[0][group] != allocations[1][group]}
    assert {change.group for change in comparison.format_changes} == changed


def test_other_budget_is_named_and_no_drift(scan: Scan, first: RunDirectory) -> None:
    comparison = compare_runs(first, scan(0, bits=8))
    assert comparison.verdict == "same"
    assert [str(change) for change in comparison.changes] == ["bits 6.0 -> 8.0"]
    assert comparison.format_changes
    assert comparison.regret is not None
    assert comparison.regret.kept_bytes < comparison.regret.own_bytes


def test_group_left_out_by_the_config_is_no_drift(scan: Scan, first: RunDirectory) -> None:
    comparison = compare_runs(first, scan(0, disable=("lm_head", "*layers.0.mlp*")))
    assert comparison.verdict == "noise"
    assert comparison.only_before == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
    ]
    back = compare_runs(scan(0, disable=("lm_head", "*layers.0.mlp*")), first)
    assert back.only_after == comparison.only_before
    assert back.regret is not None  # the earlier allocation left those groups in 16 bits


def test_caches_that_the_menu_adds_are_no_drift(scan: Scan, first: RunDirectory) -> None:
    after = scan(0, formats=(*FORMATS, "kv_fp8"), kv_bytes_per_token=1000)
    comparison = compare_runs(first, after)
    assert comparison.only_after == [f"model.layers.{n}.self_attn.kv" for n in range(2)]
    assert comparison.verdict == "noise"


def test_field_that_an_earlier_version_did_not_have_is_no_change(
    first: RunDirectory, tmp_path: Path
) -> None:
    shutil.copytree(first.uri, tmp_path / "earlier")
    earlier = RunDirectory(str(tmp_path / "earlier"))
    values = earlier.read_json("run.json")
    for name in ("expert_groups", "kv_bytes_per_token", "coverage"):
        del values["config"][name]
    earlier.write_json("run.json", values)
    assert compare_runs(earlier, first).changes == []


def test_runs_without_a_common_score_are_a_drift(scan: Scan, first: RunDirectory) -> None:
    comparison = compare_runs(first, scan(0, formats=("wfp8_afp8",), bits=9))
    assert comparison.verdict == "drift"
    assert "nothing can be compared" in comparison.reasons[0]


def test_single_shard_is_said_to_have_no_error_bars(make_run: Any) -> None:
    runs = [make_run(name=name) for name in ("a", "b")]
    for run, factor in zip(runs, (1.0, 5.0), strict=True):
        solve_run(run, solve_options(ScanConfig(model="m", data="d", out="o", bits=8)), folder="")
        rows = run.read_table("sensitivity.parquet").to_pylist()
        for row in rows:
            row |= {"score": row["score"] * factor, "score_stderr": None, "num_shards": 1}
        run.write_table("sensitivity.parquet", rows)
    comparison = compare_runs(*runs)
    assert (comparison.verdict, comparison.test, comparison.num_tested) == ("noise", "none", 0)
    assert "has no error bars" in comparison.reasons[0]
    assert json.dumps(comparison.to_json(), allow_nan=False)


def test_unfinished_run_is_refused(make_run: Any, first: RunDirectory) -> None:
    with pytest.raises(StoreError, match="no solution yet"):
        compare_runs(first, make_run())


def test_command_prints_the_verdict_first_and_exits_3_for_drift(
    first: RunDirectory, drifted: RunDirectory
) -> None:
    result = command(first.uri, drifted.uri)
    assert result.exit_code == 3, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("# drift: ")
    assert "**Why:** Changed: the model." in lines
    table = lines[lines.index("## Groups that moved") :]
    assert next(line for line in table if line.startswith("| model.")).split(" | ")[0] == (
        "| model.layers.0.mlp.down_proj"
    )


def renamed(directory: RunDirectory, folder: Path, model: dict[str, str], data: str) -> Path:
    """A copy of a run whose model and data have other names."""
    shutil.copytree(directory.path(""), folder)
    record = json.loads((folder / "run.json").read_text())
    record["model"] |= model
    record["dataset"]["name"] = data
    record["config"] |= {"model": record["model"]["name"], "data": data}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_command_knows_a_model_and_data_under_another_path(
    first: RunDirectory, tmp_path: Path
) -> None:
    model = {"name": "/home/me/models/llama"}
    other = renamed(first, tmp_path / "run", model, "/home/me/topics.txt")
    result = command(first.uri, other)
    assert (result.exit_code, result.stdout.splitlines()[0][:7]) == (0, "# same:")
    assert "**Why:** Model, data, formats, config and versions are the same." in result.stdout
    assert "| Model | llama | /home/me/models/llama |" in result.stdout
    assert "| Data | topics.txt | /home/me/topics.txt |" in result.stdout
    assert json.loads(command(first.uri, other, "--json").stdout)["changes"] == []


def test_command_names_models_that_differ(first: RunDirectory, tmp_path: Path) -> None:
    model = {"name": "llama-tuned", "fingerprint": "another"}
    result = command(first.uri, renamed(first, tmp_path / "run", model, "topics.txt"))
    assert "**Why:** Changed: the model (llama -> llama-tuned)." in result.stdout
    nameless = {"name": "llama-tuned", "fingerprint": None}  # as of an imported run
    imported = renamed(first, tmp_path / "imported", nameless, "topics.txt")
    assert "the model (llama -> llama-tuned)" in command(first.uri, imported).stdout


def test_command_prints_json(first: RunDirectory, drifted: RunDirectory) -> None:
    result = command(first.uri, drifted.uri, "--json")
    values = json.loads(result.stdout)
    assert (result.exit_code, values["verdict"], values["test"]) == (3, "drift", "paired")
    assert values == json.loads(json.dumps(compare_runs(first, drifted).to_json()))


def test_command_exits_0_for_the_same_run(first: RunDirectory) -> None:
    result = command(first.uri, first.uri)
    assert (result.exit_code, result.stdout.splitlines()[0][:7]) == (0, "# same:")


def test_command_refuses_what_is_no_run(first: RunDirectory, tmp_path: Path) -> None:
    result = command(first.uri, tmp_path / "nothing")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "is not a run directory" in result.stderr


def test_names_are_never_markup(first: RunDirectory, drifted: RunDirectory) -> None:
    comparison = compare_runs(first, drifted)
    comparison.after["model"] = "<script>|x"
    assert "&lt;script>\\|x" in render_drift(comparison)
