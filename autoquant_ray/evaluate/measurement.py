"""Measures allocations of a finished run on held-out data, with Ray workers.

Every (allocation, shard) pair is a file below ``RUN/evaluation/<data>/<allocation>/``: nothing is
measured twice, and a killed measurement resumes where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.calibrate.files import calibration_of
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.data.texts import require_rows
from autoquant_ray.distributed.interrupts import stop_on_signal
from autoquant_ray.distributed.nodes import enough_nodes
from autoquant_ray.distributed.placement import (
    connected,
    place_workers,
    require_resources,
    worker_needs,
)
from autoquant_ray.distributed.pool import Outcome, Submit, WorkerPool
from autoquant_ray.distributed.progress import progress
from autoquant_ray.distributed.task import ShardTask, Task
from autoquant_ray.errors import Interrupted, StoreError, WorkerError
from autoquant_ray.evaluate.flip_estimates import FlipEstimates, flip_rows, merge_flips
from autoquant_ray.evaluate.held_out import answers_key, data_key, held_out_samples, num_seen
from autoquant_ray.evaluate.runner import EvaluationSpec
from autoquant_ray.evaluate.table import Measured, collect
from autoquant_ray.evaluate.tasks.answers import answer_rows, read_answers, request_tasks
from autoquant_ray.formats.format import NONE
from autoquant_ray.models.find import fingerprint_chats
from autoquant_ray.models.of_run import require_model
from autoquant_ray.plan.make import make_plan
from autoquant_ray.plan.memory import footprint
from autoquant_ray.plan.plan import Plan
from autoquant_ray.quantize.modules import UNQUANTIZED, FormatNumbers
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import Lease, lease, require_free
from autoquant_ray.runs.names import ANSWERS, EVALUATION, FLIPS, SAMPLES, part_name
from autoquant_ray.runs.rounding import dropped_formats
from autoquant_ray.runs.state import RunState
from autoquant_ray.score.path_scores import PathSpec
from autoquant_ray.stages.samples import require_same_chats
from autoquant_ray.stages.shards import note_done, read_tasks
from autoquant_ray.stages.shared_rounding import for_workers
from autoquant_ray.stages.sources import data_specs

logger = logging.getLogger(__name__)


class _DamagedPartError(Exception):
    """A part was unreadable and is deleted."""


class Measurement:
    """Measures allocations on a data set; made by :func:`measuring`.

    Args:
        state: The run.
        plan: Its plan.
        folder: Folder of samples and parts, below the run directory.
        facts: About the data: ``name``, ``num_shards``, ...
        start_pool: Starts the workers; called when a part is missing for the first time.
        start_path_pool: Makes the pool of the worker that scores by ModelOpt's path integrals.
        run_lease: The lease on the run.

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
        start_path_pool: Callable[[], WorkerPool],
        run_lease: Lease,
    ) -> None:
        self.state = state
        self.folder = folder
        self.facts = facts
        self.left_out: dict[int, str] = {}
        self._plan = plan
        self._start_pool = start_pool
        self._start_path_pool = start_path_pool
        self._lease = run_lease
        self._pool: WorkerPool | None = None

    @property
    def data_key(self) -> str:
        """Digest of the data and of all else that numbers depend on, except the allocation."""
        return self.folder.removeprefix(f"{EVALUATION}/")

    def measure(
        self, candidates: Sequence[Candidate], shards: Sequence[int] | None = None
    ) -> list[Measured]:
        """Measure allocations on the same shards.

        Args:
            candidates: Allocations to measure.
            shards: Shards to measure on; default all.

        Raises:
            WorkerError: Every shard failed.
        """
        wanted = range(self.facts["num_shards"]) if shards is None else shards
        missing = self._missing(candidates, wanted)
        if missing:
            self._evaluate(missing)
        used = [shard for shard in wanted if shard not in self.left_out]
        if not used:
            raise WorkerError(f"every shard failed, the first with: {self.left_out[wanted[0]]}")
        try:
            folders = [f"{self.folder}/{candidate.key}" for candidate in candidates]
            return [collect(self._parts(folder, used)) for folder in folders]
        except _DamagedPartError:
            return self.measure(candidates, shards)

    def estimate(self, candidate: Candidate, shards: Sequence[int]) -> FlipEstimates | None:
        """Predict what single changes of an allocation do, from a backward pass on each shard.

        Args:
            candidate: The allocation.
            shards: Shards to use; those that fail are left out.

        Returns:
            The predictions; None where every shard failed.
        """
        folder = f"{self.folder}/{candidate.key}/{FLIPS}"
        finished = set(self.state.directory.list_parts(folder))
        missing = [s for s in shards if s not in finished and s not in self.left_out]
        failed = self._estimate(candidate, missing) if missing else {}
        used = [shard for shard in shards if shard not in failed and shard not in self.left_out]
        if not used:
            return None
        try:
            return merge_flips(self._parts(folder, used), candidate.formats)
        except _DamagedPartError:
            return self.estimate(candidate, shards)

    def answer(
        self, candidate: Candidate, kind: str, requests: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """Answers to requests of benchmark tasks under an allocation, each asked once in a run.

        Args:
            candidate: The allocation.
            kind, requests: See :meth:`~autoquant_ray.evaluate.tasks.responder.Responder.answer`.

        Raises:
            WorkerError: Requests could not be answered.
        """
        directory, choice = self.state.directory, _choice(self._plan, candidate)
        key = answers_key(self.state, kind, requests)
        folder = f"{EVALUATION}/{key}/{candidate.key}/{ANSWERS}"
        tasks = request_tasks(kind, requests)
        finished = set(directory.list_parts(folder))
        missing = [task for task in tasks if task.shard not in finished]

        def submit(worker: Any, task: Any) -> Any:
            return worker.answer.remote(task, choice)

        if missing:
            logger.info("tasks: %d requests to %s", len(requests), candidate.name)
            with closing(self._outcomes("tasks", missing, len(missing), submit)) as outcomes:
                for outcome in outcomes:
                    if outcome.reason is not None:
                        raise WorkerError(f"tasks of {candidate.name}: {outcome.reason}")
                    name = part_name(folder, outcome.task.shard)
                    directory.write_table(name, answer_rows(outcome.task, outcome.result))
        try:
            parts = self._parts(folder, [task.shard for task in tasks])
            return [answer for part in parts for answer in read_answers(kind, part)]
        except _DamagedPartError:
            return self.answer(candidate, kind, requests)

    def score_paths(self, task: ShardTask) -> Generator[Outcome, None, None]:
        """ModelOpt's scores by path integrals, from a worker that lives as long as this takes.

        Args:
            task: All samples.
        """
        with self._start_path_pool() as pool:
            yield from self._outcomes("shapley", [task], 1, _submit_paths, pool)

    def _parts(self, folder: str, shards: Sequence[int]) -> Iterator[Any]:
        directory = self.state.directory
        for shard in shards:
            name = part_name(folder, shard)
            try:
                yield directory.read_table(name)
            except StoreError as error:
                logger.warning("%s is damaged and measured again: %s", name, error)
                directory.append_event("part_damaged", part=name)
                directory.delete(name)
                raise _DamagedPartError from None

    def require_lease(self) -> None:
        """Check that no other process can have taken over the run.

        Raises:
            HeldError: Another process may have taken it over.
        """
        self._lease.require()

    def _missing(
        self, candidates: Sequence[Candidate], shards: Sequence[int]
    ) -> dict[int, list[Candidate]]:
        """Shard -> allocations that were not measured on it."""
        missing: dict[int, list[Candidate]] = {}
        for candidate in {candidate.key: candidate for candidate in candidates}.values():
            finished = set(self.state.directory.list_parts(f"{self.folder}/{candidate.key}"))
            for shard in shards:
                if shard not in finished and shard not in self.left_out:
                    missing.setdefault(shard, []).append(candidate)
        return dict(sorted(missing.items()))

    def _evaluate(self, missing: Mapping[int, list[Candidate]]) -> None:
        """Measure allocations on shards."""
        directory = self.state.directory

        def submit(worker: Any, task: Any) -> Any:
            choices = [_choice(self._plan, candidate) for candidate in missing[task.shard]]
            return worker.evaluate.remote(task, choices)

        tasks = read_tasks(directory, f"{self.folder}/{SAMPLES}", missing)
        with closing(self._outcomes("evaluate", tasks, len(missing), submit)) as outcomes:
            for outcome in outcomes:
                shard = outcome.task.shard
                if outcome.reason is not None:
                    logger.warning("shard %d is left out: %s", shard, outcome.reason)
                    self.left_out[shard] = outcome.reason
                else:
                    _write_parts(directory, self.folder, outcome, missing[shard])

    def _estimate(self, candidate: Candidate, shards: Sequence[int]) -> dict[int, str]:
        """Predict changes on shards; returns those that failed, with the reasons."""
        choice, failed = _choice(self._plan, candidate), {}
        groups = [group.name for group in self._plan.searched]
        formats = [format_.name for format_ in self._plan.formats]

        def submit(worker: Any, task: Any) -> Any:
            return worker.estimate.remote(task, choice)

        tasks = read_tasks(self.state.directory, f"{self.folder}/{SAMPLES}", shards)
        with closing(self._outcomes("estimate", tasks, len(shards), submit)) as outcomes:
            for outcome in outcomes:
                shard = outcome.task.shard
                if outcome.reason is not None:
                    logger.warning(
                        "changes are not predicted on shard %d: %s", shard, outcome.reason
                    )
                    failed[shard] = outcome.reason
                else:
                    name = part_name(f"{self.folder}/{candidate.key}/{FLIPS}", shard)
                    rows = flip_rows(outcome.result, groups, formats)
                    self.state.directory.write_table(name, rows)
        return failed

    def _outcomes(
        self,
        doing: str,
        tasks: Iterable[Task],
        num_tasks: int,
        submit: Submit,
        pool: WorkerPool | None = None,
    ) -> Generator[Outcome, None, None]:
        """Run tasks on a pool's workers, or on those that measure; the lease holds for each.

        Those that measure are started where they are not.

        Raises:
            Interrupted: SIGTERM or Ctrl-C; what was in flight has been yielded, as far as it ended
                within the grace period.
        """
        if pool is None:
            pool = self._pool = self._pool or self._start_pool()
        directory, num_kept = self.state.directory, 0
        with (
            stop_on_signal(pool.grace_s) as stop,
            closing(pool.run(tasks, submit, stop)) as outcomes,
            progress(doing, num_tasks) as advance,
        ):
            for outcome in outcomes:
                if outcome.reason is None:
                    self.require_lease()
                yield outcome
                if outcome.reason is None:
                    num_kept += 1
                    note_done(directory, doing, outcome)
                advance(f"{outcome.num_workers} worker(s)")
        if stop.is_made:
            raise Interrupted(
                f"interrupted: {doing} has {num_kept} of {num_tasks} shards more, all kept; run "
                "the same command again to go on"
            )


@contextmanager
def measuring(state: RunState, config: EvaluationConfig) -> Iterator[Measurement]:
    """Connect to the cluster, take the lease on the run, and read the data.

    Args:
        state: A finished run.
        config: Data and workers.

    Raises:
        AutoQuantError: One of its subclasses; finished parts are kept.
    """
    directory = state.directory
    if state.record.config is None:
        raise StoreError(f"{directory.uri} was imported: there is no model to measure")
    scan = config.scan_config(state.config)
    require_free(directory)
    ref = require_model(state, scan)
    if config.data is None:
        require_same_chats(state, fingerprint_chats(ref))
    else:
        for spec in data_specs(scan).values():
            require_rows(spec, skips_bad=scan.skip_bad_samples)
    plan = make_plan(scan, ref, device=scan.device, menu=state.plan["formats"])
    skip = num_seen(state, scan, is_given=config.data is not None)
    folder = f"{EVALUATION}/{data_key(state, scan, skip)}"
    calibration = calibration_of(state, used=())  # what is measured was checked
    if dropped := dropped_formats(state):
        names = ", ".join(dropped)
        logger.warning("%s cannot be measured (`keep_rounded` no), so rivals have none", names)
    with (
        connected(scan, scan.runtime_env),
        enough_nodes(scan, worker_needs(scan)) as resources,
        lease(directory) as run_lease,
        ExitStack() as stack,
    ):
        require_resources(scan, resources)
        facts = held_out_samples(state, folder, scan, ref, skip)
        placement = place_workers(
            scan,
            resources,
            device=scan.device,
            worker_bytes=footprint(plan, scan).worker_bytes(scan.placement),
        ).at_most(facts["num_shards"])

        def start_pool() -> WorkerPool:
            spec = EvaluationSpec.of(scan, ref, plan, for_workers(directory, calibration))
            pool = WorkerPool(spec, placement, directory.append_event, scan.grace_s)
            return stack.enter_context(pool)

        def start_path_pool() -> WorkerPool:
            spec = PathSpec.of(scan, ref, plan)
            return WorkerPool(spec, placement.at_most(1), directory.append_event, scan.grace_s)

        yield Measurement(state, plan, folder, facts, start_pool, start_path_pool, run_lease)


def _submit_paths(worker: Any, task: Any) -> Any:
    return worker.score_paths.remote(task)


def _choice(plan: Plan, candidate: Candidate) -> FormatNumbers:
    index = {format_.name: number for number, format_ in enumerate(plan.formats)}
    index[NONE] = UNQUANTIZED
    formats = candidate.formats  # without experts that saw no token
    return tuple(index[formats.get(group.name, NONE)] for group in plan.searched)


def _write_parts(
    directory: RunDirectory, folder: str, outcome: Outcome, candidates: Sequence[Candidate]
) -> None:
    result = outcome.result
    for candidate, samples in zip(candidates, result.divergences, strict=True):
        rows = [
            {
                "sample": outcome.task.first_sample + number,
                "kl": divergence.kl_N,
                "loss": divergence.loss_N,
                "reference_loss": reference_N,
                "agrees": divergence.agrees_N,
            }
            for number, (divergence, reference_N) in enumerate(
                zip(samples, result.reference, strict=True)
            )
        ]
        name = part_name(f"{folder}/{candidate.key}", outcome.task.shard)
        directory.write_table(name, rows)
