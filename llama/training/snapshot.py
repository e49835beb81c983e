"""Training snapshots: directories that are complete or not there, in which every byte is accounted for.

    runs/x/snapshots/step-00000042/   model.safetensors  optimizer.safetensors  ...  state.json  MANIFEST.json

A snapshot is written under a hidden name, every file brought to the disk, and then renamed; MANIFEST.json, the last,
holds the sha256 of each file and of each tensor. A process killed at any moment, or a full disk, leaves the snapshots
before it untouched. What does not match its manifest is not a snapshot: `latest` passes over it and says so, `load`
refuses it and names file and tensor. safetensors alone would load most flipped bits without a word.

Where processes have shares of the weights (several.py), each writes its own, model.0-of-2.safetensors and so on, into
the same hidden directory; the first writes the rest and the manifest, and renames it when all have written. Any number
of processes reads them: shares are put together tensor by tensor, as each is asked for.

Left out on purpose: what the tensors mean (step.py, run.py).
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from llama import files, processes
from llama.errors import EnvironmentFailure, InputError

FORMAT = 1
NAME = re.compile(r"step-(\d{8})")
SHARE = re.compile(r"(.+)\.(\d+)-of-(\d+)")  # the stem of a file of shares
STATE, MANIFEST = "state.json", "MANIFEST.json"


@dataclass
class Snapshot:
    """What is kept: groups of named tensors, one file each, and what JSON can say.

    shares: groups of what this process alone has, its rows of each tensor; of all other things the first process has
    as much as any.
    """

    tensors: dict[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    shares: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)


class Joined(Mapping[str, Tensor]):
    """Tensors of which each file holds some rows; one is put together whenever it is asked for."""

    def __init__(self, parts: dict[str, list[Tensor]]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Tensor:
        found = self.parts[name]
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def save(root: Path, step: int, snapshot: Snapshot, run_id: str, keep: int) -> Path:
    """Write `root`/step-NNNNNNNN, then delete this run's snapshots of later steps and all but the newest `keep`.

    One of a later step is left over where the run was resumed from an earlier one. Of several processes all call it.
    Raises EnvironmentFailure where it cannot be written; what was there before is then still there.
    """
    me, target = processes.world(), root / f"step-{step:08d}"
    if not me.is_first:
        if snapshot.shares and (scratch := processes.from_first(None)):
            processes.to_first(_write_shares(Path(scratch), snapshot.shares))
        return target
    is_there = target.exists() and _is_whole(target, run_id)
    if is_there:
        if snapshot.shares:
            processes.from_first("")
        return target
    with files.new_directory(target) as scratch:
        written = {}
        if snapshot.shares:
            processes.from_first(str(scratch.resolve()))
            for listing in processes.to_first(_write_shares(scratch, snapshot.shares)):
                written |= listing
        for group, tensors in snapshot.tensors.items():
            written |= _write(scratch / f"{group}.safetensors", tensors)
        files.write_json(scratch / STATE, snapshot.state)
        written |= _entry(scratch / STATE, {})
        manifest = {"format": FORMAT, "run_id": run_id, "step": step, "torch": torch.__version__}
        files.write_json(scratch / MANIFEST, manifest | {"files": dict(sorted(written.items()))})
    ours = [path for path in listed(root) if _run_of(path) == run_id]
    place = ours.index(target)
    for path in ours[: max(0, place + 1 - keep)] + ours[place + 1 :]:
        _discard(path)
    return target


def _write_shares(directory: Path, shares: dict[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """A file for each group of this process; what the manifest says of them."""
    me, written = processes.world(), {}
    if not directory.is_dir():
        raise InputError(
            f"process {me.rank} of {me.size} does not see {directory.parent.parent}; choose an out_dir on a disk that "
            "all hosts share"
        )
    try:
        for group, tensors in shares.items():
            path = directory / f"{group}.{me.rank}-of-{me.size}.safetensors"
            written |= _write(path, tensors)
            files.sync(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise files.cannot_write(directory, error) from error
    return written


def _write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, path)
    return _entry(path, {name: _hash(tensor) for name, tensor in plain.items()})


def _entry(path: Path, hashes: dict[str, str]) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path), "tensors": hashes}}


def listed(root: Path) -> list[Path]:
    """Directories that are named like snapshots, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if NAME.fullmatch(path.name))


def latest(root: Path, run_id: str | None = None) -> tuple[Path, Snapshot, list[str]]:
    """The newest snapshot that is whole, and one line on each that was passed over.

    run_id: only those of this run. Raises InputError where there is none.
    """
    passed_over = []
    for path in reversed(listed(root)):
        try:
            if run_id is not None and _manifest(path)["run_id"] != run_id:
                passed_over.append(f"{path} belongs to another run")
                continue
            return path, load(path), passed_over
        except InputError as error:
            passed_over.append(str(error))
    details = f": {passed_over[0]}" if passed_over else ""
    raise InputError(f"{root} holds no whole snapshot to resume from{details}")


def load(path: Path) -> Snapshot:
    """Read a snapshot. Raises InputError naming file and tensor where anything differs from the manifest."""
    manifest = _manifest(path)
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    for name in sorted(manifest["files"].keys() ^ present):
        raise InputError(f"{path / name}: {'is missing' if name not in present else 'is not in ' + MANIFEST}")
    groups: dict[str, dict[str, list[Tensor]]] = {}
    for name, entry in sorted(manifest["files"].items(), key=lambda item: _place(item[0])):
        file = path / name
        if not file.is_file():
            raise InputError(f"{file}: is not a file; resume from another snapshot")
        try:
            whole = file.stat().st_size == entry["bytes"] and files.sha256(file) == entry["sha256"]
            content = safetensors.torch.load_file(file) if file.suffix == ".safetensors" else None
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{file}: cannot be read: {error}; resume from another snapshot") from error
        if not whole:
            raise InputError(f"{file}: {_damage(content, entry['tensors'])}; resume from another snapshot")
        if content is not None:
            group = groups.setdefault(_place(name)[0], {})
            for tensor, rows in content.items():
                group.setdefault(tensor, []).append(rows)
    return Snapshot({name: Joined(parts) for name, parts in groups.items()}, files.read_json(path / STATE))


def _place(name: str) -> tuple[str, int]:
    """The group of a file, and which share of it."""
    stem = Path(name).stem
    share = SHARE.fullmatch(stem)
    return (share[1], int(share[2])) if share else (stem, 0)


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold a run directory for this process; the system lets go of it when the process ends, however it ends.

    Raises InputError naming the process that holds it. What killed processes left half written is removed.
    """
    path = root / ".lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, timeout=0).acquire()
    except filelock.Timeout:
        owner = path.read_text(errors="replace").strip() or "unknown"
        raise InputError(f"{root} is in use by process {owner}; choose another out_dir") from None
    except OSError as error:
        raise EnvironmentFailure(f"cannot write to {root}: {error.strerror}; choose another out_dir") from error
    with lock:
        path.write_text(f"{os.getpid()}\n")  # the library keeps no such number
        for scratch in [*root.glob(".*"), *root.glob("snapshots/.*")]:
            if files.SCRATCH.fullmatch(scratch.name) and scratch.is_dir():
                shutil.rmtree(scratch, ignore_errors=True)
            elif files.SCRATCH.fullmatch(scratch.name):
                scratch.unlink(missing_ok=True)
        yield


def _is_whole(path: Path, run_id: str) -> bool:
    """Whether this run has this snapshot already. A damaged one is put out of the way, another run's is not touched."""
    try:
        load(path)
    except InputError:
        _discard(path)
        return False
    if _run_of(path) != run_id:
        raise InputError(f"{path} belongs to another run; move it away or choose another out_dir")
    return True


def _discard(path: Path) -> None:
    """Delete a directory so that no half of it ever stands under its name."""
    trash = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a snapshot, checked as far as reading it needs."""
    file = path / MANIFEST
    manifest = files.read_json(file)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{file}:format: {manifest.get('format')!r} is not {FORMAT}, the one this version reads")
    listing = manifest.get("files")
    fields = {"bytes", "sha256", "tensors"}
    whole = isinstance(listing, dict) and STATE in listing and isinstance(manifest.get("run_id"), str)
    if not whole or not all(isinstance(e, dict) and e.keys() == fields for e in listing.values()):
        raise InputError(f"{file}:files: is not what a snapshot's manifest holds")
    return manifest


def _run_of(path: Path) -> str | None:
    try:
        return _manifest(path)["run_id"]
    except InputError:
        return None


def _damage(content: dict[str, Tensor] | None, hashes: dict[str, str]) -> str:
    """Which tensors of a file differ from what was saved."""
    if content is not None:
        for name in sorted(hashes.keys() | content.keys()):
            if name not in content or hashes.get(name) != _hash(content[name]):
                return f"tensor {name} is not what was saved"
    return "is not what was saved (its sha256 differs from the manifest's)"


def _hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
