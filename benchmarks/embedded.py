"""The embedded model and its draft: size, held-out loss, time of a training step, and what the model writes.

    python -m benchmarks.embedded

Measures the files as shipped, in fp32. The rows go to reports/results/tiny.jsonl, from which `python -m reports.build
readme` makes the table of data/tiny/README.md; the samples of text there are replaced here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import stopwatch
from benchmarks.rows import record
from data.tiny import EMBEDDED, corpus
from data.tiny.sequences import HELD_OUT, SEQ_LEN, held_out
from data.tiny.train import MODELS, batch, fast_loss, new_run, train_step
from llama import Llama, Tokenizer, Transformer, checkpoint, cli
from llama import device as devices
from llama.cli import option
from llama.evaluation import perplexity

RESULTS = Path(__file__).parents[1] / "reports" / "results" / "tiny.jsonl"
README = EMBEDDED / "README.md"
BEGIN, END = "<!-- samples -->\n", "<!-- end -->"
SAMPLE_LEN = 64  # tokens
N_STEPS, WARM_UP = 20, 2


@dataclass(frozen=True)
class Options(cli.Options):
    """Measure the embedded model and its draft, and put samples of its text into data/tiny/README.md."""

    seed: int = option(1, "seed of the text that the timed steps train on", **cli.SEEDS)
    device: str = option("cpu", cli.DEVICE)


def main(options: Options) -> None:
    device, _ = devices.resolve(options.device, "float32")
    tokenizer = Tokenizer(EMBEDDED / "tokenizer.model")
    for name, (preset, directory, phases) in MODELS.items():
        model = checkpoint.load(directory, torch.float32)
        runs = {
            "held_out_loss_nats": [held_out_loss(model, tokenizer)],
            "held_out_story_loss_nats": [held_out_loss(model, tokenizer, {"story": 1.0})],
            "parameters": [model.args.n_params()],
            "file_mb": [(directory / "consolidated.00.pth").stat().st_size / devices.MB],
            "train_steps": [sum(steps for _, steps, _ in phases)],
            "step_s": step_seconds(name, tokenizer, options.seed, device),
        }
        record(RESULTS, "tiny", {"model": preset}, runs, device, "float32", options.seed)
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    text = samples(Llama(checkpoint.load(EMBEDDED, torch.float32), tokenizer))
    README.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")


def held_out_loss(
    model: Transformer, tokenizer: Tokenizer, mix: corpus.Mix = corpus.BALANCED, n: int = HELD_OUT
) -> float:
    """Nats per token on held-out sequences, the first `n` of them."""
    ids = held_out(tokenizer, mix, n).flatten().tolist()
    return perplexity.evaluate(model, ids, SEQ_LEN + 1, batch_size=16).loss


def step_seconds(name: str, tokenizer: Tokenizer, seed: int, device: torch.device) -> list[float]:
    """Wall-clock time of training steps that change nothing, batches included, after some to warm up."""
    model, optimizer = new_run(name, seed, device)
    loss_function = fast_loss(name, device)

    def step(number: int) -> None:
        train_step(model, optimizer, loss_function, batch(tokenizer, seed, number, corpus.BALANCED).to(device), 0.0)

    return [stopwatch.measure(partial(step, i), device)[1].seconds for i in range(WARM_UP + N_STEPS)][WARM_UP:]


def samples(llama: Llama) -> str:
    """What the model writes after the sample prompts with greedy decoding, as a Markdown block."""
    prompts = corpus.SAMPLE_PROMPTS
    results = llama.text_completion(prompts, temperature=0, max_gen_len=SAMPLE_LEN)
    texts = [f"> {prompt}\n{result['generation'].strip()}" for prompt, result in zip(prompts, results, strict=True)]
    return "```text\n" + "\n\n".join(texts) + "\n```\n"


if __name__ == "__main__":
    cli.run(main)
