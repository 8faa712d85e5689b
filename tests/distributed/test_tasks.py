"""``evaluate --tasks``: against lm-eval itself, on the model that ``mtq.quantize`` makes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml

from autoquant_ray import load_quantization_config
from autoquant_ray.runs.events import parse_event

lm_eval = pytest.importorskip("lm_eval")

NUM_DOCS = 70
"""More than are answered together."""
CHOICES = {
    "task": "word_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ],
}
WRITING = {
    "task": "word_writing",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["w9"], "do_sample": False, "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "num_fewshot": 1,
    "fewshot_split": "train",
}
FORMATS = "wint4_afp16:max,wint8_afp16"
"""Inputs stay: an int8 that is rounded the other way in another batch moves an answer."""
TASKS = "word_choice,word_writing"


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with local data."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(0)

    def words(number: int) -> str:
        return " ".join(f"w{n}" for n in torch.randint(40, (number,), generator=generator))

    rows = [
        {
            "question": words(3 + number % 7),
            "choices": [words(1 + n % 2) for n in range(4)],
            "answer": number % 4,
        }
        for number in range(NUM_DOCS)
    ]
    (folder / "words.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for task in (CHOICES, WRITING):
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(folder / "words.jsonl")},
            "test_split": "train",
            "metadata": {"version": 2.0},
        }
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(data | task))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Path:
    """A model whose tokenizer has a token that ends texts."""
    copy: Path = tmp_path_factory.mktemp("model") / "llama"
    shutil.copytree(model_folder("llama"), copy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"eos_token": "w1", "pad_token": "w0"})
    tokenizer.save_pretrained(copy)
    return copy


@pytest.fixture(scope="module")
def answered(
    tmp_path_factory: pytest.TempPathFactory,
    run_command: Any,
    scan_arguments: Any,
    folder: Path,
    tasks_dir: Path,
) -> Path:
    run: Path = tmp_path_factory.mktemp("answered") / "run"
    words = scan_arguments(run, "--samples", 6, "--bits", "5", "--formats", FORMATS)
    done = run_command(words[0], folder, *words[2:])
    assert done.returncode == 0, done.stderr
    done = run_command(*evaluate(run, tasks_dir, 2))
    assert done.returncode == 0, done.stderr
    assert "within noise" in done.stdout
    return run


def evaluate(run: Path, tasks_dir: Path, workers: int) -> list[Any]:
    words = ["evaluate", run, "--tasks", TASKS, "--tasks-dir", tasks_dir, "--workers", workers]
    return [*words, "--against", "uniform"]


def rows_of(run: Path, name: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = pq.read_table(run / "tasks.parquet").to_pylist()
    return {(row["task"], row["metric"]): row for row in rows if row["name"] == name}


def scores_by_lm_eval(model: Any, folder: Path, tasks_dir: Path) -> dict[str, Any]:
    """lm-eval's own evaluation of a loaded model."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=TASKS.split(","),
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        bootstrap_iters=10,
    )
    return dict(results)


def quantized_by_modelopt(folder: Path, run: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = load_quantization_config(json.loads((run / "manifest.json").read_text()))
    samples = [
        tokens
        for path in sorted((run / "samples").iterdir())
        for tokens in pq.read_table(path)["tokens"].to_pylist()
    ]

    def forward_loop(quantized: Any) -> None:
        for sample in samples:
            quantized(input_ids=torch.tensor([sample]), use_cache=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mtq.quantize(model, config, forward_loop)


def test_scores_are_those_of_lm_eval_on_the_quantized_model(
    answered: Path, folder: Path, tasks_dir: Path
) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    models = {"16 bits": plain, "solution": quantized_by_modelopt(folder, answered)}
    samples: dict[str, Any] = {}
    for name, model in models.items():
        results = scores_by_lm_eval(model, folder, tasks_dir)
        samples[name] = results["samples"]
        rows = rows_of(answered, name)
        assert rows.keys() == {
            ("word_choice", "acc"),
            ("word_choice", "acc_norm"),
            ("word_writing", "exact_match"),
        }
        for (task, metric), row in rows.items():
            expected = results["results"][task]
            assert row["value"] == pytest.approx(expected[f"{metric},none"], abs=1e-9)
            assert row["stderr"] == pytest.approx(expected[f"{metric}_stderr,none"], abs=1e-9)
            assert (row["num_samples"], row["task_version"]) == (NUM_DOCS, "2.0")
        assert [row["num_fewshot"] for row in rows.values()] == [0, 0, 1]
    row = rows_of(answered, "solution")["word_choice", "acc"]
    before, after = (
        torch.tensor([sample["acc"] for sample in samples[name]["word_choice"]], dtype=torch.double)
        for name in models
    )
    assert not torch.equal(before, after)
    assert row["difference"] == pytest.approx(float((after - before).mean()))
    error = (after - before).std() / NUM_DOCS**0.5
    assert row["difference_stderr"] == pytest.approx(float(error))


def test_log_likelihoods_are_those_of_lm_eval(
    answered: Path, folder: Path, tasks_dir: Path
) -> None:
    results = scores_by_lm_eval(quantized_by_modelopt(folder, answered), folder, tasks_dir)
    expected = [
        resps[0]
        for sample in sorted(results["samples"]["word_choice"], key=lambda s: s["doc_id"])
        for resps in sample["resps"]
    ]
    (allocation,) = {row["allocation"] for row in rows_of(answered, "solution").values()}
    parts = sorted((answered / "evaluation").glob(f"*/{allocation}/answers/*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    asked = [row for row in rows if row["text"] is None]
    assert len(asked) == 4 * NUM_DOCS
    for row in asked:
        value, is_greedy = expected[row["request"]]
        assert row["log_likelihood"] == pytest.approx(value, rel=1e-3, abs=1e-3)
        assert row["is_greedy"] == is_greedy
    written = {row["request"]: row["text"] for row in rows if row["text"] is not None}
    texts = {s["doc_id"]: s["resps"][0][0] for s in results["samples"]["word_writing"]}
    assert written == texts


def test_workers_and_resume_change_nothing(
    answered: Path, run_command: Any, tasks_dir: Path
) -> None:
    before = (answered / "tasks.parquet").read_bytes()
    parts = sorted((answered / "evaluation").glob("*/*/answers/*.parquet"))
    times = [part.stat().st_mtime_ns for part in parts]
    contents = [part.read_bytes() for part in parts]
    (answered / "tasks.parquet").unlink()
    parts[0].unlink()
    parts[-1].write_bytes(b"torn")
    done = run_command(*evaluate(answered, tasks_dir, 1))
    assert done.returncode == 0, done.stderr
    assert (answered / "tasks.parquet").read_bytes() == before
    assert [part.read_bytes() for part in parts] == contents
    assert [part.stat().st_mtime_ns for part in parts[1:-1]] == times[1:-1]


def test_events_are_those_of_the_stage(answered: Path) -> None:
    events = [parse_event(line) for line in (answered / "events.jsonl").open()]
    shards = [event.shard for event in events if getattr(event, "stage", None) == "tasks"]
    assert set(shards) == set(range(-(-4 * NUM_DOCS // 64)))


def test_report_and_model_card_have_the_scores(answered: Path, run_command: Any) -> None:
    row = rows_of(answered, "solution")["word_choice", "acc"]
    for name in ("report.md", "report.html"):
        text = (answered / name).read_text()
        assert "Benchmark tasks" in text
        assert f"{row['value']:.4g} ± {row['stderr']:.1g}" in text
        assert "16 bits" in text
