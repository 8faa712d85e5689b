"""Held-out data: samples that the scan's calibration did not use, for measurements."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.sources import data_name, sources_of
from autoquant_ray.config.stage_fields import stage_fingerprints
from autoquant_ray.data.fingerprint import fingerprint_data, fingerprint_source
from autoquant_ray.data.kinds import kind_of
from autoquant_ray.data.texts import PYDOC_SOURCE
from autoquant_ray.errors import ConfigError, DataError, StoreError
from autoquant_ray.models.context import SampleLimits
from autoquant_ray.models.find import (
    ModelRef,
    fingerprint_chats,
)
from autoquant_ray.models.tokenizer import TokenizerRef
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SAMPLES, SHAPLEY, part_name
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.state import RunState, numeric_versions
from autoquant_ray.stages import samples as samples_stage
from autoquant_ray.stages.sources import Skip

logger = logging.getLogger(__name__)

_FEW_SHARDS = 4
"""Fewer make smaller ones, so that refine and an audit can divide the data."""


def num_seen(state: RunState, scan: ScanConfig, *, is_given: bool) -> Skip:
    """Number of samples at the start of the data, or of each of its sources, to skip.

    Those are the samples that calibration used.

    Args:
        state: The run.
        scan: Config of the measurement's data.
        is_given: Whether the user named the data; otherwise it is the scan's.

    Raises:
        StoreError: The scan's data has changed since.
        ConfigError: The data is cut into samples differently, so that unseen samples cannot be
            told from seen ones; or it is one of several sources of the scan.
    """
    scanned = ScanConfig.model_validate(state.config)
    is_same_data = fingerprint_data(scan.data) == state.record.fingerprints["data"]
    if not is_same_data:
        if not is_given:
            raise StoreError(
                f"data {data_name(scan.data)} has changed since {state.directory.uri} was made, so "
                "the samples that the scan has not seen are unknown; give other data with `data`"
            )
        _require_not_among(scanned, scan)
        return 0
    _require_same_kinds(scanned, scan)
    sources = sources_of(scan.data)
    is_same = {n: _part_of(s, scan) == _part_of(s, scan, scanned) for n, s in sources.items()}
    if not any(is_same.values()):
        return 0
    _require_same_cut(scanned, scan)
    dataset = state.record.dataset
    if "num_loss_tokens" in dataset:
        _require_same_choice(scanned, scan)
    if isinstance(scan.data, str):
        return int(dataset["num_samples"])
    domains = dataset["domains"].items()
    return {name: facts["num_samples"] if is_same[name] else 0 for name, facts in domains}


def _part_of(source: str, scan: ScanConfig, config: ScanConfig | None = None) -> tuple[str, str]:
    """Column and split that are read of a source; the defaults where it has none, whatever the
    options say.

    Args:
        source: Of the measurement's data.
        scan: Config of that data, which says what its files hold.
        config: Whose options; None: those of ``scan``.
    """
    config = scan if config is None else config
    is_plain = source == PYDOC_SOURCE
    has_columns = not is_plain and _kinds(source, scan) != {"text"}
    has_splits = not is_plain and not Path(source).expanduser().is_file()
    fields = ScanConfig.model_fields
    return (
        config.text_field if has_columns else fields["text_field"].default,
        config.split if has_splits else fields["split"].default,
    )


def _what_is_read(scan: ScanConfig) -> tuple[str, str]:
    """Column and split of a measurement's data, however many sources it has."""
    parts = [_part_of(source, scan) for source in sources_of(scan.data).values()]
    return next((part for part in parts if part == (scan.text_field, scan.split)), parts[0])


def _kinds(source: str, config: ScanConfig) -> set[str]:
    """What the files of a source hold, as it is read: by the option, or by their endings."""
    if config.read_as is not None:
        return {config.read_as}
    path = Path(source).expanduser()
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {kind for file in files if (kind := kind_of(file)) is not None}


def _require_same_kinds(scanned: ScanConfig, scan: ScanConfig) -> None:
    """Check that files are read as what the scan read them as: lines of text are no rows of JSON,
    and the same text would stand elsewhere among them."""
    if scan.read_as == scanned.read_as:
        return
    sources = (sources_of(config.data).values() for config in (scanned, scan))
    for before, now in zip(*sources, strict=True):
        as_before, as_now = _kinds(before, scanned), _kinds(now, scan)
        if as_before != as_now:
            raise ConfigError(
                f"`read_as`: {now} would be read as {_listed(as_now)}, and the scan read it as "
                f"{_listed(as_before)}, so that text that it calibrated on would be measured; read "
                "it alike, or give other data with `data`"
            )


def _listed(kinds: set[str]) -> str:
    return " and ".join(sorted(kinds)) or "nothing"


def _require_same_cut(scanned: ScanConfig, scan: ScanConfig) -> None:
    """Check the fields that decide where packed text is cut, and with it which text was seen."""
    cuts = [(config.pack, config.seq_len, config.domain_field) for config in (scan, scanned)]
    if cuts[0] != cuts[1] and (scan.pack or scanned.pack):
        raise ConfigError(
            f"on the scan's data ({data_name(scanned.data)}), `pack`, `seq_len` and the form of "
            f"`data` must be those of the scan (pack {scanned.pack}, {scanned.seq_len}), "
            "otherwise text that it calibrated on would be measured; give other data with `data`"
        )


def _require_same_choice(scanned: ScanConfig, scan: ScanConfig) -> None:
    """Check the fields that decide which chats are usable, and with it which ones were seen."""
    fields = ("seq_len", "loss_on", "skip_bad_samples")
    if any(getattr(scanned, name) != getattr(scan, name) for name in fields):
        raise ConfigError(
            f"on the scan's data ({data_name(scanned.data)}), `seq_len` and `loss_on` must be "
            f"those of the scan ({scanned.seq_len}, {scanned.loss_on}), otherwise chats that it "
            "calibrated on would be measured; give other data with `data`"
        )


def _require_not_among(scanned: ScanConfig, scan: ScanConfig) -> None:
    """Reject data that the scan calibrated on: one of its sources, or its file since changed."""
    if not isinstance(scan.data, str):
        return
    given = fingerprint_source(scan.data)
    if isinstance(scanned.data, str):
        with suppress(DataError):  # the file may no longer exist
            if fingerprint_source(scanned.data) == given:
                raise ConfigError(
                    f"{scan.data} has changed since the scan, which calibrated on a part of it, so "
                    "the samples that it has not seen are unknown; give other data"
                )
        return
    for name, source in scanned.data.items():
        if fingerprint_source(source) == given:
            raise ConfigError(
                f"{scan.data} is the domain {name} of the scan, which calibrated on a part of it; "
                "leave out `data` to measure on the samples of all domains that the scan has not "
                "seen, or give other data"
            )


def data_key(state: RunState, scan: ScanConfig, skip: Skip) -> str:
    """Digest of everything that measured numbers depend on, except the allocation."""
    model = state.record.fingerprints["model"]
    measured = stage_fingerprints(scan, model, fingerprint_data(scan.data))
    return _digest([measured["shards"], _calibrated(state), skip, _versions(state)])


def answers_key(state: RunState, kind: str, requests: Sequence[Any]) -> str:
    """Digest of everything that answers to requests depend on, except the allocation."""
    return _digest([kind, requests, _calibrated(state), _versions(state)])


def shapley_key(state: RunState, groups: Sequence[str]) -> str:
    """Digest of everything that ModelOpt's scores of a scan depend on.

    Args:
        state: The run.
        groups: Names of the searched groups.
    """
    left_out = sorted(state.left_out)
    return _digest([SHAPLEY, groups, left_out, _calibrated(state), _versions(state)])


def _calibrated(state: RunState) -> str:
    """Fingerprint of the scan's model, formats and calibration."""
    fingerprints = state.record.fingerprints
    config = ScanConfig.model_validate(state.config)
    model, data = fingerprints["model"], fingerprints["data"]
    return stage_fingerprints(config, model, data, state.plan["formats"])["calibrate"]


def _versions(state: RunState) -> dict[str, str]:
    return numeric_versions(state.plan["formats"])


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def held_out_samples(
    state: RunState, folder: str, scan: ScanConfig, ref: ModelRef, skip: Skip
) -> dict[str, Any]:
    """Write held-out samples as shards below the evaluation's folder, unless they are there.

    Args:
        state: The run.
        folder: The evaluation's folder below the run directory.
        scan: Config of the data.
        ref: The model, for its tokenizer.
        skip: Samples to skip at the start of the data or of each source.

    Returns:
        Facts about the data, as in ``data.json``.

    Raises:
        DataError: The data cannot be read.
        StoreError: The chat template or the processor has changed since the samples were made.
    """
    directory = state.directory
    marker, chats = f"{folder}/data.json", fingerprint_chats(ref)
    stored: dict[str, Any] | None = None
    if directory.exists(marker):
        stored = directory.read_json(marker)
        _require_same_chats(stored, chats, directory.path(folder))
    samples = f"{folder}/{SAMPLES}"
    if stored is None or not samples_stage.are_whole(directory, samples, stored["num_shards"]):
        tokenizer = TokenizerRef.of(ref, f"{state.record.fingerprints['model']}-{chats}")
        stored_limits = state.plan.get("sample_limits")
        limits = None if stored_limits is None else SampleLimits.from_json(stored_limits)
        read = _write_shards(directory, folder, scan, tokenizer, skip, limits)
        source = [fingerprint_data(scan.data), *_what_is_read(scan)]
        stored = {**read, "name": data_name(scan.data), "source": source, "skipped": skip}
        if "num_loss_tokens" in stored:
            stored["chat_fingerprint"] = chats
        if not skip:  # other data, as far as files tell
            stored["num_calibrated"] = _num_calibrated(directory, folder)
        directory.write_json(marker, stored)
    if num_calibrated := stored.get("num_calibrated"):
        logger.warning(
            "%d of %d samples of %s are among those that the scan calibrated on, token for token, "
            "so they show too little loss; give other data with `data`",
            *(num_calibrated, stored["num_samples"], stored["name"]),
        )
    return stored


def _require_same_chats(stored: Mapping[str, Any], chats: str, folder: str) -> None:
    """Check that what makes samples of chats is as it was when an evaluation's were made."""
    if stored.get("chat_fingerprint", chats) != chats:
        raise StoreError(
            f"the model's chat template or processor changed since {folder} was made; restore it, "
            "or delete that folder"
        )


def _num_calibrated(directory: RunDirectory, folder: str) -> int:
    """How many samples below an evaluation's folder are samples of the scan; of text alone."""
    scanned: set[bytes] = set()
    with suppress(StoreError):  # a measurement does not need them
        scanned.update(d for table in _parts(directory, SAMPLES) for d in _digests(table))
    measured = (_digests(table) for table in _parts(directory, f"{folder}/{SAMPLES}"))
    return sum(digest in scanned for digests in measured for digest in digests)


def _parts(directory: RunDirectory, folder: str) -> Parts:
    return Parts(directory, folder, directory.list_parts(folder))


def _digests(table: pa.Table) -> Iterator[bytes]:
    """Of the tokens of each sample that is text alone."""
    for tokens, tensors in zip(table.column("tokens"), table.column("tensors"), strict=True):
        if not tensors.as_py():
            content = tokens.values.to_numpy().tobytes()
            yield hashlib.blake2b(content, digest_size=16).digest()


def _write_shards(
    directory: RunDirectory,
    folder: str,
    scan: ScanConfig,
    tokenizer: TokenizerRef,
    skip: Skip,
    limits: SampleLimits | None,
) -> Mapping[str, Any]:
    """Read the data and write its shards below the folder; returns facts about the data."""
    with tempfile.TemporaryDirectory(prefix="autoquant-") as name:
        scratch = RunDirectory(name)
        facts = samples_stage.read_samples(scan, tokenizer, scratch, skip=skip, limits=limits)
        if facts["num_shards"] < _FEW_SHARDS and facts["num_samples"] > facts["num_shards"]:
            size = max(1, facts["num_samples"] // _FEW_SHARDS)
            small = scan.model_copy(update={"shard_samples": size})
            scratch = scratch.child("small")
            facts = samples_stage.read_samples(small, tokenizer, scratch, skip=skip, limits=limits)
        for shard in scratch.list_parts(SAMPLES):
            content = scratch.read_bytes(part_name(SAMPLES, shard))
            directory.write_bytes(part_name(f"{folder}/{SAMPLES}", shard), content)
    return facts
