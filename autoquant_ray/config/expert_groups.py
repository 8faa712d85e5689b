"""The option ``--expert-groups``: which experts of a layer share a format."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator

LAYER: Final = "layer"
EXPERT: Final = "expert"


def parse_expert_groups(value: object) -> object:
    """``layer``, ``expert``, or a number of clusters from 2.

    Raises:
        ValueError: Something else.
    """
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if value in (LAYER, EXPERT) or (type(number) is int and number >= 2):
        return number
    raise ValueError(
        f"{value!r} must be {LAYER!r}, {EXPERT!r}, or a number of clusters per layer of at least 2"
    )


ExpertGroups = Annotated[Literal["layer", "expert"] | int, BeforeValidator(parse_expert_groups)]


def is_apart(expert_groups: ExpertGroups) -> bool:
    """Whether every expert is scored by itself."""
    return expert_groups != LAYER
