"""Scores of KV-cache formats against autograd, ``mtq.quantize`` and measured divergences."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import modelopt
import numpy as np
import pytest
import torch
from families import family_model
from modelopt_scores import NOTHING, quantized_by_modelopt
from packaging.version import Version

from autoquant_ray.allocate.quant_cfg import cache_entries, quantizer_entries
from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.layers import require_gradient
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.quantize.attention import CachedAttention, Call
from autoquant_ray.quantize.backends.block_formats import for_cpu
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.quantize.modules import UNQUANTIZED
from autoquant_ray.score.loss import draw_uniforms, sample_labels
from autoquant_ray.score.scorer import Scorer

FORMATS = ("kv_fp8", "wfp8_afp8", "kv_nvfp4", "kv_fp8_nvfp4")
LENGTHS = [24, 13, 19]
FAMILIES = ("Llama", "Qwen3", "Gemma-3")  # grouped queries; norms of keys; sliding windows


@pytest.fixture(scope="module")
def prepare(make_spec: Any) -> Any:
    """A family's model, its plan with caches, and a scorer that scores it."""

    def build(family: str, **changes: Any) -> tuple[Any, Plan, Scorer]:
        model = family_model(family)
        menu = resolve_formats(FORMATS, device="cpu")  # each layer with a scale of its own
        plan = build_plan(model, [replace(format_, shares_scale=False) for format_ in menu])
        dtype = changes.get("dtype", "float32")
        model = model.to(getattr(torch, dtype))
        return model, plan, Scorer(make_spec(plan, **changes), model=model)

    return build


def quantized(model: Any, plan: Plan, choice: dict[str, str], samples: Any) -> Any:
    """The model as ``mtq.quantize`` makes it; group -> format."""
    formats = {format_.name: format_ for format_ in plan.formats}
    entries = list(NOTHING)
    for group in plan.searched:
        for module in group.modules if group.name in choice else ():
            format_ = formats[choice[group.name]]
            if format_.kv is not None:
                entries += cache_entries(module.name, format_)
            for prefix in module.quantizer_prefixes:
                entries += quantizer_entries(f"{module.name}.{prefix}", format_)
    entries = for_cpu({"quant_cfg": entries, "algorithm": "max"})["quant_cfg"]
    return quantized_by_modelopt(model, [torch.tensor([s]) for s in samples], entries)


def padded(samples: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of one batch."""
    longest = max(map(len, samples))
    ids_BS = torch.tensor([[*s, *[0] * (longest - len(s))] for s in samples])
    mask_BS = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in samples])
    return ids_BS, mask_BS


def definition(
    model: Any, plan: Plan, samples: list[list[int]], labels: str
) -> dict[tuple[str, str], tuple[float, ...]]:
    """(group, format) -> all sums, by one ordinary graph and ModelOpt's own attentions."""
    caches = [group for group in plan.searched if group.is_cache]
    calls: dict[str, Any] = {}
    gradients: dict[str, torch.Tensor] = {}

    def keep(name: str, _: Any, arguments: Any, keywords: Any, output: Any) -> None:
        calls[name] = (arguments, keywords, output[0].detach())
        output[0].register_hook(lambda gradient: gradients.update({name: gradient}))

    handles = [
        model.get_submodule(g.modules[0].name).register_forward_hook(
            partial(keep, g.name), with_kwargs=True
        )
        for g in caches
    ]
    handles.append(model.get_input_embeddings().register_forward_hook(require_gradient))
    ids_BS, mask_BS = padded(samples)
    with torch.enable_grad():
        logits_BSV = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
        loss = torch.zeros(())
        for row, sample in enumerate(samples):
            count = len(sample) - 1
            logits_nV = logits_BSV[row, :count].float()
            targets = torch.tensor(sample[1:])
            if labels == "model":
                uniforms = torch.from_numpy(draw_uniforms(0, row, 1, count))
                targets = sample_labels(logits_nV.detach().softmax(-1), uniforms)[0]
            loss = loss + torch.nn.functional.cross_entropy(logits_nV, targets, reduction="sum")
        loss.backward()
    for handle in handles:
        handle.remove()
    sums = {}
    for name in ("kv_fp8", "kv_nvfp4", "kv_fp8_nvfp4"):
        for group in caches:
            other = quantized(model, plan, {group.name: name}, samples)
            arguments, keywords, exact = calls[group.name]
            with torch.no_grad():
                changed = other.get_submodule(group.modules[0].name)(*arguments, **keywords)[0]
            product = ((changed - exact) * gradients[group.name]).double()
            token = product.sum(dim=-1).square().sum()
            sequence = product.flatten(2).sum(dim=1).square().sum()
            sums[group.name, name] = (float(product.square().sum()), float(token), float(sequence))
    return sums


@pytest.mark.parametrize(
    ("family", "labels"),
    [("Llama", "data"), ("Llama", "model"), ("Qwen3", "model"), ("Gemma-3", "data")],
)
def test_sums_equal_their_definition(
    family: str, labels: str, prepare: Any, make_samples: Any
) -> None:
    samples = make_samples(LENGTHS, seed=5)
    model, plan, scorer = prepare(family, labels=labels, estimator="sequence")
    calibration = scorer.calibrate(samples)
    scores = scorer.score(samples, 0, calibration)
    column = {name: number for number, name in enumerate(FORMATS)}
    rows = {group.name: number for number, group in enumerate(plan.searched)}
    expected = definition(model, plan, samples, labels)
    assert len(expected) == 3 * sum(group.is_cache for group in plan.searched) == 6
    for (group, name), (elementwise, token, sequence) in expected.items():
        at = rows[group], column[name]
        assert elementwise > 0
        assert scores.sums.elementwise_GF[at] == pytest.approx(elementwise, rel=1e-5)
        assert scores.sums.token_GF[at] == pytest.approx(token, rel=1e-5)
        assert scores.sums.sequence_GF[at] == pytest.approx(sequence, rel=1e-5)
        assert scores.sums.elementwise_GF[rows[group], column["wfp8_afp8"]] == 0


def test_maxima_padded_batch_ignores_padding(prepare: Any, make_samples: Any) -> None:
    samples = make_samples(LENGTHS, seed=5)
    model, plan, scorer = prepare("Llama")
    together = scorer.calibrate(samples).maxima()
    alone = merge_calibrations(scorer.calibrate([sample]) for sample in samples).maxima()
    choice = {group.name: "kv_fp8" for group in plan.searched if group.is_cache}
    other = quantized(model, plan, choice, samples)
    for group in plan.searched:
        name = group.modules[0].name
        for part in ("k", "v") if group.is_cache else ():
            statistic = (name, f"{part}_bmm_amax")
            quantizer = getattr(other.get_submodule(name), f"{part}_bmm_quantizer")
            assert together[statistic] == pytest.approx(alone[statistic], rel=1e-5)
            assert together[statistic] == pytest.approx(float(quantizer.amax), rel=1e-5)


def test_any_batching_and_draws_of_rows_agree(prepare: Any, make_samples: Any) -> None:
    samples = make_samples(LENGTHS * 3, seed=6)
    _, plan, whole = prepare("Qwen3", labels="model", label_draws=2)
    calibration = whole.calibrate(samples)
    expected = whole.score(samples, 0, calibration).sums
    _, _, single = prepare("Qwen3", labels="model", label_draws=2, step_tokens=2)
    sums_of_single = single.score(samples, 0, calibration).sums
    np.testing.assert_allclose(sums_of_single.elementwise_GF, expected.elementwise_GF, rtol=1e-4)
    _, _, drawn = prepare("Qwen3", labels="model", label_draws=2, row_share=0.5)
    sums = drawn.score(samples, 0, calibration).sums
    for number, group in enumerate(plan.searched):
        if group.is_cache:
            for column in (0, 2):
                error = np.sqrt(sums.elementwise_variance_GF[number, column])
                distance = abs(
                    sums.elementwise_GF[number, column] - expected.elementwise_GF[number, column]
                )
                assert 0 < distance < 5 * error


def test_differences_of_a_bfloat16_attention_are_formed_in_float32(
    prepare: Any, make_samples: Any
) -> None:
    """Differences of two outputs rounded to bfloat16 would be partly rounding."""
    model, plan, _ = prepare("Llama", dtype="bfloat16")
    planned = next(group for group in plan.searched if group.is_cache).modules[0]
    seen: list[Any] = []
    module = model.get_submodule(planned.name)
    handle = module.register_forward_hook(lambda *given: seen.append(given[1:]), with_kwargs=True)
    ids_BS, mask_BS = padded(make_samples(LENGTHS, seed=5))
    with torch.no_grad():
        model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
    handle.remove()
    arguments, keywords, output = seen[0]
    call, maxima = Call.of(arguments, keywords), {"k_bmm_amax": 4.0, "v_bmm_amax": 4.0}
    formats = [plan.formats[0], plan.formats[2]]
    rounded = CachedAttention(module, planned).differences(call, output[0], formats, maxima)
    single = copy.deepcopy(module).float()
    exact = CachedAttention(single, planned).differences(call.in_float32(), None, formats, maxima)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert theirs.abs().max() > 0.01
    assert module.q_proj.weight.dtype == torch.bfloat16


@torch.no_grad()
def divergence(model: Any, other: Any, samples: list[list[int]]) -> float:
    """Mean KL(P || Q) over all predicted tokens."""
    total, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor([sample])
        log_p, log_q = (
            m(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            for m in (model, other)
        )
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(sample) - 1
    return total / count


def test_score_predicts_the_divergence_of_a_single_format(prepare: Any, make_samples: Any) -> None:
    samples = make_samples([32] * 12, seed=7)
    model, plan, scorer = prepare("Llama", labels="model", label_draws=4)
    scores = scorer.score(samples, 0, scorer.calibrate(samples))
    for number, group in enumerate(plan.searched):
        for column, name in ((0, "kv_fp8"), (2, "kv_nvfp4")) if group.is_cache else ():
            predicted = 0.5 * scores.sums.elementwise_GF[number, column] / scores.num_tokens
            other = quantized(model, plan, {group.name: name}, samples)
            measured = divergence(model, other, samples)
            message = f"{group.name} {name}: predicted {predicted:.3e}, measured {measured:.3e}"
            assert 0.7 < predicted / measured < 1.4, message


@pytest.mark.skipif(
    Version(modelopt.__version__) < Version("0.48rc1"), reason="ModelOpt 0.48 has a name for it"
)
def test_keys_and_values_apart_are_what_modelopt_calls_so(prepare: Any, make_samples: Any) -> None:
    from modelopt.torch.export import quant_utils

    model, plan, _ = prepare("Llama")
    (group, *_) = [group for group in plan.searched if group.is_cache]
    other = quantized(model, plan, {group.name: "kv_fp8_nvfp4"}, make_samples(LENGTHS))
    attention = other.get_submodule(group.modules[0].name)
    assert quant_utils.get_kv_cache_dtype(attention) == quant_utils.KV_CACHE_FP8_K_NVFP4_V


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_equals_mtq_quantize(family: str, prepare: Any, make_samples: Any) -> None:
    """Caches and the projections around them, quantized together and apart."""
    samples = make_samples(LENGTHS, seed=8)
    model, plan, scorer = prepare(family)
    spec = scorer.spec
    fields = ("model", "dtype", "device", "num_threads", "modules", "formats", "step_tokens")
    evaluation = AllocationRunner(
        EvaluationSpec(
            **{name: getattr(spec, name) for name in fields},
            calibration=scorer.calibrate(samples),
        ),
        model=model,
    )
    caches = [group.name for group in plan.searched if group.is_cache]
    others = [group.name for group in plan.searched if "self_attn" in group.name]
    choices = [
        dict.fromkeys(caches, "kv_nvfp4"),
        {**dict.fromkeys(others, "wfp8_afp8"), caches[0]: "kv_fp8_nvfp4", caches[1]: "kv_nvfp4"},
    ]
    columns = {name: number for number, name in enumerate(FORMATS)}
    indices = [
        tuple(columns.get(choice.get(g.name, ""), UNQUANTIZED) for g in plan.searched)
        for choice in choices
    ]
    result = evaluation.evaluate(samples, indices)
    for choice, ours in zip(choices, result.divergences, strict=True):
        other = quantized(model, plan, choice, samples)
        kl = np.concatenate([sample.kl_N for sample in ours]).mean()
        assert kl == pytest.approx(divergence(model, other, samples), rel=2e-3)
