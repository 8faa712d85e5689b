#!/bin/sh
# datasets reads the files of a folder's commonest ending, and does not say that it leaves out the others.
#
# Packages: datasets 5.2.0 (pyarrow 26.0.1, pandas 3.1.1), seen 2026-11-29.
# Expected: `load_dataset(folder)` of two .jsonl files, a .csv, a .parquet and a .txt file with the same column gives
#   the rows of all, or an error that names the kinds.
# Seen: the rows of the two .jsonl files. One more .csv and .jsonl are equally many: then the .csv files are dropped or
#   the .jsonl files, as the order of their kinds decides. No warning, also not with logging at INFO. Files of an ending
#   that it does not know (.jsonlines) are left out the same way.
# A calibration set is then smaller than its folder, and another one after a file was added. Fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import io
import json
import logging
import pathlib

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

datasets.disable_progress_bars()
log = io.StringIO()
datasets.utils.logging.set_verbosity_info()
for handler in logging.getLogger("datasets").handlers:
    handler.setStream(log)
folder = pathlib.Path("data")
folder.mkdir()


def write(name):
    path = folder / name
    if path.suffix == ".csv":
        path.write_text(f"text\n{name}\n")
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [name]}), path)
    elif path.suffix == ".txt":
        path.write_text(f"{name}\n")
    else:
        path.write_text(json.dumps({"text": name}) + "\n")


def texts():
    rows = datasets.load_dataset(str(folder), split="train", streaming=True)
    return sorted(row["text"] for row in rows)


for name in ("a.jsonl", "b.jsonl", "c.csv", "d.parquet", "e.txt", "f.jsonlines"):
    write(name)
print("datasets", datasets.__version__)
print("in the folder:", sorted(path.name for path in folder.iterdir()))
first = texts()
print("read:", first)
for name in ("g.csv", "h.csv"):
    write(name)
second = texts()
print("with two more .csv files, read:", second)
named = [line for line in log.getvalue().splitlines() if "c.csv" in line or "e.txt" in line]
print("lines of its log at INFO that name a file left out:", len(named))
assert first == ["a.jsonl", "b.jsonl"], "others are read too: changed"
assert second == ["c.csv", "g.csv", "h.csv"], "others are read too: changed"
assert not named, "it says what it leaves out: changed"
PYTHON
