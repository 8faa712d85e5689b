#!/bin/sh
# Chat templates of models that know tools refuse forms of a message in which agents log their calls, each another one.
#
# Packages: trl 1.16.0 (its folder chat_templates holds the templates of 30 families, as the models have them),
#   transformers 5.14.1, seen 2026-11-29.
# Expected: a template that writes tool calls takes an assistant's message as the chat API of OpenAI has it:
#   `content` null, or absent, beside `tool_calls`, whose arguments are a text of JSON.
# Seen: of 29 templates 18 refuse that form, and no other form is taken by all: 6 refuse a content that is null
#   ("'NoneType' object is not iterable"), 2 one that is absent ("'dict object' has no attribute 'content'"), 16 arguments
#   that are a text ("'str object' has no attribute 'items'"), 2 those that are an object ('can only concatenate str (not
#   "dict")'); one writes the word None for null.
# Who skips chats that a template refuses loses all calls of tools with such a model. Fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.14.1 jinja2==3.1.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps trl==1.16.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import pathlib
import sysconfig

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

TOOL = {"type": "function", "function": {"name": "find", "description": "", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": ""}}, "required": []}}}
TEXT, OBJECT = '{"city": "Oslo"}', {"city": "Oslo"}
FORMS = {
    "content null": ({"content": None}, OBJECT),
    "content absent": ({}, OBJECT),
    "content ''": ({"content": ""}, OBJECT),
    "content null, arguments of JSON": ({"content": None}, TEXT),
    "content '', arguments of JSON": ({"content": ""}, TEXT),
}


def written(template, content, arguments):
    call = {"id": "c12345678", "type": "function", "function": {"name": "find", "arguments": arguments}}
    chat = [{"role": "user", "content": "How warm is it?"}, {"role": "assistant", **content, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c12345678", "name": "find", "content": "7 degrees"}]
    try:
        texts, _ = render_jinja_template([chat], tools=[TOOL], chat_template=template, bos_token="", eos_token="")
    except Exception:
        return None
    return texts[0]


folder = pathlib.Path(sysconfig.get_path("purelib")) / "trl" / "chat_templates"
refusing = {form: [] for form in FORMS}
know = saying_none = 0
for path in sorted(folder.glob("*.jinja")):
    if path.stem.endswith("_training"):
        continue
    texts = {form: written(path.read_text(), *parts) for form, parts in FORMS.items()}
    plain = written(path.read_text(), {"content": ""}, OBJECT) or written(path.read_text(), {"content": ""}, TEXT) or ""
    if "Oslo" not in plain + "".join(filter(None, texts.values())):
        continue
    know += 1
    saying_none += "None" in (texts["content null"] or "")
    for form, text in texts.items():
        if text is None:
            refusing[form].append(path.stem)
print("transformers", transformers.__version__, "trl 1.16.0")
print("templates that write calls of tools:", know, "of which write the word None:", saying_none)
for form, names in refusing.items():
    print(f"refuse {form}: {len(names)}  {' '.join(names)}")
always = set.intersection(*map(set, refusing.values()))
assert know > 20 and not always, "fewer templates write calls: changed"
for form in ("content null", "content absent", "content null, arguments of JSON"):
    assert refusing[form], f"none refuses {form}: changed"
assert saying_none, "none writes None: changed"
PYTHON
