"""Where the Triton kernels run: NVIDIA GPUs of compute capability 7.0 and later, with Triton, as CUDA builds of
PyTorch bring it. A P100 (6.0) has none, and callers use plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

OLDEST = (7, 0)  # compute capability that Triton compiles for


def ops(device: torch.device) -> ModuleType | None:
    """triton_ops, or None where it does not run.

    None under torch.compile as well, which fuses plain operations itself, and would have to break its graph for these.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return _ops() if torch.cuda.get_device_capability(device) >= OLDEST else None


@functools.cache
def _ops() -> ModuleType | None:
    try:
        return importlib.import_module("llama.kernels.triton_ops")
    except ImportError:
        return None
