"""Files that are complete or absent: directories that appear under their name only when done, strict JSON, hashes.

A crash at any moment leaves the old state or the new one. What protects against power loss is the order: contents reach
the disk (fsync) before the rename that publishes them, and the rename before anyone is told.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import reprlib
import secrets
import shutil
import tempfile
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import safetensors

from llama.errors import EnvironmentFailure, InputError

Made = TypeVar("Made")

MAX_JSON_BYTES = 64 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # how a full disk says so: no space, over quota, file too large
IS_WINDOWS = os.name == "nt"
SCRATCH = re.compile(r"\..+\.[0-9a-f]{16}")  # names of what is being written
# What lies where a file belongs that was not downloaded, by how it begins.
STAND_INS = {
    b"version https://git-lfs": "a git-LFS pointer, not the file itself; get that with `git lfs pull`",
    b"<!doctype html": "a web page, saved in place of the file; log in there and download it again",
    b"<html": "a web page, saved in place of the file; log in there and download it again",
}


def require_new(directory: str | Path) -> Path:
    """The absolute path of a directory to be made. Raises InputError where it already holds something."""
    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} already exists and is not an empty directory; choose a new name or move it away")
    return target


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Give a scratch directory to fill, which becomes `directory` when the block ends without an error.

    Raises InputError where `directory` already holds something, EnvironmentFailure where it cannot be written.
    """
    target = require_new(directory)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        mode = scratch.stat().st_mode & 0o666  # what this user's umask leaves; safetensors leaves 0o600
        for path in scratch.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        publish(scratch, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Give the name of a scratch file to write, which becomes `path` when the block ends without an error.

    Raises InputError where `path` exists, EnvironmentFailure where it cannot be written.
    """
    target = require_absent(path)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.touch()
        mode = scratch.stat().st_mode  # what this user's umask leaves; safetensors leaves 0o600
        yield scratch
        scratch.chmod(mode)
        sync(scratch)
        try:
            os.link(scratch, target)  # unlike a rename, not over what another process has made meanwhile
        except FileExistsError:
            require_absent(target)
        except OSError:  # a disk without hard links
            publish(scratch, target)
        sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise cannot_write(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # that of a directory which is none says why already
            scratch.unlink()


def require_absent(path: str | Path) -> Path:
    """The absolute path of a file to be made. Raises InputError where there is something of that name."""
    try:
        target = Path(path).resolve()  # a RuntimeError in a loop of links
        is_there = target.exists()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is no name for a file: {error}; choose another") from error
    if is_there:
        raise InputError(f"{target} already exists; choose a new name or move it away")
    return target


def require_writable(path: str | Path) -> None:
    """Raise what `new_file` would, before there is anything to write."""
    target = require_absent(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise cannot_write(target, error) from error


def cannot_write(path: Path, error: Exception) -> EnvironmentFailure:
    """safetensors and torch say no number."""
    is_space = getattr(error, "errno", None) in (None, *NO_SPACE)
    remedy = "is the disk full?" if is_space else "choose another directory"
    return EnvironmentFailure(f"cannot write {path}: {error}; {remedy}")


def publish(scratch: Path, target: Path) -> None:
    """Give a complete file or directory its name, with its content on the disk first."""
    sync(scratch)
    if IS_WINDOWS and target.is_dir():  # an empty one; only there it is in the way
        target.rmdir()
    scratch.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a directory, is on the disk; Windows waits for files alone."""
    if IS_WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def head(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(256)
    except OSError:
        return b""


def require_no_device(path: Path) -> None:
    """Raise InputError for a pipe or a device: opening one waits for whoever writes there, reading may have no end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is no file but a pipe or a device; put the file itself there")


def stand_in(path: Path) -> str | None:
    """What a file is that others put where the real one belongs, and the remedy; by what it begins with."""
    start = head(path).lstrip().lower()
    return next((what for begin, what in STAND_INS.items() if start.startswith(begin)), None)


def damaged(path: Path, expected: str) -> InputError:
    """The refusal of a file that does not hold what its name says."""
    return InputError(f"{path} is {stand_in(path) or f'truncated or no {expected}; download it again'}")


def read_text(path: Path, newline: str | None = None) -> str:
    """The text of a UTF-8 file, without its byte-order mark; `newline` as for open(). Raises InputError for others."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError for anything else, and for more than MAX_JSON_BYTES."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; it cannot be a configuration")
    try:
        content = parse_json(data)
    except (ValueError, RecursionError) as error:
        reason = stand_in(path)
        raise InputError(f"{path} is {reason}" if reason else f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content


def parse_json(data: bytes) -> Any:
    """What JSON says. Raises ValueError, also for half of a surrogate pair, which no text has, or RecursionError."""
    content = json.loads(data)
    if b"\\u" in data:
        json.dumps(content, ensure_ascii=False).encode()
    return content


def from_json(kind: type[Made], content: Any, place: str) -> Made:
    """A dataclass of numbers, texts and lists of them, as `asdict` gave it to JSON. Raises InputError."""
    hints = _hints(kind)
    if not isinstance(content, dict) or content.keys() - hints.keys():
        raise InputError(f"{place}: is not an object of {', '.join(hints)}")
    for name, value in content.items():
        if not fits(value, hints[name]):
            raise InputError(f"{place}.{name}: {reprlib.repr(value)} is not of the type {hints[name]}")
    return kind(**content)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type such as float, list[int], int | None; every integer is a float as well."""
    if isinstance(hint, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        return isinstance(value, list) and all(fits(item, inner) for item in value)
    return type(value) is hint or (hint is float and type(value) is int and abs(value) < 1 << 53)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented. Not atomic by itself: for files of a new directory."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def append_json(path: Path, content: dict[str, Any]) -> int:
    """Append a JSON object to a file as one line, all of it or nothing; returns the number of the line, from 1.

    Several processes take turns. What one that was killed left of a line is cut off. Raises EnvironmentFailure where it
    cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            _wait_for_others(file)
            file.seek(0)
            present = file.read()  # all of it, for the number of the line: megabytes, once per measurement
            end, rest = present.rfind(b"\n") + 1, json.dumps(content).encode() + b"\n"
            if _is_json(present[end:]):  # whole but for its end
                end, rest = len(present), b"\n" + rest
            file.truncate(end)
            data = memoryview(rest)
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error
    return present[:end].count(b"\n") + rest.count(b"\n")


def _wait_for_others(file: BinaryIO) -> None:
    """Until no other process appends to the file; where there are no such locks, not at all."""
    if not IS_WINDOWS:
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def replace_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object in place of what the file holds, all at once."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write_json(scratch, content)
        publish(scratch, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # that of a directory which is none says why already
            scratch.unlink()
