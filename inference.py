"""Generate text with a Llama model, with the KV cache on or off.

python inference.py                                        # the embedded model on sample prompts
python inference.py --compare                              # cache on and off, side by side
python inference.py --compare --results=reports/results/comparison.jsonl     # and keep it for the report
python inference.py --prompt="The fox saw" --stream
python inference.py --chat                                 # a conversation, here or one message per line from a pipe
python inference.py --draft=lookup --compare               # with a draft and without, side by side
python inference.py --prompt_file=book.txt --save_prompt=book.safetensors    # reads a long text once, for
python inference.py --load_prompt=book.safetensors --prompt="In short,"      # whatever comes behind it
python inference.py --ckpt_dir=Llama3.2-1B --dtype=bfloat16 --prompt="The capital of France is"
python inference.py --ckpt_dir=runs/finetuning/merged --alpaca --prompt="Name a colour."
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import stopwatch
from benchmarks.rows import model_cell, record, require_writable
from data.alpaca import encode_prompt as encode_instruction
from data.prompts import COURSE_PROMPTS
from data.prompts import read as read_prompts
from data.tiny import EMBEDDED, directory_of, has_tokenizer, name_of
from data.tiny.corpus import SAMPLE_PROMPTS
from llama import Llama, adapters, checkpoint, cli, files, memory, processes, prompt_file, quantization
from llama import device as devices
from llama.checkpoint.source import Source
from llama.cli import option
from llama.config import ModelArgs
from llama.conversation import Conversation
from llama.decoding import CACHES
from llama.device import dtype_name
from llama.errors import InputError
from llama.evaluation.agreement import verdict
from llama.memory import Memory
from llama.prompt_file import SavedPrompt
from llama.quantization import Quantization
from llama.speculative import Counts, Draft, ModelDraft, PromptLookup, Speculation, check_vocabulary, n_equal
from llama.stops import StopStrings, cut
from llama.tokenizer import ChatFormat, StreamDecoder, Tokenizer, find_tokenizer, other_tokenizer

SAMPLE_CHATS = (
    "What colour is the sky on a clear day?",
    "Tell me a story about a mouse and a lantern.",
    "Name two fruits.",
)


OWN_DRAFTS = {"int8": Quantization(8), "int4": Quantization(4, 32, zero_points=True)}  # made of the model's weights


@dataclass(frozen=True)
class Options(cli.Options):
    """Generate text with a Llama model, with the KV cache on or off, with a draft or without."""

    ON_SEVERAL = True

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    prompt: str | None = option(None, "prompt; default: sample prompts")
    prompt_file: str | None = option(
        None,
        "a file of prompts: one per line, a JSON list, or records with the field prompt; with --save_prompt, a text",
    )
    save_prompt: str | None = option(None, "keep the prompt and its KV cache in this file, for --load_prompt")
    load_prompt: str | None = option(
        None, "go on behind the text of a file from --save_prompt, which is not computed again; prompts are appended"
    )
    chat: bool = option(
        False, "send each prompt as a user's message to an instruction-tuned model; without a prompt, a conversation"
    )
    alpaca: bool = option(False, "put each prompt as an instruction into the template that finetuning.py trains on")
    adapter: str | None = option(None, cli.ADAPTER)
    any_base: bool = option(False, cli.ANY_BASE)
    compare: bool = option(
        False, "generate with and without the cache, or the draft if any; show texts, times and memory side by side"
    )
    stream: bool = option(False, "print each prompt's text while it is produced")
    use_cache: bool = option(True, "False recomputes the whole text for every token")
    draft: str | None = option(
        None,
        "speculative decoding: int8 or int4, the model's own weights in so many bits; lookup, what followed the same "
        "tokens before; or the checkpoint directory of a smaller model with the same tokenizer",
    )
    draft_tokens: int | None = option(
        None, "tokens that the draft proposes per round; default: as many as pay, at most 8"
    )
    temperature: float | None = option(
        None, "0 always takes the most probable token; default 0.6, and 0 with --compare"
    )
    top_p: float = option(0.9, "sample only from the most probable tokens that together reach this share")
    top_k: int | None = option(None, "sample only from this many most probable tokens; default: no cut")
    min_p: float = option(0.0, "sample only from tokens at least this many times as probable as the most probable one")
    repetition_penalty: float = option(1.0, "above 1, tokens that the text holds already become less probable")
    stop: str | None = option(None, "end a text before this string; several are separated by a comma")
    max_gen_len: int | None = option(
        None,
        "tokens to generate at most, for each prompt; default: 64, and in a conversation what max_seq_len leaves",
        least=0,
    )
    max_seq_len: int = option(2048, "prompt and generated tokens together; a longer prompt is refused", least=1)
    max_batch_size: int = option(32, "prompts in one call", least=1)
    seed: int = option(1, "seed of sampling; the same seed and settings give the same text")
    device: str = option("auto", cli.DEVICE)
    dtype: str = option("auto", cli.DTYPE)
    cache_dtype: str = option(
        "auto",
        "of the KV cache: auto is that of the activations, int8 takes half the memory of 16 bits",
        choices=CACHES,
    )
    decoding: str = option(
        "auto", "auto takes the fastest step that the machine has; eager the plain one; compiled uses torch.compile"
    )
    results: str | None = option(None, "append what --compare measures to this file, a row for each prompt")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and (self.stream or not self.use_cache):
            raise InputError("--compare runs with and without the cache itself; leave out --stream and --use_cache")
        if self.compare and self.temperature not in (None, 0.0):
            raise InputError("--compare needs --temperature=0: sampling would hide whether the cache changed anything")
        if self.results is not None and not self.compare:
            raise InputError("--results keeps what --compare measures; add --compare")
        if self.draft is None and self.draft_tokens is not None:
            raise InputError("--draft_tokens needs --draft, a checkpoint directory, int8, int4 or lookup")
        if self.chat and self.alpaca:
            raise InputError("--chat and --alpaca are two templates; choose one")
        if self.is_conversation and (self.draft is not None or not self.use_cache):
            refused = "--use_cache=False" if self.draft is None else f"--draft={self.draft}"
            raise InputError(f"{refused}: a conversation keeps the cache of one model; give --prompt or --prompt_file")
        if self.prompt is not None and self.prompt_file is not None:
            raise InputError("--prompt and --prompt_file exclude each other")
        if self.keeps_cache and (self.compare or self.draft is not None or not self.use_cache):
            raise InputError("a saved prompt is a KV cache of one model; leave out --compare, --draft and --use_cache")
        if self.save_prompt is not None and self.prompt is None and self.prompt_file is None:
            raise InputError("--save_prompt needs a text to keep: --prompt or --prompt_file")
        in_one = self.is_conversation or self.keeps_cache or self.draft in OWN_DRAFTS
        if processes.world().size > 1 and in_one:
            raise InputError(
                "a conversation, a saved prompt and a draft of the model's own weights need one process; start it "
                "without torchrun"
            )

    @property
    def keeps_cache(self) -> bool:
        """From or for another run."""
        return self.save_prompt is not None or self.load_prompt is not None

    @property
    def is_conversation(self) -> bool:
        """With messages from the terminal or a pipe."""
        return self.chat and not self.compare and self.prompt is None and self.prompt_file is None


@dataclass(frozen=True)
class Prompt:
    """What the user wrote, and the ids that the model gets for it, those of a saved text before it included."""

    text: str
    ids: list[int]

    @property
    def shown(self) -> str:
        """All of it, but of a book its first and last lines."""
        return self.text if len(self.text) <= 4000 else f"{self.text[:2000]}\n[...]\n{self.text[-2000:]}"


def main(options: Options) -> None:
    if options.results is not None:
        require_writable(Path(options.results))
    directory = directory_of(options.ckpt_dir)
    tokenizer = Tokenizer(find_tokenizer(directory, options.tokenizer_path))
    encoding = partial(encode, tokenizer, options=options)
    saved = None if options.load_prompt is None else prompt_file.read(options.load_prompt, encoding)
    if options.save_prompt is not None:
        files.require_writable(options.save_prompt)  # not after the minutes that a long text takes
    texts = [] if options.is_conversation else prompt_texts(options, tokenizer)
    prompts = [Prompt(text, encoding(text if saved is None else saved.text + text)) for text in texts]
    require_room(prompts, options.max_seq_len)
    processes.require_same("prompts", repr(prompts).encode())
    if options.chat:
        ChatFormat(tokenizer).kind()  # raises where there is none; all this before minutes go into loading weights
    settings = settings_of(options, tokenizer)
    longest = max((len(prompt.ids) for prompt in prompts), default=0) + settings["max_gen_len"]
    longest = options.max_seq_len if options.is_conversation else min(longest, options.max_seq_len)
    source = checkpoint.open_source(directory)  # once: it may warn
    needed = memory_needed(options, source, len(prompts), longest)
    llama = load(options, source, tokenizer)
    draft = None if options.draft is None else load_draft(options.draft, llama, options.decoding)
    speculation = settings["speculation"] = None if draft is None else Speculation(draft, options.draft_tokens)
    print(describe(llama, directory, longest, needed, source.args))
    if options.is_conversation:
        converse(llama, settings, saved)
    elif options.compare:
        comparisons = show_comparison(llama, prompts, settings)
        if options.results is not None and processes.world().is_first:
            record_comparisons(Path(options.results), llama, cell_of(options, llama), comparisons, options.seed)
    elif options.keeps_cache:
        show_behind(saved, options.save_prompt, llama, prompts, settings)
    elif options.stream:
        show_stream(llama, prompts, settings)
    else:
        show_batch(llama, prompts, settings)
    if speculation is not None:
        print(describe_draft(speculation.counts))


def prompt_texts(options: Options, tokenizer: Tokenizer) -> list[str]:
    """What the user gave, or samples of what the model can continue."""
    if options.prompt is not None:
        return [options.prompt]
    if options.prompt_file is not None:
        path = Path(options.prompt_file).expanduser()
        return read_prompts(path) if options.save_prompt is None else [files.read_text(path)]
    if options.load_prompt is not None:
        return [""]
    if options.chat:
        return list(SAMPLE_CHATS)
    return list(SAMPLE_PROMPTS if has_tokenizer(tokenizer) else COURSE_PROMPTS)


def require_room(prompts: list[Prompt], max_seq_len: int) -> None:
    """Raise InputError for a prompt that is too long, before any is answered."""
    for i, prompt in enumerate(prompts):
        if len(prompt.ids) > max_seq_len:
            raise InputError(
                f"prompt {i} has {len(prompt.ids)} tokens, outside 1 to max_seq_len={max_seq_len}; "
                "shorten it or raise max_seq_len"
            )


def memory_needed(options: Options, source: Source, n_prompts: int, longest: int) -> Memory:
    """What will be needed. Raises EnvironmentFailure where the machine lacks it."""
    is_session = options.is_conversation or options.keeps_cache
    device, dtype = devices.resolve(options.device, options.dtype)
    n_sequences = 1 if is_session or options.stream or options.compare else n_prompts
    length = options.max_seq_len if is_session else longest  # a session has all slots from the start
    needed = memory.estimate(
        source, dtype, options.cache_dtype, n_sequences, length, options.use_cache, processes.world()
    )
    memory.require(needed, source, dtype, options.cache_dtype, device)
    return needed


def settings_of(options: Options, tokenizer: Tokenizer) -> dict[str, Any]:
    """The keyword arguments of `generate` and `stream`, but for speculation."""
    usual = 0.0 if options.compare else 0.6
    usual_len = options.max_seq_len if options.is_conversation else 64
    names = ("top_p", "top_k", "min_p", "repetition_penalty", "use_cache")
    return {
        "max_gen_len": usual_len if options.max_gen_len is None else options.max_gen_len,
        "temperature": usual if options.temperature is None else options.temperature,
        "stop_tokens": tokenizer.stop_tokens,
        "stop": () if options.stop is None else tuple(options.stop.split(",")),
        **{name: getattr(options, name) for name in names},
    }


def load(options: Options, source: Source, tokenizer: Tokenizer) -> Llama:
    """The model, with the adapter in place."""
    names = ("max_seq_len", "max_batch_size", "seed", "device", "dtype", "decoding", "cache_dtype")
    llama = Llama.build(source, tokenizer, progress=True, **{name: getattr(options, name) for name in names})
    if options.adapter is not None:
        base = None if options.any_base else partial(checkpoint.fingerprint, source)
        adapters.load(llama.model, options.adapter, base, processes.world())
        processes.require_same("adapters", adapters.fingerprint(options.adapter).encode())
        llama.model.eval()
    return llama


def load_draft(name: str, llama: Llama, decoding: str) -> Draft:
    """The draft of that name. Raises InputError, before its weights are read, for one that does not fit the model."""
    if name == "lookup":
        return PromptLookup()
    if name in OWN_DRAFTS:
        try:
            return ModelDraft(quantization.quantized_copy(llama.model, OWN_DRAFTS[name]), decoding)
        except ValueError as error:
            raise InputError(f"--draft={name}: takes a model of plain weights; {error}") from None
    directory = directory_of(name)
    check_vocabulary(checkpoint.read_args(directory), llama.n_words)
    if (other := other_tokenizer(directory, llama.tokenizer)) is not None:
        raise InputError(f"{other} is not the model's tokenizer; a draft must have been trained with the same one")
    return ModelDraft(checkpoint.load(directory, llama.model.dtype, llama.device, progress=True), decoding)


def encode(tokenizer: Tokenizer, text: str, options: Options) -> list[int]:
    if options.alpaca:
        return encode_instruction(tokenizer, text)
    if options.chat:
        return ChatFormat(tokenizer).encode_dialog_prompt([{"role": "user", "content": text}])
    return tokenizer.encode_prompt(text)


def describe(
    llama: Llama, directory: Path, longest: int = 0, needed: Memory | None = None, args: ModelArgs | None = None
) -> str:
    """What was loaded, how large, where and in which precision; the memory that will be needed; and warnings.

    args: of the whole model, where this process has a part of it.

    Those are that the weights slow decoding down, and that texts of `longest` tokens are beyond the model.
    """
    dtype, config = dtype_name(llama.model.dtype), quantization.quantization_of(llama.model)
    dtype += f" over {config.name} weights" if config is not None else ""
    place = f"{llama.device.type} ({devices.device_name(llama.device)})"
    dtype += ", int8 cache" if llama.decoder.cache_dtype == "int8" else ""
    n_processes = processes.world().size
    dtype += f" in {n_processes} processes" if n_processes > 1 else ""
    size = f"{(args or llama.model.args).n_params():,} parameters, {dtype} on {place}, {llama.decoder.name} decoding"
    size += f" ({llama.decoder.why_slower})" if llama.decoder.why_slower else ""
    is_embedded = directory == EMBEDDED
    line = f"embedded model, {size}; --ckpt_dir loads real weights\n" if is_embedded else f"{directory}, {size}\n"
    line += "" if needed is None else f"memory{' of each process' if n_processes > 1 else ''}: {needed}\n"
    context = llama.model.args.trained_context
    beyond = f"texts may reach {longest} tokens, but the model is meant for {context}; expect nonsense beyond"
    warnings = [quantization.slow_reason(llama.model), beyond if longest > context else None]
    return line + "".join(f"warning: {reason}\n" for reason in warnings if reason is not None)


def show_batch(llama: Llama, prompts: list[Prompt], settings: dict[str, Any]) -> None:
    """Generate for all prompts at once, then print."""
    work = partial(llama.generate, [prompt.ids for prompt in prompts], **settings)
    (outputs, _), spent = stopwatch.measure(work, llama.device)
    for prompt, ids in zip(prompts, outputs, strict=True):
        print(f"> {prompt.shown}\n{cut(llama.tokenizer.decode(ids), settings['stop']).strip()}\n")
    print(speed(sum(map(len, outputs)), spent, settings["use_cache"]))


def show_stream(llama: Llama, prompts: list[Prompt], settings: dict[str, Any]) -> None:
    """Generate prompt by prompt, each character as soon as it is complete."""
    for prompt in prompts:
        print(f"> {prompt.shown}")
        work = partial(print_stream, llama, llama.stream(prompt.ids, **settings), settings["stop"])
        count, spent = stopwatch.measure(work, llama.device)
        print(f"\n{speed(count, spent, settings['use_cache'])}\n")


def show_behind(
    saved: SavedPrompt | None, new_file: str | None, llama: Llama, prompts: list[Prompt], settings: dict[str, Any]
) -> None:
    """Generate prompt by prompt, each behind the saved text, if any; keep the prompt where there is a new file."""
    with llama.start_session() as session:
        if saved is not None:
            saved.restore(session)
            print(f"[{len(saved.tokens):,} tokens from {saved.path}]\n")
        if new_file is not None:
            text = prompts[0].text if saved is None else saved.text + prompts[0].text
            session.read(prompts[0].ids)
            size = prompt_file.save(new_file, session, text)
            print(f"[{len(session.tokens):,} tokens kept in {new_file}, {size / devices.MB:,.1f} MB]\n")
        show_stream(llama, prompts, settings | {"session": session})


def print_stream(llama: Llama, tokens: Iterator[int], stop_strings: Sequence[str]) -> int:
    decoder, stop = StreamDecoder(llama.tokenizer), StopStrings(stop_strings)
    count = 0
    for token in tokens:
        print(stop.push(decoder.push(token)), end="", flush=True)
        count += 1
    print(stop.push(decoder.flush()) + stop.flush(), end="", flush=True)
    return count


def converse(llama: Llama, settings: dict[str, Any], saved: SavedPrompt | None = None) -> None:
    """Answer messages until /quit or the end of the input: typed ones, or those of a pipe, one per line.

    The first message stands behind the text of a saved prompt, if any.
    """
    is_typed = sys.stdin is not None and sys.stdin.isatty()
    if is_typed:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # arrow keys and history in input(); Windows has its own
        print("/reset begins anew, /system TEXT does so with instructions, /quit ends; Ctrl-C ends an answer\n")
    with llama.start_session() as session:
        conversation, system = Conversation(llama, session, settings), None
        if saved is not None:
            saved.restore(session)
            conversation.opening = saved.text
        for line in messages(is_typed):
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command in ("/reset", "/system"):
                system = rest.strip() or None if command == "/system" else system
                conversation.reset(system)
                print("[a new conversation]\n")
            elif command.startswith("/"):
                print(f"[{command} is unknown; there are /reset, /system TEXT and /quit]\n")
            else:
                say(conversation, line, is_typed)


def messages(is_typed: bool) -> Iterator[str]:
    """What is typed, line by line, or comes from a pipe; a second Ctrl-C where nothing is being said ends it."""
    was_interrupted = False
    while True:
        try:
            line = input("> " if is_typed else "").strip()
            was_interrupted = False
        except (EOFError, RuntimeError):  # the latter where the caller has closed it
            return
        except KeyboardInterrupt:
            if was_interrupted or not is_typed:
                raise
            was_interrupted = True
            print("\n[/quit or Ctrl-D ends]")
            continue
        if line:
            if not is_typed:
                print(f"> {line}")
            yield line


def say(conversation: Conversation, message: str, is_typed: bool) -> None:
    """Print an answer as it comes, and how fast that was. Raises InputError for a message that is not typed."""
    start, first = time.perf_counter(), None
    try:
        for piece in conversation.answer(message):
            first = first or time.perf_counter() - start
            print(piece, end="", flush=True)
        if conversation.is_full:
            print(f"\n[max_seq_len={conversation.llama.max_seq_len} tokens are reached; /reset begins anew]", end="")
    except KeyboardInterrupt:
        print("\n[stopped]", end="")
    except InputError as error:
        if not is_typed:  # whatever reads the answers must not take the next for this one
            raise
        return print(f"[{error}]\n")
    seconds, n = time.perf_counter() - start, conversation.n_drawn
    print(f"\n[{n} tokens, {n / seconds:.1f} tokens/s, first after {first or seconds:.2f} s]\n")


def speed(n_tokens: int, spent: stopwatch.Measurement, use_cache: bool) -> str:
    rate = n_tokens / spent.seconds
    return f"[{n_tokens} tokens in {spent.seconds:.2f} s, {rate:.1f} tokens/s, KV cache {'on' if use_cache else 'off'}]"


@dataclass(frozen=True)
class Comparison:
    """One prompt continued with the cache, or the draft (True), and without; and whether the tokens agree."""

    prompt: Prompt
    ids: dict[bool, list[int]]
    texts: dict[bool, str]
    spent: dict[bool, stopwatch.Measurement]
    verdict: str


def show_comparison(llama: Llama, prompts: list[Prompt], settings: dict[str, Any]) -> list[Comparison]:
    """Each prompt alone, with the draft and without, or the cache: texts, whether the tokens agree, time and memory."""
    speculation = settings["speculation"]
    what = "KV cache" if speculation is None else "draft"
    without = {"use_cache": False} if speculation is None else {"speculation": None}
    modes = {True: settings, False: settings | without}
    # The first call pays for set-up in the libraries; what its draft proposes is not counted.
    uncounted = None if speculation is None else Speculation(speculation.draft, speculation.draft_tokens)
    llama.generate([prompts[0].ids], **settings | {"max_gen_len": 4, "speculation": uncounted})
    comparisons = []
    for number, prompt in enumerate(prompts, 1):
        ids, spent = {}, {}
        for is_on, mode in modes.items():
            (output, _), spent[is_on] = stopwatch.measure(partial(llama.generate, [prompt.ids], **mode), llama.device)
            ids[is_on] = output[0]
        texts = {is_on: llama.tokenizer.decode(ids[is_on]).strip() for is_on in modes}
        agreement = verdict(llama, prompt.ids, ids[True], ids[False], settings["stop_tokens"])
        comparisons.append(Comparison(prompt, ids, texts, spent, agreement))
        print(f"[{number}/{len(prompts)}] > {prompt.shown}\n")
        print(cli.side_by_side(f"{what} on", f"{what} off"))
        print("-" * (2 * cli.COLUMN + 3))
        print(cli.side_by_side(texts[True], texts[False]))
        print(f"\n  tokens    {agreement}")
        on, off = spent[True].seconds, spent[False].seconds
        print(f"  time      {on:.3f} s on, {off:.3f} s off: {off / on:.2f} times as fast with the {what}")
        kind = "allocated on the GPU" if llama.device.type == "cuda" else "resident in the process"
        print(f"  memory    {megabytes(spent[True])} on, {megabytes(spent[False])} off (peak {kind})\n")
    n_agree = sum(comparison.ids[True] == comparison.ids[False] for comparison in comparisons)
    on, off = (sum(comparison.spent[is_on].seconds for comparison in comparisons) for is_on in modes)
    print(f"{n_agree} of {len(prompts)} prompts give equal tokens with the {what} on and off;", end=" ")
    print(f"{on:.2f} s on, {off:.2f} s off, {off / on:.2f} times as fast")
    return comparisons


def cell_of(options: Options, llama: Llama) -> dict[str, Any]:
    """What changes the figures of a comparison, apart from the prompt."""
    name = name_of(directory_of(options.ckpt_dir))
    model = model_cell(name, quantization.quantization_of(llama.model), options.adapter)
    cell = {**model, "max_gen_len": options.max_gen_len, "decoding": llama.decoder.name}
    if options.chat or options.alpaca:
        cell["template"] = "chat" if options.chat else "alpaca"
    if options.repetition_penalty != 1:
        cell["repetition_penalty"] = options.repetition_penalty
    if options.stop is not None:
        cell["stop"] = options.stop
    if options.draft is None:
        return {**cell, "what": "KV cache"}
    is_named = options.draft == "lookup" or options.draft in OWN_DRAFTS
    draft = options.draft if is_named else name_of(directory_of(options.draft))
    return {**cell, "what": "draft", "draft": draft, "draft_tokens": options.draft_tokens}


def record_comparisons(
    path: Path, llama: Llama, cell: dict[str, Any], comparisons: list[Comparison], seed: int
) -> None:
    """Keep comparisons: times and memory as metrics, the texts and the verdict as series."""
    for comparison in comparisons:
        runs, series = {"tokens_equal": [n_equal(*comparison.ids.values())]}, {"verdict": [comparison.verdict]}
        for is_on, name in ((True, "on"), (False, "off")):
            spent = comparison.spent[is_on]
            series[f"text_{name}"] = [comparison.texts[is_on]]
            runs |= {f"runtime_{name}_s": [spent.seconds], f"tokens_{name}": [len(comparison.ids[is_on])]}
            if spent.peak_bytes is not None:
                runs[f"peak_memory_{name}_mb"] = [spent.peak_bytes / devices.MB]
        cell = {**cell, "prompt": comparison.prompt.text}
        record(path, "comparison", cell, runs, llama.device, dtype_name(llama.model.dtype), seed, series)


def describe_draft(counts: Counts) -> str:
    """How the draft did, and a warning where it was not worth it."""
    if counts.rounds == 0:
        return "[draft: no drafting, for every text ended with its first token]"
    seen = counts.accepted + counts.rejected
    line = (
        f"[draft: {counts.proposed} tokens proposed, {counts.accepted} accepted of {seen} up to the first wrong one "
        f"(acceptance rate {counts.acceptance:.2f}), {counts.tokens_per_round:.2f} tokens per round, "
        f"expected speed-up {counts.expected_speedup:.2f}]"
    )
    return line if counts.pays else f"{line}\nwarning: the draft hardly pays here; leave it out"


def megabytes(spent: stopwatch.Measurement) -> str:
    return "not measurable here" if spent.peak_bytes is None else f"{spent.peak_bytes / devices.MB:,.0f} MB"


if __name__ == "__main__":
    cli.run(main)
