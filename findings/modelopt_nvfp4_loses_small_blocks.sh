#!/bin/sh
# ModelOpt's fake quantizer of NVFP4 and its packed NVFP4 tensors differ for small weights.
#
# Package: nvidia-modelopt 0.47.0 (torch 2.13.0, triton 3.7.0), seen 2026-11-29.
# Expected: quantize and dequantize (`fp4_fake_quant_block`, what `mtq.quantize` runs on a GPU) gives what
#   the packed tensor (`NVFP4QTensor`, what a checkpoint holds) gives when it is unpacked.
# Seen: the kernel takes a block scale below 1e-5 for 1, so that the block becomes zeros; the packed tensor
#   has no such limit, and raises scales that e4m3 would round to 0 to its smallest number. Weights of
#   standard deviation 2e-5 lose 96% of themselves in one form and 10% in the other; a row that is a
#   thousand times smaller than the others is lost in one and kept in the other.
# The kernel runs in Triton's interpreter, which needs no GPU; its conversion to e4m3 cuts off where a GPU
# rounds to nearest, so that the ordinary weights differ in the last digit.
# Prints the relative errors of both; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# modelopt.torch imports the last two and does not require them. Its kernel needs a Triton below 3.9.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 nvidia-modelopt==0.47.0 requests==2.34.2 huggingface_hub==1.33.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps triton==3.7.0
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import contextlib

import modelopt
import torch
import triton

torch.cuda.device = lambda *_: contextlib.nullcontext()  # the kernel's launcher asks for one

from modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper import fp4_fake_quant_block
from modelopt.torch.quantization.qtensor import NVFP4QTensor

torch.manual_seed(0)
ordinary = torch.randn(64, 256) * 0.02
small_row = torch.randn(64, 256) * 0.02
small_row[3] *= 1e-3
weights = {"ordinary": ordinary, "small": torch.randn(64, 256) * 2e-5, "a small row": small_row}


def unpacked(weight):
    stored, scale, second = NVFP4QTensor.quantize(weight.clone(), 16)
    return stored.dequantize(
        dtype=torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16}
    )


def worst_row(quantized, weight):
    return float(((quantized - weight).norm(dim=1) / weight.norm(dim=1)).max())


print("nvidia-modelopt", modelopt.__version__, "triton", triton.__version__)
fake, packed = {}, {}
for name, weight in weights.items():
    fake[name] = worst_row(fp4_fake_quant_block(weight, weight.abs().amax()), weight)
    packed[name] = worst_row(unpacked(weight), weight)
    print(f"{name}: worst row's relative error {fake[name]:.3f} fake, {packed[name]:.3f} packed")
assert max(packed.values()) < 0.13, "the packed tensor now loses small weights: changed"
assert fake["ordinary"] < 0.13 and fake["small"] == 1, "the kernel treats blocks otherwise: changed"
assert fake["a small row"] > 0.8, "the kernel keeps a small row now: changed"
PYTHON
