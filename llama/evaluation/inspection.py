"""What changed inside a model: how far each matrix has moved, and what that does to activations and predictions.

    changes = inspection.compare(model, base, ids, context)

    updates       |W - W0| / |W0| of each matrix, Frobenius norms; of an adapter |(alpha / r) B A| / |W0|
    activations   |h - h0| / |h0| after each block, over all tokens of a text
    divergence    KL(p0 || p) of the predictions of the next token, in nats per token (`loss` is its mean)

Both models read the same tokens, each with its own activations, so that a change is the sum of all changes below it.
W is what the model multiplies by, whatever form it has: codes are widened, adapters added. Left out: norms, which are
no matrices, and which text to take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llama.code_layers import Quantized
from llama.evaluation.intervals import LossSums
from llama.evaluation.perplexity import windows
from llama.lora import META_NAMES, LoRALinear
from llama.model import Transformer
from llama.training.loss import CHUNK

MATRICES = tuple(META_NAMES)  # of a block, in its order
TABLES = ("tok_embeddings", "output")  # a tied head has no table of its own


@dataclass
class Changes(LossSums):
    """What has changed; sums and counts are those of the divergence, for each window of the text.

    updates: of each matrix of a block, for each layer. tables: of embedding and head. total: of all these together.
    activations: after each block. n_same: predictions whose likeliest token is the same.
    """

    updates: dict[str, list[float]] = field(default_factory=dict)
    tables: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    activations: list[float] = field(default_factory=list)
    n_same: int = 0


@torch.no_grad()
def compare(model: Transformer, base: Transformer, ids: Sequence[int], context: int) -> Changes:
    """What sets `model` apart from `base`, a model of the same shape, on a text of at least 2 tokens.

    context: tokens that they see at once; the text is cut into windows of it, side by side.
    """
    changes = Changes()
    _compare_weights(changes, model.eval(), base.eval())
    text, moved = torch.tensor(ids, device=model.tok_embeddings.weight.device), []
    for window in windows(len(ids), context, context):
        tokens = text[None, window.start : window.stop]
        (h, blocks), (h_base, blocks_base) = (_run(one, tokens) for one in (model, base))
        moved.append([_squares(new, old) for new, old in zip(blocks, blocks_base, strict=True)])
        nats = 0.0
        for new, old in zip(h[0].split(CHUNK), h_base[0].split(CHUNK), strict=True):
            new, old = (one.logits(part).float().log_softmax(-1) for one, part in ((model, new), (base, old)))
            nats += (old.exp() * (old - new)).sum().item()
            changes.n_same += (new.argmax(-1) == old.argmax(-1)).sum().item()
        changes.sums.append(nats)
        changes.counts.append(tokens.numel())
    changes.activations = _relative(torch.tensor(moved, dtype=torch.float64).sum(0)).tolist()
    return changes


def weight_of(module: nn.Module) -> Tensor:
    """What a layer or a table multiplies by, in fp32 or wider."""
    if isinstance(module, LoRALinear):
        base = _wide(module.weight) if module.layer is None else weight_of(module.layer)
        return base if module.is_merged else base + module.update()
    if isinstance(module, Quantized):
        like = torch.empty(module.out_features, module.in_features, device=module.weight.device)
        return module.widen(slice(0, module.out_features), like)
    return _wide(module.weight)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _compare_weights(changes: Changes, model: Transformer, base: Transformer) -> None:
    found = []
    for name in TABLES:
        pair = [getattr(one, name) for one in (model, base)]
        if None not in pair:
            found.append(_squares(*map(weight_of, pair)))
            changes.tables[name] = _relative(torch.tensor(found[-1])).item()
    for matrix in MATRICES:
        path = META_NAMES[matrix].removesuffix(".weight")
        pairs = [[one.layers[i].get_submodule(path) for one in (model, base)] for i in range(len(base.layers))]
        squares = [_squares(*map(weight_of, pair)) for pair in pairs]
        changes.updates[matrix] = _relative(torch.tensor(squares, dtype=torch.float64)).tolist()
        found += squares
    changes.total = _relative(torch.tensor(found, dtype=torch.float64).sum(0)).item()


def _run(model: Transformer, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states, and the output of each block."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, y: outputs.append(y)) for block in model.layers]
    h = model.hidden(tokens)
    for hook in hooks:
        hook.remove()
    return h, outputs


def _squares(new: Tensor, old: Tensor) -> list[float]:
    """|new - old|^2 and |old|^2."""
    new, old = _wide(new), _wide(old)
    return [x.square().sum(dtype=torch.float64).item() for x in (new - old, old)]


def _relative(squares: Tensor) -> Tensor:
    """|new - old| / |old| from such pairs [.., 2]."""
    return (squares[..., 0] / squares[..., 1]).sqrt()
