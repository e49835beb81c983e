"""A dialog that goes on: the KV cache is kept from turn to turn, and only what is new goes through the network.

    with llama.start_session() as session:
        conversation = Conversation(llama, session, {"temperature": 0.6, "top_p": 0.9})
        for text in conversation.answer("What is the capital of France?"):
            print(text, end="", flush=True)

Each turn encodes the whole dialog, as if it were the first, and the session finds how far its cache holds it: so a turn
says what a fresh run would say, whatever was taken back or interrupted before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama.chat import Message
from llama.decoding import Session
from llama.errors import InputError
from llama.generation import Llama
from llama.stops import StopStrings
from llama.tokenizer import StreamDecoder


class Conversation:
    """Messages, and the session that holds them. settings: the keyword arguments of `Llama.stream`."""

    def __init__(self, llama: Llama, session: Session, settings: dict[str, Any]) -> None:
        self.llama, self.session, self.settings = llama, session, settings
        self.messages: list[Message] = []
        self.opening = ""  # text that the user's first message begins with
        self.n_drawn = 0  # tokens of the last answer
        self.is_full = False  # it ended because max_seq_len was reached

    def reset(self, system: str | None = None) -> None:
        """Forget all messages; begin with what the system says, if anything."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to a message, piece by piece; both become part of the dialog.

        Stopped early, what was said so far is the answer. Raises InputError where the dialog has no room left.
        """
        llama, limit = self.llama, self.llama.max_seq_len
        opening = "" if any(message["role"] == "user" for message in self.messages) else self.opening
        dialog = [*self.messages, {"role": "user", "content": opening + text}]
        ids = llama.formatter.encode_dialog_prompt(dialog)
        if len(ids) >= limit:
            raise InputError(
                f"the conversation has {len(ids)} tokens, of at most max_seq_len={limit}; begin anew, or raise that"
            )
        decoder, stop, said = StreamDecoder(llama.tokenizer), StopStrings(self.settings.get("stop", ())), []
        self.n_drawn = 0
        try:
            for token in llama.stream(ids, **self.settings, session=self.session):
                self.n_drawn += 1
                said.append(stop.push(decoder.push(token)))
                yield said[-1]
            said.append(stop.push(decoder.flush()) + stop.flush())
            yield said[-1]
        finally:
            self.is_full = len(ids) + self.n_drawn >= limit
            if content := "".join(said).strip():
                self.messages = [*dialog, {"role": "assistant", "content": content}]
