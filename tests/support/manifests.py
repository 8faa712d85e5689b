"""What ModelOpt is asked for in the tests of imported manifests."""

from __future__ import annotations

from typing import Any

PRESETS = ("INT4_AWQ_CFG", "FP8_DEFAULT_CFG")
BITS = 7.0
UNSEARCHED = "lm_head"


def manifest_of(state: dict[str, Any], bits: float) -> dict[str, Any]:
    """The JSON manifest that tooling writes from what ``mtq.auto_quantize`` returns.

    Args:
        state: Its search state.
        bits: What it was asked for.
    """
    best = state["best"]
    return {
        "scheme": {
            "name": "autoquant_int4_fp8",
            "auto_quantize_bits": bits,
            "quant_formats": list(PRESETS),
        },
        "model": {"id": "example/small-llama"},
        "dataset": {"name": "random-tokens", "num_samples": 3, "max_sample_length": 24},
        "autoquant_state": {
            "constraints": dict(best["constraints"]),
            "score": best["score"],
            "is_satisfied": best["is_satisfied"],
        },
        "layer_sensitivity": {
            name: {
                "formats": [str(recipe) for recipe in stats["formats"]],
                "scores": list(stats["scores"]),
                "costs": list(stats["costs"]),
            }
            for name, stats in state["candidate_stats"].items()
        },
    }
