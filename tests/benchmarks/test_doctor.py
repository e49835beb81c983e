"""What doctor says of cards that are not here, and that it says what the code then does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import doctor
from benchmarks.doctor import Card, Machine, findings, has_kernels
from llama import device as devices
from llama import model as network
from llama.kernels import gpu

PYPI = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CARDS = {  # compute capability, GB
    "Tesla P100-PCIE-16GB": ((6, 0), 16),
    "Tesla T4": ((7, 5), 15),
    "Tesla V100-SXM2-16GB": ((7, 0), 16),
    "NVIDIA GeForce RTX 2080 Ti": ((7, 5), 11),
    "NVIDIA GeForce RTX 3090": ((8, 6), 24),
    "NVIDIA GeForce RTX 4090": ((8, 9), 24),
    "NVIDIA A100-SXM4-80GB": ((8, 0), 80),
    "NVIDIA H100 80GB HBM3": ((9, 0), 80),
}
HERE = Machine("2.13.0+cu126", "12.6", CU126, None, False, "3.7.1", "/usr/bin/cc", "", 4, 64 << 30, 99 << 30, ())


def machine(name: str, **changes) -> Machine:
    capability, gigabytes = CARDS[name]
    card = Card(name, capability, gigabytes << 30, (gigabytes - 1) << 30, "580.1")
    return dataclasses.replace(HERE, card=card, sees_card=True, **changes)


def said(of: Machine) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in findings(of)}


@pytest.mark.parametrize("name", CARDS)
def test_every_card_runs_on_the_wheels_of_cu126_and_old_ones_not_on_pypis(name):
    capability = CARDS[name][0]
    assert not said(machine(name))["torch"].remedy
    pypi = said(machine(name, torch="2.13.0+cu130", cuda="13.0", archs=PYPI))["torch"]
    is_old = capability < (7, 5)
    assert bool(pypi.remedy) == is_old and ("cu126" in pypi.remedy) == is_old
    alone = said(dataclasses.replace(machine(name), torch="2.13.0+cpu", cuda=None, archs=(), sees_card=False))
    assert "CPUs alone" in alone["torch"].found and ("cu126" in alone["torch"].remedy) == is_old
    assert "dtype" not in alone and "C kernels" in alone["CPU"].found  # what runs then


def no_module(name: str) -> None:
    raise ImportError(name)


@pytest.mark.parametrize("name", CARDS)
def test_what_is_said_is_what_the_code_does(name, monkeypatch):
    """The same card, faked under torch: dtype, Triton, and whether K and V are repeated."""
    capability = CARDS[name][0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    found, cuda = said(machine(name)), torch.device("cuda")
    half = devices.dtype_name(devices.half_dtype(cuda))
    assert found["dtype"].found.startswith(half)
    gpu._load.cache_clear()
    monkeypatch.setattr(gpu.importlib, "import_module", no_module)  # only a real card gets so far
    assert ("Triton" in found["decode step"].found) == ("compute capability" not in gpu.why_not(cuda))
    gpu._load.cache_clear()

    class OnCuda:  # what the choice looks at
        device, dtype = cuda, getattr(torch, half)

    assert ("as they are" in found["attention"].found) == network._kernel_groups_heads(OnCuda, None)


def test_what_is_missing_comes_with_its_remedy():
    t4 = said(machine("Tesla T4", triton=None, weights=(Path("Llama-3.2-1B"),)))
    assert "no Triton" in t4["decode step"].found and t4["decode step"].remedy == "pip install triton"
    assert "Llama-3.2-1B" in t4["weights"].found and not t4["weights"].remedy
    bare = said(dataclasses.replace(HERE, no_kernels="no C compiler is installed", compiler=None, ram=1 << 30, disk=0))
    assert bare["GPU"].found == "none" and bare["CPU"].remedy == "apt-get install gcc"
    assert bare["memory"].remedy and bare["disk"].remedy and bare["weights"].remedy == "make model"
    assert "-> make model" in str(bare["weights"])


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((6, 1), ("sm_60",), True),  # a later card of the same generation
        ((6, 0), ("sm_61",), False),
        ((8, 9), ("sm_80",), True),
        ((7, 0), ("sm_60", "sm_75"), False),
        ((9, 0), ("sm_90a",), True),
        ((12, 0), ("sm_90", "compute_90"), True),  # PTX of an older one is compiled when it is loaded
        ((10, 3), ("sm_90a", "sm_120"), False),
        ((8, 0), (), False),
    ],
)
def test_which_builds_have_kernels(capability, archs, runs):
    assert has_kernels(capability, archs) == runs


def test_this_machine_is_described():
    found = said(doctor.look([Path("data/tiny"), Path("docs")]))
    assert "data/tiny" in found["weights"].found and "docs" not in found["weights"].found
    assert torch.__version__ in found["torch"].found


def test_the_driver_answers_where_torch_does_not(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\necho "Tesla P100-PCIE-16GB, 6.0, 16384, 16276, 580.82"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._card() == Card("Tesla P100-PCIE-16GB", (6, 0), 16384 << 20, 16276 << 20, "580.82")
    for answer in ('echo "No devices were found"', "exit 9", "echo"):
        fake.write_text(f"#!/bin/sh\n{answer}\n")
        assert doctor._card() is None
    fake.unlink()
    assert doctor._card() is None
