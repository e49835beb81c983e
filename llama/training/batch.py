"""From samples, prompts with their answers, to batches of tensors, and the window of batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama import order


class Sample(Protocol):
    """Token ids, and the ranges of them that are answers. data.samples.Sample."""

    @property
    def name(self) -> str: ...

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def answers(self) -> Sequence[range]: ...


@dataclass
class Batch:
    """Sequences of tokens and the positions whose next token is a label.

    tokens, pos: [B, T] int64 (pos None: 0..T-1 in every sequence). where: [N] int64, indices into the flattened
    [B * T]. labels: [N] int64, the token that follows each of them. names: of the samples, for messages. n_labels: of
    each sample, one after another in `labels`. n_tokens: of the samples, without padding.
    """

    tokens: Tensor
    pos: Tensor | None
    where: Tensor
    labels: Tensor
    names: tuple[str, ...] = ()
    n_labels: tuple[int, ...] = ()
    n_tokens: int = 0

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        pos = None if self.pos is None else self.pos.to(device)
        tensors = self.tokens.to(device), pos, self.where.to(device), self.labels.to(device)
        return Batch(*tensors, self.names, self.n_labels, self.n_tokens)


def collate(sequences: Sequence[Sequence[Sample]], pad_id: int = 0) -> Batch:
    """One batch of sequences, each of one sample or of several end to end, padded on the right.

    The label of position t is token t + 1 (the model predicts the next token), where that token is part of an answer.
    Samples of one sequence have positions from 0 each, and do not see each other. pad_id: any; nothing depends on it.
    """
    width = max(sum(len(sample.tokens) for sample in sequence) for sequence in sequences)
    tokens, positions, where, labels = [], [], [], []
    for number, sequence in enumerate(sequences):
        ids: list[int] = []
        pos: list[int] = []
        for sample in sequence:
            start = number * width + len(ids)
            for answer in sample.answers:
                where += range(start + answer.start - 1, start + answer.stop - 1)
                labels += sample.tokens[answer.start : answer.stop]
            ids += sample.tokens
            pos += range(len(sample.tokens))
        padding = width - len(ids)
        tokens.append(ids + [pad_id] * padding)
        positions.append(pos + list(range(padding)))
    samples = [sample for sequence in sequences for sample in sequence]
    return Batch(
        torch.tensor(tokens),
        torch.tensor(positions) if len(samples) > len(sequences) else None,
        torch.tensor(where),
        torch.tensor(labels),
        tuple(sample.name for sample in samples),
        tuple(sum(map(len, sample.answers)) for sample in samples),
        sum(len(sample.tokens) for sample in samples),
    )


def pack(samples: Sequence[Sample], max_seq_len: int) -> list[list[Sample]]:
    """Sequences of at most max_seq_len tokens: each sample goes, in order, to the first that has room for it."""
    sequences: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        index = next((i for i, left in enumerate(room) if left >= len(sample.tokens)), len(room))
        if index == len(room):
            sequences.append([])
            room.append(max_seq_len)
        sequences[index].append(sample)
        room[index] -= len(sample.tokens)
    return sequences


def window(
    sequences: Sequence[Sequence[Sample]], step: int, batch_size: int, accumulation: int, seed: int, pad_id: int
) -> list[Batch]:
    """The batches of optimizer step `step` (from 0, through all epochs)."""
    chosen = [sequences[i] for i in order.indices(len(sequences), step, batch_size * accumulation, seed)]
    return [collate(chosen[i : i + batch_size], pad_id) for i in range(0, len(chosen), batch_size)]
