"""Answers to benchmark tasks, against lm-eval on models that ``mtq.quantize`` made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluations import make_evaluation, quantize, random_choices
from small_models import make_tokenizer

from autoquant_ray.models.find import ModelRef
from autoquant_ray.quantize.modules import UNQUANTIZED

pytest.importorskip("lm_eval")

FORMATS = ("wint4_afp16:max", "wfp8_afp8")
LENGTHS = [24, 17, 9, 24]
LIKELIHOODS = [("w3 w5 w8 w2", " w7 w1"), ("w3 w5 w8 w2", " w4"), ("w9 w9", " w2 w30 w6")] * 3
TEXTS = [("w3 w5 w8 w2 w11 w3",), ("w1 w2 w3",)]
WRITTEN = [
    (text, {"until": ["w9 "], "do_sample": False, "max_gen_toks": 5})
    for text in ("w3 w5 w8", "w30 w2", "w4 w4 w4 w6 w8 w30")
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "w1", "pad_token": "w0"})
    tokenizer.save_pretrained(folder)
    return folder


def answers_of_lm_eval(model: Any, folder: Path) -> tuple[list[Any], list[Any], list[Any]]:
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)

    def asked(kind: str, requests: list[Any]) -> list[Any]:
        instances = [
            Instance(request_type=kind, doc={}, arguments=request, idx=n)
            for n, request in enumerate(requests)
        ]
        return list(getattr(lm, kind)(instances, disable_tqdm=True))

    return (
        asked("loglikelihood", LIKELIHOODS),
        asked("loglikelihood_rolling", TEXTS),
        asked("generate_until", WRITTEN),
    )


@pytest.mark.parametrize("room", [2**30, 0], ids=["kept", "made again"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_answers_are_those_of_the_model_that_modelopt_makes(
    family: str,
    room: int,
    make_scorer: Any,
    make_samples: Any,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autoquant_ray.evaluate.runner.room_for_visit", lambda *_: room)
    prepared = make_scorer(family, FORMATS, is_modelopt_form=True)
    samples = make_samples(LENGTHS, seed=3)
    ref = ModelRef(name="in memory", path=str(tokenizer_folder))
    runner = make_evaluation(prepared, samples, model=ref)
    (choice,) = random_choices(len(prepared.plan.searched), 1, num_formats=2)
    unquantized = (UNQUANTIZED,) * len(choice)
    seen = []
    for chosen in (choice, unquantized):
        model = quantize(prepared, chosen, samples) if chosen is choice else prepared.model
        likelihoods, rolling, written = answers_of_lm_eval(model, tokenizer_folder)
        ours = runner.answer("loglikelihood", LIKELIHOODS, chosen)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in likelihoods]
        assert [v for v, _ in ours] == pytest.approx([v for v, _ in likelihoods], rel=2e-3)
        assert runner.answer("loglikelihood_rolling", TEXTS, chosen) == pytest.approx(
            rolling, rel=2e-3
        )
        assert runner.answer("generate_until", WRITTEN, chosen) == written
        seen.append(([value for value, _ in ours], written))
    assert seen[0][0] != pytest.approx(seen[1][0], rel=2e-3), "quantization changes something"
