"""quant_cfg."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from autoquant_ray.allocate.problem import Problem
from autoquant_ray.formats.algorithms import FACTORS, by_sets, of_allocation, sharing
from autoquant_ray.formats.format import NONE, Format, attributes_to_json
from autoquant_ray.formats.kv_cache import is_described
from autoquant_ray.formats.smoothed import module_algorithm
from autoquant_ray.plan.fold import Fold, folds_of_summary, folds_to_json
from autoquant_ray.serving.shared_scales import fused_layers, needs_sharing


def quantization_config(
    problem: Problem, formats: Mapping[str, str], summary: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The configuration that ``mtq.quantize`` takes, in JSON-safe form.

    JSON has no integer keys, so block axes are strings here; :func:`load_quantization_config`
    restores them. ``algorithm`` is that of
    :func:`~autoquant_ray.formats.algorithms.of_allocation`. None for an imported manifest, which
    does not name all modules of a fused group.
    """
    menu = {entry["name"]: entry for entry in summary["formats"] if is_described(entry)}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    algorithms: dict[str, Any] = {}
    fused = fused_layers(n for n, facts in summary["modules"].items() if is_linear(facts))
    shared: list[str] = []
    apart = ApartExperts()
    for group in problem.groups.values():
        chosen = formats[group.name]
        if chosen != NONE and chosen not in menu:
            return None
        format_ = None if chosen == NONE else Format.from_json(menu[chosen])
        for module in group.module_names:
            facts = summary["modules"].get(module, {"prefixes": ()})
            if "expert" in facts:
                apart.add(module, facts, format_)
                continue
            if format_ is None:
                continue
            module_entries = cache_entries(module, format_) if format_.kv is not None else []
            for prefix in facts["prefixes"]:
                module_entries += quantizer_entries(f"{module}.{prefix}", format_)
            algorithm = module_algorithm(format_, is_linear=is_linear(facts))
            algorithms |= {entry["quantizer_name"]: algorithm for entry in module_entries}
            if needs_sharing(format_, fused.get(module, ())):
                shared.append(f"{module}.weight_quantizer")
            entries.extend(module_entries)
    entries.extend(apart.entries())
    whole = sharing(of_allocation(algorithms | apart.algorithms()), shared)
    _add_folds(whole, folds_of_summary(summary))
    return {
        "quant_cfg": [attributes_to_json(entry) for entry in entries],
        "algorithm": whole,
    }


def _add_folds(algorithm: str | dict[str, Any], folds: Mapping[str, Fold]) -> None:
    """Say where factors go."""
    sets = algorithm["sets"] if isinstance(algorithm, dict) and by_sets(algorithm) else ()
    for entry in sets:
        if entry["algorithm"]["method"] in FACTORS:
            linears = (name.removesuffix(".weight_quantizer") for name in entry["quantizers"])
            entry["algorithm"]["folds"] = folds_to_json(folds[linear] for linear in linears)


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
        {"quantizer_name": f"{module}.{part}_bmm_quantizer", "enable": True, "cfg": attributes}
        for part, attributes in zip("kv", format_.kv_parts, strict=True)
    ]


class ApartExperts:
    """Collects single experts, and says what ``mtq.quantize`` takes for them."""

    def __init__(self) -> None:
        self._prefixes: dict[str, tuple[str, ...]] = {}
        self._formats: dict[str, dict[int, Format | None]] = {}

    def add(self, name: str, facts: Mapping[str, Any], format_: Format | None) -> None:
        """Add an expert.

        Args:
            name: Its name in the plan.
            facts: Its entry in the plan's summary.
            format_: Its format; None in 16 bits.
        """
        owner = name.rpartition(".")[0]
        self._prefixes[owner] = tuple(facts["prefixes"])
        self._formats.setdefault(owner, {})[facts["expert"]] = format_

    def entries(self) -> list[dict[str, Any]]:
        """Entries of ``quant_cfg``; a later one replaces an earlier one."""
        return [
            entry
            for owner, formats in self._formats.items()
            for prefix in self._prefixes[owner]
            for entry in _entries(f"{owner}.{prefix}weight_quantizer", formats)
        ]

    def algorithms(self) -> dict[str, Any]:
        """Each quantizer's calibration: name -> ModelOpt's algorithm, None for ``max``."""
        return {
            f"{owner}.{prefix}weight_quantizers.{number}": module_algorithm(
                format_, is_linear=False
            )
            for owner, formats in self._formats.items()
            for prefix in self._prefixes[owner]
            for number, format_ in formats.items()
            if format_ is not None
        }


def _entries(quantizer: str, formats: Mapping[int, Format | None]) -> list[dict[str, Any]]:
    names = {number: None if f is None else f.name for number, f in formats.items()}
    common = Counter(names.values()).most_common(1)[0][0]
    first = next(number for number, name in names.items() if name == common)
    entries = [] if common is None else [_entry(quantizer, formats[first])]
    return entries + [
        _entry(f"{quantizer}s.{number}", format_)
        for number, format_ in formats.items()
        if names[number] != common
    ]


def _entry(quantizer: str, format_: Format | None) -> dict[str, Any]:
    if format_ is None:
        return {"quantizer_name": quantizer, "enable": False}
    return {"quantizer_name": quantizer, "enable": True, "cfg": format_.weight}
