"""Several processes that run one function, each with the environment that torchrun would give it.

    def work(directory: Path) -> torch.Tensor: ...

    first, second = several.run(2, work, directory)     # what it returns in each

Starting processes directly takes half the time of torchrun. Arguments and results travel in files, so that they may be
whatever torch.save takes. The function stands at the top of a module, by whose name each process finds it.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT = 60  # seconds


def environments(n: int) -> list[dict[str, str]]:
    """Of each of `n` processes that are to meet on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    names = ("RANK", "LOCAL_RANK")
    return [{**os.environ, **meeting, "WORLD_SIZE": str(n), **dict.fromkeys(names, str(i))} for i in range(n)]


def run(n: int, work: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
    """What `work(*arguments)` returns in each of `n` processes. Raises AssertionError where one fails; all end."""
    import torch

    folders = ROOT, ROOT / "tests", Path(sys.modules[work.__module__].__file__).parent
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(arguments, f"{scratch}/arguments")
        command = [sys.executable, __file__, work.__module__, work.__name__, scratch]
        processes = []
        for rank, environment in enumerate(environments(n)):
            with open(f"{scratch}/{rank}.log", "w") as log:
                environment["PYTHONPATH"] = path
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        codes = wait(processes, limit)  # -9 for all where the time was up
        logs = [Path(f"{scratch}/{rank}.log").read_text() for rank in range(n)]
        assert codes == [0] * n, "\n".join(f"process {i} ended with {codes[i]}\n{logs[i]}" for i in range(n))
        return [torch.load(f"{scratch}/{rank}", weights_only=False) for rank in range(n)]


def wait(processes: list[subprocess.Popen], limit: float) -> list[int]:
    """Their exit codes; all are killed where one fails or the time is up."""
    end = time.monotonic() + limit
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > end:
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


if __name__ == "__main__":
    import torch

    module, name, scratch = sys.argv[1:]
    given = torch.load(f"{scratch}/arguments", weights_only=False)
    result = getattr(importlib.import_module(module), name)(*given)
    torch.save(result, f"{scratch}/{os.environ['RANK']}")
