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
from manifests import BITS, PRESETS, UNSEARCHED, manifest_of
from modelopt_scores import next_token_loss, of_text


@pytest.fixture(scope="module")
def search(make_model: Any, make_samples: Any) -> Any:
    """``mtq.auto_quantize`` of a small llama with the head disabled, at some bits."""

    def searched(bits: float) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, state = mtq.auto_quantize(
                make_model("llama"),
                constraints={"effective_bits": bits},
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

    return searched


@pytest.fixture(scope="module")
def search_state(search: Any) -> dict[str, Any]:
    """What it returns at 7 bits."""
    state: dict[str, Any] = search(BITS)
    return state


@pytest.fixture
def manifest(search_state: dict[str, Any]) -> dict[str, Any]:
    """The JSON manifest that tooling writes from such a state."""
    return manifest_of(search_state, BITS)


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
