"""The scoring core: how much each format would disturb the loss, module by module.

For a module with output ``Y``, gradient ``g = dL/dY`` of the summed token loss, and output
``Y_f`` under format f (weight and input fake-quantized, all other modules exact):

    elementwise_f = sum_{t,o} (g_to * (Y_f - Y)_to)^2
    token_f       = sum_t (sum_o g_to * (Y_f - Y)_to)^2
    sequence_f    = sum_{s,o} (sum_{t of sequence s} g_to * (Y_f - Y)_to)^2

``1/2 * elementwise_f / num_tokens`` predicts ``KL(P || P_f)`` in nats per token: the second-order
term of the KL divergence with the Fisher matrix in place of its Hessian (ModelOpt's
``auto_quantize`` uses the same diagonal form, without the unit). The errors of a weight's rows are
independent of each other, so that products between outputs cancel out; but all tokens share them:
where several tokens of a sequence move the same prediction, as values of an attention do, products
between tokens do not. ``sequence_f`` has these. Where a module is called with other rows than a
sequence has tokens (the head with those that predict, a vision tower), each row is a sequence:
a token of the head moves its own prediction alone.

The output difference is computed in the backward pass, when the gradient is known, on rows whose
gradient is not zero: padding costs nothing. With a row share below 1 it is computed on rows drawn
by importance (:mod:`autoquant_ray.score.drawing.row_sampling`), the same for all formats of the
module that have one share.

``mtq.auto_quantize`` clamps scores along its sorted formats: a comparison with it takes one format
at a time.

Shape letters: T rows (tokens) with a gradient, C rows of a chunk, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from autoquant_ray.arrays import Floats
from autoquant_ray.distributed.scoring import SensitivitySums
from autoquant_ray.formats.format import Format
from autoquant_ray.plan.scored_modules import ScoredModule
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.single_experts import routed_apart
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.score.compared_modules import ComparedModules
from autoquant_ray.score.differences import Difference, Only
from autoquant_ray.score.drawing.row_sampling import row_masses
from autoquant_ray.score.drawing.rows import (
    ChosenRows,
    SequenceSums,
    chosen_by,
    live_rows,
    row_values,
)
from autoquant_ray.score.drawing.trial import DrawingTrials
from autoquant_ray.score.expert_tokens import TokenCounts
from autoquant_ray.score.gradient_book import GradientBook, Inputs, OnGradients


class SensitivityHooks:
    """Accumulates sensitivity sums while gradients flow backward through a model.

    Args:
        model: Parameters take no gradient; activations do.
        modules: What to score.
        formats: F formats.
        weights: Where quantized weights are kept.
        num_draws: Backward passes that follow each forward pass; sums are averaged over them.
        cache_share: Share of the rows of an attention to use, where its cache is quantized.
        difference_dtype: Of the products of linears, see
            :class:`~autoquant_ray.score.differences.OutputDifferences`.
        adds_sequences: Also add up over the tokens of sequences; all rows must be scored.

    Attributes:
        step_shape: Sequences and their tokens, padding included, of the step that is run now.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Sequence[ScoredModule],
        formats: Sequence[Format],
        weights: WeightCache,
        *,
        num_draws: int = 1,
        cache_share: float = 1.0,
        difference_dtype: str | None = None,
        adds_sequences: bool = False,
    ) -> None:
        self.step_shape = (0, 0)
        self._adds_sequences = adds_sequences
        self._compared = ComparedModules(
            model, modules, formats, weights, cache_share, difference_dtype
        )
        self._num_draws = num_draws
        num_groups = 1 + max(scored.group for scored in modules)
        self._shares_GF: Floats = np.ones((num_groups, len(formats)))
        self._trials: DrawingTrials | None = None
        device = next(model.parameters()).device
        # elementwise, token, the variances of both, and sequence
        self._sums_5GF = torch.zeros(
            5, num_groups, len(formats), dtype=torch.float64, device=device
        )
        self._num_rows_G = [0] * num_groups
        self._tokens = TokenCounts(self._compared.modules)
        self._seed: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of groups and formats."""
        num_groups, num_formats = self._shares_GF.shape
        return num_groups, num_formats

    def sums(self) -> SensitivitySums:
        """The sums since :meth:`scoring` was entered."""
        elementwise_GF, token_GF, *variances, sequence_GF = self._sums_5GF.cpu().numpy().copy()
        return SensitivitySums(
            elementwise_GF=elementwise_GF,
            token_GF=token_GF,
            elementwise_variance_GF=variances[0],
            token_variance_GF=variances[1],
            sequence_GF=sequence_GF if self._adds_sequences else None,
            num_rows_G=np.array(self._num_rows_G, dtype=np.int64),
            expert_tokens=self._tokens.by_name(),
        )

    @contextmanager
    def scoring(
        self,
        calibration: Calibration,
        shares_GF: Floats,
        seed: tuple[int, ...] = (0,),
        trials: DrawingTrials | None = None,
    ) -> Iterator[None]:
        """While open, every backward pass through the model adds to the sums.

        Args:
            calibration: Merged over all shards; needed by formats with a static input quantizer.
            shares_GF: Share of the rows to score, drawn by importance; 1 scores all.
            seed: Of the drawn rows, non-negative integers; the module's name is added to it.
            trials: Where all rows are scored, takes what drawing some would do.
        """
        self._shares_GF = shares_GF
        self._trials = trials
        self._sums_5GF.zero_()
        self._num_rows_G = [0] * len(self._num_rows_G)
        self._tokens.forget()
        self._seed = seed
        with self._compared.hooked(calibration, self._hook_of):
            yield

    def _hook_of(self, entries: Sequence[ScoredModule], module: Any) -> Callable[..., None]:
        first = entries[0].planned
        if first.is_cache:
            book = GradientBook(first.name, first.label, self._num_draws, self._seed)
            return self._compared.cache_hook(entries[0], book, self._add_tokens)
        name = first.path
        experts = [e for entry in entries if (e := entry.planned.expert) is not None]

        def score_of(inputs: Inputs) -> OnGradients:
            def score(
                output_TO: torch.Tensor | None, gradients: list[torch.Tensor], seed: tuple[int, ...]
            ) -> None:
                live_T = self._tokens.add(name, inputs, gradients)
                sequence_T = None if first.is_idle else self._sequences(len(gradients[0]))
                if not experts:
                    states_and_gradients = (*inputs, *gradients)
                    self._score(
                        entries[0], module, output_TO, states_and_gradients, seed, sequence_T
                    )
                    return
                routed = routed_apart(inputs, live_T, experts)
                for entry, expert, (rows, states) in zip(entries, experts, routed, strict=True):
                    states = [*states, *(gradient[rows] for gradient in gradients)]
                    sequence_R = None if sequence_T is None else sequence_T.to(rows.device)[rows]
                    self._score(entry, module, None, states, (*seed, expert), sequence_R)

            return score

        return GradientBook(name, name, self._num_draws, self._seed).forward_hook(score_of)

    def _score(
        self,
        scored: ScoredModule,
        module: Any,
        output_TO: torch.Tensor | None,
        states: Sequence[torch.Tensor],
        seed: tuple[int, ...],
        sequence_T: torch.Tensor | None,
    ) -> None:
        """Add what a module's formats do to its rows.

        Args:
            scored: The module's entry.
            module: The module.
            output_TO: Its output; None computes it again.
            states: Its inputs, then the gradients of all draws.
            seed: Of the drawn rows.
            sequence_T: Number of each row's sequence; None: each row is a sequence.
        """
        num_inputs = len(states) - self._num_draws
        gradients = list(states[num_inputs:])
        for rows, formats in self._chosen_rows(scored, gradients, states[0], seed):
            if not rows.num_live:
                return
            inputs = [rows.of(tensor) for tensor in states[:num_inputs]]
            if output_TO is None:
                # The model has since added to it in place.
                chosen_TO = self._compared.output_of(scored.planned, module, inputs)
            else:
                chosen_TO = rows.of(output_TO)
            differences = self._compared.differences(scored, module, chosen_TO, inputs, formats)
            chosen = [rows.of(gradient) for gradient in gradients]
            self._add(scored.group, differences, chosen, rows, sequence_T)

    def _chosen_rows(
        self,
        scored: ScoredModule,
        gradients: list[torch.Tensor],
        input_TI: torch.Tensor,
        seed: tuple[int, ...],
    ) -> Iterator[tuple[ChosenRows, Only]]:
        """Rows to score, with the formats that they are for: all rows first."""
        shares = self._shares_of(scored)
        masses_T = None
        if self._trials is not None or list(shares) != [1.0]:
            masses_T = row_masses(gradients, input_TI)
        for share, formats in shares.items():
            if share < 1:
                assert masses_T is not None
                yield chosen_by(masses_T, share, seed, input_TI.device), formats
                continue
            rows = live_rows(gradients)
            if self._trials is not None:
                assert masses_T is not None
                kept = slice(None) if rows.indices is None else rows.indices.cpu().numpy()
                rows = replace(rows, masses_T=masses_T[kept])
            yield rows, formats

    def _shares_of(self, scored: ScoredModule) -> dict[float, Only]:
        """Share -> the formats of a module that have it, largest share first."""
        indices = range(self._shares_GF.shape[1]) if scored.formats is None else scored.formats
        by_share: dict[float, list[int]] = {}
        for index in indices:
            by_share.setdefault(float(self._shares_GF[scored.group, index]), []).append(index)
        if len(by_share) == 1:
            return dict.fromkeys(by_share, scored.formats)
        return {share: tuple(by_share[share]) for share in sorted(by_share, reverse=True)}

    def _sequences(self, num_rows: int) -> torch.Tensor | None:
        """Number of each row's sequence; None where rows are not the tokens of the step, or nothing
        is added up over them."""
        num_sequences, num_tokens = self.step_shape
        if not self._adds_sequences or num_rows != num_sequences * num_tokens:
            return None
        return torch.arange(num_rows, device=self._sums_5GF.device) // num_tokens

    def _add_tokens(
        self,
        group: int,
        differences: Iterable[Difference],
        gradients_TO: list[torch.Tensor],
        chosen: ChosenRows,
    ) -> None:
        """Add what a format does to rows of an attention, which are the tokens of the step."""
        self._add(group, differences, gradients_TO, chosen, self._sequences(chosen.num_rows))

    def _add(
        self,
        group: int,
        differences: Iterable[Difference],
        gradients_TO: list[torch.Tensor],
        chosen: ChosenRows,
        sequence_T: torch.Tensor | None,
    ) -> None:
        self._num_rows_G[group] += chosen.num_live
        device = self._sums_5GF.device  # a split model's modules are on several, the sums on one
        num_draws = len(gradients_TO)
        sequences = None
        if sequence_T is not None:
            numbers_T = chosen.of(sequence_T.to(gradients_TO[0].device))
            sequences = SequenceSums(numbers_T, self.step_shape[0], chosen.dead_T)
        values_F2T: dict[int, torch.Tensor] = {}
        for index, rows, difference_CO in differences:
            take = None if sequences is None else sequences.taker(index, rows)
            values_2C = row_values(difference_CO, [g[rows] for g in gradients_TO], take)
            if chosen.dead_T is not None:
                values_2C.masked_fill_(chosen.dead_T[rows], 0.0)
            if chosen.drawn is not None or chosen.masses_T is not None:
                if index not in values_F2T:
                    values_F2T[index] = values_2C.new_zeros(2, len(gradients_TO[0]))
                values_F2T[index][:, rows] = values_2C
            if chosen.drawn is not None:
                continue
            sums_2 = values_2C.sum(dim=1).to(device)
            self._sums_5GF[:2, group, index] += sums_2
            if not self._adds_sequences:
                continue
            if sequences is None:
                self._sums_5GF[4, group, index] += sums_2[0]
            elif sequences.is_complete(rows):
                self._sums_5GF[4, group, index] += sequences.pop(index, num_draws).to(device)
        if chosen.masses_T is not None:
            assert self._trials is not None
            self._trials.add(group, values_F2T, chosen.masses_T)
        if chosen.drawn is None:
            return
        for index, values_2T in values_F2T.items():
            pairs = [chosen.drawn.estimate(values_T) for values_T in values_2T]
            estimates = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
            self._sums_5GF[:4, group, index] += torch.stack(estimates).to(device)
