"""Measures allocations of a finished run on held-out data, over the Ray workers.

Every (allocation, shard) is one file below ``RUN/evaluation/<data>/<allocation>/``: what was
measured before costs nothing, and a killed measurement goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from autoquant_ray import samples_stage
from autoquant_ray.calibration import to_maxima
from autoquant_ray.candidates import Candidate
from autoquant_ray.config import ScanConfig
from autoquant_ray.distributed.placement import connected, place_workers, require_resources
from autoquant_ray.distributed.pool import Outcome, WorkerPool
from autoquant_ray.distributed.progress import progress
from autoquant_ray.distributed.worker import ShardTask
from autoquant_ray.errors import StoreError, WorkerError
from autoquant_ray.evaluation_config import EvaluationConfig
from autoquant_ray.evaluation_engine import EvaluationSpec
from autoquant_ray.evaluation_table import Measured, collect
from autoquant_ray.fingerprint import fingerprint_source
from autoquant_ray.footprint import footprint
from autoquant_ray.formats import NONE
from autoquant_ray.lease import lease
from autoquant_ray.models import ModelRef, find_model, fingerprint_model, require_weights
from autoquant_ray.plan import Plan
from autoquant_ray.planner import make_plan
from autoquant_ray.quantized_layers import UNQUANTIZED, Choice
from autoquant_ray.sensitivity import Maxima, scored_modules
from autoquant_ray.stage_fingerprints import stage_fingerprints
from autoquant_ray.state import RunState
from autoquant_ray.store import EVALUATION, SAMPLES, RunDirectory, part_name
from autoquant_ray.tokenizer import TokenizerRef

logger = logging.getLogger(__name__)


class Measurement:
    """Measures allocations on one data set; made by :func:`measuring`.

    Args:
        state: The run.
        plan: Its plan.
        folder: Where samples and parts are, below the run.
        facts: About the data: ``name``, ``num_shards``, ...
        start_pool: Starts the workers, when the first part is missing.

    Attributes:
        left_out: Shards that could not be measured -> reason.
    """

    def __init__(
        self,
        state: RunState,
        plan: Plan,
        folder: str,
        facts: Mapping[str, Any],
        start_pool: Callable[[], WorkerPool],
    ) -> None:
        self.state = state
        self.folder = folder
        self.facts = facts
        self.left_out: dict[int, str] = {}
        self._plan = plan
        self._start_pool = start_pool
        self._pool: WorkerPool | None = None

    @property
    def data_key(self) -> str:
        """Digest of the data and of all else that the numbers depend on, but the allocation."""
        return self.folder.removeprefix(f"{EVALUATION}/")

    def measure(
        self, candidates: Sequence[Candidate], shards: Sequence[int] | None = None
    ) -> list[Measured]:
        """Measure allocations on the same shards.

        Args:
            candidates: What to measure.
            shards: On which shards; default all.

        Raises:
            WorkerError: Every shard failed.
        """
        wanted = range(self.facts["num_shards"]) if shards is None else shards
        missing = self._missing(candidates, wanted)
        if missing:
            if self._pool is None:
                self._pool = self._start_pool()
            self._run(self._pool, missing)
        used = [shard for shard in wanted if shard not in self.left_out]
        if not used:
            raise WorkerError(f"every shard failed, the first with: {self.left_out[wanted[0]]}")
        directory = self.state.directory
        return [
            collect(
                directory.read_table(part_name(f"{self.folder}/{one.key}", shard), "divergences")
                for shard in used
            )
            for one in candidates
        ]

    def _missing(
        self, candidates: Sequence[Candidate], shards: Sequence[int]
    ) -> dict[int, list[Candidate]]:
        """Shard -> allocations without a part of it."""
        missing: dict[int, list[Candidate]] = {}
        for candidate in {one.key: one for one in candidates}.values():
            there = set(self.state.directory.list_parts(f"{self.folder}/{candidate.key}"))
            for shard in shards:
                if shard not in there and shard not in self.left_out:
                    missing.setdefault(shard, []).append(candidate)
        return dict(sorted(missing.items()))

    def _run(self, pool: WorkerPool, missing: Mapping[int, list[Candidate]]) -> None:
        directory = self.state.directory
        outcomes = pool.run(
            _tasks(directory, self.folder, missing),
            lambda worker, task: worker.evaluate.remote(
                task, [_choice(self._plan, candidate) for candidate in missing[task.shard]]
            ),
        )
        with closing(outcomes), progress("evaluate", len(missing)) as advance:
            for outcome in outcomes:
                shard = outcome.task.shard
                if outcome.reason is not None:
                    logger.warning("shard %d is left out: %s", shard, outcome.reason)
                    self.left_out[shard] = outcome.reason
                else:
                    _write_parts(directory, self.folder, outcome, missing[shard])
                    num_tokens = sum(map(len, outcome.task.samples))
                    directory.append_event(
                        "shard_done",
                        stage="evaluate",
                        shard=shard,
                        num_tokens=num_tokens,
                        seconds=round(outcome.seconds, 3),
                        pid=outcome.process_id,
                    )
                advance(f"{outcome.num_workers} worker(s)")


@contextmanager
def measuring(state: RunState, config: EvaluationConfig) -> Iterator[Measurement]:
    """Connect to the cluster, hold the run, and read the data.

    Args:
        state: A finished run.
        config: Data and workers.

    Raises:
        AutoQuantError: One of its subclasses; finished parts are kept.
    """
    directory = state.directory
    scan = config.scan_config(state.values["config"])
    ref = _require_model(state, scan)
    plan = make_plan(scan, ref, device=scan.device)
    skip = state.values["dataset"]["num_samples"] if config.data is None else 0
    folder = f"{EVALUATION}/{_data_key(state, scan, skip)}"
    with connected(scan) as resources, lease(directory), ExitStack() as stack:
        require_resources(scan, resources)
        facts = _samples(directory, folder, scan, ref, skip, state)
        placement = place_workers(
            scan,
            resources,
            device=scan.device,
            worker_bytes=footprint(plan, scan).worker_bytes(scan.placement),
        ).at_most(facts["num_shards"])

        def start_pool() -> WorkerPool:
            spec = _engine_spec(scan, ref, plan, _maxima(directory))
            return stack.enter_context(WorkerPool(spec, placement, directory.append_event))

        yield Measurement(state, plan, folder, facts, start_pool)


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
