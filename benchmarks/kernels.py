"""Each kernel beside the plain PyTorch that it equals: the time of both, the bytes, and whether it pays.

    python -m benchmarks.kernels                                        # Llama 3.2 1B's shapes, 512 tokens; minutes
    python -m benchmarks.kernels --model=tiny --tokens=64 --repeats=3   # the embedded model's, in seconds
    python -m benchmarks.kernels --parts=train                          # some of it

    decode   the seven matrix products of a block, with weights of bfloat16, int8 and int4, in a decode step: norms and
             attention over one position, which a step has between them, are in the kernel's time. Plain: F.linear,
             torch._weight_int8pack_mm and, of int4, slabs of rows that are widened and multiplied
    prefill  what lies between the products of a prompt (llama/kernels/cpu/prefill.py)
    train    what lies between those of a lean training step (llama/kernels/cpu/train_ops.py); plain: the same function
             without its library
    gpu      kernels/triton_ops.py, on a GPU and in place of the others there: what lies between the products of a
             decode step, a hundred times over, and products with int8 and int4 weights; plain: the operations of
             model.py, slabs of rows. Both are recorded as CUDA graphs, as a step is

Both take turns in shuffled order, in one process. Activations are written anew before each run, as by the operation
before; weights come from memory: more of them pass by before they come again than a cache holds, or the caches are
filled with others first. Before anything is timed, results are compared. What proves equality is the test that each
row names.

Where a machine has no kernels, their plain twins are measured alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks import hardware as floors
from benchmarks import rows as row_files
from benchmarks import stopwatch
from benchmarks.workers import random_codes
from llama import KVCache, ModelArgs, Transformer, cli
from llama import device as devices
from llama.config import PRESETS
from llama.decoding import EagerStep, record
from llama.errors import InputError
from llama.kernels import gpu
from llama.kernels.cpu import decode_step, train_ops
from llama.lora import LoRAConfig
from llama.model import RMSNorm, apply_rope, rope_frequencies, rope_table
from llama.quantization import Quantization
from llama.training import lean_loss
from reports import tables
from reports.render import markdown

RESULTS = Path(__file__).parents[1] / "reports" / "results" / "kernels.jsonl"
CPU, BF16 = torch.device("cpu"), torch.bfloat16
PARTS = {"cpu": ("decode", "prefill", "train"), "cuda": ("gpu",)}
NEEDS = {
    "cpu": "Linux, AVX-512 with bfloat16, AMX except for train, and a C compiler",
    "cuda": f"Triton, and compute capability {'.'.join(map(str, gpu.OLDEST))}",
}
ROWS = (1, 16)  # of x in a decode step: one sequence, and as many as the kernel takes at once
GRAPH_CALLS = 100  # of an operation that is far shorter than a replay takes to begin
READ_BYTES = 1 << 28  # that a run goes through, where weights are read: caches hold 100 MB at most
QUANTIZED = {"int8": Quantization(8), "int4": Quantization(4)}
ADAPTERS = LoRAConfig()  # the course's: r 16, alpha 32, dropout 0.05
VOCAB = 16  # of the models that lend their blocks: the least that the kernel takes
SAME = 1 / 16  # of the norm of a result: tells another operation from another rounding, and no more
Draw = Callable[..., Tensor]  # random bfloat16 of a shape


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation in two forms, of the same operands.

    operands: given to both, as fresh copies. moved: bytes that it cannot avoid to read and write. count: how often one
    call of the kernel does it, plain_count: one of plain. is_cold: its operands are in no cache when it runs. kernel:
    None where this machine has none.
    """

    part: str
    name: str
    shape: str
    equality: str
    plain: Callable[..., Any]
    kernel: Callable[..., Any] | None
    moved: int
    operands: tuple[Tensor | None, ...] = ()
    count: int = 1
    plain_count: int = 1
    is_cold: bool = False
    weights: str | None = None
    rows: int | None = None

    def cell(self, model: str, engine: str) -> dict[str, Any]:
        """How a row names it."""
        names = {"model": model, "part": self.part, "operation": self.name, "shape": self.shape, "engine": engine}
        kind = {"weights": self.weights, "rows": self.rows} if self.weights else {}
        return {**names, **kind, "equality": self.equality}


def main(
    *,
    model: str = "llama3.2-1b",
    tokens: int = 512,
    parts: str | None = None,
    repeats: int = 11,
    seed: int = 1,
    device: str = "auto",
    results: str | None = None,
) -> None:
    """Measure each kernel beside the plain PyTorch that it equals.

    Args:
        model: whose shapes: llama3.2-1b, llama3.2-3b, llama3.1-8b, llama2-7b, tiny or tiny-draft.
        tokens: of a training step and of a prompt.
        parts: of decode, prefill and train on a CPU, gpu on a GPU; default: all of the device.
        repeats: timed runs of each form.
        seed: of operands, and of the order of the runs.
        device: auto, cpu, cuda or cuda:N.
        results: file that the measured rows are appended to; default: reports/results/kernels.jsonl.
    """
    cli.require_one_of("model", model, PRESETS)
    cli.require_at_least(1, tokens=tokens, repeats=repeats)
    place, dtype = devices.resolve(device)
    dtype = BF16 if place.type == "cpu" else dtype
    args, known = PRESETS[model], PARTS[place.type]
    wanted = known if parts is None else cli.choices("parts", parts, known)
    if tokens > args.trained_context:
        raise InputError(f"--tokens={tokens}: more positions than the {args.trained_context:,} of {model}")
    path = Path(results) if results is not None else RESULTS
    row_files.require_writable(path)
    if without := [part for part in wanted if library_of(part, place) is None]:
        needs = f"they need {NEEDS[place.type]}"
        print(f"no kernels here for {', '.join(without)} ({needs}): only their plain twins are measured")
    rows = []
    with torch.no_grad():
        for operation, runs in measure(args, tokens, wanted, repeats, seed, place, dtype):
            for engine, values in runs.items():
                by_name = {name: [run[name] for run in values] for name in values[0]}
                cell = operation.cell(model, engine)
                name = str(dtype).removeprefix("torch.")
                rows.append(row_files.record(path, "kernels", cell, by_name, place, name, seed))
    print(markdown(tables.kernels(rows)))
    print(f"rows appended to {path}")


def library_of(part: str, device: torch.device) -> Any:
    """The kernels of a part; None where this machine has none."""
    if part == "gpu":
        return gpu.ops(device)
    return train_ops.library() if part == "train" else decode_step.library()


def measure(
    args: ModelArgs,
    tokens: int,
    wanted: Sequence[str],
    repeats: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[Operation, dict[str, list[dict[str, float]]]]]:
    """Each operation with the runs of each of its forms, "kernel" and "plain". Call under torch.no_grad()."""
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    reader = Transformer.random(some_blocks(args, 16), dtype, device, seed).eval()
    with tqdm(desc="operations", unit="", file=sys.stderr) as bar:
        for part in (part for part in PARTS[device.type] if part in wanted):
            if part == "train":  # last: this cannot be taken back, and only a lean step is done like this
                devices.return_freed_memory()
            for group in groups_of(part, args, reader, tokens, draw, seed):
                yield from zip(group, take_turns(group, reader, repeats, order), strict=True)
                bar.update(len(group))


def groups_of(
    part: str, args: ModelArgs, reader: Transformer, tokens: int, draw: Draw, seed: int
) -> Iterator[list[Operation]]:
    """The operations of a part; those in one list are compared with each other."""
    if part in ("decode", "gpu"):
        yield from (decode_operations if part == "decode" else gpu_operations)(args, reader, draw, seed)
    else:
        operations = prefill_operations if part == "prefill" else train_operations
        yield from ([operation] for operation in operations(args, tokens, draw))


def take_turns(
    group: Sequence[Operation], reader: Transformer, repeats: int, order: random.Random
) -> list[dict[str, list[dict[str, float]]]]:
    """The runs of each form of each operation of a group, with what follows from those of the same round."""
    sides = [(i, name) for i, one in enumerate(group) for name in ("kernel", "plain") if getattr(one, name)]
    runs: list[dict[str, list[dict[str, float]]]] = [
        {name: [] for j, name in sides if j == i} for i in range(len(group))
    ]
    for _ in range(repeats):
        read = max(floors.read_bandwidth(reader).values())
        seconds = {side: time_of(group[side[0]], side[1], reader) for side in order.sample(sides, len(sides))}
        for i, name in sides:
            one, run_s = group[i], seconds[i, name]
            values = {"run_s": run_s, "moved_mb": one.moved / devices.MB, "moved_gb_s": one.moved / run_s / 1e9}
            values |= {"read_gb_s": read / 1e9, "of_reading_x": one.moved / run_s / read}
            if name == "kernel":
                values["plain_over_kernel_x"] = seconds[i, "plain"] / run_s
                if one.weights in QUANTIZED:  # the first of a group has weights of bfloat16
                    values["linear_over_kernel_x"] = seconds[0, "plain"] / run_s
            runs[i][name].append(values)
    return runs


def time_of(operation: Operation, side: str, reader: Transformer) -> float:
    """Seconds that one form of an operation takes for itself, its operands just written, or in no cache."""
    fresh = [one if one is None else one.clone() for one in operation.operands]
    if operation.is_cold:
        floors.read_bandwidth(reader)
    function = getattr(operation, side)
    seconds = stopwatch.measure(lambda: function(*fresh), reader.norm.weight.device)[1].seconds
    return seconds / (operation.count if side == "kernel" else operation.plain_count)


def require_same(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise InputError where two forms do not do the same: their times would mean nothing."""
    for ours, theirs in zip(found, expected, strict=True):
        if not (ours.double() - theirs.double()).norm() <= SAME * theirs.double().norm():
            raise InputError(f"{name}: the kernel's result differs from that of plain PyTorch; nothing more is timed")


def compared(
    part: str,
    name: str,
    shape: str,
    equality: str,
    kernel: Callable[..., Any] | None,
    plain: Callable[..., Any],
    *operands: Tensor | None,
    is_cold: bool = False,
) -> Operation:
    """An operation whose forms have run once and done the same. What it moves: its operands and results, each once."""

    def results(function: Callable[..., Any]) -> Sequence[Tensor]:
        found = function(*(one if one is None else one.clone() for one in operands))
        return found if isinstance(found, tuple) else (found,)

    expected = results(plain)
    if kernel is not None:
        require_same(name, results(kernel), expected)
    moved = sum(tensor.nbytes for tensor in (*operands, *expected) if tensor is not None)
    return Operation(part, name, shape, equality, plain, kernel, moved, operands, is_cold=is_cold)


# decode: matrix products


def some_blocks(args: ModelArgs, bits: int) -> ModelArgs:
    """The shape with as few blocks as give READ_BYTES of weights, or with all that it has; and hardly a vocabulary."""
    enough = math.ceil(READ_BYTES / (args.block_linear_params() * bits / 8))
    return dataclasses.replace(args, n_layers=min(args.n_layers, enough), vocab_size=VOCAB, tie_word_embeddings=True)


def decode_operations(args: ModelArgs, reader: Transformer, draw: Draw, seed: int) -> Iterator[list[Operation]]:
    """For 1 and for 16 rows, the products of a block with weights of each format; bfloat16 is the first."""
    models = {"bf16": reader}
    for name, config in QUANTIZED.items():
        models[name] = random_codes(some_blocks(args, config.bits), config, CPU, BF16, seed)
    for rows in ROWS:
        yield [products(name, model, rows, draw) for name, model in models.items()]


def products(weights: str, model: Transformer, rows: int, draw: Draw) -> Operation:
    """The seven products of a block, one block after the other."""
    args, name = model.args, f"products of a block, {weights}"
    layers = [[module for module in block.modules() if hasattr(module, "in_features")] for block in model.layers]
    inputs, blocks = {size: draw(rows, size) for size in (args.dim, args.ffn_dim)}, itertools.cycle(layers)

    def plain() -> None:  # one block, each time the next: a pass through all would take seconds with int4
        for matrix in next(blocks):
            matrix(inputs[matrix.in_features])

    kernel = None
    if decode_step.supports(model):
        tokens, pos = torch.arange(rows)[:, None] % VOCAB, torch.zeros(rows, 1, dtype=torch.int64)
        step, eager = (kind(model, KVCache(args, rows, 1, BF16, CPU)) for kind in (decode_step.NativeStep, EagerStep))
        require_same(name, [step(tokens, pos)], [eager(tokens, pos)])

        def kernel() -> None:
            step(tokens, pos)

    moved = sum(tensor.nbytes for matrix in layers[0] for tensor in matrix.state_dict().values())
    shape = f"x [{rows}, {args.dim}]"
    equality = "test_native_step_is_as_exact_as_the_eager_one"
    about = {"count": args.n_layers, "weights": weights, "rows": rows}
    return Operation("decode", "products of a block", shape, equality, plain, kernel, moved, **about)


# prefill: between the products of a prompt


def prefill_operations(args: ModelArgs, T: int, draw: Draw) -> Iterator[Operation]:
    """RMSNorm, the rotation of keys on their way into the cache, and SwiGLU, which has features first."""
    library, has_kernel = decode_step.library(), decode_step.library() is not None
    dim, K, D = args.dim, args.n_kv_heads, args.head_dim
    norm = RMSNorm(dim, args.norm_eps).to(BF16)
    slots = T + 1
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

    def made(name: str, shape: str, kernel: Callable, plain: Callable, *operands: Tensor) -> Operation:
        equality = "test_native_prefill_is_as_exact_as_the_eager_one"
        return compared("prefill", name, shape, equality, kernel if has_kernel else None, plain, *operands)

    weight = norm.weight.detach()
    yield made("RMSNorm", f"x [{T}, {dim}]", norm_kernel, lambda x, _: norm(x), draw(T, dim), weight)
    freqs_cis = rope_table(torch.arange(T)[None], rope_frequencies(args))
    shape = f"keys [{T}, {K}, {D}]"
    yield made("RoPE into the cache", shape, rotate_kernel, rotate_plain, draw(T, K * D), freqs_cis)
    gate, up = draw(args.ffn_dim, T), draw(args.ffn_dim, T)
    shape = f"gate, up [{args.ffn_dim}, {T}]"
    yield made("SwiGLU", shape, swiglu_kernel, lambda gate, up: F.silu(gate) * up, gate, up)


# train: between the products of a lean step


def without(module: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as it is where `module.name`, which finds the kernels, finds none."""

    def plain(*operands: Tensor | None) -> Any:
        find = getattr(module, name)
        setattr(module, name, lambda *_: None)
        try:
            return function(*operands)
        finally:
            setattr(module, name, find)

    return plain


def trained(
    function: Callable[..., Any], name: str, shape: str, equality: str, *operands: Tensor | None, is_cold: bool = False
) -> Operation:
    """An operation of train_ops beside itself without its library."""
    kernel = function if train_ops.library() is not None else None
    return compared(
        "train", name, shape, equality, kernel, without(train_ops, "library", function), *operands, is_cold=is_cold
    )


def train_operations(args: ModelArgs, T: int, draw: Draw) -> Iterator[Operation]:
    """All of train_ops, in the shapes in which a lean step of T tokens has them."""
    dim, ffn, heads = args.dim, args.ffn_dim, (args.n_heads, args.head_dim)
    x, dy, weight, shape = draw(T, dim), draw(T, dim), draw(dim), f"x [{T}, {dim}]"
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + args.norm_eps)

    def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return train_ops.rms_norm(x, weight, args.norm_eps, BF16)

    def norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return train_ops.rms_norm_backward(x, weight, inverse, dy, True)

    yield trained(norm, "rms_norm", shape, "test_rms_norm", x, weight)
    yield trained(norm_backward, "rms_norm_backward", shape, "test_rms_norm", x, weight, inverse, dy)
    gate, up, d = (draw(T, ffn) for _ in range(3))
    wide = f"gate, up [{T}, {ffn}]"
    yield trained(train_ops.swiglu, "swiglu", wide, "test_swiglu", gate, up)
    yield trained(train_ops.swiglu_backward, "swiglu_backward", wide, "test_swiglu", d, gate, up)
    freqs_cis = rope_table(torch.arange(T)[None], rope_frequencies(args))
    queries = draw(1, T, *heads)

    def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
        return train_ops.rotate(x, freqs_cis, 1)

    yield trained(rotate, "rotate", f"queries [{T}, {heads[0]}, {heads[1]}]", "test_rotate", queries, freqs_cis)
    yield from lora_operations(x, dy, draw)
    yield from loss_operations(args, T, draw)

    def sgd(weight: Tensor, gradient: Tensor) -> Tensor:
        train_ops.sgd_(weight, gradient, 1e-5)
        return weight

    w1, shape = draw(ffn, dim).float(), f"fp32 weight [{ffn}, {dim}]"
    yield trained(sgd, "sgd_", shape, "test_sgd", w1, draw(ffn, dim), is_cold=True)


def lora_operations(x: Tensor, y: Tensor, draw: Draw) -> Iterator[Operation]:
    """The three products with an adapter's matrix, dropout where the forward pass has it."""
    rank, (T, dim) = ADAPTERS.r, x.shape
    shape, a, low = f"x [{T}, {dim}], rank {rank}", draw(rank, dim).float(), draw(T, rank).float()
    drop = draw(T, dim).float().abs() < 0.0627  # of a normal variable, 5 % of the draws

    def down(x: Tensor, drop: Tensor, a: Tensor) -> Tensor:
        return train_ops.lora_down(x, drop, a, 1 / (1 - ADAPTERS.dropout))

    def up(y: Tensor, low: Tensor, a: Tensor) -> Tensor:
        return train_ops.lora_up_(y, low, a, None, ADAPTERS.alpha / rank)

    def outer(low: Tensor, x: Tensor, drop: Tensor) -> Tensor:
        return train_ops.lora_outer(low, x, drop, 1.0)

    yield trained(down, "lora_down", shape, "test_lora", x, drop, a)
    yield trained(up, "lora_up_", shape, "test_lora", y, low, a)
    yield trained(outer, "lora_outer", shape, "test_lora", low, x, drop)


def loss_operations(args: ModelArgs, T: int, draw: Draw) -> Iterator[Operation]:
    """Of the logits that lie together: a slice of the vocabulary."""
    width = min(lean_loss.SLICE, args.vocab_size)
    z, labels = draw(T, width), torch.arange(T) % width
    lse = train_ops.logsumexp(z)

    def gradient(z: Tensor, lse: Tensor, labels: Tensor) -> Tensor:
        return train_ops.softmax_gradient_(z, lse, labels, lean_loss.P_SCALE)

    shape = f"logits [{T}, {width}]"
    yield trained(train_ops.logsumexp, "logsumexp", shape, "test_softmax", z)
    yield trained(gradient, "softmax_gradient_", shape, "test_softmax", z, lse, labels)


# gpu: what a decode step has between its products, and products with codes


def recorded(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`work` as a CUDA graph, as a step is: what Python takes to launch it does not count. On a CPU, work itself."""
    return work if device.type == "cpu" else record(work, device)[0].replay


def gpu_operations(args: ModelArgs, reader: Transformer, draw: Draw, seed: int) -> Iterator[list[Operation]]:
    """For 1 and for 16 rows, what is fused, and the products of a block; those in 16 bits, the first, are PyTorch's."""
    device, dtype = reader.norm.weight.device, reader.dtype
    models = {str(dtype).removeprefix("torch."): reader}
    for name, config in QUANTIZED.items():
        models[name] = random_codes(some_blocks(args, config.bits), config, device, dtype, seed)
    for rows in ROWS:
        yield from ([operation] for operation in fused_operations(args, device, rows, draw))
        yield [gpu_products(name, model, rows, draw) for name, model in models.items()]


def repeated(
    name: str, rows: int, equality: str, kernel: Callable | None, plain: Callable, *operands: Tensor
) -> Operation:
    """An operation on rows that the one before left in the caches, GRAPH_CALLS times a run."""
    device, shape = operands[0].device, f"x [{rows}, {operands[0].shape[-1]}]"
    once = compared("gpu", name, shape, equality, kernel, plain, *operands)

    def many(function: Callable) -> Callable[[], Any]:
        return recorded(lambda: [function(*operands) for _ in range(GRAPH_CALLS)], device)

    forms = {"plain": many(plain), "kernel": None if kernel is None else many(kernel)}
    counts = {"count": GRAPH_CALLS, "plain_count": GRAPH_CALLS}
    return dataclasses.replace(once, **forms, **counts, operands=(), rows=rows)


def fused_operations(args: ModelArgs, device: torch.device, rows: int, draw: Draw) -> Iterator[Operation]:
    """Beside the operations of model.py and cache.py that each takes the place of."""
    ops, dim, (H, K, D) = gpu.ops(device), args.dim, (args.n_heads, args.n_kv_heads, args.head_dim)
    norm = RMSNorm(dim, args.norm_eps).to(device, draw(1).dtype)
    cache = KVCache(args, rows, 2, norm.weight.dtype, device, n_layers=1)
    pos = torch.ones(rows, 1, dtype=torch.int64, device=device)
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

    def form(kernel: Callable) -> Callable | None:
        return None if ops is None else kernel

    x = draw(rows, 1, dim)
    weight = norm.weight.detach()
    yield repeated(
        "sum and RMSNorm", rows, "test_add_rms_norm", form(norm_kernel), norm_plain, x, draw(*x.shape), weight
    )
    q, k, v = (draw(rows, 1, heads * D) for heads in (H, K, K))
    yield repeated("RoPE into the cache", rows, "test_rotate_and_store", form(rotate_kernel), rotate_plain, q, k, v)
    gate, up = draw(rows, 1, args.ffn_dim), draw(rows, 1, args.ffn_dim)
    swiglu = form(lambda gate, up: ops.silu_mul(gate, up))
    yield repeated("SwiGLU", rows, "test_silu_mul", swiglu, lambda gate, up: F.silu(gate) * up, gate, up)


def gpu_products(weights: str, model: Transformer, rows: int, draw: Draw) -> Operation:
    """The seven products of each block, one after the other; 16-bit ones have no kernel of ours."""
    args, device, is_quantized = model.args, model.norm.weight.device, weights in QUANTIZED
    layers = [[module for module in block.modules() if hasattr(module, "in_features")] for block in model.layers]
    inputs = {size: draw(rows, size) for size in (args.dim, args.ffn_dim)}

    def work() -> list[Tensor]:
        return [matrix(inputs[matrix.in_features]) for layer in layers for matrix in layer]

    kernel = None
    if is_quantized and gpu.ops(device) is not None and gpu.ops(device).multiplies(inputs[args.dim]):
        require_same(f"products of a block, {weights}", work(), without(gpu, "ops", work)())
        kernel = recorded(work, device)
    moved = sum(tensor.nbytes for matrix in layers[0] for tensor in matrix.state_dict().values())
    about = {"count": args.n_layers, "plain_count": args.n_layers, "weights": weights, "rows": rows}
    plain = recorded(without(gpu, "ops", work), device)
    shape = f"x [{rows}, {args.dim}]"
    return Operation("gpu", "products of a block", shape, "test_products", plain, kernel, moved, **about)


if __name__ == "__main__":
    cli.run(main)
