"""Sums over the tokens of a sequence before they are squared: definition, batching, what they see.

What they are for: the errors that all tokens share, of values that an attention adds up.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.plan import work

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8")
LENGTHS = [24, 7, 31, 12]


def sequence_sums(prepared: Any, shards: list[Any], calibration: Any) -> Any:
    """Over all shards, ``(groups, formats)``."""
    total, first = 0.0, 0
    for shard in shards:
        total = total + prepared.scorer.score(shard, first, calibration).sums.sequence_GF
        first += len(shard)
    return total


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3n", "qwen3_vl"])
def test_sums_any_batching_and_chunks_are_the_same(
    family: str, make_scorer: Any, make_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(LENGTHS)
    whole = make_scorer(family, FORMATS, estimator="sequence")
    single = make_scorer(family, FORMATS, estimator="sequence", step_tokens=2)
    calibration = whole.scorer.calibrate(samples)
    expected = sequence_sums(whole, [samples], calibration)
    for prepared, shards in (
        (single, [samples]),
        (whole, [[sample] for sample in samples]),
        (whole, [samples[:1], samples[1:]]),
    ):
        actual = sequence_sums(prepared, shards, calibration)
        np.testing.assert_allclose(actual, expected, rtol=1e-3)
    monkeypatch.setattr(work, "_MIN_CHUNK_ROWS", 5)
    monkeypatch.setitem(work._CHUNK_ELEMENTS, "cpu", 1)
    np.testing.assert_allclose(sequence_sums(whole, [samples], calibration), expected, rtol=1e-3)


def test_sums_equal_their_definition(make_scorer: Any, make_samples: Any) -> None:
    """Gradient by plain autograd, output difference by ModelOpt's quantized module itself."""
    import modelopt.torch.quantization as mtq

    name = "model.layers.0.self_attn.v_proj"
    prepared = make_scorer("llama", ("wint8_aint8",), is_modelopt_form=True, estimator="sequence")
    samples = make_samples([20, 13])
    calibration = prepared.scorer.calibrate(samples)
    sums = prepared.scorer.score(samples, 0, calibration).sums
    group = next(n for n, group in enumerate(prepared.plan.searched) if _holds(group, name))
    names = [module.name for module in prepared.plan.searched[group].modules]

    model = copy.deepcopy(prepared.model)
    model.get_input_embeddings().weight.requires_grad_(True)
    kept: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, i, o, n=name: kept[n].append((i[0].detach(), o)))
    expected = by_rows = 0.0
    for ids in map(torch.tensor, samples):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        outputs = [kept[name][-1][1] for name in names]
        gradients = torch.autograd.grad(loss, outputs)
        for name, gradient in zip(names, gradients, strict=True):
            kept[name][-1] = (*kept[name][-1], gradient)
    for name, calls in kept.items():
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight = prepared.model.get_submodule(name).weight
        inputs = [states for states, _, _ in calls]
        layer = torch.nn.Sequential(copy.deepcopy(layer))
        quantized = mtq.quantize(
            layer, mtq.INT8_DEFAULT_CFG, lambda m, i=inputs: [m(states) for states in i]
        )
        for states, output, gradient in calls:
            product = (gradient * (quantized(states).detach() - output.detach()))[0].double()
            expected += float(product.sum(0).square().sum())
            by_rows += float(product.square().sum())
    assert sums.sequence_GF[group, 0] == pytest.approx(expected, rel=1e-4)
    assert sums.elementwise_GF[group, 0] == pytest.approx(by_rows, rel=1e-4)
    assert abs(expected / by_rows - 1) > 0.01


def _holds(group: Any, name: str) -> bool:
    return any(module.name == name for module in group.modules)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sums_foresee_what_values_lose_together(family: str, make_scorer: Any) -> None:
    """Predicted over measured KL of each attention's queries, keys and values alone in int4.

    Where all tokens of a sample are equal, an attention adds up equal errors.
    """
    samples = [[token] * 32 for token in range(7, 7 + 12)]
    prepared = make_scorer(
        family, FORMATS[:1], labels="model", label_draws=64, estimator="sequence"
    )
    spec, calibration = prepared.scorer.spec, prepared.scorer.calibrate(samples)
    scores = prepared.scorer.score(samples, 0, calibration)
    fields = ("model", "dtype", "device", "num_threads", "modules", "formats")
    runner = AllocationRunner(
        EvaluationSpec(
            **{name: getattr(spec, name) for name in fields},
            calibration=calibration,
            step_tokens=10_000,
        ),
        model=prepared.model,
    )
    groups = [n for n, name in enumerate(prepared.names) if name.endswith("q_proj")]
    choices = [
        tuple(0 if n == group else -1 for n in range(len(prepared.names))) for group in groups
    ]
    result = runner.evaluate(samples, choices)
    for group, divergences in zip(groups, result.divergences, strict=True):
        measured = np.mean(np.concatenate([sample.kl_N for sample in divergences]))
        predicted = 0.5 * scores.sums.sequence_GF[group, 0] / scores.num_tokens
        by_rows = 0.5 * scores.sums.elementwise_GF[group, 0] / scores.num_tokens
        assert predicted / measured == pytest.approx(1, abs=0.2)
        assert by_rows / measured < 0.25
