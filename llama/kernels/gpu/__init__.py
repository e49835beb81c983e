"""Where the Triton kernels run: NVIDIA GPUs of compute capability 7.0 and later, with Triton, as CUDA builds of
PyTorch bring it, and a C compiler, with which it builds its launcher. A P100 (6.0) has none; callers use plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
from types import ModuleType

import torch

OLDEST = (7, 0)  # compute capability that Triton compiles for


def ops(device: torch.device) -> ModuleType | None:
    """triton_ops, or None where it does not run.

    None under torch.compile as well, which fuses plain operations itself, and would have to break its graph for these.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return _load(device)[0]


def why_not(device: torch.device) -> str:
    """What is missing on a GPU that has no kernels."""
    return _load(device)[1]


@functools.cache
def _load(device: torch.device) -> tuple[ModuleType | None, str]:
    """The kernels, one of which has run; or None and the reason."""
    if torch.cuda.get_device_capability(device) < OLDEST:
        return None, f"Triton needs compute capability {'.'.join(map(str, OLDEST))}"
    try:
        module = importlib.import_module("llama.kernels.gpu.triton_ops")
        value = torch.ones(1, 1, device=device)
        module.silu_mul(value, value)
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return None, f"Triton does not run here ({' '.join(str(error).split())})"
    return module, ""
