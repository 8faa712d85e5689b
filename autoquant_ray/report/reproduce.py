"""What a stranger needs to make a run and a solution again: commands, config, versions, hashes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from autoquant_ray.config import ScanConfig
from autoquant_ray.hardware_file import Hardware, load_hardware, shipped_cards

_CONFIG_FILE = "scan.yaml"
_CARD_FILE = "hardware.yaml"


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


def reproduction(run: Mapping[str, Any], manifest: Mapping[str, Any], name: str) -> Reproduction:
    """Collect it.

    Args:
        run: Content of ``run.json``.
        manifest: Content of the solution's ``manifest.json``.
        name: Of the solution; '' for the scan's own.
    """
    config = run["config"]
    commands = []
    if config:
        commands.append(scan_command(config))
        if name.endswith("-refined"):
            commands.append(_refine_command(config["out"], name))
        elif "audit" in manifest:
            commands.append(_audit_command(config["out"], name, manifest["audit"]["num_pairs"]))
        elif name:
            commands.append(solve_command(config["out"], manifest["budget"]))
    return Reproduction(
        commands=commands,
        config=yaml.safe_dump(dict(config), sort_keys=False) if config else "",
        facts=_facts(run),
    )


def scan_command(config: Mapping[str, Any]) -> str:
    """The scan as a command line; with custom formats it needs the config as a file.

    Args:
        config: Resolved config, JSON values.
    """
    words = ["autoquant-ray", "scan"]
    if config.get("custom_formats"):
        return shlex.join([*words, "--config", _CONFIG_FILE])
    words.append(config["model"])
    for name, field in ScanConfig.model_fields.items():
        value = config.get(name)
        if name in ("model", "custom_formats") or value is None or value == _plain(field.default):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name == "disable":
            words += [word for pattern in value for word in (flag, pattern)]
        elif isinstance(value, dict):
            words += [word for key, of in value.items() for word in (flag, f"{key}={of}")]
        else:
            words += [flag, ",".join(value) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def solve_command(run: str, budget: Mapping[str, Any]) -> str:
    """The command that solves a budget.

    Args:
        run: Run directory.
        budget: The ``budget`` object of ``manifest.json``.
    """
    words = ["autoquant-ray", "solve", run]
    for name in ("bits", "bytes", "max_formats"):
        if budget[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(budget[name])]
    if budget["bits_over"] != "searched":
        words += ["--bits-over", budget["bits_over"]]
    if budget["cost"] != "storage":
        words += ["--cost", budget["cost"]]
    words += _latency_words(budget.get("latency"))
    domains = budget.get("domains") or {}
    if domains:
        words += ["--domains", ",".join(f"{name}={weight}" for name, weight in domains.items())]
    if budget.get("worst_domain"):
        words.append("--worst-domain")
    for group, format_ in budget["pins"].items():
        words += ["--pin", f"{group}={format_}"]
    for pattern, formats in budget["allow"].items():
        words += ["--allow", f"{pattern}={','.join(formats)}"]
    return shlex.join(words)


def _latency_words(latency: Mapping[str, Any] | None) -> list[str]:
    if latency is None:
        return []
    card = Hardware.model_validate(latency["hardware"])
    shipped = (name for name in shipped_cards() if load_hardware(name) == card)
    words = ["--latency", next(shipped, _CARD_FILE)]
    for name in ("batch", "context", "tokens_per_second", "ms_per_token"):
        if latency[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(latency[name])]
    return words


def _refine_command(run: str, name: str) -> str:
    return shlex.join(["autoquant-ray", "refine", run, *_start(name, "-refined")])


def _audit_command(run: str, name: str, count: int) -> str:
    start = _start(name, "-audited")
    return shlex.join(["autoquant-ray", "evaluate", run, *start, "--audit", str(count)])


def _start(name: str, ending: str) -> list[str]:
    """The solution that a search started from; the scan's own needs no word."""
    start = name.removesuffix(ending)
    return [] if start == "scan" else ["--solution", start]


def _plain(default: Any) -> Any:
    """A default as JSON has it."""
    return list(default) if isinstance(default, tuple) else default


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    config, dataset = run["config"], run["dataset"]
    facts = [("Created", run["created"])] if "created" in run else []
    if config:
        order = config.get("data_seed")  # runs of earlier versions lack it
        seed = "none, the data's own order" if order is None else order
        facts += [("Seed", str(config["seed"])), ("Seed of the data's order", str(seed))]
    facts += [(f"Hash of the {kind}", str(mark)) for kind, mark in run["fingerprints"].items()]
    if "tokens_sha256" in dataset:
        facts.append(("SHA-256 of the tokens", dataset["tokens_sha256"]))
    if run.get("versions"):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        facts.append(("Versions", versions))
    seconds = {name: stage.get("seconds") for name, stage in run["stages"].items()}
    spent = [f"{name} {value:,.1f} s" for name, value in seconds.items() if value is not None]
    if spent:
        facts.append(("Time spent", ", ".join(spent)))
    return facts
