"""Thousands of generations of every kind and of training steps in one process: nothing grows, nothing is left over.

    python -m tests.trust.endurance --generations=10000 --steps=2000 --results=reports/results/trust.jsonl

The kinds take turns in a seeded order, cancelled and failing generations among them. After a warm-up, at regular
moments, garbage is collected and free memory is given back; then the resident memory is read, and file descriptors,
threads, child processes and living tensors are counted. Memory has grown by the median of the last quarter of these
moments over that of the first. Each kind must say at every turn what it said at its first one.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import psutil
import torch
from conftest import SMALL, TINY, random_model
from support import batches, samples
from tqdm import tqdm

from benchmarks import rows as row_files
from llama import Llama, Tokenizer, adapters, cli, lora, prompt_file
from llama import device as devices
from llama.cli import option
from llama.conversation import Conversation
from llama.errors import InputError, InternalError
from llama.quantization import Quantization, quantized_copy
from llama.speculative import ModelDraft, PromptLookup, Speculation
from llama.training import snapshot
from llama.training.options import TrainingOptions
from llama.training.step import Trainer, checkpoint_layers, evaluate
from serving.room import like, with_adapter

PROMPTS = ("Once upon a time", "The", "A fox and a cow sat by the river, and the fox said")
LENGTH, CANCELLED = 8, 3  # tokens of an answer, and of one that nobody waits for
MOMENTS, WARM_UP = 16, 0.15  # at which memory is read, and the share of the work before the first of them
ALLOWED = 0.01  # growth of the resident memory


class Broken(Exception):
    """What a caller's own code may raise in the middle of a generation."""


class Place:
    """A small random model with its forms, and a directory."""

    def __init__(self, folder: Path) -> None:
        args = type(SMALL)(**{**vars(SMALL), "vocab_size": 4096, "dim": 32, "head_dim": 8, "n_layers": 2})
        self.folder = folder
        self.llama = Llama(random_model(args), Tokenizer(TINY / "tokenizer.model"), max_seq_len=128, max_batch_size=4)
        self.ids = [self.llama.encode_prompt(prompt) for prompt in PROMPTS]
        self.int8 = quantized_copy(self.llama.model, Quantization(8))
        self.half = like(self.llama, copy.deepcopy(self.llama.model).bfloat16())
        model = copy.deepcopy(self.llama.model)
        lora.apply(model, config := lora.LoRAConfig(r=2))
        for module in lora.layers(model).values():
            module.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        adapters.save(model, config, folder / "adapter", "0" * 64)
        self.settings: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 7}

    def stream(self, **more: Any) -> Iterator[int]:
        return self.llama.stream(self.ids[2], LENGTH, **self.settings, **more)

    # The kinds: each gives what was said

    def batch(self) -> Any:
        return self.llama.generate(self.ids, LENGTH, logprobs=True, **self.settings)

    def uncached(self) -> Any:
        return self.llama.generate(self.ids[:1], LENGTH, use_cache=False, **self.settings)

    def streamed(self) -> Any:
        return list(self.stream(stop=["zzz"]))

    def chat(self) -> Any:
        with self.llama.start_session() as session:
            conversation = Conversation(self.llama, session, {**self.settings, "max_gen_len": LENGTH})
            return ["".join(conversation.answer(text)) for text in PROMPTS[:2]]

    def lookup(self) -> Any:
        return list(self.stream(speculation=Speculation(PromptLookup(min_ngram=1))))

    def own_form(self) -> Any:
        return list(self.stream(speculation=Speculation(ModelDraft(self.int8), 3)))

    def kept_prompt(self) -> Any:
        path = self.folder / "prompt.safetensors"
        with self.llama.start_session() as session:
            session.read(self.ids[2])
            prompt_file.save(path, session, PROMPTS[2])
        saved = prompt_file.read(path, self.llama.encode_prompt)
        with self.llama.start_session() as session:
            saved.restore(session)
            said = list(self.stream(session=session))
        path.unlink()
        return said

    def adapter(self) -> Any:
        """Beside the base, then merged into a copy of it."""
        beside = with_adapter(self.llama, str(self.folder / "adapter"), None)
        said = list(beside.stream(self.ids[1], LENGTH, **self.settings))
        lora_model = copy.deepcopy(beside.model)
        lora.merge(lora_model)
        lora.remove(lora_model)
        return said, list(like(self.llama, lora_model).stream(self.ids[1], LENGTH, **self.settings))

    def quantized(self) -> Any:
        """In 4 bits, made anew, and in 8."""
        int4 = quantized_copy(self.llama.model, Quantization(4, 32, zero_points=True))
        return [list(like(self.llama, form).stream(self.ids[1], LENGTH, temperature=0)) for form in (int4, self.int8)]

    def half_precision(self) -> Any:
        return self.half.generate(self.ids[:1], LENGTH, temperature=0)

    def cancelled(self) -> Any:
        """Whoever asked has gone: after some tokens of a plain stream, of one with a draft and of one in a session."""
        said = []
        with self.llama.start_session() as session:
            for more in ({}, {"speculation": Speculation(ModelDraft(self.int8), 3)}, {"session": session}):
                stream = self.stream(**more)
                said.append(list(itertools.islice(stream, CANCELLED)))
                stream.close()
        return said

    def failing(self) -> Any:
        """Errors of the caller in the middle, and prompts that are refused."""

        def fail(*_: Any) -> None:
            raise Broken

        said = []
        for work in (
            lambda: self.llama.generate(self.ids, LENGTH, on_step=fail, **self.settings),
            lambda: list(self.stream(on_drawn=fail)),
            lambda: self.llama.generate([[1] * 1000], LENGTH),
            lambda: list(self.stream(speculation=Speculation(PromptLookup()), use_cache=False)),
        ):
            try:
                work()
            except (Broken, InputError) as error:
                said.append(str(error))
        return said


KINDS: dict[str, Callable[[Place], Any]] = {
    work.__name__: work
    for work in (Place.batch, Place.uncached, Place.streamed, Place.chat, Place.lookup, Place.own_form)
    + (Place.kept_prompt, Place.adapter, Place.quantized, Place.half_precision, Place.cancelled, Place.failing)
}


# What is left over


class Watch:
    """What this process holds, from moment to moment."""

    def __init__(self) -> None:
        self.process, self.moments = psutil.Process(), []

    def look(self) -> None:
        gc.collect()
        devices.return_freed_memory()
        found = {"descriptors": self.process.num_fds(), "threads": self.process.num_threads()}
        found |= {"children": len(self.process.children(recursive=True))}
        found |= {"tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())}
        self.moments.append({"rss_mb": self.process.memory_info().rss / devices.MB, **found})

    def figures(self) -> dict[str, list[float]]:
        """The growth of memory as a share, and how many more of each thing there are at the end than at first."""
        memory, quarter = [moment["rss_mb"] for moment in self.moments], max(1, len(self.moments) // 4)
        growth = statistics.median(memory[-quarter:]) / statistics.median(memory[:quarter]) - 1
        first, last = self.moments[0], self.moments[-1]
        more = {f"more_{name}_n": [last[name] - first[name]] for name in first if name != "rss_mb"}
        return {"rss_mb": memory, "growth_percent": [100 * growth], **more}


def watched(n: int, work: Callable[[int], None], what: str) -> dict[str, list[float]]:
    """Do work number 0 to n - 1, and look at what is held meanwhile."""
    start, watch = math.ceil(WARM_UP * n), Watch()
    looks = {start + (n - start) * i // MOMENTS for i in range(1, MOMENTS + 1)}
    for number in tqdm(range(1, n + 1), desc=what, disable=None):
        work(number - 1)
        if number in looks:
            watch.look()
    return watch.figures()


def generations(n: int, seed: int, folder: Path) -> dict[str, list[float]]:
    """Each kind in turn, in a seeded order that changes from round to round."""
    place, first, rng, different = Place(folder), {}, random.Random(seed), []
    order = itertools.chain.from_iterable(rng.sample(sorted(KINDS), len(KINDS)) for _ in itertools.count())

    def generate(_: int) -> None:
        name = next(order)
        said = KINDS[name](place)
        if first.setdefault(name, said) != said:
            different.append(name)

    figures = watched(n, generate, "generations")
    return {"generations_n": [n], "kinds_n": [len(first)], "different_n": [len(different)], **figures}


def steps(n: int, seed: int, folder: Path) -> dict[str, list[float]]:
    """LoRA in fp16 with dropout and checkpointing, held-out losses and snapshots on the way; then the first step again.

    The same step from the same snapshot has the same loss, to the bit.
    """
    model = random_model()
    lora.apply(model, lora.LoRAConfig(r=4, dropout=0.05))
    checkpoint_layers(model, [1, 3])
    options = TrainingOptions.resolve({"amp": "fp16", "optimizer": "adamw", "lr": 1e-3, "device": "cpu"})
    trainer, rng = Trainer(model, options, n + 1), random.Random(seed)
    windows = [batches([samples(2, seed=rng.randrange(1 << 30)) for _ in range(2)]) for _ in range(8)]
    torch.manual_seed(seed)
    began = snapshot.load(snapshot.save(folder, 0, trainer.snapshot(), "first", keep=1))
    first = trainer.step(windows[0])

    def train(number: int) -> None:
        trainer.step(windows[number % len(windows)])
        if number % 20 == 19:
            evaluate(trainer, windows[0][:1])
            snapshot.save(folder, number, trainer.snapshot(), "run", keep=2)

    figures = watched(n, train, "steps")
    trainer.restore(began)
    is_equal = trainer.step(windows[0]).loss == first.loss
    return {"steps_n": [n], "different_n": [int(not is_equal)], **figures}


@dataclass(frozen=True)
class Options(cli.Options):
    """Generate and train for long in one process."""

    generations: int = option(10_000, "generations of all kinds", least=4 * len(KINDS))
    steps: int = option(2_000, "training steps", least=MOMENTS)
    seed: int = option(0, "seed of the order of the kinds, and of the samples", **cli.SEEDS)
    results: str | None = option(None, "file to append two rows to; default: none")


def main(options: Options) -> None:
    left = []
    for part, work in {
        "generation": functools.partial(generations, options.generations),
        "training": functools.partial(steps, options.steps),
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = work(options.seed, Path(folder))
        shown = {name: statistics.median(values) for name, values in runs.items()}
        print(f"{part:<12}", ", ".join(f"{name} {value:.6g}" for name, value in shown.items()), flush=True)
        if options.results is not None:
            cell = {"kind": "endurance", "part": part}
            row_files.record(Path(options.results), "trust", cell, runs, torch.device("cpu"), "float32", options.seed)
        left += [f"{part}: {what}" for what in wrong(shown)]
    if left:
        raise InternalError("; ".join(left))


def wrong(figures: dict[str, float]) -> list[str]:
    """What grew, is left over or came out differently."""
    found = [f"{name} {value:g}" for name, value in figures.items() if name.startswith("more_") and value > 0]
    if figures["growth_percent"] > 100 * ALLOWED:
        found.append(f"memory grew by {figures['growth_percent']:.2f} %")
    return found + [f"{figures['different_n']:g} outputs differ"] * (figures["different_n"] > 0)


if __name__ == "__main__":
    cli.run(main)
