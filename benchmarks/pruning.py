"""What pruning costs and saves: size against quality and against speed, one-shot beside iterative.

    python -m benchmarks.pruning                                      # everything, and the figures
    python -m benchmarks.pruning --parts=one-shot --methods=magnitude # some of it; the figures take the newest rows
    python -m benchmarks.pruning --parts=speed --model=llama3.2-1b    # a different shape, with random weights
    python -m benchmarks.pruning --ckpt_dir=models/smollm2-135m --data=wikitext2_valid_tokens.txt \
        --eval_data=wikitext2_test_tokens.txt --lr=1e-4 --share=0.9   # real weights: about an hour on two cores

Quality is the loss on text that is not trained on: of `--eval_data`, or of the embedded model's world. Iterative
pruning goes through all shares with `--steps` of fine-tuning after each cut. Its two rivals make the whole cut at once:
one then takes as many steps as the iterative one has taken until there, on the same samples (one-shot), the other those
of one round, as many as the iterative one has after its last cut (one-round). The dense model, fine-tuned as long as
the longest of them, shows what the steps do by themselves; and a cut by the norms of the weights, without fine-tuning,
what the inputs are good for that the other cuts look at, on the first samples of the text that trains.

Speed is that of taking hidden units or heads out: zeros in a dense matrix change none. All sizes take turns in shuffled
order; the limit of a decode step is the time in which the best reading kernel goes through its bytes in the same round.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, inputs, rows, stopwatch
from benchmarks import options as shared
from data import text
from data.tiny import directory_of, has_tokenizer, name_of
from llama import Llama, Transformer, checkpoint, cli, pruning
from llama import device as devices
from llama.cli import option
from llama.config import PRESETS
from llama.errors import InputError
from llama.tokenizer import Tokenizer, find_tokenizer
from llama.training.batch import Batch, collate
from llama.training.options import AMP
from llama.training.step import Settings, fine_tune
from reports import tables

PARTS = ("dense", "norm", "iterative", "one-shot", "one-round", "speed")
INPUT_LEN, OUTPUT_LEN = 256, 16
Measured = tuple[dict[str, Any], dict[str, list[float]]]  # cell and metrics of a row


@dataclass(frozen=True)
class Options(shared.DeviceOptions):
    """Measure what pruning costs in quality and saves in size and time."""

    parts: str = option(",".join(PARTS), "what to measure, separated by commas", choices=PARTS, several=True)
    methods: str = option(
        "dimensions,magnitude", "how to prune, separated by commas", choices=pruning.METHODS, several=True
    )
    share: float = option(0.75, "the most that is cut")
    rounds: int = option(6, "equal parts in which it is cut; each is a row", least=1)
    steps: int = option(12, "fine-tuning steps after each of them", least=1)
    batch_size: int = option(4, "sequences per step", least=1)
    lr: float = option(1e-3, "peak learning rate of AdamW")
    amp: str = option("none", "autocast of the fine-tuning: none, fp16 or bf16", choices=AMP)
    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    data: str | None = option(
        None, "a text file in UTF-8 to fine-tune on; the embedded model needs none: there is text of its world"
    )
    eval_data: str | None = option(None, "another, on whose start the loss is measured; default: the end of data")
    eval_tokens: int = option(8192, "tokens of a text file on which the loss is measured, at most", least=2)
    seq_len: int = option(256, "tokens of a sequence of a text file", least=2)
    model: str | None = option(
        None, "whose speed: a preset with random weights; default: the model of ckpt_dir", choices=PRESETS
    )
    figures: str | None = option(None, shared.FIGURES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_data is not None and self.data is None:
            raise InputError(f"--eval_data={self.eval_data}: needs --data, the text to fine-tune on")

    @property
    def directory(self) -> Path:
        return directory_of(self.ckpt_dir)


def main(options: Options) -> None:
    """Measure the parts, keep their rows, and show the newest rows of all parts."""
    for method in options.methods.split(","):
        for args in (checkpoint.read_args(options.directory), PRESETS.get(options.model)):
            if args is not None:
                pruning.check(args, method, options.share, options.rounds)
    device, half = devices.resolve_half(options.device)
    parts = options.parts.split(",")
    quality = Quality(options, device) if parts != ["speed"] else None
    path = options.results_file("pruning")
    rows.read_file(path)  # a damaged one is refused before anything is measured
    for part in parts:
        dtype = half if part == "speed" else torch.float32
        for cell, metrics in speed(options, device, half) if part == "speed" else quality.measure(part):
            rows.record(path, "pruning", cell, metrics, device, devices.dtype_name(dtype), options.seed)
    found = newest(path)
    shown = tables.pruning_quality(found) + tables.pruning_speed(found)
    shared.finish(path, "pruning", found, shown, options.figures)


def newest(path: Path) -> list[rows.Row]:
    """The last row of each part, method, share and model, of those from the device of the very last one.

    A run with other steps or another learning rate takes the place of the run before.
    """
    found: dict[tuple, rows.Row] = {}
    for row in rows.read_file(path):
        cell = row.cell
        if row.data["experiment"] != "pruning":
            continue
        key = (cell["part"], cell["method"], cell["share"], cell["model"], cell.get("steps") == 0, row.device_name)
        found.pop(key, None)
        found[key] = row
    return [row for row in found.values() if row.device_name == next(reversed(found.values())).device_name]


def load(options: Options, dtype: torch.dtype, device: torch.device) -> Transformer:
    model = checkpoint.load(options.directory, dtype, device)
    pruning.require_plain(model)
    return model


class Quality:
    """Losses of a model, cut and fine-tuned in several ways."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        settings = {"optimizer": "adamw", "schedule": "cosine", "warmup_steps": 2, "clip_norm": 1.0}
        self.settings = Settings(**settings, lr=options.lr, amp=options.amp)
        self.cell = {"model": name_of(options.directory), "batch_size": options.batch_size, "lr": options.lr}
        self.cell |= {"amp": options.amp} if options.amp != "none" else {}
        tokenizer = Tokenizer(find_tokenizer(options.directory, options.tokenizer_path))
        tokenizer.check_vocabulary(checkpoint.read_args(options.directory).vocab_size)
        if options.data is None:
            if not has_tokenizer(tokenizer):
                raise InputError("--data is missing; pass a text file to fine-tune on")
            self.text = text.of_embedded_model(tokenizer, options.batch_size, options.seed)
            return
        other, sizes = options.eval_data, (options.seq_len, options.batch_size, options.seed)
        files = Path(options.data), tokenizer, *sizes, other and Path(other)
        self.text = text.from_file(*files, options.eval_tokens)
        self.cell |= {"seq_len": options.seq_len, "eval_tokens": len(self.text.validation)}
        self.cell |= rows.text_cell(options.data)
        self.cell |= {f"eval_{name}": value for name, value in (rows.text_cell(other) if other else {}).items()}

    def measure(self, part: str) -> Iterator[Measured]:
        """The rows of one part."""
        if part == "dense":
            yield from self._dense()
            return
        share, rounds, steps = self.options.share, self.options.rounds, self.options.steps
        for method in self.options.methods.split(","):
            if part == "iterative":
                yield from self._cuts(part, method, share, rounds, steps)
                continue
            for number in range(1, rounds + 1):
                gone = share if number == rounds else share * number / rounds
                if part == "norm":
                    yield self._by_norm(method, gone)
                    continue
                yield from self._cuts(part, method, gone, 1, steps * (number if part == "one-shot" else 1))

    def _window(self, step: int) -> list[Batch]:
        return [collate([[sample] for sample in self.text.samples(step)])]

    def _dense(self) -> Iterator[Measured]:
        model, n_steps = load(self.options, torch.float32, self.device), self.options.steps * self.options.rounds
        yield self._measured(model, "dense", "none", 0.0, 0, loss_nats=self.text.loss(model))
        fine_tune(model, self._window, range(n_steps), self.settings)
        yield self._measured(model, "dense", "none", 0.0, n_steps, loss_nats=self.text.loss(model))

    def _by_norm(self, method: str, share: float) -> Measured:
        whole = load(self.options, torch.float32, self.device)
        args = whole.args
        model = pruning.cut(whole, method, share, args)
        share = pruning.gone(method, share, args)
        return self._measured(model, "norm", method, share, 0, loss_cut_nats=self.text.loss(model))

    def _cuts(self, part: str, method: str, share: float, rounds: int, steps: int) -> Iterator[Measured]:
        def train(rest: Transformer, number: int) -> None:
            numbers = range(steps * (number - 1), steps * number)
            fine_tune(rest, self._window, numbers, self.settings)

        whole, tokens = load(self.options, torch.float32, self.device), self.text.calibration()
        cuts = pruning.gradually(whole, method, share, rounds, train, self.text.loss, tokens)
        for number, cut in enumerate(cuts, 1):
            losses = {"loss_nats": cut.loss, "loss_cut_nats": cut.loss_cut}
            yield self._measured(cut.model, part, method, cut.share, steps * number, **losses)

    def _measured(
        self, model: Transformer, part: str, method: str, share: float, steps: int, **losses: float
    ) -> Measured:
        n_params = model.args.n_params()
        cell = {"part": part, "method": method, "share": share, "steps": steps, **self.cell}
        size = {"parameters": n_params, "stored_mb": 2 * n_params / devices.MB}
        size["zeros"] = pruning.count_zeros(model)[0]
        return cell, rows.by_metric([size | losses])


def speed(options: Options, device: torch.device, dtype: torch.dtype) -> Iterator[Measured]:
    """First token and decode step of a model at each size."""
    if options.model is None:
        whole = load(options, dtype, device)
    else:
        whole = Transformer.random(PRESETS[options.model], dtype, device, options.seed).eval()
    shares = [options.share * number / options.rounds for number in range(options.rounds + 1)]
    methods = [method for method in options.methods.split(",") if method in pruning.PARTS]
    sizes = {
        (method, gone): pruning.cut(whole, method, gone, whole.args) if gone else whole
        for method in methods
        for gone in shares
    }
    prompts = inputs.random_prompts(whole.args.vocab_size, 1, INPUT_LEN, options.seed)
    models = {size: Llama(model, None, INPUT_LEN + OUTPUT_LEN, 1) for size, model in sizes.items()}
    runs: dict[tuple[str, float], list[dict[str, float]]] = {size: [] for size in models}
    order = random.Random(options.seed)
    for llama in models.values():
        time_generation(llama, prompts)  # warm up
    for _ in range(options.repeats):
        for size in order.sample(list(models), len(models)):
            runs[size].append(time_generation(models[size], prompts))
    for (method, gone), llama in models.items():
        cell = {"part": "speed", "method": method, "share": pruning.gone(method, gone, whole.args) if gone else 0.0}
        cell["model"] = options.model or name_of(options.directory)
        cell |= {"input_len": INPUT_LEN, "output_len": OUTPUT_LEN, "batch_size": 1, "decoding": llama.decoder.name}
        n_params = llama.model.args.n_params()
        stored = {"parameters": [n_params], "stored_mb": [n_params * dtype.itemsize / devices.MB]}
        yield cell, stored | rows.by_metric(runs[method, gone])


def time_generation(llama: Llama, prompts: list[list[int]]) -> dict[str, float]:
    """Times to the first token and per token after it, and the least that the second can be right now."""
    model = llama.model
    bandwidth = max(hardware.read_bandwidth(model).values())
    n_bytes = hardware.decode_bytes(model, 1, INPUT_LEN + OUTPUT_LEN // 2)
    times, _ = stopwatch.measure_generation(
        lambda on_step: llama.generate(prompts, OUTPUT_LEN, 0, on_step=on_step), OUTPUT_LEN, llama.device
    )
    return {"ttft_s": times["ttft_s"], "tpot_s": times["tpot_s"], "floor_tpot_s": n_bytes / bandwidth}


if __name__ == "__main__":
    cli.run(main)
