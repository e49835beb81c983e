"""What lies between the matrix products of a decode step, and products with int8 and int4 weights, in Triton.

    add_rms_norm       x + delta and its RMSNorm                  2 kernels and 4 passes fewer per call than in PyTorch
    rotate_and_store   queries rotated; keys rotated and values, both into the cache
    silu_mul           silu(gate) * up
    attend             attention of a few tokens to the cached positions in use, split among many programs
    int8_linear        x w^T of a few rows with weights that stay int8: each code is read once and widened in registers
    int4_linear        the same with two codes a byte

They compute in fp32 and round where PyTorch's operations do, except that int4 weights are not rounded for a single row
of bfloat16. Each wrapper names the plain PyTorch that it equals. All tensors are contiguous, except the cache's.

Import this module only where Triton is installed; `gpu.ops` does. TRITON_INTERPRET=1 runs it on a CPU, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.device import computes_bf16

FLAT_BLOCK = 1024  # values of an element-wise operation that one program takes
# Rows and columns of the weight that one program multiplies at a time with one row of x: 8,192 codes in flight. Fewer
# rows where the weight has few, so that each of a large GPU's 132 multiprocessors gets some programs.
ROW_TILES, MANY = {"few": (4, 2048), "many": (8, 1024)}, 8192
# Rows of x up to which reading the codes again for each moves less than widening them once does: 5 bytes per weight.
SINGLE_ROWS = 4
# With more rows of x: what a tile of the matrix units holds, rows of the weight and columns at a time.
MOST_ROWS, TILE_ROWS, TILE_COLUMNS = 16, 16, 256
# Attention: slots that are read at a time, and query rows, with matrix units and without, and the length of a row, that
# fit the registers beside them.
TILE_SLOTS, MOST_QUERIES, MOST_QUERIES_PLAIN, LARGEST_HEAD = 32, 32, 16, 128
# It is split into parts of LEAST_SLOTS or more, up to about two programs for each multiprocessor of a large GPU.
PROGRAMS, LEAST_SLOTS, MOST_PARTS = 256, 256, 64


@triton.jit
def _add_rms_norm(x, delta, weight, total, normed, eps, dim: tl.constexpr, BLOCK: tl.constexpr):
    """One row per program."""
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    indices = tl.program_id(0).to(tl.int64) * dim + columns
    value = tl.load(x + indices, inside, 0.0)
    if delta is not None:
        value = (value.to(tl.float32) + tl.load(delta + indices, inside, 0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + indices, value, inside)
    wide = value.to(tl.float32)
    rounded = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)).to(value.dtype)
    scale = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    tl.store(normed + indices, (rounded.to(tl.float32) * scale).to(value.dtype), inside)


@triton.jit
def _silu_mul(gate, up, y, size, BLOCK: tl.constexpr):
    indices = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = indices < size
    g = tl.load(gate + indices, inside, 0.0)
    wide = g.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(g.dtype).to(tl.float32)
    tl.store(y + indices, (silu * tl.load(up + indices, inside, 0.0).to(tl.float32)).to(g.dtype), inside)


@triton.jit
def _rotate_head(source, target, freqs_cis, D: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.arange(0, BLOCK)
    inside = pair < D // 2
    cos = tl.load(freqs_cis + 2 * pair, inside, 0.0)
    sin = tl.load(freqs_cis + 2 * pair + 1, inside, 0.0)
    x0 = tl.load(source + 2 * pair, inside, 0.0).to(tl.float32)
    x1 = tl.load(source + 2 * pair + 1, inside, 0.0).to(tl.float32)
    tl.store(target + 2 * pair, x0 * cos - x1 * sin, inside)
    tl.store(target + 2 * pair + 1, x0 * sin + x1 * cos, inside)


@triton.jit
def _rotate_and_store(
    q, k, v, freqs_cis, pos, rotated, keys, values, row_stride, head_stride,
    T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one token per program: the H query heads, then the K key heads, then the K value heads."""
    token, head = tl.program_id(0), tl.program_id(1)
    row, t = token // T, token % T
    angles = freqs_cis + token * D
    if head < H:
        _rotate_head(q + (token * H + head) * D, rotated + ((row * H + head) * T + t) * D, angles, D, BLOCK)
    else:
        head = (head - H) % K
        source = (token * K + head) * D
        slot = row.to(tl.int64) * row_stride + head * head_stride + tl.load(pos + token) * D
        if tl.program_id(1) < H + K:
            _rotate_head(k + source, keys + slot, angles, D, BLOCK)
        else:
            columns = tl.arange(0, 2 * BLOCK)
            tl.store(values + slot + columns, tl.load(v + source + columns, columns < D, 0.0), columns < D)


@triton.jit
def _attend_part(
    q, keys, values, pos, out, maxima, sums, row_stride, head_stride, scale, T, ROWS,
    K: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All query rows of one key/value head over every n-th block of its slots, whose softmax needs no pass of its own:
    sums are of exp(score - maximum so far), and shrink when a later block has a larger score.
    """
    head, part, n_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    r, s, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    row, is_query = head * ROWS + r, (r < ROWS)[:, None] & (d < D)[None, :]
    last = tl.load(pos + head // K * T + r % T, r < ROWS, -1).to(tl.int32)  # slot that a query sees
    last_of_all = tl.max(last, 0)
    first_slot = (head // K).to(tl.int64) * row_stride + head % K * head_stride
    query = tl.load(q + row[:, None] * D + d[None, :], is_query, 0.0)
    # Finite, so that exp(-inf - maximum) is 0, not NaN, where a query sees no slot of this part.
    maximum = tl.full([BLOCK_R], -3e38, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(part * BLOCK_S, last_of_all + 1, n_parts * BLOCK_S):
        slot = start + s
        inside = (slot <= last_of_all)[:, None] & (d < D)[None, :]
        indices = first_slot + slot[:, None] * D + d[None, :]
        key, value = tl.load(keys + indices, inside, 0.0), tl.load(values + indices, inside, 0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(slot[None, :] <= last[:, None], score, float("-inf"))
        larger = tl.maximum(maximum, tl.max(score, 1))
        weight, shrink = tl.exp(score - larger[:, None]), tl.exp(maximum - larger)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        maximum = larger
    acc /= tl.maximum(total, 1.0)[:, None]  # the largest score alone adds 1; without any slot it is 0
    target = row * n_parts + part
    tl.store(out + target[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), is_query)
    if maxima is not None:
        tl.store(maxima + target, maximum, r < ROWS)
        tl.store(sums + target, total, r < ROWS)


@triton.jit
def _join_parts(means, maxima, sums, out, n_parts, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One query row per program: the mean of its parts, each weighted by the sum of its exp(score)."""
    row, part, d = tl.program_id(0), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    source = row * n_parts + part
    maximum = tl.load(maxima + source, part < n_parts, float("-inf"))
    weight = tl.exp(maximum - tl.max(maximum, 0)) * tl.load(sums + source, part < n_parts, 0.0)
    inside = (part < n_parts)[:, None] & (d < D)[None, :]
    mean = tl.load(means + source[:, None] * D + d[None, :], inside, 0.0)
    joined = tl.sum(mean * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * D + d, joined.to(out.dtype.element_ty), d < D)


@triton.jit
def _int8_row(
    x, codes, scales, y, N, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A row of y: products in fp32, each thread adding up its own columns before threads exchange any.

    Programs of the same rows of the weight follow each other, so that a second row of x finds these in a cache.
    A row of the weight has one scale, or one for each GROUP of columns.
    """
    x += tl.program_id(0) * K
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes += rows.to(tl.int64)[:, None] * K
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = (rows < N)[:, None] & (columns < K)[None, :]
        weight = tl.load(codes + columns[None, :], inside, 0).to(tl.float32)
        if GROUP is not None:  # a code times an fp16 scale is exact in fp32
            index = rows.to(tl.int64)[:, None] * tl.cdiv(K, GROUP) + (columns // GROUP)[None, :]
            weight *= tl.load(scales + index, inside, 0.0).to(tl.float32)
        sums += weight * tl.load(x + columns, columns < K, 0.0).to(tl.float32)[None, :]
    total = tl.sum(sums, 1)
    if GROUP is None:
        total *= tl.load(scales + rows, rows < N, 0.0)
    tl.store(y + tl.program_id(0) * N + rows, total.to(y.dtype.element_ty), rows < N)


@triton.jit
def _int8_tile(
    x, codes, scales, y, M, N, K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, N] on the matrix units: a code is exact in every dtype of x, in groups the weight is rounded to it."""
    m = tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes += rows.to(tl.int64)[None, :] * K
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = (columns < K)[:, None] & (rows < N)[None, :]
        code = tl.load(codes + columns[:, None], inside, 0)
        part = tl.load(x + m[:, None] * K + columns[None, :], (m < M)[:, None] & (columns < K)[None, :], 0.0)
        if GROUP is None:
            weight = code.to(part.dtype)
        else:
            index = rows.to(tl.int64)[None, :] * tl.cdiv(K, GROUP) + (columns // GROUP)[:, None]
            scale = tl.load(scales + index, inside, 0.0).to(tl.float32)
            weight = (code.to(tl.float32) * scale).to(part.dtype)
        sums = tl.dot(part, weight, sums)
    if GROUP is None:
        sums *= tl.load(scales + rows, rows < N, 0.0)[None, :]
    indices = m.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(y + indices, sums.to(y.dtype.element_ty), (m < M)[:, None] & (rows < N)[None, :])


@triton.jit
def _int4_row(
    x, packed, scales, offsets, y, N, K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row of y, with sums as in _int8_row.

    Of 16 bytes, which stand for 32 columns, byte j has column j in its low nibble and column j + 16 in its high one. In
    the last bytes some columns may be beyond K: x is 0 there.
    """
    BYTES: tl.constexpr = tl.cdiv(K, 32) * 16
    x += tl.program_id(0) * K
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    packed += row * BYTES
    groups = row * tl.cdiv(K, GROUP)
    sums = tl.zeros([BLOCK_N, BLOCK_K // 2], tl.float32)
    for start in range(0, BYTES, BLOCK_K // 2):
        at = start + tl.arange(0, BLOCK_K // 2)
        inside, block = (at < BYTES)[None, :], at // 16
        column, group = block * 32 + at % 16, groups + (block // (GROUP // 32))[None, :]
        byte = tl.load(packed + at[None, :], inside, 0).to(tl.int32)
        scale = tl.load(scales + group, inside, 0.0).to(tl.float32)
        x_low = tl.load(x + column, column < K, 0.0).to(tl.float32)[None, :]
        x_high = tl.load(x + column + 16, column + 16 < K, 0.0).to(tl.float32)[None, :]
        low, high = byte & 15, byte >> 4
        if offsets is None:
            low, high = low - 8, high - 8
        sums += (low.to(tl.float32) * x_low + high.to(tl.float32) * x_high) * scale
        if offsets is not None:
            sums += tl.load(offsets + group, inside, 0.0).to(tl.float32) * (x_low + x_high)
    tl.store(y + tl.program_id(0) * N + n, tl.sum(sums, 1).to(y.dtype.element_ty), n < N)


@triton.jit
def _int4_tile(
    x, packed, scales, offsets, y, M, N, K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, N] on the matrix units, the weights rounded to the dtype of x as the plain product rounds them."""
    BLOCKS: tl.constexpr = BLOCK_K // 32
    IN_ALL: tl.constexpr = tl.cdiv(K, 32)
    m, j = tl.arange(0, BLOCK_M), tl.arange(0, 16)[None, None, :]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None, None]
    packed += row * (IN_ALL * 16)
    groups = row * tl.cdiv(K, GROUP)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, IN_ALL, BLOCKS):
        block = (start + tl.arange(0, BLOCKS))[None, :, None]
        inside, column, group = block < IN_ALL, block * 32 + j, groups + block // (GROUP // 32)
        byte = tl.load(packed + block * 16 + j, inside, 0).to(tl.int32)
        scale = tl.load(scales + group, inside, 0.0).to(tl.float32)
        source, here = x + m[:, None, None] * K + column, (m < M)[:, None, None]
        x_low = tl.reshape(tl.load(source, here & (column < K), 0.0), [BLOCK_M, BLOCKS * 16])
        x_high = tl.reshape(tl.load(source + 16, here & (column + 16 < K), 0.0), [BLOCK_M, BLOCKS * 16])
        if offsets is None:
            low, high = ((byte & 15) - 8).to(tl.float32) * scale, ((byte >> 4) - 8).to(tl.float32) * scale
        else:
            shift = tl.load(offsets + group, inside, 0.0).to(tl.float32)
            low, high = (byte & 15).to(tl.float32) * scale + shift, (byte >> 4).to(tl.float32) * scale + shift
        low = tl.reshape(low.to(x_low.dtype), [BLOCK_N, BLOCKS * 16])
        high = tl.reshape(high.to(x_low.dtype), [BLOCK_N, BLOCKS * 16])
        sums = tl.dot(x_high, tl.trans(high), tl.dot(x_low, tl.trans(low), sums))
    indices = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + indices, sums.to(y.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


def _launch(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments, **settings) -> None:
    with torch.cuda.device_of(arguments[0]):  # unlike PyTorch's operations, Triton's run on the current device
        kernel[grid](*arguments, **settings)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + delta and model.RMSNorm of s, both like x [..., dim]; None adds nothing, and s is x itself."""
    dim = x.shape[-1]
    normed = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    block = triton.next_power_of_2(dim)
    _launch(_add_rms_norm, (x.numel() // dim,), x, delta, weight, total, normed, eps, dim, block, num_warps=8)
    return total, normed


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """F.silu(gate) * up, of one shape."""
    y = torch.empty_like(gate)
    _launch(_silu_mul, (triton.cdiv(gate.numel(), FLAT_BLOCK),), gate, up, y, gate.numel(), FLAT_BLOCK)
    return y


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, freqs_cis: Tensor, pos: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Queries after model.apply_rope, [B, H, T, D]; keys after it and values go to their slots, as KVCache.update does.

    q [B, T, H * D], k and v [B, T, K * D] as their projections return them; freqs_cis fp32 [B, T, P, 2]; pos int64
    [B, T], within the slots; keys and values [B, K, S, D], a layer of the cache.
    """
    (B, T, width), (_, K, _, D) = q.shape, keys.shape
    H = width // D
    rotated = q.new_empty(B, H, T, D)
    targets = (rotated, keys, values, *keys.stride()[:2])
    sizes = (T, H, K, D, triton.next_power_of_2(D // 2))
    _launch(_rotate_and_store, (B * T, H + 2 * K), q, k, v, freqs_cis, pos.contiguous(), *targets, *sizes, num_warps=1)
    return rotated


def attends(q: Tensor, keys: Tensor) -> bool:
    """Whether `attend` takes q: its rows of a key/value head are few, H / K * T."""
    H, T, D = q.shape[1:]
    return H // keys.shape[1] * T <= (MOST_QUERIES if _has_tiles(q) else MOST_QUERIES_PLAIN) and D <= LARGEST_HEAD


def attend(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor) -> Tensor:
    """model.attend with the mask `slot <= pos`, as [B, H, T, D]: attention split over the sequence (Dao et al. 2023)
    with an online softmax (Milakov and Gimelshein 2018).

    q [B, H, T, D] that `attends`; keys and values [B, K, S, D], a layer of the cache; pos int64 [B, T], within the
    slots. Each slot is read once for all queries of its head, none beyond the largest position of its sequence: the
    time follows the positions in use, although no shape does.
    """
    (B, H, T, D), (_, K, S, _) = q.shape, keys.shape
    rows, n_parts, BLOCK_D = H // K * T, _n_parts(B * K, S), max(16, triton.next_power_of_2(D))
    out = torch.empty_like(q)
    if n_parts == 1:
        means, maxima, sums = out, None, None
    else:
        means = q.new_empty(B * H * T, n_parts, D, dtype=torch.float32)
        maxima, sums = means.new_empty(2, B * H * T, n_parts)
    sizes = (T, rows, K, D, max(16, triton.next_power_of_2(rows)), TILE_SLOTS, BLOCK_D)  # tl.dot has 16 of each
    tensors = (q, keys, values, pos.contiguous(), means, maxima, sums)
    _launch(_attend_part, (B * K, n_parts), *tensors, *keys.stride()[:2], D**-0.5, *sizes)
    if n_parts > 1:
        joined = (means, maxima, sums, out, n_parts, D, triton.next_power_of_2(n_parts), BLOCK_D)
        _launch(_join_parts, (B * H * T,), *joined)
    return out


def _n_parts(heads: int, S: int) -> int:
    """By shapes alone, as a recorded step needs it."""
    return max(1, min(PROGRAMS // heads, S // LEAST_SLOTS, MOST_PARTS))


def multiplies(x: Tensor) -> bool:
    """Whether int8_linear and int4_linear take x [M, K]: up to SINGLE_ROWS of them, or MOST_ROWS where it has tiles."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    return 1 <= len(x) <= (MOST_ROWS if _has_tiles(x) else SINGLE_ROWS)


def _has_tiles(x: Tensor) -> bool:
    """Before sm_80 Triton compiles tl.dot to no matrix units, nor with fp32, and registers spill by the kilobyte."""
    return x.dtype != torch.float32 and computes_bf16(x.device)


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, group_size: int | None = None) -> Tensor:
    """Int8Linear of code_layers: x [M, K] that `multiplies` is y [M, N], with codes int8 [N, K] and scales fp32 [N], or
    [N, ceil(K / group_size)]."""
    return _product(_int8_row, _int8_tile, x, (codes, scales), len(codes), group_size)


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, group_size: int, offsets: Tensor | None = None) -> Tensor:
    """Int4Linear there: as int8_linear, with packed codes uint8 [N, 16 ceil(K / 32)], scales and offsets in groups."""
    return _product(_int4_row, _int4_tile, x, (packed, scales, offsets), len(packed), group_size)


def _product(
    row: triton.JITFunction,
    tile: triton.JITFunction,
    x: Tensor,
    weight: tuple[Tensor | None, ...],
    N: int,
    group_size: int | None,
) -> Tensor:
    M, K = x.shape
    y = x.new_empty(M, N)
    x = x.contiguous()
    if M == 1 or not _has_tiles(x):
        sizes = ROW_TILES["many" if N >= MANY else "few"]
        _launch(row, (M, triton.cdiv(N, sizes[0])), x, *weight, y, N, K, group_size, *sizes)
    else:
        sizes = (MOST_ROWS, TILE_ROWS, TILE_COLUMNS)
        grid = (triton.cdiv(N, TILE_ROWS),)
        _launch(tile, grid, x, *weight, y, M, N, K, group_size, *sizes, num_warps=2, num_stages=4)
    return y
