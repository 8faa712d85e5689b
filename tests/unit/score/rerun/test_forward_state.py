"""No sample depends on what the same model ran before it, or runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from chats import made
from evaluations import make_evaluation, random_choices
from small_models import DECODER, random_samples, small_config

from autoquant_ray.models.context import plain_context
from autoquant_ray.quantize.awq import best_alphas
from autoquant_ray.score.rerun.forward_state import ForwardState
from autoquant_ray.score.visits import VisitPacker

FORMATS = ("NVFP4_AWQ_LITE_CFG", "wfp8_afp8", "wint4_g32_afp16:gptq")
CONTEXT = 16
LONGER, SHORTER = [40, 40, 33], [28, 21, 12, 9, 21]
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": CONTEXT,
}


def rope_config(family: str) -> Any:
    """Config of a model whose frequencies change with the context."""
    if family == "llama":
        fields = DECODER | {"max_position_embeddings": CONTEXT, "rope_parameters": DYNAMIC}
        return transformers.LlamaConfig(**fields)
    if family == "gemma3":  # a rope for each type of layer
        ropes = {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC | {"factor": 2.0}}
        return transformers.Gemma3TextConfig(
            **(DECODER | {"max_position_embeddings": CONTEXT, "rope_parameters": ropes}),
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
        )
    assert family == "phi3"
    return transformers.Phi3Config(
        **DECODER, original_max_position_embeddings=CONTEXT, rope_parameters=LONGROPE
    )


@pytest.fixture
def make_worker(make_scorer: Any) -> Any:
    """A fresh scorer on a fresh model, and a calibration by another one."""

    def prepare(family: str) -> Any:
        torch.manual_seed(0)
        auto = transformers.AutoModelForCausalLM
        model = auto.from_config(rope_config(family), dtype=torch.float32)
        return make_scorer(model.eval().requires_grad_(False), FORMATS, labels="model")

    def build(family: str) -> SimpleNamespace:
        samples = random_samples([CONTEXT] * 3)
        calibrating, prepared = prepare(family).scorer, prepare(family)
        calibration = calibrating.calibrate(samples)
        alphas = best_alphas(calibrating.search(samples, calibration))
        calibration = replace(calibration.with_alphas(alphas), halves={0: 0, 1: 1})
        runner = make_evaluation(prepared, samples, calibration=calibration, step_tokens=1000)
        (choice,) = random_choices(len(prepared.names), 1)
        return SimpleNamespace(
            scorer=prepared.scorer, calibration=calibration, runner=runner, choice=choice
        )

    return build


def calibrate(worker: Any, samples: Any) -> Any:
    calibration = worker.scorer.calibrate(samples)
    channels = {name: vars(seen) for name, seen in calibration.channels().items()}
    return calibration.maxima(), channels


def search(worker: Any, samples: Any) -> Any:
    return worker.scorer.search(samples, worker.calibration)


def fit(worker: Any, samples: Any) -> Any:
    shards = [SimpleNamespace(shard=n, samples=samples[n::2]) for n in range(2)]
    fits = worker.scorer.fit([0, 1], worker.calibration, shards)
    fitted = {key: weight for layer in fits.values() for key, weight in layer.rounding.items()}
    return {key: vars(weight.codes) for key, weight in fitted.items() if weight.codes is not None}


def score(worker: Any, samples: Any) -> Any:
    scores = worker.scorer.score(samples, 0, worker.calibration)
    return scores.loss, scores.sums.elementwise_GF, scores.sums.token_GF


def evaluate(worker: Any, samples: Any) -> Any:
    result = worker.runner.evaluate(samples, [worker.choice])
    return result.reference, [sample.kl_N for sample in result.divergences[0]]


def estimate(worker: Any, samples: Any) -> Any:
    flips = worker.runner.estimate(samples, 0, worker.choice)
    return flips.kl, flips.sums.slope_GF, flips.sums.curvature_GF


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "action",
    [calibrate, search, fit, score, evaluate, estimate],
    ids=lambda action: action.__name__,
)
def test_shard_after_a_longer_shard_gives_the_same_bytes_as_alone(
    family: str, action: Callable[[Any, Any], Any], make_worker: Any
) -> None:
    longer, shorter = random_samples(LONGER, seed=1), random_samples(SHORTER, seed=2)
    alone = action(make_worker(family), shorter)
    worker = make_worker(family)
    action(worker, longer)
    np.testing.assert_equal(action(worker, shorter), alone)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_sample_beside_a_longer_sample_is_answered_as_alone(family: str, make_worker: Any) -> None:
    samples = random_samples([30, 40, 21, 12])
    worker = make_worker(family)
    loss, *sums = score(worker, samples)
    each = [worker.scorer.score([s], n, worker.calibration) for n, s in enumerate(samples)]
    assert loss == pytest.approx(sum(scores.loss for scores in each), rel=1e-6)
    of_each = [[s.sums.elementwise_GF, s.sums.token_GF] for s in each]
    for together, parts in zip(sums, zip(*of_each, strict=True), strict=True):
        np.testing.assert_allclose(together, np.sum(parts, axis=0), rtol=1e-4)
    references, divergences = evaluate(worker, samples)
    for sample, reference_N, kl_N in zip(samples, references, divergences, strict=True):
        (reference_alone_N,), (kl_alone_N,) = evaluate(worker, [sample])
        np.testing.assert_allclose(reference_N, reference_alone_N, rtol=1e-5)
        np.testing.assert_allclose(kl_N, kl_alone_N, rtol=1e-4, atol=1e-6)


def test_only_a_rope_that_goes_by_length_bounds_a_context() -> None:
    bounds = {family: plain_context(rope_config(family)) for family in ("llama", "gemma3", "phi3")}
    assert bounds == {"llama": CONTEXT, "gemma3": CONTEXT, "phi3": CONTEXT}
    assert plain_context(small_config("llama")) is None
    assert plain_context(small_config("qwen3_vl")) is None


def test_samples_longer_than_the_context_share_steps_with_their_equals() -> None:
    chat = made(20, [2], images=1).sample
    samples: list[Any] = [*random_samples([20, 9, 20, 16, 24]), chat, chat]
    packer = VisitPacker(1000, 1, 0, joint_context=CONTEXT)
    steps = [step for visit in packer.visits(samples) for step in visit]
    assert sorted(map(sorted, steps)) == [[0, 2], [1, 3], [4], [5], [6]]


class Counting(torch.nn.Module):
    """Keeps something of every kind between its runs, and prepares itself in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2,), 8.0), requires_grad=False)
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("last", torch.zeros(2), persistent=False)
        self.is_prepared = False
        self.longest: Any = 0
        self.lengths: list[int] = []
        self.by_length: dict[int, torch.Tensor] = {}

    def forward(self, states_S: torch.Tensor) -> torch.Tensor:
        if not self.is_prepared:
            self.weight.div_(2)
            self.is_prepared = True
        self.total += states_S.sum()
        self.register_buffer("last", states_S.sum() * torch.ones(2), persistent=False)
        self.longest = max(self.longest, len(states_S))
        self.lengths.append(len(states_S))
        self.by_length[len(states_S)] = states_S
        self.seen_now = states_S
        scale = self.longest * len(self.lengths)
        return self.weight * self.total * scale + self.last * states_S.sum(dim=0)


def test_whatever_a_run_leaves_is_undone_but_what_the_first_prepares() -> None:
    base = torch.nn.Sequential(Counting())
    state = ForwardState(base, [])
    with state.first_run(base):
        base(torch.ones(2))
    (module,) = base
    names, total = set(vars(module)), module.get_buffer("total").clone()
    results = []
    for length in (3, 9, 3):
        with state.undone(base):
            results.append(base(torch.ones(length)))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    assert module.weight.tolist() == [4.0, 4.0]
    assert set(vars(module)) == names
    assert torch.equal(module.get_buffer("total"), total)
    assert (module.is_prepared, module.longest, module.lengths) == (True, 2, [2])
    assert list(module.by_length) == [2]


def test_state_is_undone_when_a_run_fails() -> None:
    base = torch.nn.Sequential(Counting())
    state = ForwardState(base, [])
    (module,) = base
    with pytest.raises(RuntimeError), state.undone(base):
        base(torch.ones(5, 3))  # lengths that do not fit
    assert (module.longest, module.lengths, module.is_prepared) == (0, [], False)
