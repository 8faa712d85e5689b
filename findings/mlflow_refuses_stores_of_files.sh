#!/bin/sh
# MLflow refuses to write to a folder, its documented default, unless a variable allows it.
#
# Packages: mlflow-skinny 3.17.2, seen 2026-11-30.
# Expected: `MlflowClient(tracking_uri="file:///some/folder")` logs there, as in MLflow 2; a store that
#   will not be developed further is a warning.
# Seen: `MlflowException`, "in maintenance mode"; with MLFLOW_ALLOW_FILE_STORE=true all works. The
#   database that the message recommends (sqlite) needs packages that mlflow-skinny does not bring.
# Prints what was seen; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlflow-skinny==3.17.2
cd "$folder"
cat > store.py <<'PYTHON'
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

URI = Path("runs").absolute().as_uri()
try:
    MlflowClient(tracking_uri=URI)
    refused = ""
except MlflowException as error:
    refused = str(error)
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
client = MlflowClient(tracking_uri=URI)
run = client.create_run(client.create_experiment("some"))
client.log_metric(run.info.run_id, "loss", 0.5)
logged = client.get_run(run.info.run_id).data.metrics
has_database = importlib.util.find_spec("sqlalchemy") is not None
print("mlflow-skinny", version("mlflow-skinny"))
print(f"without the variable: {refused.split(' Please')[0] or 'no error'}; with it: {logged}")
print(f"sqlalchemy is installed: {has_database}")
assert "maintenance mode" in refused, "a folder is taken: changed"
assert logged == {"loss": 0.5}, "nothing is logged with the variable: changed"
assert not has_database, "the package for databases comes with it: changed"
PYTHON
venv/bin/python -W ignore store.py
