"""Plain text as token ids, to be scored; and as samples of them, to train on and to validate on.

    text = from_file("wiki.train.raw", tokenizer, context=512, batch_size=8, seed=1)
    text.samples(0)          # those of the first optimizer step
    text.loss(model)         # nats per token on the part that is not trained on

A sample is one of data/samples.py whose prompt is its first token: what trains on records trains on text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import records
from data.samples import Sample
from data.tiny import has_tokenizer
from data.tiny.sequences import SEQ_LEN, held_out, sequences
from llama import order
from llama.errors import InputError
from llama.evaluation import perplexity
from llama.model import Transformer
from llama.tokenizer import Tokenizer

LINE = re.compile(r"(?<=\n)(?=[^\S\r\n]*\S)")  # the start of a line that is not empty
WINDOW = 2048  # what papers on quantization use
VALIDATION = 64  # samples at most
VALIDATION_SHARE = 0.1  # of a file, its end
CALIBRATION = 8  # samples on which pruning measures activations


@dataclass(frozen=True)
class Text:
    """Samples by number of the optimizer step, and other ids, which are scored `context` tokens at a time."""

    samples: Callable[[int], list[Sample]]
    validation: list[int]
    context: int

    def calibration(self, n: int = CALIBRATION) -> Tensor:
        """The first `n` samples of full length that train, int64 [n, tokens]."""
        found: list[Sample] = []
        for step in itertools.count():
            found += [sample for sample in self.samples(step) if len(sample.tokens) == self.context]
            if len(found) >= n:
                return torch.tensor([sample.tokens for sample in found[:n]])

    def loss(self, model: Transformer) -> float:
        """Nats per token of the validation part, in windows side by side."""
        return perplexity.evaluate(model, self.validation, self.context, batch_size=8).loss


def read(path: Path, tokenizer: Tokenizer) -> list[int]:
    """Begin-of-text and the ids of a file. Raises InputError for a file that is not there, not UTF-8 or empty."""
    return encode(records.read_text(path), tokenizer)


def to_measure(data: str | None, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text file; without one, of held-out text of the world of the model that has this tokenizer.

    Raises InputError as `read` does, and for another model without a file.
    """
    if data is not None:
        return read(Path(data), tokenizer)
    if not has_tokenizer(tokenizer):
        raise InputError("--data is missing; pass a text file to measure on")
    return held_out(tokenizer).flatten().tolist()


def window_of(tokenizer: Tokenizer) -> int:
    """Tokens of a window in which a loss is measured: WINDOW, or one held-out sequence of the embedded model."""
    return SEQ_LEN + 1 if has_tokenizer(tokenizer) else WINDOW


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Begin-of-text, where texts have one, and the ids of a text of any length, cut nowhere.

    Meta's Llama 3 tokenizer, and so ours, cuts every 400,000 characters, also inside words: WikiText-2 would get four
    tokens more than the literature counts. Its pattern ends a piece before each line that is not empty, so line by
    line the ids are those of the whole.
    """
    pieces = LINE.split(text) if tokenizer.kind == "tiktoken" else [text]
    ids = [token for piece in pieces for token in tokenizer.encode(piece, bos=False, eos=False)]
    return tokenizer.encode("", bos=True, eos=False) + ids


def blocks(ids: list[int], length: int, name: str = "token") -> list[Sample]:
    """Samples of `length` ids, the last of fewer; each but the first begins with the last id of the one before.

    So each id but the very first is a label once.
    """
    return [_sample(f"{name} {start}", ids[start : start + length]) for start in range(0, len(ids) - 1, length - 1)]


def from_file(
    path: Path,
    tokenizer: Tokenizer,
    context: int,
    batch_size: int,
    seed: int,
    eval_path: Path | None = None,
    eval_tokens: int | None = None,
) -> Text:
    """Samples of a file train; the start of another validates, or without one the end of the file, a tenth of it.

    eval_tokens: what validates at most; None: VALIDATION times `context`. Samples come in an order that depends on
    `seed` and the epoch. Raises InputError as `read` does, and for a file that is too short for one sample.
    """
    ids, most = read(path, tokenizer), VALIDATION * context if eval_tokens is None else eval_tokens
    n_validation = 0 if eval_path is not None else min(int(len(ids) * VALIDATION_SHARE), most)
    training = ids[: len(ids) - n_validation]
    if len(training) < context or (eval_path is None and n_validation < 2):
        least = context if eval_path is not None else int(context / (1 - VALIDATION_SHARE)) + 1
        use = "train" if eval_path is not None else "train and validate"
        raise InputError(f"data={path} has {len(ids)} tokens; to {use} on it takes at least {least}")
    validation = ids[len(training) :] if eval_path is None else read(eval_path, tokenizer)[:most]
    samples = blocks(training, context)
    return Text(
        lambda step: [samples[i] for i in order.indices(len(samples), step, batch_size, seed)], validation, context
    )


def of_embedded_model(tokenizer: Tokenizer, batch_size: int, seed: int) -> Text:
    """Text of the embedded model's world, made up on demand: no sample is seen twice by design."""

    def samples(step: int) -> list[Sample]:
        stream = sequences(tokenizer, f"text-{seed}-{step}")
        return [_sample(f"sample {step}.{i}", next(stream)) for i in range(batch_size)]

    validation = held_out(tokenizer, n=VALIDATION).flatten().tolist()
    return Text(samples, validation, SEQ_LEN + 1)


def _sample(name: str, ids: list[int]) -> Sample:
    return Sample(name, tuple(ids), (range(1, len(ids)),))
