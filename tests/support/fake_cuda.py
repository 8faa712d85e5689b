"""Gives a process without a GPU the CUDA device of :mod:`fake_cuda_tensors`, before torch is there.

torch's core is given a device that does nothing (``fake_cuda_device.cpp``, compiled in a second or
two), so that its C++ takes the paths of CUDA: the backward pass runs in the device's thread.

:mod:`fake_cuda_scores` is the program of that process; what it scores stands here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("fake_cuda_device.cpp")

LENGTHS = [24, 17, 31, 9]
LINEARS = ("wint4_afp16", "wfp8_afp8", "wint8_aint8")


class Case(NamedTuple):
    """What is scored."""

    family: str
    formats: tuple[str, ...] = LINEARS
    planned: Mapping[str, Any] = MappingProxyType({})
    changes: Mapping[str, Any] = MappingProxyType({})
    has_images: bool = False


CASES = {
    "linears": Case("qwen3"),
    "two draws, sampled": Case("llama", LINEARS[1:], {}, {"row_share": 0.3, "label_draws": 2}),
    "offloaded": Case("llama", LINEARS[2:], {}, {"placement": "offload"}),
    "split": Case("llama", LINEARS[2:], {}, {"placement": "split"}),
    "16 bits": Case(
        "qwen3", ("wfp4_afp16:max", "NVFP4_DEFAULT_CFG", "wint8_aint8"), {}, {"dtype": "bfloat16"}
    ),
    "integers": Case(
        "llama",
        ("wint8_aint8", "INT8_SMOOTHQUANT_CFG", "wint8_afp16"),
        {},
        {"difference_dtype": "int8+bfloat16"},
    ),
    "caches": Case("qwen3", ("kv_fp8", "kv_nvfp4", "wfp8_afp8")),
    "experts": Case("qwen3_moe", LINEARS[::2]),
    "single experts": Case("qwen3_moe", LINEARS[:1], {"expert_groups": "single"}),
    "images": Case("qwen3_vl", LINEARS[1:], {"coverage": "full"}, {}, has_images=True),
    "AWQ": Case("llama", ("wint4_afp16:awq", "INT8_SMOOTHQUANT_CFG")),
    "GPTQ": Case("qwen3_moe", ("wint4_g32_afp16:gptq",)),
}


def compile_device(folder: Path) -> Path:
    """Compile the device; needs ``g++``."""
    library = folder / "fake_cuda_device.so"
    words = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE)]
    words += [f"-I{_torch_folder() / 'include'}", f"-L{_torch_folder() / 'lib'}"]
    subprocess.run([*words, "-lc10", "-ltorch_cpu", "-o", str(library)], check=True)
    return library


def load_device(library: str) -> None:
    """Give this process the device."""
    assert "torch" not in sys.modules
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
