"""Hugging Face's layout: config.json and model.safetensors, or several files, or the older pytorch_model.bin."""

from __future__ import annotations

import itertools
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from llama import files
from llama.checkpoint import hf_config
from llama.checkpoint.locate import remedy
from llama.checkpoint.meta import read_pth
from llama.checkpoint.source import EMBEDDING, HEAD, Source, naming, open_safetensors, unwrapped
from llama.config import ModelArgs
from llama.errors import InputError, Notice

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "*.bin")
# Meta's name <-> Hugging Face's, for everything outside and inside a block.
TOP = {EMBEDDING: "model.embed_tokens.weight", "norm.weight": "model.norm.weight", HEAD: "lm_head.weight"}
BLOCK = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
ROTATED = ("attention.wq.weight", "attention.wk.weight")  # their rows are in a different order in the two layouts
# What other programs leave beside or in place of weights in few bits.
QUANTIZED_KEYS = re.compile(r".*\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|(weight\.)?(absmax|SCB))")


class HfSource(Source):
    """What it reads has Meta's names and row order."""

    def __init__(self, directory: Path) -> None:
        with naming(directory / CONFIG, hf_config.FIELDS | hf_config.SCALES):
            self.args = hf_config.args_of(files.read_json(directory / CONFIG))
        self.where = directory
        self.names = names_of(self.args)
        self.keys: dict[str, tuple[Path, str]] = {}  # where each weight is stored
        self.shapes: dict[str, tuple[int, ...]] = {}
        stored = [(path, key, shape) for path in _weight_files(directory) for key, shape in _shapes(path).items()]
        plain = _plain_names([key for _, key, _ in stored])
        meta_names = {hf: meta for meta, hf in self.names.items()}
        for (path, key, shape), hf_name in zip(stored, plain, strict=True):
            name = meta_names.get(hf_name, hf_name)
            if QUANTIZED_KEYS.fullmatch(key):
                raise InputError(
                    f"{path}:{key}: the weights are quantized; take the original model, or a GGUF file of it"
                )
            if name in self.names and hf_name not in meta_names:
                raise InputError(f"{path}:{key}: unexpected weight; it has Meta's name in an HF checkpoint")
            if name in self.keys:
                raise InputError(f"{path}:{key}: also in {self.keys[name][0].name}; a weight may stand once")
            self.keys[name], self.shapes[name] = (path, key), shape
        if not self.args.tie_word_embeddings and HEAD not in self.shapes and EMBEDDING in self.shapes:
            raise InputError(
                f"{directory} holds no {TOP[HEAD]}, and its {CONFIG} does not tie the head; set tie_word_embeddings "
                "there to true if the head is the embedding table, else this is half a model"
            )
        if self.has_other_head():
            raise InputError(f"{self.where}: {CONFIG} ties the head, but lm_head differs from embed_tokens")

    def place(self, name: str) -> str:
        return super().place(self.keys[name][1] if name in self.keys else self.names.get(name, name))

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Map each file when it is first read; wq and wk are copies, the rest lies in the files."""
        readers: dict[Path, Callable[[str], Tensor]] = {}

        def read(name: str) -> Tensor:
            path, key = self.keys[name]
            if name.endswith(ROTATED):  # copied, so read through a mapping of its own, which then ends with its pages
                return swap_rotary_order(_reader(path)(key), name, self.args, to_hf=False)
            if path not in readers:
                readers[path] = _reader(path)
            return readers[path](key)

        yield read


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights: one, those that an index lists, or numbered ones; safetensors before .bin."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole, index = directory / f"{stem}{suffix}", directory / f"{stem}{suffix}.index.json"
        numbered = sorted(directory.glob(f"{stem}-*-of-*{suffix}"))
        if whole.is_file():
            if index.exists() and set(_listed(index)) != {whole.name}:
                warnings.warn(f"{whole} is read; {index.name} beside it lists other files", Notice, stacklevel=2)
            return [whole]
        if index.exists():
            for name in _listed(index):
                if Path(name).name != name or not name.endswith(suffix):
                    raise InputError(
                        f"{index}:weight_map: {reprlib.repr(name)} is not a plain {suffix} file name in this directory"
                    )
                if not (directory / name).is_file():
                    raise InputError(f"{index}:weight_map: {name} does not exist; download it")
            return [directory / name for name in _listed(index)]
        if numbered:
            total = numbered[-1].stem.rpartition("-")[2]
            for path, number in itertools.zip_longest(numbered, range(1, int(total) + 1) if total.isdecimal() else ()):
                if path is None or number is None or path.name != f"{stem}-{number:05d}-of-{total}{suffix}":
                    raise InputError(f"{directory}: expected {stem}-00001-of-{total}{suffix}, 00002, ... to {total}")
            return numbered
    raise InputError(
        f"{directory} holds no weights of a name that is known, such as model.safetensors; {remedy(directory)}"
    )


def _listed(index: Path) -> list[str]:
    """The names of files in an index, each once."""
    listed = files.read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index}:weight_map: must map weights to names of files")
    return sorted(set(listed.values()))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".bin":
        return {key: tuple(tensor.shape) for key, tensor in read_pth(path).items()}
    with open_safetensors(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (a handle)


def _reader(path: Path) -> Callable[[str], Tensor]:
    """What reads a tensor of a file, which stays mapped as long as this lives."""
    return read_pth(path).__getitem__ if path.suffix == ".bin" else open_safetensors(path).get_tensor


def _plain_names(keys: list[str]) -> list[str]:
    """Keys without what wrappers added, and with the `model.` that those of a bare LlamaModel lack."""
    keys = unwrapped(keys)
    if not any(key.startswith("model.") for key in keys) and "embed_tokens.weight" in keys:
        keys = [key if key == TOP[HEAD] else f"model.{key}" for key in keys]
    return keys


def names_of(args: ModelArgs) -> dict[str, str]:
    """Meta's name of each weight -> Hugging Face's."""
    blocks = {
        f"layers.{i}.{meta}": f"model.layers.{i}.{hf}" for i in range(args.n_layers) for meta, hf in BLOCK.items()
    }
    return TOP | blocks


def swap_rotary_order(weight: Tensor, name: str, args: ModelArgs, to_hf: bool) -> Tensor:
    """Reorder the rows of wq and wk: Meta rotates neighbours (0,1), (2,3), ..., Hugging Face (0,D/2), (1,D/2+1), ...

    So within a head of 8 the rows 0 1 2 3 4 5 6 7 of Meta's are 0 2 4 6 1 3 5 7 in Hugging Face's. Rows of other
    weights stay as they are; `name` is Meta's.
    """
    if not name.endswith(ROTATED) or weight.shape[0] % args.head_dim:
        return weight
    pair = (args.head_dim // 2, 2) if to_hf else (2, args.head_dim // 2)
    return weight.unflatten(0, (-1, *pair)).transpose(1, 2).flatten(0, 2)
