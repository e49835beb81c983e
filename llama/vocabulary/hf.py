"""The vocabulary of a tokenizer.json: byte-pair merges over bytes (Llama 3, SmolLM2) or over pieces (TinyLlama).

The file is checked before the library sees it, part by part against lists of what is supported: the library panics on
some broken files, and a part that it knows and we do not (lower-casing, dropout, truncation) would change ids or text.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from llama import files
from llama.errors import InputError

MAX_WORDS = 1 << 20
MAX_DEPTH = 4  # of sequences in sequences
MAX_CHARSMAP = 1 << 20  # characters in base64; sentencepiece's own have 330,000
MAX_PATTERN = 2000  # characters of a regular expression
FIELDS = {"version", "truncation", "padding", "added_tokens", "model"}
PARTS = {
    "normalizer": {"NFC", "Precompiled", "Prepend", "Replace", "Sequence"},
    "pre_tokenizer": {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Sequence", "Split"},
    "post_processor": {"ByteLevel", "Sequence", "TemplateProcessing"},
    "decoder": {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"},
}
# What token_bytes and leading_space do: nothing else may stand in a decoder.
DECODED = (
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)
NO_SPACE = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}  # in all that can prepend one
CHILDREN = ("normalizers", "pretokenizers", "processors", "decoders")  # what the parts of a Sequence are called
MODEL_VALUES = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}
MODEL_FIELDS = {*MODEL_VALUES, "vocab", "merges", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"}
# Special tokens that end an answer or a text in every vocabulary that has them.
ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "</s>")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes in order for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTES = _byte_of_character()


class _Unsupported(ValueError):
    """The file is whole, but holds what is not supported."""


class HfVocabulary:
    """`model` is a Tokenizer of the `tokenizers` library. eos_ids: the end-of-text token first, then other stops."""

    kind = "hf"

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        eos_ids: list[int],
        bos_id: int | None = None,
        pad_id: int | None = None,
        adds_bos: bool = False,
        template: str = "",
    ) -> None:
        model.encode_special_tokens = True  # spelled in a text, they stay text
        model.no_truncation()
        model.no_padding()
        self.model, self.template = model, template
        self.stop_ids = list(dict.fromkeys([*eos_ids, *_ends(model)]))
        self.bos_id, self.eos_id = bos_id, self.stop_ids[0]
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.adds_bos = adds_bos and bos_id is not None
        ends = [model.id_to_token(i) for i in (self.eos_id, bos_id, *self.stop_ids) if i is not None]
        model.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in ends[:2]])
        if model.model.unk_token in ends:
            model.model.unk_token = None  # what has no token is left out; else it would end a text
        self.n_words = model.get_vocab_size()
        added = model.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self._added = {i: token.content.encode() for i, token in added.items()}
        decoders, *others = (
            [] if part is None else _flat(json.loads(part.__getstate__()))
            for part in (model.decoder, model.normalizer, model.pre_tokenizer)
        )
        leaves = [part for parts in others for part in parts]
        self.spaces_parts = not any(part.get("prepend_scheme") == "first" for part in leaves)
        self._adds_space = any(part.get(name, off) != off for part in leaves for name, off in NO_SPACE.items())
        self._is_byte_level = any(part["type"] == "ByteLevel" for part in decoders)
        self.leading_space = any(
            part.get("start") == 1 or part.get("prepend_scheme") in ("always", "first") for part in decoders
        )
        self._never = {i for name, i in self.special.items() if name != model.model.unk_token}

    def encode(self, text: str, continues: bool = False) -> list[int]:
        model = self._continuing if continues and self._adds_space else self.model
        with _no_panic("the tokenizers library cannot encode the text with this tokenizer.json"):
            ids = model.encode(text, add_special_tokens=False).ids
        if not self._never.isdisjoint(ids):
            raise InputError("merges of the tokenizer make a special token of ordinary text; its vocabulary is broken")
        return ids

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The tokenizer without what puts a space before a text."""
        content = json.loads(self.model.to_str())
        for part in (*_flat(content["normalizer"]), *_flat(content["pre_tokenizer"])):
            part |= {name: value for name, value in NO_SPACE.items() if name in part}
        model = tokenizers.Tokenizer.from_str(json.dumps(content))
        model.encode_special_tokens = True
        return model

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        piece = self.model.id_to_token(token)
        if self._is_byte_level:
            return bytes(map(BYTES.__getitem__, piece))
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


@contextlib.contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """Turn what the library raises into InputError; a panic of it is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{what} ({' '.join(str(error).split())[:200]}); download it again") from error


def _ends(model: tokenizers.Tokenizer) -> list[int]:
    special = {token.content: i for i, token in model.get_added_tokens_decoder().items() if token.special}
    return [special[name] for name in ENDS if name in special]


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a Sequence, of Sequences in it too; or the one part; or none."""
    if part is None:
        return []
    inner = [child for name in CHILDREN for child in part.get(name, ())]
    return [leaf for child in inner for leaf in _flat(child)] if part["type"] == "Sequence" else [part]


def read(data: bytes, path: Path) -> HfVocabulary:
    """The vocabulary, with its special ids from the files beside it. Raises InputError naming file and field."""
    try:
        content = files.parse_json(data)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}; download it again") from error
    model = from_content(content, path)
    return HfVocabulary(model, **_special_ids(model, path, content))


def from_content(content: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer of what a tokenizer.json holds. Raises InputError for what is broken or not supported."""
    try:
        _check(content)
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: a number where a list should be
        is_whole = isinstance(error, _Unsupported)
        remedy = "pass another file of this tokenizer, tokenizer_path=FILE" if is_whole else "download it again"
        raise InputError(f"{path}: {error}; {remedy}") from error
    with _no_panic(f"{path}: the tokenizers library cannot read it"):
        model = tokenizers.Tokenizer.from_str(json.dumps(content))
    wrong = [t["content"] for t in content["added_tokens"] if model.token_to_id(t["content"]) != t["id"]]
    if wrong:
        raise InputError(f"{path}:added_tokens: {wrong[0]!r} has a different id in model.vocab; download it again")
    return model


def _check(content: dict[str, Any]) -> None:
    """Raise ValueError, which names the field, for what the library must not see or we do not support."""
    _require_known("", content, FIELDS | PARTS.keys())
    for name in PARTS:
        _check_part(name, content.get(name))
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError("model: is missing")
    _require_known("model.", model, MODEL_FIELDS)
    for name, accepted in MODEL_VALUES.items():
        if model.get(name) not in accepted:
            raise _Unsupported(f"model.{name}: {model.get(name)!r} is not supported, only {accepted[0]}")
    vocab, merges, added = model.get("vocab"), model.get("merges"), content.setdefault("added_tokens", [])
    for name, value, kind in (("vocab", vocab, dict), ("merges", merges, list), ("added_tokens", added, list)):
        if not isinstance(value, kind) or len(value) > MAX_WORDS:
            raise ValueError(f"{name}: must be a {kind.__name__} of at most {MAX_WORDS:,} entries")
    for i, token in enumerate(added):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise ValueError(f"added_tokens[{i}]: must be an object with content and id")
    names = {token["content"]: token.get("id") for token in added}
    ids = {**vocab, **names}
    if any(type(i) is not int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"vocab and added_tokens: {len(ids)} tokens must have the ids 0 to {len(ids) - 1}, each once")
    for i, merge in enumerate(merges):
        try:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            valid = left and right and left in vocab and right in vocab and left + right in vocab
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(f"model.merges[{i}]: {str(merge)[:60]!r} must be two pieces that make a third")
    if model.get("unk_token") is not None and model["unk_token"] not in vocab:
        raise ValueError("model.unk_token: is not in model.vocab")
    kinds = [{part["type"] for part in _flat(content.get(name))} for name in ("pre_tokenizer", "decoder")]
    if not kinds[1] or ("ByteLevel" in kinds[0]) != ("ByteLevel" in kinds[1]):
        raise ValueError("pre_tokenizer and decoder: ByteLevel must be in both, or in neither, and a decoder there")
    if "ByteLevel" in kinds[1] and not set("".join(vocab.keys() - names.keys())) <= BYTES.keys():
        raise ValueError("model.vocab: holds pieces that are not spelled in bytes, unlike the pre_tokenizer's")


def _require_known(place: str, content: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(name for name in content.keys() - known if content[name] is not None):
        raise _Unsupported(f"{place}{unknown[0]}: is not supported")


def _check_part(name: str, part: Any, depth: int = 0) -> None:
    if part is None:
        return
    supported = PARTS[name]
    if not isinstance(part, dict) or part.get("type") not in supported or depth > MAX_DEPTH:
        kind = part.get("type") if isinstance(part, dict) else part
        raise _Unsupported(f"{name}: {kind!r} is not supported, only {', '.join(sorted(supported))}")
    children = [child for key in CHILDREN for child in part.get(key) or ()] if part["type"] == "Sequence" else []
    for child in children:
        _check_part(name, child, depth + 1)
    if part["type"] == "Split" and len(json.dumps(part)) > MAX_PATTERN:
        raise ValueError(f"{name}: holds a pattern of more than {MAX_PATTERN} characters")
    if part["type"] == "Precompiled" and not _is_charsmap(part.get("precompiled_charsmap")):
        raise ValueError(f"{name}: precompiled_charsmap is broken")
    if name == "decoder" and part["type"] in ("Replace", "Strip") and part not in DECODED:
        raise _Unsupported(f"{name}: {part['type']} is supported only as {DECODED[part['type'] == 'Strip']}")


def _is_charsmap(blob: Any) -> bool:
    """Whether sentencepiece's table of characters to replace is sound: each step of a search in it, and each result.

    The size of a double array in bytes, the array (32-bit units: 31 set, an offset into the texts; else the offset of
    the children, with 8 set where the first is a result), and the texts.
    """
    try:
        data = base64.b64decode(blob[:MAX_CHARSMAP], validate=True)
        size = int.from_bytes(data[:4], "little")
        units, texts = [unit for (unit,) in struct.iter_unpack("<I", data[4 : 4 + size])], data[4 + size :]
        texts.decode()
    except (TypeError, ValueError, struct.error):
        return False
    for i, unit in enumerate(units):
        first = i ^ ((unit >> 10) << ((unit & 512) >> 6))
        if unit >> 31:
            value = unit & 0x7FFF_FFFF
            sound = value < len(texts) and texts[value] & 0xC0 != 0x80
        else:
            sound = first | 255 < len(units) and (not unit & 256 or units[first] >> 31)
        if not sound:
            return False
    return bool(units)


def _special_ids(model: tokenizers.Tokenizer, path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of HfVocabulary that stand in the files beside tokenizer.json, and in its post-processor."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
    near = {name: files.read_json(path.parent / name) if (path.parent / name).is_file() else {} for name in names}

    def of_text(field: str) -> list[int]:
        for name in names[:2]:
            value = near[name].get(field)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                if (token := model.token_to_id(value)) is not None:
                    return [token]
                if field != "pad_token":
                    raise InputError(f"{path.parent / name}:{field}: {value!r} is not in {path.name}")
        return []

    def of_id(field: str) -> list[int]:
        values = [near[name].get(field) for name in names[2:]]
        flat = [i for value in values for i in (value if isinstance(value, list) else [value]) if i is not None]
        if any(type(i) is not int for i in flat):
            raise InputError(f"{path.parent}: generation_config.json and config.json:{field}: must be ids")
        return [i for i in flat if 0 <= i < model.get_vocab_size()]

    parts = [part for processor in _flat(content.get("post_processor")) for part in processor.get("single", ())[:1]]
    first = [model.token_to_id(part["SpecialToken"]["id"]) for part in parts if "SpecialToken" in part]
    bos, eos, pad = [*first, *of_text("bos_token"), *of_id("bos_token_id")], of_text("eos_token"), of_text("pad_token")
    eos = [*eos, *of_id("eos_token_id"), *_ends(model)]
    if not eos:
        raise InputError(f"{path.parent}: no file says which token ends a text; add eos_token to tokenizer_config.json")
    adds_bos = near[names[0]].get("add_bos_token")
    return {
        "eos_ids": eos,
        "bos_id": bos[0] if bos else None,
        "pad_id": [*pad, *of_id("pad_token_id"), eos[0]][0],
        "adds_bos": adds_bos if isinstance(adds_bos, bool) else bool(first),
        "template": template_of(path.parent),
    }


def template_of(directory: Path) -> str:
    """The text of a checkpoint's chat template, from where transformers takes it; empty for none.

    Of several with names it is the default: those for tools and documents have system messages of their own.
    """
    config, file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    if file.is_file():
        return files.read_text(file)
    template = files.read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        defaults = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = defaults[0].get("template") if defaults else None
    return template if isinstance(template, str) else ""
