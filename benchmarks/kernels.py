"""Each kernel beside the plain PyTorch that it equals: the time of both, the bytes, and whether it pays.

    python -m benchmarks.kernels                                        # Llama 3.2 1B's shapes, 512 tokens; minutes
    python -m benchmarks.kernels --model=tiny --tokens=64 --repeats=3   # the embedded model's, in seconds
    python -m benchmarks.kernels --parts=train                          # some of it

    decode   the seven matrix products of a block, with weights of bfloat16, int8 and int4, in a decode step: norms and
             attention over one position, which a step has between them, are in the kernel's time. Plain: F.linear,
             torch._weight_int8pack_mm and, for int4, slabs of rows that are widened and multiplied
    prefill  what lies between the products of a prompt (llama/kernels/cpu/prefill.py)
    train    what lies between those of a lean training step (llama/kernels/cpu/train_ops.py); plain: the same function
             without its library
    gpu      llama/kernels/gpu/triton_ops.py, on a GPU and in place of the others there: what lies between the products
             of a decode step, a hundred times over, and products with int8 and int4 weights; plain: the operations of
             model.py, slabs of rows. Both are recorded as CUDA graphs, as a step is

Nearly all of these move more bytes than they multiply, so bandwidth is their limit: the table relates the bytes that an
operation cannot avoid to the best rate of reading in the same round.

Both forms take turns in shuffled order, in one process. Activations are written anew before each run, as by the
operation before; weights come from memory: more of them pass by before they come again than a cache holds, or the
caches are filled with others first. Before anything is timed, results are compared; each row names the test that
proves them equal. Where a machine has no kernels, their plain twins are measured alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import hardware, rows, stopwatch
from benchmarks import options as shared
from benchmarks.inputs import QUANTIZED, random_codes
from llama import KVCache, ModelArgs, Transformer, cli
from llama import device as devices
from llama.cli import option
from llama.config import PRESETS
from llama.decoding import EagerStep, record
from llama.errors import InputError, InternalError
from llama.kernels import gpu
from llama.kernels.cpu import decode_step, prefill, prefill_attention, train_ops
from llama.lora import LoRAConfig
from llama.model import RMSNorm, apply_rope, attend, rope_frequencies, rope_table
from llama.training import lean_loss
from reports import tables

CPU, BF16 = torch.device("cpu"), torch.bfloat16
PARTS = {"cpu": ("decode", "prefill", "train"), "cuda": ("gpu",)}
NEEDS = {
    "cpu": "Linux, AVX-512 with VNNI and bfloat16, and a C compiler",
    "cuda": f"Triton, and compute capability {'.'.join(map(str, gpu.OLDEST))}",
}
BATCH_SIZES = (1, 16)  # of a decode step: one sequence, and as many as the kernel takes at once
GRAPH_CALLS = 100  # of an operation that is far shorter than a replay takes to begin
READ_BYTES = 1 << 28  # that a run goes through, where weights are read: caches hold 100 MB at most
ADAPTERS = LoRAConfig()  # the course's: r 16, alpha 32, dropout 0.05
VOCAB = 16  # of the models that lend their blocks: next to no time goes into the head
SAME = 1 / 16  # of the norm of a result: tells a different operation from a different rounding, and no more
Draw = Callable[..., Tensor]  # random bfloat16 of a shape
Form = Callable[..., Any]  # an operation: operands to results
FormRuns = dict[str, list[dict[str, float]]]  # what was measured, by form: "kernel" and "plain"


@dataclass(frozen=True)
class Options(shared.DeviceOptions):
    """Measure each kernel beside the plain PyTorch that it equals."""

    model: str = option("llama3.2-1b", f"whose shapes: {', '.join(PRESETS)}", choices=PRESETS)
    tokens: int = option(512, "of a training step and of a prompt", least=1)
    parts: str | None = option(
        None,
        "of decode, prefill and train on a CPU, gpu on a GPU; default: all of the device",
        choices=itertools.chain(*PARTS.values()),
        several=True,
    )
    repeats: int = option(11, "timed runs of each form", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = PRESETS[self.model].trained_context
        if self.tokens > longest:
            raise InputError(f"tokens={self.tokens}: more positions than the {longest:,} of {self.model}")


@dataclass(frozen=True)
class Operation:
    """An operation in two forms, with the same operands.

    about: what rows call it, and the test that proves the forms equal. kernel: None where this machine has none. moved:
    bytes that it cannot avoid to read and write. operands: given to both, as fresh copies. counts: how often a call of
    the kernel does it, and one of plain. is_cold: its operands are in no cache when it runs.
    """

    about: dict[str, Any]
    kernel: Form | None
    plain: Form
    moved: int
    operands: tuple[Tensor, ...] = ()
    counts: tuple[int, int] = (1, 1)
    is_cold: bool = False


def named(part: str, operation: str, shape: str, equality: str, **products: Any) -> dict[str, Any]:
    return {"part": part, "operation": operation, "shape": shape, **products, "equality": equality}


def main(options: Options) -> None:
    """Measure every operation in both forms, keep their rows, and show the table."""
    device, dtype = devices.resolve_half(options.device)
    known = PARTS[device.type]
    parts = known if options.parts is None else options.parts.split(",")
    if not set(parts) <= set(known):
        raise InputError(f"parts={options.parts}: expected a choice of {','.join(known)}, each once")
    path = options.results_file("kernels")
    if without := [part for part in parts if library_of(part, device) is None]:
        needs = f"they need {NEEDS[device.type]}"
        print(f"no kernels here for {', '.join(without)} ({needs}): only their plain twins are measured")
    found = []
    with torch.no_grad():
        measured = operation_runs(
            PRESETS[options.model], options.tokens, parts, options.repeats, options.seed, device, dtype
        )
        for operation, forms in measured:
            for engine, runs in forms.items():
                cell = {"model": options.model, "engine": engine, **operation.about}
                name = devices.dtype_name(dtype)
                found.append(rows.record(path, "kernels", cell, rows.by_metric(runs), device, name, options.seed))
    shared.finish(path, "kernels", found, tables.kernels(found))


def library_of(part: str, device: torch.device) -> Any:
    """The kernels of a part; None where this machine has none."""
    if part == "gpu":
        return gpu.ops(device)
    return train_ops.library() if part == "train" else decode_step.library()


def operation_runs(
    args: ModelArgs,
    tokens: int,
    parts: Sequence[str],
    repeats: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[Operation, FormRuns]]:
    """Each operation with the runs of each of its forms. Call under torch.no_grad()."""
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    reader = Transformer.random(some_blocks(args, 16), dtype, device, seed).eval()
    groups: dict[str, Callable[[], Iterator[list[Operation]]]] = {
        "decode": lambda: decode_operations(args, reader, draw, seed),
        "prefill": lambda: ([one] for one in prefill_operations(args, tokens, draw)),
        "train": lambda: ([one] for one in train_operations(args, tokens, draw)),
        "gpu": lambda: gpu_operations(args, reader, draw, seed),
    }
    with tqdm(desc="operations", unit="", file=sys.stderr) as bar:
        for part in (part for part in PARTS[device.type] if part in parts):
            if part == "train":  # last: this cannot be taken back, and only a lean step is done like this
                devices.return_freed_memory()
            for group in groups[part]():
                yield from zip(group, take_turns(group, reader, repeats, order), strict=True)
                bar.update(len(group))


def take_turns(group: Sequence[Operation], reader: Transformer, repeats: int, order: random.Random) -> list[FormRuns]:
    """The runs of each form of each operation of a group, with what follows from those of the same round."""
    sides = [(i, name) for i, one in enumerate(group) for name in ("kernel", "plain") if getattr(one, name)]
    runs: list[FormRuns] = [{name: [] for j, name in sides if j == i} for i in range(len(group))]
    for _ in range(repeats):
        read = max(hardware.read_bandwidth(reader).values())
        seconds = {side: time_of(group[side[0]], side[1], reader) for side in order.sample(sides, len(sides))}
        for i, name in sides:
            one, run_s = group[i], seconds[i, name]
            values = {"run_s": run_s, "moved_mb": one.moved / devices.MB, "moved_gb_s": one.moved / run_s / 1e9}
            values |= {"read_gb_s": read / 1e9, "of_reading_x": one.moved / run_s / read}
            if name == "kernel":
                values["plain_over_kernel_x"] = seconds[i, "plain"] / run_s
                if one.about.get("weights") in QUANTIZED:  # the first of a group has weights of bfloat16
                    values["linear_over_kernel_x"] = seconds[0, "plain"] / run_s
            runs[i][name].append(values)
    return runs


def time_of(operation: Operation, side: str, reader: Transformer) -> float:
    """Seconds that one form of an operation takes for itself, its operands just written, or in no cache."""
    fresh = [operand.clone() for operand in operation.operands]
    if operation.is_cold:
        hardware.read_bandwidth(reader)
    form = getattr(operation, side)
    seconds = stopwatch.measure(lambda: form(*fresh), reader.norm.weight.device)[1].seconds
    return seconds / operation.counts[side == "plain"]


def require_same(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise InternalError where two forms do not do the same: their times would mean nothing."""
    for ours, theirs in zip(found, expected, strict=True):
        if not (ours.double() - theirs.double()).norm() <= SAME * theirs.double().norm():
            raise InternalError(
                f"{name}: the kernel's result differs from that of plain PyTorch; nothing more is timed"
            )


def compared(
    about: dict[str, Any], kernel: Form | None, plain: Form, operands: tuple[Tensor, ...], is_cold: bool = False
) -> Operation:
    """An operation whose forms have run once and done the same. What it moves: its operands and results, each once."""

    def results(form: Form) -> Sequence[Tensor]:
        found = form(*(operand.clone() for operand in operands))
        return found if isinstance(found, tuple) else (found,)

    expected = results(plain)
    if kernel is not None:
        require_same(about["operation"], results(kernel), expected)
    moved = sum(tensor.nbytes for tensor in (*operands, *expected))
    return Operation(about, kernel, plain, moved, operands, is_cold=is_cold)


def without(module: Any, name: str, form: Form) -> Form:
    """An operation as it is where `module.name`, which finds the kernels, finds none."""

    def plain(*operands: Tensor) -> Any:
        find = getattr(module, name)
        setattr(module, name, lambda *_: None)
        try:
            return form(*operands)
        finally:
            setattr(module, name, find)

    return plain


# decode: matrix products


def some_blocks(args: ModelArgs, bits: int) -> ModelArgs:
    """The shape with as few blocks as give READ_BYTES of weights, or with all that it has; and hardly a vocabulary."""
    enough = math.ceil(READ_BYTES / (args.block_linear_params() * bits / 8))
    return dataclasses.replace(args, n_layers=min(args.n_layers, enough), vocab_size=VOCAB, tie_word_embeddings=True)


def models_of(args: ModelArgs, reader: Transformer, seed: int) -> dict[str, Transformer]:
    """Weights of each format; those in 16 bits, with which the others are compared, come first."""
    device, dtype = reader.norm.weight.device, reader.dtype
    models = {"bf16" if device.type == "cpu" and dtype is BF16 else devices.dtype_name(dtype): reader}
    for name, config in QUANTIZED.items():
        models[name] = random_codes(some_blocks(args, config.bits), config, device, dtype, seed)
    return models


def matrices_of(model: Transformer) -> list[list[nn.Module]]:
    """The seven matrices of each block."""
    return [[module for module in block.modules() if hasattr(module, "in_features")] for block in model.layers]


def stored_bytes(matrices: Sequence[nn.Module]) -> int:
    return sum(tensor.nbytes for matrix in matrices for tensor in matrix.state_dict().values())


def product_names(part: str, weights: str, batch_size: int, args: ModelArgs, equality: str) -> dict[str, Any]:
    return named(
        part, "products of a block", f"x [{batch_size}, {args.dim}]", equality, weights=weights, rows=batch_size
    )


def decode_operations(args: ModelArgs, reader: Transformer, draw: Draw, seed: int) -> Iterator[list[Operation]]:
    """For 1 and for 16 sequences, the products of a block with weights of each format."""
    models = models_of(args, reader, seed)
    for batch_size in BATCH_SIZES:
        yield [products(name, model, batch_size, draw) for name, model in models.items()]


def products(weights: str, model: Transformer, batch_size: int, draw: Draw) -> Operation:
    """The seven products of a block, one block after the other."""
    args, layers = model.args, matrices_of(model)
    inputs, blocks = {size: draw(batch_size, size) for size in (args.dim, args.ffn_dim)}, itertools.cycle(layers)

    def plain() -> None:  # one block, each time the next: a pass through all would take seconds with int4
        for matrix in next(blocks):
            matrix(inputs[matrix.in_features])

    kernel = None
    if decode_step.supports(model):
        tokens = torch.arange(batch_size)[:, None] % VOCAB
        pos = torch.zeros(batch_size, 1, dtype=torch.int64)
        step, eager = (
            kind(model, KVCache(args, batch_size, 1, BF16, CPU)) for kind in (decode_step.NativeStep, EagerStep)
        )
        require_same(f"products of a block, {weights}", [step(tokens, pos)], [eager(tokens, pos)])

        def kernel() -> None:
            step(tokens, pos)

    about = product_names("decode", weights, batch_size, args, "test_native_step_is_as_exact_as_the_eager_one")
    return Operation(about, kernel, plain, stored_bytes(layers[0]), counts=(args.n_layers, 1))


# prefill: between the products of a prompt


def prefill_operations(args: ModelArgs, T: int, draw: Draw) -> Iterator[Operation]:
    """RMSNorm, the rotation of keys on their way into the cache, SwiGLU, which has features first; and attention."""
    library = decode_step.library()
    dim, K, D, slots = args.dim, args.n_kv_heads, args.head_dim, T + 1
    norm = RMSNorm(dim, args.norm_eps).to(BF16)
    caches = [torch.zeros(1, K, slots, D, dtype=BF16) for _ in range(2)]  # one for each form

    def norm_kernel(x: Tensor, weight: Tensor) -> Tensor:
        y = torch.empty_like(x)
        library.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), args.norm_eps, *x.shape)
        return y

    def rotate_kernel(x: Tensor, freqs_cis: Tensor) -> Tensor:
        library.rotate_heads(x.data_ptr(), freqs_cis.data_ptr(), caches[0].data_ptr(), 1, T, K, D, slots)
        return caches[0][:, :, :T]

    def rotate_plain(x: Tensor, freqs_cis: Tensor) -> Tensor:
        caches[1][:, :, :T] = apply_rope(x.view(1, T, K, D), freqs_cis).transpose(1, 2)
        return caches[1][:, :, :T]

    def swiglu_kernel(gate: Tensor, up: Tensor) -> Tensor:
        library.silu_mul(gate.data_ptr(), up.data_ptr(), gate.numel())
        return gate

    weight, freqs_cis = norm.weight.detach(), rope_table(torch.arange(T)[None], rope_frequencies(args))
    gate, up = draw(args.ffn_dim, T), draw(args.ffn_dim, T)
    for name, shape, kernel, plain, operands in (
        ("RMSNorm", f"x [{T}, {dim}]", norm_kernel, lambda x, _: norm(x), (draw(T, dim), weight)),
        ("RoPE into the cache", f"keys [{T}, {K}, {D}]", rotate_kernel, rotate_plain, (draw(T, K * D), freqs_cis)),
        ("SwiGLU", f"gate, up [{args.ffn_dim}, {T}]", swiglu_kernel, swiglu, (gate, up)),
    ):
        about = named("prefill", name, shape, "test_native_prefill_is_as_exact_as_the_eager_one")
        yield compared(about, kernel if library else None, plain, operands)
    if not prefill.needs_mask(D):  # else PyTorch's is what runs
        yield attention_of_prompt(args, T, draw)


def attention_of_prompt(args: ModelArgs, T: int, draw: Draw) -> Operation:
    """T queries behind three times as many keys, beside PyTorch's flash attention, which takes a mask."""
    H, K, D, start = args.n_heads, args.n_kv_heads, args.head_dim, 3 * T
    mask = torch.zeros(T, 4 * T, dtype=BF16)
    mask.masked_fill_(torch.arange(4 * T) > torch.arange(start, 4 * T)[:, None], -torch.inf)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask[None, None]).transpose(1, 2)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefill_attention.attention(q, k, v, start)

    about = named("prefill", "attention", f"q [{H}, {T}, {D}], {4 * T} keys", "test_it_is_as_exact_as_pytorchs")
    operands = draw(1, H, T, D), draw(1, K, 4 * T, D), draw(1, K, 4 * T, D)
    return compared(about, kernel, plain, operands)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


# train: between the products of a lean step


def train_operations(args: ModelArgs, T: int, draw: Draw) -> Iterator[Operation]:
    """All of train_ops beside themselves without their library, in the shapes of a lean step of T tokens."""
    dim, ffn, H, D, rank = args.dim, args.ffn_dim, args.n_heads, args.head_dim, ADAPTERS.r
    x, dy, weight = draw(T, dim), draw(T, dim), draw(dim)
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + args.norm_eps)
    gate, up, d = (draw(T, ffn) for _ in range(3))
    freqs_cis = rope_table(torch.arange(T)[None], rope_frequencies(args))
    a, low = draw(rank, dim).float(), draw(T, rank).float()
    drop = draw(T, dim).float().abs() < 0.0627  # of a normal variable, 5 % of the draws
    factor, scale = 1 / (1 - ADAPTERS.dropout), ADAPTERS.alpha / rank
    width = min(lean_loss.SLICE, args.vocab_size)  # the logits that lie together: a slice of the vocabulary
    z, labels = draw(T, width), torch.arange(T) % width
    ops, lse = train_ops, train_ops.logsumexp(z)

    def sgd(weight: Tensor, gradient: Tensor) -> Tensor:
        ops.sgd_(weight, gradient, 1e-5)
        return weight

    def softmax_gradient(z: Tensor, lse: Tensor, labels: Tensor) -> Tensor:
        return ops.softmax_gradient_(z, lse, labels, lean_loss.P_SCALE)

    norm, wide, lora = f"x [{T}, {dim}]", f"gate, up [{T}, {ffn}]", f"x [{T}, {dim}], rank {rank}"
    logits, table = f"logits [{T}, {width}]", f"fp32 weight [{ffn}, {dim}]"
    given = (x, weight, inverse, dy)
    queries, weights = draw(1, T, H, D), (draw(ffn, dim).float(), draw(ffn, dim))
    for name, shape, test, form, operands in (
        ("rms_norm", norm, "rms_norm", lambda x, w: ops.rms_norm(x, w, args.norm_eps, BF16), (x, weight)),
        ("rms_norm_backward", norm, "rms_norm", lambda *given: ops.rms_norm_backward(*given, True), given),
        ("swiglu", wide, "swiglu", ops.swiglu, (gate, up)),
        ("swiglu_backward", wide, "swiglu", ops.swiglu_backward, (d, gate, up)),
        ("rotate", f"queries [{T}, {H}, {D}]", "rotate", lambda x, f: ops.rotate(x, f, 1), (queries, freqs_cis)),
        ("lora_down", lora, "lora", lambda x, drop, a: ops.lora_down(x, drop, a, factor), (x, drop, a)),
        ("lora_up_", lora, "lora", lambda y, low, a: ops.lora_up_(y, low, a, None, scale), (dy, low, a)),
        ("lora_outer", lora, "lora", lambda low, x, drop: ops.lora_outer(low, x, drop, 1.0), (low, x, drop)),
        ("logsumexp", logits, "softmax", ops.logsumexp, (z,)),
        ("softmax_gradient_", logits, "softmax", softmax_gradient, (z, lse, labels)),
        ("sgd_", table, "sgd", sgd, weights),
    ):
        kernel, about = form if ops.library() else None, named("train", name, shape, f"test_{test}")
        yield compared(about, kernel, without(ops, "library", form), operands, is_cold=name == "sgd_")


# gpu: what a decode step has between its products, and products with codes


def recorded(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`work` as a CUDA graph, as a step is: what Python takes to launch it does not count. On a CPU, work itself."""
    return work if device.type == "cpu" else record(work, device)[0].replay


def gpu_operations(args: ModelArgs, reader: Transformer, draw: Draw, seed: int) -> Iterator[list[Operation]]:
    """For 1 and for 16 sequences, what is fused, and the products of a block; those in 16 bits are PyTorch's."""
    models = models_of(args, reader, seed)
    for batch_size in BATCH_SIZES:
        yield from ([one] for one in fused_operations(args, reader.norm.weight.device, batch_size, draw))
        yield [gpu_products(name, model, batch_size, draw) for name, model in models.items()]


def fused_operations(args: ModelArgs, device: torch.device, batch_size: int, draw: Draw) -> Iterator[Operation]:
    """Beside the operations of model.py and cache.py that each takes the place of."""
    ops, dim, (H, K, D) = gpu.ops(device), args.dim, (args.n_heads, args.n_kv_heads, args.head_dim)
    norm = RMSNorm(dim, args.norm_eps).to(device, draw(1).dtype)
    cache = KVCache(args, batch_size, 2, norm.weight.dtype, device, n_layers=1)
    pos = torch.ones(batch_size, 1, dtype=torch.int64, device=device)
    freqs_cis = rope_table(pos, rope_frequencies(args).to(device))

    def norm_kernel(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, delta, weight, args.norm_eps)

    def norm_plain(x: Tensor, delta: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, norm(total)

    def rotate_kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rotated = ops.rotate_and_store(q, k, v, freqs_cis, pos, cache.k[0], cache.v[0])
        return rotated, cache.k[0, :, :, 1], cache.v[0, :, :, 1]

    def rotate_plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (apply_rope(x.unflatten(-1, (-1, D)), freqs_cis).transpose(1, 2) for x in (q, k))
        keys, values = cache.update(0, k, v.unflatten(-1, (-1, D)).transpose(1, 2), pos)
        return q, keys[:, :, 1], values[:, :, 1]

    def drawn(*sizes: int) -> tuple[Tensor, ...]:
        return tuple(draw(batch_size, 1, size) for size in sizes)

    normed = (*drawn(dim, dim), norm.weight.detach())
    heads, gated = drawn(H * D, K * D, K * D), drawn(args.ffn_dim, args.ffn_dim)
    for name, test, kernel, plain, operands in (
        ("sum and RMSNorm", "test_add_rms_norm", norm_kernel, norm_plain, normed),
        ("RoPE into the cache", "test_rotate_and_store", rotate_kernel, rotate_plain, heads),
        ("SwiGLU", "test_silu_mul", lambda gate, up: ops.silu_mul(gate, up), swiglu, gated),
    ):
        about = named("gpu", name, f"x [{batch_size}, {operands[0].shape[-1]}]", test)
        yield repeated(compared(about, kernel if ops else None, plain, operands), device)


def repeated(once: Operation, device: torch.device) -> Operation:
    """An operation on operands that the call before left in the caches, GRAPH_CALLS times per run."""

    def many(form: Form) -> Callable[[], Any]:
        return recorded(lambda: [form(*once.operands) for _ in range(GRAPH_CALLS)], device)

    kernel = None if once.kernel is None else many(once.kernel)
    return Operation(once.about, kernel, many(once.plain), once.moved, counts=(GRAPH_CALLS, GRAPH_CALLS))


def gpu_products(weights: str, model: Transformer, batch_size: int, draw: Draw) -> Operation:
    """The seven products of each block, one after the other; 16-bit ones have no kernel of ours."""
    args, device, layers = model.args, model.norm.weight.device, matrices_of(model)
    ops, inputs = gpu.ops(device), {size: draw(batch_size, size) for size in (args.dim, args.ffn_dim)}

    def work() -> list[Tensor]:
        return [matrix(inputs[matrix.in_features]) for layer in layers for matrix in layer]

    kernel = None
    if weights in QUANTIZED and ops is not None and ops.multiplies(inputs[args.dim]):
        require_same(f"products of a block, {weights}", work(), without(gpu, "ops", work)())
        kernel = recorded(work, device)
    about = product_names("gpu", weights, batch_size, args, "test_products")
    plain, counts = recorded(without(gpu, "ops", work), device), (args.n_layers, args.n_layers)
    return Operation(about, kernel, plain, stored_bytes(layers[0]), counts=counts)


if __name__ == "__main__":
    cli.run(main)
