"""Run without our package: what transformers and compressed-tensors make of a case's checkpoint.

    python with_transformers.py CASE

Prints a line of JSON: versions, each layer's kind as it is loaded, the relative error of its
outputs, and the log-probabilities of the text.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import compressed_tensors
import numpy as np
import torch
import transformers
from answer import as_answer, inputs_and_error
from compressed_tensors.quantization import QuantizationArgs


def kind_of(module: Any) -> str:
    """Weights and inputs of a layer as ``compressed-tensors`` attached them."""
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return "16 bits"
    return f"{numbers(scheme.weights)}, {numbers(scheme.input_activations)}"


def numbers(args: QuantizationArgs | None) -> str:
    """Type, bits and what shares a scale."""
    if args is None:
        return "16 bits"
    strategy, group = args.strategy, args.group_size
    return f"{args.type}{args.num_bits} {strategy}{'' if group is None else f' {group}'}"


@torch.no_grad()
def main(case: Path) -> None:
    unpack = transformers.CompressedTensorsConfig(run_compressed=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        case / "out", dtype=torch.float32, quantization_config=unpack
    )
    torch.nn.Module.float(model.eval())  # NVFP4 and MXFP8 are unpacked in bfloat16
    inputs, error = inputs_and_error(case)
    ids_WS = torch.from_numpy(np.load(case / "ids.npy"))
    log_probs = model(ids_WS).logits.double().log_softmax(-1)[:, :-1]
    text = log_probs.gather(-1, ids_WS[:, 1:, None])[..., 0]
    kinds, off = {}, {}
    for name, states_TI in inputs.items():
        module = model.get_submodule(name)
        kinds[name] = kind_of(module)
        off[name] = error(name, module(torch.from_numpy(states_TI)).numpy())
    assert not any(name.startswith("autoquant_ray") for name in sys.modules)
    versions = {
        "transformers": transformers.__version__,
        "compressed-tensors": compressed_tensors.__version__,
        "torch": torch.__version__,
    }
    as_answer(versions=versions, kinds=kinds, output_errors=off, log_probs=text.tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
