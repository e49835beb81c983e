"""Linear layers and tables whose weights are codes of 8 or 4 bits: what quantization.py swaps in for plain ones.

No weight is ever widened as a whole: in a decode step its codes are (kernels/cpu/decode_step.py on a CPU,
kernels/gpu/triton_ops.py on a GPU), and else a slab of rows at a time is, in the dtype of x, and multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from llama.codes import BLOCK
from llama.frozen import FrozenLinear
from llama.kernels import gpu

SLAB_BYTES = {"cpu": 1 << 20, "cuda": 1 << 23}  # of widened weights: fits a CPU's cache, keeps a GPU busy
# Rows of x up to which PyTorch's int8 kernel for bfloat16 on a CPU beats slabs. For w1 of Llama 3.2 1B it takes 1.4 ms
# with 1 row, 7 with 16 and 114 with 256; slabs 13, 16 and 32; bfloat16 weights 2.4, 2.5 and 18 (two cores with AMX).
MOST_ROWS = 32


class Quantized(FrozenLinear):
    """Codes and scales of a matrix [out_features, in_features], which is multiplied a slab of rows at a time."""

    def __init__(self, weight: Tensor, scales: Tensor, in_features: int, group_size: int | None) -> None:
        super().__init__()
        self.out_features, self.in_features, self.group_size = len(weight), in_features, group_size
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scales", scales)

    def widen(self, rows: slice, out: Tensor) -> Tensor:
        """These rows of w, into `out`, rounded once."""
        raise NotImplementedError

    def largest(self) -> float:
        """No weight that codes and scales can stand for is larger; NaN where a scale is none."""
        raise NotImplementedError

    def slabs(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of w, and room for them in the dtype of `like`, the same for each slab."""
        n_rows = max(1, SLAB_BYTES[like.device.type] // (self.in_features * like.element_size()))
        slab = like.new_empty(n_rows, self.in_features)
        for start in range(0, self.out_features, n_rows):
            stop = min(start + n_rows, self.out_features)
            yield slice(start, stop), slab[: stop - start]

    def multiply(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.out_features)
        for rows, slab in self.slabs(x):
            torch.mm(x, self.widen(rows, slab).t(), out=y[:, rows])
        return y

    def multiply_transposed(self, dy: Tensor) -> Tensor:
        """dy w, summed over slabs in fp32 or wider."""
        dx = dy.new_zeros(len(dy), self.in_features, dtype=torch.promote_types(dy.dtype, torch.float32))
        for rows, slab in self.slabs(dy):
            dx += dy[:, rows] @ self.widen(rows, slab)
        return dx.to(dy.dtype)


def _is_aligned(weight: Tensor) -> bool:
    """Whether it begins at 16 bytes; one without content, of which memory is planned, would."""
    return isinstance(weight, FakeTensor) or weight.data_ptr() % 16 == 0


class _Int8(Quantized):
    """int8 [N, K], and scales fp32 [N], one for each row, or fp16 [N, ceil(K / group_size)]."""

    def __init__(self, weight: Tensor, scales: Tensor, group_size: int | None = None) -> None:
        super().__init__(weight, scales, weight.shape[1], group_size)

    def multiply(self, x: Tensor) -> Tensor:
        """Of rows with one scale (x codes^T) * scales: every code is exact in the dtype of x, so only the sum is
        rounded; in fp16 and with groups x w^T."""
        ops = gpu.ops(x.device)
        if ops is not None and ops.multiplies(x):
            return ops.int8_linear(x, self.weight, self.scales, self.group_size)
        # fp16 ends at 65504, which a sum of products with codes can exceed where y does not.
        if self.group_size is not None or x.dtype == torch.float16:
            return super().multiply(x)
        is_small = x.dtype == torch.bfloat16 and len(x) <= MOST_ROWS and self.in_features % 32 == 0
        # From 4 rows on, the kernel crashes where a weight does not begin at 16 bytes: a memory-mapped one may not.
        if x.device.type == "cpu" and is_small and (len(x) < 4 or _is_aligned(self.weight)):
            # PyTorch's own kernel, with the scales left to fp32: it would round them to 8 bits.
            y = torch._weight_int8pack_mm(x.contiguous(), self.weight, x.new_ones(self.out_features))
            return y.mul_(self.scales)
        y = x.new_empty(len(x), self.out_features)
        for rows, slab in self.slabs(x):
            torch.mm(x, slab.copy_(self.weight[rows]).t(), out=y[:, rows])
        return y.mul_(self.scales)

    def widen(self, rows: slice, out: Tensor) -> Tensor:
        scales = self.scales[rows].to(torch.promote_types(out.dtype, torch.float32))
        if self.group_size is None:
            return torch.mul(self.weight[rows], scales[:, None], out=out)
        of_columns = scales.repeat_interleave(self.group_size, 1)[:, : self.in_features]
        return torch.mul(self.weight[rows], of_columns, out=out)

    def largest(self) -> float:
        return 127 * self.scales.float().abs().amax().item()


class Int8Linear(_Int8):
    """y = x w^T with w[n, k] = weight[n, k] * scales[n], or * scales[n, k // group_size]; codes are -127 to 127."""


class Int8Embedding(_Int8):
    """The table of token vectors, int8 [V, dim] with scales fp32 [V]; also the head of a model with a tied one.

    `dtype` is that of the vectors it returns; model.to(dtype) changes it.
    """

    def __init__(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight, scales)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        scales = self.scales[tokens, None].to(torch.promote_types(self.dtype, torch.float32))
        return (self.weight[tokens] * scales).to(self.dtype)

    def _apply(self, fn, recurse: bool = True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)


class Int4Linear(Quantized):
    """y = x w^T; weight uint8 [N, 16 ceil(K / 32)], two nibbles per byte in the layout that codes.py draws.

    scales are bfloat16 [N, ceil(K / group_size)]; or both scales and offsets are fp16 of that shape. in_features is K,
    which may be left out where 32 divides it.
    """

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        group_size: int,
        offsets: Tensor | None = None,
        in_features: int | None = None,
    ) -> None:
        super().__init__(weight, scales, in_features or 2 * weight.shape[1], group_size)
        self.register_buffer("offsets", offsets)

    def multiply(self, x: Tensor) -> Tensor:
        """x w^T; except for a few rows of x on a GPU with Triton, a slab of rows of w at a time."""
        ops = gpu.ops(x.device)
        if ops is not None and ops.multiplies(x):
            return ops.int4_linear(x, self.weight, self.scales, self.group_size, self.offsets)
        return super().multiply(x)

    def widen(self, rows: slice, out: Tensor) -> Tensor:
        packed = self.weight[rows]
        is_padded = 2 * packed.shape[1] != self.in_features
        wide = torch.promote_types(out.dtype, torch.float32)
        # Without offsets the product of a code and a scale is rounded but once in any dtype.
        fits = not is_padded and (self.offsets is None or out.dtype == wide)
        codes = out if fits else out.new_empty(len(out), 2 * packed.shape[1], dtype=wide)
        packed = packed.unflatten(1, (-1, 1, BLOCK // 2))
        halves = codes.view(len(codes), -1, 2, BLOCK // 2)
        halves[:, :, :1].copy_(packed & 15)
        halves[:, :, 1:].copy_(packed >> 4)
        blocks = codes.view(len(codes), -1, BLOCK)
        if self.offsets is None:
            blocks.sub_(8).mul_(self._of_blocks(self.scales[rows], blocks))
        else:
            blocks.mul_(self._of_blocks(self.scales[rows], blocks)).add_(self._of_blocks(self.offsets[rows], blocks))
        return out if fits else out.copy_(codes[:, : self.in_features])

    def _of_blocks(self, of_groups: Tensor, blocks: Tensor) -> Tensor:
        """A value for each group, repeated for each of the blocks of 32 columns that are in it."""
        return of_groups.repeat_interleave(self.group_size // BLOCK, 1)[:, : blocks.shape[1], None]

    def largest(self) -> float:
        scales = self.scales.float()
        if self.offsets is None:
            return 8 * scales.abs().amax().item()
        low = self.offsets.float()
        return torch.maximum(low.abs(), (low + 15 * scales).abs()).amax().item()
