"""Fetch the Stanford Alpaca instructions, and choose some of them: the same seed always gives the same choice.

    python -m data.download --n=1000 --seed=7 --subset_out=runs/alpaca_1000.json       # default: 200, seed 1

A download that breaks off is tried again, and continued by the same command. Stanford's licence is CC BY-NC 4.0.
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

import http.client
import json
import random
import re
import ssl
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

from tqdm import tqdm

from data import alpaca, records
from llama import cli, files
from llama.cli import option
from llama.errors import EnvironmentFailure, InputError

ALPACA = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
SHA256 = "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419"
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between tries


@dataclass(frozen=True)
class Options(cli.Options):
    """Fetch the Stanford Alpaca instructions and write a random choice of them."""

    url: str = option(ALPACA, "http or https address of a JSON list of Alpaca records")
    sha256: str = option(SHA256, "what the file must hash to, 64 hexadecimal digits")
    out: str = option("data/alpaca_data.json", "file for all records; one with that hash is not fetched again")
    subset_out: str = option("data/alpaca_200_stanford.json", "file for the choice, also a JSON list")
    n: int = option(200, "number of records to choose", least=1)
    seed: int = option(1, "seed of the choice; the same data, n and seed give the same file", **cli.SEEDS)
    timeout: float = option(30.0, "seconds of silence after which the connection counts as broken", above=0)


def main(options: Options) -> None:
    out, subset = Path(options.out), Path(options.subset_out)
    fetch(options.url, out, options.sha256, timeout=options.timeout)
    found = records.read(out).records
    if not isinstance(found[0], alpaca.Record):
        raise InputError(f"{out} holds {found[0].kind}, not Alpaca records; check the address and the hash")
    print(f"{out}: {len(found):,} records, {out.stat().st_size:,} bytes, sha256 {options.sha256.lower()}")
    chosen = [asdict(record) for record in choose(found, options.n, options.seed)]
    subset.parent.mkdir(parents=True, exist_ok=True)
    subset.write_text(json.dumps(chosen, indent=1) + "\n", encoding="ascii")
    print(f"{subset}: {options.n:,} of them, chosen with seed {options.seed}")


def choose(records: list[alpaca.Record], n: int, seed: int) -> list[alpaca.Record]:
    """`n` different records with an answer, in the order of the source. Raises InputError where there are fewer."""
    answered = [record for record in records if record.instruction.strip() and record.output.strip()]
    if n > len(answered):
        raise InputError(f"n={n}: there are only {len(answered):,} records with an answer; choose fewer")
    return [answered[i] for i in sorted(random.Random(seed).sample(range(len(answered)), n))]


def fetch(url: str, path: Path, sha256: str, limit: int = 2**30, timeout: float = 30.0) -> None:
    """Download a file, unless it is there already. It gets its name when it is complete and has this hash.

    Until then its bytes are in `<path>.part`, where the next try or call continues. limit is in bytes, timeout in
    seconds. Raises InputError for an address or a content that is wrong, EnvironmentFailure for network and disk.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a file; choose another name")
    part = path.with_name(f"{path.name}.part")
    try:
        if path.exists() and files.sha256(path) == sha256.lower():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for pause in (*PAUSES, None):
            if (reason := _try(url, part, sha256.lower(), limit, timeout)) is None:
                return files.publish(part, path)
            if pause is not None:
                print(f"{url}: {reason}; trying again in {pause:g} s", flush=True)
                time.sleep(pause)
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror or error}"
        raise EnvironmentFailure(f"{reason}; free some space and run the command again to continue") from None
    raise EnvironmentFailure(f"{url}: {reason}; check the network and run the command again to continue")


def _try(url: str, part: Path, sha256: str, limit: int, timeout: float) -> str | None:
    """Complete `part` with one request and check it, or say in one line why a later request may succeed."""
    is_resumed = bool(have := part.stat().st_size if part.exists() else 0)
    try:
        if not re.match("https?://[^/]", url):
            raise ValueError("expected https://host/file")
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if is_resumed else {})
        with urllib.request.urlopen(request, timeout=timeout) as response, part.open("ab") as file:
            if response.status == 200:  # the whole file, not the rest of it
                file.truncate(have := 0)
            size = have + (response.length or 0)  # 0 where the server does not tell it
            with tqdm(total=size or None, initial=have, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                while block := response.read1(2**16):  # not read(), which loses what came before a stall
                    have += len(block)
                    if max(have, size) > limit:
                        part.unlink()
                        raise ValueError(f"larger than {limit:,} bytes")
                    file.write(block)
                    bar.update(len(block))
        if have < size:
            return f"cut off after {have:,} of {size:,} bytes"
    except HTTPError as error:
        answer = f"HTTP {error.code} {http.client.responses.get(error.code, '')}"
        if error.code >= 500 or error.code in (408, 429):  # a timeout, too many requests
            return answer
        if error.code != 416 or not is_resumed:  # 416: the part is complete
            raise InputError(f"{url}: {answer}; check the address") from None
    except (ValueError, http.client.InvalidURL) as error:  # also where the server redirects to such an address
        raise InputError(f"{url}: cannot be used ({str(error)!a}); check the address") from None
    except (URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        return ascii(str(getattr(error, "reason", error)))[1:-1]
    if (found := files.sha256(part)) == sha256:
        return None
    part.unlink()  # or the next try would continue it
    if is_resumed:
        return f"continued, its sha256 is {found}, not {sha256}"
    raise InputError(f"{url}: sha256 is {found}, not {sha256}; check the address and the hash")


if __name__ == "__main__":
    cli.run(main)
