"""Offloaded layers: same scores, little memory, clear errors."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from autoquant_ray.distributed.scoring import ScoringSpec
from autoquant_ray.errors import ModelError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import ModelRef, find_model
from autoquant_ray.models.layers import decoder_layers
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.awq import best_alphas
from autoquant_ray.score.backward import LayerwiseBackward
from autoquant_ray.score.loading import load_placed
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.score.visits import Step

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8")


@pytest.fixture
def placed_spec(make_spec: Any) -> Any:
    """Spec of a model in a folder under a placement."""

    def build(
        folder: Path, placement: str, dtype: str, formats: tuple[str, ...] = FORMATS
    ) -> ScoringSpec:
        ref = find_model(str(folder))
        plan = build_plan(build_skeleton(ref), resolve_formats(formats, device="cpu"))
        return make_spec(
            plan,
            model=ref,
            placement=placement,
            dtype=dtype,
            step_tokens=64,
            labels="model",
            label_draws=2,
        )

    return build


def run(scorer: Scorer, samples: Any) -> Any:
    calibration = scorer.calibrate(samples)
    return calibration, scorer.score(samples, 0, calibration)


def test_search_and_scores_of_scaled_channels_offloaded_equal_resident(
    model_folder: Any, make_samples: Any, placed_spec: Any
) -> None:
    samples = make_samples([24, 17, 31])
    formats = ("NVFP4_AWQ_LITE_CFG", "INT8_SMOOTHQUANT_CFG")
    results = []
    for placement in ("resident", "offload"):
        scorer = Scorer(placed_spec(model_folder("llama"), placement, "bfloat16", formats))
        calibration = scorer.calibrate(samples, 0)
        losses = scorer.search(samples, calibration)
        calibration = calibration.with_alphas(best_alphas(losses))
        results.append((losses, scorer.score(samples, 0, calibration, 0).sums))
    (losses, sums), (offloaded_losses, offloaded_sums) = results
    assert offloaded_losses == losses
    assert losses
    assert np.array_equal(offloaded_sums.elementwise_GF, sums.elementwise_GF)


@pytest.fixture
def bfloat16_folder(make_model: Any, tmp_path: Path) -> Path:
    """A model whose files must be converted for float32: a visited layer is a copy."""
    make_model("qwen3_moe").bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "falcon"])
def test_scores_offloaded_equal_resident(
    model_folder: Any, make_samples: Any, family: str, dtype: str, placed_spec: Any
) -> None:
    samples = make_samples([24, 17, 31])
    resident = run(Scorer(placed_spec(model_folder(family), "resident", dtype)), samples)
    scorer = Scorer(placed_spec(model_folder(family), "offload", dtype))
    offloaded = run(scorer, samples)
    assert offloaded[0] == resident[0]
    assert offloaded[1].loss == resident[1].loss
    for name in ("elementwise_GF", "token_GF"):
        ours, theirs = getattr(offloaded[1].sums, name), getattr(resident[1].sums, name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        assert (theirs > 0).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_of_caches_offloaded_are_those_of_resident_to_the_byte(
    model_folder: Any, make_samples: Any, dtype: str, placed_spec: Any
) -> None:
    samples = make_samples([24, 17, 31])
    formats = ("wfp8_afp8", "kv_fp8", "kv_nvfp4")
    results = []
    for placement in ("resident", "offload"):
        spec = placed_spec(model_folder("qwen3"), placement, dtype, formats)
        calibration, scores = run(Scorer(spec), samples)
        caches = [m.group for m in spec.modules if m.planned.is_cache]
        results.append((calibration, scores.sums.elementwise_GF[caches]))
    assert results[0][0] == results[1][0]
    assert results[0][1].tobytes() == results[1][1].tobytes()
    assert (results[0][1][:, 1:] > 0).all()
    assert len(results[0][1]) == 2


def test_parameters_outside_visits_are_on_meta(
    model_folder: Any, make_samples: Any, placed_spec: Any
) -> None:
    scorer = Scorer(placed_spec(model_folder("qwen3_moe"), "offload", "float32"))
    run(scorer, make_samples([9]))
    layers = decoder_layers(scorer.model).values()
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    outside = set(scorer.model.parameters()) - inside
    assert inside
    assert all(parameter.is_meta for parameter in inside)
    assert outside
    assert not any(parameter.is_meta for parameter in outside)
    assert not any(buffer.is_meta for buffer in scorer.model.buffers())


def count_layers_alive(model: Any, alive: list[int]) -> None:
    """At every visit, append how many layers' weights have been seen and still exist."""
    seen: dict[Any, list[StorageWeakRef]] = {}

    def inside_visit(layer: Any) -> Any:
        def hook(_: torch.nn.Module, __: Any) -> None:
            storages = [parameter.untyped_storage() for parameter in layer.parameters()]
            seen[layer] = [StorageWeakRef(storage) for storage in storages]
            del storages
            alive.append(sum(any(not ref.expired() for ref in refs) for refs in seen.values()))

        return hook

    for layer in decoder_layers(model).values():
        layer.input_layernorm.register_forward_pre_hook(inside_visit(layer))


def load_counted(folder: Path) -> tuple[Any, Any, list[int]]:
    model, residence = load_placed(
        find_model(str(folder)), dtype="float32", device="cpu", placement="offload"
    )
    alive: list[int] = []
    count_layers_alive(model, alive)
    return model, residence, alive


def test_probe_and_passes_hold_one_visited_layer(bfloat16_folder: Path, make_samples: Any) -> None:
    model, residence, alive = load_counted(bfloat16_folder)
    backward = LayerwiseBackward(model, residence)
    assert backward.is_layerwise
    num_probed = len(alive)
    assert num_probed == 2 * (1 + 2 + 1)  # identity, layer by layer, one whole graph; two layers
    steps = [Step(torch.tensor([sample])) for sample in make_samples([9, 7, 8])]
    passes = backward.forward(steps, keep=True)
    ones = [torch.ones_like(backward.finish(pass_, with_graph=True)) for pass_ in passes]
    backward.backward(passes, [[gradient] for gradient in ones])
    assert len(alive) == num_probed + 2 * 2 * len(steps)
    assert set(alive) == {1}


def test_calibration_and_scoring_of_experts_hold_one_visited_layer(
    bfloat16_folder: Path, make_samples: Any, placed_spec: Any
) -> None:
    scorer = Scorer(placed_spec(bfloat16_folder, "offload", "float32"))
    alive: list[int] = []
    count_layers_alive(scorer.model, alive)
    run(scorer, make_samples([24, 17]))
    assert alive
    assert set(alive) == {1}


def test_whole_graph_that_saves_weights_holds_every_layer(
    bfloat16_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter of the test above sees what it should."""
    model, residence, alive = load_counted(bfloat16_folder)
    monkeypatch.setattr(residence, "saving_names", contextlib.nullcontext)
    LayerwiseBackward(model, residence)
    assert max(alive) == 2


def test_visit_after_another_was_read_ahead_gives_the_right_weights(model_folder: Any) -> None:
    ref = find_model(str(model_folder("llama")))
    model: Any
    model, residence = load_placed(ref, dtype="float32", device="cpu", placement="offload")
    resident: Any = load_placed(ref, dtype="float32", device="cpu", placement="resident")[0]
    for index, upcoming in [(0, 0), (0, 1), (0, 1), (1, None), (1, 0), (1, None)]:
        ours, theirs = model.model.layers[index], resident.model.layers[index]
        with residence.visit(index, upcoming):
            for name, parameter in theirs.named_parameters():
                assert torch.equal(ours.get_parameter(name), parameter)


def test_reading_thread_ends_with_the_engine(model_folder: Any, placed_spec: Any) -> None:
    before = set(threading.enumerate())
    scorer = Scorer(placed_spec(model_folder("llama"), "offload", "float32"))
    (reader,) = (t for t in set(threading.enumerate()) - before if t.name.startswith("read-ahead"))
    del scorer
    gc.collect()
    reader.join()


def test_converted_experts_leave_no_files_behind(
    model_folder: Any,
    make_samples: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    placed_spec: Any,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scorer = Scorer(placed_spec(model_folder("qwen3_moe"), "offload", "float32"))
    assert list(tmp_path.iterdir()) == []
    assert (run(scorer, make_samples([9]))[1].sums.elementwise_GF > 0).all()


def test_offload_gguf_is_refused(tmp_path: Path) -> None:
    ref = ModelRef(name="model.gguf", path=str(tmp_path), gguf_file="model.gguf")
    with pytest.raises(ModelError, match=r"model\.gguf is a GGUF file.*`placement` resident"):
        load_placed(ref, dtype="float32", device="cpu", placement="offload")


def test_offload_model_that_is_no_chain_is_refused(model_folder: Any, placed_spec: Any) -> None:
    with pytest.raises(ModelError, match=r"Gemma3n.* cannot be offloaded.*`placement` resident"):
        Scorer(placed_spec(model_folder("gemma3n"), "offload", "float32"))
