"""A model in parts that are in memory one after another: its decoder layers, and what is around
them.

While a part is loaded, a shell of the model holds its modules, under their full names, and nothing
else: exporters that walk through a model see no more than that. What must be in memory together is
one part: weights that are shared, and a weight with what makes its input, where the input has
factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autoquant_ray.distributed.host_memory import trim_heap
from autoquant_ray.errors import FormatError
from autoquant_ray.export.layouts import COMPRESSED_TENSORS, MODELOPT
from autoquant_ray.models.layers import decoder_layers
from autoquant_ray.score.residence import StoredWeights

Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Modules of a model that are in memory together.

    Attributes:
        number: Its place among the parts.
        modules: Roots of the modules, by their names.
        owners: Modules beside these whose own parameters and buffers belong to it.
    """

    number: int
    modules: Names
    owners: Names

    def holds(self, name: str) -> bool:
        """Whether a module, or something below it, is in this part."""
        return any(name == root or name.startswith(f"{root}.") for root in self.modules)


class PartedModel:
    """A model whose weights are loaded part by part.

    Args:
        model: The model; what was packed is taken out of it.
        weights: Reads its parameters, which are on the meta device; None: they are in memory.
        together: Sets of modules that must be in one part.
        is_whole: All of the model is one part.
    """

    def __init__(
        self,
        model: Any,
        weights: StoredWeights | None,
        together: Iterable[Names] = (),
        *,
        is_whole: bool = False,
    ) -> None:
        self.model = model
        self._weights = weights
        layers = () if is_whole else tuple(decoder_layers(model))
        whole = [tuple(name for name, _ in model.named_children())] if is_whole else []
        self.parts = _parts(model, layers, [*whole, *together, *_shared(model)])

    @contextmanager
    def loaded(self, part: Part) -> Iterator[Any]:
        """A model that holds one part alone; afterwards its weights are gone.

        Args:
            part: Of ``parts``; each once.

        Raises:
            FormatError: ModelOpt gave a weight another form when it prepared the model.
        """
        self._load(part)
        try:
            yield _shell(self.model, part)
        finally:
            self._forget(part)
            trim_heap()

    def _forget(self, part: Part) -> None:
        # Modules refer to each other in circles, so they themselves may stay for a while.
        for name in part.modules:
            for module in self.model.get_submodule(name).modules():
                module._parameters, module._buffers = {}, {}
            parent, _, child = name.rpartition(".")
            self.model.get_submodule(parent)._modules[child] = torch.nn.Module()
        for name in part.owners:
            owner = self.model.get_submodule(name)
            owner._parameters, owner._buffers = {}, {}

    def _load(self, part: Part) -> None:
        for places in _resting(self.model, part).values():
            assert self._weights is not None
            name = next((name for name, _, _ in places if name in self._weights), None)
            if name is None:  # preparing the model parted its experts (DBRX)
                raise parted(places[0][0])
            parameter = torch.nn.Parameter(self._weights.read(name), requires_grad=False)
            for _, owner, attribute in places:
                owner._parameters[attribute] = parameter


def parted(name: str) -> FormatError:
    """The error for a weight that ModelOpt makes of others when it prepares a model.

    Args:
        name: Of the weight.
    """
    return FormatError(
        f"`format` {MODELOPT} cannot hold this model: ModelOpt makes {name} of its weights, which "
        f"is in no file of it; give `format` {COMPRESSED_TENSORS}"
    )


def _resting(model: Any, part: Part) -> dict[int, list[tuple[str, torch.nn.Module, str]]]:
    """Parameters of a part on the meta device, each with the places that it has in the model."""
    resting: dict[int, list[tuple[str, torch.nn.Module, str]]] = {}
    for root in (*part.modules, *part.owners):
        module = model.get_submodule(root)
        owners = module.named_modules() if root in part.modules else [("", module)]
        for path, owner in owners:
            for attribute, parameter in owner._parameters.items():
                if parameter is not None and parameter.is_meta:
                    name = ".".join(filter(None, (root, path, attribute)))
                    resting.setdefault(id(parameter), []).append((name, owner, attribute))
    return resting


def outline(model: Any) -> Any:
    """A copy of a model's modules without their tensors, on which names in files depend.

    Args:
        model: The model, before a part is taken out of it.
    """
    copy = _bare(model, keeps=False)
    copy._modules.update({name: outline(child) for name, child in model.named_children()})
    return copy


def are_readable(model: Any, weights: StoredWeights) -> bool:
    """Whether files hold every parameter that is on the meta device, by one of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            names.setdefault(id(parameter), []).append(name)
    return all(any(name in weights for name in alike) for alike in names.values())


def _parts(model: Any, layers: Names, together: list[Names]) -> list[Part]:
    """The parts in the order of their first modules."""
    roots: list[str] = []
    owners: list[str] = []
    _divide("", model, layers, roots, owners)
    head = {root: root for root in roots}

    def find(root: str) -> str:
        while head[root] != root:
            root = head[root]
        return root

    for names in together:
        first, *others = dict.fromkeys(find(_root_of(name, roots)) for name in names)
        head |= dict.fromkeys(others, first)
    members: dict[str, list[str]] = {}
    for root in roots:
        members.setdefault(find(root), []).append(root)
    if not members:
        members[""] = []
    return [
        Part(number=number, modules=tuple(names), owners=tuple(owners) if number == 0 else ())
        for number, names in enumerate(members.values())
    ]


def _divide(name: str, module: Any, layers: Names, roots: list[str], owners: list[str]) -> None:
    """Find the largest modules that hold no decoder layer, and what owns tensors around them."""
    is_around = any(layer.startswith(f"{name}." if name else "") for layer in layers)
    if name and (name in layers or not is_around):
        roots.append(name)
        return
    if module._parameters or module._buffers:
        owners.append(name)
    for child, part in module.named_children():
        _divide(f"{name}.{child}" if name else child, part, layers, roots, owners)


def _root_of(name: str, roots: list[str]) -> str:
    return next(root for root in roots if name == root or name.startswith(f"{root}."))


def _shared(model: Any) -> Iterator[Names]:
    """Modules that own one parameter together."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if name and parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return (tuple(names) for names in owners.values() if len(names) > 1)


def _shell(model: Any, part: Part) -> Any:
    """A copy of a model with the modules of a part alone, which it shares with it."""
    shell = _bare(model, keeps="" in part.owners)
    for name in (*part.owners, *part.modules):
        copy, original, path = shell, model, ""
        for child in filter(None, name.split(".")):
            path = f"{path}.{child}" if path else child
            original = original._modules[child]
            if child not in copy._modules:
                is_part = path in part.modules
                bare = original if is_part else _bare(original, keeps=path in part.owners)
                copy._modules[child] = bare
            copy = copy._modules[child]
    return shell


def _bare(module: Any, *, keeps: bool) -> Any:
    """A module like another, without modules below it, and without tensors unless it keeps them."""
    bare = object.__new__(type(module))
    bare.__dict__ = {**module.__dict__, "_modules": {}}
    if not keeps:
        bare.__dict__ |= {"_parameters": {}, "_buffers": {}}
    return bare
