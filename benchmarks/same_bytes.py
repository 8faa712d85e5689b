"""Digests of what scans and solutions write: equal before and after a change that moves no number.

Run it in both checkouts with the same packages, each in a folder of its own, and compare the two
outputs::

    python benchmarks/same_bytes.py --out old > old.txt      # in the old checkout
    python benchmarks/same_bytes.py --out new > new.txt      # in the new one
    diff old.txt new.txt

Parquet files are hashed as they are; JSON without the run's id; reports without times and dates.
Formats with few bits are given as ModelOpt's presets: the default rounding behind this package's
names for them has changed, so that they mean another format in an old checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from autoquant_ray.config.demo import find_demo_model

ROOT = Path(__file__).resolve().parents[1]
DECODER: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}
NEMOTRON = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "attention", "moe", "mlp"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "moe_shared_expert_intermediate_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "use_mamba_kernels": False,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_INT4, _NVFP4 = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "W4A16_NVFP4_CFG"
WEIGHT_ONLY = f"{_INT4},wfp8_afp16,wint8_afp16"
DEMO = ["--data", "pydoc", "--pack", "--samples", "16", "--seq-len", "256", "--shard-samples", "2"]
"""The demo's options, where other cases have theirs."""
CASES: dict[str, tuple[list[str], list[list[str]]]] = {
    "llama": (
        [
            "--formats",
            f"{_INT4},{_NVFP4},wfp8_afp8,wint8_aint8,kv_fp8,kv_nvfp4",
            "--kv-bytes-per-token",
            "96",
        ],
        [
            ["--bits", "5", "--kv-bytes-per-token", "96"],
            ["--bytes", "150KB", "--kv-bytes-per-token", "96", "--max-formats", "2"],
            ["--bits", "6", "--kv-bytes-per-token", "96", "--pin", "lm_head=wint8_aint8"],
        ],
    ),
    "qwen3-moe": (
        ["--formats", WEIGHT_ONLY, "--expert-groups", "2"],
        [["--bits", "5"], ["--bits", "6", "--expert-groups", "expert"]],
    ),
    "qwen3-vl": (
        ["--formats", f"{_INT4},wfp8_afp8,wint8_aint8"],
        [["--bits", "5"], ["--bits", "9", "--engine", "vllm", "--allow", "*=wfp8_afp8,none"]],
    ),
    "nemotron-h": (
        ["--formats", "INT4_AWQ_CFG,INT8_SMOOTHQUANT_CFG,wfp8_afp8", "--domains"],
        [["--bits", "5"], ["--bits", "7", "--worst-domain"]],
    ),
}
"""Name -> (options of its scan, options of each solution)."""


def main() -> None:
    """Scan, solve, explain and list digests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--no-demo", action="store_true", help="leave the real model out")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    os.chdir(options.out)
    words = (f"w{position * position % 251}" for position in range(6000))
    text = list(words)
    for name in ("a", "b"):
        lines = (" ".join(text[start : start + 40]) for start in range(0, 2400, 40))
        Path(f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = text[2400:]
    for name, (scan, solutions) in CASES.items():
        save_model(name)
        data = (
            ["--data", "a=a.txt", "--data", "b=b.txt"]
            if "--domains" in scan
            else ["--data", "a.txt"]
        )
        command(
            *("scan", name, *data, "--out", f"runs/{name}", "--bits", "6", "--address", "local"),
            *("--samples", "16", "--shard-samples", "4", "--seq-len", "64", "--workers", "2"),
            *(word for word in scan if word != "--domains"),
        )
        solve(f"runs/{name}", solutions)
    if not options.no_demo:
        command(
            *("scan", str(find_demo_model()), "--out", "runs/demo", "--bits", "6", *DEMO),
            *("--step-tokens", "512", "--formats", f"{_INT4},wfp8_afp8,wint8_aint8"),
            *("--address", "local"),
        )
        solve("runs/demo", [["--bits", "5"], ["--bits", "4.5"], ["--bytes", "150MiB"]])
    for path in sorted(Path("runs").rglob("*")):
        if (checksum := digest(path)) is not None:
            print(checksum, path)


def save_model(name: str) -> None:
    """Write the small model of a case."""
    config = {
        "llama": lambda: transformers.LlamaConfig(**DECODER),
        "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
            **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
        ),
        "nemotron-h": lambda: transformers.NemotronHConfig(**(DECODER | NEMOTRON)),
        "qwen3-vl": lambda: transformers.Qwen3VLConfig(
            text_config=DECODER | {"rope_parameters": ROPE},
            vision_config=VISION,
            tie_word_embeddings=False,
            image_token_id=250,
            video_token_id=249,
            vision_start_token_id=251,
            vision_end_token_id=252,
        ),
    }[name]()
    save_random(config, name, num_words=256)


def save_random(config: Any, name: str, num_words: int) -> None:
    """Write a random model of a config with a word tokenizer: the token of ``w17`` is 17."""
    auto = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    auto.from_config(config, dtype=torch.float32).save_pretrained(name)
    import tokenizers

    vocabulary = {f"w{index}": index for index in range(num_words)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(name)


def solve(run: str, solutions: list[list[str]]) -> None:
    """Solve budgets of a run, explain two of its groups, compute its frontier."""
    for budget in solutions:
        command("solve", run, *budget)
    manifest = json.loads(Path(run, "manifest.json").read_text(encoding="utf-8"))
    groups = sorted(manifest["stability"]["kept"]) if manifest["stability"] else ["lm_head"]
    for group in (groups[0], groups[-1]):
        words = command("explain", run, group, "--json")
        Path(run, f"explain-{group}.json").write_text(words, encoding="utf-8")
    command("frontier", run)


def command(*words: str) -> str:
    """Run the command line of this checkout; exit codes 0 and 3 are ends."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-m", "autoquant_ray", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 3):
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def digest(path: Path) -> str | None:
    """Of one file of a run; None for a file that holds times."""
    if path.is_dir() or path.name in ("run.json", "events.jsonl", "lock.json", "report.html"):
        return None
    if "scores" in path.parts or "samples" in path.parts or "search" in path.parts:
        return None
    content = path.read_bytes()
    if path.suffix == ".json":
        values = json.loads(content)
        values.pop("run_id", None)
        content = json.dumps(values).encode()
    if path.suffix == ".md":
        text = content.decode()
        text = re.sub(r"\d{8}T\d{6}Z|\d{4}-\d\d-\d\dT[\d:]+Z|\d{4}-\d\d-\d\d", "DATE", text)
        content = re.sub(r"[\d.,]+ (s|min|h)\b", "TIME", text).encode()
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    main()
