"""A scan of answers about images: the same bytes for any number of workers, and when resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chats import with_processor, write_pairs

from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import ChangedError, DataError
from autoquant_ray.evaluate.evaluate import evaluate_run
from autoquant_ray.scan import run_search

pytestmark = pytest.mark.usefixtures("ray_local")

SIZES = [(64, 48), (32, 32), (96, 64), (64, 64), (32, 64), (64, 32), (96, 32)]


@pytest.fixture(scope="module")
def make_config(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A scan of a vision-language model and its tower; the second image is missing."""
    folder = with_processor(model_folder("qwen3_vl"), tmp_path_factory.mktemp("model"))
    data = write_pairs(tmp_path_factory.mktemp("pairs"), SIZES)
    (data.parent / "1.png").unlink()

    def build(**changes: Any) -> ScanConfig:
        values = {
            "model": str(folder),
            "data": str(data),
            "out": str(tmp_path_factory.mktemp("run") / "run"),
            "formats": ("wint4_afp16:max", "wint8_aint8"),
            "coverage": "full",
            "loss_on": "answer",
            "skip_bad_samples": True,
            "bits": 8,
            "samples": 4,
            "shard_samples": 2,
            "workers": 1,
        }
        return ScanConfig.model_validate(values | changes)

    return build


def test_scan_of_images_gives_the_same_bytes_however_it_is_run(make_config: Any) -> None:
    config = make_config()
    run_search(config)
    run = Path(config.out)
    before = (run / "sensitivity.parquet").read_bytes()
    table = pq.read_table(run / "sensitivity.parquet")
    assert any(name.startswith("model.visual") for name in table.column("group").to_pylist())
    assert set(table.column("num_tokens").to_pylist()) == {4 * 9}  # eight words and an end mark

    dataset = json.loads((run / "run.json").read_text())["dataset"]
    assert dataset["counts"]["bad"] == 1
    assert len(dataset["bad_samples"]) == 1
    assert "pairs.jsonl line 2: image " in dataset["bad_samples"][0]
    assert (dataset["num_loss_tokens"], dataset["num_samples_with_images"]) == (36, 4)
    assert "1 skipped, the first because of" in (run / "report.md").read_text()

    for part in (run / "scores").iterdir():
        part.unlink()
    run_search(make_config(out=config.out, workers=2), mode="resume")
    assert (run / "sensitivity.parquet").read_bytes() == before

    rows = evaluate_run(EvaluationConfig(run=str(run), against=("uniform",))).rows
    assert {(row["num_samples"], row["num_tokens"]) for row in rows} == {(2, 18)}

    template = Path(config.model) / "chat_template.jinja"
    text = template.read_text()
    template.write_text(f"{text} w1")
    try:
        with pytest.raises(ChangedError, match="chat template or processor changed since"):
            run_search(config, "resume")
        with pytest.raises(ChangedError, match="chat template or processor changed since"):
            evaluate_run(EvaluationConfig(run=str(run), against=("uniform",)))
    finally:
        template.write_text(text)


def test_missing_image_stops_before_anything_is_written(make_config: Any) -> None:
    config = make_config(skip_bad_samples=False)
    with pytest.raises(DataError, match=r"line 2: image .*/1.png cannot be read") as caught:
        run_search(config)
    assert "`skip_bad_samples`" in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (Path(config.out) / "run.json").exists()


def test_tower_cannot_be_searched_on_text(make_config: Any, text_file: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        run_search(make_config(data=str(text_file), loss_on="all"))


def test_texts_and_chats_in_one_source_are_refused(make_config: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "answer": "w2"}, {"text": "w3 w4"}]
    for number, order in enumerate((rows, rows[::-1])):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in order))
        with pytest.raises(DataError, match="holds texts and chats"):
            run_search(make_config(data=str(path), coverage="lm", loss_on="all"))
