"""Load a model as its placement asks: onto one device, over several, or with layers left on disk.

transformers and accelerate do the work. For ``offload`` they rename checkpoint keys and find each
parameter's file; parameters that they must convert (experts that the model fuses) are written once
into a temporary folder, which is deleted as soon as its files are mapped. accelerate's own hooks,
which would bring in one linear at a time, are then taken off: :class:`Offloaded` brings in layers.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import get_balanced_memory

from autoquant_ray.errors import ModelError
from autoquant_ray.modelopt_api import prepare_experts
from autoquant_ray.models.find import ModelRef, require_mappable
from autoquant_ray.models.layers import decoder_layers
from autoquant_ray.models.load import build_skeleton, load_model
from autoquant_ray.models.quantizable import is_turned, with_plain_linears
from autoquant_ray.score.residence import (
    Offloaded,
    Residence,
    Resident,
    StoredTensor,
    StoredWeights,
)

SPLIT_SHARE = 0.8
"""Share of each GPU's free memory that a split model's weights may fill; the rest is for work."""


class PlacedSpec(Protocol):
    """What a scoring or evaluation spec says about its model."""

    @property
    def model(self) -> ModelRef:
        """The model to load."""
        ...

    @property
    def dtype(self) -> str:
        """``float32`` or ``bfloat16``."""
        ...

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    @property
    def placement(self) -> str:
        """``resident``, ``offload`` or ``split``."""
        ...

    @property
    def num_threads(self) -> int:
        """Threads of CPU kernels."""
        ...


def set_up_model(spec: PlacedSpec, model: Any = None) -> tuple[Any, Residence]:
    """Set this process's threads, and load its model with experts that can be run.

    Args:
        spec: What to load, and where.
        model: Use this loaded model instead of loading the spec's.

    Raises:
        ModelError: As :func:`load_placed`.
    """
    torch.set_num_threads(spec.num_threads)
    residence: Residence = Resident()
    if model is None:
        model, residence = load_placed(
            spec.model, dtype=spec.dtype, device=spec.device, placement=spec.placement
        )
    with_plain_linears(model)
    prepare_experts(model)
    return model, residence


def load_placed(
    ref: ModelRef, *, dtype: str, device: str, placement: str
) -> tuple[torch.nn.Module, Residence]:
    """Load a model for scoring.

    Args:
        ref: Model to load.
        dtype: ``float32`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        placement: ``resident``, ``offload`` or ``split``.

    Returns:
        The model, and what brings the weights of its decoder layers to the device.

    Raises:
        ModelError: The weights cannot be read, or the model cannot be placed like this.
    """
    if placement == "offload":
        return _load_offloaded(ref, dtype=dtype, device=device)
    if placement == "split":
        return _load_split(ref, dtype=dtype), Resident()
    return load_model(ref, dtype=dtype, device=device), Resident()


def _load_offloaded(ref: ModelRef, *, dtype: str, device: str) -> tuple[torch.nn.Module, Residence]:
    require_mappable(ref)
    skeleton = build_skeleton(ref)
    names = list(decoder_layers(skeleton))
    if not names:
        raise ModelError(
            f"{type(skeleton).__name__} has no list of decoder layers and cannot be offloaded; "
            "give `placement` resident"
        )
    place: int | str = torch.cuda.current_device() if device == "cuda" else "cpu"
    places = offload_map(skeleton, names, place)
    with _on_disk(ref, dtype=dtype, device=device, places=places) as (model, stored):
        layers = {name: model.get_submodule(name) for name in names}
        missing = {n for n, parameter in model.named_parameters() if parameter.is_meta}
        missing -= set(stored)
        if missing:
            raise ModelError(f"model {ref.name} has no weights for {min(missing)}")
        return model, Offloaded(layers, stored, torch.device(place))


def load_on_disk(ref: ModelRef, *, dtype: str) -> tuple[torch.nn.Module, StoredWeights]:
    """Load a model whose parameters all stay in its files.

    Args:
        ref: Model to load.
        dtype: ``float32`` or ``bfloat16``.

    Returns:
        The model with all parameters on the meta device, and what reads them. Heads that share the
        embedding's weight, and copies of it, may not be among what can be read.

    Raises:
        ModelError: The weights cannot be read, or are in no files that can be mapped.
    """
    require_mappable(ref)
    with _on_disk(ref, dtype=dtype, device="cpu", places={"": "disk"}) as (model, stored):
        return model, StoredWeights(stored)


@contextmanager
def _on_disk(
    ref: ModelRef, *, dtype: str, device: str, places: Mapping[str, int | str]
) -> Iterator[tuple[torch.nn.Module, dict[str, StoredTensor]]]:
    """A model with parameters on the meta device, and where these are: in the model's files, or in
    temporary ones that last until the context ends."""
    with tempfile.TemporaryDirectory(prefix="autoquant-offload-") as folder:
        placing = {"device_map": dict(places), "offload_folder": folder}
        with _quiet("accelerate.big_modeling"):  # it warns of the meta device
            model = load_model(ref, dtype=dtype, device=device, placing=placing)
        stored = _stored_tensors(model)
        for name, module in model.named_modules():
            if is_turned(module) and f"{name}.weight" in stored:
                stored[f"{name}.weight"] = replace(stored[f"{name}.weight"], is_turned=True)
        _take_off_hooks(model)
        yield model, stored


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Inside, a logger of another package says nothing below errors."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stored_tensors(model: torch.nn.Module) -> dict[str, StoredTensor]:
    """Parameter name -> its file, from the hooks that accelerate put on the offloaded modules."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            return {
                name: StoredTensor(
                    file=entry["safetensors_file"],
                    name=entry["weight_name"],
                    dtype=getattr(torch, entry["dtype"]),
                )
                for name, entry in weights.dataset.index.items()
            }
    return {}


def _take_off_hooks(model: torch.nn.Module) -> None:
    remove_hook_from_submodules(model)
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if getattr(forward, "__func__", None) is type(module).forward:
            del module.forward  # accelerate leaves the class's own method on the instance


def offload_map(
    model: torch.nn.Module, layers: list[str], device: int | str
) -> dict[str, int | str]:
    """accelerate's device map: decoder layers on disk, everything else on the device.

    Args:
        model: The model or its skeleton.
        layers: Names of its decoder layers.
        device: Index of a GPU, or ``cpu``.
    """
    places: dict[str, int | str] = {}

    def place(name: str, module: torch.nn.Module) -> None:
        prefix = f"{name}." if name else ""
        if name in layers:
            places[name] = "disk"
        elif not any(layer.startswith(prefix) for layer in layers):
            places[name] = device
        else:
            tensors = [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            places.update({prefix + tensor_name: device for tensor_name, _ in tensors})
            for child_name, child in module.named_children():
                place(prefix + child_name, child)

    place("", model)
    return places


def split_map(
    model: torch.nn.Module, free_bytes: Mapping[int, int], *, name: str
) -> dict[str, int | str]:
    """accelerate's device map that spreads whole decoder layers evenly over GPUs.

    Args:
        model: Skeleton in the type that it will be loaded in.
        free_bytes: Index of each GPU -> its free memory.
        name: The model's name, for the error.

    Raises:
        ModelError: The GPUs have no room for all of it; nothing may spill to the host.
    """
    classes = getattr(model, "_no_split_modules", None)
    room: dict[int | str, int | str] = {
        gpu: int(free * SPLIT_SHARE) for gpu, free in free_bytes.items()
    }
    balanced = get_balanced_memory(model, max_memory=room, no_split_module_classes=classes)
    places: dict[str, int | str] = dict(
        infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=classes)
    )
    spilled = [module for module, place in places.items() if place in ("cpu", "disk")]
    if spilled:
        gib = sum(free_bytes.values()) * SPLIT_SHARE / 2**30
        raise ModelError(
            f"model {name} does not fit {len(free_bytes)} GPUs with {gib:.1f} GiB for weights; "
            "raise `gpus_per_worker`, or give `placement` offload"
        )
    return places


def _load_split(ref: ModelRef, *, dtype: str) -> torch.nn.Module:
    free = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())}
    skeleton = build_skeleton(ref).to(getattr(torch, dtype))
    placing = {"device_map": split_map(skeleton, free, name=ref.name)}
    return load_model(ref, dtype=dtype, device="cuda", placing=placing)
