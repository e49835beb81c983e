"""The checkpoint that a user means by a path, and what to say where there is none: it depends on what lies there.

Llama-3.2-1B/                     the directory itself
Llama-3.2-1B/model.safetensors    a file in it: the directory
model.gguf                        a GGUF file, which is a checkpoint by itself
~/.cache/huggingface/hub/...      a repository in Hugging Face's cache: the snapshot that its refs/main names
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from llama import files
from llama.errors import InputError
from llama.gguf_header import MAGIC

MARKERS = ("params.json", "config.json")  # Meta's layout, Hugging Face's
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".7z")
UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")  # of Hugging Face's tools, browsers, aria2


def locate(ckpt_dir: str | Path, what: str = "checkpoint directory") -> Path:
    """The directory of a checkpoint, or its GGUF file. Raises InputError, with `what`, where it leads nowhere."""
    path = Path(ckpt_dir)
    with contextlib.suppress(RuntimeError):  # no such user: then it is a name like any other
        path = path.expanduser()
    if path.is_file():
        return path if is_gguf(path) else path.parent
    if not path.is_dir():
        hint = "check its name"
        if not path.is_absolute() and len(path.parts) == 2:
            hint += ", or download it first if that is a repository on Hugging Face"
        raise InputError(f"{what} {path} does not exist; {hint}")
    if all((path / name).is_dir() for name in ("blobs", "snapshots")):  # a run of finetuning.py has the latter, too
        return _snapshot(path)
    if any((path / folder / name).is_file() for folder in ("", "original") for name in MARKERS):
        return path
    ggufs = [file for file in path.iterdir() if is_gguf(file)]
    return ggufs[0] if len(ggufs) == 1 else path


def is_gguf(path: Path) -> bool:
    """By content; one that is damaged by its name, so that it is the file that a message speaks of."""
    return path.is_file() and (files.head(path).startswith(MAGIC) or path.suffix == ".gguf")


def _snapshot(repository: Path) -> Path:
    """The one that refs/main names, else the only one there is."""
    snapshots = [path for path in (repository / "snapshots").iterdir() if path.is_dir()]
    name = files.head(repository / "refs" / "main").decode(errors="replace").strip()
    chosen = [path for path in snapshots if path.name == name] or snapshots
    if len(chosen) != 1:
        names = ", ".join(sorted(path.name for path in snapshots)) or "none"
        raise InputError(f"{repository} is a repository of Hugging Face's cache; pass one of its snapshots/ ({names})")
    return chosen[0]


def remedy(directory: Path) -> str:
    """What to do about a directory that holds no whole checkpoint."""
    here = sorted(directory.iterdir())

    def first(*suffixes: str) -> Path | None:
        return next((path for path in here if path.suffix in suffixes), None)

    if (directory / "adapter_config.json").is_file():
        return "this is an adapter: pass it as adapter=DIR, and its base model as ckpt_dir"
    caches = (directory / ".cache/huggingface/download", directory / "../../blobs")  # of a download, of a snapshot
    if any(path.suffix in UNFINISHED for path in (*here, *caches[0].glob("*"), *caches[1].glob("*"))):
        return "a download of it was not finished: start it again, and it goes on"
    below = [path for path in here if path.is_dir() and any((path / name).is_file() for name in MARKERS)]
    if below:
        return f"there is a checkpoint in a folder below, pass ckpt_dir={below[0]}"
    if adapters := [path.parent for path in sorted(directory.glob("*/adapter_config.json"))]:
        return f"there is an adapter in a folder below, pass adapter={adapters[0]}, and its base model as ckpt_dir"
    if ggufs := [str(path) for path in here if is_gguf(path)]:
        return f"pass one of its GGUF files, ckpt_dir={' or '.join(ggufs)}"
    if path := first(*ARCHIVES):
        return f"unpack {path.name} first"
    if any((directory / name).is_file() for name in MARKERS):
        return "download the weights, too"
    if path := first(*WEIGHTS):
        return f"download the configuration that belongs to {path.name}, too: it is published beside it"
    return "check its name" if here else "it is empty: check its name"
