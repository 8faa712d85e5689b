"""What a stranger needs to make a run and a solution again: commands, config, versions, hashes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from autoquant_ray.allocate.load import CARD_FILE
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.values import flag_of
from autoquant_ray.runs.record import RunRecord

_CONFIG_FILE = "scan.yaml"
_WITHOUT_FLAG = ("custom_formats", "runtime_env")
"""Fields of a scan that only a file can have."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """How to make it again.

    Attributes:
        commands: Shell commands, in order; none for an imported run.
        config: The resolved config as YAML; '' for an imported run.
        facts: (label, value) of what must be the same.
    """

    commands: list[str]
    config: str
    facts: list[tuple[str, str]]


def reproduction(
    run: RunRecord,
    manifest: Mapping[str, Any],
    name: str,
    read_manifest: Callable[[str], Mapping[str, Any]],
) -> Reproduction:
    """Collect it.

    Args:
        run: Content of ``run.json``.
        manifest: Content of the solution's ``manifest.json``.
        name: Of the solution; '' for the scan's own.
        read_manifest: Gives the manifest of another solution that this one was made from.
    """
    config = run.config
    commands: list[str] = []
    if config:
        while "made_from" in manifest:
            made = manifest["made_from"]
            commands.insert(0, _measured_command(config["out"], made))
            name, manifest = made["solution"], read_manifest(made["solution"])
        if name:
            options = SolveOptions.from_json(manifest["budget"])
            commands.insert(0, solve_command(config["out"], options))
        commands.insert(0, scan_command(config))
    return Reproduction(
        commands=commands,
        config=yaml.safe_dump(dict(config), sort_keys=False) if config else "",
        facts=[*_facts(run), *_card(commands)],
    )


def scan_command(config: Mapping[str, Any]) -> str:
    """The scan as a command line; what has no flag needs the config as a file.

    Args:
        config: Resolved config, JSON values.
    """
    words = ["autoquant-ray", "scan"]
    if needs_file(config):
        return shlex.join([*words, "--config", _CONFIG_FILE])
    words.append(config["model"])
    for name, field in ScanConfig.model_fields.items():
        value = config.get(name)
        if name in ("model", *_WITHOUT_FLAG) or value is None or value == _plain(field.default):
            continue
        flag = flag_of(name, field)
        if isinstance(value, bool) and field.default is True:
            words += [flag, "yes" if value else "no"]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name == "disable":
            words += [word for pattern in value for word in (flag, pattern)]
        elif isinstance(value, dict):
            words += [word for key, of in value.items() for word in (flag, f"{key}={of}")]
        else:
            words += [flag, ",".join(value) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def needs_file(config: Mapping[str, Any]) -> bool:
    """Whether a scan has what no flag says, so that its config must be a file.

    Args:
        config: Resolved config, JSON values.
    """
    return any(config.get(name) for name in _WITHOUT_FLAG)


def solve_command(run: str, options: SolveOptions) -> str:
    """The command that solves a budget.

    Args:
        run: Run directory.
        options: Budget and constraints; what is not given is not written.
    """
    return shlex.join(["autoquant-ray", "solve", run, *options.words()])


def _measured_command(run: str, made: Mapping[str, Any]) -> str:
    """The command that made a solution from another one by measurement."""
    words = ["autoquant-ray", made["command"], run]
    if made["solution"]:
        words += ["--solution", made["solution"]]
    for name, value in made["options"].items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _card(commands: Sequence[str]) -> list[tuple[str, str]]:
    """Where the figures of a card of one's own are."""
    if not any(CARD_FILE in command for command in commands):
        return []
    return [(CARD_FILE, "the card's figures, in manifest.json under budget, latency, hardware")]


def _plain(default: Any) -> Any:
    """A default as JSON has it."""
    return list(default) if isinstance(default, tuple) else default


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    config, dataset = run.config, run.dataset
    facts = [] if run.created is None else [("Created", run.created)]
    if config:
        order = config.get("data_seed")  # runs of earlier versions lack it
        seed = "none, the data's own order" if order is None else order
        facts += [("Seed", str(config["seed"])), ("Seed of the data's order", str(seed))]
    facts += [(f"Hash of the {kind}", str(mark)) for kind, mark in run.fingerprints.items()]
    if "tokens_sha256" in dataset:
        facts.append(("SHA-256 of the tokens", dataset["tokens_sha256"]))
    if run.versions:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        facts.append(("Versions", versions))
    seconds = {name: stage.get("seconds") for name, stage in run.stages.items()}
    spent = [f"{name} {value:,.1f} s" for name, value in seconds.items() if value is not None]
    if spent:
        facts.append(("Time spent", ", ".join(spent)))
    return facts
