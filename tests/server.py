"""A server in this process, on a free port of 127.0.0.1; what needs it is skipped without the demo's packages."""

from __future__ import annotations

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


def wait_until(is_true, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)
