"""``explain``: prices of flips against all allocations, shares of shards against sums of files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastparquet
import numpy as np
import pandas
import pytest
from click.testing import CliRunner, Result

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.certainty.explain import explain_group
from autoquant_ray.allocate.certainty.explanation import Explanation, head_lines
from autoquant_ray.allocate.group_names import find_group
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import load_problem
from autoquant_ray.allocate.search import search
from autoquant_ray.cli.main import main
from autoquant_ray.errors import ConfigError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SCORES, part_name
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run, write_solution
from autoquant_ray.stages.aggregate import aggregate_parts

FORMATS = ("wint4_afp16", "wint8_aint8")
EVIL = "<b>evil</b>"
NUM_SHARDS = 6
ODD_SHARD = 3


def run(*arguments: Any) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def explained(directory: RunDirectory, *arguments: Any) -> dict[str, Any]:
    """What ``explain --json`` prints."""
    done = run("explain", directory.uri, *arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def by_format(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["format"]: entry for entry in found["formats"]}


@dataclass(frozen=True)
class Everything:
    """All allocations of a run, as arrays with one row per allocation."""

    groups: list[str]
    formats_AG: Any
    bits_A: Any
    scores_A: Any

    @classmethod
    def of(cls, directory: RunDirectory, scores: Any = None) -> Everything:
        """Read plan and scores by fastparquet, combine all formats of all groups."""
        plan = fastparquet.ParquetFile(directory.path("plan.parquet")).to_pandas()
        plan = plan[plan.is_searched]
        if scores is None:
            table = fastparquet.ParquetFile(directory.path("sensitivity.parquet")).to_pandas()
            scores = table.set_index(["group", "format"]).score.to_dict()
        groups = list(dict.fromkeys(plan.group))
        weights = plan.drop_duplicates("group").num_weights.sum()
        rows = [plan[plan.group == group] for group in groups]
        combinations = list(itertools.product(*(range(len(frame)) for frame in rows)))
        index_AG = np.array(combinations)
        names = [frame.format.to_numpy() for frame in rows]
        bits = [8 * frame.weight_bytes.to_numpy() / weights for frame in rows]
        losses = [
            np.array([0.0 if f == "none" else scores[group, f] for f in frame.format])
            for group, frame in zip(groups, rows, strict=True)
        ]
        columns = range(len(groups))
        return cls(
            groups=groups,
            formats_AG=np.stack([names[g][index_AG[:, g]] for g in columns], axis=1),
            bits_A=sum(bits[g][index_AG[:, g]] for g in columns),
            scores_A=sum(losses[g][index_AG[:, g]] for g in columns),
        )

    def best(self, bits: float, **pins: str) -> tuple[dict[str, str], float] | None:
        """The best allocation within a budget that keeps the pins."""
        is_allowed = self.bits_A <= bits * (1 + 1e-12)
        for group, format_ in pins.items():
            is_allowed = is_allowed & (self.formats_AG[:, self.groups.index(group)] == format_)
        if not is_allowed.any():
            return None
        at = int(np.argmin(np.where(is_allowed, self.scores_A, math.inf)))
        return dict(zip(self.groups, self.formats_AG[at], strict=True)), float(self.scores_A[at])


def check_flips(found: dict[str, Any], everything: Everything, bits: float, **pins: str) -> int:
    """Compare every flip of a group with all allocations; returns how many are not possible."""
    own = everything.best(bits, **pins)
    assert own is not None
    formats, score = own
    assert found["chosen"] == formats[found["group"]]
    num_impossible = 0
    for format_, entry in by_format(found).items():
        flip = entry["flip"]
        best = everything.best(bits, **(pins | {found["group"]: format_}))
        assert flip["is_possible"] == (best is not None)
        if best is None:
            assert "reachable is" in flip["reason"]
            num_impossible += 1
            continue
        assert flip["plan_score"] == pytest.approx(best[1], rel=1e-9)
        assert flip["change"] == pytest.approx(best[1] - score, abs=1e-9 * score)
        changes = {entry["group"]: (entry["from"], entry["to"]) for entry in flip["other_groups"]}
        assert changes == {
            group: (formats[group], best[0][group])
            for group in everything.groups
            if best[0][group] != formats[group] and group != found["group"]
        }
    return num_impossible


def test_price_of_every_flip_is_that_of_the_best_allocation_with_it(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    everything = Everything.of(directory)
    num_others = 0
    for group in everything.groups:
        found = explained(directory, group)
        check_flips(found, everything, 7.0)
        assert {entry["format"] for entry in found["formats"]} == {*FORMATS, "none"}
        chosen = by_format(found)[found["chosen"]]["flip"]
        assert (chosen["change"], chosen["other_groups"]) == (0.0, [])
        num_others += sum(len(entry["flip"]["other_groups"]) for entry in found["formats"])
    assert num_others > len(everything.groups)


def test_flip_that_no_budget_allows_names_the_reachable_range(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    solve_run(directory, SolveOptions(bits=4.3))
    everything = Everything.of(directory)
    impossible = [
        check_flips(explained(directory, g, "--solution", "bits-4.30"), everything, 4.3)
        for g in everything.groups
    ]
    assert sum(impossible) > 0
    found = run("explain", directory.uri, everything.groups[0], "--solution", "bits-4.30")
    assert "none: not possible: --bits 4.3 cannot be met: reachable is " in found.output


def test_pins_of_the_solution_hold_and_its_own_pin_gives_way(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    first, second = Everything.of(directory).groups[:2]
    pins = {first: "none", second: "wint4_afp16"}
    name = solve_run(directory, SolveOptions(bits=8.5, pins=pins)).name
    everything = Everything.of(directory)
    found = explained(directory, first, "--solution", name)
    assert (found["pin"], found["chosen"]) == ("none", "none")
    for format_, entry in by_format(found).items():
        best = everything.best(8.5, **{first: format_, second: "wint4_afp16"})
        free = everything.best(8.5, **{first: format_})
        assert best is not None
        assert free is not None
        assert free[1] < 0.99 * best[1]  # the other pin binds
        assert entry["flip"]["plan_score"] == pytest.approx(best[1], rel=1e-9)
    shown = run("explain", directory.uri, first, "--solution", name).output
    assert "chosen: none, fixed by --pin" in shown
    assert explained(directory, everything.groups[2], "--solution", name)["pin"] is None


def test_allowed_formats_are_said_and_bind_the_flips(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    allow = {"*.o_proj": ("wint8_aint8", "none")}
    name = solve_run(directory, SolveOptions(bits=7.0, allow=allow)).name
    found = explained(directory, "layers.0.self_attn.o_proj", "--solution", name)
    assert found["allow"] == {"*.o_proj": ["wint8_aint8", "none"]}
    flip = by_format(found)["wint4_afp16"]["flip"]
    assert flip["is_possible"] is False
    assert flip["reason"] == "--allow *.o_proj=wint8_aint8,none leaves it out"
    assert by_format(found)["none"]["flip"]["is_possible"] is True


@pytest.fixture
def odd_run(make_run: Any) -> tuple[RunDirectory, str]:
    """Six shards of different sizes, one of which is very odd for one group; solved at 7 bits."""
    directory = make_run(formats=FORMATS, num_shards=NUM_SHARDS)
    group = load_problem(RunState.open(directory))[0].searched[2].name
    for shard in range(NUM_SHARDS):
        table = directory.read_table(part_name(SCORES, shard), "scores").to_pandas()
        table["num_tokens"] = 40 + 10 * shard
        if shard == ODD_SHARD:
            table.loc[table.group == group, "elementwise_sum"] *= 1000
        rows = table.to_dict("records")
        directory.write_table(part_name(SCORES, shard), "scores", rows)
    plan_rows = directory.read_table("plan.parquet", "plan").to_pylist()
    parts = Parts(directory, SCORES, range(NUM_SHARDS))
    found = aggregate_parts(parts, plan_rows, "elementwise")
    directory.write_table("sensitivity.parquet", "sensitivity", found.rows)
    directory.write_table("resampling.parquet", "resampling", found.buckets)
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    return directory, group


def score_parts(directory: RunDirectory) -> pandas.DataFrame:
    """All parts, read by fastparquet."""
    paths = sorted(Path(directory.path(SCORES)).glob("shard-*.parquet"))
    return pandas.concat(fastparquet.ParquetFile(str(path)).to_pandas() for path in paths)


def test_shares_of_the_shards_are_those_of_the_files(odd_run: tuple[RunDirectory, str]) -> None:
    directory, _ = odd_run
    parts = score_parts(directory)
    tokens = parts.drop_duplicates("shard").set_index("shard").num_tokens
    for group in dict.fromkeys(parts.group):
        found = explained(directory, group)
        assert found["num_shards"] == NUM_SHARDS
        for format_ in FORMATS:
            rows = parts[(parts.group == group) & (parts.format == format_)].set_index("shard")
            shares = (rows.elementwise_sum / rows.elementwise_sum.sum()).sort_values()[::-1]
            told = by_format(found)[format_]["shards"]
            assert [entry["shard"] for entry in told] == list(shares.index[: len(told)])
            assert [entry["share"] for entry in told] == pytest.approx(list(shares[: len(told)]))
            assert [entry["token_share"] for entry in told] == pytest.approx(
                [tokens[entry["shard"]] / tokens.sum() for entry in told]
            )
        assert by_format(found)["none"]["shards"] == []


def test_odd_shard_that_decides_is_named_with_what_holds_without_it(
    odd_run: tuple[RunDirectory, str],
) -> None:
    directory, group = odd_run
    found = explained(directory, group)
    assert by_format(found)[FORMATS[0]]["shards"][0]["shard"] == ODD_SHARD
    assert by_format(found)[FORMATS[0]]["shards"][0]["share"] > 0.9
    parts = score_parts(directory)
    parts = parts[parts.shard != ODD_SHARD]
    tokens = parts.drop_duplicates("shard").num_tokens.sum()
    sums = parts.groupby(["group", "format"]).elementwise_sum.sum()
    best = Everything.of(directory, (0.5 * sums / tokens).to_dict()).best(7.0)
    assert best is not None
    assert found["without_shard"] == [{"shard": ODD_SHARD, "format": best[0][group]}]
    assert best[0][group] != found["chosen"]
    shown = run("explain", directory.uri, group).output
    assert f"without shard {ODD_SHARD} the group gets {best[0][group]}" in shown


def test_resampled_shares_are_those_of_the_manifest(odd_run: tuple[RunDirectory, str]) -> None:
    directory, _ = odd_run
    kept = directory.read_json("manifest.json")["stability"]["kept"]
    assert any(share < 1 for share in kept.values())
    for group, share in kept.items():
        found = explained(directory, group)
        shares = {f: entry["resampled_share"] for f, entry in by_format(found).items()}
        assert shares[found["chosen"]] == share
        assert sum(shares.values()) == pytest.approx(1)
        assert found["num_resamples"] == 200


@pytest.mark.parametrize(
    ("chosen", "other", "said"),
    [
        (0.0, 1.0, "in 0% of 200 resamples of the shards (these, solved approximately, take "),
        (0.4, 0.6, "in 40% of 200 resamples of the shards (a coin toss)"),
        (1.0, 0.0, "in 100% of 200 resamples of the shards (certain)"),
    ],
)
def test_format_that_resamples_never_take_is_no_coin_toss(
    odd_run: tuple[RunDirectory, str], chosen: float, other: float, said: str
) -> None:
    told = explain_group(odd_run[0], odd_run[1])
    second = next(one.format for one in told.formats if not one.is_chosen)
    shares = {told.chosen: chosen, second: other}
    formats = tuple(
        dataclasses.replace(one, resampled_share=shares.get(one.format, 0.0))
        for one in told.formats
    )
    text = head_lines(dataclasses.replace(told, formats=formats))[-1]
    assert said in text
    assert (second in text) == (other == 1)


def test_scores_and_costs_are_those_of_the_files(odd_run: tuple[RunDirectory, str]) -> None:
    directory, group = odd_run
    table = fastparquet.ParquetFile(directory.path("sensitivity.parquet")).to_pandas()
    rows = table[table.group == group].set_index("format")
    found = explained(directory, group)
    for format_ in FORMATS:
        entry = by_format(found)[format_]
        for column in ("score", "score_stderr", "weight_bits", "weight_bytes"):
            assert entry[column] == rows.loc[format_, column] > 0
    none = by_format(found)["none"]
    assert (none["score"], none["score_stderr"], none["weight_bits"]) == (0.0, None, 16.0)
    summary = directory.read_json("manifest.json")["solution"]
    assert found["plan_score"] == pytest.approx(summary["predicted_kl_nats"], rel=1e-12)


def files(directory: RunDirectory) -> Iterator[tuple[str, bytes]]:
    for path in sorted(Path(directory.uri).rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes()


def test_same_question_has_the_same_answer_and_changes_no_file(
    odd_run: tuple[RunDirectory, str],
) -> None:
    directory, group = odd_run
    before = dict(files(directory))
    assert (
        run("explain", directory.uri, group).output == run("explain", directory.uri, group).output
    )
    assert explained(directory, group) == explained(directory, group)
    assert dict(files(directory)) == before


def test_parts_that_are_gone_or_damaged_are_said_and_the_rest_is_told(
    odd_run: tuple[RunDirectory, str],
) -> None:
    directory, group = odd_run
    whole = explained(directory, group)
    path = Path(directory.path(part_name(SCORES, 2)))
    path.write_bytes(b"PAR1")
    damaged = explained(directory, group)
    assert "shard-000002.parquet is damaged" in damaged["no_shards"]
    path.unlink()
    gone = explained(directory, group)
    assert gone["no_shards"] == "1 of 6 parts are gone, the first of shard 2"
    for found in (damaged, gone):
        assert (found["num_shards"], found["without_shard"]) == (None, [])
        for format_, entry in by_format(found).items():
            assert entry == by_format(whole)[format_] | {"shards": []}


def test_group_seen_in_one_shard_alone_has_no_score_without_it(
    odd_run: tuple[RunDirectory, str],
) -> None:
    directory, group = odd_run
    other = load_problem(RunState.open(directory))[0].searched[0].name
    for shard in set(range(NUM_SHARDS)) - {ODD_SHARD}:
        table = directory.read_table(part_name(SCORES, shard), "scores").to_pylist()
        unseen = {"elementwise_sum": None, "token_sum": None}
        rows = [row | (unseen if row["group"] == other else {}) for row in table]
        directory.write_table(part_name(SCORES, shard), "scores", rows)
    found = explained(directory, group)
    assert {"shard": ODD_SHARD, "format": None} in found["without_shard"]
    assert "without shard 3 some group has no score" in run("explain", directory.uri, group).output


def test_unsearched_group_says_why(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    found = explained(directory, "lm_head")
    assert (found["is_searched"], found["chosen"]) == (False, "none")
    assert found["reason"] == "disabled by 'lm_head'"
    shown = run("explain", directory.uri, "lm_head").output
    assert "not searched, stays in 16 bits (0.03 MiB): disabled by 'lm_head'" in shown


def test_refined_solution_is_compared_with_itself(make_run: Any) -> None:
    """It loses more by prediction than the scores' own choice, to which its flips may go back."""
    directory = make_run(formats=FORMATS)
    options = SolveOptions(bits=7.0)
    solve_run(directory, options, folder="")
    state = RunState.open(directory)
    problem, scores = load_problem(state)
    best = search(problem, scores, options)
    group = next(g for g, f in best.formats.items() if f == "wint8_aint8")
    formats = best.formats | {group: "wint4_afp16"}
    score = math.fsum(scores[g, f] for g, f in formats.items() if f != "none")
    worse = Allocation(
        formats=formats, score=score, costs=best.costs, optimality_gap=0.0, is_satisfied=True
    )
    write_solution(state, problem, scores, options, worse, "scan-refined")
    name = "solutions/scan-refined/manifest.json"
    directory.write_json(name, directory.read_json(name) | {"refinement": {}})
    found = explained(directory, group, "--solution", "scan-refined")
    assert (found["is_refined"], found["chosen"]) == (True, "wint4_afp16")
    assert found["plan_score"] == pytest.approx(score)
    back = by_format(found)["wint8_aint8"]["flip"]
    assert back["change"] == pytest.approx(best.score - score)
    assert back["other_groups"] == []
    shown = run("explain", directory.uri, group, "--solution", "scan-refined").output
    assert "chosen by measured KL" in shown


def test_imported_run_has_prices_but_no_shards(tmp_path: Path) -> None:
    def entry(score: float) -> dict[str, Any]:
        names = [
            "INT4(effective-bits: 4.0)",
            "FP8(effective-bits: 8.0)",
            "NONE(effective-bits: 16.0)",
        ]
        return {"formats": names, "scores": [score, score / 8, 0], "costs": [25, 50, 100]}

    layers = {"a.quant_recipe": entry(1.0), "b.quant_recipe": entry(3.0), "c": entry(2.0)}
    layers["d"] = {"formats": ["NONE(effective-bits: 16.0)"], "scores": [0], "costs": [100]}
    manifest = tmp_path / "manifest.json"
    manifest.write_text(
        json.dumps({"scheme": {"auto_quantize_bits": 10}, "layer_sensitivity": layers})
    )
    directory = RunDirectory(str(tmp_path / "run"))
    assert run("import", manifest, "--out", directory.uri).exit_code == 0
    found = explained(directory, "b")
    assert (found["chosen"], found["unit"]) == ("FP8", "no unit (imported)")
    assert (found["num_shards"], found["num_resamples"]) == (None, None)
    assert found["no_shards"] == "imported scores have no shards"
    assert found["plan_score"] == pytest.approx(6 / 8)
    flips = {f: entry["flip"] for f, entry in by_format(found).items()}
    assert (flips["INT4"]["change"], flips["INT4"]["other_groups"]) == (3 - 3 / 8, [])
    assert flips["none"]["change"] == pytest.approx(3 - 6 / 8)
    assert flips["none"]["other_groups"] == [
        {"group": group, "from": "FP8", "to": "INT4"} for group in "ac"
    ]
    shown = run("explain", directory.uri, "b").output
    assert "no unit (imported)" in shown
    assert explained(directory, "d")["reason"] == "the manifest offers only NONE"


# --- names

GROUPS = {
    f"model.layers.{layer}.{name}": [f"model.layers.{layer}.{own}" for own in (name, *others)]
    for layer in (1, 11, 12)
    for name, *others in (("attn.q_proj", "attn.k_proj"), ("mlp.down_proj",))
} | {"lm_head": ["lm_head"]}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.11.mlp.down_proj", "model.layers.11.mlp.down_proj"),
        ("model.layers.11.attn.k_proj", "model.layers.11.attn.q_proj"),
        ("11.attn.k_proj", "model.layers.11.attn.q_proj"),
        ("1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ("1.mlp", "model.layers.1.mlp.down_proj"),
        ("12.attn.k", "model.layers.12.attn.q_proj"),
        ("head", "lm_head"),
    ],
)
def test_name_that_fits_one_group_is_found(name: str, group: str) -> None:
    assert find_group(name, GROUPS) == group


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("layers.1", "fits 2 groups; give one of: model.layers.1.attn.q_proj, model.layers.1.mlp"),
        ("proj", "fits 6 groups; give one of: .*, \\.\\.\\. \\(6 in all\\)$"),
        ("model.layers.13.mlp.down_proj", "closest: model.layers.1[12]?.mlp.down_proj"),
        ("lmhead", "no group or module is named 'lmhead'; closest: lm_head$"),
        ("", "no group or module is named ''; closest: "),
    ],
)
def test_name_that_fits_none_or_many_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        find_group(name, GROUPS)


def test_command_refuses_in_one_line(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    no_solution = run("explain", directory.uri, "lm_head")
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    refused = {
        "is not a solution; solutions of the run: none": no_solution,
        "fits 2 groups; give one of: ": run("explain", directory.uri, "down_proj"),
        "no group or module is named 'x.y'; closest: ": run("explain", directory.uri, "x.y"),
        "solutions/b/ is not a solution": run("explain", directory.uri, "lm_head", "--solution=b"),
        "is not a run directory": run("explain", Path(directory.uri).parent, "lm_head"),
    }
    for text, done in refused.items():
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert text in done.stderr


def test_page_of_an_explanation_is_escaped(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    told = explain_group(directory, "0.mlp.down_proj")
    page = told._repr_html_()
    assert page.count("<tr>") == 4
    assert "model.layers.0.mlp.down_proj" in page
    evil = Explanation(**(vars(told) | {"group": EVIL, "module_names": [EVIL], "no_shards": EVIL}))
    assert EVIL not in evil._repr_html_()
    assert evil._repr_html_().count("&lt;b&gt;evil") == 3
