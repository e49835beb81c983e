"""What pruning costs and saves: size against quality and against speed, one-shot beside iterative.

    python -m benchmarks.pruning                                      # everything, and the figure
    python -m benchmarks.pruning --parts=one-shot --methods=magnitude # some of it; the figure takes the newest rows
    python -m benchmarks.pruning --parts=speed --model=llama3.2-1b    # of another shape, with random weights

Quality is measured on the embedded model, on text of its world that it was not trained on. Iterative pruning goes
through all shares with `--steps` of fine-tuning after each cut. Its two rivals make the whole cut at once: one then
takes as many steps as the iterative one has taken until there, on the same rows (one-shot), the other those of one
round, as many as the iterative one has after its last cut (one-round). The dense model, fine-tuned as long as the
longest of them, shows what the steps do by themselves.

Speed is that of taking hidden units out: zeros in a dense matrix change none. All sizes take turns in shuffled order;
the floor of a decode step is the time in which the best reading kernel goes through its bytes in the same round.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware as floors
from benchmarks import rows as row_files
from benchmarks import stopwatch
from data import text
from llama import Llama, Transformer, checkpoint, cli, pruning
from llama import device as devices
from llama.config import PRESETS
from llama.errors import InputError
from llama.tokenizer import Tokenizer
from llama.training.batch import Batch, collate
from llama.training.step import Settings
from llama.training.step import fine_tune as train
from reports import tables
from reports.render import markdown

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "data" / "tiny"
RESULTS = ROOT / "reports" / "results" / "pruning.jsonl"
FIGURE = ROOT / "reports" / "figures" / "pruning.png"
PARTS = ("dense", "iterative", "one-shot", "one-round", "speed")
INPUT_LEN, OUTPUT_LEN = 256, 16


def main(
    *,
    parts: str = "dense,iterative,one-shot,one-round,speed",
    methods: str = "dimensions,magnitude",
    share: float = 0.75,
    rounds: int = 6,
    steps: int = 12,
    batch_size: int = 4,
    lr: float = 1e-3,
    model: str = "tiny",
    repeats: int = 5,
    device: str = "auto",
    seed: int = 1,
    results: str | None = None,
    figure: str | None = None,
) -> None:
    """Measure what pruning costs in quality and saves in size and time.

    Args:
        parts: of dense, iterative, one-shot, one-round and speed.
        methods: of dimensions and magnitude.
        share: the most that is cut.
        rounds: equal parts in which it is; each is a row.
        steps: fine-tuning steps after each of them.
        batch_size: rows of 256 tokens in a step.
        lr: peak learning rate of AdamW.
        model: whose speed: tiny, with its weights, or another preset with random ones.
        repeats: timed runs of each size.
        device: auto, cpu, cuda or cuda:N.
        seed: of rows, random weights and the order of runs.
        results: file that the measured rows are appended to; default: reports/results/pruning.jsonl.
        figure: file of the plot, made of the newest rows in results; default: reports/figures/pruning.png.
    """
    wanted, chosen = check_flags(parts, methods, share, rounds, steps, batch_size, model, repeats)
    path = Path(results) if results is not None else RESULTS
    row_files.require_writable(path)
    newest(path)  # a file that cannot be read is refused before anything is measured
    target, dtype = devices.resolve(device, "bfloat16" if devices.resolve(device)[0].type == "cpu" else "auto")
    quality = Quality(share, rounds, steps, batch_size, lr, target, seed)
    for part in wanted:
        if part == "speed":
            name, measured = (
                str(dtype).removeprefix("torch."),
                speed(model, share, rounds, repeats, target, dtype, seed),
            )
        else:
            name, measured = "float32", quality.measure(part, chosen)
        for cell, metrics in measured:
            row_files.append_row(path, "pruning", cell, metrics, target, name, seed)
    rows = newest(path)
    shown = [row_files.Row(path.name, 0, row) for row in rows]
    print(markdown([*tables.pruning_quality(shown), *tables.pruning_speed(shown)]))
    plot(rows, Path(figure) if figure is not None else FIGURE)


def check_flags(
    parts: str, methods: str, share: float, rounds: int, steps: int, batch_size: int, model: str, repeats: int
) -> tuple[list[str], list[str]]:
    """Parts and methods. Raises InputError for what cannot be measured."""
    wanted, chosen = cli.choices("parts", parts, PARTS), cli.choices("methods", methods, pruning.METHODS)
    cli.require_at_least(1, rounds=rounds, steps=steps, batch_size=batch_size, repeats=repeats)
    cli.require_one_of("model", model, PRESETS)
    for method in chosen:
        pruning.check(PRESETS[model], method, share, rounds)
        pruning.check(PRESETS["tiny"], method, share, rounds)
    return wanted, chosen


Row = tuple[dict[str, Any], dict[str, Any]]


class Quality:
    """Losses of the embedded model, cut and fine-tuned in several ways."""

    def __init__(
        self, share: float, rounds: int, steps: int, batch_size: int, lr: float, device: torch.device, seed: int
    ) -> None:
        self.share, self.rounds, self.steps, self.device = share, rounds, steps, device
        self.settings = Settings(optimizer="adamw", lr=lr, schedule="cosine", warmup_steps=2, clip_norm=1.0)
        self.text = text.of_embedded_model(Tokenizer(EMBEDDED / "tokenizer.model"), batch_size, seed)
        self.fixed = {"model": "tiny", "batch_size": batch_size, "lr": lr}

    def measure(self, part: str, methods: list[str]) -> Iterator[Row]:
        """The rows of one part."""
        if part == "dense":
            yield from self._dense()
            return
        for method in methods:
            if part == "iterative":
                yield from self._cuts(part, method, self.share, self.rounds, self.steps)
                continue
            for number in range(1, self.rounds + 1):
                share = self.share if number == self.rounds else self.share * number / self.rounds
                yield from self._cuts(part, method, share, 1, self.steps * (number if part == "one-shot" else 1))

    def _load(self) -> Transformer:
        return checkpoint.load(EMBEDDED, torch.float32, self.device)

    def _window(self, step: int) -> list[Batch]:
        return [collate([[sample] for sample in self.text.samples(step)])]

    def _dense(self) -> Iterator[Row]:
        model = self._load()
        yield self._row(model, "dense", "none", 0.0, 0, self.text.loss(model))
        n_steps = self.steps * self.rounds
        train(model, self._window, range(n_steps), self.settings)
        yield self._row(model, "dense", "none", 0.0, n_steps, self.text.loss(model))

    def _cuts(self, part: str, method: str, share: float, rounds: int, steps: int) -> Iterator[Row]:
        def fine_tune(rest: Transformer, number: int) -> None:
            numbers = range(steps * (number - 1), steps * number)
            train(rest, self._window, numbers, self.settings)

        cuts = pruning.gradually(self._load(), method, share, rounds, fine_tune, self.text.loss)
        for number, cut in enumerate(cuts, 1):
            yield self._row(cut.model, part, method, cut.share, steps * number, cut.loss, cut.loss_cut)

    def _row(
        self,
        model: Transformer,
        part: str,
        method: str,
        share: float,
        steps: int,
        loss: float,
        loss_cut: float | None = None,
    ) -> Row:
        cell = {"part": part, "method": method, "share": share, "steps": steps, **self.fixed}
        n_params = model.args.n_params()
        values = {
            "parameters": n_params,
            "stored_mb": 2 * n_params / devices.MB,
            "zeros": pruning.count_zeros(model)[0],
        }
        values |= {"loss_nats": loss} | ({} if loss_cut is None else {"loss_cut_nats": loss_cut})
        return cell, {name: row_files.spread([value]) for name, value in values.items()}


def speed(
    name: str, share: float, rounds: int, repeats: int, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[Row]:
    """First token and decode step of a model at each size."""
    if name == "tiny":
        whole = checkpoint.load(EMBEDDED, dtype, device)
    else:
        whole = Transformer.random(PRESETS[name], dtype, device, seed).eval()
    sizes = {0.0: whole}
    for number in range(1, rounds + 1):
        gone = share * number / rounds
        sizes[gone] = pruning.cut(whole, "dimensions", gone, whole.args.ffn_dim)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(whole.args.vocab_size, (1, INPUT_LEN), generator=generator).tolist()
    models = {gone: Llama(model, None, INPUT_LEN + OUTPUT_LEN, 1) for gone, model in sizes.items()}
    runs: dict[float, list[dict[str, float]]] = {gone: [] for gone in models}
    order = random.Random(seed)
    for llama in models.values():
        time_generation(llama, prompts)  # warm up
    for _ in range(repeats):
        for gone in order.sample(list(models), len(models)):
            runs[gone].append(time_generation(models[gone], prompts))
    for gone, llama in models.items():
        cell = {"part": "speed", "method": "dimensions", "share": gone, "model": name}
        cell |= {"input_len": INPUT_LEN, "output_len": OUTPUT_LEN, "batch_size": 1, "decoding": llama.decoder.name}
        n_params = llama.model.args.n_params()
        metrics = {"parameters": row_files.spread([n_params])}
        metrics["stored_mb"] = row_files.spread([n_params * dtype.itemsize / devices.MB])
        metrics |= {key: row_files.spread([run[key] for run in runs[gone]]) for key in runs[gone][0]}
        yield cell, metrics


def time_generation(llama: Llama, prompts: list[list[int]]) -> dict[str, float]:
    """Seconds to the first token and for each after it, and the least that the second can be right now."""
    weight = llama.model.tok_embeddings.weight
    times: list[float] = []

    def at_step(step: int) -> None:
        if step == 1:
            devices.synchronize(weight.device)
            times.append(time.perf_counter())

    bandwidth = max(floors.read_bandwidth(llama.model).values())
    n_bytes = floors.decode_bytes(llama.model, 1, INPUT_LEN + OUTPUT_LEN // 2)
    began = time.perf_counter()
    _, whole = stopwatch.measure(lambda: llama.generate(prompts, OUTPUT_LEN, 0, on_step=at_step), weight.device)
    first = times[0] - began
    return {"ttft_s": first, "tpot_s": (whole.seconds - first) / (OUTPUT_LEN - 1), "floor_tpot_s": n_bytes / bandwidth}


# From rows to plot


def newest(path: Path) -> list[dict[str, Any]]:
    """The last row of each part, method, share and model, of those from the device of the very last one.

    A run with other steps or another rate takes the place of the one before. Raises InputError naming a damaged line.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
            cell = row["cell"]
            if row["experiment"] != "pruning" or not row["metrics"]:
                raise ValueError
            key = (cell["part"], cell["method"], cell["share"], cell["model"], cell.get("steps") == 0)
            rows.pop((key, row["device"]["name"]), None)
            rows[key, row["device"]["name"]] = row
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}:{number}: is no row of this benchmark; choose another --results") from None
    return [row for (_, device), row in rows.items() if device == next(reversed(rows))[1]]


def pick(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Rows whose cell has these values, by share."""
    found = [row for row in rows if all(row["cell"].get(name) == value for name, value in wanted.items())]
    return sorted(found, key=lambda row: (row["cell"]["share"], row["cell"].get("steps", 0)))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss by share for both methods, and speed by size. Line styles and markers tell curves apart, not colours."""
    from matplotlib.figure import Figure  # draws without a screen, and only here

    figure = Figure(figsize=(11, 3.9), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {"dimensions": "hidden units taken out", "magnitude": "smallest weights set to zero"}
    for axis, (method, title) in zip(axes, titles.items(), strict=False):
        plot_quality(axis, rows, method)
        axis.set(title=title, xlabel="share that is gone", ylabel="validation loss (nats a token)")
    plot_speed(axes[2], rows)
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:  # nothing has been measured for one yet
            axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_quality(axis: Any, rows: list[dict[str, Any]], method: str) -> None:
    """One-shot before fine-tuning, after a round's and after all steps; iterative; and the dense model."""
    values: Callable[[dict[str, Any]], dict[str, float]] = row_files.medians
    labels = {"one-round": "one-shot, one round's steps", "one-shot": "one-shot, all steps", "iterative": "iterative"}
    for part, style in (("one-round", "^:"), ("one-shot", "s--"), ("iterative", "o-")):
        found = pick(rows, part=part, method=method)
        shares = [row["cell"]["share"] for row in found]
        if part == "one-shot" and found:
            axis.plot(
                shares, [values(row)["loss_cut_nats"] for row in found], "x:", color="0.5", label="not fine-tuned"
            )
        if found:
            colour = "#1b6ca8" if part == "iterative" else "#c1440e"
            axis.plot(shares, [values(row)["loss_nats"] for row in found], style, color=colour, label=labels[part])
    for row, style in zip(pick(rows, part="dense"), ("-", "-."), strict=False):
        label = f"dense, {row['cell']['steps']} steps" if row["cell"]["steps"] else "dense"
        axis.axhline(values(row)["loss_nats"], color="0.3", linestyle=style, linewidth=0.8, label=label)


def plot_speed(axis: Any, rows: list[dict[str, Any]]) -> None:
    """How many times as fast as the whole model, by parameters left."""
    styles = iter((("o-", "#1b6ca8"), ("o--", "#1b6ca8"), ("s-", "#c1440e"), ("s--", "#c1440e")))
    for name in sorted({row["cell"]["model"] for row in rows if row["cell"]["part"] == "speed"}):
        found = [row_files.medians(row) for row in pick(rows, part="speed", model=name)]
        left = [m["parameters"] / found[0]["parameters"] for m in found]
        for key, label in (("tpot_s", "each next token"), ("ttft_s", "first token")):
            style, colour = next(styles)
            faster = [found[0][key] / m[key] for m in found]
            axis.plot(left, faster, style, color=colour, label=f"{name}, {label}", markersize=4)
    axis.set(title="speed of what is left", xlabel="share of the parameters left", ylabel="times as fast")
    axis.invert_xaxis()


if __name__ == "__main__":
    cli.run(main)
