"""JSON as any other tool reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoquant_ray.runs.directory import RunDirectory


def read_json(directory: RunDirectory, name: str) -> Any:
    """JSON as any other tool reads it: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = Path(directory.uri, name).read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)
