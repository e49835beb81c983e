"""Fetch the Stanford Alpaca instructions, and choose some of them: the same seed always gives the same choice.

    python -m data.download                                  # all of them, and 200 chosen with seed 1
    python -m data.download --n=1000 --seed=7 --subset_out=runs/alpaca_1000.json
    python -m data.download --sha256=...                     # refuse any other content

A download that breaks off is tried again and, by the same command, continues where it stands: the bytes so far are in
`<out>.part`, and `<out>.part.json` says which version of the file they belong to. `<out>` appears when it is complete
and checked, never before. Stanford gives the data out under CC BY-NC 4.0; it is not part of this repository.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import random
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from llama import cli, files
from llama.errors import EnvironmentFailure, InputError

ALPACA = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
LIMIT = 2**30  # bytes; Alpaca has 23 million, and no server shall fill the disk
BLOCK = 2**16  # bytes read at once
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between tries, so one try more than there are pauses
FIELDS = {"instruction": True, "input": False, "output": True}  # name -> is required

Record = dict[str, Any]


def main(
    *,
    url: str = ALPACA,
    out: str = "data/alpaca_data.json",
    subset_out: str = "data/alpaca_200_stanford.json",
    n: int = 200,
    seed: int = 1,
    sha256: str | None = None,
    timeout: float = 30.0,
) -> None:
    """Fetch the Stanford Alpaca instructions and write a random choice of them.

    Args:
        url: http or https address of a JSON list of Alpaca records.
        out: file for all records; one that is already there is not fetched again.
        subset_out: file for the choice, also a JSON list.
        n: records to choose.
        seed: of the choice; the same data, n and seed give the same file.
        sha256: what the file must hash to, 64 hexadecimal digits; default: not checked.
        timeout: seconds that the server may be silent before the connection counts as broken.
    """
    check_url(url)
    if n < 1:
        raise InputError(f"--n={n}: expected at least 1")
    if seed < 0:  # Python's generator takes its absolute value, so two seeds would give one choice
        raise InputError(f"--seed={seed}: expected 0 or more")
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise InputError(f"--sha256={sha256}: expected 64 hexadecimal digits")
    if not 0 < timeout <= 3600:
        raise InputError(f"--timeout={timeout:g}: expected more than 0 and at most 3600 seconds")
    target, subset = Path(out), Path(subset_out)
    check_places(target, subset)
    content, records = obtain(url, target, sha256.lower() if sha256 else None, timeout)
    print(f"{target}: {len(records):,} records, {len(content):,} bytes, sha256 {digest(content)}")
    chosen = choose(records, n, seed)
    with saving(subset):
        part_of(subset).write_text(json.dumps(chosen, indent=1) + "\n", encoding="ascii")
        files.publish(part_of(subset), subset)
    print(f"{subset}: {n:,} of them, chosen with seed {seed}")


def choose(records: list[Record], n: int, seed: int) -> list[Record]:
    """`n` different records with an answer (some have none), in the order of the source.

    A pure function of the arguments. Raises InputError where there are fewer than `n`.
    """
    answered = [record for record in records if record["output"].strip()]
    if n > len(answered):
        raise InputError(f"--n={n}: there are only {len(answered):,} records with an answer; choose fewer")
    return [answered[place] for place in sorted(random.Random(seed).sample(range(len(answered)), n))]


def check_url(url: str) -> None:
    """Raise InputError for an address that is not http or https, or that no request can be made of."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        usable = False
    if not usable or not all("!" <= char <= "~" for char in url):
        raise InputError(f"--url={url!r}: expected an address like https://host/file.json, http or https")


def check_places(target: Path, subset: Path) -> None:
    """Make both directories. Raises InputError, before anything is fetched, where the files could not be written."""
    for path in (target, subset):
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise InputError(f"{path} is not a file; choose another name")
            if not os.access(path.parent, os.W_OK):
                raise InputError(f"directory {path.parent} cannot be written to; choose another one")
    places = [target, part_of(target), origin_file(target), subset, part_of(subset)]
    if len({place.resolve() for place in places}) < len(places):
        raise InputError(f"--out={target} and --subset_out={subset} get in each other's way; choose other names")


def obtain(url: str, target: Path, sha256: str | None, timeout: float) -> tuple[bytes, list[Record]]:
    """The file's bytes and records, from `target` where it is there and has the right hash, else from `url`.

    Raises InputError for content that is not what it should be, and EnvironmentFailure for what network and disk do.
    """
    if target.exists():
        content = read(target)
        if sha256 in (None, digest(content)):
            print(f"{target} is already there and is not fetched again")
            return content, parse(content, str(target), "delete the file to fetch it again")
        print(f"{target} is there, but its sha256 is {digest(content)}; fetching it again")
    part = part_of(target)
    fetch(url, target, timeout)
    content = read(part)
    try:
        if sha256 not in (None, digest(content)):
            raise InputError(f"{url}: sha256 is {digest(content)}, not {sha256}; check --url and --sha256")
        records = parse(content, url, "check --url")
    except InputError:
        discard(target)  # or the next call would take it for complete
        raise
    with saving(target):
        files.publish(part, target)
        origin_file(target).unlink(missing_ok=True)
    return content, records


def parse(content: bytes, place: str, remedy: str) -> list[Record]:
    """The records in a JSON list. Raises InputError, naming `place`, record (counted from 1) and field."""
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(records, list):
        raise InputError(f"{place} is not a JSON list of Alpaca records; {remedy}")
    for number, record in enumerate(records, start=1):
        where = f"{place}, record {number} of {len(records):,}"
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object; {remedy}")
        for field, is_required in FIELDS.items():
            if field not in record and is_required:
                raise InputError(f"{where}: {field!r} is missing; {remedy}")
            if not isinstance(record.get(field, ""), str):
                raise InputError(f"{where}: {field!r} is not a string; {remedy}")
    return records


@dataclass(frozen=True)
class Origin:
    """What the bytes of a part belong to: address, ETag or Last-Modified of the version, size of the whole in bytes."""

    url: str
    validator: str | None
    size: int | None


class Interrupted(Exception):
    """The file has not come whole, and another try may bring the rest; with `start_over`, all of it."""

    def __init__(self, reason: str, start_over: bool = False):
        super().__init__(reason)
        self.start_over = start_over


class WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only; urllib itself would also go to ftp."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        """What urllib does, or HTTPError with the code of the redirect."""
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(newurl, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, target: Path, timeout: float) -> None:
    """Complete `<target>.part`, in as many tries as there are. Raises EnvironmentFailure after the last."""
    for pause in (*PAUSES, None):
        try:
            receive(url, target, timeout)
            return
        except Interrupted as error:
            if error.start_over:
                discard(target)
            if pause is None:
                tries = f"the last of {len(PAUSES) + 1} tries" if PAUSES else "the only try"
                raise EnvironmentFailure(
                    f"{url}: {error}, in {tries}; check the network and run the command again to continue"
                ) from None
            print(f"{url}: {error}; trying again in {pause:g} s", flush=True)
            time.sleep(pause)


def receive(url: str, target: Path, timeout: float) -> None:
    """Make one request for what `<target>.part` lacks. Raises Interrupted where it still lacks some afterwards."""
    part, origin = part_of(target), read_origin(target, url)
    have = part.stat().st_size if origin else 0
    if origin and have == origin.size:  # the last call ended between the last byte and the new name
        return
    resume = {"Range": f"bytes={have}-", "If-Range": origin.validator} if origin and have else {}
    with open_url(url, resume, timeout) as response:
        start, size = body_range(response, origin, have)
        if size is not None and size > LIMIT:
            raise too_large(url, target)
        with saving(target), part.open("ab") as file:
            file.truncate(start)
            if start == 0:  # only now: the old bytes must not pass for the new version's
                new = Origin(url, validator_of(response.headers), size)
                origin_file(target).write_text(json.dumps(asdict(new)), encoding="ascii")
            have = start
            show = {"unit": "B", "unit_scale": True, "desc": target.name, "disable": None, "leave": False}
            with tqdm(total=size, initial=start, **show) as bar:
                for block in blocks(response, None if size is None else size - start, timeout):
                    have += len(block)
                    if have > LIMIT:
                        raise too_large(url, target)
                    file.write(block)
                    bar.update(len(block))
    if size is not None and have < size:
        raise Interrupted(f"cut off after {have:,} of {size:,} bytes")


def open_url(url: str, headers: dict[str, str], timeout: float) -> http.client.HTTPResponse:
    """Send a request. Raises InputError where the server refuses it, and Interrupted where a later one may succeed."""
    request = urllib.request.Request(url, headers={"User-Agent": "python -m data.download", **headers})
    try:
        return urllib.request.build_opener(WebRedirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"HTTP {error.code} {http.client.responses.get(error.code, '')}".strip()
        if error.code == 416:
            raise Interrupted("the part does not fit the file there", start_over=True) from None
        if error.code >= 500 or error.code in (408, 429):  # also "you are slow" and "too many requests"
            raise Interrupted(answer) from None
        if error.code < 400:
            place = error.headers.get("Location")
            raise InputError(f"{url}: redirect to {place!a} is endless or not to http or https; check --url") from None
        raise InputError(f"{url}: {answer}; check --url") from None
    except (http.client.InvalidURL, ValueError) as error:  # also the address of a redirect
        raise InputError(f"{url}: address cannot be used ({str(error)!a}); check --url") from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(describe(error, timeout)) from None


def body_range(response: http.client.HTTPResponse, origin: Origin | None, have: int) -> tuple[int, int | None]:
    """Where in the file the body begins (0, or `have`), and the size of the whole file, where the server tells it.

    Raises Interrupted for a body that does not continue the part.
    """
    if response.status == 200:
        return 0, response.length
    if response.status != 206:
        raise Interrupted(f"unexpected answer HTTP {response.status}")
    match = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)", response.headers.get("Content-Range", ""))
    size = int(match[2]) if match and match[2] != "*" else None
    if match is None or int(match[1]) != have or (origin and None not in (size, origin.size) and size != origin.size):
        raise Interrupted("the server sent another part than the missing one", start_over=True)
    if origin and origin.validator:
        header = "ETag" if origin.validator.startswith('"') else "Last-Modified"
        if response.headers.get(header, origin.validator) != origin.validator:
            raise Interrupted("the file there has changed", start_over=True)
    return have, size if size is not None or origin is None else origin.size


def blocks(response: http.client.HTTPResponse, n_bytes: int | None, timeout: float) -> Iterator[bytes]:
    """The body as it arrives, at most `n_bytes` of it. Raises Interrupted where the network fails."""
    left = sys.maxsize if n_bytes is None else n_bytes
    while left > 0:
        try:
            block = response.read1(min(left, BLOCK))  # not read(), which loses what came before a stall
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(describe(error, timeout)) from None
        if not block:
            return
        left -= len(block)
        yield block


def validator_of(headers: Message) -> str | None:
    """What tells this version of the file from others: a strong ETag (If-Range takes no weak one) or Last-Modified."""
    etag = headers.get("ETag", "")
    value = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    return value if value and value.isascii() and value.isprintable() else None


def read_origin(target: Path, url: str) -> Origin | None:
    """What `<target>.part` belongs to; None where it cannot be continued from `url`."""
    try:
        origin = Origin(**json.loads(origin_file(target).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    is_usable = origin.url == url and isinstance(origin.validator, str) and part_of(target).is_file()
    return origin if is_usable and isinstance(origin.size, int | None) else None


def describe(error: Exception, timeout: float) -> str:
    """One line on a network error; what a server wrote into it does not reach the terminal unescaped."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return f"no answer for {timeout:g} s"
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return text if text.isprintable() else ascii(text)


def too_large(url: str, target: Path) -> InputError:
    """Removes what came so far, and says why."""
    discard(target)
    return InputError(f"{url}: larger than {LIMIT:,} bytes, which no Alpaca file is; check --url")


def discard(target: Path) -> None:
    """Remove the unfinished download."""
    with saving(target):
        for path in (part_of(target), origin_file(target)):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Say what went wrong on the disk: EnvironmentFailure where it is full, else InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            line = f"disk full while {path} was written; free some space and run the command again to continue"
            raise EnvironmentFailure(line) from None
        raise InputError(f"{path} cannot be written: {error.strerror or error}; choose another name") from None


def read(path: Path) -> bytes:
    """All of a file. Raises InputError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; choose another --out") from None


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def part_of(path: Path) -> Path:
    """Where a file grows before it is complete."""
    return path.with_name(f"{path.name}.part")


def origin_file(target: Path) -> Path:
    """Where the Origin of a part is kept."""
    return target.with_name(f"{target.name}.part.json")


if __name__ == "__main__":
    cli.run(main)
