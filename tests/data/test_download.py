"""data/download.py against a server on this machine that cuts off, stalls, fails, changes its mind and lies."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import re
import runpy
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data import alpaca, download, records
from llama import cli
from llama.errors import EnvironmentFailure, InputError

RECORDS = [{"instruction": f"Say {i} in Polish: ź", "input": "", "output": f"It is {i}. " * 9} for i in range(40)]
CONTENT = json.dumps(RECORDS, indent=4).encode()
OTHER = json.dumps(RECORDS[::-1], indent=4).encode()  # a later version, as long as the first
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CUT = 1000  # bytes after which a bad answer ends
BODIES = {
    "/not-json": CONTENT[:-1],
    "/not-a-list": b'{"instruction": "a", "output": "b"}',
    "/not-an-object": b'[{"instruction": "a", "output": "b"}, 3]',
    "/no-output": b'[{"instruction": "a", "output": "b"}, {"instruction": "a"}]',
    "/wrong-input": b'[{"instruction": "a", "output": "b", "input": 3}]',
}
PLACES = {
    "/to-a-file": "file:///etc/hostname",
    "/to-itself": "/to-itself",
    "/to-nonsense": "http://[",
    "/moved": "/good",
}
STATUSES = {"/missing": 404, "/busy": 500, "/too-many": 429}


class Server(ThreadingHTTPServer):
    """What a path does is in Handler; `log` has path, Range and sent bytes of each request, in order."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.log, self.calls, self.end = [], collections.Counter(), threading.Event()
        self.watched, self.seen = None, []

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request, client_address):
        """The client may leave in the middle."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.calls[self.path] += 1
        first = self.server.calls[self.path] == 1
        status = STATUSES.get(self.path, 500 if self.path == "/busy-once" and first else 200)
        if self.path in PLACES:
            self.answer(302, b"", {"Location": PLACES[self.path]})
        elif status != 200:
            self.answer(status, b"sorry")
        elif self.path in BODIES:
            self.answer(200, BODIES[self.path])
        elif self.path == "/unsized":
            self.answer(200, CONTENT, {"Content-Length": None})
        else:
            self.file(first)

    def file(self, first):
        """A version of the file, or the part of it that is asked for."""
        content = OTHER if self.path.startswith("/changing") and not first else CONTENT
        start = 0 if "ignores" in self.path else int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if start >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        ends = "cut-always" in self.path or (first and ("once" in self.path or "changing" in self.path))
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.answer(206 if start else 200, content[start:], headers, CUT if ends else None)

    def answer(self, status, body, headers=None, cut=None):
        self.server.log.append((self.path, self.headers.get("Range"), len(body[:cut])))
        if self.server.watched:
            self.server.seen.append(self.server.watched.exists())
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if cut is not None and "stall" in self.path:
            self.server.end.wait(60)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        yield server
        server.end.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def call(server, tmp_path, monkeypatch, capsys):
    """Runs the command on a path of the server: exit code, stdout, stderr. Its files are out.json and subset.json."""

    def call(path, *flags):
        url = path if "://" in path else server.url(path)
        sha256 = hashlib.sha256(BODIES.get(path, CONTENT)).hexdigest()
        files = (f"--out={tmp_path}/out.json", f"--subset_out={tmp_path}/subset.json", "--n=7")
        given = {flag.split("=")[0] for flag in flags}
        defaults = [flag for flag in (f"--url={url}", f"--sha256={sha256}", *files) if flag.split("=")[0] not in given]
        monkeypatch.setattr(sys, "argv", ["download.py", *defaults, *flags])
        with pytest.raises(SystemExit) as exit_:
            cli.run(download.main)
        return exit_.value.code, *capsys.readouterr()

    return call


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_nothing_happens_at_import(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(download.__file__, run_name="imported")
    assert not left(tmp_path) and capsys.readouterr() == ("", "")


def test_the_file_arrives_byte_equal_with_a_choice_of_it(server, call, tmp_path):
    code, out, err = call("/good", "--seed=3", f"--sha256={SHA256.upper()}")
    assert (code, err) == (0, "") and left(tmp_path) == ["out.json", "subset.json"]
    assert (tmp_path / "out.json").read_bytes() == CONTENT
    assert f"out.json: 40 records, {len(CONTENT):,} bytes, sha256 {SHA256}\n" in out
    assert "subset.json: 7 of them, chosen with seed 3\n" in out
    chosen = download.choose(records.read(tmp_path / "out.json").records, 7, 3)
    subset = (tmp_path / "subset.json").read_text()
    assert subset == json.dumps([dataclasses.asdict(record) for record in chosen], indent=1) + "\n"
    code, out, err = call("/good", "--seed=3")
    assert (code, err, len(server.log)) == (0, "", 1)  # it is there already, and not fetched again
    assert (tmp_path / "subset.json").read_text() == subset


def test_the_choice_is_a_pure_function_in_the_order_of_the_source():
    made = [alpaca.Record(**record) for record in RECORDS]
    random.seed(5)
    chosen = download.choose(made, 7, 1)
    random.seed(6)
    assert download.choose(made, 7, 1) == chosen != download.choose(made, 7, 2)
    indices = [made.index(record) for record in chosen]
    assert len(set(indices)) == 7 and indices == sorted(indices)
    assert download.choose(made, 40, 1) == made
    with pytest.raises(InputError, match="n=41: there are only 40 records"):
        download.choose(made, 41, 1)


@pytest.mark.parametrize("path", ["/cut-once", "/stall-once"])
@pytest.mark.parametrize("pauses", [(0.0,), ()], ids=["same call", "next call"])
def test_a_broken_download_continues_where_it_stands(server, call, tmp_path, monkeypatch, path, pauses):
    monkeypatch.setattr(download, "PAUSES", pauses)
    timeout = ["--timeout=2"] if "stall" in path else []  # enough for a busy machine to answer
    if not pauses:
        code, out, err = call(path, *timeout)
        reason = "timed out" if "stall" in path else f"cut off after 1,000 of {len(CONTENT):,} bytes"
        again = "check the network and run the command again to continue"
        assert (code, out, err) == (3, "", f"error: {server.url(path)}: {reason}; {again}\n")
        assert left(tmp_path) == ["out.json.part"]
        assert (tmp_path / "out.json.part").read_bytes() == CONTENT[:CUT]
    code, out, err = call(path, *timeout)
    assert (code, err) == (0, "") and (not pauses or "; trying again in 0 s\n" in out)
    assert (tmp_path / "out.json").read_bytes() == CONTENT and left(tmp_path) == ["out.json", "subset.json"]
    assert server.log == [(path, None, CUT), (path, f"bytes={CUT}-", len(CONTENT) - CUT)]


def test_only_a_complete_file_gets_the_name(server, call, tmp_path, monkeypatch):
    server.watched = tmp_path / "out.json"
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(a.read_bytes()), replace(a, b)))
    assert call("/cut-once")[0] == 0
    assert server.seen == [False, False] and replaced == [CONTENT]


@pytest.mark.parametrize(
    ("path", "content", "ranges"),
    [
        ("/changing", OTHER, [None, f"bytes={CUT}-", None]),  # continues with the bytes of the other version
        ("/ignores-range-once", CONTENT, [None, f"bytes={CUT}-"]),
        ("/unsized", CONTENT, [None]),
        ("/busy-once", CONTENT, [None, None]),
        ("/moved", CONTENT, [None, None]),
    ],
)
def test_other_servers(server, call, tmp_path, path, content, ranges):
    assert call(path, f"--sha256={hashlib.sha256(content).hexdigest()}")[0] == 0
    assert (tmp_path / "out.json").read_bytes() == content
    assert [entry[1] for entry in server.log] == ranges


@pytest.mark.parametrize(
    ("part", "ranges"),
    [
        (CONTENT, [f"bytes={len(CONTENT)}-"]),  # ended before the file got its name
        (CONTENT + b"more", [f"bytes={len(CONTENT) + 4}-", None]),
        (CONTENT[:9], ["bytes=9-"]),
        (b"", [None]),
        (b"abc", ["bytes=3-", None]),  # of a different file
    ],
)
def test_a_part_that_lies_there_is_used_only_where_it_fits(server, call, tmp_path, part, ranges):
    (tmp_path / "out.json.part").write_bytes(part)
    assert call("/good")[0] == 0
    assert (tmp_path / "out.json").read_bytes() == CONTENT and left(tmp_path) == ["out.json", "subset.json"]
    assert [entry[1] for entry in server.log] == ranges


def test_another_hash_is_refused(server, call, tmp_path):
    wanted = "a" * 64
    message = f"sha256 is {SHA256}, not {wanted}; check the address and the hash"
    code, _, err = call("/good", f"--sha256={wanted}")
    assert (code, left(tmp_path), err) == (2, [], f"error: {server.url('/good')}: {message}\n")
    (tmp_path / "out.json").write_bytes(OTHER)
    assert call("/good", f"--sha256={wanted}")[0] == 2
    assert left(tmp_path) == ["out.json"] and (tmp_path / "out.json").read_bytes() == OTHER
    assert call("/good", f"--sha256={SHA256}")[0] == 0 and len(server.log) == 3
    assert (tmp_path / "out.json").read_bytes() == CONTENT


BAD = {
    "/missing": (2, r"/missing: HTTP 404 Not Found; check the address", 1),
    "/busy": (3, r"/busy: HTTP 500 Internal Server Error; .* run the command again", 3),
    "/too-many": (3, r"/too-many: HTTP 429 Too Many Requests; check the network", 3),
    "/cut-always": (3, r"cut off after 3,000 of [\d,]+ bytes; .* to continue", 3),
    "/cut-always-stall --timeout=0.5": (3, r"timed out; check the network", 3),
    "/not-json": (2, r"out\.json is not valid JSON: ", 1),
    "/not-a-list": (2, "--n=7: there are only 1 records with an answer", 1),
    "/not-an-object": (2, r"out\.json:record 2 must be an object", 1),
    "/no-output": (2, r"out\.json:record 2:output: is missing", 1),
    "/wrong-input": (2, r"out\.json:record 1:input: must be a text", 1),
    "/to-a-file": (2, r"/to-a-file: HTTP 302 Found; check the address", 1),
    "/to-itself": (2, r"/to-itself: HTTP 302 Found; check the address", None),
    "/to-nonsense": (2, r"/to-nonsense: cannot be used \('.*'\); check the address", 1),
    "file:///etc/hostname": (2, r"file:///etc/hostname: cannot be used \('expected https://host/file'\)", 0),
    "http:///a": (2, r"cannot be used", 0),
    "http://a:b/": (2, r"cannot be used", 0),
    "http://a/ź": (2, r"cannot be used", 0),
    "http://a..b/": (2, r"cannot be used", 0),
    "/good --n=0": (2, r"--n=0: expected at least 1", 0),
    "/good --n=41": (2, r"--n=41: there are only 40 records with an answer; choose fewer", 1),
    "/good --seed=-1": (2, r"--seed=-1: expected at least 0", 0),
    "/good --sha256=12": (2, r"sha256 is [0-9a-f]{64}, not 12; check the address and the hash", 1),
    "/good --timeout=0": (2, r"--timeout=0.0: expected more than 0", 0),
    "/good --timeout=nan": (2, r"--timeout=nan: expected more than 0", 0),
    "/good --out=": (2, r"\. is not a file; choose another name", 0),
    "/good --out=/dev/null": (2, r"/dev/null is not a file; choose another name", 0),
    "/good --out=/dev/null/a.json": (3, r"/dev/null/a\.json cannot be written: ", 0),
}
KEPT = {"/cut-always": {"out.json.part"}, "/cut-always-stall --timeout=0.5": {"out.json.part"}}
KEPT |= {case: {"out.json"} for case in (*BODIES, "/good --n=41")}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_with_their_exit_code(server, call, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    expected, message, n_requests = BAD[case]
    code, _, err = call(*case.split(" "))
    assert code == expected and re.fullmatch(f"error: .*({message}).*\n", err), err
    assert n_requests in (None, len(server.log))
    assert set(left(tmp_path)) == KEPT.get(case, set())


@pytest.mark.parametrize("path", ["/good", "/unsized"])
def test_a_file_over_the_limit_is_not_kept(server, tmp_path, path):
    with pytest.raises(InputError, match=rf"{path}: cannot be used \('larger than [\d,]+ bytes'\); check the address"):
        download.fetch(server.url(path), tmp_path / "a", SHA256, len(CONTENT) - 1)
    assert (left(tmp_path), len(server.log)) == ([], 1)
    download.fetch(server.url(path), tmp_path / "a", SHA256, len(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_no_network(call, monkeypatch):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        code, _, err = call(f"http://127.0.0.1:{free.getsockname()[1]}/a.json")
    assert code == 3 and re.fullmatch(r"error: .*: \[Errno \d+\] Connection refused; check .* to continue\n", err)


class FullDisk(io.FileIO):
    """Takes CUT bytes, and no more."""

    def write(self, data):
        super().write(data[:CUT])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_what_came(server, call, tmp_path, monkeypatch):
    whole = download.Path.open
    monkeypatch.setattr(
        download.Path, "open", lambda path, mode="r", **options: (FullDisk if mode == "ab" else whole)(path, mode)
    )
    code, _, err = call("/good")
    message = "cannot be written: No space left on device; free some space and run the command again to continue"
    assert (code, err) == (3, f"error: {tmp_path}/out.json {message}\n")
    monkeypatch.setattr(download.Path, "open", whole)
    assert call("/good")[0] == 0 and [entry[1] for entry in server.log] == [None, f"bytes={CUT}-"]


def test_pauses_grow(server, tmp_path, monkeypatch, capsys):
    slept = []
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download.time, "sleep", slept.append)
    with pytest.raises(EnvironmentFailure, match="HTTP 500 Internal Server Error; check the network"):
        download.fetch(server.url("/busy"), tmp_path / "a.json", SHA256, timeout=5.0)
    assert slept == [1, 2, 4, 8] and len(server.log) == 5
