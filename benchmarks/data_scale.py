"""Memory and time of turning millions of short texts into sample shards, on one machine.

Writes a Parquet file of short texts, trains a small byte-pair tokenizer on some of them, and runs
the real stage: texts are read by the driver, tokenized in Ray tasks, cut into shards and written.
Each size runs in a process of its own, whose peak memory is printed; the last line is JSON.

    python benchmarks/data_scale.py --samples 100000 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import describe_machine

WORDS = tuple(f"{first}{last}" for first in "bcdfghlmnprst" for last in ("a", "eel", "ing", "ook"))
WORDS_PER_TEXT = 12
ROWS_PER_BATCH = 50_000


def main() -> None:
    """Run every size in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--shard-samples", type=int, default=1000)
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(run_stage(Path(arguments.inside), arguments)))
        return
    results = []
    for count in arguments.samples:
        with tempfile.TemporaryDirectory(prefix="data-scale-") as folder:
            write_texts(Path(folder), count)
            train_tokenizer(Path(folder))
            inside = [*sys.argv, "--inside", folder, "--samples", str(count)]
            done = subprocess.run(
                [sys.executable, *inside], stdout=subprocess.PIPE, text=True, check=True
            )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    print(json.dumps({"results": results} | describe_machine()))


def write_texts(folder: Path, count: int) -> None:
    """``texts.parquet``: rows of twelve made-up words, written batch by batch."""
    generator = np.random.default_rng(0)
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(folder / "texts.parquet", schema) as writer:
        for start in range(0, count, ROWS_PER_BATCH):
            rows = min(ROWS_PER_BATCH, count - start)
            picks = generator.integers(0, len(WORDS), size=(rows, WORDS_PER_TEXT))
            texts = [" ".join([WORDS[pick] for pick in row]) for row in picks.tolist()]
            writer.write_table(pa.table({"text": texts}, schema=schema))


def train_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer whose tokens are shorter than most words."""
    import tokenizers
    import transformers

    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([" ".join(WORDS)] * 50, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(folder)


def run_stage(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Fingerprint, read, tokenize, shard and keep, as a scan does; returns what it cost."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    from autoquant_ray.config.scan import ScanConfig
    from autoquant_ray.data.fingerprint import fingerprint_data
    from autoquant_ray.models.tokenizer import TokenizerRef
    from autoquant_ray.runs.directory import RunDirectory
    from autoquant_ray.runs.state import RunState
    from autoquant_ray.stages import samples as samples_stage

    (count,) = arguments.samples
    config = ScanConfig(
        model="none",
        data=str(folder / "texts.parquet"),
        out=str(folder / "run"),
        bits=8,
        samples=count,
        shard_samples=arguments.shard_samples,
    )
    ray.init(
        address="local",
        num_cpus=arguments.cpus,
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    start_mib = peak_mib()
    start, cpu_s = time.time(), time.process_time()
    data = fingerprint_data(config.data)
    fingerprint_s = time.time() - start
    scratch = RunDirectory(str(folder / "scratch"))
    facts = samples_stage.read_samples(config, TokenizerRef(model=str(folder)), scratch)
    read_s = time.time() - start - fingerprint_s
    identity = {"model": {}, "dataset": {}, "fingerprints": {"data": data}}
    state = RunState.start(RunDirectory(config.out), config, "new", identity)
    state.begin()
    samples_stage.keep_samples(state, scratch, facts, "benchmark")
    if not samples_stage.has_samples(state, "benchmark"):
        raise RuntimeError(f"sample shards are missing in {config.out}")
    seconds = time.time() - start
    cpu_s = time.process_time() - cpu_s
    ray.shutdown()
    return {
        "samples": facts["num_samples"],
        "tokens": facts["num_tokens"],
        "shards": facts["num_shards"],
        "seconds": round(seconds, 1),
        "fingerprint_seconds": round(fingerprint_s, 2),
        "read_seconds": round(read_s, 1),
        "driver_cpu_seconds": round(cpu_s, 1),
        "samples_per_second": round(facts["num_samples"] / seconds),
        "start_mib": start_mib,
        "peak_mib": peak_mib(),
        "tokens_sha256": facts["tokens_sha256"],
    }


def peak_mib() -> int:
    """Peak resident memory of this process; ``getrusage`` would count the parent's too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024


if __name__ == "__main__":
    main()
