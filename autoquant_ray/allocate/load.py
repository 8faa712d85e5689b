"""A card, a load and the speed that is asked for there; what the times mean to the user."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autoquant_ray.allocate.cards import Hardware, load_hardware, shipped_cards
from autoquant_ray.errors import ConfigError

CARD_FILE = "hardware.yaml"
"""What a card that is not shipped is called in a printed command."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A card, a load, and the speed asked for.

    Attributes:
        hardware: The card.
        batch: Sequences decoded at once.
        context: Tokens of each that are cached in a decode step, and length of the prefill.
        ms_per_token: Longest decode step, which is what each sequence waits for its next token.
        tokens_per_second: Least throughput of the whole batch. Without either speed nothing is
            limited; the time is predicted.
    """

    hardware: Hardware
    batch: int = 1
    context: int = 1024
    ms_per_token: float | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        for flag in ("batch", "context"):
            if getattr(self, flag) < 1:
                raise ConfigError(f"--{flag} {getattr(self, flag)} must be at least 1")
        if None not in (self.ms_per_token, self.tokens_per_second):
            raise ConfigError("`ms_per_token` and `tokens_per_second` exclude each other")
        for flag in ("ms_per_token", "tokens_per_second"):
            speed = getattr(self, flag)
            if speed is not None and not 0 < speed < math.inf:
                raise ConfigError(f"--{flag.replace('_', '-')} {speed} must be a number above 0")
            if speed is not None:
                object.__setattr__(self, flag, float(speed))  # 10 and 10.0 are one solution

    @property
    def limit_ms(self) -> float | None:
        """Longest decode step; None where nothing is limited."""
        if self.tokens_per_second is not None:
            return 1000 * self.batch / self.tokens_per_second
        return self.ms_per_token

    @property
    def target(self) -> str:
        """The limit as the user wrote it, with the load."""
        speed = f"`ms_per_token` {self.ms_per_token:g}" if self.ms_per_token is not None else ""
        if self.tokens_per_second is not None:
            speed = f"`tokens_per_second` {self.tokens_per_second:g}"
        return f"{speed} on {self.hardware.name} (batch {self.batch}, context {self.context})"

    def words(self) -> list[str]:
        """The card, load and limit as words of a command line."""
        shipped = (name for name in shipped_cards() if load_hardware(name) == self.hardware)
        words = ["--latency", next(shipped, CARD_FILE)]
        for name in ("batch", "context", "tokens_per_second", "ms_per_token"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    @property
    def name_parts(self) -> list[str]:
        """What the limit adds to a solution's name: ``ms-5``, ``tps-200`` or nothing."""
        speeds = (("ms", self.ms_per_token), ("tps", self.tokens_per_second))
        return [f"{unit}-{speed:g}" for unit, speed in speeds if speed is not None]

    def reachable(self, low_ms: float, high_ms: float) -> str:
        """A range of step times in the user's unit; its fastest end, as rounded, can be met."""
        if self.tokens_per_second is None:
            low, high = (four_digits(ms, math.ceil) for ms in (low_ms, high_ms))
            return f"{low} to {high} ms per token"
        slow, fast = (four_digits(1000 * self.batch / ms, math.floor) for ms in (high_ms, low_ms))
        return f"{slow} to {fast} tokens per second"

    def to_json(self) -> dict[str, Any]:
        """Plain values, the card's figures among them; :meth:`from_json` is the inverse."""
        return asdict(self) | {
            "hardware": self.hardware.model_dump(mode="json", exclude_defaults=True)
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Latency | None:
        """Read back what :meth:`to_json` wrote; None stays None."""
        if value is None:
            return None
        return cls(**{**value, "hardware": Hardware.model_validate(value["hardware"])})


def latency_of(card: str, **options: Any) -> Latency:
    """A load on a card.

    Args:
        card: A shipped card, such as ``h100``, or the path of a hardware file.
        options: Other fields of :class:`Latency`.

    Raises:
        ConfigError: An unknown card, a wrong file, or a value out of range.
    """
    return Latency(hardware=load_hardware(card), **options)


def four_digits(value: float, direction: Callable[[float], int] = round) -> str:
    """A number above 0 with four digits, without an exponent.

    Args:
        value: The number.
        direction: How the digits are rounded: ``math.ceil``, ``math.floor`` or to the nearest.
    """
    digits = 3 - math.floor(math.log10(value))
    return f"{direction(value * 10**digits) / 10**digits:.{max(digits, 0)}f}"
