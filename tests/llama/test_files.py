"""Directories that appear whole or not at all, and what an error in the writing of one is called."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import ROOT

from llama import checkpoint, cli, files
from llama.errors import EnvironmentFailure, InputError


def write(directory, error: Exception):
    with files.new_directory(directory) as scratch:
        (scratch / "half").write_text("x")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), torch.OutOfMemoryError("CUDA"), KeyError("x")])
def test_an_error_that_is_not_of_the_disk_stays_what_it_is(tmp_path, error):
    """A bug stays a bug and a lack of memory a lack of memory; the disk is not blamed."""
    with pytest.raises(type(error)) as raised:
        write(tmp_path / "out", error)
    assert raised.value is error and not list(tmp_path.iterdir())
    line, code = cli.explain(error)
    assert "disk" not in line and code == (3 if isinstance(error, torch.OutOfMemoryError) else 1)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "is the disk full"),
        (safetensors.SafetensorError("I/O error"), "is the disk full"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "choose another"),
    ],
)
def test_an_error_of_the_disk_names_the_directory(tmp_path, error, remedy):
    with pytest.raises(EnvironmentFailure, match=f"cannot write {tmp_path / 'out'}: .*{remedy}"):
        write(tmp_path / "out", error)
    assert not list(tmp_path.iterdir())


def test_the_writer_of_torch_reports_a_full_disk_as_a_runtime_error(model, tmp_path, monkeypatch):
    def full(*_args):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(EnvironmentFailure, match=r"cannot write .*file write failed; is the disk full"):
        checkpoint.save(model, tmp_path / "out")


def test_windows_which_opens_no_directory_and_replaces_none(tmp_path, monkeypatch):
    """Its rules, kept by a stand-in: a directory cannot be opened, nor be overwritten by a rename."""
    usual, rename = os.open, Path.replace

    def open_file(path, flags, *args, **named):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        return usual(path, flags, *args, **named)

    def replace(path, target):
        if target.is_dir():
            raise PermissionError(errno.EACCES, "Access is denied")
        return rename(path, target)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(Path, "replace", replace)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EnvironmentFailure), files.new_directory(tmp_path / "new") as scratch:
        (scratch / "file").write_text("x")
    monkeypatch.setattr(files, "IS_WINDOWS", True)
    for name in ("new", "empty"):
        with files.new_directory(tmp_path / name) as scratch:
            (scratch / "file").write_text("x")
        assert (tmp_path / name / "file").read_text() == "x"


def test_contents_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """For a power cut: files, then the directory that lists them, then its name, then the list that the name is in."""
    events, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda at: (events.append(Path(os.readlink(f"/proc/self/fd/{at}")).name), sync(at))
    )
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append("renamed"), replace(path, to)))
    with files.new_directory(tmp_path / "out") as scratch:
        for name in ("a", "b"):
            (scratch / name).write_text("x")
    assert sorted(events[:2]) == ["a", "b"] and events[2:] == [scratch.name, "renamed", tmp_path.name]


def test_a_file_that_is_replaced_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    def full(path, _):
        path.write_text('{"half":')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.replace_json(tmp_path / "a.json", {"n": 1})
    with monkeypatch.context() as context, pytest.raises(EnvironmentFailure, match="is the disk full"):
        context.setattr(files, "write_json", full)
        files.replace_json(tmp_path / "a.json", {"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and files.read_json(tmp_path / "a.json") == {"n": 1}
    files.replace_json(tmp_path / "a.json", {"n": 3})
    assert files.read_json(tmp_path / "a.json") == {"n": 3}


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "text").write_bytes("naïve 日本語".encode())
    program = "import sys, pathlib; from llama import files; print(ascii(files.read_text(pathlib.Path(sys.argv[1]))))"
    command = [sys.executable, "-c", program, str(tmp_path / "text")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout == ascii("naïve 日本語") + "\n", run.stderr


@pytest.mark.parametrize("new", [files.new_directory, files.new_file])
def test_two_that_write_the_same_do_not_share_a_scratch_name(tmp_path, new):
    taken = contextlib.suppress(InputError)  # the first to end has the name; an empty directory may be replaced
    with taken, new(tmp_path / "out") as one, new(tmp_path / "out") as other:
        assert one != other


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_who_may_read_a_checkpoint_is_what_the_umask_says(model, tmp_path, umask, layout):
    usual = os.umask(umask)
    try:
        checkpoint.save(model, tmp_path / "out", layout)
    finally:
        os.umask(usual)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


def test_a_new_file_does_not_take_the_place_of_one_that_came_meanwhile(tmp_path, monkeypatch):
    target = tmp_path / "new"
    with pytest.raises(InputError, match="already exists"), files.new_file(target) as scratch:
        scratch.write_text("mine")
        target.write_text("another's")
    assert target.read_text() == "another's" and list(tmp_path.iterdir()) == [target]
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no such links")))
    with files.new_file(tmp_path / "plain") as scratch:
        scratch.write_text("x")
    assert (tmp_path / "plain").read_text() == "x" and len(list(tmp_path.iterdir())) == 2


def test_a_line_that_finds_no_room_leaves_the_file_as_it_was(tmp_path):
    """In a process that may write so many bytes and no more; then with room, after a line that was cut off."""
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n')
    program = (
        "import pathlib, resource, signal\nfrom llama import errors, files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        f"try: files.append_json(pathlib.Path({str(path)!r}), {{'b': 'x' * 9000}})\n"
        "except errors.EnvironmentFailure as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cannot write" in run.stdout and "is the disk full" in run.stdout and path.read_text() == '{"a": 1}\n'
    path.write_text('{"a": 1}\n{"b":')
    assert files.append_json(path, {"c": 3}) == 2 and path.read_text() == '{"a": 1}\n{"c": 3}\n'


# A script that is in the middle of writing tensors for a minute.
WRITING = """
import pathlib, runpy, signal, sys, time
import safetensors.torch
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the caller of the tests may ignore
def save_file(tensors, path, metadata=None):
    pathlib.Path(path).write_bytes(b"half of it")
    time.sleep(60)
safetensors.torch.save_file = save_file
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPTS = {
    "inference.py": ("--prompt=The", "--save_prompt={}"),
    "compress.py": ("quantize", "--bits=8", "--out_dir={}"),
}


@pytest.mark.parametrize(
    ("script", "number"),
    [
        ("inference.py", signal.SIGHUP),
        ("compress.py", signal.SIGTERM),
        pytest.param("inference.py", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_script_that_is_terminated_leaves_nothing_half_written(tmp_path, script, number):
    """Its code is what a shell would say. As `timeout` does, the signal is sent twice."""
    arguments = [argument.format(tmp_path / "new") for argument in SCRIPTS[script]]
    process = subprocess.Popen([sys.executable, "-c", WRITING, script, *arguments], cwd=ROOT, stderr=subprocess.PIPE)
    while not any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    process.send_signal(number)
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 128 + number, errors
    assert b"Traceback" not in errors and not list(tmp_path.iterdir())


def test_a_signal_that_the_caller_ignores_stays_ignored(monkeypatch):
    """As under `nohup`."""

    def main(options: cli.Options) -> None:
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and callable(signal.getsignal(signal.SIGTERM))

    usual = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        monkeypatch.setattr(sys, "argv", ["script"])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        assert end.value.code == 0
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
