"""Scores by domain, plans by domain, and who pays for them."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from autoquant_ray.allocate.domains import DomainScores, read_domain_scores
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun, solution_options
from autoquant_ray.cli.main import main
from autoquant_ray.config.domain_weights import normalised, parse_weights
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import rewrite_reports, solve_run

DOMAINS = ("code", "chat", "code", "chat", "code", "law")
BITS = 6.0


@pytest.fixture
def domain_run(make_run: Any) -> RunDirectory:
    """Six shards of three domains; law has one."""
    run: RunDirectory = make_run(domains=DOMAINS, num_shards=len(DOMAINS))
    return run


def domains_of(run: RunDirectory) -> DomainScores:
    scores = read_domain_scores(RunState.open(run))
    assert scores is not None
    return scores


def manifest_of(run: RunDirectory, name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = run.read_json(f"solutions/{name}/manifest.json")
    return manifest


def best_losses(run: RunDirectory, bits: float) -> np.ndarray[Any, Any]:
    """Losses (plans, domains) of all allocations within a budget, by trying everything."""
    problem = ScoredRun.read(RunState.open(run)).problem
    domains = domains_of(run)
    limit = bits * sum(group.num_weights for group in problem.searched) / 8
    menus = [list(group.rows) for group in problem.searched]
    shape = [range(len(menu)) for menu in menus]
    picked = np.array(list(itertools.product(*shape)))

    def total(value: Any) -> Any:
        tables = [
            np.array([value(group, name) for name in menu])
            for group, menu in zip(problem.searched, menus, strict=True)
        ]
        return sum(table[picked[:, g]] for g, table in enumerate(tables))

    costs = total(lambda group, name: group.cost(name, "storage"))
    losses = [
        total(lambda group, name, s=scores: 0.0 if name == NONE else s[group.name, name])
        for scores in domains.scores.values()
    ]
    return np.stack(losses, axis=1)[costs <= limit * (1 + 1e-12)]


def test_domains_leave_the_whole_as_it_is(make_run: Any, domain_run: RunDirectory) -> None:
    plain = make_run(num_shards=len(DOMAINS), name="plain")
    for name in ("sensitivity.parquet", "resampling.parquet"):
        assert plain.read_bytes(name) == domain_run.read_bytes(name)
    for name in ("domain_sensitivity.parquet", "domain_resampling.parquet"):
        assert not plain.exists(name)


def test_domain_scores_are_the_sums_of_their_own_shards(domain_run: RunDirectory) -> None:
    table = domain_run.read_table("domain_sensitivity.parquet").to_pylist()
    assert {row["domain"]: row["num_shards"] for row in table} == {"chat": 2, "code": 3, "law": 1}
    for row in table:
        shards = [s for s, name in enumerate(DOMAINS) if name == row["domain"]]
        sums = []
        for shard in shards:
            part = domain_run.read_table(f"scores/shard-{shard:06d}.parquet").to_pylist()
            key = (row["group"], row["format"])
            sums += [p["elementwise_sum"] for p in part if (p["group"], p["format"]) == key]
        assert row["score"] == pytest.approx(0.5 * math.fsum(sums) / (50 * len(shards)), rel=1e-14)
        assert row["num_tokens"] == 50 * len(shards)
        assert (row["score_stderr"] is None) == (row["domain"] == "law")


def test_domain_without_a_scored_shard_is_left_out(domain_run: RunDirectory) -> None:
    from autoquant_ray.stages.domain_scores import write_domain_scores

    state = RunState.open(domain_run)
    state.record.quarantined = [{"shard": 5, "stage": "score", "reason": "made up"}]
    rows = domain_run.read_table("plan.parquet").to_pylist()
    write_domain_scores(state, rows, "elementwise")
    assert set(domains_of(domain_run).scores) == {"chat", "code"}
    with pytest.raises(ConfigError, match="no scores of a domain 'law'; it has: chat, code"):
        solve_run(domain_run, SolveOptions(bits=BITS, domains={"law": 1.0}))


def test_weighted_allocation_is_the_best_of_all(domain_run: RunDirectory) -> None:
    options = SolveOptions(bits=BITS, domains={"code": 3, "chat": 1})
    solution = solve_run(domain_run, options)
    weights = np.array([0.25, 0.75, 0.0])  # chat, code, law
    expected = float((best_losses(domain_run, BITS) @ weights).min())
    assert solution.summary["score"] == pytest.approx(expected, rel=1e-9)
    domains = solution.summary["domains"]
    assert {name: domain["weight"] for name, domain in domains.items()} == {
        "chat": 0.25,
        "code": 0.75,
        "law": 0.0,
    }
    total = math.fsum(domain["weight"] * domain["predicted_kl_nats"] for domain in domains.values())
    assert total == pytest.approx(expected, rel=1e-9)


def test_worst_domain_allocation_is_the_best_of_all(domain_run: RunDirectory) -> None:
    solution = solve_run(domain_run, SolveOptions(bits=BITS, worst_domain=True))
    expected = float(best_losses(domain_run, BITS).max(axis=1).min())
    assert solution.summary["score"] == pytest.approx(expected, rel=1e-9)
    assert solution.summary["optimality_gap"] < 1e-6
    domains = solution.summary["domains"].values()
    assert max(domain["predicted_kl_nats"] for domain in domains) == solution.summary["score"]
    assert solution.summary["effective_bits"] <= BITS + 1e-9
    assert solution.certainty is None


def test_equal_allocation_stands_beside_every_allocation(domain_run: RunDirectory) -> None:
    weights = dict.fromkeys(("code", "chat", "law"), 1.0)
    equal = solve_run(domain_run, SolveOptions(bits=BITS, domains=weights))
    for options in (SolveOptions(bits=BITS), SolveOptions(bits=BITS, worst_domain=True)):
        summary = solve_run(domain_run, options).summary
        for name, domain in summary["domains"].items():
            assert domain["equal_kl_nats"] == equal.summary["domains"][name]["predicted_kl_nats"]


def test_predicted_kl_stays_that_of_all_tokens(domain_run: RunDirectory) -> None:
    plain = solve_run(domain_run, SolveOptions(bits=BITS))
    one_sided = solve_run(domain_run, SolveOptions(bits=BITS, domains={"law": 1.0}))
    assert plain.summary["predicted_kl_nats"] == plain.summary["score"]
    law = one_sided.summary["domains"]["law"]["predicted_kl_nats"]
    assert one_sided.summary["score"] == pytest.approx(law, rel=1e-12)
    assert law < plain.summary["domains"]["law"]["predicted_kl_nats"]
    assert one_sided.summary["predicted_kl_nats"] > plain.summary["predicted_kl_nats"]
    tokens = [domain["num_tokens"] for domain in plain.summary["domains"].values()]
    shares = np.array(tokens) / sum(tokens)
    losses = [domain["predicted_kl_nats"] for domain in one_sided.summary["domains"].values()]
    assert one_sided.summary["predicted_kl_nats"] == pytest.approx(shares @ losses, rel=1e-9)


@pytest.mark.parametrize("objective", [{"domains": {"chat": 1.0}}, {"worst_domain": True}])
def test_constraints_hold_together_with_domains(
    objective: dict[str, Any], domain_run: RunDirectory
) -> None:
    group = next(iter(solve_run(domain_run, SolveOptions(bits=BITS)).formats))
    plain = solve_run(domain_run, SolveOptions(bits=8.0))
    size = round(plain.summary["weight_bytes"])
    solution = solve_run(
        domain_run,
        SolveOptions(
            bits=9.0,
            bytes=size,
            max_formats=2,
            pins={group: NONE},
            allow={"*mlp*": ("wint4_afp16", "wint8_aint8")},
            **objective,
        ),
    )
    assert solution.formats[group] == NONE
    assert len(set(solution.formats.values()) - {NONE}) <= 2
    assert solution.summary["weight_bytes"] <= size
    assert solution.summary["effective_bits"] <= 9.0
    for name, format_ in solution.formats.items():
        assert "mlp" not in name or format_ in ("wint4_afp16", "wint8_aint8")


def test_worst_domain_infeasible_budget_tells_the_range(domain_run: RunDirectory) -> None:
    with pytest.raises(InfeasibleBudgetError, match="reachable"):
        solve_run(domain_run, SolveOptions(bits=1.0, worst_domain=True))


def test_options_come_back_from_the_manifest(domain_run: RunDirectory) -> None:
    for options in (
        SolveOptions(bits=BITS, domains={"code": 1, "chat": 2}),
        SolveOptions(bits=BITS, worst_domain=True),
    ):
        solution = solve_run(domain_run, options)
        state = RunState.open(domain_run)
        start = f"solutions/{solution.name}/"
        stored_options = solution_options(state, start)
        assert stored_options == options
        assert stored_options.name == solution.name
        names = [
            candidate.name
            for candidate in collect_candidates(
                ScoredRun.read(state), start, ("random",), num_random=1
            )
        ]
        assert names == ["solution", "random 1"]


def test_names_of_solutions_differ_by_their_domains() -> None:
    names = [
        SolveOptions(bits=6, **options).name
        for options in (
            {},
            {"worst_domain": True},
            {"domains": {"a": 1, "b": 1}},
            {"domains": {"a": 1, "b": 2}},
        )
    ]
    assert names[:2] == ["bits-6.00", "bits-6.00-worst-domain"]
    assert len(set(names)) == 4
    assert SolveOptions(bits=6, domains={"b": 0.5, "a": 0.5}).name == names[2]


def test_certainty_of_weighted_allocation_is_that_of_its_domains(domain_run: RunDirectory) -> None:
    both = solve_run(domain_run, SolveOptions(bits=BITS, domains={"code": 1, "chat": 1}))
    assert both.certainty is not None
    assert both.certainty.num_buckets == 5
    assert both.certainty.null_score is not None
    assert both.certainty.null_score > both.summary["score"]
    assert set(both.certainty.kept.values()) != {1.0}
    lone = solve_run(domain_run, SolveOptions(bits=BITS, domains={"law": 1}))
    assert lone.certainty is None  # one shard shows no spread
    name = f"solutions/{lone.name}/manifest.json"
    assert domain_run.read_json(name)["stability"] is None


def test_certainty_of_one_domain_is_that_of_a_run_of_its_shards(make_run: Any) -> None:
    """All shards of one domain, and a second one without a weight: as if it were not there."""
    plain = make_run(num_shards=6, name="plain")
    with_other = make_run(num_shards=8, domains=("a",) * 6 + ("b",) * 2)
    expected = solve_run(plain, SolveOptions(bits=BITS)).certainty
    certainty = solve_run(with_other, SolveOptions(bits=BITS, domains={"a": 1.0})).certainty
    assert expected is not None
    assert certainty is not None
    assert certainty.null_score == pytest.approx(expected.null_score, rel=1e-9)
    for group, share in expected.kept.items():
        assert certainty.kept[group] == pytest.approx(share, abs=0.12)  # 200 other draws


def run_command(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_solve_command_takes_domains(domain_run: RunDirectory) -> None:
    arguments = ("solve", domain_run.uri, "--bits", "6", "--json")
    result = run_command(*arguments, "--domains", "code=2,chat=2")
    assert result.exit_code == 0, result.output
    solution = json.loads(result.stdout)
    assert solution["domains"]["code"]["weight"] == 0.5
    assert manifest_of(domain_run, solution["name"])["budget"]["domains"] == {
        "chat": 0.5,
        "code": 0.5,
    }
    worst = run_command("solve", domain_run.uri, "--bits", "6", "--worst-domain")
    assert worst.exit_code == 0, worst.output
    assert "in code: " in worst.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--domains", "code"), "'code' is not NAME=WEIGHT"),
        (("--domains", "code=x"), "'code=x' is not NAME=WEIGHT"),
        (("--domains", "code=1,code=2"), "'code' is named twice"),
        (("--domains", "code=-1"), "the weight of 'code' must be 0 or more"),
        (("--domains", "code=0"), "all weights are 0"),
        (("--domains", "kode=1"), "no scores of a domain 'kode'; it has: chat, code, law"),
        (("--domains", "code=1", "--worst-domain"), "exclude each other"),
    ],
)
def test_solve_command_refuses_in_one_line(
    arguments: tuple[str, ...], problem: str, domain_run: RunDirectory
) -> None:
    result = run_command("solve", domain_run.uri, "--bits", "6", *arguments)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not domain_run.exists("solutions")


def test_run_without_domains_says_how_to_get_them(make_run: Any) -> None:
    result = run_command("solve", make_run().uri, "--bits", "6", "--worst-domain")
    assert result.exit_code == 2
    assert "--domain-field" in result.stderr
    assert "Loss by domain" not in str(result.stdout)


def test_reports_say_who_pays(make_run: Any) -> None:
    run = make_run(domains=("co|de", "<b>chat", "co|de", "<b>chat"), num_shards=4)
    plain = solve_run(run, SolveOptions(bits=BITS))
    worst = solve_run(run, SolveOptions(bits=BITS, worst_domain=True))
    weighted = solve_run(run, SolveOptions(bits=BITS, domains={"co|de": 1}))
    rewrite_reports(run)
    texts = {
        solution.name: run.read_bytes(f"solutions/{solution.name}/report.md").decode()
        for solution in (plain, worst, weighted)
    }
    for text in texts.values():
        assert "## Loss by domain" in text
        assert "co\\|de" in text
        assert "&lt;b>chat" in text
    assert "All tokens count equally" in texts[plain.name]
    assert "| 50.0% |" in texts[plain.name]
    assert "proven optimal to within" in texts[worst.name]
    assert "smallest loss of the worst domain" in texts[worst.name]
    assert "domains weighted co\\|de 1" in texts[weighted.name]
    for solution in (plain, worst, weighted):
        page = run.read_bytes(f"solutions/{solution.name}/report.html").decode()
        assert "Loss by domain" in page
        assert "<b>chat" not in page
        for name, domain in solution.summary["domains"].items():
            assert f"{domain['predicted_kl_nats']:.4g}" in page, name


def test_reports_without_domains_do_not_mention_them(make_run: Any) -> None:
    run = make_run()
    solution = solve_run(run, SolveOptions(bits=BITS))
    assert "domains" not in solution.summary
    for name in ("report.md", "report.html"):
        assert b"Loss by domain" not in run.read_bytes(f"solutions/{solution.name}/{name}")


def test_weights_are_normalised_once() -> None:
    weights = normalised(parse_weights("b=1, a=2, c=0"))
    assert weights == {"a": 2 / 3, "b": 1 / 3}
    assert normalised(weights) == weights
    assert normalised({}) == {}
    assert parse_weights("a=b=0.5") == {"a=b": 0.5}
