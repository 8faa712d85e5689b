"""Data that a scan has not seen, and the model that it was made with: what a measurement needs."""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import suppress
from typing import Any

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.sources import data_name
from autoquant_ray.config.stage_fields import stage_fingerprints
from autoquant_ray.data.fingerprint import fingerprint_data, fingerprint_source
from autoquant_ray.errors import ConfigError, DataError, StoreError
from autoquant_ray.models.find import (
    ModelRef,
    fingerprint_chats,
)
from autoquant_ray.models.tokenizer import TokenizerRef
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SAMPLES, part_name
from autoquant_ray.runs.state import RunState, numeric_versions
from autoquant_ray.stages import samples as samples_stage
from autoquant_ray.stages.sources import Skip


def num_seen(state: RunState, scan: ScanConfig, *, is_given: bool) -> Skip:
    """Samples at the start of the data, or of each of its sources, that calibration used.

    Raises:
        StoreError: The data is the run's own and was changed.
        ConfigError: It is cut into samples in another way, so that the rest cannot be told; or it
            is one of the run's several sources.
    """
    own = ScanConfig.model_validate(state.values["config"])
    is_own = fingerprint_data(scan.data) == state.values["fingerprints"]["data"]
    if not is_own:
        if not is_given:
            raise StoreError(
                f"data {data_name(scan.data)} changed since {state.directory.uri} was made, so "
                "that what the scan has not seen cannot be told; give other data with --data"
            )
        _require_not_among(own, scan)
        return 0
    if (scan.text_field, scan.split) != (own.text_field, own.split):
        return 0
    cuts = [(one.pack, one.seq_len, one.domain_field) for one in (scan, own)]
    is_cut_alike = cuts[0] == cuts[1]
    if not is_cut_alike and (scan.pack or own.pack):
        raise ConfigError(
            f"--pack and --seq-len must be those of the scan (pack {own.pack}, {own.seq_len}), and "
            f"--data written as there, on its own data ({data_name(own.data)}), or text that it "
            "calibrated on would be measured; give other data with --data"
        )
    dataset = state.values["dataset"]
    if "num_loss_tokens" in dataset:
        _require_same_choice(own, scan)
    if isinstance(scan.data, str):
        return int(dataset["num_samples"])
    return {name: facts["num_samples"] for name, facts in dataset["domains"].items()}


def _require_same_choice(own: ScanConfig, scan: ScanConfig) -> None:
    """Of chats, length and loss decide which ones can be used at all."""
    fields = ("seq_len", "loss_on", "skip_bad_samples")
    if any(getattr(own, name) != getattr(scan, name) for name in fields):
        raise ConfigError(
            f"--seq-len and --loss-on must be those of the scan ({own.seq_len}, {own.loss_on}) on "
            f"its own data ({data_name(own.data)}), or chats that it calibrated on would be "
            "measured; give other data with --data"
        )


def _require_not_among(own: ScanConfig, scan: ScanConfig) -> None:
    """What the scan calibrated on is not unseen: one of its sources, or its file, changed."""
    if not isinstance(scan.data, str):
        return
    given = fingerprint_source(scan.data)
    if isinstance(own.data, str):
        with suppress(DataError):  # it may be gone
            if fingerprint_source(own.data) == given:
                raise ConfigError(
                    f"{scan.data} changed since the scan, which calibrated on a part of it, so "
                    "that what it has not seen cannot be told; give other data"
                )
        return
    for name, source in own.data.items():
        if fingerprint_source(source) == given:
            raise ConfigError(
                f"{scan.data} is the domain {name} of the scan, which calibrated on a part of it; "
                "leave out --data to measure on what the scan has not seen of all its domains, or "
                "give other data"
            )


def data_key(state: RunState, scan: ScanConfig, skip: Skip) -> str:
    """Digest of everything that the measured numbers depend on, but the allocation."""
    prints = state.values["fingerprints"]
    marks = stage_fingerprints(scan, prints["model"], fingerprint_data(scan.data))
    own = stage_fingerprints(
        ScanConfig.model_validate(state.values["config"]), prints["model"], prints["data"]
    )
    text = json.dumps([marks["shards"], own["calibrate"], skip, numeric_versions()])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def held_out_samples(
    directory: RunDirectory,
    folder: str,
    scan: ScanConfig,
    ref: ModelRef,
    skip: Skip,
    state: RunState,
) -> dict[str, Any]:
    """Held-out samples as shards below the evaluation's folder; read once.

    Raises:
        DataError: They cannot be read.
        StoreError: The chat template or the processor that they were made with changed.
    """
    marker, chats = f"{folder}/data.json", fingerprint_chats(ref)
    if not directory.exists(marker):
        tokenizer = TokenizerRef.of(ref, f"{state.values['fingerprints']['model']}-{chats}")
        with tempfile.TemporaryDirectory(prefix="autoquant-") as name:
            scratch = RunDirectory(name)
            facts = samples_stage.read_samples(scan, tokenizer, scratch, skip=skip)
            for shard in scratch.list_parts(SAMPLES):
                content = scratch.read_bytes(part_name(SAMPLES, shard))
                directory.write_bytes(part_name(f"{folder}/{SAMPLES}", shard), content)
        source = [fingerprint_data(scan.data), scan.text_field, scan.split]
        told: dict[str, Any] = {"name": data_name(scan.data), "source": source, "skipped": skip}
        if "num_loss_tokens" in facts:
            told["chat_fingerprint"] = chats
        directory.write_json(marker, facts | told)
    found: dict[str, Any] = directory.read_json(marker)
    if found.get("chat_fingerprint", chats) != chats:
        raise StoreError(
            f"the model's chat template or processor changed since {directory.path(folder)} was "
            "made; put it back, or delete that folder"
        )
    return found
