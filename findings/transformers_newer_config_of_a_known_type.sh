#!/bin/sh
# A config that transformers 5.18 writes is not always one that 5.14 reads, of types that both have.
#
# Packages: transformers 5.14.1 and 5.18.0 (huggingface_hub 1.33.0), seen 2026-11-29.
# Expected: a checkpoint saved by a newer minor release loads in an older one that has its model type;
#   5.14 was told by nothing that these are other models.
# Seen: 5.18 renames a layer type as it loads (`deepseek_sparse_attention` to `indexed_attention`:
#   DeepSeek-V3.2, GLM-5) and writes the new name, which 5.14 refuses; it writes Gemma 4's head
#   dimensions in another form, and 5.14 stops over an attribute that "may vary across layers". Loading
#   and saving again, as exporters do, is enough. The other way works: 5.18 reads what 5.14 writes.
# Prints what each release makes of the other's files; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.14.1 5.18.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check \
        transformers=="$version" huggingface_hub==1.33.0
done
cat > "$folder/write.py" <<'PYTHON'
import sys

import transformers

for kind in sys.argv[2:]:
    transformers.CONFIG_MAPPING[kind]().save_pretrained(f"{sys.argv[1]}/{kind}")
PYTHON
cat > "$folder/read.py" <<'PYTHON'
import sys

import transformers

for kind in sys.argv[2:]:
    try:
        transformers.AutoConfig.from_pretrained(f"{sys.argv[1]}/{kind}")
        print(f"{transformers.__version__} reads {kind}")
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        print(f"{transformers.__version__} stops at {kind}: {type(error).__name__}: {reason}")
PYTHON
kinds="deepseek_v32 glm_moe_dsa gemma4_text llama qwen3_moe"
cd "$folder"
for version in 5.14.1 5.18.0; do
    # shellcheck disable=SC2086
    "$version/bin/python" -W ignore write.py "by-$version" $kinds 2> errors || { cat errors; exit 1; }
done
# shellcheck disable=SC2086
{
    5.18.0/bin/python -W ignore read.py by-5.14.1 $kinds
    5.14.1/bin/python -W ignore read.py by-5.18.0 $kinds
} 2> errors | tee output
test "$(grep -c '^5.18.0 reads' output)" = 5 || { echo "5.18 no longer reads all: changed"; exit 1; }
test "$(grep -c '^5.14.1 stops' output)" = 3 || { echo "5.14 now reads more: changed"; exit 1; }
grep -q '^5.14.1 reads llama' output
