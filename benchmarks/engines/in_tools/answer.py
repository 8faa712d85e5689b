"""What the scripts beside this have in common; they run in a tool's environment, without ours."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def as_answer(**content: Any) -> None:
    """Print the answer as the last line."""
    sys.stdout.write(f"\n{json.dumps(content)}\n")


def layers_of(case: Path) -> dict[str, dict[str, Any]]:
    """Module -> its planned format and its shape."""
    layers: dict[str, dict[str, Any]] = json.loads((case / "case.json").read_text())["layers"]
    return layers


def inputs_and_error(case: Path) -> tuple[dict[str, Any], Callable[[str, Any], float]]:
    """What layers are given, ``(T, I)``, and the relative error of what they make of it."""
    expected = load_file(case / "outputs.safetensors")

    def error(name: str, actual_TO: Any) -> float:
        difference = actual_TO - expected[name]
        return float((difference**2).sum() ** 0.5 / (expected[name] ** 2).sum() ** 0.5)

    return load_file(case / "inputs.safetensors"), error


def digest_of(weight_OI: Any) -> str:
    """Of float32 rows in any order: a converter permutes those of queries and keys."""
    rows = sorted(row.tobytes() for row in weight_OI + np.float32(0))  # -0 becomes 0
    return hashlib.sha256(b"".join(rows)).hexdigest()


def plain_weights(case: Path) -> dict[str, Any]:
    """The model's own weights of its layers, ``(O, I)`` in float32."""
    weights: dict[str, Any] = load_file(f"{model_of(case)}.safetensors")
    return weights


def model_of(case: Path) -> str:
    """Folder of the model in 16 bits."""
    return str(json.loads((case / "case.json").read_text())["model"])


def weight_losses(case: Path, weights: dict[str, Any]) -> dict[str, float]:
    """Squared error of each quantized layer's weights in the tool, over that of the plan's."""
    original = plain_weights(case)
    errors = {name: float(((weights[name] - original[name]) ** 2).sum()) for name in weights}
    return losses_of(case, errors)


def losses_of(case: Path, errors: dict[str, float]) -> dict[str, float]:
    """Squared errors over those of the plan, of the layers that it quantizes."""
    layers = layers_of(case)
    planned = {name: layers[name].get("squared_error") for name in errors}
    return {name: error / planned[name] for name, error in errors.items() if planned[name]}


def text_of(logits_WSV: Any, ids_WS: Any) -> Any:
    """Log-probabilities of each window's next tokens, ``(W, S - 1)``, in nats."""
    logits = logits_WSV[:, :-1].astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    totals = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    return np.take_along_axis(logits, ids_WS[:, 1:, None], -1)[..., 0] - totals
