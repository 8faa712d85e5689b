"""Run without our package: what AutoRound makes of a recipe.

    python with_auto_round.py CASE

Rounds to the nearest (no iterations), saves, and reads what was saved. Prints a line of JSON:
versions, each layer's kind by its stored tensors, the layers whose entries in the recipe the saved
config does not have (experts of a layer have one entry), and how often the weights lose what the
plan's lose.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from answer import as_answer, layers_of, model_of, weight_losses
from safetensors import safe_open


def unpacked(words: Any, bits: int) -> Any:
    """Integers of packed words: ``bits`` at a time along the first axis, from the lowest bit."""
    stream = np.unpackbits(words.astype("<u4").T.copy().view(np.uint8), axis=1, bitorder="little")
    numbers = stream.reshape(len(stream), -1, bits)
    return (numbers * 2 ** np.arange(bits)).sum(-1).T


def weight_of(tensors: dict[str, Any], name: str, bits: int) -> Any:
    """``(O, I)`` of a layer in the layout of GPTQ, whose zeros are in the middle."""
    scales_GO = tensors[f"{name}.scales"].astype(np.float32)
    numbers_IO = unpacked(tensors[f"{name}.qweight"], bits) - 2.0 ** (bits - 1)
    group = len(numbers_IO) // len(scales_GO)
    return (numbers_IO * scales_GO.repeat(group, 0)).T


def main(case: Path) -> None:
    from auto_round import AutoRound

    recipe = json.loads((case / "recipe").read_text())
    with tempfile.TemporaryDirectory() as folder:
        rounding = AutoRound(
            model_of(case),
            layer_config=recipe,
            iters=0,
            disable_opt_rtn=True,
            disable_model_free=True,  # which leaves int8 and int3 in 16 bits
            enable_torch_compile=False,
            device_map="cpu",
        )
        rounding.quantize_and_save(folder, format="auto_round")
        (config_file,) = Path(folder).rglob("config.json")
        config = json.loads(config_file.read_text())["quantization_config"]
        tensors = {}
        for file in config_file.parent.glob("*.safetensors"):
            with safe_open(file, "np") as opened:
                packed = [name for name in opened.keys() if name.endswith(("qweight", "scales"))]  # noqa: SIM118
                tensors |= {name: opened.get_tensor(name) for name in packed}
    kinds, weights = {}, {}
    for name, layer in layers_of(case).items():
        if f"{name}.qweight" not in tensors:
            kinds[name] = "16 bits"
            continue
        rows = len(tensors[f"{name}.qweight"])
        bits = rows * 32 // layer["columns"]
        num_groups = len(tensors[f"{name}.scales"])
        group = -1 if num_groups == 1 else layer["columns"] // num_groups
        kinds[name] = f"int{bits} g{group}"
        weights[name] = weight_of(tensors, name, bits)
    entries = config["extra_config"]
    asked = {
        name: recipe.get(name) or recipe[layer["expert"]["module"]]
        for name, layer in layers_of(case).items()
    }
    missing = [
        name
        for name, entry in asked.items()
        if entries.get(name, {}).get("bits", config["bits"]) != entry["bits"] and name != "lm_head"
    ]
    as_answer(
        versions={"auto-round": version("auto-round")},
        kinds=kinds,
        missing=missing,
        weight_losses=weight_losses(case, weights),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
