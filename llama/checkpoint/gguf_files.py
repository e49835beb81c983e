"""What is written for llama.cpp and ollama: the GGUF file that llama.cpp's own converter would write.

Left out on purpose: quantization to fewer than 8 bits (llama-quantize does that), files in parts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from llama.checkpoint import tokenizer_files
from llama.checkpoint.gguf import ARCHITECTURE, FIELDS, HEAD_DIMS, PLAIN, ROPE_FACTORS, ROWS, names_of, rope_factors
from llama.checkpoint.source import EMBEDDING, Source, by_block, write_fields
from llama.config import ModelArgs
from llama.errors import InputError, Notice
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from llama.vocabulary.gguf import BYTE, CONTROL, CUTS, GPT2_PATTERN, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llama.vocabulary.pieces import Pieces

# What is written by name, and how the file calls itself then. Norms are float32 in all of them.
TYPES = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
NORMALIZES = (
    "the tokenizer replaces characters or takes spaces out, which is not done behind GGUF; ids may differ there"
)


def write(model: Transformer, path: Path, tokenizer_path: Path | None) -> None:
    """The model in its own dtype."""
    state = model.state_dict()
    _write(path, model.args, state, state.items(), tokenizer_path, _type_of(model.dtype, "the model"))


def convert(source: Source, path: Path, tokenizer_path: Path | None, type_name: str | None = None) -> None:
    """Write the weights of a checkpoint, one in memory at a time, as `type_name` of TYPES; None: as they are stored.

    Raises InputError where the tokenizer has no form in GGUF, or float16 cannot hold a weight.
    """
    layout = source.lay_out().state_dict()

    def read_all() -> Iterator[tuple[str, Tensor]]:
        for block in by_block(list(layout)):
            with source.open() as read:
                for name in block:
                    weight = read(name)
                    _type_of(weight.dtype, source.place(name))
                    yield name, weight

    if type_name is None:
        with source.open() as read:
            type_name = _type_of(source.dtype or read(EMBEDDING).dtype, source.place(EMBEDDING))
    _write(path, source.args, layout, read_all(), tokenizer_path, type_name)


def _type_of(dtype: torch.dtype, place: str) -> str:
    for name, (kind, _) in TYPES.items():
        if PLAIN.get(kind) is dtype:
            return name
    raise InputError(f"{place}: holds {dtype}; expected float32, bfloat16 or float16 weights")


def _write(
    path: Path,
    args: ModelArgs,
    layout: dict[str, Tensor],
    weights: Iterable[tuple[str, Tensor]],
    tokenizer_path: Path | None,
    type_name: str,
) -> None:
    """`layout`: Meta's names and the shapes of what `weights` gives in this order."""
    kind, file_type = TYPES[type_name]
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    names = names_of(args.n_layers) | {ROPE_FACTORS: ROPE_FACTORS}
    _add_shape(writer, args)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if tokenizer_path is not None:
        _add_tokenizer(writer, Tokenizer(tokenizer_path), args.vocab_size)
    extra = {ROPE_FACTORS: rope_factors(args)} if args.use_scaled_rope else {}
    kinds = {name: _kind_for(weight.shape, kind) for name, weight in (layout | extra).items()}
    for name, weight in (layout | extra).items():
        size = _n_bytes(weight, kinds[name])
        writer.add_tensor_info(names[name], weight.shape, np.dtype(np.float32), size, kinds[name])
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in itertools.chain(weights, extra.items()):
            writer.write_tensor_data(_encoded(weight.detach(), kinds[name], names[name]))


def _add_shape(writer: gguf.GGUFWriter, args: ModelArgs) -> None:
    writer.add_type("model")
    writer.add_name("Llama")
    for name, value in write_fields(FIELDS, args).items():
        is_real = name in (FIELDS["norm_eps"], FIELDS["rope_theta"])
        (writer.add_float32 if is_real else writer.add_uint32)(name, value)
    for name in HEAD_DIMS:
        writer.add_uint32(name, args.head_dim)
    if args.rope_linear_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(args.rope_linear_factor)


def _kind_for(shape: torch.Size, kind: Kind) -> Kind:
    """As llama.cpp's converter chooses: norms in float32, float16 where a row is no whole number of blocks."""
    if len(shape) == 1:
        return Kind.F32
    return kind if shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


def _n_bytes(weight: Tensor, kind: Kind) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return weight.numel() // block * block_bytes


def _encoded(weight: Tensor, kind: Kind, name: str) -> np.ndarray:
    """The bytes of a tensor, a few rows at a time."""
    out = np.empty((weight.shape[0], _n_bytes(weight, kind) // weight.shape[0]), dtype=np.uint8)
    for rows, place in zip(weight.split(ROWS), np.split(out, range(ROWS, len(out), ROWS)), strict=True):
        if kind is Kind.F16 and rows.abs().max() > torch.finfo(torch.float16).max:
            raise InputError(f"{name}: values exceed float16; use type=bf16 or f32")
        if kind in PLAIN:
            place[:] = rows.cpu().to(PLAIN[kind]).contiguous().view(torch.uint8).view(len(rows), -1).numpy()
        else:
            place[:] = gguf.quantize(rows.cpu().float().numpy(), kind)
    return out


# The tokenizer


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Tokens, merges or scores, special ids and chat template."""
    vocabulary = tokenizer.vocabulary
    if tokenizer.kind == "sentencepiece":
        words = _of_pieces(writer, vocabulary)
    else:
        model = tokenizer_files.byte_level(tokenizer) if tokenizer.kind == "tiktoken" else vocabulary.model
        words = _of_merges(writer, json.loads(model.to_str()), vocabulary.leading_space)
    words += [(f"[PAD{i}]", UNUSED, -1000.0) for i in range(len(words), vocab_size)]  # tables may be larger
    tokens, types, scores = zip(*words, strict=True)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if any(scores):
        writer.add_token_scores(scores)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.pad_id != tokenizer.eos_id:
        writer.add_pad_token_id(tokenizer.pad_id)
    for name in ("<|eot_id|>", "<|im_end|>"):
        if name in tokenizer.special_tokens:
            writer.add_eot_token_id(tokenizer.special_tokens[name])
            break
    writer.add_add_bos_token(tokenizer.adds_bos)
    if template := tokenizer.template or tokenizer_files.chat_template(tokenizer):
        writer.add_chat_template(template)


Word = tuple[str, int, float]  # text, type and score of a token


def _of_pieces(writer: gguf.GGUFWriter, vocabulary: Pieces) -> list[Word]:
    """A sentencepiece model as it is."""
    model = vocabulary.model
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_space_prefix(vocabulary.leading_space)
    types, spec = tokenizer_files.types_and_spec(model)
    if spec.get(2) or spec.get(4, 1):  # precompiled_charsmap, remove_extra_whitespaces
        warnings.warn(NORMALIZES, Notice, stacklevel=2)
    return [(model.id_to_piece(i), kind, model.get_score(i)) for i, kind in enumerate(types)]


def _of_merges(writer: gguf.GGUFWriter, content: dict[str, Any], leading_space: bool) -> list[Word]:
    """A tokenizer.json of merges over bytes, or over pieces: then earlier merges become higher scores."""
    model, added = content["model"], content["added_tokens"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    special = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    tokens = {i: token for token, i in model["vocab"].items()} | {token["id"]: token["content"] for token in added}
    words = [(tokens[i], special.get(i, NORMAL), 0.0) for i in range(len(tokens))]
    if content["decoder"]["type"] == "ByteLevel":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of_cuts(content))
        writer.add_token_merges([" ".join(pair) for pair in merges])
        return words
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(leading_space)
    if any(part in json.dumps(content["normalizer"]) for part in ("NFC", "Precompiled", "Regex")):
        warnings.warn(NORMALIZES, Notice, stacklevel=2)
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    unknown = model["unk_token"] or "<unk>"
    bytes_of = {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    for i, (token, kind, _) in enumerate(words):
        kind = UNKNOWN if token == unknown else bytes_of.get(token, kind)
        words[i] = (token, kind, -float(rank.get(token, len(rank))))
    return words


def _name_of_cuts(content: dict[str, Any]) -> str:
    """The name in GGUF of how a tokenizer.json cuts text. Raises InputError where there is none."""
    pre = content["pre_tokenizer"]
    cuts = []
    for part in pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]:
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            cuts.append(part["pattern"].get("Regex"))
        elif part["type"] == "Digits" and part["individual_digits"]:
            cuts.append(r"\p{N}")
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            cuts += [GPT2_PATTERN] * part["use_regex"]
        else:
            cuts.append(None)
    name = next((name for name, known in CUTS.items() if known == tuple(cuts)), None)
    if name is None or content["normalizer"] is not None:
        part = "pre_tokenizer" if name is None else "normalizer"
        raise InputError(f"the tokenizer's {part} has no name in GGUF; write hf, and let llama.cpp convert that")
    return name
