"""An allocation -> the manifests that people and ``mtq.quantize`` read.

Needs neither torch nor the model: everything stands in the run directory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from autoquant_ray.algorithms import by_sets, of_plan, on_cpu
from autoquant_ray.allocation import Allocation
from autoquant_ray.budget import BITS_PER_BYTE, Problem, SolveOptions
from autoquant_ray.expert_entries import ApartExperts
from autoquant_ray.formats import NONE, Format, attributes_from_json, attributes_to_json
from autoquant_ray.group_choices import ACTIVE_MOE, GroupChoices
from autoquant_ray.kv_budget import cache_summary
from autoquant_ray.kv_formats import KV_BYTES, is_described
from autoquant_ray.latency import LATENCY
from autoquant_ray.number_formats import is_scaled_by_block, is_static_nvfp4
from autoquant_ray.smoothed_formats import module_algorithm
from autoquant_ray.store import SCHEMA_VERSION
from autoquant_ray.stored_size import format_bits

Scores = Mapping[tuple[str, str], float]


def chosen_formats(problem: Problem, allocation: Allocation) -> dict[str, str]:
    """Format of every group, unsearched ones included, in the model's order."""
    return {name: allocation.formats.get(name, NONE) for name in problem.groups}


def allocation_key(formats: Mapping[str, str]) -> str:
    """Digest of searched group -> format: equal allocations have equal keys."""
    text = json.dumps(sorted(formats.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def average_bits(
    groups: Sequence[GroupChoices],
    formats: Mapping[str, str],
    resource: str = "storage",
    bits_per_unit: float = BITS_PER_BYTE,
) -> float:
    """Average bits per weight of groups under the given formats, by one of the costs."""
    cost = math.fsum(group.cost(formats[group.name], resource) for group in groups)
    return cost * bits_per_unit / float(sum(group.weights(resource) for group in groups))


def predicted_loss(scores: Mapping[tuple[str, str], float], formats: Mapping[str, str]) -> float:
    """Summed scores of the formats; 16 bits lose nothing.

    Args:
        scores: (group, format) -> nats per token.
        formats: Group -> format; groups without a score may be there in 16 bits.
    """
    return math.fsum(scores[group, name] for group, name in formats.items() if name != NONE)


def model_bytes(problem: Problem, formats: Mapping[str, str]) -> float:
    """Bytes of the whole model's weights; groups without a format stay in 16 bits."""
    return problem.other_bytes + math.fsum(
        group.cost(formats.get(group.name, NONE), "model") for group in problem.groups.values()
    )


def solution_summary(
    problem: Problem, allocation: Allocation, scores_are_nats: bool
) -> dict[str, Any]:
    """The ``solution`` object of ``manifest.json``.

    ``effective_bits`` averages stored bits over the searched groups, ``effective_bits_all`` over
    all quantizable ones; ``weight_bytes`` is the whole model's weights. ``predicted_kl_nats`` is
    null where the scores have no unit (an imported ModelOpt manifest). With routed experts it has
    ``active_moe_effective_bits``; with caches to choose ``kv_bytes_per_token``; with a card,
    ``latency``
    (:meth:`~autoquant_ray.latency.StepTime.prediction`).
    """
    formats = chosen_formats(problem, allocation)
    everything = list(problem.groups.values())
    more: dict[str, Any] = {}
    if problem.has_active_moe:
        more["active_moe_effective_bits"] = average_bits(everything, formats, ACTIVE_MOE, 16)
    if problem.step is not None:
        more[LATENCY] = problem.step.prediction(everything, formats)
    return {
        "effective_bits": average_bits(problem.searched, formats),
        "effective_bits_all": average_bits(everything, formats),
        "modelopt_effective_bits": average_bits(everything, formats, "modelopt", 16),
        "weight_bytes": model_bytes(problem, formats),
        "score": allocation.score,
        "predicted_kl_nats": allocation.score if scores_are_nats else None,
        "is_satisfied": allocation.is_satisfied,
        "optimality_gap": allocation.optimality_gap,
        **cache_summary(problem.caches, formats),
    } | more


def manifest_rows(
    problem: Problem, formats: Mapping[str, str], scores: Scores, summary: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of ``manifest.parquet``: one per module. ``score`` is that of the module's group."""
    known = {
        entry["name"]: Format.from_json(entry)
        for entry in summary["formats"]
        if entry.get("weight")
    }
    rows = []
    for group in problem.groups.values():
        chosen = formats[group.name]
        for module in group.module_names:
            facts = summary["modules"][module]
            shapes = [tuple(shape) for shape in facts["shapes"]]
            weights = sum(math.prod(shape) for shape in shapes)
            row = group.rows[chosen]
            bits = float(weights) * row["weight_bits"]
            if chosen in known:
                own, linear = known[chosen], is_linear(facts)
                bits = float(sum(format_bits(own, s, is_linear=linear) for s in shapes))
            rows.append(
                {
                    "module": module,
                    "group": group.name,
                    "format": chosen,
                    "weight_bits": bits / weights if weights else row["weight_bits"],
                    "weight_bytes": bits / BITS_PER_BYTE,
                    "score": 0.0 if chosen == NONE else scores[group.name, chosen],
                }
            )
    return rows


def quantization_config(
    problem: Problem, formats: Mapping[str, str], summary: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The configuration that ``mtq.quantize`` takes, in JSON-safe form.

    JSON has no integer keys, so block axes are strings here;
    :func:`load_quantization_config` restores them. ``algorithm`` is that of
    :func:`~autoquant_ray.algorithms.of_plan`. None for an imported manifest, which does not name
    all modules of a fused group.
    """
    known = {entry["name"]: entry for entry in summary["formats"] if is_described(entry)}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    algorithms: dict[str, Any] = {}
    apart = ApartExperts()
    for group in problem.groups.values():
        chosen = formats[group.name]
        if chosen != NONE and chosen not in known:
            return None
        format_ = None if chosen == NONE else Format.from_json(known[chosen])
        for module in group.module_names:
            facts = summary["modules"].get(module, {"prefixes": ()})
            if "expert" in facts:
                apart.add(module, facts, format_)
                continue
            if format_ is None:
                continue
            own = cache_entries(module, format_) if format_.kv is not None else []
            for prefix in facts["prefixes"]:
                own += quantizer_entries(f"{module}.{prefix}", format_)
            algorithm = module_algorithm(format_, is_linear=is_linear(facts))
            algorithms |= {entry["quantizer_name"]: algorithm for entry in own}
            entries.extend(own)
    entries.extend(apart.entries())
    return {
        "quant_cfg": [attributes_to_json(entry) for entry in entries],
        "algorithm": of_plan(algorithms | apart.algorithms()),
    }


def is_linear(facts: Mapping[str, Any]) -> bool:
    """Whether a module of the plan's summary is a linear, not experts or an attention."""
    return list(facts["prefixes"]) == [""]


def quantizer_entries(start: str, format_: Format) -> list[dict[str, Any]]:
    """ModelOpt's entries for one module, with Python types.

    Args:
        start: What stands before ``weight_quantizer`` in the quantizers' names.
        format_: The module's format.
    """
    entries = []
    for part, attributes in (("weight", format_.weight), ("input", format_.input)):
        if attributes is not None:
            entry = {"quantizer_name": f"{start}{part}_quantizer", "enable": True}
            entries.append(entry | {"cfg": attributes})
    return entries


def cache_entries(module: str, format_: Format) -> list[dict[str, Any]]:
    """ModelOpt's entries for the keys and values of one attention, with Python types."""
    return [
        {"quantizer_name": f"{module}.{part}_bmm_quantizer", "enable": True, "cfg": format_.kv}
        for part in "kv"
    ]


def load_quantization_config(
    manifest: Mapping[str, Any], *, device: Literal["auto", "cpu", "cuda"] = "auto"
) -> dict[str, Any]:
    """Give a manifest's ``quantization_config`` the Python types that ``mtq.quantize`` checks.

    ModelOpt runs NVFP4 and the MX formats by CUDA kernels only. For a model on CPU their
    quantizers name the ``backend`` that this package registers with ModelOpt
    (:mod:`autoquant_ray.block_formats`); on CUDA such a quantizer still runs ModelOpt's kernels.
    Where layers are calibrated by different algorithms, the mode that this package registers with
    ModelOpt (:mod:`autoquant_ray.calibration_mode`) runs ModelOpt's own, one after another.

    Args:
        manifest: Content of ``manifest.json``.
        device: Where the model is. ``cuda`` never names the backend, so that what is saved
            needs ModelOpt alone. ``auto``: ``cpu`` where this machine has no CUDA device.

    Returns:
        ``{"quant_cfg": [...], "algorithm": ...}`` with integer block axes and tuples.

    Raises:
        ValueError: The manifest has none, because it was imported.
    """
    config = manifest["quantization_config"]
    if config is None:
        raise ValueError("this manifest was imported and does not name all quantized modules")
    entries = [
        entry | ({"cfg": attributes_from_json(entry["cfg"])} if "cfg" in entry else {})
        for entry in config["quant_cfg"]
    ]
    restored = {"quant_cfg": entries, "algorithm": config["algorithm"]}
    quantizers = [entry.get("cfg") or {} for entry in entries]
    by_block = any(map(is_scaled_by_block, quantizers)) and _is_on_cpu(device)
    if by_block and any(map(is_static_nvfp4, quantizers)):
        restored["algorithm"] = on_cpu(config["algorithm"])
    if by_sets(restored["algorithm"]):
        import autoquant_ray.calibration_mode  # noqa: F401
    if not by_block:
        return restored
    from autoquant_ray.block_formats import for_cpu

    return for_cpu(restored)


def _is_on_cpu(device: str) -> bool:
    import torch

    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def build_manifest(
    run: Mapping[str, Any],
    options: SolveOptions,
    solution: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    stability: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Content of ``manifest.json``.

    Args:
        run: Content of ``run.json``. The manifest's ``dataset`` also holds its ``used`` (shards,
            samples and tokens behind the scores) and ``stopping``, null where it has none.
        options: Budget and constraints that were solved for.
        solution: From :func:`solution_summary`.
        config: From :func:`quantization_config`.
        stability: What resampling says of the allocation; None where nothing was resampled.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run["run_id"],
        "model": run["model"],
        "dataset": run["dataset"] | {key: run.get(key) for key in ("used", "stopping")},
        "budget": {
            "bits": options.bits,
            "bytes": options.bytes,
            "bits_over": options.bits_over,
            "cost": options.cost,
            "max_formats": options.max_formats,
            "pins": dict(options.pins),
            "allow": {pattern: list(formats) for pattern, formats in options.allow.items()},
            "domains": dict(options.domains),
            "worst_domain": options.worst_domain,
            "latency": None if options.latency is None else options.latency.to_json(),
            "engine": options.engine,
            "gpu": options.gpu,
            "expert_groups": options.expert_groups,
            **({} if (limit := options.kv_bytes_per_token) is None else {KV_BYTES: limit}),
        },
        "solution": dict(solution),
        "quantization_config": config,
        "stability": stability,
    }


def is_chosen_by_measurement(manifest: Mapping[str, Any]) -> bool:
    """Whether measured losses chose a solution, so that it is not what the scores would choose."""
    return not {"chosen_on", "refinement"}.isdisjoint(manifest)
