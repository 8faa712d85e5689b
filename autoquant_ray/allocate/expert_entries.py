"""ModelOpt's configuration for experts with formats of their own.

ModelOpt's wrapper holds the weight quantizers of fused experts in lists
(``gate_up_proj_weight_quantizers.3``), and matches a whole list by its name without the ``s`` and
the number (``conversion.py``, ``_normalize_fused_experts_quantizer_name``). Here a layer's
commonest format is set for the whole list, and the others after it one by one: ModelOpt compares
every entry with every quantizer of a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import module_algorithm


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
