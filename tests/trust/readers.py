"""Every reader of the project, with a small valid folder of each kind that it reads, and how a script reads it.

folders(Path("valid"))                # writes valid/READER/KIND/...
READERS["adapter"].read(folder)       # raises what a script would end with
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import sentencepiece
import torch

import finetuning
from benchmarks import rows
from data import dataset, pairs, prompts, text
from data import records as records_file
from data.tiny import EMBEDDED
from llama import Llama, ModelArgs, Tokenizer, Transformer, adapters, checkpoint, lora, prompt_file, quantization
from llama.chat import ChatFormat
from llama.lora import LoRAConfig
from llama.quantization import Quantization
from llama.training import run, snapshot
from llama.training.options import TrainingOptions

N_RANKS = 320  # of the embedded vocabulary: its bytes, and its first merges
ARGS = ModelArgs(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=N_RANKS + 256, multiple_of=32, rope_theta=5e5,
                 use_scaled_rope=True, rope_scale_factor=32.0, tie_word_embeddings=True)  # fmt: skip
SMALL = dataclasses.replace(ARGS, vocab_size=24)  # where no tokenizer is read
UNTIED = dataclasses.replace(SMALL, tie_word_embeddings=False, use_scaled_rope=False, rope_scale_factor=None)
SAID = "Hello wörld  12\n don't <|eot_id|> <s>\t🦊"
RECORDS = [
    {"instruction": "Say fox.", "input": "", "output": "fox"}, {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Say ox.", "output": "ox", "extra": [1]},
]  # fmt: skip


class Reader(NamedTuple):
    """make: writes its folders into a directory. read: as a script does. share: of the forms. targets: what is
    changed mostly, ends of names. sealed: puts right the hashes of a changed folder. writes: it may write there."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    share: int
    targets: tuple[str, ...] = ("",)
    sealed: Callable[[dict[str, bytes]], dict[str, bytes]] | None = None
    writes: bool = False


@functools.cache
def scratch() -> Path:
    """A directory of this process, in memory where there is such a file system; it goes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="llama-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def valid(name: str) -> dict[str, dict[str, bytes]]:
    """The valid folders of a reader, by kind: what their files hold."""
    made = scratch() / "valid" / str(list(READERS).index(name))
    READERS[name].make(made)
    return {
        kind.name: {
            str(path.relative_to(kind)): path.read_bytes() for path in sorted(kind.rglob("*")) if path.is_file()
        }
        for kind in sorted(made.iterdir())
    }


@functools.cache
def model(args: ModelArgs = ARGS) -> Transformer:
    made = Transformer(args)
    made.init_weights(torch.Generator().manual_seed(0), 0.1)
    return made.eval()


def ranks_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(b"".join((EMBEDDED / "tokenizer.model").read_bytes().splitlines(keepends=True)[:N_RANKS]))
    return path


def pieces_file(folder: Path) -> Path:
    """A sentencepiece model of byte pairs as Llama 2's is, of three hundred pieces."""
    folder.mkdir(parents=True)
    path = folder / "tokenizer.model"
    learned = (record["instruction"] + " fox and other words 12" for record in RECORDS)
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=learned, model_writer=file, vocab_size=300, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        )  # fmt: skip
    return path


# Checkpoints


def read_checkpoint(folder: Path) -> None:
    """Load the weights and compute with them."""
    files = list(folder.glob("*.gguf"))
    loaded = checkpoint.load(files[0] if files else folder, torch.float32)
    with torch.no_grad():
        loaded(torch.zeros(1, 3, dtype=torch.int64))


def make_params(folder: Path) -> None:
    checkpoint.save(model(SMALL), folder / "tied", "meta")
    checkpoint.save(model(UNTIED), folder / "untied", "meta")


def make_pth(folder: Path) -> None:
    checkpoint.save(model(UNTIED), folder / "whole", "meta")
    checkpoint.save(model(dataclasses.replace(UNTIED, n_kv_heads=2)), folder / "shards", "meta", shards=2)
    checkpoint.save(model(SMALL), folder / "hf", "hf")
    state = safetensors.torch.load_file(folder / "hf/model.safetensors")
    (folder / "hf/model.safetensors").unlink()
    torch.save(state, folder / "hf/pytorch_model.bin")


def make_hf(folder: Path) -> None:
    checkpoint.save(model(), folder / "scaled", "hf", ranks_file(scratch() / "scaled"))
    checkpoint.save(model(UNTIED), folder / "plain", "hf")


def make_safetensors(folder: Path) -> None:
    """One file, and two with an index."""
    checkpoint.save(model(SMALL), folder / "one", "hf")
    checkpoint.save(model(UNTIED), folder / "two", "hf")
    state = safetensors.torch.load_file(folder / "two/model.safetensors")
    (folder / "two/model.safetensors").unlink()
    names, listed = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        path = folder / f"two/model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: state[name] for name in part}, path, {"format": "pt"})
        listed |= dict.fromkeys(part, path.name)
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / "two/model.safetensors.index.json").write_text(json.dumps(index))


def make_quantized(folder: Path) -> None:
    forms = {
        "int8": Quantization(bits=8),
        "int4": Quantization(bits=4),
        "points": Quantization(bits=4, zero_points=True),
    }
    for name, form in forms.items():
        checkpoint.save(quantization.quantized_copy(model(UNTIED), form), folder / name)


def make_gguf(folder: Path) -> None:
    for name, args, tokenizer in (("bytes", ARGS, ranks_file), ("pieces", UNTIED, pieces_file)):
        path = tokenizer(scratch() / "gguf" / name)
        fitting = dataclasses.replace(args, vocab_size=Tokenizer(path).n_words)
        (folder / name).mkdir(parents=True)
        checkpoint.save(model(fitting), folder / name / "model.gguf", "gguf", path)


def read_gguf(folder: Path) -> None:
    read_tokenizer(folder)
    read_checkpoint(folder)


# Tokenizers


def read_tokenizer(folder: Path) -> None:
    """Encode and decode with it: every id within the vocabulary, every id with bytes."""
    path = next((path for path in sorted(folder.glob("*.gguf"))), None) or finetuning.find_tokenizer(folder)
    tokenizer = Tokenizer(path)
    ids = [*tokenizer.encode(SAID, bos=True, eos=True), *tokenizer.encode(SAID, bos=False, eos=False, continues=True)]
    ids += ChatFormat(tokenizer).encode_dialog_prompt([{"role": "user", "content": "Hi"}])
    edges = [0, 1, tokenizer.n_words // 2, tokenizer.n_words - 1]
    tokenizer.decode([*ids, *edges, *tokenizer.stop_tokens, tokenizer.pad_id])


def make_tokenizer_json(folder: Path) -> None:
    """Made from either kind of tokenizer.model, and one with the parts that Llama 3's has."""
    for name, write in (("bytes", ranks_file), ("pieces", pieces_file)):
        path = write(scratch() / "from" / name)
        args = dataclasses.replace(ARGS, vocab_size=Tokenizer(path).n_words)
        checkpoint.save(model(args), folder / name, "hf", path)
        for other in ("config.json", "model.safetensors", "tokenizer.model"):  # no part of this reader
            (folder / name / other).unlink(missing_ok=True)
        shutil.rmtree(folder / name / "original", ignore_errors=True)
    token_map = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>", "lstrip": False}}
    (folder / "bytes/special_tokens_map.json").write_text(json.dumps(token_map))


# Adapters, saved prompts, runs


def make_adapter(folder: Path) -> None:
    adapted = copy.deepcopy(model())
    config = LoRAConfig(4, 8.0, 0.0, ("wq", "wv", "w2"))
    lora.apply(adapted, config, 0)
    adapters.save(adapted, config, folder / "peft", "0" * 64, "base")
    adapters.save(adapted, config, folder / "bin", "0" * 64)
    tensors = safetensors.torch.load_file(folder / "bin" / adapters.WEIGHTS)
    (folder / "bin" / adapters.WEIGHTS).unlink()
    torch.save(tensors, folder / "bin" / adapters.PICKLED)
    patterns = json.loads((folder / "bin" / adapters.CONFIG).read_text())
    patterns |= {"target_modules": r".*\.(q_proj|v_proj|down_proj)", "rank_pattern": {"q_proj": 4}, "use_rslora": True}
    (folder / "bin" / adapters.CONFIG).write_text(json.dumps(patterns))


def read_adapter(folder: Path) -> None:
    adapted = copy.deepcopy(model())
    adapters.load(adapted, folder, lambda: "0" * 64)
    with torch.no_grad():
        adapted(torch.zeros(1, 3, dtype=torch.int64))


@functools.cache
def llama(cache_dtype: str = "auto") -> Llama:
    tokenizer = Tokenizer(ranks_file(scratch() / "llama"))
    return Llama(model(), tokenizer, max_seq_len=64, max_batch_size=1, decoding="eager", cache_dtype=cache_dtype)


def make_prompt(folder: Path) -> None:
    for kind in ("auto", "int8"):
        (folder / kind).mkdir(parents=True)
        with llama(kind).start_session() as session:
            session.read(llama().encode_prompt("The fox says"))
            prompt_file.save(folder / kind / f"{kind}.safetensors", session, "The fox says")


def read_prompt(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"), folder / "none")
    ours = llama("int8" if path.name.startswith("int8") else "auto")
    saved = prompt_file.read(path, ours.encode_prompt)
    with ours.start_session() as session:
        saved.restore(session)
        session.read(ours.encode_prompt(saved.text + " hi"))


def sealed_prompt(files: dict[str, bytes]) -> dict[str, bytes]:
    """With the hash of what the tensors are now."""
    found = {}
    for name, data in files.items():
        try:
            tensors = safetensors.torch.load(data)
            end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:end])
            about = header["__metadata__"]
            about["sha256"] = prompt_file._digest(tensors, about["model_sha256"])
        except Exception:  # no file that could have one
            found[name] = data
            continue
        head = json.dumps(header).encode()
        found[name] = len(head).to_bytes(8, "little") + head + data[end:]
    return found


@functools.cache
def training() -> run.Run:
    """A run with everything that a snapshot is compared with; where its directory lies is said at each reading."""
    base, data = scratch() / "base", scratch() / "records.json"
    checkpoint.save(model(), base, "meta", ranks_file(scratch() / "tokenizer"))
    data.write_text(json.dumps(RECORDS * 2))
    flags = {
        "ckpt_dir": str(base),
        "data": str(data),
        "out_dir": str(scratch() / "run"),
        "held_out": 1,
        "epochs": 1,
        "max_seq_len": 320,
        "r": 2,
        "amp": "fp16",
        "optimizer": "adamw",
        "export": "none",
        "device": "cpu",
    }
    options = TrainingOptions.resolve(flags)
    made = run.Run(options, base, finetuning.tokenizer_file(options), *finetuning.read_data(options))
    identity = made._identity()
    made._identity = lambda: identity  # of files that are no part of the run's directory
    return made


def make_run(folder: Path) -> None:
    """A run that has been begun; without its own paths, which are those of this machine."""
    (scratch() / "run").mkdir()
    training().begin()
    folder.mkdir(parents=True)
    (scratch() / "run").rename(folder / "run")
    (folder / "run/loss.jsonl").touch()


def read_run(folder: Path) -> None:
    TrainingOptions.resolve({"resume": True, "out_dir": str(folder)})
    resumed = training()
    resumed.root, resumed.log = folder, run.Log(folder / "loss.jsonl", True)
    resumed.restore()
    resumed.log.lines()


def sealed_run(files: dict[str, bytes]) -> dict[str, bytes]:
    """With a manifest of what the files are now."""
    found = dict(files)
    for name, data in files.items():
        if not name.endswith(snapshot.MANIFEST):
            continue
        try:
            manifest = json.loads(data)
            for stem, entry in manifest["files"].items():
                content = files[name.replace(snapshot.MANIFEST, stem)]
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            found[name] = json.dumps(manifest).encode()
        except Exception:  # no manifest any more
            continue
    return found


# Data and results


def make_data(folder: Path) -> None:
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    gpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    answers = {"chosen": "fox", "rejected": "ox"}
    written = {
        "alpaca.json": json.dumps(RECORDS, indent=1),
        "alpaca.jsonl": "\n".join(map(json.dumps, RECORDS)),
        "chat.jsonl": "\n".join(json.dumps({"messages": chat}) for _ in range(3)),
        "gpt.json": json.dumps([{"conversations": gpt}] * 3),
        "completions.jsonl": '{"prompt": "2 + 2 =", "completion": " 4"}\n' * 3,
        "texts.json": json.dumps([{"text": "A fox and an ox. " * 9}] * 3),
        "alpaca.csv": 'instruction,input,output\nSay fox.,,fox\n"Say, ""ox"".",1 2,ox\nSay\n,,fox\n'.replace(
            "Say\n", '"Say\n"'
        ),
        "completions.tsv": "prompt\tresponse\n1\t2\n3\t4\n5\t6\n",
        "text.txt": "A fox and an ox.\n\n  They met in a wood.\n" * 20,
        "pairs.json": json.dumps(
            [{"instruction": "Say fox.", **answers}, {"instruction": "Say", "input": "x", **answers}] * 2
        ),
        "pairs.jsonl": "\n".join([json.dumps({"messages": chat[1:2], **answers})] * 3),
        "pairs_chats.json": json.dumps(
            [{"chosen": chat, "rejected": [*chat[:2], {"role": "assistant", "content": "No"}]}] * 3
        ),
        "prompts.txt": "Say fox.\nSay ox.\n",
        "prompts.json": json.dumps(["Say fox.", {"prompt": "Say ox."}]),
    }
    for name, content in written.items():
        (folder / name.replace(".", "_")).mkdir(parents=True)
        (folder / name.replace(".", "_") / name).write_text(content)


def read_data(folder: Path) -> None:
    path = min(folder.iterdir(), default=folder / "none")
    if path.name.startswith("prompts"):
        prompts.read(path)
        return
    of_pairs = path.name.startswith("pairs")
    (pairs if of_pairs else records_file).read(path)
    tokenizer = llama().tokenizer
    dataset.load(path, tokenizer, 320, 1, 0, ("Say fox.",), of_pairs=of_pairs)
    list(dataset.show(path, tokenizer, 320, 2, of_pairs))
    if path.suffix == ".txt":
        text.from_file(path, tokenizer, 16, 2, 0)


def make_rows(folder: Path) -> None:
    (folder / "results").mkdir(parents=True)
    path = folder / "results/speed.jsonl"
    for size in (1, 2, 3):
        cell = {"model": "tiny", "batch_size": size, "use_cache": True}
        series = {"loss_nats": [[1, 2.0], [2, 1.5]]}
        rows.record(path, "inference", cell, {"runtime_s": [1.0, 2.0]}, torch.device("cpu"), "float32", 0, series)


def read_rows(folder: Path) -> None:
    found = rows.read_folder(folder)
    for each in found.values():
        rows.group(each, "model")


READERS = {
    "params.json": Reader(make_params, read_checkpoint, 4, ("params.json",)),
    "config.json": Reader(make_hf, read_checkpoint, 7, ("/config.json", "config.json")),
    ".pth": Reader(make_pth, read_checkpoint, 3, (".pth", ".bin")),
    "safetensors": Reader(make_safetensors, read_checkpoint, 5, (".safetensors", "index.json")),
    "GGUF": Reader(make_gguf, read_gguf, 4),
    "tokenizer.model, tiktoken": Reader(lambda folder: ranks_file(folder / "ranks"), read_tokenizer, 5),
    "tokenizer.model, sentencepiece": Reader(lambda folder: pieces_file(folder / "pieces"), read_tokenizer, 14),
    "tokenizer.json": Reader(make_tokenizer_json, read_tokenizer, 6),
    "adapter": Reader(make_adapter, read_adapter, 4),
    "quantized": Reader(make_quantized, read_checkpoint, 3),
    "snapshot": Reader(make_run, read_run, 8, ("",), sealed_run, writes=True),
    "data": Reader(make_data, read_data, 18),
    "saved prompt": Reader(make_prompt, read_prompt, 6, ("",), sealed_prompt),
    "results": Reader(make_rows, read_rows, 24),
}
