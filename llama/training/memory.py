"""Where the memory of a training step goes: by category, measured or estimated, and what recomputation can save.

    with Tracker(model) as tracker:            # real tensors, or fake ones that hold nothing
        ...one step...
    tracker.footprint().at_peak                # {"weights": 4943..., "activations": ..., ...}, in bytes

    estimate(args, dtype, lora_config, settings, shape)     # the same without weights, data or GPU, in seconds
    plan(profile, budget)                                   # the fewest blocks to recompute, so that it fits

PyTorch's own torch.distributed._tools.mem_tracker is not used: it cannot tell the 16-bit copies that autocast makes of
the weights from activations, and follows modules, where a loss or an optimizer is none. What kernels allocate inside
themselves is not seen here; on a GPU it is the difference to what the allocator counts.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llama import device as devices
from llama import lora, quantization
from llama.config import ModelArgs
from llama.errors import InputError
from llama.lora import LoRAConfig
from llama.model import Transformer
from llama.quantization import Quantization
from llama.training import qat
from llama.training.batch import Batch
from llama.training.options import Settings
from llama.training.step import Trainer, checkpoint_layers

# In the order in which one storage that is several things is counted.
CATEGORIES = ("weights", "optimizer", "gradients", "copies", "activations", "temporary")
SHARDED = {"weights", "optimizer", "gradients"}  # what processes can divide among themselves
GATHERED = "gathered"  # the category of what a process has of the parts of others
CUDA_BLOCK = 512  # bytes: PyTorch's allocator rounds up to it


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes at the moment of the peak, and the most that each category ever held.

    weights, optimizer (state), gradients; copies: of weights, in another dtype; activations: kept for the backward
    pass; temporary: everything else, what is recomputed in the backward pass included. Of one of several processes that
    divide the weights, gathered: weights and gradients that are whole for the moment.
    """

    at_peak: dict[str, int]
    largest: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


class Tracker(TorchDispatchMode):
    """Follows every storage that is made or freed inside the block, with what it was used for.

    Each storage gets a number. Of x = ones(1, 2), h = x w^T, y = exp(h), sum(y).backward() with w of [1, 2]:

        number     0        1            2          3            4          5          6          7
        storage    w        x            h          y            sum        d sum      dh         dw
        category   weights  activations  temporary  activations  temporary  temporary  temporary  gradients
        events     +8       +8           +4         +4           +4         +4         +4         +8    -4 (6) ...

    Events are in order of time, bytes made and -bytes freed. A category is the first of CATEGORIES of all uses of the
    storage: x was temporary when it was made, and an activation when autograd kept it. `footprint` plays the events and
    counts each storage, from its beginning, as what it became: 8 + 8 + 12 + 16 bytes at the peak.

    marks_blocks: remember the moments at which each block of the network begins and ends, for `moments`.
    """

    def __init__(self, model: Transformer, marks_blocks: bool = False) -> None:
        super().__init__()
        self._model, self._marks_blocks = model, marks_blocks
        self._events: list[tuple[int, int]] = []  # number of the storage, + bytes where made, - bytes where freed
        self._keys: dict[int, int] = {}  # the number of each live storage by its address
        self._category: list[str] = []
        self._marks: list[tuple[Any, int]] = []
        self._sums: dict[int, int] = {}  # sums of two gradients: number of the storage, and that of the first addend
        for tensor in (*model.parameters(), *model.buffers()):
            self._see(tensor, "weights")

    def __enter__(self) -> Tracker:
        self._hooks = [
            weight.register_post_accumulate_grad_hook(self._see_gradient)
            for weight in self._model.parameters()
            if weight.requires_grad
        ]
        for i, block in enumerate(self._model.layers if self._marks_blocks else ()):
            self._hooks += [
                block.register_forward_pre_hook(lambda *_, i=i: self.mark(("forward", i))),
                block.register_forward_hook(lambda _, __, output, i=i: self._mark_output(output, i)),
            ]
        self._saved = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._saved.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._saved.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default and self._is_weight(args[0])
        if func is torch.ops.aten.copy_.default and self._is_weight(args[1]):
            self._see(args[0], "copies")
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor, "copies" if is_copy else "temporary")
        if func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() >= 0 and not args[0]._is_view():
            self._sums[self._number(result)] = self._number(args[0])
        return result

    def mark(self, name: Any) -> None:
        """Remember this moment under a name."""
        self._marks.append((name, len(self._events)))

    def _mark_output(self, output: Tensor, i: int) -> None:
        self.mark(("after", i))
        output.register_hook(lambda _: self.mark(("backward", i)))  # its gradient is there: the block's turn comes

    def count_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """What the optimizer keeps; call it after its step."""
        for state in optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, Tensor):
                    self._see(tensor, "optimizer")

    def _pack(self, tensor: Tensor) -> Tensor:
        self._see(tensor, "activations")
        return tensor

    def _see_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:  # it is where lean parts have moved the weight instead
            self._see(weight.grad, "gradients")

    def _number(self, tensor: Tensor) -> int | None:
        return self._keys.get(tensor.untyped_storage()._cdata)

    def _is_weight(self, tensor: Tensor) -> bool:
        number = self._number(tensor)
        return number is not None and self._category[number] == "weights"

    def _see(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        number = self._keys.get(storage._cdata)
        if number is None:
            number, size = len(self._category), storage.nbytes()
            if tensor.device.type == "cuda":
                size = -(-size // CUDA_BLOCK) * CUDA_BLOCK
            self._keys[storage._cdata] = number
            self._category.append(category)
            self._events.append((number, size))
            weakref.finalize(storage, self._free, storage._cdata, number, size)
        elif CATEGORIES.index(category) < CATEGORIES.index(self._category[number]):
            self._category[number] = category

    def _free(self, key: int, number: int, size: int) -> None:
        if self._keys.get(key) == number:
            del self._keys[key]
        self._events.append((number, -size))

    def _history(self) -> list[tuple[int, int]]:
        """All events, gradients that meet added up in place.

        So autograd does where it holds the only reference to the first of them, unless it is a view or, as here, a
        dispatch mode is on; that it was the only one shows where it is freed next. State of the optimizer, which the
        first step makes at its end, is there through all others, so it does not come and go here: see `_state`.
        """
        state = set(self._state())
        events = [(number, 0 if number in state else size) for number, size in self._events]
        for i in range(len(events) - 1):
            (made, size), then = events[i], events[i + 1]
            if size > 0 and then == (self._sums.get(made), -size):
                events[i], events[i + 1] = events[i + 1], events[i]
        return events

    def _state(self) -> dict[int, int]:
        """The optimizer's storages, with their bytes."""
        made = {number: size for number, size in self._events if size > 0}
        return {number: size for number, size in made.items() if self._category[number] == "optimizer"}

    def footprint(self, shards: int = 1, gathered_itemsize: int = 8) -> Footprint:
        """The peak so far. A storage counts from its beginning as what it became.

        shards: as one of so many processes would have it that divide weights, gradients and optimizer state (FSDP2),
        and so the optimizer's work; it follows from a whole step with marks_blocks. gathered_itemsize: bytes of a value
        at most while it is whole; FSDP2 gathers what autocast would copy in 16 bits, so there are no copies.
        """
        gathered = self._gathered(gathered_itemsize) if shards > 1 else {}
        update = next((place for name, place in self._marks if name == "update"), len(self._events))
        live = dict.fromkeys((*CATEGORIES, GATHERED) if shards > 1 else CATEGORIES, 0)
        live["optimizer"] = sum(-(-size // shards) for size in self._state().values())
        largest, at_peak, peak = dict(live), dict(live), -1
        sizes: dict[int, int] = {}  # of each live storage
        # The first of two gradients that meet becomes their sum: also that is divided, and its whole is in gathered.
        addends = {first for made, first in self._sums.items() if self._category[made] == "gradients"}
        for place, (number, size) in enumerate(self._history()):
            category = self._category[number]
            if number in sizes:
                live[category] -= sizes.pop(number)
            else:
                is_divided = category in SHARDED or number in addends or place >= update
                sizes[number] = -(-size // shards) if is_divided else size
                if category == "copies" and shards > 1:
                    sizes[number] = 0
                live[category] += sizes[number]
            if place in gathered:
                live[GATHERED] = gathered[place]
                largest[GATHERED] = max(largest[GATHERED], gathered[place])
            largest[category] = max(largest[category], live[category])
            total = sum(live.values())
            if total > peak:
                peak, at_peak = total, dict(live)
        return Footprint(at_peak, largest)

    def _gathered(self, itemsize: int) -> dict[int, int]:
        """Bytes that sharded processes have whole from each place in the events on.

        Of the root (embedding, last norm, output head) the weights from the beginning, and from the loss on their
        gradients, too; of one block at a time the weights while it runs, and in its backward pass their gradients. Both
        travel in one flat buffer: that of the next block's weights is there meanwhile, and a copy of what is summed.
        """
        blocks = [sizes_of(block, itemsize) for block in self._model.layers]
        root_weights, root_gradients = (
            size - sum(block[i] for block in blocks) for i, size in enumerate(sizes_of(self._model, itemsize))
        )
        found = {0: root_weights}
        for name, place in self._marks:
            if name == "update":
                found[place] = 0
                continue
            moment, i = name
            weights, gradients = blocks[i]
            of_block = {"forward": 2 * weights, "after": 0, "backward": 2 * (weights + gradients)}[moment]
            found[place] = root_weights + of_block
            if name == ("after", len(blocks) - 1) or moment == "backward":
                found[place] += root_gradients
            if name == ("backward", 0):  # those of the root are summed last
                found[place] = max(found[place], root_weights + 2 * root_gradients)
        return found

    def moments(self) -> dict[Any, tuple[int, int]]:
        """For each mark, the last of its name, the bytes that were live at it and the most from it to the next one."""
        totals = [sum(self._state().values())]
        for _, size in self._history():
            totals.append(totals[-1] + size)
        ends = [place for _, place in self._marks[1:]] + [len(self._events)]
        return {
            name: (totals[place], max(totals[place : end + 1]))
            for (name, place), end in zip(self._marks, ends, strict=True)
        }


def sizes_of(module: nn.Module, itemsize: int = 8) -> tuple[int, int]:
    """Bytes of all parameters, and of those that are trained, as many as of their gradients; of `itemsize` at most."""
    sizes = [(w.numel() * min(w.itemsize, itemsize), w.requires_grad) for w in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a training step: sequences of a batch, tokens of each, labels of the batch, and batches in the step."""

    batch_size: int
    tokens: int
    labels: int
    accumulation: int = 1

    def window(self) -> list[Batch]:
        """Batches of this shape, for trying out: id 0 everywhere."""
        size = self.batch_size * self.tokens
        where = torch.arange(min(self.labels, size))
        ids = torch.zeros(self.batch_size, self.tokens, dtype=torch.int64)
        return [Batch(ids, None, where, torch.zeros_like(where)) for _ in range(self.accumulation)]


class _RepeatedHeads(TorchFunctionMode):
    """Attention of a CUDA device on tensors of the CPU: without flash attention, `attend` repeats K and V there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention and kwargs.get("enable_gqa"):
            q, k, v, mask = args
            has_flash = torch.cuda.is_available() and devices.computes_bf16(torch.device("cuda"))
            if not (has_flash and q.dtype.itemsize == 2):
                k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
                args, kwargs["enable_gqa"] = (q, k, v, mask), False
        return func(*args, **kwargs)


@contextmanager
def fake_trainer(
    args: ModelArgs,
    dtype: torch.dtype,
    adapters: LoRAConfig | None,
    settings: Settings,
    layers: Sequence[int] = (),
    quantized: Quantization | None = None,
    device_type: str = "cpu",
) -> Iterator[Trainer]:
    """A trainer whose tensors have shapes and no content, and a world in which all tensors are like that.

    device_type: "cuda" for attention as it is there; all else is as on a CPU.
    """
    with torch.device("meta"):
        model = Transformer(args)
    if quantized is not None:
        quantization.lay_out(model, quantized)
    model.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), _RepeatedHeads() if device_type == "cuda" else nullcontext():
        model = model.to_empty(device="cpu")
        if settings.qat is not None:
            qat.lay_out(model, qat.FORMATS[settings.qat])
        if adapters is not None:
            adapt = lora.apply if settings.qat is None else qat.adapt
            adapt(model, adapters)
        checkpoint_layers(model, layers)
        yield Trainer(model, settings, 1)


def track_step(trainer: Trainer, window: Sequence[Batch], marks_blocks: bool = False) -> Tracker:
    """Follow one whole step, with the learning rate at 0: no weight changes."""
    trainer.model.train()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    with Tracker(trainer.model, marks_blocks) as tracker:
        for batch in window:
            trainer.back_propagate(batch)
        tracker.mark("update")
        trainer.optimizer.step()
        tracker.count_optimizer(trainer.optimizer)
        trainer.optimizer.zero_grad()
    return tracker


@functools.lru_cache(maxsize=64)
def estimate(
    args: ModelArgs,
    dtype: torch.dtype,
    adapters: LoRAConfig | None,
    settings: Settings,
    shape: Shape,
    layers: tuple[int, ...] = (),
    quantized: Quantization | None = None,
    device_type: str = "cpu",
) -> Footprint:
    """What a training step will need, found by running it on tensors without content, as a CPU would.

    With device_type "cuda" attention is that of a GPU, where K and V may be repeated for each query head. Not in it:
    what kernels allocate inside themselves (oneDNN's copy of an operand in a layout of its own: 33 MB for Llama 3.2 1B
    in 16 bits), what the allocator wastes, and PyTorch's own libraries.
    """
    with fake_trainer(args, dtype, adapters, settings, layers, quantized, device_type) as trainer:
        return track_step(trainer, shape.window()).footprint()


@dataclasses.dataclass(frozen=True)
class Profile:
    """What recomputing each block saves, and the peak of each stretch of a step that recomputes none, in bytes.

    Live bytes over a step of n = 3 blocks, each of which keeps its activations from its forward to its backward pass:

                      +- loss -+                savings[i]: the height of block i's stair, less its output, which the
                 +- 2          2 -+             next block keeps as its input
            +- 1                  1 -+
       +- 0                          0 -+
       |                                +- update -
        peaks[0], [1], [2], [3], [2], [1], [0], [0]

    peaks[i]: while block i runs, forward or backward; recomputing the blocks before it takes their stairs from under
    it. So peaks[n], of the loss, is lowered by the savings of all blocks, and peaks[0], which is also the peak of
    everything after the backward pass, by none.
    """

    savings: tuple[int, ...]
    peaks: tuple[int, ...]

    def peak(self, layers: Sequence[int]) -> int:
        """The peak of a step that recomputes these blocks."""
        return max(peak - sum(self.savings[j] for j in layers if j < i) for i, peak in enumerate(self.peaks))


def profile(
    args: ModelArgs,
    dtype: torch.dtype,
    adapters: LoRAConfig | None,
    settings: Settings,
    shape: Shape,
    quantized: Quantization | None = None,
    device_type: str = "cpu",
) -> Profile:
    """Measure the blocks, on tensors without content; see `estimate`."""
    with fake_trainer(args, dtype, adapters, settings, (), quantized, device_type) as trainer:
        # With accumulation the second batch is the one to look at: the gradients of the first are there.
        moments = track_step(trainer, shape.window()[:2], marks_blocks=True).moments()
    n = args.n_layers
    stream = torch.promote_types(dtype, torch.float32) if settings.amp != "none" else dtype
    output = shape.batch_size * shape.tokens * args.dim * stream.itemsize
    savings = [moments["after", i][0] - moments["forward", i][0] - output for i in range(n)]
    if adapters is not None:  # nothing below it is trained, so the first block keeps its input only to recompute it
        savings[0] -= output
    # Where the last product of a block needs nothing of what is recomputed, its gradient is made first, and waits.
    waiting = 0
    if adapters is not None and "w2" not in adapters.targets:
        waiting = shape.batch_size * shape.tokens * args.ffn_dim * (dtype.itemsize if settings.amp == "none" else 2)
    peaks = []
    for i in range(n):
        start, forward = moments["forward", i]
        gradient_is_there, backward = moments["backward", i]
        recomputed = gradient_is_there - savings[i] + waiting + forward - start  # the forward pass, on top of these
        peaks.append(max(forward, backward, recomputed))
    peaks[0] = max(peaks[0], moments["update"][1])
    return Profile(tuple(savings), (*peaks, moments["after", n - 1][1]))


def plan(profile: Profile, budget: float) -> list[int]:
    """The fewest blocks whose recomputation keeps the peak within `budget` bytes.

    Blocks that are chosen because of an early peak lower all later ones too, so that it is best to go through the
    peaks in order and, where one is too high, to choose the blocks before it that save most. Raises InputError where
    no choice is enough.
    """
    chosen: list[int] = []
    for i, peak in enumerate(profile.peaks):
        left = sorted((j for j in range(i) if j not in chosen), key=lambda j: profile.savings[j])
        while peak - sum(profile.savings[j] for j in chosen) > budget:
            if not left or profile.savings[left[-1]] <= 0:
                least = profile.peak(range(len(profile.savings)))
                where = (
                    "while a block or the loss runs" if i else "after the backward pass, where no activation is left"
                )
                raise InputError(
                    f"checkpoint_budget_gb={budget / 1e9:g}: recomputing blocks cannot bring the peak below "
                    f"{least / 1e9:.2f} GB, which is reached {where}; use lean=True, lora=True or a smaller max_seq_len"
                )
            chosen.append(left.pop())
    return sorted(chosen)
