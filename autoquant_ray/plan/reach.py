"""Which modules a run on text reaches, and which of them a gradient of the loss reaches.

Found by running a few tokens (:mod:`autoquant_ray.plan.stand_in`), not by names: a module that only
sees images, sound or nothing does not run; of one that only chooses (an indexer, whose output picks
tokens), no output leads to the logits. Neither can be scored.

A model may do more with more tokens (DeepSeek-V4 compresses whole blocks of them): where some of a
decoder's modules are not reached, more tokens are run before that is believed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import one_line
from autoquant_ray.models.layers import decoder_layers
from autoquant_ray.models.quantizable import (
    PlannedModule,
    expert_place,
    has_plain_forward,
    is_of_tower,
)
from autoquant_ray.plan.stand_in import StandIn

if TYPE_CHECKING:
    import torch

IDLE = "vision or audio tower: not searched with --coverage lm, or takes no images"
UNCALLED = "does not run on text: it is called with other inputs, or never"
NO_GRADIENT = "no gradient of the loss reaches it: it chooses, or its output is not used"
NOT_A_PRODUCT = "does not compute a linear's product"
PAST_QUANTIZERS = "ModelOpt cannot quantize these experts: their code does not call its quantizers"

_OTHER_MODALITIES = {"image", "video", "audio"}
_FEW_TOKENS, _MANY_TOKENS = 8, 136
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reach:
    """What a run on text reaches.

    Attributes:
        idle: Modules outside of the decoder layers that do not run: towers and what joins them.
        reasons: Other module -> why it cannot be scored.
        roots: What the names of idle modules and of all beside them begin with.
    """

    idle: frozenset[str] = frozenset()
    reasons: dict[str, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ()

    def is_idle(self, name: str) -> bool:
        """Whether a module, or the owner of a parameter, is part of what does not run on text."""
        return is_of_tower(name) or any(f"{name}.".startswith(root) for root in self.roots)


def text_reach(model: Any, modules: Sequence[PlannedModule]) -> Reach:
    """What of a model's modules a run on text reaches; by their names where it cannot be run.

    Args:
        model: A skeleton on the meta device, or a loaded model; it is not changed.
        modules: Those that can be quantized.
    """
    by_name = Reach(idle=frozenset(m.name for m in modules if is_of_tower(m.name)))
    try:
        decoder = _inside_layers(model)
        stand_in, watch = StandIn(model, modules), _Watch()
        watch.run(stand_in, _FEW_TOKENS)
        reach = watch.reach(modules, decoder)
        if any(name in decoder for name in reach.reasons):
            with contextlib.suppress(*_FAILURES):  # a part of a model need not run by itself
                _look_again(stand_in, watch, reach.reasons)
            reach = watch.reach(modules, decoder)
    except _FAILURES as error:
        logger.info(
            "%s does not run without its weights (%s): what does not see text is told by names",
            type(model).__name__,
            one_line(error),
        )
        return by_name
    return reach


def called_caches(
    model: Any, modules: Sequence[PlannedModule], attentions: Sequence[str]
) -> set[str]:
    """Attentions that call the quantizers of their cache when text runs; all where it cannot run.

    ModelOpt goes by the names in a class's source file: a linear attention beside another one
    (MiniMax) has its quantizers, and never calls them.

    Args:
        model: A skeleton on the meta device, or a loaded model; it is not changed.
        modules: Those that can be quantized.
        attentions: Names of attentions that have quantizers.
    """
    try:
        stand_in = StandIn(model, modules)
        with stand_in.noting_caches(attentions) as called:
            stand_in.run([[1] * _FEW_TOKENS], lambda *_: None)
    except _FAILURES as error:
        logger.info("%s does not run without its weights: %s", type(model).__name__, error)
        return set(attentions)
    return called


def _inside_layers(model: Any) -> set[str]:
    """Names of what is in the decoder layers; all names of a model that takes text alone."""
    if {*getattr(model, "input_modalities", ())}.isdisjoint(_OTHER_MODALITIES):
        return {name for name, _ in model.named_modules()}
    inside = {id(m) for layer in decoder_layers(model).values() for m in layer.modules()}
    return {name for name, module in model.named_modules() if id(module) in inside}


def _look_again(stand_in: StandIn, watch: _Watch, unreached: Iterable[str]) -> None:
    """Run more tokens, through as many layers as have one of each kind.

    Layers are of a kind where the same of their modules exist and are not reached.
    """
    missing = set(unreached)
    first: dict[frozenset[tuple[str, bool]], tuple[str, int]] = {}
    same: dict[str, str] = {}
    for number, layer in enumerate(decoder_layers(stand_in.model)):
        inside = {
            name.removeprefix(f"{layer}."): name in missing
            for name in stand_in.modules
            if name.startswith(f"{layer}.")
        }
        if any(inside.values()):
            like, _ = first.setdefault(frozenset(inside.items()), (layer, number))
            same |= {f"{layer}.{end}": f"{like}.{end}" for end in inside}
    if first:
        with stand_in.shortened(1 + max(number for _, number in first.values())):
            watch.run(stand_in, _MANY_TOKENS)
        watch.take_over(same)


class _Watch:
    """Notes what runs, and what of it leads to the logits."""

    def __init__(self) -> None:
        self._run: set[str] = set()
        self._trained: set[str] = set()
        self._refused: dict[str, str] = {}

    def run(self, stand_in: StandIn, num_tokens: int) -> None:
        """Run some tokens.

        Raises:
            RuntimeError: The graph does not show all that leads to the logits (Reformer's).
        """
        import torch

        nodes: dict[str, list[Any]] = {}

        def visit(name: str, given: torch.Tensor, output: torch.Tensor) -> None:
            self._run.add(name)
            nodes.setdefault(name, []).append(output.grad_fn)
            module = stand_in.modules[name]
            if not _is_product(module, given, output):
                self._refused[name] = NOT_A_PRODUCT
            elif name in stand_in.past_quantizers:
                self._refused[name] = PAST_QUANTIZERS

        size = stand_in.model.get_input_embeddings().weight.shape[0]
        logits = stand_in.run([[1 + i % min(7, size - 1) for i in range(num_tokens)]], visit)
        behind = _ancestors(logits.grad_fn)
        if any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in behind):
            raise RuntimeError("a function with a backward of its own hides what runs inside")
        self._trained |= {name for name, seen in nodes.items() if any(n in behind for n in seen)}

    def take_over(self, same: Mapping[str, str]) -> None:
        """Take what was seen of a module for another one.

        Args:
            same: Module -> the one that was watched for it.
        """
        for seen in (self._run, self._trained):
            seen |= {name for name, like in same.items() if like in seen}
        refused = self._refused
        refused |= {name: refused[like] for name, like in same.items() if like in refused}

    def reach(self, modules: Sequence[PlannedModule], decoder: set[str]) -> Reach:
        """What was seen up to now."""
        run, trained = (_with_siblings(modules, names) for names in (self._run, self._trained))
        idle: set[str] = set()
        reasons: dict[str, str] = {}
        for module in modules:
            if module.is_cache or module.path in trained - self._refused.keys():
                continue
            if module.path in self._refused:
                reasons[module.name] = self._refused[module.path]
            elif module.path in run:
                reasons[module.name] = NO_GRADIENT
            elif module.path in decoder and not is_of_tower(module.path):
                reasons[module.name] = UNCALLED
            else:
                idle.add(module.name)
        roots = _roots(idle, [module.name for module in modules if module.name not in idle])
        return Reach(idle=frozenset(idle), reasons=reasons, roots=roots)


def _roots(idle: Iterable[str], others: Sequence[str]) -> tuple[str, ...]:
    """The shortest beginnings of idle modules' names with which no other module's begins."""
    roots = set()
    for name in idle:
        parts = name.split(".")
        beginnings = (f"{'.'.join(parts[:count])}." for count in range(1, len(parts) + 1))
        alone = (b for b in beginnings if not any(f"{n}.".startswith(b) for n in others))
        roots.add(next(alone, f"{name}."))
    return tuple(sorted(roots))


def _with_siblings(modules: Iterable[PlannedModule], names: set[str]) -> set[str]:
    """The names, and those of the other experts of a layer: few tokens do not visit all."""
    places = {
        (place[0], name.rpartition(".")[2])
        for name in names
        if (place := expert_place(name)) is not None
    }
    return names | {
        module.path
        for module in modules
        if (place := expert_place(module.path)) is not None
        and (place[0], module.path.rpartition(".")[2]) in places
    }


def _is_product(module: Any, given: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether a linear with a forward of its own gives a linear's product."""
    import torch

    if not isinstance(module, torch.nn.Linear) or has_plain_forward(module):
        return True
    if given.shape[-1] != module.in_features:
        return False
    with torch.no_grad():
        weight, bias = module.weight.to(given.dtype), module.bias
        expected = torch.nn.functional.linear(
            given, weight, None if bias is None else bias.to(given.dtype)
        )
    return output.shape == expected.shape and bool(torch.allclose(output, expected, rtol=1e-4))


def _ancestors(node: Any) -> set[Any]:
    """The nodes of a graph that lead to one of them."""
    seen, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        waiting.extend(parent for parent, _ in current.next_functions)
    return seen
