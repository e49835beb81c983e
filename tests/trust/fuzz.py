"""Hostile files: seeded mutants of valid files, read as the scripts read them, and what must never happen.

    python -m tests.trust.fuzz --n=1000000 --seed=0 --state=fuzz.json --results=reports/results/trust.jsonl
    python -m tests.trust.fuzz --reader=adapter --mutant=1234        # one of them, with the traceback

Mutant i of a reader follows from (seed, reader, i) alone. Two processes read them, forked from this one, which has
imported everything; they are watched from outside. A mutant may be read, or refused with exit code 2 or 3 in one line.
Failures are all else: an error that is a bug, a process that dies, more than 5 s, more than 1 GB over what the valid
file takes, a file opened outside the folder, anything written, a process or connection begun, code compiled or run.
A state file makes it resumable: what a killed run had finished is not done again.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no threads of torch
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import dataclasses
import importlib
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import rows
from llama import cli, files
from llama.cli import option
from llama.errors import InputError, InternalError
from tests.trust import forms, readers
from tests.trust.readers import READERS, Reader

SECONDS = 5.0
MB = 1_000_000
MEMORY_MB = 1000
ADDRESS_SPACE = 4 << 30  # over what the process has: what is asked for beyond is refused by the system
CHUNK = 250  # mutants of one fork
LINE = cli.LINE + 10  # characters of an error
MEMORY = "/dev/shm"
LIBRARIES = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))
HARMLESS = ("/dev/null", "/proc/self/status", "/proc/meminfo")
OPENED = ("open", "os.listdir", "os.scandir")
# What torch imports when it needs it.
LATE = [f"torch._subclasses.{module}" for module in ("schema_check_mode", "functional_tensor", "fake_tensor")]
LATE += ["torch.nested._internal.ops", "torch.nested._internal.nested_tensor"]
# What no reading of a file does.
FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn",
    "socket.", "exec", "compile", "pickle.find_class", "marshal.", "ctypes.dlopen", "import", "os.remove", "os.rename",
    "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.kill", "os.putenv",
    "shutil.", "tempfile.", "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "sys.settrace", "os.utime",
)  # fmt: skip


@dataclass(frozen=True)
class Options(cli.Options):
    """Read mutants of valid files, count what was refused and what failed."""

    n: int = option(20_000, "mutants, over all readers", least=1)
    seed: int = option(0, "other mutants", **cli.SEEDS)
    state: str | None = option(None, "JSON file that keeps how far the run is; it goes on from there")
    results: str | None = option(None, "file of rows; one for each reader when all are done")
    reader: str | None = option(None, "one reader alone", choices=READERS)
    mutant: int | None = option(None, "one mutant of that reader, here, with its traceback", least=0)


class Guard:
    """What an audit hook sees while a mutant is read; a hook cannot be taken off, so there is one, mostly off."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.may_write = False
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in OPENED:
            path, mode = arguments[0], arguments[1:]
            if isinstance(path, int) or self._is_allowed(os.path.abspath(os.fsdecode(path or ".")), event, mode):
                return
        elif not event.startswith(FORBIDDEN) or (event == "import" and arguments[0] in sys.modules):
            return
        what = f"{event} {arguments!r}"[:200]
        self.seen.append(what)
        raise PermissionError(f"not while a file is read: {what}")

    def _is_allowed(self, path: str, event: str, mode: tuple) -> bool:
        writes = event == "open" and bool(mode[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        if path == self.folder or path.startswith(self.folder + os.sep):
            return not writes or self.may_write
        # Where Hugging Face's cache keeps unfinished downloads: names are looked at, nothing is read.
        if event == "os.scandir" and path == os.path.abspath(f"{self.folder}/../../blobs"):
            return True
        return not writes and (path.startswith(LIBRARIES) or path in HARMLESS)


GUARD = Guard()


@contextlib.contextmanager
def guarded(folder: Path, may_write: bool) -> Iterator[list[str]]:
    GUARD.folder, GUARD.may_write, GUARD.seen = str(folder), may_write, []
    try:
        yield GUARD.seen
    finally:
        GUARD.folder = None


# A mutant


@dataclass(frozen=True)
class Case:
    """A valid folder of a reader and what stands in it instead; None: nothing, a string: a link to that."""

    kind: str
    changes: dict[str, bytes | str | None]


def case_of(name: str, seed: int, i: int) -> Case:
    """Mutant i of a reader."""
    rng, reader, valid = random.Random(f"{seed} {name} {i}"), READERS[name], readers.valid(name)
    kind = rng.choice(list(valid))
    given = valid[kind]
    if rng.random() < 0.08:
        changes = forms.other_files(rng, given)
    else:
        targets = [path for path in given if f"/{path}".endswith(reader.targets)]
        chosen = {rng.choice(targets) for _ in range(rng.choice((1, 1, 1, 2)))}
        others = [rng.choice(list(given)) for _ in chosen]
        changes = {
            path: forms.mutated(rng, path, given[path], given[other])
            for path, other in zip(sorted(chosen), others, strict=True)
        }
    if reader.sealed is not None and rng.random() < 0.7:
        whole = {path: data for path, data in {**given, **changes}.items() if isinstance(data, bytes)}
        changes |= {path: data for path, data in reader.sealed(whole).items() if data != given.get(path)}
    return Case(kind, changes)


def write_valid(name: str, place: Path) -> None:
    """All folders of a reader below `place`, and beside and above them what a path may lead to."""
    for kind, given in readers.valid(name).items():
        put(place / "a" / kind, given)
    for decoy in (place / "a/decoy.safetensors", place / "decoy.safetensors"):
        decoy.write_bytes(DECOY)
        os.utime(decoy, (0, time.time()))  # the next reading will show


DECOY = (2).to_bytes(8, "little") + b"{}"


def put(folder: Path, changes: dict[str, bytes | str | None]) -> None:
    """A new file for each change: the old one may still be mapped."""
    for name, content in changes.items():
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        if content == forms.FIFO:
            os.mkfifo(path)
        elif content == forms.FOLDER:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        elif content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def read_one(reader: Reader, folder: Path) -> tuple[str, str]:
    """What came of it, and of a failure what it was."""
    with guarded(folder, reader.writes) as seen:
        try:
            reader.read(folder)
            raised = None
        except BaseException as error:
            raised = error
    if seen:
        return "guard", seen[0]
    if os.path.exists(forms.CANARY):
        os.unlink(forms.CANARY)
        return "ran", "the payload's file is there"
    for decoy in (folder.parent / "decoy.safetensors", folder.parent.parent / "decoy.safetensors"):
        if os.stat(decoy).st_atime > 0:
            os.utime(decoy, (0, time.time()))
            return "outside", f"{decoy.name} beside the folder was read"
    return ("accepted", "") if raised is None else judged(raised, folder)


def judged(error: BaseException, folder: Path) -> tuple[str, str]:
    """Whether a user would get a line that helps."""
    if not isinstance(error, Exception):
        return "escaped", repr(error)
    line, code = cli.explain(error)
    if isinstance(error, MemoryError) or line.startswith("out of memory"):
        return "memory", f"{type(error).__name__}: {error}"
    if code not in (2, 3):
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "bug", f"{line} [{place.filename.rpartition('/')[2]}:{place.lineno}]"
    if isinstance(error, OSError) and str(folder) not in line:
        return "unnamed", line
    if len(line) > LINE or not line.isprintable():
        return "line", f"{len(line)} characters: {line[:300]!r}"
    return "refused", line


# A process


NUMBER, START, REFUSED, ACCEPTED, SLOWEST, PEAK = range(6)  # what it tells, in shared memory


def work(name: str, seed: int, part: range, place: Path, told: Any, pipe: Connection) -> None:
    """Read the mutants of a part; failures go through the pipe."""
    parent = os.getppid()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    reader = READERS[name]
    write_valid(name, place)
    for kind in readers.valid(name):
        found = read_one(reader, place / "a" / kind)
        if found[0] != "accepted":
            pipe.send((-1, "valid", f"{kind}: {found[0]}: {found[1]}"))
            os._exit(0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in part:
        told[NUMBER] = i
        try:
            case = case_of(name, seed, i)
            folder = place / "a" / case.kind
            put(folder, case.changes)
        except Exception:
            pipe.send((i, "no mutant", traceback.format_exc()[-400:]))
            continue
        told[START] = time.monotonic()
        kind, what = read_one(reader, folder)
        told[SLOWEST] = max(told[SLOWEST], time.monotonic() - told[START])
        told[START] = 0
        told[PEAK] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024 / MB
        told[REFUSED] += kind == "refused"
        told[ACCEPTED] += kind == "accepted"
        if kind not in ("refused", "accepted"):
            pipe.send((i, kind, what[:500]))
        given = readers.valid(name)[case.kind]
        again = given if reader.writes else case.changes
        put(folder, {path: given.get(path) for path in {**case.changes, **again}})
        if told[PEAK] > MEMORY_MB:
            pipe.send((i, "memory", f"{told[PEAK]:.0f} MB over the valid file's"))
            os._exit(0)  # the peak does not fall again
        if os.getppid() != parent:
            os._exit(0)


class Worker:
    """A fork that reads a part, and what is known of it from outside."""

    def __init__(self, name: str, seed: int, part: range, place: Path) -> None:
        self.name, self.part, self.place = name, part, place
        self.told = multiprocessing.RawArray("d", [part.start - 1, 0, 0, 0, 0, 0])
        self.pipe, end = multiprocessing.Pipe(False)
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=work, args=(name, seed, part, place, self.told, end))
        self.process.start()
        end.close()
        self.failures: list[tuple[int, str, str]] = []

    def poll(self) -> bool:
        """Whether it has ended; ends it where a mutant takes too long."""
        self.listen()
        if self.told[START] and time.monotonic() - self.told[START] > SECONDS:
            self.process.kill()
            self.process.join()
            self.failures.append((int(self.told[NUMBER]), "time", f"more than {SECONDS} s"))
            return True
        if self.process.is_alive():
            return False
        self.process.join()
        self.listen()
        if self.process.exitcode != 0:
            self.failures.append((int(self.told[NUMBER]), "died", f"exit code {self.process.exitcode}"))
        return True

    def listen(self) -> None:
        with contextlib.suppress(EOFError):
            while self.pipe.poll():
                self.failures.append(self.pipe.recv())

    @property
    def rest(self) -> range:
        return range(int(self.told[NUMBER]) + 1, self.part.stop)


# A run


@dataclass
class Count:
    """Of one reader: what came of its mutants, and at what cost."""

    done: list[list[int]] = dataclasses.field(default_factory=list)  # parts, first and end
    refused: int = 0
    accepted: int = 0
    slowest_s: float = 0.0
    peak_mb: float = 0.0
    failures: list[list] = dataclasses.field(default_factory=list)

    def add(self, worker: Worker) -> None:
        told, (first, end) = worker.told, (worker.part.start, worker.rest.start)
        self.done.append([first, end])
        self.refused += int(told[REFUSED])
        self.accepted += int(told[ACCEPTED])
        self.slowest_s, self.peak_mb = max(self.slowest_s, told[SLOWEST]), max(self.peak_mb, told[PEAK])
        self.failures += map(list, worker.failures)

    def missing(self, n: int) -> Iterator[range]:
        """The parts of n mutants that are not done."""
        at = 0
        for first, end in [*sorted(self.done), [n, n]]:
            yield from (range(start, min(start + CHUNK, first)) for start in range(at, first, CHUNK))
            at = max(at, end)


class Run:
    """How far a run is, in memory and in its state file."""

    def __init__(self, n: int, seed: int, names: list[str], path: Path | None = None) -> None:
        shares = sum(READERS[name].share for name in names)
        self.n = {name: n * READERS[name].share // shares for name in names}
        self.n[names[0]] += n - sum(self.n.values())
        self.seed, self.path = seed, path
        self.identity = {"n": n, "seed": seed, "readers": names, "commit": rows.commit()}
        self.counts = {name: Count() for name in names}
        if path is not None and path.exists():
            held = files.read_json(path)
            if held["identity"] != self.identity:
                raise InputError(f"{path} is of another run, {held['identity']}; remove it, or name another state")
            self.counts = {name: Count(**count) for name, count in held["counts"].items()}

    def save(self) -> None:
        if self.path is not None:
            counts = {name: dataclasses.asdict(count) for name, count in self.counts.items()}
            files.replace_json(self.path, {"identity": self.identity, "counts": counts})

    def go(self, n_processes: int = 2) -> None:
        """Read all that is not done yet."""
        parts = {name: list(count.missing(self.n[name])) for name, count in self.counts.items()}
        queue = [(name, part) for name in parts for part in parts[name]]
        random.Random(0).shuffle(queue)  # costly readers and cheap ones at once
        warm_up(self.counts)
        free, slow = list(range(n_processes)), set()
        workers: dict[int, Worker] = {}
        with scratch() as folder, tqdm(total=sum(len(part) for _, part in queue), unit="mutant", disable=None) as bar:
            while queue or workers:
                while queue and free:
                    name, part = queue.pop()
                    number = free.pop()
                    place = folder / str(number)
                    shutil.rmtree(place, ignore_errors=True)
                    workers[number] = Worker(name, self.seed, part, place)
                time.sleep(0.01)
                for number, worker in list(workers.items()):
                    if not worker.poll():
                        continue
                    del workers[number]
                    free.append(number)
                    rest, i = worker.rest, int(worker.told[NUMBER])
                    if i < worker.part.start:
                        raise InternalError(f"a valid {worker.name} is not read: {worker.failures}")
                    if worker.failures and worker.failures[-1][1] == "time" and (worker.name, i) not in slow:
                        slow.add((worker.name, i))  # tried again: the machine may have been busy
                        worker.failures.pop()
                        worker.told[NUMBER], rest = i - 1, range(i, worker.part.stop)
                    if rest:
                        queue.append((worker.name, rest))
                    self.counts[worker.name].add(worker)
                    bar.update(rest.start - worker.part.start)
                    self.save()

    @property
    def failures(self) -> list[str]:
        return [
            f"{name} {i}: {kind}: {what}" for name, count in self.counts.items() for i, kind, what in count.failures
        ]

    def record(self, path: Path) -> None:
        """A row for each reader."""
        for name, count in self.counts.items():
            metrics = {"mutants_n": self.n[name], "refused_n": count.refused, "accepted_n": count.accepted}
            metrics |= {"failures_n": len(count.failures), "slowest_s": count.slowest_s, "memory_mb": count.peak_mb}
            runs = {metric: [value] for metric, value in metrics.items()}
            rows.record(
                path, "trust", {"kind": "fuzz", "reader": name}, runs, torch.device("cpu"), "float32", self.seed
            )


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="llama-fuzz-", dir=MEMORY if os.path.isdir(MEMORY) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare() -> None:
    torch.set_num_threads(1)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        "a".encode(encoding)  # json guesses which of them a file has, and imports it
    for module in LATE:
        importlib.import_module(module)
    sys.addaudithook(GUARD)


def warm_up(names: Iterable[str]) -> None:
    """Make and read what is valid, once for all forks: it imports what is imported late."""
    for name in names:
        for kind, given in readers.valid(name).items():
            folder = readers.scratch() / "warm" / str(list(READERS).index(name)) / kind
            put(folder, given)
            READERS[name].read(folder)


def show(name: str, seed: int, i: int) -> None:
    """One mutant, read here."""
    case = case_of(name, seed, i)
    with scratch() as folder:
        write_valid(name, folder)
        target = folder / "a" / case.kind
        put(target, case.changes)
        for path, content in case.changes.items():
            print(f"{case.kind}/{path}: {content[:2000] if content else content!r}")
        READERS[name].read(target)


def main(options: Options) -> None:
    prepare()
    if options.mutant is not None:
        show(options.reader or next(iter(READERS)), options.seed, options.mutant)
        return
    if options.results is not None:
        rows.require_writable(Path(options.results))
    run = Run(
        options.n,
        options.seed,
        [options.reader] if options.reader else list(READERS),
        Path(options.state) if options.state else None,
    )
    run.go()
    for name, count in run.counts.items():
        print(
            f"{name:32} {run.n[name]:8,} mutants {count.refused:8,} refused {count.accepted:8,} accepted "
            f"{len(count.failures):4} failures {count.slowest_s:6.3f} s {count.peak_mb:6.1f} MB"
        )
    print("\n".join(run.failures[:200]))
    if options.results is not None:
        run.record(Path(options.results))
    if run.failures:
        raise InternalError(f"{len(run.failures)} of {options.n} mutants were neither read nor refused")


if __name__ == "__main__":
    cli.run(main)
