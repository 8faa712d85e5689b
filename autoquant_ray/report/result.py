"""What a solution comes to, in a sentence: what the demo ends with and every report starts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoquant_ray.allocate.constrained.curve import loss_of
from autoquant_ray.allocate.frontier import uniform_points
from autoquant_ray.allocate.read import options_of
from autoquant_ray.formats.format import NONE
from autoquant_ray.report.groups import MixRow
from autoquant_ray.report.headline import unquantized_bytes
from autoquant_ray.report.sources import Sources

_MAX_FORMATS = 4


def result_sentence(sources: Sources, mix: Sequence[MixRow]) -> str:
    """Formats by their share of the weights, size, loss, and what a single format would lose.

    The loss is the measured one where there is one, and then the single format is the best measured
    one of no more bytes; otherwise both are predictions, and the single format is the best one
    of no more bytes.

    Args:
        sources: The solution.
        mix: How much of the model is in each format.
    """
    named = [f"{row.format} for {row.share:.0%}" for row in mix if row.format != NONE]
    formats = f"{', '.join(named[:_MAX_FORMATS])}{', ...' * (len(named) > _MAX_FORMATS)}"
    size = _size(sources, sources.manifest["solution"]["weight_bytes"])
    head = f"{formats} of the weights, {size}" if named else f"all weights in 16 bits, {size}"
    loss = _measured(sources) if sources.measured else _predicted(sources)
    return f"{head}; {loss}."


def _size(sources: Sources, num_bytes: float) -> str:
    return f"{num_bytes / unquantized_bytes(sources.scored.problem):.0%} of the size"


def _nats(loss: float) -> str:
    return f"{loss:.3f}" if loss >= 0.01 else f"{loss:.2g}"


def _measured(sources: Sources) -> str:
    solution, *rivals = sources.measured[0]
    text = (
        f"measured loss {_nats(solution['kl_mean'])} nats per token (predicted "
        f"{_nats(solution['predicted_kl'])}) on {solution['num_tokens']:,} tokens "
        f"{_data(sources, solution)}"
    )
    single = [row for row in rivals if row["name"].startswith("uniform ")]
    if not single:
        return text
    best = min(single, key=lambda row: float(row["kl_mean"]))
    name = best["name"].removeprefix("uniform ")
    size = _size(sources, best["weight_bytes"])
    return f"{text}; {name} everywhere loses {_nats(best['kl_mean'])} at {size}"


def _data(sources: Sources, row: dict[str, Any]) -> str:
    """What was measured on; of the scan's own data, samples are taken that it has not used."""
    if row["dataset"] == sources.run.dataset.get("name"):
        return "that the scan has not seen"
    return f"of {row['dataset']}"


def _predicted(sources: Sources) -> str:
    unit = "" if sources.run.is_imported else " nats per token"
    text = f"predicted loss {_nats(sources.predicted)}{unit}"
    if sources.is_by_domain:
        return text
    points = uniform_points(
        sources.scored.problem, loss_of(sources.scored, options_of(sources.manifest))
    )
    most = sources.manifest["solution"]["weight_bytes"]
    within = {name: point for name, point in points.items() if point.weight_bytes <= most}
    if not within:
        return text
    name = min(within, key=lambda name: within[name].predicted_kl)
    size = _size(sources, within[name].weight_bytes)
    return f"{text}; {name} everywhere would lose {_nats(within[name].predicted_kl)} at {size}"
