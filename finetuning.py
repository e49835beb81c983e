"""Fine-tune a Llama model, with LoRA or in full, in a run that can be stopped and resumed at any time.

    python finetuning.py                               # the embedded model, 200 records, the course's settings
    python finetuning.py --preset=learn                # settings that change what the model answers
    python finetuning.py --ckpt_dir=Llama-3.2-1B --dtype=float16 --lean       # in a fifth more than the weights need
    python finetuning.py --resume                      # continue where a run stopped, to the same bytes
    python finetuning.py --adapter=runs/finetuning/adapter --out_dir=runs/more    # go on from an adapter
    python finetuning.py --data=chats.jsonl            # Alpaca's records, chats, prompts with completions, plain text
    python finetuning.py --objective=dpo --preset=learn   # on pairs of answers, of which one is preferred
    python finetuning.py --show_data=3                 # print samples, the trained tokens in brackets
    torchrun --nproc_per_node=2 finetuning.py          # two processes share each window (docs/devices.md)

The whole training loop is `train`, below. What it calls stands in llama/training: step.py has the parts of a step,
run.py the directory of a run. That holds settings.json, loss.jsonl (one line per step), loss.png and snapshots/, and at
the end adapter/ (in PEFT's format), merged/ (a checkpoint that inference.py takes) and summary.json.
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

import contextlib
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import rows as row_files
from data import alpaca, dataset
from data.tiny import EMBEDDED, directory_of, name_of
from llama import checkpoint, cli, files, processes
from llama.errors import InputError
from llama.kernels.cpu import train_ops
from llama.tokenizer import Tokenizer, find_tokenizer
from llama.training import dpo, snapshot
from llama.training.batch import pack
from llama.training.options import TrainingOptions
from llama.training.run import Data, Run, StopSignal
from reports import charts

INSTRUCTIONS = ("Name three colours.", "What is the capital of France?", "Explain how to make a cup of tea.")
N_SHOWN = 10  # held-out answers in a row
CELL = ("preset", "lora", "optimizer", "lr", "batch_size", "accumulation", "amp", "lean", "checkpointing")
CELL += ("max_seq_len",)
FIGURES = ("held_out_loss_before", "held_out_loss", "held_out_right_before", "held_out_right", "held_out_asked")


def train(run: Run, stop: StopSignal) -> None:
    """Take the optimizer steps that are left, each over a window of micro-batches; end early where a signal came.

    This is all of the training, top to bottom. Trainer.step in llama/training/step.py takes one step without log and
    snapshots, for pruning and benchmarks; a test compares the two bit by bit.
    """
    options, trainer = run.options, run.trainer
    optimizer, scaler, progress = trainer.optimizer, trainer.scaler, trainer.progress
    with tqdm(total=run.total, initial=progress.windows, unit="step", desc="training") as bar:
        while progress.windows < run.total and not stop():
            window = run.window()
            run.start_clock()
            n_terms = sum(map(trainer.n_terms, window))  # label tokens, or pairs
            lr = trainer.begin(window)
            loss = 0.0
            for number, batch in run.share_out(window):  # all of it, or what falls to this process
                if stop():  # leave no trace of this window: the resumed run takes it again
                    optimizer.zero_grad()
                    return
                trainer.seed_dropout(number)
                with trainer.autocast():  # products in 16 bits, where amp says so
                    loss_sum = trainer.loss_sum(batch)  # cross entropy over the label tokens of this micro-batch
                if options.loss_normalization == "tokens":  # the gradient of one large batch
                    part = loss_sum / n_terms
                else:  # the course's: mean / accumulation steps, in which a token of a short answer weighs more
                    part = loss_sum / (trainer.n_terms(batch) * len(window))
                if not trainer.keeps_gradients:  # backward() moves the weights: look before
                    trainer.require_finite(window, part)
                scaler.scale(part).backward()  # adds to the gradients
                loss += part.detach()
            loss = run.sum_over_processes(loss, stop)
            scaler.unscale_(optimizer)
            norm = trainer.clip_gradient()
            trainer.require_finite(window, loss, norm)
            scale = scaler.get_scale()
            scaler.step(optimizer)  # not where a gradient has overflowed in fp16; update() then lowers the scale
            scaler.update()
            optimizer.zero_grad()
            report = trainer.count(window, loss, lr, norm, skipped=scaler.get_scale() < scale)
            run.log_step(report, [name for batch in window for name in batch.names], bar)
            is_last = progress.windows == run.total
            if progress.windows % run.eval_every == 0 and not is_last:
                run.look(bar)
            if progress.windows % options.save_every == 0 or is_last:
                run.save()


def main(options: TrainingOptions) -> None:
    """A whole run: from the start, or from its newest snapshot, to the exported model."""
    if options.show_data is not None:
        tokenizer = Tokenizer(tokenizer_file(options))
        sizes = options.max_seq_len, options.show_data
        print("\n".join(dataset.show(data_file(options), tokenizer, *sizes, options.of_pairs)))
        return
    is_first = processes.world().is_first  # which alone writes
    if not options.resume and is_first:
        require_free(options.root)
    if options.results is not None:
        row_files.require_writable(Path(options.results))
    run = Run(options, directory_of(options.ckpt_dir), tokenizer_file(options), *read_data(options))
    print(run.describe())
    lock = snapshot.lock(options.root) if is_first else contextlib.nullcontext()
    with lock, StopSignal().caught() as stop:  # nothing was written until here
        if not options.resume and is_first:
            require_free(options.root)  # again: another run may have come and gone meanwhile
        run.restore() if options.resume else run.begin()
        train(run, stop)
        if run.trainer.progress.windows < run.total:
            run.save_and_stop(stop)
        summary = run.finish()
        if is_first:
            keep_figures(run, summary)


def require_free(root: Path) -> None:
    """Raise InputError where a new run would overwrite something."""
    if root.exists() and not root.is_dir():
        raise InputError(f"out_dir={root} is not a directory")
    present = {entry.name for entry in root.iterdir() if entry.name[0] != "."} if root.exists() else set()
    # A run that was killed before its first snapshot has nothing to lose and nothing to resume from.
    if present - {"settings.json", "loss.jsonl", "snapshots"} or snapshot.listed(root / "snapshots"):
        raise InputError(f"out_dir={root} is in use; resume=True continues the run in it, or choose another")


# Data


def tokenizer_file(options: TrainingOptions) -> Path:
    return find_tokenizer(directory_of(options.ckpt_dir), options.tokenizer_path)


def data_file(options: TrainingOptions) -> Path:
    if options.data is not None:
        return Path(options.data).expanduser()
    name = "pairs_200.json" if options.of_pairs else "alpaca_200.json"
    return (EMBEDDED if options.ckpt_dir is None else EMBEDDED.parent) / name


def eval_file(options: TrainingOptions) -> Path | None:
    return None if options.eval_data is None else Path(options.eval_data).expanduser()


def read_data(options: TrainingOptions) -> tuple[Tokenizer, Data]:
    """The tokenizer, and what is trained and measured on. Raises InputError where that is the same file."""
    tokenizer, path, eval_path = Tokenizer(tokenizer_file(options)), data_file(options), eval_file(options)
    sizes = options.max_seq_len, options.held_out, options.seed
    found = dataset.load(path, tokenizer, *sizes, INSTRUCTIONS, eval_path, options.of_pairs)
    sha256, eval_sha256 = files.sha256(path), eval_path and files.sha256(eval_path)
    if sha256 == eval_sha256:
        raise InputError(f"eval_data={eval_path} is what is trained on; leave it out, and a part is held out")
    training, held_out = found.training, found.held_out
    count = f"{len(training)} {'pairs' if options.of_pairs else 'samples'}"
    if not options.of_pairs:  # of which each is a sequence
        held_out = [[sample] for sample in held_out]
        training = pack(training, options.max_seq_len) if options.packing else [[sample] for sample in training]
        count += f" in {len(training)} sequences" if options.packing else ""
    summary = f"{found.what}: {count}, {len(held_out)} held out{found.notes}"
    return tokenizer, Data(training, held_out, found.questions, sha256, summary, eval_sha256)


# Figures


def keep_figures(run: Run, summary: dict[str, Any]) -> None:
    """Write summary.json, loss.png and, the first time that a run ends, its row, with the curves of its losses."""
    options, figures, lines = run.options, run.figures, run.log.lines()
    runs = {f"{name}_nats" if "loss" in name else name: [summary[name]] for name in FIGURES if name in summary}
    if "held_out_fall_95" in summary:
        low, high = summary["held_out_fall_95"]
        runs |= {"held_out_fall_low_nats": [low], "held_out_fall_high_nats": [high]}
    for name, unit in dpo.UNITS.items():  # each with its interval
        for part, value in zip(("", "_low", "_high"), summary.get(f"held_out_{name}", ()), strict=False):
            runs[f"held_out_{name}{part}_{unit}"] = [value]
    runs |= {"moved_share_x": [summary["moved_share"]], "step_s": figures.step_seconds}
    runs["samples"] = [sum(map(len, run.data.sequences))]
    runs["peak_memory_mb"] = [] if figures.peak_mb is None else [figures.peak_mb]
    held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    if "held_out_loss" in summary:
        held_out = [(0, summary["held_out_loss_before"]), *held_out, (run.total, summary["held_out_loss"])]
    series = {"loss_nats": [(line["step"], line["loss"]) for line in lines if "loss" in line]}
    # A user's records and texts stay in the run's directory.
    answers = [list(answer.values()) for answer in summary["answers"] if answer["instruction"] in INSTRUCTIONS]
    series |= {"held_out_loss_nats": held_out, "answers": answers}
    if options.data is None:
        asked = [list(answer.values()) for answer in summary.get("held_out_answers", [])[:N_SHOWN]]
        series["held_out_answers"] = [[alpaca.task(prompt), *texts] for prompt, *texts in asked]
    is_kept = options.results is not None and not figures.steps_before and not (options.root / "summary.json").exists()
    path = Path(options.results) if is_kept else None
    runs = {name: values for name, values in runs.items() if values}
    cell, dtype = cell_of(options, run.device), options.dtype
    experiment = path.stem if path is not None else "finetuning"
    row = row_files.record(path, experiment, cell, runs, run.device, dtype, options.seed, series)
    files.replace_json(options.root / "summary.json", summary)
    save_chart(row, options.root / "loss.png")


def cell_of(options: TrainingOptions, device: torch.device) -> dict[str, Any]:
    """What changes the figures of a run; rarer settings and the data only where they are not those of the preset."""
    directory = directory_of(options.ckpt_dir)
    cell = row_files.model_cell(name_of(directory), checkpoint.read_quantization(directory), options.adapter)
    cell |= {name: getattr(options, name) for name in CELL} | options.changed()
    if (n_processes := processes.world().size) > 1:
        cell |= {"processes": n_processes, "shard": options.shard}
    cell["kernels"] = train_ops.in_use(options.lean, device)
    if options.data is not None:
        cell |= {"data": data_file(options).name, "data_sha256": files.sha256(data_file(options))}
    if (path := eval_file(options)) is not None:
        cell |= {"eval_data": path.name, "eval_data_sha256": files.sha256(path)}
    return cell


def save_chart(row: row_files.Row, path: Path) -> None:
    """The loss curve, all at once."""
    (figure,) = charts.loss([row]).values()
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, dpi=150, format="png")
    scratch.replace(path)


if __name__ == "__main__":
    cli.run(main)
