"""A prompt in a file, with its keys and values: a long text goes through the network once, whatever is asked about it.

    with llama.start_session() as session:
        session.read(llama.encode_prompt(text))
        save("book.safetensors", session, text)

    saved = read("book.safetensors", llama.encode_prompt)
    with llama.start_session() as session:
        saved.restore(session)
        llama.stream(llama.encode_prompt(saved.text + question), 64, session=session)

A session computes what its cache does not hold, so it begins behind the saved tokens. Text and question are encoded
together, as in a run without the file: where a token spans the border, the saved ones from there on are taken back.

The file is safetensors: text (UTF-8), tokens and the cache's own tensors, without its unused slots. Its metadata has
two hashes: of the model, because keys and values of another one give fluent nonsense, and of all that the file holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from llama import files, lora
from llama.cache import Int8Cache, KVCache
from llama.decoding import Session
from llama.device import dtype_name
from llama.errors import InputError
from llama.model import Transformer

HASHES = ("model_sha256", "sha256")


@dataclass(frozen=True)
class SavedPrompt:
    """What a file holds. `parts`: keys and values as the cache has them, [n_layers, n_kv_heads, T, head_dim] each."""

    path: Path
    text: str
    tokens: list[int]
    parts: dict[str, Tensor]
    model_sha256: str

    def restore(self, session: Session) -> None:
        """Put the prompt into a session, as if it had read it.

        Raises InputError where the session has too few slots, a cache of another dtype, or another model.
        """
        cache, n = session.run.cache, len(self.tokens)
        if n > cache.max_len:
            raise InputError(f"{self.path}:tokens: are {n}, of at most max_seq_len={cache.max_len}; raise that")
        ours, theirs = dtype_name(cache.k.dtype), dtype_name(self.parts["k"].dtype)
        if ours != theirs:
            remedy = "cache_dtype=int8" if theirs == "int8" else f"cache_dtype=auto with dtype={theirs}"
            raise InputError(f"{self.path}:k: is a KV cache in {theirs}, this run's is in {ours}; use {remedy}")
        slots = {name: getattr(cache, name)[:, 0, :, :n] for name in cache.parts}
        is_same_shape = all(slots[name].shape == self.parts[name].shape for name in slots)
        if not is_same_shape or self.model_sha256 != fingerprint(session.run.model):
            raise InputError(
                f"{self.path}:model_sha256: is of another model, adapter or dtype of weights; use those that it was "
                "saved with, or save the prompt anew"
            )
        for name, values in slots.items():
            values.copy_(self.parts[name])
        session.tokens = list(self.tokens)


def save(path: str | Path, session: Session, text: str) -> int:
    """Write what the cache of a session holds, the tokens of `text`, as a new file; returns its size in bytes.

    Takes the memory of those positions once more. Raises InputError where `path` exists, EnvironmentFailure where it
    cannot be written.
    """
    cache, n = session.run.cache, len(session.tokens)
    tensors = {name: getattr(cache, name)[:, 0, :, :n].cpu().contiguous() for name in cache.parts}
    tensors["tokens"] = torch.tensor(session.tokens)
    tensors["text"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    model_sha256 = fingerprint(session.run.model)
    hashes = dict(zip(HASHES, (model_sha256, _digest(tensors, model_sha256)), strict=True))
    with files.new_file(path) as scratch:
        safetensors.torch.save_file(tensors, scratch, hashes)
    return Path(path).stat().st_size


def read(path: str | Path, encode: Callable[[str], list[int]]) -> SavedPrompt:
    """Read and check a file; keys and values stay mapped.

    encode: how a text becomes the ids of a prompt in this run. Raises InputError for a file that is damaged or another
    thing, or whose text has other ids now.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"saved prompt {path} is not a file; check its name")
    try:
        with safetensors.safe_open(path, "pt") as file:
            hashes, names = file.metadata() or {}, set(file.keys())
            if not any(names == {"tokens", "text", *kind.parts} for kind in (KVCache, Int8Cache)):
                held = ", ".join(sorted(names)[:3])
                raise InputError(f"{path}: holds {held or 'no tensors'}; a saved prompt holds tokens, text, k and v")
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        what = files.stand_in(path) or "truncated or no safetensors file"
        raise InputError(f"{path} is {what}; save the prompt anew") from error
    model_sha256, sha256 = (hashes.get(name, "") for name in HASHES)
    if sha256 != _digest(tensors, model_sha256):
        raise InputError(f"{path}:sha256: differs from that of the content, which is damaged; save the prompt anew")
    if [tensors[name].dtype for name in ("tokens", "text")] != [torch.int64, torch.uint8]:
        raise InputError(f"{path}: tokens and text are not what a saved prompt holds; save the prompt anew")
    tokens, text = tensors.pop("tokens").tolist(), tensors.pop("text").numpy().tobytes().decode(errors="replace")
    if tokens != encode(text):
        raise InputError(
            f"{path}:tokens: are not those of its text here; use the tokenizer and the template (chat, alpaca) that it "
            "was saved with"
        )
    return SavedPrompt(path, text, tokens, tensors, model_sha256)


def fingerprint(model: Transformer) -> str:
    """sha256 of all that keys and values depend on: weights and adapters as they are in memory, RoPE, epsilon."""
    digest = hashlib.sha256(f"{model.args.norm_eps} {model.dtype}\n".encode())
    digest.update(f"{ {name: layer.scale for name, layer in lora.layers(model).items()} }\n".encode())
    for name, tensor in {**model.state_dict(), "rope_freqs": model.rope_freqs}.items():
        _add(digest, name, tensor)
    return digest.hexdigest()


def _digest(tensors: dict[str, Tensor], model_sha256: str) -> str:
    """sha256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256(model_sha256.encode())
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
