"""Options: said once as fields of a dataclass, read by fire, checked, and named in messages as they are typed."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import pytest
from conftest import ROOT

from llama import cli
from llama.cli import option
from llama.errors import InputError, NonFinite


@dataclass(frozen=True)
class Options(cli.Options):
    """Do something."""

    mode: str = option("fast", "how", choices=("fast", "slow"))
    parts: str = option("a,b", "which", choices=("a", "b", "c"), several=True)
    steps: int = option(3, "how often", least=1)
    budget: float | None = option(None, "how much; default: no limit", above=0)
    stream: bool = option(False, "whether at once")
    title: str | None = option(None, "a word")
    max_len: int = option(9, "how long")
    share: float = option(0.5, "how much of it", below=1)
    out_dir: str = option("runs", "where to")


@dataclass(frozen=True)
class WithPresets(Options):
    """Do something, from a preset."""

    @classmethod
    def resolve(cls, typed: dict[str, Any]) -> Self:
        preset = {"steps": 100} if typed.get("mode") == "slow" else {}
        return cls(**{**preset, **typed})


def called(argv: list[str], kind: type = Options) -> Options:
    """The options that a script gets for these arguments."""
    received = []

    def main(options) -> None:
        received.append(options)

    main.__annotations__["options"] = kind
    cli.call(main, argv, "script.py")
    return received[0]


def test_flags_are_fields():
    assert called([]) == Options()
    found = called(["--mode=slow", "--parts", "c,a", "--steps=7", "--budget=0.5", "--stream", "--title=1,2"])
    assert found == Options("slow", "c,a", 7, 0.5, True, "1,2")


def test_a_home_directory_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = called(["--out_dir=~/runs", "--title=~/runs"])
    assert (found.out_dir, found.title) == ("/home/me/runs", "~/runs")


def test_only_what_was_typed_overrides_a_preset():
    assert called(["--mode=slow"], WithPresets).steps == 100
    assert called(["--mode=slow", "--steps=3"], WithPresets).steps == 3  # typed, though it is the default


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--mode=quick", "--mode=quick: expected one of fast, slow"),
        ("--parts=a,d", "--parts=a,d: expected a choice of a,b,c, each once"),
        ("--parts=a,a", "--parts=a,a: expected a choice of a,b,c, each once"),
        ("--parts=", "--parts=: expected a choice of a,b,c, each once"),
        ("--steps=0", "--steps=0: expected at least 1"),
        ("--share=1", "--share=1.0: expected less than 1"),
        ("--share=-inf", "--share=-inf: expected less than 1"),
        ("--share=nan", "--share=nan: expected less than 1"),
        ("--steps=x", "--steps=x: expected an integer"),
        ("--budget=0", "--budget=0.0: expected more than 0"),
        ("--budget=inf", "--budget=inf: expected more than 0"),
        ("--budget=nan", "--budget=nan: expected more than 0"),
        ("--stream=maybe", "--stream=maybe: expected True or False"),
        ("--step=1", "unknown flag --step; did you mean --steps?"),
        ("-x=1", "unknown flag -x; see --help"),
        ("--no-stream", "unknown flag --no-stream; did you mean --stream?"),
        ("--title", "flag --title needs a value; one that begins with -- is written --title=value"),
        ("title", "unexpected argument 'title'; flags are written --name=value"),
    ],
)
def test_what_an_option_may_not_be(flag, message):
    with pytest.raises(InputError) as error:
        called([flag])
    assert str(error.value) == message


def test_a_dataclass_made_in_python_is_checked_as_well():
    with pytest.raises(InputError, match=r"--budget=-1"):
        Options(budget=-1)
    assert Options(budget=math.pi).budget == math.pi


def test_help_says_all_that_a_field_says(capsys):
    with pytest.raises(IndexError):  # nothing was called
        called(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Do something." in out
    for field in fields(Options):
        assert f"--{field.name}=" in out and field.metadata["help"] in out
    assert "Default: 'fast'" in out and "Default: 3" in out


@pytest.mark.parametrize("kind", [InputError, NonFinite])
def test_the_librarys_parameters_become_flags(kind):
    """`steps=3` of a message is `--steps=3` where it is an option of the script; paths and other words stay."""

    def main(options: Options) -> None:
        raise kind("use steps=3 or mode=slow, not other=1, /runs/steps=4 or --steps=5; my_steps=6")

    with pytest.raises(kind) as error:
        cli.call(main, [], "script.py")
    assert str(error.value) == "use --steps=3 or --mode=slow, not other=1, /runs/steps=4 or --steps=5; my_steps=6"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("shorten it or raise max_len", "shorten it or raise --max_len"),
        ("max_len -1; max_len=2, or the steps", "--max_len -1; --max_len=2, or the steps"),
        ("/runs/max_len/a.json:max_len: 'max_len'", "/runs/max_len/a.json:max_len: 'max_len'"),
        ("--max_len, my_max_len and max_length", "--max_len, my_max_len and max_length"),
    ],
)
def test_a_parameter_without_a_value_is_a_flag_where_it_is_no_word_of_english(message, shown):
    def main(options: Options) -> None:
        raise InputError(message)

    with pytest.raises(InputError) as error:
        cli.call(main, [], "script.py")
    assert str(error.value) == shown


def main(options: Options) -> None:
    """A script, run by the test below."""
    print("done")
    print("progress", file=sys.stderr)


@pytest.mark.parametrize(
    ("closed", "code", "shown"),
    [("", 0, "done\nprogress\n"), ("2>&-", 0, "done\n"), (">&-", 3, "error: standard output is closed; .*\n")],
)
def test_streams_that_the_caller_closed(closed, code, shown):
    program = "from llama import cli; import test_cli; cli.run(test_cli.main)"
    command = ["sh", "-c", f'"$0" "$@" {closed}', sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), *sys.path])}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == code and re.fullmatch(shown, run.stdout + run.stderr)


@pytest.mark.parametrize(
    ("full", "flags", "code"), [("2>", [], 3), ("2>", ["--max_len=x"], 2), (">", ["--max_len=x"], 2)]
)
def test_streams_on_a_full_disk_change_no_exit_code(full, flags, code):
    program = "from llama import cli; import test_cli; cli.run(test_cli.main)"
    command = ["sh", "-c", f'"$0" "$@" 2>/dev/full {full}/dev/full', sys.executable, "-c", program, *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), *sys.path])}
    assert subprocess.run(command, stdout=subprocess.DEVNULL, env=environment).returncode == code


def test_a_line_quotes_nothing_that_a_terminal_would_obey():
    """What a file holds may be in it: colours and cursors, half a surrogate pair, a book."""
    line, code = cli.explain(InputError("a.json:\n name \x1b[2J\x07\u202e\ud800 \t is wrong"))
    assert (line, code) == ("a.json: name \\x1b[2J\\x07\\u202e\\ud800 is wrong", 2)
    line, _ = cli.explain(InputError("a.json:" + "x" * 10**6 + "; delete it"))
    assert len(line) < 2100 and line.startswith("a.json:xxx") and line.endswith("xxx; delete it")
