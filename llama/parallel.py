"""One model over several processes, each of which has a part of every matrix: tensor parallelism (Shoeybi et al. 2019).

`SPLIT` is the whole plan, by Meta's names. Of two processes each has half of the heads and half of the hidden units,
and what it computes of `wo` and `w2` is its share of a sum:

    x --> wq wk wv: its heads --> attention --> wo --> sum over processes
    x --> w1 w3: its hidden units --> w2 ------------> sum over processes, so that x is the same everywhere

A layer sends these two sums of [B, T, dim] and nothing else. Besides, a forward pass sends the sum of the embedding
and, of the positions that are projected, the logits. So all processes hold the same logits; with the same random
stream they draw the same tokens, and none has to be sent.

Left out on purpose: who the processes are (processes.py), training on several.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama.config import ModelArgs
from llama.errors import InputError
from llama.model import Transformer
from llama.processes import World
from llama.surgery import replace_modules

# The dimension along which a matrix [out, in] is cut. What is not listed, the norms, every process has whole.
SPLIT = {"tok_embeddings": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}
# The dimension of an adapter's matrices, A [rank, in] and B [out, rank], that every process has whole.
RANK = {"lora_A": 0, "lora_B": 1}


class Summed:
    """Before a linear class that has some columns: its product is a share of the whole one."""

    def forward(self, x: Tensor) -> Tensor:
        return _sum(super().forward(x))


class Gathered:
    """Before a linear class that has some rows of the output head: the logits of all rows."""

    def forward(self, x: Tensor) -> Tensor:
        return _gather(super().forward(x))


class Table:
    """Before an embedding class that has some rows, from `first` on: the vector is where its row is, else 0."""

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens - self.first
        is_here = (rows >= 0) & (rows < len(self.weight))
        return _sum(super().forward(rows.where(is_here, 0)) * is_here[..., None])

    def project(self, h: Tensor) -> Tensor:
        return _gather(super().project(h))


ROLES = {"tok_embeddings": Table, "output": Gathered, "wo": Summed, "w2": Summed}


def _sum(x: Tensor) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x)
    return x


def _gather(x: Tensor) -> Tensor:
    """[..., n] of each process side by side: [..., n * processes]."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, -1)


def split(model: Transformer, me: World) -> None:
    """Leave of every matrix the part of this process: on the meta device, before weights are read.

    `model.args` become those of the part, a model with fewer heads and hidden units. Raises InputError naming what
    `me.size` processes cannot share evenly: a field of the shape, or groups of codes.
    """
    part = part_of(model.args, me.size)
    leaves = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    replace_modules(model, lambda _, module: leaves[module] in SPLIT, lambda module: _part(module, leaves[module], me))
    model.args = part


def part_of(args: ModelArgs, size: int) -> ModelArgs:
    """The shape of one of `size` parts: fewer heads and hidden units. Raises InputError where they are not equal."""
    for name in ("n_kv_heads", "n_heads", "ffn_dim", "vocab_size"):
        if getattr(args, name) % size:
            raise InputError(f"{size} processes cannot share {name}={getattr(args, name)} evenly; start fewer")
    heads = {"n_heads": args.n_heads // size, "n_kv_heads": args.n_kv_heads // size, "head_dim": args.head_dim}
    return replace(args, **heads).with_ffn_dim(args.ffn_dim // size)


def shard(name: str, whole: Tensor, me: World) -> Tensor:
    """This process's part of the weight of that name, or of its scales, offsets or adapter."""
    return _cut(whole, axis_of(name), me)


def axis_of(name: str) -> int | None:
    """The dimension along which the weight of that name is cut; None where every process has it whole."""
    *_, leaf, tensor = name.split(".")
    axis = SPLIT.get(leaf)
    return None if axis == RANK.get(tensor) else axis


def sum_with_update(name: str, adapted: nn.Module) -> None:
    """Let an adapted wo or w2 sum its product and its update together, in one message."""
    if ROLES.get(name.rpartition(".")[2]) is Summed:
        adapted.__class__ = _class(Summed, type(adapted))


def _cut(whole: Tensor, axis: int | None, me: World) -> Tensor:
    if axis is None or axis >= whole.dim():  # a scale for each row belongs to all of its columns
        return whole
    part = me.share(whole.shape[axis])
    return whole[part] if axis == 0 else whole[:, part]


def _part(module: nn.Module, leaf: str, me: World) -> nn.Module:
    axis, part = SPLIT[leaf], object.__new__(_class(ROLES.get(leaf), type(module)))
    part.__dict__.update(module.__dict__)
    weight = nn.Parameter(_cut(module.weight, axis, me), requires_grad=False)
    part._parameters = module._parameters | {"weight": weight}
    part._buffers = {name: b if b is None else _cut(b, axis, me) for name, b in module._buffers.items()}
    if leaf == "tok_embeddings":
        part.first = me.share(len(module.weight)).start
    size = "num_embeddings" if isinstance(module, nn.Embedding) else ("out_features", "in_features")[axis]
    n = getattr(module, size)
    group = getattr(module, "group_size", None) if axis == 1 else None
    if group and n // me.size % group:
        raise InputError(
            f"{me.size} processes cannot share the {n} columns of {leaf} in groups of {group}; start fewer, or "
            "quantize in smaller groups"
        )
    setattr(part, size, n // me.size)
    return part


@functools.cache
def _class(role: type | None, base: type) -> type:
    return base if role is None else type(f"{role.__name__}{base.__name__}", (role, base), {})
