"""Models that are found on the hub, and those that the installed transformers does not know."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from command_line import NO_CLUSTER, refusal, run
from gguf_files import random_llama, write_llama

from autoquant_ray.errors import ModelError
from autoquant_ray.models.find import find_model, fingerprint_model, upgrade_advice
from autoquant_ray.models.load import build_skeleton

PYPROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))
REQUIRED = PYPROJECT["project"]["dependencies"]
UNKNOWN = {
    "whole": ({"model_type": "newest", "architectures": ["NewestForCausalLM"]}, "newest"),
    "part": ({"model_type": "llava", "text_config": {"model_type": "newest_text"}}, "newest_text"),
}


@pytest.mark.parametrize(("config", "kind"), UNKNOWN.values(), ids=UNKNOWN)
def test_type_that_transformers_does_not_know_gets_advice_within_the_bounds(
    config: dict[str, object], kind: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refusal(run("plan", tmp_path))
    assert f"transformers {transformers.__version__} does not know the type '{kind}'" in line
    assert "git+https" not in line
    assert "--upgrade transformers" not in line


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64}
UNBUILT: dict[str, tuple[dict[str, object], str]] = {
    "text for a number": (LLAMA | {"hidden_size": "64"}, "Field 'hidden_size' expected int"),
    "unknown activation": (LLAMA | {"hidden_act": "other"}, "cannot be built from its config"),
    "no heads": (LLAMA | {"num_attention_heads": 0}, ""),
    "a part without a type": ({"model_type": "musicgen", "text_encoder": None}, "'text_encoder'"),
    "a draft of a model": ({"model_type": "gemma4_assistant"}, "has no attribute 'vocab_size'"),
    "an unregistered class": ({"model_type": "evolla"}, "EvollaConfig"),
}


@pytest.mark.parametrize(("config", "words"), UNBUILT.values(), ids=UNBUILT)
def test_config_that_transformers_cannot_build_is_refused_in_a_line(
    config: dict[str, object], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in refusal(run("plan", tmp_path))


@pytest.fixture
def transformers_log() -> Iterator[io.StringIO]:
    """What transformers logs, as a terminal would show it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


@pytest.mark.parametrize("passed_on", [False, True], ids=["", "CI"])
def test_refusal_is_the_only_line_where_transformers_warns_first(
    passed_on: bool,
    transformers_log: io.StringIO,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # where the environment says CI, transformers passes its records on to the root's handlers
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", passed_on)
    rope = {"rope_type": "no-such", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"rope_parameters": rope}))
    assert "cannot be built from its config" in refusal(run("plan", tmp_path))
    assert transformers_log.getvalue() == ""


def test_what_transformers_warns_of_is_said_where_the_model_can_be_read(
    transformers_log: io.StringIO, tmp_path: Path
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "odd": 1}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | sizes | {"rope_parameters": rope}))
    assert run("plan", tmp_path).exit_code == 0
    assert "{'odd'}" in transformers_log.getvalue()


def test_advice_names_the_newest_release_that_is_allowed() -> None:
    (required,) = (line for line in REQUIRED if line.startswith("transformers"))
    bound = re.search(r"<(5\.\d+)", required)
    assert bound is not None
    assert f"pip install --upgrade 'transformers<{bound[1]}'" in upgrade_advice("5.10.1", REQUIRED)


def test_advice_at_the_newest_release_is_not_to_upgrade() -> None:
    requirements = ["torch>=2.9", "transformers<5.19,>=5.10"]
    advice = upgrade_advice("5.18.0", requirements)
    assert "pip" not in advice
    assert "none from 5.19 on" in advice
    assert "'transformers<5.19'" in upgrade_advice("5.17.2.dev0", requirements)


def test_model_that_the_cache_lacks_is_refused_where_the_hub_may_not_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    line = refusal(run("plan", "some/model"))
    assert "some/model is no folder here and not in the hub's cache" in line
    assert "HF_HUB_OFFLINE" in line


def test_hub_that_does_not_answer_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    connect = socket.socket.connect
    monkeypatch.setattr(
        socket.socket, "connect", lambda *words: (asked.append(words[1]), connect(*words))[1]
    )
    line = refusal(run("plan", "some/model"))
    assert "the hub http://127.0.0.1:9 does not answer" in line
    assert "HF_ENDPOINT" in line
    assert asked == [("127.0.0.1", 9)]


def test_fingerprint_of_a_hub_model_names_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    transformers.LlamaConfig().save_pretrained(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint_model(find_model("some/model")) == f"some/model@{commit}"


def sharded(model_folder: Any, folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


SCAN = ("--data", "pydoc", "--formats", "wint8_afp16", "--bits", "9", "--address", NO_CLUSTER)


def test_folder_that_lacks_files_of_its_index_is_refused_before_work(
    model_folder: Any, tmp_path: Path
) -> None:
    folder = sharded(model_folder, tmp_path / "m")
    scan = ("scan", folder, "--out", tmp_path / "run", *SCAN)
    parts = sorted(folder.glob("*.safetensors"))
    parts[1].unlink()
    line = refusal(run(*scan))
    assert f"lacks {parts[1].name} of the {len(parts)} files that its index lists" in line
    (folder / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(run(*scan))


@pytest.mark.parametrize("names", [[1], {"lm_head.weight": 7}, "all"])
def test_index_that_names_no_files_is_refused(
    names: Any, model_folder: Any, tmp_path: Path
) -> None:
    folder = sharded(model_folder, tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "does not name the file of each weight" in refusal(run("plan", folder))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("b.gguf", "A.GGUF"), r"holds several GGUF files: A\.GGUF, b\.gguf; give one"),
        (("adapter_config.json",), r"holds an adapter, not a model; merge it into its model first"),
        (("notes.txt",), r"holds no config\.json and no GGUF file; give the folder of a model"),
    ],
)
def test_folder_without_a_config_is_refused_with_what_to_do(
    names: Sequence[str], problem: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=problem) as caught:
        find_model(str(tmp_path))
    assert caught.value.exit_code == 2


def test_ending_of_a_gguf_file_may_be_in_capitals(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "A.GGUF", random_llama())
    for given in (file, tmp_path):
        ref = find_model(str(given))
        assert ref.gguf_file == "A.GGUF"
        assert build_skeleton(ref).config.num_hidden_layers == 2
