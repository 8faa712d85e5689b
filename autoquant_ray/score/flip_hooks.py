"""What single changes of a quantized model would do to its loss: slope, curvature, interaction.

The model runs quantized by an allocation. A *flip* gives one group another format and leaves all
others. With ``d`` the change of the output of the group's modules at the inputs that they have in
the quantized model, the loss changes by

    slope        sum_t <g_t, d_t>                   g: gradient of the loss at the module's output
    curvature    1/2 E_s[sum_{t,o} (s_to d_to)^2]   s: the same of sampled labels

The second is the form of the scores (:mod:`autoquant_ray.score.sensitivity`), with the Fisher
matrix of the quantized model: the generalized Gauss-Newton matrix of the KL divergence there. Two
flips a and b add to that

    interaction  E_s[sum_t <s_t, d_t>_a <s_t, d_t>_b]

which is formed for groups whose modules are children of one module, such as the two of an MLP.

Shape letters: T rows (tokens), C rows of a chunk, O out features, G groups, F formats and no
quantization after them, K draws of labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch

from autoquant_ray.arrays import Floats
from autoquant_ray.formats.format import Format
from autoquant_ray.models.quantizable import expert_place
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.modules import UNQUANTIZED, FormatNumbers
from autoquant_ray.quantize.single_experts import routed_apart
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.score.compared_modules import ComparedModules
from autoquant_ray.score.differences import Difference
from autoquant_ray.score.drawing.rows import ChosenRows, live_rows
from autoquant_ray.score.gradient_book import GradientBook, Inputs, OnGradients

Pair = tuple[int, int]
"""Two groups, the one with the smaller number first."""


@dataclass(frozen=True, kw_only=True)
class FlipSums:
    """Sums over the rows of a shard; the last of the formats is no quantization.

    Attributes:
        slope_GF: Float64, nats; 0 for the format that a group has.
        curvature_GF: Float64, nats.
        interactions: Of the flips of two groups ``(F, F)``, float64, nats.
    """

    slope_GF: Floats
    curvature_GF: Floats
    interactions: Mapping[Pair, Floats]


@dataclass(frozen=True, kw_only=True)
class FlippedRows:
    """Some rows of a module's output, of one call.

    Attributes:
        call: Number of the call, the same for all modules of a step; None: no interactions.
        num_rows: Rows of the whole output.
        places_C: Which of them these are, int64.
        dead_C: Those that do not count; None if all do.
    """

    call: int | None
    num_rows: int
    places_C: torch.Tensor
    dead_C: torch.Tensor | None


def neighbours(modules: Sequence[ScoredModule]) -> list[Pair]:
    """Pairs of groups of linears whose modules are children of one module; without experts."""
    parents: dict[str, dict[int, None]] = {}
    for scored in modules:
        name = scored.planned.name
        if scored.planned.kind == "linear" and expert_place(name) is None:
            parents.setdefault(name.rpartition(".")[0], {})[scored.group] = None
    pairs = [pair for groups in parents.values() for pair in combinations(sorted(groups), 2)]
    return list(dict.fromkeys(pairs))


class FlipTotals:
    """Adds up what flips do, row by row.

    Args:
        modules: What can be flipped.
        num_formats: Length of the menu.
        num_draws: Draws of labels.
    """

    def __init__(self, modules: Sequence[ScoredModule], num_formats: int, num_draws: int) -> None:
        self._pairs = neighbours(modules)
        self._paired = {group for pair in self._pairs for group in pair}
        self._num_formats, self._num_draws = num_formats + 1, num_draws
        num_groups = 1 + max(scored.group for scored in modules)
        self._sums_2GF = torch.zeros(2, num_groups, num_formats + 1, dtype=torch.float64)
        self._interactions: dict[Pair, torch.Tensor] = {}
        self._dots: dict[tuple[int, int], torch.Tensor] = {}

    def clear(self) -> None:
        """Begin again."""
        self._sums_2GF.zero_()
        self._interactions, self._dots = {}, {}

    def sums(self) -> FlipSums:
        """The sums since the last :meth:`clear`."""
        slope_GF, curvature_GF = self._sums_2GF.numpy().copy()
        interactions = {
            pair: self._interactions[pair].numpy()
            for pair in self._pairs
            if pair in self._interactions
        }
        return FlipSums(slope_GF=slope_GF, curvature_GF=curvature_GF, interactions=interactions)

    def add(
        self,
        group: int,
        index: int,
        change_CO: torch.Tensor,
        gradients_CO: Sequence[torch.Tensor],
        rows: FlippedRows,
    ) -> None:
        """Add rows of a module.

        Args:
            group: The module's group.
            index: Its new format; -1: none.
            change_CO: Of its output.
            gradients_CO: At its output: of the loss, then of each draw.
            rows: Which rows these are.
        """
        terms = [change_CO.float() * gradient_CO.float() for gradient_CO in gradients_CO]
        dots_KC = torch.stack([term_CO.sum(dim=1) for term_CO in terms]).double()
        squares_C = sum(
            torch.linalg.vector_norm(term, dim=1).double().square() for term in terms[1:]
        )
        values_2C = torch.stack([dots_KC[0], squares_C * (0.5 / self._num_draws)])
        if rows.dead_C is not None:
            values_2C.masked_fill_(rows.dead_C, 0.0)
            dots_KC.masked_fill_(rows.dead_C, 0.0)
        self._sums_2GF[:, group, index] += values_2C.sum(dim=1).to(self._sums_2GF.device)
        if rows.call is not None and group in self._paired:
            key = (group, rows.call)
            if key not in self._dots:
                shape = (self._num_formats, self._num_draws, rows.num_rows)
                self._dots[key] = dots_KC.new_zeros(shape)
            self._dots[key][index].index_add_(1, rows.places_C, dots_KC[1:])

    def finish_layer(self) -> None:
        """Form the interactions of the modules seen since the last call, and forget their rows."""
        for pair in self._pairs:
            for call in [call for group, call in self._dots if group == pair[0]]:
                first_FKT, second_FKT = (self._dots.get((group, call)) for group in pair)
                if first_FKT is None or second_FKT is None:
                    continue
                product_FF = torch.einsum("fkt,gkt->fg", first_FKT, second_FKT).cpu()
                before = self._interactions.get(pair, torch.zeros_like(product_FF))
                self._interactions[pair] = before + product_FF / self._num_draws
        self._dots = {}


@dataclass(frozen=True)
class _SeenRows:
    """Rows of a module with a gradient.

    Attributes:
        group: The module's group.
        gradients_TO: At its output: of the loss, then of each draw.
        chosen: Which rows these are.
        call: Number of the call; None: no interactions.
        num_rows: Rows of the whole output.
    """

    group: int
    gradients_TO: Sequence[torch.Tensor]
    chosen: ChosenRows
    call: int | None
    num_rows: int

    def part(self, rows: slice) -> FlippedRows:
        """Some of the rows."""
        indices, dead_T = self.chosen.indices, self.chosen.dead_T
        if indices is None:
            indices = torch.arange(self.num_rows, device=self.gradients_TO[0].device)
        return FlippedRows(
            call=self.call,
            num_rows=self.num_rows,
            places_C=indices[rows],
            dead_C=None if dead_T is None else dead_T[rows],
        )


class FlipHooks:
    """Accumulates the sums of all flips while gradients flow backward through a quantized model.

    Args:
        model: Parameters take no gradient; activations do.
        modules: What can be flipped.
        formats: The menu.
        weights: Where quantized weights are kept.
        num_draws: Draws of labels, whose gradients follow that of the loss.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Sequence[ScoredModule],
        formats: Sequence[Format],
        weights: WeightCache,
        num_draws: int,
    ) -> None:
        self._compared = ComparedModules(model, modules, formats, weights)
        self._num_formats, self._num_draws = len(formats), num_draws
        self._totals = FlipTotals(modules, len(formats), num_draws)
        self._choice: FormatNumbers = ()

    def sums(self) -> FlipSums:
        """The sums since :meth:`watching` was entered."""
        return self._totals.sums()

    def finish_layer(self) -> None:
        """Called after the backward pass of a layer over all steps."""
        self._totals.finish_layer()

    @contextmanager
    def watching(self, choice: FormatNumbers, calibration: Calibration) -> Iterator[None]:
        """While open, every backward pass through the model adds to the sums.

        Args:
            choice: The allocation that the model runs under.
            calibration: From the scan.
        """
        self._totals.clear()
        self._choice = choice
        with self._compared.hooked(calibration, self._hook_of):
            yield

    def _hook_of(self, entries: Sequence[ScoredModule], module: Any) -> Callable[..., None]:
        first = entries[0].planned
        num_gradients = 1 + self._num_draws
        book = GradientBook(first.name, first.label, num_gradients, (), hides_output=True)
        if first.is_cache:
            return self._compared.cache_hook(entries[0], book, partial(self._add_cache, entries[0]))
        calls = itertools.count()
        experts = [e for entry in entries if (e := entry.planned.expert) is not None]

        def score_of(inputs: Inputs) -> OnGradients:
            call = next(calls)

            def score(_: Any, gradients: list[torch.Tensor], __: Any) -> None:
                if not experts:
                    self._score(entries[0], module, inputs, gradients, call)
                    return
                live_T = torch.stack([g.ne(0).any(dim=1) for g in gradients]).any(dim=0)
                routed = routed_apart(inputs, live_T, experts)
                for entry, (rows, states) in zip(entries, routed, strict=True):
                    chosen = [gradient[rows] for gradient in gradients]
                    self._score(entry, module, states, chosen, call=None)

            return score

        return book.forward_hook(score_of)

    def _score(
        self,
        scored: ScoredModule,
        module: Any,
        inputs: Sequence[torch.Tensor],
        gradients_TO: list[torch.Tensor],
        call: int | None,
    ) -> None:
        """Add what flips of a module's format do to its rows.

        Args:
            scored: The module's entry.
            module: The module.
            inputs: What it was called with.
            gradients_TO: At its output: of the loss, then of each draw.
            call: Number of the call; None: no interactions.
        """
        rows = live_rows(gradients_TO)
        if not rows.num_live:
            return
        states = [rows.of(tensor) for tensor in inputs]
        gradients = [rows.of(gradient_TO) for gradient_TO in gradients_TO]
        exact_TO = self._compared.output_of(scored.planned, module, states)
        differences_of = partial(self._compared.differences, scored, module, exact_TO, states)
        menu = range(self._num_formats) if scored.formats is None else scored.formats
        now = self._choice[scored.group]
        base_TO = None
        if now != UNQUANTIZED:
            parts = [difference_CO.clone() for _, _, difference_CO in differences_of((now,))]
            base_TO = torch.cat(parts)
        others = tuple(index for index in menu if index != now)
        seen = _SeenRows(scored.group, gradients, rows, call, len(gradients_TO[0]))
        self._add(base_TO, differences_of(others), seen)

    def _add_cache(
        self,
        scored: ScoredModule,
        _: int,
        differences: Iterable[Difference],
        gradients: list[torch.Tensor],
        rows: ChosenRows,
    ) -> None:
        """Add the flips of a cache."""
        of_format = {index: (rows, states_TO) for index, rows, states_TO in differences}
        base = of_format.pop(self._choice[scored.group], None)
        others = [(index, *of_rows) for index, of_rows in of_format.items()]
        base_TO = None if base is None else base[1]
        seen = _SeenRows(scored.group, gradients, rows, None, len(gradients[0]))
        self._add(base_TO, others, seen)

    def _add(
        self, base_TO: torch.Tensor | None, differences: Iterable[Difference], seen: _SeenRows
    ) -> None:
        """Add the flips of a group's module.

        Args:
            base_TO: What its format does to the module's output; None if it has none.
            differences: What the other formats do.
            seen: Rows of the module.
        """
        for index, rows, difference_CO in differences:
            change_CO = difference_CO if base_TO is None else difference_CO - base_TO[rows]
            gradients_CO = [gradient_TO[rows] for gradient_TO in seen.gradients_TO]
            self._totals.add(seen.group, index, change_CO, gradients_CO, seen.part(rows))
        if base_TO is not None:
            everything = seen.part(slice(0, len(base_TO)))
            self._totals.add(seen.group, UNQUANTIZED, -base_TO, seen.gradients_TO, everything)
