"""finetuning.py as a user runs it: what it leaves behind, what inference.py makes of it, and every way to stop it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash
import peft
import pytest
import torch
from conftest import ROOT, TINY, random_model
from transformers import LlamaForCausalLM, pipeline

import finetuning
import inference
from data import alpaca, records
from data.samples import encode
from llama import Llama, adapters, checkpoint, cli, files, lora, quantization
from llama import device as devices
from llama.config import PRESETS
from llama.errors import EnvironmentFailure, InputError, Stopped
from llama.evaluation import perplexity
from llama.tokenizer import ChatFormat, Tokenizer
from llama.training import batch as batches
from llama.training import qat, snapshot
from llama.training import run as running
from llama.training import verdict as verdicts
from llama.training.options import Settings, TrainingOptions
from llama.training.step import Evaluation, Trainer


@contextlib.contextmanager
def short_answers():
    """What is tested is the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "ANSWER_LEN", 3)
        patch.setattr(finetuning, "INSTRUCTIONS", ("Say fox.",))
        yield


@pytest.fixture(autouse=True)
def quick():
    with short_answers():
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A random model with the embedded tokenizer, and a few records."""
    work = tmp_path_factory.mktemp("base")
    crash.options_in(work)
    return work


def flags(base: Path, root: Path, **changes) -> list[str]:
    given = {**crash.FLAGS, "ckpt_dir": base / "base", "data": base / "data.json", "out_dir": root, **changes}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["finetuning.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.run(finetuning.main)
    return exit_.value.code, *capsys.readouterr()


class StopAfter(running.StopSignal):
    """As if a signal came after `step` steps; None: never."""

    def __init__(self, run: running.Run, step: int | None) -> None:
        super().__init__()
        self.run, self.step, self.received = run, step, signal.SIGTERM

    def __call__(self) -> bool:
        return self.step is not None and self.run.trainer.progress.windows >= self.step


def options_of(base: Path, root: Path, **changes) -> TrainingOptions:
    places = {"ckpt_dir": str(base / "base"), "data": str(base / "data.json"), "out_dir": str(root)}
    return TrainingOptions.resolve({**crash.FLAGS, **places, **changes})


def prepared(options: TrainingOptions) -> running.Run:
    files = finetuning.directory_of(options.ckpt_dir), finetuning.tokenizer_file(options)
    return running.Run(options, *files, *finetuning.read_data(options))


def run_to(base: Path, root: Path, step: int | None = None, resume: bool = False, **changes) -> running.Run:
    """A run in this process, stopped after `step` steps as by a signal; None: to its end."""
    run = prepared(options_of(base, root, **changes))
    with snapshot.lock(root):
        run.restore() if resume else run.begin()
        stop = StopAfter(run, step)
        with contextlib.suppress(Stopped):
            finetuning.train(run, stop)
            if run.trainer.progress.windows < run.total:
                run.save_and_stop(stop)
            finetuning.keep_figures(run, run.finish())
    return run


# What a run leaves


def test_what_changes_the_figures_of_a_run_is_part_of_its_cell(base, tmp_path):
    """No run hides the figures of another: settings, data and the format of a quantized base tell them apart."""
    model = checkpoint.load(TINY)
    quantization.quantize(model, quantization.Quantization(8))
    checkpoint.save(model, tmp_path / "int8", tokenizer_path=TINY / "tokenizer.model")
    records = json.loads((base / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(records[:-1]))
    changes = [{"lr": 0.5}, {"momentum": 0.5}, {"clip_norm": 1.0}, {"schedule": "cosine"}, {"warmup_steps": 3}]
    changes += [{"r": 2}, {"alpha": 3.0}, {"dropout": 0.5}, {"targets": "wq"}, {"epochs": 4}, {"max_steps": 2}]
    changes += [{"held_out": 2}, {"packing": True}, {"checkpoint_budget_gb": 5.0}, {"weight_decay": 0.1}]
    changes += [{"loss_normalization": "microbatch"}, {"data": str(tmp_path / "data.json")}]
    changes += [{"data": str(base / "data.json")}, {"ckpt_dir": str(tmp_path / "int8")}]
    changes += [{"eval_data": str(base / "data.json")}, {"eval_data": str(tmp_path / "data.json")}]
    cells = [finetuning.cell_of(TrainingOptions.resolve(change), torch.device("cpu")) for change in ({}, *changes)]
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
    assert cells[0].keys() == {"model", "kernels", *finetuning.CELL}  # as in rows from before
    same = [TrainingOptions.resolve(change) for change in ({"save_every": 3}, {"out_dir": "a"}, {"keep": 1})]
    assert all(finetuning.cell_of(options, torch.device("cpu")) == cells[0] for options in same)


def test_a_run_leaves_what_it_promises(base, tmp_path, monkeypatch, capsys):
    root, results = tmp_path / "run", tmp_path / "rows.jsonl"
    code, out, err = call(monkeypatch, capsys, *flags(base, root, export="both", epochs=3, amp="none", results=results))
    assert code == 0, err
    expected = ".lock settings.json loss.jsonl loss.png snapshots adapter merged merged-hf summary.json"
    assert {p.name for p in root.iterdir()} == set(expected.split())
    rows = [json.loads(line) for line in (root / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 7))
    assert [row["step"] for row in rows if "held_out_loss" in row] == [3]
    measured = json.loads(results.read_text())
    assert measured["cell"]["kernels"] == "none" and measured["cell"]["preset"] == "course"
    assert measured["cell"]["kernels"] == "none"  # plain training has none
    assert measured["series"]["loss_nats"] == [[row["step"], row["loss"]] for row in rows if "loss" in row]
    assert [step for step, _ in measured["series"]["held_out_loss_nats"]] == [0, 3, 6]
    assert measured["series"]["held_out_loss_nats"][-1][1] == measured["metrics"]["held_out_loss_nats"]["median"]
    assert (root / "loss.png").read_bytes().startswith(b"\x89PNG")
    trained = 4 * 16 * ((32 + 32) + (32 + 16))  # layers x rank x (in + out) of wq and wv
    assert re.search(rf"trainable  {trained:,} of [\d,]+ parameters \([\d.]+%\)", out)
    for text in ("before", "after", "Held-out loss", "% of the trained values", ") ended by themselves"):
        assert text in out
    assert [p.name for p in snapshot.listed(root / "snapshots")] == ["step-00000005", "step-00000006"]
    summary = json.loads((root / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["skipped"] == 0 and summary["held_out_loss"] > 0
    assert len(summary["held_out_answers"]) == summary["held_out_asked"] > 0
    assert "held_out_answers" not in measured["series"]  # a user's records stay in the run's directory


def test_a_row_shows_answers_to_held_out_instructions_of_our_own_records(tmp_path, monkeypatch, capsys):
    root, results = tmp_path / "run", tmp_path / "rows.jsonl"
    arguments = ["--max_steps=1", "--held_out=12", "--export=none", f"--out_dir={root}", f"--results={results}"]
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    row, summary = json.loads(results.read_text()), json.loads((root / "summary.json").read_text())
    low, high = summary["held_out_fall_95"]
    assert row["metrics"]["held_out_fall_low_nats"]["median"] == low
    assert row["metrics"]["held_out_fall_high_nats"]["median"] == high
    shown = row["series"]["held_out_answers"]
    assert len(shown) == finetuning.N_SHOWN < len(summary["held_out_answers"])
    records = {record["instruction"]: record["output"] for record in json.loads((TINY / "alpaca_200.json").read_text())}
    for (asked, reference, _, _), full in zip(shown, summary["held_out_answers"], strict=False):
        assert reference == records[asked.partition("\n\n### Input:")[0]] == full["reference"]
        assert full["prompt"].endswith(f"### Instruction:\n{asked}\n\n### Response:")


def test_adapter_and_merged_models_are_the_trained_model(base, tmp_path):
    """Adapter, merged checkpoint in both layouts, transformers on the one, peft on the other: one set of logits."""
    root = tmp_path / "run"
    run = run_to(base, root, export="both", amp="none", lr=0.05)
    tokens = torch.randint(0, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = run.model.eval()(tokens).detach()
    plain = checkpoint.load(base / "base")
    assert (plain(tokens) - wanted).abs().max() > 0.1
    adapters.load(plain, root / "adapter", lambda: checkpoint.fingerprint(base / "base"))
    hf = LlamaForCausalLM.from_pretrained(root / "merged-hf", dtype=torch.float32)
    checkpoint.save(checkpoint.load(base / "base"), tmp_path / "hf", "hf")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, root / "adapter").eval()
    for logits in (
        plain.eval()(tokens),
        checkpoint.load(root / "merged")(tokens),
        checkpoint.load(root / "merged-hf")(tokens),
        hf(tokens).logits,
        theirs(tokens).logits,
    ):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)
    for name, place in (("merged", "tokenizer.model"), ("merged-hf", "original/tokenizer.model")):
        assert (root / name / place).read_bytes() == (TINY / "tokenizer.model").read_bytes()


def test_a_merged_gguf_file_is_the_trained_model(base, tmp_path):
    root = tmp_path / "run"
    run = run_to(base, root, export="gguf", amp="none", lr=0.05, max_steps=1)
    tokens = torch.randint(0, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(checkpoint.load(root / "merged.gguf")(tokens), run.model.eval()(tokens))
    assert Tokenizer(root / "merged.gguf").is_same(Tokenizer(TINY / "tokenizer.model"))


ANSWERS = {"Name a colour.": "Blue.", "Count.": "One, two, three.", "Who are you?": "A fox."}


@pytest.mark.parametrize("kind", ["alpaca", "chats"])
def test_what_was_learnt_ends_in_transformers_as_well(base, tmp_path, kind):
    """Answers learnt by heart, through the folder for Hugging Face: the pipeline says them, and stops behind them."""
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ANSWERS.items()]
    data = [{"instruction": q, "input": "", "output": a} for q, a in ANSWERS.items()]
    data = [{"messages": turn} for turn in turns] if kind == "chats" else data
    (tmp_path / "data.json").write_text(json.dumps(data))
    changes = {"data": str(tmp_path / "data.json"), "export": "hf", "held_out": 0, "accumulation": 1, "batch_size": 3}
    changes |= {
        "lora": False,
        "epochs": 40,
        "save_every": 100,
        "eval_every": 100,
        "amp": "none",
        "checkpointing": "none",
    }
    run_to(base, tmp_path / "run", **changes)
    folder = tmp_path / "run" / "merged-hf"
    llama = Llama.build(folder, folder / "tokenizer.json", 128, 3, device="cpu", dtype="float32")
    generate = pipeline("text-generation", model=str(folder), dtype=torch.float32)
    for turn, (question, answer) in zip(turns, ANSWERS.items(), strict=True):
        asked = turn[:1] if kind == "chats" else alpaca.prompt(question)
        said = generate(asked, do_sample=False, max_new_tokens=30, return_full_text=False)[0]["generated_text"]
        prompt = ChatFormat(llama.tokenizer).encode_dialog_prompt(turn[:1]) if kind == "chats" else None
        prompt = prompt or alpaca.encode_prompt(llama.tokenizer, question)
        (ours,), _ = llama.generate([prompt], max_gen_len=30, temperature=0.0)
        assert said == llama.tokenizer.decode(ours) == answer


PAIRS = [(record["instruction"], record["output"]) for record in crash.RECORDS]
DIALOGS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in PAIRS
]
FILES = {  # of each kind: what it is called, what it holds, what the run says of it, and the flag of inference.py
    "Alpaca": ("a.json", json.dumps(crash.RECORDS), "5 Alpaca records (JSON): 4 samples, 1 held out", "--alpaca"),
    "chats": ("a", "\n".join(map(json.dumps, DIALOGS)), "5 chats (JSON lines): 4 samples, 1 held out", "--chat"),
}


@pytest.mark.parametrize("name", FILES)
def test_inference_takes_the_result_and_the_same_prompts(base, tmp_path, monkeypatch, capsys, name):
    """Whatever it was trained on: the answer after training is what inference.py gives for the question."""
    file, content, summary, flag = FILES[name]
    root = tmp_path / "run"
    (tmp_path / file).write_text(content)
    code, out, err = call(
        monkeypatch, capsys, *flags(base, root, export="meta", data=tmp_path / file, amp="none", lr=0.1)
    )
    assert code == 0 and f"data       {summary}\n" in out, err
    answers = json.loads((root / "summary.json").read_text())["answers"]
    assert answers[0]["instruction"] == "Say fox." and answers[0]["after"] != answers[0]["before"]
    for source in ([f"--ckpt_dir={root / 'merged'}"], [f"--ckpt_dir={base / 'base'}", f"--adapter={root / 'adapter'}"]):
        more = [flag, "--prompt=Say fox.", "--max_gen_len=3", "--temperature=0", "--device=cpu"]
        monkeypatch.setattr(sys, "argv", ["inference.py", *source, *more])
        with pytest.raises(SystemExit) as exit_:
            cli.run(inference.main)
        out, err = capsys.readouterr()
        assert exit_.value.code == 0, err
        shown = out.split("> Say fox.\n")[1].split("\n\n[")[0]
        assert shown.strip() == answers[0]["after"]


def test_training_goes_on_with_plain_text(base, tmp_path, monkeypatch, capsys):
    """Every token a label; the end of the file is held out; the model continues it before and after."""
    (tmp_path / "corpus.txt").write_text("".join(f"The fox saw {n} bears.\n" for n in range(30)))
    changes = {"data": tmp_path / "corpus.txt", "max_seq_len": 8, "held_out": 3, "amp": "none", "packing": True}
    changes |= {"epochs": 1, "accumulation": 12, "checkpointing": "none", "results": tmp_path / "pretraining.jsonl"}
    code, out, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run", **changes))
    assert code == 0, err
    assert re.search(r"data       plain text: \d+ samples in \d+ sequences, 3 held out\n", out)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "fox" in summary["answers"][0]["instruction"] and len(summary["answers"]) == 1
    row = json.loads((tmp_path / "pretraining.jsonl").read_text())
    assert row["experiment"] == "pretraining" and "The fox" not in json.dumps(row["series"])  # no text of the user's
    assert summary["held_out_loss"] < summary["held_out_loss_before"] and summary["held_out_asked"] == 0
    ids = Tokenizer(TINY / "tokenizer.model").encode((tmp_path / "corpus.txt").read_text(), bos=True, eos=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    trained = sum(line["label_tokens"] for line in lines if line.get("epoch") == 0)
    held_out = len(ids) - 1 - trained
    assert 2 * 7 < held_out <= 3 * 7  # but for the very first, each token is a label once, here or there


@pytest.fixture
def texts(tmp_path) -> dict[str, str]:
    """To train on one text and to measure on another, all weights, 40 blocks in each step."""
    (tmp_path / "train.txt").write_text("".join(f"The fox saw {n} bears.\n" for n in range(60)))
    (tmp_path / "test.txt").write_text("".join(f"The owl met {n} foxes.\n" for n in range(40)))
    sizes = {"max_seq_len": 8, "held_out": 12, "accumulation": 40, "epochs": 2, "lr": 1e-3}
    plain = {"lora": False, "amp": "none", "checkpointing": "none", "export": "meta"}
    return {"data": str(tmp_path / "train.txt"), "eval_data": str(tmp_path / "test.txt"), **sizes, **plain}


def test_a_text_is_trained_on_and_another_measured_on(no_estimate, base, tmp_path, texts):
    """All blocks of the one are trained; the loss is that of evaluate.py on the same blocks of the other."""
    run = run_to(base, tmp_path / "run", **texts)
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    ids = {name: tokenizer.encode(Path(texts[name]).read_text(), bos=True, eos=False) for name in ("data", "eval_data")}
    lines = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    n_blocks = len({name for line in trained for name in line["samples"]})
    assert [len(line["samples"]) for line in trained] == [40, n_blocks - 40] * 2
    assert sum(line["label_tokens"] for line in trained) == 2 * (len(ids["data"]) - 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    measured = ids["eval_data"][: 12 * 7 + 1]  # a block begins with the last token of the one before
    for name, directory in (("_before", base / "base"), ("", tmp_path / "run" / "merged")):
        loss = perplexity.evaluate(checkpoint.load(directory), measured, context=8, stride=7).loss
        assert summary[f"held_out_loss{name}"] == pytest.approx(loss, rel=1e-6)
    assert summary["held_out_loss"] < summary["held_out_loss_before"] - 0.2
    counts = f"{n_blocks} samples, 12 held out; held out: the first of {(len(ids['eval_data']) + 5) // 7} samples"
    assert run.data.summary == f"plain text: {counts} of {texts['eval_data']}, plain text"
    assert "owl" in summary["answers"][0]["instruction"]


@pytest.mark.parametrize("is_adapted", [False, True])
def test_a_run_through_the_rounding_resumes_to_the_same_bytes_and_writes_its_codes(
    no_estimate, base, tmp_path, texts, is_adapted
):
    """The exported checkpoint has the loss that the run has measured last; an adapter is in its codes, not beside."""
    changes = texts | {"qat": 4, "max_steps": 2}
    if is_adapted:
        changes |= {"lora": True, "dropout": 0.0, "targets": "wq,wk,wv,wo,w1,w2,w3", "max_steps": 4}
    run = run_to(base, tmp_path / "whole", **changes)
    method = "on wq,wk,wv,wo,w1,w2,w3" if is_adapted else "all weights"
    assert f"{method} through int4 with zero-points," in run.describe()
    run_to(base, tmp_path / "run", 1, **changes)
    run_to(base, tmp_path / "run", resume=True, **changes)
    results = []
    for root in (tmp_path / "whole", tmp_path / "run"):
        assert not (root / "adapter").exists()
        (last,) = list((root / "snapshots").glob(f"*{changes['max_steps']}"))
        written = [root / "loss.jsonl", root / "merged" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
        results.append([path.read_bytes() for path in written])
    assert results[0] == results[1]
    assert checkpoint.read_quantization(root / "merged") == dataclasses.replace(qat.FORMATS[4], method="qat")
    summary = json.loads((root / "summary.json").read_text())
    ids = Tokenizer(TINY / "tokenizer.model").encode(Path(texts["eval_data"]).read_text(), bos=True, eos=False)
    loss = perplexity.evaluate(checkpoint.load(root / "merged"), ids[: 12 * 7 + 1], context=8, stride=7).loss
    assert summary["held_out_loss"] == pytest.approx(loss, rel=1e-6)
    assert summary["held_out_loss"] < summary["held_out_loss_before"] - 0.1


ROUNDED = {
    "": "--dropout=0.05 with --qat=4: an update that is rounded with its weight has no input of its own; use",
    "--dropout=0 --adapter=runs/adapter": "--adapter=runs/adapter with --qat=4: merge it first",
    "--lora=False --lean --accumulation=1": "--qat=4 with --lean=True",
    "--lora=False --keep_zeros": "--keep_zeros=True with --qat=4",
    "--lora=False --export=gguf": "--export=gguf: has no place for codes of 4 bits; use meta or none",
}


@pytest.mark.parametrize("extra", ROUNDED)
def test_what_does_not_go_with_rounding_is_refused(base, tmp_path, monkeypatch, capsys, extra):
    given = [f"--ckpt_dir={base / 'base'}", f"--out_dir={tmp_path / 'run'}", "--qat=4", *extra.split()]
    code, _, err = call(monkeypatch, capsys, *given)
    assert code == 2 and ROUNDED[extra] in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_starts_from_the_codes_of_a_checkpoint_and_no_others(no_estimate, base, tmp_path, monkeypatch, capsys):
    """In its format; also when it is resumed, and not where it is no quantized form of the model."""
    config = quantization.Quantization(4, 32)
    for name, seed in (("codes", None), ("others", 1)):
        model = checkpoint.load(base / "base")
        if seed is not None:
            model.init_weights(torch.Generator().manual_seed(seed))
        quantization.quantize(model, config)
        checkpoint.save(model, tmp_path / name)
    changes = {"qat": 4, "lora": False, "amp": "none", "export": "meta", "max_steps": 1, "accumulation": 1}
    run = run_to(base, tmp_path / "run", qat_start=str(tmp_path / "codes"), **changes)
    assert run.rounding == config and len(run.trainer.weights["layers.0.feed_forward.w2.scales"][0]) > 1
    assert checkpoint.read_quantization(tmp_path / "run" / "merged") == dataclasses.replace(config, method="qat")
    again = [f"--out_dir={tmp_path / 'run'}", "--resume"]
    assert call(monkeypatch, capsys, *again)[0] == 0
    code, _, err = call(monkeypatch, capsys, *again, f"--qat_start={tmp_path / 'others'}")
    assert code == 2 and "the codes to start from are not those of this weight" in err
    given = {"lora": False, "qat": 4, "amp": "none"}
    refused = {
        "others": "the codes to start from are not those of this weight",
        "base": "holds no codes of 4 bits; make them with compress.py quantize",
    }
    (tmp_path / "base").symlink_to(base / "base")
    for name, message in refused.items():
        extra = given | {"qat_start": tmp_path / name}
        code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "new", **extra))
        assert code == 2 and message in err and not (tmp_path / "new").exists(), err
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "new", qat_start=tmp_path / "codes"))
    assert code == 2 and "leave it out, or say which" in err


def test_codes_are_not_trained_through_another_rounding(tmp_path, monkeypatch, capsys):
    model = checkpoint.load(TINY)
    quantization.quantize(model, quantization.Quantization(8))
    checkpoint.save(model, tmp_path / "int8", tokenizer_path=TINY / "tokenizer.model")
    given = [f"--ckpt_dir={tmp_path / 'int8'}", f"--out_dir={tmp_path / 'run'}", "--qat=4", "--lora=False"]
    code, _, err = call(monkeypatch, capsys, *given)
    assert code == 2 and "int8 is quantized already; train the original" in err and len(err.splitlines()) == 1


def test_what_is_measured_on_is_known_by_its_content(no_estimate, base, tmp_path, texts, monkeypatch, capsys):
    """Resumed to the same bytes, also where the file has moved; any other file is refused, and so is one too many."""
    texts |= {"lora": True, "max_steps": 2, "export": "none"}
    run_to(base, tmp_path / "whole", **texts)
    run_to(base, tmp_path / "run", 1, **texts)
    Path(texts["eval_data"]).rename(tmp_path / "moved.txt")
    resume = ["--resume", f"--out_dir={tmp_path / 'run'}"]
    code, _, err = call(monkeypatch, capsys, *resume)
    assert code == 2 and f"eval_data={texts['eval_data']}, which is no longer there; pass --eval_data=PATH" in err
    (tmp_path / "other.txt").write_text("The owl met 1 fox.\n" * 40)
    for path, message in (
        (tmp_path / "other.txt", "eval_data is not what the run was started with"),
        (texts["data"], "is what is trained on; leave it out"),
    ):
        code, _, err = call(monkeypatch, capsys, *resume, f"--eval_data={path}")
        assert code == 2 and message in err and len(err.splitlines()) == 1
    assert call(monkeypatch, capsys, *resume, f"--eval_data={tmp_path / 'moved.txt'}")[0] == 0
    assert crash.digest(tmp_path / "run") == crash.digest(tmp_path / "whole")
    run_to(base, tmp_path / "without", 1, **{**texts, "eval_data": None})
    resume[1] = f"--out_dir={tmp_path / 'without'}"
    code, _, err = call(monkeypatch, capsys, *resume, f"--eval_data={tmp_path / 'moved.txt'}")
    assert code == 2 and "without was started without --eval_data; leave it out" in err


def test_full_training_exports_the_trained_weights(base, tmp_path):
    run = run_to(base, tmp_path / "run", lora=False, amp="none", export="meta", optimizer="sgd", lr=0.1, max_steps=2)
    assert not (tmp_path / "run" / "adapter").exists()
    stored = checkpoint.load(tmp_path / "run" / "merged").state_dict()
    assert all(torch.equal(stored[name], w) for name, w in run.model.state_dict().items())
    assert not torch.equal(stored["norm.weight"], checkpoint.load(base / "base").norm.weight)


def test_packing_and_batches_train_on_the_same_tokens(base, tmp_path):
    counts = set()
    for name, changes in {"rows": {}, "packed": {"packing": True}, "batches": {"batch_size": 2}}.items():
        run = run_to(base, tmp_path / name, epochs=1, eval_every=99, **changes)
        counts.add(run.trainer.progress.label_tokens)
    assert len(counts) == 1


def test_samples_beyond_the_models_own_context_are_warned_of(base, tmp_path):
    run = prepared(options_of(base, tmp_path / "run"))
    longest = max(len(sample.tokens) for sequence in run.data.sequences for sample in sequence)
    for context in (longest, longest - 1):
        run.model.args = dataclasses.replace(run.model.args, max_seq_len=context)
        line = f"warning    samples reach {longest} tokens, but the model is meant for {context}\n"
        assert (line in run.describe()) == (context < longest)


def test_no_held_out_records_no_verdict(base, tmp_path, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, *flags(base, tmp_path / "run", held_out=0, max_steps=2))
    assert code == 0 and "nothing can be said about learning" in out


def test_show_data_marks_what_is_trained(base, tmp_path, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, *flags(base, tmp_path / "run", show_data=2))
    assert code == 0 and not (tmp_path / "run").exists()
    assert out.count("### Response:\n[") == 2 and out.count("[<end of text>]") == 2


def test_a_base_of_16_bits_trains_fp32_adapters(base, tmp_path, capsys):
    run = run_to(base, tmp_path / "run", dtype="bfloat16", amp="none", lr=1e-5, export="meta")
    assert {w.dtype for w in run.trainer.weights.values()} == {torch.float32}
    assert checkpoint.load(tmp_path / "run" / "merged").norm.weight.dtype is torch.bfloat16
    assert "to rounding; keep the adapter" in capsys.readouterr().out


# Verdicts


def verdict(before: float, after: float, copied: float = 9.0, held_out: int = 30, **options) -> str:
    def made(loss: float, copy_loss: float) -> Evaluation:
        noise = [0.01 * math.sin(i) for i in range(held_out)]
        return Evaluation([10 * (loss + x) for x in noise], [10] * held_out, [10 * copy_loss] * held_out)

    given = TrainingOptions.resolve(options)
    return " ".join(verdicts.verdict(given, 4096, made(before, 9.0), made(after, copied), 0.5))


def test_verdicts_are_plain():
    assert "It learned." in verdict(3.0, 2.5) and "ALARM" not in verdict(3.0, 2.5)
    assert "It got worse" in verdict(2.5, 3.0)
    hardly = verdict(3.0, 2.9999)
    assert "It learned nothing that shows." in hardly and "The preset learn" in hardly
    assert "The preset learn" not in verdict(3.0, 3.0, preset="learn")
    assert "B starts at zero" not in verdict(3.0, 3.0, adapter="runs/finetuning/adapter")
    few = verdict(3.0, 2.5, held_out=1)
    assert "Held-out loss 3.0000 before, 2.5000 after; too few" in few and "It learned" not in few and "95 %" not in few
    assert "ALARM: the loss started at 9.00, above ln(vocabulary) = 8.32" in verdict(9.0, 2.0)
    assert "ALARM: the model is better at repeating" in verdict(3.0, 2.5, copied=1.0)


def test_a_verdict_is_certain_only_where_the_records_agree():
    """The fall of each record, in nats; the interval is that of the records, and says so."""
    given = TrainingOptions.resolve({})

    def said(falls: list[float]) -> str:
        before = Evaluation([30.0 + i for i in range(len(falls))], [10] * len(falls), [90.0] * len(falls))
        sums = [loss - 10 * fall for loss, fall in zip(before.sums, falls, strict=True)]
        return " ".join(verdicts.verdict(given, 4096, before, Evaluation(sums, before.counts, before.copied), 0.5))

    assert "It learned." in said([0.2, 0.3] * 10)
    assert "It learned nothing that shows." in said([2.0, -1.8] * 10)  # a fall of 0.1 on average
    assert "It learned nothing that shows." in said([0.009] * 20)  # certain, and too little to matter
    assert "It learned." in said([0.011] * 20)
    assert "It got worse" in said([-0.2, -0.3] * 10) and "It got worse" in said([-0.011] * 20)
    for falls in ([-2.0, 1.8] * 10, [-0.009] * 20):
        assert "It learned nothing that shows." in said(falls)
    mixed = said([0.2, 0.3] * 10)
    low, high = map(float, re.search(r"it fell by 0.2500 \[(\S+) to (\S+)\]", mixed).groups())
    assert 0.22 < low < 0.25 < high < 0.28
    low, high = map(float, re.search(r"after \[95 %: (\S+) to (\S+)\]", mixed).groups())
    assert low < 3.95 - 0.25 < high and high - low > 0.3  # records differ more than their falls


def test_copying_alarms_where_training_made_it_better_than_predicting():
    def said(copied: tuple[float, float], losses: tuple[float, float]) -> str:
        made = [Evaluation([10 * x] * 20, [10] * 20, [10 * c] * 20) for x, c in zip(losses, copied, strict=True)]
        return " ".join(verdicts.verdict(TrainingOptions.resolve({}), 4096, *made, 0.5))

    assert "labels that are not shifted" in said((5.0, 1.0), (3.0, 2.0))
    assert "ALARM" not in said((5.0, 2.5), (3.0, 2.0))  # it predicts better than it copies
    assert "ALARM" not in said((1.5, 1.0), (3.0, 2.0))  # predicting became better by more
    assert "ALARM" not in said((1.0, 1.0), (2.0, 2.0))  # it did so before


def test_answers_are_counted_before_and_after():
    def made(*pairs: tuple[str, bool]) -> list[dict]:
        return [{"text": text, "ended": ended} for text, ended in pairs]

    before = made(("about it", True), ("a", False), ("x", True), ("c", False))
    after = made(("about that", False), ("a", True), ("b", True), ("c", False))
    text = verdicts.compared(["What is it?"], ["a", "b", "c"], before, after)
    assert "2 of 4 answers (1 to the questions above, 3 held out) ended by themselves before, 2 after." in text
    assert "0 of 3 held-out answers were the reference before, 2 after." in text
    assert text.index("What is it?") < text.index("about it") < text.index("about that")


@pytest.mark.parametrize(
    ("flags", "copies", "exported"),
    [
        ({"optimizer": "sgd", "keep": 1, "export": "none"}, 3, 0),
        ({"optimizer": "sgd", "momentum": 0.9, "keep": 2, "export": "none"}, 7, 0),
        ({"optimizer": "adamw", "keep": 2, "export": "hf"}, 10, 1),
    ],
)
def test_a_run_starts_only_where_its_files_will_fit(base, tmp_path, monkeypatch, flags, copies, exported):
    """Snapshots of weights and moments, one more while it is written, the adapter, and what is exported."""
    run = prepared(options_of(base, tmp_path / "run", **flags))
    trained = sum(weight.nbytes for weight in run.trainer.weights.values())
    needed = copies * trained + exported * sum(weight.nbytes for weight in run.model.parameters())
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: shutil._ntuple_diskusage(free, 0, free))
        with contextlib.nullcontext() if fits else pytest.raises(EnvironmentFailure, match="GB are free"):
            run._check_disk()


def test_updates_too_small_for_any_weight_end_the_run(base, tmp_path, monkeypatch, capsys):
    changes = {"lora": False, "optimizer": "sgd", "lr": 1e-30, "amp": "none"}
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run", **changes))
    assert code == 4 and "no weight moved" in err


def test_numbers_that_run_away_end_with_the_last_good_snapshot_kept(base, tmp_path, monkeypatch, capsys):
    changes = {"lora": False, "optimizer": "sgd", "lr": 1e30, "amp": "none"}
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run", **changes))
    assert code == 4 and len(err.strip().splitlines()[-1]) < 400 and "error: " in err
    path, saved, _ = snapshot.latest(tmp_path / "run" / "snapshots")
    assert all(t.isfinite().all() for t in saved.tensors["model"].values()), path


# Stopping and resuming


@pytest.fixture(scope="session")
def reference(base, tmp_path_factory) -> str:
    """What a run of 4 steps in 2 epochs, fp16 with dropout and checkpointing, leaves when nothing interrupts it."""
    root = tmp_path_factory.mktemp("reference") / "run"
    with short_answers():
        run_to(base, root)
    return crash.digest(root)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resuming_at_any_step_gives_the_same_bytes(base, reference, tmp_path, step):
    """Weights, optimizer, random state, scaler, learning rates, losses and order of samples."""
    run_to(base, tmp_path / "run", step)
    assert not (tmp_path / "run" / "adapter").exists()
    torch.manual_seed(12345)
    run_to(base, tmp_path / "run", resume=True)
    assert crash.digest(tmp_path / "run") == reference


def test_the_last_step_is_saved_whatever_its_number(base, tmp_path):
    """Also by a run that was stopped and resumed in between."""
    run_to(base, tmp_path / "run", 1, save_every=3)
    run_to(base, tmp_path / "run", resume=True, save_every=3)
    assert snapshot.latest(tmp_path / "run" / "snapshots")[0].name == "step-00000004"


def test_resuming_after_every_step_gives_the_same_bytes(base, reference, tmp_path):
    run_to(base, tmp_path / "run", 1)
    for step in (2, 3):
        run_to(base, tmp_path / "run", step, resume=True)
    run_to(base, tmp_path / "run", resume=True)
    assert crash.digest(tmp_path / "run") == reference
    written = (tmp_path / "run" / "summary.json").read_bytes()
    run_to(base, tmp_path / "run", resume=True)  # of a run that has ended: nothing changes, nor what was measured
    assert (tmp_path / "run" / "summary.json").read_bytes() == written and b'"tokens_per_s": null' not in written
    assert crash.digest(tmp_path / "run") == reference


def test_the_figures_of_a_resumed_run_are_those_of_all_its_steps(base, tmp_path):
    """Time, tokens and peak memory; the row that is published counts every step."""
    results = tmp_path / "rows.jsonl"
    run_to(base, tmp_path / "run", 3)
    before = snapshot.latest(tmp_path / "run" / "snapshots")[1].state["figures"]
    run = run_to(base, tmp_path / "run", resume=True, results=str(results))
    assert run.figures.step_seconds[:3] == before["step_seconds"] and len(run.figures.step_seconds) == 4
    assert run.figures.peak_bytes >= before["peak_bytes"]
    assert json.loads(results.read_text())["metrics"]["step_s"]["n"] == 4
    n_tokens = sum(len(sample.tokens) for sequence in run.data.sequences for sample in sequence)
    assert run.figures.tokens == 2 * n_tokens  # two epochs
    run_to(base, tmp_path / "run", resume=True, results=str(results))  # of a run that has ended: no second row
    assert len(results.read_text().splitlines()) == 1


def test_a_run_of_a_version_without_figures_resumes_to_the_same_bytes(base, reference, tmp_path, capsys):
    root, results = tmp_path / "run", tmp_path / "rows.jsonl"
    run_to(base, root, 2)
    for path in snapshot.listed(root / "snapshots"):
        state = json.loads((path / "state.json").read_text())
        del state["figures"]
        (path / "state.json").write_text(json.dumps(state))
        manifest = json.loads((path / "MANIFEST.json").read_text())
        size, digest = (path / "state.json").stat().st_size, files.sha256(path / "state.json")
        manifest["files"]["state.json"] |= {"bytes": size, "sha256": digest}
        (path / "MANIFEST.json").write_text(json.dumps(manifest))
    run_to(base, root, resume=True, results=str(results))
    assert crash.digest(root) == reference and not results.exists()
    assert "Time and memory of the first 2 steps are not known" in capsys.readouterr().out


def test_tokens_per_second_do_not_count_padding(base, tmp_path):
    tokens = {run_to(base, tmp_path / f"{n}", epochs=1, batch_size=n).figures.tokens for n in (1, 2, 4)}
    assert len(tokens) == 1


@pytest.mark.parametrize("missing", ["clear_refs", "status", ""])
def test_a_system_that_does_not_tell_the_peak_is_no_reason_to_end(base, tmp_path, monkeypatch, capsys, missing):
    """Without Linux's /proc, or where the peak cannot be reset: no figure, rather than that of the whole process."""
    (tmp_path / "proc").mkdir()
    if missing:
        (tmp_path / "proc" / "status").write_text("" if missing == "status" else "VmHWM: 99 kB")
    if missing == "clear_refs":
        (tmp_path / "proc" / "clear_refs").mkdir()  # cannot be written
    monkeypatch.setattr(devices, "PROCESS", tmp_path / "proc" if missing else tmp_path / "none")
    code, out, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run", results=tmp_path / "rows.jsonl"))
    assert code == 0, err
    assert "Peak memory of a step is not measurable here;" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["peak_memory_mb"] is None
    assert "peak_memory_mb" not in json.loads((tmp_path / "rows.jsonl").read_text())["metrics"]


def test_moved_data_and_a_moved_base_resume(base, reference, tmp_path):
    """What a run was started with is known by its content."""
    run_to(base, tmp_path / "run", 2)
    shutil.copytree(base, tmp_path / "moved")
    typed = {"resume": True, "out_dir": str(tmp_path / "run"), "ckpt_dir": str(tmp_path / "moved" / "base")}
    options = TrainingOptions.resolve({**typed, "data": str(tmp_path / "moved" / "data.json")})
    finetuning.main(options)
    assert crash.digest(tmp_path / "run") == reference


def test_a_run_is_resumed_from_anywhere(base, reference, tmp_path, monkeypatch, capsys):
    """Started with relative paths; then from another directory, and with all of it moved; a lost file is named."""
    shutil.copytree(base, tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    relative = {"ckpt_dir": "base", "data": "data.json", "tokenizer_path": "base/tokenizer.model"}
    run_to(base, Path("runs/a"), 1, **relative)
    shutil.move(tmp_path / "clone", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "moved" / "runs" / "a"
    options = TrainingOptions.resolve({"resume": True, "out_dir": str(root)})
    assert Path(options.data).samefile(tmp_path / "moved" / "data.json")
    capsys.readouterr()
    for name in ("data", "ckpt_dir"):
        path = tmp_path / "moved" / relative[name]
        path.rename(tmp_path / "elsewhere")
        code, _, err = call(monkeypatch, capsys, "--resume", f"--out_dir={root}")
        assert code == 2 and len(err.splitlines()) == 1
        assert f"{name}={relative[name]}, which is no longer there; pass --{name}=PATH as it is now" in err
        (tmp_path / "elsewhere").rename(path)
    shutil.move(root, tmp_path / "alone")  # the run without what it was made of: typed paths hold from its directory
    monkeypatch.chdir(tmp_path / "moved")
    finetuning.main(TrainingOptions.resolve({"resume": True, "out_dir": str(tmp_path / "alone")}))
    assert crash.digest(tmp_path / "alone") == reference


def test_a_longer_log_is_cut_back_and_a_shorter_one_refused(base, reference, tmp_path):
    root = tmp_path / "run"
    run_to(base, root, 2)
    with (root / "loss.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1')
    run_to(base, root, 3, resume=True)
    lines = [json.loads(line) for line in (root / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    (root / "loss.jsonl").write_text("")
    with pytest.raises(InputError, match=r"loss\.jsonl has 0 bytes"):
        run_to(base, root, resume=True)


def test_each_epoch_is_another_order_of_all_records(base, tmp_path):
    run_to(base, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    epochs = [[n for row in rows if row.get("epoch") == e for n in row["samples"]] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == 4 and epochs[0] != epochs[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_run_goes_on_later(base, tmp_path, number):
    """A process of its own, told to stop in the middle of a step."""
    root = tmp_path / "run"
    command = [sys.executable, "finetuning.py", *flags(base, root, epochs=60, save_every=1000)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = root / "loss.jsonl"
    for _ in range(2400):
        time.sleep(0.05)
        if log.exists() and log.read_bytes().count(b"\n") >= 3:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    line = err.strip().splitlines()[-1]
    assert re.search(
        rf"stopped by {number.name} after step (\d+) of 120, saved in .*; --resume=True continues it", line
    )
    step = int(re.search(r"after step (\d+)", line)[1])
    assert snapshot.latest(root / "snapshots")[0].name == f"step-{step:08d}" and step >= 3
    rows = [json.loads(row) for row in log.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, step + 1))


def test_a_second_signal_ends_it_at_once():
    # A shell starts what it runs in the background with SIGINT ignored, these tests too.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stop = running.StopSignal()
        with stop.caught():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop() and stop.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, outside)


CHANGES = {
    "seed": 2, "lr": 1e-3, "batch_size": 2, "accumulation": 2, "epochs": 5, "max_steps": 9, "r": 8, "targets": "wq",
    "optimizer": "sgd", "amp": "none", "dtype": "bfloat16", "checkpointing": "all", "dropout": 0.5, "held_out": 2,
    "preset": "learn", "loss_normalization": "microbatch", "packing": True, "max_seq_len": 95,
}  # fmt: skip


@pytest.fixture(scope="session")
def stopped(base, tmp_path_factory) -> Path:
    """A run that stopped after its first step."""
    root = tmp_path_factory.mktemp("stopped") / "run"
    with short_answers():
        run_to(base, root, 1)
    return root


@pytest.mark.parametrize("name", CHANGES)
def test_changed_settings_are_refused_by_name(stopped, monkeypatch, capsys, name):
    was = json.loads((stopped / "settings.json").read_text())["options"][name]
    code, _, err = call(monkeypatch, capsys, "--resume", f"--out_dir={stopped}", f"--{name}={CHANGES[name]}")
    assert code == 2 and f"--{name}={CHANGES[name]} (was {was})" in err and len(err.splitlines()) == 1


def test_other_data_or_another_base_is_refused(base, stopped, tmp_path, monkeypatch, capsys):
    shutil.copytree(stopped, tmp_path / "run")
    checkpoint.save(
        random_model(checkpoint.read_args(base / "base"), seed=5), tmp_path / "other", "meta", TINY / "tokenizer.model"
    )
    (tmp_path / "data.json").write_text(json.dumps(crash.RECORDS[::-1]))
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes().rstrip(b"\n"))
    for name, path in (("ckpt_dir", "other"), ("data", "data.json"), ("tokenizer_path", "tokenizer.model")):
        code, _, err = call(
            monkeypatch, capsys, "--resume", f"--out_dir={tmp_path / 'run'}", f"--{name}={tmp_path / path}"
        )
        assert code == 2 and f"{name} is not what the run was started with" in err and f"--{name}=PATH" in err


def test_a_snapshot_that_lacks_anything_is_not_resumed(base, stopped, tmp_path, monkeypatch, capsys):
    root = tmp_path / "run"
    shutil.copytree(stopped, root)
    for path in snapshot.listed(root / "snapshots"):
        (path / "rng.safetensors").unlink()
    code, _, err = call(monkeypatch, capsys, "--resume", f"--out_dir={root}")
    assert code == 2 and "rng.safetensors: is missing" in err and len(err.splitlines()) == 1


# In less memory


def losses(root: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (root / "loss.jsonl").read_text().splitlines()) if "loss" in row]


LEAN_FULL = {"lora": False, "lean": True, "optimizer": "sgd", "accumulation": 1, "amp": "none", "lr": 0.05}


@pytest.mark.parametrize("changes", [{"amp": "none", "checkpointing": "none"}, LEAN_FULL])
def test_a_lean_run_is_the_run(base, tmp_path, changes):
    """Losses and merged weights of --lean are those without, with adapters and with all weights trained."""
    weights = []
    for is_lean in (False, True):
        root = tmp_path / str(is_lean)
        run_to(base, root, export="meta", **{**changes, "lean": is_lean})
        weights.append(checkpoint.load(root / "merged").state_dict())
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


def test_a_lean_run_of_all_weights_resumes_to_the_same_bytes(base, tmp_path):
    run_to(base, tmp_path / "whole", **LEAN_FULL)
    run_to(base, tmp_path / "run", step=3, **LEAN_FULL)
    run_to(base, tmp_path / "run", resume=True, **LEAN_FULL)
    assert (tmp_path / "run" / "loss.jsonl").read_bytes() == (tmp_path / "whole" / "loss.jsonl").read_bytes()
    last = [snapshot.listed(tmp_path / name / "snapshots")[-1] / "model.safetensors" for name in ("run", "whole")]
    assert last[0].read_bytes() == last[1].read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "run" / "loss.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] is None for row in rows if "loss" in row)


@pytest.mark.parametrize(("name", "value"), [("accumulation", 3), ("optimizer", "adamw"), ("momentum", 0.9)])
def test_lean_training_of_all_weights_says_what_it_cannot_do(base, tmp_path, monkeypatch, capsys, name, value):
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run", **{**LEAN_FULL, name: value}))
    assert code == 2 and f"which --{name}={value} does not allow" in err and len(err.splitlines()) == 1


def test_the_expected_peak_is_printed_before_and_the_measured_one_after(base, tmp_path, monkeypatch, capsys):
    """And --checkpoint_budget_gb chooses layers with which the expected one is within the budget."""
    plain = {"amp": "none", "checkpointing": None, "epochs": 1}
    code, out, err = call(monkeypatch, capsys, *flags(base, tmp_path / "a", **plain))
    assert code == 0, err
    assert re.search(r"memory +\d+ MB expected at the peak of a step: weights \d", out)
    # Nothing at all here, where other tests' memory is freed meanwhile.
    assert re.search(r"Peak memory of a step [\d,]+ MB; \d+ MB were expected\.", out)
    expected = json.loads((tmp_path / "a" / "summary.json").read_text())["expected_peak_memory_mb"]
    budget = expected / 1e3 * 0.9
    code, out, err = call(monkeypatch, capsys, *flags(base, tmp_path / "b", checkpoint_budget_gb=budget, **plain))
    assert code == 0, err
    assert re.search(r"[1-4] of 4 layers checkpointed", out)
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["expected_peak_memory_mb"] <= budget * 1e3
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "c", checkpoint_budget_gb=1e-4, **plain))
    assert code == 2 and "cannot bring the peak below" in err and len(err.splitlines()) == 1


# What is wrong with what the user gave

BAD = {
    "preset": ("best", "expected one of course, learn"),
    "lr": ("fast", "expected a number"),
    "r": ("0", "--r=0 is not a rank"),
    "alpha": ("-1", "alpha"),
    "dropout": ("1", "dropout"),
    "targets": ("wq,q_proj", "--targets=wq,q_proj"),
    "optimizer": ("lion", "--optimizer=lion: expected one of sgd, adamw"),
    "amp": ("int8", "--amp=int8: expected one of none, fp16, bf16"),
    "checkpointing": ("every:0", "--checkpointing=every:0"),
    "dtype": ("int8", "--dtype=int8 is unknown"),
    "epochs": ("0", "--epochs=0: expected at least 1"),
    "accumulation": ("0", "--accumulation=0"),
    "held_out": ("5", "none of them to train on"),
    "max_seq_len": ("8", "nothing can be trained on within --max_seq_len=8"),
    "keep": ("0", "--keep=0"),
    "seed": ("99999999999999999999", "--seed=99999999999999999999: expected less than 9.22"),
    "export": ("onnx", "--export=onnx"),
    "data": ("absent.json", "cannot read absent.json"),
    "eval_data": ("absent.json", "cannot read absent.json"),
    "ckpt_dir": ("absent", "absent"),
    "tokenizer_path": ("README.md", "README.md"),
    "clip_norm": ("0", "--clip_norm=0.0: expected more than 0"),
    "schedule": ("wave", "--schedule=wave: expected one of"),
    "device": ("tpu", "--device=tpu is unknown"),
    "qat": ("5", "--qat=5: expected one of 4, 8"),
    "loss_normalization": ("sum", "--loss_normalization=sum: expected one of"),
    "checkpoint_budget_gb": ("1", "--checkpoint_budget_gb=1.0 chooses the layers; leave out --checkpointing="),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(base, tmp_path, monkeypatch, capsys, name):
    value, message = BAD[name]
    code, out, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run", **{name: value}))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_not_overwritten(base, stopped, tmp_path, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in stopped.rglob("*")}
    code, _, err = call(monkeypatch, capsys, *flags(base, stopped))
    assert code == 2 and "--resume=True continues the run" in err
    assert {p: p.stat().st_mtime_ns for p in stopped.rglob("*")} == before
    code, _, err = call(monkeypatch, capsys, "--resume", f"--out_dir={tmp_path / 'none'}")
    assert code == 2 and "holds no run to resume" in err and not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "file"))
    assert code == 2 and "not a directory" in err


def test_a_disk_too_small_shows_before_the_first_step(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run"))
    assert code == 3 and "0.0 GB are free" in err and not (tmp_path / "run" / "loss.jsonl").exists()
    (tmp_path / "file").write_text("")
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "file" / "run"))
    assert code == 3 and "cannot write" in err


def test_full_training_in_16_bits_is_refused(base, tmp_path, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run", lora=False, dtype="bfloat16"))
    assert code == 2 and "without LoRA all weights are trained, in float32" in err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(base, tmp_path, monkeypatch, capsys):
    args = type(checkpoint.read_args(base / "base"))(**{**vars(checkpoint.read_args(base / "base")), "vocab_size": 512})
    checkpoint.save(random_model(args), tmp_path / "small", "meta", TINY / "tokenizer.model")
    code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run", ckpt_dir=tmp_path / "small"))
    assert code == 2 and "the tokenizer has 4096 words, the model 512" in err


# Faults


def test_a_run_that_came_and_went_meanwhile_is_not_written_over(base, reference, tmp_path, monkeypatch):
    """Between a look at the directory and the lock on it, while the model is read."""
    prepare, root = finetuning.read_data, tmp_path / "run"

    def slowly(options):
        monkeypatch.setattr(finetuning, "read_data", prepare)
        run_to(base, root)
        return prepare(options)

    monkeypatch.setattr(finetuning, "read_data", slowly)
    with pytest.raises(InputError, match="is in use"):
        finetuning.main(options_of(base, root))
    assert crash.digest(root) == reference


def test_saved_settings_of_another_type_are_refused(base, tmp_path):
    run_to(base, tmp_path / "run", max_steps=1)
    path = tmp_path / "run" / "settings.json"
    content = json.loads(path.read_text())
    content["options"]["targets"] = 1.5
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"settings\.json:options: is not of this version"):
        TrainingOptions.resolve({"resume": True, "out_dir": str(tmp_path / "run")})


@functools.cache
def fault_library(folder: Path) -> Path:
    """The compiled shim that makes file operations fail."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    return crash.build_library(folder)


def crash_run(mode: str, tmp_path: Path, *numbers: int) -> dict:
    """crash.py in a process of its own."""
    environment = {**os.environ, "LD_PRELOAD": str(fault_library(tmp_path)), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    (tmp_path / "work").mkdir()
    command = [sys.executable, "tests/crash.py", mode, str(tmp_path / "work"), *map(str, numbers)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


ENOSPC, EIO = 28, 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "lasting"), [pytest.param(0, 0, id="killed"), pytest.param(ENOSPC, 1, id="disk full")]
)
def test_a_run_survives_faults(tmp_path, error, lasting):
    """At every 61st change that the run makes to its directory; test_a_run_survives_every_fault takes all."""
    found = crash_run("faults", tmp_path, error, lasting, 61)
    assert found["failures"] == {} and found["tried"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("error", "lasting", "every"), [(0, 0, 1), (ENOSPC, 1, 1), (ENOSPC, 0, 3), (EIO, 0, 2)])
def test_a_run_survives_every_fault(tmp_path, error, lasting, every):
    """Killed, or refused, at every single change: resumed, it ends with the bytes of a run that nothing disturbed."""
    found = crash_run("faults", tmp_path, error, lasting, every)
    assert found["failures"] == {} and found["tried"] >= found["operations"] // every > 50


@pytest.mark.slow
def test_a_run_survives_being_killed_at_two_hundred_moments(tmp_path):
    """After a random time, resumed, killed again, to the end: the bytes of a run that nothing disturbed."""
    found = crash_run("kills", tmp_path, 200, signal.SIGKILL)
    assert found["failures"] == {} and found["kills"] >= 200 and found["runs"] >= 5


@pytest.mark.slow
def test_a_run_survives_being_asked_to_stop_at_a_hundred_moments(tmp_path):
    found = crash_run("kills", tmp_path, 100, signal.SIGTERM)
    assert found["failures"] == {} and found["kills"] >= 100


# From an adapter


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    """An adapter of another rank and alpha, some layers of which have others again."""
    target, model = tmp_path_factory.mktemp("trained") / "adapter", checkpoint.load(base / "base")
    each = tuple((f"layers.{i}.attention.wq", 2 + i % 2, 6.0) for i in range(1, 4))
    lora.apply(model, config := lora.LoRAConfig(r=2, alpha=6.0, dropout=0.5, targets=("wq",), modules=each))
    for module in lora.layers(model).values():
        torch.nn.init.normal_(module.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    adapters.save(model, config, target, checkpoint.fingerprint(base / "base"))
    return target


@pytest.fixture
def no_estimate(monkeypatch):
    footprint = running.memory.Footprint({"weights": 1}, {"weights": 1})
    monkeypatch.setattr(running.memory, "estimate", lambda *_, **__: footprint)


def test_training_goes_on_from_an_adapter_and_resumes_to_the_same_bytes(no_estimate, base, tmp_path, trained):
    """Rank, alpha and targets are the adapter's, dropout the run's. Content is identity."""
    start = checkpoint.load(base / "base")
    config = adapters.load(start, trained)
    whole = prepared(options_of(base, tmp_path / "none", adapter=str(trained)))
    assert whole.lora == dataclasses.replace(config, dropout=0.05) and whole.options.r == 3
    assert all(torch.equal(t, lora.state_dict(start)[name]) for name, t in lora.state_dict(whole.model).items())
    run_to(base, tmp_path / "whole", adapter=str(trained))
    settings = json.loads((tmp_path / "whole" / "settings.json").read_text())
    assert settings["adapter_sha256"] == adapters.fingerprint(trained) and settings["options"]["targets"] == "wq"
    run_to(base, tmp_path / "stopped", step=1, adapter=str(trained))
    moved = shutil.copytree(trained, tmp_path / "moved")
    resumed = options_of(base, tmp_path / "stopped", resume=True, adapter=str(moved))
    finetuning.main(resumed)
    assert crash.digest(tmp_path / "whole") == crash.digest(tmp_path / "stopped")
    assert adapters.read_config(tmp_path / "stopped" / "adapter", start.args).modules == config.modules
    (moved / adapters.CONFIG).write_text((moved / adapters.CONFIG).read_text().replace(": 6", ": 7"))
    with pytest.raises(InputError, match="adapter is not what the run was started with"):
        finetuning.main(resumed)


def test_what_contradicts_an_adapter_is_refused(no_estimate, base, tmp_path, trained, monkeypatch, capsys):
    checkpoint.save(random_model(checkpoint.read_args(base / "base"), seed=5), tmp_path / "other")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "other")
    for changes, message in (
        ({"r": 4, "targets": "wq"}, f"--r=4, --targets=wq: --adapter={trained} says it; leave it out"),
        ({"lora": False, "dtype": "float32"}, "is trained with --lora=True"),
        ({"adapter": f"{trained},{trained}"}, "training goes on from one"),
        ({"ckpt_dir": tmp_path / "other", "max_steps": 1}, "--any_base=True uses it all the same"),
    ):
        code, _, err = call(monkeypatch, capsys, *flags(base, tmp_path / "run", **{"adapter": trained, **changes}))
        assert code == 2 and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()
    changes = {"adapter": trained, "ckpt_dir": tmp_path / "other", "any_base": True, "max_steps": 1}
    assert call(monkeypatch, capsys, *flags(base, tmp_path / "run", **changes))[0] == 0


def test_an_adapter_names_its_base_which_peft_loads(no_estimate, base, tmp_path):
    """AutoPeftModelForCausalLM finds the base that the run was started with, from any directory, without a warning."""
    checkpoint.save(checkpoint.load(base / "base"), tmp_path / "hf", "hf", TINY / "tokenizer.model")
    run = run_to(base, tmp_path / "run", ckpt_dir=str(tmp_path / "hf"), amp="none", lr=0.05)
    tokens = torch.randint(0, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(theirs(tokens).logits, run.model.eval()(tokens), rtol=0, atol=1e-5)


# Against transformers + peft


def test_twenty_steps_equal_transformers_and_peft(base, tmp_path):
    """The same weights, adapters, samples and settings: losses within 1e-4 of each other, step by step."""
    work = tmp_path / "work"
    model = checkpoint.load(base / "base")
    config = lora.LoRAConfig(r=4, alpha=8.0, dropout=0.0)
    lora.apply(model, config, seed=3)
    adapters.save(model, config, work / "adapter", "")
    checkpoint.save(checkpoint.load(base / "base"), work / "hf", "hf")
    theirs = LlamaForCausalLM.from_pretrained(work / "hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, work / "adapter", is_trainable=True).train()
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    found = records.read(ROOT / "data" / "alpaca_200.json").records[:24]
    samples, _, _ = encode(tokenizer, found, 256)
    rows = [[sample] for sample in samples]
    settings = Settings(optimizer="adamw", lr=1e-2, weight_decay=0.01, clip_norm=1.0)
    trainer = Trainer(model, settings, 20)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    losses = []
    for step in range(20):
        window = batches.window(rows, step, 2, 2, 1, tokenizer.pad_id)
        ours, count = trainer.step(window).loss, sum(len(batch.labels) for batch in window)
        total = 0.0
        for batch in window:
            labels = torch.full_like(batch.tokens, -100).flatten()
            labels[batch.where + 1] = batch.labels  # transformers shifts by itself
            out = theirs(batch.tokens, labels=labels.view_as(batch.tokens), num_items_in_batch=count)
            out.loss.backward()
            total += out.loss.item()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((ours, total))
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in losses), losses
    assert losses[-1][0] < losses[0][0] - 0.2


@pytest.mark.slow
def test_a_newcomers_path(tmp_path):
    """The README's commands, in processes of their own: train the embedded model a little, then ask it."""
    root = tmp_path / "first"
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    trained = run([sys.executable, "finetuning.py", f"--out_dir={root}", "--max_steps=2", "--device=cpu"])
    assert trained.returncode == 0, trained.stderr
    assert "180 samples, 20 held out" in trained.stdout
    asked = run(
        [sys.executable, "inference.py", f"--ckpt_dir={root / 'merged'}", "--alpaca", "--prompt=Name a colour."]
    )
    assert asked.returncode == 0 and "> Name a colour." in asked.stdout


@pytest.mark.parametrize("vocab_size", [4095, 4609])
def test_a_vocabulary_of_a_different_size_is_refused_before_the_weights_are_read(
    monkeypatch, capsys, base, tmp_path, vocab_size
):
    args = dataclasses.replace(PRESETS["tiny-draft"], vocab_size=vocab_size)
    checkpoint.save(random_model(args), tmp_path / "model", tokenizer_path=TINY / "tokenizer.model")
    monkeypatch.setattr("llama.checkpoint.load", lambda *_args, **_named: pytest.fail("read the weights"))
    given = flags(base, tmp_path / "run", ckpt_dir=tmp_path / "model", checkpointing="none")
    code, _, err = call(monkeypatch, capsys, *given)
    assert code == 2 and f"the tokenizer has 4096 words, the model {vocab_size}; pass the one that belongs" in err
    assert "--tokenizer_path=FILE" in err
