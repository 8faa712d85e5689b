"""Memory, time and scores of a scan with offloaded layers against one with a resident model.

A random Llama in bfloat16 is written layer by layer (never more than one file's weights in memory),
then scanned through the command line once per placement. Memory is the largest ``RssAnon`` of the
worker process, read from ``/proc`` while it runs: anonymous memory, without the pages of mapped
files, which the system can drop. Linux only.

    python benchmarks/offload_memory.py --dtype bfloat16
    python benchmarks/offload_memory.py --dtype float32 --disable lm_head
    python benchmarks/offload_memory.py --placements offload --shard-samples 1 --formats \\
        wint4_afp16:max,wint4_afp16:awq,wint4_afp16:gptq
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import tokenizers
import torch
import transformers
from machine import describe_machine
from safetensors.torch import save_file

from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.load import build_skeleton

STAGES = ("calibrate", "search", "fit", "score")
_POLL_S = 0.02
_PACKAGES = "import torch, transformers, modelopt.torch.quantization, autoquant_ray.score.scorer"


def main() -> None:
    """Write the model, scan it under each placement, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--shard-samples", type=int, default=8, help="GPTQ needs two shards.")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--formats", default="wint4_afp16:max,wint8_aint8")
    parser.add_argument("--disable", action="append", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--placements", default="offload,resident")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoquant-benchmark-") as name:
        folder = Path(name)
        num_weights = write_model(folder / "model", options)
        print(f"{num_weights / 1e9:.2f}B parameters written", flush=True)
        results = {
            placement: scan(folder, placement, options)
            for placement in options.placements.split(",")
        }
        summary = {
            **describe_machine(),
            "parameters": num_weights,
            "file_gib": round(sum(f.stat().st_size for f in folder.glob("model/*")) / 2**30, 2),
            "imports_anon_gib": imports_gib(_PACKAGES),
            "dtype": options.dtype,
            "disabled": options.disable,
            "tokens": options.samples * options.seq_len,
            "placements": results,
            "largest_relative_score_difference": largest_difference(folder, list(results)),
        }
    print(json.dumps(summary))


def write_model(folder: Path, options: argparse.Namespace) -> int:
    """Write config, tokenizer, and one safetensors file per layer; returns the parameters."""
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        vocab_size=options.vocabulary,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    write_tokenizer(folder, options.vocabulary)
    skeleton = build_skeleton(ModelRef(name="random", path=str(folder)))
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in skeleton.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else name
        files.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in files.items():
        tensors = {name: random_weight(name, shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {name: file for file, shapes in files.items() for name in shapes}
    total = sum(shape.numel() for shapes in files.values() for shape in shapes.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": index})
    )
    return total


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options for the sizes of the model, those of 1.26B by default, and its type."""
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Normal weights with deviation 0.02; norms are 1."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer in which the word ``w17`` is token 17."""
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def scan(folder: Path, placement: str, options: argparse.Namespace) -> dict[str, Any]:
    """Scan in a process of its own; watch its worker's memory."""
    text = folder / "text.txt"
    ids = torch.randint(
        options.vocabulary,
        (options.samples, options.seq_len),
        generator=torch.Generator().manual_seed(1),
    )
    text.write_text("\n".join(" ".join(f"w{i}" for i in row) for row in ids.tolist()) + "\n")
    command = [sys.executable, "-m", "autoquant_ray", "scan", str(folder / "model")]
    command += ["--data", str(text), "--out", str(folder / placement), "--bits", "8"]
    command += ["--formats", options.formats, "--placement", placement, "--dtype", options.dtype]
    command += ["--device", "cpu", "--workers", "1", "--cpus-per-worker", str(options.threads)]
    command += ["--shard-samples", str(options.shard_samples)]
    command += ["--seq-len", str(options.seq_len), "--address", "local", "--verbose"]
    command += [part for pattern in options.disable for part in ("--disable", pattern)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = watch(process)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(f"{placement}: the scan failed with exit code {process.returncode}")
    stages = json.loads((folder / placement / "run.json").read_text())["stages"]
    result = {
        "peak_anon_gib": round(peak / 2**30, 3),
        "seconds": round(seconds, 1),
        **{f"{name}_s": facts["seconds"] for name, facts in stages.items() if name in STAGES},
    }
    print(f"{placement}: {json.dumps(result)}", flush=True)
    return result


def watch(process: subprocess.Popen[bytes]) -> int:
    """Largest anonymous memory, in bytes, of the scan's worker while the scan runs."""
    driver, peak = psutil.Process(process.pid), 0
    workers: list[psutil.Process] = []
    while process.poll() is None:
        if not workers:
            workers = find_workers(driver)
        peak = max([peak, *(anonymous_bytes(worker.pid) for worker in workers)])
        time.sleep(_POLL_S)
    return peak


def find_workers(driver: psutil.Process) -> list[psutil.Process]:
    """The worker actors below a driver process."""
    workers = []
    for child in driver.children(recursive=True):
        try:
            if "ShardWorker" in " ".join(child.cmdline()):
                workers.append(child)
        except psutil.NoSuchProcess:
            continue
    return workers


def anonymous_bytes(process_id: int) -> int:
    """``RssAnon`` of a process; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
    return sizes[0] if sizes else 0


def imports_gib(imports: str) -> float:
    """Anonymous memory of a process that has run some imports, and done nothing."""
    code = f"{imports}; print(open('/proc/self/status').read())"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    line = next(line for line in output.stdout.splitlines() if line.startswith("RssAnon"))
    return round(int(line.split()[1]) / 2**20, 3)


def largest_difference(folder: Path, placements: Sequence[str]) -> float:
    """Largest relative difference of any score between the placements."""
    tables = [
        pq.read_table(folder / placement / "sensitivity.parquet").to_pydict()
        for placement in placements
    ]
    first = tables[0]
    for table in tables:
        if (table["group"], table["format"]) != (first["group"], first["format"]):
            raise SystemExit("the placements scored different groups or formats")
    return max(
        abs(ours - theirs) / abs(theirs)
        for table in tables
        for ours, theirs in zip(table["score"], first["score"], strict=True)
        if ours != theirs or theirs
    )


if __name__ == "__main__":
    main()
