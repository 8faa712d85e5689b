"""Run without our package: what mlx-lm makes of a recipe.

    python with_mlx.py CASE

Converts the model as ``docs/engines.md`` says, reads the written folder again, and prints a line of
JSON: versions, each layer's kind, how often its weights lose what the plan's lose, and how far the
written model's log-probabilities of the text are from those of its dequantized weights.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from answer import as_answer, layers_of, model_of, text_of, weight_losses
from mlx_lm.models.switch_layers import SwitchLinear

_EXPERT = re.compile(r"^(.*)\.experts\.(\d+)\.(.*)$")


def convert(case: Path, out: str) -> list[str]:
    """Quantize as the recipe says; returns the names in it that mlx-lm never asked for."""
    layers, asked = json.loads((case / "recipe").read_text()), set()
    groups = [entry["group_size"] for entry in layers.values() if isinstance(entry, dict)]

    def choose(path: str, module: Any) -> Any:
        asked.add(path)
        return layers.get(path, False)

    mlx_lm.convert(
        model_of(case), out, quantize=True, q_group_size=min(groups), quant_predicate=choose
    )
    entries = {name: entry for name, entry in layers.items() if isinstance(entry, dict)}
    return [name for name in entries if name not in asked]


def place_of(layer: str, modules: dict[str, Any]) -> tuple[str, int | None]:
    """The module that holds a layer, and the number of an expert where it holds several."""
    if expert := _EXPERT.match(layer):
        return f"{expert[1]}.switch_mlp.{expert[3]}", int(expert[2])
    return layer if layer in modules else "model.embed_tokens", None


def kind_of(module: Any) -> str:
    """Mode, bits and group of a layer as it was written."""
    if not hasattr(module, "bits"):
        return "16 bits"
    return f"{module.mode} {module.bits} g{module.group_size}"


def plain_weight(module: Any) -> Any:
    """``(O, I)`` in float32, or ``(E, O, I)``: MLX's own dequantization."""
    if not hasattr(module, "bits"):
        return module.weight.astype(mx.float32)
    arguments = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    weight = mx.dequantize(
        module.weight, module.scales, getattr(module, "biases", None), **arguments
    )
    return weight.astype(mx.float32)


def plain_layer(module: Any) -> Any:
    """The layer with its dequantized weight."""
    weight = plain_weight(module)
    if weight.ndim == 3:
        experts, rows, columns = weight.shape
        switch = SwitchLinear(columns, rows, experts, bias=False)
        switch.weight = weight
        return switch
    kind = nn.Embedding if "Embedding" in type(module).__name__ else nn.Linear
    rows, columns = weight.shape
    layer = kind(rows, columns) if kind is nn.Embedding else nn.Linear(columns, rows, bias=False)
    layer.weight = weight
    return layer


def log_probs(model: Any, ids_WS: Any) -> Any:
    """Of each window's next tokens, ``(W, S - 1)``."""
    logits = [model(mx.array(row)[None])[0].astype(mx.float32) for row in ids_WS]
    return text_of(np.stack([np.array(row) for row in logits]), ids_WS)


def main(case: Path) -> None:
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as folder:
        missing = convert(case, f"{folder}/out")
        model, _ = mlx_lm.load(f"{folder}/out")
        model.set_dtype(mx.float32, lambda type_: type_ == mx.bfloat16)
        modules = dict(model.named_modules())
        ids_WS = np.load(case / "ids.npy")
        served = log_probs(model, ids_WS)
        layers = layers_of(case)
        places = {name: place_of(name, modules) for name in layers}
        kinds = {name: kind_of(modules[module]) for name, (module, _) in places.items()}
        stored = {module: np.array(plain_weight(modules[module])) for module, _ in places.values()}
        weights = {
            name: stored[module] if expert is None else stored[module][expert]
            for name, (module, expert) in places.items()
        }
        plain = [(name, plain_layer(m)) for name, m in modules.items() if hasattr(m, "bits")]
        model.update_modules(mlx_tree(plain))
        expected = log_probs(model, ids_WS)
    as_answer(
        versions={name: version(name) for name in ("mlx-lm", "mlx")},
        kinds=kinds,
        missing=missing,
        weight_losses=weight_losses(case, weights),
        runner_difference=float(np.abs(served - expected).mean()),
    )


def mlx_tree(modules: list[tuple[str, Any]]) -> Any:
    from mlx.utils import tree_unflatten

    return tree_unflatten(modules)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
