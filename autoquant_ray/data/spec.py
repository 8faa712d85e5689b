"""Which calibration data is used, and how it becomes samples."""

from __future__ import annotations

from dataclasses import dataclass

from autoquant_ray.config.sources import FileKind


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which calibration data is used, and how it becomes samples.

    Attributes:
        source: Path of a file of a kind in :mod:`autoquant_ray.data.kinds`, a folder of them, a
            hub id, or ``pydoc``.
        read_as: What the file, or every file of the folder, holds; None: what its ending says.
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
    read_as: FileKind | None = None
    text_field: str = "text"
    split: str = "train"
    num_samples: int
    seq_len: int
    pack: bool = False
    shuffle_seed: int | None = None
    domain_field: str | None = None
    loss_on: str = "all"
