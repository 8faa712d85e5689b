"""``mtq.quantize`` with a manifest's config sets exactly the manifest's quantizers."""

from __future__ import annotations

import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import pyarrow.parquet as pq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from strict_json import read_json

from autoquant_ray import load_quantization_config
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.solve import solve_run

WEIGHT, INPUT = "weight", "input"

QUANTIZERS = {
    "wint4_afp16": {WEIGHT: (4, {-1: 128, "type": "static"}, None)},
    "wfp8_afp8": {WEIGHT: ((4, 3), None, None), INPUT: ((4, 3), None, None)},
    "wint8_aint8": {WEIGHT: (8, None, 0), INPUT: (8, None, None)},
    "none": {},
}
"""Format -> quantizer -> (num_bits, block_sizes, axis); ModelOpt sets a block format's axis."""

PINS = {
    "llama": {
        "model.layers.0.self_attn.q_proj": "wint8_aint8",
        "model.layers.0.mlp.gate_proj": "wfp8_afp8",
        "model.layers.1.self_attn.o_proj": "none",
        "model.layers.1.mlp.down_proj": "wint4_afp16",
    },
    "qwen3_moe": {
        "model.layers.0.self_attn.q_proj": "wint8_aint8",
        "model.layers.0.mlp.experts": "wint8_aint8",
        "model.layers.1.self_attn.o_proj": "none",
        "model.layers.1.mlp.experts": "wint4_afp16",
    },
}


def expected_quantizers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Quantizer name -> settings that the layers of a manifest ask for, experts by kind."""
    expected = {}
    for row in rows:
        is_experts = row["module"].endswith(".experts")
        starts = ("gate_up_proj_", "down_proj_") if is_experts else ("",)
        for start in starts:
            for part, settings in QUANTIZERS[row["format"]].items():
                name = f"{start}{part}_quantizer"
                expected[f"{row['module']}.{name}"] = settings
    return expected


def enabled_quantizers(model: torch.nn.Module) -> dict[str, Any]:
    """Quantizer name -> settings of all enabled ones; one entry for a list over experts."""
    settings_of: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer) or not module.is_enabled:
            continue
        start, _, last = name.rpartition(".")
        of_experts = last.isdigit()
        shown = start.replace("_quantizers", "_quantizer") if of_experts else name
        blocks = module.block_sizes
        axis = None if blocks else module.axis
        settings = (module.num_bits, dict(blocks) if blocks else None, axis)
        assert settings_of.setdefault(shown, settings) == settings, name
    return settings_of


@pytest.mark.parametrize("family", PINS)
def test_quantization_config_sets_exactly_the_manifest_quantizers(
    family: str, make_run: Any, make_model: Any, make_samples: Any
) -> None:
    directory = make_run(family)
    solution = solve_run(directory, SolveOptions(bits=10, pins=PINS[family]))
    manifest = read_json(directory, f"solutions/{solution.name}/manifest.json")
    rows = pq.read_table(solution.paths["manifest.parquet"]).to_pylist()
    assert PINS[family].items() <= {row["group"]: row["format"] for row in rows}.items()
    ids = torch.tensor(make_samples([24] * 4))
    model = make_model(family)
    plain = model(input_ids=ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = load_quantization_config(manifest)
        quantized = mtq.quantize(model, config, forward_loop=lambda m: m(input_ids=ids))
    assert enabled_quantizers(quantized) == expected_quantizers(rows)
    logits = quantized(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    assert (logits - plain).abs().max() > 0


def test_quantization_config_all_none_changes_nothing(
    make_run: Any, make_model: Any, make_samples: Any
) -> None:
    directory = make_run()
    solution = solve_run(directory, SolveOptions(bits=16, allow={"*": ("none",)}))
    manifest = read_json(directory, f"solutions/{solution.name}/manifest.json")
    ids = torch.tensor(make_samples([24] * 2))
    model = make_model("llama")
    plain = model(input_ids=ids).logits
    quantized = mtq.quantize(
        model, load_quantization_config(manifest), forward_loop=lambda m: m(input_ids=ids)
    )
    assert enabled_quantizers(quantized) == {}
    assert torch.equal(quantized(input_ids=ids).logits, plain)


def test_quantization_config_of_vision_model_leaves_the_tower_alone(
    make_run: Any, make_model: Any, make_samples: Any
) -> None:
    directory = make_run("qwen3_vl", disable=())
    solution = solve_run(directory, SolveOptions(bits=8))
    manifest = read_json(directory, f"solutions/{solution.name}/manifest.json")
    rows = pq.read_table(solution.paths["manifest.parquet"]).to_pylist()
    towers = [row for row in rows if "visual" in row["module"]]
    assert towers
    assert all(row["format"] == "none" for row in towers)
    ids = torch.tensor(make_samples([24] * 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = mtq.quantize(
            make_model("qwen3_vl"),
            load_quantization_config(manifest),
            forward_loop=lambda m: m(input_ids=ids),
        )
    enabled = enabled_quantizers(quantized)
    assert enabled == expected_quantizers(rows)
    assert enabled


def test_quantization_config_of_imported_manifest_is_refused() -> None:
    with pytest.raises(ValueError, match="imported"):
        load_quantization_config({"quantization_config": None})
