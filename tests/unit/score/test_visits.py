"""How steps are grouped into visits, and which rows of a step predict."""

from __future__ import annotations

import torch

from autoquant_ray.score.visits import VisitPlanner, make_step, predicting_rows


def samples(*lengths: int) -> list[list[int]]:
    return [list(range(1, length + 1)) for length in lengths]


def test_visits_hold_as_many_steps_as_there_is_room_for() -> None:
    chosen = samples(10, 10, 10, 10, 10)
    planner = VisitPlanner(step_tokens=10, token_bytes=4, room=80)
    assert [len(visit) for visit in planner.visits(chosen)] == [2, 2, 1]
    assert planner.input_bytes(chosen) == 5 * 40


def test_visits_without_room_are_of_one_step_and_lose_nothing() -> None:
    chosen = samples(3, 9, 4, 7)
    planner = VisitPlanner(step_tokens=12, token_bytes=4, room=0)
    visits = planner.visits(chosen)
    assert all(len(visit) == 1 for visit in visits)
    assert sorted(p for visit in visits for step in visit for p in step) == [0, 1, 2, 3]


def test_step_is_padded_on_the_right_and_masked() -> None:
    ids_BS, mask_BS, inputs = make_step(samples(3, 1), torch.device("cpu"))
    assert ids_BS.tolist() == [[1, 2, 3], [1, 0, 0]]
    assert mask_BS is not None
    assert not inputs
    assert mask_BS.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert make_step(samples(2, 2), torch.device("cpu"))[1] is None


def test_predicting_rows_are_all_real_tokens_but_the_last() -> None:
    assert predicting_rows(samples(3, 2, 4)).tolist() == [0, 1, 4, 8, 9, 10]
