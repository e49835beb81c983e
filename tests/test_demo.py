"""demo.py as a process: what it says where it cannot start, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from functools import partial

import pytest
from conftest import ROOT

from demo import Options, main
from llama.errors import InputError

needs_packages = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gradio", "uvicorn")),
    reason="needs the packages of demo.py: make .venv/demo.stamp",
)


@contextmanager
def demo(*flags: str):
    """A running server: its process and its address."""
    command = [sys.executable, "-u", "demo.py", "--port=0", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests run in a shell's background
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heed, **pipes) as process:
        try:
            url = re.search(r"http://[^,]+", process.stdout.readline())[0]
            yield process, url
        finally:
            process.kill()


@pytest.mark.parametrize("package", ["gradio", "uvicorn"])
def test_without_its_packages_it_says_how_to_get_them(package):
    hide = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['demo.py']; "
    program = hide + "import runpy; runpy.run_path('demo.py', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    remedy = "type `make demo`, or `pip install -r requirements-demo.txt`"
    missing = package if package in run.stderr else "uvicorn"  # where neither is installed
    assert (run.returncode, run.stderr) == (3, f"error: the package {missing} is not installed; {remedy}\n")


@needs_packages
def test_what_it_refuses_to_start_with():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for settings, said in (
            ({"host": "0.0.0.0"}, "host=0.0.0.0 is reached by other machines; add --api_key"),
            ({"host": "::"}, "host=:: is reached by other machines; add --api_key"),
            ({"host": "nowhere.invalid", "api_key": "x"}, "host=nowhere.invalid: "),
            ({"host": "192.0.2.1", "api_key": "x"}, "host=192.0.2.1: "),
            ({"api_key": ""}, "api_key must have"),
            ({"api_key": "gr\u00fcn"}, "api_key must have"),
            ({"port": taken.getsockname()[1]}, "already in use"),
        ):
            with pytest.raises(InputError, match=re.escape(said)):
                main(Options(**settings))


@needs_packages
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_it_while_a_text_is_streamed(number, code):
    with demo("--max_gen_len=2000") as (process, url):
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 2000, "stream": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.readline().startswith(b"data: ")
            process.send_signal(number)
            rest = answer.read()  # ends in form, at once
        out, err = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in out + err
        assert rest.endswith(b"data: [DONE]\n\n")
        assert err == ("error: interrupted\n" if code == 130 else "")
