"""Compile every kernel of triton_ops as its launches ask for it, for three GPUs and without one; print JSON.

Run by test_gpu_kernels.py, in a process of its own because the interpreter takes the place of the whole language.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))
from llama.kernels import triton_ops

CAPABILITIES = {70: "*fp16", 75: "*fp16", 80: "*bf16", 90: "*fp16"}  # Volta, Turing, Ampere, Hopper
SIZES = ("N", "size", "row_stride", "head_stride")  # which 16 divides, as Triton finds out at a launch
DIM, FFN = 2048, 8192


def launches(half: str) -> list[tuple[str, dict[str, str], dict[str, int | None], dict[str, int]]]:
    """Kernel, types of its arguments, constants (a 1 and a None are such too) and settings, for Llama 3.2 1B."""

    def of(names: str, **others: str) -> dict[str, str]:
        return dict.fromkeys(names.split(), half) | others

    stored = of(
        "q k v rotated keys values", freqs_cis="*fp32", pos="*i64", row_stride="i32", head_stride="i32", T="i32"
    )
    found = [
        ("_add_rms_norm", of("x delta weight total normed", eps="fp32"), {"dim": DIM, "BLOCK": DIM}, {"num_warps": 8}),
        (
            "_add_rms_norm",
            of("x weight total normed", eps="fp32"),
            {"delta": None, "dim": DIM, "BLOCK": DIM},
            {"num_warps": 8},
        ),
        ("_silu_mul", of("gate up y", size="i32"), {"BLOCK": triton_ops.FLAT_BLOCK}, {}),
        ("_rotate_and_store", stored, {"H": 32, "K": 8, "D": 64, "BLOCK": 32}, {"num_warps": 1}),
        ("_rotate_and_store", stored, {"T": 1, "H": 32, "K": 8, "D": 64, "BLOCK": 32}, {"num_warps": 1}),
    ]
    for name, weight, group in (
        ("_int8", {"codes": "*i8", "scales": "*fp32"}, {}),
        ("_int4", {"packed": "*u8", "scales": "*bf16"}, {"GROUP": 32}),
    ):
        types = of("x y", N="i32", M="i32", **weight)
        for rows, columns in triton_ops.ROW_TILES.values():
            for x in (half, "*fp32"):
                tile = {"K": FFN, "BLOCK_N": rows, "BLOCK_K": columns}
                found.append((f"{name}_row", {**types, "x": x, "y": x}, {**tile, **group}, {}))
        tile = {"BLOCK_M": triton_ops.MOST_ROWS, "BLOCK_N": triton_ops.TILE_ROWS, "BLOCK_K": triton_ops.TILE_COLUMNS}
        found.append((f"{name}_tile", types, {"K": DIM, **tile, **group}, {"num_warps": 2, "num_stages": 4}))
    return found


def build(
    name: str, capability: int, types: dict[str, str], constants: dict[str, int | None], settings: dict[str, int]
) -> dict[str, Any]:
    """What the compiler and the assembler make of a kernel."""
    kernel = getattr(triton_ops, name)
    names = kernel.arg_names
    signature = {one: "constexpr" if one in constants else types[one] for one in names}
    aligned = [i for i, one in enumerate(names) if signature[one].startswith("*") or one in SIZES]
    values = {(names.index(one),): value for one, value in constants.items()}
    source = ASTSource(kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in aligned})
    asm = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings).asm
    ptx, tile = asm["ptx"], rf"convert_layout.* tensor<{constants.get('BLOCK_N')}x\d+x"
    arch = f"-arch=sm_{capability}{'a' if capability == 90 else ''}"
    command = [triton.knobs.nvidia.ptxas.path, arch, "-v", "-o", "/dev/null", "/dev/stdin"]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": name,
        "capability": capability,
        "spilled_bytes": int(said.split(" bytes spill stores")[0].split()[-1]),
        "registers": int(said.split("Used ")[1].split()[0]),
        "reads": {kind: ptx.count(kind) for kind in ("ld.global.v4", "cp.async.cg")}
        | {"bytes": len(re.findall(r"ld\.global\S*\.[bsu]8\b", ptx))},
        "moved": len(re.findall(tile, asm["ttgir"])),
        "products": ptx.count("mma.sync"),
    }


if __name__ == "__main__":
    found = []
    for capability, half in CAPABILITIES.items():
        for name, *launch in launches(half):
            if capability >= 80 or not name.endswith("_tile"):  # `multiplies` leaves older ones to plain products
                found.append(build(name, capability, *launch))
    print(json.dumps(found))
