"""A small training that is killed, or refused a write, at one file operation after another, and then resumed.

    LD_PRELOAD=fault.so python tests/crash.py faults DIRECTORY ERRNO LASTING EVERY
    python tests/crash.py kills DIRECTORY N SIGNAL

faults: ERRNO 0 kills the process at the operation; LASTING 1 lets all later ones fail too (a full disk); EVERY 3 tries
each third operation. kills: at N random moments, resuming in between. Prints one JSON object: how many there were, and
what went wrong. Each trial is a fork of this process, which has imported everything.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from conftest import SMALL, TINY, random_model
from tqdm import tqdm

import finetuning
from llama import adapters, checkpoint, cli
from llama.training import memory, snapshot, verdict
from llama.training.options import TrainingOptions

RECORDS = [
    {"instruction": f"Say {word}.", "output": word * n} for n, word in enumerate(("ox", "fox", "red", "to", "a"), 1)
]
BASE_NAME = "base_model_name_or_path"
FLAGS = {
    "held_out": 1, "accumulation": 3, "epochs": 2, "max_seq_len": 96, "save_every": 1, "eval_every": 3, "dropout": 0.05,
    "optimizer": "adamw", "lr": 1e-2, "amp": "fp16", "checkpointing": "1,3", "export": "none", "device": "cpu",
}  # fmt: skip


def build_library(folder: Path) -> Path:
    """fault.c, compiled."""
    target, source = folder / "fault.so", Path(__file__).with_name("fault.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(target), str(source), "-ldl"], check=True)
    return target


def options_in(work: Path) -> TrainingOptions:
    """A random model, its tokenizer and records in `work`, and the settings of a run over them."""
    if not (work / "base").exists():
        args = type(SMALL)(**{**vars(SMALL), "vocab_size": 4096, "dim": 32, "head_dim": 8, "n_layers": 4})
        checkpoint.save(random_model(args), work / "base", "meta", TINY / "tokenizer.model")
        (work / "data.json").write_text(json.dumps(RECORDS))
    return TrainingOptions.resolve({**FLAGS, "ckpt_dir": str(work / "base"), "data": str(work / "data.json")})


def make_quick() -> None:
    """What is not about files takes no time: short answers, no picture, no estimate of memory."""
    verdict.ANSWER_LEN, finetuning.INSTRUCTIONS = 2, ("Say fox.",)
    finetuning.save_chart = lambda *_: None
    footprint = memory.Footprint({"weights": 1}, {"weights": 1})
    memory.estimate = lambda *_, **__: footprint
    tqdm.monitor_interval = 0  # no thread: it would not survive the fork
    tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and one killed while holding it stops the rest


def start(
    work: Callable[[], None], output: Path, root: Path, fault: tuple[int, int, int] | None = None, jump: int = 0
) -> int:
    """Begin work that changes files below `root`, in a fork; its process id. What it prints goes to a file.

    fault: which operation on a file, errno, lasting; -1 for errno moves the directory away. jump: seconds by which the
    time of day is wrong, forwards and backwards in turn.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.dump_traceback_later(30, file=2)  # where it hangs, if it does
        library = ctypes.CDLL(None)  # the preloaded one
        library.fault_clock(ctypes.c_long(jump))
        if fault is not None:
            library.fault_arm(str(root).encode(), *fault)
        work()
        if fault is not None:
            os.write(1, f"\noperations {library.fault_count()}\n".encode())
        code = 0
    except BaseException as error:
        line, code = cli.explain(error)
        os.write(2, f"\nerror: {line}\n".encode())
    finally:
        os._exit(code)


def end(pid: int, after: tuple[float, int] | None = None) -> int:
    """The exit code of a fork, negative for a signal. after: seconds until it gets a signal, and which."""
    if after is not None:
        moment = time.monotonic() + after[0]
        while (left := moment - time.monotonic()) > 0:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(min(0.005, left))
        os.kill(pid, after[1])  # one that has ended keeps its exit code
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(options: TrainingOptions, root: Path) -> None:
    """Begin a run or resume it, and say of each snapshot that it is there."""
    save = snapshot.save

    def announced(*args):
        path = save(*args)
        os.write(1, f"\nsaved {path.name}\n".encode())
        return path

    snapshot.save = announced
    resume = bool(snapshot.listed(root / "snapshots"))
    finetuning.main(dataclasses.replace(options, out_dir=str(root), resume=resume))


def attempt(
    options: TrainingOptions,
    root: Path,
    output: Path,
    fault: tuple[int, int, int] | None,
    after: tuple[float, int] | None = None,
) -> int:
    """Run or resume in a fork; its exit code, as of `end`."""
    return end(start(lambda: train(options, root), output, root, fault), after)


def digest(root: Path) -> str:
    """Everything that a run leaves, but for times and where its base lies.

    Of the adapter its tensors: safetensors writes the entries of its metadata in any order.
    """
    last = snapshot.listed(root / "snapshots")[-1]
    files = [root / "loss.jsonl", *sorted(last.glob("*.safetensors"))]
    content = [path.name.encode() + path.read_bytes() for path in files]
    config = json.loads((root / "adapter" / adapters.CONFIG).read_text())
    content.append(json.dumps({name: value for name, value in config.items() if name != BASE_NAME}).encode())
    adapter = safetensors.torch.load_file(root / "adapter" / adapters.WEIGHTS)
    content += [name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(adapter.items())]
    state = snapshot.load(last).state
    del state["figures"]
    return hashlib.sha256(b"".join([*content, json.dumps(state, sort_keys=True).encode()])).hexdigest()


def lost_step(root: Path, text: str) -> str | None:
    """What is wrong where the newest snapshot is older than one that was announced."""
    steps = [line.split()[1] for line in text.splitlines() if line.startswith("saved ")]
    found = snapshot.latest(root / "snapshots")[0].name if steps else ""
    return f"{steps[-1]} was announced, {found} is there" if steps and found < steps[-1] else None


def wrong_end(code: int, text: str, expected: set[int]) -> str | None:
    """What is wrong where a run has not ended as it should: with that code, and one line of an error if any."""
    if code not in expected or "Traceback" in text:
        return f"exit code {code}: {text[-300:]}"
    if code > 0 and sum(line.startswith("error: ") for line in text.splitlines()) != 1:
        return f"not one line: {text[-300:]}"
    return None


def trial(options: TrainingOptions, work: Path, wanted: str, fault: tuple[int, int, int]) -> str | None:
    """One fault, then a resumed run. What went wrong, if anything."""
    root, output = work / "run", work / "output"
    shutil.rmtree(root, ignore_errors=True)
    code = attempt(options, root, output, fault)
    text = output.read_text(errors="replace")
    expected = {-signal.SIGKILL} if fault[1] == 0 else {0, 3}  # 0: what failed was the removal of something old
    problem = wrong_end(code, text, expected) or lost_step(root, text)
    if problem is not None:
        return problem
    code = attempt(options, root, output, None)
    if code != 0:
        return f"resuming ended with {code}: {output.read_text(errors='replace')[-300:]}"
    return None if digest(root) == wanted else "the resumed run has other bytes"


def kill_often(options: TrainingOptions, work: Path, wanted: str, n: int, number: int) -> dict:
    """Kill a run at random moments, resume it, kill it again, to its end; as often as it takes for `n` kills."""
    killed = {-number, 128 + number}  # by the signal itself, or after saving
    rng, kills, runs, failures = random.Random(0), 0, 0, {}
    root, output = work / "run", work / "output"
    while kills < n:
        shutil.rmtree(root, ignore_errors=True)
        runs, code, tries = runs + 1, -number, 0
        while code in killed and tries < 40:
            seconds = rng.uniform(0, 1.2) if tries < 39 else 60  # the last has time enough, unless it hangs
            code, tries = attempt(options, root, output, None, (seconds, number)), tries + 1
            kills += code in killed
        if code != 0 or digest(root) != wanted:
            failures[kills] = f"ended with {code}: {output.read_text(errors='replace')[-2000:]}"
            break
    return {"kills": kills, "runs": runs, "failures": failures}


def n_operations(text: str) -> int:
    """How many changes of files the run has counted that printed this."""
    return int(text.rsplit("operations ", 1)[1])


def try_faults(options: TrainingOptions, work: Path, error: int, lasting: int, every: int) -> dict:
    """Let one operation after another fail."""
    code = attempt(options, work / "run", work / "output", (0, 0, 0))
    text = (work / "output").read_text()
    assert code == 0, text
    n = n_operations(text)
    wanted, failures = digest(work / "run"), {}
    points = range(1, n + 1, every)
    for point in points:
        problem = trial(options, work, wanted, (point, error, lasting))
        if problem is not None:
            failures[point] = problem
    return {"operations": n, "tried": len(points), "failures": failures}


def main(mode: str, directory: str, *numbers: str) -> None:
    """Try, and print what came of it."""
    make_quick()
    work = Path(directory)
    options = options_in(work)
    finetuning.main(
        dataclasses.replace(options, out_dir=str(work / "warm up"))
    )  # what PyTorch imports late is there for all forks
    numbers = list(map(int, numbers))
    if mode == "faults":
        found = try_faults(options, work, *numbers)
    else:
        found = kill_often(options, work, digest(work / "warm up"), *numbers)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
