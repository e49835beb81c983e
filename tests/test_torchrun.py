"""inference.py under torchrun writes what one process writes, and whatever goes wrong is one line of one process."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import several
import torch
from conftest import ROOT, TINY

from llama import adapters, checkpoint, lora
from llama.lora import LoRAConfig

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
UNEQUAL = re.compile(r"\[\d+ tokens.*|\[draft.*|embedded model.*|memory.*|  (time|memory) .*|\d of .*")


def start(n: int, script: str | Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, *TORCHRUN, f"--nproc_per_node={n}", str(script), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_on_two_hosts(script: str, *flags: str) -> list[subprocess.Popen]:
    """Two torchruns that meet over the loopback, as in docs/devices.md."""
    port = several.environments(1)[0]["MASTER_PORT"]
    meeting = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}", "--nproc_per_node=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    each = [[sys.executable, "-m", "torch.distributed.run", f"--node_rank={i}", *meeting, script] for i in (0, 1)]
    return [subprocess.Popen([*command, *flags], cwd=ROOT, **pipes) for command in each]


def errors(process: subprocess.Popen, limit: float = 240) -> list[str]:
    """The lines of ours; torchrun adds its own report."""
    try:
        _, err = process.communicate(timeout=limit)
    finally:
        end_all(process)
    assert process.returncode != 0
    return [line for line in err.splitlines() if line.startswith("error:")]


def end_all(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for each in (*psutil.Process(process.pid).children(), process):
            each.kill()


def write_adapter(directory: Path, seed: int = 0) -> None:
    """Of the embedded model, as after some training: B is not zero."""
    model, config = checkpoint.load(TINY), LoRAConfig(4, targets=("wq", "wo", "w2"))
    lora.apply(model, config, seed)
    for module in lora.layers(model).values():
        module.lora_B.data.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
    adapters.save(model, config, directory, checkpoint.fingerprint(TINY))


@pytest.mark.parametrize(
    "flags", ["--compare", "--stream", "--draft=lookup --temperature=0", "--temperature=0.9", "--compare --adapter"]
)
def test_several_processes_write_what_one_writes(tmp_path, flags):
    write_adapter(tmp_path / "adapter")
    flags = flags.replace("--adapter", f"--adapter={tmp_path / 'adapter'}")
    flags = (*flags.split(), "--max_gen_len=24", "--dtype=float32", "--device=cpu")
    process = start(2, "inference.py", *flags)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "error" not in err
    assert "float32 in 2 processes on cpu" in out and "memory of each process: weights 10.0 MB" in out
    alone = subprocess.run([sys.executable, "inference.py", *flags], cwd=ROOT, capture_output=True, text=True).stdout
    texts, expected = ([x for x in o.splitlines() if not UNEQUAL.fullmatch(x)] for o in (out, alone))
    assert texts == expected and any(line.startswith("> ") or "] > " in line for line in texts)


def test_two_hosts_write_what_one_process_writes(tmp_path):
    flags = ("--max_gen_len=24", "--dtype=float32", "--device=cpu", "--prompt=Once upon a time")
    hosts = start_on_two_hosts("inference.py", *flags)
    (out, _), (nothing, _) = (host.communicate(timeout=240) for host in hosts)
    assert [host.returncode for host in hosts] == [0, 0] and nothing == "" and "float32 in 2 processes" in out
    alone = subprocess.run([sys.executable, "inference.py", *flags], cwd=ROOT, capture_output=True, text=True).stdout
    texts, expected = ([x for x in o.splitlines() if not UNEQUAL.fullmatch(x)] for o in (out, alone))
    assert texts == expected and any(line.startswith("> ") for line in texts)


def test_two_hosts_train_what_one_process_trains(tmp_path):
    flags = ("--max_steps=3", "--accumulation=3", "--held_out=2", "--export=none", "--lr=0.01", "--device=cpu")
    hosts = start_on_two_hosts("finetuning.py", f"--out_dir={tmp_path / 'two'}", "--shard", *flags)
    texts = [host.communicate(timeout=240) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], texts
    command = [sys.executable, "finetuning.py", f"--out_dir={tmp_path / 'one'}", *flags]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "loss.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_host_is_lost_the_other_ends(tmp_path, rank):
    (tmp_path / "prompts").write_text("Once upon a time\n" * 999)
    flags = ("--stream", "--device=cpu", f"--prompt_file={tmp_path / 'prompts'}")
    hosts = start_on_two_hosts("inference.py", *flags)
    assert any(line.startswith("> Once") for line in hosts[0].stdout)
    end_all(hosts[rank])
    since, late = time.monotonic(), threading.Timer(90, end_all, [hosts[1 - rank]])
    late.start()
    said = next(line for line in hosts[1 - rank].stderr if line.startswith("error:"))
    assert "another process of this run has ended" in said or "terminated; torchrun" in said
    assert time.monotonic() - since < 60
    late.cancel()
    end_all(hosts[1 - rank])  # its torchrun would wait some minutes more for that of the lost host
    for host in hosts:
        host.communicate()


def test_bfloat16_takes_the_eager_step():
    out, _ = start(2, "inference.py", "--dtype=bfloat16", "--max_gen_len=4", "--device=cpu").communicate(timeout=240)
    assert re.search(r"bfloat16 in 2 processes on cpu \(.*\), eager decoding", out)


BAD = {
    "3 inference.py --prompt=x": "3 processes cannot share n_kv_heads=2 evenly; start fewer",
    "2 inference.py --promt=x": "unknown flag --promt; did you mean --prompt?",
    "2 inference.py --max_gen_len=-1": "--max_gen_len=-1: expected at least 0",
    "2 inference.py --chat": "a conversation, a saved prompt and a draft",
    "2 inference.py --draft=int8": "a conversation, a saved prompt and a draft",
    "2 inference.py --ckpt_dir=/nowhere": "checkpoint directory /nowhere does not exist",
    "2 evaluate.py": "this script runs in one process; start it with python, without torchrun",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line_of_one_process(command):
    n, script, *flags = command.split()
    [line] = errors(start(int(n), script, *flags))
    assert BAD[command] in line


# What one of two processes has that the other has not, and what is said of it.
UNLIKE = {
    "os.chdir(f'{here}/{rank}'); sys.argv += ['--adapter=adapter', '--any_base']": "process 1 of 2 has other adapters",
    "sys.argv.append(f'--seed={rank}')": "process 1 of 2 has other flags than process 0",
    "os.chdir(f'{here}/{rank}'); sys.argv.append('--ckpt_dir=model')": "process 1 of 2 has other weights than",
    "os.chdir(f'{here}/{rank}'); sys.argv.append('--prompt_file=prompts')": "process 1 of 2 has other prompts than",
    "device.free_bytes = lambda _: 10**(12 - 9 * rank)": "cpu has 0 MB of memory free, and this takes",
}


@pytest.mark.parametrize("setup", UNLIKE)
def test_processes_that_are_not_alike_end_in_one_line(tmp_path, setup):
    for rank in (0, 1):
        model = checkpoint.load(TINY)
        with torch.no_grad():
            model.norm.weight += rank
        checkpoint.save(model, tmp_path / f"{rank}" / "model", tokenizer_path=TINY / "tokenizer.model")
        (tmp_path / f"{rank}" / "prompts").write_text(f"The fox {rank}")
        write_adapter(tmp_path / f"{rank}" / "adapter", seed=rank)
    (tmp_path / "program.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport inference\nfrom llama import cli, device\n"
        f"rank, here = int(os.environ['RANK']), {str(tmp_path)!r}\n{setup}\ncli.run(inference.main)\n"
    )
    [line] = errors(start(2, tmp_path / "program.py", "--max_gen_len=4", "--device=cpu"))
    assert UNLIKE[setup] in line


def started(tmp_path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """torchrun and its processes, which are generating and would go on for long."""
    (tmp_path / "prompts").write_text("Once upon a time\n" * 999)
    process = start(2, "inference.py", "--stream", "--device=cpu", f"--prompt_file={tmp_path / 'prompts'}")
    assert any(line.startswith("> Once") for line in process.stdout)
    time.sleep(random.uniform(0, 2))
    return process, psutil.Process(process.pid).children()


def test_an_interrupt_ends_all_processes(tmp_path):
    process, workers = started(tmp_path)
    process.send_signal(signal.SIGINT)
    since = time.monotonic()
    assert errors(process) == ["error: interrupted"]
    assert time.monotonic() - since < 10 and not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_is_killed_the_others_end_with_one_line(tmp_path, rank):
    process, workers = started(tmp_path)
    workers[rank].kill()
    [line] = errors(process, 60)
    assert line.startswith(("error: another process of this run has ended", "error: terminated; torchrun ends all"))
    assert not any(worker.is_running() for worker in workers)
