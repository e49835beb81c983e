"""Damaged and hostile forms of a valid file, each made from a seeded generator: the format's own fields first.

    data = mutated(rng, "model.safetensors", valid)

What is changed: fields of JSON; the header of a safetensors or GGUF file, with its lengths put right, so that what
reads it gets that far; fields of a protobuf; lines of ranks and records; entries and opcodes of a .pth file, calls that
would run code among them; and, of each format, any bytes.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import pickle
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from llama.checkpoint.tokenizer_files import wire_fields

CANARY = "/dev/shm/llama-fuzz-canary"  # what a payload would make, and nothing else does
OUTSIDE = ("../decoy.safetensors", "../../decoy.safetensors", "a/../../decoy.safetensors", "/etc/hostname", "/dev/zero",
           "/proc/self/environ", "..", ".", "/", "~", "file:///etc/hostname", "..\\decoy.safetensors")  # fmt: skip
NUMBERS = ("0", "-1", "1", "2", "3", "-0", "0.5", "1.0", "1e2", "1e999", "-1e999", "1e-320", "NaN", "Infinity",
           "-Infinity", "65536", "2147483647", "4294967296", "9223372036854775807", "18446744073709551616", "-1e18",
           "9" * 400, "9" * 5000)  # fmt: skip
TEXTS = ("", "a", "\0", "\ud800", "\x1b[2J", "\n\n", "x" * 100_000, "{0.__class__}", "%s%n", "\u202e", "<|eot_id|>",
         "true", "1", "é", "\U0010ffff", "(a+)+$", "(" * 500, "[", ".*", *OUTSIDE)  # fmt: skip
# As they stand in a file: of every type, some of them no JSON at all.
HOSTILE = (*NUMBERS, *map(json.dumps, TEXTS), "null", "true", "false", "[]", "{}", "[[]]", "[null]", "[-1]", '{"": 0}',
           '{"a": {"b": {}}}', "[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "0" + "}" * 900,
           '{"a": 1, "a": 2}', "tru", "'a'", "01", ".5", "")  # fmt: skip
INTEGERS = (0, 1, 2, 3, 7, 8, 9, 31, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
            1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1)  # fmt: skip
DTYPES = "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL F8_E4M3 F8_E5M2 C64 F4 X".split()


FIFO, FOLDER = "a pipe", "a folder"  # in the place of a file; any other text is where a link leads
LINKS = ("/dev/zero", "/dev/full", "/dev/stdin", "/dev/tty", "nowhere", ".", "..", FIFO, FOLDER)
EXTRA = (
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00003-of-00002.safetensors",
    "x.gguf",
    "config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "consolidated.00.pth",
    "consolidated.01.pth",
    "params.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "adapter_model.bin",
    "adapter_config.json",
    "x.part",
    "step-00000001",
    "z.jsonl",
)


def other_files(rng: random.Random, files: dict[str, bytes]) -> dict[str, bytes | str | None]:
    """A file missing, empty, in another's place, no file at all, or one too many."""
    name, other, kind = rng.choice(list(files)), rng.choice(list(files)), rng.randrange(6)
    if kind == 0:
        return {name: None}
    if kind == 1:
        return {name: files[other], other: files[name]}
    if kind == 2:
        return {
            name: rng.choice((b"", b"\0", b"{}", b"[]", b"version https://git-lfs.github.com/spec/v1\n", b"<html>"))
        }
    if kind <= 4:
        return {name: rng.choice((*LINKS, name.rpartition("/")[2], other.rpartition("/")[2]))}
    extra = rng.choice(EXTRA)
    folder = rng.choice(("", name.rpartition("/")[0] + "/" * ("/" in name)))
    return {folder + extra: rng.choice((files[other], FIFO, FOLDER, "/dev/zero", b""))}


def mutated(rng: random.Random, name: str, data: bytes, other: bytes) -> bytes:
    """A form of the file `name`; `other`: the content of another file, to put parts of in."""
    if rng.random() < 0.2:
        return any_bytes(rng, data, other)
    data = form_of(name, data)(rng, data)
    return any_bytes(rng, data, other) if rng.random() < 0.05 else data


def form_of(name: str, data: bytes) -> Callable[[random.Random, bytes], bytes]:
    """What changes a file of that name."""
    if data[:4] == b"GGUF":
        return gguf
    if name.endswith((".pth", ".bin")):
        return pth
    if name.endswith(".safetensors"):
        return safetensors
    if name.endswith(".jsonl"):
        return json_lines
    if name.endswith(".json"):
        return json_text
    if name.endswith(".model"):
        return ranks if data[:4].isascii() and data[:4].isalnum() else protobuf
    return text


def any_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Cut off, flipped, moved, repeated, left out, overwritten, or mixed with another file."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, rng.randint(1, 64), rng.randint(1, 4096)))
    if rng.random() < 0.5:  # where headers are
        at = min(at, rng.randrange(256))
    kind = rng.randrange(9)
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(rng.randint(1, 8) if data else 0):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        number = (rng.choice(INTEGERS) % (1 << 64)).to_bytes(8, rng.choice(("little", "big")))
        return data[:at] + number[: min(size, 8)] + data[at + min(size, 8) :]
    if kind == 3:
        return data[:at] + data[at + size :]
    if kind == 4:
        return data[:at] + data[at : at + size] * rng.randint(2, 40) + data[at + size :]
    if kind == 5:
        start = rng.randrange(len(data) + 1)
        return data[:at] + data[start : start + size] + data[at + size :]
    if kind == 6:
        return data[:at] + bytes([rng.choice((0, 10, 32, 48, 255))]) * size + data[at + size :]
    start = rng.randrange(len(other) + 1)
    if kind == 7:
        return data[:at] + other[start:]
    return data[:at] + other[start : start + size] + data[at:]


# JSON


def json_text(rng: random.Random, data: bytes) -> bytes:
    """Other values, names, types and depths in one to four spots; repeated fields."""
    root, raw = json.loads(data), {}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change(rng, root, raw)
    # ensure_ascii: a lone surrogate has a form in JSON, none in UTF-8
    written = json.dumps(root, indent=rng.choice((None, 2)), ensure_ascii=rng.random() < 0.9)
    written = re.sub(r'"@(\d+)@"', lambda match: raw.get(match[1], match[0]), written)
    return re.sub(r"@again\d*", "", written).encode("utf-8", "surrogatepass")


def _change(rng: random.Random, root: Any, raw: dict[str, str]) -> None:
    node, key = _spot(rng, root)
    if key is None:
        return
    mark = str(len(raw))
    kind, value = rng.randrange(10), node[key]
    if kind <= 3:
        node[key], raw[mark] = f"@{mark}@", rng.choice(HOSTILE)
    elif kind == 4:
        del node[key]
    elif kind == 5 and isinstance(value, int):
        node[key] = rng.choice(
            (value + 1, value - 1, -value, value * 2, value // 2, value << 40, str(value), value * 1.0)
        )
    elif kind == 6:
        node[key] = rng.choice(([value], {"a": value}, [value] * 40, str(value)))
    elif kind == 7:
        there, other = _spot(rng, root)
        node[key] = node[key] if other is None else json.loads(json.dumps(there[other]))
    elif isinstance(node, dict):
        new = f"{key}@again{mark}" if kind == 8 else rng.choice(("x", "", "\x1b[2J", "__class__", *list(node)[:9]))
        node[new], raw[mark] = f"@{mark}@", rng.choice(HOSTILE)
    else:
        node.insert(rng.randrange(len(node) + 1), f"@{mark}@")
        raw[mark] = rng.choice(HOSTILE)


def _spot(rng: random.Random, node: Any) -> tuple[Any, Any]:
    """A container in a tree and a key of it, the more likely the higher; without a key where there is none."""
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or rng.random() < 0.3:
            return node, key
        node = child
    return node, None


def json_lines(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return text(rng, data)
    lines = data.splitlines() or [b'{"step": 1, "loss": 2.5}']
    at = rng.randrange(len(lines))
    lines[at] = json_text(rng, lines[at])
    return b"\n".join(lines)


# Text


def text(rng: random.Random, data: bytes) -> bytes:
    """Lines left out, repeated, swapped, and what a parser of tables or lines may stumble over."""
    ends = rng.choice((b"\n", b"\r\n", b"\r", b"\x85", b"\n"))
    lines = data.splitlines() or [b""]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines[at:at] = lines[at : at + 3] * rng.randint(1, 9)
        elif kind == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            parts = (
                b'"',
                b'""',
                b"'",
                b",",
                b";",
                b"\t",
                b"\0",
                b"\xff",
                b"\xef\xbb\xbf",
                b"\xed\xa0\x80",
                b"\r",
                b"\x1b[2J",
                b"[" * 5000,
                b'{"a":' * 2000,
                b"sep=;\n",
                b"," * 5000,
                b'"' * 5001,
                b" " * 5000,
                b"x" * 50_000,
                b"\n" * 99,
                b'{"text": 1}',
                b"text",
                b"prompt,completion",
                b"<|eot_id|>",
                "\u2028".encode(),
                b"PK\x03\x04",
            )
            spot = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:spot] + rng.choice(parts) + lines[at][spot + rng.choice((0, 0, 1, 9)) :]
    return ends.join(lines)


def ranks(rng: random.Random, data: bytes) -> bytes:
    """tiktoken's lines, `base64 rank`."""
    if rng.random() < 0.2:
        return text(rng, data)
    lines = data.splitlines()
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.choice((rng.randrange(len(lines)), rng.randrange(min(3, len(lines))), len(lines) - 1))
        token, _, rank = lines[at].partition(b" ")
        tokens = (
            b"",
            b"=",
            b"====",
            b"YQ",
            b"YQ==",
            b"YR==",
            b"AA==",
            b"Y Q==",
            b"\xff",
            "é".encode(),
            token * 3,
            token[:-1],
            base64.b64encode(rng.randbytes(rng.randint(1, 9))),
            base64.b64encode(b"x" * 40_000),
        )
        numbers = (
            b"",
            b"-1",
            b"+" + rank,
            b"0" + rank,
            b"1_0",
            b"1e3",
            b"99999999999",
            b"9" * 5000,
            rank + b" 1",
            "٣".encode(),
            b" " + rank,
            b"0x1",
            str(rng.randrange(1000)).encode(),
            rank,
        )
        token, rank = rng.choice(((token, rng.choice(numbers)), (rng.choice(tokens), rank)))
        lines[at] = token + rng.choice((b" ", b" ", b" ", b"\t", b"  ", b"")) + rank
    if rng.random() < 0.3:
        lines = lines[: rng.randrange(len(lines) + 1)] + rng.choice(
            ([], [b""], lines[:2], [b"YWFhYWE= 320", b"YWFhYWFh 321"])
        )
    return b"\n".join(lines) + rng.choice((b"\n", b""))


# safetensors


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header, its length, or the numbers behind it."""
    end = 8 + int.from_bytes(data[:8], "little")
    head, body = data[8:end], data[end:]
    kind = rng.randrange(6)
    if kind == 0:
        head = json_text(rng, head)
    elif kind <= 2:
        head = _other_entries(rng, head)
    elif kind == 3:
        return (rng.choice(INTEGERS) % (1 << 64)).to_bytes(8, "little") + head + body
    elif kind == 4:
        part = rng.choice((b"\xff", b"\0", b"\x7f\x80", b"\0\0\x80\x7f", b"\xff\xff\xff\x7f", b"\x80"))
        at = rng.randrange(len(body) + 1)
        body = body[:at] + part * (rng.choice((1, 8, len(body))) // len(part) + 1) + body[at:]
        body = body[: rng.choice((end, len(data) - end, len(data) - end))]
    else:
        head, body = head + b" " * rng.choice((0, 1, 8, 100_000)), body + bytes(rng.choice((0, 1, 8)))
    return len(head).to_bytes(8, "little") + head + body


def _other_entries(rng: random.Random, head: bytes) -> bytes:
    """Types, shapes and offsets that might still fit together, and those that do not."""
    entries = json.loads(head)
    names = [name for name in entries if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, len(names)))) if names else ():
        entry, kind = entries[rng.choice(names)], rng.randrange(7)
        shape = entry["shape"]
        if not all(type(size) is int for size in shape):
            continue
        if kind == 0:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 1:
            entry["shape"] = rng.choice(
                (shape[::-1], [1, *shape], [*shape, 1], [0, *shape], shape[:-1], [*shape, 0], [])
            )
        elif kind == 2 and shape:
            shape[rng.randrange(len(shape))] = rng.choice((0, -1, 1.5, 1 << 62, 1 << 63, 1 << 32, 64, None))
        elif kind == 3:
            entry["data_offsets"][rng.randrange(2)] = rng.choice((0, 8, -8, 1 << 62, 1 << 63, 4, 1.5, "0"))
        elif kind == 4:
            entry["data_offsets"] = entries[rng.choice(names)]["data_offsets"]
        elif kind == 5:  # numbers of half the size, twice as many; or as many bytes of another type
            entry["shape"], entry["dtype"] = (
                [*shape[:-1], *(2 * n for n in shape[-1:])],
                rng.choice(("I16", "F16", "BF16")),
            )
        else:
            one, other = rng.choice(names), rng.choice(names)
            entries[one], entries[other] = entries[other], entries[one]
    if names and rng.random() < 0.2:
        entries[rng.choice(("model.", "_orig_mod.", "module.", "x", "")) + rng.choice(names)] = entries.pop(
            rng.choice(names)
        )
    if rng.random() < 0.1:
        entries["__metadata__"] = rng.choice(
            ({}, {"format": "tf"}, {"a": "b" * 100_000}, {"sha256": ""}, None, [], {"a": 1})
        )
    return json.dumps(entries).encode()


# GGUF


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@functools.lru_cache(16)
def _gguf_parts(data: bytes) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]], int]:
    """Where each number, each field and each tensor's entry stands, start and end; where the tensors' data begin."""
    at, spots = 24, [(4, 8), (8, 16), (16, 24)]

    def number(size: int) -> int:
        nonlocal at
        spots.append((at, at + size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def value(kind: int, count: int = 1) -> None:
        nonlocal at
        for i in range(count):
            if kind == 8:
                size = number(8)
                at += size
            elif i < 2:
                number(SIZES[kind])
            else:
                at += SIZES[kind]

    n_tensors, n_fields = struct.unpack_from("<QQ", data, 8)
    fields, tensors = [], []
    for _ in range(n_fields):
        start, _ = at, value(8)
        kind = number(4)
        value(number(4), number(8)) if kind == 9 else value(kind)
        fields.append((start, at))
    for _ in range(n_tensors):
        start, _ = at, value(8)
        for _ in range(number(4)):
            number(8)
        number(4), number(8)
        tensors.append((start, at))
    return spots, fields, tensors, -(-at // 32) * 32


def gguf(rng: random.Random, data: bytes) -> bytes:
    """Any number of the header, a field left out, repeated or of another type and value, an entry of a tensor."""
    spots, fields, tensors, start = _gguf_parts(data)
    if rng.random() < 0.5:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 3))):
            at, end = rng.choice(spots)
            old = int.from_bytes(data[at:end], "little")
            new = rng.choice((*INTEGERS, old + 1, old - 1, old * 2, old + 32, old ^ 1 << rng.randrange(32), *range(14)))
            changed[at:end] = (new % (1 << 8 * (end - at))).to_bytes(end - at, "little")
        return bytes(changed)
    parts = [[data[at:end] for at, end in part] for part in (fields, tensors)]
    entries = rng.choice((parts[0], parts[0], parts[1]))
    for _ in range(rng.choice((1, 1, 2))):
        at, kind = rng.randrange(len(entries)), rng.randrange(5)
        if kind == 0:
            del entries[at]
        elif kind == 1:
            entries.append(entries[at])
        elif kind == 2:
            other = rng.randrange(len(entries))
            entries[at], entries[other] = entries[other], entries[at]
        elif entries is parts[0]:
            name = entries[at][: 8 + int.from_bytes(entries[at][:8], "little")]
            entries[at] = name + _gguf_value(rng)
        else:
            name = rng.choice(
                (b"x.weight", b"blk.0.attn_q.weight", b"blk.99999.attn_q.weight", b"a" * 300, b"\xff", b"\x1b[2J")
            )
            entries[at] = (
                len(name).to_bytes(8, "little") + name + entries[at][8 + int.from_bytes(entries[at][:8], "little") :]
            )
        if not entries:
            break
    head = data[:8] + struct.pack("<QQ", len(parts[1]), len(parts[0])) + b"".join([*parts[0], *parts[1]])
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data[start:]


def _gguf_value(rng: random.Random) -> bytes:
    """A type and a value of it."""
    kind = rng.choice((*SIZES, 8, 8, 9, 9, 13))
    number = (rng.choice(INTEGERS) % (1 << 64)).to_bytes(8, "little")
    floats = [struct.pack("<f", value) for value in (0.0, -1.0, 1e38, float("nan"), float("inf"), 1e-45, 0.5)]
    string = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    string = len(string).to_bytes(8, "little") + string
    if kind == 9:
        inner, count = rng.choice((4, 5, 6, 8, 9, 0)), rng.choice((0, 1, 2, 1 << 20, 1 << 40, (1 << 64) - 1))
        item = string if inner == 8 else rng.choice(floats) if inner == 6 else number[: SIZES.get(inner, 4)]
        return struct.pack("<IIQ", 9, inner, count) + item * min(count, 2)
    body = string if kind == 8 else rng.choice(floats) if kind == 6 else number[: SIZES.get(kind, 8)]
    return struct.pack("<I", kind) + body


# protobuf


def protobuf(rng: random.Random, data: bytes, depth: int = 0) -> bytes:
    """Fields of a message, or of messages in it, left out, repeated, changed, of other numbers and types."""
    try:
        fields = list(wire_fields(data))
    except (IndexError, ValueError):
        return any_bytes(rng, data, data)
    if not fields:
        return data
    for _ in range(rng.choice((1, 1, 2, 4)) if depth == 0 else 1):
        at, kind = rng.choice((rng.randrange(len(fields)), len(fields) - 1, len(fields) - 2)), rng.randrange(8)
        number, wire, value = fields[at]
        if kind == 0:
            fields[at : at + 1] = []
        elif kind == 1:
            fields[at:at] = [fields[at]] * rng.choice((1, 1, 9, 500))
        elif kind == 2:
            fields[at] = rng.choice((0, 1, 2, 3, 4, 5, 9, 10, 12, 35, 45, 1 << 28)), wire, value
        elif isinstance(value, int):
            fields[at] = number, wire, rng.choice((*INTEGERS, value + 1, value - 1)) % (1 << 64)
        elif kind == 3 or wire != 2:
            ends = (
                b"",
                b"\0",
                b"\xff\xff",
                b"\0\0\xc0\x7f",
                b"\0\0\x80\x7f",
                "\u2581".encode() * 40,
                b"<0x41>",
                b"x" * 5000,
                value * 2,
            )
            fields[at] = number, wire, rng.choice(ends)[: len(value) if wire != 2 else None]
        else:
            fields[at] = number, wire, protobuf(rng, value, depth + 1)
        if not fields:
            return b""
    return b"".join(map(_field, fields))


def _field(field: tuple[int, int, Any]) -> bytes:
    number, wire, value = field
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | wire) + (_varint(len(value)) if wire == 2 else b"") + value


def _varint(value: int) -> bytes:
    low = bytes([value & 127 | 128 * (value > 127)])
    return low + _varint(value >> 7) if value > 127 else low


# .pth

CALLS = (
    ("os", "system", f"touch {CANARY}"),
    ("posix", "system", f"touch {CANARY}"),
    ("builtins", "eval", f"open({CANARY!r}, 'w')"),
    ("builtins", "exec", f"open({CANARY!r}, 'w')"),
    ("builtins", "open", CANARY),
    ("subprocess", "getoutput", f"touch {CANARY}"),
    ("builtins", "__import__", "antigravity"),
    ("torch.hub", "load", "a/b"),
    ("torch", "load", CANARY),
    ("io", "open", CANARY),
    ("runpy", "run_path", CANARY),
    ("pickle", "loads", "x"),
    ("_codecs", "encode", "a"),
    ("torch", "tensor", "a"),
    ("collections", "OrderedDict", "a"),
    ("torch.storage", "_load_from_bytes", "a"),
    ("torch._utils", "_rebuild_tensor_v2", "a"),
    ("torch", "FloatStorage", "a"),
    ("torch.nn.parameter", "Parameter", "a"),
    ("torch.serialization", "_get_layout", "a"),
    ("torch", "device", "meta"),
    ("torch", "Size", "a"),
    ("builtins", "bytearray", "a"),
    ("builtins", "set", "a"),
    ("numpy.core.multiarray", "scalar", "a"),
    ("torch._utils", "_rebuild_sparse_tensor", "a"),
    ("torch", "device", "cuda"),
    ("torch._tensor", "_rebuild_from_type_v2", "a"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage", "a"),
)


def _call(rng: random.Random) -> bytes:
    """Opcodes that call something with a text, and leave what it gives on the stack."""
    module, name, argument = rng.choice(CALLS)
    given = argument.encode()
    text = b"X" + len(given).to_bytes(4, "little") + given
    return (
        b"c"
        + f"{module}\n{name}\n".encode()
        + rng.choice((text + b"\x85R", b"(" + text + b"tR", b")\x81", b"(" + text + b"tR0"))
    )


@functools.lru_cache(16)
def _entries(data: bytes) -> tuple[tuple[str, bytes], ...]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return tuple((entry.filename, archive.read(entry)) for entry in archive.infolist())


@functools.lru_cache(16)
def _opcodes(program: bytes) -> tuple[tuple[str, Any, int], ...]:
    return tuple((opcode.name, argument, at) for opcode, argument, at in pickletools.genops(program))


def pth(rng: random.Random, data: bytes) -> bytes:
    """An archive of other entries, or whose pickle has other opcodes; a pickle that is none."""
    entries = list(_entries(data))
    program = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    kind = rng.randrange(8)
    if kind <= 3:
        entries[program] = entries[program][0], _other_opcodes(rng, entries[program][1])
    elif kind == 4:
        whole = b"\x80\x02" + _call(rng) + b"."
        if rng.random() < 0.3:
            return rng.choice(
                (whole, pickle.dumps({"a": 1}), pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + whole)
            )
        entries[program] = entries[program][0], whole
    elif kind == 5:
        at = rng.randrange(len(entries))
        name, content = entries[at]
        name = rng.choice(
            (
                name,
                "archive/data/0",
                "archive/../decoy",
                "/etc/hostname",
                "archive/data.pkl",
                "x/data.pkl",
                "",
                "a" * 9999,
                "archive/constants.pkl",
                "archive/byteorder",
                "archive/.format_version",
            )
        )
        content = rng.choice(
            (content, b"", content[: len(content) // 2], content * 2, b"big", b"\0" * 64, rng.randbytes(9))
        )
        entries[at : at + rng.randrange(2)] = [(name, content)]
    elif kind == 6:
        del entries[rng.randrange(len(entries))]
    else:
        changed = bytearray(data)
        start = rng.choice((0, data.rfind(b"PK\x05\x06"), data.find(b"PK\x01\x02")))
        for _ in range(rng.choice((1, 1, 3))):
            at = min(start + rng.randrange(64), len(data) - 4)
            changed[at : at + 4] = rng.choice(INTEGERS).to_bytes(8, "little")[:4]
        return bytes(changed)
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def _other_opcodes(rng: random.Random, program: bytes) -> bytes:
    """Numbers, names and texts of a pickle changed, opcodes left out, repeated and put in."""
    codes = _opcodes(program)
    ends = [at for _, _, at in codes[1:]] + [len(program)]
    parts = [program[at:end] for (_, _, at), end in zip(codes, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(1, len(parts))
        name, argument, _ = codes[at]
        kind = rng.randrange(8)
        if kind <= 3 and isinstance(argument, int):
            number = rng.choice((*INTEGERS, -1, -8, argument + 1, argument * 2, argument - 1))
            parts[at] = pickle.dumps(number, 2)[2:-1]
        elif kind <= 3 and name == "GLOBAL":
            module, call, _ = rng.choice(CALLS)
            parts[at] = f"c{module}\n{call}\n".encode()
        elif kind <= 3 and isinstance(argument, str):
            names = (
                "storage",
                "cuda",
                "meta",
                "0",
                "1",
                "../0",
                "cpu",
                "output.weight",
                "norm.weight",
                "",
                "\ud800",
                "_orig_mod.norm.weight",
            )
            given = rng.choice(names).encode("utf-8", "surrogatepass")
            parts[at] = b"X" + len(given).to_bytes(4, "little") + given
        elif kind == 4:
            parts[at] = b""
        elif kind == 5:
            parts[at] *= rng.choice((2, 2, 3, 2000))
        elif kind == 6:
            parts[at] = _call(rng) + parts[at]
        else:
            parts[at] = (
                rng.choice(
                    (
                        b"N",
                        b"}",
                        b"]",
                        b")",
                        b"(",
                        b"0",
                        b"1",
                        b"2",
                        b"R",
                        b"b",
                        b"u",
                        b"s",
                        b"t",
                        b"Q",
                        b"\x81",
                        b"h\0",
                        b"q\0",
                        b".",
                        b"K\1",
                        b"G\x7f\xf0\0\0\0\0\0\0",
                    )
                )
                + parts[at]
            )
    return b"".join(parts)
