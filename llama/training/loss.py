"""Cross entropy at the labelled positions only, some at a time.

With a vocabulary of 128,256 the logits of one position are half a megabyte in fp32. A training sample has labels on its
answer alone; the others are never projected, and of those that are, a bounded number is held at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 128  # positions: 66 MB of fp32 logits, and as much again for their gradient


def cross_entropy(project: Callable[[Tensor], Tensor], h: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """-log softmax(project(h))[label] at N positions [N], in nats, in fp32 or wider.

    h: [N, dim] final hidden states, each of the position before its label. labels: [N] int64. project: hidden states to
    logits [.., V]. With more than `chunk` positions the logits of each part are computed again in the backward pass.
    """
    if len(h) <= chunk:
        return _all_at_once(project, h, labels)
    parts = zip(h.split(chunk), labels.split(chunk), strict=True)
    return torch.cat(
        [
            checkpoint(_all_at_once, project, part, part_labels, use_reentrant=False, preserve_rng_state=False)
            for part, part_labels in parts
        ]
    )


def cross_entropy_sum(project: Callable[[Tensor], Tensor], h: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """The sum of `cross_entropy` over the positions."""
    return cross_entropy(project, h, labels, chunk).sum()


def _all_at_once(project: Callable[[Tensor], Tensor], h: Tensor, labels: Tensor) -> Tensor:
    logits = project(h)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")
