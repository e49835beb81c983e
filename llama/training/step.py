"""What one optimizer step needs, exactly: accumulation, AMP, recomputation, and the state that resuming needs.

The loop stands in finetuning.py, `train`. A step takes a window of batches, counts the label tokens of all of them, and
back-propagates sum(CE) / count batch by batch: the gradient of one large batch, however the window is cut and however
long the answers are. Nothing that is not finite ever reaches a weight. Trained weights are fp32; frozen ones may have
16 bits.

With `Settings(lean=True)` the network's parts are those of lean.py: the same step in far less memory.
`CheckpointedBlock` is activation checkpointing (Chen et al. 2016): a block keeps its input alone, and its forward runs
again in the backward pass, dropout included.

Left out on purpose: data (batch.py), files (snapshot.py, run.py), what is printed (run.py, verdict.py).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from llama.errors import InputError, NonFinite
from llama.evaluation.intervals import LossSums
from llama.model import Cache, Mask, Transformer, TransformerBlock
from llama.surgery import take_over
from llama.training import several
from llama.training.batch import Batch
from llama.training.lean import SGDInBackward, make_lean
from llama.training.lean_loss import lean_cross_entropy
from llama.training.loss import cross_entropy
from llama.training.options import AMP, Settings, require_plain_sgd
from llama.training.snapshot import Snapshot

MAX_SKIPS = 25  # steps in a row whose fp16 gradients overflowed: by then the scale is 1e-3 and it is not the scale
SAMPLED = 4096  # elements of each trained tensor that tell whether steps survive rounding


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
    """What one step did. loss: nats per label token (by the normalization in use); grad_norm: before clipping.

    grad_norm is None where SGD happened inside the backward pass: the gradient was never there as a whole. tokens:
    prompts included, padding not. figures: what else there is to log, by name.
    """

    loss: float
    lr: float
    grad_norm: float | None
    label_tokens: int
    tokens: int
    skipped: bool
    figures: dict[str, float] = field(default_factory=dict)


class CheckpointedBlock(TransformerBlock):
    """A block that keeps its input for the backward pass and computes the rest again. Same keys, same numbers."""

    def __init__(self, block: TransformerBlock) -> None:
        take_over(self, block)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Mask, pos: Tensor | None, cache: Cache | None) -> Tensor:
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
            step = int(spec[6:])
            return list(range(step - 1, n_layers, max(0, step)))  # a step of 0 is a ValueError
        chosen = sorted({int(part) for part in spec.split(",")})
    except ValueError:
        raise InputError(f"checkpointing={spec} is none of none, all, every:K, or layers such as 0,4,8") from None
    if chosen[0] < 0 or chosen[-1] >= n_layers:
        raise InputError(f"checkpointing={spec} names a layer outside 0 to {n_layers - 1}")
    return chosen


def checkpoint_layers(model: Transformer, layers: Sequence[int]) -> None:
    """Recompute these blocks in the backward pass, and no others."""
    if any(isinstance(block, CheckpointedBlock) for block in model.layers):
        raise ValueError("the model has checkpointed blocks already")
    for layer in layers:
        model.layers[layer] = CheckpointedBlock(model.layers[layer])


class Trainer:
    """A model with what training adds to it: optimizer, gradient scaler, progress; and the parts of a step.

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
                raise InputError(f"{name}: trained weights must be float32, not {weight.dtype}; use dtype=float32")
        self.masks = {name: mask for name, mask in model.named_buffers() if name.endswith(".mask")}  # of pruned weights
        self.device = model.tok_embeddings.weight.device
        self.optimizer = self._make_optimizer()
        # fp16 gradients below 6e-8 vanish; the scaler multiplies the loss so that they do not. bf16 has fp32's range.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=(AMP[settings.amp] or model.dtype) is torch.float16
        )
        self.progress = Progress()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings, weights = self.settings, list(self.weights.values())
        in_backward = make_lean(self.model) if settings.lean else None
        if in_backward is not None:
            require_plain_sgd(settings)
            if self.masks:
                raise InputError(
                    "lean=True trains all weights inside the backward pass, which would move pruned ones too"
                )
            return in_backward
        if settings.optimizer == "sgd":
            return torch.optim.SGD(weights, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
        return torch.optim.AdamW(weights, settings.lr, weight_decay=settings.weight_decay)

    # The parts of a step

    def step(self, window: Sequence[Batch]) -> Report:
        """Take one optimizer step over all batches of a window.

        It is a turn of the loop in finetuning.py, which is written out there to be read and also logs, saves and stops.
        This is for those who need steps alone: pruning, benchmarks, tests. A test compares the two bit by bit.
        """
        n_terms, loss = sum(map(self.n_terms, window)), 0.0
        lr = self.begin(window)
        for number, batch in enumerate(window):
            self.seed_dropout(number)
            per_token = self.settings.loss_normalization == "tokens"
            with self.autocast():
                part = self.loss_sum(batch) / (n_terms if per_token else self.n_terms(batch) * len(window))
            if not self.keeps_gradients:
                self.require_finite(window, part)
            self.scaler.scale(part).backward()
            loss += part.detach()
        self.scaler.unscale_(self.optimizer)
        norm = self.clip_gradient()
        self.require_finite(window, loss, norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return self.count(window, loss, lr, norm, skipped=self.scaler.get_scale() < scale)

    def begin(self, window: Sequence[Batch]) -> float:
        """Set the learning rate of the next step, and return it; dropout is on from here."""
        if not any(len(batch.labels) for batch in window):
            raise ValueError("the window has no label token")
        if len(window) > 1 and not self.keeps_gradients:
            raise ValueError("SGD inside the backward pass cannot accumulate over several batches")
        lr = self.settings.lr_at(self.progress.steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        return lr

    def seed_dropout(self, number: int) -> None:
        """What is dropped in a window's batch follows from seed, step and its number, whichever process takes it."""
        step = getattr(self.settings, "seed", 0) * 1_000_003 + self.progress.windows
        torch.manual_seed((step * 65_537 + number) % (1 << 63))

    @property
    def keeps_gradients(self) -> bool:
        return not isinstance(self.optimizer, SGDInBackward)

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        amp = AMP[self.settings.amp]
        return torch.autocast(self.device.type, amp, enabled=amp is not None)

    def n_terms(self, batch: Batch) -> int:
        """What the loss of a batch is a sum over: its label tokens."""
        return len(batch.labels)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Summed loss of a batch: cross entropy in nats."""
        return self.losses(batch, batch.labels)[0].sum()

    def losses(self, batch: Batch, *labellings: Tensor) -> list[Tensor]:
        """Cross entropy of each label [N] for several choices of labels [N], from one pass through the network."""
        batch = batch.to(self.device)
        h = self.model.hidden(batch.tokens, batch.pos).flatten(0, 1)[batch.where]
        return [self._cross_entropy(h, labels.to(self.device)) for labels in labellings]

    def _cross_entropy(self, h: Tensor, labels: Tensor) -> Tensor:
        head = self.model.tok_embeddings if self.model.output is None else self.model.output
        if not self.settings.lean or not head.weight.is_floating_point():  # codes have no slices to multiply
            return cross_entropy(self.model.logits, h, labels)
        move = None if self.keeps_gradients else self.optimizer.move_product
        return lean_cross_entropy(h, head.weight, labels, move)

    def back_propagate(self, batch: Batch, share: float = 1) -> Tensor:
        """Forward and backward pass of loss_sum / share, to be measured: nothing is checked, so tensors may be fake."""
        with self.autocast():
            loss = self.loss_sum(batch) / share
        self.scaler.scale(loss).backward()
        return loss.detach()

    def clip_gradient(self) -> float | None:
        """Scale the gradient down to the largest norm that the settings allow; return the L2 norm from before.

        None where SGD inside the backward pass has used the gradient up, NaN where that was not finite.
        """
        if not self.keeps_gradients:
            return None if self.optimizer.is_finite() else math.nan
        norm = nn.utils.clip_grad_norm_(self.weights.values(), self.settings.clip_norm or math.inf)
        return several.whole(norm).item()

    def require_finite(self, window: Sequence[Batch], loss: Tensor, norm: float | None = None) -> None:
        """Raise NonFinite where the loss, or the gradient's norm, is not finite: before it reaches a weight.

        A GPU must wait for it: once per step is enough, and before each backward pass only where that moves weights.
        Not where the loss is scaled: there it means that the scale was too high, and GradScaler leaves the step out.
        """
        if not self.scaler.is_enabled() and not math.isfinite(loss.item() + (norm or 0.0)):
            self.optimizer.zero_grad()
            end = "no weight was changed; lower lr or use amp=none"
            if norm is not None and not self.keeps_gradients:
                end = "SGD inside the backward pass has moved weights; the snapshots are from before; lower lr"
            raise NonFinite(f"{self._describe_non_finite(window, loss.item(), norm)}; {end}")

    def count(self, window: Sequence[Batch], loss: Tensor, lr: float, norm: float | None, skipped: bool) -> Report:
        """Add a step to the progress. Raises NonFinite where the last MAX_SKIPS were all skipped."""
        progress, label_tokens = self.progress, sum(len(batch.labels) for batch in window)
        progress.windows += 1
        progress.steps += not skipped
        progress.skipped += skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
        progress.label_tokens += label_tokens
        if progress.skipped_in_a_row >= MAX_SKIPS:
            problem = self._describe_non_finite(window, loss.item(), norm)
            raise NonFinite(
                f"{MAX_SKIPS} steps in a row overflowed; {problem}; no weight was changed; lower lr or use amp=none"
            )
        return Report(loss.item(), lr, norm, label_tokens, sum(batch.n_tokens for batch in window), skipped)

    @torch.no_grad()
    def _describe_non_finite(self, window: Sequence[Batch], loss: float, norm: float | None) -> str:
        """Where in the data, and the block in which activations are largest or first stop being finite."""
        largest = [0.0] * len(self.model.layers)

        def note(block: nn.Module, _: Any, y: Tensor) -> None:
            i = blocks.index(block)
            largest[i] = max(largest[i], y.abs().max().nan_to_num(math.inf).item())

        blocks = list(self.model.layers)
        hooks = [block.register_forward_hook(note) for block in blocks]
        for batch in window:
            with self.autocast():
                self.loss_sum(batch)
        for hook in hooks:
            hook.remove()
        layer = largest.index(max(largest))
        names = ", ".join(name for batch in window for name in batch.names)
        gradient = "" if norm is None else f"gradient norm {norm:g}, "
        return (
            f"step {self.progress.windows + 1}: loss {loss:g}, {gradient}samples {names}; activations reach "
            f"{largest[layer]:.3g} in layer {layer}"
        )

    # State

    def snapshot(self) -> Snapshot:
        """Everything that the rest of the training depends on. Raises NonFinite where a weight is not finite."""
        groups = {"model": {name: weight.detach() for name, weight in self.weights.items()}}
        groups["optimizer"] = {
            f"{name}:{key}": value
            for name, weight in self.weights.items()
            for key, value in self.optimizer.state.get(weight, {}).items()
            if value is not None
        }
        whole, shares = several.apart(groups)
        for name, weight in [*whole["model"].items(), *shares.get("model", {}).items()]:
            if not weight.isfinite().all():
                raise NonFinite(f"{name} is not finite after step {self.progress.steps}; nothing was saved")
        whole |= {"rng": self.random_state()} | ({"masks": self.masks} if self.masks else {})
        return Snapshot(whole, self._state(), shares)

    def _state(self) -> dict[str, dict[str, Any]]:
        return {"progress": vars(self.progress), "scaler": self.scaler.state_dict()}

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot, to the bit. Raises InputError where anything is missing, extra or misshapen."""
        found, state = snapshot.tensors, snapshot.state
        for group, wanted in (("model", self.weights), ("masks", self.masks), ("rng", self.random_state())):
            require_same(group, wanted, found.get(group, {}))
        for part, content in self._state().items():
            _require_like(f"state.json:{part}", content, state.get(part))
        if "optimizer" not in found:
            raise InputError("the snapshot has no 'optimizer'; it is not of this version or not whole")
        with torch.no_grad():
            for group, tensors in (("model", self.weights), ("masks", self.masks)):
                for name, tensor in tensors.items():
                    tensor.copy_(several.share_of(found[group][name], tensor))
        self.set_random_state(found["rng"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self._restore_optimizer(found["optimizer"])

    def _restore_optimizer(self, saved: dict[str, Tensor]) -> None:
        """AdamW and momentum keep tensors for each weight from their first step on; plain SGD keeps none."""
        keys = ("step", "exp_avg", "exp_avg_sq")
        if self.settings.optimizer == "sgd":
            keys = ("momentum_buffer",) if self.settings.momentum else ()
        is_begun = bool(saved) or self.progress.steps > 0
        slots = [{key: f"{name}:{key}" for key in keys} for name in self.weights] if is_begun else []
        _require_names("optimizer", {name for slot in slots for name in slot.values()}, saved)
        for slot, weight in zip(slots, self.weights.values(), strict=False):
            alike = {name: torch.empty(()) if key == "step" else weight for key, name in slot.items()}
            require_same("optimizer", alike, {name: saved[name] for name in alike})
        state = {
            i: {
                key: several.share_of(saved[name], weight) if key != "step" else saved[name]
                for key, name in slot.items()
            }
            for i, (slot, weight) in enumerate(zip(slots, self.weights.values(), strict=False))
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def random_state(self) -> dict[str, Tensor]:
        """Of the generators that dropout draws from."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Continue from an earlier `random_state`. Raises InputError for what is none."""
        try:
            torch.set_rng_state(state["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda"], self.device)
        except RuntimeError as error:
            raise InputError(
                f"rng: is no state of a random generator ({error}); resume from another snapshot"
            ) from error


class Movement:
    """Whether training moves the weights at all: a sample of each, compared with how it was at the start."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.start = {name: self._sample(weight) for name, weight in weights.items()}

    @staticmethod
    def _sample(weight: Tensor) -> Tensor:
        flat = several.whole(weight.detach()).flatten()
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
        with trainer.autocast():
            losses, copied = trainer.losses(batch, batch.labels, itself)
        result.sums.append(losses.sum().item())
        result.copied.append(copied.sum().item())
        result.counts.append(len(batch.labels))
    return result


def fine_tune(
    model: Transformer, window: Callable[[int], Sequence[Batch]], steps: Sequence[int], settings: Settings
) -> None:
    """Train all weights, one optimizer step on each of the numbered windows; masks hold. The optimizer starts anew."""
    trainer = Trainer(model.requires_grad_(True), settings, len(steps))
    for step in tqdm(steps, unit="step", desc="fine-tuning", disable=None, leave=False):
        trainer.step(window(step))


def _require_names(group: str, wanted: Collection[str], found: Collection[str]) -> None:
    for name in sorted(set(wanted) ^ set(found)):
        raise InputError(f"{group}:{name}: is {'missing from the snapshot' if name in wanted else 'not expected'}")


def _require_like(place: str, wanted: dict[str, float], found: Any) -> None:
    """The same names, with numbers of the same types; none of them counts down, and none is beyond counting."""
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        raise InputError(f"{place}: is not of this version, or of a run with a different amp or dtype")
    for name, usual in wanted.items():
        if type(found[name]) is not type(usual) or not 0 <= found[name] < 1 << 53:
            raise InputError(f"{place}.{name}: {reprlib.repr(found[name])} is no number that a training can have")


def require_same(group: str, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    _require_names(group, wanted, found)
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise InputError(f"{group}:{name}: has shape {list(found[name].shape)}, expected {list(tensor.shape)}")
