"""Train the embedded model and its draft, from the tokenizer on, on text that corpus.py makes up as it goes.

    python -m data.tiny.train                  # tokenizer, model, draft: an hour on two cores
    python -m data.tiny.train --only draft     # one of: tokenizer, model, draft
    python -m benchmarks.embedded              # measure what was trained

Each batch is a function of (seed, step), so no text is seen twice by design and an interrupted run continues where its
last saved state stands, with the same command. Deterministic for one machine and torch build; the text is the same
everywhere. Needs requirements-dev.txt (the byte-pair trainer of `tokenizers`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.tiny import EMBEDDED, corpus
from data.tiny.sequences import SEQ_LEN, sequences
from llama import checkpoint, cli
from llama import device as devices
from llama.cli import option
from llama.config import PRESETS
from llama.errors import InputError
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from llama.vocabulary.ranks import LLAMA3_PATTERN, N_SPECIAL

BATCH_SIZE = 16
# Two phases: mostly stories, for grammar, then mostly questions and instructions, for facts. Each warms up and decays
# the learning rate on its own: (mix of documents, optimizer steps, peak rate).
Phase = tuple[corpus.Mix, int, float]
LossFunction = Callable[[Transformer, torch.Tensor], torch.Tensor]
# name -> preset, directory, phases
MODELS: dict[str, tuple[str, Path, list[Phase]]] = {
    "model": ("tiny", EMBEDDED, [(corpus.BALANCED, 3000, 3e-3), (corpus.QUESTIONS, 3000, 2e-3)]),
    "draft": ("tiny-draft", EMBEDDED / "draft", [(corpus.BALANCED, 1000, 6e-3), (corpus.QUESTIONS, 1000, 4e-3)]),
}
SAVE_EVERY = 250
WORTH_COMPILING = 500  # steps: compiling takes a minute or two and saves a third of each


@dataclass(frozen=True)
class Options(cli.Options):
    """Train what the repository ships."""

    only: str | None = option(None, "one stage alone; default: all, in this order", choices=("tokenizer", *MODELS))
    seed: int = option(1, "seed of the corpus and of the initial weights", **cli.SEEDS)
    device: str = option("cpu", cli.DEVICE)
    work_dir: str = option("runs/tiny", "where the training state is kept for resuming; may be deleted afterwards")


def main(options: Options) -> None:
    devices.keep_freed_memory()
    device, _ = devices.resolve(options.device, "float32")
    if options.only in (None, "tokenizer"):
        train_tokenizer(options.seed)
    for name in MODELS:
        if options.only in (None, name):
            train_model(name, options.seed, device, Path(options.work_dir))


def train_tokenizer(seed: int, n_documents: int = 40_000) -> None:
    """Learn byte pairs and write them as a tiktoken rank file: 256 single bytes, then the merges in order."""
    import tokenizers  # only this stage needs it

    rng = random.Random(f"tokenizer-{seed}")
    documents = (corpus.document(rng) for _ in range(n_documents))
    texts = ("\n".join([doc.text, *(content for _, content in doc.dialog)]) for doc in documents)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    n_ranks = PRESETS["tiny"].vocab_size - N_SPECIAL
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_ranks, initial_alphabet=to_bytes.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [_piece_bytes(left) + _piece_bytes(right) for left, right in merges]
    if len(pieces) != n_ranks:
        raise InputError(f"the corpus yields {len(pieces)} tokens, not {n_ranks}; it has too few different words")
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)]
    (EMBEDDED / "tokenizer.model").write_text("".join(lines), encoding="ascii")


def _piece_bytes(piece: str) -> bytes:
    """Undo the byte-level alphabet, in which each byte is shown as one printable character (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    shifted = {256 + i: byte for i, byte in enumerate(b for b in range(256) if b not in printable)}
    return bytes(shifted.get(ord(char), ord(char)) for char in piece)


def batch(tokenizer: Tokenizer, seed: int, step: int, mix: corpus.Mix) -> torch.Tensor:
    """The [BATCH_SIZE, SEQ_LEN + 1] ids of one step."""
    stream = sequences(tokenizer, f"train-{seed}-{step}", mix)
    return torch.tensor([next(stream) for _ in range(BATCH_SIZE)])


def loss_of(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy in nats."""
    logits = model(ids[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def schedule(phases: list[Phase]) -> Iterator[tuple[corpus.Mix, float]]:
    """Mix and learning rate of every step: linear warm-up over 100 steps, then a cosine down to 2 % of the peak."""
    for mix, steps, peak in phases:
        for step in range(steps):
            warm = min(1.0, (step + 1) / 100)
            yield mix, peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def new_run(name: str, seed: int, device: torch.device) -> tuple[Transformer, torch.optim.Optimizer]:
    """The untrained model and its optimizer: AdamW, weight decay on matrices only."""
    model = Transformer(PRESETS[MODELS[name][0]])
    model.init_weights(torch.Generator().manual_seed(seed))
    model.to(device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=True)


def fast_loss(name: str, device: torch.device) -> LossFunction:
    """`loss_of`, compiled for a long run on a CPU that has a C++ compiler."""
    n_steps = sum(steps for _, steps, _ in MODELS[name][2])
    pays = device.type == "cpu" and n_steps >= WORTH_COMPILING and shutil.which("g++")
    return torch.compile(loss_of, dynamic=False) if pays else loss_of


def train_step(
    model: Transformer, optimizer: torch.optim.Optimizer, loss_function: LossFunction, ids: torch.Tensor, rate: float
) -> torch.Tensor:
    """One update in bf16 autocast, gradients clipped to norm 1; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = loss_function(model, ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train_model(name: str, seed: int, device: torch.device, work_dir: Path) -> None:
    """Train one model, resuming from `work_dir`, and write it in Meta's layout and 16 bits."""
    preset, directory, phases = MODELS[name]
    plan, loss_function = list(schedule(phases)), fast_loss(name, device)
    tokenizer = Tokenizer(EMBEDDED / "tokenizer.model")
    model, optimizer = new_run(name, seed, device)
    state_path, recipe = work_dir / f"{name}-{seed}.pt", _recipe(name)
    start = _resume(state_path, recipe, model, optimizer)
    bar = tqdm(range(start, len(plan)), initial=start, total=len(plan), desc=f"{preset} ({model.args.n_params():,})")
    for step in bar:
        mix, rate = plan[step]
        loss = train_step(model, optimizer, loss_function, batch(tokenizer, seed, step, mix).to(device), rate)
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(plan):
            _save_state(state_path, recipe, step + 1, model, optimizer)
    _export(model.to(torch.bfloat16), directory)


def _recipe(name: str) -> str:
    """A hash of what a run is made of: resuming with a different corpus, tokenizer or schedule would mix two runs."""
    parts = [(EMBEDDED / file).read_bytes() for file in ("words.toml", "corpus.py", "tokenizer.model")]
    parts.append(repr((MODELS[name][0], MODELS[name][2], BATCH_SIZE, SEQ_LEN)).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _resume(path: Path, recipe: str, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        raise InputError(f"{path} is of a different corpus, tokenizer or schedule; delete it to start over")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save_state(path: Path, recipe: str, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    state = {"recipe": recipe, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, scratch)
    os.replace(scratch, path)


def _export(model: Transformer, directory: Path) -> None:
    """Put params.json and the weights beside whatever else `directory` holds."""
    fresh = directory / ".new"
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed right here
    checkpoint.save(model, fresh)
    for file in fresh.iterdir():
        os.replace(file, directory / file.name)
    fresh.rmdir()


if __name__ == "__main__":
    cli.run(main)
