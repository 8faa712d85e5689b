"""An explanation in words: head, table and notes, the same for a terminal and a notebook."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from autoquant_ray.allocate.certainty.flips import Flip
from autoquant_ray.allocate.certainty.shard_shares import ShardShare
from autoquant_ray.allocate.certainty.solution import CERTAIN, COIN_TOSS
from autoquant_ray.formats.algorithms import MAX
from autoquant_ray.formats.method_names import names_methods
from autoquant_ray.notebook import lines_html, table_html
from autoquant_ray.wording import few

_MAX_NAMED = 5
_NUM_SHARDS = 3


def head_lines(explanation: Explanation) -> list[str]:
    """What the group is, what it got, and what bound the choice."""
    modules = few(explanation.module_names, _MAX_NAMED)
    is_cache = any(alternative.kv_bytes is not None for alternative in explanation.formats)
    what = "its KV cache" if is_cache else f"{explanation.num_weights:,} weights"
    lines = [f"group: {explanation.group}", f"modules: {modules}; {what}"]
    if explanation.reason is not None:
        size = f"{explanation.weight_bytes / 2**20:,.2f} MiB"
        size = "the embedding's bytes" if explanation.is_tied else size
        return [*lines, f"not searched, stays in 16 bits ({size}): {explanation.reason}"]
    name = f"solution {explanation.solution}" if explanation.solution else "the scan's own solution"
    lines.append(
        f"{name}: {explanation.budget}, loses {explanation.plan_score:.4g} ({explanation.unit})"
    )
    lines.append(f"chosen: {explanation.chosen}{_why_sure(explanation)}")
    lines += [f"--allow {p}={','.join(names)} applies" for p, names in explanation.allow.items()]
    if explanation.is_refined:
        lines.append("chosen by measured KL; prices are of plans that the scores alone choose")
    if explanation.is_tied:
        lines.append("tied to the embedding: in 16 bits it adds nothing to the model's bytes")
    return lines


def _why_sure(explanation: Explanation) -> str:
    if explanation.pin is not None:
        return ", fixed by --pin"
    share = next((a.resampled_share for a in explanation.formats if a.is_chosen), None)
    if share is None:
        return ""
    verdict = " (certain)" if share >= CERTAIN else " (a coin toss)" if share < COIN_TOSS else ""
    others = [a.format for a in explanation.formats if (a.resampled_share or 0) >= CERTAIN]
    if others and share < COIN_TOSS:  # measured KL chose the plan, not the scores
        verdict = f" (these take {others[0]}: see the prices of the flips)"
    return f", in {share:.0%} of {explanation.num_resamples} resamples of the shards{verdict}"


def table_heads(explanation: Explanation) -> tuple[str, ...]:
    """Heads of the table of formats."""
    saved = ("Saved",) if _names_methods(explanation) else ()
    first, last = ("Format", "Bits", "MiB", "Score"), ("Resamples", "Price of the flip")
    return (*first, *saved, *last, "Others change")


def _names_methods(explanation: Explanation) -> bool:
    return names_methods(alternative.format for alternative in explanation.formats)


def table_rows(explanation: Explanation) -> list[tuple[str, ...]]:
    """One row per format, under :func:`table_heads`."""
    has_saved = _names_methods(explanation)
    return [
        (
            f"{alternative.format} *" if alternative.is_chosen else alternative.format,
            f"{alternative.weight_bits:.3f}",
            f"{alternative.model_bytes / 2**20:,.2f}"
            if alternative.kv_bytes is None
            else f"{alternative.kv_bytes:,.0f} B/token",
            _score(alternative),
            *((_saved(alternative),) if has_saved else ()),
            "-" if alternative.resampled_share is None else f"{alternative.resampled_share:.0%}",
            _price(alternative, explanation),
            str(len(alternative.flip.others)) if alternative.flip.reason is None else "-",
        )
        for alternative in explanation.formats
    ]


def _score(alternative: Alternative) -> str:
    if alternative.score_stderr is None:
        return f"{alternative.score:.3e}"
    drawn = alternative.sampling_stderr
    rows = f", rows {drawn:.0e}" if drawn else ""
    return f"{alternative.score:.3e} ± {alternative.score_stderr:.0e}{rows}"


def _saved(alternative: Alternative) -> str:
    if alternative.method in (None, MAX):
        return "-"
    if alternative.saved is None:
        return "plain not scored"
    plain = alternative.score + alternative.saved
    return f"{alternative.saved:.2e}" + (f" ({alternative.saved / plain:.0%})" if plain else "")


def _price(alternative: Alternative, explanation: Explanation) -> str:
    change = alternative.flip.change
    if change is None:
        return "not possible"
    if alternative.is_chosen and change == 0:
        return "-"
    relative = f" ({change / explanation.plan_score:+.1%})" if explanation.plan_score else ""
    return f"{change:+.2e}{relative}"


def note_lines(explanation: Explanation) -> list[str]:
    """What does not fit a table: groups that change with a flip, and where the scores come from."""
    if explanation.reason is not None:
        return []
    lines = [
        "* chosen. Price of the flip: change of the whole plan's predicted loss when the budget is "
        "solved again with that format"
    ]
    if any(alternative.sampling_stderr for alternative in explanation.formats):
        lines.append("rows: the part of a score's standard error that comes from drawing rows")
    if _names_methods(explanation):
        lines.append(f"Saved: score of the same format rounded plainly ({MAX}), minus its own")
    for alternative in explanation.formats:
        lines += _flip_lines(alternative)
    if explanation.no_shards is not None:
        return [*lines, f"shards: {explanation.no_shards}"]
    lines += [
        f"{alternative.format}: share of the score (and of the tokens) of the largest of "
        f"{explanation.num_shards} shards: {_shares(alternative)}"
        for alternative in explanation.formats
        if alternative.shards
    ]
    return lines + _without_lines(explanation)


def _without_lines(explanation: Explanation) -> list[str]:
    shards: dict[str, list[str]] = {}
    for shard, format_ in explanation.without_shard.items():
        effect = f"the group {'keeps' if format_ == explanation.chosen else 'gets'} {format_}"
        text = "some group has no score" if format_ is None else effect
        shards.setdefault(text, []).append(str(shard))
    return [f"without shard {' or '.join(names)} {text}" for text, names in shards.items()]


def _flip_lines(alternative: Alternative) -> list[str]:
    if alternative.flip.reason is not None:
        return [f"{alternative.format}: not possible: {alternative.flip.reason}"]
    if not alternative.flip.others:
        return []
    changes = [f"{g} {before} -> {after}" for g, (before, after) in alternative.flip.others.items()]
    return [f"{alternative.format}: also changes {few(changes, _MAX_NAMED)}"]


def _shares(alternative: Alternative) -> str:
    parts = [
        f"shard {s.shard} {s.share:.1%} ({s.token_share:.1%})"
        for s in alternative.shards[:_NUM_SHARDS]
    ]
    return ", ".join(parts)


def explanation_html(explanation: Explanation) -> str:
    """The same for a notebook."""
    heads, rows = table_heads(explanation), table_rows(explanation)
    table = table_html(heads, rows) if explanation.formats else ""
    return f"{lines_html(head_lines(explanation))}{table}{lines_html(note_lines(explanation))}"


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One format of the group.

    Attributes:
        score: Predicted loss in the explanation's unit; 0 for 16 bits, by definition.
        score_stderr: Its standard error; None where it is unknown, and for 16 bits.
        sampling_stderr: The part of it that comes from drawing rows: 0 without; None the same.
        method: How it rounds weights: ``max`` is plainly; None for 16 bits, caches, and imported
            formats.
        saved: Score of the same format rounded plainly, minus its own: 0 for plain rounding; None
            where the run did not score that, and where there is no method.
        weight_bits: Average stored bits, scales included.
        weight_bytes: Stored bytes of the group.
        model_bytes: What the format adds to the whole model; 0 for a tied head in 16 bits.
        kv_bytes: Of a KV cache: bytes that a token of context takes; None for weights.
        resampled_share: Share of the resamples of the shards that chose it; None where there are
            none.
        flip: What the whole plan becomes with it.
        shards: Shards with the largest shares of the score, largest first.
    """

    format: str
    is_chosen: bool
    score: float
    score_stderr: float | None
    sampling_stderr: float | None
    method: str | None
    saved: float | None
    weight_bits: float
    weight_bytes: float
    model_bytes: float
    kv_bytes: float | None
    resampled_share: float | None
    flip: Flip
    shards: list[ShardShare]

    def to_json(self) -> dict[str, Any]:
        """One of the ``formats`` of ``explain --json``."""
        shards = [asdict(shard) for shard in self.shards]
        return vars(self) | {"flip": self.flip.to_json(), "shards": shards}


@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """What a run's files say about one group of one solution.

    Attributes:
        solution: Folder below ``solutions/``; '' for the scan's own.
        reason: Why the group is not searched; None where it is. The fields after ``weight_bytes``
            are then empty.
        chosen: Its format.
        weight_bytes: Its stored bytes under it.
        budget: Budget of the solution as a user writes it.
        unit: Of all scores.
        plan_score: Predicted loss of the whole solution.
        pin: Format that the user fixed for it; None for no pin.
        allow: Patterns of the user that match it -> formats allowed.
        is_tied: It is a head that shares the embedding's bytes in 16 bits.
        is_refined: Measured KL chose the solution (refine, --audit), so it is not what the scores
            alone would choose.
        num_resamples: Of the shards; None where there were none to resample.
        num_shards: Shards behind the scores; None where their parts are not there.
        no_shards: Why they are not; None where they are.
        without_shard: Shard -> format that the group gets when the budget is solved without it;
            None where some group was seen in that shard alone.
        formats: All formats of the group, 16 bits included, in the order of the menu.
    """

    run: str
    solution: str
    group: str
    module_names: list[str]
    num_weights: int
    reason: str | None
    chosen: str
    weight_bytes: float
    budget: str = ""
    unit: str = ""
    plan_score: float | None = None
    pin: str | None = None
    allow: dict[str, list[str]] = field(default_factory=dict)
    is_tied: bool = False
    is_refined: bool = False
    num_resamples: int | None = None
    num_shards: int | None = None
    no_shards: str | None = None
    without_shard: dict[int, str | None] = field(default_factory=dict)
    formats: list[Alternative] = field(default_factory=list)

    @property
    def is_searched(self) -> bool:
        """Whether a format was chosen for the group."""
        return self.reason is None

    def to_json(self) -> dict[str, Any]:
        """What ``explain --json`` prints."""
        without = [{"shard": s, "format": f} for s, f in self.without_shard.items()]
        formats = [alternative.to_json() for alternative in self.formats]
        values = vars(self) | {"without_shard": without, "formats": formats}
        return {"is_searched": self.is_searched, **values}

    def __repr__(self) -> str:
        """Group and format; shards and other formats of a group would hide them."""
        why = f"of {len(self.formats)} formats" if self.reason is None else self.reason
        return f"Explanation({self.group!r}, {self.chosen}, {why})"

    def _repr_html_(self) -> str:
        return explanation_html(self)
