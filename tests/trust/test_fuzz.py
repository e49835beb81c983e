"""The fuzzer of hostile files: what it finds, and that it would notice."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from llama.errors import InputError
from tests.trust import fuzz
from tests.trust.readers import READERS, Reader


@pytest.fixture(scope="module", autouse=True)
def prepared():
    fuzz.prepare()


def run_of(tmp_path, planted, n: int = 3) -> list[str]:
    """The kinds of failures of a reader that does something else than reading."""
    made = Reader(lambda folder: put(folder / "only" / "a.json"), planted, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "planted", made)
        run = fuzz.Run(n, 0, ["planted"], tmp_path / "state.json")
        run.go()
    return [kind for _, kind, _ in run.counts["planted"].failures]


def put(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text('{"a": 1}')


def hostile(action):
    """A reader that reads what is valid, and does this with all else."""

    def read(folder: Path) -> None:
        path = folder / "a.json"
        if not path.is_file() or path.read_bytes() != b'{"a": 1}':
            action(folder)

    return read


def opens(folder: Path) -> None:
    Path("/etc/hostname").read_bytes()


def writes(folder: Path) -> None:
    (folder / "b").write_text("")


def divides(folder: Path) -> None:
    print(1 / 0)


def eats(folder: Path) -> None:
    mmap.mmap(-1, 1_100_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def asks_for_more(folder: Path) -> None:
    bytearray(1 << 40)


def talks(folder: Path) -> None:
    raise InputError("colours: \x1b[31m" + "x" * 9000)  # the line is made harmless: no failure


def panics(folder: Path) -> None:
    raise BaseException("a panic")


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (opens, "guard"),
        (writes, "guard"),
        (lambda folder: exec("1"), "guard"),
        (lambda folder: subprocess.run(["true"]), "guard"),
        (lambda folder: os.system("true"), "guard"),
        (divides, "bug"),
        (panics, "escaped"),
        (lambda folder: os._exit(139), "died"),
        (eats, "memory"),
        (asks_for_more, "memory"),
        (talks, None),
    ],
)
def test_each_kind_of_failure_is_noticed(tmp_path, action, kind):
    assert set(run_of(tmp_path, hostile(action))) == ({kind} if kind else set())


def test_a_mutant_that_hangs_is_ended_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    assert set(run_of(tmp_path, hostile(lambda folder: time.sleep(60)))) == {"time"}


def test_what_lies_beside_the_folder_is_missed_when_it_is_read(tmp_path):
    """Also by a library that opens files without Python: by their access time."""
    fuzz.write_valid("results", tmp_path)
    decoy = tmp_path / "a/decoy.safetensors"
    folder = tmp_path / "a/results"
    assert fuzz.read_one(READERS["results"], folder) == ("accepted", "")
    reader = READERS["results"]._replace(read=lambda folder: subprocess_cat(decoy))
    assert fuzz.read_one(reader, folder)[0] == "outside"


def subprocess_cat(path: Path) -> None:
    folder, fuzz.GUARD.folder = fuzz.GUARD.folder, None
    path.read_bytes()
    fuzz.GUARD.folder = folder


def test_a_mutant_follows_from_its_number_alone():
    for name in ("params.json", "results", "tokenizer.model, tiktoken"):
        first, again = ([fuzz.case_of(name, 1, i) for i in numbers] for numbers in (range(20), reversed(range(20))))
        assert first == again[::-1] and len({repr(case) for case in first}) > 15
        assert fuzz.case_of(name, 2, 0) != first[0]


def test_a_killed_run_goes_on(tmp_path):
    """What is done is not read again; a state of another run is refused."""
    state = tmp_path / "state.json"
    run = fuzz.Run(60, 0, ["results"], state)
    run.go()
    run.counts["results"].done = [[0, 10], [30, 60]]
    run.save()
    again = fuzz.Run(60, 0, ["results"], state)
    assert list(again.counts["results"].missing(60)) == [range(10, 30)]
    again.go()
    count = again.counts["results"]
    assert count.refused + count.accepted == 80 and not list(count.missing(60)) and not again.failures
    with pytest.raises(InputError, match="of another run"):
        fuzz.Run(61, 0, ["results"], state)


@pytest.mark.parametrize("name", READERS)
def test_mutants_are_read_or_refused(name):
    """A few of each reader, most of them refused."""
    run = fuzz.Run(30, 7, [name])
    run.go(1)
    count = run.counts[name]
    assert not run.failures and count.refused + count.accepted == 30 and count.refused > 3


@pytest.mark.slow
def test_twenty_thousand_mutants(tmp_path):
    command = [sys.executable, "-m", "tests.trust.fuzz", "--n=20000", "--seed=3", f"--state={tmp_path / 'state'}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count(" 0 failures") == len(READERS), run.stdout[-3000:] + run.stderr
