"""Tensors of a model's files that transformers does not load, such as heads that guess ahead.

Engines use these (``mtp.*`` of Qwen3-Next and Nemotron-H, ``model.layers.N.*`` beyond the last
layer of GLM-4.5 and DeepSeek-V3), so that a checkpoint without them is another model. They are
carried: counted, and copied in 16 bits.

A stored name is followed as transformers follows it when it loads (5.14,
``core_model_loading.rename_source_key``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.gguf_config import read_facts, unloaded_tensors
from autoquant_ray.models.load import files_dtype
from autoquant_ray.models.packed_weight import PackedWeight, logical_shape
from autoquant_ray.models.quantized_source import quantized_source
from autoquant_ray.models.stored_tensors import TensorHeader, stored_tensors
from autoquant_ray.wording import few

if TYPE_CHECKING:
    import torch

_MOST_NAMES = 2
_WIDE_FLOATS = ("F32", "F64")
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_OF_INPUTS = ("scale", "zero_point")
"""How tensors end that quantized checkpoints hold beside weights: of inputs and caches."""


@dataclass(frozen=True, kw_only=True)
class FileTensors:
    """The tensors of a model's files as a checkpoint in 16 bits would have them.

    Attributes:
        headers: All that is stored; nothing for GGUF, or a hub id that is not cached.
        packed: Name of a weight that is stored in parts -> its parts.
    """

    headers: Mapping[str, TensorHeader]
    packed: Mapping[str, PackedWeight]

    @classmethod
    def of(cls, ref: ModelRef) -> FileTensors:
        """Read the headers.

        Raises:
            ModelError: A file is damaged, or quantized in a way that is not read.
        """
        source = quantized_source(ref)
        packed = {} if source is None else source.weights
        return cls(headers=stored_tensors(ref), packed=packed)

    @property
    def names(self) -> list[str]:
        """Names of all tensors; packed weights last."""
        parts = {part for packed in self.packed.values() for part in packed.parts}
        plain = [name for name in self.headers if name not in parts]
        if self.packed:
            plain = [name for name in plain if not name.endswith(_OF_INPUTS)]
        return [*plain, *self.packed]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        packed = self.packed.get(name)
        if packed is None:
            return self.headers[name].shape
        return logical_shape(packed, self.headers[packed.numbers].shape)

    def num_bytes(self, name: str, *, is_16_bit: bool) -> int:
        """Bytes that a tensor takes in a checkpoint.

        Args:
            name: Of the tensor.
            is_16_bit: Whether the model is stored in 16 bits, so that wider numbers stay.
        """
        dtype = "BF16" if name in self.packed else self.headers[name].dtype
        if dtype in _WIDE_FLOATS and not is_16_bit:
            dtype = "BF16"
        return math.prod(self.shape(name)) * _ITEM_BYTES.get(dtype, 1)


def carried_bytes(model: torch.nn.Module, ref: ModelRef) -> dict[str, int]:
    """Tensor of the files that transformers does not load -> bytes that it takes in a checkpoint.

    Args:
        model: A skeleton, or the loaded model before anything changed it.
        ref: Where the files are; none are found for a GGUF file, or a hub id that is not cached.
    """
    tensors = FileTensors.of(ref)
    if not tensors.headers:
        return {}
    place_of = memory_names(model)
    held = model.state_dict().keys()
    carried = [name for name in tensors.names if place_of(name) not in held]
    if not carried:
        return {}
    is_16_bit = str(files_dtype(ref)) in ("torch.bfloat16", "torch.float16")
    return {name: tensors.num_bytes(name, is_16_bit=is_16_bit) for name in carried}


def memory_names(model: Any) -> Callable[[str], str]:
    """A function from a name in the files to the name of what transformers makes of it.

    Args:
        model: A skeleton, or the loaded model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    return _place_of(model, get_model_conversion_mapping(model))


def keep_conversions(model: Any, names: Iterable[str]) -> None:
    """Note in a skeleton by which rules its files' tensors are converted, as loading does.

    Those of older files are not among them, unless these are such; of a model without files no
    older ones are.

    Args:
        model: The skeleton.
        names: Of the tensors in its files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model)
    place_of = _place_of(model, mapping)
    used = [place_of(name) for name in names]
    if used:
        mapping = [entry for entry in mapping if entry.was_used()]
    else:
        mapping = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = mapping


def unscope_conversions(model: Any) -> None:
    """Let converters of a part of a model count for all of it, where no other tensor fits them.

    ModelOpt's exporter knows no parts, and refuses such a model (Qwen3.5's experts beside images).

    Args:
        model: As transformers loaded it, or a skeleton that notes its conversions.
    """
    names = [*model.state_dict()]
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [_unscoped(conversion, names) for conversion in conversions]


def _unscoped(conversion: Any, names: Sequence[str]) -> Any:
    from transformers.core_model_loading import WeightConverter

    if conversion.scope_prefix is None or not isinstance(conversion, WeightConverter):
        return conversion
    whole = copy.copy(conversion)
    whole.scope_prefix = None
    here, everywhere = conversion.reverse_transform(), whole.reverse_transform()
    is_same = all(here.rename_source_key(n)[1] == everywhere.rename_source_key(n)[1] for n in names)
    return whole if is_same else conversion


def _place_of(model: Any, mapping: Sequence[Any]) -> Callable[[str], str]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    held = dict.fromkeys(model.state_dict(), True)  # names alone: weights may go meanwhile
    prefix = model.base_model_prefix or None

    def place_of(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, held)
        if renamed not in held and name in held:
            renamed, _ = rename_source_key(name, [], [], prefix, held)
        return str(renamed)

    return place_of


def unloaded_gguf_tensors(ref: ModelRef, model: Any) -> list[str]:
    """Tensors of a GGUF file that are of no layer that transformers loads.

    Args:
        ref: The model; nothing is left out of other files.
        model: A skeleton, or the loaded model.
    """
    if ref.gguf_file is None:
        return []
    names = read_facts(Path(ref.path) / ref.gguf_file).sizes
    return unloaded_tensors(names, model.config.get_text_config().num_hidden_layers)


def carried_roots(carried: Iterable[str], stored: Iterable[str]) -> list[str]:
    """The shortest prefixes under which nothing but carried tensors stands.

    Args:
        carried: Names of carried tensors.
        stored: Names of all stored tensors.
    """
    names = set(carried)
    shared = {start for name in stored if name not in names for start in _starts(name)}
    roots = (next((s for s in _starts(name) if s not in shared), name) for name in carried)
    return list(dict.fromkeys(roots))


def describe_carried(carried: Mapping[str, int]) -> str:
    """What people are told of carried tensors."""
    names = few(list(carried), _MOST_NAMES)
    return (
        f"{len(carried)} tensors ({names}), {sum(carried.values()) / 2**20:,.1f} MiB at 16 bits, "
        "which transformers does not load and exports copy"
    )


def _starts(name: str) -> list[str]:
    """``a``, ``a.b`` of ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
