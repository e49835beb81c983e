"""Checkpoints on disk: Meta's directories (params.json + consolidated.NN.pth) and Hugging Face's (config.json +
*.safetensors), read and written; and our own of quantized models (params.json with a field `quantization` +
model.safetensors, with Meta's names and a `.scales` beside each quantized `.weight`).

Reading is strict: every key is accounted for and every shape checked, against a model that is first built on the meta
device, so nothing is allocated before the files are known to fit. The weights are memory-mapped and assigned block by
block: where the dtype is kept on the CPU they are the mapped file itself; where it changes, one block at a time is in
memory twice. Nothing is unpickled beyond tensors (`weights_only=True`).

Left out on purpose: training state (snapshot.py), downloading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama import files, quantization
from llama.config import ROPE_HIGH_FREQ_FACTOR, ROPE_LOW_FREQ_FACTOR, ROPE_ORIGINAL_CONTEXT, ModelArgs
from llama.device import dtype_name
from llama.errors import EnvironmentFailure, InputError
from llama.model import Transformer
from llama.quantization import Quantization

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"

TOKENIZER_IN = {"meta": "tokenizer.model", "hf": "original/tokenizer.model"}  # where the released directories have it

# Meta's name <-> Hugging Face's, for everything outside and inside a block.
HF_TOP = {EMBEDDING: "model.embed_tokens.weight", "norm.weight": "model.norm.weight", HEAD: "lm_head.weight"}
HF_BLOCK = {
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
ROTATED = ("attention.wq.weight", "attention.wk.weight")  # rows in another order in the two layouts
# Tables that follow from the configuration; old checkpoints carry them, no model needs them.
DERIVED_KEYS = re.compile(r"rope\.freqs|(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
STORED_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}  # of codes, scales
# How Meta's model-parallel shards were cut: these along their input dimension, norms not at all, the rest along dim 0.
SHARDED_ON_INPUT = ("attention.wo.weight", "feed_forward.w2.weight")


def load(
    ckpt_dir: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", progress: bool = False
) -> Transformer:
    """Build the model of a checkpoint directory, in evaluation mode, with `dtype` (None: as stored) on `device`.

    Raises InputError naming file and field for anything missing, malformed, unexpected or not representable in `dtype`.
    """
    source = _open_source(ckpt_dir)
    model = _lay_out(source)
    names = list(model.state_dict())
    label = f"loading {Path(ckpt_dir).name}"
    with tqdm(total=len(names), desc=label, unit="tensor", disable=None if progress else True, leave=False) as bar:
        for block in _by_block(names):
            with source.open() as read:
                for name in block:
                    _assign(model, name, _convert(read(name), source, name, dtype, device))
                    bar.update()
    stored = {weight.dtype for name, weight in model.named_parameters() if name not in source.codes}
    if len(stored) > 1:
        raise InputError(f"{source.where}: weights of several dtypes ({', '.join(map(str, stored))}); pass --dtype")
    # Moves the RoPE frequencies, the only thing not on it yet, and tells a quantized table what the norms compute in.
    model.to(device, model.dtype)
    return model.eval()


def read_args(ckpt_dir: str | Path) -> ModelArgs:
    """The shape of a checkpoint, without reading its weights. Raises InputError as `load` does."""
    return _open_source(ckpt_dir).args


def read_quantization(ckpt_dir: str | Path) -> Quantization | None:
    """How a checkpoint is quantized, None where it is not, without reading its weights. Raises InputError as `load`."""
    return _open_source(ckpt_dir).quantization


def save(
    model: Transformer,
    directory: str | Path,
    layout: Literal["meta", "hf"] = "meta",
    tokenizer_path: Path | None = None,
) -> None:
    """Write a model as a new checkpoint directory in Meta's or Hugging Face's ("hf") layout, with its tokenizer if any.

    A quantized model has a layout of its own, with Meta's names. The directory appears under its name only when
    complete. Raises InputError where it already holds something or a quantized model should get Hugging Face's layout,
    EnvironmentFailure where it cannot be written.
    """
    write = {"meta": _write_meta, "hf": _write_hf}[layout]
    if quantization.quantization_of(model) is not None:
        if layout == "hf":
            raise InputError("a quantized model has no form in Hugging Face's layout; write that of the original")
        write = _write_quantized
    with files.new_directory(directory) as scratch:
        write(model, scratch)
        if tokenizer_path is not None:
            target = scratch / TOKENIZER_IN[layout]
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(tokenizer_path, target)


def fingerprint(ckpt_dir: str | Path) -> str:
    """sha256 of the shapes and values (as fp32) of the weights in a checkpoint directory.

    The same for every layout and every stored dtype that holds the values exactly, and in whatever dtype they are then
    used. Raises InputError as `load` does.
    """
    source = _open_source(ckpt_dir)
    digest = hashlib.sha256()
    for block in _by_block(list(_lay_out(source).state_dict())):
        with source.open() as read:
            for name in block:
                weight = read(name)
                digest.update(f"{name} {list(weight.shape)}\n".encode())
                for part in weight.split(4096):  # rows: an fp32 copy of a whole 16-bit table would be a gigabyte
                    digest.update(part.float().contiguous().numpy().data)
    return digest.hexdigest()


# Reading


def _open_source(ckpt_dir: str | Path) -> Source:
    directory = Path(ckpt_dir)
    if not directory.is_dir():
        raise InputError(f"checkpoint directory {directory} does not exist; check its name")
    has_meta, has_hf = (directory / "params.json").exists(), (directory / "config.json").exists()
    if has_meta == has_hf:
        found = (
            "both a params.json and a config.json" if has_meta else "neither params.json (Meta) nor config.json (HF)"
        )
        raise InputError(f"{directory} holds {found}; exactly one says which layout it is")
    if has_hf:
        return _HfSource(directory)
    is_quantized = "quantization" in files.read_json(directory / "params.json")
    return _QuantizedSource(directory) if is_quantized else _MetaSource(directory)


class Source(Protocol):
    """What a directory holds: a shape, tensors under Meta's names, and what they are called there."""

    args: ModelArgs
    where: Path
    shapes: dict[str, tuple[int, ...]]
    quantization: Quantization | None
    codes: dict[str, torch.dtype]  # tensors that keep their dtype: codes and scales

    def label(self, name: str) -> str:
        """How the files call a weight."""
        ...

    def open(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """Map the files for a while; gives a function that reads a tensor."""
        ...


class _QuantizedSource:
    """params.json with a field `quantization`, and model.safetensors with Meta's names."""

    def __init__(self, directory: Path) -> None:
        params_path = directory / "params.json"
        params = files.read_json(params_path)
        with _naming(params_path):
            self.quantization = Quantization.from_params(params.pop("quantization"))
            self.args = ModelArgs.from_params(params)
            if self.args.vocab_size == -1:
                raise ValueError("vocab_size: is -1; a quantized checkpoint says it")
        self.where = directory / "model.safetensors"
        with _open_safetensors(self.where) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dictionary)
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            kinds = {name: STORED_DTYPES.get(part.get_dtype()) for name, part in slices.items()}
        _check_depth(self)
        self.codes = {}
        with torch.device("meta"):
            model = Transformer(self.args)
        with _naming(params_path):
            quantization.lay_out(model, self.quantization)
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                continue
            self.codes[name] = tensor.dtype
            if name in kinds and kinds[name] is not tensor.dtype:
                found = str(kinds[name] or "another type").removeprefix("torch.")
                wanted = f"{self.quantization.bits} bits have {str(tensor.dtype).removeprefix('torch.')}"
                raise InputError(f"{self.where}:{name}: holds {found}, {wanted}; quantize the original again")

    def label(self, name: str) -> str:
        """How the file calls a weight."""
        return name

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Map the file for a while."""
        yield _open_safetensors(self.where).get_tensor


class _MetaSource:
    """params.json and consolidated.00.pth, .01.pth, ...; one file per model-parallel rank."""

    quantization, codes = None, {}

    def __init__(self, directory: Path) -> None:
        self.paths = sorted(directory.glob("consolidated.*.pth"))
        expected = [f"consolidated.{i:02d}.pth" for i in range(len(self.paths))]
        if not self.paths or [path.name for path in self.paths] != expected:
            found = ", ".join(path.name for path in self.paths) or "none"
            raise InputError(f"{directory}: expected shards consolidated.00.pth, 01, ... without a gap; found {found}")
        self.where = self.paths[0] if len(self.paths) == 1 else directory / "consolidated.*.pth"
        shapes = [{key: tuple(t.shape) for key, t in _read_pth(path).items()} for path in self.paths]
        for path, shard in zip(self.paths, shapes, strict=True):
            if shard.keys() != shapes[0].keys():
                odd = sorted(shard.keys() ^ shapes[0].keys())[0]
                raise InputError(f"{path}: its keys differ from those of {self.paths[0].name}, first at {odd}")
        params_path = directory / "params.json"
        params = files.read_json(params_path)
        declared_tied = params.get("tie_word_embeddings")
        with _naming(params_path):
            args = ModelArgs.from_params(params)
        self.dim = args.dim
        self.shapes = {key: self._merged_shape(key, [s[key] for s in shapes]) for key in shapes[0]}
        if args.vocab_size == -1 and len(self.shapes.get(EMBEDDING, ())) == 2:
            args = dataclasses.replace(args, vocab_size=self.shapes[EMBEDDING][0])
        with _naming(params_path):
            self.args = self._resolve_head(args, declared_tied)

    def _resolve_head(self, args: ModelArgs, declared_tied: bool | None) -> ModelArgs:
        """A tied checkpoint may still list `output.weight`: released ones do, as a second name for the table."""
        if args.vocab_size == -1:
            raise ValueError(f"vocab_size: is -1, and {self.where} holds no {EMBEDDING} to take it from")
        if not args.tie_word_embeddings and HEAD not in self.shapes and declared_tied is None:
            raise ValueError(
                f"tie_word_embeddings: {self.where} holds no {HEAD}; set it to true if the head is the embedding table"
            )
        if args.tie_word_embeddings and {HEAD, EMBEDDING} <= self.shapes.keys():
            with self.open() as read:
                if not _same(read(HEAD), read(EMBEDDING)):
                    raise ValueError(
                        f"tie_word_embeddings: the head is tied, but {HEAD} differs from {EMBEDDING} in {self.where}"
                    )
        return args

    def _axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The dimension along which ranks hold different parts; None where each holds the whole."""
        if len(shape) < 2:
            return None
        if name == EMBEDDING:  # Llama 2 cut the vectors, Llama 3 the vocabulary
            return 0 if shape[1] == self.dim else 1
        return 1 if name.endswith(SHARDED_ON_INPUT) else 0

    def _merged_shape(self, name: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        axis = self._axis(name, shapes[0])
        merged = list(shapes[0])
        if axis is not None:
            merged[axis] = sum(shape[axis] for shape in shapes if len(shape) == len(merged))
        for path, shape in zip(self.paths, shapes, strict=True):
            cut = [size for i, size in enumerate(shape) if i != axis]
            if len(shape) != len(merged) or cut != [size for i, size in enumerate(shapes[0]) if i != axis]:
                raise InputError(
                    f"{path}:{name}: shape {list(shape)} does not fit {list(shapes[0])} of the first shard"
                )
        return tuple(merged)

    def label(self, name: str) -> str:
        """How the files call a weight."""
        return name

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Map the shards for a while; pages read through the mapping are given back when it closes."""
        shards = [_read_pth(path) for path in self.paths]

        def read(name: str) -> Tensor:
            parts = [shard[name] for shard in shards]
            axis = self._axis(name, tuple(parts[0].shape))
            if len(parts) > 1 and axis is not None:
                return torch.cat(parts, axis)
            if not all(torch.equal(part, parts[0]) for part in parts[1:]):
                raise InputError(f"{self.where}:{name}: the shards hold different copies; they are of several models")
            return parts[0]

        yield read


class _HfSource:
    """config.json and model.safetensors, or files with an index; what it reads has Meta's names and row order."""

    quantization, codes = None, {}

    def __init__(self, directory: Path) -> None:
        config_path = directory / "config.json"
        with _naming(config_path):
            self.args = _args_from_hf(files.read_json(config_path))
        self.directory = directory
        self.where = directory
        self.names = _hf_names(self.args)
        paths = self._files()
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        meta_name = {hf: meta for meta, hf in self.names.items()}
        for path in paths:
            with _open_safetensors(path) as file:
                for key in file.keys():  # noqa: SIM118 (a handle, not a dictionary)
                    name = meta_name.get(key, key)
                    if name in self.names and key not in meta_name:
                        raise InputError(f"{path}:{key}: unexpected weight; it has Meta's name in an HF checkpoint")
                    if name in self.file_of:
                        raise InputError(f"{path}:{key}: also in {self.file_of[name].name}; a weight may stand once")
                    self.file_of[name] = path
                    self.shapes[name] = tuple(file.get_slice(key).get_shape())
        if self.args.tie_word_embeddings and {HEAD, EMBEDDING} <= self.shapes.keys():
            with self.open() as read:
                if not _same(read(HEAD), read(EMBEDDING)):
                    raise InputError(f"{self.where}: config.json ties the head, but lm_head differs from embed_tokens")

    def _files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if not index.exists():
            single = self.directory / "model.safetensors"
            if not single.exists():
                raise InputError(f"{self.directory} holds neither model.safetensors nor its .index.json")
            return [single]
        listed = files.read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(f"{index}:weight_map: must map weights to files")
        for name in listed.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(
                    f"{index}:weight_map: {name!r} is not a plain .safetensors file name in this directory"
                )
            if not (self.directory / name).is_file():
                raise InputError(f"{index}:weight_map: {name} does not exist; download it")
        return sorted({self.directory / name for name in listed.values()})

    def label(self, name: str) -> str:
        """How the files call a weight."""
        return self.names.get(name, name)

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Map the files for a while; pages read through the mapping are given back when it closes."""
        handles: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            path = self.file_of[name]
            if name.endswith(ROTATED):  # copied, so read through a mapping of its own, which then ends with its pages
                with _open_safetensors(path) as file:
                    return swap_rotary_order(file.get_tensor(self.names[name]), name, self.args, to_hf=False)
            if path not in handles:
                handles[path] = _open_safetensors(path)
            return handles[path].get_tensor(self.names[name])

        yield read


def _lay_out(source: Source) -> Transformer:
    """The model on the meta device, once the files are known to fit it."""
    _check_depth(source)
    with torch.device("meta"):
        model = Transformer(source.args)
    if source.quantization is not None:
        quantization.lay_out(model, source.quantization)
    _check_keys(source, model)
    return model


def _check_depth(source: Source) -> None:
    """Refuse a config with far more layers than the files before all of them are laid out."""
    last = f"layers.{source.args.n_layers - 1}.attention_norm.weight"
    if last not in source.shapes:
        place = f"{source.where}:{source.label(last)}"
        raise InputError(f"{place}: weight is missing; the config says {source.args.n_layers} layers")


def _check_keys(source: Source, model: Transformer) -> None:
    """Every weight of the model is there with its shape, and nothing else is."""
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    is_spare = model.args.tie_word_embeddings and source.quantization is None
    spare = {HEAD} if is_spare else set()  # checked equal to the table already
    for name, shape in wanted.items():
        place = f"{source.where}:{source.label(name)}"
        if name not in source.shapes:
            raise InputError(f"{place}: weight is missing; download the checkpoint again")
        if source.shapes[name] != shape:
            raise InputError(f"{place}: has shape {list(source.shapes[name])}, the config says {list(shape)}")
    for name in source.shapes:
        if name not in wanted and name not in spare and not DERIVED_KEYS.fullmatch(name):
            place = f"{source.where}:{source.label(name)}"
            raise InputError(f"{place}: unexpected weight; this is not a Llama text model of that config")


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, without reading them where they are one piece of memory under two names."""
    return (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()) or torch.equal(a, b)


def _by_block(names: list[str]) -> Iterator[list[str]]:
    """Consecutive names of one transformer block, or one name outside the blocks."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(".".join(parts[:2]) if parts[0] == "layers" else name, []).append(name)
    yield from groups.values()


def _convert(
    stored: Tensor, source: Source, name: str, dtype: torch.dtype | None, device: torch.device | str
) -> Tensor:
    place = f"{source.where}:{source.label(name)}"
    if name in source.codes:
        _check_codes(stored, place, dtype)
        dtype = stored.dtype
    elif stored.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{place}: holds {stored.dtype}; expected float32, bfloat16 or float16 weights")
    try:
        weight = stored.to(device=device, dtype=dtype or stored.dtype).contiguous()
    except torch.OutOfMemoryError as error:
        raise EnvironmentFailure(f"{device} has too little memory for the weights; use a 16-bit --dtype") from error
    if weight.dtype == torch.float16 and stored.dtype != torch.float16 and not weight.isfinite().all():
        raise InputError(f"{place}: values exceed float16; use --dtype=bfloat16 or float32")
    return weight


def _check_codes(stored: Tensor, place: str, dtype: torch.dtype | None) -> None:
    """Scales are numbers that the largest code does not carry beyond fp32, nor beyond `dtype`; any code is one."""
    if not stored.is_floating_point():
        return
    largest = stored.abs().amax().item() * {torch.float32: 127, torch.bfloat16: 8}[stored.dtype]
    if not largest <= torch.finfo(torch.float32).max:
        raise InputError(f"{place}: holds scales that are no finite numbers; quantize the original again")
    if dtype == torch.float16 and largest > torch.finfo(dtype).max:
        raise InputError(f"{place}: values exceed float16; use --dtype=bfloat16 or float32")


def _assign(model: Transformer, name: str, weight: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    setattr(module, leaf, weight)


def _read_pth(path: Path) -> dict[str, Tensor]:
    """Map one shard. Only tensors are unpickled; anything else in the file is refused before it runs."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise EnvironmentFailure(
            f"torch {torch.__version__} can be made to run code by a .pth file; install torch >= 2.10"
        )
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch raises a different type for each kind of damage; all mean the same to the user
        foreign = type(error).__name__ == "UnpicklingError"
        reason = "holds more than tensors and might run code" if foreign else "is truncated or no PyTorch checkpoint"
        raise InputError(f"{path} {reason}; download it again from a source you trust") from error
    plain = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
        for key, t in state.items()
    )
    if not plain:
        raise InputError(f"{path} must hold a flat dictionary of plain tensors")
    return state


def _open_safetensors(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is truncated or no safetensors file; download it again") from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn `field: reason` of ModelArgs into `reason in file:field`."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}:{error}") from error


# Hugging Face's layout


def _hf_names(args: ModelArgs) -> dict[str, str]:
    blocks = {
        f"layers.{i}.{meta}": f"model.layers.{i}.{hf}" for i in range(args.n_layers) for meta, hf in HF_BLOCK.items()
    }
    return HF_TOP | blocks


def swap_rotary_order(weight: Tensor, name: str, args: ModelArgs, to_hf: bool) -> Tensor:
    """Reorder the rows of wq and wk: Meta rotates neighbours (0,1), (2,3), ..., Hugging Face (0,D/2), (1,D/2+1), ...

    Rows of other weights stay as they are; `name` is Meta's.
    """
    if not name.endswith(ROTATED) or weight.shape[0] % args.head_dim:
        return weight
    pair = (args.head_dim // 2, 2) if to_hf else (2, args.head_dim // 2)
    return weight.unflatten(0, (-1, *pair)).transpose(1, 2).flatten(0, 2)


def _args_from_hf(config: dict[str, Any]) -> ModelArgs:
    """ModelArgs of a config.json. Raises ValueError for an architecture or option that this code would not honour."""
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    for name in required:
        if name not in config:
            raise ValueError(f"{name}: is missing")
    unsupported = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, only in unsupported.items():
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
        **_rope_from_hf(config),
    )
    if not isinstance(ffn, int) or not 0 < ffn < 1 << 20:
        raise ValueError(f"intermediate_size: {ffn!r} is not a size")
    args = args.with_ffn_dim(ffn)
    if config.get("head_dim") not in (None, args.head_dim):
        raise ValueError(f"head_dim: {config['head_dim']!r} is not supported, only hidden_size / num_attention_heads")
    return args


def _rope_from_hf(config: dict[str, Any]) -> dict[str, Any]:
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
    fixed = {
        "low_freq_factor": ROPE_LOW_FREQ_FACTOR,
        "high_freq_factor": ROPE_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": ROPE_ORIGINAL_CONTEXT,
    }
    for name, only in fixed.items():
        if rope.get(name) != only:
            raise ValueError(f"rope_scaling: {name} {rope.get(name)!r} is not supported, only {only}")
    if "factor" not in rope:
        raise ValueError("rope_scaling: factor is missing")
    return {"rope_theta": theta, "use_scaled_rope": True, "rope_scale_factor": rope["factor"]}


def _hf_config(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": args.rope_scale_factor,
        "low_freq_factor": ROPE_LOW_FREQ_FACTOR,
        "high_freq_factor": ROPE_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": ROPE_ORIGINAL_CONTEXT,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling if args.use_scaled_rope else None,
        "max_position_embeddings": args.trained_context,
        "tie_word_embeddings": args.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype_name(dtype),
    }


# Writing


def _write_meta(model: Transformer, directory: Path) -> None:
    state = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    if model.args.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]  # Meta's code needs the key; torch.save stores shared memory once
    files.write_json(directory / "params.json", model.args.to_params())
    try:
        torch.save(state, directory / "consolidated.00.pth")
    except RuntimeError as error:  # how torch's writer reports that a write failed
        raise OSError(str(error)) from error


def _write_quantized(model: Transformer, directory: Path) -> None:
    described = {**model.args.to_params(), "quantization": quantization.quantization_of(model).to_params()}
    files.write_json(directory / "params.json", described)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _write_hf(model: Transformer, directory: Path) -> None:
    names = _hf_names(model.args)
    state = {
        names[name]: swap_rotary_order(weight.detach().cpu(), name, model.args, to_hf=True).contiguous()
        for name, weight in model.state_dict().items()
    }
    files.write_json(directory / "config.json", _hf_config(model.args, next(model.parameters()).dtype))
    safetensors.torch.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
