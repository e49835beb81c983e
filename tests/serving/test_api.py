"""The API with the client that people have, `openai`; and with what no client would send."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from conftest import ROOT
from server import ask, raw, serve, wait_until

from serving import api
from serving.engine import Engine

openai = pytest.importorskip("openai", reason="needs the client of the API: pip install -r requirements-dev.txt")

PROMPT = "Once upon a time, there was a little fox"
CHAT = [{"role": "user", "content": "What do cows eat?"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 24}
WORK = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}


@pytest.fixture(scope="module")
def site(tiny):
    with serve(tiny) as found:
        yield found


@pytest.fixture
def client(site):
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def test_completion(client, tiny):
    """The text that the model gives to `generate`."""
    answer = client.completions.create(prompt=PROMPT, **GREEDY)
    ids = tiny.encode_prompt(PROMPT)
    tokens, _ = tiny.generate([ids], 24, temperature=0)
    assert answer.choices[0].text == tiny.tokenizer.decode(tokens[0]) and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(tokens[0]))
    assert (answer.object, answer.model, answer.choices[0].index) == ("text_completion", "tiny", 0)
    assert client.completions.create(prompt=PROMPT, echo=True, **GREEDY).choices[0].text.startswith(PROMPT + " ")


def test_chat(client, tiny):
    answer = client.chat.completions.create(messages=CHAT, **GREEDY)
    expected = tiny.chat_completion([CHAT], temperature=0, max_gen_len=24)[0]["generation"]
    message = answer.choices[0].message
    assert {"role": message.role, "content": message.content} == expected
    assert (answer.object, answer.choices[0].finish_reason) == ("chat.completion", "stop")


def test_streams_say_the_same(client):
    whole = client.completions.create(prompt=PROMPT, **GREEDY)
    parts = list(client.completions.create(prompt=PROMPT, stream=True, **GREEDY))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text and len(parts) > 10
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert len({part.id for part in parts}) == 1
    whole = client.chat.completions.create(messages=CHAT, **GREEDY)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(messages=CHAT, **options, **GREEDY)
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said == whole.choices[0].message.content and parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == "stop" and last.choices == [] and last.usage == whole.usage


def test_stop_strings_end_a_text_and_are_not_in_it(client):
    text = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = text[20:24]
    for stops in (stop, ["nothing of it", stop]):
        answer = client.completions.create(prompt=PROMPT, stop=stops, logprobs=1, **GREEDY).choices[0]
        assert (answer.text, answer.finish_reason) == (text[: text.index(stop)], "stop")
        assert "".join(answer.logprobs.tokens).startswith(answer.text)
        assert answer.logprobs.text_offset[-1] < len(answer.text)  # no token that lies behind it
    parts = list(client.completions.create(prompt=PROMPT, stop=stop, stream=True, **GREEDY))
    assert "".join(part.choices[0].text for part in parts) == text[: text.index(stop)]


def test_a_seed_gives_the_same_text_twice_and_none_gives_others(client):
    def text(**settings) -> str:
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, **settings).choices[0].text

    assert text(seed=5, temperature=1) == text(seed=5, temperature=1) != text(seed=6, temperature=1)
    assert len({text(temperature=2) for _ in range(3)}) == 3


def test_logprobs_of_both_forms(client, tiny):
    answer = client.completions.create(prompt=PROMPT, logprobs=3, **GREEDY).choices[0]
    tokens, values = tiny.generate([tiny.encode_prompt(PROMPT)], 24, temperature=0, logprobs=True)
    assert answer.logprobs.token_logprobs == pytest.approx(values[0], abs=1e-4)
    assert answer.logprobs.tokens == [tiny.tokenizer.decode([token]) for token in tokens[0]]
    for token, top in zip(answer.logprobs.tokens, answer.logprobs.top_logprobs, strict=True):
        assert len(top) == 3 and max(top, key=top.get) == token
    for token, at in zip(answer.logprobs.tokens, answer.logprobs.text_offset, strict=True):
        assert answer.text[at:].startswith(token.lstrip()) or answer.text[at:].startswith(token)
    chat = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **GREEDY).choices[0]
    entries = chat.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == chat.message.content
    assert all(e.top_logprobs[0].token == e.token and len(e.top_logprobs) == 2 for e in entries)
    assert client.chat.completions.create(messages=CHAT, **GREEDY).choices[0].logprobs is None


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_errors_are_those_that_the_client_knows(client):
    for error, settings in (
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"n": 2}),
        (openai.BadRequestError, {"extra_body": {"unheard_of": 1}}),
        (openai.NotFoundError, {"model": "gpt-4"}),
    ):
        with pytest.raises(error) as end:
            client.chat.completions.create(**{"messages": CHAT, "model": "tiny"} | settings)
        assert end.value.body["message"] and end.value.body["type"] == "invalid_request_error"
        assert end.value.param in (*settings, "unheard_of")


def test_a_key_is_checked(tiny):
    with serve(tiny, api_key="sesame") as site:
        with openai.OpenAI(base_url=f"{site.url}/v1", api_key="sesame", max_retries=0) as client:
            assert client.completions.create(**WORK).choices[0].text
        for key in ("Sesame", "sesam", "sesame ", "sesame sesame", "", "é"):
            status, headers, content = ask(site, authorization=f"Bearer {key}x", body=WORK)
            assert (status, content["error"]["code"]) == (401, "invalid_api_key"), key
            assert headers["www-authenticate"] == "Bearer"
        for line in (None, "sesame", "Basic sesame", "Bearer"):
            assert ask(site, authorization=line, body=WORK)[0] == 401
        assert ask(site, "GET", "/v1/models")[0] == 401 and ask(site, "GET", "/v1/nothing")[0] == 401
        twice = f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nConnection: close\r\n"
        assert raw(site, f"{twice}Authorization: Bearer x\r\nAuthorization: Bearer sesame\r\n\r\n".encode())[0] == 400
        assert not [line for line in site.lines if "sesame" in line]


@pytest.mark.parametrize(
    ("status", "request_"),
    {
        "nothing there": (404, {"path": "/v1/embeddings"}),
        "the root of the API": (404, {"path": "/v1", "method": "GET"}),
        "a path with a line feed": (404, {"path": "/v1/%0a%0dx"}),
        "GET where POST is meant": (405, {"method": "GET"}),
        "DELETE": (405, {"method": "DELETE", "path": "/v1/models"}),
        "no body": (400, {}),
        "no JSON": (400, {"body": b"{'model': 1}"}),
        "deep JSON": (400, {"body": b"[" * 200_000}),
        "negative numbers": (400, {"body": {**WORK, "max_tokens": -5}}),
        "a number too large": (400, {"body": b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}"}),
        "a long prompt": (400, {"body": {**WORK, "prompt": "fox " * 5000}}),
        "a large body": (413, {"body": b" " * (api.MOST_BYTES + 1)}),
        "another type": (415, {"body": WORK, "content_type": "text/plain"}),
        "no type": (415, {"body": WORK, "content_type": None}),
        "compressed": (415, {"body": WORK, "content_encoding": "gzip"}),
        "another host": (403, {"body": WORK, "host": "evil.example"}),
        "another host with our port": (403, {"body": WORK, "host": "127.0.0.1.evil.example:7860"}),
        "another site": (403, {"body": WORK, "origin": "http://evil.example"}),
        "a sandboxed page": (403, {"body": WORK, "origin": "null"}),
    }.values(),
    ids=lambda value: "",
)
def test_what_is_wrong_gets_its_status_and_one_line(site, status, request_):
    n = len(site.lines)
    found, headers, content = ask(site, **request_)
    assert found == status and headers["content-type"] == "application/json", content
    assert set(content["error"]) == {"message", "type", "param", "code"} and content["error"]["message"]
    assert ("allow" in headers) == (status == 405) and "access-control-allow-origin" not in headers
    wait_until(lambda: len(site.lines) > n)
    assert len(site.lines) == n + 1 and f" {status} " in site.lines[-1] and len(site.lines[-1]) < 400
    assert site.lines[-1].isprintable()
    assert ask(site, body=WORK)[0] == 200


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/gradio_api/%66ile/etc/passwd"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_files_are_refused_before_the_page_sees_their_path(site, method, path):
    status, _, content = ask(site, method, path)
    assert status == 404 and content["error"]["message"] == "files are not taken or given here"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST:1"])
def test_names_of_this_machine_are_taken(site, host):
    assert ask(site, body=WORK, host=host)[0] == 200
    assert ask(site, body=WORK, host=host, origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /v1/models HTTP/1.1\r\n\r\n",  # no host
        b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n X: folded\x00\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    ],
    ids=lambda data: str(data[:12]),
)
def test_what_is_no_http_is_turned_away(site, data):
    with contextlib.suppress(ConnectionError, IndexError):  # or cut off while it still sends
        assert raw(site, data)[0] == 400
    assert ask(site, body=WORK)[0] == 200


def test_a_body_in_chunks_is_read_and_an_endless_one_is_not(site):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nContent-Type: application/json\r\n"
    head = f"{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
    body = json.dumps(WORK).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:]))
    assert raw(site, head + chunks + b"0\r\n\r\n")[0] == 200
    with socket.create_connection(("127.0.0.1", site.port), timeout=20) as connection:
        connection.sendall(head)
        with pytest.raises(ConnectionError):
            for _ in range(100_000):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    wait_until(lambda: " 413 " in site.lines[-1])


def test_slow_senders_are_cut_off(site, monkeypatch):
    monkeypatch.setattr(api, "BODY_SECONDS", 0.2)
    monkeypatch.setattr("serving.web.ARRIVAL_SECONDS", 0.5)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nContent-Type: application/json\r\n"
    assert raw(site, f"{head}Content-Length: 50\r\n\r\n{{".encode())[0] == 408
    for data in (b"", head.encode()):  # who never says what he wants
        with socket.create_connection(("127.0.0.1", site.port), timeout=5) as connection:
            connection.sendall(data)
            with contextlib.suppress(ConnectionError):
                assert connection.recv(100) == b""


def stream(site, max_tokens: int = 64) -> socket.socket:
    """A connection that has begun to get a long stream."""
    body = json.dumps({**WORK, "max_tokens": max_tokens, "stream": True, "logprobs": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", site.port), timeout=20)
    connection.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def test_who_leaves_ends_his_generation(site, monkeypatch):
    monkeypatch.setattr(site.api, "most_tokens", 400)
    connection = stream(site, 400)
    wait_until(lambda: site.engine.n_jobs == 1)
    connection.close()
    wait_until(lambda: site.engine.n_jobs == 0)
    wait_until(lambda: "client left" in site.lines[-1])
    assert int(re.search(r"\+(\d+) tokens", site.lines[-1])[1]) < 400


def test_a_server_that_ends_says_so_to_those_that_it_serves(tiny):
    with serve(tiny) as site:
        site.api.most_tokens = 400
        with stream(site, 400) as connection:
            site.engine.close()
            rest = connection.makefile("rb").read()
        assert b"told to end" in rest and rest.split(b"data: ")[-1].startswith(b"[DONE]")
        assert ask(site, body=WORK)[0] == 503


def test_who_does_not_read_is_cut_off_and_holds_nobody_up(site, monkeypatch):
    monkeypatch.setattr("serving.web.STALLED_SECONDS", 0.3)
    monkeypatch.setattr(api.Reply, "event", noisy(api.Reply.event))
    n, connection = len(site.lines), stream(site)
    assert ask(site, body=WORK)[0] == 200
    with connection:
        wait_until(lambda: len(site.lines) == n + 2)
        wait_until(lambda: site.engine.n_jobs == 0)
        assert any("client left" in line for line in site.lines[n:])


def test_more_requests_at_once_than_there_may_be_are_refused_in_form(site, monkeypatch):
    monkeypatch.setattr("serving.web.REQUESTS", 1)
    with stream(site):
        status, _, content = ask(site, "GET", "/v1/models")
        assert (status, content["error"]["code"]) == (503, "overloaded")
    wait_until(lambda: ask(site, "GET", "/v1/models")[0] == 200)


def noisy(event):
    """Events of a megabyte: so many fill what the system buffers."""

    async def large(self, content):
        await event(self, content and {**content, "padding": "x" * 1_000_000})

    return large


def test_a_full_queue_refuses_in_form_and_fifty_at_once_leave_nothing_behind(tiny):
    with serve(tiny, engine=Engine(2, 8)) as site:
        client, process = openai.OpenAI(base_url=f"{site.url}/v1", api_key="x", max_retries=0), psutil.Process()

        def one(i: int) -> str:
            try:
                return client.completions.create(**{**WORK, "max_tokens": 6, "seed": i % 5}).choices[0].text
            except openai.InternalServerError as error:
                assert error.status_code == 503 and error.code == "overloaded", error
                assert error.response.headers["retry-after"] == "1"
                return ""

        sizes = []
        for _ in range(3):
            with ThreadPoolExecutor(50) as pool:
                texts = list(pool.map(one, range(50)))
            assert 10 <= sum(map(bool, texts)) <= 50
            for seed in range(5):  # the same text for each seed, whoever else was there
                assert len({text for text in texts[seed::5] if text}) <= 1
            assert site.engine.n_jobs == 0
            sizes.append(process.memory_info().rss / 1e6)
        client.close()
        assert sizes[2] - sizes[1] < 10, sizes


def test_the_model_failing_is_an_error_in_form(site, client, monkeypatch):
    def fail(*args, **settings):
        yield from ()
        raise RuntimeError("secret of the machine")

    monkeypatch.setattr(site.api.llama, "stream", fail)
    with pytest.raises(openai.InternalServerError) as end:
        client.completions.create(**WORK)
    assert end.value.status_code == 500 and "secret" not in str(end.value)
    wait_until(lambda: "secret" in site.lines[-1])
    with pytest.raises(openai.APIError):  # it had begun
        list(client.completions.create(**WORK, stream=True))


def test_the_examples_of_the_documentation_run(site, capsys):
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8").replace("http://127.0.0.1:7860", site.url)
    (program,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    exec(program, {})
    assert "grass" in capsys.readouterr().out
    if shutil.which("curl"):
        (command,) = (line for line in page.splitlines() if line.startswith("curl "))
        run = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
        assert json.loads(run.stdout)["choices"][0]["message"]["content"]
