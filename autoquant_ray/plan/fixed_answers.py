"""A model run without its weights: linears, embeddings and fused experts give fixed answers.

What lies between them (norms, rotations, attention, activations, routers, sums) is run with random
weights, so it shows which layers read what, whatever a family's code looks like, at the cost of a
few tokens. Matrices stay on the meta device: a model of any size is run in seconds.

Shape letters: B samples, S positions, T their product, O out features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from autoquant_ray.models.quantizable import quantizable_modules

if TYPE_CHECKING:
    import torch

Scaling = Callable[["torch.Tensor"], "torch.Tensor"]
"""What is done to a module's output, ``(..., O)``."""

NUM_TOKENS = 16
_STRIDE = 7919  # between the answers of two modules
_MAX_ELEMENTS = 2**28
_SAME = 1e-9


class FixedAnswers:
    """A copy of a model that gives fixed answers.

    Args:
        model: A skeleton on the meta device, or a loaded model; it is not changed.

    Raises:
        ValueError: Too much of it lies outside of linears.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        import torch

        self.model = without_weights(model)
        generator = torch.Generator().manual_seed(0)
        self.planned = list(quantizable_modules(self.model))
        matrices = {m.path: self.model.get_submodule(m.path) for m in self.planned}
        embeddings = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Embedding)
        }
        answered = {**matrices, **embeddings}
        self._widths = {
            name: getattr(module, "out_features", None) or getattr(module, "embedding_dim", None)
            for name, module in answered.items()
        }
        # A convolution's weight may be read past its module; torch convolves with one on the meta
        # device without an error, and gives memory that nothing was written to.
        unread = {m for m in answered.values() if not isinstance(m, torch.nn.modules.conv._ConvNd)}
        _fill(self.model, unread, generator)
        widest = max((width or 0 for width in self._widths.values()), default=0)
        length = NUM_TOKENS * widest + _STRIDE * (len(answered) + 1)
        self._numbers = torch.randn(length, generator=generator, dtype=torch.float64) + 0.5
        self._seen: dict[str, list[torch.Tensor]] = {}
        self._visit: Callable[[str, list[torch.Tensor]], None] = self._seen.__setitem__
        self._scalings: Mapping[str, Scaling] = {}
        head: Any = self.model.get_output_embeddings()
        for number, (name, module) in enumerate(answered.items()):
            answer = self._answer(name, number, is_head=module is head)
            module.forward = answer

    def run(
        self, scalings: Mapping[str, Scaling], visit: Callable[[str, list[torch.Tensor]], None]
    ) -> None:
        """Run a few tokens.

        Args:
            scalings: Module that answers -> what is done to its answer.
            visit: Called with each answering module's name and the tensors that it is given.
        """
        import torch

        self._scalings, self._visit = scalings, visit
        ids_BS = torch.arange(1, NUM_TOKENS + 1)[None]
        with torch.no_grad(), single_thread():
            self.model(input_ids=ids_BS, use_cache=False)

    @contextmanager
    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While open, parameters have other values.

        Args:
            tensors: Name of a parameter -> its value.
        """
        before = {name: self.model.get_parameter(name).data for name in tensors}
        for name, tensor in tensors.items():
            self.model.get_parameter(name).data = tensor
        try:
            yield
        finally:
            for name, tensor in before.items():
                self.model.get_parameter(name).data = tensor

    def _answer(self, name: str, number: int, *, is_head: bool) -> Callable[..., torch.Tensor]:
        def answer(*arguments: Any, **named: Any) -> torch.Tensor:
            import torch

            tensors = [a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor)]
            if any(tensor.is_meta for tensor in tensors):
                raise ValueError(f"what {name} reads is computed with a weight that is not there")
            self._visit(name, tensors)
            shape = tensors[0].shape
            width = self._widths[name]
            if not isinstance(self.model.get_submodule(name), torch.nn.Embedding):
                shape = shape[:-1]
            if is_head:
                return torch.zeros(1, dtype=torch.float64).expand(*shape, width)
            full = (*shape, tensors[0].shape[-1] if width is None else width)
            start, size = number * _STRIDE, math.prod(full)
            given = self._numbers[start : start + size].reshape(full).clone()
            scaling = self._scalings.get(name)
            return given if scaling is None else scaling(given)

        return answer


def is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal up to rounding in float64."""
    import torch

    if tensor.shape != other.shape:
        return False
    if torch.equal(tensor, other):
        return True
    if not tensor.is_floating_point():
        return False
    return bool(torch.allclose(tensor, other, rtol=_SAME, atol=0.0))


@contextmanager
def single_thread() -> Iterator[None]:
    """While open, kernels run in this thread: for a few tokens, waking others takes longer."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy on the meta device, in evaluation mode; parameters that are shared stay shared."""
    import torch

    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    copied: torch.nn.Module = copy.deepcopy(model, memo).eval()
    return copied


def _fill(model: torch.nn.Module, unread: set[torch.nn.Module], generator: torch.Generator) -> None:
    """Give random values to all but the modules whose weights nothing reads."""
    import torch

    others = [module for module in model.modules() if module not in unread]
    tensors = [t for m in others for t in [*m._parameters.values(), *m._buffers.values()]]
    if sum(tensor.numel() for tensor in tensors if tensor is not None) > _MAX_ELEMENTS:
        raise ValueError("too many of its weights lie outside of linears")
    for module in others:
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is None:
                    continue
                value = torch.zeros(tensor.shape, dtype=tensor.dtype)
                if tensor.is_floating_point():
                    value = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    value = value + 0.1
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                filled = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
                group[name] = filled
