"""Token ids and positions that a model has room for: read off its skeleton, checked before work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import run

from autoquant_ray.data.samples import RichSample, require_within
from autoquant_ray.errors import DataError, ModelError
from autoquant_ray.models.context import SampleLimits, limits_of
from autoquant_ray.models.find import find_model
from autoquant_ray.models.tokenizer import require_ids_within

LENGTH = 24
TABLES: dict[str, Any] = {
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=LENGTH),
    "opt": transformers.OPTConfig(
        hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=LENGTH,
    ),
    "gptj": transformers.GPTJConfig(
        n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=LENGTH
    ),
    "mpt": transformers.MptConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=LENGTH),
    "prophetnet": transformers.ProphetNetConfig(
        hidden_size=16, num_decoder_layers=1, num_decoder_attention_heads=2, decoder_ffn_dim=16,
        num_encoder_layers=1, num_encoder_attention_heads=2, encoder_ffn_dim=16,
        max_position_embeddings=LENGTH, is_decoder=True, is_encoder_decoder=False,
        add_cross_attention=False,
    ),
    "roberta": transformers.RobertaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, is_decoder=True, pad_token_id=1,
    ),
    "bart": transformers.BartConfig(
        d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=LENGTH, is_decoder=True, is_encoder_decoder=False, pad_token_id=1,
    ),
    "xglm": transformers.XGLMConfig(
        d_model=16, num_layers=1, attention_heads=2, ffn_dim=16, max_position_embeddings=LENGTH,
    ),
    "llama": transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", TABLES)
def test_positions_are_those_up_to_which_the_model_runs(family: str) -> None:
    config = TABLES[family]
    config.vocab_size = 64
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    limits = limits_of(model)
    assert limits.token_ids == 64
    longest = 0
    for length in (*range(LENGTH - 3, LENGTH + 2), LENGTH + 3):
        try:
            with torch.no_grad():
                model(torch.full((1, length), 5))
        except (IndexError, RuntimeError):
            break
        longest = length
    assert limits.positions == (None if longest > LENGTH + 1 else longest)
    with torch.device("meta"):
        assert limits_of(transformers.AutoModelForCausalLM.from_config(config)) == limits


def test_samples_beyond_the_limits_are_refused_with_the_numbers() -> None:
    limits = SampleLimits(token_ids=64, positions=8)
    require_within([[1, 63], [2] * 8], limits, "d.txt")
    with pytest.raises(DataError, match=r"d\.txt has a sample of 9 tokens.*table of 8 positions"):
        require_within([[1, 2], [2] * 9], limits, "d.txt")
    with pytest.raises(DataError, match=r"has the token 64, but the model's embedding has 64 rows"):
        require_within([np.array([1, 64], dtype=np.int32)], limits, "d.txt")
    placeholder = RichSample(
        tokens_T=np.array([1, 64], dtype=np.int32),
        in_loss_T=np.array([True, False]),
        tensors={"pixel_values": np.zeros((1, 3), dtype=np.float32)},
    )
    require_within([placeholder], limits, "d.txt")
    require_within([[1, 10**6] * 9], SampleLimits(token_ids=10**7, positions=None), "d.txt")


def with_tokens(source: Path, folder: Path, tokens: list[str]) -> Path:
    """A copy of a model whose tokenizer has more tokens than its embedding."""
    shutil.copytree(source, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<filler_{number}>" for number in range(rows - len(tokenizer))])
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokenizer_beyond_the_embedding_stops_the_plan(model_folder: Any, tmp_path: Path) -> None:
    folder = with_tokens(model_folder("llama"), tmp_path / "m", ["<call>", "<result>"])
    result = run("plan", folder, "--formats", "wint8_afp16", "--device", "cpu")
    assert result.exit_code == 2
    assert "2 tokens of its tokenizer, the first '<call>' with number" in result.stderr
    assert "have no row in its embedding, which has" in result.stderr
    assert len(result.stderr) < 400 + len(str(folder))


def test_tokenizer_with_placeholders_beyond_the_embedding_is_fine(
    model_folder: Any, tmp_path: Path
) -> None:
    folder = with_tokens(model_folder("llama"), tmp_path / "m", ["<image_soft_token>", "[PAD]"])
    ref = find_model(str(folder))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    require_ids_within(ref, rows)
    with pytest.raises(ModelError, match=f"has {rows - 1};"):
        require_ids_within(ref, rows - 1)
    (tmp_path / "empty").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "empty")
    require_ids_within(find_model(str(tmp_path / "empty")), 1)


def test_plan_says_how_many_positions_there_are(tmp_path: Path) -> None:
    TABLES["opt"].architectures = ["OPTForCausalLM"]
    TABLES["opt"].save_pretrained(tmp_path)
    result = run("plan", tmp_path, "--formats", "wint8_afp16", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"samples: {LENGTH} tokens at most, by its table of positions" in result.stdout
