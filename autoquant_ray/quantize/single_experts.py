"""Single experts: one slice of a fused experts module, run on the tokens routed to it.

The module itself computes an expert: its shadow (:mod:`autoquant_ray.quantize.experts`) gets the
expert's slice alone as its weights, and each of the expert's tokens with that one route. So all
experts together cost what the module costs, and no family's forward is written again here. The
model has no module of a single expert's name: its module is that of ``PlannedModule.path``.

Shape letters: T tokens, R tokens of one expert, K routes of a token, H hidden, O out features, I in
features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from autoquant_ray.errors import WorkerError
from autoquant_ray.formats.format import Format
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.quantize.experts import FusedExperts
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.quantize.weight_search import WeightScales


class SingleExpert:
    """One expert of a fused experts module.

    Args:
        experts: The whole module.
        number: Which expert.
    """

    def __init__(self, experts: FusedExperts, number: int) -> None:
        self.parameters = experts.parameters
        self.experts = experts
        self.number = number

    @torch.no_grad()
    def quantized_weight(self, name: str, format_: Format, scales: WeightScales) -> torch.Tensor:
        """Fake-quantize the expert's slice of a parameter; returns ``(1, O, I)``.

        Args:
            name: The parameter's.
            format_: Its weight quantizer is used.
            scales: Those of the model.
        """
        return self.experts.quantized_slice(name, self.number, format_, scales)[None]

    def run(
        self,
        format_: Format,
        weights: dict[str, torch.Tensor],
        maxima: Mapping[str, float],
        inputs: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Output ``(R, H)``, routing weights applied, under a format that leaves inputs alone.

        Args:
            format_: The format.
            weights: Parameter name -> :meth:`quantized_weight` under it.
            maxima: Not needed: experts share the quantizer of their inputs.
            inputs: From :func:`routed_apart`.
        """
        assert format_.input is None, f"{format_.name} quantizes the inputs of a single expert"
        return self.experts.run_weights(weights, inputs)

    def run_and_collect(
        self, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Unquantized output ``(R, H)``, routing weights applied; no maxima."""
        weights = {name: self.experts.slice_of(name, self.number) for name in self.parameters}
        return self.experts.run_weights(weights, inputs), {}


Runnable = FusedExperts | SingleExpert
"""All experts of a module, or one of them."""


class _Scored(Protocol):
    @property
    def planned(self) -> PlannedModule: ...


Scored = TypeVar("Scored", bound=_Scored)


def by_module(model: Any, modules: Iterable[Scored]) -> list[tuple[list[Scored], Any]]:
    """Entries with the module that holds them: a single entry, or all experts of a fused module."""
    members: dict[str, list[Scored]] = {}
    for entry in modules:
        members.setdefault(entry.planned.path, []).append(entry)
    return [(entries, model.get_submodule(path)) for path, entries in members.items()]


def runnable_experts(modules: Iterable[tuple[Sequence[_Scored], Any]]) -> dict[str, Runnable]:
    """Name -> what runs it, of all fused experts modules and single experts."""
    runnable: dict[str, Runnable] = {}
    for entries, module in modules:
        planned = entries[0].planned
        if planned.kind == "experts":
            runnable[planned.name] = FusedExperts(module, planned)
        elif planned.expert is not None:
            experts = FusedExperts(module, planned)
            for entry in entries:
                assert entry.planned.expert is not None
                runnable[entry.planned.name] = SingleExpert(experts, entry.planned.expert)
    return runnable


@torch.no_grad()
def sums_by_expert(
    experts: FusedExperts,
    numbers: Sequence[int],
    reduce: Callable[[torch.Tensor], torch.Tensor],
    inputs: Sequence[torch.Tensor],
    real_T: torch.Tensor | None,
) -> Iterator[tuple[int, dict[str, tuple[torch.Tensor, int]]]]:
    """Sums over the inputs of both projections of single experts, each run on its tokens alone.

    Args:
        experts: The whole module.
        numbers: Which experts.
        reduce: ``(T, I)`` -> the sum over its rows.
        inputs: What the module is called with.
        real_T: Which rows are tokens; None: all.

    Yields:
        Number of an expert that got tokens, and its sums, see :meth:`FusedExperts.input_channels`.
    """
    if real_T is None:
        real_T = torch.ones(len(inputs[0]), dtype=torch.bool, device=inputs[0].device)
    for number, (rows, routed) in zip(numbers, routed_apart(inputs, real_T, numbers), strict=True):
        if len(rows):
            yield number, experts.input_channels(reduce, routed, number)


@torch.no_grad()
def run_apart(
    chosen: Sequence[tuple[SingleExpert, PlannedModule, Format]],
    weights: WeightCache,
    scales: WeightScales,
) -> Callable[..., torch.Tensor]:
    """A forward of a fused experts module with some experts quantized, each its own way.

    Args:
        chosen: Those experts of one module, their entries in the plan, their formats.
        weights: Keeps quantized weights between calls.
        scales: Those of the model.
    """
    experts = chosen[0][0].experts
    mixed = {name: experts.weights_of(name).detach().clone() for name in experts.parameters}
    for expert, planned, format_ in chosen:
        for name, weights_EOI in mixed.items():
            weights_EOI[expert.number] = weights.get(
                (planned.name, format_.weight_key, name),
                partial(expert.quantized_weight, name, format_, scales),
            )[0]
    return lambda *inputs: experts.run_weights(mixed, inputs)


def routed_apart(
    inputs: Sequence[torch.Tensor], live_T: torch.Tensor, experts: Sequence[int]
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Each expert's tokens, as rows and as inputs of the module with this one route.

    Args:
        inputs: Inputs of a fused experts module, each with T rows: states, and in any order routes
            ``(T, K)`` and their weights ``(T, K)``.
        live_T: Which tokens count.
        experts: Numbers of the experts.

    Yields:
        Per expert: its R rows ascending, and the inputs of those rows: states ``(R, H)``, routes
        ``(R, 1)`` of zeros, weights ``(R, 1)``.

    Raises:
        WorkerError: The module takes something else.
    """
    routes_at = _place_of_routes(inputs)
    routes_TK = inputs[routes_at]
    none = torch.iinfo(torch.int64).max
    is_live_T1 = live_T.to(routes_TK.device)[:, None]
    chosen_N = torch.where(is_live_T1, routes_TK.long(), none).flatten()
    order_N = chosen_N.argsort(stable=True)
    bounds = torch.arange(max(experts) + 2, device=chosen_N.device)
    ends = torch.searchsorted(chosen_N[order_N], bounds).tolist()  # all that the host waits for
    for expert in experts:
        places_R = order_N[ends[expert] : ends[expert + 1]]
        rows_R = places_R // routes_TK.shape[1]
        columns_R = places_R % routes_TK.shape[1]
        routed = [states[rows_R, columns_R][:, None] for states in inputs[1:]]
        routed[routes_at - 1] = routes_TK.new_zeros(len(rows_R), 1)
        yield rows_R, [inputs[0][rows_R], *routed]


def _place_of_routes(inputs: Sequence[torch.Tensor]) -> int:
    """Which input holds the routes.

    Raises:
        WorkerError: The inputs are not states, routes and their weights.
    """
    integers = [n for n, states in enumerate(inputs) if not states.is_floating_point()]
    routes_at = integers[0] if integers else 0
    others = [states for n, states in enumerate(inputs) if n not in (0, routes_at)]
    if routes_at == 0 or any(states.shape != inputs[routes_at].shape for states in others):
        raise WorkerError(
            "the experts of this model take other inputs than states, routes and their weights, so "
            "that they cannot be told apart; leave out `expert_groups`, and formats by weighted or "
            "gptq"
        )
    return routes_at
