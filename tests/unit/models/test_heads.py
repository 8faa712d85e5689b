"""Models without a head over a vocabulary are refused by what transformers says of them."""

from pathlib import Path

import pytest
import transformers

from autoquant_ray.errors import ModelError
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.load import require_language_model


def test_a_head_that_transformers_does_not_name_is_refused_by_that(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    whole = transformers.LlamaForCausalLM(config)
    ref = ModelRef(name="model", path=str(tmp_path))
    require_language_model(whole, ref)
    with pytest.raises(ModelError, match="LlamaModel, for which transformers names no linear head"):
        require_language_model(whole.model, ref)
