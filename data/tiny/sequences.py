"""Token sequences of the embedded model's world: documents end to end, a pure function of a name and a mix."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from data.tiny import corpus
from llama.tokenizer import ChatFormat, Tokenizer

SEQ_LEN = 256  # tokens that the embedded model predicts in a sequence, which has one more
HELD_OUT = 256  # sequences


def sequences(tokenizer: Tokenizer, name: str, mix: corpus.Mix = corpus.BALANCED) -> Iterator[list[int]]:
    """Endless sequences of SEQ_LEN + 1 ids. Each begins with a document, as every prompt does."""
    rng = random.Random(name)
    chat = ChatFormat(tokenizer)
    while True:
        ids: list[int] = []
        while len(ids) < SEQ_LEN + 1:
            doc = corpus.document(rng, mix)
            if doc.dialog:
                ids.append(tokenizer.bos_id)
                for role, content in doc.dialog:
                    ids += chat.encode_message({"role": role, "content": content})
            else:
                ids += tokenizer.encode(doc.text, bos=True, eos=True)
        yield ids[: SEQ_LEN + 1]


def held_out(tokenizer: Tokenizer, mix: corpus.Mix = corpus.BALANCED, n: int = HELD_OUT) -> torch.Tensor:
    """[n, SEQ_LEN + 1] ids of text from a seed that training never uses."""
    stream = sequences(tokenizer, "held-out", mix)
    return torch.tensor([next(stream) for _ in range(n)])
