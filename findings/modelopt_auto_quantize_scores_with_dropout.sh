#!/bin/sh
# ModelOpt's auto_quantize scores a model in evaluation mode with its dropout on.
#
# Packages: nvidia-modelopt 0.47.0, transformers 5.14.1, torch 2.13.0, seen 2026-11-29.
# Expected: a model that was put into evaluation mode is scored as it answers: the same data gives the
#   same scores, whatever the seed of torch's generator.
# Seen: to checkpoint gradients, the decoder and its layers are put into training mode, so what they drop
#   out themselves is dropped. A family whose config states a dropout (0.1 by default in BioGPT, BART,
#   OPT and others) is scored with it: scores differ by tens of percent from seed to seed, and from those
#   of the same weights with the dropout set to 0.
# Prints the scores under two seeds with and without dropout; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# modelopt.torch imports the last two and does not require them.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.14.1 torch==2.13.0 \
    nvidia-modelopt==0.47.0 accelerate==1.15.0 requests==2.34.2 huggingface_hub==1.33.0
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import contextlib
import io

import modelopt
import modelopt.torch.quantization as mtq
import torch
import transformers

ids = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))


def scores(dropout, seed):
    config = transformers.BioGptConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, **dropout,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        searched, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": 12.0},
            quantization_formats=[mtq.INT8_DEFAULT_CFG],
            data_loader=[ids],
            forward_step=lambda m, batch: m(input_ids=batch, labels=batch, use_cache=False),
            loss_func=lambda output, _: output.loss,
            num_calib_steps=1,
            num_score_steps=1,
            verbose=False,
        )
    return [stats["scores"][0] for stats in state["candidate_stats"].values()][:4]


OFF = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "layerdrop"), 0.0
)
seen = {(name, seed): scores(given, seed) for name, given in (("on", {}), ("off", OFF)) for seed in (1, 2)}
print("nvidia-modelopt", modelopt.__version__, "transformers", transformers.__version__)
for (name, seed), values in seen.items():
    print(f"dropout {name:3} seed {seed}:", " ".join(f"{value:.3e}" for value in values))
largest = max(abs(a / b - 1) for a, b in zip(seen["on", 1], seen["on", 2]))
print(f"largest difference between the seeds with dropout: {largest:.0%}")
assert seen["off", 1] == seen["off", 2], "without dropout the seed matters too"
assert largest > 0.02, "the seed does not matter: changed"
PYTHON
