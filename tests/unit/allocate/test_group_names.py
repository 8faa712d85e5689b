"""Names of groups: a part of one is enough if it fits one group."""

from __future__ import annotations

import pytest

from autoquant_ray.allocate.group_names import find_group
from autoquant_ray.errors import ConfigError

GROUPS = {
    f"model.layers.{layer}.{name}": [f"model.layers.{layer}.{module}" for module in (name, *others)]
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
