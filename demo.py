"""A web page on one loaded model, and an API in OpenAI's form beside it. `make demo` sets up what it needs.

python demo.py                                             # the embedded model, at http://127.0.0.1:7860
python demo.py --ckpt_dir=Llama3.2-1B-Instruct --dtype=bfloat16
python demo.py --host=0.0.0.0 --api_key=SECRET             # for other machines, with a key
curl http://127.0.0.1:7860/v1/models                       # the API; docs/demo.md has more
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

import importlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from data.tiny import EMBEDDED, directory_of, name_of
from llama import Llama, Transformer, checkpoint, cli, memory
from llama import device as devices
from llama.checkpoint import fingerprint
from llama.cli import option
from llama.decoding import CACHES
from llama.device import dtype_name
from llama.errors import EnvironmentFailure, InputError
from llama.quantization import quantization_of
from llama.tokenizer import find_tokenizer
from serving.api import Api
from serving.engine import Engine
from serving.room import CONVERSATIONS, Room, with_adapter


@dataclass(frozen=True)
class Options(cli.Options):
    """A web page on one loaded model, and an API in OpenAI's form."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    adapter: str | None = option(None, cli.ADAPTER)
    any_base: bool = option(False, cli.ANY_BASE)
    max_seq_len: int = option(2048, "prompt and generated tokens of one text together", least=2)
    max_gen_len: int = option(512, "tokens of one answer at most", least=1)
    streams: int = option(4, "texts that are generated at once, in turn, each with its own cache", least=2)
    waiting: int = option(32, "requests that may wait behind them; more are refused", least=0)
    host: str = option("127.0.0.1", "address to listen at; one that other machines reach needs api_key")
    port: int = option(7860, "port to listen at; 0 takes a free one", least=0, below=1 << 16)
    api_key: str | None = option(None, "what requests to the API must bear, and the page's password")
    device: str = option("auto", cli.DEVICE)
    dtype: str = option("auto", cli.DTYPE)
    cache_dtype: str = option("auto", "of the KV cache: auto is that of the activations", choices=CACHES)
    decoding: str = option("auto", "auto takes the fastest step that the machine has; eager the plain one")


def main(options: Options) -> None:
    web = packaged("serving.web")
    if options.api_key is None and not web.is_loopback(options.host):
        raise InputError(f"host={options.host} is reached by other machines; add --api_key=SECRET")
    if options.api_key is not None and not (options.api_key.isascii() and options.api_key.strip()):
        raise InputError("api_key must have visible ASCII characters")
    listening = web.listen(options.host, options.port)
    pages = packaged("serving.page")
    directory = directory_of(options.ckpt_dir)
    base, adapted = load(options)
    most, name = min(options.max_gen_len, options.max_seq_len - 1), name_of(directory)
    engine = Engine(options.streams, options.waiting)
    room = Room(base, engine, adapted, small_draft(directory, base))
    api = Api(room.llama, engine, name, most, options.api_key, log)
    page = pages.application(pages.page(room, describe(name, base), most, log), options.api_key)
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server = web.server(web.Site(api, page, web.is_loopback(options.host)))
    server.on_start = partial(log, f"{name}: the page is at {url}, the API at {url}/v1; Ctrl-C ends")
    try:
        server.run(sockets=[listening])
    finally:
        engine.close()


def packaged(name: str) -> ModuleType:
    """A module of what requirements.txt does not bring. Raises EnvironmentFailure where that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        remedy = "type `make demo`, or `pip install -r requirements-demo.txt`"
        raise EnvironmentFailure(f"the package {error.name} is not installed; {remedy}") from None


def load(options: Options) -> tuple[Llama, Llama | None]:
    """The model, and the same with the adapter. Raises EnvironmentFailure where memory lacks for all caches."""
    directory = directory_of(options.ckpt_dir)
    source = checkpoint.open_source(directory)
    device, dtype = devices.resolve(options.device, options.dtype)
    needed = memory.estimate(source, dtype, options.cache_dtype, options.streams + CONVERSATIONS, options.max_seq_len)
    memory.require(needed, source, dtype, options.cache_dtype, device)
    names = ("max_seq_len", "device", "dtype", "decoding", "cache_dtype")
    settings = {name: getattr(options, name) for name in names}
    tokenizer = find_tokenizer(directory, options.tokenizer_path)
    llama = Llama.build(source, tokenizer, max_batch_size=1, progress=True, **settings)
    if options.adapter is None:
        return llama, None
    return llama, with_adapter(llama, options.adapter, None if options.any_base else partial(fingerprint, source))


def small_draft(directory: Path, base: Llama) -> Transformer | None:
    """The draft model that ships with the embedded one."""
    if directory.resolve() != EMBEDDED.resolve():
        return None
    return checkpoint.load(EMBEDDED / "draft", base.model.dtype, base.device)


def describe(name: str, llama: Llama) -> str:
    """The model in a line."""
    config = quantization_of(llama.model)
    weights = dtype_name(llama.model.dtype) + (f" over {config.name} weights" if config is not None else "")
    n = llama.model.args.n_params()
    return f"{name}: {n:,} parameters, {weights}, {devices.device_name(llama.device)}, {llama.decoder.name} decoding"


def log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
