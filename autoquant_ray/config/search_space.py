"""The part of a scan's description that a plan needs: model, formats, layers left out."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from autoquant_ray.config.expert_groups import ExpertGroups
from autoquant_ray.formats.kv_cache import menu_problem
from autoquant_ray.formats.menu import CUSTOM_KEYS, CUSTOM_KEYS_PROBLEM, SHARES_SCALE
from autoquant_ray.serving.named_menus import named_menu


def _check_custom_key(key: str) -> str:
    if key not in CUSTOM_KEYS:
        raise ValueError(CUSTOM_KEYS_PROBLEM)
    return key


def _check_custom_entry(entry: dict[str, Any]) -> dict[str, Any]:
    for key, value in entry.items():
        if isinstance(value, bool) != (key == SHARES_SCALE):
            raise ValueError(f"{key}: must be {CUSTOM_KEYS[key]} (got {value!r})")
    return entry


CustomKey = Annotated[str, AfterValidator(_check_custom_key)]
CustomEntry = Annotated[
    dict[CustomKey, dict[str, Any] | bool | None], AfterValidator(_check_custom_entry)
]


class SearchSpace(BaseModel):
    """What is searched: model, formats, layers left out. Enough for ``plan``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        description="Model folder, GGUF file, or Hugging Face id. plan needs only its config.json."
    )
    formats: tuple[str, ...] = Field(
        default=("wint4_afp16", "wfp8_afp8", "wint8_aint8"),
        description="Quantization formats to choose from, separated by commas, each with a method "
        "of rounding behind a colon if wanted: NAME:max rounds plainly; without it, integers of 3 "
        "to 6 bits and NVFP4 (wint4_afp16, wfp4_afp16) are rounded by 'weighted', which reads the "
        "data; NAME:mse can lose more than max. docs/formats.md lists all. A menu by name is what "
        "an engine serves together: vllm-hopper, sglang-blackwell, trtllm-h100 and others. "
        "16 bits ('none') is always a choice too.",
    )
    custom_formats: dict[str, CustomEntry] = Field(
        default_factory=dict,
        description="Extra formats, config file only: name -> {weight: ModelOpt quantizer "
        "attributes, input: the same or null, algorithm: max, mse, or a mapping with method and "
        "ModelOpt's arguments, shares_scale: false where fused layers keep scales of their own}.",
    )
    disable: tuple[str, ...] = Field(
        default=(),
        description="Glob of module names left in 16 bits. May be repeated.",
    )
    coverage: Literal["lm", "full"] = Field(
        default="lm",
        description="lm: the vision tower of a vision-language model stays in 16 bits, as most "
        "engines serve it. full: it is searched too, which takes data with images.",
    )
    expert_groups: ExpertGroups = Field(
        default="layer",
        description="Which routed experts share a format: layer (all of a layer), expert (none), "
        "or a number K (K clusters per layer, by sensitivity); docs/experts.md.",
    )
    search_routers: bool = Field(
        default=False,
        description="Search routers that are plain linears too, and gates of shared experts, as "
        "ModelOpt does. Off: they stay in 16 bits, which engines run them in.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where workers compute. auto: cuda where there is a GPU."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run model code that the checkpoint brings. Off: refuse it."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's ``yes`` is not the number 1."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("must not be yes, no, true or false")
        return value

    @field_validator("formats", "disable", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return parts
        return tuple(part.strip() if isinstance(part, str) else part for part in parts)

    @field_validator("custom_formats", mode="before")
    @classmethod
    def _expand_algorithms(cls, value: Any) -> Any:
        """``algorithm: mse`` is short for ``algorithm: {method: mse}``."""

        def expanded(entry: Any) -> Any:
            is_short = isinstance(entry, dict) and isinstance(entry.get("algorithm"), str)
            return entry | {"algorithm": {"method": entry["algorithm"]}} if is_short else entry

        if not isinstance(value, dict):
            return value
        return {name: expanded(entry) for name, entry in value.items()}

    @field_validator("formats", mode="after")
    @classmethod
    def _expand_menus(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Menus by name become their formats; what is named beside one is not taken twice."""
        menus = {name: menu for name in value if (menu := named_menu(name)) is not None}
        if not menus:
            return value
        formats = [part for name in value for part in menus.get(name, (name,))]
        return tuple(dict.fromkeys(formats))

    @field_validator("formats")
    @classmethod
    def _check_formats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or "" in value:
            raise ValueError("name at least one format, for example wint4_afp16,wfp8_afp8")
        if "none" in value:
            raise ValueError("'none' (16 bits) is always a choice; leave it out of the formats")
        if len(set(value)) != len(value):
            raise ValueError("a format is named twice")
        return value

    @model_validator(mode="after")
    def _check_custom_formats_are_named(self) -> Self:
        plain = {name.rpartition(":")[0] for name in self.formats}
        unused = sorted(set(self.custom_formats) - set(self.formats) - plain)
        if unused:
            raise ValueError(f"custom format {unused[0]!r} is not among the formats; name it there")
        if (problem := menu_problem(self.formats, self.custom_formats)) is not None:
            raise ValueError(problem)
        return self
