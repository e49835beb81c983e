"""Long texts: time to first token, time per token and memory by the length of the prompt.

    python -m benchmarks.context                          # Llama 3.2 1B, random weights; a quarter of an hour
    python -m benchmarks.context --contexts=131064        # a step with all that the model can hold
    python -m benchmarks.context --contexts=65536 --prefill_up_to=65536 --n_layers=2    # memory of a long prompt

One sequence, its KV cache in 16 bits and in int8, and transformers with the same weights beside both, all in turns. The
time to first token is that of a prompt of random ids, up to `--prefill_up_to` tokens. The time per token is that of
steps behind `context` tokens, whose keys and values are random numbers: a step takes the same time whatever they are,
and a long prompt would take most of an hour.

Memory is the peak of the process while the prompt goes through, beyond weights, cache and libraries. It hardly depends
on the number of layers, so `--n_layers=2` measures it in minutes, and nothing else: one block of which every position
is computed, and the last one.

The limit of a step: the bytes of weights and of the cache in use over the best rate of any reading kernel. The limit of
a prompt: its FLOPs over the best rate of the network's own largest products. Both rates are measured right before what
they are compared with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import hardware, inputs, rows, stopwatch, workers
from benchmarks import options as shared
from llama import KVCache, ModelArgs, Transformer, checkpoint, cli, quantization
from llama import device as devices
from llama.checkpoint import hf
from llama.cli import option
from llama.config import PRESETS
from llama.decoding import CACHES, Decoder, Generation
from llama.errors import InputError
from reports import tables

CONTEXTS = (1024, 4096, 16384, 65536)
PEER = "transformers"
Runs = dict[str, list[float]]


@dataclass(frozen=True)
class Options(shared.DeviceOptions):
    """Measure time to first token, time per token and memory by the length of the prompt."""

    ckpt_dir: str | None = option(None, "a checkpoint directory instead of random weights")
    contexts: str = option(",".join(map(str, CONTEXTS)), "tokens before the steps")
    caches: str = option(",".join(CACHES), "auto (16 bits), int8 or both", choices=CACHES, several=True)
    prefill_up_to: int = option(
        4096, "the longest prompt that goes through the network; longer ones are made up", least=0
    )
    steps: int = option(8, "that are timed together", least=1)
    n_layers: int | None = option(
        None, "blocks of a model of which memory alone is measured; default: all, and time", least=2
    )
    against: str = option(PEER, "what is measured beside it, if it is installed", choices=(PEER, "none"))
    dtype: str = option("auto", shared.HALF_DTYPE)
    repeats: int = option(3, "timed runs of each cell", least=1)
    figures: str | None = option(None, shared.FIGURES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_layers is not None and self.ckpt_dir is not None:
            raise InputError(f"n_layers={self.n_layers}: a checkpoint has its own; leave out one of the two")

    @property
    def sizes(self) -> list[int]:
        return shared.sizes_of(self.contexts, "contexts")


def main(options: Options) -> None:
    """Measure every context with every cache, keep the rows, and show the table."""
    device, dtype = devices.resolve_half(options.device, options.dtype)
    path, contexts = options.results_file("context"), options.sizes
    args = args_of(options)
    if max(contexts) + options.steps > args.trained_context:
        most = f"more than the model's {args.trained_context:,} positions"
        raise InputError(f"contexts={options.contexts} steps={options.steps}: {most}; lower one")
    workers.warm_libraries(device, dtype)
    before = stopwatch.memory_baseline(device)
    if options.ckpt_dir is None:
        name, model = options.model, Transformer.random(args, dtype, device, options.seed).eval()
    else:
        name, model = checkpoint.locate(options.ckpt_dir).name, checkpoint.load(options.ckpt_dir, dtype, device).eval()
    decoders = {kind: Decoder(model, "auto", kind) for kind in options.caches.split(",")}
    place = {"model": name, "n_layers": args.n_layers, "steps": options.steps}
    peaks = {
        (context, kind): peak_memory(decoder, context, before)
        for context in tqdm([n for n in contexts if n <= options.prefill_up_to], desc="memory", unit="context")
        for kind, decoder in decoders.items()
    }
    measured = {}
    if options.n_layers is None:
        peer, order = peer_of(model, options), random.Random(options.seed)
        for context in tqdm(contexts, desc="time", unit="context"):
            with contextlib.ExitStack() as still_open:
                sides = {
                    kind: still_open.enter_context(Ours.start(d, context, options)) for kind, d in decoders.items()
                }
                sides |= {} if peer is None else {PEER: Theirs(peer, context, options)}
                found = take_turns(sides, model, context, options, order)
            measured |= {(context, kind): values for kind, values in found.items()}
    found = []
    for context, kind in dict.fromkeys([*measured, *peaks]):
        cell = {**place, "context": context, "engine": PEER if kind == PEER else "llama"}
        cell |= {"cache": kind if kind == "int8" else devices.dtype_name(dtype)}
        cell |= {"decoding": "peer" if kind == PEER else decoders[kind].name}
        values = measured.get((context, kind), {}) | peaks.get((context, kind), {})
        found.append(rows.record(path, "context", cell, values, device, devices.dtype_name(dtype), options.seed))
    shared.finish(path, "context", found, tables.context(found), options.figures)


def args_of(options: Options) -> ModelArgs:
    """The shape of the model that the options ask for."""
    if options.ckpt_dir is not None:
        return checkpoint.read_args(options.ckpt_dir)
    args = PRESETS[options.model]
    return dataclasses.replace(args, n_layers=min(options.n_layers or args.n_layers, args.n_layers))


def fill(cache: KVCache) -> None:
    """Random keys and values in every slot, in all layers the same."""
    for name in cache.parts:
        values = getattr(cache, name)
        if name.endswith("scales"):
            values.fill_(1 / 64)
        elif values.dtype == torch.int8:
            values[0].random_(-127, 128)
        else:
            values[0].normal_()
        values[1:] = values[:1]


def bytes_of(cache: KVCache) -> int:
    return sum(getattr(cache, name).nbytes for name in cache.parts)


@torch.no_grad()
def peak_memory(decoder: Decoder, context: int, before: int) -> Runs:
    """What the process holds at most while a prompt goes through, beyond `before`, weights and cache, in MB."""
    device = decoder.model.norm.weight.device
    with decoder.start(1, context) as run:
        fill(run.cache)  # so that all of it is there
        tokens, last = prompt_of(decoder.model, context)
        held = before + hardware.weight_bytes(decoder.model) + bytes_of(run.cache)
        _, measured = stopwatch.measure(lambda: run.last_logits(tokens, last), device)
    return {name: [value] for name, value in measured.peak_over(held).items()}


def prompt_of(model: Transformer, length: int) -> tuple[Tensor, Tensor]:
    """Random ids [1, T], and the index of the last one, [1]."""
    device = model.norm.weight.device
    tokens = torch.tensor(inputs.random_prompts(model.args.vocab_size, 1, length, 0), device=device)
    return tokens, torch.tensor([length - 1], device=device)


# Sides: each reads a prompt, and takes steps behind `context` tokens


@dataclass(frozen=True)
class Ours:
    """This package, with a cache that stays."""

    run: Generation
    context: int
    steps: int

    @classmethod
    @contextlib.contextmanager
    def start(cls, decoder: Decoder, context: int, options: Options) -> Iterator[Ours]:
        with decoder.start(1, context + options.steps) as run:
            fill(run.cache)
            yield cls(run, context, options.steps)

    def read(self) -> None:
        self.run.last_logits(*prompt_of(self.run.model, self.context)).argmax(-1).tolist()

    def prepare(self) -> Callable[[], None]:
        """Steps to be timed."""
        positions = [torch.tensor([[self.context + i]], device=self.run.cache.k.device) for i in range(self.steps)]

        def work() -> None:
            token = torch.zeros_like(positions[0])
            for pos in positions:
                token = self.run.step(token, pos)[:, -1].argmax(-1, keepdim=True)

        return work

    def cache_bytes(self) -> float:
        """What a step reads of the cache, half of the steps done."""
        return bytes_of(self.run.cache) * (self.context + self.steps / 2) / self.run.cache.max_len


@dataclass(frozen=True)
class Theirs:
    """transformers, with its default cache."""

    model: Any
    context: int
    options: Options

    def read(self) -> None:
        config = self.model.config
        ids = torch.tensor(inputs.random_prompts(config.vocab_size, 1, self.context, 0), device=self.model.device)
        self.model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    def prepare(self) -> Callable[[], None]:
        from transformers import DynamicCache

        config, cache = self.model.config, DynamicCache()
        shape = (1, config.num_key_value_heads, self.context, config.head_dim)
        keys, values = torch.randn((2, *shape), dtype=self.model.dtype, device=self.model.device)
        for layer in range(config.num_hidden_layers):
            cache.update(keys, values, layer)

        def work() -> None:
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
            for _ in range(self.options.steps):
                found = self.model(token, past_key_values=cache, use_cache=True)
                token = found.logits[:, -1].argmax(-1, keepdim=True)

        return work


def peer_of(model: Transformer, options: Options) -> Any:
    """transformers' model with the very weights of ours; None where it is left out, which a line says.

    Pairs of rows that it would rotate stand in a different order, so its texts are not ours; its times are.
    """
    if options.against == "none":
        return None
    if quantization.quantization_of(model) is not None:
        print(f"{PEER} does not have these weights: it is left out")
        return None
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print(f"{PEER} is not installed: it is left out")
        return None
    args, device = model.args, model.norm.weight.device
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.trained_context,
        tie_word_embeddings=args.tie_word_embeddings,
        attn_implementation="sdpa",
        dtype=model.dtype,
    )
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    names = hf.names_of(args)
    theirs.load_state_dict({names[name]: w for name, w in model.state_dict().items()}, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(device)
    return theirs.eval()


@torch.no_grad()
def take_turns(
    sides: dict[str, Any], model: Transformer, context: int, options: Options, order: random.Random
) -> dict[str, Runs]:
    """The metrics of each side: prompts and steps of all of them in turns, each with the limit of the same minute."""
    found: dict[str, Runs] = {name: {} for name in sides}
    for repeat in range(-1, options.repeats):
        for name in order.sample(list(sides), len(sides)):
            reads = context <= options.prefill_up_to and repeat >= 0
            values = prompt_metrics(sides[name], model, context) if reads else {}
            values |= step_metrics(sides[name], model, options.steps)
            for metric, value in values.items() if repeat >= 0 else ():  # the first is to warm up
                found[name].setdefault(metric, []).append(value)
    return found


def prompt_metrics(side: Any, model: Transformer, context: int) -> dict[str, float]:
    rate = max(hardware.product_rate(model).values())
    measured = {"ttft_s": seconds(side.read, model), "floor_ttft_s": model.args.forward_flops(context) / rate}
    over = measured["ttft_s"] / measured["floor_ttft_s"]
    return {**measured, "ttft_over_floor_x": over, "product_tflop_s": rate / 1e12}


def step_metrics(side: Any, model: Transformer, steps: int) -> dict[str, float]:
    work = side.prepare()
    if not isinstance(side, Ours):
        return {"tpot_s": seconds(work, model) / steps}
    rate = max(hardware.read_bandwidth(model).values())
    n_bytes = hardware.decode_bytes(model, 1, 0) + side.cache_bytes()
    measured = {"tpot_s": seconds(work, model) / steps, "floor_tpot_s": n_bytes / rate}
    over = measured["tpot_s"] / measured["floor_tpot_s"]
    return {**measured, "tpot_over_floor_x": over, "step_bytes_gb": n_bytes / 1e9, "read_gb_s": rate / 1e9}


def seconds(work: Callable[[], None], model: Transformer) -> float:
    device = model.norm.weight.device
    devices.synchronize(device)
    began = time.perf_counter()
    work()
    devices.synchronize(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    cli.run(main)
