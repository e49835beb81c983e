"""The web server of demo.py: the API under /v1, the page at /, and what stands guard before both.

Refused before anything looks at them: names of this machine that a foreign page made up (DNS rebinding), requests that
come from pages of another site, and bodies of unbounded length. A client that takes too long to send a request, or to
read its answer, is cut off. The page's browser is told to load nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama.errors import InputError
from serving.api import Api, Receive, Reply, Scope, Send, body_of, header
from serving.fields import Refused

ARRIVAL_SECONDS = 15.0  # from a request's first byte, or the connection, to its last
STALLED_SECONDS = 30.0  # that a client may leave its answer unread, once the system's buffers are full
REQUESTS = 256  # at once; more are refused in form, and beyond twice as many without form
LOCAL = ("127.0.0.1", "localhost", "[::1]")
NOT_SERVED = ("/gradio_api/upload", "/gradio_api/proxy", "/gradio_api/file", "/gradio_api/stream", "/gradio_api/deep")
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Site:
    """The ASGI application. page: the one for every path outside of /v1. is_local: bound to this machine alone."""

    def __init__(self, api: Api, page: Any, is_local: bool) -> None:
        self.api, self.page, self.is_local, self.n_open = api, page, is_local, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # start and end of the server
            return await self.page(scope, receive, send)
        is_api = scope["path"] == "/v1" or scope["path"].startswith("/v1/")
        self.n_open += 1
        try:
            await self._answer(scope, receive, send, is_api)
        finally:
            self.n_open -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send, is_api: bool) -> None:
        try:
            self._check(scope)
            if not is_api and scope["method"] not in ("GET", "HEAD"):
                receive = _replayed(await body_of(receive, header(scope, "content-length")), receive)
        except Refused as error:
            path = scope["raw_path"][:80].decode("ascii", "replace")
            self.api.log(f"{scope['client'][0]} {scope['method'][:10]} {path} {error.status} {error}")
            return await Reply(send).json(error.status, error.content)
        await (self.api(scope, receive, send) if is_api else self.page(scope, receive, _with_policy(send)))

    def _check(self, scope: Scope) -> None:
        """Raises Refused."""
        if self.n_open > REQUESTS:
            raise Refused(503, f"{REQUESTS} requests are being answered; try again later", code="overloaded")
        host, origin = header(scope, "host"), header(scope, "origin")
        if self.is_local and re.sub(r":\d+$", "", host).lower() not in LOCAL:
            raise Refused(403, f"the host {host[:60]!r} is not this machine's; use 127.0.0.1")
        if origin and origin.partition("://")[2].lower() != host.lower():
            raise Refused(403, f"pages of {origin[:60]!r} may not use this server")
        if scope["path"].startswith(NOT_SERVED):
            raise Refused(404, "files are not taken or given here")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that has been read, for whoever reads it next."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> dict[str, Any]:
        return parts.pop() if parts else await receive()

    return receive_again


def _with_policy(send: Send) -> Send:
    """Adds headers by which a browser keeps to this server."""
    policy = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]

    async def send_more(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *policy]}
        await send(message)

    return send_more


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP, which would wait for ever: for a request to arrive, and for an answer to be read."""

    _arrival: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._arrival = self.loop.call_later(ARRIVAL_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_waiting = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not is_waiting and self._arrival is not None:
            self._arrival = self._arrival.cancel()
        elif is_waiting and self._arrival is None:
            self._arrival = self.loop.call_later(ARRIVAL_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        self._stalled = self._stalled and self._stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to a place, before minutes go into loading weights. Raises InputError where that is impossible."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"port={port} on host={host}: {reason}; choose another port or host") from None
    return found


class Server(uvicorn.Server):
    """uvicorn, which says when it has begun to answer, and ends all generations when it is told to end."""

    site: Site
    on_start: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.on_start is not None:
            self.on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.site.api.engine.close()
        await super().shutdown(sockets)


def server(site: Site) -> Server:
    """What runs the site: `server(site).run(sockets=[listen(host, port)])`."""
    config = uvicorn.Config(
        site,
        http=PatientProtocol,
        ws="none",
        log_level="error",
        access_log=False,
        lifespan="on",
        limit_concurrency=2 * REQUESTS,
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    found = Server(config)
    found.site = site
    return found
