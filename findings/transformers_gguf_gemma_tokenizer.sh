#!/bin/sh
# transformers cuts text otherwise than SentencePiece once Gemma's tokenizer comes from a GGUF file.
#
# Packages: transformers 5.14.1 (tokenizers 0.22.2), gguf 0.19.0, sentencepiece 0.2.3, seen 2026-11-29.
# Expected: `AutoTokenizer.from_pretrained(folder, gguf_file=...)` of architecture gemma3 gives the tokens
#   of the SentencePiece model that is in the file (BPE: a piece's score is minus its rank), BOS first where
#   `tokenizer.ggml.add_bos_token` is true, and a saved copy gives the same tokens again.
# Seen: the scores are taken for log probabilities of a Unigram model, which cuts words elsewhere and into
#   more tokens; no BOS; and the copy that `save_pretrained` writes cuts a text into more tokens still.
# A model fed with these tokens gives finite, plausible and wrong losses. Fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.14.1 \
    tokenizers==0.22.2 torch==2.13.0 gguf==0.19.0 sentencepiece==0.2.3
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import io
import pydoc_data.topics

import gguf
import sentencepiece
import transformers

text = "\n".join(pydoc_data.topics.topics.values())
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text.splitlines()), model_writer=model, model_type="bpe",
    vocab_size=4000, byte_fallback=True, normalization_rule_name="identity",
    add_dummy_prefix=False, remove_extra_whitespaces=False, pad_id=3, minloglevel=2,
)
pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
numbers = range(pieces.vocab_size())
kinds = gguf.TokenType


def kind(number):
    if pieces.is_unknown(number):
        return kinds.UNKNOWN
    if pieces.is_control(number):
        return kinds.CONTROL
    return kinds.BYTE if pieces.is_byte(number) else kinds.NORMAL


writer = gguf.GGUFWriter("gemma.gguf", "gemma3")
writer.add_context_length(128)
writer.add_embedding_length(64)
writer.add_block_count(1)
writer.add_feed_forward_length(64)
writer.add_head_count(2)
writer.add_head_count_kv(1)
writer.add_key_length(32)
writer.add_value_length(32)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_tokenizer_model("llama")
writer.add_token_list([pieces.id_to_piece(number) for number in numbers])
writer.add_token_scores([pieces.get_score(number) for number in numbers])
writer.add_token_types([kind(number) for number in numbers])
for role in ("bos", "eos", "unk", "pad"):
    getattr(writer, f"add_{role}_token_id")(getattr(pieces, f"{role}_id")())
writer.add_add_bos_token(True)
writer.add_add_space_prefix(False)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

tokenizer = transformers.AutoTokenizer.from_pretrained(".", gguf_file="gemma.gguf")
tokenizer.save_pretrained("saved")
again = transformers.AutoTokenizer.from_pretrained("saved")
sentence = "The interpreter raises an exception when the attribute is missing."
print("transformers", transformers.__version__, "gguf", "0.19.0")
print("backend:", type(tokenizer.backend_tokenizer.model).__name__)
print("SentencePiece:       ", pieces.encode(sentence, out_type=str))
print("transformers:        ", tokenizer.tokenize(sentence))
print("saved and read again:", again.tokenize(sentence))
expected = pieces.encode(text[:20000])
counts = [len(ids) for ids in (expected, tokenizer(text[:20000])["input_ids"], again(text[:20000])["input_ids"])]
print("tokens of the same 20,000 characters:", counts)
print("begins with BOS:", tokenizer(sentence)["input_ids"][0] == pieces.bos_id())
assert type(tokenizer.backend_tokenizer.model).__name__ == "Unigram", "no longer a Unigram model: changed"
assert tokenizer(sentence, add_special_tokens=False)["input_ids"] != pieces.encode(sentence), "equal: changed"
assert counts[0] < counts[1], "not more tokens: changed"
assert tokenizer(sentence)["input_ids"][0] != pieces.bos_id(), "BOS is there: changed"
assert counts[2] != counts[1], "the saved copy cuts the same: changed"
PYTHON
