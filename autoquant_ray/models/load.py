"""Find, fingerprint and load a model; build its skeleton on the meta device.

Weights are read from safetensors or GGUF only; pickled checkpoints are refused. Code that a
checkpoint brings is run only with ``trust_remote_code``. A checkpoint that is quantized is
dequantized here, not by transformers, which leaves out scales that it does not expect.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.dequantize import opened
from autoquant_ray.models.find import ModelRef, _load_config, hold_warnings
from autoquant_ray.models.gguf_config import require_places
from autoquant_ray.models.quantizable import with_plain_linears
from autoquant_ray.models.quantized_config import stated_quantization, without_quantization
from autoquant_ray.models.quantized_source import QuantizedSource, quantized_source
from autoquant_ray.models.separate_heads import tie_as_files
from autoquant_ray.models.stored_tensors import fetch_weights, stored_tensors
from autoquant_ray.wording import few

if TYPE_CHECKING:
    import torch


_UNREADABLE = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError)
"""What transformers raises for files that it cannot make sense of."""


@hold_warnings()
def build_skeleton(ref: ModelRef) -> torch.nn.Module:
    """Build the model on the meta device from its config: names and shapes, no weights.

    Of the files it takes no more than whether they hold a head apart from the embedding, and
    whether they are quantized in a way that can be read.

    Raises:
        ModelError: The config cannot be read, or describes no language model, or the checkpoint is
            quantized in a way that is not read.
    """
    import torch

    config = _load_config(ref)
    quantized_source(ref)
    without_quantization(config)
    model_class = _model_class(config, ref)
    try:
        with torch.device("meta"):
            model: torch.nn.Module = model_class.from_config(
                config, trust_remote_code=ref.trust_remote_code, dtype=torch.bfloat16
            )
        model.tie_weights()
    except Exception as error:  # noqa: BLE001 - whatever transformers makes of a foreign config
        reason = f"{type(error).__name__}: {one_line(error, limit=200)}"
        raise ModelError(
            f"model {ref.name} cannot be built from its config ({reason}); look at config.json"
        ) from None
    require_language_model(model, ref)
    tie_as_files(model, ref)
    with_plain_linears(model)
    if ref.gguf_file is not None:
        require_places(model, Path(ref.path) / ref.gguf_file)
    return model.eval()


@hold_warnings()
def load_model(
    ref: ModelRef, *, dtype: str, device: str, placing: Mapping[str, Any] | None = None
) -> torch.nn.Module:
    """Load the weights for scoring: evaluation mode, no parameter takes a gradient.

    Args:
        ref: Model to load.
        dtype: ``float32`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        placing: Arguments of ``from_pretrained`` that say where each part goes; None: all of it
            to the device.

    Raises:
        ModelError: Weights missing, unreadable, or not in safetensors or GGUF; or quantized in a
            way that is not read.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if placing is not None:
        arguments |= placing
    elif device == "cuda":
        arguments["device_map"] = {"": torch.cuda.current_device()}
    try:
        fetch_weights(ref)
        source = quantized_source(ref)
        model, info = (
            _from_files(ref, arguments) if source is None else _dequantized(ref, source, arguments)
        )
    except (*_UNREADABLE, SafetensorError) as error:
        raise ModelError(f"model {ref.name} cannot be loaded: {one_line(error)}") from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _of_other_shapes(ref) from None
    if ref.gguf_file is not None:
        _require_shapes(model, ref)
    _require_all_weights(model, info["missing_keys"], ref)
    require_language_model(model, ref)
    tie_as_files(model, ref)
    with_plain_linears(model)
    if ref.gguf_file is not None:
        require_places(model, Path(ref.path) / ref.gguf_file)
    model.requires_grad_(False)
    return model.eval()


def _from_files(ref: ModelRef, arguments: Mapping[str, Any]) -> tuple[torch.nn.Module, Any]:
    """The model as transformers loads it, and what it says of its keys."""
    config = without_quantization(_load_config(ref))
    model_class = _model_class(config, ref)
    extra: dict[str, Any] = {} if ref.gguf_file is not None else {"use_safetensors": True}
    # The config has what transformers does not read from a GGUF file, and lacks what a checkpoint
    # still says of its quantization though its files are in 16 bits.
    if ref.gguf_file is not None or stated_quantization(ref):
        extra["config"] = config
    loaded: tuple[torch.nn.Module, Any] = model_class.from_pretrained(
        ref.path, **ref.load_arguments, **extra, **arguments
    )
    return loaded


def _dequantized(
    ref: ModelRef, source: QuantizedSource, arguments: Mapping[str, Any]
) -> tuple[torch.nn.Module, Any]:
    """The model with the weights that the packed ones stand for, as from files in 16 bits.

    transformers is given a state dict whose tensors are dequantized when it asks for them, so its
    renaming, joining of experts and placing are those of a plain checkpoint.
    """
    config = without_quantization(_load_config(ref))
    model_class: Any = type(build_skeleton(ref))
    with opened(source.headers, source.weights) as state:
        loaded: tuple[torch.nn.Module, Any] = model_class.from_pretrained(
            None, config=config, state_dict=state, **arguments
        )
    return loaded


def _require_all_weights(model: torch.nn.Module, missing: Iterable[str], ref: ModelRef) -> None:
    """Check that no parameter was left to chance: transformers fills in what files do not hold.

    Raises:
        ModelError: One was.
    """
    made_up = sorted(set(missing) & {name for name, _ in model.named_parameters()})
    if made_up:
        raise ModelError(
            f"the files of model {ref.name} hold no weights for {few(made_up, 2)}, which "
            "transformers would fill with random numbers; check that the folder is complete"
        )


def _of_other_shapes(ref: ModelRef) -> ModelError:
    return ModelError(
        f"model {ref.name} cannot be loaded: weights in its files have other shapes than its "
        "config says; get the files and the config from one place"
    )


def _require_shapes(model: torch.nn.Module, ref: ModelRef) -> None:
    """Check that linears and embeddings are as large as they were made.

    transformers 5.18 gives them whatever a GGUF file holds under their names.

    Raises:
        ModelError: Some are not.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            made = (module.num_embeddings, module.embedding_dim)
        elif isinstance(module, torch.nn.Linear):
            made = (module.out_features, module.in_features)
        else:
            continue
        if tuple(module.weight.shape) != made:
            raise _of_other_shapes(ref)


def own_dtype(ref: ModelRef) -> torch.dtype | None:
    """The type of a checkpoint's weights as its config states it; None where it does not."""
    import torch

    config = _load_config(ref)
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    dtype = getattr(torch, stated, None) if isinstance(stated, str) else stated
    return dtype if isinstance(dtype, torch.dtype) else None


def files_dtype(ref: ModelRef) -> torch.dtype | None:
    """The type in which a checkpoint's files hold most bytes of what is not packed there; without
    such files the one that its config states.

    Configs may name another type than the files have, or none.
    """
    import torch

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    source = quantized_source(ref)
    packed = {part for of in source.weights.values() for part in of.parts} if source else set()
    num_bytes: Counter[torch.dtype] = Counter()
    for name, header in stored_tensors(ref).items():
        if name not in packed and (dtype := types.get(header.dtype)) is not None:
            num_bytes[dtype] += math.prod(header.shape) * dtype.itemsize
    return max(num_bytes, key=num_bytes.__getitem__) if num_bytes else own_dtype(ref)


def require_language_model(model: torch.nn.Module, ref: ModelRef) -> None:
    """Check that the model ends in a linear head over a vocabulary.

    Raises:
        ModelError: It does not.
    """
    import torch

    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if not isinstance(head, torch.nn.Linear):
        raise ModelError(
            f"model {ref.name} is a {type(model).__name__}, for which transformers names no linear "
            "head over a vocabulary (get_output_embeddings); the loss is computed from one"
        )


def _model_class(config: Any, ref: ModelRef) -> Any:
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {ref.name} is an encoder-decoder, not a decoder-only model")
    # BERT-like encoders have a causal class too; is_decoder tells which one the checkpoint is.
    is_masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    if is_masked and getattr(config, "is_decoder", True) is False:
        raise ModelError(f"model {ref.name} is an encoder, not a decoder-only language model")
    remote = ref.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    with_images = transformers.AutoModelForImageTextToText._model_mapping.get(type(config), None)
    # Some families have a class without the vision tower for the same config (Qwen3.5, Llama 4);
    # the checkpoint names its own.
    is_whole = with_images is not None and with_images.__name__ in (config.architectures or ())
    has_causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    if remote or (has_causal and not is_whole):
        return transformers.AutoModelForCausalLM
    if with_images is not None:
        return transformers.AutoModelForImageTextToText
    raise ModelError(
        f"model {ref.name} has type {config.model_type!r}, which is not a language model that "
        "transformers can load with AutoModelForCausalLM"
    )
