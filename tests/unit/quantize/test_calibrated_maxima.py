"""Menus whose inputs carry no stored scale are scored without a pass over the data before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stage_pool import Pool

from autoquant_ray.errors import FormatError
from autoquant_ray.formats.menu import known_formats, resolve_formats
from autoquant_ray.formats.numbers import has_calibrated_maximum
from autoquant_ray.formats.smoothed import needs_calibration
from autoquant_ray.modelopt_api import needs_static_maximum
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.quantizers import make_quantizer
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.calibrate import calibrate, is_calibrated

PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN_CFG"
DYNAMIC = ("MXFP8_DEFAULT_CFG", PER_TOKEN, "MXINT8_DEFAULT_CFG", "wint8_afp16")


def quantizers_of(name: str) -> list[Any]:
    """Attributes of the quantizers of a format; none of one that cannot be scanned."""
    try:
        (format_,) = resolve_formats((name,), device="cuda")
    except FormatError:
        return []
    return [part for part in (format_.weight, format_.input, format_.kv) if part]


def test_attributes_say_of_every_format_what_modelopt_calibrates() -> None:
    said = []
    for name in known_formats():
        for attributes in quantizers_of(name):
            quantizer = make_quantizer(attributes, torch.device("cpu"))
            said.append(has_calibrated_maximum(attributes))
            assert said[-1] == needs_static_maximum(quantizer), (name, attributes)
    assert set(said) == {True, False}


@pytest.mark.parametrize("attribute", [{"use_constant_amax": True}, {"constant_amax": 3.0}])
def test_constant_maximum_is_not_calibrated(attribute: dict[str, Any]) -> None:
    attributes = {"num_bits": (4, 3), **attribute}
    assert not needs_static_maximum(make_quantizer(attributes, torch.device("cpu")))
    assert not has_calibrated_maximum(attributes)


@pytest.mark.parametrize("name", ["wint8_aint8", "kv_fp8", "kv_nvfp4", "NVFP4_DEFAULT_CFG"])
def test_single_stored_scale_makes_a_menu_need_calibration(name: str) -> None:
    assert not needs_calibration(resolve_formats(DYNAMIC, device="cpu"))
    assert needs_calibration(resolve_formats((*DYNAMIC, name), device="cpu"))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_scores_without_calibration_are_those_with_it(
    family: str, make_scorer: Any, make_samples: Any
) -> None:
    prepared, samples = make_scorer(family, DYNAMIC), make_samples([24, 17])
    collected = prepared.scorer.calibrate(samples)
    assert collected.modules
    having = prepared.scorer.score(samples, 0, collected).sums
    lacking = prepared.scorer.score(samples, 0, Calibration()).sums
    assert (having.elementwise_GF > 0).all()
    np.testing.assert_array_equal(having.elementwise_GF, lacking.elementwise_GF)
    np.testing.assert_array_equal(having.token_GF, lacking.token_GF)


def test_stage_does_nothing_for_a_menu_without_stored_scales(
    make_run: Any, make_scorer: Any
) -> None:
    prepared = make_scorer("llama", DYNAMIC)
    state = RunState.open(make_run(formats=DYNAMIC, disable=()))
    pool = Pool(prepared.scorer)
    assert calibrate(state, pool, prepared.plan, "mark") == Calibration()  # type: ignore[arg-type]
    assert pool.done == []
    assert is_calibrated(state, prepared.plan)
