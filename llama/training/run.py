"""A fine-tuning run: a directory that a training fills, which may stop at any moment and resumes to the same bytes.

    settings.json   the options, and what identifies data and base model
    loss.jsonl      one line per step
    snapshots/      see snapshot.py
    adapter/ merged/ merged-hf/ summary.json    at the end

Left out on purpose: the loop (finetuning.py), the step (step.py), where samples come from (data/dataset.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama import Llama, Tokenizer, adapters, checkpoint, files, lora, order, processes, pruning
from llama import device as devices
from llama.errors import EnvironmentFailure, InputError, NonFinite, Stopped
from llama.evaluation.intervals import LEAST_PIECES, confidence
from llama.quantization import Quantization
from llama.training import batch, dpo, memory, qat, several, snapshot, verdict
from llama.training.options import SETTINGS, TrainingOptions
from llama.training.step import (
    Evaluation,
    Movement,
    Report,
    Trainer,
    checkpoint_layers,
    checkpointed_layers,
    evaluate,
    require_same,
)

MAX_ASKED = 20  # held-out samples whose answers are compared with the reference
EXPORTS = {"meta": {"merged": "meta"}, "hf": {"merged-hf": "hf"}, "none": {}}  # what is written, in which layouts
EXPORTS["gguf"] = {"merged.gguf": "gguf"}
EXPORTS["both"] = EXPORTS["meta"] | EXPORTS["hf"]


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; the next one has its usual effect.

    Of several processes all must stop after the same step: `agreed`, once one has told the others. torchrun passes a
    Ctrl-C on to them, which they get from the terminal, too; so there the next one has no effect.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_alone, self.agreed = processes.world().size == 1, False

    def __call__(self) -> bool:
        return self.received is not None if self.is_alone else self.agreed

    @contextmanager
    def caught(self) -> Iterator[StopSignal]:
        """Watch for the signals inside the block."""
        usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in usual.items():
                signal.signal(number, handler)

        def receive(number: int, _: Any) -> None:
            self.received = self.received or number
            if self.is_alone:
                restore()

        for number in usual:
            signal.signal(number, receive)
        try:
            yield self
        finally:
            restore()


class Log:
    """loss.jsonl: one line per step, by the first process.

    Holds no times, so that a resumed run writes the bytes of an uninterrupted one.
    """

    def __init__(self, path: Path, is_written: bool) -> None:
        self.path, self.is_written = path, is_written

    def start(self, n_bytes: int = 0) -> None:
        """Go on after the first `n_bytes`; what a later, lost part of the run wrote is cut off."""
        if not self.is_written:
            return
        files.require_no_device(self.path)
        present = self.path.stat().st_size if self.path.exists() else 0
        if present < n_bytes:
            raise InputError(f"{self.path} has {present} bytes, the snapshot was taken at {n_bytes}; restore the file")
        with self.path.open("ab") as file:
            file.truncate(n_bytes)

    def append(self, line: dict[str, Any]) -> None:
        if not self.is_written:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def commit(self) -> int:
        """Bring everything to the disk; return the size in bytes."""
        if not self.is_written:
            return 0
        files.sync(self.path)
        return self.path.stat().st_size

    def lines(self) -> list[dict[str, Any]]:
        """Raises InputError for one that `append` did not write."""
        lines = []
        for number, text in enumerate(files.read_text(self.path).splitlines(), 1):
            try:
                line = files.parse_json(text.encode())
                is_step = isinstance(line, dict) and files.fits(line.get("step"), int)
            except (ValueError, RecursionError):
                is_step = False
            if not is_step:
                raise InputError(f"{self.path}:{number}: is not what a step has written; restore the file")
            lines.append(line)
        return lines


@dataclass
class Figures:
    """Time, tokens and peak memory of the steps, over all processes that took them.

    peak_bytes: of the steps alone, over what the process held before it loaded the model; None: not measurable here.
    steps_before: those of which nothing is known, because a version that kept no figures took them.
    """

    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_bytes: int | None = None
    steps_before: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / sum(self.step_seconds)

    @property
    def peak_mb(self) -> float | None:
        return None if self.peak_bytes is None else self.peak_bytes / devices.MB


@dataclass
class Data:
    """What a run trains on, and what it is measured by.

    sequences, held_out: of one sample each; of several where they are packed; of a pair's chosen and rejected sample.
    questions: ids of the prompt, by instruction; of the first held-out samples, the prompts are asked, too. sha256: of
    the file; eval_sha256: of that of the held-out samples, where they have one of their own. summary: for people.
    """

    sequences: Sequence[Sequence[batch.Sample]]
    held_out: Sequence[Sequence[batch.Sample]]
    questions: dict[str, list[int]]
    sha256: str
    summary: str
    eval_sha256: str | None = None


class Run:
    """A training with its data, and the directory that holds it; nothing is written before `begin` or `restore`.

    directory: of the base model. Raises InputError for what cannot be trained.
    """

    def __init__(
        self, options: TrainingOptions, directory: Path, tokenizer_file: Path, tokenizer: Tokenizer, data: Data
    ) -> None:
        self.options, self.data, self.tokenizer, self.tokenizer_file = options, data, tokenizer, tokenizer_file
        self.me = processes.start()
        if self.me.size > 1:
            require_shareable(options)
        self.root, self.figures = options.root, Figures()
        self.log = Log(options.root / "loss.jsonl", self.me.is_first)
        self.device, dtype = devices.resolve(options.device, options.dtype)
        if options.amp == "bf16" and not devices.computes_bf16(self.device):
            raise InputError("amp=bf16: this GPU has no bfloat16 arithmetic; use fp16")
        self.quantized = checkpoint.read_quantization(directory)
        is_shared = options.shard and self.me.size > 1
        if is_shared and self.quantized is not None:
            raise InputError(f"shard=True: {directory} is quantized, and codes stay whole; use shard=False")
        if self.quantized is not None:
            require_adapters_alone(options, directory)
        args = checkpoint.read_args(directory)
        self.rounding = rounding_of(options, args)
        self.directory, self.adapter_sha256 = directory, None
        self.lora = options.lora_config if options.lora else None
        if options.adapter is not None:
            self._take_over(options.adapter, args)
        tokenizer.check_vocabulary(args.vocab_size)
        self.layers = self._plan_memory(args, dtype)
        devices.return_freed_memory()
        self._baseline = devices.memory_bytes(self.device)
        self.model = checkpoint.load(directory, dtype, "cpu" if is_shared else self.device, progress=True)
        self.base = checkpoint.fingerprint(directory)
        if options.adapter is not None:
            adapters.load(self.model, options.adapter, None if options.any_base else lambda: self.base)
            for module in lora.layers(self.model).values():
                module.dropout.p = options.dropout
        elif self.lora is not None and self.rounding is None:
            lora.apply(self.model, self.lora, options.seed)
        else:
            self.model.requires_grad_(True)
        if options.keep_zeros:
            pruning.keep_zeros(self.model)
        if self.rounding is not None:
            start = options.qat_start and checkpoint.load(options.qat_start, dtype, self.device, progress=True)
            qat.begin(self.model, self.rounding, start, progress=True)
            if self.lora is not None:
                qat.adapt(self.model, self.lora, options.seed)
        checkpoint_layers(self.model, self.layers)
        if is_shared:
            several.shard(self.model, self.device)
        self.per_epoch = order.steps_per_epoch(len(data.sequences), options.batch_size * options.accumulation)
        self.total = min(self.per_epoch * options.epochs, options.max_steps or math.inf)
        self.eval_every = options.eval_every or max(1, self.total // 4)
        self.trainer = self._make_trainer()
        max_seq_len = options.max_seq_len + verdict.ANSWER_LEN
        self.llama = Llama(self.model, tokenizer, max_seq_len=max_seq_len, decoding="eager")
        asked = [(sequence[0].tokens, sequence[0].answers[0]) for sequence in data.held_out]
        asked = [(tokens, answer) for tokens, answer in asked if answer.start > 1][:MAX_ASKED]  # texts ask nothing
        self.prompts = [*data.questions.values(), *(list(tokens[: answer.start]) for tokens, answer in asked)]
        self.references = [tokenizer.decode(tokens[answer.start : answer.stop - 1]).strip() for tokens, answer in asked]

    def _make_trainer(self) -> Trainer:
        settings = self.model, self.options, self.total
        if not self.options.of_pairs:
            return Trainer(*settings)
        return dpo.PreferenceTrainer(*settings, [sample.name for pair in self.data.sequences for sample in pair])

    def _take_over(self, adapter: str, args: checkpoint.ModelArgs) -> None:
        """Make rank, alpha and targets of the adapter to go on from those of this run; dropout is the run's own."""
        folder, *others = adapters.folders(adapter)
        if others:
            raise InputError(f"adapter={adapter}: training goes on from one; merge the others into the base first")
        self.adapter_sha256 = adapters.fingerprint(adapter)
        self.lora = dataclasses.replace(adapters.read_config(folder, args), dropout=self.options.dropout)
        targets = ",".join(self.lora.targets)
        self.options = dataclasses.replace(self.options, r=self.lora.r, alpha=self.lora.alpha, targets=targets)

    def _plan_memory(self, args: checkpoint.ModelArgs, dtype: torch.dtype) -> list[int]:
        """The layers to recompute; also estimates the peak of a step on the longest samples."""
        options = self.options
        tokens = max(sum(len(sample.tokens) for sample in sequence) for sequence in self.data.sequences)
        labels = max(
            sum(len(answer) for sample in sequence for answer in sample.answers) for sequence in self.data.sequences
        )
        size = options.batch_size
        shape = memory.Shape(size, tokens, size * labels, min(2, options.accumulation))
        training = args, dtype, self.lora, options, shape
        where = {"quantized": self.quantized, "device_type": self.device.type}
        layers = checkpointed_layers(options.checkpointing, args.n_layers)
        if options.checkpoint_budget_gb is not None:
            layers = memory.plan(memory.profile(*training, **where), options.checkpoint_budget_gb * 1e9)
        self.expected = memory.estimate(*training, tuple(layers), **where)
        return layers

    def describe(self) -> str:
        """The settings in a few lines."""
        options = self.options
        n_trained, n_all = lora.trainable_share(self.model)
        name = options.ckpt_dir or "embedded model"
        name += f", int{self.quantized.bits}" if self.quantized is not None else ""
        method = f"LoRA r={options.r}, alpha={options.alpha:g}, dropout={options.dropout:g} on {options.targets}"
        method += f", from {options.adapter}" if options.adapter is not None else ""
        method = method if options.lora else "all weights"
        method += f" through {self.rounding.name}" if self.rounding is not None else ""
        held = ", ".join(f"{name} {size / devices.MB:,.0f}" for name, size in self.expected.at_peak.items() if size)
        how = "weights in shares" if options.shard else "copies of the weights"
        together = f", over {self.me.size} processes, {how}" if self.me.size > 1 else ""
        averaged = options.loss_normalization
        if options.of_pairs:
            averaged = f"{averaged.replace('tokens', 'pairs')}, of dpo with beta {options.beta:g}"
        alone = " of one process alone" if self.me.size > 1 and options.shard else ""
        context = self.model.args.trained_context
        longest = max(len(sample.tokens) for sequence in self.data.sequences for sample in sequence)
        beyond = f"warning    samples reach {longest} tokens, but the model is meant for {context}"
        return "\n".join(
            (
                *[beyond] * (longest > context),
                f"model      {name}, {options.dtype} on {devices.device_name(self.device)}, seed {options.seed}",
                f"training   {method}, amp {options.amp}, "
                f"{len(self.layers)} of {self.model.args.n_layers} layers checkpointed{', lean' * options.lean}",
                f"trainable  {n_trained:,} of {n_all:,} parameters ({n_trained / n_all:.4%})",
                f"optimizer  {options.optimizer}, lr {options.lr:g} {options.schedule}, "
                f"warm-up {options.warmup_steps}, loss averaged over {averaged}",
                f"memory     {self.expected.peak / devices.MB:,.0f} MB expected at the peak of a step{alone}: {held}",
                f"data       {self.data.summary}",
                f"steps      {self.total} of {options.accumulation} x {options.batch_size} sequences{together}; "
                f"an epoch has {self.per_epoch}; kept in {self.root}",
            )
        )

    # The directory

    def begin(self) -> None:
        """Start anew: what the untrained model does, and a first snapshot, so that a full disk shows at once."""
        identity = {f"{name}_sha256": value for name, value in self._identity().items()}
        processes.require_same("data or model", repr(identity).encode())
        self.run_id = secrets.token_hex(8)
        if self.me.is_first:
            self._check_disk()
            shutil.rmtree(self.root / "snapshots", ignore_errors=True)
            options = {"options": self.options.kept(), "places": self.options.places()}
            files.replace_json(self.root / SETTINGS, {"run_id": self.run_id, **options, **identity})
        self.log.start()
        torch.manual_seed(self.options.seed)
        self.movement = Movement(self.trainer.weights)
        self.before = None
        self.before = self.evaluate()
        if self.options.of_pairs:
            dpo.begin(self.trainer, _one_by_one(self.data.sequences))
        self.answers_before = verdict.answer(self.llama, self.prompts)
        self.save()

    def _identity(self) -> dict[str, str | None]:
        """What the run is made of, by content (sha256)."""
        return {
            "data": self.data.sha256,
            "eval_data": self.data.eval_sha256,
            "base": self.base,
            "adapter": self.adapter_sha256,
            "qat_start": self.options.qat_start and checkpoint.fingerprint(self.options.qat_start),
            "tokenizer": files.sha256(self.tokenizer_file),
        }

    def _check_disk(self) -> None:
        """Raise EnvironmentFailure where snapshots and exports would not fit."""
        copies = {"sgd": 2 if self.options.momentum else 1, "adamw": 3}[self.options.optimizer]
        trained = sum(weight.nbytes for weight in self.trainer.weights.values())
        whole = sum(weight.nbytes for weight in self.model.parameters())
        needed = trained * (copies * (self.options.keep + 1) + 1) + len(EXPORTS[self.options.export]) * whole
        free = shutil.disk_usage(self.root).free
        if free < needed:
            gigabytes = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise EnvironmentFailure(f"{self.root}: the run needs {gigabytes}; choose another out_dir or export=none")

    def restore(self) -> None:
        """Go on from the newest whole snapshot of this run."""
        about = files.read_json(self.root / SETTINGS)
        self.run_id = about.get("run_id")
        for name, now in self._identity().items():
            was = about.get(f"{name}_sha256", now if name == "tokenizer" else None)  # older runs do not tell it
            if was != now:
                option = {"base": "ckpt_dir", "tokenizer": "tokenizer_path"}.get(name, name)
                if was is None and name in ("eval_data", "adapter", "qat_start"):
                    raise InputError(f"{self.root} was started without {option}; leave it out, or start a new run")
                reason = f"is not what the run was started with (sha256 {str(was)[:12]}, now {str(now)[:12]})"
                raise InputError(f"{option} {reason}; pass {option}=PATH of that, if it is elsewhere")
        path, saved, passed_over = snapshot.latest(self.root / "snapshots", self.run_id)
        for line in passed_over:
            print(f"passed over: {line}")
        missing = {"start", "before", "answers_before", "log_bytes"} - {*saved.tensors, *saved.state}
        if missing:
            raise InputError(f"{path}: has no {', '.join(sorted(missing))}; it is not of this version")
        self._restore_what_is_beside(path / snapshot.STATE, saved.state)
        self.movement = Movement(self.trainer.weights)
        require_same("start", self.movement.start, saved.tensors["start"])
        self.movement.start = {name: tensor.to(self.device) for name, tensor in saved.tensors["start"].items()}
        self.trainer.restore(saved)
        self.log.start(saved.state["log_bytes"])
        done = self.trainer.progress.windows
        print(f"resumed    after step {done}")

    def _restore_what_is_beside(self, place: Path, state: dict[str, Any]) -> None:
        """Figures and answers; a snapshot comes with the run's directory, which anybody may have made."""
        done = state.get("progress")
        done = done.get("windows") if isinstance(done, dict) else None
        figures = state.get("figures", {"steps_before": done})  # older snapshots have none
        self.figures = files.from_json(Figures, figures, f"{place}:figures")
        kind = dpo.Preferences if self.options.of_pairs else Evaluation
        self.before = files.from_json(kind, state["before"], f"{place}:before")
        if any(len(values) != len(self.data.held_out) for values in vars(self.before).values()):
            raise InputError(f"{place}:before: is not of the {len(self.data.held_out)} samples that are held out")
        answers, log_bytes = state["answers_before"], state["log_bytes"]
        fields = {"text": str, "ended": bool}
        whole = files.fits(answers, list[dict]) and all(
            [type(answer.get(name)) for name in fields] == [*fields.values()] for answer in answers
        )
        if not whole or len(answers) != len(self.prompts):
            raise InputError(f"{place}:answers_before: is not an answer to each of {len(self.prompts)} prompts")
        if not files.fits(log_bytes, int) or log_bytes < 0:
            raise InputError(f"{place}:log_bytes: is not a number of bytes")
        self.answers_before = answers

    def save(self) -> None:
        """Keep everything that resuming needs."""
        content = self.trainer.snapshot()
        content.tensors["start"] = self.movement.start
        content.state |= {
            "log_bytes": self.log.commit(),
            "before": dataclasses.asdict(self.before),
            "answers_before": self.answers_before,
            "figures": dataclasses.asdict(self.figures),
        }
        step = self.trainer.progress.windows
        snapshot.save(self.root / "snapshots", step, content, self.run_id, self.options.keep)
        processes.wait()  # for what the first one writes: it is there for all of them, or the run has ended

    def save_and_stop(self, stop: StopSignal) -> None:
        """Raise Stopped, when everything is kept."""
        self.save()
        done = f"after step {self.trainer.progress.windows} of {self.total}"
        received = stop.received or signal.SIGTERM  # another process may have got it
        name = signal.Signals(received).name
        raise Stopped(f"stopped by {name} {done}, saved in {self.root}; resume=True continues it", received)

    # Between the steps

    def window(self) -> list[batch.Batch]:
        """The micro-batches of the next step, of all processes."""
        options = self.options
        sizes = (options.batch_size, options.accumulation, options.seed)
        return batch.window(self.data.sequences, self.trainer.progress.windows, *sizes, self.tokenizer.pad_id)

    def share_out(self, window: list[batch.Batch]) -> Iterator[tuple[int, batch.Batch]]:
        """The micro-batches of this process, with their numbers in the window."""
        if self.me.size == 1:
            return enumerate(window)
        return several.share_out(window, self.me, self.options.shard)

    def sum_over_processes(self, loss: torch.Tensor | float, stop: StopSignal) -> torch.Tensor | float:
        """Add up the gradients of a window's shares; its loss."""
        if self.me.size > 1:
            is_asked = stop.received is not None
            loss, stop.agreed = several.sum_over_processes([*self.trainer.weights.values()], loss, is_asked)
        return loss

    def start_clock(self) -> None:
        """A step begins."""
        self._peak_is_known = devices.reset_peak_memory(self.device)
        self._began = time.perf_counter()

    def log_step(self, report: Report, names: list[str], bar: tqdm) -> None:
        """A step has ended. names: of its samples. Raises NonFinite where the first has moved no weight."""
        figures, progress = self.figures, self.trainer.progress
        figures.step_seconds.append(time.perf_counter() - self._began)
        figures.tokens += report.tokens
        peak = devices.peak_memory_bytes(self.device) if self._peak_is_known else None
        if peak is not None:
            figures.peak_bytes = max(figures.peak_bytes or 0, peak - self._baseline)
        line = {
            "step": progress.windows,
            "epoch": (progress.windows - 1) // self.per_epoch,
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm if math.isfinite(report.grad_norm or 0) else None,
            "label_tokens": report.label_tokens,
            "skipped": report.skipped,
            "samples": names,
            **report.figures,
        }
        self.log.append(line)
        first = progress.steps == 1 and not report.skipped
        if first and report.lr > 0 and report.grad_norm != 0 and self.movement.share() == 0:
            raise NonFinite(f"lr={report.lr:g}: no weight moved in the first step; updates are below its resolution")
        bar.update()
        peak = "" if figures.peak_mb is None else f", peak {figures.peak_mb:,.0f} MB"
        skipped = f", {progress.skipped} skipped" if progress.skipped else ""
        rate = f"{figures.tokens_per_s:,.0f} tokens/s{peak}{skipped}"
        bar.set_postfix_str(f"loss {report.loss:.3f}, lr {report.lr:.2g}, {rate}")

    def look(self, bar: tqdm) -> None:
        """Held-out loss and answers on the way."""
        step, n = self.trainer.progress.windows, len(self.data.questions)
        answers = verdict.answer(self.llama, self.prompts[:n])
        if self.data.held_out:
            loss = self.evaluate().loss
            self.log.append({"step": step, "held_out_loss": loss})
            bar.write(f"step {step}: held-out loss {loss:.4f}")
        for question, answer in zip(self.data.questions, answers, strict=True):
            bar.write(f"step {step}: {question} -> {' '.join(answer['text'].split())}")

    def evaluate(self) -> Evaluation | dpo.Preferences:
        """The loss of the held-out samples or pairs, each by itself."""
        held_out = _one_by_one(self.data.held_out)
        if self.options.of_pairs:
            return dpo.evaluate(self.trainer, held_out, self.before)
        return evaluate(self.trainer, held_out)

    # The end

    def finish(self) -> dict[str, Any]:
        """Compare before and after, say whether it learned, and write what the run was for; return its summary."""
        options, figures, progress = self.options, self.figures, self.trainer.progress
        after, answers = self.evaluate(), verdict.answer(self.llama, self.prompts)
        has_enough = options.of_pairs and len(after.counts) >= LEAST_PIECES
        preferences = dpo.figures(self.before, after, options.beta) if has_enough else {}
        print(verdict.compared(list(self.data.questions), self.references, self.answers_before, answers))
        lines = verdict.verdict(options, self.model.args.vocab_size, self.before, after, self.movement.share())
        if preferences:
            lines += dpo.describe(preferences, len(after.counts))
        if progress.skipped:
            lines.append(f"{progress.skipped} of {self.total} steps overflowed in fp16 and were skipped.")
        peak = "is not measurable here" if figures.peak_mb is None else f"{figures.peak_mb:,.0f} MB"
        lines.append(f"Peak memory of a step {peak}; {self.expected.peak / devices.MB:,.0f} MB were expected.")
        if figures.steps_before:
            lines.append(f"Time and memory of the first {figures.steps_before} steps are not known: no row is kept.")
        summary = self._summary(after, answers) | preferences
        print("\n".join([*lines, *self.export()]))
        return summary

    def _summary(self, after: Evaluation, answers: list[verdict.Answer]) -> dict[str, Any]:
        """What summary.json holds."""
        progress, figures = self.trainer.progress, self.figures
        summary = {
            "steps": progress.steps,
            "skipped": progress.skipped,
            "label_tokens": progress.label_tokens,
            "moved_share": self.movement.share(),
            "tokens_per_s": figures.tokens_per_s if figures.step_seconds else None,
            "peak_memory_mb": figures.peak_mb,
            "expected_peak_memory_mb": self.expected.peak / devices.MB,
            "answers": [
                {"instruction": question, "before": old["text"], "after": new["text"]}
                for question, old, new in zip(self.data.questions, self.answers_before, answers, strict=False)
            ],
        }
        if self.data.held_out:
            n = len(self.data.questions)
            right = [verdict.count_right(found[n:], self.references) for found in (self.answers_before, answers)]
            summary |= {"held_out_loss_before": self.before.loss, "held_out_loss": after.loss}
            if len(after.counts) >= LEAST_PIECES:
                summary |= {"held_out_fall_95": confidence(self.before, after)}
            summary |= {"held_out_right_before": right[0], "held_out_right": right[1]}
            summary["held_out_asked"] = len(self.references)
            asked = zip(self.prompts[n:], self.references, self.answers_before[n:], answers[n:], strict=True)
            summary["held_out_answers"] = [
                {"prompt": self.tokenizer.decode(prompt), "reference": reference}
                | {"before": old["text"], "after": new["text"]}
                for prompt, reference, old, new in asked
            ]
        return summary

    def export(self) -> list[str]:
        """Write adapter and merged models, where a run that was resumed after its end has none yet; say where."""
        options, lines, adapter = self.options, [], self.root / "adapter"
        self._put_together()
        if not self.me.is_first:
            return []
        has_adapter = options.lora and self.rounding is None
        if has_adapter and not adapter.exists():
            adapters.save(self.model, self.lora, adapter, self.base, str(self.directory.resolve()))
        if has_adapter and options.export != "none":
            lost = lora.merge(self.model)
            lora.remove(self.model)
            if lost > 0.01:
                lines.append(f"Merging in {options.dtype} lost {lost:.0%} of the update to rounding; keep the adapter.")
        if options.keep_zeros:
            zeros, n_all = pruning.count_zeros(self.model)
            lines.append(f"{zeros:,} of {n_all:,} weights of the projections are zero, as before.")
            pruning.remove_masks(self.model)
        if self.rounding is not None:
            qat.finish(self.model, self.rounding)
        for name, layout in EXPORTS[options.export].items():
            if not (self.root / name).exists():
                checkpoint.save(self.model, self.root / name, layout, self.tokenizer_file)
        names = [*["adapter"] * has_adapter, *EXPORTS[options.export]]
        return lines + [f"{name:<10} {self.root / name}" for name in names]

    def _put_together(self) -> None:
        """Where each process has a share, give the first one the whole model, in main memory."""
        if not any(map(several.is_share, self.trainer.weights.values())):
            return
        trained = {}
        for name, weight in self.trainer.weights.items():
            whole = several.whole(weight.detach())  # all of them ask for it, and one keeps it
            if self.me.is_first:
                trained[name] = whole.cpu()
        if not self.me.is_first:
            return
        self.model = checkpoint.load(self.directory, self.model.dtype, "cpu")
        if self.lora is not None:
            lora.apply(self.model, self.lora, self.options.seed)
        with torch.no_grad():
            for name, weight in trained.items():
                self.model.get_parameter(name).copy_(weight)


def _one_by_one(sequences: Sequence[Sequence[batch.Sample]]) -> list[batch.Batch]:
    return [batch.collate([sequence]) for sequence in sequences]


def require_shareable(options: TrainingOptions) -> None:
    """Raise InputError for what several processes cannot do together."""
    if options.lean and not options.lora:
        raise InputError(
            "lean=True moves all weights inside the backward pass, before processes could add up; use lora=True"
        )
    refused = {"lean": options.lean, "qat": options.qat, "keep_zeros": options.keep_zeros}
    for name, value in refused.items():
        if options.shard and value:
            raise InputError(f"{name}={value} needs whole weights in every process; use shard=False")
    if options.shard and options.loss_normalization != "tokens":
        raise InputError(f"loss_normalization={options.loss_normalization} with shard=True: use tokens")


def rounding_of(options: TrainingOptions, args: checkpoint.ModelArgs) -> Quantization | None:
    """The format that weights are trained through. Raises InputError where qat_start holds no codes for this model."""
    if options.qat_start is None:
        return qat.FORMATS.get(options.qat)
    found, place = checkpoint.read_quantization(options.qat_start), f"qat_start={options.qat_start}"
    if found is None or found.bits != options.qat:
        raise InputError(f"{place} holds no codes of {options.qat} bits; make them with compress.py quantize")
    if checkpoint.read_args(options.qat_start) != args:
        raise InputError(f"{place} holds a different model; quantize the one that is trained")
    return found


def require_adapters_alone(options: TrainingOptions, directory: Path) -> None:
    """Raise InputError for what the codes of a quantized base do not allow."""
    if options.qat is not None:
        raise InputError(f"qat={options.qat}: {directory} is quantized already; train the original")
    if not options.lora:
        raise InputError(f"lora=False: {directory} is quantized; codes cannot be trained, use LoRA or the original")
    if options.export != "none":
        raise InputError(
            f"export={options.export}: an adapter cannot be merged into the quantized weights of {directory}; use "
            "export=none, the adapter is kept, and compress.py merges it into the original"
        )
