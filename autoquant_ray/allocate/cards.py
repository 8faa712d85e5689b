"""Cards that allocations are made for: bandwidth and matrix-product rates, each with its source.

The shipped cards are the files of ``hardware/``; a file of one's own has the same keys. Rates are
dense. A rate stands under ``<weight>x<activation>``, each ``16`` (bfloat16 and float16), ``fp8``,
``int4`` and so on; a pair without one runs at the rate of ``16x16``. The command measure-latency
writes such files of a cluster's own accelerators.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from autoquant_ray.config.files import places_in, problems_of, read_yaml
from autoquant_ray.errors import ConfigError

FOLDER = Path(__file__).parent / "hardware"
SIXTEEN = "16"
_PAIR = re.compile(r"(16|(fp|int)[1-9]\d?)x(16|(fp|int)[1-9]\d?)")


class Figure(BaseModel):
    """A number and where it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float = Field(gt=0, allow_inf_nan=False)
    source: str = Field(pattern=r"\S", description="Who says so, and what exactly.")
    spread: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Of a measurement: quartiles / median."
    )

    @field_validator("value", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a number, not yes, no, true or false")
        return value


class Share(Figure):
    """A part of 1."""

    value: float = Field(gt=0, le=1, allow_inf_nan=False)


class Hardware(BaseModel):
    """One card."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"\S")
    memory_bandwidth: Figure = Field(description="Peak, in bytes per second.")
    bandwidth_share: Share | None = Field(
        default=None, description="Share of the peak that reads achieve. Default: all of it."
    )
    matmul_rates: dict[str, Figure] = Field(
        description="Pair of numeric classes, such as fp8xfp8 -> dense operations per second."
    )

    weight_reads: dict[str, Figure] = Field(
        default_factory=dict,
        description="Pair -> bytes of weights per second that its kernel reads; without: all.",
    )
    without_kernel: dict[str, str] = Field(
        default_factory=dict, description="Pairs that were not measured, and why."
    )
    products: tuple[dict[str, Any], ...] = Field(
        default=(), description="What was measured of each product, for people; not kept."
    )

    @field_validator("matmul_rates", "weight_reads")
    @classmethod
    def _check_pairs(cls, value: dict[str, Figure]) -> dict[str, Figure]:
        for pair in value:
            if not _PAIR.fullmatch(pair):
                raise ValueError(
                    f"{pair!r} is not a pair <weight>x<activation> of 16, fp8, int8, fp4, ..."
                )
        return value

    @field_validator("matmul_rates")
    @classmethod
    def _check_plain(cls, value: dict[str, Figure]) -> dict[str, Figure]:
        if f"{SIXTEEN}x{SIXTEEN}" not in value:
            raise ValueError("the rate 16x16 is missing; formats without units run at it")
        return value

    @field_validator("products")
    @classmethod
    def _drop_products(cls, _: Any) -> tuple[dict[str, Any], ...]:
        return ()

    @property
    def is_measured(self) -> bool:
        """Whether the figures were measured on the card, and are no datasheet's."""
        return self.memory_bandwidth.spread is not None

    def bytes_per_second(self, weight: str = SIXTEEN, activation: str = SIXTEEN) -> float:
        """Bandwidth that reads achieve, in a product of a pair of numeric classes."""
        if (figure := self.weight_reads.get(f"{weight}x{activation}")) is not None:
            return figure.value
        share = 1.0 if self.bandwidth_share is None else self.bandwidth_share.value
        return self.memory_bandwidth.value * share

    def rate(self, weight: str, activation: str) -> float:
        """Dense operations per second of a pair of numeric classes."""
        pair = f"{weight}x{activation}"
        return self.matmul_rates.get(pair, self.matmul_rates[f"{SIXTEEN}x{SIXTEEN}"]).value

    def has_units(self, weight: str, activation: str) -> bool:
        """Whether the card multiplies the pair as it is; 16-bit activations always do."""
        return activation == SIXTEEN or f"{weight}x{activation}" in self.matmul_rates


def shipped_cards() -> list[str]:
    """Names of the shipped cards."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_hardware(named: str, option: str = "latency") -> Hardware:
    """Read a card.

    Args:
        named: A shipped card, such as ``h100``, or the path of a hardware file.
        option: Which option names it, for the error.

    Raises:
        ConfigError: No such card or file, an unknown key, a figure that is wrong or lacks its
            source; one line with the place.
    """
    cards = shipped_cards()
    path = str(FOLDER / f"{named.lower()}.yaml") if named.lower() in cards else named
    if not Path(path).is_file():
        raise ConfigError(
            f"`{option}` {named!r} is neither a card ({', '.join(cards)}) nor a hardware file"
        )
    try:
        return Hardware.model_validate(read_yaml(path))
    except ValidationError as error:
        keys = [*Hardware.model_fields, "value", "source"]
        place = places_in(f"hardware file {path}")
        raise ConfigError(problems_of(error, place, keys)) from None
