"""What this machine can run, what is missing, and how to get it: `python course.py --doctor`.

`look` collects what is here, without computing anything; `findings` says what follows from it. The two are apart so
that tests can ask about cards that are not here.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llama import device as devices
from llama.kernels import gpu
from llama.kernels.cpu import decode_step, native

GB = 1e9
WEIGHTS_GB = 2.5  # of Llama 3.2 1B in 16 bits
ROOM_GB = 8.0  # on the disk, for one random checkpoint in fp32, adapters and reports
OLDEST_OF_PYPI = (7, 5)  # compute capability that PyPI's wheels of the pinned torch have kernels for
TORCH = "2.13.0"
LATEST_OF_CU126 = "2.14"  # the last torch whose cu126 wheels exist, and with them kernels for 5.0 to 7.0
INSTALL = {
    False: f"pip install torch=={TORCH}",
    True: f"pip install torch=={TORCH} --index-url https://download.pytorch.org/whl/cu126",
}


@dataclass(frozen=True)
class Card:
    """A GPU, as its driver describes it. Sizes in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """What was found. cuda: what torch was built for, None for a CPU build; archs: what it has kernels for."""

    torch: str
    cuda: str | None
    archs: tuple[str, ...]
    card: Card | None
    sees_card: bool  # torch does
    triton: str | None
    compiler: str | None
    no_kernels: str  # why the CPU's C kernels do not run; empty where they do
    cpus: int
    ram: int
    disk: int
    weights: tuple[Path, ...]


@dataclass(frozen=True)
class Finding:
    """One line. remedy: what to do, where something is missing; empty where all is well."""

    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.what:<11} {self.found}" + f"\n{'':<11} -> {self.remedy}" * bool(self.remedy)


def look(places: list[Path]) -> Machine:
    """This machine; checkpoints are looked for in `places`."""
    has_kernels = decode_step.library() is not None  # before why_not, which it fills
    return Machine(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        archs=tuple(torch.cuda.get_arch_list()) if torch.version.cuda else (),
        card=_card(),
        sees_card=torch.cuda.is_available(),
        triton=_version("triton"),
        compiler=shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
        no_kernels="" if has_kernels else native.why_not.get("decode_step", decode_step.NO_AVX512),
        cpus=torch.get_num_threads(),
        ram=devices.free_bytes(torch.device("cpu")),
        disk=shutil.disk_usage(Path.cwd()).free,
        weights=tuple(place for place in places if _is_checkpoint(place)),
    )


def _card() -> Card | None:
    """The first GPU, by its driver: it answers even where torch has no CUDA."""
    query = "name,compute_cap,memory.total,memory.free,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
        name, capability, total, free, driver = (part.strip() for part in answer.stdout.splitlines()[0].split(","))
        major, minor = map(int, capability.split("."))
        return Card(name, (major, minor), int(total) << 20, int(free) << 20, driver)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_checkpoint(place: Path) -> bool:
    return place.is_file() or any(any(place.glob(name)) for name in ("params.json", "config.json", "*.gguf"))


def has_kernels(capability: tuple[int, int], archs: tuple[str, ...]) -> bool:
    """Whether a build runs on a card: with its own kernels, those of an older one of its generation, or PTX."""
    major, minor = capability
    for arch in archs:
        kind, _, digits = arch.partition("_")
        number = "".join(filter(str.isdigit, digits))
        theirs = int(number[:-1] or 0), int(number[-1])
        if kind == "sm" and theirs[0] == major and theirs[1] <= minor and digits == number:
            return True
        if kind == "sm" and theirs == capability:  # sm_90a and the like run on that one alone
            return True
        if kind == "compute" and theirs <= capability:
            return True
    return False


def findings(machine: Machine) -> Iterator[Finding]:
    """Line by line, what there is and what it means."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()}, {machine.cpus} threads")
    yield from _gpu(machine)
    if not machine.sees_card:
        how = f"plain PyTorch alone: {machine.no_kernels}" if machine.no_kernels else "C kernels, in bfloat16"
        yield Finding("CPU", how, "apt-get install gcc" if machine.compiler is None else "")
    free = machine.ram / GB
    yield Finding("memory", f"{free:.1f} GB free", "" if free > 2 * WEIGHTS_GB else "close other programs")
    room = machine.disk / GB
    yield Finding("disk", f"{room:.1f} GB free here", "" if room > ROOM_GB else f"free {ROOM_GB:g} GB, or go elsewhere")
    names = ", ".join(map(str, machine.weights))
    yield Finding("weights", names or "none found; random ones give times and memory", "" if names else "make model")


def _gpu(machine: Machine) -> Iterator[Finding]:
    """The card, whether this torch computes on it, and which code paths run there."""
    card, build = machine.card, f"{machine.torch}, for {f'CUDA {machine.cuda}' if machine.cuda else 'CPUs alone'}"
    if card is None:
        yield Finding("GPU", "none" if not machine.sees_card else "seen by torch, not by nvidia-smi")
        yield Finding("torch", build)
        return
    capability = ".".join(map(str, card.capability))
    size = f"{card.memory / GB:.1f} GB, {card.free / GB:.1f} free"
    yield Finding("GPU", f"{card.name}, compute capability {capability}, {size}, driver {card.driver}")
    if not machine.sees_card or not has_kernels(card.capability, machine.archs):
        archs = f" ({' '.join(machine.archs)})" if machine.archs else ""
        yield Finding("torch", f"{build}{archs}: no kernels for this card", install_line(card.capability))
        return
    yield Finding("torch", f"{build}, has kernels for this card")
    yield Finding("dtype", "bfloat16" if card.capability >= (8, 0) else "float16; bfloat16 would be emulated")
    if card.capability < gpu.OLDEST:
        yield Finding("decode step", "plain kernels, recorded as a CUDA graph")
        yield Finding("int8, int4", "dequantized before each product: less memory, the same time")
    elif machine.triton is None or machine.compiler is None:
        missing = "Triton" if machine.triton is None else "a C compiler"
        remedy = "pip install triton" if machine.triton is None else "apt-get install gcc"
        yield Finding("decode step", f"plain kernels, recorded as a CUDA graph: no {missing}", remedy)
        yield Finding("int8, int4", "dequantized before each product: less memory, the same time")
    else:
        yield Finding("decode step", f"fused Triton {machine.triton} kernels, recorded as a CUDA graph")
        yield Finding("int8, int4", f"multiplied directly, up to {16 if card.capability >= (8, 0) else 4} sequences")
    grouped = card.capability >= (8, 0)
    yield Finding("attention", "flash, K and V as they are" if grouped else "K and V repeated for each query head")


def install_line(capability: tuple[int, int]) -> str:
    """The pip command whose torch has kernels for such a card."""
    is_old = capability < OLDEST_OF_PYPI
    return INSTALL[is_old] + f" (up to {LATEST_OF_CU126})" * is_old
