"""How ModelOpt calibrates the quantizers of a format: its ``algorithm``, checked when planning.

``max`` takes the largest value of a tensor, ``mse`` tries multiples of it and keeps the one with
the smallest squared error. Names, defaults and ranges of the arguments are those of ModelOpt's own
config classes. Only arguments that change a scale can be given. ``weighted`` is this package's: the
search of ``mse`` with each squared error weighted by the mean square of the input channel that the
weight is multiplied with, which is the squared error of the output if channels are uncorrelated.
``awq`` is ModelOpt's ``awq_lite`` with one set of factors for all linears that read an input, so
that the factors can be folded into what makes it (:mod:`autoquant_ray.plan.find_folds`).
``gptq`` keeps the largest values as scales and rounds column by column, see
:mod:`autoquant_ray.quantize.gptq`; without ``perc_damp`` each weight's damping is chosen.
``awq+gptq`` takes the factors of ``awq`` and rounds what they give by ``gptq``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from autoquant_ray.errors import FormatError
from autoquant_ray.formats.numbers import is_static_nvfp4

MAX, MSE, WEIGHTED, GPTQ = "max", "mse", "weighted", "gptq"
SMOOTHQUANT, AWQ_LITE, AWQ = "smoothquant", "awq_lite", "awq"
AWQ_GPTQ = "awq+gptq"
_MULTIPLIERS = ("step_size", "start_multiplier", "stop_multiplier")
ARGUMENTS: Mapping[str, Sequence[str]] = {
    MAX: (),
    MSE: (*_MULTIPLIERS, "fp8_scale_sweep"),
    WEIGHTED: _MULTIPLIERS,
    GPTQ: ("perc_damp",),
    SMOOTHQUANT: ("alpha",),
    AWQ_LITE: ("alpha_step",),
    AWQ: ("alpha_step",),
    AWQ_GPTQ: ("alpha_step", "perc_damp"),
}
"""Method -> its arguments."""

SEARCHES = (MSE, WEIGHTED)
"""Methods that try multiples of a weight's maximum."""

METHODS = (MAX, MSE, WEIGHTED, AWQ, GPTQ, AWQ_GPTQ)
"""Methods that can be given behind a format's name: ``wint4_afp16:awq``."""

FITTED = (WEIGHTED, AWQ, GPTQ, AWQ_GPTQ)
"""Methods of this package, which fit weights to their inputs."""

FACTORS = (AWQ, AWQ_GPTQ)
"""Methods that multiply a weight's columns by factors which are folded into the model."""

BY_COLUMNS = (GPTQ, AWQ_GPTQ)
"""Methods that round a weight column by column."""

FITTED_BY_EXPERT = (WEIGHTED, *BY_COLUMNS)
"""Methods that fit a routed expert's weights to the tokens that were routed to it."""

WEIGHTED_DEFAULTS: Mapping[str, Any] = {
    "step_size": 0.025,
    "start_multiplier": 0.7,
    "stop_multiplier": 1.05,
}
"""15 multiples; those of ModelOpt's ``mse``, from 0.25 to 4 in steps of 0.1, are too coarse."""

ALPHA_STEP = 0.1
"""Between AWQ's candidates where an algorithm names no step, as in ModelOpt's AWQLiteCalibConfig.
"""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    WEIGHTED: WEIGHTED_DEFAULTS,
    GPTQ: {},
    AWQ: {"alpha_step": ALPHA_STEP},
    AWQ_GPTQ: {"alpha_step": ALPHA_STEP},
}
"""What the methods of this package are without arguments; ModelOpt need not be asked."""

SETS: Final = "autoquant_ray_sets"
"""Method of an allocation of several: see :mod:`autoquant_ray.quantize.calibration_mode`."""

MAX_CANDIDATES = 256
"""Scales that a search may try: what one byte can number."""

SEARCHED_BYTES = 2**30
"""Most bytes that a worker keeps of what searches found, one per scale: 17 billion weights in
blocks of 16."""

FACTOR_BYTES = 2**28
"""Most bytes that a worker keeps of the factors of Hessians, for weights with the same input."""


def checked_algorithm(owner: str, given: Any) -> dict[str, Any] | None:
    """An algorithm with all its arguments; None for ``max``.

    Args:
        owner: The format in words, for errors.
        given: A method, or a mapping with ``method`` and arguments; None means ``max``.

    Raises:
        FormatError: Unknown method, argument or value.
    """
    arguments = dict(given) if isinstance(given, Mapping) else {"method": given}
    method = arguments.pop("method", MAX) or MAX
    if method not in ARGUMENTS:
        raise FormatError(
            f"{owner} needs the calibration algorithm {method!r}; known are {', '.join(ARGUMENTS)}"
        )
    unknown = sorted(str(name) for name in set(arguments) - set(ARGUMENTS[method]))
    if unknown:
        taken = ", ".join(ARGUMENTS[method]) or "no arguments"
        raise FormatError(
            f"{owner}: the algorithm {method} has no argument {unknown[0]!r}; it takes {taken}"
        )
    return None if method == MAX else {"method": method} | _with_defaults(owner, method, arguments)


def check_method(owner: str, weight: Mapping[str, Any], algorithm: Mapping[str, Any]) -> None:
    """Refuse a method that the weights of a format cannot have; ModelOpt would skip it silently.

    Args:
        owner: The format in words, for errors.
        weight: Its weight quantizer.
        algorithm: From :func:`checked_algorithm`.

    Raises:
        FormatError: There is no stored scale, or the candidates are none or too many.
    """
    method = algorithm["method"]
    if method not in (*SEARCHES, *BY_COLUMNS):
        return
    sizes = weight.get("block_sizes") or {}
    if "dynamic" in (weight.get("type"), sizes.get("type")):
        raise FormatError(
            f"{owner}: the algorithm {method} needs stored scales, but its weights are scaled "
            "anew at each use (type: dynamic); give them static scales, or use max"
        )
    if method != MSE and [axis for axis in sizes if isinstance(axis, int)] not in ([], [-1]):
        raise FormatError(
            f"{owner}: the algorithm {method} needs blocks of the last axis (-1), whose values "
            "are multiplied with different input channels; leave other axes out, or use mse"
        )
    if method in SEARCHES:
        _check_candidates(owner, weight, algorithm)


def _check_candidates(owner: str, weight: Mapping[str, Any], algorithm: Mapping[str, Any]) -> None:
    """Refuse a search without candidates, or with too many."""
    if algorithm.get("fp8_scale_sweep"):
        if not is_static_nvfp4(weight):
            raise FormatError(
                f"{owner}: fp8_scale_sweep searches the scales of static NVFP4 weights only; "
                "set it to false"
            )
        return
    start, stop, step = (
        algorithm[name] for name in ("start_multiplier", "stop_multiplier", "step_size")
    )
    number = num_multipliers(algorithm) if stop >= start else 0
    if not 1 <= number <= MAX_CANDIDATES:
        raise FormatError(
            f"{owner}: multipliers from {start:g} to {stop:g} in steps of {step:g} are "
            f"{number} candidates; there must be 1 to {MAX_CANDIDATES}"
        )


def num_multipliers(algorithm: Mapping[str, Any]) -> int:
    """How many multiples of a maximum a search tries, both ends included.

    ``weighted`` tries those that its step reaches. ``mse`` counts as ModelOpt does, where a step
    that divides the range by floating-point luck may add a multiple.
    """
    start, stop, step = (
        float(algorithm[name]) for name in ("start_multiplier", "stop_multiplier", "step_size")
    )
    steps = (stop - start) / step
    return 1 + (round(steps) if algorithm["method"] == WEIGHTED else math.ceil(steps))


def of_allocation(algorithms: Mapping[str, Mapping[str, Any] | None]) -> str | dict[str, Any]:
    """The ``algorithm`` of a whole allocation, for ``mtq.quantize``; JSON-safe.

    Args:
        algorithms: Name of every quantizer -> its format's algorithm.

    Returns:
        ``max``; or the one algorithm of ModelOpt's that all have; or :data:`SETS` with a set of
        quantizers for each algorithm but ``max``.
    """
    sets: dict[str, dict[str, Any]] = {}
    for name, algorithm in algorithms.items():
        if algorithm is not None:
            entry = sets.setdefault(json.dumps(algorithm), {"algorithm": dict(algorithm)})
            entry.setdefault("quantizers", []).append(name)
    if not sets:
        return MAX
    only = next(iter(sets.values()))["algorithm"]
    if len(sets) == 1 and None not in algorithms.values() and only["method"] not in FITTED:
        return dict(only)
    return {"method": SETS, "sets": list(sets.values()), "others": MAX}


def sharing(algorithm: str | dict[str, Any], quantizers: Sequence[str]) -> str | dict[str, Any]:
    """The algorithm of an allocation with this package's mode, where weights share scales.

    Args:
        algorithm: From :func:`of_allocation`.
        quantizers: Names of weight quantizers that take the largest weight of all layers that
            engines fuse with theirs.
    """
    return {**in_mode(algorithm), "shared": list(quantizers)} if quantizers else algorithm


def without_fits(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of ``mtq.quantize`` with ``max`` for methods of this package, which need
    inputs."""
    algorithm = config["algorithm"]
    if not by_sets(algorithm):
        return dict(config)
    sets = [
        set_ | {"algorithm": MAX} if set_["algorithm"]["method"] in FITTED else set_
        for set_ in algorithm["sets"]
    ]
    return {**config, "algorithm": algorithm | {"sets": sets}}


def algorithm_of_part(
    algorithm: str | dict[str, Any], holds: Callable[[str], bool]
) -> str | dict[str, Any]:
    """An algorithm of ``mtq.quantize`` for a part of a model.

    Args:
        algorithm: For the model.
        holds: Whether the part holds a quantizer, by its name.
    """
    if isinstance(algorithm, str) or not by_sets(algorithm):
        return algorithm
    sets = [
        set_ | {"quantizers": names}
        for set_ in algorithm["sets"]
        if (names := [name for name in set_["quantizers"] if holds(name)])
    ]
    shared = [name for name in algorithm.get("shared", ()) if holds(name)]
    return algorithm | {"sets": sets, "shared": shared}


def by_sets(algorithm: str | Mapping[str, Any]) -> bool:
    """Whether the algorithm of an allocation needs this package's mode."""
    return isinstance(algorithm, Mapping) and algorithm["method"] == SETS


def in_mode(algorithm: str | dict[str, Any]) -> dict[str, Any]:
    """The same with this package's mode, which lets ModelOpt calibrate static NVFP4 on CPU and
    shares scales."""
    if isinstance(algorithm, dict) and by_sets(algorithm):
        return algorithm
    return {"method": SETS, "sets": [], "others": algorithm}


def _with_defaults(owner: str, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    if not arguments and method in _DEFAULTS:
        return dict(_DEFAULTS[method])

    from pydantic import ValidationError

    from autoquant_ray.modelopt_api import algorithm_configs as config

    if method == AWQ_GPTQ:
        by_part = {
            p: {n: v for n, v in arguments.items() if n in ARGUMENTS[p]} for p in (AWQ, GPTQ)
        }
        factors, rounding = (_with_defaults(owner, p, given) for p, given in by_part.items())
        return factors | rounding
    classes: dict[str, Any] = {
        MSE: config.MseCalibConfig,
        WEIGHTED: config.MseCalibConfig,
        GPTQ: config.GPTQCalibConfig,
        SMOOTHQUANT: config.SmoothQuantCalibConfig,
        AWQ_LITE: config.AWQLiteCalibConfig,
        AWQ: config.AWQLiteCalibConfig,
    }
    for name, value in arguments.items():
        is_switch = isinstance(classes[method].model_fields[name].default, bool)
        if value is None or isinstance(value, bool) != is_switch:
            wanted = "true or false" if is_switch else "a number"
            raise FormatError(f"{owner}: algorithm.{name}: must be {wanted} (got {value!r})")
    given = {**WEIGHTED_DEFAULTS, **arguments} if method == WEIGHTED else dict(arguments)
    try:
        full = classes[method](**given).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"{owner}: algorithm.{place}: {first['msg']} (got {first['input']!r})"
        ) from None
    names = given if method == GPTQ else ARGUMENTS[method]
    numbers = {name: full[name] for name in names}
    if not all(math.isfinite(value) for value in numbers.values()):
        raise FormatError(f"{owner}: algorithm: arguments must be finite numbers (got {numbers})")
    return numbers
