"""Real tools read what ``export`` writes: every layer's kind, and the numbers.

    python benchmarks/engines/check.py transformers mlx-lm --work .engines

``make engines`` runs it for all tools. For SmolLM2-135M and three random models, each layout and
each recipe is exported by the command from a real scan (``cases.py``), and read by the tool in an
environment of its own (``in_tools``). A line is right where

- every layer has the kind that the manifest gives it;
- what each layer makes of fixed inputs is within 2e-3 (relative) of what the planned layer makes
  of them (5e-3 where the tool computes in bfloat16): scales of int4 blocks are stored in 16 bits;
- the log-probabilities of a fixed text are as near the planned model's as that is to itself with
  its 16-bit weights moved by a millionth: at most three times as far, or 0.01 nats per token.

A tool with a recipe rounds by itself; types of GGUF files it rounds as they were scored, bit for
bit. There the squared error of each layer's weights stands beside
that of the planned layer (at most 2.5 times: nvfp4 without a scale per tensor loses 2.2 times as
much), and the text in the tool's own runner beside that of its dequantized weights (0.05 nats: the
runner of llama.cpp rounds inputs to 8 bits).

Where a tool cannot take a case on this machine, its error is the line, and another one is wrong.

Results are kept in ``results.json`` beside this file; the table in ``docs/engines.md`` is made
from it. The exit code is 1 where a line is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from engines.cases import CASES, MODELS, make_case, make_model, make_run
from engines.environments import environment_of, run_in, versions_in
from engines.page import RESULTS, write_page
from engines.tools import TOOLS, Tool

LARGEST_ERROR = {"float32": 2e-3, "bfloat16": 5e-3}
LARGEST_DIFFERENCE, TIMES_THE_NOISE = 0.01, 3
LARGEST_LOSS = 2.5
LARGEST_OF_RUNNER = 0.05
"""llama.cpp's runner rounds inputs to 8 bits, in blocks of 32 or 256."""
_MOST_NAMES = 3


def main() -> None:
    """Check each tool with each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", default=[], metavar="TOOL", help=", ".join(TOOLS))
    parser.add_argument("--work", type=Path, default=Path(".engines"))
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    work, wrong = options.work.absolute(), 0
    for tool in options.tools or TOOLS:
        python, environment = environment_of(tool, work)
        for name in options.models:
            model = make_model(name, work / "models" / name)
            for case in TOOLS[tool].cases:
                run = make_run(model, work / "runs" / name, case)
                folder = make_case(run, case, work / "cases" / name / case.replace(", ", "-"))
                row = {
                    "tool": tool,
                    "case": case,
                    "model": name,
                    **check(TOOLS[tool], python, folder, environment),
                }
                print(json.dumps(row), flush=True)
                keep(row)
                wrong += bool(row["wrong"])
    write_page()
    sys.exit(bool(wrong))


def check(tool: Tool, python: str, folder: Path, environment: Path) -> dict[str, Any]:
    """A line of the table: what a tool made of a case, or how it refused it, as it should."""
    start = time.perf_counter()
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    content = json.loads((folder / "case.json").read_text())
    refusal = tool.refusals.get((content["case"], Path(content["model"]).name))
    try:
        answer = json.loads(
            run_in(python, tool.script, [str(folder), str(environment)]).splitlines()[-1]
        )
    except RuntimeError as error:
        if refusal is not None and refusal in str(error):
            versions = versions_in(python, tool.names)
            return {"date": day, "versions": versions, "refused": refusal, "wrong": []}
        return {"date": day, "wrong": [str(error)]}
    seconds = round(time.perf_counter() - start)
    judged = judge(tool, answer, folder)
    if refusal is not None:
        judged["wrong"].append(f"it takes this, and once said: {refusal}")
    return {"date": day, "versions": answer["versions"], "seconds": seconds} | judged


def judge(tool: Tool, answer: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What an answer says of a case: numbers, and what is wrong.

    Args:
        tool: That gave it.
        answer: ``kinds`` (module -> kind), and those of ``missing`` (names that were never asked
            for), ``other_weights`` (names whose weights are not those of the plan, where they
            should be), ``unfilled`` (parameters of the tool's model that the checkpoint does not
            have), ``output_errors``, ``weight_losses`` (module -> number),
            ``runner_difference`` and ``log_probs`` that the tool has.
        folder: Of the case.
    """
    layers = json.loads((folder / "case.json").read_text())["layers"]
    expected = {name: tool.kind_of(row) for name, row in layers.items()}
    wrong = [
        f"{name}: {answer['kinds'].get(name)} instead of {kind}"
        for name, kind in expected.items()
        if answer["kinds"].get(name) != kind
    ]
    result: dict[str, Any] = {
        "num_layers": len(layers),
        "num_right": len(layers) - len(wrong),
        "num_formats": len({row["format"] for row in layers.values()}),
    }
    wrong = wrong[:_MOST_NAMES]
    if missing := answer.get("missing"):
        wrong.append(f"the tool never asked for {', '.join(missing[:_MOST_NAMES])}")
    if unfilled := answer.get("unfilled"):
        wrong.append(f"not in the checkpoint: {', '.join(unfilled[:_MOST_NAMES])}")
    if others := answer.get("other_weights"):
        wrong.append(f"other weights than the plan's: {', '.join(others[:_MOST_NAMES])}")
    if errors := answer.get("output_errors"):
        worst = max(errors, key=lambda name: errors[name])
        result["worst_output_error"] = errors[worst]
        if not errors[worst] <= LARGEST_ERROR[answer.get("dtype", "float32")]:
            wrong.append(f"{worst}: its outputs are off by {errors[worst]:.2g}")
    if losses := answer.get("weight_losses"):
        result["weight_losses"] = [min(losses.values()), max(losses.values())]
        if not max(losses.values()) <= LARGEST_LOSS:
            wrong.append(f"weights lose {max(losses.values()):.2g} times what the plan's lose")
    allowed = LARGEST_DIFFERENCE
    if "log_probs" in answer:
        planned = np.load(folder / "log_probs.npy")
        result["difference"] = float(np.abs(np.array(answer["log_probs"]) - planned).mean())
        result["noise"] = float(np.abs(np.load(folder / "moved.npy") - planned).mean())
        allowed = max(LARGEST_DIFFERENCE, TIMES_THE_NOISE * result["noise"])
    elif "runner_difference" in answer:
        result["difference"], allowed = answer["runner_difference"], LARGEST_OF_RUNNER
    if not result.get("difference", 0.0) <= allowed:
        wrong.append(f"the text is off by {result['difference']:.2g} nats per token")
    return result | {"wrong": wrong}


def keep(row: dict[str, Any]) -> None:
    """Write a line to the results, in place of an earlier one of the same tool, case and model."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    place = tuple(row[key] for key in ("tool", "case", "model"))
    rows = [r for r in rows if (r["tool"], r["case"], r["model"]) != place] + [row]
    tools, cases = list(TOOLS), list(CASES)
    rows.sort(
        key=lambda r: (tools.index(r["tool"]), cases.index(r["case"]), MODELS.index(r["model"]))
    )
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
