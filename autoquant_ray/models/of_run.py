"""The model of a run, found again and checked."""

from __future__ import annotations

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import StoreError
from autoquant_ray.models.find import ModelRef, find_model, fingerprint_model
from autoquant_ray.models.stored_tensors import require_weights
from autoquant_ray.runs.state import RunState


def require_model(state: RunState, scan: ScanConfig) -> ModelRef:
    """The run's model, which must be as it was.

    Raises:
        StoreError: It changed.
    """
    ref = find_model(scan.model, trust_remote_code=scan.trust_remote_code)
    require_weights(ref)
    if fingerprint_model(ref) != state.record.fingerprints["model"]:
        raise StoreError(
            f"model {scan.model} changed since {state.directory.uri} was made; scan it again"
        )
    return ref
