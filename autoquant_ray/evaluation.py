"""The story of an evaluation: how much allocations of a finished run really lose.

Runs the quantized model beside the model itself on held-out data over the Ray workers. Every
(allocation, shard) is one file below ``RUN/evaluation/``; a killed evaluation goes on where it
stopped, and an allocation that was measured before costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from autoquant_ray import samples_stage
from autoquant_ray.calibration import to_maxima
from autoquant_ray.candidates import Candidate, collect_candidates
from autoquant_ray.config import ScanConfig, stage_fingerprints
from autoquant_ray.distributed.placement import connected, place_workers, require_resources
from autoquant_ray.distributed.pool import Outcome, WorkerPool
from autoquant_ray.distributed.progress import progress
from autoquant_ray.distributed.worker import ShardTask
from autoquant_ray.errors import StoreError, WorkerError
from autoquant_ray.evaluation_config import EvaluationConfig
from autoquant_ray.evaluation_engine import EvaluationSpec
from autoquant_ray.evaluation_table import collect, evaluation_rows
from autoquant_ray.fingerprint import fingerprint_source
from autoquant_ray.footprint import footprint
from autoquant_ray.formats import NONE
from autoquant_ray.lease import lease
from autoquant_ray.models import ModelRef, find_model, fingerprint_model, require_weights
from autoquant_ray.plan import Plan
from autoquant_ray.planner import make_plan
from autoquant_ray.quantized_layers import UNQUANTIZED, Choice
from autoquant_ray.report import write_reports
from autoquant_ray.sensitivity import Maxima, scored_modules
from autoquant_ray.state import RunState
from autoquant_ray.store import EVALUATION, SAMPLES, SOLUTIONS, RunDirectory, part_name
from autoquant_ray.tokenizer import TokenizerRef

logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.parquet"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        rows: Of ``evaluation.parquet``, the solution first.
        quarantined: Shards left out, with the reason.
        paths: Files written.
    """

    rows: list[dict[str, Any]]
    quarantined: list[dict[str, Any]]
    paths: dict[str, str]


def evaluate_run(config: EvaluationConfig) -> Evaluation:
    """Measure a solution of a run, and what it is compared with.

    Raises:
        AutoQuantError: One of its subclasses; finished parts are kept.
    """
    directory = RunDirectory(config.run)
    state = RunState.open(directory)
    start = f"{SOLUTIONS}/{config.solution}/" if config.solution else ""
    candidates = collect_candidates(state, start, config.against, num_random=config.num_random)
    scan = config.scan_config(state.values["config"])
    ref = _require_model(state, scan)
    plan = make_plan(scan, ref, device=scan.device)
    skip = state.values["dataset"]["num_samples"] if config.data is None else 0
    folder = f"{EVALUATION}/{_data_key(state, scan, skip)}"
    with connected(scan) as resources, lease(directory):
        require_resources(scan, resources)
        facts = _samples(directory, folder, scan, ref, skip, state)
        missing = _missing_parts(directory, folder, facts["num_shards"], candidates)
        quarantined: list[dict[str, Any]] = []
        if missing:
            placement = place_workers(
                scan,
                resources,
                device=scan.device,
                worker_bytes=footprint(plan, scan).worker_bytes(scan.placement),
            ).at_most(len(missing))
            spec = _engine_spec(scan, ref, plan, _maxima(directory))
            with WorkerPool(spec, placement, directory.append_event) as pool:
                quarantined = _measure(directory, folder, pool, plan, missing)
        return _write(state, start, folder, facts, candidates, quarantined)


def _require_model(state: RunState, scan: ScanConfig) -> ModelRef:
    ref = find_model(scan.model, trust_remote_code=scan.trust_remote_code)
    require_weights(ref)
    if fingerprint_model(ref) != state.values["fingerprints"]["model"]:
        raise StoreError(
            f"model {scan.model} changed since {state.directory.uri} was made; scan it again"
        )
    return ref


def _data_key(state: RunState, scan: ScanConfig, skip: int) -> str:
    """Digest of everything that the measured numbers depend on, but the allocation."""
    prints = state.values["fingerprints"]
    marks = stage_fingerprints(scan, prints["model"], fingerprint_source(scan.data))
    own = stage_fingerprints(
        ScanConfig.model_validate(state.values["config"]), prints["model"], prints["data"]
    )
    text = json.dumps([marks["shards"], own["calibrate"], skip])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _samples(
    directory: RunDirectory,
    folder: str,
    scan: ScanConfig,
    ref: ModelRef,
    skip: int,
    state: RunState,
) -> dict[str, Any]:
    """Held-out samples as shards below the evaluation's folder; read once."""
    marker = f"{folder}/data.json"
    if not directory.exists(marker):
        tokenizer = TokenizerRef(
            model=ref.path,
            gguf_file=ref.gguf_file,
            trust_remote_code=ref.trust_remote_code,
            fingerprint=state.values["fingerprints"]["model"],
        )
        with tempfile.TemporaryDirectory(prefix="autoquant-") as name:
            scratch = RunDirectory(name)
            facts = samples_stage.read_samples(scan, tokenizer, scratch, skip=skip)
            for shard in scratch.list_parts(SAMPLES):
                content = scratch.read_bytes(part_name(SAMPLES, shard))
                directory.write_bytes(part_name(f"{folder}/{SAMPLES}", shard), content)
        directory.write_json(marker, facts | {"name": scan.data, "skipped": skip})
    found: dict[str, Any] = directory.read_json(marker)
    return found


def _missing_parts(
    directory: RunDirectory, folder: str, num_shards: int, candidates: Sequence[Candidate]
) -> dict[int, list[Candidate]]:
    """Shard -> allocations without an intact part of it."""
    missing: dict[int, list[Candidate]] = {}
    for candidate in {one.key: one for one in candidates}.values():
        parts = set(directory.list_parts(f"{folder}/{candidate.key}"))
        for shard in range(num_shards):
            if shard not in parts:
                missing.setdefault(shard, []).append(candidate)
    return dict(sorted(missing.items()))


def _maxima(directory: RunDirectory) -> Maxima:
    if not directory.exists("calibration.parquet"):
        return {}
    rows = directory.read_table("calibration.parquet", "calibration").to_pylist()
    return to_maxima({(row["module"], row["statistic"]): row["value"] for row in rows})


def _engine_spec(scan: ScanConfig, ref: ModelRef, plan: Plan, maxima: Maxima) -> EvaluationSpec:
    return EvaluationSpec(
        model=ref,
        dtype=scan.dtype,
        device=scan.device,
        num_threads=scan.cpus_per_worker,
        modules=scored_modules(plan),
        formats=plan.formats,
        maxima=maxima,
        step_tokens=scan.step_tokens,
        placement=scan.placement,
    )


def _measure(
    directory: RunDirectory,
    folder: str,
    pool: WorkerPool,
    plan: Plan,
    missing: Mapping[int, list[Candidate]],
) -> list[dict[str, Any]]:
    """Measure what is missing; returns the shards that had to be left out."""
    quarantined = []
    outcomes = pool.run(
        _tasks(directory, folder, missing),
        lambda worker, task: worker.evaluate.remote(
            task, [_choice(plan, candidate) for candidate in missing[task.shard]]
        ),
    )
    with closing(outcomes), progress("evaluate", len(missing)) as advance:
        for outcome in outcomes:
            shard = outcome.task.shard
            if outcome.reason is not None:
                logger.warning("shard %d is left out: %s", shard, outcome.reason)
                quarantined.append({"shard": shard, "reason": outcome.reason})
            else:
                _write_parts(directory, folder, outcome, missing[shard])
                directory.append_event("shard_done", stage="evaluate", shard=shard)
            advance()
    return quarantined


def _tasks(directory: RunDirectory, folder: str, shards: Mapping[int, Any]) -> Iterator[ShardTask]:
    for shard in shards:
        table = directory.read_table(part_name(f"{folder}/{SAMPLES}", shard), "samples")
        yield ShardTask(
            shard=shard,
            first_sample=table.column("sample")[0].as_py(),
            samples=[row.values.to_numpy() for row in table.column("tokens")],
        )


def _choice(plan: Plan, candidate: Candidate) -> Choice:
    index = {format_.name: number for number, format_ in enumerate(plan.formats)}
    index[NONE] = UNQUANTIZED
    return tuple(index[candidate.formats[group.name]] for group in plan.searched)


def _write_parts(
    directory: RunDirectory, folder: str, outcome: Outcome, candidates: Sequence[Candidate]
) -> None:
    result = outcome.result
    for candidate, samples in zip(candidates, result.divergences, strict=True):
        rows = [
            {
                "sample": outcome.task.first_sample + number,
                "kl": one.kl_N,
                "loss": one.loss_N,
                "reference_loss": reference_N,
                "agrees": one.agrees_N,
            }
            for number, (one, reference_N) in enumerate(zip(samples, result.reference, strict=True))
        ]
        name = part_name(f"{folder}/{candidate.key}", outcome.task.shard)
        directory.write_table(name, "divergences", rows)


def _write(
    state: RunState,
    start: str,
    folder: str,
    facts: Mapping[str, Any],
    candidates: Sequence[Candidate],
    quarantined: list[dict[str, Any]],
) -> Evaluation:
    """``evaluation.parquet``: rows of this solution on this data are replaced, others stay."""
    directory = state.directory
    left_out = {entry["shard"] for entry in quarantined}
    shards = [shard for shard in range(facts["num_shards"]) if shard not in left_out]
    if not shards:
        raise WorkerError(f"every shard failed, the first with: {quarantined[0]['reason']}")
    measured = [
        collect(
            directory.read_table(part_name(f"{folder}/{one.key}", shard), "divergences")
            for shard in shards
        )
        for one in candidates
    ]
    labels = {"solution": start.removeprefix(f"{SOLUTIONS}/").rstrip("/"), "dataset": facts["name"]}
    labels["data_key"] = folder.removeprefix(f"{EVALUATION}/")
    rows = evaluation_rows(candidates, measured, labels)
    before = []
    if directory.exists(EVALUATION_FILE):
        before = directory.read_table(EVALUATION_FILE, "evaluation").to_pylist()
    kept = [r for r in before if any(r[k] != labels[k] for k in ("solution", "data_key"))]
    path = directory.write_table(EVALUATION_FILE, "evaluation", [*kept, *rows])
    paths = {EVALUATION_FILE: path} | write_reports(state, start)
    return Evaluation(rows=rows, quarantined=quarantined, paths=paths)
