"""Small checkpoints that are quantized already: a plain one with its weights packed anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Pack = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
"""A weight -> its parts, by what stands for ``weight`` in their names."""


def repacked(
    plain: Path,
    folder: Path,
    pack: Pack,
    config: Mapping[str, Any] | None,
    *,
    only: str = "_proj.weight",
) -> Path:
    """Write a checkpoint again with some of its weights packed.

    Args:
        plain: It, in one file.
        folder: Where to.
        pack: Packs a weight.
        config: Its ``quantization_config``; None: it says nothing of it.
        only: End of the names of weights that are packed.
    """
    shutil.copytree(plain, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(only):
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": t.contiguous() for part, t in pack(tensor).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder if config is None else with_config(folder, quantization_config=config)


def with_config(folder: Path, **entries: Any) -> Path:
    """Add entries to a ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def block_fp8(rows: int, columns: int) -> Pack:
    """FP8 with a scale per block, as DeepSeek's files have it; the last blocks may be smaller."""

    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        grid = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                place = (
                    slice(i * rows, (i + 1) * rows),
                    slice(j * columns, (j + 1) * columns),
                )
                grid[i, j] = weight[place].abs().amax() / 448
                numbers[place] = (weight[place] / grid[i, j]).to(torch.float8_e4m3fn)
        return {"weight": numbers, "weight_scale_inv": grid}

    return pack


def tensor_fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """FP8 with a scale per tensor, as ModelOpt writes it."""
    scale = weight.abs().amax() / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale, "input_scale": torch.tensor(0.01)}


FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
MODELOPT_FP8 = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
