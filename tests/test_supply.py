"""What the project takes from others and reaches over a network is what docs/security.md says, and nothing else."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from packaging.utils import canonicalize_name
from test_house import HAS_DEMO, MODULES, imports_of, is_below

from reports import licences

# What can open a connection, or wait for one, and the modules that import it.
NETWORK = {
    "socket": {"serving.web"},
    "ssl": {"data.download"},
    "urllib": {"data.download"},
    "http": {"data.download"},
    "huggingface_hub": {"data.model"},
    "uvicorn": {"serving.web"},
    "gradio": {"serving.page"},
    "fastapi": {"serving.page"},
    "asyncio": {"serving.api", "serving.engine", "serving.page", "serving.web"},
    "torch.distributed": {"llama.parallel", "llama.processes", "llama.training.several"},
}
OTHERS = (
    *("requests", "httpx", "httpx2", "aiohttp", "urllib3", "httpcore", "tornado", "zmq", "websockets", "starlette"),
    *("openai", "ftplib", "smtplib", "poplib", "imaplib", "xmlrpc", "socketserver", "webbrowser", "selectors"),
)


def test_few_modules_can_reach_a_network():
    found = {
        package: {name for name, path in MODULES.items() if any(is_below(i, package) for i in imports_of(path))}
        for package in [*NETWORK, *OTHERS]
    }
    assert {package: names for package, names in found.items() if names} == NETWORK


ATTEMPTS = {
    "connect": "socket.create_connection(('192.0.2.1', 80), timeout=1)",
    "look up": "socket.getaddrinfo('example.com', 80)",
    "send": "with socket.socket(type=socket.SOCK_DGRAM) as it: it.sendto(b'', ('192.0.2.1', 53))",
    "IPv6": "with socket.socket(socket.AF_INET6) as it: it.connect(('2001:db8::1', 80))",
    "download": "urllib.request.urlopen('http://example.com')",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_no_test_leaves_this_machine(attempt, tmp_path, monkeypatch):
    """Neither a test nor a Python that it starts: refused, and noted even where the error is swallowed."""
    log = tmp_path / "log"
    monkeypatch.setenv("OFFLINE_LOG", str(log))
    with pytest.raises(OSError, match="tests are offline"):
        exec(f"import socket, urllib.request\n{ATTEMPTS[attempt]}", {})
    program = f"import socket, urllib.request\ntry:\n {ATTEMPTS[attempt]}\nexcept Exception: print('swallowed')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "swallowed\n" and log.read_text().count(f"{os.environ['PYTEST_CURRENT_TEST']} socket.") == 2


def test_this_machine_can_be_reached():
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        waiting.listen()
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, waiting.getsockname()[1]), timeout=5).close()


# Licences that ask for no more than a notice, or (MPL) for the source of changed files of the package itself.
PERMISSIVE = {
    *("MIT", "MIT-CMU", "BSD", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "Zlib", "BSL-1.0", "CC0-1.0"),
    *("Apache-2.0", "Apache-2.0 WITH LLVM-exception", "PSF-2.0", "CNRI-Python", "MPL-2.0"),
}


@pytest.fixture(scope="module")
def listed() -> dict[str, list[str]]:
    """The lines of the page's table by package."""
    part = licences.PART.search(licences.PAGE.read_text(encoding="utf-8"))[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {name: rest for name, *rest in lines[2:]}


@pytest.mark.skipif(not HAS_DEMO, reason="needs the packages of demo.py: make .venv/demo.stamp")
def test_every_package_has_its_licence_on_the_page(listed):
    """As installed: a new one, or one with a new licence, is read before `python -m reports.licences` lists it."""
    installed = {name: licence for name, _, licence, *_ in licences.table().body}
    assert len(installed) > 100
    assert {name: licence for name, licence in installed.items() if listed.get(name, [0, 0])[1] != licence} == {}


def test_the_pins_are_those_of_the_page(listed):
    for file in licences.FILES:
        for requirement in licences.requirements(file):
            (pin,) = requirement.specifier
            assert pin.operator == "==" and listed[canonicalize_name(requirement.name)][0] == pin.version


def test_no_licence_reaches_beyond_its_package(listed):
    parts = {part for _, licence, *_ in listed.values() for part in re.split(r" AND | OR |[()]", licence) if part}
    assert "MIT" in parts and not parts - PERMISSIVE


def test_what_the_makefile_installs_is_named():
    page = licences.PAGE.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"pip install [^\n]*?([\w-]+)==", makefile)
    assert named and all(name in page for name in named)
