"""A server in this process, on a free port of 127.0.0.1; what needs it is skipped without the demo's packages."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from serving.api import Api
from serving.engine import Engine


async def no_page(scope, receive, send):
    """Only the start and the end of the server."""
    while scope["type"] == "lifespan":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


@contextmanager
def serve(llama, page=no_page, api_key=None, is_local=True, engine=None):
    """Url, engine and lines of the log of a running server."""
    web = pytest.importorskip("serving.web", reason="needs the packages of demo.py: make .venv/demo.stamp")
    engine, lines, listening = engine or Engine(2, 8), [], web.listen("127.0.0.1", 0)
    api = Api(llama, engine, "tiny", 64, api_key, lines.append)
    server = web.server(web.Site(api, page, is_local))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = listening.getsockname()[1]
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, engine=engine, lines=lines, api=api)
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
        listening.close()


def wait_until(is_true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def ask(site, method="POST", path="/v1/completions", body=None, read=True, **headers) -> tuple[int, dict, dict]:
    """Status, headers and content of a request as it is written here: bytes of a body as they are, else as JSON."""
    body = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = {"Host": f"127.0.0.1:{site.port}", "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-").title(): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return raw(site, f"{method} {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + body)


def raw(site, data: bytes) -> tuple[int, dict, dict]:
    with socket.create_connection(("127.0.0.1", site.port), timeout=20) as connection:
        connection.sendall(data)
        answer = connection.makefile("rb").read()
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if "chunked" in headers.get("transfer-encoding", ""):
        content = b"".join(part.partition(b"\r\n")[2] for part in content.split(b"\r\n0\r\n\r\n"))
    try:
        return int(status.split()[1]), headers, json.loads(content)
    except ValueError:
        return int(status.split()[1]), headers, {"text": content.decode("latin-1")}
