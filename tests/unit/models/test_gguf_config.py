"""Rotary embeddings of GGUF files: the logits of the model from which the file was made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import finish, random_llama, write_llama

from autoquant_ray.errors import ModelError
from autoquant_ray.models.find import find_model
from autoquant_ray.models.gguf_config import RotaryMetadata, apply_rotary
from autoquant_ray.models.load import build_skeleton, load_model

TOKENS = torch.arange(3, 203)[None]


def llama3_divisors(model: Any) -> list[float]:
    """What llama.cpp's converter stores: the plain frequencies over the scaled ones."""
    dim = model.config.head_dim
    plain = model.config.rope_parameters["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    return (plain / model.model.rotary_emb.inv_freq.numpy()).tolist()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def require_same(file: Path, twin: Any, plain: Any) -> Any:
    """The loaded file's logits are those of the twin, and not those of the unscaled model."""
    loaded = load_model(find_model(str(file)), dtype="float32", device="cpu")
    assert (logits_of(twin) - logits_of(plain)).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(loaded), logits_of(twin), rtol=1e-4, atol=1e-4)
    return loaded


def twins(**parameters: Any) -> tuple[Any, Any]:
    plain = random_llama(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    scaled = random_llama(rope_parameters={"rope_theta": 10000.0, **parameters})
    return scaled, plain


def test_llama3_frequencies(tmp_path: Path) -> None:
    scaled, plain = twins(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    tensors = {"rope_freqs.weight": llama3_divisors(scaled)}
    file = write_llama(tmp_path / "x.gguf", plain, tensors=tensors)
    loaded = require_same(file, scaled, plain)
    assert loaded.config.rope_parameters == scaled.config.rope_parameters


@pytest.mark.parametrize(("factor", "low", "high", "original"), [(32, 2, 8, 64), (4, 1, 3, 1024)])
def test_llama3_frequencies_of_other_bounds(
    tmp_path: Path, factor: float, low: float, high: float, original: int
) -> None:
    scaled, plain = twins(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    tensors = {"rope_freqs.weight": llama3_divisors(scaled)}
    require_same(write_llama(tmp_path / "x.gguf", plain, tensors=tensors), scaled, plain)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_scaling(metadata: dict[str, Any], tmp_path: Path) -> None:
    """By the names of today, and as llama.cpp reads a factor alone and the name of 2023."""
    scaled, plain = twins(rope_type="linear", factor=4.0)
    require_same(write_llama(tmp_path / "x.gguf", plain, metadata), scaled, plain)


@pytest.mark.parametrize(
    ("family", "base", "turned"),
    [("starcoder2", 999999.4375, None), ("stablelm", 50000.0, 0.5), ("phi3", 10000.0, 0.75)],
)
def test_base_and_turned_dimensions_are_those_of_the_file(
    family: str, base: float, turned: float | None, tmp_path: Path
) -> None:
    """What transformers leaves at its defaults; Phi-4-mini turns 96 of 128 dimensions."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", family)
    writer.add_embedding_length(256)
    writer.add_head_count(2)
    writer.add_block_count(1)
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(int(128 * (turned or 1)))
    writer.add_tensor("token_embd.weight", np.zeros((8, 256), dtype=np.float32))
    finish(writer)
    config = build_skeleton(find_model(str(tmp_path / "x.gguf"))).config
    assert config.rope_parameters["rope_theta"] == base
    assert config.rope_parameters.get("partial_rotary_factor") == turned


@pytest.mark.parametrize(
    ("family", "num_layers", "hidden", "heads", "head", "scalar"),
    [
        ("gemma2", 42, 3584, 16, 256, 256),
        ("gemma2", 46, 4608, 32, 128, 144),
        ("gemma3", 48, 3840, 16, 256, 256),
        ("gemma3", 62, 5376, 32, 128, 168),
    ],
)
def test_scale_of_gemmas_queries_is_that_of_its_size(
    family: str, num_layers: int, hidden: int, heads: int, head: int, scalar: int, tmp_path: Path
) -> None:
    """Of the 9B, 12B and 27B models, as their own configs have it."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", family)
    writer.add_embedding_length(hidden)
    writer.add_head_count(heads)
    writer.add_key_length(head)
    writer.add_block_count(num_layers)
    writer.add_tensor("token_embd.weight", np.zeros((8, hidden), dtype=np.float32))
    finish(writer)
    config = build_skeleton(find_model(str(tmp_path / "x.gguf"))).config
    assert config.get_text_config().query_pre_attn_scalar == scalar


def test_biases_that_transformers_skips_are_refused(tmp_path: Path) -> None:
    """By the plan and by the scan; families that have them take them."""
    plain = random_llama()
    tensors = {f"blk.{n}.attn_q.bias": [1.0] * 64 for n in range(2)}
    ref = find_model(str(write_llama(tmp_path / "x.gguf", plain, tensors=tensors)))
    for load in (build_skeleton, lambda r: load_model(r, dtype="float32", device="cpu")):
        with pytest.raises(
            ModelError, match=r"holds biases \(blk.0.attn_q.bias\) that transformers"
        ):
            load(ref)
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "qwen2")
    writer.add_embedding_length(64)
    writer.add_head_count(2)
    writer.add_block_count(1)
    for name in ("attn_q", "attn_k", "attn_v"):
        writer.add_tensor(f"blk.0.{name}.bias", np.zeros(64, dtype=np.float32))
    finish(writer)
    build_skeleton(find_model(str(tmp_path / "y.gguf")))


def test_yarn(tmp_path: Path) -> None:
    scaled, plain = twins(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    metadata = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    require_same(write_llama(tmp_path / "x.gguf", plain, metadata), scaled, plain)


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({}, {}),
        ({"llama.rope.scaling.type": "none"}, {}),
        ({"llama.rope.scaling.type": "linear"}, {}),
        ({}, {"rope_freqs.weight": [1.0] * 16}),
    ],
)
def test_no_scaling_leaves_the_config_alone(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any]
) -> None:
    plain = random_llama()
    file = write_llama(tmp_path / "x.gguf", plain, metadata, tensors)
    loaded = load_model(find_model(str(file)), dtype="float32", device="cpu")
    assert loaded.config.rope_parameters == plain.config.rope_parameters


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"llama.rope.scaling.alpha": 2.0}, {}, "rope.scaling has alpha"),
        ({"llama.rope.scaling.type": "spiral"}, {}, "rope.scaling has type 'spiral'"),
        ({}, {"rope_freqs.weight": [1.0] * 8 + [3.0, 1.0] * 4}, "not of Llama 3's form"),
    ],
)
def test_what_transformers_cannot_do_is_refused(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    file = write_llama(tmp_path / "x.gguf", random_llama(), metadata, tensors)
    with pytest.raises(ModelError, match=message):
        load_model(find_model(str(file)), dtype="float32", device="cpu")


def test_layers_with_a_window_keep_their_positions() -> None:
    config = transformers.Gemma3TextConfig(num_hidden_layers=6)
    before = dict(config.rope_parameters["sliding_attention"])
    scaling = {"type": "linear", "factor": 8.0}
    apply_rotary(config, RotaryMetadata(scaling=scaling, window_base=None, divisors={}))
    assert config.rope_parameters["sliding_attention"] == before
    full = config.rope_parameters["full_attention"]
    assert (full["rope_type"], full["factor"]) == ("linear", 8.0)
    apply_rotary(config, RotaryMetadata(scaling={}, window_base=5000.0, divisors={}))
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 5000.0
    assert config.rope_parameters["full_attention"] == full


def test_longrope_takes_both_lists() -> None:
    config = transformers.Phi3Config(max_position_embeddings=131072)
    factors = {
        "rope_factors_long.weight": np.full(48, 4.0),
        "rope_factors_short.weight": np.full(48, 1.5),
    }
    scaling = {"original_context_length": 4096, "attn_factor": 1.19}
    apply_rotary(config, RotaryMetadata(scaling=scaling, window_base=None, divisors=factors))
    parameters = config.rope_parameters
    assert (parameters["rope_type"], parameters["factor"]) == ("longrope", 32)
    assert parameters["long_factor"] == [4.0] * 48
    assert parameters["short_factor"] == [1.5] * 48
    assert parameters["attention_factor"] == 1.19
    assert config.original_max_position_embeddings == 4096


def test_scaling_of_a_model_without_rotary_embeddings_is_refused() -> None:
    config: Any = SimpleNamespace(model_type="gpt2")
    scaling = {"type": "linear", "factor": 2.0}
    with pytest.raises(ModelError, match="gpt2 has none"):
        apply_rotary(config, RotaryMetadata(scaling=scaling, window_base=None, divisors={}))
