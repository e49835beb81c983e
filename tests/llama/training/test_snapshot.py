"""Snapshots are whole or not there: every byte counted, nothing good deleted, no two runs in one directory."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import several
import torch
from conftest import ROOT

from llama import files, processes
from llama.errors import EnvironmentFailure, InputError
from llama.training import snapshot
from llama.training.snapshot import Snapshot


def content(step: int, size: int = 40) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    return Snapshot(
        {
            "model": {"a": torch.randn(size, generator=generator), "b": torch.tensor(step)},
            "optimizer": {},
            "rng": {"cpu": torch.get_rng_state()[:64]},
        },
        {"step": step, "text": "ü"},
    )


def equal(a: Snapshot, b: Snapshot) -> bool:
    names = {group: tensors.keys() for group, tensors in a.tensors.items()}
    return (
        a.state == b.state
        and names == {group: tensors.keys() for group, tensors in b.tensors.items()}
        and all(torch.equal(t, b.tensors[group][name]) for group in names for name, t in a.tensors[group].items())
    )


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = snapshot.save(tmp_path, 7, content(7), "run", keep=1)
    assert path.name == "step-00000007" and equal(snapshot.load(path), content(7))
    assert {p.name for p in path.iterdir()} == {
        *(f"{group}.safetensors" for group in ("model", "optimizer", "rng")), "state.json", "MANIFEST.json"
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]  # no scratch


def test_files_have_the_modes_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        path = snapshot.save(tmp_path, 1, content(1), "run", keep=1)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in path.iterdir() if p.suffix == ".json"} == {0o640}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_other_runs_are_not_touched(tmp_path, keep):
    snapshot.save(tmp_path, 99, content(99), "another run", keep=1)
    for step in range(1, 8):
        snapshot.save(tmp_path, step, content(step), "run", keep)
        ours = [path for path in snapshot.listed(tmp_path) if path.name != "step-00000099"]
        assert [int(path.name[5:]) for path in ours] == list(range(max(1, step - keep + 1), step + 1))
    path, found, passed_over = snapshot.latest(tmp_path, "run")
    assert path.name == "step-00000007" and equal(found, content(7))
    assert len(passed_over) == 1 and "another run" in passed_over[0]
    with pytest.raises(InputError, match="another run"):
        snapshot.save(tmp_path, 99, content(99), "run", keep)
    assert equal(snapshot.load(tmp_path / "step-00000099"), content(99))


def test_a_damaged_newer_one_never_costs_a_good_one(tmp_path):
    """Resumed from step 4 because 8 is broken; with keep=1 the good 6 must survive the cleaning up, not the bad 8."""
    snapshot.save(tmp_path, 4, content(4), "run", keep=5)
    snapshot.save(tmp_path, 8, content(8), "run", keep=5)
    (tmp_path / "step-00000008" / "model.safetensors").write_bytes(b"x")
    assert snapshot.latest(tmp_path, "run")[0].name == "step-00000004"
    snapshot.save(tmp_path, 6, content(6), "run", keep=1)
    assert [path.name for path in snapshot.listed(tmp_path)] == ["step-00000006"]
    (tmp_path / "step-00000006" / "state.json").unlink()
    snapshot.save(tmp_path, 6, content(6), "run", keep=1)  # in the place of a damaged one
    assert equal(snapshot.load(tmp_path / "step-00000006"), content(6))


def test_saving_the_same_step_again_keeps_what_is_there(tmp_path):
    path = snapshot.save(tmp_path, 3, content(3), "run", keep=1)
    before = path.stat().st_ino
    assert snapshot.save(tmp_path, 3, content(3), "run", keep=1) == path and path.stat().st_ino == before


def save_shares(root: Path, trouble: str = "") -> None:
    """Two processes, which have 3 and 2 rows of a matrix; the first has a step count, too."""
    me = processes.start()
    rows = torch.arange(10.0).view(5, 2)[3 * me.rank : 3 + 2 * me.rank]
    whole = {"model": {}, "optimizer": {"a:step": torch.tensor(4.0)}, "rng": {}} if me.is_first else {}
    content = Snapshot(whole, {"step": 4}, {"model": {"a": rows}, "optimizer": {"a:exp_avg": -rows}})
    if trouble == "disk" and not me.is_first:
        snapshot._write = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    if trouble == "elsewhere" and not me.is_first:
        processes.from_first = lambda value, usual=processes.from_first: usual(value) + "x"
    try:
        for _ in range(2):  # the second time it is there already
            assert snapshot.save(root, 4, content, "run", keep=1).name == "step-00000004"
    except (EnvironmentFailure, InputError) as error:
        assert trouble and not me.is_first
        (root / "said").write_text(str(error))
        processes.abandon(1)


def test_each_process_writes_its_share_and_any_number_reads_them(tmp_path):
    several.run(2, save_shares, tmp_path)
    path = tmp_path / "step-00000004"
    names = {f"{group}.{i}-of-2.safetensors" for group in ("model", "optimizer") for i in (0, 1)}
    whole = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "MANIFEST.json"}
    assert {p.name for p in path.iterdir()} == names | whole
    found = snapshot.load(path).tensors
    assert torch.equal(found["model"]["a"], torch.arange(10.0).view(5, 2)) and len(found["model"]) == 1
    assert torch.equal(found["optimizer"]["a:exp_avg"], -found["model"]["a"])
    assert found["optimizer"]["a:step"] == 4 and found["rng"] == {}
    flip(path / "model.1-of-2.safetensors", 8 * (path / "model.1-of-2.safetensors").stat().st_size - 1)
    with pytest.raises(InputError, match=r"model\.1-of-2\.safetensors: tensor a is not what was saved"):
        snapshot.load(path)
    (path / "model.1-of-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.1-of-2\.safetensors: is missing"):
        snapshot.load(path)


@pytest.mark.slow
@pytest.mark.parametrize(("trouble", "said"), [("disk", "No space left"), ("elsewhere", "that all hosts share")])
def test_where_one_process_cannot_write_there_is_no_snapshot(tmp_path, trouble, said):
    with pytest.raises(AssertionError, match="ended with 1"):
        several.run(2, save_shares, tmp_path, trouble)
    assert said in (tmp_path / "said").read_text() and not (tmp_path / "step-00000004").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "rng.safetensors", "state.json", "MANIFEST.json"])
def test_a_missing_file_is_named_and_the_previous_snapshot_taken(tmp_path, name):
    for step in (1, 2):
        snapshot.save(tmp_path, step, content(step), "run", keep=2)
    (tmp_path / "step-00000002" / name).unlink()
    path, found, passed_over = snapshot.latest(tmp_path)
    assert path.name == "step-00000001" and equal(found, content(1))
    assert len(passed_over) == 1 and name in passed_over[0]
    with pytest.raises(InputError, match=name):
        snapshot.load(tmp_path / "step-00000002")
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(InputError, match="no whole snapshot"):
        snapshot.latest(tmp_path)


def test_an_extra_file_or_another_format_is_refused(tmp_path):
    path = snapshot.save(tmp_path, 1, content(1), "run", keep=1)
    (path / "extra").write_text("")
    with pytest.raises(InputError, match="extra"):
        snapshot.load(path)
    (path / "extra").unlink()
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for change in ({"format": 2}, {"files": []}, {"files": {}}, {"run_id": None}, {"files": {"state.json": {}}}):
        (path / "MANIFEST.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(InputError, match=r"MANIFEST\.json"):
            snapshot.load(path)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def undetected_flips(folder: Path, n: int) -> list[str]:
    """Single bits flipped in random places of random files, and put back; those that were loaded all the same."""
    path = snapshot.save(folder, 1, content(1, size=200), "run", keep=1)
    names = sorted(p.name for p in path.iterdir() if p.name != "MANIFEST.json")
    sizes = [8 * (path / name).stat().st_size for name in names]
    rng, missed = random.Random(0), []
    for _ in range(n):
        name = rng.choices(names, sizes)[0]
        bit = rng.randrange(sizes[names.index(name)])
        flip(path / name, bit)
        try:
            snapshot.load(path)
            missed.append(f"{name} bit {bit}")
        except InputError as error:
            assert name in str(error), error
        flip(path / name, bit)
    assert equal(snapshot.load(path), content(1, size=200))
    return missed


def test_every_flipped_bit_is_noticed(tmp_path):
    assert undetected_flips(tmp_path, 300) == []


@pytest.mark.slow
def test_every_flipped_bit_of_ten_thousand_is_noticed(tmp_path):
    assert undetected_flips(tmp_path, 10_000) == []


def test_a_flipped_value_is_named_by_its_tensor(tmp_path):
    path = snapshot.save(tmp_path, 1, content(1), "run", keep=1)
    data = (path / "model.safetensors").read_bytes()
    flip(path / "model.safetensors", 8 * data.index(content(1).tensors["model"]["a"].numpy().tobytes()) + 5)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor a is not what was saved"):
        snapshot.load(path)


def test_a_flipped_bit_of_the_manifest_is_never_taken_for_another_state(tmp_path):
    """The manifest has no hash of its own: what still loads must be what was saved."""
    path = snapshot.save(tmp_path, 1, content(1), "run", keep=1)
    whole = (path / "MANIFEST.json").read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        flip(path / "MANIFEST.json", bit)
        try:
            assert equal(snapshot.load(path), content(1))
        except InputError as error:
            assert str(path) in str(error)
        (path / "MANIFEST.json").write_bytes(whole)


def read_again_and_again(root: Path, seconds: float, found) -> None:
    """Another process that lists and loads the newest while it is being written."""
    end, n, problems = time.monotonic() + seconds, 0, []
    while time.monotonic() < end:
        for path in snapshot.listed(root):
            if path.exists() and not (path / "MANIFEST.json").exists() and path.exists():
                problems.append(f"{path.name} had no manifest")
        n += 1
    found.put((n, problems))


def test_a_directory_under_its_name_is_always_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    reader = context.Process(target=read_again_and_again, args=(tmp_path, 1.0, found))
    reader.start()
    step = 0
    while reader.is_alive() and found.empty():
        step += 1
        snapshot.save(tmp_path, step, content(step), "run", keep=2)
    n, problems = found.get(timeout=60)
    reader.join()
    assert problems == [] and n > 50 and step > 5


def test_order_on_the_disk(tmp_path):
    """For a power cut: all content is synced before the rename, the directory after it, and nothing written later."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    program = (
        "import sys; sys.path[:0] = ['.', 'tests/llama/training', 'tests']\n"
        "import os, pathlib, torch, test_snapshot as t\n"
        f"t.snapshot.save(pathlib.Path({str(tmp_path)!r}), 1, t.content(1), 'run', 1)\n"
        "os.write(1, b'saved')\n"
    )
    trace = tmp_path.with_name("trace")
    calls = "write,writev,pwrite64,fsync,fdatasync,rename,renameat,renameat2,ftruncate"
    command = ["strace", "-f", "-y", "-o", str(trace), "-e", f"trace={calls}", sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode and "ptrace" in run.stderr.lower():
        pytest.skip("tracing is not allowed here")
    assert run.returncode == 0, run.stderr
    written, synced, renamed, parent_synced = set(), set(), False, False
    for line in trace.read_text().splitlines():
        path = line.split("<", 1)[-1].split(">", 1)[0]
        if " rename" in line and str(tmp_path) in line:
            source, target = re.findall(r'"([^"]+)"', line)
            if not snapshot.NAME.fullmatch(Path(target).name):  # safetensors writes under another name first
                written = {target if path == source else path for path in written}
                continue
            renamed = True
            assert written and written <= synced, f"not on the disk before the rename: {written - synced}"
            assert any(Path(p).name.startswith(".step-") for p in synced)  # the list of files itself
        elif "fsync(" in line or "fdatasync(" in line:
            synced.add(path)
            parent_synced |= renamed and path == str(tmp_path)
        elif path.startswith(str(tmp_path)):
            assert not renamed, f"written after the rename: {line}"
            written.add(path)
            synced.discard(path)
        elif "saved" in line:
            assert parent_synced, "announced before it was safe"
    assert renamed and parent_synced and len(written) == 5


def test_a_directory_is_one_runs_at_a_time(tmp_path):
    with snapshot.lock(tmp_path):
        program = (
            "from pathlib import Path; from llama.training import snapshot\n"
            f"with snapshot.lock(Path({str(tmp_path)!r})): pass"
        )
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode and f"in use by process {os.getpid()}" in run.stderr
    leftover, half = tmp_path / "snapshots" / f".step-00000001.{'0a' * 8}", tmp_path / f".settings.json.{'1b' * 8}"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    half.write_text("{")
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    with snapshot.lock(tmp_path):  # the first has let go; what a killed process left is cleared away, and nothing else
        assert not leftover.exists() and not half.exists() and (tmp_path / ".git" / "objects").exists()


def test_what_cannot_be_written_is_one_kind_of_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match="cannot write"):
        snapshot.save(tmp_path / "file" / "snapshots", 1, content(1), "run", keep=1)
    with pytest.raises(EnvironmentFailure, match="cannot write"), snapshot.lock(tmp_path / "file" / "x"):
        pass
    snapshot.save(tmp_path / "s", 1, content(1), "run", keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(EnvironmentFailure, match="No space left"):
        snapshot.save(tmp_path / "s", 2, content(2), "run", keep=1)
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["step-00000001"]
    assert equal(snapshot.load(tmp_path / "s" / "step-00000001"), content(1))


def test_an_old_one_that_cannot_be_deleted_is_out_of_the_way(tmp_path, monkeypatch):
    """As where somebody else owns a file in it; the next save does not stumble over what is left."""
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else 1 / 0)
    for step in (1, 2, 3):
        snapshot.save(tmp_path, step, content(step), "run", keep=1)
    assert [path.name for path in snapshot.listed(tmp_path)] == ["step-00000003"]
    assert equal(snapshot.load(tmp_path / "step-00000003"), content(3))
