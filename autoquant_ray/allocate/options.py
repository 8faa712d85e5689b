"""Budget and constraints of one solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, SkipValidation, TypeAdapter, ValidationError

from autoquant_ray.allocate.load import Latency
from autoquant_ray.config.domain_weights import check_objective, normalised
from autoquant_ray.config.expert_groups import LAYER, ExpertGroups
from autoquant_ray.config.files import first_problem
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.kv_cache import positive_problem
from autoquant_ray.serving.rules import check_target

BITS_PER_BYTE = 8
UNQUANTIZED_BITS = 16


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """Budget and constraints of one solution; all given ones hold together.

    What is least is the loss on all tokens, unless ``domains`` weighs the losses of domains (the
    weights are made to sum to 1) or ``worst_domain`` asks for the least loss of the worst one.
    Values of unknown types go through :meth:`checked`.
    With an ``engine`` only allocations count that it can serve, on the ``gpu`` if one is given.
    ``expert_groups`` None: as the run was scanned.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    bits: float | None = None
    bytes: int | None = None
    kv_bytes_per_token: float | None = None
    bits_over: Literal["searched", "all"] = "searched"
    cost: Literal["storage", "modelopt", "active_moe"] = "storage"
    max_formats: int | None = None
    pins: Mapping[str, str] = field(default_factory=dict)
    allow: Mapping[str, Sequence[str]] = field(default_factory=dict)
    domains: Mapping[str, float] = field(default_factory=dict)
    worst_domain: bool = False
    latency: SkipValidation[Latency | None] = None
    engine: str | None = None
    gpu: str | None = None
    expert_groups: ExpertGroups | None = None

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> SolveOptions:
        """Options of values that may be of any type.

        Raises:
            ConfigError: An unknown name, or a value that its field cannot take.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            known = [one.name for one in fields(cls)]
            raise ConfigError(first_problem(error, lambda name, _: name, known)) from None

    def __post_init__(self) -> None:
        check_objective(self.domains, self.worst_domain)
        object.__setattr__(self, "domains", normalised(self.domains))
        if not isinstance(self.latency, Latency | None):
            raise ConfigError(f"latency {self.latency!r}: use latency_of({self.latency!r}, ...)")
        object.__setattr__(self, "gpu", check_target(self.engine, self.gpu))
        limit_ms = None if self.latency is None else self.latency.limit_ms
        if self.bits is None and self.bytes is None and limit_ms is None:
            raise ConfigError(
                "give a budget: --bits B, --bytes N, or --latency HARDWARE with "
                "--tokens-per-second X or --ms-per-token Y"
            )
        if self.bits is not None and not 0 < self.bits <= UNQUANTIZED_BITS:
            raise ConfigError(f"--bits {self.bits} must be above 0 and at most 16")
        if (problem := positive_problem(self.kv_bytes_per_token)) is not None:
            raise ConfigError(problem)


def solve_options(config: ScanConfig) -> SolveOptions:
    """The budget of a scan."""
    names = {one.name for one in fields(SolveOptions)} & ScanConfig.model_fields.keys()
    values = {name: getattr(config, name) for name in names}
    experts = None if config.expert_groups == LAYER else config.expert_groups
    return SolveOptions(**values | {"expert_groups": experts})
