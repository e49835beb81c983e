"""Fine-tuning over several processes: the numbers of one, stopped and resumed by any number of them."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import several
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, random_model
from support import batches, samples

import finetuning
from llama import lora, processes
from llama.errors import InputError
from llama.lora import LoRAConfig
from llama.processes import World
from llama.training import several as over_processes
from llama.training.batch import Batch
from llama.training.options import TrainingOptions
from llama.training.run import Run, StopSignal, require_shareable
from llama.training.step import Report, Trainer, checkpoint_layers

STEPS = 20
WAYS = {
    "adapters": {"dropout": 0.1, "optimizer": "adamw", "lr": 1e-3, "clip_norm": 0.5},
    "adapters, the course's mean": {"dropout": 0.1, "lr": 0.1, "loss_normalization": "microbatch"},
    "adapters, lean": {"dropout": 0.1, "lr": 0.1, "lean": True},
    "all weights": {"lora": False, "lr": 0.03, "momentum": 0.5},
    "adapters, in shares": {"dropout": 0.1, "optimizer": "adamw", "lr": 1e-3, "shard": True},
    "all weights, in shares": {"lora": False, "lr": 0.03, "clip_norm": 0.5, "shard": True, "checkpointing": "all"},
}


class Steps(Run):
    """Steps of a run without its directory, on windows of 3, 2 and 1 batches: some processes have none in the last."""

    def __init__(self, options: TrainingOptions, stop_after: int | None = None) -> None:
        self.me, self.options, self.total, self.eval_every = processes.start(), options, STEPS, STEPS
        of_batches = batches([[sample] for sample in samples(6)])
        self.windows = [of_batches[:3], of_batches[3:5], of_batches[5:]]
        self.model, self.device = random_model(), torch.device("cpu")
        if options.lora:
            lora.apply(self.model, LoRAConfig(4, 8.0, options.dropout), 0)
            for weight in (module.lora_B for module in lora.layers(self.model).values()):
                torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(1))
        else:
            self.model.requires_grad_(True)
        self.model.double()  # in which the order of sums does not show
        if options.checkpointing == "all":
            checkpoint_layers(self.model, range(SMALL.n_layers))
        if options.shard and self.me.size > 1:
            over_processes.shard(self.model, self.device)
        self.trainer, self.losses = Trainer(self.model, options, STEPS), []
        self.stop, self.stop_after = StopSignal(), stop_after

    def window(self) -> list[Batch]:
        return self.windows[self.trainer.progress.windows % 3]

    def log_step(self, report: Report, names: list[str], bar: object) -> None:
        self.losses.append(report.loss)
        if len(self.losses) == self.stop_after and self.me.rank == self.me.size - 1:
            self.stop.received = signal.SIGTERM

    def start_clock(self) -> None: ...

    def save(self) -> None: ...

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: over_processes.whole(weight.detach()) for name, weight in self.trainer.weights.items()}


def train_each_way() -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    found = {}
    for way, settings in WAYS.items():
        run = Steps(TrainingOptions(**settings))
        finetuning.train(run, run.stop)
        found[way] = run.losses, run.weights()
    return found


@pytest.fixture(scope="module")
def alone():
    return train_each_way()


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_twenty_steps_are_those_of_one_process(n, alone):
    results = several.run(n, train_each_way, limit=300)
    for way, (losses, weights) in alone.items():
        for others_losses, others in (result[way] for result in results):
            assert others_losses == pytest.approx(losses, rel=1e-10), way
            for name, weight in weights.items():
                moved = (weight - others[name]).abs().max() / weight.abs().max()
                assert moved < 1e-10, f"{way}: {name}"
        for result in results[1:]:
            assert all(torch.equal(result[way][1][name], results[0][way][1][name]) for name in weights), way


def train_past_an_overflow() -> tuple[list[float], dict[str, torch.Tensor], list[float], int]:
    """Losses, weights, scales and skipped steps, where only the share of the first process overflows, in window 4."""
    run = Steps(TrainingOptions(lora=False, lr=0.03, clip_norm=0.5, shard=True, amp="fp16"))
    scaler, scales = run.trainer.scaler, []
    usual = scaler.unscale_

    def unscale(optimizer: torch.optim.Optimizer) -> None:
        scales.append(scaler.get_scale())
        if len(scales) == 5 and run.me.rank == 0:
            gradient = run.trainer.weights["tok_embeddings.weight"].grad
            (gradient.to_local() if over_processes.is_share(gradient) else gradient)[0, 0] = torch.inf
        usual(optimizer)

    scaler.unscale_ = unscale
    finetuning.train(run, run.stop)
    return run.losses, run.weights(), scales, run.trainer.progress.skipped


def test_an_overflow_in_one_share_skips_the_step_of_all():
    losses, weights, scales, skipped = train_past_an_overflow()
    assert skipped == 1 and scales[5] == scales[4] / 2
    for other_losses, others, other_scales, other_skipped in several.run(2, train_past_an_overflow):
        assert (other_scales, other_skipped) == (scales, skipped)
        assert other_losses == pytest.approx(losses, rel=1e-10)
        for name, weight in weights.items():
            assert (weight - others[name]).abs().max() / weight.abs().max() < 1e-10, name


def count_messages() -> int:
    sent = []
    usual = dist.all_reduce
    dist.all_reduce = lambda *given, **named: (sent.append(given), usual(*given, **named))[1]
    run = Steps(TrainingOptions(lr=0.1))
    finetuning.train(run, run.stop)
    return len(sent)


def count_and_stop() -> tuple[int, int]:
    """Messages of a whole run, and the windows of one that a process is told to stop."""
    usual, n = dist.all_reduce, count_messages()
    dist.all_reduce = usual
    run = Steps(TrainingOptions(lr=0.1), stop_after=5)
    finetuning.train(run, run.stop)
    return n, run.trainer.progress.windows


def test_one_message_per_window_and_one_end_for_all():
    assert several.run(2, count_and_stop) == [(STEPS, 6)] * 2  # the other hears of it with the next window


def test_large_gradients_travel_in_several_messages(monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat: sent.append(len(flat)) or flat.mul_(2))
    monkeypatch.setattr(over_processes, "MESSAGE", 100)
    weights = [torch.zeros(n, requires_grad=True) for n in (10, 12, 40, 3)]
    for weight in weights[1:]:
        weight.grad = torch.ones_like(weight)
    loss, is_stopping = over_processes.sum_over_processes(weights, torch.tensor(1.5), False)
    assert (loss, is_stopping) == (3, False) and sent == [2 + 10 + 12, 40, 3]
    assert [weight.grad.unique().tolist() for weight in weights] == [[0], [2], [2], [2]]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("n_batches", range(1, 9))
def test_every_batch_goes_to_one_process(size, n_batches):
    window = batches([[sample] for sample in samples(n_batches)])
    for is_even in (False, True):
        shares = [list(over_processes.share_out(window, World(rank, size), is_even)) for rank in range(size)]
        real = [(number, batch) for share in shares for number, batch in share if len(batch.labels)]
        assert sorted(number for number, _ in real) == list(range(n_batches))
        assert all(batch is window[number] for number, batch in real)
        assert not is_even or len({len(share) for share in shares}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lean": True, "lora": False, "accumulation": 1}, "lean=True moves all weights"),
        ({"lean": True, "shard": True}, "lean=True needs whole weights"),
        ({"qat": 4, "lora": False, "shard": True}, "qat=4 needs whole weights"),
        ({"shard": True, "loss_normalization": "microbatch"}, "use tokens"),
    ],
)
def test_what_processes_cannot_share_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        require_shareable(TrainingOptions(**settings))


# Real command lines

FLAGS = ("--max_steps=6", "--accumulation=3", "--save_every=1", "--held_out=2", "--export=none", "--lr=0.01")


def start(n: int, directory: Path, *flags: str) -> list[subprocess.Popen]:
    command = [sys.executable, "finetuning.py", f"--out_dir={directory}", *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, cwd=ROOT, env=env, **quiet) for env in several.environments(n)]


def finish(running: list[subprocess.Popen], limit: float = 120) -> tuple[list[int], str]:
    """Exit codes, and what all of them wrote to stderr but for the progress bar."""
    end = time.monotonic() + limit
    texts = [process.communicate(timeout=max(1, end - time.monotonic()))[1] for process in running]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("error")]
    return [process.returncode for process in running], "\n".join(lines)


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [(), ("--shard",)])
def test_a_run_moves_from_two_processes_to_four_to_one(tmp_path, shard):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert finish(start(1, whole, *FLAGS)) == ([0], "")
    for n, flags in ((2, (*FLAGS, *shard)), (4, ("--resume", *shard)), (1, ("--resume",))):
        running = start(n, moved, *flags)
        step = {2: 2, 4: 4, 1: 6}[n]
        while n > 1 and not (moved / "snapshots" / f"step-{step:08d}").exists():
            time.sleep(0.05)
        for process in running if n > 1 else ():
            process.send_signal(signal.SIGTERM)
        codes, error = finish(running)
        assert codes == ([143] * n if n > 1 else [0]) and error.count("error:") == (n > 1), error
    for name, weight in adapter(whole).items():
        assert torch.allclose(weight, adapter(moved)[name], rtol=0, atol=1e-6), name
    logs = [
        [json.loads(line)["loss"] for line in (d / "loss.jsonl").read_text().splitlines() if '"loss"' in line]
        for d in (whole, moved)
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


def torchrun(directory: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "finetuning.py"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, f"--out_dir={directory}", *flags], cwd=ROOT, **quiet)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert finish([torchrun(directory, *FLAGS)]) == ([0], "")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_process_that_is_killed_ends_the_run_which_resumes(tmp_path, uninterrupted, seed):
    """At a random moment: torchrun and the other end soon, and two processes resume to the same bytes."""
    rng, directory = random.Random(seed), tmp_path / "run"
    running = torchrun(directory, *FLAGS)
    while not (directory / "settings.json").exists() and running.poll() is None:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 4))
    children = psutil.Process(running.pid).children()
    if children:
        rng.choice(children).kill()
    _, error = finish([running], limit=60)
    assert error.count("error:") <= 1 and not any(child.is_running() for child in children)
    if not (directory / "summary.json").exists():
        flags = ("--resume",) if any((directory / "snapshots").glob("step-*")) else FLAGS
        assert finish([torchrun(directory, *flags)]) == ([0], "")
    assert (directory / "loss.jsonl").read_bytes() == (uninterrupted / "loss.jsonl").read_bytes()
    assert all(torch.equal(weight, adapter(directory)[name]) for name, weight in adapter(uninterrupted).items())
