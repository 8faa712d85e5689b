"""Measures what the cluster's accelerators do with a model's products, and writes cards of them.

A card gives a single number for reading weights and a single one for operations, per pair of
numeric classes: those with which the products of the whole model, each as often as the model has
it, would take as long as they took.
"""

from __future__ import annotations

import datetime
import logging
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autoquant_ray.allocate.cards import SIXTEEN, Hardware
from autoquant_ray.allocate.latency import numeric_class
from autoquant_ray.config.latency_measurement import LatencyMeasurement
from autoquant_ray.distributed.placement import connected
from autoquant_ray.distributed.products import Product, TimedProduct, spread_of, time_products
from autoquant_ray.errors import ClusterError, ConfigError, one_line
from autoquant_ray.export.folder import require_outside_runs
from autoquant_ray.models.find import find_model
from autoquant_ray.plan.make import make_plan
from autoquant_ray.plan.plan import Plan
from autoquant_ray.runs.filesystems import Place, child_uri, open_place

logger = logging.getLogger(__name__)

_TYPE = "accelerator_type:"
_PLAIN = f"{SIXTEEN}x{SIXTEEN}"


@dataclass(frozen=True, kw_only=True)
class MeasuredCard:
    """A card of the cluster.

    Attributes:
        place: Path of its file.
        hardware: Its figures.
    """

    place: str
    hardware: Hardware


def measure_cards(config: LatencyMeasurement, *, overwrite: bool = False) -> list[MeasuredCard]:
    """Measure the products of a model on every kind of accelerator, and write a card of each.

    Args:
        config: Model, menu, loads and cluster.
        overwrite: Whether files of earlier measurements may be replaced.

    Raises:
        ClusterError: The cluster cannot be reached, or a node fails.
        ConfigError: A file is there already.
        ModelError: The model's config cannot be read.
    """
    place = _place(config.out)
    ref = find_model(config.model, trust_remote_code=config.trust_remote_code)
    device = "cpu" if config.device == "auto" else config.device
    products, counts = products_of(make_plan(config, ref, device=device), config.batch)
    cards = []
    with connected(config):
        kinds = _kinds(config)
        files = {kind: f"{kind}.yaml" for kind in kinds}
        there = [file for file in files.values() if place.read(file) is not None]
        if there and not overwrite:
            raise ConfigError(
                f"--out {config.out} holds {there[0]}; give another folder, or --overwrite"
            )
        for kind, node in kinds.items():
            name, timed = _measure(products, config, kind, node)
            content = card_of(name, ref.name, timed, counts)
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
            hardware = Hardware.model_validate(content)
            place.write(files[kind], text.encode())
            path = child_uri(config.out, files[kind])
            cards.append(MeasuredCard(place=path, hardware=hardware))
    return cards


def _place(out: str) -> Place:
    """Where files go: no run."""
    if "://" not in out:
        require_outside_runs(Path(out), out)
    return open_place(out)


def products_of(
    plan: Plan, batches: Sequence[int]
) -> tuple[list[Product], dict[tuple[int, int], int]]:
    """The products of a plan's linears and experts in a decode step, under every pair of its menu.

    Args:
        plan: Groups and formats.
        batches: Numbers of tokens.

    Returns:
        The products, and how many weights of a shape ``(out, in)`` the model has. An expert
        counts as a weight.
    """
    counts: dict[tuple[int, int], int] = {}
    for group in plan.groups:
        for module in group.modules:
            multiplies = module.kind in ("linear", "experts", "expert") and not module.is_idle
            for *experts, num_out, num_in in module.shapes if multiplies else ():
                many = 1 if module.expert is not None or not experts else experts[0]
                counts[num_out, num_in] = counts.get((num_out, num_in), 0) + many
    groups: dict[tuple[str, str], int | None] = {(SIXTEEN, SIXTEEN): None}
    for format_ in plan.formats:
        if format_.kv is None:
            weight, states = numeric_class(format_.weight), numeric_class(format_.input)
            block = (format_.weight.get("block_sizes") or {}).get(-1)
            groups.setdefault((weight, states), block if states == SIXTEEN else None)
    products = [
        Product(
            weight=weight,
            activation=activation,
            tokens=tokens,
            out_features=num_out,
            in_features=num_in,
            group=groups[weight, activation],
        )
        for weight, activation in sorted(groups)
        for num_out, num_in in sorted(counts)
        for tokens in batches
    ]
    return products, counts


def _kinds(config: LatencyMeasurement) -> dict[str, str | None]:
    """Kind of accelerator -> a node that has it; the CPU where there is none."""
    kinds: dict[str, str | None] = {}
    for node in ray.nodes():
        resources = node["Resources"] if node["Alive"] else {}
        if config.device == "cpu" or resources.get("GPU", 0) < 1:
            continue
        types = [key.removeprefix(_TYPE) for key in resources if key.startswith(_TYPE)]
        kind = re.sub(r"[^a-z0-9.]+", "-", (types[0] if types else "gpu").lower()).strip("-")
        kinds.setdefault(kind, node["NodeID"])
    if config.device == "cuda" and not kinds:
        raise ClusterError("`device` cuda: the cluster has no GPU; give --device cpu, or auto")
    return kinds or {"cpu": None}


def _measure(
    products: Sequence[Product], config: LatencyMeasurement, kind: str, node: str | None
) -> tuple[str, list[TimedProduct]]:
    logger.info("%s: %d products, %d rounds each", kind, len(products), config.rounds)
    options: dict[str, Any] = {"num_cpus": config.cpus_per_worker, "max_retries": 0}
    if node is not None:
        options["num_gpus"] = 1
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(time_products).options(**options)
    try:
        answer: tuple[str, list[TimedProduct]] = ray.get(
            task.remote(
                products,
                device="cpu" if node is None else "cuda",
                num_threads=config.cpus_per_worker,
                num_rounds=config.rounds,
            )
        )
    except RayError as error:
        reason = one_line(error.cause if isinstance(error, RayTaskError) else error)
        raise ClusterError(f"products cannot be measured on {kind}: {reason}") from None
    return answer


def card_of(
    name: str, model: str, timed: Sequence[TimedProduct], counts: Mapping[tuple[int, int], int]
) -> dict[str, Any]:
    """The content of a hardware file.

    Args:
        name: The device in words.
        model: The model's name.
        timed: What was measured.
        counts: Shape of a weight -> how many the model has.

    Raises:
        ClusterError: Not even products in 16 bits could be run.
    """
    date = datetime.date.today().isoformat()
    reads: dict[str, dict[str, Any]] = {}
    rates: dict[str, dict[str, Any]] = {}
    for pair, of_pair in _by_pair(timed):
        tokens = [t.product.tokens for t in of_pair]
        few, many = (_at(of_pair, count) for count in (min(tokens), max(tokens)))
        note = f"measured {date} with {{}} of {sum(counts.values())} weights of {model}"
        reads[pair] = _figure(few, counts, [t.weight_bytes for t in few], note)
        operations = [2 * t.product.tokens * math.prod(t.product.shape) for t in many]
        rates[pair] = _figure(many, counts, operations, note)
    if _PLAIN not in rates:
        problem = next((t.problem for t in timed if t.product.pair == _PLAIN), "no products")
        raise ClusterError(f"{name} cannot be measured: {problem}")
    content = {
        "name": f"{name} (measured)",
        "memory_bandwidth": reads.pop(_PLAIN),
        "weight_reads": reads,
        "matmul_rates": rates,
        "without_kernel": {
            t.product.pair: t.problem for t in timed if t.problem and t.product.pair not in rates
        },
        "products": [_row(t) for t in timed if not t.problem],
    }
    return {key: value for key, value in content.items() if value}


def _figure(
    timed: Sequence[TimedProduct],
    counts: Mapping[tuple[int, int], int],
    amounts: Sequence[int],
    note: str,
) -> dict[str, Any]:
    """Amounts over the time that the products of a whole model take: of the rounds, the median."""
    weights = [counts[t.product.shape] for t in timed]
    total = sum(n * amount for n, amount in zip(weights, amounts, strict=True))
    rounds = list(zip(*(t.seconds for t in timed), strict=True))
    seconds = [sum(n * s for n, s in zip(weights, of_round, strict=True)) for of_round in rounds]
    kernel, tokens = timed[0].kernel, timed[0].product.tokens
    return {
        "value": float(f"{total / statistics.median(seconds):.4g}"),
        "spread": round(spread_of(seconds), 4),
        "source": f"{note.format(sum(weights))}: {kernel}, {tokens} token(s), median of "
        f"{len(rounds)} rounds",
    }


def _by_pair(timed: Sequence[TimedProduct]) -> Iterator[tuple[str, list[TimedProduct]]]:
    """Pairs that torch has a kernel for, and their products, without shapes that it refused."""
    for pair in sorted({t.product.pair for t in timed}):
        of_pair = [t for t in timed if t.product.pair == pair]
        refused = {t.product.shape for t in of_pair if t.problem}
        if ran := [t for t in of_pair if t.product.shape not in refused]:
            yield pair, ran


def _at(timed: Sequence[TimedProduct], tokens: int) -> list[TimedProduct]:
    return [t for t in timed if t.product.tokens == tokens]


def _row(timed: TimedProduct) -> dict[str, Any]:
    """A product for people who want to look."""
    product = timed.product
    return {
        "pair": product.pair,
        "kernel": timed.kernel,
        "tokens": product.tokens,
        "out_features": product.out_features,
        "in_features": product.in_features,
        "milliseconds": float(f"{1000 * statistics.median(timed.seconds):.4g}"),
        "spread": round(spread_of(timed.seconds), 4),
    }
