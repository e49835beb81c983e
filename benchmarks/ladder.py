"""The ladder: from plain PyTorch without a cache to what is fastest, one change per row, on the same work.

    python -m benchmarks.ladder                        # the embedded model in bfloat16, two to three minutes
    python -m benchmarks.ladder --model=llama3.2-1b    # Llama 3.2 1B, random weights: time and memory only

A rung is one change to another rung, with whose speed its own is compared; a test shows that it gives the same text, or
bounds the error. The work is greedy decoding of the same prompts, one after another, for the same number of tokens,
whatever they say: text of the embedded model's world, and questions that it repeats again and again, which is what
prompt lookup is for. Each rung has a process of its own, as benchmarks/workers.py says.

Perplexity is that of the rung's weights, in its dtype, on the text and in the windows of evaluate.py: it says what
int8, int4 and pruning cost; a cache, a kernel and a draft change nothing in it. Pruned is without fine-tuning.

Left out on purpose: several prompts at once (benchmark_inference.py), and speculation with random weights: how often a
draft is right about a model that has learned nothing says nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, inputs, rows, stopwatch, workers
from benchmarks import options as shared
from data.tiny import EMBEDDED
from data.tiny.sequences import SEQ_LEN, held_out
from llama import Llama, Transformer, checkpoint, cli, pruning, quantization
from llama import device as devices
from llama.cli import option
from llama.config import PRESETS
from llama.errors import InputError
from llama.evaluation import perplexity
from llama.quantization import Quantization
from llama.speculative import Draft, ModelDraft, PromptLookup, Speculation
from llama.tokenizer import Tokenizer
from reports import tables

SHARE = 0.25  # of the hidden units that pruning takes out
OWN, REPETITIVE, RANDOM = "its own", "repetitive", "random ids"
N_PROMPTS = 8  # of the model's own text
# After which the embedded model asks and answers one question again and again; 16 tokens each, so that none is cut.
QUESTIONS = tuple(
    f'Question: What is the past tense of "{verb}"?\nAnswer:' for verb in ("speak", "swim", "drink", "buy")
)
# What "auto" decoding comes to.
STEPS = {"native": "C step", "fused and captured": "Triton", "captured": "CUDA graph", "eager": "auto"}
# What tests a change: the same tokens, the same logits, or a bound on the error.
TESTS = {
    "no cache": "tests/llama/checkpoint/test_checkpoint.py::test_logits_equal_transformers",
    "KV cache": "tests/llama/test_generation.py::test_cache_on_equals_off_over_a_thousand_tokens",
    "C step": "tests/llama/test_decoding.py::test_native_step_is_as_exact_as_the_eager_one",
    "Triton": "tests/llama/kernels/test_gpu_kernels.py::test_fused_step_is_as_exact_as_the_eager_one",
    "CUDA graph": "tests/llama/test_decoding.py::test_captured_step_equals_eager",
    "auto": "tests/llama/test_decoding.py::test_a_machine_that_cannot_compile_kernels_says_so_and_goes_on",
    "int8": "tests/llama/test_quantization.py::test_int8_loses_at_most_half_a_step",
    "int4": "tests/llama/test_quantization.py::test_int4_is_bounded_and_better_than_rounding",
    "pruned": "tests/llama/test_pruning.py::test_the_strongest_units_are_left_in_their_order",
    "draft": "tests/llama/test_speculative.py::test_greedy_equals_plain_for_any_draft",
    "lookup": "tests/llama/test_speculative.py::test_greedy_equals_plain_for_any_draft",
}


@dataclass(frozen=True)
class Options(shared.DeviceOptions):
    """Measure what each change brings: cache, decode step, int8, int4, pruning, speculative decoding."""

    model: str = option(
        "tiny",
        "tiny, the embedded model; or another preset with random weights: time and memory, no drafts",
        choices=PRESETS,
    )
    input_len: int = option(32, "tokens of each prompt; those of repetitive text may have fewer", least=2)
    output_len: int = option(64, "tokens generated for each prompt", least=2)
    max_tokens: int | None = option(None, "tokens of held-out text for the perplexity; default: all of it", least=2)
    dtype: str = option("auto", shared.HALF_DTYPE)
    figures: str | None = option(None, shared.FIGURES)
    work_dir: str | None = option(None, shared.WORK_DIR)

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = SEQ_LEN if self.model == "tiny" else PRESETS[self.model].trained_context
        if self.input_len + self.output_len > longest:
            lengths = f"input_len={self.input_len} output_len={self.output_len}"
            raise InputError(f"{lengths}: more than the model's {longest:,} tokens")
        if self.max_tokens is not None and self.model != "tiny":
            raise InputError(
                f"max_tokens={self.max_tokens}: is for the perplexity of the embedded model; random weights have none"
            )


@dataclass(frozen=True)
class Rung:
    """What it changes about which other rung, and all that it runs with. `row` is its number, from 1."""

    row: int
    name: str
    changes: int | None
    text: str
    weights: str = "whole"
    use_cache: bool = True
    decoding: str = "auto"
    draft: str | None = None
    engine: str = "llama"

    def __str__(self) -> str:
        return f"{self.row} {self.name}"


@dataclass(frozen=True)
class LadderSetup:
    """What all rungs of one run share: checkpoints by form of the weights, ids of the prompts by text."""

    directories: dict[str, str]
    prompts: dict[str, list[list[int]]]
    output_len: int
    device: str
    dtype: str


def main(options: Options) -> None:
    """Measure every rung, keep its row, and show the ladder."""
    device, dtype = devices.resolve_half(options.device, options.dtype)
    path = options.results_file("ladder")
    has_text = options.model == "tiny"
    rungs = ladder(has_text)
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        source = EMBEDDED
        if not has_text:
            source = inputs.provide_weights(Path(folder), options.model, None, dtype, options.seed, for_peers=False)
        directories = make_forms(source, Path(folder), {rung.weights for rung in rungs})
        prompts = make_prompts(options.model, options.input_len, options.seed)
        setup = LadderSetup(directories, prompts, options.output_len, str(device), devices.dtype_name(dtype))
        quality = losses(setup, options.max_tokens) if has_text else {}
        runs = ladder_runs(setup, rungs, options.repeats, options.seed)
    found = []
    for rung in rungs:
        cell, metrics, series = describe(options.model, setup, rung, runs, quality.get(rung.weights, {}))
        found.append(rows.record(path, "ladder", cell, metrics, device, setup.dtype, options.seed, series))
    shared.finish(path, "ladder", found, tables.ladder(found) + tables.drafts(found), options.figures)


def ladder(has_text: bool) -> list[Rung]:
    """The rungs, in order. has_text: of a trained model, so that drafts have a chance to be right."""
    text = OWN if has_text else RANDOM
    rungs = [
        Rung(1, "no cache", None, text, use_cache=False, decoding="eager"),
        Rung(2, "KV cache", 1, text, decoding="eager"),
        Rung(3, "auto", 2, text),
        Rung(4, "int8", 3, text, weights="int8"),
        Rung(5, "int4", 4, text, weights="int4"),
        Rung(6, "pruned", 3, text, weights="pruned"),
    ]
    if not has_text:
        return rungs
    return [
        *rungs,
        Rung(7, "draft", 3, text, draft="model"),
        Rung(8, "lookup", 3, text, draft="lookup"),
        Rung(9, "no cache", None, REPETITIVE, use_cache=False, decoding="eager"),
        Rung(10, "KV cache", 9, REPETITIVE, decoding="eager"),
        Rung(11, "auto", 10, REPETITIVE),
        Rung(12, "draft", 11, REPETITIVE, draft="model"),
        Rung(13, "lookup", 11, REPETITIVE, draft="lookup"),
    ]


def make_forms(
    source: Path, folder: Path, forms: Iterable[str], formats: Mapping[str, Quantization] = inputs.QUANTIZED
) -> dict[str, str]:
    """A checkpoint for each form of the weights: whole, with hidden units taken out, or in one of these formats."""
    directories = {"whole": str(source.resolve())}
    for name in sorted(set(forms) - {"whole"}):
        model = checkpoint.load(source)
        if name == "pruned":
            model = pruning.cut(model, "dimensions", SHARE, model.args)
        else:
            quantization.quantize(model, formats[name], progress=True)
        checkpoint.save(model, folder / name)
        directories[name] = str((folder / name).resolve())
    return directories


def make_prompts(model: str, input_len: int, seed: int) -> dict[str, list[list[int]]]:
    """Ids of equal length by text, so that a recorded step serves all prompts of a text."""
    if model != "tiny":
        return {RANDOM: inputs.random_prompts(PRESETS[model].vocab_size, 1, input_len, seed)}
    tokenizer = Tokenizer(EMBEDDED / "tokenizer.model")
    own = held_out(tokenizer, n=N_PROMPTS)[:, :input_len].tolist()
    questions = [tokenizer.encode(question, bos=True, eos=False) for question in QUESTIONS]
    length = min(input_len, *map(len, questions))
    return {OWN: own, REPETITIVE: [ids[-length:] for ids in questions]}


def losses(setup: LadderSetup, max_tokens: int | None) -> dict[str, dict[str, float]]:
    """Loss and perplexity of each form of the embedded model, counted as evaluate.py counts."""
    device, dtype = devices.resolve(setup.device, setup.dtype)
    ids = held_out(Tokenizer(EMBEDDED / "tokenizer.model")).flatten().tolist()[:max_tokens]
    found = {}
    for name, directory in setup.directories.items():
        network = checkpoint.load(directory, dtype, device)
        result = perplexity.evaluate(network, ids, SEQ_LEN + 1, progress=True)
        found[name] = {"loss_nats": result.loss, "perplexity_x": result.perplexity, "scored_tokens": result.tokens}
    return found


def ladder_runs(setup: LadderSetup, rungs: list[Rung], repeats: int, seed: int) -> dict[Rung, list[dict[str, Any]]]:
    """Each rung with its measurements. On a CPU all take turns; on a GPU each runs alone."""
    groups = workers.turns(rungs, torch.device(setup.device), lambda rung: "all")
    return dict(workers.rounds(groups, lambda rung: RungRunner(setup, rung), repeats, seed))


@dataclass
class RungRunner:
    """One rung in its process."""

    setup: LadderSetup
    rung: Rung

    def prepare(self) -> None:
        """Load, and generate once: all of it, or two tokens without the cache, which touch all that more of them do."""
        setup, rung = self.setup, self.rung
        self.device, self.dtype = devices.resolve(setup.device, setup.dtype)
        workers.warm_libraries(self.device, self.dtype)
        self.baseline = stopwatch.memory_baseline(self.device)
        self.prompts = setup.prompts[rung.text]
        length = max(map(len, self.prompts)) + setup.output_len
        self.llama = Llama(self._load(setup.directories[rung.weights]), None, length, 1, decoding=rung.decoding)
        self.draft: Draft | None = None
        if rung.draft is not None:
            self.draft = PromptLookup() if rung.draft == "lookup" else ModelDraft(self._load(EMBEDDED / "draft"))
        self._generate(setup.output_len if rung.use_cache else 2, self.draft and Speculation(self.draft))

    def measure(self) -> dict[str, Any]:
        """Time and memory; which step decoded, and the ids."""
        speculation = None if self.draft is None else Speculation(self.draft)
        ids, spent = stopwatch.measure(lambda: self._generate(self.setup.output_len, speculation), self.device)
        values = {"runtime_s": spent.seconds, "tokens_per_s": sum(map(len, ids)) / spent.seconds}
        models = [self.llama.model, *([self.draft.decoder.model] if isinstance(self.draft, ModelDraft) else [])]
        values["weights_mb"] = sum(map(hardware.weight_bytes, models)) / devices.MB
        values |= spent.peak_over(self.baseline)
        if speculation is not None:
            values["acceptance"] = speculation.counts.acceptance
            values["tokens_a_round"] = speculation.counts.tokens_per_round
        return values | {"decoding": self.llama.decoder.name, "ids": ids}

    def _load(self, directory: str | Path) -> Transformer:
        return checkpoint.load(directory, self.dtype, self.device)

    def _generate(self, length: int, speculation: Speculation | None) -> list[list[int]]:
        options = {"use_cache": self.rung.use_cache, "speculation": speculation}
        return [self.llama.generate([prompt], length, 0, **options)[0][0] for prompt in self.prompts]


def describe(
    model: str, setup: LadderSetup, rung: Rung, runs: dict[Rung, list[dict[str, Any]]], quality: dict[str, float]
) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, list]]:
    """Cell, metrics and series of a row: what ran, how fast, and the test of it; no metrics where memory ran out."""
    own = runs[rung]
    decoding = own[0]["decoding"] if own else rung.decoding
    name = STEPS.get(decoding, decoding) if rung.name == "auto" else rung.name
    cell = {"model": model, **asdict(rung), "name": name, "decoding": decoding}
    del cell["engine"]  # all of them are ours
    prompts = setup.prompts[rung.text]
    cell |= {"prompts": len(prompts), "input_len": len(prompts[0]), "output_len": setup.output_len}
    series = {"test": [TESTS[name]]}
    if not own:
        return cell, {}, series
    metrics = rows.by_metric(own) | {key: [value] for key, value in quality.items()}
    base = next((runs[other] for other in runs if other.row == rung.changes), [])
    if base:
        metrics["tokens_equal"] = [equal_tokens(run["ids"], base[0]["ids"]) for run in own]
    return cell, metrics, series


def equal_tokens(ids: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> int:
    """How many tokens come before the first that differs, in all texts together."""
    n_equal = 0
    for own, other in zip(ids, others, strict=True):
        pairs = enumerate(zip(own, other, strict=True))
        n_equal += next((i for i, (a, b) in pairs if a != b), len(own))
    return n_equal


if __name__ == "__main__":
    cli.run(main)
