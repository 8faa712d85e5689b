"""The command that measures the cluster's accelerators, for ``solve --latency``."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from autoquant_ray.cli.edge import Result, only_ours_on_stdout, prints_result, show_lines
from autoquant_ray.cli.options import config_options, given_fields
from autoquant_ray.config.files import load_config
from autoquant_ray.config.latency_measurement import LatencyMeasurement

if TYPE_CHECKING:
    from autoquant_ray.jobs.latency_card import MeasuredCard


@click.command("measure-latency")
@click.argument("model", required=False)
@config_options(LatencyMeasurement, exclude=("model", "custom_formats"))
@click.option("--config", "config_file", type=click.Path(), help="YAML file with these fields.")
@click.option("--overwrite", is_flag=True, help="Replace the files of an earlier measurement.")
@prints_result
def measure_latency(
    model: str | None, config_file: str | None, overwrite: bool, **flags: Any
) -> Result:
    """Measure MODEL's products on the cluster's own accelerators, for solve --latency.

    MODEL may be a folder that holds only config.json. Every kind of accelerator gets a file with
    the rates at which its kernels read weights and multiply, as torch has kernels for the formats.

    \b
    Example:
      autoquant-ray measure-latency ./Qwen3-4B --out hardware \\
          --formats wint8_aint8,wfp8_afp8
      autoquant-ray solve runs/qwen3 --latency hardware/h100.yaml \\
          --tokens-per-second 90
    """
    from autoquant_ray.jobs.latency_card import measure_cards

    given = given_fields({"model": model, **flags})
    config = load_config(LatencyMeasurement, config_file, given)
    with only_ours_on_stdout():
        cards = measure_cards(config, overwrite=overwrite)
    return Result(
        json=lambda: [
            card.hardware.model_dump(mode="json", exclude_defaults=True) | {"file": card.place}
            for card in cards
        ],
        show=lambda: show_lines(_lines(cards)),
    )


def _lines(cards: Iterable[MeasuredCard]) -> Iterator[str]:
    for card in cards:
        hardware = card.hardware
        yield f"{card.place}: {hardware.name}"
        for pair, rate in hardware.matmul_rates.items():
            weight, _, states = pair.partition("x")
            read = hardware.bytes_per_second(weight, states)
            yield f"  {pair:10} reads {read / 1e9:.4g} GB/s, {rate.value / 1e12:.4g} TFLOP/s"
        for problem in hardware.without_kernel.values():
            yield f"  {problem}: such formats count with the rates of 16x16"
        place = shlex.quote(card.place)
        yield f"next: autoquant-ray solve RUN --latency {place} --tokens-per-second X"
