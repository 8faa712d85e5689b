"""Plans of several calibration algorithms, against ModelOpt on each layer alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt_scores import NOTHING, quantized_by_modelopt

from autoquant_ray import load_quantization_config
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.formats.algorithms import of_allocation
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.solve import solve_run

INT4 = {"num_bits": 4, "block_sizes": {-1: 16, "type": "static"}}
INT8, INT8_INPUT = {"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}
CUSTOM: dict[str, Any] = {
    "int4_mse": {"weight": INT4, "input": None, "algorithm": {"method": "mse"}},
    "int8_narrow": {
        "weight": INT8,
        "input": INT8_INPUT,
        "algorithm": {"method": "mse", "start_multiplier": 0.5, "stop_multiplier": 1.1},
    },
}


def by(algorithm: Any, weight: Any, input_: Any = None) -> Format:
    full = {"method": algorithm} if isinstance(algorithm, str) else algorithm
    return Format(
        name=str(algorithm), weight=weight, input=input_, modelopt_compression=1, algorithm=full
    )


MIXED = {
    "model.layers.0.self_attn.q_proj": by("smoothquant", INT8, INT8_INPUT),
    "model.layers.0.self_attn.o_proj": by(None, INT8, INT8_INPUT),
    "model.layers.0.mlp.gate_proj": by({"method": "mse", "step_size": 0.2}, INT4),
    "model.layers.0.mlp.up_proj": by("awq_lite", INT4),
    "model.layers.0.mlp.down_proj": by({"method": "awq_lite", "alpha_step": 0.25}, INT4),
    "model.layers.1.self_attn.k_proj": by("awq_lite", INT4, INT8_INPUT),
    "model.layers.1.self_attn.v_proj": by("mse", INT8),
    "model.layers.1.mlp.up_proj": by({"method": "smoothquant", "alpha": 0.5}, INT8, INT8_INPUT),
    "model.layers.1.mlp.down_proj": by(None, {"num_bits": (4, 3), "axis": None}, INT8_INPUT),
}


def entries_of(formats: dict[str, Format]) -> list[dict[str, Any]]:
    of_layers = (quantizer_entries(f"{name}.", format_) for name, format_ in formats.items())
    return [*NOTHING, *(entry for entries in of_layers for entry in entries)]


def algorithm_of(formats: dict[str, Format]) -> Any:
    return of_allocation(
        {
            entry["quantizer_name"]: format_.algorithm
            for name, format_ in formats.items()
            for entry in quantizer_entries(f"{name}.", format_)
        }
    )


def state_of(layer: Any) -> dict[str, Any]:
    """What a calibrated layer computes with."""
    state = {"weight": layer.weight.detach(), "quantized": layer.weight_quantizer(layer.weight)}
    for part in ("weight_quantizer", "input_quantizer"):
        quantizer = getattr(layer, part)
        state[f"{part} enabled"] = torch.tensor(quantizer.is_enabled)
        if quantizer.is_enabled:
            state[f"{part} amax"] = quantizer.amax
        if quantizer.pre_quant_scale is not None:
            state[f"{part} pre_quant_scale"] = quantizer.pre_quant_scale
    return state


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layer_is_what_modelopt_makes_of_it_alone(
    dtype: torch.dtype, make_model: Any, make_samples: Any
) -> None:
    model = make_model("llama").to(dtype)
    batches = [torch.tensor(make_samples([24, 24], seed=1)), torch.tensor(make_samples([17]))]
    load_quantization_config(
        {"quantization_config": {"quant_cfg": [], "algorithm": {"method": "autoquant_ray_sets"}}}
    )
    algorithm = algorithm_of(MIXED)
    assert len(algorithm["sets"]) == 6
    together = quantized_by_modelopt(model, batches, entries_of(MIXED), algorithm)
    changed = 0
    for name, format_ in MIXED.items():
        chosen = {name: format_}
        alone = quantized_by_modelopt(model, batches, entries_of(chosen), algorithm_of(chosen))
        theirs, ours = alone.get_submodule(name), together.get_submodule(name)
        assert_equal(state_of(ours), state_of(theirs))
        states = torch.randn(3, ours.in_features, dtype=dtype)
        assert torch.equal(ours(states), theirs(states))
        changed += not torch.equal(ours.weight, model.get_submodule(name).weight)
    assert changed == 5  # those that are smoothed


def test_manifest_of_several_algorithms_gives_each_layer_its_own(
    make_run: Any, make_model: Any, make_samples: Any, make_scorer: Any
) -> None:
    menu = ("int4_mse", "int8_narrow", "wint8_aint8", "wint4_afp16:max")
    directory = make_run("qwen3_moe", menu, disable=(), custom=CUSTOM)
    groups = [g.name for g in make_scorer("qwen3_moe", menu, custom=CUSTOM).plan.searched]
    pins = {name: [*menu, "none"][number % 5] for number, name in enumerate(groups)}
    solution = solve_run(directory, SolveOptions(bits=16, pins=pins))
    manifest = json.loads(Path(solution.paths["manifest.json"]).read_text())
    algorithm = manifest["quantization_config"]["algorithm"]
    assert [set_["algorithm"]["stop_multiplier"] for set_ in algorithm["sets"]] == [4.0, 1.1]
    assert algorithm["others"] == "max"

    model, ids = make_model("qwen3_moe"), torch.tensor(make_samples([24] * 4))
    config = load_quantization_config(manifest, device="cpu")
    ours = quantized_by_modelopt(model, [ids], config["quant_cfg"], config["algorithm"])
    formats = {f.name: f for f in resolve_formats(menu, device="cpu", custom=CUSTOM)}
    expected = {
        name: quantized_by_modelopt(
            model, [ids], config["quant_cfg"], formats[name].algorithm or "max"
        )
        for name in menu
    }
    compared = set()
    for name, module in ours.named_modules():
        group = next((group for group in pins if name.startswith(f"{group}.")), None)
        is_quantizer = isinstance(module, mtq.nn.TensorQuantizer) and module.is_enabled
        if is_quantizer and group is not None:  # a group is named after its first module
            theirs = expected[pins[group]].get_submodule(name)
            assert torch.equal(module.amax, theirs.amax), name
            compared.add(pins[group])
    assert compared == set(menu)


def test_plans_of_one_algorithm_need_no_mode_of_ours() -> None:
    plain = {"a.weight_quantizer": None, "a.input_quantizer": None}
    searched = {"b.weight_quantizer": {"method": "mse", "step_size": 0.1}}
    assert of_allocation({}) == of_allocation(plain) == "max"
    assert of_allocation(searched) == {"method": "mse", "step_size": 0.1}
    mixed = of_allocation(plain | searched)
    assert mixed["others"] == "max"
    assert mixed["sets"] == [
        {"algorithm": searched["b.weight_quantizer"], "quantizers": ["b.weight_quantizer"]}
    ]
    assert json.loads(json.dumps(mixed)) == mixed


def test_set_without_a_quantizer_of_the_model_is_refused(make_model: Any) -> None:
    algorithm = {
        "method": "autoquant_ray_sets",
        "sets": [{"algorithm": "mse", "quantizers": ["model.layers.9.q.weight_quantizer"]}],
    }
    with pytest.raises(ValueError, match=r"names no enabled quantizer.*model\.layers\.9\.q"):
        quantized_by_modelopt(make_model("llama"), [], entries_of(MIXED), algorithm)


def test_model_saved_after_the_mode_is_restored(
    make_model: Any, make_samples: Any, tmp_path: Path
) -> None:
    import modelopt.torch.opt as mto

    ids = torch.tensor(make_samples([24]))
    model = make_model("llama")
    quantized = quantized_by_modelopt(model, [ids], entries_of(MIXED), algorithm_of(MIXED))
    mto.save(quantized, tmp_path / "model.pt")
    restored = mto.restore(copy.deepcopy(model), tmp_path / "model.pt")
    assert torch.equal(restored(input_ids=ids).logits, quantized(input_ids=ids).logits)
