"""The generation loop: token ids in, token ids out, with the KV cache on or off.

`Llama` has Meta's interface (build, generate, text_completion, chat_completion). Prompts of unequal length are padded
on the right: a causal mask already hides the padding from real tokens, and each sequence decodes at its own position,
overwriting its padding. So it gets what it would get alone, and no step is spent on a token that is already known.

Nothing is read back from the device while tokens are produced, except now and then whether all sequences have stopped.
A prompt too long to go through the network at once goes in parts (decoding.py).
With a draft model each round is read back, since the host decides what is proposed next: speculative.py has that loop.
Left out on purpose: files (checkpoint/), sampling (sampling.py), how a decode step is computed (decoding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from llama import checkpoint, processes
from llama import device as devices
from llama.chat import UNSAFE_ERROR, ChatFormat, Dialog, Message
from llama.checkpoint.source import Source
from llama.config import ModelArgs
from llama.decoding import CACHES, DECODING, PREFILL_TOKENS, Decoder, Session
from llama.errors import InputError, NonFinite
from llama.model import Transformer
from llama.sampling import Sampling, next_token, penalize
from llama.speculative import Speculation, before_stop
from llama.stops import TokenStop
from llama.tokenizer import Tokenizer

# Steps from one check of whether all sequences have stopped to the next. Each makes the host wait for a GPU.
STOP_CHECK_EVERY = {"cpu": 1, "cuda": 16}
# Without the cache every step has a new length. Rounded up, with padding that no token sees, there are fewer shapes for
# libraries to prepare kernels for (a CPU's keep 100 MB of them), for 3 % more positions.
LENGTH_MULTIPLE = 16
ECHO_CHUNK = 128  # prompt positions whose logits are held at once (128 * 128,256 fp32 values are 66 MB)


class CompletionPrediction(TypedDict, total=False):
    """A continued text; `tokens` and `logprobs` (natural logarithms) only with logprobs=True."""

    generation: str
    tokens: list[str]
    logprobs: list[float]


class ChatPrediction(TypedDict, total=False):
    """An answered dialog; `tokens` and `logprobs` only with logprobs=True."""

    generation: Message
    tokens: list[str]
    logprobs: list[float]


class _Batch:
    """Prompts padded to one [B, T] tensor, and how many tokens each may get."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], max_gen_len: int, max_seq_len: int, pad_id: int, device: torch.device
    ) -> None:
        self.prompts = prompts
        lengths = [len(prompt) for prompt in prompts]
        self.budgets = [min(max_gen_len, max_seq_len - length) for length in lengths]
        self.n_steps = max(self.budgets)
        self.longest = max(lengths)
        total = max(length + budget for length, budget in zip(lengths, self.budgets, strict=True))
        self.tokens = torch.tensor([[*prompt, *[pad_id] * (total - len(prompt))] for prompt in prompts]).to(device)
        self.last = torch.tensor(lengths).to(device) - 1  # position of each sequence's newest token
        # The token sampled last is never fed back, so it needs no slot.
        self.max_len = max(total - 1, self.longest)

    def seen(self, vocab_size: int) -> Tensor:
        """Which tokens each prompt holds, [B, V]."""
        seen = torch.zeros(len(self.prompts), vocab_size, dtype=torch.bool, device=self.tokens.device)
        for row, prompt in zip(seen, self.prompts, strict=True):
            row[torch.tensor(prompt, device=row.device)] = True
        return seen


class Llama:
    """A model with its tokenizer and limits; `.model` and `.tokenizer` are public. Without a tokenizer, ids only.

    max_seq_len: prompt and generated tokens of one sequence together. max_batch_size: prompts of one call. seed: of the
    random stream that sampling draws from, across calls; a call with a `seed` has a separate one.
    """

    @staticmethod
    def build(
        ckpt_dir: str | Path | Source,
        tokenizer_path: str | Path | Tokenizer,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str = "auto",
        dtype: str = "auto",
        decoding: str = "auto",
        cache_dtype: str = "auto",
        progress: bool = False,
    ) -> Llama:
        """Load a checkpoint in Meta's or Hugging Face's layout, or a GGUF file, with a tokenizer or the path of one.

        See device.resolve for the "auto" of device and dtype, decoding.py for that of decoding and cache_dtype. All
        arguments are checked before the weights are read. Under torchrun each process gets its part of the model
        (parallel.py), whatever the number of shards; model_parallel_size is Meta's, and can only be that of processes.
        """
        me = processes.start()
        if model_parallel_size not in (None, me.size):
            raise InputError(
                f"model_parallel_size={model_parallel_size}: there are {me.size} processes; leave it out, or start "
                "as many with torchrun"
            )
        target, weights = devices.resolve(device, dtype)
        tokenizer = tokenizer_path if isinstance(tokenizer_path, Tokenizer) else Tokenizer(tokenizer_path)
        source = checkpoint.open_source(ckpt_dir)
        _check_limits(tokenizer, source.args, max_seq_len, max_batch_size, seed, decoding, cache_dtype)
        model = checkpoint.load(source, weights, target, progress, me)
        if me.size > 1:
            processes.require_same("weights", _digest(model))
        return Llama(model, tokenizer, max_seq_len, max_batch_size, seed, decoding, cache_dtype)

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        max_seq_len: int = 2048,
        max_batch_size: int = 32,
        seed: int = 1,
        decoding: str = "auto",
        cache_dtype: str = "auto",
    ) -> None:
        _check_limits(tokenizer, model.args, max_seq_len, max_batch_size, seed, decoding, cache_dtype)
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.formatter = None if tokenizer is None else ChatFormat(tokenizer)
        self.stop_tokens = [] if tokenizer is None else tokenizer.stop_tokens
        self.decoder = Decoder(model, decoding, cache_dtype)
        self._generator = torch.Generator(self.device).manual_seed(seed)

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @property
    def n_words(self) -> int:
        """Ids that may be drawn: those of the tokenizer, though the model's tables may have more rows."""
        return self.model.args.vocab_size if self.tokenizer is None else self.tokenizer.n_words

    @torch.no_grad()  # not inference_mode: a model that samples between training steps must still be able to train
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        top_k: int | None = None,
        use_cache: bool = True,
        seed: int | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        speculation: Speculation | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt by at most `max_gen_len` tokens, or to a stop token (not returned), or to max_seq_len.

        logprobs: also return the log-probability of each returned token under the model, before temperature and cuts
        (0.0 for the first token of a prompt, which nothing predicts). echo: return prompt and continuation.
        min_p, repetition_penalty: see sampling.py. stop_tokens: default the tokenizer's. stop: strings; a text
        that holds one ends with the token that completes it. speculation: draft and verify (speculative.py); the same
        tokens at temperature 0, tokens of the same distribution above. on_step: called with 1, 2, ... when the work for
        that many tokens per sequence has been given to the device. Raises InputError for prompts or settings out of
        range.
        """
        batch = self._batch(prompt_tokens, max_gen_len)
        sampling = self._sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
        stops = self.stop_tokens if stop_tokens is None else list(stop_tokens)
        watches = [TokenStop(self.tokenizer, stop) for _ in prompt_tokens] if stop else []
        prompt_logprobs = self._prompt_logprobs(prompt_tokens) if logprobs and echo else [[] for _ in prompt_tokens]
        if speculation is None:
            drawn, drawn_logprobs = self._run(batch, sampling, use_cache, stops, watches, logprobs, on_step)
        else:
            if on_step is not None:
                raise InputError("on_step counts tokens per sequence, which differ with speculative decoding")
            drawn, drawn_logprobs = [[] for _ in prompt_tokens], [[] for _ in prompt_tokens]
            for i, tokens, values in self._rounds(batch, sampling, use_cache, stops, logprobs, speculation):
                drawn[i] += tokens
                drawn_logprobs[i] += values
                if watches and [watches[i].push(token) for token in tokens] and all(w.length for w in watches):
                    break
        tokens_out, logprobs_out = [], []
        for i, prompt in enumerate(prompt_tokens):
            length = before_stop(drawn[i][: batch.budgets[i]], stops)
            length = min(length, watches[i].length or length) if watches else length
            tokens_out.append((list(prompt) if echo else []) + drawn[i][:length])
            logprobs_out.append(prompt_logprobs[i] + drawn_logprobs[i][:length])
        return tokens_out, logprobs_out if logprobs else None

    @torch.no_grad()
    def stream(
        self,
        prompt: Sequence[int],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        *,
        top_k: int | None = None,
        use_cache: bool = True,
        seed: int | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        speculation: Speculation | None = None,
        session: Session | None = None,
        on_drawn: Callable[[int, Tensor], None] | None = None,
    ) -> Iterator[int]:
        """Yield the tokens that `generate` would return for one prompt, each as soon as it is drawn.

        session: of `start_session`; what it has in its cache of a prompt is not computed again. on_drawn: called with
        each token and the logits [V] that it was drawn from, which are valid during the call, before it is yielded;
        with a draft for all tokens of a round at once.
        """
        batch = self._batch([prompt], max_gen_len)
        sampling = self._sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
        stops = self.stop_tokens if stop_tokens is None else list(stop_tokens)
        watch = TokenStop(self.tokenizer, stop) if stop else None
        for token in self._drawn(batch, sampling, use_cache, stops, speculation, session, on_drawn):
            if token in stops:
                return
            yield token
            if watch is not None and watch.push(token):
                return

    def _drawn(
        self,
        batch: _Batch,
        sampling: Sampling,
        use_cache: bool,
        stops: list[int],
        speculation: Speculation | None,
        session: Session | None,
        on_drawn: Callable[[int, Tensor], None] | None,
    ) -> Iterator[int]:
        """The tokens of a single prompt."""
        if speculation is not None:
            if session is not None:
                raise InputError("a session keeps its cache from prompt to prompt, a draft does not; leave one out")
            for _, tokens, _ in self._rounds(batch, sampling, use_cache, stops, False, speculation, on_drawn):
                yield from tokens
            return
        for drawn, logits in self._steps(batch, sampling, use_cache, session):
            self._require_finite(_is_finite(logits))
            token = drawn.item()
            if on_drawn is not None:
                on_drawn(token, logits[0])
            yield token

    @contextmanager
    def start_session(self) -> Iterator[Session]:
        """A session of up to max_seq_len tokens, for one text or dialog that goes on."""
        with self.decoder.start(1, self.max_seq_len) as run:
            yield Session(run)

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options,
    ) -> list[CompletionPrediction]:
        """Continue texts. max_gen_len None: to a stop token or max_seq_len. options: the keyword ones of `generate`."""
        ids = [self.encode_prompt(prompt) for prompt in prompts]
        limit = self.max_seq_len if max_gen_len is None else max_gen_len
        tokens, values = self.generate(ids, limit, temperature, top_p, logprobs, echo, **options)
        start = int(echo and self.tokenizer.adds_bos)  # leaves out the begin-of-text token, which no prompt spells
        return [
            {"generation": self.tokenizer.decode(drawn[start:]), **self._details(drawn, values and values[i])}
            for i, drawn in enumerate(tokens)
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options,
    ) -> list[ChatPrediction]:
        """Answer dialogs (an optional system message, then user and assistant in turn) as the assistant.

        A dialog that spells Llama 2's tags gets an error as its answer, as in Meta's code.
        """
        ids = [self.formatter.encode_dialog_prompt(d) for d in dialogs if not self.formatter.is_unsafe(d)]
        limit = self.max_seq_len if max_gen_len is None else max_gen_len
        tokens, values = self.generate(ids, limit, temperature, top_p, logprobs, **options) if ids else ([], None)
        answers = iter(zip(tokens, values or [None] * len(tokens), strict=True))
        predictions = []
        for dialog in dialogs:
            if self.formatter.is_unsafe(dialog):
                drawn, content = ([], [] if logprobs else None), UNSAFE_ERROR
            else:
                drawn = next(answers)
                content = self.tokenizer.decode(drawn[0])
            predictions.append({"generation": {"role": "assistant", "content": content}, **self._details(*drawn)})
        return predictions

    def _details(self, drawn: list[int], logprobs: list[float] | None) -> dict[str, list]:
        """What a prediction holds besides its text."""
        if logprobs is None:
            return {}
        return {"tokens": [self.tokenizer.decode([token]) for token in drawn], "logprobs": logprobs}

    def encode_prompt(self, prompt: str) -> list[int]:
        return self.tokenizer.encode_prompt(prompt)

    def _batch(self, prompts: Sequence[Sequence[int]], max_gen_len: int) -> _Batch:
        """Check the prompts against the limits, then pad them."""
        if not prompts:
            raise InputError("there is no prompt; pass at least one")
        if len(prompts) > self.max_batch_size:
            raise InputError(
                f"{len(prompts)} prompts exceed max_batch_size={self.max_batch_size}; raise it or pass fewer"
            )
        if max_gen_len < 0:
            raise InputError(f"max_gen_len={max_gen_len} is out of range; use 0 or more")
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= self.max_seq_len:
                raise InputError(
                    f"prompt {i} has {len(prompt)} tokens, outside 1 to max_seq_len={self.max_seq_len}; "
                    "shorten it or raise max_seq_len"
                )
            if not 0 <= min(prompt) <= max(prompt) < self.n_words:
                raise InputError(f"prompt {i} holds a token outside the vocabulary of {self.n_words}")
        pad_id = 0 if self.tokenizer is None else self.tokenizer.pad_id
        return _Batch(prompts, max_gen_len, self.max_seq_len, pad_id, self.device)

    def _sampling(
        self,
        temperature: float,
        top_p: float,
        top_k: int | None,
        min_p: float,
        repetition_penalty: float,
        seed: int | None,
    ) -> Sampling:
        """The settings, checked: each defines a distribution. Below 1e-6 a temperature is 0 in all but name."""
        if not (temperature == 0 or 1e-6 <= temperature <= 100):  # also refuses NaN
            raise InputError(f"temperature={temperature} is out of range; use 0 (greedy), or 1e-6 to 100")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p={top_p} is out of range; use a share above 0, up to 1 (no cut)")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k={top_k} is out of range; use at least 1, or leave it out (no cut)")
        if not 0 <= min_p <= 1:
            raise InputError(f"min_p={min_p} is out of range; use a share of 0 (no cut) to 1")
        if not 0.01 <= repetition_penalty <= 100:
            raise InputError(f"repetition_penalty={repetition_penalty} is out of range; use 0.01 to 100, 1 for none")
        if seed is not None:
            _check_seed(seed)
        generator = self._generator if seed is None else torch.Generator(self.device).manual_seed(seed)
        return Sampling(temperature, top_p, top_k, min_p, repetition_penalty, generator, self.n_words)

    def _run(
        self,
        batch: _Batch,
        sampling: Sampling,
        use_cache: bool,
        stops: list[int],
        watches: list[TokenStop],
        logprobs: bool,
        on_step: Callable[[int], None] | None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Draw until every sequence has stopped or used its budget; those that have may get tokens past their end."""
        stop_ids = torch.tensor(stops, dtype=torch.int64, device=self.device)
        budgets = torch.tensor(batch.budgets, device=self.device)
        done, finite = budgets <= 0, torch.tensor(True, device=self.device)
        drawn, values = [], []
        for step, (tokens, logits) in enumerate(self._steps(batch, sampling, use_cache), 1):
            drawn.append(tokens)
            if on_step is not None:
                on_step(step)
            if logprobs:
                values.append(logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
            finite = finite & _is_finite(logits)
            done = done | torch.isin(tokens, stop_ids) | (budgets <= step)
            if watches:  # text, which the host alone can look at
                ended = [watch.push(token) for watch, token in zip(watches, tokens.tolist(), strict=True)]
                done = done | torch.tensor(ended, device=self.device)
            if step % STOP_CHECK_EVERY[self.device.type] == 0 and (done.all() | ~finite):
                break
        self._require_finite(finite)
        none = [[]] * len(batch.budgets)
        return torch.stack(drawn, 1).tolist() if drawn else none, torch.stack(values, 1).tolist() if values else none

    def _rounds(
        self,
        batch: _Batch,
        sampling: Sampling,
        use_cache: bool,
        stops: list[int],
        logprobs: bool,
        speculation: Speculation,
        on_drawn: Callable[[int, Tensor], None] | None = None,
    ) -> Iterator[tuple[int, list[int], list[float]]]:
        """Yield a prompt's number, its next tokens and, with `logprobs`, their log-probabilities.

        on_drawn: see `stream`, whose single prompt it is for.
        """
        if not use_cache:
            raise InputError("speculative decoding needs the KV cache; leave out the draft or use_cache=False")
        if sampling.repetition_penalty != 1:
            raise InputError("repetition_penalty changes with every token, and a draft proposes several; leave one out")
        speculation.check(self.decoder, self.max_seq_len, self.n_words)
        rounds = speculation.rounds(self.decoder, batch.prompts, batch.budgets, sampling, stops, logprobs)
        for tokens, values, logits in rounds:
            self._require_finite(_is_finite(logits))
            if on_drawn is not None:
                for token, logits_V in zip(tokens[0], logits[0], strict=False):  # fewer tokens at the end of a text
                    on_drawn(token, logits_V)
            yield from zip(range(len(tokens)), tokens, values, strict=True)

    def _require_finite(self, finite: Tensor) -> None:
        if not finite:
            dtype = devices.dtype_name(self.model.dtype)
            remedy = "the weights are damaged" if dtype == "float32" else "try dtype=float32"
            raise NonFinite(f"the model's logits are not finite in {dtype}; {remedy}")

    def _steps(
        self, batch: _Batch, sampling: Sampling, use_cache: bool, session: Session | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the next token of every sequence [B] and the logits [B, V] it was drawn from, `n_steps` times.

        With the cache a step computes one position per sequence; without, the whole text so far. Either way only the
        newest position of each is projected to the vocabulary.
        """
        if batch.n_steps == 0:
            return
        tokens, pos = batch.tokens, batch.last
        sequences = torch.arange(len(tokens), device=self.device)
        penalty = sampling.repetition_penalty
        seen = None if penalty == 1 else batch.seen(self.model.args.vocab_size)
        # Nothing reads a cache after the only step, but the later parts of a long prompt read it before.
        has_cache = session is not None or (use_cache and (batch.n_steps > 1 or batch.longest > PREFILL_TOKENS))
        slots = batch.max_len if has_cache else None
        with self.decoder.start(len(tokens), slots) if session is None else nullcontext(session) as run:
            logits = run.last_logits(tokens[:, : batch.longest], pos)
            for step in range(1, batch.n_steps + 1):
                token = next_token(logits if seen is None else penalize(logits, seen, penalty), sampling)
                yield token, logits
                if step == batch.n_steps:
                    return
                if seen is not None:
                    seen[sequences, token] = True
                pos = (pos + 1).clamp_(max=batch.max_len - 1)  # a sequence past its end stays in its last slot, unread
                if has_cache:
                    logits = run.step(token[:, None], pos[:, None])[:, 0]
                else:
                    tokens[sequences, pos] = token
                    length = -(-(batch.longest + step) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
                    logits = run.last_logits(tokens[:, :length], pos)

    def _prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p of each prompt token given those before it, one prompt at a time, some positions at a time."""
        results = []
        for prompt in prompts:
            ids = torch.tensor(prompt, device=self.device)
            h = self.model.hidden(ids[None])[0, :-1]
            parts = [torch.zeros(1, device=self.device)]
            for h_part, targets in zip(h.split(ECHO_CHUNK), ids[1:].split(ECHO_CHUNK), strict=True):
                logits = self.model.logits(h_part).float().log_softmax(-1)
                parts.append(logits.gather(-1, targets[:, None])[:, 0])
            values = torch.cat(parts)
            self._require_finite(values.isfinite().all())
            results.append(values.tolist())
        return results


def _digest(model: Transformer) -> bytes:
    """What tells models apart of which every process has another part: the norms, which are in all of them."""
    norms = (weight for name, weight in model.named_parameters() if name.endswith("norm.weight"))
    return repr(model.args).encode() + b"".join(weight.detach().float().cpu().numpy().tobytes() for weight in norms)


def _is_finite(logits: Tensor) -> Tensor:
    """Whether no logit is NaN or +inf: the largest is NaN if any is. A tenth of the time of checking all."""
    return logits.amax(-1).isfinite().all()


def _check_limits(
    tokenizer: Tokenizer | None,
    args: ModelArgs,
    max_seq_len: int,
    max_batch_size: int,
    seed: int,
    decoding: str,
    cache_dtype: str,
) -> None:
    if tokenizer is not None:
        tokenizer.check_vocabulary(args.vocab_size)
    for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        if value < 1:
            raise InputError(f"{name}={value} is out of range; use at least 1")
    for name, value, known in (("decoding", decoding, DECODING), ("cache_dtype", cache_dtype, CACHES)):
        if value not in known:
            raise InputError(f"{name}={value} is unknown; use {', '.join(known)}")
    _check_seed(seed)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed={seed} is out of range; use 0 to 2^63 - 1")
