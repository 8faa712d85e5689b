"""How steps are grouped into visits, and which rows of a step predict."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from chats import made

from autoquant_ray.score.visits import VisitPacker, make_step, predicting_rows


def samples(*lengths: int) -> list[list[int]]:
    return [list(range(1, length + 1)) for length in lengths]


def test_visits_hold_as_many_steps_as_there_is_room_for() -> None:
    chosen = samples(10, 10, 10, 10, 10)
    packer = VisitPacker(step_tokens=10, token_bytes=4, room=80)
    assert [len(visit) for visit in packer.visits(chosen)] == [2, 2, 1]
    assert packer.input_bytes(chosen) == 5 * 40


def test_visits_without_room_are_of_one_step_and_lose_nothing() -> None:
    chosen = samples(3, 9, 4, 7)
    packer = VisitPacker(step_tokens=12, token_bytes=4, room=0)
    visits = packer.visits(chosen)
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


def test_steps_hold_samples_of_one_kind_and_join_their_images() -> None:
    samples: list[Any] = [
        np.arange(4, dtype=np.int32),
        made(3, [2], images=2).sample,
        made(5, [2, 4], images=1).sample,
        [1, 2],
    ]
    (first, second), *rest = [
        step for visit in VisitPacker(100, 1, 0).visits(samples) for step in visit
    ]
    assert [sorted((first, second)), *map(sorted, rest)] == [[0, 3], [1, 2]]
    chosen = [samples[position] for position in rest[0]]
    step = make_step(chosen, torch.device("cpu"))
    assert step.ids_BS.shape == (2, 5)
    assert step.inputs["pixel_values"][:, 0].tolist() == [5, 3, 3]
    assert step.inputs["mm_token_type_ids"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert predicting_rows(chosen).tolist() == [1, 3, 6]
