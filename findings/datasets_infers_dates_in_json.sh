#!/bin/sh
# datasets makes timestamps of texts in JSON that look like dates, and of texts in CSV numbers and nothing.
#
# Packages: datasets 5.2.0 (pyarrow 26.0.1, pandas 3.1.1), seen 2026-11-29.
# Expected: a text in quotes of a JSON file is a text; a column of a CSV whose cells are texts gives these texts.
# Seen: where every text at a place of the file's first part looks like a date, all are datetime.datetime: the arguments
#   of a tool call, which no chat template can write as JSON then ("Object of type datetime is not JSON serializable"),
#   and whole messages. In the CSV `null` and `NA` are None, `01` is 1.0. One more row with another text, and all are
#   texts again: what a row is depends on its neighbours.
# Fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import datetime
import json
import pathlib

import datasets

datasets.disable_progress_bars()


def chat(day):
    call = {"type": "function", "function": {"name": "book", "arguments": {"day": day}}}
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}


def days(*written):
    path = pathlib.Path(f"{len(written)}.jsonl")
    path.write_text("".join(json.dumps(chat(day)) + "\n" for day in written))
    rows = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
    return [row["messages"][0]["tool_calls"][0]["function"]["arguments"]["day"] for row in rows]


pathlib.Path("a.csv").write_text("text\nnull\nNA\n01\n")
cells = [row["text"] for row in datasets.load_dataset("csv", data_files="a.csv", split="train", streaming=True)]
print("datasets", datasets.__version__)
alone, beside = days("2026-11-29"), days("2026-11-29", "tomorrow")
print("the argument '2026-11-29':", repr(alone[0]))
print("beside 'tomorrow':        ", repr(beside[0]))
print("cells null, NA and 01:    ", cells)
try:
    json.dumps(alone[0])
    message = ""
except TypeError as error:
    message = str(error)
print("as JSON:", message)
assert isinstance(alone[0], datetime.datetime), "a text: changed"
assert beside == ["2026-11-29", "tomorrow"], "no texts: changed"
assert message, "it can be written: changed"
assert cells == [None, None, 1.0], "texts: changed"
PYTHON
