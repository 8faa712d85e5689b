"""The model behind a checkpoint, loaded as the run did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import FormatError
from autoquant_ray.export.check import StoredTensors
from autoquant_ray.export.source import Source
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.load import load_model, own_dtype
from autoquant_ray.models.of_run import require_model
from autoquant_ray.models.quantizable import is_turned
from autoquant_ray.models.separate_heads import give_weight, separate_head

_16_BITS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class SixteenBits:
    """Rounds what is not quantized.

    Attributes:
        dtype: ``bfloat16`` or ``float16``.
        kept: Tensors that the model's own 16-bit files hold in float32.
    """

    dtype: torch.dtype
    kept: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Of the type, as configs have it."""
        return str(self.dtype).removeprefix("torch.")

    def rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is stored."""
        is_kept = tensor.dtype != torch.float32 or name in self.kept
        return tensor if is_kept else tensor.to(self.dtype)


def load_for_export(source: Source) -> tuple[Any, ModelRef, SixteenBits]:
    """Load the run's model on the CPU, in the type that the run computed in.

    Returns:
        The model, where it is from, and how to round what is not quantized: to the run's 16-bit
        type, else to the checkpoint's own, else to bfloat16.

    Raises:
        StoreError: The model changed since the run.
        ModelError: It cannot be loaded.
        FormatError: Its files hold matrices the other way round.
    """
    import transformers

    scan = ScanConfig.model_validate(source.state.config)
    ref = require_model(source.state, scan)
    model: Any = load_model(ref, dtype=scan.dtype, device="cpu")
    _require_plain_linears(model)
    file_dtype = own_dtype(ref)
    dtype = model.dtype if model.dtype != torch.float32 else file_dtype
    kept: frozenset[str] = frozenset()
    if file_dtype in _16_BITS and ref.weights_folder is not None:
        dtypes = StoredTensors.of(ref.weights_folder).dtypes
        kept = frozenset(name for name, stored in dtypes.items() if stored == "F32")
    sixteen_bits = SixteenBits(dtype=dtype if dtype in _16_BITS else torch.bfloat16, kept=kept)
    if not model.config.architectures:  # a GGUF file names none, and exporters ask for it
        model.config.architectures = [type(model).__name__]
    if ref.gguf_file is None:
        # The model's file is copied; transformers would not save again what it finds odd in it.
        model.generation_config = transformers.GenerationConfig()
    _untie_head(model, source)
    return model, ref, sixteen_bits


def _require_plain_linears(model: Any) -> None:
    if any(map(is_turned, model.modules())):
        raise FormatError(
            f"a checkpoint of {type(model).__name__} cannot be written: its files hold matrices "
            "the other way round (Conv1D of transformers), and engines turn those that are packed "
            "too; give manifest.json's quantization_config to mtq.quantize"
        )


def _untie_head(model: Any, source: Source) -> None:
    """Give a quantized head that shares the embedding's weight a weight of its own.

    A head that has one already, whatever the config says, is stored: then too the config must not
    tie it, or an engine would read the embedding in its place.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    is_copied = head.weight is embedding.weight and name in source.formats
    if is_copied:
        give_weight(model)
    if not is_copied and separate_head(model) is None:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def distinct_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; of those that share their memory the first."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()
