"""Undoes what a forward pass leaves on a model's modules, so that no sample depends on another.

transformers keeps state beside the parameters: ``dynamic`` rope the longest context that it has
seen with the frequencies of that context, recurrent blocks their last state, vision-language models
the offsets of their last positions. Whatever it is: buffers and attributes are noted before a run
and put back after it. That copies names, not tensors; only tensors that a model's first run changes
in place are copied.

What the first run does stays: some models prepare themselves in it (RWKV divides its weights once,
and notes that it has). torch's own modules keep nothing in evaluation mode and are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch

_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
"""Parameters, parts and hooks: whoever replaces them in a run puts them back."""


class ForwardState:
    """What runs of a model leave behind beside their output.

    Args:
        base: The model without its head.
        layers: Its decoder layers, which are also run by themselves.
    """

    def __init__(self, base: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
        self._modules = {
            part: [m for m in part.modules() if not type(m).__module__.startswith("torch.nn.")]
            for part in (base, *layers)
        }
        self._copied: dict[torch.nn.Module, list[str]] = {}

    @contextmanager
    def first_run(self, base: torch.nn.Module) -> Iterator[None]:
        """Keep what the base model's first run changes, and note which tensors it changes."""
        before = {module: _versions(module) for module in self._modules[base]}
        yield
        for module, versions in before.items():
            changed = [
                name
                for name, (tensor, version) in _versions(module).items()
                if name in versions and versions[name][0] is tensor and versions[name][1] != version
            ]
            if changed:
                self._copied[module] = changed

    @contextmanager
    def undone(self, part: torch.nn.Module) -> Iterator[None]:
        """Put back, at the end, what a run changes.

        Args:
            part: What runs: the base model or a layer.
        """
        noted = [_Noted(module, self._copied.get(module, ())) for module in self._modules[part]]
        try:
            yield
        finally:
            for module in noted:
                module.put_back()


class _Noted:
    """Attributes and buffers of a module; of lists and mappings among them, what they hold."""

    def __init__(self, module: torch.nn.Module, copied: Sequence[str]) -> None:
        attributes = vars(module)
        plain = [
            value
            for name, value in attributes.items()
            if type(value) in (dict, list) and name not in _OF_EVERY_MODULE
        ]
        self._before: list[tuple[Any, Any]] = [
            (held, held.copy()) for held in (attributes, module._buffers, *plain)
        ]
        for _, names in self._before[:2] if copied else ():
            names.update({name: names[name].clone() for name in copied if name in names})

    def put_back(self) -> None:
        for held, before in self._before:
            if isinstance(held, list):
                held[:] = before
            elif held.keys() != before.keys() or not all(map(is_, held.values(), before.values())):
                held.clear()
                held.update(before)


def _versions(module: torch.nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    """Name -> tensor, and how often it was changed in place; of buffers and attributes."""
    return {
        name: (tensor, tensor._version)
        for name, tensor in (*vars(module).items(), *module._buffers.items())
        if isinstance(tensor, torch.Tensor) and not tensor.is_inference()
    }
