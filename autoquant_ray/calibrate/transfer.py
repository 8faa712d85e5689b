"""Statistics brought to the host together: it waits for the device once, not for each of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

Key = TypeVar("Key", bound=Hashable)


def on_host(tensors: Mapping[Key, torch.Tensor]) -> dict[Key, np.ndarray[Any, Any]]:
    """Arrays of the same shapes and types.

    Args:
        tensors: Of any shapes, on any devices, of types that NumPy has.
    """
    alike: dict[Hashable, list[Key]] = {}
    for key, tensor in tensors.items():
        alike.setdefault((tensor.device, tensor.dtype), []).append(key)
    arrays: dict[Key, np.ndarray[Any, Any]] = {}
    for keys in alike.values():
        flat = torch.cat([tensors[key].flatten() for key in keys]).cpu()
        parts = flat.split([tensors[key].numel() for key in keys])
        arrays |= {k: p.view(tensors[k].shape).numpy() for k, p in zip(keys, parts, strict=True)}
    return {key: arrays[key] for key in tensors}
