"""Run without our package: what transformers and compressed-tensors make of a case's checkpoint.

    python with_transformers.py CASE

Prints a line of JSON: versions, each layer's kind as it is loaded, the relative error of its
outputs, and the log-probabilities of the text. Experts are unpacked on loading, in bfloat16, and
their inputs are never quantized.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import compressed_tensors
import numpy as np
import torch
import transformers
from answer import as_answer, inputs_and_error, layers_of, plain_weights
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


def expert_weight(model: Any, layer: Any) -> torch.Tensor:
    """``(O, I)`` of a linear of an expert."""
    place, first = layer["expert"], layer["expert"]["first"]
    weights_EOI = getattr(model.get_submodule(place["module"]), place["parameter"])
    weight: torch.Tensor = weights_EOI[place["number"]][first : first + layer["rows"]]
    return weight


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
    layers, plain = layers_of(case), plain_weights(case)
    for name, states_TI in inputs.items():
        if "expert" in layers[name]:
            weight_OI = expert_weight(model, layers[name]).numpy()
            kinds[name] = "16 bits" if np.array_equal(weight_OI, plain[name]) else "unpacked"
            off[name] = error(name, states_TI @ weight_OI.T)
            continue
        module = model.get_submodule(name)
        kinds[name] = kind_of(module)
        off[name] = error(name, module(torch.from_numpy(states_TI)).numpy())
    assert not any(name.startswith("autoquant_ray") for name in sys.modules)
    versions = {
        "transformers": transformers.__version__,
        "compressed-tensors": compressed_tensors.__version__,
        "torch": torch.__version__,
    }
    has_experts = any("expert" in layer for layer in layers.values())
    dtype = "bfloat16" if has_experts else "float32"
    as_answer(
        versions=versions, dtype=dtype, kinds=kinds, output_errors=off, log_probs=text.tolist()
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
