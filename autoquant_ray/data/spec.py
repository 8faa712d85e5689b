"""Which calibration data is used, and how it becomes samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which calibration data is used, and how it becomes samples.

    Attributes:
        source: Path of a text file (one sample per line), a ``.jsonl``, ``.json`` or
            ``.parquet`` file, a dataset folder, a hub id, or ``pydoc``.
        text_field: Column that holds the text; not used for text files and ``pydoc``.
        split: Split of a dataset folder or hub id.
        num_samples: Number of samples at most.
        seq_len: Longest sample, in tokens.
        pack: Chop the running text into windows of ``seq_len`` tokens instead of taking every
            text as a sample.
        shuffle_seed: Seed of the texts' order; None keeps the source's own.
        domain_field: Column that holds each text's domain; None where the source is one.
        loss_on: ``all`` tokens, or those of the ``answer`` of chats and prompts.
    """

    source: str
    text_field: str = "text"
    split: str = "train"
    num_samples: int
    seq_len: int
    pack: bool = False
    shuffle_seed: int | None = None
    domain_field: str | None = None
    loss_on: str = "all"
