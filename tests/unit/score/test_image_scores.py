"""Scores of data with images: against ModelOpt, and against one ordinary graph of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from chats import with_processor, write_pairs
from modelopt_scores import Batch, modelopt_scores

from autoquant_ray.calibrate.maxima import ActivationMaxima
from autoquant_ray.data.chat_encoding import ConversationEncoder, Encoded
from autoquant_ray.data.conversations import Conversation, load_images
from autoquant_ray.data.samples import RichSample
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.data.texts import read_rows
from autoquant_ray.distributed.task import ShardTask
from autoquant_ray.errors import ModelError
from autoquant_ray.evaluate.flip_estimator import NUM_DRAWS
from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.models.tokenizer import TokenizerRef
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.calibration import Calibration, merge_calibrations
from autoquant_ray.quantize.modules import UNQUANTIZED
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.score.visits import make_step

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
PRESET = "INT8_WEIGHT_ONLY_CFG"


@pytest.fixture(scope="module")
def samples_of(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three answers about images of different sizes, by family."""
    data = write_pairs(tmp_path_factory.mktemp("pairs"), [(64, 48), (32, 32), (96, 64)])

    def read(family: str) -> list[RichSample]:
        folder = with_processor(model_folder(family), tmp_path_factory.mktemp(family))
        spec = DataSpec(source=str(data), num_samples=9, seq_len=99, loss_on="answer")
        encoder = ConversationEncoder(TokenizerRef(model=str(folder)), "answer")
        samples = []
        for row, _ in read_rows(spec):
            assert isinstance(row, Conversation)
            loaded = load_images(row)
            assert isinstance(loaded, Conversation)
            encoded = encoder.encode(loaded)
            assert isinstance(encoded, Encoded)
            samples.append(encoded.sample)
        return samples

    return read


@pytest.fixture(scope="module")
def full_scorer(make_model: Any, make_spec: Any) -> Any:
    """Build a scorer that scores the vision tower too."""

    def build(family: str, presets: tuple[str, ...], **changes: Any) -> tuple[Any, Scorer]:
        model = make_model(family)
        plan = build_plan(model, resolve_formats(presets, device="cpu"), coverage="full")
        return plan, Scorer(make_spec(plan, **changes), model=model)

    return build


def batch_of(samples: list[RichSample]) -> Batch:
    step = make_step(samples, torch.device("cpu"))
    in_loss = torch.zeros_like(step.ids_BS, dtype=torch.bool)
    for row, sample in enumerate(samples):
        in_loss[row, : len(sample)] = torch.from_numpy(sample.in_loss_T)
    return step.ids_BS, in_loss, {**step.inputs, "attention_mask": step.mask_BS}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_with_images_equal_modelopt(family: str, make_scorer: Any, samples_of: Any) -> None:
    formats = ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG")
    prepared = make_scorer(family, formats, is_modelopt_form=True)
    samples = samples_of(family)
    assert prepared.scorer.is_layerwise
    # ModelOpt's calibration sees padding, ours does not.
    shards = [[sample] for sample in samples]
    calibration = merge_calibrations(prepared.scorer.calibrate(shard) for shard in shards)
    ours = np.zeros((len(prepared.names), len(formats)))
    for shard in shards:
        scores = prepared.scorer.score(shard, 0, calibration)
        assert scores.num_tokens == 9  # eight words and the end of the turn
        ours += scores.sums.elementwise_GF / scores.num_tokens**2

    batches = [batch_of(shard) for shard in shards]
    for _, _, inputs in batches:
        inputs.pop("attention_mask")
    theirs = modelopt_scores(prepared.model, batches, formats)
    assert set(theirs) == set(prepared.names)
    for name, scores_F in zip(prepared.names, ours, strict=True):
        assert scores_F == pytest.approx(
            [theirs[name][format_] for format_ in formats], rel=1e-4
        ), name


def test_towers_channels_count_every_patch_once(full_scorer: Any, samples_of: Any) -> None:
    """The first step with images makes the tower run more often, for a check of the model."""
    _, scorer = full_scorer("qwen3_vl", ("INT4_AWQ_CFG",))
    samples = samples_of("qwen3_vl")
    num_patches = sum(len(sample.tensors["pixel_values"]) for sample in samples)
    name = "model.visual.blocks.0.attn.qkv"
    losses = []
    for _ in range(2):
        calibration = scorer.calibrate(samples)
        assert calibration.channels()[name, ""].num_tokens == num_patches
        losses.append(scorer.search(samples, calibration))
    assert losses[0] == losses[1]
    fresh = full_scorer("qwen3_vl", ("INT4_AWQ_CFG",))[1]
    assert fresh.search(samples, calibration) == losses[0]  # a worker that has calibrated nothing
    assert any(module == name for module, _, _ in losses[0])


def test_towers_roundings_are_those_of_a_worker_that_has_calibrated(
    full_scorer: Any, samples_of: Any
) -> None:
    """Where a scan goes on, or a worker is replaced, GPTQ's pass is the first to see images."""
    formats = ("wint4_g32_afp16:gptq",)
    (plan, used), (_, fresh) = (full_scorer("qwen3_vl", formats) for _ in range(2))
    shards = [
        ShardTask(shard=number, first_sample=number, samples=[sample])
        for number, sample in enumerate(samples_of("qwen3_vl"))
    ]
    calibration = Calibration(halves={shard.shard: shard.shard % 2 for shard in shards})
    used.calibrate(shards[0].samples)
    outside = len(plan.layer_weights)
    codes = [
        {
            key: weight.codes.whole.tobytes()
            for key, weight in scorer.fit([outside], calibration, shards)[outside].rounding.items()
        }
        for scorer in (used, fresh)
    ]
    assert any(module.startswith("model.visual.") for module, _, _ in codes[0])
    assert codes[0] == codes[1]


def whole_graph_sums(plan: Any, model: Any, batch: Batch) -> dict[str, float]:
    """Elementwise sums of int8 weights, per channel, from one graph of the whole model."""
    ids, in_loss, inputs = batch
    seen: dict[str, tuple[Any, Any]] = {}
    handles = []
    names = {module.name: group.name for group in plan.searched for module in group.modules}
    for name in names:

        def hook(_: Any, arguments: Any, output: Any, name: str = name) -> None:
            output.retain_grad()
            seen[name] = (arguments[0].detach(), output)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    embedding = model.get_input_embeddings()
    handles.append(
        embedding.register_forward_hook(lambda _, __, out: out.detach().requires_grad_(True))
    )
    pixels = inputs["pixel_values"].clone().requires_grad_(True)
    assert in_loss is not None
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False, **inputs | {"pixel_values": pixels}).logits
        targets = torch.where(in_loss[:, 1:].flatten(), ids[:, 1:].flatten(), -100)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum"
        )
        loss.backward()
    for handle in handles:
        handle.remove()
    sums: dict[str, float] = {}
    for name, (states, output) in seen.items():
        weight = model.get_submodule(name).weight
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        error = (weight / scale).round().clamp(-128, 127) * scale - weight
        difference = (states.double() @ error.double().T) * output.grad.double()
        sums[names[name]] = sums.get(names[name], 0.0) + float(difference.square().sum())
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_the_vision_tower_equal_one_whole_graph(
    family: str, full_scorer: Any, samples_of: Any
) -> None:
    plan, scorer = full_scorer(family, (PRESET,))
    samples = samples_of(family)
    names = [group.name for group in plan.searched]
    assert any("visual" in name for name in names)
    ours = scorer.score(samples, 0, Calibration()).sums.elementwise_GF[:, 0]

    theirs = whole_graph_sums(plan, scorer.model, batch_of(samples))
    assert set(theirs) == set(names)
    for name, value in zip(names, ours, strict=True):
        assert value == pytest.approx(theirs[name], rel=1e-4), name


def test_scores_of_the_vision_tower_ignore_how_steps_are_grouped(
    full_scorer: Any, samples_of: Any
) -> None:
    samples, presets = samples_of("qwen3_vl"), (PRESET, "INT8_DEFAULT_CFG")
    sums = []
    for room in (2**30, 0):
        _, scorer = full_scorer(
            "qwen3_vl",
            presets,
            labels="model",
            label_draws=2,
            step_tokens=30,
            activation_bytes=room,
        )
        calibration = scorer.calibrate(samples, 0)
        assert any(name.startswith("model.visual") for name in calibration.modules)
        sums.append(scorer.score(samples, 0, calibration, 0).sums)
    assert np.array_equal(sums[0].elementwise_GF, sums[1].elementwise_GF)
    assert (sums[0].elementwise_GF > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_with_images_ignore_what_is_kept_of_the_first_runs(
    family: str, full_scorer: Any, samples_of: Any
) -> None:
    samples, sums = samples_of(family), []
    for room in (0, 20_000, 2**30):
        _, scorer = full_scorer(family, ("INT8_DEFAULT_CFG",), step_tokens=30, graph_bytes=room)
        calibration = scorer.calibrate(samples, 0)
        assert min(room, 20_000) // 2 <= scorer.product_room.used_bytes <= room
        sums.append([scorer.score(samples, 0, calibration, 0).sums.token_GF for _ in range(2)])
    assert np.array_equal(sums[1], sums[0])
    assert np.array_equal(sums[2], sums[0])


def test_model_that_adds_after_its_last_layer_is_refused(
    make_model: Any, make_spec: Any, samples_of: Any
) -> None:
    model = make_model("qwen3_vl")
    del model.model.language_model.layers[1:]  # the tower's output now comes after the last layer
    plan = build_plan(model, resolve_formats((PRESET,), device="cpu"))
    scorer = Scorer(make_spec(plan), model=model)
    with pytest.raises(ModelError, match=r"cannot be scored with images.*give data without images"):
        scorer.score(samples_of("qwen3_vl"), 0, Calibration())


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_runs_the_vision_tower_quantized(
    family: str, full_scorer: Any, samples_of: Any
) -> None:
    plan, scorer = full_scorer(family, (PRESET,))
    fields = ("model", "dtype", "device", "num_threads", "modules", "formats")
    spec = EvaluationSpec(
        **{name: getattr(scorer.spec, name) for name in fields},
        calibration=Calibration(),
        step_tokens=10_000,
    )
    samples = samples_of(family)
    unquantized = tuple(UNQUANTIZED for _ in plan.searched)
    tower = tuple(
        0 if group.name.startswith("model.visual") else UNQUANTIZED for group in plan.searched
    )
    result = AllocationRunner(spec, model=scorer.model).evaluate(samples, [unquantized, tower])
    assert all(divergence.kl_N.max() < 1e-6 for divergence in result.divergences[0])

    ids, in_loss, inputs = batch_of(samples)
    assert in_loss is not None
    rows = in_loss[:, 1:].flatten()

    def log_probabilities() -> torch.Tensor:
        logits = scorer.model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1]
        return torch.log_softmax(logits.flatten(0, 1)[rows].double(), dim=-1)

    with torch.no_grad():
        p = log_probabilities()
        for group, format_ in zip(plan.searched, tower, strict=True):
            for module in group.modules if format_ == 0 else ():
                weight = scorer.model.get_submodule(module.name).weight
                scale = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_((weight / scale).round().clamp(-128, 127) * scale)
        expected = (p.exp() * (p - log_probabilities())).sum(dim=-1)
    measured = np.concatenate([divergence.kl_N for divergence in result.divergences[1]])
    assert measured == pytest.approx(expected.numpy(), rel=1e-2, abs=1e-6)
    assert measured.sum() > 1e-5


def test_mask_of_tokens_hides_no_patch_of_a_tower() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("visual", "layer")})
    linear: dict[str, Any] = {"kind": "linear", "parameters": ("weight",), "shapes": ((2, 2),)}
    modules = [
        ScoredModule(group=0, planned=PlannedModule(name=n, is_idle=n == "visual", **linear))
        for n in model
    ]
    maxima = ActivationMaxima(model, modules)
    with maxima.collecting():
        maxima.set_mask(torch.tensor([[1, 1, 0]]))
        for module in model.values():
            module(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))  # three tokens, or patches
    largest = {name: value for (name, _), value in maxima.calibration().maxima().items()}
    assert largest == {"visual": 3.0, "layer": 2.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_flips_reach_the_tower(family: str, full_scorer: Any, samples_of: Any) -> None:
    """Of the unquantized model, their curvatures are the scores."""
    plan, scorer = full_scorer(family, (PRESET,), labels="model", label_draws=NUM_DRAWS)
    samples = samples_of(family)
    fields = ("model", "dtype", "device", "num_threads", "modules", "formats")
    spec = EvaluationSpec(
        **{name: getattr(scorer.spec, name) for name in fields},
        calibration=Calibration(),
        step_tokens=10_000,
    )
    runner = AllocationRunner(spec, model=scorer.model)
    sums = runner.estimate(samples, 0, (UNQUANTIZED,) * len(plan.searched)).sums
    scores = scorer.score(samples, 0, Calibration()).sums.elementwise_GF / 2
    assert (scores[[group.name.startswith("model.visual") for group in plan.searched]] > 0).all()
    assert sums.curvature_GF[:, :-1] == pytest.approx(scores, rel=1e-3)
