"""One training over several processes: each takes some batches of every window, and all end it with the same gradient.

Copies: every process has the whole model. The gradients of the trained weights are added up once per window, in
messages of at most `MESSAGE` bytes, the loss in the first. (DistributedDataParallel does as much, but around one
`forward`; the loop calls `hidden`, and `logits` for the labelled positions alone.)

Shares: torch's FSDP2 (`fully_shard`) leaves each process a share of every weight, gradient and optimizer state. A block
is put together for its forward pass, and again for its backward pass.

A window's label tokens are counted over all processes, and dropout is drawn for each batch from a stream of its own:
the numbers are those of one process, up to the order of sums. One process alone uses nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llama.model import Transformer
from llama.processes import ALONE, World, world
from llama.training.batch import Batch

MESSAGE = 1 << 28  # bytes of gradients that are copied together


def share_out(window: Sequence[Batch], me: World, is_even: bool) -> Iterator[tuple[int, Batch]]:
    """The batches of this process, with their numbers in the window.

    is_even: all processes go through the network equally often, some at last without a label.
    """
    yield from list(enumerate(window))[me.rank :: me.size]
    if is_even and me.rank >= len(window) % me.size > 0:
        blank = window[0]
        yield len(window), Batch(blank.tokens, blank.pos, blank.where[:0], blank.labels[:0])


def sum_over_processes(weights: Sequence[Tensor], loss: Tensor | float, is_stopping: bool) -> tuple[Tensor, bool]:
    """Add up the gradients in place; the loss of all processes, and whether one of them was asked to stop.

    Gradients of shares have been added up in the backward pass.
    """
    like = {"dtype": weights[0].dtype, "device": weights[0].device}
    told = torch.stack([torch.as_tensor(value, **like) for value in (loss, float(is_stopping))])
    weights = [weight for weight in weights if not is_share(weight)]
    for weight in weights:
        if weight.grad is None:  # no batch of the window was here
            weight.grad = torch.zeros_like(weight)
    message: list[Tensor] = [told]
    for gradient in (weight.grad.view(-1) for weight in weights):
        if sum(part.nbytes for part in message) + gradient.nbytes > MESSAGE:
            _add_up(message)
            message = []
        message.append(gradient)
    _add_up(message)
    return told[0], bool(told[1])


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def dividing(weights: Iterable[Tensor]) -> World:
    """Who this process is among those that can divide forward passes; alone where each has a share of the weights."""
    return ALONE if not dist.is_initialized() or any(map(is_share, weights)) else world()


def _add_up(parts: list[Tensor]) -> None:
    """One sum over processes for several tensors [n], in place."""
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    for part, total in zip(parts, flat.split([len(part) for part in parts]), strict=True):
        part.copy_(total)


def shard(model: Transformer, device: torch.device) -> None:
    """Leave this process its share of every weight, on its device; the model may be on the CPU until then."""
    from torch.distributed.device_mesh import init_device_mesh  # here: one process alone shall not wait for them
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)  # the loss is divided by the label tokens of all processes
        part.set_force_sum_reduction_for_comms(True)
    for name in ("hidden", "logits"):
        register_fsdp_forward_method(model, name)


def is_share(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


Groups = dict[str, dict[str, Tensor]]


def apart(groups: Groups) -> tuple[Groups, Groups]:
    """What every process has, and this process's shares: copies in main memory, by group and name."""
    copies = {group: {n: t.cpu() for n, t in named.items() if not is_share(t)} for group, named in groups.items()}
    rows = {n: {m: t.to_local().cpu() for m, t in named.items() if is_share(t)} for n, named in groups.items()}
    return copies, {group: named for group, named in rows.items() if named}


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every process has a share, put together; all of them must ask for it."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a whole tensor that every process has."""
    if not is_share(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
