"""Paths as people give them, and refusals that look at what lies there before they advise."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from support import same_weights

from data.tiny import directory_of
from llama import checkpoint
from llama.checkpoint.locate import locate
from llama.errors import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2471645608\n"
CONFIG = (
    '{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8, '
    '"intermediate_size": 8}'
)


@pytest.fixture
def saved(tmp_path, model):
    checkpoint.save(model, tmp_path / "m")
    return tmp_path / "m"


def test_a_file_stands_for_its_directory(saved, model, monkeypatch):
    for name in ("params.json", "consolidated.00.pth"):
        assert same_weights(model, checkpoint.load(saved / name))
        assert directory_of(str(saved / name)) == saved
    monkeypatch.setenv("HOME", str(saved.parent))
    assert locate("~/m/params.json") == saved
    assert same_weights(model, checkpoint.load("~/m"))


def test_a_gguf_file_is_a_checkpoint_by_itself(tmp_path, saved):
    """Also by the directory that holds it and no other; beside a checkpoint it is a copy."""
    (tmp_path / "d").mkdir()
    first, second = tmp_path / "d" / "renamed.bin", tmp_path / "d" / "q8.gguf"
    first.write_bytes(b"GGUF\3\0\0\0")
    assert locate(first) == locate(tmp_path / "d") == first
    shutil.copy(first, second)
    with pytest.raises(InputError, match=r"pass one of its GGUF files, ckpt_dir=\S+q8\.gguf or \S+renamed\.bin$"):
        checkpoint.load(tmp_path / "d")
    shutil.copy(first, saved)
    assert locate(saved) == saved


@pytest.mark.parametrize("has_config", [False, True])
def test_original_one_level_down(tmp_path, saved, model, has_config):
    """What Meta's download command makes, and a repository of which only original/ was downloaded."""
    saved.rename(tmp_path / "original")
    if has_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert same_weights(model, checkpoint.load(tmp_path))


def test_of_two_layouts_the_one_with_weights_counts(tmp_path, saved, model):
    checkpoint.save(model, tmp_path / "hf", "hf")
    shutil.copy(tmp_path / "hf" / "config.json", saved)
    assert type(checkpoint.open_source(saved)).__name__ == "MetaSource"
    shutil.copy(tmp_path / "hf" / "model.safetensors", saved)
    assert type(checkpoint.open_source(saved)).__name__ == "HfSource"
    assert same_weights(model, checkpoint.load(saved))


def test_the_cache_of_hugging_face(tmp_path, model):
    """Snapshots of links into blobs/: as a repository, a snapshot, or a file of one."""
    repository = tmp_path / "models--org--name"
    checkpoint.save(model, tmp_path / "hf", "hf")
    for path in ("blobs", "refs", "snapshots/abc", "snapshots/def"):
        (repository / path).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.move(tmp_path / "hf" / name, repository / "blobs" / name[::-1])
        (repository / "snapshots/abc" / name).symlink_to(f"../../blobs/{name[::-1]}")
    with pytest.raises(InputError, match=r"pass one of its snapshots/ \(abc, def\)"):
        checkpoint.load(repository)
    (repository / "refs/main").write_text("abc")
    for path in (repository, repository / "snapshots/abc", repository / "snapshots/abc/model.safetensors"):
        assert same_weights(model, checkpoint.load(path))
    (repository / "snapshots/abc/model.safetensors").unlink()
    (repository / "blobs/0123.incomplete").touch()
    with pytest.raises(InputError, match="a download of it was not finished"):
        checkpoint.load(repository)
    (repository / "refs/main").write_text("../../hf")
    with pytest.raises(InputError, match="pass one of its snapshots"):
        checkpoint.load(repository)


LYING_AROUND = {
    "nothing": ({}, "it is empty"),
    "an adapter": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "an adapter: pass it as adapter="),
    "a download": ({"config.json": "{}", "model.safetensors.incomplete": ""}, "download of it was not finished"),
    "its cache": ({"config.json": "{}", ".cache/huggingface/download/x.incomplete": ""}, "was not finished"),
    "a folder down": ({"files/config.json": "{}"}, r"folder below, pass ckpt_dir=\S+/files"),
    "a run": ({"snapshots/step-1/state.json": "{}", "merged/params.json": "{}"}, r"pass ckpt_dir=\S+/merged"),
    "a run of adapters": ({"snapshots/s/x": "", "adapter/adapter_config.json": "{}"}, r"pass adapter=\S+/adapter, and"),
    "an archive": ({"model.zip": "PK"}, "unpack model.zip first"),
    "no weights": ({"config.json": "{}", "tokenizer.json": "{}"}, "but no .*; download the weights"),
    "weights alone": ({"consolidated.00.pth": ""}, "configuration that belongs to consolidated.00.pth"),
    "other files": ({"README.md": ""}, "neither params.json .* check its name"),
    "a pointer": ({"config.json": CONFIG, "model.safetensors": POINTER}, "safetensors is a git-LFS pointer.*git lfs"),
    "Meta's pointer": ({"params.json": "{}", "consolidated.00.pth": POINTER}, "pth is a git-LFS pointer.*git lfs"),
    "pointers alone": ({"config.json": POINTER, "model.safetensors": POINTER}, "config.json is a git-LFS pointer"),
    "a web page": ({"config.json": "<!DOCTYPE html><html>", "model.safetensors": ""}, "config.json is a web page"),
}  # fmt: skip


@pytest.mark.parametrize("name", LYING_AROUND)
def test_the_remedy_looks_at_what_lies_there(tmp_path, name):
    content, message = LYING_AROUND[name]
    for file, text in content.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_path_that_leads_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not exist; check its name, or download it first"):
        checkpoint.load("meta-llama/Llama-3.2-1B")
    with pytest.raises(InputError, match=r"does not exist; check its name$"):
        checkpoint.load("~nobody-of-that-name")


def test_a_script_takes_a_file_of_a_checkpoint():
    command = [sys.executable, "inference.py", f"--ckpt_dir={TINY / 'params.json'}", "--prompt=The", "--max_gen_len=2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "[2 tokens in" in run.stdout
