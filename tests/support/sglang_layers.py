"""Run without this package: how SGLang's own classes read each layer of a checkpoint.

    python sglang_layers.py SGLANG FOLDER < names.json

``SGLANG`` is the folder of an unpacked wheel of sglang, whose dependencies need not be there: what
its file for ModelOpt's layouts imports of kernels and of modules is stood in for, and everything
that decides about formats is its own. The names are those of SGLang's modules, as a JSON object of
name -> ``linear`` or ``head``. Prints a JSON object: name -> class of its method, or None; and
``capability``, the least compute capability of the format. Where SGLang refuses the checkpoint, it
prints ``raises`` alone.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

SGLANG = Path(sys.argv[1])
LAYERS = "sglang.srt.layers"
MODELOPT = f"{LAYERS}.quantization.modelopt_quant"
NATIVE_FP8 = f"{LAYERS}.quantization.fp8"
COMPRESSED = f"{LAYERS}.quantization.compressed_tensors"
RUN = {
    MODELOPT,
    NATIVE_FP8,
    f"{COMPRESSED}.compressed_tensors",
    f"{COMPRESSED}.utils",
    f"{LAYERS}.quantization.base_config",
    f"{LAYERS}.quantization.utils",
    f"{LAYERS}.modelopt_utils",
}
METHODS = {
    "modelopt": (MODELOPT, "ModelOptFp8Config"),
    "modelopt_fp8": (MODELOPT, "ModelOptFp8Config"),
    "modelopt_fp4": (MODELOPT, "ModelOptFp4Config"),
    "modelopt_mixed": (MODELOPT, "ModelOptMixedPrecisionConfig"),
    "mxfp8": (NATIVE_FP8, "Fp8Config"),
    "compressed-tensors": (f"{COMPRESSED}.compressed_tensors", "CompressedTensorsConfig"),
}
"""As in ``sglang/srt/layers/quantization/__init__.py``."""

BASES = {
    "linear": ("linear", "LinearBase"),
    "head": ("vocab_parallel_embedding", "ParallelLMHead"),
}
"""Kind of a layer -> where its class is."""


EMPTY = {"__init__": lambda *_, **__: None, "get_min_capability": staticmethod(int)}
"""What classes have in place of their functions."""


class StandIn(types.ModuleType):
    """A module whose classes are empty, and whose functions do nothing; none asks for a GPU."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = type(name, (), EMPTY)
        elif name.startswith(("is_", "get_bool")) or name.endswith("_required"):
            value = MagicMock(return_value=False)
        else:
            value = MagicMock()
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds SGLang's modules: those of ``RUN`` in its files, stand-ins for all others."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """See the base class."""
        if name.partition(".")[0] != "sglang":
            return None
        if name in RUN:
            return importlib.util.spec_from_file_location(name, file_of(name))
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: Any) -> StandIn:
        """See the base class."""
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is to do."""


def file_of(name: str) -> Path:
    """The file of a module."""
    return SGLANG.joinpath(*name.split(".")).with_suffix(".py")


def functions_of(name: str, *wanted: str) -> dict[str, Any]:
    """Functions of a module whose file is not run, those of classes among them."""
    nodes = [n for n in ast.walk(ast.parse(file_of(name).read_text())) if is_named(n, wanted)]
    for node in nodes:
        node.decorator_list, node.returns = [], None
        for argument in node.args.args:
            argument.annotation = None
    theirs: dict[str, Any] = {}
    exec(compile(ast.Module(nodes, []), name, "exec"), theirs)
    return theirs


def is_named(node: ast.AST, names: tuple[str, ...]) -> bool:
    """Whether a node is a function of one of these names."""
    return isinstance(node, ast.FunctionDef) and node.name in names


def read_config(folder: Path) -> Any:
    """SGLang's object for the ``quantization_config`` of a folder, or the name of its method."""
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    parse = functions_of(
        "sglang.srt.configs.model_config",
        "unwrap_modelopt_quantization_config",
        "_parse_modelopt_quant_config",
    )["_parse_modelopt_quant_config"]
    content |= parse(None, content) or {}
    content["packed_modules_mapping"] = {}  # as of a Llama, whose class has none
    place, kind = METHODS.get(content["quant_method"], (None, None))
    if place is None:
        return content["quant_method"]
    return getattr(importlib.import_module(place), kind).from_config(content)


def kind_of(config: Any, kind: str, name: str) -> Any:
    """The class of a layer's method; None where it is not quantized."""
    place, base_name = BASES[kind]
    layer = getattr(importlib.import_module(f"{LAYERS}.{place}"), base_name)()
    try:
        method = config.get_quant_method(layer, name)
    except ValueError as error:
        return {"raises": str(error)}
    if hasattr(layer, "scheme"):
        return type(layer.scheme).__name__
    if type(method).__name__ == "Fp8LinearMethod":
        numbers = "MXFP8" if method.use_mxfp8 else f"blocks of {method.weight_block_size}"
        return f"Fp8LinearMethod of {numbers}"
    is_quantized = method is not None and not type(method).__name__.startswith("Unquantized")
    return type(method).__name__ if is_quantized else None


if __name__ == "__main__":
    sys.meta_path.insert(0, Finder())
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    names = json.load(sys.stdin)
    try:
        checkpoint = read_config(Path(sys.argv[2]))
    except ValueError as error:
        kinds: dict[str, Any] = {"raises": str(error)}
    else:
        if isinstance(checkpoint, str):
            kinds = {name: {"method": checkpoint} for name in names}
        else:
            kinds = {name: kind_of(checkpoint, kind, name) for name, kind in names.items()}
            kinds["capability"] = checkpoint.get_min_capability()
    sys.stdout.write(f"{json.dumps(kinds)}\n")
