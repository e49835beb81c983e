"""The vocabulary in a GGUF file's metadata: what tokenizer.json or a sentencepiece model would hold, put together anew.

Of byte pairs (`gpt2`) it becomes a model of the `tokenizers` library, of pieces with scores (`llama`) one of
sentencepiece. How text is cut before merging has only a name there; CUTS says what the names stand for. The chat
template is kept as text, which tells formats apart, and never executed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama import gguf_header
from llama.errors import InputError
from llama.vocabulary import hf, pieces
from llama.vocabulary.ranks import LLAMA3_PATTERN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type, and sentencepiece's
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre -> the patterns that cut a text, each what the one before left. The first name is what is written.
CUTS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (LLAMA3_PATTERN,)),
    "smollm": (r"\p{N}", GPT2_PATTERN),
    "gpt-2": (GPT2_PATTERN,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"),
}
PREFIX = "tokenizer.ggml."


def read(path: Path) -> hf.HfVocabulary | pieces.Pieces:
    """Raises InputError naming file and field."""
    fields = gguf_header.read(path).fields
    own = {key.removeprefix(PREFIX): value for key, value in fields.items() if key.startswith(PREFIX)}
    kind, tokens, types = own.get("model"), own.get("tokens"), own.get("token_type")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{path}:{PREFIX}model: {kind!r} is not supported, only gpt2 and llama; pass tokenizer_path")
    if not _is_list(tokens, str) or not _is_list(types, int) or len(types) != len(tokens):
        raise InputError(f"{path}:{PREFIX}tokens and token_type: must be lists of the same length; convert it anew")
    while tokens and (tokens[-1], types[-1]) == (f"[PAD{len(tokens) - 1}]", UNUSED):  # up to the size of the table
        del tokens[-1], types[-1]
    for name, value in own.items():
        if name.endswith("_token_id") and not (type(value) is int and 0 <= value < len(tokens)):
            raise InputError(f"{path}:{PREFIX}{name}: {value!r} is not the id of a token; convert it anew")
    template = fields.get("tokenizer.chat_template", "")
    return (_pieces if kind == "llama" else _byte_pairs)(path, own, tokens, types, str(template))


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _byte_pairs(path: Path, own: dict[str, Any], tokens: list[str], types: list[int], template: str) -> hf.HfVocabulary:
    pre = own.get("pre", "default")
    if pre == "default" and "<|begin_of_text|>" in tokens:  # Llama 3 in files from before there were names
        pre = "llama-bpe"
    if not isinstance(pre, str) or pre not in CUTS:
        raise InputError(f"{path}:{PREFIX}pre: {pre!r} is not supported, only {', '.join(CUTS)}; pass tokenizer_path")
    if "eos_token_id" not in own:
        raise InputError(f"{path}:{PREFIX}eos_token_id: is missing; nothing says which token ends a text")
    is_llama3 = CUTS[pre] == CUTS["llama-bpe"]
    whole = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    cuts = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in CUTS[pre]]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {i: token for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)}
    n_words = 1 + max((i for i in range(len(tokens)) if i not in added), default=-1)  # added ones behind need no id
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": types[i] == CONTROL, **whole} for i, token in added.items()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens[:n_words])},
            "merges": own.get("merges"),
            "ignore_merges": is_llama3,
        },
    }
    ends = [own.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    return hf.HfVocabulary(
        hf.from_content(content, path),
        eos_ids=[i for i in ends if i is not None],
        bos_id=own.get("bos_token_id"),
        pad_id=own.get("padding_token_id"),
        adds_bos=own.get("add_bos_token", is_llama3) is True,
        template=template,
    )


def _pieces(path: Path, own: dict[str, Any], tokens: list[str], types: list[int], template: str) -> pieces.Pieces:
    scores = own.get("scores")
    if not _is_list(scores, float) or len(scores) < len(tokens):
        raise InputError(f"{path}:{PREFIX}scores: must be a number for each token; convert it anew")
    if any(not NORMAL <= kind <= BYTE for kind in types):
        raise InputError(f"{path}:{PREFIX}token_type: must be from {NORMAL} to {BYTE}; convert it anew")
    ids = {name: own.get(f"{name}_token_id", default) for name, default in (("unknown", 0), ("bos", 1), ("eos", 2))}
    named = [(45 + at, tokens[i].encode()) for at, i in enumerate(ids.values()) if i < len(tokens)]
    adds_space = own.get("add_space_prefix", True) is True
    proto = _message(
        *((1, _message((1, t.encode()), (2, s), (3, kind))) for t, s, kind in zip(tokens, scores, types, strict=False)),
        (2, _message((3, 2), (35, BYTE in types), *named)),  # trainer_spec: model_type BPE, byte_fallback, <unk> ...
        (3, _message((1, b"identity"), (3, adds_space), (4, False), (5, True))),  # normalizer_spec
    )
    try:
        vocabulary = pieces.read(proto, path, template)
    except InputError as error:
        raise InputError(f"{path}:{PREFIX}tokens: no sentencepiece model can have these; convert it anew") from error
    vocabulary.adds_bos = own.get("add_bos_token", True) is True
    ends = (own.get(f"{name}_token_id") for name in ("eot", "eom"))
    vocabulary.stop_ids = list(dict.fromkeys([*vocabulary.stop_ids, *(i for i in ends if i is not None)]))
    return vocabulary


def _message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A protobuf message of these fields, in its wire format."""
    parts: Iterable[bytes] = (
        _varint(number << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, float)
        else _varint(number << 3 | 2) + _varint(len(value)) + value
        if isinstance(value, bytes)
        else _varint(number << 3) + _varint(value)
        for number, value in fields
    )
    return b"".join(parts)


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the eighth says that there are more."""
    low = bytes([value & 127 | 128 * (value > 127)])
    return low + _varint(value >> 7) if value > 127 else low
