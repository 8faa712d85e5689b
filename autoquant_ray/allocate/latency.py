"""How fast a plan can decode: a roofline bound per group. Knows nothing of torch, Ray or files.

The roofline model (Williams, Waterman and Patterson 2009, "Roofline: an insightful visual
performance model for multicore architectures", CACM 52(4)): a kernel takes at least as long as its
traffic does at the memory's bandwidth, and at least as long as its operations do at the units'
rate, so ``time = max(bytes / bandwidth, operations / rate)``. For T tokens at once (the batch B in
a decode step, B times the context in a prefill):

- a group of W weights: its stored bytes, and 2 W T operations. Weights with 16-bit activations are
  multiplied in 16 bits; so are formats for which the card has no units. Both read fewer bytes.
- routed experts, of which a token visits the share r: 2 W T r operations, and the share
  ``1 - (1 - r)^T`` of the bytes, the expected share of experts that T tokens touch where each
  token draws its own uniformly. Real routers repeat themselves and touch fewer.
- attention of one layer after S tokens: the B S cached keys and values in 16 bits (whatever format
  the plan gives the cache, so such a plan may be faster than its bound), and 4 B S D
  operations for D attended values; in a prefill half of 4 B S^2 D, as a token sees only earlier
  ones.
- everything else (norms, routers, biases): as a group in 16 bits. Of the embedding only one row per
  token is read; it is left out. The head works on the last tokens alone, in a prefill too.

Layers run one after the other, so the times add up: the time of a plan is linear in its choices,
and a limit on it is one more budget of the same knapsack. Not counted are activations between
kernels (per group about T over its width of the weights' traffic), starts of kernels, unpacking of
weights, and traffic between GPUs. So this is a bound: a measured step takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from autoquant_ray.allocate.allocation import Budget
from autoquant_ray.allocate.cards import SIXTEEN
from autoquant_ray.allocate.load import Latency, four_digits
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import NONE, Attributes

if TYPE_CHECKING:
    from autoquant_ray.allocate.group_choices import GroupChoices

LATENCY = "latency"
"""Name of the cost: milliseconds of one decode step."""
_IN_16_BITS = (SIXTEEN, SIXTEEN)


def numeric_class(attributes: Attributes | None) -> str:
    """``16``, ``int4``, ``fp8`` and so on, from a quantizer's attributes.

    Args:
        attributes: None for values that stay in 16 bits.
    """
    if attributes is None:
        return SIXTEEN
    bits = attributes.get("num_bits", 8)
    return f"int{bits}" if isinstance(bits, int) else f"fp{1 + sum(bits)}"


class StepTime:
    """Times of the groups of one plan on one card.

    Args:
        latency: Card and load.
        plan: The plan's summary from ``run.json``.

    Raises:
        ConfigError: The run does not hold what the prediction needs.
    """

    def __init__(self, latency: Latency, plan: Mapping[str, Any]) -> None:
        if "step" not in plan:
            raise ConfigError(
                "`latency` needs what a decode step reads besides the groups, which this run does "
                "not hold (imported, or made by an earlier version); scan the model again"
            )
        self.latency = latency
        self._facts = plan["step"]
        self._classes = {NONE: _IN_16_BITS} | {
            entry["name"]: (numeric_class(entry["weight"]), numeric_class(entry["input"]))
            for entry in plan["formats"]
            if not entry.get("kv")
        }

    def group_ms(self, group: GroupChoices, format_: str) -> float:
        """Milliseconds of a group in one decode step; 0 where it is not run."""
        return self._group_ms(group, format_, self.latency.batch)

    @property
    def other_ms(self) -> float:
        """Milliseconds of a decode step outside the groups: attention, norms, routers."""
        batch, context = self.latency.batch, self.latency.context
        total = self._others_ms(batch)
        for kind in self._facts["attention"]:
            seen = min(context, kind["window"] or context)
            read = batch * seen * kind["kv_bytes"]
            total += kind["layers"] * self._ms(read, 4 * batch * seen * kind["width"])
        return total

    def budget(self, unsearched: Iterable[GroupChoices], limit_ms: float) -> Budget:
        """The limit that it leaves to the searched groups.

        Args:
            unsearched: Groups that stay in 16 bits.
            limit_ms: Milliseconds of a whole decode step.
        """
        fixed = self.other_ms + sum(group.cost(NONE, LATENCY) for group in unsearched)
        return Budget(
            resource=LATENCY,
            limit=limit_ms - fixed,
            unit_per_bit=None,
            description=self.latency.target,
            fixed=fixed,
            reachable=self.latency.reachable,
        )

    def prediction(
        self, groups: Iterable[GroupChoices], formats: Mapping[str, str]
    ) -> dict[str, Any]:
        """The ``latency`` object of a solution's summary.

        Args:
            groups: All groups of the plan.
            formats: Group -> format.
        """
        groups = list(groups)
        card, batch = self.latency.hardware, self.latency.batch
        step_ms = self.other_ms + math.fsum(self.group_ms(g, formats[g.name]) for g in groups)
        return {
            "hardware": card.name,
            "batch": batch,
            "context": self.latency.context,
            "ms_per_token": step_ms,
            "tokens_per_second": 1000 * batch / step_ms,
            "prefill_ms": self._prefill_ms(groups, formats),
            "kind": "roofline bound from measured rates"
            if card.is_measured
            else "roofline bound, not a measurement",
            "formats_without_units": sorted(
                {
                    formats[group.name]
                    for group in groups
                    if not group.is_cache
                    and not card.has_units(*self._classes[formats[group.name]])
                }
            ),
            "uncounted_layers": self._facts["layers"]
            - sum(kind["layers"] for kind in self._facts["attention"]),
        }

    def _prefill_ms(self, groups: Iterable[GroupChoices], formats: Mapping[str, str]) -> float:
        batch, context = self.latency.batch, self.latency.context
        total = self._others_ms(batch * context)
        for group in groups:
            is_head = self._facts["head"] in group.module_names
            tokens = batch if is_head else batch * context
            total += self._group_ms(group, formats[group.name], tokens)
        for kind in self._facts["attention"]:
            seen = min(context, kind["window"] or context)
            pairs = context * seen - seen * (seen - 1) / 2
            written = batch * context * kind["kv_bytes"]
            total += kind["layers"] * self._ms(written, 4 * batch * pairs * kind["width"])
        return total

    def _group_ms(self, group: GroupChoices, format_: str, tokens: int) -> float:
        if group.is_idle or group.is_cache:
            return 0.0
        if group.active_share is None:
            raise ConfigError(
                f"`latency` needs the share of the experts of {group.name} that a token visits, "
                "which the model's config does not name; such a model has no prediction"
            )
        weight_bytes = float(group.rows[format_]["weight_bytes"])
        pair = self._classes[format_]
        return self._matmul_ms(weight_bytes, group.num_weights, tokens, group.active_share, pair)

    def _others_ms(self, tokens: int) -> float:
        """Weights outside the groups, in 16 bits."""
        plain, experts = self._facts["other_bytes"], self._facts["other_expert_bytes"]
        ratio = self._facts["active_expert_ratio"] or 1.0
        return self._matmul_ms(plain, plain / 2, tokens) + self._matmul_ms(
            experts, experts / 2, tokens, ratio
        )

    def _matmul_ms(
        self,
        weight_bytes: float,
        num_weights: float,
        tokens: int,
        share: float = 1.0,
        pair: tuple[str, str] = _IN_16_BITS,
    ) -> float:
        touched = touched_share(share, tokens)
        return self._ms(weight_bytes * touched, 2 * num_weights * tokens * share, pair)

    def _ms(
        self, num_bytes: float, operations: float, pair: tuple[str, str] = _IN_16_BITS
    ) -> float:
        """The roofline."""
        card = self.latency.hardware
        return 1000 * max(num_bytes / card.bytes_per_second(*pair), operations / card.rate(*pair))


def touched_share(share: float, tokens: int) -> float:
    """Expected share of the experts that some tokens touch together.

    Args:
        share: Share that one token visits, drawn uniformly and for itself.
        tokens: Number of tokens.
    """
    return 1.0 - (1.0 - share) ** tokens


def describe_prediction(prediction: Mapping[str, Any]) -> str:
    """One line for people.

    Args:
        prediction: From :meth:`StepTime.prediction`.
    """
    step, speed, prefill = (
        four_digits(prediction[key]) for key in ("ms_per_token", "tokens_per_second", "prefill_ms")
    )
    text = (
        f"{step} ms per token, {speed} tokens/s on {prediction['hardware']} (batch "
        f"{prediction['batch']}, context {prediction['context']}); prefill {prefill} ms; "
        f"{prediction['kind']}"
    )
    if prediction["formats_without_units"]:
        names = ", ".join(prediction["formats_without_units"])
        text += f"; the card has no units for {names}: multiplied in 16 bits"
    if prediction["uncounted_layers"]:
        text += f"; attention of {prediction['uncounted_layers']} layers is not counted"
    return text
