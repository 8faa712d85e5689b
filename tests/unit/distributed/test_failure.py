"""Decisions about dead workers and failed shards, without Ray."""

from __future__ import annotations

import pickle

import pytest

from autoquant_ray import errors
from autoquant_ray.distributed.failure import MAX_STARTS, Decision, FailurePolicy, start_in_time


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


class Starts:
    """A start that fails with these errors, one after another, and then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.log: list[str] = []
        self._errors = list(errors)

    def start(self) -> None:
        self.log.append("start")
        if self._errors:
            raise self._errors.pop(0)

    def clean_up(self) -> None:
        self.log.append("clean up")


TIMEOUTS = [
    TimeoutError("no node"),
    RuntimeError("Timed out waiting for node info for node_id=3f."),
    Exception("The current node timed out during startup. This could happen because ..."),
    RuntimeError("Failed to connect to GCS within 60 seconds"),
]


@pytest.mark.parametrize("error", TIMEOUTS, ids=str)
def test_start_that_times_out_is_tried_again_after_cleaning_up(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    starts = Starts(error)
    start_in_time(starts.start, starts.clean_up)
    assert starts.log == ["start", "clean up", "start"]
    (record,) = caplog.records
    assert str(error) in record.getMessage()


def test_start_that_never_is_in_time_ends_with_the_last_error() -> None:
    starts = Starts(*TIMEOUTS)
    with pytest.raises(RuntimeError, match=r"timed out during startup.* \(3 times\)"):
        start_in_time(starts.start, starts.clean_up)
    assert starts.log == ["start", "clean up"] * MAX_STARTS


def test_start_that_fails_for_another_reason_is_not_tried_again() -> None:
    starts = Starts(ValueError("address 'local' is wrong"))
    with pytest.raises(ValueError, match="is wrong"):
        start_in_time(starts.start, starts.clean_up)
    assert starts.log == ["start"]
