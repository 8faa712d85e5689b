"""A CUDA device without a GPU: its tensors say that they are on ``cuda:0``, and hold real values.

Every operation on the device comes here, whatever thread it is from, and the CPU computes it. It
fails where CUDA does: where a CPU tensor with a dimension meets a device tensor. It is noted where
CUDA makes the host wait (``torch.cuda.set_sync_debug_mode`` names the same operations): a number is
read, a mask or ``nonzero`` asks for a size, a copy crosses over in either direction.

What this does not show: which types and shapes CUDA's kernels take (but ``torch._int_mm``'s, which
are checked here), what they compute, and how long that takes. ModelOpt's kernels are replaced by
what computes the same on a CPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from autoquant_ray.quantize.backends.block_formats import blocks_of, quantize_blocks

DEVICE = torch.device("cuda", 0)
_PACKAGES = ("autoquant_ray/", "transformers/", "modelopt/", "accelerate/")
_aten = torch.ops.aten
_SIZES = {_aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_consecutive}
_SIZES |= {_aten.unique_dim, _aten.bincount}
_COPIES = {_aten.copy_, _aten._to_copy, _aten.set_}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index}

_waits: Counter[str] = Counter()


class DeviceTensor(torch.Tensor):
    """A tensor on the device; ``values`` has its numbers, in the memory of the host."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> DeviceTensor:
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"on cuda:0: {self.values}"

    def data_ptr(self) -> int:
        """Where its numbers are."""
        return self.values.data_ptr()

    def tolist(self) -> Any:
        """The host waits and reads all numbers."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts what makes the host wait: ``file:function operation``."""
    _waits.clear()
    counted: Counter[str] = Counter()
    yield counted
    counted.update(_waits)
    _waits.clear()


def install() -> None:
    """Let torch create tensors on the device, in every thread of this process."""
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "CUDA")
    _installed.append(library)
    torch._C._set_only_lift_cpu_tensors(True)  # else ``torch.tensor`` looks for a real device
    torch.__future__.set_swap_module_params_on_conversion(True)
    stream = torch.Stream(stream_id=0, device_index=0, device_type=1)
    _device_constructors()  # remembers the original, which ``with torch.device(...)`` asks for
    torch.tensor = partial(_tensor, torch.tensor)
    for name, function in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "current_stream": lambda _device=None: stream,
        "Stream": lambda _device=None: _Stream(stream),
        "stream": lambda _stream: nullcontext(),
        "synchronize": lambda _device=None: _note("synchronize"),
        "mem_get_info": lambda _device=None: (2**33, 2**33),
        "empty_cache": lambda: None,
    }.items():
        setattr(torch.cuda, name, function)


_installed: list[torch.library.Library] = []


def _tensor(original: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """``torch.tensor``, which passes by all that is in Python."""
    args = tree_map_only(DeviceTensor, lambda tensor: tensor.tolist(), args)
    made: torch.Tensor = original(*args, **kwargs)
    return made if device is None else made.to(device)


class _Stream:
    """As much of a stream of copies as is used."""

    def __init__(self, stream: torch.Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        """The host waits."""
        _note("synchronize")


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a CUDA kernel does, or that it does not."""
    device: list[DeviceTensor] = []
    host: list[torch.Tensor] = []
    values, named = _on_host(args, device, host), _on_host(kwargs, device, host)
    strangers = [tensor for tensor in host if tensor.is_cuda]
    assert not strangers, f"{func}: a tensor on the device without values"
    packet = getattr(func, "overloadpacket", None)
    if packet is _aten.record_stream:
        return None
    target = kwargs.get("device")
    if packet not in _COPIES and device and any(tensor.dim() for tensor in host):
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu "
            f"{tuple(next(t.shape for t in host if t.dim()))} in {_place()}"
        )
    if (operation := _waiting(packet, args, kwargs, bool(device))) is not None:
        _note(operation)
    if target is not None:
        named["device"] = torch.device("cpu")
    result = _KERNELS.get(packet, func)(*values, **named)
    for tensor in device:
        if tensor.shape != tensor.values.shape:  # given as ``out``, and made larger
            with torch._C._DisableTorchDispatch():
                tensor.data = DeviceTensor(tensor.values)
    if packet is _aten._local_scalar_dense:
        return result
    if (torch.device(target).type != "cuda") if target is not None else not device:
        return result
    if isinstance(result, torch.Tensor):
        result = DeviceTensor(result)
    else:
        result = tree_map_only(torch.Tensor, DeviceTensor, result)
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return result
    return return_and_correct_aliasing(func, tuple(args), dict(kwargs), result)


def _on_host(given: Any, device: list[DeviceTensor], host: list[torch.Tensor]) -> Any:
    """Arguments with the values of device tensors in their place; notes the tensors among them."""
    if isinstance(given, DeviceTensor):
        device.append(given)
        return given.values
    if isinstance(given, torch.Tensor):
        host.append(given)
    if isinstance(given, list | tuple):
        return [_on_host(each, device, host) for each in given]
    if isinstance(given, dict):
        return {name: _on_host(each, device, host) for name, each in given.items()}
    return given


def _waiting(
    packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], has_device: bool
) -> str | None:
    """What makes the host wait for the device, if it has to."""
    name = packet.__name__ if packet is not None else ""
    if packet in (_aten._local_scalar_dense, _aten.equal):
        return "item" if has_device else None
    if packet in _SIZES or (packet is _aten.repeat_interleave and args[1:] in ((), (None,))):
        return name if has_device else None
    if packet in _INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        fills = packet is not _aten.index and not isinstance(args[-1], DeviceTensor)
        return f"{name} by mask" if masks and not (fills and len(masks) == 1) else None
    if packet is _aten._to_copy and has_device and "device" in kwargs:
        target = kwargs["device"]
        return "to host" if target is not None and torch.device(target).type == "cpu" else None
    if packet is _aten.copy_ and isinstance(args[0], DeviceTensor):
        is_waiting = len(args) < 3 or not args[2]  # as with ``non_blocking``
        return "to device" if is_waiting and not isinstance(args[1], DeviceTensor) else None
    if packet is _aten.copy_ and isinstance(args[1], DeviceTensor):
        return "to host"
    return None


def _note(operation: str) -> None:
    _waits[f"{_place()} {operation}"] += 1


def _place() -> str:
    """File and function of the innermost frame that is neither torch nor this; of this package,
    the file's name, whatever its room."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if frame.f_code.co_name == "__torch_dispatch__":  # passes on what another frame computes
            path = ""
        for package in _PACKAGES:
            if f"/{package}" in path:
                name = path.rsplit(f"/{package}", 1)[1]
                while frame.f_code.co_name.startswith("<") and frame.f_back is not None:
                    frame = frame.f_back  # a comprehension is no function from Python 3.12 on
                if package == "autoquant_ray/":
                    return f"{Path(name).name}:{frame.f_code.co_name}"
                return f"{package}{name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _quantize(
    values: torch.Tensor,
    amax: torch.Tensor,
    num_bits: int = 8,
    exponent_bits: int = 0,
    unsigned: bool = False,
    narrow_range: bool = True,
    *_for_export: Any,
) -> torch.Tensor:
    """What ModelOpt's kernel of integers and FP8 computes."""
    from modelopt.torch.quantization.tensor_quant import _fp8_eager, _tensor_quant

    if exponent_bits:
        return _fp8_eager(values, amax)
    return _tensor_quant(values, amax, num_bits, unsigned, narrow_range)


def _quantize_blocks(
    values: torch.Tensor,
    block_size: int,
    amax: torch.Tensor | None,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
    *_for_export: Any,
) -> torch.Tensor:
    """What ModelOpt's kernels of NVFP4 and MX compute."""
    number: Any = num_bits
    if exponent_bits:
        number = (exponent_bits, num_bits - exponent_bits - 1)
    scale = (scale_exponent_bits, scale_num_bits - scale_exponent_bits - 1)
    sizes = {-1: block_size, "type": "dynamic", "scale_bits": scale}
    blocks = blocks_of({"num_bits": number, "block_sizes": sizes})
    return quantize_blocks(values, blocks, amax if blocks.has_second_scale else None)


def _int_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What cuBLAS computes, of the shapes that it takes (``_int_mm_out_cuda`` in torch)."""
    if left.shape[0] <= 16 or left.shape[1] % 8 or right.shape[1] % 8:
        raise RuntimeError(f"_int_mm: CUDA does not multiply {left.shape} by {right.shape}")
    return torch._int_mm(left, right)


_KERNELS: dict[Any, Any] = {
    _aten._int_mm: _int_mm,
    torch.ops.tensorrt.quantize_op: _quantize,
    torch.ops.tensorrt.dynamic_block_quantize_op: _quantize_blocks,
}
