"""The documents tell the truth: commands run and print what is shown, options, tests, files and links exist."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, TINY

from benchmarks import embedded
from benchmarks.rows import read_folder
from data.tiny import train
from llama import checkpoint

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), TINY / "README.md"]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
NOT_RUN, SLOW, OUTPUT = "not run by the tests: ", "run by the slow tests", "output of: "
README_LINES = 160
REAL = "models/smollm2-135m"
OPTION = re.compile(r"--(\w+)")


class Block(NamedTuple):
    """A fenced block, and what the comment above it says of it."""

    page: str
    comment: str
    text: str


def blocks(language: str) -> list[Block]:
    fence = re.compile(rf"(?:<!-- ([^\n]+) -->\n)?```{language}\n(.*?)```", re.DOTALL)
    found = ((page, match) for page, text in TEXTS.items() for match in fence.findall(text))
    return [Block(page, comment, text) for page, (comment, text) in found]


def commands(block: Block) -> list[str]:
    """Each line as it is typed, without the comment at its end."""
    return [shlex.join(words) for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]


SHELL = blocks("sh")
SHOWN = {
    shlex.join(shlex.split(block.comment.removeprefix(OUTPUT))): block.text.splitlines()
    for block in blocks("text")
    if block.comment.startswith(OUTPUT)
}
EVERY = {command for block in SHELL for command in commands(block)}
FAST = dict.fromkeys(
    [command for block in SHELL if not block.comment for command in commands(block)]
    + [command for command in SHOWN if command not in EVERY]
)


def assert_prints(out: str, command: str) -> None:
    """Something, and of an output that a page shows every line in its order; `...` stands for any lines."""
    assert out.strip()
    printed = iter(out.splitlines())
    for line in SHOWN.get(command, []):
        assert line == "..." or line in printed, f"{command} does not print: {line}"


@pytest.mark.parametrize("command", FAST)
def test_commands_run(command, monkeypatch, capsys):
    if REAL in command and not (ROOT / REAL).is_dir():
        pytest.skip("needs a trained model: make model")
    words = shlex.split(command)
    if words[0] == "make":  # would start over; that the targets exist is what can be checked from inside
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    if words[:2] == ["python", "-m"]:
        run = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert_prints(run.stdout, command)
        return
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a fruit.\n"))  # a conversation from a pipe
    # As from the shell, but for the two seconds that Python and torch take to start.
    assert run_here(words[1:], monkeypatch) == 0, capsys.readouterr().err
    assert_prints(capsys.readouterr().out, command)


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a script, or of a module (-m), that runs in this process."""
    run, name, *flags = [runpy.run_module, *words[1:]] if words[0] == "-m" else [runpy.run_path, *words]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as end, warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        run(name, run_name="__main__")  # runpy warns of a module that a test has imported already
    return end.value.code


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in SHELL if block.comment == SLOW], ids=lambda block: block.page)
def test_slow_commands_run(block, tmp_path):
    """One after the other in a directory of their own, beside the data."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    for command in commands(block):
        _, *words = shlex.split(command)
        script = words if words[0] == "-m" else [str(ROOT / words[0]), *words[1:]]
        path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
        run = subprocess.run([sys.executable, *script], cwd=tmp_path, env=path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert_prints(run.stdout, command)


def test_what_is_not_run_says_why():
    assert {block.comment for block in SHELL if not block.comment.startswith(NOT_RUN)} <= {"", SLOW}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(command in EVERY or re.sub("[\"']", "", command) in re.sub("[\"']", "", makefile) for command in SHOWN)


def script_of(command: str) -> tuple[str, ...]:
    """What stands before the options; nothing where it is no script of ours."""
    program, *words = shlex.split(command)
    if program != "python" or words[:2] == ["-m", "pytest"]:
        return ()
    return tuple(itertools.takewhile(lambda word: word == "-m" or not word.startswith("-"), words))


@functools.cache
def options_of(script: tuple[str, ...]) -> set[str]:
    """The options that `--help` lists."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_here([*script, "--help"], patch) == 0
    return set(OPTION.findall(out.getvalue()))


@pytest.mark.parametrize("block", [block for block in SHELL if block.comment.startswith(NOT_RUN)], ids=lambda b: b.page)
def test_options_of_commands_that_are_not_run_exist(block):
    """Script, command and options, for lack of more."""
    for command in commands(block):
        if script := script_of(command):
            assert set(OPTION.findall(command)) - {"help"} <= options_of(script), command


def test_options_named_in_the_text_exist():
    """Each is an option of some script whose commands the pages show."""
    known = {"debug"}.union(*map(options_of, {script_of(command) for command in EVERY} - {()}))
    named = {name for text in TEXTS.values() for part in re.findall("`[^`\n]+`", text) for name in OPTION.findall(part)}
    assert named and not named - known


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page)
def test_python_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(block.text, {})
    assert out.getvalue()


def test_named_tests_exist():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = {name for text in TEXTS.values() for name in re.findall(r"\btest_\w+\b(?!\.py)", text)}
    assert len(names) > 100
    assert not {name for name in names if f"def {name}(" not in sources}


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:llama|data|benchmarks|reports|tests|docs)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme():
    assert {page for page in TEXTS if page != "README.md"} <= set(re.findall(r"\]\(([\w./]+)\)", TEXTS["README.md"]))


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= README_LINES


def test_the_embedded_model_is_what_its_page_says(tiny):
    """Measured again: the held-out loss of both models, the samples, the size of what ships."""
    for row in read_folder(ROOT / "reports" / "results")["tiny"]:
        directory = {preset: folder for preset, folder, *_ in train.MODELS.values()}[row.cell["model"]]
        loss = embedded.held_out_loss(checkpoint.load(directory, torch.float32), tiny.tokenizer, n=16)
        assert loss == pytest.approx(row.median("held_out_loss_nats"), abs=0.1)
    text = TEXTS["data/tiny/README.md"]
    assert re.search(r"<!-- samples -->\n(.*?)<!-- end -->", text, re.DOTALL)[1] == embedded.samples(tiny)
    shipped = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(os.path.getsize(path) for path in shipped) <= 12e6
    main, draft = (checkpoint.load(TINY / part).args.n_params() for part in ("", "draft"))
    assert draft * 10 <= main
