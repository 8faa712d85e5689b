#!/bin/sh
# ModelOpt 0.47 quantizes a tensor to zeros in FP8 where its largest value is at most 2^-24; 0.48 does not.
#
# Packages: nvidia-modelopt 0.47.0 and 0.48.0rc1 (torch 2.13.0), seen 2026-11-29.
# Expected: a scale per tensor is relative, so a weight times a power of two has the same relative
#   error, down to where float32 itself ends; and two releases of a library give the same numbers.
# Seen: 0.47 takes a maximum of at most 2^-24 (6e-8) for 0 (`scaled_e4m3`), and the weight is lost
#   whole: relative error 1. 0.48 has the relative error of larger weights (tried: 1e-30).
#   Integers of 8 bits lose such weights in both.
# Prints relative errors by the tensor's largest value; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# modelopt.torch imports the last two and does not require them.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 nvidia-modelopt==0.47.0 requests==2.34.2 huggingface_hub==1.33.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    --target "$folder/next" nvidia-modelopt==0.48.0rc1
cat > "$folder/measure.py" <<'PYTHON'
import contextlib
import io
import json

import modelopt
import modelopt.torch.quantization as mtq
import torch

FP8 = {"num_bits": (4, 3), "axis": None}
INT8 = {"num_bits": 8, "axis": 0}


def relative_error(largest, attributes):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False)
    weight = torch.rand(64, 64) * 2 - 1
    weight *= largest / weight.abs().max()
    layer.weight.data.copy_(weight)
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "enable": True, "cfg": attributes},
    ]
    model = torch.nn.Sequential(layer)
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, lambda m: m(torch.ones(1, 64)))
    # in float64: squares of such numbers are 0 in float32
    error = model[0].weight_quantizer(weight).double() - weight.double()
    return float(error.norm() / weight.double().norm())


with contextlib.redirect_stdout(io.StringIO()):
    errors = {
        f"{name} {largest:g}": round(relative_error(largest, attributes), 4)
        for name, attributes in (("fp8", FP8), ("int8", INT8))
        for largest in (1.0, 2.0**-23, 2.0**-24, 1e-30)
    }
print(json.dumps({"version": modelopt.__version__, "errors": errors}))
PYTHON
cd "$folder"
venv/bin/python -W ignore measure.py 2> errors | tail -n 1 > now.json || { cat errors; exit 1; }
PYTHONPATH="$folder/next" venv/bin/python -W ignore measure.py 2> errors | tail -n 1 > next.json ||
    { cat errors; exit 1; }
cat now.json next.json
venv/bin/python - <<'PYTHON'
import json

now, later = (json.load(open(f"{name}.json")) for name in ("now", "next"))
small = f"fp8 {2.0**-24:g}"
assert (now["version"], later["version"]) == ("0.47.0", "0.48.0rc1")
assert now["errors"][small] == now["errors"]["fp8 1e-30"] == 1, "0.47 keeps small weights: changed"
kept = later["errors"]["fp8 1"]
assert later["errors"][small] == kept < 0.03, "0.48 loses small weights: changed"
assert now["errors"]["int8 1e-30"] == later["errors"]["int8 1e-30"] == 1, "int8: changed"
PYTHON
