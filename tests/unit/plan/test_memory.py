"""Placement without GPUs: what a worker needs, what ``auto`` takes, how a model is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pydantic
import pytest

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import stage_fingerprints
from autoquant_ray.distributed.placement import place_workers, require_resources
from autoquant_ray.errors import ClusterError, ModelError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.layers import decoder_layers
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan import memory
from autoquant_ray.plan.memory import (
    GIB,
    Footprint,
    KeptGraphs,
    choose_placement,
    footprint,
    held_tokens,
    kept_graphs,
    moment_bytes,
    rounding_bytes,
)
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.score.loading import offload_map, split_map
from autoquant_ray.score.scorer import Scorer

SEVENTY_GIB = Footprint(
    weight_bytes=70 * GIB, offloaded_bytes=4 * GIB, work_bytes=5 * GIB
)  # 76 with the process


def make_config(**changes: Any) -> ScanConfig:
    values = {"model": "m", "data": "d", "out": "o", "bits": 8, "dtype": "float32"}
    return ScanConfig(**(values | changes))


@pytest.mark.parametrize(
    ("device_gib", "num_gpus", "can_offload", "placement"),
    [
        (85, 1, True, "resident"),
        (84, 1, True, "offload"),
        (84, 0, True, "offload"),
        (84, 2, True, "split"),
        (85, 2, True, "resident"),
        (40, 2, True, "offload"),
        (43, 2, True, "split"),
        (40, 1, False, "resident"),
    ],
)
def test_auto_takes_what_fits(
    device_gib: int, num_gpus: int, can_offload: bool, placement: str
) -> None:
    chosen, reason = choose_placement(
        SEVENTY_GIB,
        device_bytes=device_gib * GIB,
        num_gpus=num_gpus,
        can_offload=can_offload,
    )
    assert chosen == placement
    where = "each GPU" if num_gpus else "the host"
    assert reason == f"resident needs 76.0 GiB, {where} has {device_gib}.0 GiB"


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_footprint_counts_the_weights(make_model: Any, family: str, dtype: str, size: int) -> None:
    model = make_model(family)
    plan = build_plan(model, resolve_formats(("wint8_aint8",), device="cpu"))
    memory = footprint(plan, make_config(dtype=dtype))
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    layers = [
        sum(parameter.numel() for parameter in layer.parameters())
        for layer in decoder_layers(model).values()
    ]
    assert len(layers) == 2
    assert memory.weight_bytes == num_weights * size
    # Two layers of two: nothing is left out, so nothing is saved.
    assert memory.offloaded_bytes == memory.weight_bytes


def test_footprint_of_many_layers_holds_two(make_model: Any) -> None:
    plan = build_plan(make_model("llama"), resolve_formats(("wint8_aint8",), device="cpu"))
    outside = footprint(plan, make_config()).weight_bytes - 4 * sum(plan.layer_weights)
    object.__setattr__(plan, "layer_weights", plan.layer_weights[:1] * 2)
    assert footprint(plan, make_config()).offloaded_bytes == outside + 8 * plan.layer_weights[0]


def test_offloaded_workers_are_placed_by_what_they_hold() -> None:
    resources = {"CPU": 64.0, "memory": 200.0 * GIB}
    sizes = {
        placement: place_workers(
            make_config(placement=placement),
            resources,
            device="cpu",
            worker_bytes=SEVENTY_GIB.worker_bytes(placement),
        ).num_workers
        for placement in ("resident", "offload")
    }
    assert sizes == {"resident": 2, "offload": 16}


def test_auto_grows_with_the_cluster_and_a_number_does_not() -> None:
    small, large = {"CPU": 2.0, "GPU": 2.0}, {"CPU": 64.0, "GPU": 6.0}
    placed = {
        workers: place_workers(
            make_config(workers=workers), small, device="cuda", worker_bytes=1
        ).at_most(5)
        for workers in ("auto", 2)
    }
    assert {workers: p.num_workers for workers, p in placed.items()} == {"auto": 2, 2: 2}
    assert {workers: p.max_workers for workers, p in placed.items()} == {"auto": 5, 2: 2}
    assert placed["auto"].room(large) == 6
    assert placed["auto"].room({"CPU": 4.0}) == 1


def test_split_without_gpus_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="`gpus_per_worker` 2 or more"):
        make_config(placement="split")
    with pytest.raises(pydantic.ValidationError, match="`device` that is not cpu"):
        make_config(placement="split", gpus_per_worker=2, device="cpu")
    config = make_config(placement="split", gpus_per_worker=2)
    on_cpu = config.model_copy(update={"device": "cpu"})
    with pytest.raises(ClusterError, match="split needs GPUs"):
        require_resources(on_cpu, {"CPU": 2.0})
    placed = place_workers(config, {"CPU": 8.0, "GPU": 4.0}, device="cuda", worker_bytes=1)
    assert (placed.num_workers, placed.gpus_per_worker) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "resources", "message"),
    [
        (
            {"device": "cuda"},
            {"CPU": 2.0},
            "1 worker(s) need 1 GPU, the cluster has 0; scan with `device` cpu, give the `address` "
            "of a cluster that has GPUs, or",
        ),
        (
            {"device": "cuda", "workers": 3},
            {"CPU": 4.0, "GPU": 2.0},
            "3 worker(s) need 3 GPU, the cluster has 2; lower `workers` or `gpus_per_worker`, or",
        ),
        (
            {"device": "cpu", "gpus_per_worker": 1},
            {"CPU": 4.0},
            "1 worker(s) need 1 GPU, the cluster has 0; leave out `gpus_per_worker`, or",
        ),
        (
            {"device": "cpu", "cpus_per_worker": 9},
            {"CPU": 4.0},
            "1 worker(s) need 9 CPU, the cluster has 4; lower `workers` or `cpus_per_worker`, or",
        ),
    ],
)
def test_cluster_that_has_too_little_is_refused_with_what_mends_it(
    changes: dict[str, Any], resources: dict[str, float], message: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        require_resources(make_config(**changes), resources)
    remedy = "wait for an autoscaler with `wait_for_workers`"
    assert str(caught.value) == f"{message} {remedy}"


def test_placement_is_part_of_the_scores_fingerprint() -> None:
    marks = [
        stage_fingerprints(make_config(placement=placement), model="m", data="d")
        for placement in ("resident", "offload")
    ]
    changed = {stage for stage in marks[0] if marks[0][stage] != marks[1][stage]}
    assert changed == {"calibrate", "score", "aggregate", "allocate"}


def test_offload_map_leaves_only_layers_on_disk(model_folder: Any) -> None:
    skeleton = build_skeleton(find_model(str(model_folder("qwen3_vl"))))
    names = list(decoder_layers(skeleton))
    places = offload_map(skeleton, names, 3)
    assert {name for name, place in places.items() if place == "disk"} == set(names)
    assert places["model.visual"] == places["lm_head"] == 3
    for name, _ in skeleton.named_parameters():
        assert any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_split_map_uses_every_gpu_and_keeps_layers_whole(
    make_model: Any, tmp_path: Path, family: str
) -> None:
    values = make_model(family).config.to_dict() | {"num_hidden_layers": 8, "layer_types": None}
    type(make_model(family).config)(**values).save_pretrained(tmp_path)
    skeleton = build_skeleton(find_model(str(tmp_path)))
    places = split_map(skeleton, {0: GIB, 1: GIB}, name=family)
    assert places["model.embed_tokens"] == 0
    gpus = [places[f"model.layers.{index}"] for index in range(8)]  # a layer is never cut
    assert gpus == sorted(gpus)
    assert set(gpus) == {0, 1}
    assert gpus.count(1) >= 3


def test_split_map_never_spills_to_the_host(model_folder: Any) -> None:
    skeleton = build_skeleton(find_model(str(model_folder("llama"))))
    with pytest.raises(ModelError, match=r"m does not fit 2 GPUs .*`gpus_per_worker`"):
        split_map(skeleton, {0: 50_000, 1: 50_000}, name="m")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_scores_with_the_hooks_of_a_split_model_are_the_same(
    make_model: Any, make_spec: Any, make_samples: Any, family: str
) -> None:
    """accelerate wraps every module's forward; ours are put around and inside of that."""
    results = []
    for is_hooked in (False, True):
        model = make_model(family)
        if is_hooked:
            names = [*split_map(model, {0: GIB, 1: GIB}, name=family)]
            accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), force_hooks=True)
            assert "forward" in vars(model.model.layers[0].self_attn.q_proj)
        plan = build_plan(model, resolve_formats(("wint4_afp16:max", "wint8_aint8"), device="cpu"))
        spec = make_spec(plan, step_tokens=64, labels="model")
        scorer = Scorer(spec, model=model)
        assert scorer.is_layerwise
        samples = make_samples([24, 17])
        calibration = scorer.calibrate(samples)
        results.append((calibration, scorer.score(samples, 0, calibration).sums))
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1].elementwise_GF, results[1][1].elementwise_GF)


def test_integers_need_room_for_codes_and_for_sums(make_model: Any) -> None:
    """A byte per weight and per input, and four per sum: of the widest input and output."""
    plan = build_plan(make_model("llama"), resolve_formats(("wint8_aint8",), device="cpu"))

    def work_bytes(difference_dtype: str | None, dtype: str = "float32") -> int:
        config = make_config(device="cpu", dtype=dtype, difference_dtype=difference_dtype)
        return footprint(plan, config).work_bytes

    tokens = make_config().step_tokens
    outside = sum(group.num_weights for group in plan.searched) - sum(plan.layer_weights)
    codes = plan.layer_weights[0] + max(0, outside)
    assert work_bytes("bfloat16") == work_bytes(None)
    added = work_bytes("int8+bfloat16") - work_bytes("bfloat16")
    assert added == codes + tokens * 160 + 4 * tokens * 256
    assert work_bytes("int8+bfloat16", "bfloat16") == work_bytes(None, "bfloat16")


def test_gptq_needs_room_for_second_moments(make_model: Any) -> None:
    """Of inputs of 64 channels, and the 160 of down_proj, in two halves; seven factors of each,
    and of the widest once more; seven matrices that these are made of; and three roundings, a byte
    per weight."""
    model = make_model("llama")
    plans = [
        build_plan(model, resolve_formats((name,), device="cpu"), disable=("lm_head",))
        for name in ("wint4_afp16:max", "wint4_afp16:gptq")
    ]
    plain, fitted = (footprint(plan, make_config()).work_bytes for plan in plans)
    linears = [
        module
        for layer in decoder_layers(model).values()
        for module in layer.modules()
        if hasattr(module, "in_features")
    ]
    squares = [linear.in_features**2 for linear in linears]
    assert max(squares) == 160**2
    codes = 3 * sum(linear.weight.numel() for linear in linears)
    assert fitted - plain == 4 * ((2 + 7) * sum(squares) + (7 + 7) * max(squares)) + codes


def test_gptq_needs_room_for_second_moments_of_every_expert(
    make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 experts in each of 2 layers, inputs of 64 and 48 channels; experts share no moments."""
    model = make_model("qwen3_moe")
    plans = [
        build_plan(model, resolve_formats((name,), device="cpu"), disable=("*attn*", "lm_head"))
        for name in ("wint8_afp16", "wint8_afp16:gptq")
    ]
    assert {group.modules[0].kind for group in plans[1].searched} == {"experts"}
    expert, widest = 2 * 4 * (64**2 + 48**2), 4 * 64**2

    def expected(num_experts: int) -> float:
        """Moments; seven factors of each input; of the widest, seven more, and seven matrices."""
        return num_experts * expert * (1 + 7 / 2) + (7 + 7) * widest

    assert moment_bytes(plans[0]) == 0
    assert moment_bytes(plans[1]) == expected(2 * 8)
    weights = 2 * 8 * 3 * 64 * 48
    plain, fitted = (footprint(plan, make_config()).work_bytes for plan in plans)
    assert fitted - plain == moment_bytes(plans[1]) + 3 * weights
    monkeypatch.setattr(memory, "MOMENT_BYTES", 3 * expert)
    assert moment_bytes(plans[1]) == expected(3)
    monkeypatch.setattr(memory, "MOMENT_BYTES", 1)
    assert moment_bytes(plans[1]) == expected(1)
    monkeypatch.setattr(memory, "RESULT_BYTES", 1)  # those of a layer are given back together
    assert rounding_bytes(plans[1]) == 3 * plans[1].layer_weights[0] > 3 * weights / 2


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_of_all_layers_take_what_the_plan_says(
    family: str, dtype: str, make_scorer: Any, make_samples: Any
) -> None:
    prepared = make_scorer(family, ("wint8_aint8",), graph_bytes=GIB)
    if dtype == "bfloat16":
        prepared.model.bfloat16()
    passes = prepared.scorer._forward(make_samples([24, 24]), [[0, 1]])
    prepared.model.float()
    config = make_config(dtype=dtype, samples=2, seq_len=24, step_tokens=48)
    graphs = kept_graphs(prepared.plan, config, footprint(prepared.plan, config))
    assert len(passes) == 1
    assert graphs.num_layers == 2
    used = prepared.scorer.product_room.used_bytes
    assert used <= graphs.all_bytes <= 1.1 * used


def test_graphs_that_auto_keeps_on_a_cpu_are_a_fifth_of_the_rest_where_nodes_have_room(
    make_model: Any,
) -> None:
    plan = build_plan(make_model("llama"), resolve_formats(("wint8_aint8",), device="cpu"))
    config = make_config(device="cpu", placement="resident", step_tokens=10**7)
    memory = footprint(plan, config)
    graphs = kept_graphs(plan, config, memory)
    needed = memory.worker_bytes("resident")
    assert graphs.nbytes == needed // 5
    count = 2 * graphs.nbytes // graphs.visit_bytes
    assert graphs.line().startswith(f"graphs of {count} of 2 layers are kept, ")
    assert graphs.line().endswith("(auto: a fifth of what a worker needs without)")
    assert graphs.within(needed) == graphs
    assert graphs.within(GIB // 8).nbytes == GIB // 8
    short = kept_graphs(plan, make_config(device="cpu", placement="resident"), memory)
    assert short.visit_bytes == short.all_bytes * 8 * 512 // held_tokens(plan, make_config())
    assert "of its node leave" in graphs.within(0).line()


def test_graphs_are_kept_as_asked_for_or_as_the_gpu_has_room(make_model: Any) -> None:
    plan = build_plan(make_model("llama"), resolve_formats(("wint8_aint8",), device="cpu"))

    def graphs(**changes: Any) -> KeptGraphs:
        config = make_config(placement="resident", **changes)
        return kept_graphs(plan, config, footprint(plan, config))

    assert graphs(device="cpu", keep_graphs=0).line().startswith("graphs of 0 of 2 layers")
    everything = graphs(device="cpu", keep_graphs="3GiB")
    assert everything.nbytes == 3 * GIB
    assert everything.counted_bytes == everything.all_bytes < GIB
    assert everything.line().startswith("graphs of 2 of 2 layers")
    assert graphs(device="cuda").nbytes is None
    assert "free memory" in graphs(device="cuda").line()
    assert graphs(device="cuda", gpus_per_worker=0.5).nbytes == 0


def test_keep_graphs_changes_no_fingerprint() -> None:
    marks = [
        stage_fingerprints(make_config(keep_graphs=kept), model="m", data="d")
        for kept in ("auto", 0, "2")
    ]
    assert marks[0] == marks[1] == marks[2]


def test_keep_graphs_that_is_no_size_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="neither 'auto' nor a number of GiB"):
        make_config(keep_graphs="many")
