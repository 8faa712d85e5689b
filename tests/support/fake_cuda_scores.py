"""Scores small models on the CPU and on the device of :mod:`fake_cuda_tensors`, in one process.

Its arguments are the compiled device and an empty folder. The last line that it prints is JSON:
case -> step -> what the host waited for, the numbers of steps and modules, and the ratio of sums.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fake_cuda import CASES, LENGTHS, LINEARS, Case, load_device

if __name__ == "__main__":
    load_device(sys.argv[1])  # before torch

import chats
import numpy as np
import torch
from fake_cuda_tensors import install, waits
from scoring_specs import scoring_spec
from small_models import make_tokenizer, random_samples, small_model

from autoquant_ray.data.chat_encoding import ConversationEncoder
from autoquant_ray.data.conversations import load_images
from autoquant_ray.data.samples import Samples
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.data.texts import read_rows
from autoquant_ray.distributed.scoring import ScoringSpec
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import ModelRef, find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.models.tokenizer import TokenizerRef
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.quantize.awq import best_alphas
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.score import sensitivity
from autoquant_ray.score.scorer import Scorer


def main() -> None:
    """Score all cases, on the CPU first."""
    install()
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        folder = Path(sys.argv[2], case.family)
        if not folder.exists():
            small_model(case.family).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        samples = images(folder) if case.has_images else random_samples(LENGTHS)
        by_cpu = Run(case, folder, samples, "cpu")
        by_device = Run(case, folder, samples, "cuda")
        assert next(by_device.scorer.model.parameters()).is_cuda
        results[name] = by_device.waits | {
            "modules": len(by_device.scorer.spec.modules),
            "largest_difference": largest_difference(by_device.sums, by_cpu.sums),
        }
    results["planted"] = planted(Path(sys.argv[2], "llama"))
    sys.stdout.write(json.dumps(results))


class Run:
    """All steps of a case on a device; ``waits`` has what the host waited for, by step."""

    def __init__(self, case: Case, folder: Path, samples: Samples, device: str) -> None:
        self.waits: dict[str, dict[str, int]] = {}
        ref = find_model(str(folder))
        formats = resolve_formats(case.formats, device=device)
        plan = build_plan(build_skeleton(ref), formats, **case.planned)
        spec = spec_of(case, ref, plan, device)
        self.scorer = self._step("load", lambda: Scorer(spec))
        halves = {0: samples[::2], 1: samples[1::2]}
        parts = self._step(
            "calibrate", lambda: [self.scorer.calibrate(s, n) for n, s in halves.items()]
        )
        calibration = merge_calibrations(parts)
        calibration = replace(calibration, folds=plan.folds, halves={0: 0, 1: 1})
        if "AWQ" in str(case.formats) or "awq" in str(case.formats):
            losses = self._step("search", lambda: self.scorer.search(samples, calibration))
            calibration = calibration.with_alphas(best_alphas(losses))
        if "gptq" in str(case.formats):
            shards = [Shard(n, s) for n, s in halves.items()]
            fits = self._step("fit", lambda: self.scorer.fit([0], calibration, shards))
            rounding = {
                key: weight for fit in fits.values() for key, weight in fit.rounding.items()
            }
            calibration = replace(calibration, rounding=rounding)
        scores = self._step("score", lambda: self.scorer.score(samples, 0, calibration))
        self.sums = scores.sums.elementwise_GF

    def _step(self, name: str, run: Callable[[], Any]) -> Any:
        with waits() as counted:
            result = run()
        self.waits[name] = dict(counted)
        return result


class Shard(NamedTuple):
    """A shard with its samples."""

    shard: int
    samples: Samples


def spec_of(case: Case, ref: ModelRef, plan: Plan, device: str) -> ScoringSpec:
    """What a scorer computes; steps of at most two samples."""
    fields = {"model": ref, "device": device, "step_tokens": 48, "labels": "model", **case.changes}
    if device == "cpu" and fields.get("placement") == "split":
        del fields["placement"]
    return scoring_spec(plan, **fields)


def images(folder: Path) -> Samples:
    """Answers about images of two sizes."""
    data = chats.write_pairs(folder, [(64, 48), (32, 32)])
    folder = chats.with_processor(folder, folder.with_suffix(".chat"))
    encoder = ConversationEncoder(TokenizerRef(model=str(folder)), "answer")
    rows = read_rows(DataSpec(source=str(data), num_samples=9, seq_len=99, loss_on="answer"))
    loaded: list[Any] = [load_images(row) for row, _ in rows]  # type: ignore[arg-type]
    encoded: list[Any] = [encoder.encode(conversation) for conversation in loaded]
    return [each.sample for each in encoded]


def largest_difference(sums_GF: np.ndarray[Any, Any], others_GF: np.ndarray[Any, Any]) -> float:
    """Relative, over all groups and formats that were scored."""
    assert ((sums_GF > 0) == (others_GF > 0)).all()
    is_scored = others_GF > 0
    return float(np.abs(sums_GF[is_scored] / others_GF[is_scored] - 1).max())


def planted(folder: Path) -> dict[str, Any]:
    """What is seen of a number that is read, and of a CPU tensor, in the loop over modules."""
    case, samples = Case("llama", LINEARS[2:]), random_samples(LENGTHS)
    values_of = sensitivity.row_values

    def reading(difference_CO: torch.Tensor, *rest: Any) -> torch.Tensor:
        difference_CO.sum().item()
        return values_of(difference_CO, *rest)

    def mixing(difference_CO: torch.Tensor, *rest: Any) -> torch.Tensor:
        return values_of(difference_CO + torch.zeros(difference_CO.shape[1]), *rest)

    sensitivity.row_values = reading
    seen: dict[str, Any] = {"item": Run(case, folder, samples, "cuda").waits["score"]}
    sensitivity.row_values = mixing
    try:
        Run(case, folder, samples, "cuda")
    except RuntimeError as error:
        seen["tensor"] = str(error)
    sensitivity.row_values = values_of
    return seen


if __name__ == "__main__":
    main()
