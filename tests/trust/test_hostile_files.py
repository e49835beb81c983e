"""What the fuzzer has found, one file of each kind: refused in a line that names it."""

from __future__ import annotations

import io
import json
import os
import re
import struct
from collections.abc import Callable

import pytest
import torch

from llama import files
from llama.errors import InputError
from llama.training.run import Log
from tests.trust import forms, fuzz, readers
from tests.trust.readers import READERS

STATE = "snapshots/step-00000000/state.json"
RNG = "snapshots/step-00000000/rng.safetensors"


def changed(**fields) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | fields).encode()


def with_piece(data: bytes) -> bytes:
    """A sentencepiece model whose last piece is no UTF-8."""
    parts = list(forms.wire_fields(data))
    at = max(i for i, (number, _, _) in enumerate(parts) if number == 1)
    parts[at] = 1, 2, b"\x0a\x01\xff" + parts[at][2][parts[at][2].index(b"\x15") :]
    return b"".join(map(forms._field, parts))


def with_list(data: bytes) -> bytes:
    """A GGUF file in which tokenizer.ggml.pre is a list."""
    _, fields, _, start = forms._gguf_parts(data)
    name = b"tokenizer.ggml.pre"
    entries = [data[at:end] for at, end in fields if name + b"\x08" not in data[at:end]]
    entries.append(struct.pack("<Q", len(name)) + name + struct.pack("<IIQI", 9, 4, 1, 7))
    head = data[:16] + struct.pack("<Q", len(entries)) + b"".join(entries) + data[fields[-1][1] : start]
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data[start:]


def stretched(data: bytes) -> bytes:
    """Tensors of 4 GB each, of one number each in the file."""
    out = io.BytesIO()
    state = torch.load(io.BytesIO(data), weights_only=True)
    torch.save({name: tensor.flatten()[:1].expand(1 << 15, 1 << 15) for name, tensor in state.items()}, out)
    return out.getvalue()


FOUND = [
    ("snapshot", STATE, changed(progress=5), "progress: is not of this version"),
    ("snapshot", STATE, changed(figures="x"), "figures: is not an object of step_seconds"),
    ("snapshot", STATE, changed(figures={"tokens": "1"}), "figures.tokens: '1' is not of the type"),
    ("snapshot", STATE, changed(before=[]), "before: is not an object of sums"),
    ("snapshot", STATE, changed(before={"sums": [1.0, 2.0]}), "before: is not of the 1 samples"),
    ("snapshot", STATE, changed(answers_before=[1]), "answers_before: is not an answer to each of"),
    ("snapshot", STATE, changed(log_bytes=-1), "log_bytes: is not a number of bytes"),
    ("snapshot", "loss.jsonl", forms.FIFO, "loss.jsonl is no file but a pipe"),
    ("snapshot", STATE, forms.FIFO, "state.json"),
    ("snapshot", RNG, lambda data: data[:-5056] + b"\xff" * 5056, "rng: is no state of a random"),
    ("results", "speed.jsonl", forms.FIFO, "is not a file"),
    ("results", "speed.jsonl", lambda data: data.replace(b"1.5", b"9" * 400), "metrics.runtime_s is not"),
    (".pth", "consolidated.01.pth", forms.FIFO, "is no file but a pipe"),
    (".pth", "pytorch_model.bin", forms.FIFO, "holds no weights"),
    ("quantized", "model.safetensors", forms.FIFO, "is no file but a pipe"),
    ("tokenizer.model, sentencepiece", "tokenizer.model", with_piece, "is neither a tiktoken rank file"),
    ("tokenizer.json", "special_tokens_map.json", changed(bos_token="\ud800"), "surrogates not allowed"),
    ("GGUF", "model.gguf", with_list, r"tokenizer.ggml.pre: \[7\] is not supported"),
    ("config.json", "config.json", changed(vocab_size=-1), "config.json:vocab_size: -1 is no number of words"),
    (".pth", "consolidated.00.pth", stretched, "holds tensors that are larger than the file"),
]


@pytest.mark.parametrize(("reader", "name", "change", "message"), FOUND)
def test_what_the_fuzzer_found_is_refused(tmp_path, reader, name, change, message):
    kind, given = next((kind, given) for kind, given in readers.valid(reader).items() if name in given)
    fuzz.write_valid(reader, tmp_path)
    changes = {name: change if isinstance(change, str) else change(given[name])}
    if READERS[reader].sealed is not None and isinstance(change, Callable):
        changes = READERS[reader].sealed({**given, **changes})
    fuzz.put(tmp_path / "a" / kind, changes)
    with pytest.raises(InputError, match=message) as refusal:
        READERS[reader].read(tmp_path / "a" / kind)
    assert str(tmp_path) in str(refusal.value) or re.match("state.json|rng:", str(refusal.value))


def test_values_from_json_have_the_types_of_their_fields():
    for value, hint in ((1, int), (1, float), (1.5, float), ([1], list[float]), (None, int | None), ("a", str)):
        assert files.fits(value, hint)
    for value, hint in (
        (True, int),
        ("1", int),
        (1.0, int),
        ([1, "a"], list[float]),
        (10**400, float),
        ({}, list[int]),
    ):
        assert not files.fits(value, hint)


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "a.json").write_text(r'{"a": "\ud83e\udd8a"}')
    assert files.read_json(tmp_path / "a.json") == {"a": "\N{FOX FACE}"}
    (tmp_path / "a.json").write_text(r'{"a": ["\ud83e"]}')
    with pytest.raises(InputError, match=r"a.json is not valid JSON: .*surrogates not allowed"):
        files.read_json(tmp_path / "a.json")


def test_a_snapshot_is_not_waited_for(tmp_path):
    """A pipe that a manifest lists is no file, whatever size it says."""
    given = readers.valid("snapshot")["run"]
    fuzz.write_valid("snapshot", tmp_path)
    folder = tmp_path / "a/run/snapshots/step-00000000"
    manifest = json.loads(given["snapshots/step-00000000/MANIFEST.json"])
    manifest["files"]["pipe"] = {"bytes": 0, "sha256": "0", "tensors": {}}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError, match="pipe: is not a file"):
        READERS["snapshot"].read(tmp_path / "a/run")


@pytest.mark.parametrize("line", ["[]", "{", '{"loss": 1.0}', '{"step": "1"}', "[" * 100_000])
def test_a_log_that_no_step_has_written_is_named(tmp_path, line):
    log = Log(tmp_path / "loss.jsonl", True)
    log.append({"step": 1, "loss": 2.5})
    assert log.lines() == [{"step": 1, "loss": 2.5}]
    (tmp_path / "loss.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(InputError, match=r"loss.jsonl:2: is not what a step has written"):
        log.lines()
