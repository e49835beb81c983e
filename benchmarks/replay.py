"""Record the replay of the results page: one prompt continued with the KV cache and without, and when each token came.

    python -m benchmarks.replay                        # the embedded model: its text, and the second of each token
    python -m benchmarks.replay --ckpt_dir=models/smollm2-135m     # the same of other weights
    python -m benchmarks.replay --model=llama3.2-1b --repeats=1    # Llama 3.2 1B, random weights: the seconds

Both modes take turns in one process, greedily, after a warm-up that is not counted. Of the repeated runs, the row keeps
the one whose time is in the middle, so that what is replayed is a run as it was and not an average of several. Random
weights write nonsense, so no text of theirs is kept. Left out: batches, sampling and peers, which
benchmark_inference.py has.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import inputs, rows
from benchmarks.options import DeviceOptions
from data.tiny import directory_of, name_of
from llama import Llama, Transformer, cli
from llama import device as devices
from llama.cli import option
from llama.config import PRESETS
from llama.errors import InputError, InternalError
from llama.tokenizer import StreamDecoder, find_tokenizer

TimedText = tuple[list[int], list[float]]  # the tokens, and the seconds from the start at which each was there


@dataclass(frozen=True)
class Options(DeviceOptions):
    """Record one prompt's continuation with and without the KV cache, token by token."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    model: str = option("tiny", "tiny, weights of ckpt_dir; or another preset with random weights", choices=PRESETS)
    prompt: str = option("Once upon a time, there was a little fox named", "what trained weights continue")
    input_len: int = option(256, "tokens of the prompt where weights are random; it is random too", least=1)
    output_len: int | None = option(None, "tokens at most; default: 200 of trained weights, else 32", least=2)
    repeats: int = option(3, "runs of each mode, of which the middle one is kept", least=1)
    dtype: str = option("auto", f"{cli.DTYPE}; for random weights 16 bits on a CPU, too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ckpt_dir is not None and self.model != "tiny":
            raise InputError(f"--model={self.model} has random weights; leave it out, or --ckpt_dir")


def main(options: Options) -> None:
    """Record both modes, and keep a row for each."""
    path = options.results_file("replay")
    output_len = options.output_len or (200 if options.model == "tiny" else 32)
    prompt: str | None = options.prompt
    name = options.model
    if options.model == "tiny":
        directory = directory_of(options.ckpt_dir)
        name, tokenizer = name_of(directory), find_tokenizer(directory, None)
        llama = Llama.build(directory, tokenizer, 2048, 1, device=options.device, dtype=options.dtype)
        ids = llama.encode_prompt(prompt)
    else:
        args, prompt = PRESETS[options.model], None
        device, dtype = devices.resolve_half(options.device, options.dtype)
        network = Transformer.random(args, dtype, device, options.seed).eval()
        [ids] = inputs.random_prompts(args.vocab_size, 1, options.input_len, options.seed)
        llama = Llama(network, None, options.input_len + output_len, 1)
    runs = record(llama, ids, output_len, options.repeats)
    if llama.tokenizer is not None and runs[True][0][0] != runs[False][0][0]:
        raise InternalError("the tokens with and without the KV cache differ, so the replay would compare two texts")
    for use_cache, found in runs.items():
        cell = {"model": name, "use_cache": use_cache, "batch_size": 1, "prompt": prompt}
        row = keep(path, llama, cell | {"input_len": len(ids)}, found, options.seed)
        seconds = row.median("runtime_s")
        print(f"KV cache {'on ' if use_cache else 'off'} {len(found[0][0])} tokens in {seconds:.2f} s")
    print(f"rows appended to {path}; make page puts them into reports/index.html")


def record(llama: Llama, ids: list[int], output_len: int, repeats: int) -> dict[bool, list[TimedText]]:
    """Runs with the cache (True) and without, in turns; the first of each list is the one in the middle by its time."""
    runs: dict[bool, list[TimedText]] = {True: [], False: []}
    for use_cache in runs:
        list(llama.stream(ids, 2, 0, use_cache=use_cache))
    for _ in range(repeats):
        for use_cache, found in runs.items():
            found.append(timed(llama, ids, output_len, use_cache))
    for found in runs.values():
        if not found[0][0]:
            raise InputError("the model ends the text at once; choose another --prompt")
        found.sort(key=lambda run: run[1][-1])
        found.insert(0, found.pop((len(found) - 1) // 2))
    return runs


def timed(llama: Llama, ids: list[int], output_len: int, use_cache: bool) -> TimedText:
    """One run. A token counts from when it could be shown, which on a GPU is after it was read back."""
    devices.synchronize(llama.device)
    tokens, seconds, began = [], [], time.perf_counter()
    for token in llama.stream(ids, output_len, 0, use_cache=use_cache):
        seconds.append(time.perf_counter() - began)
        tokens.append(token)
    return tokens, seconds


def keep(path: Path, llama: Llama, cell: dict[str, Any], runs: list[TimedText], seed: int) -> rows.Row:
    """The row of one mode: the spread of all its runs, and the tokens of the one that is replayed."""
    tokens, seconds = runs[0]
    times = [times for _, times in runs]
    metrics = {"runtime_s": [run[-1] for run in times], "ttft_s": [run[0] for run in times]}
    metrics["tpot_s"] = [(run[-1] - run[0]) / max(1, len(tokens) - 1) for run in times]
    metrics["replayed_s"] = [seconds[-1]]
    series: dict[str, list] = {"token_s": [round(second, 6) for second in seconds]}
    if llama.tokenizer is not None:
        decoder = StreamDecoder(llama.tokenizer)
        series["text"] = [decoder.push(token) for token in tokens]
        series["text"][-1] += decoder.flush()
    cell = {**cell, "output_len": len(tokens), "decoding": llama.decoder.name}
    dtype = devices.dtype_name(llama.model.dtype)
    return rows.record(path, "replay", cell, metrics, llama.device, dtype, seed, series)


if __name__ == "__main__":
    cli.run(main)
