"""The tests of the core notice small mistakes in it; and the tool that says so plants what it says."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from tests.trust import mutate
from tests.trust.mutants import mutants

TEXT = '''
def width(a: int, b: int = 2, *, keep: bool = True) -> int:
    """A docstring, with 3 in it."""
    if not keep and a < b:
        raise ValueError(f"{a} is below {b + 1}")
    for i in range(a, 8):
        if i % 2:
            continue
        a += i
    print(f"{a + 1:2}", end="")
    return max((a * 2), -b, key=abs)
'''
PLANTED = {
    ("2", "3"), ("True", "False"), ("not keep", "keep"), ("and", "or"), ("<", "<="), ("8", "9"), ("%", "*"),
    ("not keep and a < b", "(not (not keep and a < b))"), ("i % 2", "(not (i % 2))"), ("continue", "break"),
    ('raise ValueError(f"{a} is below {b + 1}")', "pass"), ("range(a, 8)", "range(8, a)"), ("a += i", "pass"),
    ('print(f"{a + 1:2}", end="")', "print(f'{a + 1:2}')"), ('print(f"{a + 1:2}", end="")', "pass"), ("*", "/"),
    ("-b", "b"),
    ("max((a * 2), -b, key=abs)", "max(-b, a * 2, key=abs)"), ("max((a * 2), -b, key=abs)", "max(a * 2, -b)"),
    ("return max((a * 2), -b, key=abs)", "return None"),
}  # fmt: skip


def test_every_kind_of_mistake_is_planted_once_and_nothing_that_people_read():
    found = mutants("a.py", TEXT)
    assert {(mutant.old, mutant.new) for mutant in found} == PLANTED
    for mutant in found:
        ast.parse(mutant.apply(TEXT))
        assert TEXT.splitlines()[mutant.line - 1].strip() == mutant.source and mutant.scope == "width"


def test_the_same_seed_draws_the_same_mutants_of_the_whole_project():
    first, second = (mutate.drawn(50, seed) for seed in (3, 3))
    assert first == second != mutate.drawn(50, 4) and len({mutant.path for mutant in first}) > 10
    assert all(mutant.path == "llama/cache.py" for mutant in mutate.drawn(9, 0, "llama/cache.py"))


def test_equivalent_mutants_are_not_counted():
    ended = [{"name": str(i), "path": "llama/cache.py", "outcome": mutate.KILLED} for i in range(3)]
    ended.append({"name": "survivor", "path": "data/text.py", "outcome": mutate.SURVIVED})
    text = mutate.summary(ended)
    assert "all: 3 of 4 noticed, 75.0%" in text and "core: 3 of 3 noticed" in text and text.endswith("\nsurvivor")


@pytest.mark.slow
def test_forty_mistakes_in_the_core_are_noticed(tmp_path):
    """Of 40, as they fall with the code as it is; `make mutate` counts more of them, and all of the project's."""
    flags = ["--core", "--n=40", f"--state={tmp_path / 'state'}", "--processes=1"]
    command = [sys.executable, "-m", "tests.trust.mutate", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    ended = [json.loads(line) for line in (tmp_path / "state").read_text().splitlines()]
    survivors = {outcome["name"] for outcome in ended if outcome["outcome"] == mutate.SURVIVED} - mutate.excused()
    assert len(ended) == 40 and len(survivors) <= 10, survivors
