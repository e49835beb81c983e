"""C kernels for the CPU: compiled once, in under a second, with the machine's own compiler; kept in the user's cache.

Without a compiler, or on a system that is not Linux on x86-64, there are none, and callers use plain PyTorch.
"""

from __future__ import annotations

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


@functools.cache
def load(name: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library made of `<name>.c` beside this file, or None where that fails.

    It shares PyTorch's OpenMP threads: libgomp.so.1 is in the process already, and a second pool would fight for cores.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    source = Path(__file__).with_name(f"{name}.c")
    command = [compiler, "-O3", *flags, "-fopenmp", "-shared", "-fPIC"]
    content = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(content + " ".join(command).encode()).hexdigest()[:16]
    library = _cache_directory() / f"{name}-{key}.so"
    if not library.exists():
        scratch = library.with_suffix(f".{os.getpid()}")
        run = subprocess.run([*command, "-o", str(scratch), str(source)], capture_output=True)
        if run.returncode:  # an old compiler that does not know the instructions
            return None
        os.replace(scratch, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


@functools.cache
def _cache_directory() -> Path:
    """~/.cache/llama-kernels, or a folder of this process alone where that cannot be written."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(directory, os.W_OK) and directory.stat().st_uid == os.getuid():
            return directory
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="llama-kernels-"))
