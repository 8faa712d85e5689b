"""Reasons to doubt a solution, in words, the gravest first.

Pure functions: numbers in, sentences out. Each sentence says what is wrong, by how much, and what
to do. Thresholds are constants of this module; where a threshold was measured, its docstring says
so.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoquant_ray.allocate.candidate import AT_SIZE_OF
from autoquant_ray.allocate.certainty.stopping import MIN_SHARDS
from autoquant_ray.report.evidence import ChosenFormat, Evidence
from autoquant_ray.report.measured import IN_RANGE, is_nothing
from autoquant_ray.report.task_scores.section import NOISE
from autoquant_ray.wording import few

MOST = 0.25
"""Share of the predicted loss from which a single group is a concern."""
WIDE = 0.1
"""Relative standard error of the predicted KL from which it is a concern."""
FEWEST_BITS = 5.0
"""Effective bits below which layers interact so much that the sum of their scores is too low:
measured on a small Llama, the sum was within 16% at 6 bits and above, within 21% at 5, too low by a
factor of 1.2 at 4.5 and by a factor of 2 at 3.6."""
FEWEST_UNIFORM_BITS = 4.5
"""Effective bits below which an allocation of a single format is predicted too low: on
SmolLM2-135M, measured over predicted was 1.4 to 1.5 there, and 0.9 to 1.2 elsewhere."""
REGRET = 0.01
"""Expected regret, as a share of the predicted KL, from which coin tosses are a concern."""
NO_BETTER = 0.9
"""Share of the loss with shuffled scores from which a solution is hardly better than those."""
_MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Concern:
    """A reason to doubt a solution.

    Attributes:
        is_grave: The solution should not be used as it is; otherwise it needs a look.
        title: The reason in a few words.
        text: What is wrong, by how much, and what to do.
        command: Command line that mends it, or that shows what would; '' where there is none.
    """

    is_grave: bool
    title: str
    text: str
    command: str = ""


def find_concerns(evidence: Evidence) -> list[Concern]:
    """All reasons that apply; grave ones first, otherwise in the order in which to look."""
    concerns = [
        replace(concern, command=concern.command or evidence.remedies.get(remedy, ""))
        for rule, remedy in _RULES
        for concern in rule(evidence)
    ]
    return sorted(concerns, key=lambda concern: not concern.is_grave)


def _unsatisfied(evidence: Evidence) -> Iterator[Concern]:
    if not evidence.is_satisfied:
        yield _grave("The budget is not met", "Solve again, or give a larger budget.")


def _rivals(evidence: Evidence) -> Iterator[Concern]:
    """A rival with less measured loss within the same budget."""
    if evidence.by_domain:
        return
    for solution, *rivals in evidence.measured:
        better = [row for row in rivals if _is_surely_better(row) and _is_no_larger(row, solution)]
        if better:
            best = min(better, key=lambda row: float(row["kl_mean"]))
            yield _grave(
                "Another allocation loses less",
                f"Measured on {solution['dataset']}, {best['name']} loses {best['kl_mean']:.4g} "
                f"nats per token, this solution {solution['kl_mean']:.4g}, under the same budget. "
                "Use the other one, or search by measured KL with 'refine'.",
            )


def _is_surely_better(rival: Mapping[str, Any]) -> bool:
    """Whether a rival loses less by more than noise, if the difference has an error."""
    noise = NOISE * (rival["kl_above_solution_stderr"] or 0.0)
    return bool(rival["kl_above_solution"] + noise < 0)


def _is_no_larger(rival: Mapping[str, Any], solution: Mapping[str, Any]) -> bool:
    """Whether a rival is within the size: files and other solutions had other budgets."""
    is_foreign = str(rival["name"]).startswith(("file ", "solution ", AT_SIZE_OF))
    return not is_foreign or bool(rival["weight_bytes"] <= solution["weight_bytes"])


def _null(evidence: Evidence) -> Iterator[Concern]:
    """A loss close to that of the null hypothesis, scores shuffled among the groups."""
    if evidence.null is None or evidence.by_measurement:
        return
    loss = evidence.predicted if evidence.objective is None else evidence.objective
    if loss > NO_BETTER * evidence.null:
        yield _grave(
            "Hardly better than shuffled scores",
            f"With scores shuffled among the groups, the predicted loss is {evidence.null:.4g}; "
            f"this solution has {loss:.4g}. At this budget it matters little which groups get "
            "which format, or the scores carry little information.",
        )


def _measured(evidence: Evidence) -> Iterator[Concern]:
    for solution, *_ in evidence.measured:
        if not math.isfinite(solution["kl_mean"]):
            yield _grave(
                "The solution breaks the model",
                f"Measured on {solution['dataset']}, its KL is not finite: a format overflows. "
                "Exclude formats with --allow, or give a larger budget.",
            )
            continue
        if is_nothing(solution):
            continue
        predicted = solution["predicted_kl"]
        ratio = solution["kl_mean"] / predicted if predicted > 0 else math.inf
        if not 1 / IN_RANGE <= ratio <= IN_RANGE:
            yield _look(
                "The prediction does not hold",
                f"Measured on {solution['dataset']}, the loss is {ratio:.3g} times the prediction; "
                f"within a factor of {IN_RANGE:g} is normal. Trust the measured number; 'refine' "
                "searches by measured loss.",
            )


def _unserved(evidence: Evidence) -> Iterator[Concern]:
    if evidence.unserved is not None:
        yield _look("No engine serves it as it is", evidence.unserved)


def _low_bits(evidence: Evidence) -> Iterator[Concern]:
    is_low = round(evidence.effective_bits, 1) < FEWEST_BITS
    if is_low and not evidence.measured and evidence.labels is not None:
        general = (
            f"At {evidence.effective_bits:.2f} bits (below {FEWEST_BITS:g}) layers interact, and "
            "the predicted KL tends to be too low. Measure the solution with 'evaluate'."
        )
        uniform = low_uniform(evidence.effective_bits, evidence.uniform)
        yield _look("Below the range of the prediction", uniform or general)


def low_uniform(effective_bits: float, uniform: str | None) -> str | None:
    """Why a predicted KL is too low that stems from a single format of few bits.

    Args:
        effective_bits: Average stored bits over the searched groups.
        uniform: From :class:`~autoquant_ray.report.evidence.Evidence`.

    Returns:
        None where that does not apply.
    """
    if uniform is None or round(effective_bits, 2) >= FEWEST_UNIFORM_BITS:
        return None
    return (
        f"All quantized groups are in {uniform}, at {effective_bits:.2f} bits (below "
        f"{FEWEST_UNIFORM_BITS:g}): the predicted KL runs low there. On SmolLM2-135M, the measured "
        "KL was 1.4 to 1.5 times the predicted one, elsewhere 0.9 to 1.2 times. Measure the "
        "solution with 'evaluate'."
    )


def _quarantined(evidence: Evidence) -> Iterator[Concern]:
    for entry in evidence.quarantined:
        yield _look(
            "Data was left out",
            f"Shard {entry['shard']} was left out in the stage {entry['stage']}: "
            f"{entry['reason']}. The scores do not cover its samples.",
        )


def _experts(evidence: Evidence) -> Iterator[Concern]:
    if evidence.few_tokens:
        number = sum(len(group.experts) for group in evidence.few_tokens)
        least = min(evidence.few_tokens, key=lambda group: group.fewest)
        yield _look(
            "Experts that saw few tokens",
            f"{_count(number, 'routed expert')} of {_count(len(evidence.few_tokens), 'group')} saw "
            f"fewer than {evidence.min_expert_tokens} tokens, the fewest {least.fewest} in "
            f"{least.group}: their scores are unreliable. Use more --samples.",
        )


def _silent_experts(evidence: Evidence) -> Iterator[Concern]:
    if evidence.silent_experts:
        yield _look(
            "Experts that saw no token",
            f"{_count(len(evidence.silent_experts), 'routed expert')} saw no token, the first "
            f"{evidence.silent_experts[0]}: without a score they stay in 16 bits. Use more "
            "--samples.",
        )


def _labels(evidence: Evidence) -> Iterator[Concern]:
    if evidence.labels == "data":
        yield _look(
            "Labels from the data",
            "The scores use the data's next tokens as labels (empirical Fisher), which biases the "
            "predicted KL; scan with --labels model for an unbiased one.",
        )


def _shards(evidence: Evidence) -> Iterator[Concern]:
    if evidence.num_shards is None or evidence.num_shards >= MIN_SHARDS:
        return
    if evidence.num_shards == 1:
        text = "The scores come from a single shard, so their standard error is unknown."
    else:
        text = (
            f"The scores come from {evidence.num_shards} shards; with fewer than {MIN_SHARDS}, "
            "standard errors are rough."
        )
    yield _look("Few shards", f"{text} Use more --samples, or a smaller --shard-samples.")


def _wide_total(evidence: Evidence) -> Iterator[Concern]:
    if evidence.stderr is not None and evidence.stderr > WIDE * evidence.predicted > 0:
        yield _look(
            "A large standard error",
            f"The predicted KL is {evidence.predicted:.4g} ± {evidence.stderr:.2g}, a relative "
            f"error of {evidence.stderr / evidence.predicted:.0%}. Score more samples.",
        )


def _wide_choices(evidence: Evidence) -> Iterator[Concern]:
    unsure = [c for c in evidence.choices if c.stderr is not None and c.stderr >= c.score]
    if unsure:
        named = few([f"{c.group} ({c.format})" for c in unsure], _MAX_NAMED)
        share = _share(unsure, evidence)
        yield _look(
            "Scores within their standard error",
            f"{_count(len(unsure), 'chosen format')} with a score no larger than its standard "
            f"error, together {share} of the predicted loss: {named}. Score more samples.",
        )


def _tosses(evidence: Evidence) -> Iterator[Concern]:
    if evidence.by_measurement:
        return
    if evidence.coin_tosses and (evidence.expected_regret or 0.0) >= REGRET:
        tossed = [c for c in evidence.choices if c.group in set(evidence.coin_tosses)]
        yield _look(
            "Coin tosses that matter",
            f"{_count(len(evidence.coin_tosses), 'group')} with an undecided format, together "
            f"{_share(tossed, evidence)} of the predicted loss: "
            f"{few(evidence.coin_tosses, _MAX_NAMED)}. "
            f"Errors of the scores are expected to cost {evidence.expected_regret:.1%} of the "
            "predicted KL. Score more samples.",
        )


def _largest(evidence: Evidence) -> Iterator[Concern]:
    largest = max(evidence.choices, key=lambda choice: choice.score, default=None)
    if largest is None or len(evidence.choices) < 2 or largest.score < MOST * evidence.predicted:
        return
    share = largest.score / evidence.predicted
    concern = _look(
        f"One group takes {'most' if share > 0.5 else 'much'} of the loss",
        f"{largest.group} in {largest.format} takes {share:.0%} of the predicted loss. "
        f"'explain' with {largest.group} shows what keeping it in 16 bits would cost elsewhere.",
    )
    explain = evidence.remedies.get("explain")
    command = "" if explain is None else f"{explain} {shlex.quote(largest.group)}"
    yield replace(concern, command=command)


def _grave(title: str, text: str) -> Concern:
    return Concern(is_grave=True, title=title, text=text)


def _look(title: str, text: str) -> Concern:
    return Concern(is_grave=False, title=title, text=text)


def _share(choices: Sequence[ChosenFormat], evidence: Evidence) -> str:
    return f"{sum(choice.score for choice in choices) / evidence.predicted:.1%}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


_RULES: tuple[tuple[Callable[[Evidence], Iterator[Concern]], str], ...] = (
    (_unsatisfied, "frontier"),
    (_rivals, "refine"),
    (_null, "frontier"),
    (_measured, "refine"),
    (_unserved, "served"),
    (_low_bits, "evaluate"),
    (_quarantined, ""),
    (_experts, "samples"),
    (_silent_experts, "samples"),
    (_labels, "labels"),
    (_shards, "samples"),
    (_wide_total, "samples"),
    (_wide_choices, "samples"),
    (_tosses, "samples"),
    (_largest, "explain"),
)
"""Each rule with the name of its remedy, in the order in which to look."""
