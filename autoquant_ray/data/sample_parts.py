"""Samples <-> Parquet: ``samples/shard-*.parquet``.

Plain text takes two columns. Samples of chats and images add two: which tokens count in the loss,
and the processor's tensors, each as its name, type, shape and bytes. No pickle, and the same
samples give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from autoquant_ray.data.samples import Int32s, RichSample
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.names import SAMPLES
from autoquant_ray.runs.schemas import SCHEMAS

_NUMERIC_KINDS = "biuf"


def text_part(first_sample: int, lengths_N: Int32s, tokens_T: Int32s) -> pa.Table:
    """Samples of plain text.

    Args:
        first_sample: Position of the first one in the data set.
        lengths_N: Tokens of each.
        tokens_T: Token ids of all, one after the other.
    """
    offsets = np.concatenate([np.zeros(1, dtype=np.int32), lengths_N.cumsum(dtype=np.int32)])
    columns = {
        "sample": np.arange(first_sample, first_sample + len(lengths_N)),
        "tokens": pa.ListArray.from_arrays(offsets, tokens_T),
    }
    schema = pa.schema([SCHEMAS[SAMPLES].field(name) for name in columns])
    return pa.table(columns, schema=schema)


def rich_part(first_sample: int, samples: Sequence[RichSample]) -> pa.Table:
    """Samples of chats and images.

    Args:
        first_sample: Position of the first one in the data set.
        samples: In order.
    """
    rows = [
        {
            "sample": first_sample + number,
            "tokens": sample.tokens_T,
            "in_loss": sample.in_loss_T,
            "tensors": [_stored(name, sample.tensors[name]) for name in sorted(sample.tensors)],
        }
        for number, sample in enumerate(samples)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS[SAMPLES])


def samples_of(table: pa.Table) -> list[Int32s | RichSample]:
    """The samples of a part.

    Raises:
        StoreError: A tensor's bytes are not what its type and shape say.
    """
    tokens = [row.values.to_numpy() for row in table.column("tokens")]
    if table.column("in_loss").null_count == table.num_rows:
        return tokens
    return [
        RichSample(
            tokens_T=tokens_T,
            in_loss_T=np.asarray(in_loss.as_py(), dtype=np.bool_),
            tensors={entry["name"]: _restored(entry) for entry in tensors.as_py() or ()},
        )
        for tokens_T, in_loss, tensors in zip(
            tokens, table.column("in_loss"), table.column("tensors"), strict=True
        )
    ]


def digest_bytes(samples: Sequence[RichSample]) -> bytes:
    """What a digest of samples takes in beside their token ids."""
    parts: list[bytes] = []
    for sample in samples:
        parts.append(sample.in_loss_T.tobytes())
        for name in sorted(sample.tensors):
            entry = _stored(name, sample.tensors[name])
            parts += [f"{name} {entry['dtype']} {entry['shape']}".encode(), entry["data"]]
    return b"".join(parts)


def _stored(name: str, tensor: npt.NDArray[Any]) -> dict[str, Any]:
    ordered = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
    return {
        "name": name,
        "dtype": ordered.dtype.str,
        "shape": list(tensor.shape),
        "data": ordered.tobytes(),
    }


def _restored(entry: dict[str, Any]) -> npt.NDArray[Any]:
    dtype, shape, data = np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["data"]
    if dtype.kind not in _NUMERIC_KINDS or len(data) != math.prod(shape) * dtype.itemsize:
        raise StoreError(
            f"a sample's tensor {entry['name']!r} is damaged: {len(data)} bytes for {dtype} {shape}"
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape)
