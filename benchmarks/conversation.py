"""A conversation of five turns: the time to first token of each, with the KV cache kept from turn to turn and without.

    python -m benchmarks.conversation                                      # the embedded model
    python -m benchmarks.conversation --ckpt_dir=models/smollm2-135m

Each message is answered twice on the same dialog: in a session (llama/decoding.py), which computes only what its cache
does not hold, and by a fresh run, which computes the whole dialog. Which of them comes first changes from turn to turn
and from round to round. Answers are greedy; that of the session becomes part of the dialog.

Left out on purpose: the time per token after the first, which is the same for both.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import options as shared
from benchmarks import rows
from benchmarks.rows import Row
from data.tiny import directory_of, name_of
from llama import Llama, Tokenizer, cli, quantization
from llama import device as devices
from llama.chat import ChatFormat, Message
from llama.cli import option
from llama.decoding import Session
from llama.speculative import n_equal
from llama.tokenizer import find_tokenizer
from reports import tables

MESSAGES = (
    "What is the capital of France?",
    "What can one see there in two days?",
    "Which of these is the best place for children?",
    "How do I get there from the station?",
    "Write all of that as a short letter to a friend.",
)
LONGEST_MESSAGE = 64  # tokens, with what the chat format puts around it and a system message


@dataclass(frozen=True)
class Options(shared.RowOptions):
    """Measure the time to first token in each turn of a conversation, with a kept KV cache and without."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    answer_len: int = option(64, "tokens of an answer at most", least=2)
    device: str = option("auto", cli.DEVICE)
    dtype: str = option("auto", cli.DTYPE)


class Answer(NamedTuple):
    """What a run answers to a dialog, and when."""

    tokens: list[int]
    ttft_s: float  # from the message to the first token, the encoding of the dialog included
    dialog_tokens: int
    computed_tokens: int  # those of the dialog that went through the network


class Turn(NamedTuple):
    kept: Answer
    fresh: Answer


def main(options: Options) -> None:
    """Hold the conversation several times, after one that is not counted, and keep a row for each turn."""
    path = options.results_file("conversation")
    directory = directory_of(options.ckpt_dir)
    tokenizer = Tokenizer(find_tokenizer(directory))
    ChatFormat(tokenizer).kind()  # raises where there is none, before the weights are read
    longest = len(MESSAGES) * (LONGEST_MESSAGE + options.answer_len)
    llama = Llama.build(directory, tokenizer, longest, 1, device=options.device, dtype=options.dtype, progress=True)
    rounds = [
        converse(llama, options.answer_len, number)
        for number in tqdm(range(options.repeats + 1), desc="conversation", unit="round")
    ]
    cell = rows.model_cell(name_of(directory), quantization.quantization_of(llama.model), None)
    cell |= {"answer_len": options.answer_len, "decoding": llama.decoder.name}
    found = [
        keep(path, llama, {**cell, "turn": number}, turns)
        for number, turns in enumerate(zip(*rounds[1:], strict=True), 1)
    ]
    shared.finish(path, "conversation", found, tables.conversation(found))


def converse(llama: Llama, answer_len: int, number: int) -> list[Turn]:
    """One round: all messages, each answered in both ways."""
    dialog: list[Message] = []
    turns: list[Turn] = []
    with llama.start_session() as session:
        for message in MESSAGES:
            dialog.append({"role": "user", "content": message})
            sessions = {"kept": session, "fresh": None}
            order = sorted(sessions, reverse=(number + len(turns)) % 2 == 1)
            answers = {name: answer(llama, dialog, answer_len, sessions[name]) for name in order}
            turns.append(Turn(**answers))
            dialog.append({"role": "assistant", "content": llama.tokenizer.decode(turns[-1].kept.tokens).strip()})
    return turns


def answer(llama: Llama, dialog: Sequence[Message], answer_len: int, session: Session | None) -> Answer:
    """Answer the last message, in a session or afresh."""
    before = 0 if session is None else session.n_computed
    devices.synchronize(llama.device)
    began = time.perf_counter()
    ids = llama.formatter.encode_dialog_prompt(dialog)
    stream = llama.stream(ids, answer_len, 0, session=session)
    first = list(itertools.islice(stream, 1))  # none where the answer ends at once
    ttft_s = time.perf_counter() - began
    computed_tokens = len(ids) if session is None else session.n_computed - before
    return Answer([*first, *stream], ttft_s, len(ids), computed_tokens)


def keep(path: Path, llama: Llama, cell: dict[str, Any], turns: Sequence[Turn]) -> Row:
    """The row of one turn: the times of all rounds, and what was said."""
    metrics = {
        "ttft_kept_s": [turn.kept.ttft_s for turn in turns],
        "ttft_fresh_s": [turn.fresh.ttft_s for turn in turns],
        "dialog_tokens": [turn.kept.dialog_tokens for turn in turns],
        "computed_tokens": [turn.kept.computed_tokens for turn in turns],
        "answer_tokens": [len(turn.fresh.tokens) for turn in turns],
        "tokens_equal": [n_equal(turn.kept.tokens, turn.fresh.tokens) for turn in turns],
    }
    said = llama.tokenizer.decode(turns[0].kept.tokens).strip()
    series = {"message": [MESSAGES[cell["turn"] - 1]], "answer": [said]}
    dtype = devices.dtype_name(llama.model.dtype)
    return rows.record(path, "conversation", cell, metrics, llama.device, dtype, series=series)


if __name__ == "__main__":
    cli.run(main)
