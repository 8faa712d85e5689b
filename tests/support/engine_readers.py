"""Ask an engine's own code, in a process of its own, how it reads each layer of a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

_PARTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_LLAMA = {"lm_head": "head"} | {
    f"model.layers.{layer}.{part}": "linear" for layer in range(2) for part in _PARTS
}


def read_by_engine(
    command: Sequence[str], names: Mapping[str, str] | None = None, **variables: str
) -> dict[str, Any]:
    """Name of a module of an engine -> what its script prints of it.

    Args:
        command: Runs the script, which reads names and kinds of modules and prints an object.
        names: Name of a module -> its kind; None: those of a Llama of two layers.
        variables: Of its environment, beside those here.
    """
    done = subprocess.run(
        command,
        input=json.dumps(_LLAMA if names is None else names),
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return read
