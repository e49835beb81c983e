"""Hugging Face's layout: config.json and model.safetensors, or several files with an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from llama import files
from llama.checkpoint.source import EMBEDDING, HEAD, Source, naming, open_safetensors
from llama.config import ROPE_HIGH_FREQ_FACTOR, ROPE_LOW_FREQ_FACTOR, ROPE_ORIGINAL_CONTEXT, ModelArgs
from llama.errors import InputError

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
ROPE_SCALING = {
    "low_freq_factor": ROPE_LOW_FREQ_FACTOR,
    "high_freq_factor": ROPE_HIGH_FREQ_FACTOR,
    "original_max_position_embeddings": ROPE_ORIGINAL_CONTEXT,
}
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
ROTATED = ("attention.wq.weight", "attention.wk.weight")  # their rows are in a different order in the two layouts


class HfSource(Source):
    """What it reads has Meta's names and row order."""

    def __init__(self, directory: Path) -> None:
        with naming(directory / CONFIG):
            self.args = _args_of(files.read_json(directory / CONFIG))
        self.where = directory
        self.names = names_of(self.args)
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(directory):
            self._list(path)
        if self.has_other_head():
            raise InputError(f"{self.where}: {CONFIG} ties the head, but lm_head differs from embed_tokens")

    def _list(self, path: Path) -> None:
        """Take in the names and shapes of a file."""
        meta_names = {hf: meta for meta, hf in self.names.items()}
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118 (a handle, not a dictionary)
                name = meta_names.get(key, key)
                if name in self.names and key not in meta_names:
                    raise InputError(f"{path}:{key}: unexpected weight; it has Meta's name in an HF checkpoint")
                if name in self.file_of:
                    raise InputError(f"{path}:{key}: also in {self.file_of[name].name}; a weight may stand once")
                self.file_of[name] = path
                self.shapes[name] = tuple(file.get_slice(key).get_shape())

    def place(self, name: str) -> str:
        return super().place(self.names.get(name, name))

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Map each file when it is first read; wq and wk are copies, the rest lies in the files."""
        handles: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            path = self.file_of[name]
            if name.endswith(ROTATED):  # copied, so read through a mapping of its own, which then ends with its pages
                with open_safetensors(path) as file:
                    return swap_rotary_order(file.get_tensor(self.names[name]), name, self.args, to_hf=False)
            if path not in handles:
                handles[path] = open_safetensors(path)
            return handles[path].get_tensor(self.names[name])

        yield read


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise InputError(f"{directory} holds neither model.safetensors nor its .index.json")
        return [single]
    listed = files.read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}:weight_map: must map weights to files")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index}:weight_map: {name!r} is not a plain .safetensors file name in this directory")
        if not (directory / name).is_file():
            raise InputError(f"{index}:weight_map: {name} does not exist; download it")
    return sorted({directory / name for name in listed.values()})


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


def _args_of(config: dict[str, Any]) -> ModelArgs:
    """ModelArgs of a config.json. Raises ValueError for an architecture or option that this code would not honour."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"):
        if name not in config:
            raise ValueError(f"{name}: is missing")
    for name, only in FIXED.items():
        if config.get(name, only) != only:
            raise ValueError(f"{name}: {config[name]!r} is not supported, only {only!r}")
    ffn = config["intermediate_size"]
    args = ModelArgs(
        dim=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config.get("num_key_value_heads"),
        vocab_size=config["vocab_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        **_rope_of(config),
    )
    if not isinstance(ffn, int) or not 0 < ffn < 1 << 20:
        raise ValueError(f"intermediate_size: {ffn!r} is not a size")
    args = args.with_ffn_dim(ffn)
    if config.get("head_dim") not in (None, args.head_dim):
        raise ValueError(f"head_dim: {config['head_dim']!r} is not supported, only hidden_size / num_attention_heads")
    return args


def _rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 keeps everything under `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling: {rope!r} is not an object")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise ValueError(f"rope_scaling: type {kind!r} is not supported, only 'llama3'")
    for name, only in ROPE_SCALING.items():
        if rope.get(name) != only:
            raise ValueError(f"rope_scaling: {name} {rope.get(name)!r} is not supported, only {only}")
    if "factor" not in rope:
        raise ValueError("rope_scaling: factor is missing")
    return {"rope_theta": theta, "use_scaled_rope": True, "rope_scale_factor": rope["factor"]}
