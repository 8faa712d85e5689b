"""One row of what an engine accepts."""

from __future__ import annotations

from dataclasses import dataclass

GENERATIONS = ("ampere", "ada", "hopper", "blackwell")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One algorithm of one engine, or one scheme of compressed-tensors.

    Attributes:
        algo: ModelOpt's ``quant_algo``, or the scheme.
        mixed: Generations on which it is served as one of several formats
            (``MIXED_PRECISION``).
        single: Generations on which it is served as the only format of a checkpoint.
        note: What happens elsewhere; '' where there is nothing to say.
        source: Repository, file and pull request.
        one_scale: Fused layers are computed under one scale for all of their weights: where the
            parts have several, weights are rounded again, or read under another's.
        blocks: Sizes of blocks that it takes; () takes any.
        experts: Whether routed experts may have it.
    """

    algo: str
    mixed: tuple[str, ...]
    single: tuple[str, ...]
    note: str
    source: str
    one_scale: bool = False
    blocks: tuple[int, ...] = ()
    experts: bool = True
