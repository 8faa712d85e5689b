"""The scoring core on a GPU: parity with ModelOpt, formats that need its CUDA kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from scoring_specs import scoring_spec

from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.backends.block_formats import BACKEND
from autoquant_ray.quantize.quantizers import fake_quantize_weight
from autoquant_ray.score.scorer import Scorer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def score(model_folder: Any, make_samples: Any, device: str, formats: tuple[str, ...]) -> Any:

    from autoquant_ray.models.load import build_skeleton

    ref = find_model(str(model_folder("qwen3")))
    plan = build_plan(build_skeleton(ref), resolve_formats(formats, device=device))
    scorer = Scorer(scoring_spec(plan, model=ref, device=device, step_tokens=256))
    samples = make_samples([24, 17, 31])
    return scorer.score(samples, 0, scorer.calibrate(samples))


def test_scores_cuda_equal_cpu(model_folder: Any, make_samples: Any) -> None:
    formats = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8")
    on_cpu = score(model_folder, make_samples, "cpu", formats)
    on_cuda = score(model_folder, make_samples, "cuda", formats)
    np.testing.assert_allclose(on_cuda.sums.elementwise_GF, on_cpu.sums.elementwise_GF, rtol=1e-3)


def test_scores_fp4_on_cuda_are_finite_and_positive(model_folder: Any, make_samples: Any) -> None:
    scores = score(model_folder, make_samples, "cuda", ("wfp4_afp16:max", "MXFP4_DEFAULT_CFG"))
    assert np.isfinite(scores.sums.elementwise_GF).all()
    assert (scores.sums.elementwise_GF > 0).all()


BLOCKS = {
    "NVFP4": ((2, 1), 16, (4, 3)),
    "MXFP4": ((2, 1), 32, (8, 0)),
    "MXFP6 e2m3": ((2, 3), 32, (8, 0)),
    "MXFP6 e3m2": ((3, 2), 32, (8, 0)),
    "MXFP8 e4m3": ((4, 3), 32, (8, 0)),
    "MXFP8 e5m2": ((5, 2), 32, (8, 0)),
    "MXINT8": (8, 32, (8, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [512, 500])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_cpu_equal_modelopt_kernels(name: str, columns: int, dtype: torch.dtype) -> None:
    """MX bit by bit; NVFP4 up to its kernel's inexact division, which can move a value by a step.

    Blocks of all magnitudes, of zeros, and with single large values.
    """
    num_bits, size, scale_bits = BLOCKS[name]
    sizes = {-1: size, "type": "dynamic", "scale_bits": scale_bits}
    attributes = {"num_bits": num_bits, "block_sizes": sizes}
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp2(torch.empty(256, 1).uniform_(-30, 30, generator=generator))
    if scale_bits == (4, 3):
        scales = torch.exp2(torch.empty(256, 1).uniform_(-20, 2, generator=generator))
    weight = torch.randn(256, columns, generator=generator) * scales
    weight[::7, 3] *= 50
    weight[::11, :64] = 0
    weight = weight.to(dtype)
    on_cpu = fake_quantize_weight(attributes, weight)
    on_cuda = fake_quantize_weight(attributes, weight.cuda()).cpu()
    if scale_bits == (8, 0):
        assert torch.equal(on_cuda, on_cpu)
    else:
        close = torch.isclose(on_cuda, on_cpu, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
        assert (~close).float().mean() < 1e-4
    through_backend = TensorQuantizer(QuantizerAttributeConfig(**attributes, backend=BACKEND))
    plain = TensorQuantizer(QuantizerAttributeConfig(**attributes))
    assert torch.equal(through_backend(weight.cuda()), plain(weight.cuda()))


@pytest.mark.parametrize("name", ["four_over_six", "sweep", "max"])
def test_static_nvfp4_cpu_equals_modelopt_kernels(name: str) -> None:
    """The same scales are found, up to the last bits of their division."""
    sizes = {-1: 16, "type": "static", "scale_bits": (4, 3)}
    if name == "four_over_six":
        sizes |= {"four_over_six": True}
    full = {"method": "mse", "step_size": 0.5, "start_multiplier": 1.0, "stop_multiplier": 1.5}
    algorithm = None if name == "max" else full | {"fp8_scale_sweep": name == "sweep"}
    attributes = {"num_bits": (2, 1), "block_sizes": sizes}
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    on_cpu = fake_quantize_weight(attributes, weight, algorithm)
    on_cuda = fake_quantize_weight(attributes, weight.cuda(), algorithm).cpu()
    close = torch.isclose(on_cuda, on_cpu, rtol=1e-6)
    assert (~close).float().mean() < 1e-3


def test_scores_of_blocks_cuda_equal_cpu(model_folder: Any, make_samples: Any) -> None:
    formats = ("NVFP4_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "MXINT8_DEFAULT_CFG")
    on_cpu = score(model_folder, make_samples, "cpu", formats)
    on_cuda = score(model_folder, make_samples, "cuda", formats)
    np.testing.assert_allclose(on_cuda.sums.elementwise_GF, on_cpu.sums.elementwise_GF, rtol=2e-2)
