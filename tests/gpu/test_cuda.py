"""The scoring core on a GPU: parity with ModelOpt, formats that need its CUDA kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from autoquant_ray.engine import Engine, EngineSpec
from autoquant_ray.formats import resolve_formats
from autoquant_ray.models import find_model
from autoquant_ray.plan import build_plan
from autoquant_ray.sensitivity import scored_modules

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def score(model_folder: Any, make_samples: Any, device: str, formats: tuple[str, ...]) -> Any:
    from autoquant_ray.calibration import to_maxima
    from autoquant_ray.models import build_skeleton

    ref = find_model(str(model_folder("qwen3")))
    plan = build_plan(build_skeleton(ref), resolve_formats(formats, device=device))
    spec = EngineSpec(
        model=ref,
        dtype="float32",
        device=device,
        num_threads=1,
        modules=scored_modules(plan),
        formats=plan.formats,
        step_tokens=256,
        labels="data",
        label_draws=1,
        seed=0,
    )
    engine = Engine(spec)
    samples = make_samples([24, 17, 31])
    return engine.score(samples, 0, to_maxima(engine.calibrate(samples)))


def test_scores_cuda_equal_cpu(model_folder: Any, make_samples: Any) -> None:
    formats = ("wint4_afp16", "wfp8_afp8", "wint8_aint8")
    on_cpu = score(model_folder, make_samples, "cpu", formats)
    on_cuda = score(model_folder, make_samples, "cuda", formats)
    np.testing.assert_allclose(on_cuda.sums.elementwise_GF, on_cpu.sums.elementwise_GF, rtol=1e-3)


def test_scores_fp4_on_cuda_are_finite_and_positive(model_folder: Any, make_samples: Any) -> None:
    scores = score(model_folder, make_samples, "cuda", ("wfp4_afp16", "MXFP4_DEFAULT_CFG"))
    assert np.isfinite(scores.sums.elementwise_GF).all()
    assert (scores.sums.elementwise_GF > 0).all()
