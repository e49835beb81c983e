"""The head of a GGUF file: its metadata, and where each tensor lies.

    GGUF | version | number of tensors, of fields | fields: key, type, value | tensors: name, dims, type, offset | data

Read here and not through gguf.GGUFReader, which trusts the file: counts are not held against its size, a slice beyond
its end is silently shorter, offsets overflow, and each string of a vocabulary becomes a few arrays (6 s and 1 GB
for Llama 3's). What is read has been checked to lie in the file, and every number is bounded before it is used.

Left out on purpose: big-endian files, version 1, arrays of arrays (llama.cpp reads none of them either).
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llama import files
from llama.errors import InputError

MAGIC = b"GGUF"
NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # struct's codes by GGUF's types
FLOAT, STRING, ARRAY = 6, 8, 9
MAX_COUNT = 1 << 16  # of fields and of tensors: 1,024 layers have 9,219
MAX_ITEMS = 1 << 22  # of all arrays together: the largest vocabularies have 0.26 million words and twice as many merges
MAX_NAME = 256
MAX_BYTES = 1 << 28  # of the head; Llama 3's has 8 million
LENGTH = struct.Struct("<Q")


class Stored(NamedTuple):
    """A tensor in the file: `n_bytes` at `offset` from its start; the shape has rows first, as torch does."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class Header(NamedTuple):
    fields: dict[str, Any]
    tensors: dict[str, Stored]


def read(path: Path) -> Header:
    """Raises InputError for a file that is damaged, hostile, or of a version that is not supported."""
    if not files.head(path).startswith(MAGIC):
        raise files.damaged(path, "GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data, path).header()


class _Reader:
    """Walks through the head of one file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.end = data, path, min(len(data), MAX_BYTES)
        self.at = len(MAGIC)
        self.items = 0  # of arrays

    def refuse(self, reason: str) -> InputError:
        return InputError(f"{self.path}: {reason}; download it again, or convert the original anew")

    def numbers(self, code: str, count: int) -> list[Any]:
        """The next numbers of one type."""
        code = f"<{count}{code}"
        if struct.calcsize(code) > self.end - self.at:
            raise self.refuse(f"is truncated at byte {self.at}")
        values = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return list(values)

    def take(self, code: str) -> int:
        return self.numbers(code, 1)[0]

    def texts(self, count: int) -> list[str]:
        """The next strings. A vocabulary and its merges have 100,000, so the loop keeps to what each one needs."""
        data, end, at, texts = self.data, self.end, self.at, []
        try:
            for _ in range(count):
                start = at + LENGTH.size
                at = start + LENGTH.unpack_from(data, at)[0]
                if at > end:
                    break
                texts.append(data[start:at].decode())
        except struct.error:
            raise self.refuse(f"is truncated at byte {at}") from None
        except UnicodeDecodeError:
            raise self.refuse(f"the text at byte {start} is not UTF-8") from None
        if at > end:
            raise self.refuse(f"a text of {at - start} bytes at byte {start - LENGTH.size} does not fit in the file")
        self.at = at
        return texts

    def name(self) -> str:
        """The next string, of at most MAX_NAME bytes that can be shown in a line."""
        at = self.at
        (text,) = self.texts(1)
        if not (0 < len(text.encode()) <= MAX_NAME and text.isprintable()):
            raise self.refuse(f"{text[:40]!r} at byte {at + LENGTH.size} is no name")
        return text

    def header(self) -> Header:
        version = self.take("I")
        if version >= 1 << 16:
            raise InputError(f"{self.path}: is big-endian; convert the original for little-endian machines")
        if version not in (2, 3):
            raise InputError(f"{self.path}: is GGUF version {version}, supported are 2 and 3; take a newer conversion")
        n_tensors, n_fields = self.take("Q"), self.take("Q")
        if max(n_tensors, n_fields) > MAX_COUNT:
            raise self.refuse(f"{n_tensors} tensors and {n_fields} fields cannot be")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.name()
            if key in fields:
                raise self.refuse(f"{key} is there twice")
            fields[key] = self.value(key)
        return Header(fields, self.tensors(n_tensors, fields.get("general.alignment", 32)))

    def value(self, key: str) -> Any:
        """The value of a field: a number, a string, or a list of either."""
        kind, count = self.take("I"), 1
        if is_array := kind == ARRAY:
            kind, count = self.take("I"), self.take("Q")
            self.items += count
            if self.items > MAX_ITEMS or kind == ARRAY:
                raise self.refuse(f"{key} is an array of {'arrays' if kind == ARRAY else f'{count} items'}")
        if kind >= len(NUMBERS):
            raise self.refuse(f"{key} has the unknown type {kind}")
        values = self.texts(count) if kind == STRING else self.numbers(NUMBERS[kind], count)
        if is_array:
            return values
        return float(str(np.float32(values[0]))) if kind == FLOAT else values[0]  # 1e-05, not 9.999999747378752e-06

    def tensors(self, count: int, alignment: Any) -> dict[str, Stored]:
        """Where each lies, held against the size of the file; no two may share a byte."""
        if type(alignment) is not int or alignment not in (1 << bits for bits in range(3, 17)):
            raise self.refuse(f"general.alignment: {alignment!r} is not a power of two from 8 to 65536")
        stored: dict[str, Stored] = {}
        for _ in range(count):
            name, n_dims = self.name(), self.take("I")
            if name in stored or not 1 <= n_dims <= 4:
                raise self.refuse(f"tensor {name} " + ("is there twice" if name in stored else f"has {n_dims} axes"))
            shape = tuple(self.numbers("Q", n_dims)[::-1])
            kind, offset = self.take("I"), self.take("Q")
            if kind not in set(GGMLQuantizationType):
                raise InputError(f"{self.path}:{name}: has the type {kind}, which is unknown here; take another file")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            n_bytes = math.prod(shape) // block * block_bytes
            if shape[-1] % block or not 0 < n_bytes <= len(self.data):
                raise self.refuse(f"tensor {name} cannot have the shape {list(shape)}")
            stored[name] = Stored(GGMLQuantizationType(kind), shape, offset, n_bytes)
        start = end = math.ceil(self.at / alignment) * alignment
        for name, tensor in sorted(stored.items(), key=lambda entry: entry[1].offset):
            offset = start + tensor.offset
            if offset % alignment or offset + tensor.n_bytes > len(self.data):
                raise self.refuse(f"tensor {name} lies beyond the end of the file, or is not aligned")
            if offset < end:
                raise self.refuse(f"tensor {name} and the one before it overlap")
            stored[name], end = tensor._replace(offset=offset), offset + tensor.n_bytes
        return stored
