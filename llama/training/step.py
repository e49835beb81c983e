"""One optimizer step, exactly: accumulation, AMP, recomputation, and the state that resuming needs.

A step takes a window of batches, counts the label tokens of all of them, and back-propagates sum(CE) / count batch by
batch: the gradient of one large batch, however the window is cut and however long the answers are. Nothing that is not
finite ever reaches a weight. Trained weights are fp32; the frozen ones may have 16 bits.

With `Settings(lean=True)` the network's parts are those of lean.py: the same step in far less memory.
`CheckpointedBlock` is activation checkpointing (Chen et al. 2016): a block keeps its input alone, and its forward runs
again in the backward pass, dropout included.

Left out on purpose: data (batch.py), files (snapshot.py), what is printed (finetuning.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from llama.errors import InputError, NonFinite
from llama.evaluation.intervals import LossSums
from llama.model import Cache, Transformer, TransformerBlock
from llama.surgery import replace_modules
from llama.training.batch import Batch
from llama.training.lean import InBackward, make_lean
from llama.training.lean_loss import lean_cross_entropy_sum
from llama.training.loss import cross_entropy_sum
from llama.training.snapshot import Snapshot

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
NORMALIZATIONS = ("tokens", "microbatch")
AMP = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_SKIPS = 25  # steps in a row whose fp16 gradients overflowed: by then the scale is 1e-3 and it is not the scale
SAMPLED = 4096  # elements of each trained tensor that tell whether steps survive rounding


@dataclass(frozen=True)
class Settings:
    """What an optimizer step does. Raises InputError naming the field where a value is impossible.

    weight_decay: torch's meaning, part of the gradient for SGD and decoupled for AdamW. clip_norm: largest allowed L2
    norm of the whole gradient. loss_normalization: "tokens" weighs each label token of a step alike; "microbatch" is
    the mean over micro-batches of their mean losses, in which a token of a short answer weighs more. lean: see lean.py.
    """

    optimizer: str = "sgd"
    lr: float = 1e-5
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = None
    loss_normalization: str = "tokens"
    amp: str = "none"
    lean: bool = False

    def __post_init__(self) -> None:
        choices = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "loss_normalization": NORMALIZATIONS, "amp": AMP}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: {getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        for name in ("lr", "momentum", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: {getattr(self, name)} is out of range; use 0 or more")
        if self.momentum >= 1 or (self.momentum and self.optimizer != "sgd"):
            raise InputError(f"momentum: {self.momentum} is for sgd and below 1")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise InputError(f"clip_norm: {self.clip_norm} is out of range; use a positive number or leave it out")

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of update `step` (from 0): up to `lr` over the warm-up, then by the schedule down to 0.

        The last update, total_steps - 1, still moves: the schedule reaches 0 one step later.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        done = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.lr * factor


@dataclass
class Progress:
    """How far a training has come. Every field is part of a snapshot."""

    windows: int = 0  # consumed, whether or not they moved the weights: the place in the data
    steps: int = 0  # optimizer steps that were taken: the place in the learning-rate schedule
    skipped: int = 0  # windows whose fp16 gradients overflowed
    skipped_in_a_row: int = 0
    label_tokens: int = 0


@dataclass
class Report:
    """What one window did. loss: nats per label token (by the normalization in use); grad_norm: before clipping.

    grad_norm is None where SGD happened inside the backward pass: the gradient was never there as a whole.
    """

    loss: float
    lr: float
    grad_norm: float | None
    label_tokens: int
    tokens: int
    skipped: bool


class CheckpointedBlock(TransformerBlock):
    """A block that keeps its input for the backward pass and computes the rest again. Same keys, same numbers."""

    def __init__(self, block: TransformerBlock) -> None:
        nn.Module.__init__(self)
        for name, module in block.named_children():
            self.add_module(name, module)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, pos: Tensor | None, cache: Cache | None
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, freqs_cis, mask, pos, cache)
        # Not reentrant: that kind gives adapters no gradient where the embedding below is frozen. The state of the
        # random generator is restored for the second run, so that dropout drops the same elements.
        return checkpoint(super().forward, x, freqs_cis, mask, pos, cache, use_reentrant=False)


def checkpointed_layers(spec: str, n_layers: int) -> list[int]:
    """The layers that "none", "all", "every:K" (the last of each K) or a list such as "0,4,8" names."""
    if spec in ("none", "all"):
        return list(range(n_layers)) if spec == "all" else []
    try:
        if spec.startswith("every:"):
            return list(range(n_layers))[int(spec[6:]) - 1 :: _positive(int(spec[6:]))]
        chosen = sorted({int(part) for part in spec.split(",")})
    except ValueError:
        raise InputError(f"checkpointing: {spec!r} is none of none, all, every:K, or layers such as 0,4,8") from None
    if chosen[0] < 0 or chosen[-1] >= n_layers:
        raise InputError(f"checkpointing: {spec!r} names a layer outside 0 to {n_layers - 1}")
    return chosen


def _positive(value: int) -> int:
    if value < 1:
        raise ValueError
    return value


def checkpoint_layers(model: Transformer, layers: Sequence[int]) -> None:
    """Recompute these blocks in the backward pass, and no others."""
    blocks = {f"layers.{layer}" for layer in layers}
    if any(isinstance(block, CheckpointedBlock) for block in model.layers):
        raise ValueError("the model has checkpointed blocks already")
    if blocks:
        replace_modules(model, lambda name, _: name in blocks, CheckpointedBlock)


def require_plain_sgd(settings: Settings, accumulation: int = 1) -> None:
    """Raise InputError where SGD inside the backward pass would be another step than these settings ask for."""
    allowed = {
        "optimizer": ("sgd",),
        "momentum": (0,),
        "weight_decay": (0,),
        "clip_norm": (None,),
        "amp": ("none", "bf16"),
        "accumulation": (1,),
    }
    found = {**vars(settings), "accumulation": accumulation}
    for name, choices in allowed.items():
        if found[name] not in choices:
            raise InputError(
                f"--lean trains all weights by SGD inside the backward pass, which {name}={found[name]} does not "
                "allow: use sgd without momentum, weight_decay and clip_norm, accumulation 1, and amp none or bf16; "
                "or --lora"
            )


class Trainer:
    """A model with what training adds to it: optimizer, gradient scaler, progress. `stop` ends a window early.

    Raises InputError where nothing is trainable, where a trainable weight has 16 bits (most of its updates would be
    rounded away), and where SGD inside the backward pass is not the step that the settings ask for.
    """

    def __init__(self, model: Transformer, settings: Settings, total_steps: int) -> None:
        self.model, self.settings, self.total_steps = model, settings, total_steps
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not self.weights:
            raise InputError("no weight is trainable; apply adapters or unfreeze the model")
        for name, weight in self.weights.items():
            if weight.dtype not in (torch.float32, torch.float64):
                raise InputError(f"{name}: trained weights must be float32, not {weight.dtype}; use --dtype=float32")
        self.masks = {name: mask for name, mask in model.named_buffers() if name.endswith(".mask")}  # of pruned weights
        self.device = model.tok_embeddings.weight.device
        self.optimizer = self._make_optimizer()
        self.compute_dtype = AMP[settings.amp] or model.dtype
        # fp16 gradients below 6e-8 vanish; the scaler multiplies the loss so that they do not. bf16 has fp32's range.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.compute_dtype is torch.float16)
        self.sgd: InBackward | None = None
        if settings.lean:
            self.sgd = make_lean(model)
        if self.sgd is not None:
            require_plain_sgd(settings)
            if self.masks:
                raise InputError("--lean trains all weights inside the backward pass, which would move pruned ones too")
        self.progress = Progress()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings, weights = self.settings, list(self.weights.values())
        if settings.optimizer == "sgd":
            return torch.optim.SGD(weights, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
        return torch.optim.AdamW(weights, settings.lr, weight_decay=settings.weight_decay)

    def step(self, window: Sequence[Batch], stop: Callable[[], bool] = lambda: False) -> Report | None:
        """Take one optimizer step over all batches of a window; None, and no trace, where `stop()` became true.

        Raises NonFinite, with every weight as it was, where loss or gradient is not finite; in fp16, where that means
        that the loss scale was too high, only after MAX_SKIPS skipped steps in a row.
        """
        count, random = sum(len(batch.labels) for batch in window), self._random_state()
        if count == 0:
            raise ValueError("the window has no label token")
        if self.sgd is not None:
            if len(window) > 1:
                raise ValueError("SGD inside the backward pass cannot accumulate over several batches")
            self.sgd.start(self.settings.lr_at(self.progress.steps, self.total_steps))
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in window:
            if stop():
                self.optimizer.zero_grad()
                self._set_random_state(random)
                return None
            share = count if self.settings.loss_normalization == "tokens" else len(batch.labels) * len(window)
            loss = self.back_propagate(batch, share)
            total = total + loss
        return self._update(window, total, count)

    def back_propagate(self, batch: Batch, share: int) -> Tensor:
        """Add the gradient of loss_sum / share to those of the weights, or move them by it; return the loss."""
        loss = self.loss_sum(batch) / share
        if self.sgd is not None and self.sgd.lr and not loss.isfinite():
            raise NonFinite(self._describe_non_finite([batch], loss.item(), math.nan))
        self.scaler.scale(loss).backward()
        return loss.detach()

    def loss_sum(self, batch: Batch) -> Tensor:
        """Summed cross entropy of a batch in nats, under autocast where AMP is on."""
        return self.loss_sums(batch, [batch.labels])[0]

    def loss_sums(self, batch: Batch, labellings: Sequence[Tensor]) -> list[Tensor]:
        """The same for several choices of labels [N], from one pass through the network."""
        batch = batch.to(self.device)
        amp = AMP[self.settings.amp]
        with torch.autocast(self.device.type, amp, enabled=amp is not None):
            h = self.model.hidden(batch.tokens, batch.pos).flatten(0, 1)[batch.where]
            return [self._cross_entropy_sum(h, labels.to(self.device)) for labels in labellings]

    def _cross_entropy_sum(self, h: Tensor, labels: Tensor) -> Tensor:
        head = self.model.tok_embeddings if self.model.output is None else self.model.output
        if not self.settings.lean or not head.weight.is_floating_point():  # codes have no slices to multiply
            return cross_entropy_sum(self.model.logits, h, labels)
        return lean_cross_entropy_sum(h, head.weight, labels, self.sgd and self.sgd.move_product)

    def _update(self, window: Sequence[Batch], total: Tensor, count: int) -> Report:
        progress, loss = self.progress, total.item()
        lr = self.settings.lr_at(progress.steps, self.total_steps)
        norm, skipped = (None, False) if self.sgd is not None else self._optimizer_step(window, loss, lr)
        if self.sgd is not None and not self.sgd.is_finite():
            names = ", ".join(name for batch in window for name in batch.names)
            raise NonFinite(
                f"step {progress.windows + 1}: loss {loss:g}, but a gradient that is not finite (samples {names}) has "
                "moved weights; the snapshots are from before; lower --lr"
            )
        progress.windows += 1
        progress.steps += not skipped
        progress.skipped += skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
        progress.label_tokens += count
        if progress.skipped_in_a_row >= MAX_SKIPS:
            raise NonFinite(f"{MAX_SKIPS} steps in a row overflowed; {self._describe_non_finite(window, loss, norm)}")
        return Report(loss, lr, norm, count, sum(batch.tokens.numel() for batch in window), skipped)

    def _optimizer_step(self, window: Sequence[Batch], loss: float, lr: float) -> tuple[float, bool]:
        """Move the weights by their gradients. Return the gradient's norm, and whether the step was skipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.settings.clip_norm is None else self.settings.clip_norm
        norm = nn.utils.clip_grad_norm_(self.weights.values(), limit).item()
        if not self.scaler.is_enabled() and not math.isfinite(loss + norm):
            self.optimizer.zero_grad()
            raise NonFinite(self._describe_non_finite(window, loss, norm))
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)  # does nothing where a gradient overflowed
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm, self.scaler.get_scale() < scale

    @torch.no_grad()
    def _describe_non_finite(self, window: Sequence[Batch], loss: float, norm: float) -> str:
        """Where in the data, and the block in which activations are largest or first stop being finite."""
        largest: dict[int, float] = {}
        hooks = [
            block.register_forward_hook(
                lambda _, __, y, i=i: largest.__setitem__(
                    i, max(largest.get(i, 0.0), y.abs().max().nan_to_num(math.inf).item())
                )
            )
            for i, block in enumerate(self.model.layers)
        ]
        for batch in window:
            self.loss_sum(batch)
        for hook in hooks:
            hook.remove()
        layer = max(largest, key=lambda i: (largest[i], -i))
        names = ", ".join(name for batch in window for name in batch.names)
        return (
            f"step {self.progress.windows + 1}: loss {loss:g}, gradient norm {norm:g} (samples {names}; activations "
            f"reach {largest[layer]:.3g} in layer {layer}); no weight was changed; lower --lr or use --amp=none"
        )

    # State

    def snapshot(self) -> Snapshot:
        """Everything that the rest of the training depends on. Raises NonFinite where a weight is not finite."""
        for name, weight in self.weights.items():
            if not weight.isfinite().all():
                raise NonFinite(f"{name} is not finite after step {self.progress.steps}; nothing was saved")
        slots = self.optimizer.state_dict()["state"]
        names = list(self.weights)
        optimizer = {
            f"{names[i]}:{key}": value for i, slot in slots.items() for key, value in slot.items() if value is not None
        }
        state = {"progress": vars(self.progress), "scaler": self.scaler.state_dict()}
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        tensors = {"model": weights, "optimizer": optimizer, "rng": self._random_state()}
        return Snapshot(tensors | ({"masks": self.masks} if self.masks else {}), state)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot, to the bit. Raises InputError where anything is missing, extra or misshapen."""
        with torch.no_grad():
            _require_same("model", self.weights, _entry(snapshot.tensors, "model"))
            for name, weight in self.weights.items():
                weight.copy_(snapshot.tensors["model"][name])
            _require_same("masks", self.masks, snapshot.tensors.get("masks", {}))
            for name, mask in self.masks.items():
                mask.copy_(snapshot.tensors["masks"][name])
        _require_same("rng", self._random_state(), _entry(snapshot.tensors, "rng"))
        self._set_random_state(snapshot.tensors["rng"])
        scaler = _entry(snapshot.state, "scaler")
        if scaler.keys() != self.scaler.state_dict().keys():
            raise InputError("state.json:scaler: is of a run with another --amp or --dtype")
        if scaler:
            self.scaler.load_state_dict(scaler)
        progress = _entry(snapshot.state, "progress")
        if progress.keys() != {f.name for f in fields(Progress)}:
            raise InputError("state.json:progress: has other fields than this version")
        self.progress = Progress(**progress)
        self._restore_optimizer(_entry(snapshot.tensors, "optimizer"))

    def _restore_optimizer(self, saved: dict[str, Tensor]) -> None:
        """AdamW and momentum keep tensors for each weight from their first step on; plain SGD keeps none."""
        slots: dict[int, dict[str, Tensor]] = {}
        names = list(self.weights)
        for key, tensor in saved.items():
            name, _, slot = key.rpartition(":")
            if name not in self.weights:
                raise InputError(f"optimizer:{key}: belongs to no trained weight")
            slots.setdefault(names.index(name), {})[slot] = tensor
        kinds = {
            "adamw": {"step", "exp_avg", "exp_avg_sq"},
            "sgd": {"momentum_buffer"} if self.settings.momentum else set(),
        }
        expected = kinds[self.settings.optimizer]
        if slots or self.progress.steps:
            for i, name in enumerate(names):
                if slots.get(i, {}).keys() != expected:
                    raise InputError(f"optimizer:{name}: expected {sorted(expected)}, found {sorted(slots.get(i, {}))}")
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _random_state(self) -> dict[str, Tensor]:
        """Of the generators that dropout draws from."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)


class Movement:
    """Whether training moves the weights at all: a sample of each, compared with how it was at the start."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.start = {name: self._sample(weight) for name, weight in weights.items()}

    @staticmethod
    def _sample(weight: Tensor) -> Tensor:
        flat = weight.detach().flatten()
        return flat[:: max(1, len(flat) // SAMPLED)].clone()

    def share(self) -> float:
        """Share of the sampled elements that are no longer what they were."""
        moved = sum((self._sample(weight) != self.start[name]).sum().item() for name, weight in self.weights.items())
        return moved / sum(map(len, self.start.values()))


@dataclass
class Evaluation(LossSums):
    """The loss of each sample.

    copied: what the loss would be if the label were the token that the model was just given. A model that was trained
    on labels that are not shifted is good at that, and at nothing else.
    """

    copied: list[float] = field(default_factory=list)

    @property
    def copy_loss(self) -> float:
        """The same for the token itself instead of the next one."""
        return sum(self.copied) / sum(self.counts)


@torch.no_grad()
def evaluate(trainer: Trainer, batches: Sequence[Batch]) -> Evaluation:
    """The loss of batches of one sample each, without dropout. Draws no random number."""
    result = Evaluation()
    trainer.model.eval()
    for batch in batches:
        itself = batch.tokens.flatten()[batch.where]
        loss, copied = trainer.loss_sums(batch, [batch.labels, itself])
        result.sums.append(loss.item())
        result.copied.append(copied.item())
        result.counts.append(len(batch.labels))
    return result


def fine_tune(
    model: Transformer, window: Callable[[int], Sequence[Batch]], steps: Sequence[int], settings: Settings
) -> None:
    """Train all weights, one optimizer step on each of the numbered windows; masks hold. The optimizer starts anew."""
    trainer = Trainer(model.requires_grad_(True), settings, len(steps))
    for step in tqdm(steps, unit="step", desc="fine-tuning", disable=None, leave=False):
        trainer.step(window(step))


def _entry(content: dict[str, Any], name: str) -> Any:
    if name not in content:
        raise InputError(f"the snapshot has no {name!r}; it is not of this version or not whole")
    return content[name]


def _require_same(group: str, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name in sorted(wanted.keys() ^ found.keys()):
        raise InputError(f"{group}:{name}: is {'missing from the snapshot' if name in wanted else 'not expected'}")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise InputError(f"{group}:{name}: has shape {list(found[name].shape)}, expected {list(tensor.shape)}")
