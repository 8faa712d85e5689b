"""A manifest from a real ``mtq.auto_quantize`` run, and the run that it becomes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from command_line import run
from manifests import BITS, PRESETS, UNSEARCHED
from modelopt_scores import next_token_loss, of_text


@pytest.fixture(scope="module")
def search_state(make_model: Any, make_samples: Any) -> dict[str, Any]:
    """What ``mtq.auto_quantize`` returns for a small llama at 7 bits, with the head disabled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            make_model("llama"),
            constraints={"effective_bits": BITS},
            quantization_formats=[getattr(mtq, preset) for preset in PRESETS],
            data_loader=[of_text(torch.tensor(make_samples([24, 24, 24])))],
            forward_step=next_token_loss,
            loss_func=lambda loss, _: loss,
            num_calib_steps=1,
            num_score_steps=1,
            disabled_layers=[f"*{UNSEARCHED}*"],
            verbose=False,
        )
    return dict(state)


@pytest.fixture
def manifest(search_state: dict[str, Any]) -> dict[str, Any]:
    """The JSON manifest that tooling writes from such a state."""
    best = search_state["best"]
    return {
        "scheme": {
            "name": "autoquant_int4_fp8",
            "auto_quantize_bits": BITS,
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
            for name, stats in search_state["candidate_stats"].items()
        },
    }


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a manifest; returns its path."""

    def write_json(manifest: Any) -> Path:
        path = tmp_path / "autoquant.json"
        path.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
        return path

    return write_json


@pytest.fixture
def imported(manifest: dict[str, Any], write: Any, tmp_path: Path) -> Path:
    """The run that the manifest becomes."""
    result = run("import", write(manifest), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    return tmp_path / "run"
