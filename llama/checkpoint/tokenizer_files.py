"""A tokenizer's files in a checkpoint directory: copied as they are, or made for transformers from a tokenizer.model.

    tokenizer.json           the source's own with the files beside it, or made from its tokenizer.model
    tokenizer_config.json    for AutoTokenizer, with a chat template for the format of chat.py where none came along
    generation_config.json   every id that ends a text here, and how the source's folder samples

Ids are the same in all forms. One thing is not: in transformers, a text that spells a special token becomes that token.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from llama import files
from llama.chat import ChatFormat
from llama.checkpoint.locate import is_gguf
from llama.config import ModelArgs
from llama.errors import InputError
from llama.tokenizer import Tokenizer
from llama.vocabulary.hf import BYTES
from llama.vocabulary.ranks import LLAMA3_PATTERN

TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
NEIGHBOURS = ("tokenizer.model", "special_tokens_map.json", "added_tokens.json", TEMPLATE)  # copied, never run
SAMPLING = ("do_sample", "temperature", "top_p", "top_k")  # kept from the source's generation_config.json
# The formats of chat.py as programs for others to run, each by its mark there.
CHAT_TEMPLATES = {
    "<|start_header_id|>": "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "<|im_start|>": "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "[INST]": "{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + message.content) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
}
MAX_PIECE = 1024  # Llama 3's longest are 128 spaces
Text = TypeVar("Text", bytes, str)


def write(path: Path, directory: Path, args: ModelArgs | None = None) -> dict[str, Any]:
    """Write a tokenizer for transformers, with its tokenizer.model where there is one; returns its special ids.

    args: the shape of the model that it is for.
    """
    tokenizer = Tokenizer(path)
    config, generation = tokenizer_config(tokenizer), special_ids(tokenizer)
    generation["pad_token_id"] = tokenizer.pad_id  # may be end-of-text here, where nothing is trained
    if tokenizer.kind == "tiktoken":
        _save(byte_level(tokenizer), directory)
        (directory / "original").mkdir()  # beside the weights, other programs would take it for sentencepiece
        shutil.copyfile(path, directory / "original/tokenizer.model")
    elif tokenizer.kind == "sentencepiece":
        _save(from_pieces(tokenizer), directory)
        (directory / "tokenizer.model").write_bytes(tokenizer.vocabulary.model.serialized_model_proto())
    elif is_gguf(path):
        model = tokenizers.Tokenizer.from_str(tokenizer.vocabulary.model.to_str())
        _save(put_bos_first(model, tokenizer), directory)
    else:
        for name in (path.name, *NEIGHBOURS):
            if (path.parent / name).is_file():
                shutil.copyfile(path.parent / name, directory / (TOKENIZER if name == path.name else name))
        given = path.parent / TOKENIZER_CONFIG
        config |= files.read_json(given) if given.is_file() else {}
    if args is not None:
        config.setdefault("model_max_length", args.trained_context)
        if args.vocab_size > tokenizer.n_words:  # a padded table; its last rows are never drawn
            generation["suppress_tokens"] = list(range(tokenizer.n_words, args.vocab_size))
    files.write_json(directory / TOKENIZER_CONFIG, config)
    files.write_json(directory / GENERATION_CONFIG, generation | sampling_of(path.parent))
    return special_ids(tokenizer)


def _save(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
    """As its own `save` does, whose error for a full disk is no OSError."""
    (directory / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def copy(path: Path | None, directory: Path) -> None:
    """Put a tokenizer, if any, into a directory of Meta's layout or ours: tokenizer.model as it is, others as JSON."""
    if path is None:
        return
    if is_gguf(path) or Tokenizer(path).kind == "hf":
        write(path, directory)
    else:
        shutil.copyfile(path, directory / "tokenizer.model")


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What AutoTokenizer of transformers 4 and 5 needs beside a tokenizer.json."""
    named = {token: name for name, token in tokenizer.special_tokens.items()}
    name_of = tokenizer.vocabulary.model.id_to_token if tokenizer.kind == "hf" else named.get  # an end may be a word
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    if tokenizer.pad_id == tokenizer.eos_id:  # trainers leave pads out of the loss, and with them the end of a text
        del ids["pad_token"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_input_names"] = ["input_ids", "attention_mask"]  # without it, transformers 4 gives segments as well
    config |= {name: name_of(token) for name, token in ids.items() if token is not None}
    if template := tokenizer.template or chat_template(tokenizer):
        config["chat_template"] = template
    return config


def chat_template(tokenizer: Tokenizer) -> str:
    """A template that gives the ids of chat.py for any dialog that spells no special token; empty without a format."""
    try:
        kind = ChatFormat(tokenizer).kind()
    except InputError:
        return ""
    return "{{ bos_token }}" * (tokenizer.adds_bos and kind != "[INST]") + CHAT_TEMPLATES[kind]


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Begin, padding, and all that ends a text or an answer in a dialog."""
    stops = tokenizer.stop_tokens
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else stops[0]}
    return ids if tokenizer.pad_id == tokenizer.eos_id else {**ids, "pad_token_id": tokenizer.pad_id}


def sampling_of(folder: Path) -> dict[str, Any]:
    """How the source's folder samples by default."""
    path = (folder.parent if folder.name == "original" else folder) / GENERATION_CONFIG
    given = files.read_json(path) if path.is_file() else {}
    return {name: given[name] for name in SAMPLING if isinstance(given.get(name), (bool, int, float))}


# From tokenizer.model to tokenizer.json


def merges(rank: Mapping[Text, float]) -> list[tuple[Text, Text]]:
    """The merges of a byte-pair vocabulary in which lower ranks merge first, in that order.

    Whatever stands around it, a token is always built from the same two parts: those before the last merge when it is
    encoded alone. A token that merging never builds has none; it is found only where it is a whole word.
    """
    found = []
    if any(len(token) > MAX_PIECE for token in rank):
        raise InputError(
            f"the tokenizer has a token of more than {MAX_PIECE:,} characters; it is no vocabulary of words"
        )
    # Of equal ones (Llama 2's runs of spaces) the longest goes first: what can be built was built from the left.
    for token in sorted(rank, key=lambda token: (rank[token], -len(token))):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joint = [rank.get(left + right, float("inf")) for left, right in itertools.pairwise(parts)]
            first = joint.index(min(joint))
            if joint[first] == float("inf"):
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2 and parts[0] in rank and parts[1] in rank:
            found.append((parts[0], parts[1]))
    return found


def byte_level(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Llama 3's ranks as a byte-level model of the `tokenizers` library: the same cuts, merges and ids."""
    letters = {byte: letter for letter, byte in BYTES.items()}
    n_ranks = tokenizer.n_words - len(tokenizer.special_tokens)  # the special tokens come last
    rank = {tokenizer.token_bytes(token): token for token in range(n_ranks)}
    words = {token: "".join(map(letters.__getitem__, token)) for token in rank}
    model = models.BPE(
        vocab={words[token]: i for token, i in rank.items()},
        merges=[(words[left], words[right]) for left, right in merges(rank)],
        ignore_merges=True,
    )
    result = tokenizers.Tokenizer(model)
    cut = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    result.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    result.decoder = decoders.ByteLevel()
    return with_special(result, tokenizer)


def from_pieces(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A sentencepiece model as a model of the `tokenizers` library, with its rules for spaces: the same ids.

    Raises InputError for one that is not of byte pairs. Where it also normalizes characters, as Llama 2's does not,
    the library does so cluster by cluster and differs for rare combinations, as in all that transformers converts.
    """
    model = tokenizer.vocabulary.model
    types, spec = types_and_spec(model)
    pieces = [model.id_to_piece(i) for i in range(len(types))]
    rank = {pieces[i]: -model.get_score(i) for i, kind in enumerate(types) if kind == 1}
    whole = sorted((pieces[i] for i, kind in enumerate(types) if kind == 4), key=len, reverse=True)  # user-defined
    result = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges(rank),
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=bool(whole),
        )
    )
    result.normalizer = normalizers.Sequence(list(spacing(spec)))
    if whole:
        result.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, whole))), behavior="isolated")
    bytes_too = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    result.decoder = decoders.Sequence([*bytes_too, *[decoders.Strip(" ", 1, 0)] * spec.get(3, 1)])
    return with_special(result, tokenizer)


def types_and_spec(model: Any) -> tuple[list[int], dict[int, Any]]:
    """The type of each piece of a sentencepiece model of byte pairs, else InputError, and its normalizer_spec."""
    data = model.serialized_model_proto()  # 1: pieces, 2: trainer_spec, 3: normalizer_spec
    specs = last_values(data)
    if last_values(specs[2]).get(3) != 2:
        raise InputError("a sentencepiece model has a form in other layouts only where it is of byte pairs")
    types = [last_values(value).get(3, 1) for number, _, value in wire_fields(data) if number == 1]
    return types, last_values(specs[3])


def spacing(spec: dict[int, Any]) -> Iterator[normalizers.Normalizer]:
    """What a sentencepiece model does to a text first, as its normalizer_spec says."""
    if spec.get(2):  # precompiled_charsmap
        yield normalizers.Precompiled(spec[2])
    if spec.get(4, 1):  # remove_extra_whitespaces
        yield normalizers.Replace(Regex("^ +| +$"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if spec.get(3, 1):  # add_dummy_prefix
        yield normalizers.Prepend("\u2581")
    yield normalizers.Replace(" ", "\u2581")


def wire_fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and value (int or bytes) of each field of a protobuf message.

    Raises ValueError or IndexError where it is cut short, or has a wire type that protobuf has given up.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, wire, varint()
        elif wire in (1, 2, 5):
            size = {1: 8, 5: 4}.get(wire) or varint()
            at += size
            if at > len(data):
                raise ValueError(f"field {number} is cut short")
            yield number, wire, data[at - size : at]
        else:
            raise ValueError(f"field {number} has wire type {wire}")


def last_values(data: bytes) -> dict[int, Any]:
    """The value of each field by its number; of a repeated one the last."""
    return {number: value for number, _, value in wire_fields(data)}


def with_special(result: tokenizers.Tokenizer, tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Add the special tokens, and begin-of-text in front of every text."""
    names = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    result.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return put_bos_first(result, tokenizer)


def put_bos_first(result: tokenizers.Tokenizer, tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    if tokenizer.adds_bos:
        bos = result.id_to_token(tokenizer.bos_id)
        result.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
        )
    return result
