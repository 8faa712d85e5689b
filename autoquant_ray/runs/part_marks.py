"""What a part says of itself in its Parquet metadata: which part it is, and of which stage.

The mark is the fingerprint of the stage: a hash of everything that the part's numbers depend on.
So a part of another run, or of another shard under this one's name, is not taken for it. Parts of
earlier versions say nothing and are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from autoquant_ray.runs.names import (
    CALIBRATION,
    CHANNELS,
    EVALUATION,
    ROUNDING,
    SAMPLES,
    SCORES,
    SEARCH,
    is_part,
    remedy_of,
)

STAGE_OF = {
    SAMPLES: "shards",
    CALIBRATION: "calibrate",
    CHANNELS: "calibrate",
    SEARCH: "search",
    ROUNDING: "fit",
    SCORES: "score",
}
"""Folder of parts -> the stage that writes them."""
_PART, _MARK = b"autoquant_ray.part", b"autoquant_ray.stage"


def marked(table: pa.Table, name: str, marks: Mapping[str, str]) -> pa.Table:
    """The same table with the mark of a part; any other table as it is.

    Args:
        table: What is written.
        name: Of the file, in its run.
        marks: Folder -> fingerprint of its stage.
    """
    if not is_part(name):
        return table
    part, mark = _part_and_mark(name, marks)
    return table.replace_schema_metadata(
        {**(table.schema.metadata or {}), _PART: part, _MARK: mark}
    )


def why_foreign(
    metadata: Mapping[bytes, bytes] | None, name: str, marks: Mapping[str, str]
) -> str | None:
    """Why a part is not the one that its name says, as the end of a sentence with the remedy;
    None where it is.

    Args:
        metadata: Of its file.
        name: Of the file, in its run.
        marks: Folder -> fingerprint of its stage.
    """
    if not is_part(name) or metadata is None or _PART not in metadata:
        return None
    part, mark = _part_and_mark(name, marks)
    before = metadata[_PART].decode(errors="replace")
    if before != part:
        return f"the part {before} under another name; {remedy_of(name)}"
    there = metadata.get(_MARK, b"").decode(errors="replace")
    is_other = bool(mark and there) and there != mark
    return f"a part of another run; {remedy_of(name)}" if is_other else None


def _part_and_mark(name: str, marks: Mapping[str, str]) -> tuple[str, str]:
    """What a part is called wherever its data is, and its mark; '' where there is none yet."""
    if not name.startswith(f"{EVALUATION}/"):
        return name, marks.get(name.partition("/")[0], "")
    _, key, part = name.split("/", 2)
    return part, "" if part.startswith(f"{SAMPLES}/") else key
