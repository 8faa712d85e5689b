#!/bin/sh
# ModelOpt's weight calibration `mse` does not try the plain maximum.
#
# Package: nvidia-modelopt 0.47.0 (torch 2.13.0), seen 2026-11-29.
# Expected: `mse` searches multiples of the maximum for the smallest squared error, from 0.25 to 4 in
#   steps of 0.1, so its result is never worse, by that error, than calibration by `max`.
# Seen: the step is rounded so that the range is divided evenly (39 multiples, 0.0987 apart), and 1 is
#   not among them. A weight that lies exactly on its int4 grid is kept exactly by `max` and changed by
#   `mse`; a range that is symmetric around 1 (0.5 to 1.5) has it and keeps the weight.
# Prints the three squared errors; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# modelopt.torch imports the last two and does not require them.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 nvidia-modelopt==0.47.0 requests==2.34.2 huggingface_hub==1.33.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import modelopt
import modelopt.torch.quantization as mtq
import torch

torch.manual_seed(0)
on_grid = torch.randint(-7, 8, (64, 128)).float()
on_grid[:, ::16] = 7.0  # every block of 16 has its largest code
INT4 = {"num_bits": 4, "block_sizes": {-1: 16, "type": "static"}}


def squared_error(algorithm):
    layer = torch.nn.Linear(128, 64, bias=False)
    layer.weight.data.copy_(on_grid * 0.1)
    weight = layer.weight.detach().clone()
    model = torch.nn.Sequential(layer)
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "enable": True, "cfg": INT4},
    ]
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": algorithm}, lambda m: m(weight[:4]))
    return float((model[0].weight_quantizer(weight) - weight).square().sum())


errors = {
    "max": squared_error("max"),
    "mse, defaults": squared_error({"method": "mse"}),
    "mse, 0.5 to 1.5": squared_error(
        {"method": "mse", "start_multiplier": 0.5, "stop_multiplier": 1.5, "step_size": 0.1}
    ),
}
print("nvidia-modelopt", modelopt.__version__)
for name, error in errors.items():
    print(f"squared error by {name}: {error:.4f}")
assert errors["max"] == 0 and errors["mse, 0.5 to 1.5"] == 0, "the grid is not kept: changed"
assert errors["mse, defaults"] > 1, "mse with its defaults now keeps the maximum: changed"
PYTHON
