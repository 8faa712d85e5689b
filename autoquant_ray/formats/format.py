"""One format: the quantizers of a weight and of its input, in ModelOpt's attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoquant_ray.formats.numbers import has_tensor_scale

Attributes = dict[str, Any]
"""Fields of ModelOpt's ``QuantizerAttributeConfig``."""

NONE = "none"
"""Name of the choice that leaves a group in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One choice of the menu.

    Attributes:
        name: As given by the user.
        weight: Attributes of the weight quantizer; empty for a format of the KV cache.
        input: Attributes of the input quantizer; None keeps inputs in 16 bits.
        algorithm: How ModelOpt calibrates the quantizers, as its ``algorithm`` with a ``method``;
            None: each by its own maximum.
        kv: Attributes of the quantizers of keys and values; None for a format of weights.
        kv_values: Those of the values' quantizer, where it is another than that of the keys.
        modelopt_compression: ModelOpt's estimate of compressed over 16-bit size. It is the
            minimum over weight and input, so it undercounts formats with narrow inputs.
        shares_scale: Where a weight has one scale for the whole of it, layers that engines fuse
            have it in common; False: each its own, as ModelOpt quantizes them.
    """

    name: str
    weight: Attributes
    input: Attributes | None
    modelopt_compression: float
    algorithm: Attributes | None = None
    kv: Attributes | None = None
    kv_values: Attributes | None = None
    shares_scale: bool = True

    @property
    def kv_parts(self) -> tuple[Attributes | None, Attributes | None]:
        """Attributes of the quantizers of keys and of values."""
        return self.kv, self.kv_values or self.kv

    @property
    def has_shared_scale(self) -> bool:
        """Whether fused layers have a scale in common."""
        return self.shares_scale and bool(self.weight) and has_tensor_scale(self.weight)

    @property
    def weight_key(self) -> str:
        """Equal for formats that quantize weights alike."""
        key = attributes_key(self.weight)
        key = f"{key} shared" if self.has_shared_scale else key
        return key if self.algorithm is None else f"{key} {attributes_key(self.algorithm)}"

    @property
    def input_key(self) -> str | None:
        """Equal for formats that quantize inputs alike; None where inputs stay in 16 bits."""
        return None if self.input is None else attributes_key(self.input)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``run.json``; :meth:`from_json` is the inverse."""
        return {
            "name": self.name,
            "weight": attributes_to_json(self.weight),
            "input": None if self.input is None else attributes_to_json(self.input),
            "modelopt_compression": self.modelopt_compression,
            **({} if self.algorithm is None else {"algorithm": self.algorithm}),
            **({} if self.kv is None else {"kv": attributes_to_json(self.kv)}),
            **({"kv_values": attributes_to_json(self.kv_values)} if self.kv_values else {}),
            **({"shares_scale": True} if self.has_shared_scale else {}),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Format:
        """Read back what :meth:`to_json` wrote; earlier versions had no scales in common."""
        weight = attributes_from_json(value["weight"])
        has_scale = bool(weight) and has_tensor_scale(weight)
        return cls(
            name=value["name"],
            weight=weight,
            input=None if value["input"] is None else attributes_from_json(value["input"]),
            modelopt_compression=value["modelopt_compression"],
            algorithm=value.get("algorithm"),
            kv=attributes_from_json(value["kv"]) if value.get("kv") else None,
            kv_values=attributes_from_json(value["kv_values"]) if "kv_values" in value else None,
            shares_scale=value.get("shares_scale", not has_scale),
        )


def attributes_to_json(attributes: Attributes) -> Attributes:
    """Make quantizer attributes JSON-safe: tuples become lists, block axes become strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return {key: plain(value) for key, value in attributes.items()}


def attributes_from_json(attributes: Attributes) -> Attributes:
    """Undo :func:`attributes_to_json`: block axes become integers, lists become tuples."""

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                int(key) if key.lstrip("-").isdigit() else key: restored(item)
                for key, item in value.items()
            }
        return tuple(value) if isinstance(value, list) else value

    return {key: restored(value) for key, value in attributes.items()}


def attributes_key(attributes: Attributes) -> str:
    """A text that is equal exactly for equal attributes."""
    return repr(sorted(attributes_to_json(attributes).items()))
