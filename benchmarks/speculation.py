"""Speculative decoding on a trained model: prompt lookup, and lighter forms of the model itself as drafts.

    python -m benchmarks.speculation                                       # the embedded model
    python -m benchmarks.speculation --ckpt_dir=models/smollm2-135m --data=wikitext2_test.raw --input_len=1024

Two kinds of text: running text, of which each prompt is a piece; and quoting text, whose prompt is a piece and, after
it, the beginning of that same piece, so that it goes on as a copy. On each, every draft is measured beside plain
decoding of the same prompts, in turns; greedy, where both must give the same tokens, and sampled, where the texts
differ and the tokens a second are compared. The time is that of the tokens after the first one: what a prompt takes
is the same, for none of these drafts reads it again.

Left out on purpose: a smaller model of another kind as the draft (benchmarks/ladder.py).
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from benchmarks import options as shared
from benchmarks import rows
from data import text
from data.tiny import directory_of, name_of
from llama import Llama, Tokenizer, Transformer, cli, pruning, quantization
from llama import device as devices
from llama.cli import option
from llama.errors import InputError
from llama.quantization import Quantization
from llama.speculative import Draft, ModelDraft, PromptLookup, Speculation, n_equal
from llama.tokenizer import find_tokenizer
from reports import tables

FORMS = {"int8": Quantization(8), "int4": Quantization(4, 64, zero_points=True)}
PRUNED = 0.1  # of the hidden units, those of the smallest norm
DRAFTS = ("lookup", *FORMS, "pruned")
QUOTED = 8  # a quoting prompt begins its piece anew with this part of it
TEMPERATURES = (0.0, 0.8)
TOP_P = 0.9
TEXTS = ("running", "quoting")


@dataclass(frozen=True)
class Options(shared.RowOptions):
    """Measure speculative decoding: acceptance, tokens per round and speed-up of each draft on each kind of text."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    data: str | None = option(None, shared.TEXT)
    input_len: int = option(128, "tokens of a prompt", least=2 * QUOTED)
    output_len: int = option(50, "tokens generated for each prompt", least=2)
    prompts: int = option(4, "prompts of each kind", least=1)
    drafts: str = option(",".join(DRAFTS), f"some of {', '.join(DRAFTS)}, with commas between")
    seed: int = option(1, "of sampling, and of the order of the runs", **cli.SEEDS)
    device: str = option("auto", cli.DEVICE)
    dtype: str = option("auto", shared.HALF_DTYPE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.names) <= set(DRAFTS) or len(set(self.names)) < len(self.names):
            raise InputError(f"drafts={self.drafts}: expected some of {', '.join(DRAFTS)}, with commas between")

    @property
    def names(self) -> list[str]:
        return self.drafts.split(",")


def main(options: Options) -> None:
    """Measure each draft on each kind of text, and keep a row for it."""
    path = options.results_file("speculation")
    directory = directory_of(options.ckpt_dir)
    tokenizer = Tokenizer(find_tokenizer(directory))
    ids = text.to_measure(options.data, tokenizer)
    prompts = {kind: make_prompts(kind, ids, options) for kind in TEXTS}
    device, dtype = devices.resolve_half(options.device, options.dtype)
    length = options.input_len + options.output_len
    llama = Llama.build(directory, tokenizer, length, 1, device=device, dtype=dtype, progress=True)
    drafts = {name: make_draft(name, llama.model) for name in options.names}
    cell = rows.model_cell(name_of(directory), None, None) | rows.text_cell(options.data)
    cell |= {name: getattr(options, name) for name in ("input_len", "output_len", "prompts")}
    found = []
    for kind, temperature in itertools.product(TEXTS, TEMPERATURES):
        measured = measure(llama, drafts, prompts[kind], temperature, options)
        for name, metrics in measured.items():
            place = {**cell, "text": kind, "temperature": temperature, "draft": name, "decoding": llama.decoder.name}
            found.append(
                rows.record(path, "speculation", place, metrics, device, devices.dtype_name(dtype), options.seed)
            )
    shared.finish(path, "speculation", found, tables.speculation(found))


def make_prompts(kind: str, ids: Sequence[int], options: Options) -> list[list[int]]:
    """Pieces of a text, as far from each other as there is text. Raises InputError where it has too few tokens."""
    n, step = options.input_len, len(ids) // options.prompts
    if step < n:
        raise InputError(f"input_len={n} times prompts={options.prompts} is more than the text's {len(ids):,} tokens")
    pieces = [list(ids[start : start + n]) for start in range(0, step * options.prompts, step)]
    again = n // QUOTED
    return pieces if kind == "running" else [[*piece[:-again], *piece[:again]] for piece in pieces]


def make_draft(name: str, model: Transformer) -> Draft:
    if name == "lookup":
        return PromptLookup()
    if name == "pruned":
        return ModelDraft(pruning.cut(model, "dimensions", PRUNED, model.args))
    return ModelDraft(quantization.quantized_copy(model, FORMS[name]))


def measure(
    llama: Llama, drafts: dict[str, Draft], prompts: Sequence[Sequence[int]], temperature: float, options: Options
) -> dict[str, dict[str, list[float]]]:
    """Metrics of each draft: the runs of all of them and of plain decoding take turns, prompt by prompt."""
    order, found = random.Random(options.seed), {name: {} for name in drafts}
    for repeat in tqdm(range(-1, options.repeats), desc=f"temperature {temperature:g}", unit="run"):
        runs = {way: Run(llama, drafts.get(way), temperature, options) for way in (None, *drafts)}
        for number, prompt in enumerate(prompts):
            for way in order.sample(list(runs), len(runs)):
                runs[way].add(prompt, options.seed + number)
        for name in drafts if repeat >= 0 else ():  # the first is to warm up
            for metric, value in runs[name].against(runs[None]).items():
                found[name].setdefault(metric, []).append(value)
    return found


class Run:
    """All prompts, one way of decoding."""

    def __init__(self, llama: Llama, draft: Draft | None, temperature: float, options: Options) -> None:
        self.llama, self.temperature, self.output_len = llama, temperature, options.output_len
        self.speculation = None if draft is None else Speculation(draft)
        self.seconds, self.texts = 0.0, []

    def add(self, prompt: Sequence[int], seed: int) -> None:
        """Generate, and add the time of the tokens after the first."""
        settings: dict[str, Any] = {"temperature": self.temperature, "top_p": TOP_P, "stop_tokens": [], "seed": seed}
        tokens = self.llama.stream(prompt, self.output_len, speculation=self.speculation, **settings)
        first = next(tokens)
        devices.synchronize(self.llama.device)
        began = time.perf_counter()
        rest = list(tokens)
        self.seconds += time.perf_counter() - began
        self.texts.append([first, *rest])

    def against(self, plain: Run) -> dict[str, float]:
        """What a draft brought, beside plain decoding of the same prompts."""
        n, n_plain = (sum(len(each) - 1 for each in run.texts) for run in (self, plain))
        rates = n / self.seconds, n_plain / plain.seconds
        counts = self.speculation.counts
        equal = sum(n_equal(*pair) for pair in zip(self.texts, plain.texts, strict=True))
        return {
            "tokens_per_s": rates[0],
            "plain_tokens_per_s": rates[1],
            "speedup_x": rates[0] / rates[1],
            "acceptance": counts.acceptance,
            "tokens_a_round": counts.tokens_per_round,
            **({"tokens_equal": equal} if self.temperature == 0 else {}),
        }


if __name__ == "__main__":
    cli.run(main)
