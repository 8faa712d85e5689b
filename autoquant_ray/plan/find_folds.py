"""Finds the inputs whose channels can take factors, by trying: no names of families or layers.

A model is run with fixed answers of its linears (:mod:`autoquant_ray.plan.fixed_answers`), once as
it is and once with the channels of candidates divided by random factors, every channel by another.
If the inputs of exactly the linears of one group are divided by these factors, channel for channel,
and nothing else in the model changes, the group's input can be folded into the candidate. All
layers are tried at once; a second run with other factors must say the same. Where the code between
is not linear in a candidate (GELU, a norm on values), where a router or a sum reads the input too,
or where layers share values, the runs differ, and there is no fold.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import one_line
from autoquant_ray.plan.fixed_answers import FixedAnswers, Scaling, is_same
from autoquant_ray.plan.fold import NORM, ROWS, SHIFTED_NORM, Fold, fold_of_rows

if TYPE_CHECKING:
    import torch

Groups = Mapping[str, tuple[str, ...]]
"""Module -> the modules of its group."""

_TOLERANCE = 1e-6
_LAYER = re.compile(r"^.*?\.\d+(?=\.)")
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Candidate:
    """A module, or some of its rows, that may take the inverse of factors."""

    name: str
    kind: str
    start: int
    size: int


@dataclass
class _Changes:
    """What a run changed.

    Attributes:
        rows: Linear -> candidate and the row of it that divides each channel.
        others: Modules whose inputs changed in another way.
    """

    rows: dict[str, tuple[_Candidate, tuple[int, ...]]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)


def find_folds(model: torch.nn.Module, groups: Iterable[Sequence[str]]) -> dict[str, Fold]:
    """The folds of a model: linear -> the fold of its input.

    Args:
        model: A skeleton on the meta device, or a loaded model; it is not changed.
        groups: The linears of every group that may take factors.
    """
    group_of = {name: tuple(group) for group in groups for name in group}
    folds: dict[str, Fold] = {}
    try:
        search = _Search(FixedAnswers(model), group_of)
        for candidates in search.candidates():
            for fold in search.folds(candidates):
                if not any(reader in folds for reader in fold.readers):
                    folds |= dict.fromkeys(fold.readers, fold)
    except _FAILURES as error:
        logger.warning(
            "awq: %s does not run without its weights (%s), so none of its inputs takes factors",
            type(model).__name__,
            one_line(error),
        )
        return {}
    return folds


class _Search:
    """Tries candidates on a model with fixed answers."""

    def __init__(self, answers: FixedAnswers, group_of: Groups) -> None:
        self._answers = answers
        self._group_of = group_of
        self._linears = {m.name for m in answers.planned if m.kind == "linear"}
        self._before: dict[str, list[list[torch.Tensor]]] = {}
        answers.run({}, self._keep)

    def _keep(self, name: str, tensors: list[torch.Tensor]) -> None:
        self._before.setdefault(name, []).append([tensor.clone() for tensor in tensors])

    def candidates(self) -> list[list[_Candidate]]:
        """Candidates that are tried together: those of all layers that go by the same name."""
        together: dict[tuple[Any, ...], list[_Candidate]] = {}
        for name, module in self._answers.model.named_modules():
            pattern = re.sub(r"\.\d+(?=\.)", ".N", name)
            if (kind := _norm_kind(name, module, self._answers)) is not None:
                size = len(module.weight)
                together.setdefault((pattern, 0), []).append(_Candidate(name, kind, 0, size))
            elif name in self._linears and name in self._before:
                for number, (start, size) in enumerate(self._slices(name, module)):
                    candidate = _Candidate(name, ROWS, start, size)
                    together.setdefault((pattern, number), []).append(candidate)
        return list(together.values())

    def _slices(self, name: str, linear: Any) -> list[tuple[int, int]]:
        """First row and number of rows: all, and what fused projections hold for a linear beside
        them (the second half: gate and up; the last of three parts: queries, keys and values)."""
        num_rows, parent = linear.out_features, name.rpartition(".")[0]
        beside = [n for n in self._linears if n != name and n.rpartition(".")[0] == parent]
        widths = {self._answers.model.get_submodule(n).in_features for n in beside}
        slices = [(0, num_rows)]
        for width in sorted(w for w in widths if isinstance(w, int) and w < num_rows):
            if num_rows == 2 * width:
                slices += [(width, width), (0, width)]
            if (num_rows - width) % 2 == 0:
                part = (num_rows - width) // 2
                slices.append((num_rows - part, part))
        return slices

    def folds(self, candidates: Sequence[_Candidate]) -> list[Fold]:
        """The folds of candidates that are tried together."""
        active = list(candidates)
        while active:
            changes = self._try(active, seed=0)
            complete = self._complete(changes)
            suspects = {_layer(name) for name in changes.others}
            if not suspects:
                active = [candidate for candidate in active if candidate in complete]
                again = self._try(active, seed=1)
                if again.others or self._complete(again) != complete:
                    return []
                folds = (
                    fold_of_rows(readers, candidate.name, candidate.kind, rows)
                    for candidate, (readers, rows) in complete.items()
                )
                return [fold for fold in folds if fold is not None]
            left = [c for c in active if c in complete and _layer(c.name) not in suspects]
            if left == active:
                return []
            active = left
        return []

    def _complete(
        self, changes: _Changes
    ) -> dict[_Candidate, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Candidates that divide the input of a whole group; readers of others are suspects."""
        readers: dict[_Candidate, dict[tuple[int, ...], list[str]]] = {}
        for name, (candidate, rows) in changes.rows.items():
            readers.setdefault(candidate, {}).setdefault(rows, []).append(name)
        complete = {}
        for candidate, by_rows in readers.items():
            (rows, names), *more = by_rows.items()
            group = self._group_of.get(names[0])
            if more or group is None or set(group) != set(names):
                changes.others |= {name for names in by_rows.values() for name in names}
            else:
                complete[candidate] = (group, rows)
        return complete

    def _try(self, candidates: Sequence[_Candidate], seed: int) -> _Changes:
        """Divide the channels of candidates, and look at what changes."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        factors = {c: _factors(c.size, generator) for c in candidates}
        scalings: dict[str, Scaling] = {}
        parameters: dict[str, torch.Tensor] = {}
        for candidate, factors_O in factors.items():
            module: Any = self._answers.model.get_submodule(candidate.name)
            if candidate.kind == ROWS:
                whole_O = torch.ones(module.out_features, dtype=torch.float64)
                whole_O[candidate.start : candidate.start + candidate.size] = factors_O
                scalings[candidate.name] = partial(torch.div, other=whole_O)
            else:
                parameters |= _divided(candidate.name, module, candidate.kind, factors_O)
        changes, calls = _Changes(), {name: iter(seen) for name, seen in self._before.items()}

        def visit(name: str, tensors: list[torch.Tensor]) -> None:
            before = next(calls.get(name, iter(())), [])
            if len(before) == len(tensors) and all(map(is_same, before, tensors)):
                return
            candidate = _nearest(name, candidates)
            rows = None
            if name in self._linears and candidate is not None and len(before) == len(tensors) == 1:
                rows = _matched_rows(before[0], tensors[0], factors[candidate])
            if rows is None or candidate is None:
                changes.others.add(name)
                return
            shifted = tuple(row + candidate.start for row in rows)
            if changes.rows.setdefault(name, (candidate, shifted)) != (candidate, shifted):
                changes.others.add(name)

        with self._answers.replaced(parameters):
            self._answers.run(scalings, visit)
        return changes


def _layer(name: str) -> str:
    """``model.layers.3`` of what is in it; '' of what is in no layer."""
    match = _LAYER.match(name)
    return match[0] if match else ""


def _nearest(name: str, candidates: Sequence[_Candidate]) -> _Candidate | None:
    """The candidate of the same layer whose name has most in common."""
    there = [c for c in candidates if _layer(c.name) == _layer(name)]

    def num_common(candidate: _Candidate) -> int:
        pairs = zip(candidate.name.split("."), name.split("."), strict=False)
        return next((n for n, (part, other) in enumerate(pairs) if part != other), len(name))

    return max(there, key=num_common, default=None)


def _factors(size: int, generator: torch.Generator) -> torch.Tensor:
    """Different factors from 0.5 to 2, in random order."""
    import torch

    order = torch.randperm(size, generator=generator).double()
    return 0.5 * 4 ** ((order + 0.5) / size)


def _matched_rows(
    before: torch.Tensor, after: torch.Tensor, factors_O: torch.Tensor
) -> list[int] | None:
    """The factor that each channel was divided by, as its number; None where there is none."""
    import torch

    before_TI = before.reshape(-1, before.shape[-1]).double()
    after_TI = after.reshape(-1, after.shape[-1]).double()
    if before_TI.shape != after_TI.shape:
        return None
    largest_I, token_I = before_TI.abs().max(dim=0)
    ratio_I = (before_TI.gather(0, token_I[None]) / after_TI.gather(0, token_I[None]))[0]
    if not (bool((largest_I > 0).all()) and bool(torch.isfinite(ratio_I).all())):
        return None
    sorted_O, order_O = factors_O.sort()
    middles = (sorted_O[1:] * sorted_O[:-1]).sqrt()
    rows_I = order_O[torch.bucketize(ratio_I, middles)]
    error_TI = (after_TI * factors_O[rows_I] - before_TI).abs()
    is_matched = bool((error_TI <= _TOLERANCE * largest_I).all())
    return rows_I.tolist() if is_matched else None


def _divided(name: str, norm: Any, kind: str, factors_O: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters of a norm whose output is divided."""
    shift = 1.0 if kind == SHIFTED_NORM else 0.0
    parameters = {f"{name}.weight": (norm.weight + shift) / factors_O - shift}
    if getattr(norm, "bias", None) is not None:
        parameters[f"{name}.bias"] = norm.bias / factors_O
    return parameters


def _norm_kind(name: str, module: Any, answers: FixedAnswers) -> str | None:
    """What kind of norm a module is; None for other modules."""
    import torch

    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, len(weight), generator=generator, dtype=torch.float64)
    factors_O = _factors(len(weight), generator)
    for kind in (NORM, SHIFTED_NORM):
        try:
            before = module(states)
            with answers.replaced(_divided(name, module, kind, factors_O)):
                after = module(states)
        except _FAILURES:
            return None  # it takes more than one input
        if torch.allclose(after * factors_O, before, rtol=1e-5, atol=1e-6):
            return kind
    return None
