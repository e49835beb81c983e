"""No test leaves this machine, and neither does any Python that one starts: each runs this file first.

tests/conftest.py puts the folder on PYTHONPATH. Whoever asks for, connects to or sends to another machine gets an
error, and the file named in OFFLINE_LOG a line, at which the session fails: libraries may swallow the error.
"""

from __future__ import annotations

import os
import sys
from typing import Any

# Which argument of an event is an address; of a name's look-up, the name alone.
ADDRESS = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1}
NAME = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}


def is_here(host: Any, is_name: bool) -> bool:
    """Whether it is this machine. A name that is an address in digits is looked up nowhere."""
    import ipaddress

    host = host.decode("latin-1") if isinstance(host, bytes) else host
    own = os.uname().nodename.partition(".")[0]
    if not host or host.partition(".")[0] in ("localhost", own):  # also with the domain, or as Jupyter asks, .local
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return is_name or address.is_loopback or address.is_unspecified


def refuse(event: str, arguments: tuple) -> None:
    if event in ADDRESS:
        address = arguments[ADDRESS[event]]
        if not isinstance(address, tuple) or not isinstance(address[0], (str, bytes)):
            return  # a file's, or nobody's
        host = address[0]
    elif event in NAME:
        host = arguments[NAME[event]]
    else:
        return
    if is_here(host, event in NAME):
        return
    if not str(host).endswith(".invalid"):  # names that tests use because nobody can have them
        with open(os.environ.get("OFFLINE_LOG", os.devnull), "a") as log:
            print(os.environ.get("PYTEST_CURRENT_TEST"), event, host, *sys.argv, file=log)
    raise PermissionError(f"tests are offline: {event} {host}")


sys.addaudithook(refuse)
