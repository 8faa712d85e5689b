"""Products kept from a layer's first run for its second: fewer products, the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.layers import decoder_layers
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.score.rerun.kept_products import ProductKeeper, ProductRoom, giving
from autoquant_ray.score.scorer import Scorer

FORMATS = ("wint4_afp16:max", "wint8_aint8", "kv_fp8")
LENGTHS = [24, 7, 31, 12, 18]
ROOMS = (0, 40_000, 2**30)
"""Bytes: none, a part of what the models below have, all of it."""


def scores(scorer: Scorer, samples: Any) -> tuple[bytes, ...]:
    """Every number of a shard whose layer inputs calibration kept, and of it run again."""
    calibration = scorer.calibrate(samples, 3)
    parts = [scorer.score(samples, 0, calibration, 3) for _ in range(2)]
    arrays = [(part.sums.elementwise_GF, part.sums.token_GF) for part in parts]
    assert (arrays[0][0] > 0).any()
    tokens = [repr(part.sums.expert_tokens).encode() for part in parts]
    return (*tokens, *(array.tobytes() for pair in arrays for array in pair))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "falcon"])
@pytest.mark.parametrize("placement", ["resident", "offload"])
def test_scores_whatever_is_kept_are_the_same_bytes(
    family: str, dtype: str, placement: str, model_folder: Any, make_spec: Any, make_samples: Any
) -> None:
    ref, samples = find_model(str(model_folder(family))), make_samples(LENGTHS)
    formats = FORMATS[: 2 if family == "falcon" else 3]
    plan = build_plan(build_skeleton(ref), resolve_formats(formats, device="cpu"))
    results = {
        room: scores(
            Scorer(
                make_spec(
                    plan,
                    model=ref,
                    dtype=dtype,
                    placement=placement,
                    step_tokens=64,
                    labels="model",
                    label_draws=2,
                    graph_bytes=room,
                )
            ),
            samples,
        )
        for room in ROOMS
    }
    assert results[ROOMS[1]] == results[0]
    assert results[ROOMS[2]] == results[0]


def test_drawn_rows_whatever_is_kept_are_the_same_bytes(
    make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples(LENGTHS)
    results = [
        scores(
            make_scorer("qwen3_moe", FORMATS, row_share=0.4, graph_bytes=room).scorer,
            samples,
        )
        for room in ROOMS
    ]
    assert results[0] == results[1] == results[2]


def test_experts_that_run_again_to_be_watched_leave_no_product_behind(
    make_model: Any, make_spec: Any, make_samples: Any
) -> None:
    """Alone, an expert has its tokens in their order; in its module, by the place of its route."""
    model, samples = make_model("qwen3_moe"), make_samples([24, 24, 24])
    formats = resolve_formats(("wint4_afp16:max", "wint4_g32_afp16:weighted"), device="cpu")
    plan = build_plan(model, formats, expert_groups="expert")
    results = []
    for room in ROOMS:
        spec = make_spec(plan, labels="model", step_tokens=48, graph_bytes=room)
        results.append(scores(Scorer(spec, model=model), samples))
    assert results[0] == results[1] == results[2]


class FlopCounter(TorchDispatchMode):
    """Adds up floating-point operations by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations of the products of a run."""
    with FlopCounter() as counter:
        run()
    return counter.total


def flops_of_layers(model: Any, samples: list[list[int]]) -> int:
    """Of one forward pass, without the angles of the positions, which no layer computes."""
    ids = torch.tensor(samples)
    states, places = model.get_input_embeddings()(ids), torch.arange(ids.shape[1])[None]
    outside = flops_of(lambda: model.model.rotary_emb(states, places))
    return flops_of(lambda: model.model(input_ids=ids, use_cache=False)) - outside


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_products_of_the_layers_are_computed_once_where_all_are_kept_and_twice_where_none_is(
    family: str, make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples([24, 24])
    counts = {}
    for room in ROOMS:
        scorer = make_scorer(family, FORMATS[:1], graph_bytes=room).scorer
        calibration = scorer.calibrate(samples)
        counts[room] = flops_of(lambda s=scorer, c=calibration: s.score(samples, 0, c))
    once = flops_of_layers(make_scorer(family, FORMATS[:1]).model, samples)
    assert counts[0] - counts[ROOMS[2]] == once
    assert 0 < counts[0] - counts[ROOMS[1]] < once


def test_products_kept_by_calibration_spare_the_shard_those_of_its_second_run(
    make_scorer: Any, make_samples: Any
) -> None:
    samples, counts = make_samples([24, 24]), []
    for room in (0, 2**30):
        scorer = make_scorer("llama", FORMATS[:1], graph_bytes=room).scorer
        calibration = scorer.calibrate(samples, 0)
        counts.append(flops_of(lambda s=scorer, c=calibration: s.score(samples, 0, c, 0)))
    assert counts[0] - counts[1] == flops_of_layers(scorer.model, samples)


def test_kept_results_stay_within_the_room_and_go_when_they_are_used(
    make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples([24, 24])
    scorer = make_scorer("llama", FORMATS, graph_bytes=ROOMS[1]).scorer
    layer, used = decoder_layers(scorer.model)["model.layers.1"], []
    hook = layer.register_forward_hook(lambda *_: used.append(scorer.product_room.used_bytes))
    calibration = scorer.calibrate(samples, 0)
    scorer.calibrate(samples, 1)
    for shard in (0, 2, 1):
        scorer.score(samples, 0, calibration, shard)
        used.append(scorer.product_room.used_bytes)
    hook.remove()
    assert max(used) <= ROOMS[1]
    assert max(used) > ROOMS[1] // 2
    assert used[-1] == 0


def test_shard_that_is_tried_sample_by_sample_lets_go_of_what_was_kept(
    make_scorer: Any, make_samples: Any
) -> None:
    samples = make_samples([24, 24])
    scorer = make_scorer("llama", FORMATS[:1], row_share="auto", graph_bytes=2**30).scorer
    calibration = scorer.calibrate(samples, 0)
    assert scorer.product_room.used_bytes > 0
    assert scorer.score(samples, 0, calibration, 0).trial is not None
    assert scorer.product_room.used_bytes == 0


def test_room_for_few_goes_to_the_results_with_most_work_per_byte() -> None:
    states, wide, narrow = torch.ones(4, 64), torch.ones(64, 8), torch.ones(8, 8)
    room = ProductRoom(nbytes=4 * 8 * 4)
    recording = ProductKeeper(room).recording()
    with recording:
        first = states @ wide
        first @ narrow
    assert room.used_bytes == room.nbytes
    with FlopCounter() as counter, giving(recording.products):
        second = states @ wide
        second @ narrow
    assert torch.equal(first, second)
    assert counter.total == 2 * 4 * 8 * 8
    assert room.used_bytes == 0


def test_result_that_is_changed_in_place_is_computed_again() -> None:
    states, weight = torch.ones(1, 4, 6), torch.ones(5, 6)
    room = ProductRoom(nbytes=2**20)
    recording = ProductKeeper(room).recording()
    with recording:
        torch.nn.functional.linear(states, weight).add_(1)
    assert room.used_bytes == 0
    with giving(recording.products):
        assert torch.equal(torch.nn.functional.linear(states, weight), torch.full((1, 4, 5), 6.0))


def test_calls_that_differ_from_the_first_run_are_computed() -> None:
    room = ProductRoom(nbytes=2**20)
    recording = ProductKeeper(room).recording()
    with recording:
        torch.ones(3, 6) @ torch.ones(6, 5)
        torch.ones(3, 6) @ torch.ones(6, 5)
    with giving(recording.products):
        given = torch.full((2, 6), 2.0) @ torch.ones(6, 5)
        after = torch.full((3, 6), 2.0) @ torch.ones(6, 5)
    assert torch.equal(given, torch.full((2, 5), 12.0))
    assert torch.equal(after, torch.full((3, 5), 12.0))
    assert room.used_bytes == 0


def test_results_of_a_run_that_fails_are_let_go() -> None:
    room = ProductRoom(nbytes=2**20)
    recording = ProductKeeper(room).recording()
    with recording:
        torch.ones(3, 6) @ torch.ones(6, 5)
    with pytest.raises(ValueError, match="stop"), giving(recording.products):
        raise ValueError("stop")
    assert room.used_bytes == 0


@pytest.mark.parametrize("kind", ["efficient", "cudnn"])
def test_attention_of_a_gpu_is_kept_with_the_sums_that_its_gradient_needs(kind: str) -> None:
    attend = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention").default
    room = ProductRoom(nbytes=2**20)
    with FakeTensorMode():
        states = torch.empty(1, 2, 32, 8, device="cuda", dtype=torch.float16)
        record = ProductKeeper(room).recording()
        with record:
            first = attend(states, states, states, None, False)
        with giving(record.products):
            second = attend(states, states, states, None, True)
    assert first[0] is second[0]
    assert second[1].numel() > 0
