"""Decisions about dead workers and failed shards, without Ray."""

from __future__ import annotations

import pickle

import pytest

from autoquant_ray import errors
from autoquant_ray.distributed.failure import Decision, FailurePolicy


def test_policy_third_death_of_a_shard_quarantines_it() -> None:
    policy = FailurePolicy(max_replacements=10)
    decisions = [policy.on_worker_death(4) for _ in range(3)]
    assert decisions == [Decision.RETRY, Decision.RETRY, Decision.QUARANTINE]
    assert policy.on_worker_death(5) is Decision.RETRY


def test_policy_idle_death_blames_no_shard() -> None:
    policy = FailurePolicy(max_replacements=10)
    assert [policy.on_worker_death(None) for _ in range(5)] == [Decision.RETRY] * 5
    assert policy.kills == {}


def test_policy_replacements_end_with_the_budget() -> None:
    policy = FailurePolicy(max_replacements=2)
    assert [policy.take_replacement() for _ in range(4)] == [True, True, False, False]


def test_policy_non_finite_is_quarantined_other_errors_fail() -> None:
    policy = FailurePolicy(max_replacements=2)
    assert policy.on_error(errors.NonFiniteError("nan")) is Decision.QUARANTINE
    assert policy.on_error(errors.WorkerError("bug")) is Decision.FAIL
    assert policy.on_error(errors.ModelError("gone")) is Decision.FAIL


@pytest.mark.parametrize(
    "kind",
    [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)],
)
def test_errors_survive_pickling(kind: type[errors.AutoQuantError]) -> None:
    error = pickle.loads(pickle.dumps(kind("shard 3: it broke")))
    assert type(error) is kind
    assert str(error) == "shard 3: it broke"
    assert error.exit_code in {1, 2, 4}
