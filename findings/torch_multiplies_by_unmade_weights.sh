#!/bin/sh
# torch multiplies an ordinary tensor by a weight on the meta device, which has no numbers, and returns unwritten memory.
#
# Packages: torch 2.13.0 (CPU), seen 2026-11-30.
# Expected: an error, as `torch.ones(4) + torch.empty(4, device="meta")` gives ("Tensor on device meta is not on the
#   expected device cpu!"), or a result on the meta device, as `torch.bmm` gives.
# Seen: `linear` without a bias (so does a `torch.nn.Linear` that was made on the meta device and never loaded), `@` of two
#   matrices and `conv1d` return an ordinary tensor on the CPU without an error. Nothing has written it: it holds what the
#   memory held before, here the sevens of tensors that were freed.
# A layer that was left out when a model was loaded part by part gives numbers, other ones each time, and most of them
# finite: check that no parameter is on the meta device before a model runs. Fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn import functional

SEVENS, ROUNDS = 7.0, 20
rows = torch.ones(64, 16)


def unmade(*shape):
    return torch.empty(*shape, device="meta")


def share_of_old_memory(product):
    """The largest share of a result, over some rounds, that is what freed tensors of its size held."""
    shares = []
    for _ in range(ROUNDS):
        freed = [torch.full((64 * 64,), SEVENS) for _ in range(8)]
        del freed
        result = product().detach()
        assert result.device.type == "cpu", result.device
        shares.append((result == SEVENS).float().mean().item())
    return max(shares)


try:
    torch.ones(4) + unmade(4)
except RuntimeError as error:
    print("+:", error)
else:
    raise SystemExit("a sum with a meta tensor no longer fails")
assert torch.bmm(torch.ones(1, 2, 3), unmade(1, 3, 4)).device.type == "meta"
layer = torch.nn.Linear(16, 64, bias=False, device="meta")
products = {
    "linear": lambda: functional.linear(rows, unmade(64, 16)),
    "torch.nn.Linear": lambda: layer(rows),
    "@": lambda: rows @ unmade(16, 64),
    "conv1d": lambda: functional.conv1d(torch.ones(1, 16, 66), unmade(64, 16, 3)),
}
for name, product in products.items():
    share = share_of_old_memory(product)
    print(f"{name}: no error, on the CPU; {share:.0%} of the numbers are those of freed tensors")
    assert share > 0.9, name
PYTHON
