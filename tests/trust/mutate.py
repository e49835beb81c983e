"""Mutation testing: how many small mistakes in the program do its tests notice?

    make mutate     # which test runs which line; then 600 mutants, in runs/mutants.jsonl

Each mutant (mutants.py) is planted in a copy of the tree, and the tests that run its line are run there, cheap ones of
every kind first, until one fails. Score: noticed / (all - equivalent); one that changes nothing that anybody could see
is listed in EQUIVALENT with the reason. A run that is stopped goes on where it was. Processes are forks of one that has
imported what takes long and nothing of ours.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

# Nothing of ours but this: a fork that had it already would not take it from the changed copy.
from tests.trust.mutants import Mutant, mutants

ROOT = Path(__file__).parent.parent.parent
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
SOURCES = ("llama/**/*.py", "data/**/*.py", "finetuning.py")
CORE = {  # and the tests that are there for each
    "llama/model.py": ["tests/llama/test_model.py", "tests/llama/checkpoint/test_checkpoint.py"],
    "llama/cache.py": ["tests/llama/test_cache.py", "tests/llama/test_model.py"],
    "llama/sampling.py": ["tests/llama/test_sampling.py"],
    "llama/lora.py": ["tests/llama/test_lora.py"],
    "llama/training/loss.py": ["tests/llama/training/test_training.py"],
    "llama/training/lean_loss.py": ["tests/llama/training/test_lean.py"],
    "llama/training/step.py": ["tests/llama/training/test_training.py"],
}
HEAVY = "torch transformers peft safetensors tiktoken sentencepiece gguf matplotlib.pyplot fire triton".split()
SECONDS, TESTS = 40, 400  # of tests that are run on one mutant, and how many at most
MEMORY = 12 << 30  # bytes that a process may take
PHASE = re.compile(r"(\|(run|setup|teardown)| \((call|setup|teardown)\))$")  # of a test, behind its name
KILLED, SURVIVED = "killed", "survived"


def main() -> None:
    """Run what the flags ask for; one line of JSON for each mutant, then the score."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", type=Path, default=ROOT / "runs" / "coverage")
    parser.add_argument("--times", type=Path, help="how long each test takes, as pytest's --junitxml writes it")
    parser.add_argument("--core", action="store_true", help="of the core alone, and all tests of each file")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--only", default="", help="of files whose path contains this")
    parser.add_argument("--again", action="store_true", help="try those that have survived once more")
    parser.add_argument("--results", type=Path, help="rows of the score")
    parser.add_argument("--processes", type=int, default=2)
    flags = parser.parse_args()
    chosen = drawn(flags.n, flags.seed, flags.only, flags.core)
    done = {line["name"]: line for line in _lines(flags.state)}
    left = [m for m in chosen if m.name not in done or (flags.again and done[m.name]["outcome"] == SURVIVED)]
    tests = TestsOfFiles() if flags.core else TestsOfLines(flags.coverage, flags.times)
    for outcome in run(left, tests, flags.processes):
        done[outcome["name"]] = outcome
        with flags.state.open("a") as file:
            file.write(json.dumps(outcome) + "\n")
        print(outcome["outcome"], outcome["name"], outcome["by"], f"{outcome['seconds']:.0f} s", flush=True)
    require_sound({outcome["by"] for outcome in done.values() if "::" in outcome["by"]})
    outcomes = [done[mutant.name] for mutant in chosen]
    print(summary(outcomes))
    if flags.results is not None:
        import torch

        from benchmarks import rows

        for part, group in {"all": outcomes, "core": [o for o in outcomes if o["path"] in CORE]}.items():
            noticed, counted = score(group)
            runs = {"planted_n": [len(group)], "equivalent_n": [len(group) - counted], "noticed_n": [noticed]}
            cell = {"kind": "mutants", "part": part}
            rows.record(flags.results, "trust", cell, runs, torch.device("cpu"), "float32", flags.seed)


def require_sound(tests: set[str]) -> None:
    """Those that have noticed something pass where nothing is planted; else what they noticed was something else."""
    if not tests:
        return
    with tempfile.TemporaryDirectory() as scratch:
        tree = _copy(Path(scratch) / "plain")
        flags = ["-n", "2", "-q", "-p", "no:cacheprovider", "--tb=line", "-m", ""]
        if subprocess.run([sys.executable, "-m", "pytest", *flags, *sorted(tests)], cwd=tree).returncode:
            sys.exit("error: tests fail on the program as it is; mend them, and take their mutants out of the state")


def drawn(n: int, seed: int, only: str = "", core: bool = False) -> list[Mutant]:
    """`n` of all mutants, each as likely as any other."""
    paths = sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)})
    names = [str(path.relative_to(ROOT)) for path in paths]
    names = [name for name in names if only in name and (name in CORE or not core)]
    found = [mutant for name in names for mutant in mutants(name, (ROOT / name).read_text())]
    return random.Random(seed).sample(found, min(n, len(found)))


def run(chosen: list[Mutant], tests: TestsOfLines | TestsOfFiles, processes: int) -> Iterator[dict]:
    """What became of each, as they end."""
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            __import__(name)
    waiting, running = collections.deque(chosen), {}
    with tempfile.TemporaryDirectory() as scratch:
        free = [_copy(Path(scratch) / str(i)) for i in range(processes)]
        for mutant in chosen[:1]:  # unchanged: nothing may be noticed
            pid = _start(dataclasses.replace(mutant, new=mutant.old), free[0], tests.of(mutant)[0])
            if os.waitpid(pid, 0)[1] != 0:
                raise RuntimeError((free[0] / "output").read_text()[-2000:])
        while waiting or running:
            while waiting and free:
                mutant, tree = waiting.popleft(), free.pop()
                found, seconds = tests.of(mutant)
                running[_start(mutant, tree, found)] = mutant, tree, time.monotonic(), 60 + 6 * seconds
            time.sleep(0.05)
            for pid, (mutant, tree, start, limit) in list(running.items()):
                took = time.monotonic() - start
                if took > limit:
                    os.killpg(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # what its tests have started
                shutil.copy(ROOT / mutant.path, tree / mutant.path)
                free.append(tree)
                del running[pid]
                yield _outcome(mutant, os.waitstatus_to_exitcode(status), tree, took)


def _copy(tree: Path) -> Path:
    """The project without its history, as it stands."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return tree


def _start(mutant: Mutant, tree: Path, tests: list[str]) -> int:
    """A process that runs the tests on the mutant; it ends with pytest's exit code."""
    (tree / mutant.path).write_text(mutant.apply((ROOT / mutant.path).read_text()))
    pid = os.fork()
    if pid:
        return pid
    os.setpgrp()
    os.chdir(tree)
    output = os.open(tree / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    assert "llama" not in sys.modules
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # the copy has its own
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    flags = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # imported before, all of it: see HEAVY
    flags += ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", f"--basetemp={tree}.tmp"]
    code = 3
    try:
        code = int(pytest.main([*flags, *tests])) if tests else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _outcome(mutant: Mutant, code: int, tree: Path, seconds: float) -> dict:
    text = (tree / "output").read_text(errors="replace")
    failed = next((line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    by = failed.split(" - ")[0].partition(" ")[2] or f"exit code {code}"
    return {
        "name": mutant.name, "path": mutant.path, "line": mutant.line, "seconds": seconds,
        "outcome": SURVIVED if code in (0, 5) else KILLED, "by": "" if code in (0, 5) else by,
    }  # fmt: skip


class TestsOfFiles:
    """All tests that are there for a file of the core: nothing need be measured before."""

    __test__ = False

    def of(self, mutant: Mutant) -> tuple[list[str], float]:
        return CORE[mutant.path], SECONDS


class TestsOfLines:
    """Which tests run a line, and how long each takes."""

    __test__ = False

    def __init__(self, data: Path, times: Path) -> None:
        self.data = coverage.CoverageData(str(data))
        self.data.read()
        self.files = {os.path.relpath(path, ROOT): path for path in self.data.measured_files()}
        self.seconds: dict[str, float] = {}
        for case in xml.etree.ElementTree.parse(times).iter("testcase"):
            path = case.get("classname").replace(".", "/") + ".py"
            self.seconds[f"{path}::{case.get('name')}"] = float(case.get("time"))

    def of(self, mutant: Mutant) -> tuple[list[str], float]:
        """Node ids, and how long they take together: each function once, then each again with other parameters."""
        by_line = self.data.contexts_by_lineno(self.files.get(mutant.path, ""))
        contexts = set(by_line.get(mutant.line, ())) - {""} or set().union(*by_line.values())  # "": while imported
        names = {PHASE.sub("", context) for context in contexts}
        mirror = Path("tests", mutant.path).with_name(f"test_{Path(mutant.path).name}")
        times, chosen, total = collections.Counter(), [], 0.0
        by_time = sorted((name for name in names if name in self.seconds), key=self.seconds.get)
        ranked = []
        for name in by_time:
            function = name.partition("[")[0]
            ranked.append((times[function], not name.startswith(str(mirror)), self.seconds[name], name))
            times[function] += 1
        for *_, seconds, name in sorted(ranked)[:TESTS]:
            if total + seconds <= SECONDS or not chosen:
                chosen.append(name)
                total += seconds
        return chosen, total


def score(outcomes: list[dict]) -> tuple[int, int]:
    """How many were noticed, of how many that are not equivalent."""
    equivalent = excused()
    counted = [outcome for outcome in outcomes if outcome["outcome"] == KILLED or outcome["name"] not in equivalent]
    return sum(outcome["outcome"] == KILLED for outcome in counted), len(counted)


def summary(outcomes: list[dict]) -> str:
    """The score, of all and of the core, and those that nobody noticed."""
    equivalent, lines = excused(), []
    for title, group in (("all", outcomes), ("core", [o for o in outcomes if o["path"] in CORE])):
        noticed, counted = score(group)
        lines.append(f"{title}: {noticed} of {counted} noticed, {noticed / max(1, counted):.1%}")
    unnoticed = (outcome["name"] for outcome in outcomes if outcome["outcome"] == SURVIVED)
    return "\n".join([*lines, *(name for name in unnoticed if name not in equivalent)])


def excused() -> set[str]:
    """Names of mutants that change nothing that anybody could see."""
    return {entry["name"] for entry in tomllib.loads(EQUIVALENT.read_text()).get("mutant", ())}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
