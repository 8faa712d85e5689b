"""Run by a Python that has vLLM, without this package: how vLLM reads each layer of a checkpoint.

    python vllm_layers.py FOLDER CLASS < names.json

The names are those of vLLM's modules of a model class (``LlamaForCausalLM``), as a JSON object of
name -> ``linear``, ``head`` or ``experts``. Prints a JSON object: name -> the kinds of weights and
inputs, or what vLLM raises. No kernel is chosen, so no GPU is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models import llama

_KINDS = {"linear": LinearBase, "head": ParallelLMHead}
_DTYPE = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))


def choose_no_kernel() -> None:
    """Schemes choose their kernels when they are made; here none is there."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(schemes.__name__):
            continue
        for part in ("init_nvfp4_linear_kernel", "init_mxfp4_linear_kernel"):
            if hasattr(module, part):
                setattr(module, part, lambda *_, **__: None)
        if hasattr(module, "get_current_vllm_config"):
            module.get_current_vllm_config = lambda: _DTYPE


def read_config(folder: Path) -> Any:
    """vLLM's object for the ``quantization_config`` of a folder, as its own choice of class."""
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    method = content["quant_method"]
    for name in ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"):
        kind = get_quantization_config(name)
        if kind.override_quantization_method(content, None) is not None:
            method = name
    config = get_quantization_config(method).from_config(content)
    config.packed_modules_mapping = llama.LlamaForCausalLM.packed_modules_mapping
    return config


def kind_of(config: Any, kind: str, name: str) -> Any:
    """Weights and inputs of a layer; None where it is not quantized."""
    layer = _KINDS[kind].__new__(_KINDS[kind])
    torch.nn.Module.__init__(layer)
    try:
        method = config.get_quant_method(layer, name)
    except (ValueError, NotImplementedError) as error:
        return {"raises": str(error)}
    if type(method).__name__.startswith("Unquantized") or method is None:
        return None
    if hasattr(layer, "scheme"):
        return {"scheme": type(layer.scheme).__name__}
    keys = (method.wkey, method.akey)
    return {"weight": type(keys[0]).__name__, "input": keys[1] and type(keys[1]).__name__}


if __name__ == "__main__":
    choose_no_kernel()
    checkpoint = read_config(Path(sys.argv[1]))
    names = json.load(sys.stdin)
    kinds = {name: kind_of(checkpoint, kind, name) for name, kind in names.items()}
    sys.stdout.write(f"{json.dumps(kinds)}\n")
