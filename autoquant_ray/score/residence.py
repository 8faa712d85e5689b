"""Where the weights of decoder layers live, and when they are on the device.

:class:`Resident` keeps all of them there. :class:`Offloaded` leaves them in safetensors files:
while a layer is visited its parameters are on the device, otherwise they are on the meta device, so
that code which forgets to visit fails instead of computing nonsense. The layer that comes next is
read by one background thread during the visit, so at most two layers are held.

A weight is read from its module when it is used: a reference taken before the visit is stale, and a
reference kept after it leaks a layer.

The files are memory-mapped. On a CPU, in the type that the files hold, a layer's parameters *are*
the mapping: nothing is copied, and the pages belong to the file cache, which the system may drop
and read again. Everywhere else they are copied and converted, once per visit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors
import torch


class Residence(Protocol):
    """Brings the weights of decoder layers to the device."""

    @property
    def is_offloaded(self) -> bool:
        """Whether a layer's weights are on the device only during a visit."""
        ...

    def visit(self, index: int, upcoming: int | None) -> AbstractContextManager[None]:
        """Weights of decoder layer ``index`` are on the device while open.

        Args:
            index: The layer; one visit at a time.
            upcoming: The layer visited next, read ahead; the same index keeps its weights.
        """
        ...

    def saving_names(self) -> AbstractContextManager[None]:
        """While open, autograd saves a layer's weights in a form that does not keep them alive."""
        ...


class Resident:
    """All weights are on the device all the time."""

    is_offloaded = False

    def visit(self, index: int, upcoming: int | None) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def saving_names(self) -> AbstractContextManager[None]:
        """Nothing to do: the weights are alive anyway."""
        return nullcontext()


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A parameter in a safetensors file.

    Attributes:
        file: Path.
        name: The tensor's name in the file.
        dtype: Type on the device.
        is_turned: Whether the file holds the matrix the other way round.
    """

    file: str
    name: str
    dtype: torch.dtype
    is_turned: bool = False


class StoredWeights:
    """Parameters in memory-mapped safetensors files.

    A mapping outlives its file's name: temporary files may be deleted once this is made.

    Args:
        stored: Full parameter name -> where it is.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = dict(stored)
        self._files: dict[str, Any] = {
            path: safetensors.safe_open(path, framework="pt")
            for path in sorted({tensor.file for tensor in stored.values()})
        }

    def __contains__(self, name: str) -> bool:
        """Whether a file holds this parameter."""
        return name in self._stored

    def share(self, name: str, owner: str) -> None:
        """Let a parameter be read where another one is."""
        self._stored[name] = self._stored[owner]

    def mapped(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor the way round in which the model has it; the mapping itself where it can be."""
        tensor: torch.Tensor = self._files[stored.file].get_tensor(stored.name)
        return tensor.T.contiguous() if stored.is_turned else tensor

    def read(self, name: str) -> torch.Tensor:
        """A copy of a parameter on the CPU, in the type in which the model has it."""
        stored = self._stored[name]
        return self.mapped(stored).to(stored.dtype, copy=True)


@dataclass(frozen=True)
class _Slot:
    """A place in the model that holds an offloaded parameter."""

    owner: torch.nn.Module
    attribute: str


@dataclass(frozen=True)
class _SavedView:
    """What autograd keeps of a view of a weight: where to read it again."""

    stored: StoredTensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Offloaded:
    """Weights stay in memory-mapped safetensors files.

    Args:
        layers: Decoder layers, name -> module; their parameters are on the meta device.
        stored: Full parameter name -> where it is; covers all of these parameters.
        device: Where a visited layer's parameters are.
    """

    is_offloaded = True

    def __init__(
        self,
        layers: Mapping[str, torch.nn.Module],
        stored: Mapping[str, StoredTensor],
        device: torch.device,
    ) -> None:
        self._device = device
        self._layers = [_slots(name, layer, stored) for name, layer in layers.items()]
        self._weights = StoredWeights(stored)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: dict[int, Future[list[torch.Tensor]]] = {}
        self._visited: list[tuple[StoredTensor, torch.Tensor]] = []

    @contextmanager
    def visit(self, index: int, upcoming: int | None) -> Iterator[None]:
        """See :meth:`Residence.visit`."""
        ahead = self._ahead.pop(index, None)
        self._ahead.clear()
        reading = self._reader.submit(self._read, index) if ahead is None else ahead
        tensors = reading.result()
        if upcoming is not None:
            is_same = upcoming == index
            self._ahead[upcoming] = (
                reading if is_same else self._reader.submit(self._read, upcoming)
            )
        slots = self._layers[index]
        resting = [slot.owner._parameters[slot.attribute] for slot in slots]
        self._visited = list(zip(slots.values(), tensors, strict=True))
        for slot, tensor in zip(slots, tensors, strict=True):
            if self._stream is not None:
                tensor.record_stream(torch.cuda.current_stream(self._device))
            slot.owner._parameters[slot.attribute] = torch.nn.Parameter(tensor, requires_grad=False)
        try:
            yield
        finally:
            self._visited = []
            for slot, parameter in zip(slots, resting, strict=True):
                slot.owner._parameters[slot.attribute] = parameter

    def saving_names(self) -> AbstractContextManager[None]:
        """See :meth:`Residence.saving_names`."""
        hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
            self._pack, self._unpack
        )
        return hooks

    def _read(self, index: int) -> list[torch.Tensor]:
        if self._stream is None:
            return [self._load(stored) for stored in self._layers[index].values()]
        with torch.cuda.stream(self._stream):
            tensors = [self._load(stored) for stored in self._layers[index].values()]
        self._stream.synchronize()
        return tensors

    def _load(self, stored: StoredTensor) -> torch.Tensor:
        mapped = self._weights.mapped(stored)
        tensor = mapped.to(device=self._device, dtype=stored.dtype)
        if tensor is mapped:
            _touch_pages(mapped)
        return tensor

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _SavedView:
        for stored, weight in self._visited:
            offset = tensor.data_ptr() - weight.data_ptr()
            if 0 <= offset < weight.nbytes and tensor.dtype == weight.dtype:
                elements = offset // weight.element_size()
                return _SavedView(stored, tensor.shape, tensor.stride(), elements)
        return tensor

    def _unpack(self, saved: torch.Tensor | _SavedView) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        weight = self._load(saved.stored)
        return weight.as_strided(saved.shape, saved.stride, weight.storage_offset() + saved.offset)


def _slots(
    name: str, layer: torch.nn.Module, stored: Mapping[str, StoredTensor]
) -> dict[_Slot, StoredTensor]:
    return {
        _Slot(owner, attribute): stored[".".join(filter(None, (name, path, attribute)))]
        for path, owner in layer.named_modules()
        for attribute, parameter in owner._parameters.items()
        if parameter is not None and parameter.is_meta
    }


def _touch_pages(tensor: torch.Tensor) -> None:
    """Read one byte per page, so that the file is read now and not in the middle of a product."""
    tensor.reshape(-1).view(torch.uint8)[::4096].sum()
