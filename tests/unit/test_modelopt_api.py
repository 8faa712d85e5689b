"""What is used of ModelOpt, compared with the installed version, all of it at once."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import autoquant_ray

FUTURE = "from __future__ import annotations"
DOORS = ("modelopt_api.py", "modelopt_export.py")
TREE = ast.parse(
    "\n".join(
        (Path(autoquant_ray.__file__).parent / door).read_text("utf-8").replace(FUTURE, "")
        for door in DOORS
    )
)

QUANTIZER = (
    *("_use_constant_amax", "_constant_amax", "_dynamic", "_get_amax", "_fake_quantize"),
    *("_calibrator", "_pre_quant_scale", "_enable_pre_quant_scale", "_amax"),
    *("amax", "axis", "backend", "block_sizes", "disable", "enable", "is_enabled", "num_bits"),
    *("is_mx_format", "is_nvfp4_static", "is_static_block_quant", "set_from_attribute_config"),
)
BLOCK_QUANTIZER = ("_original_shape", "_amax_shape_for_export")
CALIBRATOR = (
    *("_initial_amax", "_losses_sum", "_generate_candidates", "_compute_candidate_amax"),
    "_axis",
)
EXPORTER = (
    *("_export_transformers_checkpoint", "_export_quantized_weight", "_write_hf_export_config"),
    "requantize_resmooth_fused_llm_layers",
)
CONFIGS = ("get_quant_config", "process_layer_quant_config")
DESCRIPTOR = ("_calib_func", "_supports_layerwise")
BY_TEXT = {*QUANTIZER, *BLOCK_QUANTIZER, *EXPORTER}
CLASSES = {
    "QuantizeAlgorithmConfig": ("_mutates_weights",),
    "_QuantFusedExperts": ("_first_proj_attr",),
    "_QuantAttention": ("is_compatible_attention",),
    "StaticBlockScaleQuantizer": ("from_tensor_quantizer", "global_amax"),
    "QuantModule": ("iter_weights_for_calibration",),
    "SharedWeightGlobalAmaxState": ("restore_from_members",),
    "mtq": ("auto_quantize", "config", "quantize", "register"),
}


def imported(node: ast.AST = TREE) -> Iterator[list[tuple[str, str]]]:
    """What the door imports from ModelOpt: module and name; several where another may do."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Try):
            branches = [*child.body, *(s for handler in child.handlers for s in handler.body)]
            if all(isinstance(branch, ast.ImportFrom) for branch in branches):
                yield [pair for branch in branches for pair in _pairs(branch)]
                continue
        for pair in _pairs(child):
            yield [pair]
        yield from imported(child)


def _pairs(node: ast.AST) -> list[tuple[str, str]]:
    if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "modelopt":
        return [(str(node.module), alias.name) for alias in node.names]
    return []


def _exists(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def test_every_name_that_is_imported_exists() -> None:
    wanted = list(imported())
    assert [("modelopt.torch.export", "unified_export_hf")] in wanted
    assert any(len(places) == 2 for places in wanted), "names that moved are not seen"
    gone = [" or ".join(map(".".join, places)) for places in wanted if not _any_exists(places)]
    assert not gone, f"nvidia-modelopt has no longer {gone}"


def _any_exists(places: list[tuple[str, str]]) -> bool:
    return any(_exists(*place) for place in places)


def test_every_private_attribute_that_is_used_is_in_the_list() -> None:
    used = {
        node.attr
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute)
        if node.attr.startswith("_") and not node.attr.endswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }
    texts = {n.value for n in ast.walk(TREE) if isinstance(n, ast.Constant)}
    used |= {
        text for text in texts if isinstance(text, str) and text in BY_TEXT and text.startswith("_")
    }
    listed = {
        *QUANTIZER,
        *BLOCK_QUANTIZER,
        *CALIBRATOR,
        *EXPORTER,
        *(name for names in CLASSES.values() for name in names),
    }
    assert used == {name for name in listed if name.startswith("_")}


def test_every_attribute_exists() -> None:
    import torch

    from autoquant_ray import modelopt_api as door

    quantizer: Any = door.TensorQuantizer()
    quantizer.amax = torch.ones(())
    quantizer.pre_quant_scale = torch.ones(())
    blocks = {"num_bits": 4, "block_sizes": {-1: 2, "type": "static"}}
    of_blocks: Any = door.TensorQuantizer(door.QuantizerAttributeConfig(**blocks))
    of_blocks(torch.ones(4, 4))
    search: Any = door.ScaleSearch(
        quantizer, step_size=0.5, start_multiplier=0.5, stop_multiplier=1.5, fp8_scale_sweep=False
    )
    search.best(torch.ones(4, 4))
    holders = [(quantizer, QUANTIZER), (of_blocks, BLOCK_QUANTIZER)]
    holders += [(search._calibrator, CALIBRATOR)]
    holders += [(type(door.CalibrateModeRegistry["max_calibrate"]), DESCRIPTOR)]
    exporter = importlib.import_module("modelopt.torch.export.unified_export_hf")
    configs = importlib.import_module("modelopt.torch.export.quant_utils")
    holders += [(exporter, EXPORTER), (configs, CONFIGS)]
    holders += [(getattr(door, name), attributes) for name, attributes in CLASSES.items()]
    gone = [f"{holder}.{a}" for holder, names in holders for a in names if not hasattr(holder, a)]
    assert not gone, f"nvidia-modelopt has no longer {gone}"
