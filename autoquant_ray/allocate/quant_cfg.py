"""quant_cfg."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoquant_ray.allocate.expert_entries import ApartExperts
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.formats.algorithms import of_plan
from autoquant_ray.formats.format import NONE, Format, attributes_to_json
from autoquant_ray.formats.kv_cache import is_described
from autoquant_ray.formats.smoothed import module_algorithm


def quantization_config(
    problem: Problem, formats: Mapping[str, str], summary: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The configuration that ``mtq.quantize`` takes, in JSON-safe form.

    JSON has no integer keys, so block axes are strings here; :func:`load_quantization_config`
    restores them. ``algorithm`` is that of :func:`~autoquant_ray.formats.algorithms.of_plan`. None
    for an imported manifest, which does not name all modules of a fused group.
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
