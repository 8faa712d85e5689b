"""Slopes, curvatures and interactions of flips against models that ``mtq.quantize`` made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import make_evaluation, quantize, random_choices

from autoquant_ray.data.samples import num_predicted
from autoquant_ray.errors import NonFiniteError
from autoquant_ray.evaluate.flip_estimator import NUM_DRAWS
from autoquant_ray.models.find import find_model
from autoquant_ray.quantize.calibration import calibration_of_maxima
from autoquant_ray.quantize.modules import UNQUANTIZED
from autoquant_ray.score.loss import draw_uniforms, sample_labels
from autoquant_ray.score.scorer import Scorer

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8")
WEIGHT_FORMATS = ("wint4_afp16:max", "wint8_afp16", "wfp8_afp16")

LENGTHS = [24, 17, 9, 24]


@contextmanager
def watching(model: Any, names: list[str]) -> Iterator[dict[str, list[Any]]]:
    """Inputs and outputs of modules, outputs with their gradients kept."""
    seen: dict[str, list[Any]] = {name: [] for name in names}
    handles = []
    for name in names:

        def hook(_: Any, inputs: Any, output: Any, name: str = name) -> None:
            output.retain_grad()
            seen[name].append((inputs, output))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def losses_of(model: Any, quantized: Any, sample: list[int], position: int) -> list[torch.Tensor]:
    """KL(P || Q) summed over the tokens of a sample, then the loss of each draw of labels from Q.

    Args:
        model: Gives P.
        quantized: Gives Q, with a graph.
        sample: Token ids.
        position: Of the sample in the data.
    """
    ids_1S = torch.tensor([sample])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids_1S, use_cache=False).logits[0, :-1], dim=-1)
    embedded = quantized.get_input_embeddings()(ids_1S).detach().requires_grad_(True)
    logits = quantized(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
    log_q = torch.log_softmax(logits, dim=-1)
    uniforms = torch.from_numpy(draw_uniforms(0, position, NUM_DRAWS, num_predicted(sample)))
    labels = sample_labels(log_q.detach().exp(), uniforms)
    drawn = [-log_q.gather(1, label[:, None]).sum() for label in labels]
    return [(log_p.exp() * (log_p - log_q)).sum(), *drawn]


def dots_of(
    model: Any, now: Any, flipped: Any, names: list[str], samples: list[list[int]]
) -> tuple[float, float, Any]:
    """Slope and curvature of a flip, and per token and draw ``<s, d>``, by autograd alone.

    Args:
        model: The unquantized model.
        now: The quantized model.
        flipped: Another one, whose modules of these names run under the new format.
        names: Modules of the group.
        samples: The data.
    """
    slope, curvature = 0.0, 0.0
    tokens = []
    for position, sample in enumerate(samples):
        with watching(now, names) as seen:
            losses = losses_of(model, now, sample, position)
        rows = 0.0
        for name in names:
            ((inputs, output),) = seen[name]
            with torch.no_grad():
                change = flipped.get_submodule(name)(*inputs) - output
            gradients = [torch.autograd.grad(x, output, retain_graph=True)[0] for x in losses]
            products = [(gradient * change).double().flatten(0, -2) for gradient in gradients]
            slope += float(products[0].sum())
            curvature += sum(float(p.square().sum()) for p in products[1:]) / 2 / NUM_DRAWS
            rows = rows + torch.stack([product.sum(dim=1) for product in products[1:]])
        tokens.append(rows)
    return slope, curvature, torch.cat(tokens, dim=1)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("formats", [FORMATS, WEIGHT_FORMATS], ids=["inputs", "weights"])
def test_equals_autograd_on_modelopts_model(
    family: str, formats: tuple[str, ...], make_scorer: Any, make_samples: Any
) -> None:
    prepared = make_scorer(family, formats, is_modelopt_form=True)
    samples = make_samples(LENGTHS, seed=3)
    runner = make_evaluation(prepared, samples)
    num_groups = len(prepared.plan.searched)
    (choice,) = random_choices(num_groups, 1, seed=5)
    result = runner.estimate(samples, 0, choice)
    assert result.num_tokens == sum(LENGTHS) - len(LENGTHS)
    now = quantize(prepared, choice, samples)
    others = {f: quantize(prepared, (f,) * num_groups, samples) for f in range(len(formats))}
    others[UNQUANTIZED] = prepared.model
    for group in range(0, num_groups, 3):
        names = [module.name for module in prepared.plan.searched[group].modules]
        for index in set(others) - {choice[group]}:
            slope, curvature, _ = dots_of(prepared.model, now, others[index], names, samples)
            assert result.sums.slope_GF[group, index] == pytest.approx(slope, rel=2e-3, abs=1e-4)
            assert result.sums.curvature_GF[group, index] == pytest.approx(curvature, rel=2e-3)
        assert result.sums.slope_GF[group, choice[group]] == 0


def test_interaction_is_the_product_per_token(make_scorer: Any, make_samples: Any) -> None:
    """Of gate_up and down of an MLP, and of the two groups of an attention; of no others."""
    prepared = make_scorer("llama", WEIGHT_FORMATS, is_modelopt_form=True)
    samples = make_samples([24, 17], seed=3)
    runner = make_evaluation(prepared, samples)
    groups = prepared.plan.searched
    (choice,) = random_choices(len(groups), 1, seed=2)
    sums = runner.estimate(samples, 0, choice).sums
    names = [[module.name for module in group.modules] for group in groups]
    parents = [group[0].rpartition(".")[0] for group in names]
    assert set(sums.interactions) == {
        (a, b) for b in range(len(groups)) for a in range(b) if parents[a] == parents[b]
    }
    now = quantize(prepared, choice, samples)
    others = {f: quantize(prepared, (f,) * len(groups), samples) for f in range(3)}
    for (first, second), sums_FF in sums.interactions.items():
        tokens = [
            {
                index: dots_of(prepared.model, now, other, names[group], samples)[2]
                for index, other in others.items()
                if index != choice[group]
            }
            for group in (first, second)
        ]
        for index, rows_KT in tokens[0].items():
            for partner, partner_KT in tokens[1].items():
                expected = float((rows_KT * partner_KT).sum()) / NUM_DRAWS
                assert sums_FF[index, partner] == pytest.approx(expected, rel=5e-3, abs=1e-4)


def test_curvature_of_the_unquantized_model_is_its_score(
    make_scorer: Any, make_samples: Any
) -> None:
    """There Q is P: no slope, and the scorer draws the same labels."""
    prepared = make_scorer("qwen3_moe", FORMATS, labels="model", label_draws=NUM_DRAWS)
    samples = make_samples(LENGTHS)
    runner = make_evaluation(prepared, samples)
    num_groups = len(prepared.plan.searched)
    sums = runner.estimate(samples, 7, (UNQUANTIZED,) * num_groups).sums
    scores = prepared.scorer.score(samples, 7, runner.spec.calibration).sums
    np.testing.assert_allclose(sums.curvature_GF[:, :-1], scores.elementwise_GF / 2, rtol=1e-4)
    np.testing.assert_allclose(sums.slope_GF, 0.0, atol=1e-4)
    assert (sums.curvature_GF[:, UNQUANTIZED] == 0).all()


def sums_of(runner: Any, samples: Any, choice: Any) -> list[Any]:
    sums = runner.estimate(samples, 0, choice).sums
    return [sums.slope_GF, sums.curvature_GF, *sums.interactions.values()]


def test_one_whole_graph_gives_the_same_sums(make_scorer: Any, make_samples: Any) -> None:
    samples = make_samples(LENGTHS)
    plain, broken = (make_scorer("llama", FORMATS) for _ in range(2))
    broken.model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 1.0, *args[1:]), kwargs), with_kwargs=True
    )
    broken.scorer = Scorer(broken.scorer.spec, model=broken.model)
    assert not broken.scorer.is_layerwise
    (choice,) = random_choices(len(plain.plan.searched), 1)
    ours, theirs = (sums_of(make_evaluation(p, samples), samples, choice) for p in (broken, plain))
    for sums, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-6)


def test_sum_that_is_no_number_is_an_error(make_scorer: Any, make_samples: Any) -> None:
    prepared = make_scorer("llama", FORMATS)
    samples = make_samples(LENGTHS)
    maxima = prepared.scorer.calibrate(samples).maxima()
    broken = prepared.plan.searched[0].modules[0].name
    calibration = calibration_of_maxima(maxima | {(broken, "input_amax"): float("nan")})
    runner = make_evaluation(prepared, samples, calibration=calibration)
    with pytest.raises(NonFiniteError):
        runner.estimate(samples, 0, (2,) * len(prepared.plan.searched))


def test_little_room_gives_the_same_sums(make_scorer: Any, make_samples: Any) -> None:
    prepared = make_scorer("qwen3_moe", FORMATS)
    samples = make_samples(LENGTHS)
    (choice,) = random_choices(len(prepared.plan.searched), 1)
    wide, narrow = (
        sums_of(make_evaluation(prepared, samples, activation_bytes=room), samples, choice)
        for room in (2**30, 1)
    )
    for sums, expected in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(sums, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_equals_resident(
    dtype: str, model_folder: Any, make_scorer: Any, make_samples: Any
) -> None:
    prepared = make_scorer("llama", ("wint4_afp16:max", "wint8_aint8", "kv_fp8"))
    samples = make_samples(LENGTHS)
    spec = make_evaluation(prepared, samples).spec
    spec = dataclasses.replace(spec, model=find_model(str(model_folder("llama"))), dtype=dtype)
    is_cache = [group.modules[0].is_cache for group in prepared.plan.searched]
    choice = tuple(2 if cached else group % 3 % 2 for group, cached in enumerate(is_cache))
    results = [
        sums_of(dataclasses.replace(spec, placement=placement).build(), samples, choice)
        for placement in ("resident", "offload")
    ]
    for sums, expected in zip(*results, strict=True):
        assert sums.tobytes() == expected.tobytes()
