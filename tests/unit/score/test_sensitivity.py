"""The scoring core against definitions: batching, padding, labels, row selection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from autoquant_ray.errors import NonFiniteError
from autoquant_ray.quantize.calibration import Calibration, merge_calibrations
from autoquant_ray.score import scorer as scorer_module
from autoquant_ray.score.drawing.rows import live_rows
from autoquant_ray.score.loss import sample_labels

FAMILIES = ["llama", "qwen3", "qwen3_moe", "qwen3_vl"]
FORMATS = (
    "wint4_afp16:max",
    "wfp8_afp8",
    "wint8_aint8",
    "wint8_aint4",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
)
LENGTHS = [24, 7, 31, 12, 18, 24, 9, 15]


def total(prepared: Any, shards: list[Any], calibration: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Elementwise sums, token sums and token count over shards."""
    elementwise, token, count, first = 0.0, 0.0, 0, 0
    for shard in shards:
        scores = prepared.scorer.score(shard, first, calibration)
        elementwise = elementwise + scores.sums.elementwise_GF
        token = token + scores.sums.token_GF
        count += scores.num_tokens
        first += len(shard)
    return np.asarray(elementwise), np.asarray(token), count


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_any_batching_are_the_same(family: str, make_scorer: Any, make_samples: Any) -> None:
    samples = make_samples(LENGTHS)
    whole = make_scorer(family, FORMATS)
    single = make_scorer(family, FORMATS, step_tokens=2)
    calibration = whole.scorer.calibrate(samples)
    expected = total(whole, [samples], calibration)
    assert expected[2] == sum(LENGTHS) - len(LENGTHS)
    for prepared, shards in (
        (single, [samples]),
        (whole, [[sample] for sample in samples]),
        (whole, [samples[:1], samples[1:6], samples[6:]]),
    ):
        elementwise, token, count = total(prepared, shards, calibration)
        assert count == expected[2]
        np.testing.assert_allclose(elementwise, expected[0], rtol=1e-5)
        np.testing.assert_allclose(token, expected[1], rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_maxima_padded_batch_ignores_padding(
    family: str, make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples(LENGTHS)
    prepared = make_scorer(family, FORMATS)
    padded = prepared.scorer.calibrate(samples).maxima()
    shards = [prepared.scorer.calibrate([sample]) for sample in samples]
    alone = merge_calibrations(shards).maxima()
    assert set(padded) == set(alone)
    for key, value in alone.items():
        assert padded[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.mlp.down_proj"),
        ("falcon", "transformer.h.0.mlp.dense_4h_to_h"),
        ("gemma3n", "model.layers.1.self_attn.o_proj"),
        ("gemma3n", "model.layers.0.mlp.down_proj"),
        ("gemma3n", "model.per_layer_model_projection"),
    ],
)
def test_sums_linear_equal_their_definition(
    family: str, name: str, make_scorer: Any, make_samples: Any
) -> None:
    """Gradient by plain autograd, output difference by ModelOpt's quantized module itself."""
    import copy

    import modelopt.torch.quantization as mtq

    prepared = make_scorer(family, ("wint8_aint8",))
    samples = make_samples([20])
    calibration = prepared.scorer.calibrate(samples)
    scores = prepared.scorer.score(samples, 0, calibration)
    ids = torch.tensor(samples)

    model = copy.deepcopy(prepared.model)
    kept: dict[str, torch.Tensor] = {}

    def keep(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output.retain_grad()
        kept.update(input=inputs[0].detach(), output=output)
        return output.clone()  # what the model does to it in place stays out

    model.get_submodule(name).register_forward_hook(keep)
    model.get_input_embeddings().weight.requires_grad_(True)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    layer = torch.nn.Linear(1, 1, bias=False)
    original = prepared.model.get_submodule(name)
    layer.weight, layer.bias = original.weight, original.bias
    layer = torch.nn.Sequential(copy.deepcopy(layer))
    quantized = mtq.quantize(layer, mtq.INT8_DEFAULT_CFG, lambda m: m(kept["input"]))
    difference = quantized(kept["input"]).detach() - kept["output"].detach()
    product = (kept["output"].grad * difference)[0].double()

    group = prepared.names.index(name)
    assert scores.sums.elementwise_GF[group, 0] == pytest.approx(
        float(product.square().sum()), rel=1e-4
    )
    assert scores.sums.token_GF[group, 0] == pytest.approx(
        float(product.sum(1).square().sum()), rel=1e-3
    )


def test_sums_many_draws_average_single_draws(
    make_scorer: Any, make_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K draws over one forward pass are the mean of K passes that use each draw alone."""
    samples = make_samples([16, 16])
    several = make_scorer("qwen3", FORMATS, labels="model", label_draws=3)
    calibration = several.scorer.calibrate(samples)
    together = several.scorer.score(samples, 0, calibration).sums.elementwise_GF

    single = make_scorer("qwen3", FORMATS, labels="model", label_draws=1)
    apart = []
    for draw in range(3):
        with monkeypatch.context() as patched:
            original = scorer_module.draw_uniforms
            patched.setattr(
                scorer_module,
                "draw_uniforms",
                lambda s, p, _, n, d=draw, f=original: f(s, p, 3, n)[d : d + 1],
            )
            apart.append(single.scorer.score(samples, 0, calibration).sums.elementwise_GF)
    np.testing.assert_allclose(together, np.mean(apart, axis=0), rtol=1e-5)


def test_sums_seed_changes_draws_and_same_seed_repeats(make_scorer: Any, make_samples: Any) -> None:
    samples = make_samples([16])
    results = []
    for seed in (0, 0, 1):
        prepared = make_scorer("llama", ("wint4_afp16:max",), labels="model", seed=seed)
        results.append(prepared.scorer.score(samples, 0, Calibration()).sums.elementwise_GF)
    assert np.array_equal(results[0], results[1])
    assert not np.allclose(results[0], results[2])


def test_sample_labels_invert_the_cumulative_distribution() -> None:
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0)) * 3
    uniforms = np.random.default_rng(1).random((2, 2000))
    labels = sample_labels(logits.softmax(-1), torch.from_numpy(uniforms))
    cumulative = np.cumsum(torch.softmax(logits.double(), dim=-1).numpy(), axis=-1)
    for draw in range(2):
        expected = [
            np.searchsorted(row, u, side="right")
            for row, u in zip(cumulative, uniforms[draw], strict=True)
        ]
        assert np.mean(labels[draw].numpy() == np.array(expected)) > 0.999


def test_score_nan_gradient_is_an_error(make_scorer: Any, make_samples: Any) -> None:
    prepared = make_scorer("llama", ("wint8_afp16",))
    model = prepared.model
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"is nan; look for NaN .* \(`dtype` float32\)"):
        prepared.scorer.score(make_samples([8]), 0, Calibration())


def test_model_without_a_plain_chain_gives_the_same_sums(
    make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples([12, 20])
    plain = make_scorer("llama", FORMATS)
    calibration = plain.scorer.calibrate(samples)
    expected = total(plain, [samples], calibration)

    broken = make_scorer("llama", FORMATS)
    broken.model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 1.0, *args[1:]), kwargs), with_kwargs=True
    )
    broken.scorer = scorer_module.Scorer(broken.scorer.spec, model=broken.model)
    assert plain.scorer.is_layerwise
    assert not broken.scorer.is_layerwise
    elementwise, token, _ = total(broken, [samples], calibration)
    np.testing.assert_allclose(elementwise, expected[0], rtol=1e-5)
    np.testing.assert_allclose(token, expected[1], rtol=1e-5)


@pytest.mark.parametrize(("family", "layerwise"), [("falcon", True), ("gemma3n", False)])
def test_layers_are_visited_alone_only_where_gradients_agree(
    family: str, layerwise: bool, make_scorer: Any
) -> None:
    assert make_scorer(family).scorer.is_layerwise is layerwise


def test_sample_labels_number_that_rounds_to_one_gives_no_impossible_label() -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 3:5] = 0.0
    uniforms = torch.tensor([[1 - 2.0**-40]], dtype=torch.float64)
    assert sample_labels(logits.softmax(-1), uniforms).item() == 4


def test_sums_bfloat16_stay_near_float32(
    make_model: Any, make_scorer: Any, make_samples: Any
) -> None:
    """The same rounded weights and the same labels, computed in both types."""
    samples = make_samples([60, 60])
    formats = ("wint4_afp16:max", "wint8_afp16", "wint8_aint8", "wfp8_afp8")
    prepared = make_scorer("llama", formats)
    prepared.model.to(torch.bfloat16)
    half = scorer_module.Scorer(prepared.scorer.spec, model=prepared.model)
    calibration = half.calibrate(samples)
    rounded = half.score(samples, 0, calibration).sums.elementwise_GF
    prepared.model.to(torch.float32)
    single = scorer_module.Scorer(prepared.scorer.spec, model=prepared.model)
    exact = single.score(samples, 0, calibration).sums.elementwise_GF
    ratios = rounded / exact
    weight_only = [formats.index("wint4_afp16:max"), formats.index("wint8_afp16")]
    np.testing.assert_allclose(ratios[:, weight_only], 1, atol=0.02)
    np.testing.assert_allclose(ratios, 1, atol=0.15)
    assert np.median(ratios) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sums_layer_inputs_kept_from_calibration_change_no_bit(
    family: str, make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples(LENGTHS)
    prepared = make_scorer(family, FORMATS, step_tokens=60)
    calibration = prepared.scorer.calibrate(samples, shard=5)
    kept = prepared.scorer.score(samples, 0, calibration, shard=5)
    fresh = prepared.scorer.score(samples, 0, calibration, shard=5)
    assert np.array_equal(kept.sums.elementwise_GF, fresh.sums.elementwise_GF)
    assert np.array_equal(kept.sums.token_GF, fresh.sums.token_GF)
    assert kept.loss == fresh.loss


def test_layer_inputs_are_kept_only_where_there_is_room(
    make_scorer: Any, make_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model runs forward again for the shard that was not kept, and only for it."""
    samples = make_samples([16, 16])
    prepared = make_scorer("llama", FORMATS)
    hidden = prepared.model.config.hidden_size * prepared.model.config.num_hidden_layers * 4
    room_for_one = 2 * (32 * hidden)
    prepared = make_scorer("llama", FORMATS, activation_bytes=room_for_one)
    calibration = Calibration()
    for shard in (0, 1):
        calibration = prepared.scorer.calibrate(samples, shard=shard)
    ran: list[int] = []
    original = prepared.scorer._forward
    monkeypatch.setattr(prepared.scorer, "_forward", lambda *a: ran.append(1) or original(*a))
    prepared.scorer.score(samples, 0, calibration, shard=0)
    assert not ran
    prepared.scorer.score(samples, 0, calibration, shard=1)
    assert ran


@pytest.mark.parametrize("limit", [0, 20_000, 10**9])
def test_sums_weight_cache_of_any_size_changes_no_bit(
    limit: int, make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples([24, 31])
    results = []
    for cached in (limit, None):
        prepared = make_scorer(
            "qwen3_moe", FORMATS, weight_cache_bytes=cached, step_tokens=24, activation_bytes=2**20
        )
        calibration = prepared.scorer.calibrate(samples)
        results.append(prepared.scorer.score(samples, 0, calibration).sums.elementwise_GF)
    assert np.array_equal(*results)


def test_live_rows_finds_a_gradient_in_any_column_and_any_draw() -> None:
    gradients = [torch.zeros(60, 40) for _ in range(2)]
    gradients[0][:57, 0] = 1.0
    gradients[1][58, 39] = -1e-30
    gradients[1][59, 20] = torch.nan
    chosen = live_rows(gradients)
    assert chosen.num_live == 59
    assert chosen.indices is None  # one dead row is not worth a copy of the others
    assert chosen.dead_T is not None
    assert chosen.dead_T.nonzero()[:, 0].tolist() == [57]


def test_live_rows_selects_where_many_are_dead() -> None:
    gradient = torch.zeros(60, 40)
    gradient[[3, 30], 39] = 1.0
    chosen = live_rows([gradient])
    assert chosen.indices is not None
    assert chosen.indices.tolist() == [3, 30]
    assert chosen.dead_T is None
