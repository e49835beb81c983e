"""Record the replay of the results page: one prompt continued with the KV cache and without, and when each token came.

    python -m benchmarks.replay                        # the embedded model: its text, and the second of each token
    python -m benchmarks.replay --model=llama3.2-1b --repeats=1    # Llama 3.2 1B, random weights: the seconds

Both modes take turns in one process, greedily, after a warm-up that is not counted. Of the repeated runs, the row keeps
the one whose time is in the middle, so that what is replayed is a run as it was and not an average of several. Random
weights write nonsense, so of them no text is kept. Left out: batches, sampling and peers, which benchmark_inference.py
has.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows as row_files
from llama import Llama, Transformer, cli
from llama import device as devices
from llama.config import PRESETS
from llama.errors import InputError
from llama.tokenizer import StreamDecoder

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "data" / "tiny"
RESULTS = ROOT / "reports" / "results" / "replay.jsonl"
Run = tuple[list[int], list[float]]  # the tokens, and the seconds from the start at which each was there


def main(
    *,
    model: str = "tiny",
    prompt: str = "Once upon a time, there was a little fox named",
    input_len: int = 256,
    output_len: int | None = None,
    repeats: int = 3,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 1,
    results: str | None = None,
) -> None:
    """Record one prompt's continuation with and without the KV cache, token by token.

    Args:
        model: tiny, which is the embedded model; or another preset's shape with random weights: llama3.2-1b, ...
        prompt: what the embedded model continues.
        input_len: tokens of the prompt where weights are random; it is random too.
        output_len: tokens at most; default: 200 of the embedded model, else 32.
        repeats: runs of each mode, of which the middle one is kept.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16; auto as in inference.py, and bfloat16 for random weights on a CPU.
        seed: of random weights and prompts.
        results: file that the rows are appended to; default: reports/results/replay.jsonl.
    """
    cli.require_one_of("model", model, PRESETS)
    output_len = (200 if model == "tiny" else 32) if output_len is None else output_len
    cli.require_at_least(1, input_len=input_len, repeats=repeats)
    cli.require_at_least(2, output_len=output_len)
    path = Path(results) if results is not None else RESULTS
    row_files.require_writable(path)
    if model == "tiny":
        llama = Llama.build(EMBEDDED, EMBEDDED / "tokenizer.model", 2048, 1, device=device, dtype=dtype)
        ids = llama.encode_prompt(prompt)
    else:
        llama, ids, prompt = random_model(model, input_len, output_len, device, dtype, seed)
    runs = record(llama, ids, output_len, repeats)
    if llama.tokenizer is not None and runs[True][0][0] != runs[False][0][0]:
        raise InputError("the tokens with and without the KV cache differ, so the replay would compare two texts")
    for use_cache, found in runs.items():
        cell = {"model": model, "use_cache": use_cache, "batch_size": 1, "prompt": prompt, "input_len": len(ids)}
        row = append_row(path, llama, cell, found, seed)
        spent = row["metrics"]["runtime_s"]["median"]
        print(f"KV cache {'on ' if use_cache else 'off'} {len(found[0][0])} tokens in {spent:.2f} s")
    print(f"rows appended to {path}; make page puts them into reports/index.html")


def random_model(
    model: str, input_len: int, output_len: int, device: str, dtype: str, seed: int
) -> tuple[Llama, list[int], None]:
    """A preset's shape with random weights, a random prompt, and no text."""
    if dtype == "auto" and devices.resolve(device)[0].type == "cpu":
        dtype = "bfloat16"  # as benchmark_inference.py measures
    place, weights = devices.resolve(device, dtype)
    network = Transformer.random(PRESETS[model], weights, place, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(PRESETS[model].vocab_size, (input_len,), generator=generator).tolist()
    return Llama(network, None, input_len + output_len, 1), ids, None


def record(llama: Llama, ids: list[int], output_len: int, repeats: int) -> dict[bool, list[Run]]:
    """Runs with the cache (True) and without, in turns; the first of each list is the one in the middle by its time."""
    for use_cache in (True, False):
        list(llama.stream(ids, 2, 0, use_cache=use_cache))
    runs: dict[bool, list[Run]] = {True: [], False: []}
    for _ in range(repeats):
        for use_cache, found in runs.items():
            found.append(timed(llama, ids, output_len, use_cache))
    for found in runs.values():
        if not found[0][0]:
            raise InputError("the model ends the text at once; choose another --prompt")
        found.sort(key=lambda run: run[1][-1])
        found.insert(0, found.pop((len(found) - 1) // 2))
    return runs


def timed(llama: Llama, ids: list[int], output_len: int, use_cache: bool) -> Run:
    """One run. A token counts from when it could be shown, which on a GPU is after it was read back."""
    devices.synchronize(llama.device)
    tokens, seconds, began = [], [], time.perf_counter()
    for token in llama.stream(ids, output_len, 0, use_cache=use_cache):
        seconds.append(time.perf_counter() - began)
        tokens.append(token)
    return tokens, seconds


def append_row(path: Path, llama: Llama, cell: dict[str, Any], runs: list[Run], seed: int) -> dict[str, Any]:
    """The row of one mode: the spread of all its runs, and the tokens of the one that is replayed."""
    tokens, seconds = runs[0]
    later = max(1, len(tokens) - 1)
    metrics = {
        "runtime_s": row_files.spread([times[-1] for _, times in runs]),
        "ttft_s": row_files.spread([times[0] for _, times in runs]),
        "tpot_s": row_files.spread([(times[-1] - times[0]) / later for _, times in runs]),
        "replayed_s": row_files.spread([seconds[-1]]),
    }
    series: dict[str, list] = {"token_s": [round(second, 6) for second in seconds]}
    if llama.tokenizer is not None:
        decoder = StreamDecoder(llama.tokenizer)
        series["text"] = [decoder.push(token) for token in tokens]
        series["text"][-1] += decoder.flush()
    cell = {**cell, "output_len": len(tokens), "decoding": llama.decoder.name}
    dtype = str(llama.model.tok_embeddings.weight.dtype).removeprefix("torch.")
    return row_files.append_row(path, "replay", cell, metrics, llama.device, dtype, seed, series)


if __name__ == "__main__":
    cli.run(main)
