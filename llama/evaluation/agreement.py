"""Whether two continuations of a prompt agree, and whether rounding explains where they do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama.generation import Llama
from llama.speculative import n_equal

# How far apart the logits of two candidates may be for rounding alone to decide between them. A logit of 16 to 32, as
# trained models have, is a multiple of 1/8 in bfloat16, of 1/64 in float16, and errors of some layers add up.
ROUNDING_MARGIN = {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float32: 1e-3}


@torch.no_grad()
def verdict(llama: Llama, prompt: list[int], tokens: list[int], others: list[int], stops: Sequence[int]) -> str:
    """In words: equal, or the first difference and by how much the logits of the two choices differ.

    stops: the stop tokens; a text that ends earlier than the other chose the likeliest of them, which it omits.
    """
    if tokens == others:
        return f"equal ({len(tokens)} of {len(tokens)})"
    same = n_equal(tokens, others)
    context = torch.tensor([prompt + tokens[:same]], device=llama.device)
    logits = llama.model.logits(llama.model.hidden(context)[0, -1])
    likely_stop = max(stops, key=lambda token: logits[token].item())
    first, second = ([*ids, likely_stop][same] for ids in (tokens, others))
    margin = abs(logits[first].float() - logits[second].float()).item()
    is_explained = margin <= ROUNDING_MARGIN[logits.dtype]
    reason = "within rounding" if is_explained else "MORE THAN ROUNDING EXPLAINS: please report this"
    names = " against ".join(repr(llama.tokenizer.decode([token])) for token in (first, second))
    return f"first differ at token {same + 1}: {names}, logit margin {margin:.4f} ({reason})"
