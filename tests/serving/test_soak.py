"""Good and bad requests of all kinds at once, for a while: every answer is as it should be, and nothing grows."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import threading
import time
from collections import Counter

import psutil
import pytest
from test_demo import demo, needs_packages

SECONDS = float(os.environ.get("SOAK_SECONDS", 20))
WORK = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 24, "seed": 3}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "What do cows eat? \U0001f42e"}], "max_tokens": 24}
TEXT, DIALOG = "/v1/completions", "/v1/chat/completions"
JSON = "application/json"
# Path, body, type of the body, and the statuses that are right; 503: the queue is full.
REQUESTS = [
    (TEXT, WORK, JSON, {200, 503}),
    (TEXT, {**WORK, "stream": True, "logprobs": 5}, JSON, {200, 503}),
    (DIALOG, CHAT, JSON, {200, 503}),
    (DIALOG, {**CHAT, "stream": True, "stop": ["."]}, JSON, {200, 503}),
    (TEXT, {**WORK, "prompt": "fox " * 400}, JSON, {200, 503}),
    (TEXT, {**WORK, "prompt": "fox " * 5000}, JSON, {400}),
    (TEXT, {**WORK, "max_tokens": -1}, JSON, {400}),
    (TEXT, {**WORK, "unknown": 1}, JSON, {400}),
    (TEXT, {**WORK, "model": "other"}, JSON, {404}),
    (TEXT, "not JSON", JSON, {400}),
    (TEXT, " " * 300_000, JSON, {413}),
    (TEXT, WORK, "text/plain", {415}),
    ("/v1/nothing", WORK, JSON, {404}),
]


def exchange(port: int, path: str, body: dict | str, kind: str, leave: bool) -> int:
    """The status; leave: goes away after the first bytes of an answer."""
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        first = connection.recv(12)
        while not leave and connection.recv(65536):
            pass
    return int(first.split()[1])


def visit(port: int, seed: int, end: float, counts: Counter, wrong: list) -> None:
    rng = random.Random(seed)
    while time.monotonic() < end:
        path, body, kind, right = rng.choice(REQUESTS)
        if rng.random() < 0.05:  # says nothing, or not all, and leaves
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(rng.choice([b"", b"GET", b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"]))
                time.sleep(rng.random() / 10)
            continue
        try:
            status = exchange(port, path, body, kind, leave=rng.random() < 0.1)
        except (OSError, IndexError, ValueError) as error:
            wrong.append((path, str(body)[:60], repr(error)))
            continue
        counts[status] += 1
        if status not in right:
            wrong.append((path, str(body)[:60], status))


@needs_packages
@pytest.mark.slow
def test_soak():
    """SOAK_SECONDS=600 makes it ten minutes."""
    with demo("--streams=2", "--waiting=4") as (process, url):
        port, server, lines = int(url.rpartition(":")[2]), psutil.Process(process.pid), []
        reader = threading.Thread(target=lambda: lines.extend(process.stdout))
        reader.start()
        counts, wrong, sizes = Counter(), [], []
        for part in (0.25, 0.75):  # memory is compared after some of the time and after all of it
            end = time.monotonic() + part * SECONDS
            threads = [
                threading.Thread(target=visit, args=(port, i + int(100 * part), end, counts, wrong)) for i in range(12)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            time.sleep(0.5)
            sizes.append((server.memory_info().rss / 1e6, server.num_fds(), server.num_threads()))
        assert exchange(port, TEXT, WORK, JSON, leave=False) == 200
        process.terminate()
        err = process.stderr.read()
        reader.join()
        answered = sum(counts.values()) + 1
        logged = sum(re.search(r" POST \S+ (\d+|left) ", line) is not None for line in lines)
        print(
            f"{SECONDS:g} s: {dict(sorted(counts.items()))}, {len(wrong)} wrong; MB, files, threads: {sizes}; {logged}"
        )
        assert not wrong and not err and set(counts) >= {200, 400, 404, 413, 415, 503}
        assert answered <= logged
        assert sizes[1][0] - sizes[0][0] < 30 and sizes[1][1] <= sizes[0][1] + 3 and sizes[1][2] <= sizes[0][2] + 3
