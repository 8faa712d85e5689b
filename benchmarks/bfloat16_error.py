"""Scores in bfloat16 against float32: the difference of rounded outputs, and what we compute.

Same weights (rounded to bfloat16 once), same labels. *Before* is ``Xq Wq^T - Y`` with all three
rounded to bfloat16, as a hook on a bfloat16 model sees them; *after* forms the quantization errors
in float32 and multiplies them apart; *products* does so in a float32 model (``--difference-dtype
bfloat16``); *integers* multiplies integers there (``int8+float32``). Printed per format: quantiles
over groups of the score over its float32 value, the largest relative error, and of *products* and
*integers* the CPU seconds beside those in float32.

    python benchmarks/bfloat16_error.py --samples 2 --seq-len 64
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from kl_prediction import make_spec, read_samples
from machine import describe_machine

from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton, load_model
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.quantizers import fake_quantize_weight, make_input_quantizer
from autoquant_ray.score import differences
from autoquant_ray.score.scorer import Scorer

PRODUCTS = {"float32": "float32", "products": "bfloat16", "integers": "int8+float32"}
FORMATS = ("wint8_afp16", "wint8_aint8", "wfp8_afp8", "wint4_afp16:max")


def main() -> None:
    """Score four ways, print the ratios and the summary as the last line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=64)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ref = find_model(str(find_demo_model()))
    plan = build_plan(build_skeleton(ref), resolve_formats(FORMATS, device="cpu"))
    samples = read_samples(ref, options.samples, options.seq_len)
    spec = dataclasses.replace(make_spec(ref, plan, "data"), dtype="bfloat16")
    model = load_model(ref, dtype="bfloat16", device="cpu")
    scorer = Scorer(spec, model=model)
    calibration = scorer.calibrate(samples)
    after = scorer.score(samples, 0, calibration).sums.elementwise_GF
    original = differences.OutputDifferences.of_linear
    differences.OutputDifferences.of_linear = of_rounded_outputs  # type: ignore[method-assign]
    before = scorer.score(samples, 0, calibration).sums.elementwise_GF
    differences.OutputDifferences.of_linear = original  # type: ignore[method-assign]
    spec = make_spec(ref, plan, "data")
    summary: dict[str, Any] = {**describe_machine(), "tokens": options.samples * options.seq_len}
    model.float()
    by_title, seconds = {"before": before, "after": after}, {}
    for title, dtype in PRODUCTS.items():
        scorer = Scorer(dataclasses.replace(spec, difference_dtype=dtype), model=model)
        start = time.process_time()
        by_title[title] = scorer.score(samples, 0, calibration).sums.elementwise_GF
        seconds[dtype] = round(time.process_time() - start, 2)
    print(f"CPU seconds of a float32 model by the type of its products: {seconds}")
    summary["cpu_seconds"] = seconds
    exact = by_title.pop("float32")
    for column, name in enumerate(FORMATS):
        for title, sums in by_title.items():
            ratios = sums[:, column] / exact[:, column]
            quantiles = [round(float(q), 4) for q in np.quantile(ratios, (0, 0.5, 1))]
            largest = f"{np.abs(ratios - 1).max():.1e}"
            print(f"{name:14s} {title:8s} lowest, median, highest: {quantiles}; error {largest}")
            summary[f"{name} {title}"] = [*quantiles, float(largest)]
    print(json.dumps(summary))


def of_rounded_outputs(
    self: differences.OutputDifferences,
    planned: Any,
    module: Any,
    calibration: Any,
    output_TO: torch.Tensor,
    input_TI: torch.Tensor,
    only: differences.Only = None,
) -> Iterator[differences.Difference]:
    """Both outputs in bfloat16, then their difference."""
    maximum = calibration.maxima.get("input_amax")
    for formats in self._menu(only):
        weight_OI = fake_quantize_weight(formats[0][1].weight, module.weight)
        for index, format_ in formats:
            quantizer = make_input_quantizer(format_.input, maximum, input_TI)
            states_TI = input_TI if quantizer is None else quantizer(input_TI)
            outputs_TO = torch.nn.functional.linear(states_TI, weight_OI, module.bias)
            yield index, slice(0, len(output_TO)), outputs_TO - output_TO


if __name__ == "__main__":
    main()
