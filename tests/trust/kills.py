"""Kills whatever writes files, at random moments, and looks at what is left.

    python -m tests.trust.kills --n=1000 --seed=0 --state=kills.jsonl --results=reports/results/trust.jsonl

Half of the kills come at a random change of a file (fault.c), half after a random part of the time that the operation
takes. Afterwards each file and directory is as it was before or as an undisturbed run makes it, byte for byte, and the
operation, run once more, gives just that. Every trial is a line of the state file: an interrupted run goes on there.
"""

from __future__ import annotations

import json
import random
import signal
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import rows as row_files
from llama import cli, files
from llama.cli import option
from llama.errors import InputError, InternalError
from tests.trust.operations import OPERATIONS, Bench, preload


@dataclass(frozen=True)
class Options(cli.Options):
    """Kill operations at random moments."""

    n: int = option(1000, "kills, over all operations", least=1)
    seed: int = option(0, "seed of the moments", **cli.SEEDS)
    operations: str = option(",".join(OPERATIONS), "which", choices=OPERATIONS, several=True)
    state: str | None = option(None, "file of all trials so far, of a run that was interrupted; default: none is kept")
    results: str | None = option(None, "file to append a row per operation to; default: none")


def main(options: Options) -> None:
    preload()
    trials, names = read_state(options), options.operations.split(",")
    shares = {name: len(range(i, options.n, len(names))) for i, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work))
        with tqdm(total=options.n, initial=sum(counted(trials)["kills"].values()), unit="kill", disable=None) as bar:
            while left := [name for name in names if counted(trials)["kills"][name] < shares[name]]:
                for name in left:
                    trial = attempt(bench, name, options.seed, sum(trial["operation"] == name for trial in trials))
                    trials.append(trial)
                    if options.state is not None:
                        files.append_json(Path(options.state), {"seed": options.seed, **trial})
                    bar.update(trial["is_killed"])
        wholes = {name: bench.whole(name) for name in names}
    counts = counted(trials)
    for name, (_, n_operations, seconds) in wholes.items():
        runs = {f"{what}_n": [counts[what][name]] for what in ("kills", "old", "some", "new", "scratch", "lost")}
        runs |= {"file_operations_n": [n_operations], "undisturbed_s": [seconds]}
        print(f"{name:<20}", ", ".join(f"{what} {values[0]:g}" for what, values in runs.items()))
        if options.results is not None:
            cell = {"kind": "kills", "operation": name}
            cpu, path = torch.device("cpu"), Path(options.results)
            row_files.record(path, "trust", cell, runs, cpu, "float32", options.seed)
    lost = [f"{trial['operation']}, {trial['moment']}: {trial['problem']}" for trial in trials if trial["problem"]]
    if lost:
        raise InternalError(f"{len(lost)} of {len(trials)} trials went wrong; the first: {lost[0]}")


def read_state(options: Options) -> list[dict]:
    """The trials of earlier runs. Raises InputError where they are of a different seed."""
    if options.state is None or not Path(options.state).exists():
        return []
    trials = [json.loads(line) for line in files.read_text(Path(options.state)).splitlines()]
    if any(trial.pop("seed") != options.seed for trial in trials):
        raise InputError(f"--state={options.state} is of a run with a different seed; choose another file")
    return trials


def attempt(bench: Bench, name: str, seed: int, number: int) -> dict:
    """One run of an operation, killed if it lasts that long; what came of it."""
    rng, (_, n_operations, seconds) = random.Random(f"{seed} {name} {number}"), bench.whole(name)
    before = bench.fresh(name)
    if number % 2:
        moment = f"after {(after := rng.uniform(0, bench.seconds.get(name, seconds))):.3f} s"
        code = bench.run(name, after=after)
    else:
        moment = f"at file operation {(at := rng.randint(1, n_operations))} of {n_operations}"
        code = bench.run(name, fault=(at, 0, 0))
    n_scratch = bench.n_scratch()
    problem, state = bench.judge(name, code, {0, -signal.SIGKILL}, before)
    found = {"operation": name, "moment": moment, "is_killed": code == -signal.SIGKILL, "state": state}
    return found | {"scratch": n_scratch, "problem": problem}


def counted(trials: list[dict]) -> dict[str, Counter]:
    """Of the trials in which the kill came in time, how many there were, and how they ended, by operation."""
    counts = {what: Counter() for what in ("kills", "old", "some", "new", "scratch", "lost")}
    for trial in trials:
        name = trial["operation"]
        counts["lost"][name] += trial["problem"] is not None
        if trial["is_killed"]:
            counts["kills"][name] += 1
            counts[trial["state"]][name] += 1
            counts["scratch"][name] += trial["scratch"] > 0
    return counts


if __name__ == "__main__":
    cli.run(main)
