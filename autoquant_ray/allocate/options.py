"""Budget and constraints of one solution: each option is described once, beside its field.

From the fields come the flags of ``solve``, the name of a solution's folder, the ``budget`` of its
manifest, and the command that a report prints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SkipValidation,
    ValidationError,
    field_validator,
    model_validator,
)

from autoquant_ray.allocate.load import Latency
from autoquant_ray.config.domain_weights import check_objective, normalised, parse_weights
from autoquant_ray.config.expert_groups import LAYER, ExpertGroups, parse_expert_groups
from autoquant_ray.config.files import problems_of
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.values import parse_bytes
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.kv_cache import positive_problem
from autoquant_ray.serving.rules import check_target

BITS_PER_BYTE = 8
UNQUANTIZED_BITS = 16


@dataclass(frozen=True, kw_only=True)
class Written:
    """How an option is written outside the model.

    Attributes:
        flag: Of ``solve``, where it is not the field's name.
        metavar: Of the flag.
        least: Smallest number that the flag takes.
        read: Makes the value of the flag's text, where that is written in a way of its own; raises
            ValueError. None: the field's type says how.
        is_joined: All entries of a mapping are written after one flag, not a flag for each.
        part: Value -> what it adds to the name of a solution's folder. None: it goes into the
            digest at the end of the name.
        needs: Field without which the value counts as the default.
        is_in_every_digest: The digest holds it also where it is not given. Of a new option this
            must be False, so that names stay what they are.
        is_in_every_manifest: The same for the manifest.
    """

    flag: str | None = None
    metavar: str | None = None
    least: int | None = None
    read: Callable[[str], Any] | None = None
    is_joined: bool = False
    part: Callable[[Any], str] | None = None
    needs: str | None = None
    is_in_every_digest: bool = False
    is_in_every_manifest: bool = True

    def flag_of(self, name: str) -> str:
        """The flag of the field of that name."""
        return f"--{(self.flag or name).replace('_', '-')}"


def _bits_part(bits: float) -> str:
    """Nine digits at most: what a search for a loss ends with has noise behind them."""
    text = f"{bits:.2f}"
    short = f"{bits:.9g}"
    return f"bits-{text if float(text) == float(short) else short}"


def _described_in_scan(name: str) -> str:
    return ScanConfig.model_fields[name].description or ""


class SolveOptions(BaseModel):
    """Budget and constraints of one solution; all given ones hold together.

    What is least is the loss on all tokens, unless ``domains`` weighs the losses of domains (the
    weights are made to sum to 1) or ``worst_domain`` asks for the least loss of the worst one.
    With an ``engine`` only allocations count that it can serve, on the ``gpu`` if one is given.
    ``expert_groups`` None: as the run was scanned.

    Raises:
        ConfigError: An unknown name, or a value that its field cannot take.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Annotated[float | None, Written(part=_bits_part)] = Field(
        default=None,
        description="Budget: average stored bits per searched weight; a tied head's weights are "
        "not among them, and what quantizing it adds is.",
    )
    bytes: Annotated[
        int | None,
        BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value),
        Written(read=parse_bytes, part=lambda number: f"bytes-{number}"),
    ] = Field(default=None, description="Budget: bytes of the whole model, e.g. 2.5GiB.")
    kv_bytes_per_token: Annotated[
        float | None,
        Written(metavar="N", part=lambda limit: f"kv-{limit:g}", is_in_every_manifest=False),
    ] = Field(
        default=None,
        description="Limit: bytes that a token of context takes in the KV cache, over all layers.",
    )
    bits_over: Annotated[
        Literal["searched", "all"], Written(needs="bits", is_in_every_digest=True)
    ] = Field(default="searched", description="Weights that --bits averages over.")
    cost: Annotated[
        Literal["storage", "modelopt", "active_moe"],
        Written(needs="bits", is_in_every_digest=True),
    ] = Field(
        default="storage",
        description="Cost that --bits counts: stored bytes with scales, or ModelOpt's number; "
        "active_moe: of routed experts only the share that a token visits.",
    )
    max_formats: Annotated[int | None, Written(least=1, is_in_every_digest=True)] = Field(
        default=None,
        description="Most distinct formats; one rounded by several methods counts once.",
    )
    max_group_kl: Annotated[float | None, Written(metavar="NATS", is_in_every_manifest=False)] = (
        Field(
            default=None,
            ge=0,
            allow_inf_nan=False,
            description="Most that a single group may be predicted to lose, in nats per token.",
        )
    )
    pins: Annotated[
        Mapping[str, str],
        Written(flag="pin", metavar="GROUP=FORMAT", is_in_every_digest=True),
    ] = Field(default={}, description="Fix a group's format. May be repeated.")
    allow: Annotated[
        Mapping[str, tuple[str, ...]],
        Written(metavar="PATTERN=F1,F2", is_in_every_digest=True),
    ] = Field(default={}, description="Formats that groups may take. May be repeated.")
    domains: Annotated[
        Mapping[str, float],
        Written(metavar="NAME=WEIGHT,...", read=parse_weights, is_joined=True),
    ] = Field(
        default={},
        description="Least weighted loss of the domains, such as code=0.7,chat=0.3; one that is "
        "not named counts nothing. Without it all tokens count alike.",
    )
    worst_domain: Annotated[bool, Written(part=lambda _: "worst-domain")] = Field(
        default=False, description="Least loss of the domain that loses most, with a proven gap."
    )
    latency: Annotated[SkipValidation[Latency | None], Written(metavar="HARDWARE")] = Field(
        default=None,
        description="Predict the speed of decoding on a card (a100, b200, h100, h200, rtx4090, or "
        "a YAML file of yours, with the keys of autoquant_ray/allocate/hardware/h100.yaml): a "
        "roofline bound, not a measurement.",
    )
    engine: Annotated[str | None, Written(metavar="ENGINE", part=str)] = Field(
        default=None, description=_described_in_scan("engine")
    )
    gpu: Annotated[str | None, Written(metavar="GPU", part=str)] = Field(
        default=None, description=_described_in_scan("gpu")
    )
    expert_groups: Annotated[
        ExpertGroups | None,
        Written(
            metavar="GROUPS",
            read=parse_expert_groups,
            part=lambda groups: f"experts-{groups}",
        ),
    ] = Field(
        default=None,
        description="Of a run scanned with --expert-groups expert or K: layer, expert, or another "
        "K. [default: as scanned]",
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            names = list(type(self).model_fields)
            raise ConfigError(problems_of(error, lambda name, _: name, names)) from None

    @field_validator("latency", mode="before")
    @classmethod
    def _require_latency(cls, value: Any) -> Any:
        if not isinstance(value, Latency | None):
            raise ConfigError(f"latency {value!r}: use latency_of({value!r}, ...)")
        return value

    @model_validator(mode="before")
    @classmethod
    def _normalise(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Weights that sum to 1, and the generation of a card, as they are recorded."""
        engine, gpu = values.get("engine"), values.get("gpu")
        if all(isinstance(name, str | None) for name in (engine, gpu)):
            values = values | {"gpu": check_target(engine, gpu)}
        return values

    @field_validator("domains", mode="after")
    @classmethod
    def _sum_to_one(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        return normalised(value)

    @model_validator(mode="after")
    def _check(self) -> SolveOptions:
        check_objective(self.domains, self.worst_domain)
        limit_ms = None if self.latency is None else self.latency.limit_ms
        if self.bits is None and self.bytes is None and limit_ms is None:
            raise ConfigError(
                "give a budget: `bits` B, `bytes` N, or `latency` HARDWARE with "
                "`tokens_per_second` X or `ms_per_token` Y"
            )
        if self.bits is not None and not 0 < self.bits <= UNQUANTIZED_BITS:
            raise ConfigError(f"`bits` {self.bits} must be above 0 and at most 16")
        if (problem := positive_problem(self.kv_bytes_per_token)) is not None:
            raise ConfigError(problem)
        return self

    def replaced(self, **changes: Any) -> SolveOptions:
        """The same options but for some, checked again."""
        return SolveOptions(**dict(self) | changes)

    @property
    def name(self) -> str:
        """Name of the solution's folder: ``bits-4.50``, ``bytes-1500000``, ...

        Options without a part of their own are told apart by a digest at the end.
        """
        parts, is_plain = [], True
        digest: dict[str, Any] = {}
        for name, written in written_options().items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if written.needs is not None and getattr(self, written.needs) is None:
                value = default
            if isinstance(value, Latency):
                parts += value.name_parts
            if written.part is not None:
                parts += [] if value == default else [written.part(value)]
            elif value != default or written.is_in_every_digest:
                is_plain = is_plain and value == default
                digest[name] = _digested(value)
        if not is_plain:
            parts.append(hashlib.sha256(json.dumps(digest).encode()).hexdigest()[:6])
        return "-".join(parts)

    def words(self, without: Collection[str] = ()) -> list[str]:
        """The options as words of a command line; what is not given is not written.

        Args:
            without: Fields to leave out.
        """
        words: list[str] = []
        for name, written in written_options().items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value == default or name in without:
                continue
            flag = written.flag_of(name)
            if isinstance(value, Latency):
                words += value.words()
            elif value is True:
                words.append(flag)
            elif isinstance(value, Mapping):
                entries = [
                    f"{key}={','.join(of) if isinstance(of, tuple) else of}"
                    for key, of in value.items()
                ]
                pairs = [",".join(entries)] if written.is_joined else entries
                words += [word for entry in pairs for word in (flag, entry)]
            else:
                words += [flag, str(value)]
        return words

    def to_json(self) -> dict[str, Any]:
        """The ``budget`` object of ``manifest.json``."""
        values = {name: _plain(value) for name, value in self}
        written = written_options()
        always = {n: value for n, value in values.items() if written[n].is_in_every_manifest}
        given = {n: v for n, v in values.items() if n not in always and v is not None}
        return always | given

    @classmethod
    def from_json(cls, budget: Mapping[str, Any]) -> SolveOptions:
        """Read back what :meth:`to_json` wrote."""
        return cls(**{**budget, "latency": Latency.from_json(budget.get("latency"))})


def written_options() -> dict[str, Written]:
    """Field of :class:`SolveOptions` -> how it is written."""
    return {
        name: next(entry for entry in field.metadata if isinstance(entry, Written))
        for name, field in SolveOptions.model_fields.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Latency):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: list(of) if isinstance(of, tuple) else of for key, of in value.items()}
    return value


def _digested(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted(
            (key, f"{of:.9g}" if isinstance(of, float) else list(of) if type(of) is tuple else of)
            for key, of in value.items()
        )
    return _plain(value)


def solve_options(config: ScanConfig) -> SolveOptions:
    """The budget of a scan."""
    names = SolveOptions.model_fields.keys() & ScanConfig.model_fields.keys()
    values = {name: getattr(config, name) for name in names}
    experts = None if config.expert_groups == LAYER else config.expert_groups
    return SolveOptions(**values | {"expert_groups": experts})


OPTION_NAMES = frozenset(SolveOptions.model_fields) | {
    "ms_per_token",
    "tokens_per_second",
    "formats",
}
"""Options that a reason for or against a solution may name."""
