"""What calibration knows of a model's inputs, as quantizers take it.

A shard gives a :class:`Calibration`, and so does the merge of all shards. Maxima merge by maximum,
so shards may be computed anywhere, in any order, more than once. Sums of channels merge in float64
and in the order of the shards, so that their mean depends neither on who counted nor on who came
first.

Shape letters: I in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from autoquant_ray.models.quantizable import expert_place
from autoquant_ray.plan.fold import Fold


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Inputs of one module, channel by channel, over real tokens.

    Attributes:
        largest_I: Largest absolute value, float32; None where no format needs it.
        sum_I: Sum of absolute values, float64; None where no format needs it.
        square_sum_I: Sum of squares, float64; None where no format needs it.
        num_tokens: Number of tokens.
    """

    largest_I: np.ndarray[Any, np.dtype[np.float32]] | None
    sum_I: np.ndarray[Any, np.dtype[np.float64]] | None
    square_sum_I: np.ndarray[Any, np.dtype[np.float64]] | None = None
    num_tokens: int

    @property
    def mean_I(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Mean of absolute values: ModelOpt's ``act_scale``."""
        assert self.sum_I is not None
        return (self.sum_I / self.num_tokens).astype(np.float32)

    def without_squares(self) -> Channels | None:
        """The same without the sum of squares; None if nothing else is there."""
        if self.largest_I is None and self.sum_I is None:
            return None
        return replace(self, square_sum_I=None)

    def merged(self, later: Channels) -> Channels:
        """With those of a shard that comes after all that are in this record."""
        largest_I, sum_I, square_sum_I = self.largest_I, self.sum_I, self.square_sum_I
        if largest_I is not None and later.largest_I is not None:
            largest_I = np.maximum(largest_I, later.largest_I)
        if sum_I is not None and later.sum_I is not None:
            sum_I = sum_I + later.sum_I
        if square_sum_I is not None and later.square_sum_I is not None:
            square_sum_I = square_sum_I + later.square_sum_I
        return Channels(
            largest_I=largest_I,
            sum_I=sum_I,
            square_sum_I=square_sum_I,
            num_tokens=self.num_tokens + later.num_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class ModuleCalibration:
    """What calibration knows of one module.

    Attributes:
        maxima: Name (``input_amax``, ``k_bmm_amax``, ...) -> largest absolute value.
        channels: Its input channels; None where no format needs them, or no token came.
        experts: Of fused experts, ``PARAMETER.NUMBER`` (``PARAMETER`` where all experts are
            quantized as one tensor) -> input channels over the tokens routed there.
        alphas: Name of a format that AWQ searches -> exponent of the best candidate.
    """

    maxima: Mapping[str, float] = field(default_factory=dict)
    channels: Channels | None = None
    experts: Mapping[str, Channels] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def merged(self, later: ModuleCalibration) -> ModuleCalibration:
        """With that of a shard that comes after all that are in this record; no alphas."""
        maxima = dict(self.maxima)
        for name, value in later.maxima.items():
            maxima[name] = max(value, maxima[name]) if name in maxima else value
        channels = self.channels or later.channels
        if self.channels is not None and later.channels is not None:
            channels = self.channels.merged(later.channels)
        experts = dict(self.experts)
        for part, more in later.experts.items():
            experts[part] = experts[part].merged(more) if part in experts else more
        return ModuleCalibration(maxima=maxima, channels=channels, experts=experts)


_UNSEEN = ModuleCalibration()

NUM_HALVES = 2
"""Of the shards of each domain, where what is fitted to many tokens is scored."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def can_be_halved(num_tokens: Sequence[int], least: int) -> bool:
    """Whether something can be fitted to the tokens of an expert, and without those of a half.

    Args:
        num_tokens: That were routed to it in each half.
        least: Fewer of both together are too few.
    """
    return all(num_tokens) and sum(num_tokens) >= least


@dataclass(frozen=True, kw_only=True)
class FittedCodes:
    """A weight rounded by GPTQ: codes of its format's grid, one byte per weight, row by row.

    Attributes:
        damping: That was chosen.
        whole: Fitted on all tokens.
        without: Fitted on all tokens but those of a half, by the number of the half.
    """

    damping: float
    whole: Bytes
    without: tuple[Bytes, ...]


@dataclass(frozen=True, kw_only=True)
class FittedWeight:
    """What was fitted to a weight under a format.

    Attributes:
        multipliers: For each scale of the weight, in order, the number of the multiple of its
            maximum that was best; None where scales are the maxima.
        codes: Its rounding; None where each number is rounded to the nearest.
    """

    multipliers: Bytes | None = None
    codes: FittedCodes | None = None


class Codes(Protocol):
    """As :class:`FittedCodes`, in memory or in a file."""

    @property
    def damping(self) -> float: ...

    @property
    def whole(self) -> Bytes: ...

    @property
    def without(self) -> Sequence[Bytes]: ...


class Fit(Protocol):
    """As :class:`FittedWeight`, in memory or in a file."""

    @property
    def multipliers(self) -> Bytes | None: ...

    @property
    def codes(self) -> Codes | None: ...


FittedWeights = Mapping[tuple[str, str, str], Fit]
"""(module, part as in ``ModuleCalibration.experts`` or '', ``Format.weight_key``) -> the fit."""


@dataclass(frozen=True)
class Calibration:
    """What calibration knows of a model.

    Attributes:
        modules: Module name -> its record; modules that saw no token are not among them.
        rounding: What was fitted to a weight; of a run, read from its file where it is used.
        folds: Linear -> fold of its input, of those that may take factors.
        halves: Shard -> the half of the data that it is in, where something was fitted to halves.
        unseen_half: Weights are rounded as fitted without the tokens of this half; None: with all.
    """

    modules: Mapping[str, ModuleCalibration] = field(default_factory=dict)
    rounding: FittedWeights = field(default_factory=dict)
    folds: Mapping[str, Fold] = field(default_factory=dict)
    halves: Mapping[int, int] = field(default_factory=dict)
    unseen_half: int | None = None

    def for_shard(self, shard: int | None) -> Calibration:
        """The same with weights rounded as fitted without the half that a shard is in.

        Args:
            shard: Its number; None, or a shard without a half: as fitted to all tokens.
        """
        half = None if shard is None else self.halves.get(shard)
        return replace(self, unseen_half=half)

    def codes(self, key: tuple[str, str, str]) -> Bytes | None:
        """Codes of a weight, as in ``rounding``; None where each number is rounded to the nearest.

        Args:
            key: As in ``rounding``.
        """
        fitted = self.rounding.get(key)
        if fitted is None or fitted.codes is None:
            return None
        half = self.unseen_half
        return fitted.codes.whole if half is None else fitted.codes.without[half]

    def of(self, module: str) -> ModuleCalibration:
        """The record of a module; an empty one where it saw no token."""
        return self.modules.get(module, _UNSEEN)

    def maxima(self) -> dict[tuple[str, str], float]:
        """(module, name) -> largest absolute value: the rows of ``calibration.parquet``."""
        return {
            (module, name): value
            for module, record in self.modules.items()
            for name, value in record.maxima.items()
        }

    def channels(self) -> dict[tuple[str, str], Channels]:
        """(module, part) -> channels: the rows of ``channels.parquet``.

        The part is '' for a linear's input, else as in ``ModuleCalibration.experts``.
        """
        channels = {}
        for module, record in self.modules.items():
            if record.channels is not None:
                channels[module, ""] = record.channels
            channels |= {(module, part): value for part, value in record.experts.items()}
        return channels

    def with_enough_tokens(self, least: int) -> tuple[Calibration, list[str]]:
        """Without the mean squares of experts that saw few tokens; and the names of these experts.

        Scales of their weights then stay at the maxima.

        Args:
            least: Fewer tokens are few.
        """
        modules = dict(self.modules)
        few: set[str] = set()
        for name, record in self.modules.items():
            kept = {k: v for k, v in record.experts.items() if v.num_tokens >= least}
            for part in record.experts.keys() - kept.keys():
                few.add(".".join((name, *part.split(".")[1:])))
            modules[name] = replace(record, experts=kept)
            channels = record.channels
            if channels is None or channels.square_sum_I is None:
                continue
            if expert_place(name) is not None and channels.num_tokens < least:
                few.add(name)
                modules[name] = replace(record, channels=channels.without_squares())
        return replace(self, modules=modules), sorted(few)

    def with_alphas(self, alphas: Mapping[tuple[str, str], float]) -> Calibration:
        """Together with the result of AWQ's search.

        Args:
            alphas: (module, format) -> exponent of the best candidate.
        """
        modules = dict(self.modules)
        for (module, format_), alpha in alphas.items():
            record = modules[module]
            modules[module] = replace(record, alphas={**record.alphas, format_: alpha})
        return replace(self, modules=modules)


def calibration_of_maxima(maxima: Mapping[tuple[str, str], float]) -> Calibration:
    """The inverse of :meth:`Calibration.maxima`."""
    nested: dict[str, dict[str, float]] = {}
    for (module, name), value in maxima.items():
        nested.setdefault(module, {})[name] = value
    return Calibration(
        {module: ModuleCalibration(maxima=values) for module, values in nested.items()}
    )


def calibration_of_channels(channels: Mapping[tuple[str, str], Channels]) -> Calibration:
    """The inverse of :meth:`Calibration.channels`."""
    parts: dict[str, dict[str, Channels]] = {}
    for (module, part), record in channels.items():
        parts.setdefault(module, {})[part] = record
    return Calibration(
        {
            module: ModuleCalibration(channels=records.pop("", None), experts=records)
            for module, records in parts.items()
        }
    )


def merge_calibrations(parts: Iterable[Calibration]) -> Calibration:
    """Merge shards in their order; modules and names are sorted."""
    merged: dict[str, ModuleCalibration] = {}
    for part in parts:
        for module, record in part.modules.items():
            merged[module] = merged.get(module, _UNSEEN).merged(record)
    return Calibration(
        {
            module: replace(
                record,
                maxima=dict(sorted(record.maxima.items())),
                experts=dict(sorted(record.experts.items())),
            )
            for module, record in sorted(merged.items())
        }
    )
