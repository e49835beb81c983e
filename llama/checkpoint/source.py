"""What every layout is read as: a shape, and tensors under Meta's names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
from torch import Tensor

from llama import files, parallel, quantization
from llama.config import ModelArgs
from llama.errors import InputError
from llama.model import Transformer
from llama.processes import World
from llama.quantization import Quantization

REQUIRED = ("dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "ffn_dim")  # of a file that is not Meta's
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
# Tables that follow from the configuration; old checkpoints carry them, no model needs them.
DERIVED_KEYS = re.compile(r"rope\.freqs|(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq")

# Parts of a name that torch's wrappers put in: compiled, sharded and checkpointed modules, anywhere in it.
WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER_WRAPPERS = ("module.", "base_model.model.")  # before every name: of data-parallel and PEFT models


class Source:
    """An opened checkpoint. A layout is a subclass: its constructor reads everything but the weights, and checks it."""

    args: ModelArgs
    where: Path  # of the weights, as messages name them
    shapes: dict[str, tuple[int, ...]]
    quantization: Quantization | None = None
    dtype: torch.dtype | None = None  # of a model whose dtype nobody names; None: as stored
    codes: Mapping[str, torch.dtype] = MappingProxyType({})  # tensors that keep their dtype: codes and scales

    def open(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """Map the files for a while; gives a function that reads a tensor. What was read goes when it closes."""
        raise NotImplementedError

    @contextmanager
    def open_part(self, me: World) -> Iterator[Callable[[str], Tensor]]:
        """Like `open`; of each matrix, what process `me` of several has."""
        with self.open() as read:
            yield lambda name: parallel.shard(name, read(name), me)

    def place(self, name: str) -> str:
        """Where a weight is, for messages."""
        return f"{self.where}:{name}"

    def has_other_head(self) -> bool:
        """Whether a tied checkpoint lists a head as well, as released ones do, and it is not the table."""
        if not self.args.tie_word_embeddings or not {HEAD, EMBEDDING} <= self.shapes.keys():
            return False
        with self.open() as read:
            head, table = read(HEAD), read(EMBEDDING)
            is_alias = head.data_ptr() == table.data_ptr() and head.shape == table.shape
            return not (is_alias and head.stride() == table.stride()) and not torch.equal(head, table)

    def lay_out(self) -> Transformer:
        """The model on the meta device, once the files are known to fit it."""
        self.check_depth()
        with torch.device("meta"):
            model = Transformer(self.args)
        if self.quantization is not None:
            quantization.lay_out(model, self.quantization)
        self._check_keys({name: tuple(weight.shape) for name, weight in model.state_dict().items()})
        return model

    def check_depth(self) -> None:
        """Refuse a config with far more layers than the files before all of them are laid out."""
        last = f"layers.{self.args.n_layers - 1}.attention_norm.weight"
        if last not in self.shapes:
            raise InputError(f"{self.place(last)}: weight is missing; the config says {self.args.n_layers} layers")

    def _check_keys(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Every weight of the model is there with its shape, and nothing else is."""
        for name, shape in expected.items():
            if name not in self.shapes:
                raise InputError(f"{self.place(name)}: weight is missing; download the checkpoint again")
            if self.shapes[name] != shape:
                raise InputError(
                    f"{self.place(name)}: has shape {list(self.shapes[name])}, the config says {list(shape)}"
                )
        spare = {HEAD} if self.args.tie_word_embeddings and self.quantization is None else set()  # equal to the table
        for name in self.shapes:
            if name not in expected and name not in spare and not DERIVED_KEYS.fullmatch(name):
                raise InputError(
                    f"{self.place(name)}: unexpected weight; this is not a Llama text model of that config"
                )


def by_block(names: list[str]) -> Iterator[list[str]]:
    """Consecutive names of one transformer block, or one name outside the blocks."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(".".join(parts[:2]) if parts[0] == "layers" else name, []).append(name)
    yield from groups.values()


def unwrapped(keys: list[str]) -> list[str]:
    """Names of weights without what wrappers added; an outer prefix goes only where every name has it."""
    keys = [WRAPPERS.sub("", key) for key in keys]
    while prefix := next((p for p in OUTER_WRAPPERS if keys and all(key.startswith(p) for key in keys)), None):
        keys = [key.removeprefix(prefix) for key in keys]
    return keys


def open_safetensors(path: Path) -> Any:
    """A handle on a file. Raises InputError for one that is damaged."""
    files.require_no_device(path)
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise files.damaged(path, "safetensors file") from error


@contextmanager
def naming(path: Path, names: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Turn `field: reason` of ModelArgs into `reason in file:field`, with the field's name there."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        field, colon, reason = str(error).partition(":")
        text = names.get(field, field) + colon + reason  # it may quote what a hostile file says
        raise InputError(f"{path}:{text if len(text) < 400 else f'{text[:200]} ... {text[-200:]}'}") from error


def read_fields(names: Mapping[str, str], given: Mapping[str, Any], **others: Any) -> ModelArgs:
    """ModelArgs of a file with names of its own for them. Raises ValueError, `field: reason`, with ours.

    A context length that the other fields imply is left out, as in Meta's params.json, which does not say it.
    """
    values = {ours: given[theirs] for ours, theirs in names.items() if given.get(theirs) is not None}
    for ours in REQUIRED:
        if ours not in values:
            raise ValueError(f"{ours}: is missing")
    if values["vocab_size"] == -1:  # in Meta's files, "as many as the table has"
        raise ValueError("vocab_size: -1 is no number of words")
    ffn_dim = values.pop("ffn_dim")
    args = ModelArgs(**values, **others)
    implied = dataclasses.replace(args, max_seq_len=None)
    return (implied if implied.trained_context == args.max_seq_len else args).with_ffn_dim(ffn_dim)


def write_fields(names: Mapping[str, str], args: ModelArgs) -> dict[str, Any]:
    """What read_fields reads, with the context length always."""
    return {theirs: getattr(args, ours) for ours, theirs in names.items()} | {
        names["max_seq_len"]: args.trained_context
    }
