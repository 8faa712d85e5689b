"""What transformers does not read of a GGUF file's model: rotary embeddings, a head apart.

transformers 5.14 reads a file's base frequency (not StarCoder2's and StableLM's) and nothing else,
so a model whose context was stretched would run with the positions of its shorter origin, and
Phi-4-mini would turn all dimensions of a head, not three quarters of them. Names and meanings of
the metadata are of the GGUF specification (``docs/gguf.md`` of ggml) and of llama.cpp
(``src/llama-model.cpp``).

Shape letter: F rotary frequencies, half of the rotary dimensions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.gguf_parameters import opened
from autoquant_ray.models.layers import decoder_layers
from autoquant_ray.wording import few

Floats = npt.NDArray[np.float64]

_DIVISORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
_TOLERANCE = 1e-4  # relative; rope_freqs is stored in float32
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_IGNORED = ("type", "finetuned")
_NAMES = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "attn_factor": "attention_factor",
    "yarn_attn_factor": "attention_factor",
}
_BIAS = re.compile(r"blk\.0\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.bias")
_BLOCK, _AHEAD = re.compile(r"blk\.(\d+)\."), ".nextn."
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
_LAYERS_WITH_LONG_CONTEXT = "full_attention"
_LAYERS_WITH_WINDOW = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class RotaryMetadata:
    """What a GGUF file says of rotary embeddings.

    Attributes:
        scaling: Name without ``ARCHITECTURE.rope.scaling.`` -> value.
        window_base: Base of the layers with a sliding window; None where the file names none.
        divisors: Name of the tensor -> what each frequency is divided by, ``(F,)`` float64.
        base: Base of the layers that see the whole context; None where the file names none.
        num_dimensions: Dimensions of a head that are turned; None where the file does not say.
    """

    scaling: Mapping[str, Any]
    window_base: float | None
    divisors: Mapping[str, Floats]
    base: float | None = None
    num_dimensions: int | None = None


class ModelFacts(NamedTuple):
    """What transformers does not read of a GGUF file's model.

    Attributes:
        rotary: Its rotary embeddings.
        has_separate_head: Whether the file holds a head that differs from the embedding.
        sizes: Name of each of its tensors -> how many numbers it holds.
        parameters: What it says of the model: name without its architecture -> value.
        split: What it says of the parts that the model was split into.
    """

    rotary: RotaryMetadata
    has_separate_head: bool
    sizes: Mapping[str, int]
    parameters: Mapping[str, Any]
    split: Mapping[str, Any]


def read_facts(file: Path) -> ModelFacts:
    """Read them, once for every state of the file.

    Raises:
        ModelError: The file cannot be read.
    """
    try:
        state = file.stat()
    except OSError as error:
        raise ModelError(f"GGUF file {file} cannot be read: {one_line(error)}") from None
    return _read(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read(file: Path, _modified: int, _size: int) -> ModelFacts:
    with opened(file) as reader:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        parameters = _named(reader.fields, reader.fields["general.architecture"].contents())
        return ModelFacts(
            rotary=_rotary(parameters, tensors),
            has_separate_head=_has_separate_head(tensors),
            sizes={name: int(tensor.n_elements) for name, tensor in tensors.items()},
            parameters=parameters,
            split=_named(reader.fields, "split"),
        )


def _named(fields: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Entries of the metadata whose names begin so, by the rest of the name."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): field.contents()
        for name, field in fields.items()
        if name.startswith(start)
    }


def _rotary(parameters: Mapping[str, Any], tensors: Mapping[str, Any]) -> RotaryMetadata:
    prefix, start = "rope.", "scaling."
    named = {n.removeprefix(prefix): v for n, v in parameters.items() if n.startswith(prefix)}
    scaling = {n.removeprefix(start): v for n, v in named.items() if n.startswith(start)}
    if "factor" not in scaling and "scale_linear" in named:  # its name in files of 2023
        scaling["factor"] = named["scale_linear"]
    if scaling.get("factor"):
        scaling.setdefault("type", "linear")  # as llama.cpp reads it
    return RotaryMetadata(
        scaling=scaling,
        window_base=named.get("freq_base_swa"),
        divisors={
            name: np.array(tensors[name].data, dtype=np.float64).reshape(-1)
            for name in _DIVISORS
            if name in tensors
        },
        base=named.get("freq_base"),
        num_dimensions=named.get("dimension_count"),
    )


def _has_separate_head(tensors: Mapping[str, Any]) -> bool:
    if not {_HEAD, _EMBEDDING} <= tensors.keys():
        return False
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    is_alike = head.tensor_type == embedding.tensor_type
    return not (is_alike and np.array_equal(head.data, embedding.data))


def apply_rotary(config: Any, rotary: RotaryMetadata) -> None:
    """Set a config's rotary embeddings as a GGUF file has them.

    Args:
        config: As transformers made it of the file; changed in place.
        rotary: Of the file.

    Raises:
        ModelError: The file asks for what transformers cannot do.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        if rotary.scaling.get("type", "none") != "none" or rotary.divisors:
            raise ModelError(
                f"GGUF metadata scale rotary positions, but {config.model_type} has none; convert "
                "the model to safetensors"
            )
        return
    by_layer = _LAYERS_WITH_LONG_CONTEXT in parameters
    before = parameters[_LAYERS_WITH_LONG_CONTEXT] if by_layer else parameters
    plain = dict(before)
    if rotary.base is not None:
        plain["rope_theta"] = float(rotary.base)
    if rotary.num_dimensions is not None and not by_layer and "partial_rotary_factor" in plain:
        plain["partial_rotary_factor"] = rotary.num_dimensions / _head_size(config)
    after = _scaled(config, plain, rotary)
    if not by_layer:
        config.rope_parameters = after
        return
    changed = {**parameters, _LAYERS_WITH_LONG_CONTEXT: after}
    if rotary.window_base is not None and _LAYERS_WITH_WINDOW in changed:
        window = {**changed[_LAYERS_WITH_WINDOW], "rope_theta": float(rotary.window_base)}
        changed[_LAYERS_WITH_WINDOW] = window
    config.rope_parameters = changed


def apply_query_scale(config: Any) -> None:
    """Set what Gemma's queries are divided by, as llama.cpp does: metadata do not say it.

    It is the size of a head, but in the models of 27B, which are known by their layers, the hidden
    size over the number of heads. transformers takes 256 for all.

    Args:
        config: As transformers made it of a file; changed in place.
    """
    text = config.get_text_config()
    num_layers = _LAYERS_OF_27B.get(text.model_type)
    if num_layers is None:
        return
    is_largest = text.num_hidden_layers == num_layers
    width = text.hidden_size // text.num_attention_heads
    text.query_pre_attn_scalar = width if is_largest else text.head_dim


def require_places(model: Any, file: Path) -> None:
    """Check that a model has a place for every number that a file holds of it.

    transformers makes biases, and norms of queries and keys, where the family's default has them,
    and skips those of other files without a word; llama.cpp uses them.

    Args:
        model: A skeleton, or the loaded model.
        file: The GGUF file.

    Raises:
        ModelError: It has not.
    """
    facts = read_facts(file)
    stored = [name for name in facts.sizes if _BIAS.fullmatch(name)]
    layer = next(iter(decoder_layers(model).values()), model)
    biases = [m for m in layer.modules() if getattr(m, "in_features", 0) and m.bias is not None]
    if len(stored) > len(biases):
        raise ModelError(
            f"GGUF file {file} holds biases ({few(stored, 3)}) that transformers does not load; "
            "convert the model to safetensors"
        )
    num_layers = model.config.get_text_config().num_hidden_layers
    apart = {*_DIVISORS, *unloaded_tensors(facts.sizes, num_layers)}
    apart |= set() if facts.has_separate_head else {_HEAD}
    num_stored = sum(size for name, size in facts.sizes.items() if name not in apart)
    places = {id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}
    if not facts.has_separate_head and _HEAD in facts.sizes and not _is_tied(model):
        num_stored += facts.sizes[_HEAD]
    if num_stored > sum(places.values()):
        raise ModelError(
            f"GGUF file {file} holds {num_stored - sum(places.values()):,} more numbers than the "
            f"{model.config.model_type} that transformers makes of it, which would be left out; "
            "convert the model to safetensors"
        )


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def unloaded_tensors(names: Iterable[str], num_layers: int) -> list[str]:
    """Tensors of a file that are of no layer that transformers loads, such as those that guess
    ahead.

    Args:
        names: Of the file's tensors.
        num_layers: Of the model.
    """
    return [
        name
        for name in names
        if _AHEAD in name or ((block := _BLOCK.match(name)) and int(block[1]) >= num_layers)
    ]


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _scaled(config: Any, plain: dict[str, Any], rotary: RotaryMetadata) -> dict[str, Any]:
    """The parameters of the layers that see the whole context."""
    kind = rotary.scaling.get("type", "none")
    unknown = sorted(set(rotary.scaling) - {*_NAMES, *_IGNORED})
    if unknown or kind not in ("none", "linear", "yarn", "longrope"):
        what = unknown[0] if unknown else f"type {kind!r}"
        raise ModelError(
            f"GGUF metadata: rope.scaling has {what}, which transformers cannot do; convert the "
            "model to safetensors"
        )
    names = ["rope_theta", "partial_rotary_factor"]
    # GPT-OSS does not round its bounds, which no metadata say.
    names += ["truncate"] if kind == plain.get("rope_type") else []
    kept = {name: plain[name] for name in names if name in plain}
    values = {_NAMES[n]: v for n, v in rotary.scaling.items() if n in _NAMES}
    if "rope_freqs.weight" in rotary.divisors:
        return kept | _llama3(kept, rotary.divisors["rope_freqs.weight"], values)
    if "rope_factors_long.weight" in rotary.divisors:
        return kept | _longrope(config, rotary.divisors, values)
    if kind in ("none", "longrope") or not values.get("factor"):
        return plain
    if kind == "yarn" and "attention_factor" in values:
        # llama.cpp multiplies its default by it, transformers replaces the default.
        values["attention_factor"] *= 0.1 * math.log(values["factor"]) + 1
    return kept | values | {"rope_type": kind}


def _longrope(
    config: Any, divisors: Mapping[str, Floats], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Frequencies that depend on which side of the original context a text is on (Phi-3)."""
    original = values.get("original_max_position_embeddings")
    if original is None or "rope_factors_short.weight" not in divisors:
        raise ModelError(
            "GGUF metadata: longrope needs original_context_length and both factors; convert the "
            "model anew"
        )
    config.original_max_position_embeddings = int(original)
    long, short = (divisors[f"rope_factors_{side}.weight"].tolist() for side in ("long", "short"))
    return {
        "factor": config.max_position_embeddings / int(original),
        **values,
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
    }


def _llama3(
    kept: Mapping[str, Any], divisors_F: Floats, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Llama 3's parameters, of which a file stores the outcome.

    Low frequencies are divided by a factor, high ones are kept, and between them the share that is
    kept is a line over the frequency. Two points of that line give its bounds, up to the original
    context, which only scales them.

    Raises:
        ModelError: No such parameters give the file's divisors.
    """
    dim = 2 * len(divisors_F)
    frequencies_F = float(kept["rope_theta"]) ** (-np.arange(0, dim, 2) / dim)
    turns_F = frequencies_F / (2 * math.pi)
    factor = float(divisors_F.max())
    if factor == 1:
        return {"rope_type": "default"}
    shares_F = (1 / divisors_F - 1 / factor) / (1 - 1 / factor)
    original = values.get("original_max_position_embeddings", 8192)
    parameters = _LLAMA3 | {"original_max_position_embeddings": int(original)}
    between_F = (shares_F > _TOLERANCE) & (shares_F < 1 - _TOLERANCE)
    if between_F.sum() >= 2:
        slope, start = np.polyfit(turns_F[between_F], shares_F[between_F], 1)
        width = original / slope
        low = -start * width
        parameters |= {"low_freq_factor": _rounded(low), "high_freq_factor": _rounded(low + width)}
    width = parameters["high_freq_factor"] - parameters["low_freq_factor"]
    line_F = (
        parameters["original_max_position_embeddings"] * turns_F - parameters["low_freq_factor"]
    )
    kept_F = (line_F / width).clip(0, 1)
    expected_F = (1 - kept_F) / factor + kept_F
    if not np.allclose(expected_F * divisors_F, 1, rtol=0, atol=_TOLERANCE):
        raise ModelError(
            "GGUF tensor rope_freqs.weight is not of Llama 3's form, which is the only one that "
            "transformers can do; convert the model to safetensors"
        )
    return {**parameters, "factor": factor, "rope_type": "llama3"}


def _rounded(value: float) -> float:
    """A value of four digits: what it was before float32."""
    return float(f"{value:.4g}")
