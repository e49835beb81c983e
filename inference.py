"""Generate text with a Llama model, with the KV cache on or off.

python inference.py                                        # the embedded model on sample prompts
python inference.py --compare                              # cache on and off, side by side
python inference.py --compare --results=reports/results/comparison.jsonl     # and keep it for the report
python inference.py --prompt="The fox saw" --stream
python inference.py --draft=lookup --compare               # with a draft and without, side by side
python inference.py --ckpt_dir=Llama3.2-1B --dtype=bfloat16 --prompt="The capital of France is"
python inference.py --ckpt_dir=runs/finetuning/merged --alpaca --prompt="Name a colour."
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import rows as row_files
from benchmarks import stopwatch
from data.alpaca import encode_prompt as encode_instruction
from data.tiny.corpus import SAMPLE_PROMPTS
from llama import Llama, checkpoint, cli, lora, quantization
from llama import device as devices
from llama.errors import InputError
from llama.speculative import Counts, Draft, ModelDraft, PromptLookup, Speculation, check_vocabulary
from llama.tokenizer import TOKENIZER_PLACES, StreamDecoder, Tokenizer, find_tokenizer

EMBEDDED = Path(__file__).parent / "data" / "tiny"
SAMPLE_CHATS = (
    "What colour is the sky on a clear day?",
    "Tell me a story about a mouse and a lantern.",
    "Name two fruits.",
)
# How far apart the logits of two candidates may be for rounding alone to decide between them. A logit of 16 to 32, as
# trained models have, is a multiple of 1/8 in bfloat16, of 1/64 in float16, and errors of some layers add up.
ROUNDING_MARGIN = {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float32: 1e-3}


@dataclass(frozen=True)
class Prompt:
    """What the user wrote, and the ids that the model gets for it."""

    text: str
    ids: list[int]


def main(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    prompt: str | None = None,
    prompt_file: str | None = None,
    chat: bool = False,
    alpaca: bool = False,
    adapter: str | None = None,
    compare: bool = False,
    stream: bool = False,
    use_cache: bool = True,
    draft: str | None = None,
    draft_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float = 0.9,
    top_k: int | None = None,
    max_gen_len: int = 64,
    max_seq_len: int = 2048,
    max_batch_size: int = 32,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    decoding: str = "auto",
    results: str | None = None,
) -> None:
    """Generate text with a Llama model, with the KV cache on or off, with a draft or without.

    Args:
        ckpt_dir: checkpoint directory in Meta's or Hugging Face's layout; without it, the small embedded model.
        tokenizer_path: tokenizer.model; default: the one in ckpt_dir.
        prompt: one prompt; default: sample prompts.
        prompt_file: a file of prompts, one a line, or a JSON list of strings.
        chat: send each prompt as a user's message to an instruction-tuned model.
        alpaca: put each prompt as an instruction into the template that finetuning.py trains on.
        adapter: directory of a LoRA adapter for the model, from finetuning.py or PEFT.
        compare: generate with and without the cache, or the draft if any; show texts, times and memory side by side.
        stream: print each prompt's text while it is produced.
        use_cache: False recomputes the whole text for every token.
        draft: speculative decoding: checkpoint directory of a smaller model with the same tokenizer, or lookup, which
            proposes what followed the same tokens before.
        draft_tokens: tokens that the draft proposes in a round; default: as many as pay, at most 8.
        temperature: 0 always takes the most probable token; default 0.6, and 0 with --compare.
        top_p: sample only from the most probable tokens that together reach this share.
        top_k: sample only from this many most probable tokens; default: no cut.
        max_gen_len: tokens to generate at most, for each prompt.
        max_seq_len: prompt and generated tokens together; a longer prompt is refused.
        max_batch_size: prompts in one call.
        seed: of sampling; the same seed and settings give the same text.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16; auto is float32 on a CPU, else the GPU's native 16-bit type.
        decoding: auto takes the fastest step that the machine has; eager the plain one; compiled uses torch.compile.
        results: append what --compare finds to this file, a row for each prompt.
    """
    if compare and (stream or not use_cache):
        raise InputError("--compare runs with and without the cache itself; leave out --stream and --use_cache")
    if compare and temperature not in (None, 0.0):
        raise InputError("--compare needs --temperature=0: sampling would hide whether the cache changed anything")
    if results is not None:
        if not compare:
            raise InputError("--results keeps what --compare finds; add --compare")
        row_files.require_writable(Path(results))
    if draft is None and draft_tokens is not None:
        raise InputError("--draft_tokens needs --draft, a checkpoint directory or lookup")
    if temperature is None:
        temperature = 0.0 if compare else 0.6
    if chat and alpaca:
        raise InputError("--chat and --alpaca are two templates; choose one")
    texts = read_prompts(prompt, prompt_file, chat)
    directory = Path(ckpt_dir) if ckpt_dir is not None else EMBEDDED
    tokenizer = Path(tokenizer_path) if tokenizer_path is not None else find_tokenizer(directory)
    limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size, "seed": seed}
    llama = Llama.build(directory, tokenizer, **limits, device=device, dtype=dtype, decoding=decoding, progress=True)
    if adapter is not None:
        lora.load(llama.model, adapter, directory)
        llama.model.eval()
    speculation = None if draft is None else Speculation(load_draft(draft, llama, decoding), draft_tokens)
    print(describe(llama, directory))
    prompts = [Prompt(text, encode(llama, text, chat, alpaca)) for text in texts]
    stops = llama.tokenizer.chat_stop_tokens if chat else llama.tokenizer.stop_tokens
    options = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    options |= {"stop_tokens": stops, "speculation": speculation}
    if compare:
        found = show_comparison(llama, prompts, options)
        if results is not None:
            place = {"model": "tiny" if directory == EMBEDDED else directory.name, "max_gen_len": max_gen_len}
            place |= {"what": "KV cache" if draft is None else "draft", "decoding": llama.decoder.name}
            append_rows(Path(results), llama, place, found, seed)
    elif stream:
        show_stream(llama, prompts, {**options, "use_cache": use_cache})
    else:
        show_batch(llama, prompts, {**options, "use_cache": use_cache})
    if speculation is not None:
        print(describe_draft(speculation.counts))


def load_draft(name: str, llama: Llama, decoding: str) -> Draft:
    """The draft of that name. Raises InputError, before its weights are read, for one that does not fit the model."""
    if name == "lookup":
        return PromptLookup()
    check_vocabulary(checkpoint.read_args(name), llama.model.args)
    own = [path for place in TOKENIZER_PLACES if (path := Path(name) / place).is_file()]
    if own and not llama.tokenizer.is_same(Tokenizer(own[0])):
        raise InputError(f"{own[0]} is not the model's tokenizer; a draft must have been trained with the same one")
    return ModelDraft(checkpoint.load(name, llama.model.dtype, llama.device, progress=True), decoding)


def read_prompts(prompt: str | None, prompt_file: str | None, chat: bool) -> list[str]:
    """The texts to continue. Raises InputError for both or an unreadable or empty file."""
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt_file exclude each other")
    if prompt is not None:
        return [prompt]
    if prompt_file is None:
        return list(SAMPLE_CHATS if chat else SAMPLE_PROMPTS)
    try:
        content = Path(prompt_file).read_text(encoding="utf-8-sig")  # also turns \r\n into \n
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {prompt_file} as UTF-8 text: {error}") from error
    if prompt_file.endswith(".json"):
        try:
            prompts = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{prompt_file} is not valid JSON: {error}") from error
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise InputError(f"{prompt_file} must hold a JSON list of strings")
    else:
        prompts = [line for line in content.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{prompt_file} holds no prompt")
    return prompts


def encode(llama: Llama, text: str, chat: bool, alpaca: bool) -> list[int]:
    if alpaca:
        return encode_instruction(llama.tokenizer, text)
    if chat:
        return llama.formatter.encode_dialog_prompt([{"role": "user", "content": text}])
    return llama.encode_prompt(text)


def describe(llama: Llama, directory: Path) -> str:
    """What was loaded, how large, where and in which precision; and a warning where the weights slow decoding down."""
    dtype, config = devices.dtype_name(llama.model.dtype), quantization.quantization_of(llama.model)
    dtype += f" over int{config.bits} weights" if config is not None else ""
    place = f"{llama.device.type} ({devices.device_name(llama.device)})"
    size = f"{llama.model.args.n_params():,} parameters, {dtype} on {place}, {llama.decoder.name} decoding"
    line = f"{directory}, {size}\n"
    if directory == EMBEDDED:
        line = f"embedded model, {size}; --ckpt_dir loads real weights\n"
    reason = quantization.slow_reason(llama.model)
    return line if reason is None else f"{line}warning: {reason}\n"


def show_batch(llama: Llama, prompts: list[Prompt], options: dict) -> None:
    """Generate for all prompts at once, then print."""
    work = partial(llama.generate, [prompt.ids for prompt in prompts], **options)
    (outputs, _), spent = stopwatch.measure(work, llama.device)
    for prompt, ids in zip(prompts, outputs, strict=True):
        print(f"> {prompt.text}\n{llama.tokenizer.decode(ids).strip()}\n")
    print(speed(sum(map(len, outputs)), spent, options["use_cache"]))


def show_stream(llama: Llama, prompts: list[Prompt], options: dict) -> None:
    """Generate prompt by prompt, each character as soon as it is complete."""
    for prompt in prompts:
        print(f"> {prompt.text}")
        count, spent = stopwatch.measure(
            partial(print_stream, llama, llama.stream(prompt.ids, **options)), llama.device
        )
        print(f"\n{speed(count, spent, options['use_cache'])}\n")


def print_stream(llama: Llama, tokens: Iterator[int]) -> int:
    decoder = StreamDecoder(llama.tokenizer)
    count = 0
    for token in tokens:
        print(decoder.push(token), end="", flush=True)
        count += 1
    print(decoder.flush(), end="", flush=True)
    return count


def speed(n_tokens: int, spent: stopwatch.Measurement, use_cache: bool) -> str:
    rate = n_tokens / spent.seconds
    return f"[{n_tokens} tokens in {spent.seconds:.2f} s, {rate:.1f} tokens/s, KV cache {'on' if use_cache else 'off'}]"


@dataclass(frozen=True)
class Comparison:
    """One prompt continued in both ways (True: with the cache, or the draft), and whether the tokens agree."""

    prompt: Prompt
    ids: dict[bool, list[int]]
    spent: dict[bool, stopwatch.Measurement]
    verdict: str


def show_comparison(llama: Llama, prompts: list[Prompt], options: dict) -> list[Comparison]:
    """Each prompt alone, with the draft and without, or the cache: texts, whether the tokens agree, time and memory."""
    speculation = options["speculation"]
    if speculation is None:
        what, ways = "KV cache", {True: {"use_cache": True}, False: {"use_cache": False}}
        warm_up = {}
    else:
        what, ways = "draft", {True: {}, False: {"speculation": None}}
        warm_up = {"speculation": Speculation(speculation.draft, speculation.draft_tokens)}  # counted apart
    # The first call pays for set-up in the libraries.
    llama.generate([prompts[0].ids], **{**options, **warm_up, "max_gen_len": 4})
    totals = {True: 0.0, False: 0.0}
    n_equal = 0
    found = []
    for number, prompt in enumerate(prompts, 1):
        ids, spent = {}, {}
        for is_on, way in ways.items():
            work = partial(llama.generate, [prompt.ids], **{**options, **way})
            (output, _), spent[is_on] = stopwatch.measure(work, llama.device)
            ids[is_on] = output[0]
            totals[is_on] += spent[is_on].seconds
        n_equal += ids[True] == ids[False]
        print(f"[{number}/{len(prompts)}] > {prompt.text}\n")
        print(cli.side_by_side(f"{what} on", f"{what} off"))
        print("-" * (2 * cli.COLUMN + 3))
        print(cli.side_by_side(*(llama.tokenizer.decode(ids[is_on]).strip() for is_on in (True, False))))
        agreement = verdict(llama, prompt.ids, ids[True], ids[False], options["stop_tokens"])
        found.append(Comparison(prompt, ids, spent, agreement))
        print(f"\n  tokens    {agreement}")
        on, off = spent[True].seconds, spent[False].seconds
        print(f"  time      {on:.3f} s on, {off:.3f} s off: {off / on:.2f} times as fast with the {what}")
        print(f"  memory    {megabytes(spent[True])} on, {megabytes(spent[False])} off (peak {memory_kind(llama)})\n")
    speedup = totals[False] / totals[True]
    print(f"{n_equal} of {len(prompts)} prompts give equal tokens with the {what} on and off;", end=" ")
    print(f"{totals[True]:.2f} s on, {totals[False]:.2f} s off, {speedup:.2f} times as fast")
    return found


def append_rows(path: Path, llama: Llama, place: dict, found: list[Comparison], seed: int) -> None:
    """Keep comparisons: times and memory as metrics, the texts and the verdict as series."""
    dtype = devices.dtype_name(llama.model.tok_embeddings.weight.dtype)
    for comparison in found:
        metrics, series = {}, {"verdict": [comparison.verdict]}
        for is_on, name in ((True, "on"), (False, "off")):
            ids, spent = comparison.ids[is_on], comparison.spent[is_on]
            series[f"text_{name}"] = [llama.tokenizer.decode(ids).strip()]
            metrics |= {
                f"runtime_{name}_s": row_files.spread([spent.seconds]),
                f"tokens_{name}": row_files.spread([len(ids)]),
            }
            if spent.peak_bytes is not None:
                metrics[f"peak_memory_{name}_mb"] = row_files.spread([spent.peak_bytes / devices.MB])
        on, off = comparison.ids[True], comparison.ids[False]
        n_equal = next((i for i, (a, b) in enumerate(zip(on, off, strict=False)) if a != b), min(len(on), len(off)))
        metrics["tokens_equal"] = row_files.spread([n_equal])
        cell = {**place, "prompt": comparison.prompt.text}
        row_files.append_row(path, "comparison", cell, metrics, llama.device, dtype, seed, series)


def describe_draft(counts: Counts) -> str:
    """What came of the draft, and a warning where it was not worth it."""
    if counts.rounds == 0:
        return "[draft: not asked, for every text ended with its first token]"
    seen = counts.accepted + counts.rejected
    line = (
        f"[draft: {counts.proposed} tokens proposed, {counts.accepted} accepted of {seen} up to the first wrong one "
        f"(acceptance {counts.acceptance:.2f}), {counts.tokens_per_round:.2f} tokens a round, "
        f"expected speed-up {counts.expected_speedup:.2f}]"
    )
    return line if counts.pays else f"{line}\nwarning: the draft hardly pays here; leave it out"


def verdict(llama: Llama, prompt: list[int], cached: list[int], uncached: list[int], stops: list[int]) -> str:
    """Whether two continuations agree; if not, where they part and by how much the logits of the two choices differ."""
    if cached == uncached:
        return f"equal ({len(cached)} of {len(cached)})"
    same = next(i for i in range(len(cached) + 1) if cached[i : i + 1] != uncached[i : i + 1])
    with torch.no_grad():
        tokens = torch.tensor([prompt + cached[:same]], device=llama.device)
        logits = llama.model.logits(llama.model.hidden(tokens)[0, -1])
    likely_stop = max(stops, key=lambda token: logits[token].item())  # what ended the shorter text, which omits it
    first, second = ([*ids, likely_stop][same] for ids in (cached, uncached))
    margin = abs(logits[first].float() - logits[second].float()).item()
    explained = margin <= ROUNDING_MARGIN[logits.dtype]
    reason = "within rounding" if explained else "MORE THAN ROUNDING EXPLAINS: please report this"
    names = " against ".join(repr(llama.tokenizer.decode([token])) for token in (first, second))
    return f"first differ at token {same + 1}: {names}, logit margin {margin:.4f} ({reason})"


def megabytes(spent: stopwatch.Measurement) -> str:
    return "not measurable here" if spent.peak_bytes is None else f"{spent.peak_bytes / devices.MB:,.0f} MB"


def memory_kind(llama: Llama) -> str:
    return "allocated on the GPU" if llama.device.type == "cuda" else "resident in the process"


if __name__ == "__main__":
    cli.run(main)
