"""C kernels for the CPU: compiled once, in a few seconds, with the machine's own compiler; kept in the user's cache.

Without a compiler, or on a system that is not Linux on x86-64, there are none, and callers use plain PyTorch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

why_not: dict[str, str] = {}  # by library: why this process has none


@functools.cache
def load(name: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library made of `<name>.c` beside this file, or None; `why_not` then has the reason.

    It shares PyTorch's OpenMP threads: libgomp.so.1 is in the process already, and a second pool would fight for cores.
    """
    try:
        return ctypes.CDLL(str(_compiled(name, flags)))
    except OSError as error:
        why_not[name] = error.strerror or str(error)
        return None


def _compiled(name: str, flags: tuple[str, ...]) -> Path:
    """The shared library, compiled now where the cache has none. Raises OSError where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise OSError("the C kernels are for Linux on x86-64")
    if compiler is None:
        raise OSError("no C compiler is installed")
    source = Path(__file__).with_name(f"{name}.c")
    command = [compiler, "-O3", *flags, "-fopenmp", "-shared", "-fPIC"]
    content = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(content + " ".join(command).encode()).hexdigest()[:16]
    library = _cache_directory() / f"{name}-{key}.so"
    if not library.exists():
        scratch = library.with_suffix(f".{os.getpid()}")
        run = subprocess.run([*command, "-o", str(scratch), str(source)], capture_output=True)
        if run.returncode:  # an old compiler that does not know the instructions, or a full disk
            raise OSError(f"{compiler} cannot compile {source.name}")
        os.replace(scratch, library)
    return library


@functools.cache
def _cache_directory() -> Path:
    """~/.cache/llama-kernels, else a folder of this process alone. Raises OSError where nothing can be written."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: this user has no home
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-kernels"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(directory, os.W_OK) and directory.stat().st_uid == os.getuid():
            return directory
    try:
        return Path(tempfile.mkdtemp(prefix="llama-kernels-"))
    except OSError as error:
        raise OSError("no directory can be written to compile the C kernels in") from error
