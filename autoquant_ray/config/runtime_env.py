"""What a job brings to the processes of a cluster: packages, environment variables, files.

A part of Ray's ``runtime_env``, by its names. It holds no secrets: Ray's dashboard shows it, and a
run's ``run.json`` keeps it.
"""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from autoquant_ray.config.values import checked_places, is_variable

SOUNDS_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY", re.IGNORECASE)
"""Names of environment variables whose values are not written down."""


class RuntimeEnv(BaseModel):
    """Fields of ``runtime_env`` in a job file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pip: tuple[str, ...] = Field(
        default=(), description="Packages that pip installs for the workers, once per node."
    )
    uv: tuple[str, ...] = Field(default=(), description="The same by uv, which must be there.")
    env_vars: dict[str, str] = Field(
        default_factory=dict, description="Environment variables of the workers; no secrets."
    )
    working_dir: str | None = Field(
        default=None,
        description="Folder that becomes the workers' working directory, 512 MiB at most.",
    )

    @field_validator("env_vars")
    @classmethod
    def _check_variables(cls, value: dict[str, str]) -> dict[str, str]:
        for number, name in enumerate(value, start=1):
            if not is_variable(name):
                raise ValueError(f"entry {number} has no name of an environment variable")
            if SOUNDS_SECRET.search(name):
                raise ValueError(
                    f"{name} sounds like a secret, which Ray's dashboard would show; set it in the "
                    "cluster's environment, its name under secrets"
                )
        return value

    @field_validator("working_dir")
    @classmethod
    def _check_folder(cls, value: str | None) -> Any:
        return checked_places(value)

    @model_validator(mode="after")
    def _check_single_installer(self) -> Self:
        if self.pip and self.uv:
            raise ValueError("pip and uv exclude each other; name all packages under one of them")
        return self

    def to_ray(self) -> dict[str, Any]:
        """What Ray takes."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return {name: value for name, value in values.items() if value}
