"""Reasons to doubt a plan, in words, the gravest first.

Pure: numbers in, sentences out. Each says what is wrong, by how much, and what to do. Thresholds
stand here as constants; where one comes from a measurement, it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant_ray.allocate.certainty.stopping import MIN_SHARDS
from autoquant_ray.report.evidence import ChosenFormat, Evidence
from autoquant_ray.report.measured import IN_RANGE
from autoquant_ray.wording import few

MOST = 0.25
"""Share of the predicted loss from which a single group is named."""
WIDE = 0.1
"""Error of the predicted KL, as a share of it, from which it is called wide."""
FEWEST_BITS = 5.0
"""Effective bits below which layers interact so much that the sum of their scores falls short: on a
small Llama the sum was within 16% at 6 bits and above, 21% at 5, 1.2 times too low at 4.5 and 2
times at 3.6."""
REGRET = 0.01
"""Expected regret, as a share of the predicted KL, from which coin tosses matter."""
NO_BETTER = 0.9
"""Share of the null's loss from which a plan is hardly better than one from shuffled scores."""
_MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Concern:
    """One reason.

    Attributes:
        is_grave: The plan should not be used as it is; otherwise it needs a look.
        title: In a few words.
        text: What is wrong, by how much, what to do.
    """

    is_grave: bool
    title: str
    text: str


def find_concerns(evidence: Evidence) -> list[Concern]:
    """All reasons that hold; grave ones first, otherwise in the order in which to look."""
    rules = (
        _unsatisfied,
        _rivals,
        _null,
        _measured,
        _unserved,
        _low_bits,
        _quarantined,
        _experts,
        _silent_experts,
        _labels,
        _shards,
        _wide_total,
        _wide_choices,
        _tosses,
        _largest,
    )
    found = [concern for rule in rules for concern in rule(evidence)]
    return sorted(found, key=lambda concern: not concern.is_grave)


def _unsatisfied(known: Evidence) -> Iterator[Concern]:
    if not known.is_satisfied:
        yield _grave("The budget is not met", "Solve it again, or give a larger budget.")


def _rivals(known: Evidence) -> Iterator[Concern]:
    """A rival that loses less within the same budget, measured."""
    if known.by_domain:
        return
    for own, *rivals in known.measured:
        better = [row for row in rivals if _is_surely_better(row) and _is_no_larger(row, own)]
        if better:
            best = min(better, key=lambda row: float(row["kl_mean"]))
            yield _grave(
                "Another plan loses less",
                f"Measured on {own['dataset']}, {best['name']} loses {best['kl_mean']:.4g} nats "
                f"per token, this plan {own['kl_mean']:.4g}, under the same budget. Use that one, "
                "or search by measured KL with 'refine'.",
            )


def _is_surely_better(rival: Mapping[str, Any]) -> bool:
    """By two standard errors of the difference, where they are known."""
    return bool(rival["kl_above_solution"] + 2 * (rival["kl_above_solution_stderr"] or 0.0) < 0)


def _is_no_larger(rival: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Rivals from elsewhere have their own size; all others were made for the same budget."""
    is_foreign = str(rival["name"]).startswith(("file ", "solution "))
    return not is_foreign or bool(rival["weight_bytes"] <= own["weight_bytes"])


def _null(known: Evidence) -> Iterator[Concern]:
    own = known.predicted if known.objective is None else known.objective
    if known.null is not None and own > NO_BETTER * known.null and not known.by_measurement:
        yield _grave(
            "Hardly better than shuffled scores",
            f"Plans from shuffled scores would lose {known.null:.4g}, this one "
            f"{own:.4g}: at this budget the choice of groups matters little, or the "
            "scores say little.",
        )


def _measured(known: Evidence) -> Iterator[Concern]:
    for own, *_ in known.measured:
        if not math.isfinite(own["kl_mean"]):
            yield _grave(
                "The plan breaks the model",
                f"Measured on {own['dataset']}, its KL is not finite: a format overflows. Leave "
                "formats out with --allow, or give a larger budget.",
            )
            continue
        if not (own["kl_mean"] > 0 and own["predicted_kl"] > 0):
            continue
        ratio = own["kl_mean"] / own["predicted_kl"]
        if not 1 / IN_RANGE <= ratio <= IN_RANGE:
            yield _look(
                "The prediction does not hold",
                f"Measured on {own['dataset']}, the plan loses {ratio:.3g} times what was "
                f"predicted, more than a factor of {IN_RANGE:g} apart. Trust the measured number; "
                "'refine' searches by it.",
            )


def _unserved(known: Evidence) -> Iterator[Concern]:
    if known.unserved is not None:
        yield _look("No engine serves it as it is", known.unserved)


def _low_bits(known: Evidence) -> Iterator[Concern]:
    is_low = round(known.effective_bits, 1) < FEWEST_BITS
    if is_low and not known.measured and known.labels is not None:
        yield _look(
            "Below the range of the prediction",
            f"At {known.effective_bits:.2f} bits (below {FEWEST_BITS:g}) layers interact, and the "
            "predicted KL tends to be too low. Measure the plan with 'evaluate'.",
        )


def _quarantined(known: Evidence) -> Iterator[Concern]:
    for entry in known.quarantined:
        yield _look(
            "Data was left out",
            f"Shard {entry['shard']} was left out while {entry['stage']}: {entry['reason']}. The "
            "plan knows nothing of its samples.",
        )


def _experts(known: Evidence) -> Iterator[Concern]:
    if known.few_tokens:
        number = sum(len(one.experts) for one in known.few_tokens)
        least = min(known.few_tokens, key=lambda one: one.fewest)
        yield _look(
            "Experts that saw few tokens",
            f"{_count(number, 'routed expert')} of {_count(len(known.few_tokens), 'group')} saw "
            f"fewer than {known.min_expert_tokens} tokens, the fewest {least.fewest} in "
            f"{least.group}: the scores say little of them. Use more --samples.",
        )


def _silent_experts(known: Evidence) -> Iterator[Concern]:
    if known.silent_experts:
        yield _look(
            "Experts that saw no token",
            f"{_count(len(known.silent_experts), 'routed expert')} saw no token, the first "
            f"{known.silent_experts[0]}: without a score, 16 bits are kept. Use more --samples.",
        )


def _labels(known: Evidence) -> Iterator[Concern]:
    if known.labels == "data":
        yield _look(
            "Labels from the data",
            "The scores use the data's next tokens as labels (empirical Fisher), which biases the "
            "predicted KL; scan with --labels model for an unbiased one.",
        )


def _shards(known: Evidence) -> Iterator[Concern]:
    if known.num_shards is None or known.num_shards >= MIN_SHARDS:
        return
    if known.num_shards == 1:
        text = "The scores come from a single shard, so nothing says how far off they are."
    else:
        text = (
            f"The scores come from {known.num_shards} shards; fewer than {MIN_SHARDS} hardly show "
            "their spread, and the error bars are rough."
        )
    yield _look("Few shards", f"{text} Use more --samples, or a smaller --shard-samples.")


def _wide_total(known: Evidence) -> Iterator[Concern]:
    if known.stderr is not None and known.stderr > WIDE * known.predicted > 0:
        yield _look(
            "A wide error bar",
            f"The predicted KL is {known.predicted:.4g} ± {known.stderr:.2g}: an error of "
            f"{known.stderr / known.predicted:.0%}. Score more samples.",
        )


def _wide_choices(known: Evidence) -> Iterator[Concern]:
    unsure = [c for c in known.choices if c.stderr is not None and c.stderr >= c.score]
    if unsure:
        named = few([f"{c.group} ({c.format})" for c in unsure], _MAX_NAMED)
        share = _share(unsure, known)
        yield _look(
            "Scores within their own error",
            f"{_count(len(unsure), 'chosen format')} with a score no larger than its standard "
            f"error, together {share} of the predicted loss: {named}. Score more samples.",
        )


def _tosses(known: Evidence) -> Iterator[Concern]:
    if known.by_measurement:
        return
    if known.coin_tosses and (known.expected_regret or 0.0) >= REGRET:
        tossed = [c for c in known.choices if c.group in set(known.coin_tosses)]
        yield _look(
            "Coin tosses that matter",
            f"{_count(len(known.coin_tosses), 'group')} with an undecided format, together "
            f"{_share(tossed, known)} of the predicted loss: {few(known.coin_tosses, _MAX_NAMED)}. "
            f"The plan is expected to lose {known.expected_regret:.1%} because its scores are "
            "estimates. Score more samples.",
        )


def _largest(known: Evidence) -> Iterator[Concern]:
    largest = max(known.choices, key=lambda choice: choice.score, default=None)
    if largest is None or len(known.choices) < 2 or largest.score < MOST * known.predicted:
        return
    share = largest.score / known.predicted
    yield _look(
        f"One group takes {'most' if share > 0.5 else 'much'} of the loss",
        f"{largest.group} in {largest.format} takes {share:.0%} of the predicted loss. "
        f"'explain' with {largest.group} tells what 16 bits for it would cost elsewhere.",
    )


def _grave(title: str, text: str) -> Concern:
    return Concern(is_grave=True, title=title, text=text)


def _look(title: str, text: str) -> Concern:
    return Concern(is_grave=False, title=title, text=text)


def _share(choices: Sequence[ChosenFormat], known: Evidence) -> str:
    return f"{sum(choice.score for choice in choices) / known.predicted:.1%}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
