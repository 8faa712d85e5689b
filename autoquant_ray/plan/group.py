"""A group of the plan: modules that share one format, which formats they take, what these cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.gguf_types import fits
from autoquant_ray.formats.kv_cache import cache_bytes
from autoquant_ray.formats.smoothed import is_fitted, is_smoothed, needs_channels, takes_factors
from autoquant_ray.formats.stored_size import format_bits
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.fold import Fold

UNQUANTIZED_BITS = 16


@dataclass(frozen=True, kw_only=True)
class PlannedGroup:
    """Modules that share one format; named after the first of them.

    Attributes:
        reason: Why the group is not searched; None for a searched group.
        is_tied: Its weight is the input embedding too (a tied head).
        fold: Where factors of its input go; None where they cannot be folded, or no format has any.
    """

    name: str
    modules: tuple[PlannedModule, ...]
    reason: str | None
    is_tied: bool
    fold: Fold | None = None

    @property
    def is_searched(self) -> bool:
        """Whether a format is chosen for this group."""
        return self.reason is None

    @property
    def is_cache(self) -> bool:
        """Whether it is what an attention keeps of its keys and values, not weights."""
        return self.modules[0].is_cache

    def takes(self, format_: Format) -> bool:
        """Whether a format is among the choices of this group.

        Experts share the quantizer of their inputs; one that is a group takes what leaves them.
        Scaled channels would change a tied embedding. Factors need an input that can be folded.
        Weights that several modules share are stored once, so they take no format that is fitted to
        the inputs of a module. A type of GGUF files needs rows of whole blocks.
        """
        is_apart = self.modules[0].expert is not None
        if self.is_cache != (format_.kv is not None) or (is_apart and format_.input is not None):
            return False
        if takes_factors(format_) and self.fold is None:
            return False
        if not all(fits(format_.weight, module.shapes) for module in self.modules):
            return False
        if self.is_shared and (needs_channels(format_) or is_fitted(format_)):
            return False
        return not (self.is_tied and is_smoothed(format_))

    @property
    def is_shared(self) -> bool:
        """Whether several of its modules hold the same weights."""
        return any(module.shared_with is not None for module in self.modules)

    @property
    def num_weights(self) -> int:
        """Number of weight elements in the group."""
        return sum(module.num_weights for module in self.modules)

    @property
    def num_stored(self) -> int:
        """Number of its weights that are stored on their own: none of a tied head."""
        return 0 if self.is_tied else self.num_weights

    def weight_bytes(self, format_: Format | None) -> float:
        """Stored bytes under a format (scales included); None: 16 bits."""
        if format_ is None:
            return self.num_weights * UNQUANTIZED_BITS / 8
        bits = (
            format_bits(format_, shape, is_linear=module.kind == "linear")
            for module in self.modules
            if module.shared_with is None
            for shape in module.shapes
        )
        return sum(bits) / 8

    def added_bytes(self, format_: Format | None) -> float:
        """What a format adds to the model's bytes; a tied head in 16 bits adds nothing."""
        return 0.0 if self.is_tied and format_ is None else self.weight_bytes(format_)

    def modelopt_cost(self, format_: Format | None) -> float:
        """ModelOpt's cost: weights times its compression, in 16-bit weight equivalents."""
        return self.num_weights * (1.0 if format_ is None else format_.modelopt_compression)

    def kv_bytes(self, format_: Format | None) -> float | None:
        """Bytes of the cache that a token of context takes; None for weights."""
        keys, values = (None, None) if format_ is None else format_.kv_parts
        shapes = self.modules[0].cached
        return cache_bytes(keys, shapes, values) if shapes else None

    def bits(self, format_: Format | None) -> float:
        """Stored bits per weight, of a cache per element."""
        stored = self.kv_bytes(format_) or self.weight_bytes(format_)
        return stored * 8 / (self.num_weights or sum(map(math.prod, self.modules[0].cached)))


def nothing_stored(heads: Sequence[str]) -> ConfigError:
    """The error where only heads are searched that share the embedding's weight.

    Args:
        heads: Their groups.
    """
    return ConfigError(
        f"only {', '.join(heads)} is left to search, which is tied to the embedding: it costs no "
        "bytes in 16 bits, and quantizing it adds some; search other layers too"
    )
