"""Compile what the wrappers of triton_ops launch, for four kinds of GPU and without one; print JSON.

Run by test_gpu_kernels.py, in a process of its own because the interpreter takes the place of the whole language.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[3]))
from llama.kernels.gpu import triton_ops

# Volta, Turing, Ampere, Hopper
CAPABILITIES = {70: torch.float16, 75: torch.float16, 80: torch.bfloat16, 90: torch.float16}
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TYPES |= {torch.int8: "*i8", torch.uint8: "*u8", torch.int64: "*i64"}
DIM, FFN, K, D = 2048, 8192, 8, 64  # of Llama 3.2 1B
Launch = tuple[triton.JITFunction, tuple[Any, ...], dict[str, int]]


def launches(half: torch.dtype) -> list[Launch]:
    """Kernel, arguments and settings, with one token and with more."""
    found: list[Launch] = []
    triton_ops._launch = lambda kernel, grid, *arguments, **settings: found.append((kernel, arguments, settings))

    def new(*shape: int, dtype: torch.dtype = half) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for delta in (None, new(2, DIM)):
        triton_ops.add_rms_norm(new(2, DIM), delta, new(DIM), 1e-5)
    triton_ops.silu_mul(new(2, FFN), new(2, FFN))
    for T in (1, 2):
        q, k, v = new(1, T, DIM), new(1, T, K * D), new(1, T, K * D)
        freqs_cis, pos = new(1, T, D // 2, 2, dtype=torch.float32), new(1, T, dtype=torch.int64)
        triton_ops.rotate_and_store(q, k, v, freqs_cis, pos, *new(2, 1, K, 512, D))
    for T, S, width, dtype in (
        (1, 512, D, half),
        (1, 500, D, half),
        (4, 512, 2 * D, half),
        (1, 512, 80, half),
        (4, 512, D, torch.float32),
    ):
        cache = new(2, 1, K, S, width, dtype=dtype)
        triton_ops.attend(new(1, 4 * K, T, width, dtype=dtype), *cache, new(1, T, dtype=torch.int64))
    for M, N, dtype in (
        (1, DIM, half),
        (1, FFN, half),
        (1, DIM, torch.float32),
        (1, FFN, torch.float32),
        (9, DIM, half),
    ):
        x = new(M, FFN, dtype=dtype)
        codes, packed = new(N, FFN, dtype=torch.int8), new(N, FFN // 2, dtype=torch.uint8)
        triton_ops.int8_linear(x, codes, new(N, dtype=torch.float32))
        triton_ops.int8_linear(x, codes, new(N, FFN // 64, dtype=torch.float16), 64)
        triton_ops.int4_linear(x, packed, new(N, FFN // 32, dtype=torch.bfloat16), 32)
        pairs = new(2, N, FFN // 64, dtype=torch.float16)
        triton_ops.int4_linear(x, packed, pairs[0], 64, pairs[1])
    return found


def build(capability: int, kernel: triton.JITFunction, arguments: tuple, settings: dict[str, int]) -> dict[str, Any]:
    """What the compiler, told of the arguments what a launch tells it, and the assembler make of a kernel."""
    signature, constants, aligned = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[i,] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            is_tensor = isinstance(value, Tensor)
            signature[parameter.name] = TYPES[value.dtype] if is_tensor else "i32"
            aligned |= {(i,): [["tt.divisibility", 16]]} if is_tensor or value % 16 == 0 else {}
    source = ASTSource(kernel, signature, constants, aligned)
    asm = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings).asm
    rows = dict(zip(kernel.arg_names, arguments, strict=True)).get("BLOCK_N")
    arch = f"-arch=sm_{capability}{'a' if capability == 90 else ''}"
    command = [triton.knobs.nvidia.ptxas.path, arch, "-v", "-o", "/dev/null", "/dev/stdin"]
    said = subprocess.run(command, input=asm["ptx"], capture_output=True, text=True, check=True).stderr
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "spilled_bytes": int(said.split(" bytes spill stores")[0].split()[-1]),
        "registers": int(said.split("Used ")[1].split()[0]),
        "reads": {kind: asm["ptx"].count(kind) for kind in ("ld.global.v4", "cp.async.cg")}
        | {"bytes": len(re.findall(r"ld\.global\S*\.[bsu]8\b", asm["ptx"]))},
        "moved": len(re.findall(rf"convert_layout.* tensor<{rows}x\d+x", asm["ttgir"])),
        "products": asm["ptx"].count("mma.sync"),
    }


if __name__ == "__main__":
    found = []
    for capability, half in CAPABILITIES.items():
        for kernel, *launch in launches(half):
            if capability >= 80 or not kernel.__name__.endswith("_tile"):  # older ones have none: `_has_tiles`
                found.append(build(capability, kernel, *launch))
    print(json.dumps(found))
