"""NVFP4 and MX formats on CPU: scored, compared with ModelOpt's search, quantized by a manifest."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluations import make_evaluation
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt_scores import of_text, scores_of_config, summed_by_step

from autoquant_ray import load_quantization_config
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.formats.menu import PAIRS, resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.backends.block_formats import (
    BACKEND,
    WEIGHTS_BACKEND,
    backend_for,
    for_cpu,
)
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.quantize.modules import UNQUANTIZED
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.solve import solve_run

BLOCK_PRESETS = (
    "NVFP4_DEFAULT_CFG",
    "W4A16_NVFP4_CFG",
    "W4A8_NVFP4_FP8_CFG",
    "MXFP4_DEFAULT_CFG",
    "W4A8_MXFP4_FP8_CFG",
    "MXFP6_DEFAULT_CFG",
    "MXFP8_DEFAULT_CFG",
    "MXINT8_DEFAULT_CFG",
)


def test_all_pairs_and_block_presets_score_in_one_pass_and_in_order(
    make_scorer: Any, make_samples: Any
) -> None:
    formats = (*PAIRS, "wfp4_afp16:max", "wfp4_afp8:max", *BLOCK_PRESETS)
    prepared = make_scorer("llama", formats, labels="model")
    shards = [make_samples([24] * 4, seed=1), make_samples([17, 30], seed=2)]
    calibration = merge_calibrations(prepared.scorer.calibrate(shard) for shard in shards)
    sums_GF = sum(prepared.scorer.score(s, 0, calibration).sums.elementwise_GF for s in shards)
    assert sums_GF.shape == (len(prepared.names), len(PAIRS) + 2 + len(BLOCK_PRESETS))
    assert np.isfinite(sums_GF).all()
    assert (sums_GF > 0).all()
    of = {name: sums_GF[:, index] for index, name in enumerate(formats)}
    worse_first = [
        ("wfp4_afp16:max", "wfp8_afp16"),
        ("wfp4_afp16:max", "wint8_afp16"),
        ("wfp4_afp8:max", "wfp8_afp8"),
        ("wfp4_afp16:max", "wfp4_afp16"),
        ("wfp4_afp8:max", "wfp4_afp8"),
        ("NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG"),
        ("MXFP4_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"),
        ("W4A8_NVFP4_FP8_CFG", "wfp4_afp8:max"),
        ("MXFP4_DEFAULT_CFG", "MXFP6_DEFAULT_CFG"),
        ("MXFP6_DEFAULT_CFG", "MXFP8_DEFAULT_CFG"),
        ("MXFP8_DEFAULT_CFG", "MXINT8_DEFAULT_CFG"),
    ]
    for worse, better in worse_first:
        assert of[worse].sum() > of[better].sum(), (worse, better)
    np.testing.assert_array_equal(of["wfp4_afp16:max"], of["W4A16_NVFP4_CFG"])


def test_scores_do_not_depend_on_the_other_formats(make_scorer: Any, make_samples: Any) -> None:
    samples = make_samples([24, 17])

    def scores(formats: tuple[str, ...]) -> Any:
        scorer = make_scorer("llama", formats).scorer
        return scorer.score(samples, 0, scorer.calibrate(samples)).sums.elementwise_GF

    together = scores(("MXFP4_DEFAULT_CFG", "wint8_aint8", "NVFP4_DEFAULT_CFG"))
    np.testing.assert_array_equal(together[:, 2:], scores(("NVFP4_DEFAULT_CFG",)))


@pytest.mark.parametrize(
    ("family", "presets"),
    [
        ("llama", ("NVFP4_DEFAULT_CFG", "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG")),
        ("llama", ("MXFP6_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", "MXINT8_DEFAULT_CFG")),
        ("qwen3_moe", ("NVFP4_DEFAULT_CFG",)),
    ],
)
def test_scores_equal_modelopt_search_with_the_backend(
    family: str, presets: tuple[str, ...], make_scorer: Any, make_model: Any, make_samples: Any
) -> None:
    """All calibrate by maximum, as our manifests say; MX presets leave the FP8 inputs dynamic."""
    prepared = make_scorer(family, presets, is_modelopt_form=True)
    shards = [make_samples([24, 24], seed=1), make_samples([17, 17], seed=2)]
    calibration = merge_calibrations(prepared.scorer.calibrate(shard) for shard in shards)
    ours = summed_by_step(prepared.scorer, shards, calibration)
    batches = [of_text(torch.tensor(shard)) for shard in shards]
    for index, preset in enumerate(presets):
        config = for_cpu(getattr(mtq, preset)) | {"algorithm": "max"}
        theirs = scores_of_config(make_model(family), batches, config)
        assert set(theirs) == set(prepared.names)
        for group, name in enumerate(prepared.names):
            tolerance = 1e-3 if name.endswith("experts") else 1e-4
            assert ours[group, index] == pytest.approx(theirs[name], rel=tolerance), (name, preset)


def enabled_quantizers(model: torch.nn.Module) -> dict[str, Any]:
    return {
        name: (module.num_bits, dict(module.block_sizes or {}), module.backend)
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    }


@torch.no_grad()
def test_manifest_quantizes_on_cpu_to_the_formats_and_the_loss_that_evaluate_measures(
    make_run: Any, make_model: Any, make_samples: Any, make_scorer: Any
) -> None:
    menu = ("NVFP4_DEFAULT_CFG", "W4A8_MXFP4_FP8_CFG", "MXINT8_DEFAULT_CFG", "wfp8_afp8")
    directory = make_run("llama", menu, disable=())
    groups = [group.name for group in make_scorer("llama", menu).plan.searched]
    pins = {name: ([*menu, "none"])[index % 5] for index, name in enumerate(groups)}
    solution = solve_run(directory, SolveOptions(bits=16, pins=pins))
    manifest = json.loads(Path(solution.paths["manifest.json"]).read_text())
    assert "backend" not in json.dumps(manifest["quantization_config"])
    samples = make_samples([24, 17, 30], seed=3)

    model = make_model("llama")
    before = [torch.log_softmax(model(torch.tensor([s])).logits[0, :-1], -1) for s in samples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(
            model,
            load_quantization_config(manifest, device="cpu"),
            forward_loop=lambda m: [m(torch.tensor([s])) for s in samples],
        )
    formats = {format_.name: format_ for format_ in resolve_formats(menu, device="cpu")}
    expected = {}
    for row in pq.read_table(solution.paths["manifest.parquet"]).to_pylist():
        assert row["format"] == pins[row["group"]]
        chosen = formats.get(row["format"])
        parts = {} if chosen is None else {"weight": chosen.weight, "input": chosen.input}
        for part, attributes in parts.items():
            blocks = attributes.get("block_sizes") or {}
            backend = backend_for(attributes, is_weight=part == "weight") if blocks else None
            expected[f"{row['module']}.{part}_quantizer"] = (
                attributes["num_bits"],
                blocks,
                backend,
            )
    assert enabled_quantizers(model) == expected

    after = [torch.log_softmax(model(torch.tensor([s])).logits[0, :-1], -1) for s in samples]
    kl = [(p.exp() * (p - q)).sum(-1).numpy() for p, q in zip(before, after, strict=True)]
    prepared = make_scorer("llama", menu)
    choice = tuple(menu.index(f) if f != "none" else UNQUANTIZED for f in pins.values())
    measured = make_evaluation(prepared, samples).evaluate(samples, [choice])
    ours = np.concatenate([divergence.kl_N for divergence in measured.divergences[0]])
    np.testing.assert_allclose(ours, np.concatenate(kl), rtol=5e-3, atol=5e-6)
    assert ours.mean() > 1e-3


def test_config_for_cuda_names_no_backend() -> None:
    entry = {"quantizer_name": "*", "cfg": {"num_bits": [2, 1], "block_sizes": {"-1": 16}}}
    manifest = {"quantization_config": {"quant_cfg": [entry], "algorithm": "max"}}
    on_cuda = load_quantization_config(manifest, device="cuda")
    assert on_cuda["quant_cfg"][0]["cfg"] == {"num_bits": (2, 1), "block_sizes": {-1: 16}}
    on_cpu = load_quantization_config(manifest, device="cpu")
    assert on_cpu["quant_cfg"][0]["cfg"]["backend"] == BACKEND
    assert load_quantization_config(manifest) == (on_cuda if torch.cuda.is_available() else on_cpu)


def test_for_cpu_leaves_other_quantizers_and_the_given_config_alone() -> None:
    config = for_cpu(mtq.W4A8_NVFP4_FP8_CFG)
    backends = {
        entry["quantizer_name"]: entry["cfg"].get("backend")
        for entry in config["quant_cfg"]
        if entry.get("cfg")
    }
    assert backends["*weight_quantizer"] == WEIGHTS_BACKEND
    assert backends["*input_quantizer"] is None
    both = {e["quantizer_name"]: e.get("cfg") for e in for_cpu(mtq.NVFP4_DEFAULT_CFG)["quant_cfg"]}
    assert both["*weight_quantizer"]["backend"] == WEIGHTS_BACKEND
    assert both["*input_quantizer"]["backend"] == BACKEND
    assert "backend" not in str(mtq.W4A8_NVFP4_FP8_CFG)
    assert for_cpu(mtq.FP8_DEFAULT_CFG) == mtq.FP8_DEFAULT_CFG


@pytest.mark.parametrize("num_bits", [(2, 3), (5, 2)], ids=str)
def test_custom_mx_format_that_no_preset_has_scores(
    num_bits: Any, make_model: Any, make_spec: Any, make_samples: Any
) -> None:
    sizes = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
    attributes = {"num_bits": num_bits, "block_sizes": sizes}
    custom = {"mine": {"weight": attributes, "input": attributes}}
    model = make_model("llama")
    plan = build_plan(model, resolve_formats(("mine",), device="cpu", custom=custom))
    scorer = Scorer(make_spec(plan), model=model)
    sums = scorer.score(make_samples([24]), 0, scorer.calibrate(make_samples([24])))
    assert (sums.sums.elementwise_GF > 0).all()
