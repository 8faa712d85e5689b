"""A model whose matrices are made up: it runs text on the CPU without reading a weight.

A layer's product is a gather: each output is one of the inputs, with a sign and a shift. That is
linear, costs no more than to read the input, and needs no weight, so a model of any size runs a few
tokens in seconds. Everything else is the model's own code with random weights and, where it
computes buffers (masks, rotations), with these. What depends on what, and whether a gradient
arrives, is then as in the model itself, whatever its family.

A weight that is read otherwise than by calling its module is there too: as a view of few numbers.

Shape letters: T tokens, I in features, O out features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from autoquant_ray.models.layers import (
    base_model,
    decoder_layers,
    head_owner,
    replaced_forward,
    require_gradient,
    set_decoder_layers,
    text_decoder,
)
from autoquant_ray.models.quantizable import PlannedModule, has_plain_forward
from autoquant_ray.plan.fixed_answers import single_thread, without_weights

if TYPE_CHECKING:
    import torch

_FAILURES = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
_MAX_ELEMENTS = 2**28
_SMALL = 2**16
_STRIDE = 17  # between the numbers of two parameters

Visit = Callable[[str, "torch.Tensor", "torch.Tensor"], None]
"""Called with a module's name, what it is given and what it gives."""


class StandIn:
    """A copy of a model that runs text.

    Args:
        model: A skeleton on the meta device, or a loaded model; it is not changed.
        planned: Its modules that can be quantized.

    Attributes:
        model: The copy.
        modules: What can be quantized in it, by name.
        past_quantizers: Of the fused experts that have run, those whose code does not call
            ModelOpt's quantizers.

    Raises:
        ValueError: Too much of it lies outside of these.
    """

    def __init__(self, model: torch.nn.Module, planned: Sequence[PlannedModule]) -> None:
        import torch

        self.model: Any = without_weights(model)
        self._generator = torch.Generator().manual_seed(0)
        self._planned = {module.path: module for module in planned if not module.is_cache}
        self.modules: dict[str, Any] = {n: self.model.get_submodule(n) for n in self._planned}
        self.past_quantizers: set[str] = set()
        self._calls: dict[type, bool] = {}
        self._fill()

    def run(self, rows: Sequence[Sequence[int]], visit: Visit) -> torch.Tensor:
        """Run samples of one length; logits ``(B, S, V)`` with the graph that leads to them.

        Args:
            rows: Token ids.
            visit: Called for each module that can be quantized, as often as it runs.
        """
        import torch

        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.enter_context(replaced_forward(module, self._forward(name, module, visit)))
            for module in self._other_linears:
                stack.enter_context(replaced_forward(module, _of_any_shape(module)))
            for module in self.model.modules():
                if isinstance(module, torch.nn.Embedding):
                    stack.callback(module.register_forward_hook(_with_gradient).remove)
            stack.enter_context(single_thread())
            stack.enter_context(torch.enable_grad())
            # The shape of the graph is wanted, not what it would compute with.
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None)
            )
            return self._logits(torch.tensor(rows))

    @contextmanager
    def noting_caches(self, names: Sequence[str]) -> Iterator[set[str]]:
        """While open, attentions run in ModelOpt's wrapper.

        Args:
            names: Of the attentions, whose class has quantizers of caches.

        Yields:
            Those of them that have run and called the quantizer of their keys or of their values.
        """
        from autoquant_ray.modelopt_api import register_attention, shadow_of

        called: set[str] = set()
        with ExitStack() as stack:
            for name in names:
                module = self.model.get_submodule(name)
                register_attention(module)
                shadow = shadow_of(module)
                for part, quantizer in shadow.named_children():
                    if part.endswith("_bmm_quantizer"):
                        quantizer.disable()
                    if part in ("k_bmm_quantizer", "v_bmm_quantizer"):
                        quantizer.register_forward_pre_hook(partial(_note, called, name))
                stack.enter_context(replaced_forward(module, shadow.__call__))
            yield called

    @contextmanager
    def shortened(self, num_layers: int) -> Iterator[None]:
        """While open, only so many of the decoder's first layers are there."""
        layers = [*decoder_layers(self.model).values()]
        set_decoder_layers(self.model, layers[:num_layers])
        try:
            yield
        finally:
            set_decoder_layers(self.model, layers)

    def _logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """As a scan computes them: what runs text, then the head on what that gives."""
        owner, base = head_owner(self.model), base_model(self.model)
        output = base(input_ids=ids_BS, use_cache=False)
        with ExitStack() as stack:
            for part in {id(part): part for part in (base, text_decoder(self.model))}.values():
                stack.enter_context(replaced_forward(part, lambda *_, **__: output))
            logits: torch.Tensor = owner(input_ids=ids_BS, use_cache=False).logits
        return logits

    def _fill(self) -> None:
        """Give values to all tensors. They share their numbers, which take little room."""
        import torch

        views, others = self._owners()
        sizes = [p.numel() for module in others for p in _tensors(module._parameters).values()]
        if sum(sizes) > _MAX_ELEMENTS:
            raise ValueError("too many of its weights lie outside of what is quantized")
        length = max(sizes, default=0) + _STRIDE * len(sizes)
        numbers = torch.rand(length, generator=self._generator, dtype=torch.float64) + 0.1
        start = 0
        for module in self.model.modules():
            buffers = _tensors(module._buffers)
            for key, buffer in buffers.items():
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
            if buffers:
                with contextlib.suppress(*_FAILURES):  # then they stay zeros
                    self.model._init_weights(module)
            for key, parameter in _tensors(module._parameters).items():
                if module in views:
                    value = self._view(parameter.shape)
                else:
                    value = numbers[start : start + parameter.numel()].view(parameter.shape)
                    start += _STRIDE
                module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)

    def _owners(self) -> tuple[set[Any], list[Any]]:
        """The modules whose weights are views of few numbers, and all others."""
        import torch

        planned = set(self.modules.values())
        linears = (m for m in self.model.modules() if isinstance(m, torch.nn.Linear))
        self._other_linears = [module for module in linears if module not in planned]
        embeddings = {m for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        views = planned | embeddings | set(self._other_linears)
        return views, [module for module in self.model.modules() if module not in views]

    def _view(self, shape: torch.Size) -> torch.Tensor:
        """Random numbers, a large matrix as a view of a line of them."""
        import torch

        if shape.numel() <= _SMALL:
            return torch.randn(shape, generator=self._generator, dtype=torch.float64)
        line = torch.randn(sum(shape), generator=self._generator, dtype=torch.float64)
        return line.as_strided(shape, [1] * len(shape))

    def _forward(self, name: str, module: Any, visit: Visit) -> Callable[..., Any]:
        width = getattr(module, "out_features", None)
        original = module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            given = [a for a in (*arguments, *keywords.values()) if _is_float(a)]
            states = given[0]
            if width is not None and not has_plain_forward(module):
                output = original(*arguments, **keywords)
            elif width is not None:
                output = _gathered(states, width)
            elif self._planned[name].kind == "convolution":
                output = original(*arguments, **keywords)
            else:
                if not self._calls_quantizers(name, module, arguments, keywords):
                    self.past_quantizers.add(name)
                output = states.roll(1, dims=-1)
                for weights in given[1:]:
                    output = output + _per_row(weights, states).to(output) * states
            visit(name, states, output[0] if isinstance(output, tuple) else output)
            return output

        return forward

    def _calls_quantizers(self, name: str, module: Any, arguments: Any, keywords: Any) -> bool:
        """Whether fused experts call ModelOpt's quantizers, tried once for a class of them; True
        where they do not run: they are tried again with their weights."""
        from autoquant_ray.modelopt_api import experts_shadow, prepare_experts

        if type(module) not in self._calls:
            self._calls[type(module)] = True
            with contextlib.suppress(*_FAILURES):
                prepare_experts(self.model)
                parameters = self._planned[name].parameters
                self._calls[type(module)] = calls_quantizers(
                    experts_shadow(module, parameters), parameters, arguments, keywords
                )
        return self._calls[type(module)]


def calls_quantizers(
    shadow: Any,
    parameters: Sequence[str],
    arguments: Sequence[Any],
    keywords: Mapping[str, Any] | None = None,
) -> bool:
    """Whether the code of fused experts calls their quantizers, seen in a run of one token.

    ModelOpt takes a module for fused experts by the names and shapes of its parameters, and
    quantizes what it hands to ``torch.nn.functional.linear``. Code that multiplies otherwise
    (Aria's in transformers 5.18, by ``@``) passes its quantizers by: they see no input in
    calibration, and what is quantized is not what runs.

    Args:
        shadow: Of the experts, with weights; it is left as it was.
        parameters: Names of their weights.
        arguments, keywords: What the experts are called with; tensors of T rows, T at least 1.
    """
    import torch

    called: set[str] = set()
    names = [f"{parameter}_input_quantizer" for parameter in parameters]
    resting = {name: getattr(shadow, name) for name in names}
    try:
        for name in names:
            setattr(shadow, name, _noting(name, called))
        with torch.no_grad():
            first = {name: _of_first_token(value) for name, value in (keywords or {}).items()}
            shadow(*map(_of_first_token, arguments), **first)
    finally:
        for name, quantizer in resting.items():
            setattr(shadow, name, quantizer)
    return called == set(names)


def _note(called: set[str], name: str, *_: Any) -> None:
    """Forward hook that notes a call."""
    called.add(name)


def _noting(name: str, called: set[str]) -> torch.nn.Module:
    """What stands in the place of a quantizer, leaves what it is given, and notes its call."""
    import torch

    class Noting(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            called.add(name)
            return states

    return Noting()


def _of_first_token(value: Any) -> Any:
    """The first row; where it says experts, the first of them alone, which spares the others."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    row = value[:1]
    return row if row.is_floating_point() else torch.zeros_like(row)


def _tensors(group: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in group.items() if tensor is not None}


def _gathered(states: torch.Tensor, width: int) -> torch.Tensor:
    """A linear map to a width ``(..., O)``: inputs in another order, with signs and a shift."""
    import torch

    numbers_O = torch.arange(width)
    size = states.shape[-1]
    index_O = (numbers_O * 7919 + numbers_O // size * 31) % size
    sign_O = 1.0 - 2.0 * (numbers_O * 5 % 3 == 0)
    return states[..., index_O] * sign_O.to(states.dtype) + (0.1 * (numbers_O % 7)).to(states.dtype)


def _of_any_shape(module: Any) -> Callable[..., torch.Tensor]:
    """A linear's forward that gives the shape of its own: it may take its input in groups."""
    original = module.forward

    def forward(states: torch.Tensor, *arguments: Any) -> torch.Tensor:
        with _on_meta(module):
            shape = original(states.detach().to("meta"), *arguments).shape
        is_row_by_row = shape[:-1] == states.shape[:-1]
        result: torch.Tensor
        result = _gathered(states, shape[-1]) if is_row_by_row else original(states, *arguments)
        return result

    return forward


@contextmanager
def _on_meta(module: Any) -> Iterator[None]:
    """While open, a module's parameters are on the meta device."""
    import torch

    resting = dict(module._parameters)
    for name, parameter in _tensors(resting).items():
        module._parameters[name] = torch.nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False
        )
    try:
        yield
    finally:
        module._parameters.update(resting)


def _per_row(weights: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """A number for each row of the states, from what its experts weigh."""
    is_of_rows = weights.dim() == states.dim() and weights.shape[:-1] == states.shape[:-1]
    return weights.mean(dim=-1, keepdim=True) if is_of_rows else 0.0 * weights.sum()


def _is_float(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _with_gradient(_: Any, __: Any, output: Any) -> Any:
    """Forward hook: gradients begin at what an embedding gives."""
    return require_gradient(_, __, output) if _is_float(output) else output
