"""The API: OpenAI's /v1/models, /v1/completions and /v1/chat/completions over one model, as an ASGI application.

Plain or as a stream of server-sent events. Errors have OpenAI's shape; fields.py says what a request may hold. A client
that leaves ends its generation. Left out on purpose: several choices per request, tools, embeddings, batches of files.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llama import Llama, cli
from serving.engine import Busy, Engine, Job
from serving.fields import Ask, Refused, json_of, read
from serving.text import Piece, pieces

MOST_BYTES = 1 << 18  # of a request's body
MOST_DISCARDED = 1 << 23  # of a body that is too large: read to its end, so that the client gets to its answer
BODY_SECONDS = 10.0  # in which a body has to arrive
FORMS = {"/v1/completions": "text", "/v1/chat/completions": "chat"}
Scope, Receive, Send = dict[str, Any], Callable[[], Awaitable[dict[str, Any]]], Callable[[dict[str, Any]], Awaitable]


def header(scope: Scope, name: str) -> str:
    """A header's value, empty where there is none. Raises Refused where it comes twice."""
    values = [value for key, value in scope["headers"] if key == name.encode()]
    if len(values) > 1:
        raise Refused(400, f"the header {name} comes {len(values)} times")
    return values[0].decode("latin-1") if values else ""


class Reply:
    """What goes back to the client; `status` is None before it has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.status = send, None

    async def json(self, status: int, content: dict[str, Any], **headers: str) -> None:
        """A whole answer."""
        await self._begin(status, "application/json", headers)
        await self.send({"type": "http.response.body", "body": json.dumps(content).encode()})

    async def event(self, content: dict[str, Any] | None) -> None:
        """A part of a stream; None is its end."""
        if self.status is None:
            await self._begin(200, "text/event-stream; charset=utf-8", {"cache-control": "no-cache"})
        data = "[DONE]" if content is None else json.dumps(content)
        is_last = content is None
        await self.send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": not is_last})

    async def _begin(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.status = status
        pairs = {"content-type": kind, "x-content-type-options": "nosniff", **headers}
        lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in pairs.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": lines})


@dataclass
class Shown:
    """An answer so far: its text, and the tokens in it. A token counts once its text is certain to be shown."""

    text: str = ""
    n: int = 0  # tokens that were generated, those of a stop string included
    _start: int = 0
    _held: list[tuple[int, Piece]] = field(default_factory=list)

    def push(self, piece: Piece) -> list[tuple[int, Piece]]:
        """The tokens that are certain with a piece, each with the number of the character that it begins at."""
        self.text += piece.text
        if piece.token is not None:
            self.n += 1
            self._held.append((self._start, piece))
            self._start = piece.end
        is_last = piece.finish is not None
        ready = [(at, p) for at, p in self._held if (at < len(self.text) if is_last else p.end <= len(self.text))]
        self._held = self._held[len(ready) :]
        return ready


class Api:
    """most_tokens: of an answer. api_key: what requests must bear; None: nothing. log: gets a line per request."""

    def __init__(
        self,
        llama: Llama,
        engine: Engine,
        model: str,
        most_tokens: int = 512,
        api_key: str | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        self.llama, self.engine, self.model, self.most_tokens = llama, engine, model, most_tokens
        self.api_key, self.log, self.began = api_key, log, int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, and log it."""
        began, reply, counts = time.perf_counter(), Reply(send), []
        try:
            await self._answer(scope, receive, reply, counts)
        except Exception as error:
            refused, note = self._explained(error)
            counts.append(note)
            if reply.status is None:
                allow = "POST" if scope["path"] in FORMS else "GET"
                more = {401: {"www_authenticate": "Bearer"}, 405: {"allow": allow}, 503: {"retry_after": "1"}}
                await reply.json(refused.status, refused.content, **more.get(refused.status, {}))
            else:
                await reply.event(refused.content)
                await reply.event(None)
        client, path = (scope.get("client") or ("?",))[0], scope["raw_path"][:80].decode("ascii", "replace")
        line = f"{client} {scope['method'][:10]} {path} {reply.status or 'left'} {time.perf_counter() - began:.2f} s"
        self.log(" ".join([line, *counts]))

    def _explained(self, error: Exception) -> tuple[Refused, str]:
        """The error that a client gets, and what the log says: all of it only where the client is at fault."""
        if isinstance(error, Refused):
            return error, str(error)
        line, code = cli.explain(error)
        if isinstance(error, Busy):
            return Refused(503, line, code="overloaded"), line
        if code == 2:
            return Refused(400, line), line
        return Refused(503 if code == 3 else 500, "the server could not answer; its log says why"), line

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply, counts: list[str]) -> None:
        self._check_key(header(scope, "authorization"))
        path, method = scope["path"], "POST" if scope["path"] in FORMS else "GET"
        about = {"id": self.model, "object": "model", "created": self.began, "owned_by": "llama"}
        if path not in (*FORMS, "/v1/models", f"/v1/models/{self.model}"):
            known = ", ".join(("/v1/models", *FORMS))
            raise Refused(404, f"there is nothing at {path[:80]!r}; this server has {known}", code="not_found")
        if scope["method"] != method:
            raise Refused(405, f"{path} takes {method}")
        if method == "GET":
            is_list = path == "/v1/models"
            return await reply.json(200, {"object": "list", "data": [about]} if is_list else about)
        if header(scope, "content-type").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be application/json")  # which no page of another site can send
        if header(scope, "content-encoding").lower() not in ("", "identity"):
            raise Refused(415, "compressed bodies are not supported")
        body = await body_of(receive, header(scope, "content-length"))
        ask = await asyncio.to_thread(read, json_of(body), FORMS[path], self.model, self.llama, self.most_tokens)
        work = pieces(self.llama, ask.ids, top=ask.top, **ask.settings)
        with self.engine.run(work) as job, _ended_by_leaving(job, receive):
            counts += await self._generate(job, ask, _Form(FORMS[path], self.model, self.llama), reply)

    async def _generate(self, job: Job[Piece], ask: Ask, form: _Form, reply: Reply) -> list[str]:
        """Send the answer; returns the number of tokens, for the log."""
        shown, tokens, finish = Shown(), [], None
        if ask.stream:
            await reply.event(form.part("", begins=True))
        text = ask.opening
        async for piece in job:
            if job.is_cancelled:
                break
            ready, finish = shown.push(piece), piece.finish
            text, tokens = text + piece.text, tokens + ready
            if ask.stream and (text or tokens or finish):
                logprobs = None if ask.top is None else form.logprobs(tokens, ask.top)
                await reply.event(form.part(text, finish, logprobs))
                text, tokens = "", []
        n_prompt = len(ask.ids)
        usage = {"prompt_tokens": n_prompt, "completion_tokens": shown.n, "total_tokens": n_prompt + shown.n}
        if self.engine.is_closed and finish is None:
            raise Refused(503, "the server has been told to end")
        if job.is_cancelled or finish is None:
            return ["client left", f"{n_prompt}+{shown.n} tokens"]
        if ask.stream:
            if ask.with_usage:
                await reply.event(form.around([], is_part=True) | {"usage": usage})
            await reply.event(None)
        else:
            logprobs = None if ask.top is None else form.logprobs(tokens, ask.top)
            await reply.json(200, form.whole(text, finish, logprobs) | {"usage": usage})
        return [f"{n_prompt}+{shown.n} tokens"]

    def _check_key(self, sent: str) -> None:
        """Raises Refused. The comparison takes as long for a key that is nearly right."""
        scheme, _, key = sent.partition(" ")
        wanted = (self.api_key or "").encode()
        is_right = hmac.compare_digest(key.strip().encode("latin-1"), wanted) and scheme.lower() == "bearer"
        if self.api_key is not None and not is_right:
            raise Refused(
                401, "the API key is missing or wrong; it goes into Authorization: Bearer", code="invalid_api_key"
            )


class _Form:
    """One answer in the shape of completions ("text") or of chats."""

    def __init__(self, form: str, model: str, llama: Llama) -> None:
        self.is_chat, self.tokenizer = form == "chat", llama.tokenizer
        self.about = {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        self.about["model"] = model

    def around(self, choices: list[dict[str, Any]], is_part: bool) -> dict[str, Any]:
        name = "chat.completion" + ".chunk" * is_part if self.is_chat else "text_completion"
        return {**self.about, "object": name, "choices": choices}

    def whole(self, text: str, finish: str, logprobs: Any) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        return self.around([{"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}], is_part=False)

    def part(self, text: str, finish: str | None = None, logprobs: Any = None, begins: bool = False) -> dict[str, Any]:
        """begins: the first of a stream, which names the role."""
        delta = ({"role": "assistant"} if begins else {}) | ({"content": text} if text or begins or logprobs else {})
        said = {"delta": delta} if self.is_chat else {"text": text}
        return self.around([{"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}], is_part=True)

    def logprobs(self, tokens: Sequence[tuple[int, Piece]], top: int) -> dict[str, Any]:
        """Of tokens with the number of the character that each begins at."""
        if self.is_chat:
            entries = [
                self._entry(p.token, p.logprob) | {"top_logprobs": [self._entry(*pair) for pair in p.likeliest]}
                for _, p in tokens
            ]
            return {"content": entries, "refusal": None}
        likeliest = [{self._text(i): value for i, value in [*p.likeliest, (p.token, p.logprob)]} for _, p in tokens]
        return {
            "tokens": [self._text(p.token) for _, p in tokens],
            "token_logprobs": [p.logprob for _, p in tokens],
            "top_logprobs": likeliest if top else None,
            "text_offset": [at for at, _ in tokens],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token)
        return {"token": self._text(token), "logprob": logprob, "bytes": list(data)}

    def _text(self, token: int) -> str:
        """A token as text; where its bytes are none on their own, as OpenAI writes them."""
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


async def body_of(receive: Receive, length: str) -> bytes:
    """A request's body. Raises Refused for one that is too large, too slow or cut off."""
    body, n = bytearray(), 0
    is_over = length.isdecimal() and int(length[:20]) > MOST_DISCARDED  # not worth to read
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while not is_over:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the body is cut off")
                n += len(message["body"])
                body += message["body"] if n <= MOST_BYTES else b""
                is_over = n > MOST_DISCARDED
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    if is_over or n > MOST_BYTES:
        raise Refused(413, f"the body is larger than {MOST_BYTES:,} bytes")
    return bytes(body)


@contextmanager
def _ended_by_leaving(job: Job[Any], receive: Receive) -> Iterator[None]:
    """While the block runs, a client that leaves ends the job."""

    async def watch() -> None:
        with contextlib.suppress(OSError):
            while (await receive())["type"] != "http.disconnect":
                pass
        job.cancel()

    task = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    finally:
        task.cancel()
