"""Which device and dtype to compute on, checked by really computing there."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from llama.errors import EnvironmentFailure, InputError

MB = 1e6
PROCESS = Path("/proc/self")  # Linux's facts about this process
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
SMALL_WORK = 30_000_000  # floating-point operations; with more, two threads of one core begin to be faster than one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> tuple[torch.device, torch.dtype]:
    """Turn names into a device and a dtype that work together on this machine.

    "auto" is the GPU where there is one; and fp32 on a CPU (exact), bf16 on a GPU that computes in it, fp16 on an older
    one. Raises InputError for an unknown name, EnvironmentFailure where a tiny matrix product does not run.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"device={device} is unknown; use auto, cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device={device} is not supported; use auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFailure("no CUDA device is available; use device=cpu, or install a CUDA build of torch")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise EnvironmentFailure(
            f"{resolved} does not exist; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if dtype == "auto":
        dtype = _native_dtype(resolved)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype} is unknown; use auto, {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    _probe(resolved, dtype)
    return resolved, dtype


def _native_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else half_dtype(device)


def resolve_half(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """As `resolve`, but "auto" is 16 bits on a CPU, too: half the bytes to read, which is what a benchmark measures."""
    target, _ = resolve(device, "float32")
    return resolve(target, half_dtype(target) if dtype == "auto" else dtype)


def half_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit type to compute in: bf16, and fp16 on a GPU that has no bf16."""
    return torch.bfloat16 if computes_bf16(device) else torch.float16


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 numbers: a CPU, and GPUs since Ampere.

    torch.cuda.is_bf16_supported() is also True where bf16 is emulated, which is slower than fp32.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _probe(device: torch.device, dtype: torch.dtype) -> None:
    """A wheel without kernels for the card still reports CUDA as available; only computing something finds out."""
    try:
        ones = torch.ones(8, 8, device=device, dtype=dtype)
        (ones @ ones).sum().item()
    except RuntimeError as error:
        if "no kernel image" in str(error):
            name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
            raise EnvironmentFailure(
                f"{name} is sm_{major}{minor}, but torch {torch.__version__} was built for "
                f"{' '.join(torch.cuda.get_arch_list())}; for a P100 install torch from the cu126 wheels (docs/gpu.md)"
            ) from error
        raise EnvironmentFailure(f"{device} cannot multiply {dtype} matrices: {error}") from error


@contextmanager
def threads_for(flops: int, device: torch.device) -> Iterator[None]:
    """One thread of a CPU while a piece of work runs that is too small for several.

    Threads wait for each other after every product. Beside a busy process one of them may get no core for
    milliseconds: a model of 5 layers of 64 took 5.5 s for what one thread does in 0.15.
    """
    n = torch.get_num_threads()
    if device.type != "cpu" or n == 1 or flops >= SMALL_WORK:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that are freed; without glibc this does nothing.

    By default it returns them to the system at once, and the next operation's buffer is faulted in anew, page by page:
    a seventh of the time of a training step on a CPU. For scripts that own their process.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)  # blocks below 1 GiB come from the heap,
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)  # which is not handed back


def return_freed_memory() -> None:
    """Let glibc return what is free now, and from now on every block of a megabyte; without glibc this does nothing.

    By default it learns to keep blocks of up to 32 MB, and the gaps between them: 300 to 500 MB in a training step of
    Llama 3.2 1B, and after it. For scripts that own their process.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError):
        return None


def synchronize(device: torch.device) -> None:
    """Wait for all work that was queued on the device; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """What a GPU has left; of a machine, what it could give to a process, swap included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available + psutil.swap_memory().free


def memory_bytes(device: torch.device) -> int:
    """What is allocated on a GPU now; on a CPU, what of this process is resident."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def reset_peak_memory(device: torch.device) -> bool:
    """Start a new peak at the current use. False where that is not possible: of a process, Linux alone does it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (PROCESS / "clear_refs").write_text("5")  # sets the resident high-water mark to the current size
    except OSError:
        return False
    return True


def peak_memory_bytes(device: torch.device) -> int | None:
    """The highest memory use since the last reset, or ever where there was none. None: not measurable here."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024  # "... kB", which means KiB here
    except (OSError, KeyError):
        return None


def device_name(device: torch.device) -> str:
    """The marketing name of a GPU or CPU, as far as the system tells; the meta device computes shapes alone."""
    if device.type == "meta":
        return "arithmetic"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
