"""Which texts a test reads."""

from __future__ import annotations

from typing import Any

from autoquant_ray.data.texts import DataSpec


def spec_of(source: Any, **changes: Any) -> DataSpec:
    arguments: dict[str, Any] = {"source": str(source), "num_samples": 100, "seq_len": 8}
    return DataSpec(**arguments | changes)
