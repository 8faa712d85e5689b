"""Types of GGUF files: by ggml's own library, against the package ``gguf``, which is none of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from command_line import refusal, run

from autoquant_ray.errors import FormatError
from autoquant_ray.formats.format import Format, attributes_to_json
from autoquant_ray.formats.gguf_types import (
    GGUF_TYPES,
    GGUF_WEIGHTS,
    fitting_type,
    library_file,
    require_library,
)
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.formats.stored_size import format_bits
from autoquant_ray.modelopt_api import mtq
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.quantizers import fake_quantize_weight

needs_library = pytest.mark.skipif(library_file() is None, reason="needs libggml-python")
LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
"""Those that the package ``gguf`` quantizes too, in numpy."""


def type_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def format_of(name: str) -> Format:
    (format_,) = resolve_formats((name,), device="cpu")
    return format_


def weight_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heavy tails, small and large rows, a row and a block of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator) ** 3
    weight *= torch.logspace(-4, 1, shape[-2])[:, None]
    weight[..., 1, :] = 0
    weight[..., 2, :32] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_numbers_and_sizes_are_those_of_gguf(name: str) -> None:
    type_ = GGUF_TYPES[name]
    assert type_.number == type_of(name).value
    assert (type_.block, type_.num_bytes) == gguf.GGML_QUANT_SIZES[type_of(name)]
    narrower = type_.narrower
    assert (narrower is None) == (type_.block == 32)
    assert narrower is None or GGUF_TYPES[narrower].block == 32


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_stored_bits_are_those_of_a_tensor_in_a_file(name: str) -> None:
    shape = (2, 6, 768)
    for columns, other in ((768, name), (736, fitting_type(name, 736))):
        assert other is not None
        stored = gguf.quant_shape_to_byte_shape((2, 6, columns), type_of(other))
        assert format_bits(format_of(name), (*shape[:-1], columns)) == 8 * np.prod(stored)
    assert fitting_type(name, 720) is None


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEGACY)
def test_legacy_types_are_those_of_gguf_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    weight = weight_of(12, 96, dtype=dtype)
    quantized = fake_quantize_weight(GGUF_WEIGHTS[name], weight)
    stored = gguf.quantize(weight.float().numpy(), type_of(name))
    expected = torch.from_numpy(gguf.dequantize(stored, type_of(name))).to(dtype)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, expected)


LARGEST_ERROR = {"q2_k": 0.2, "q3_k": 0.06, "iq3_s": 0.06, "q4_k": 0.015, "iq4_xs": 0.015}
LARGEST_ERROR |= {"iq4_nl": 0.015, "q5_k": 0.004, "q6_k": 0.001}


@needs_library
@pytest.mark.parametrize("name", LARGEST_ERROR)
def test_other_types_are_values_of_the_type_near_the_weights(name: str) -> None:
    """What is made is stored again without a change by gguf's own reading of the bytes."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    quantized = fake_quantize_weight(GGUF_WEIGHTS[name], weight)
    error = (quantized - weight).square().sum() / weight.square().sum()
    assert 0 < error < LARGEST_ERROR[name]
    stored = stored_by_library(weight, name)
    expected = gguf.dequantize(stored, type_of(name))
    assert np.array_equal(quantized.numpy(), expected)


def stored_by_library(weight: torch.Tensor, name: str) -> Any:
    """The bytes of a tensor, by the library alone."""
    import ctypes

    library = ctypes.CDLL(str(library_file()))
    block, size = gguf.GGML_QUANT_SIZES[type_of(name)]
    rows, columns = weight.shape
    stored = np.empty((rows, columns // block * size), np.uint8)
    values = np.ascontiguousarray(weight.numpy())
    library.ggml_quantize_chunk(
        type_of(name).value,
        ctypes.c_void_p(values.ctypes.data),
        ctypes.c_void_p(stored.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None,
    )
    return stored


@needs_library
@pytest.mark.parametrize("name", ["q4_k", "q3_k", "iq3_s"])
def test_rows_of_other_sizes_get_the_type_that_llama_cpp_takes(name: str) -> None:
    weight = weight_of(4, 288)
    narrower = GGUF_TYPES[name].narrower
    assert narrower is not None
    expected = fake_quantize_weight(GGUF_WEIGHTS[narrower], weight)
    assert torch.equal(fake_quantize_weight(GGUF_WEIGHTS[name], weight), expected)


@needs_library
def test_threads_and_parts_of_a_weight_change_no_bit() -> None:
    weight = weight_of(2, 4100, 256)  # three parts
    whole = fake_quantize_weight(GGUF_WEIGHTS["q5_k"], weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(fake_quantize_weight(GGUF_WEIGHTS["q5_k"], weight), whole)
    finally:
        torch.set_num_threads(threads)
    rows = torch.stack([weight[1, 4099], weight[0, 7]])
    of_rows = fake_quantize_weight(GGUF_WEIGHTS["q5_k"], rows)
    assert torch.equal(of_rows, torch.stack([whole[1, 4099], whole[0, 7]]))
    assert torch.equal(
        fake_quantize_weight(GGUF_WEIGHTS["q5_k"], weight[0].T.contiguous().T), whole[0]
    )


@needs_library
@pytest.mark.parametrize("name", GGUF_TYPES)
def test_rows_with_other_values_than_numbers_become_nan_alone(name: str) -> None:
    weight = weight_of(4, 256)
    expected = fake_quantize_weight(GGUF_WEIGHTS[name], weight)
    spoilt = weight.clone()
    spoilt[0, 3], spoilt[2, 9] = float("nan"), float("inf")
    quantized = fake_quantize_weight(GGUF_WEIGHTS[name], spoilt)
    assert quantized[[0, 2]].isnan().all()
    assert torch.equal(quantized[[1, 3]], expected[[1, 3]])


def test_missing_library_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, model_folder: Any
) -> None:
    monkeypatch.setattr("autoquant_ray.formats.gguf_types.PACKAGE", "no_such_package")
    line = refusal(run("plan", model_folder("llama"), "--formats", "q4_k,wint8_aint8,q8_0"))
    assert "q4_k, q8_0: " in line
    assert "pip install libggml-python" in line
    assert "wint8_aint8" not in line
    require_library({"wint8_aint8": format_of("wint8_aint8").weight})


@pytest.mark.parametrize("given", ["q4_k:gptq", "q4_k:weighted", "q4_k:awq"])
def test_methods_of_rounding_are_refused(given: str) -> None:
    with pytest.raises(FormatError, match="q4_k"):
        format_of(given)


def test_unknown_type_of_a_custom_format_is_refused() -> None:
    weight = GGUF_WEIGHTS["q4_k"] | {"backend_extra_args": {"type": "iq1_s"}}
    with pytest.raises(FormatError, match=r"'iq1_s' is no type of GGUF files .* q2_k, q3_k"):
        resolve_formats(("mine",), device="cpu", custom={"mine": {"weight": weight}})


@needs_library
def test_modelopt_quantizes_a_model_as_gguf_would(make_model: Any) -> None:
    """By the attributes that a run's ``quant_cfg`` has, through JSON."""
    model, by_gguf = make_model("llama"), make_model("llama")
    config = {
        "quantizer_name": "*_proj.weight_quantizer",
        "enable": True,
        "cfg": GGUF_WEIGHTS["q5_1"],
    }
    quant_cfg = [{"quantizer_name": "*", "enable": False}, attributes_to_json(config)]
    mtq.quantize(model, {"quant_cfg": quant_cfg, "algorithm": "max"})
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        plain = by_gguf(ids).logits
        for name, module in by_gguf.named_modules():
            if name.endswith("_proj"):
                stored = gguf.quantize(module.weight.numpy(), type_of("q5_1"))
                module.weight.copy_(torch.from_numpy(gguf.dequantize(stored, type_of("q5_1"))))
        expected = by_gguf(ids).logits
        assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(plain, expected)


def test_groups_take_no_type_that_their_rows_do_not_fit(make_model: Any) -> None:
    plan = build_plan(make_model("llama"), [format_of("q4_k"), format_of("wint8_aint8")])
    (module, *_) = plan.searched[0].modules
    odd = replace(plan.searched[0], modules=(replace(module, shapes=((64, 48),)),))
    assert [f.name for f in plan.menu(plan.searched[0])] == ["q4_k", "wint8_aint8"]
    assert [f.name for f in plan.menu(odd)] == ["wint8_aint8"]


@needs_library
def test_plan_says_the_bits_of_the_type_that_rows_get(model_folder: Any) -> None:
    """The tiny model's rows are 64 and 96 wide: no blocks of 256, but whole ones of 32."""
    done = run("plan", model_folder("llama"), "--formats", "q4_k,wint8_aint8", "--json")
    rows = json.loads(done.stdout)["groups"]
    bits = {row["weight_bits"] for row in rows if row["format"] == "q4_k"}
    assert bits == {8 * GGUF_TYPES["q5_0"].num_bytes / 32}
