"""Several processes that run one function, each with the environment that torchrun would give it.

    def work(directory: Path) -> torch.Tensor: ...

    first, second = several.run(2, work, directory)     # what it returns in each

The processes are forks of one that has imported what all of them need, which takes seconds. Arguments and results
travel in files, so that they may be whatever torch.save takes. The function stands at the top of a module, by whose
name each process finds it.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import signal
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

    folder = str(Path(sys.modules[work.__module__].__file__).parent)
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(arguments, f"{scratch}/arguments")
        work_by_name = [folder, work.__module__, work.__name__, scratch]
        print(json.dumps([environments(n), work_by_name, limit]), file=server().stdin, flush=True)
        codes = json.loads(server().stdout.readline())  # -9 for all where the time was up
        logs = [Path(f"{scratch}/{rank}.log").read_text() for rank in range(n)]
        assert codes == [0] * n, "\n".join(f"process {i} ended with {codes[i]}\n{logs[i]}" for i in range(n))
        return [torch.load(f"{scratch}/{rank}", weights_only=False) for rank in range(n)]


@functools.cache
def server() -> subprocess.Popen:
    """The process whose forks do the work; it ends with this one."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ["PYTHONPATH"]])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, **pipes)
    atexit.register(process.communicate)
    return process


def serve() -> None:
    """For each line, which `run` writes: the exit codes of its forks. Returns in each fork, once its work is done."""
    for line in sys.stdin:
        given, work_by_name, limit = json.loads(line)
        children = []
        for environment in given:
            child = os.fork()
            if not child:
                return do_work(environment, *work_by_name)
            children.append(child)
        print(json.dumps(wait(children, limit)), flush=True)


def do_work(environment: dict[str, str], folder: str, module: str, name: str, scratch: str) -> None:
    """In a fork: as if it had been started with this environment and its output sent to a file."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    with open(f"{scratch}/{environment['RANK']}.log", "w") as log, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdin = os.fdopen(0, closefd=False)  # the other has read ahead
    sys.path.insert(0, folder)
    given = torch.load(f"{scratch}/arguments", weights_only=False)
    result = getattr(importlib.import_module(module), name)(*given)
    torch.save(result, f"{scratch}/{environment['RANK']}")


def wait(children: list[int], limit: float) -> list[int]:
    """The exit codes of processes; all are killed where one fails or the time is up."""
    end, codes = time.monotonic() + limit, {}
    while len(codes) < len(children) and not any(codes.values()) and time.monotonic() < end:
        for child in set(children) - codes.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            codes |= {child: os.waitstatus_to_exitcode(status)} if found else {}
        time.sleep(0.01)
    for child in set(children) - codes.keys():
        os.kill(child, signal.SIGKILL)
        codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [codes[child] for child in children]


if __name__ == "__main__":
    import conftest  # noqa: F401
    import torch.distributed.tensor  # noqa: F401

    import finetuning  # noqa: F401

    serve()
