"""``explain``: prices of flips against all allocations, pins, refusals, the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from explanations import FORMATS, Everything, by_format, explained

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.certainty.explain import explain_group
from autoquant_ray.allocate.certainty.explanation import Explanation
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run, write_solution

EVIL = "<b>evil</b>"


def check_flips(
    explanation: dict[str, Any], everything: Everything, bits: float, **pins: str
) -> int:
    """Compare every flip of a group with all allocations; returns how many are not possible."""
    allocation = everything.best(bits, **pins)
    assert allocation is not None
    formats, score = allocation
    assert explanation["chosen"] == formats[explanation["group"]]
    num_impossible = 0
    for format_, entry in by_format(explanation).items():
        flip = entry["flip"]
        best = everything.best(bits, **(pins | {explanation["group"]: format_}))
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
            if best[0][group] != formats[group] and group != explanation["group"]
        }
    return num_impossible


def test_price_of_every_flip_is_that_of_the_best_allocation_with_it(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    everything = Everything.of(directory)
    num_others = 0
    for group in everything.groups:
        explanation = explained(directory, group)
        check_flips(explanation, everything, 7.0)
        assert {entry["format"] for entry in explanation["formats"]} == {*FORMATS, "none"}
        chosen = by_format(explanation)[explanation["chosen"]]["flip"]
        assert (chosen["change"], chosen["other_groups"]) == (0.0, [])
        num_others += sum(len(entry["flip"]["other_groups"]) for entry in explanation["formats"])
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
    result = run("explain", directory.uri, everything.groups[0], "--solution", "bits-4.30")
    assert "none: not possible: --bits 4.3 cannot be met: reachable is " in result.output


def test_pins_of_the_solution_hold_and_its_own_pin_gives_way(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    first, second = Everything.of(directory).groups[:2]
    pins = {first: "none", second: "wint4_afp16"}
    name = solve_run(directory, SolveOptions(bits=8.5, pins=pins)).name
    everything = Everything.of(directory)
    explanation = explained(directory, first, "--solution", name)
    assert (explanation["pin"], explanation["chosen"]) == ("none", "none")
    for format_, entry in by_format(explanation).items():
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
    explanation = explained(directory, "layers.0.self_attn.o_proj", "--solution", name)
    assert explanation["allow"] == {"*.o_proj": ["wint8_aint8", "none"]}
    flip = by_format(explanation)["wint4_afp16"]["flip"]
    assert flip["is_possible"] is False
    assert flip["reason"] == "--allow *.o_proj=wint8_aint8,none leaves it out"
    assert by_format(explanation)["none"]["flip"]["is_possible"] is True


def test_unsearched_group_says_why(make_run: Any) -> None:
    directory = make_run(formats=FORMATS)
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    explanation = explained(directory, "lm_head")
    assert (explanation["is_searched"], explanation["chosen"]) == (False, "none")
    assert explanation["reason"] == "disabled by 'lm_head'"
    shown = run("explain", directory.uri, "lm_head").output
    assert "not searched, stays in 16 bits (0.03 MiB): disabled by 'lm_head'" in shown


def test_refined_solution_is_compared_with_itself(make_run: Any) -> None:
    """It loses more by prediction than the scores' own choice, to which its flips may go back."""
    directory = make_run(formats=FORMATS)
    options = SolveOptions(bits=7.0)
    solve_run(directory, options, folder="")
    state = RunState.open(directory)
    scored_run = ScoredRun.read(state)
    problem, scores = scored_run.problem, scored_run.scores
    best = search(problem, scores, options)
    group = next(g for g, f in best.formats.items() if f == "wint8_aint8")
    formats = best.formats | {group: "wint4_afp16"}
    score = math.fsum(scores[g, f] for g, f in formats.items() if f != "none")
    worse = Allocation(
        formats=formats, score=score, costs=best.costs, optimality_gap=0.0, is_satisfied=True
    )
    write_solution(scored_run, options, worse, "scan-refined")
    name = "solutions/scan-refined/manifest.json"
    directory.write_json(name, directory.read_json(name) | {"refinement": {}})
    explanation = explained(directory, group, "--solution", "scan-refined")
    assert (explanation["is_refined"], explanation["chosen"]) == (True, "wint4_afp16")
    assert explanation["plan_score"] == pytest.approx(score)
    back = by_format(explanation)["wint8_aint8"]["flip"]
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
    explanation = explained(directory, "b")
    assert (explanation["chosen"], explanation["unit"]) == ("FP8", "no unit (imported)")
    assert (explanation["num_shards"], explanation["num_resamples"]) == (None, None)
    assert explanation["no_shards"] == "imported scores have no shards"
    assert explanation["plan_score"] == pytest.approx(6 / 8)
    flips = {f: entry["flip"] for f, entry in by_format(explanation).items()}
    assert (flips["INT4"]["change"], flips["INT4"]["other_groups"]) == (3 - 3 / 8, [])
    assert flips["none"]["change"] == pytest.approx(3 - 6 / 8)
    assert flips["none"]["other_groups"] == [
        {"group": group, "from": "FP8", "to": "INT4"} for group in "ac"
    ]
    shown = run("explain", directory.uri, "b").output
    assert "no unit (imported)" in shown
    assert explained(directory, "d")["reason"] == "the manifest offers only NONE"


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
    explanation = explain_group(directory, "0.mlp.down_proj")
    page = explanation._repr_html_()
    assert page.count("<tr>") == 4
    assert "model.layers.0.mlp.down_proj" in page
    evil = Explanation(
        **(vars(explanation) | {"group": EVIL, "module_names": [EVIL], "no_shards": EVIL})
    )
    assert EVIL not in evil._repr_html_()
    assert evil._repr_html_().count("&lt;b&gt;evil") == 3
