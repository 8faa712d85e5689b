"""Run by a Python that has vLLM, without this package: what vLLM's model makes of a checkpoint.

    python vllm_model.py FOLDER EXPERTS [mtp]

vLLM builds its own class of the model and loads the weights, by its own loader; only the kernels of
experts are not chosen, which need a GPU. With ``mtp`` it is the class of the model's head that
guesses tokens ahead. What experts have loaded is written to the file EXPERTS (safetensors, by the
names of vLLM's parameters). Prints a JSON object: ``kinds``, name of a module -> class of its
scheme or method, and ``missing``, the parameters that were not in the checkpoint.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts, unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors_moe,
    schemes,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm_layers import choose_no_kernel


class NoKernel:
    """Stands for a class of kernels, and for a kernel."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


def choose_no_kernel_of_linears() -> None:
    """Whatever this machine has, so that layers can be made that only GPUs compute."""
    made = re.compile(r"init_\w+_linear_kernel|select_linear_kernel|expose_input_quant_key")
    modules = [m for name, m in sys.modules.items() if name.startswith(schemes.__name__)]
    for module in [*modules, modelopt]:
        for name in list(vars(module)):
            if made.fullmatch(name):
                setattr(module, name, NoKernel)
            elif name == "choose_mp_linear_kernel":
                setattr(module, name, lambda *_, **__: NoKernel)


def choose_no_kernel_of_experts() -> None:
    """As on a GPU: Marlin for integers, whose class then checks the shapes; else none is there."""
    modules = [unquantized_fused_moe_method, modelopt]
    for entry in pkgutil.iter_modules(compressed_tensors_moe.__path__):
        with suppress(ModuleNotFoundError):  # some need packages for other GPUs
            modules.append(
                importlib.import_module(f"{compressed_tensors_moe.__name__}.{entry.name}")
            )
    for module in modules:
        for name in list(vars(module)):
            if name.startswith("select_") and name.endswith("_moe_backend"):
                kernel = WNA16MoEBackend.MARLIN if "wna16" in name else None
                setattr(module, name, lambda *_, kernel=kernel, **__: (kernel, None))


def load_model(folder: Path, *, is_head: bool) -> tuple[Any, set[str]]:
    """vLLM's model, and the names of the parameters that it has loaded."""
    guesses = {"method": "mtp", "num_speculative_tokens": 1}
    arguments = EngineArgs(
        model=str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=64,
        speculative_config=guesses if is_head else None,
    )
    config = arguments.create_engine_config()
    head = config.speculative_config.draft_model_config if is_head else None
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as place:
        init_distributed_environment(1, 0, f"file://{place}/meeting", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = initialize_model(config)
        if is_head:  # with what the class of the whole model has told the config of fused layers
            model = initialize_model(config, model_config=head)
        return model, model.load_weights(stored_tensors(folder))


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a folder by their names."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def main(folder: Path, experts: Path, *, is_head: bool) -> None:
    """Print and write what the model has."""
    choose_no_kernel()
    choose_no_kernel_of_experts()
    model, loaded = load_model(folder, is_head=is_head)
    kinds = {}
    tensors = {}
    for name, module in model.named_modules():
        if getattr(module, "quant_method", None) is not None:
            kinds[name] = type(getattr(module, "scheme", None) or module.quant_method).__name__
        if isinstance(module, RoutedExperts):
            parameters = module.named_parameters(recurse=False)
            tensors |= {f"{name}.{part}": parameter.contiguous() for part, parameter in parameters}
    save_file(tensors, experts)
    missing = [name for name, _ in model.named_parameters() if name not in loaded]
    sys.stdout.write(f"{json.dumps({'kinds': kinds, 'missing': missing})}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), is_head=sys.argv[3:] == ["mtp"])
