"""All that the project writes, as small operations: kills.py and disks.py let each of them fail at any moment.

An operation writes into a directory of its own, from what `given` has made beside it. Each of its names is afterwards
what it was before, or what an undisturbed run makes: `view` says what is there, so that halves can be told from wholes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import crash
import safetensors
import safetensors.torch
import torch

import compress
import inference
from benchmarks import rows as row_files
from llama import adapters, checkpoint, lora
from llama.training import snapshot
from llama.training.run import EXPORTS
from reports import build
from reports import pdf as course_reports

TIMES = {"tokens_per_s", "peak_memory_mb"}  # of summary.json
RESULTS = ("inference", "comparison", "loading")  # experiments of which the small reports have rows
CELL, N_POINTS = {"model": "small"}, 20_000  # of the row that is appended: long enough to be cut in the middle
DOCUMENT = "# A page\n\n<!-- begin: inference table_1 -->\n<!-- end -->\n"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def hash_of(path: Path) -> str:
    """Of a file's content, or of the names and contents below a directory."""
    digest = hashlib.sha256()
    for part in [path] if path.is_file() else sorted(path.rglob("*")):
        digest.update(str(part.relative_to(path)).encode() + (part.read_bytes() if part.is_file() else b"/"))
    return digest.hexdigest()


# What is there


def entries(root: Path) -> dict[str, str]:
    """The content behind each name in a directory; scratch has names that begin with a dot."""
    return {path.name: hash_of(path) for path in root.iterdir() if path.name[0] != "."}


def checkpoints(root: Path) -> dict[str, str]:
    """The same, of checkpoints that load. Raises InputError for one that does not."""
    for path in root.iterdir():
        if path.name[0] != ".":
            checkpoint.load(path)
    return entries(root)


def all_files(root: Path) -> dict[str, str]:
    """The content of each file below a directory."""
    names = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    return {str(name): hash_of(root / name) for name in names if name.name[0] != "."}


def prompts(root: Path) -> dict[str, str]:
    """Saved prompts by what they hold: safetensors writes two entries of metadata in any order."""
    found = {}
    for path in root.glob("[!.]*"):
        with safetensors.safe_open(path, "pt") as file:
            content = [sorted(file.metadata().items())]
        content += sorted((name, tensor.tolist()) for name, tensor in safetensors.torch.load_file(path).items())
        found[path.name] = hashlib.sha256(repr(content).encode()).hexdigest()
    return found


def measured(root: Path) -> dict[str, str]:
    """The newest row of each cell, without its time."""
    found = {}
    for experiment, rows in row_files.read_folder(root).items():
        for row in rows:
            content = {name: value for name, value in row.data.items() if name != "time"}
            found[f"{experiment} {row.cell}"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return found


def training_run(root: Path) -> dict[str, str]:
    """What a run has exported, and the run itself once it has ended. Raises InputError for half a snapshot."""
    for path in snapshot.listed(root / "snapshots"):
        snapshot.load(path)
    found = {path.name: hash_of(path) for path in root.iterdir() if path.name in ("adapter", *EXPORTS["both"])}
    if (root / "summary.json").exists():
        summary = json.loads((root / "summary.json").read_text())
        found["run"] = crash.digest(root) + repr({name: summary[name] for name in sorted(summary.keys() - TIMES)})
    return found


# The operations


@dataclass(frozen=True)
class Operation:
    """run: from what is given, into a directory. prepare: what is in that before. view: the content of each name in it.

    is_new: what is there already is refused, with exit code 2; other operations are repeated, or resumed.
    """

    run: Callable[[Path, Path], None]
    view: Callable[[Path], dict[str, str]]
    prepare: Callable[[Path, Path], None] = lambda given, root: None
    is_new: bool = True


def script(main: Callable, options: type, name: str = "out", **given_options: object) -> Callable[[Path, Path], None]:
    """A command of compress.py, from the small model into `name`."""

    def run(given: Path, root: Path) -> None:
        places = {"ckpt_dir": str(given / "base"), "out_dir": str(root / name)}
        if options is compress.MergeOptions:
            places["adapter"] = str(given / "adapter")
        main(options(**places, **given_options))

    return run


def save_prompt(given: Path, root: Path) -> None:
    options = {"ckpt_dir": str(given / "base"), "prompt": "Once upon a time", "max_gen_len": 1, "device": "cpu"}
    inference.main(inference.Options(save_prompt=str(root / "prompt.safetensors"), **options))


def train(given: Path, root: Path) -> None:
    crash.train(dataclasses.replace(crash.options_in(given), export="both"), root)


def old_rows(given: Path, root: Path) -> None:
    shutil.copy(given / "results" / "loading.jsonl", root / "rows.jsonl")


def add_row(given: Path, root: Path) -> None:
    row_files.commit = lambda: "0" * 12  # in this fork alone
    device, series = torch.device("cpu"), {"points_nats": [[step, 1 / (1 + step)] for step in range(N_POINTS)]}
    row_files.record(root / "rows.jsonl", "loading", CELL, {"runtime_s": [1.0, 2.0]}, device, "float32", series=series)


def old_page(given: Path, root: Path) -> None:
    (root / "index.html").write_text("an older page")


def make_page(given: Path, root: Path) -> None:
    build.page(build.PageOptions(results=str(given / "results"), page=str(root / "index.html")))


def old_readme(given: Path, root: Path) -> None:
    (root / "README.md").write_text(DOCUMENT)


def make_readme(given: Path, root: Path) -> None:
    build.ROOT, build.FIGURES, build.DOCUMENTS = root, root / "figures", ("README.md",)
    build.readme(build.ReadmeOptions(results=str(given / "results")))


def make_pdf(given: Path, root: Path) -> None:
    course_reports.PHASES = ("phase_1",)
    build.pdf(build.PdfOptions(results=str(given / "results"), out_dir=str(root)))


QUANTIZE, CONVERT = (compress.quantize, compress.QuantizeOptions), (compress.convert, compress.ConvertOptions)
MERGE, PRUNE = (compress.merge, compress.MergeOptions), (compress.prune, compress.PruneOptions)
OPERATIONS = {
    "train": Operation(train, training_run, is_new=False),
    "export": Operation(
        train,
        training_run,
        lambda given, root: shutil.copytree(given / "trained", root, dirs_exist_ok=True),
        is_new=False,
    ),
    "quantize int8": Operation(script(*QUANTIZE), checkpoints),
    "quantize int4": Operation(script(*QUANTIZE, bits=4, zero_points=True), checkpoints),
    "convert meta": Operation(script(*CONVERT, to="meta", type="f16"), checkpoints),
    "convert meta shards": Operation(script(*CONVERT, to="meta", shards=2), checkpoints),
    "convert hf": Operation(script(*CONVERT, to="hf"), checkpoints),
    "convert gguf": Operation(script(*CONVERT, "out.gguf"), checkpoints),
    "convert gguf q8_0": Operation(script(*CONVERT, "out.gguf", type="q8_0"), checkpoints),
    "merge": Operation(script(*MERGE), checkpoints),
    "prune": Operation(script(*PRUNE, device="cpu"), checkpoints),
    "prompt": Operation(save_prompt, prompts),
    "rows": Operation(add_row, measured, old_rows, is_new=False),
    "page": Operation(make_page, all_files, old_page, is_new=False),
    "readme": Operation(make_readme, all_files, old_readme, is_new=False),
    "pdf": Operation(make_pdf, all_files, is_new=False),
}


SHARED = ("rows", "page", "readme", "pdf")  # which two processes may write at once


def give(work: Path) -> Path:
    """A small model, an adapter for it, a run that has not exported yet, and measured rows."""
    given = work / "given"
    given.mkdir(parents=True)
    crash.options_in(given)
    model = checkpoint.load(given / "base")
    lora.apply(model, config := lora.LoRAConfig(r=2))
    for module in lora.layers(model).values():
        module.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    adapters.save(model, config, given / "adapter", checkpoint.fingerprint(given / "base"))
    (given / "results").mkdir()
    for name in RESULTS:
        shutil.copy(build.RESULTS / f"{name}.jsonl", given / "results")
    train(given, given / "trained")
    for name in ("adapter", *EXPORTS["both"]):
        shutil.rmtree(given / "trained" / name)
    for name in ("summary.json", "loss.png"):
        (given / "trained" / name).unlink(missing_ok=True)
    return given


# Disturbed runs


class Bench:
    """Where operations are tried, each run a fork of this process, which has imported everything."""

    def __init__(self, work: Path) -> None:
        crash.make_quick()
        compress.load_text = lambda *_: None
        self.given, self.root, self.output = give(work), work / "run", work / "output"
        self.seconds: dict[str, float] = {}  # of the last run from the start that nothing disturbed
        (work / "warm up").mkdir()
        make_page(self.given, work / "warm up")  # what is imported late is there for all forks

    def fresh(self, name: str) -> dict[str, str]:
        """What is there before the operation."""
        for path in (self.root, self.gone):
            shutil.rmtree(path, ignore_errors=True)
        self.root.mkdir()
        OPERATIONS[name].prepare(self.given, self.root)
        return OPERATIONS[name].view(self.root)

    @property
    def gone(self) -> Path:
        """Where fault.c moves the directory."""
        return self.root.with_name(f"{self.root.name}.gone")

    def start(
        self, name: str, fault: tuple[int, int, int] | None = None, jump: int = 0, output: Path | None = None
    ) -> int:
        """The process id of a run; see crash.start."""
        work = functools.partial(OPERATIONS[name].run, self.given, self.root)
        return crash.start(work, output or self.output, self.root, fault, jump)

    def run(
        self, name: str, fault: tuple[int, int, int] | None = None, after: float | None = None, jump: int = 0
    ) -> int:
        """The exit code of a run. after: seconds until it is killed."""
        return crash.end(self.start(name, fault, jump), None if after is None else (after, signal.SIGKILL))

    @functools.cache  # noqa: B019 (one bench lives as long as the process)
    def whole(self, name: str) -> tuple[dict[str, str], int, float]:
        """What an undisturbed run makes, how many file operations it takes, and how many seconds."""
        self.fresh(name)
        began = time.perf_counter()
        code = self.run(name, (0, 0, 0))
        seconds, text = time.perf_counter() - began, text_of(self.output)
        assert code == 0, f"{name}: {text}"
        return OPERATIONS[name].view(self.root), crash.n_operations(text), seconds

    def judge(self, name: str, code: int, expected: set[int], before: dict[str, str]) -> tuple[str | None, str]:
        """What is wrong after a disturbed run, if anything, and whether it left the old state, the new or some of both.

        Then the directory is whole again where a fault took it away, and the run is repeated, undisturbed.
        """
        operation, wanted, text = OPERATIONS[name], self.whole(name)[0], text_of(self.output)
        state = "old"
        try:
            problem = crash.wrong_end(code, text, expected)
            if self.root.exists():
                seen = operation.view(self.root)
                halves = [key for key, value in seen.items() if value not in (before.get(key), wanted.get(key))]
                lost = [key for key in before.keys() - seen.keys() if not self.gone.exists()]
                problem = problem or (f"half: {halves}, lost: {lost}" if halves or lost else None)
                problem = problem or (None if self.gone.exists() else crash.lost_step(self.root, text))
                state = "new" if seen == wanted else "old" if seen == before else "some"
            if self.gone.exists():
                shutil.rmtree(self.root, ignore_errors=True)
                self.gone.rename(self.root)
            elif problem is None and code == 0 and state != "new":
                problem = "ended well, without the result"
            is_there = operation.is_new and operation.view(self.root) == wanted
            began = time.perf_counter()
            again = self.run(name)
            if state == "old" and again == 0:  # the machine may be faster or slower than it was
                self.seconds[name] = time.perf_counter() - began
            problem = problem or crash.wrong_end(again, text_of(self.output), {2} if is_there else {0})
            if problem is None and operation.view(self.root) != wanted:
                problem = "the run after it gives something else"
        except Exception as error:  # of what cannot be read
            problem = f"{type(error).__name__}: {error}"
        return problem, state

    def n_scratch(self) -> int:
        """How many hidden names are left."""
        return sum(path.name[0] == "." and path.name != ".lock" for path in self.root.rglob("*"))


def preload() -> None:
    """Go on with fault.c loaded, and one thread: here, or in a process like this one, whose exit code it takes."""
    if "fault.so" in os.environ.get("LD_PRELOAD", ""):
        return
    with tempfile.TemporaryDirectory() as folder:
        library = crash.build_library(Path(folder))
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run(sys.orig_argv, env=environment).returncode)
