"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): training on which of two answers is better.

    margin = beta * ((log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)))
    loss   = -log sigmoid(margin), the mean over the pairs of a step's whole window

log pi(answer) is the sum over the answer's tokens, after the prompt, under the model that is trained; ref is the model
as the run starts. Its log-probabilities of all pairs are computed once, before the first step and without dropout, and
kept with the run: there is no second copy of the weights, and a resumed run has the same numbers. Where new adapters
are trained, that model is the one with its adapters off, to the bit.

Each pair counts the same, as in equation 7 of the paper, an expectation over pairs. Weighing pairs by their tokens
would weigh long answers twice: log pi is a sum over tokens already.

A pair is one sequence of two samples, chosen and rejected, that do not see each other, as packed samples do not; so
batches, windows, recomputation, lean parts, autocast and processes are those of step.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llama.errors import InputError
from llama.evaluation.intervals import LossSums, confidence
from llama.model import Transformer
from llama.training import several
from llama.training.batch import Batch
from llama.training.options import Settings
from llama.training.snapshot import Snapshot
from llama.training.step import Report, Trainer

UNITS = {"preferred_before": "x", "preferred": "x", "preferred_rise": "x", "reward_accuracy": "x"}
UNITS |= {"margin": "nats", "chosen_gain": "nats", "rejected_gain": "nats"}  # of `figures`


class PreferenceTrainer(Trainer):
    """A trainer whose batches are pairs: sequences of two samples each, the chosen answer first.

    names: of the samples of all pairs. reference: log ref of each answer, by the name of its sample.
    """

    def __init__(self, model: Transformer, settings: Settings, total_steps: int, names: Sequence[str]) -> None:
        super().__init__(model, settings, total_steps)
        self.names, self.reference = names, {}
        self._margins: list[Tensor] = []  # of the pairs of the window that went through the network here

    def set_reference(self, log_ref: Tensor) -> None:
        """log ref [answers] in the order of `names`."""
        self.reference = dict(zip(self.names, log_ref.tolist(), strict=True))

    def snapshot(self) -> Snapshot:
        """Also the reference."""
        content = super().snapshot()
        content.tensors["reference"] = {"log_ref": torch.tensor([*self.reference.values()], dtype=torch.float64)}
        return content

    def restore(self, snapshot: Snapshot) -> None:
        """Raises InputError where the reference is not that of these pairs."""
        found = snapshot.tensors.get("reference", {}).get("log_ref", torch.empty(0))
        if len(found) != len(self.names):
            raise InputError(f"reference: has {len(found)} log-probabilities, expected {len(self.names)}")
        super().restore(snapshot)
        self.set_reference(found)

    def begin(self, window: Sequence[Batch]) -> float:
        self._margins = []
        return super().begin(window)

    def n_terms(self, batch: Batch) -> int:
        """What the loss of a batch is a sum over: its pairs."""
        return len(batch.names) // 2

    def loss_sum(self, batch: Batch) -> Tensor:
        """Summed loss of the pairs of a batch."""
        log_probs = self.log_probs(batch)
        gains = log_probs - log_probs.new_tensor([self.reference[name] for name in batch.names])
        margins = self.settings.beta * (gains[0::2] - gains[1::2])
        self._margins.append(margins.detach())
        return -F.logsigmoid(margins).sum()

    def log_probs(self, batch: Batch) -> Tensor:
        """log pi of each sample's answer, [samples] in nats."""
        (losses,) = self.losses(batch, batch.labels)
        numbers = torch.arange(len(batch.n_labels))
        owners = numbers.repeat_interleave(torch.tensor(batch.n_labels, dtype=torch.int64))
        is_own = (numbers[:, None] == owners).to(losses.device)
        return -torch.where(is_own, losses, 0.0).sum(1)  # not index_add, whose order of sums a GPU leaves open

    def count(self, window: Sequence[Batch], *report: Any, **more: Any) -> Report:
        """Also the mean margin, and the share of pairs in which it is above 0."""
        found = super().count(window, *report, **more)
        margins = torch.cat([torch.zeros(0, device=self.device), *self._margins]).double()
        sums = several.total(torch.stack([margins.sum(), (margins > 0).sum()]))
        margin, right = (sums / sum(map(self.n_terms, window))).tolist()
        found.figures = {"margin": margin, "reward_accuracy": right}
        return found


@torch.no_grad()
def log_probs(trainer: PreferenceTrainer, batches: Iterable[Batch]) -> Tensor:
    """log pi of all answers [pairs, 2] in nats, chosen and rejected, of batches of one pair each, without dropout."""
    trainer.model.eval()
    found = []
    for batch in batches:
        with trainer.autocast():
            found.append(trainer.log_probs(batch))
    return torch.stack(found)


def begin(trainer: PreferenceTrainer, batches: Sequence[Batch]) -> None:
    """Make the model as it is now the reference, on batches of one pair each.

    Of several processes that have whole weights each takes some of the pairs.
    """
    me = several.dividing(trainer.weights.values())
    own = range(me.rank, len(batches), me.size)
    log_ref = torch.zeros(len(batches), 2, dtype=torch.float64, device=trainer.device)
    bar = tqdm(own, unit="pair", desc="reference", disable=None, leave=False)
    if own:
        log_ref[list(own)] = log_probs(trainer, (batches[i] for i in bar)).double()
    trainer.set_reference((several.total(log_ref) if me.size > 1 else log_ref).flatten())


@dataclass
class Preferences(LossSums):
    """The loss of each held-out pair (`counts` are 1), and log pi of its answers."""

    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)

    @property
    def is_preferred(self) -> list[bool]:
        """Whether the chosen answer is the likelier one: ranking accuracy (Chen et al. 2024, arXiv:2405.19534)."""
        return [chosen > rejected for chosen, rejected in zip(self.chosen, self.rejected, strict=True)]

    def margins(self, start: Preferences, beta: float) -> list[float]:
        gaps = [
            [chosen - rejected for chosen, rejected in zip(one.chosen, one.rejected, strict=True)]
            for one in (self, start)
        ]
        return [beta * (now - then) for now, then in zip(*gaps, strict=True)]


def evaluate(trainer: PreferenceTrainer, batches: Sequence[Batch], start: Preferences | None) -> Preferences:
    """What the model makes of held-out pairs, in batches of one; start: the same at the start, None: this is it."""
    if not batches:
        return Preferences()
    chosen, rejected = log_probs(trainer, batches).T.tolist()
    result = Preferences(counts=[1] * len(batches), chosen=chosen, rejected=rejected)
    margins = torch.tensor(result.margins(start or result, trainer.settings.beta), dtype=torch.float64)
    result.sums = (-F.logsigmoid(margins)).tolist()
    return result


def figures(before: Preferences, after: Preferences, beta: float) -> dict[str, Any]:
    """What summary.json says of the held-out pairs; each with its 95 % interval over pairs, as [value, low, high].

    preferred: share of pairs whose chosen answer is the likelier one. reward_accuracy: share whose margin is above 0.
    """
    margins = after.margins(before, beta)
    was, now = ([float(is_so) for is_so in found.is_preferred] for found in (before, after))
    means = {
        "preferred_before": was,
        "preferred": now,
        "preferred_rise": [new - old for old, new in zip(was, now, strict=True)],
        "reward_accuracy": [float(margin > 0) for margin in margins],
        "margin": margins,
        "chosen_gain": [new - old for old, new in zip(before.chosen, after.chosen, strict=True)],
        "rejected_gain": [new - old for old, new in zip(before.rejected, after.rejected, strict=True)],
    }
    return {f"held_out_{name}": mean_95(values) for name, values in means.items()}


def mean_95(values: list[float]) -> list[float]:
    """The mean of one value per pair, and its 95 % interval."""
    return [sum(values) / len(values), *confidence(LossSums(values, [1] * len(values)))]


def describe(found: dict[str, Any], n: int) -> list[str]:
    """`figures` of n pairs in words."""

    def percent(name: str) -> str:
        mean, low, high = (100 * value for value in found[f"held_out_{name}"])
        return f"{mean:.1f} [{low:.1f} to {high:.1f}]"

    margin, chosen, rejected = (found[f"held_out_{name}"] for name in ("margin", "chosen_gain", "rejected_gain"))
    return [
        f"Of {n} held-out pairs the chosen answer was the likelier one in {percent('preferred_before')} %, and is in "
        f"{percent('preferred')} % now, a rise of {percent('preferred_rise')} points.",
        f"Compared with the start, {percent('reward_accuracy')} % have moved towards the chosen answer, by a mean "
        f"margin of {margin[0]:.3f} [{margin[1]:.3f} to {margin[2]:.3f}].",
        f"The log-probability of the chosen answers has changed by {chosen[0]:+.2f} nats on average, that of the "
        f"rejected ones by {rejected[0]:+.2f}.",
    ]
