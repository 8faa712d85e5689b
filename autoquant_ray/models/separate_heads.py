"""Heads with a weight of their own in the files, though the config ties them to the embedding.

Where a checkpoint holds both weights, transformers (5.14, ``tie_weights``) compares them when it
loads it: it ties equal ones, keeps different ones, and leaves the config as it is. So a head that
was saved twice is tied here too, and one that differs is a layer like any other. A skeleton, made
from the config alone, must be told by the files, and so must a model whose weights stay there
(``findings/transformers_ties_no_heads_on_disk.sh``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.models.dequantize import LazyWeight, opened
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.gguf_config import read_facts
from autoquant_ray.models.packed_weight import PackedWeight
from autoquant_ray.models.quantized_source import quantized_source
from autoquant_ray.models.stored_tensors import stored_tensors

if TYPE_CHECKING:
    import torch

_ROWS_AT_ONCE = 4096


def separate_head(model: Any) -> str | None:
    """Name of the head that the config ties to the embedding and that has a weight of its own.

    Args:
        model: A loaded model, or a skeleton that :func:`tie_as_files` has seen.
    """
    name, embedding = _head_name(model), model.get_input_embeddings()
    is_shared = embedding is None or model.get_output_embeddings().weight is embedding.weight
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    return None if is_shared or f"{name}.weight" not in ties else name


def describe_separate(head: str) -> str:
    """What people are told of such a head."""
    return (
        f"{head} is a layer of its own: the config ties it to the input embedding, but the files "
        "hold another weight for it"
    )


def tie_as_files(model: Any, ref: ModelRef) -> None:
    """Give a head that the config ties a weight of its own where the files hold one, and none where
    they hold the embedding's again.

    Args:
        model: A skeleton, or the loaded model: rounded to fewer bits, two weights may be equal that
            differ in the files, and those that stay in files are never compared.
        ref: Where the files are; of a hub id, those in the local cache count.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if embedding is None or head.weight.shape != embedding.weight.shape:
        return
    is_shared, name = head.weight is embedding.weight, f"{_head_name(model)}.weight"
    if not is_shared and separate_head(model) is None:
        return
    embedding_name = next(n for n, m in model.named_modules() if m is embedding)
    differ = _differ_in_files(ref, name, f"{embedding_name}.weight", tuple(head.weight.shape))
    if is_shared and differ:
        give_weight(model)
    elif not is_shared and not differ:
        head.weight = embedding.weight


def give_weight(model: Any) -> None:
    """Untie the head: a copy of the embedding's weight becomes its own."""
    import torch

    head = model.get_output_embeddings()
    weight = head.weight
    head.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    name, tied = f"{_head_name(model)}.weight", model.all_tied_weights_keys
    model.all_tied_weights_keys = {n: source for n, source in tied.items() if n != name}


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def _differ_in_files(ref: ModelRef, head: str, embedding: str, shape: tuple[int, ...]) -> bool:
    """Whether the files hold both weights, and these differ."""
    if ref.gguf_file is not None:
        return read_facts(Path(ref.path) / ref.gguf_file).has_separate_head
    headers, source = stored_tensors(ref), quantized_source(ref)
    weights = {} if source is None else source.weights
    tensors = [*headers, *weights]
    head_name, embedding_name = (_stored_name(name, tensors) for name in (head, embedding))
    if head_name is None or embedding_name is None or head_name == embedding_name:
        return False
    pair = (head_name, embedding_name)
    if any(name not in weights and headers[name].shape != shape for name in pair):
        return False
    used = {part: headers[part] for name in pair for part in _parts(weights, name)}
    with opened(used, {name: weights[name] for name in pair if name in weights}) as state:
        return _differ(state[head_name], state[embedding_name], shape)


def _parts(weights: Mapping[str, PackedWeight], name: str) -> tuple[str, ...]:
    return weights[name].parts if name in weights else (name,)


def _stored_name(name: str, stored: Iterable[str]) -> str | None:
    """A parameter's name in the files, where prefixes may differ: its own, else the shortest."""
    end = ".".join(name.split(".")[-2:])
    fitting = [other for other in stored if other == end or other.endswith(f".{end}")]
    return name if name in fitting else min(fitting, key=len, default=None)


def _differ(rows: Any, other_rows: Any, shape: tuple[int, ...]) -> bool:
    """Whether two stored tensors of a shape differ, read in parts; dequantized ones as a whole."""
    import torch

    whole = [part[...] if isinstance(part, LazyWeight) else part for part in (rows, other_rows)]
    if any(isinstance(part, torch.Tensor) and part.shape != shape for part in whole):
        return False
    for start in range(0, shape[0], _ROWS_AT_ONCE):
        parts: list[torch.Tensor] = [part[start : start + _ROWS_AT_ONCE] for part in whole]
        if not torch.equal(parts[0].float(), parts[1].float()):
            return True
    return False
