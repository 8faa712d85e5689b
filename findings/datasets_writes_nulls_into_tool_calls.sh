#!/bin/sh
# datasets writes nulls for arguments of other rows' tool calls where rows come from Python or Parquet, not from JSON.
#
# Packages: datasets 5.2.0 (pyarrow 26.0.1, pandas 3.1.1), jinja2 3.1.6, seen 2026-11-29.
# Expected: chats with calls of different arguments are the same chats after `Dataset.from_list`, in memory, in Parquet
#   and saved to disk; or the same as `load_dataset("json")` makes of the same rows.
# Seen: `from_list` merges the arguments into one struct: each call has the arguments of all calls, null where it had
#   none, and the user's message has `tool_calls`. A chat template that writes arguments as JSON writes
#   the nulls, so a model would be calibrated on calls that nobody made. `load_dataset("json")` of the same rows keeps
#   them apart (its type Json): whether a chat is whole depends on the way that it took. Fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 \
    jinja2==3.1.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
import pathlib

import datasets
import jinja2

datasets.disable_progress_bars()


def chat(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "Do it."}, {"role": "assistant", "content": None, "tool_calls": [call]}]}


rows = [chat("find_weather", city="Oslo"), chat("book", day="Monday", seats=2)]
template = jinja2.Template(
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
made = datasets.Dataset.from_list(rows)
made.to_parquet("rows.parquet")
made.save_to_disk("saved")
pathlib.Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
ways = {
    "from_list": made,
    "Parquet of it": datasets.load_dataset("parquet", data_files="rows.parquet", split="train", streaming=True),
    "saved to disk": datasets.load_from_disk("saved"),
    "JSON lines": datasets.load_dataset("json", data_files="rows.jsonl", split="train", streaming=True),
}
print("datasets", datasets.__version__)
print("as it is:      ", template.render(rows[0]))
written = {}
for name, way in ways.items():
    first = next(iter(way))
    written[name] = template.render(first)
    print(f"{name + ':':15}", written[name], "| keys of the user's message:", sorted(first["messages"][0]))
plain = template.render(rows[0])
for name in ("from_list", "Parquet of it", "saved to disk"):
    assert json.loads(written[name]) == {"city": "Oslo", "day": None, "seats": None}, f"{name}: changed"
assert written["JSON lines"] == plain, "JSON lines: changed"
PYTHON
