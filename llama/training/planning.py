"""A training step over several processes, planned without them: the memory of each, and what it sends.

    step = Step(args, torch.float32, None, settings, shape)
    for division in divisions(8):                   # DDP 8, FSDP2 8, tensor parallel 8, and mixes
        plan(step, division)                        # footprint, bytes sent; InputError where there is no such division
    fewest(step, limit=80e9, most=64)               # the least number of processes that have so much memory each

DDP: every process has the whole model and batches of its own; once per step the gradients are summed, a copy of 268 MB
of them at a time.
FSDP2: each has 1 / n of weights, gradients and optimizer state, and batches of its own. For each batch the weights of a
block are gathered twice, forward and backward, those of the root (embedding, last norm, output head) once, and the
gradients are summed where they are kept; all that in 16 bits in mixed precision, which is FSDP2's own then.
Tensor parallel: each has a part of every matrix (llama/parallel.py), all have the same batches. A layer sums [B, T,
dim] twice forward and twice backward, once more where it is recomputed; besides, the embedding and the gradient of the
last hidden states are summed, and three numbers per label for a loss of which each process has the logits of its part
of the vocabulary. Mixed: tensor parallel in groups, FSDP2 among them.

The memory is that of memory.py: of the shape of one part, with shards divided. Traffic is that of ring algorithms:
an all-gather or a reduce-scatter of b bytes over n processes sends (n - 1) / n * b from each and brings it as much, an
all-reduce twice that. Left out: latency, what overlaps with computation, buffers of the communication library.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from llama import lora
from llama.config import ModelArgs
from llama.errors import InputError
from llama.lora import LoRAConfig
from llama.parallel import SPLIT, part_of
from llama.training import memory
from llama.training.memory import Footprint, Shape, Tracker
from llama.training.options import Settings
from llama.training.several import MESSAGE


@dataclass(frozen=True)
class Step:
    """What a process does by itself, as memory.estimate takes it. shape: with all batches of its step."""

    args: ModelArgs
    dtype: torch.dtype
    adapters: LoRAConfig | None
    settings: Settings
    shape: Shape
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Division:
    """How processes share a step: the product of the three is their number.

    tensor: so many have a part of every matrix; shards: so many divide what is kept of such a part; replicas: so many
    keep the same.
    """

    tensor: int = 1
    shards: int = 1
    replicas: int = 1

    def __str__(self) -> str:
        names = {"tensor parallel": self.tensor, "FSDP2": self.shards, "DDP": self.replicas}
        return " x ".join(f"{name} {n}" for name, n in names.items() if n > 1) or "one process"


@dataclass(frozen=True)
class Plan:
    """Of one process: memory, bytes that it sends per step and receives as many; and the tokens of all in a step."""

    division: Division
    footprint: Footprint
    sent: int
    tokens: int


def divisions(n: int) -> list[Division]:
    """The ways to divide a step among n processes."""
    if n == 1:
        return [Division()]
    mixed = [Division(tensor=t, shards=n // t) for t in range(2, n) if n % t == 0]
    return [Division(replicas=n), Division(shards=n), Division(tensor=n), *mixed]


def plan(step: Step, division: Division) -> Plan:
    """Raises InputError where the matrices have no such parts, or a step cannot be shared."""
    if step.settings.lean and step.adapters is None and division != Division():
        raise InputError(
            "lean full fine-tuning moves a weight as soon as one process knows its gradient, before those of others "
            "can be added; plan it without lean, or with lora=True"
        )
    tracker, sizes = _part(step, division.tensor)
    footprint = tracker.footprint(division.shards, _gathered_itemsize(step))
    if division.replicas > 1:
        footprint = _with_message(footprint, min(sizes.trained, MESSAGE))
    shape = step.shape
    tokens = shape.batch_size * shape.tokens * shape.accumulation * division.shards * division.replicas
    return Plan(division, footprint, _sent(step, division, sizes), tokens)


def plans(step: Step, n: int) -> Iterator[Plan | tuple[Division, str]]:
    """A plan for each division among n processes; where there is none, the reason."""
    for division in divisions(n):
        try:
            yield plan(step, division)
        except InputError as error:
            yield division, str(error)


def fewest(step: Step, limit: float, most: int) -> Plan | None:
    """The plan with the fewest processes, a power of two up to `most`, each of which stays within `limit` bytes.

    Of several, that which sends least per token. None where none fits.
    """
    for n in (1 << i for i in range(most.bit_length())):
        fitting = [found for found in plans(step, n) if isinstance(found, Plan) and found.footprint.peak <= limit]
        if fitting:
            return min(fitting, key=lambda found: found.sent / found.tokens)
    return None


@dataclass(frozen=True)
class _Sizes:
    """Bytes of one part: what is trained, and of that shares of a sum; of shards what is gathered, and summed."""

    trained: int
    partial: int
    gathered: int
    summed: int


def _with_message(footprint: Footprint, message: int) -> Footprint:
    """The peak, unless it comes between the last backward pass and the update, when gradients are copied and sent."""
    sent = dict.fromkeys(footprint.at_peak, 0)
    sent |= {name: footprint.largest[name] for name in ("weights", "optimizer", "gradients")} | {"temporary": message}
    return Footprint(sent, footprint.largest) if sum(sent.values()) > footprint.peak else footprint


def _gathered_itemsize(step: Step) -> int:
    return 8 if step.settings.amp == "none" else 2  # 8: whatever it is kept in


@functools.lru_cache(maxsize=16)
def _part(step: Step, tensor: int) -> tuple[Tracker, _Sizes]:
    """A step of one part, without content, and the sizes of its weights."""
    args = step.args
    if tensor > 1:
        args = replace(part_of(args, tensor), vocab_size=args.vocab_size // tensor)
    shape = replace(step.shape, accumulation=min(2, step.shape.accumulation))  # the second batch is as all later ones
    with memory.fake_trainer(args, step.dtype, step.adapters, step.settings, step.layers) as trainer:
        model = trainer.model
        weights, summed = memory.sizes_of(model, _gathered_itemsize(step))
        blocks = sum(memory.sizes_of(block, _gathered_itemsize(step))[0] for block in model.layers)
        # Of the two factors of an adapter, the one that has no part: its gradient is a sum over all parts.
        adapted = [(name.rpartition(".")[2], module) for name, module in lora.layers(model).items()]
        partial = sum((module.lora_A if SPLIT[leaf] == 0 else module.lora_B).nbytes for leaf, module in adapted)
        tracker = memory.track_step(trainer, shape.window(), marks_blocks=True)
        trained = memory.sizes_of(model)[1]
    return tracker, _Sizes(trained, partial, weights + blocks, summed)  # blocks are gathered twice, the root once


def _sent(step: Step, division: Division, sizes: _Sizes) -> int:
    """Bytes that one process sends in a step."""

    def ring(n: int, n_bytes: int) -> float:  # an all-gather or a reduce-scatter; an all-reduce is both
        return (n - 1) / n * n_bytes

    shape, args = step.shape, step.args
    n_tokens, n_labels = shape.batch_size * shape.tokens, min(shape.labels, shape.batch_size * shape.tokens)
    itemsize = step.dtype.itemsize if step.settings.amp == "none" else 2
    sums = (4 * args.n_layers + len(step.layers)) * n_tokens * args.dim * itemsize
    sums += n_tokens * args.dim * step.dtype.itemsize + n_labels * args.dim * itemsize + 3 * n_labels * 4
    per_batch = 2 * ring(division.tensor, sums)
    per_batch += ring(division.shards, sizes.gathered + sizes.summed)
    once = 2 * ring(division.replicas, sizes.trained) + 2 * ring(division.tensor, sizes.partial)
    return round(shape.accumulation * per_batch + once)
