"""A scan that stops when it is stable: the same shards and bytes, whoever scored them and when."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.pool import Outcome
from autoquant_ray.distributed.scoring import SensitivitySums, ShardScores
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SAMPLES, part_name
from autoquant_ray.runs.state import RunState
from autoquant_ray.scan import run_search
from autoquant_ray.solve import solve_run
from autoquant_ray.stages import score as stages

# Many draws make a shard slow enough that a kill lands in the middle of the scan.
STOPPING = ("--shard-samples", "1", "--label-draws", "12", "--bits", "7.5")
STOPPING += ("--stop-when-stable", "90%")


def result_of(run: Path) -> tuple[bytes, list[str], Any]:
    """What must be the same: the scores, the parts that are left, the decision."""
    values = json.loads((run / "run.json").read_text())
    parts = sorted(path.name for path in (run / "scores").iterdir())
    return (run / "sensitivity.parquet").read_bytes(), parts, values["stopping"]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, run_command: Any, scan_arguments: Any
) -> Path:
    run: Path = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_command(*scan_arguments(run, *STOPPING, "--workers", "1"))
    assert done.returncode == 0, done.stderr
    assert "used 8 of 12 shards (8 of 12 samples, " in done.stdout
    assert "; stable: expected regret " in done.stdout
    return run


def test_stopped_scan_keeps_the_first_shards_and_says_so(undisturbed: Path) -> None:
    _, parts, stopping = result_of(undisturbed)
    assert parts == [f"shard-{shard:06d}.parquet" for shard in range(8)]
    assert (stopping["shards_used"], stopping["shards_total"]) == (8, 12)
    assert stopping["is_stable"] is True
    assert 0 <= stopping["expected_regret"] < 0.9 == stopping["threshold"]
    assert [check["shards"] for check in stopping["checks"]] == [8]
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["dataset"]["stopping"] == stopping
    lengths = [12, 40, 6, 23, 31, 17, 28, 9, 35, 14, 20, 26]
    used = {"num_shards": 8, "num_samples": 8, "num_tokens": sum(lengths[:8])}
    assert manifest["dataset"]["used"] == used
    for name in ("report.md", "report.html"):
        text = (undisturbed / name).read_text()
        assert f"{sum(lengths[:8])} of {sum(lengths)} tokens, 8 of 12 samples (at most 128)" in text
        assert "8 of 12 batches (shards)" in text
        assert f"expected regret {stopping['expected_regret']:.2%} of the predicted KL" in text


def test_stopped_scan_has_the_scores_of_a_scan_of_those_shards(
    ray_local: None, undisturbed: Path, tmp_path: Path, model_folder: Any, text_file: Path
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("".join(text_file.read_text().splitlines(keepends=True)[:8]))
    config = ScanConfig(
        model=str(model_folder("llama")),
        data=str(few),
        out=str(tmp_path / "run"),
        formats=("wint4_afp16:max", "wint8_afp16"),
        bits=8,
        shard_samples=1,
        workers=1,
    )
    run_search(config)
    more = config.model_copy(
        update={"data": str(text_file), "out": str(tmp_path / "more"), "stop_when_stable": 0.9}
    )
    run_search(more)
    assert result_of(tmp_path / "more")[2]["shards_used"] == 8
    stopped, whole = tmp_path / "more", tmp_path / "run"
    assert (stopped / "sensitivity.parquet").read_bytes() == (
        whole / "sensitivity.parquet"
    ).read_bytes()


def test_stopped_scan_with_three_workers_is_identical(
    undisturbed: Path, tmp_path: Path, run_command: Any, scan_arguments: Any
) -> None:
    run = tmp_path / "run"
    done = run_command(*scan_arguments(run, *STOPPING, "--workers", "3"))
    assert done.returncode == 0, done.stderr
    assert result_of(run) == result_of(undisturbed)


def test_stopped_scan_with_a_killed_worker_is_identical(
    undisturbed: Path, tmp_path: Path, start_command: Any, scan_arguments: Any, watch: Any
) -> None:
    run = tmp_path / "run"
    watch.kill_worker(
        run, start_command(*scan_arguments(run, *STOPPING, "--workers", "2")), after=2
    )
    assert result_of(run) == result_of(undisturbed)


def test_stopped_scan_with_a_killed_driver_resumes_to_the_same(
    undisturbed: Path,
    tmp_path: Path,
    start_command: Any,
    run_command: Any,
    scan_arguments: Any,
    watch: Any,
) -> None:
    run = tmp_path / "run"
    alone = ("--workers", "1", "--address", "local")
    scan = start_command(*scan_arguments(run, *STOPPING, *alone))
    kept = watch.kill_driver(run, scan, after=3)
    assert 3 <= len(kept) < 8
    resumed = run_command(*scan_arguments(run, *STOPPING, "--workers", "1", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert kept.items() <= watch.part_times(run).items()
    assert result_of(run) == result_of(undisturbed)


class Arrivals:
    """A pool whose results come in a given order; made-up sums that depend on the shard alone."""

    grace_s = 0.0

    def __init__(self, plan: Any, order: list[int], broken: tuple[int, ...] = ()) -> None:
        self._plan = plan
        self._order = order
        self._broken = broken
        self.yielded: list[int] = []

    def run(self, tasks: Any, submit: Any, stop: Any) -> Iterator[Outcome]:
        waiting = {task.shard: task for task in tasks}
        for shard in self._order:
            if shard in waiting:
                self.yielded.append(shard)
                yield self._outcome(waiting[shard])

    def _outcome(self, task: Any) -> Outcome:
        if task.shard in self._broken:
            return Outcome(task=task, reason="broken")
        num_groups = len(self._plan.searched)
        noise_GF = np.random.default_rng(task.shard).gamma(0.2, 5.0, size=(num_groups, 2))
        sums_GF = noise_GF * np.arange(1, num_groups + 1)[:, None] * [1.0, 2.0**-8]
        sums = SensitivitySums(
            elementwise_GF=sums_GF,
            token_GF=2 * sums_GF,
            elementwise_variance_GF=np.zeros_like(sums_GF),
            token_variance_GF=np.zeros_like(sums_GF),
            num_rows_G=np.full(num_groups, 9),
        )
        scores = ShardScores(
            sums=sums,
            num_tokens=40 + task.shard,
            num_samples=2,
            loss=1.0,
            seconds=0.5,
            row_shares_GF=np.ones_like(sums_GF),
        )
        return Outcome(task=task, result=scores)


@pytest.fixture
def made_up_scan(make_model: Any, tmp_path: Path) -> Any:
    """Score and aggregate 40 made-up shards that arrive in an order; returns (state, pool)."""
    formats = ("wint4_afp16:max", "wint8_afp16")
    plan = build_plan(make_model("llama"), resolve_formats(formats, device="cpu"))
    count = iter(range(1000))

    def run(
        order: list[int],
        broken: tuple[int, ...] = (),
        share: float = 0.6,
        state: RunState | None = None,
    ) -> tuple[RunState, Arrivals]:
        if state is None:
            config = ScanConfig(
                model="llama",
                data="made-up",
                out=str(tmp_path / f"run-{next(count)}"),
                formats=formats,
                bits=7,
                stop_when_stable=share,
            )
            facts = {"num_shards": 40, "num_samples": 80, "num_tokens": 640}
            identity = {
                "model": {"name": "llama", "fingerprint": "m"},
                "dataset": {"name": "made-up"} | facts,
                "fingerprints": {"model": "m", "data": "d"},
            }
            state = RunState.start(RunDirectory(config.out), config, "new", identity)
            state.begin()
            stages.write_plan(state, plan, "plan")
            for shard in range(40):
                rows = [{"sample": 2 * shard + i, "tokens": [1] * 8} for i in range(2)]
                state.directory.write_table(part_name(SAMPLES, shard), rows)
        pool = Arrivals(plan, order, broken)
        config = ScanConfig.model_validate(state.record.config)
        state.release_quarantine()
        if not stages.is_scored(state, plan, "score"):
            stages.score(state, pool, plan, Calibration(), "score")  # type: ignore[arg-type]
        stages.aggregate(state, config, "aggregate")
        return state, pool

    return run


IN_ORDER = list(range(40))


def kept(state: RunState) -> Any:
    """The result of a made-up scan with its quarantine."""
    return *result_of(Path(state.directory.uri)), state.record.quarantined, state.record.used


def test_score_any_order_of_arrival_leaves_the_same_files(
    ray_local: None, made_up_scan: Any
) -> None:
    broken = (3, 25, 39)
    reference, pool = made_up_scan(IN_ORDER, broken)
    stopping = reference.record.stopping
    assert [check["shards"] for check in stopping["checks"]][:2] == [8, 12]
    assert 8 < stopping["shards_used"] < 30
    assert 0 < stopping["expected_regret"] < stopping["threshold"] == 0.6
    assert pool.yielded == IN_ORDER[: stopping["shards_used"] + 1]
    assert [entry["shard"] for entry in reference.record.quarantined] == [3]
    assert 3 not in reference.directory.list_parts("scores")
    rng = np.random.default_rng(0)
    late = [39, 25, 30, 29, 3, *(s for s in IN_ORDER if s not in (39, 25, 30, 29, 3))]
    for order in (IN_ORDER[::-1], late, rng.permutation(40).tolist()):
        state, _ = made_up_scan(order, broken)
        assert kept(state) == kept(reference)


def test_score_too_noisy_to_stop_uses_everything(ray_local: None, made_up_scan: Any) -> None:
    state, _ = made_up_scan(IN_ORDER, share=1e-9)
    stopping = state.record.stopping
    assert stopping["is_stable"] is False
    assert [check["shards"] for check in stopping["checks"]] == [8, 12, 18, 27, 40]
    assert stopping["expected_regret"] == stopping["checks"][-1]["expected_regret"] > 1e-9
    assert state.record.used == {"num_shards": 40, "num_samples": 80, "num_tokens": 640}
    state, _ = made_up_scan(IN_ORDER, broken=(3,), share=1e-9)
    assert state.record.used == {"num_shards": 39, "num_samples": 78, "num_tokens": 624}
    assert state.record.stopping["shards_used"] == 39


def test_score_resume_decides_on_parts_that_are_there(ray_local: None, made_up_scan: Any) -> None:
    """All parts on disk, as after a kill between the last result and the decision."""
    reference, _ = made_up_scan(IN_ORDER)
    used = reference.record.stopping["shards_used"]
    whole, _ = made_up_scan(IN_ORDER, share=1e-9)
    whole.record.config["stop_when_stable"] = 0.6
    whole.record.stages.pop("score")
    whole.reopen("aggregate")
    state, pool = made_up_scan(IN_ORDER, state=whole)
    assert pool.yielded == []
    assert kept(state) == kept(reference)
    assert state.directory.list_parts("scores") == IN_ORDER[:used]


def test_score_resume_of_a_stopped_scan_scores_only_what_was_lost(
    ray_local: None, made_up_scan: Any
) -> None:
    state, _ = made_up_scan(IN_ORDER)
    before = kept(state)
    _, pool = made_up_scan(IN_ORDER, state=state)
    assert pool.yielded == []
    state.directory.delete(part_name("scores", 4))
    state, pool = made_up_scan(IN_ORDER[::-1], state=state)
    assert 4 in pool.yielded
    assert not set(pool.yielded) & set(IN_ORDER[: before[2]["shards_used"]]) - {4}
    assert kept(state) == before


def test_score_released_shard_is_decided_on_again(ray_local: None, made_up_scan: Any) -> None:
    """A shard that was left out works on resume: the same result as if it always had."""
    reference, _ = made_up_scan(IN_ORDER)
    state, _ = made_up_scan(IN_ORDER, broken=(3,))
    assert kept(state) != kept(reference)
    state, _ = made_up_scan(IN_ORDER, state=state)
    assert kept(state) == kept(reference)


def test_stopped_scan_resume_with_another_share_is_refused(
    undisturbed: Path, tmp_path: Path, run_command: Any, scan_arguments: Any
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    arguments = scan_arguments(tmp_path / "run", *STOPPING[:-1], "5%", "--resume")
    done = run_command(*arguments)
    assert done.returncode == 2
    assert "stop_when_stable: 0.9 -> 0.05" in done.stderr.splitlines()[-1]
    assert result_of(tmp_path / "run") == result_of(undisturbed)


def test_stopped_scan_solved_for_another_budget_says_what_was_used(
    undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    solution = solve_run(RunDirectory(str(tmp_path / "run")), SolveOptions(bits=5))
    assert solution.shards_used is not None
    assert solution.shards_used.startswith("8 of 12 shards")
    assert "at the scan's own budget" in solution.shards_used
