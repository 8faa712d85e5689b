"""Layer-wise quantization search for large models, distributed on Ray.

Importing this package imports neither torch nor Ray; the names below load what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoquant_ray.version import VERSION as __version__

if TYPE_CHECKING:
    from autoquant_ray.allocate.load import latency_of
    from autoquant_ray.api import Run, search
    from autoquant_ray.calibrate.modelopt_config import load_quantization_config
    from autoquant_ray.config.scan import ScanConfig
    from autoquant_ray.scan import run_search
    from autoquant_ray.solve import solve_run

_LAZY = {
    "Run": "autoquant_ray.api",
    "search": "autoquant_ray.api",
    "ScanConfig": "autoquant_ray.config.scan",
    "latency_of": "autoquant_ray.allocate.load",
    "run_search": "autoquant_ray.scan",
    "solve_run": "autoquant_ray.solve",
    "load_quantization_config": "autoquant_ray.calibrate.modelopt_config",
}

__all__ = [
    "Run",
    "ScanConfig",
    "__version__",
    "latency_of",
    "load_quantization_config",
    "run_search",
    "search",
    "solve_run",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
