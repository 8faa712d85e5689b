"""All steps of a scorer on a CUDA device that is none: nothing of them may be left on the CPU, and
the host waits for the device where it is listed here, and nowhere else.

See ``tests/support/fake_cuda_tensors.py`` for what this device shows, and what it does not.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
from fake_cuda import CASES, SOURCE, compile_device

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# In the loop over modules: how often per module, format and step at most.
IN_SCORING = {
    "rows.py:live_rows item": "how many rows have a gradient decides the shapes",
    "row_sampling.py:row_masses to host": "rows are drawn on the host",
    "block_formats.py:_weights_entry_point item": "whether a block is lost",
    "single_experts.py:routed_apart to host": "how many tokens each expert got",
    "smoothing.py:_smoothquant_scales item": "whether a channel was never other than 0",
    "smoothing.py:_smoothquant_scales to device": "statistics of the run",
    "smoothing.py:input_maximum item": "the scale of an input whose channels are scaled",
    "smoothing.py:input_maximum to device": "statistics of the run",
    "weight_search.py:factors to device": "statistics of the run",
    "grid.py:grid_of item": "whether a grid has a column of its own per weight",
    "grid.py:values_of to device": "what GPTQ rounded a weight to",
}
PER_MODULE = {"rows.py:live_rows item", "row_sampling.py:row_masses to host"}  # for all formats
# Elsewhere in that step: how often per step, layer or shard at most.
AROUND_SCORING = {
    "visits.py:make_step to device": "tokens, mask and pixels",
    "scorer.py:_loss_gradients item": "the loss",
    "scorer.py:_loss_gradients to device": "which rows predict, and what draws their labels",
    "sensitivity.py:sums to host": "the result",
    "expert_tokens.py:by_name to host": "tokens of each expert, once per module at the end",
    "residence.py:_load to device": "weights of a layer, read ahead by another thread",
    "residence.py:_read synchronize": "the same",
}
BEFORE_SCORING = {
    "input_rows.py:set nonzero": "which tokens are real, once per step",
    "transfer.py:on_host to host": "the result",
    "scale_search.py:_add_losses to device": "losses of AWQ's candidates",
    "scale_search.py:_add_losses to host": "the same",
    "scale_search.py:_errors to device": "statistics of the run",
    "attention.py:forward index by mask": "keys and values of real tokens",
    "fit.py:_alike nonzero": "which columns are unused",
    "fit.py:_alike to host": "the same",
    "fit.py:_loss item": "which damping loses least",
    "fit.py:gptq_codes to host": "the result",
    "second_moments.py:_feedback item": "whether there is a Cholesky factor",
    "second_moments.py:feedback item": "whether columns are unused",
    "single_experts.py:routed_apart to host": IN_SCORING["single_experts.py:routed_apart to host"],
    "grid.py:grid_of item": IN_SCORING["grid.py:grid_of item"],
    "watched_passes.py:run_watched index by mask": "real tokens before the head",
    **{p: why for p, why in AROUND_SCORING.items() if p.startswith(("visits", "residence"))},
}
TOLERANCES = {"16 bits": 0.3, "two draws, sampled": 0.1}  # attention is rounded otherwise there
TOLERANCE = 0.01


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the cases gave, in a process of its own: it has the device before torch."""
    folder = tmp_path_factory.mktemp("fake-cuda")
    library = compile_device(folder)
    script = SOURCE.with_name("fake_cuda_scores.py")
    words = [sys.executable, str(script), str(library), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ours(waits: dict[str, int]) -> dict[str, int]:
    """Without what a model's own code waits for."""
    return {place: count for place, count in waits.items() if not is_models(place)}


def is_models(place: str) -> bool:
    return place.startswith(("transformers/", "elsewhere"))


@pytest.mark.parametrize("case", CASES)
def test_scores_on_the_device_equal_those_on_the_cpu(results: Any, case: str) -> None:
    tolerance = TOLERANCES.get(case, TOLERANCE)
    assert results[case]["largest_difference"] < tolerance


@pytest.mark.parametrize("case", CASES)
def test_host_waits_where_it_is_listed(results: Any, case: str) -> None:
    result = results[case]
    for step in ("calibrate", "search", "fit"):
        assert set(ours(result.get(step, {}))) <= set(BEFORE_SCORING)
    waits = ours(result["score"])
    assert set(waits) <= set(IN_SCORING) | set(AROUND_SCORING)
    num_steps = waits["scorer.py:_loss_gradients item"]
    num_formats = len(CASES[case].formats)
    for place in set(waits) & set(IN_SCORING):
        per_module = 1 if place in PER_MODULE else num_formats
        assert waits[place] <= per_module * num_steps * result["modules"], place
    for place in set(waits) & set(AROUND_SCORING):
        assert waits[place] <= 10 * num_steps, place


def test_lists_of_places_have_none_too_many(results: Any) -> None:
    scored = {place for case in CASES for place in results[case]["score"]}
    before = {
        place
        for case in CASES
        for step in ("calibrate", "search", "fit")
        for place in results[case].get(step, {})
    }
    assert scored >= set(IN_SCORING) | set(AROUND_SCORING)
    assert before >= set(BEFORE_SCORING)


def test_number_read_in_the_loop_is_seen(results: Any) -> None:
    waits = results["planted"]["item"]
    assert waits["sensitivity.py:_add item"] == waits["rows.py:live_rows item"]


def test_cpu_tensor_in_the_loop_is_an_error(results: Any) -> None:
    message = results["planted"]["tensor"]
    assert "same device, found cuda:0 and cpu" in message
    assert message.endswith("in sensitivity.py:_add")
