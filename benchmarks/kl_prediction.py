"""Does the score predict the KL divergence? Random (group, format) pairs of SmolLM2-135M, measured.

For each pair a fresh copy of the model is quantized by ``mtq.quantize`` in that group alone,
calibrated on the same tokens, and run: the mean KL(P || Q) over tokens stands beside the score.
The model's linears lie on a 4-bit grid (GGUF Q4_1), which flatters 4-bit formats in both columns.

    python benchmarks/kl_prediction.py --pairs 36 --samples 8 --seq-len 256
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.stats
import torch
from machine import describe_machine

from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.data.cutting import SampleAssembler, chunk_texts, tokenize_chunk
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.data.texts import read_texts
from autoquant_ray.distributed.scoring import ScoringSpec
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import ModelRef, find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.plan.group import PlannedGroup
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.score.scorer import Scorer

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wint8_aint8", "wint8_aint4")


def main() -> None:
    """Score, measure, print the table and its summary as the last line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=36)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--labels", choices=["model", "data"], default="model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ref = find_model(str(find_demo_model()))
    # mtq.quantize gives each weight a scale of its own, fused layers too.
    menu = [replace(f, shares_scale=False) for f in resolve_formats(FORMATS, device="cpu")]
    plan = build_plan(build_skeleton(ref), menu)
    samples = read_samples(ref, options.samples, options.seq_len)
    scorer = Scorer(make_spec(ref, plan, options.labels))
    predicted = predict(scorer, plan, samples)
    pairs = list(itertools.product(range(len(plan.searched)), range(len(FORMATS))))
    chosen = np.random.default_rng(options.seed).permutation(len(pairs))[: options.pairs]
    ids = torch.tensor(samples)
    reference = log_probabilities(scorer.model, ids)
    rows = []
    for group_index, format_index in sorted(pairs[index] for index in chosen):
        group, format_ = plan.searched[group_index], plan.formats[format_index]
        true = measure(scorer.model, group, format_, ids, reference)
        score = float(predicted[group_index, format_index])
        rows.append((group.name, format_.name, score, true))
        print(f"{group.name:42s} {format_.name:12s} {score:.4e} {true:.4e} {score / true:.3f}")
    scores, trues = (np.array([row[column] for row in rows]) for column in (2, 3))
    ratios = scores / trues
    summary = {
        **describe_machine(),
        "labels": options.labels,
        "tokens": ids.numel(),
        "pairs": len(rows),
        "spearman": round(float(scipy.stats.spearmanr(scores, trues).statistic), 4),
        "median_ratio": round(float(np.median(ratios)), 3),
        "ratio_10_90": [round(float(np.quantile(ratios, q)), 3) for q in (0.1, 0.9)],
    }
    print(json.dumps(summary))


def read_samples(ref: ModelRef, num_samples: int, seq_len: int) -> list[list[int]]:
    """Full windows of ``pydoc`` text."""
    spec = DataSpec(source="pydoc", num_samples=num_samples, seq_len=seq_len, pack=True)
    tokenizer = load_tokenizer(TokenizerRef(model=ref.path, gguf_file=ref.gguf_file))
    assembler = SampleAssembler(spec)
    samples: list[list[int]] = []
    for texts in chunk_texts(read_texts(spec), 16):
        tokens = tokenize_chunk(tokenizer, texts, pack=True)
        samples += assembler.add(tokens, [not text.strip() for text in texts])
        if assembler.is_full:
            break
    return samples


def make_spec(ref: ModelRef, plan: Plan, labels: str) -> ScoringSpec:
    """Scorer of this process, all cores."""
    return ScoringSpec(
        model=ref,
        dtype="float32",
        device="cpu",
        num_threads=torch.get_num_threads(),
        modules=scored_modules(plan),
        formats=plan.formats,
        step_tokens=512,
        labels=labels,
        label_draws=1,
        seed=0,
    )


def predict(scorer: Scorer, plan: Plan, samples: list[list[int]]) -> np.ndarray[Any, Any]:
    """Scores (G, F) in nats per token."""
    start = time.perf_counter()
    calibration = scorer.calibrate(samples)
    result = scorer.score(samples, 0, calibration)
    seconds = time.perf_counter() - start
    print(f"scored {len(plan.searched)} groups x {len(plan.formats)} formats in {seconds:.0f} s")
    return 0.5 * result.sums.elementwise_GF / result.num_tokens


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Per sample, log-probabilities ``(S - 1, V)`` of all predicted positions."""
    return [
        torch.log_softmax(model(input_ids=row[None], use_cache=False).logits[0, :-1], -1)
        for row in ids
    ]


@torch.no_grad()
def measure(
    model: Any, group: PlannedGroup, format_: Format, ids: torch.Tensor, reference: list[Any]
) -> float:
    """Mean KL(P || Q) in nats per token with one group quantized."""
    import modelopt.torch.quantization as mtq

    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for module in group.modules:
        entries += quantizer_entries(f"{module.name}.", format_)

    def forward_loop(quantized: Any) -> None:
        for row in ids:
            quantized.base_model(input_ids=row[None], use_cache=False)
            if group.name == "lm_head":
                quantized(input_ids=row[None], use_cache=False)

    quantized = copy.deepcopy(model)
    config = {"quant_cfg": entries, "algorithm": "max"}
    mtq.quantize(quantized, config, forward_loop if format_.input else None)
    total, count = 0.0, 0
    for log_p, row in zip(reference, ids, strict=True):
        log_q = torch.log_softmax(
            quantized(input_ids=row[None], use_cache=False).logits[0, :-1], -1
        )
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        count += len(log_p)
    return total / count


if __name__ == "__main__":
    main()
