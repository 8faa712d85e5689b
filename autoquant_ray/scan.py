"""The story of a scan: plan, calibrate, score, allocate, report.

:func:`run_search` reads top to bottom. Every stage reads and writes files of the run directory
and is skipped when its result is up to date, so a killed scan goes on where it stopped.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoquant_ray.allocate.options import solve_options
from autoquant_ray.checkpoint_limits import checkpoint_limits
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.sources import data_name
from autoquant_ray.config.stage_fields import stage_fingerprints
from autoquant_ray.data.fingerprint import fingerprint_data
from autoquant_ray.data.texts import require_rows
from autoquant_ray.distributed.metrics import metrics_of
from autoquant_ray.distributed.node_devices import (
    device_bytes,
    difference_dtype,
    gpus_per_worker,
)
from autoquant_ray.distributed.nodes import enough_nodes
from autoquant_ray.distributed.placement import (
    Placement,
    connected,
    place_workers,
    require_resources,
    resolve_device,
    spare_bytes,
    worker_needs,
)
from autoquant_ray.distributed.pool import WorkerPool
from autoquant_ray.distributed.scoring import ScoringSpec
from autoquant_ray.distributed.this_machine import require_gpu
from autoquant_ray.errors import DataError
from autoquant_ray.formats.integer_pairs import has_integer_pair, multiplies_integers
from autoquant_ray.formats.menu import check_device
from autoquant_ray.models.context import SampleLimits
from autoquant_ray.models.find import (
    ModelRef,
    find_model,
    fingerprint_chats,
    fingerprint_model,
    require_mappable,
)
from autoquant_ray.models.stored_tensors import require_weights
from autoquant_ray.models.tokenizer import TokenizerRef, require_ids_within
from autoquant_ray.plan.make import make_plan
from autoquant_ray.plan.memory import (
    GIB,
    KeptGraphs,
    choose_placement,
    footprint,
    kept_graphs,
)
from autoquant_ray.plan.plan import Plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import lease, require_free
from autoquant_ray.runs.names import SAMPLES
from autoquant_ray.runs.record import QuarantinedShard, RunRecord
from autoquant_ray.runs.rounding import drop_rounding
from autoquant_ray.runs.state import Mode, RunState, require_target
from autoquant_ray.solve import Solution, solve_run
from autoquant_ray.stages import calibrate as calibration_stage
from autoquant_ray.stages import samples as samples_stage
from autoquant_ray.stages import score as stages
from autoquant_ray.stages.fit import fit
from autoquant_ray.stages.sources import data_specs
from autoquant_ray.tracking.mlflow_runs import tracked

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A finished scan.

    Attributes:
        solution: The allocation and the paths of all written files.
        quarantined: Shards left out, with the stage and the reason.
    """

    solution: Solution
    quarantined: list[QuarantinedShard]


def run_search(config: ScanConfig, mode: Mode = "new", run_id: str | None = None) -> SearchResult:
    """Scan a model and choose a format for every group.

    Args:
        config: What to do.
        mode: ``new`` refuses an existing run directory, ``resume`` goes on with it, ``overwrite``
            deletes it first.
        run_id: Of a run that is started; default: folder and time. A resumed run keeps its id.

    Raises:
        AutoQuantError: One of its subclasses; the run directory stays resumable.
        Interrupted: SIGTERM or Ctrl-C while workers computed; the same.
    """
    ref = find_model(config.model, trust_remote_code=config.trust_remote_code)
    require_gpu(config)
    directory = RunDirectory(config.out)
    directory.advice = "go on with `resume`"
    resumed = RunState.open(directory).record if mode == "resume" and directory.exists() else None
    device = "cuda" if config.device == "auto" else config.device
    menu = resumed.plan["formats"] if resumed is not None and resumed.plan is not None else None
    plan = make_plan(config, ref, device=device, menu=menu, engine=config.engine)
    limits = checkpoint_limits(plan, ref)
    plan = replace(plan, checkpoint_limits=limits.for_run())
    stages.check_budget(plan, config)
    for spec in data_specs(config).values():
        require_rows(spec, skips_bad=config.skip_bad_samples)
    require_weights(ref)
    if plan.limits is not None:
        require_ids_within(ref, plan.limits.token_ids)
    if config.placement == "offload":
        require_mappable(ref)
    require_target(directory, mode)
    require_free(directory)
    with (
        connected(config, config.runtime_env),
        enough_nodes(config, worker_needs(config)) as resources,
    ):
        config = _resolve(config, resources)
        require_resources(config, resources)
        config = _resolve_difference_dtype(config, plan, resumed)
        config = _resolve_placement(config, ref, plan, resumed)
        check_device(plan.formats, config.device)
        logger.info("plan: %d of %d groups searched", len(plan.searched), len(plan.groups))
        for limit in limits.lines():
            logger.warning("export: %s", limit)
        placement, graphs = _place(config, plan, resources)
        logger.info("%s", graphs.line())
        identity = _identity(config, ref) | ({} if run_id is None else {"run_id": run_id})
        with lease(directory) as held:
            state = RunState.start(directory, config, mode, identity, held)
            with metrics_of(directory, state.record.run_id), tracked(directory, state.record):
                solution = _run_stages(state, config, ref, plan, placement, graphs.nbytes)
    return SearchResult(solution=solution, quarantined=state.record.quarantined)


def _run_stages(
    state: RunState,
    config: ScanConfig,
    ref: ModelRef,
    plan: Plan,
    placement: Placement,
    graph_bytes: int | None,
) -> Solution:
    """Every stage that is not up to date, in order."""
    directory = state.directory
    menu = [format_.to_json() for format_ in plan.formats]
    marks = stage_fingerprints(config, **state.record.fingerprints, menu=menu)
    _make_samples(state, config, ref, marks["shards"], plan.limits)
    stages.write_plan(state, plan, marks["plan"], ref.weights_folder)
    state.release_quarantine()
    is_scored = stages.is_scored(state, plan, marks["score"])
    is_fitted = config.keep_rounded or not is_scored  # needed afterwards, or for the scores
    if not (is_scored and calibration_stage.is_calibrated(state, plan, has_rounding=is_fitted)):
        spec = _scoring_spec(config, ref, plan, graph_bytes)
        placement = placement.at_most(state.num_shards)
        logger.info("%d worker(s) on %s", placement.num_workers, placement.device)
        with WorkerPool(spec, placement, directory.append_event, config.grace_s) as pool:
            mark = marks["calibrate"]
            calibration = calibration_stage.calibrate(state, pool, plan, mark)
            calibration = calibration_stage.search_scales(state, pool, plan, calibration, mark)
            if is_fitted:
                calibration = fit(state, pool, plan, calibration, mark)
            if not is_scored:
                stages.score(state, pool, plan, calibration, marks["score"])
        directory.append_event("workers_stopped")
    if not config.keep_rounded:
        drop_rounding(state)
    stages.aggregate(state, config, marks["aggregate"])
    solution = solve_run(directory, solve_options(config), folder="")
    directory.append_event("run_done", quarantined=len(state.record.quarantined))
    return solution


def _make_samples(
    state: RunState,
    config: ScanConfig,
    ref: ModelRef,
    fingerprint: str,
    limits: SampleLimits | None,
) -> None:
    """The run's samples, where they are not there; nothing is written before they are read."""
    chats = fingerprint_chats(ref)
    if samples_stage.has_samples(state, fingerprint):
        samples_stage.require_same_chats(state, chats)
        return
    tokenizer = TokenizerRef.of(ref, f"{state.record.fingerprints['model']}-{chats}")
    with tempfile.TemporaryDirectory(prefix="autoquant-") as folder:
        scratch = RunDirectory(folder)
        scratch.marks[SAMPLES] = fingerprint
        facts = samples_stage.read_samples(
            config,
            tokenizer,
            scratch,
            limits=limits,
            hold_out=samples_stage.hold_out_of(state, config, fingerprint),
        )
        if config.coverage == "full" and not facts.get("num_samples_with_images"):
            raise DataError(
                f"`coverage` full searches the vision tower, but {data_name(config.data)} "
                "holds no images; give data with images, or leave it out"
            )
        if "num_loss_tokens" in facts:
            facts["chat_fingerprint"] = chats
        state.begin()
        samples_stage.keep_samples(state, scratch, facts, fingerprint)


def _resolve(config: ScanConfig, resources: Mapping[str, float]) -> ScanConfig:
    """Replace ``auto`` in the fields that can change numbers."""
    device = resolve_device(config, resources)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return config.model_copy(update={"device": device, "dtype": dtype})


def _resolve_placement(
    config: ScanConfig, ref: ModelRef, plan: Plan, resumed: RunRecord | None
) -> ScanConfig:
    """Replace ``auto`` by what the device has room for, or by what the resumed run took."""
    if config.placement != "auto":
        return config
    earlier = None if resumed is None else (resumed.config or {}).get("placement")
    if earlier in ("resident", "offload", "split"):
        return config.model_copy(update={"placement": earlier})
    placement, reason = choose_placement(
        footprint(plan, config),
        device_bytes=device_bytes(config, config.device),
        num_gpus=gpus_per_worker(config, config.device),
        can_offload=ref.gguf_file is None and bool(plan.layer_weights),
    )
    logger.info("placement: %s -> %s", reason, placement)
    return config.model_copy(update={"placement": placement})


def _place(
    config: ScanConfig, plan: Plan, resources: Mapping[str, float]
) -> tuple[Placement, KeptGraphs]:
    """Size the pool, and say what each worker keeps of the layers' graphs.

    What ``auto`` keeps never costs a worker; what the user asks for may.
    """
    memory = footprint(plan, config)
    graphs = kept_graphs(plan, config, memory)
    is_auto = config.keep_graphs == "auto"
    needed = memory.worker_bytes(config.placement)
    asked = 0 if is_auto else graphs.counted_bytes
    placement = place_workers(config, resources, device=config.device, worker_bytes=needed + asked)
    if is_auto and config.device == "cpu":
        graphs = graphs.within(spare_bytes(config, placement))
        placement = replace(placement, worker_bytes=needed + graphs.counted_bytes)
    return placement, graphs


def _resolve_difference_dtype(
    config: ScanConfig, plan: Plan, resumed: RunRecord | None
) -> ScanConfig:
    """Replace ``auto`` and ``int8``, once for all workers: by what is fast on all nodes, or by what
    the resumed run took."""
    asked, has_integers = config.difference_dtype, has_integer_pair(plan.formats)
    if multiplies_integers(asked) and (config.dtype == "bfloat16" or not has_integers):
        reason = "no format has integers for weight and input, with a scale per channel and token"
        if has_integers:
            reason = "it needs a float32 model; `dtype` is bfloat16"
        logger.warning("`difference_dtype` %s multiplies no integers: %s", asked, reason)
    if asked not in ("auto", "int8"):
        return config
    earlier = None if resumed is None else (resumed.config or {}).get("difference_dtype")
    if asked == "int8" and not multiplies_integers(earlier):
        earlier = None
    chosen = earlier or difference_dtype(config, has_integers=has_integers)
    logger.info("differences: products in %s", chosen.replace("+", " and "))
    return config.model_copy(update={"difference_dtype": chosen})


def _identity(config: ScanConfig, ref: ModelRef) -> dict[str, Any]:
    model, data = fingerprint_model(ref), fingerprint_data(config.data)
    return {
        "model": {"name": ref.name, "fingerprint": model},
        "dataset": {
            "name": data_name(config.data),
            "max_samples": config.samples,
            "seq_len": config.seq_len,
            "source_fingerprint": data,
        },
        "fingerprints": {"model": model, "data": data},
    }


def _scoring_spec(
    config: ScanConfig, ref: ModelRef, plan: Plan, graph_bytes: int | None
) -> ScoringSpec:
    return ScoringSpec(
        model=ref,
        dtype=config.dtype,
        device=config.device,
        num_threads=config.cpus_per_worker,
        modules=scored_modules(plan),
        formats=plan.formats,
        step_tokens=config.step_tokens,
        labels=config.labels,
        label_draws=config.label_draws,
        seed=config.seed,
        row_share=config.sample_rows,
        difference_dtype=config.difference_dtype,
        estimator=config.estimator,
        weight_cache_bytes=(
            None if config.weight_cache_gib == "auto" else round(config.weight_cache_gib * GIB)
        ),
        activation_bytes=round(config.activation_cache_gib * GIB),
        graph_bytes=graph_bytes,
        work_bytes=footprint(plan, config).work_bytes,
        placement=config.placement,
        min_expert_tokens=config.min_expert_tokens,
    )
