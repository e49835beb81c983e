"""Dialogs as token ids: the formats of Llama 2, of Llama 3 and ChatML, told apart by the vocabulary's special tokens.

    Llama 3   <|begin_of_text|> <|start_header_id|>user<|end_header_id|>\\n\\n question <|eot_id|> ...
    ChatML    <|im_start|>user\\n question <|im_end|>\\n ...
    Llama 2   <s>[INST] question [/INST] answer </s> ...          (the tags are plain text)

A checkpoint's chat template is a program, so it is never run. Its text says which format is meant where a vocabulary
has the tokens of several, and which system message a ChatML dialog without one begins with. Llama 3 follows Meta's
code: no system message with dates, which Hugging Face's template of 3.1 and later adds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from llama.errors import InputError

# Each format by what its templates write, and the special tokens that it needs.
FORMATS = {
    "<|im_start|>": ("<|im_start|>", "<|im_end|>"),
    "<|start_header_id|>": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "[INST]": ("<s>", "</s>"),
}
DEFAULT_SYSTEM = re.compile(r"""<\|im_start\|>system(?:\n|\\n)([^<{}'"\\]+)<\|im_end\|>""")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Message(TypedDict):
    """One turn of a dialog."""

    role: Literal["system", "user", "assistant"]
    content: str


Dialog = Sequence[Message]


class ChatFormat:
    """Ids of a dialog in the format of the tokenizer's vocabulary. Raises InputError, when used, where it has none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The dialog, ready for the assistant's next answer.

        Raises InputError where it is empty, a message malformed, or the last turn not the user's, or empty.
        """
        parts = self.encode_dialog(dialog)
        if dialog[-1]["role"] != "user":
            raise InputError("the last message must be the user's, for the assistant to answer")
        if not dialog[-1]["content"].strip():
            raise InputError(f"message {len(dialog) - 1} is empty; write at least one character")
        ids = [token for part, _ in parts for token in part]
        return ids if self.kind() == "[INST]" else ids + self.encode_header({"role": "assistant", "content": ""})

    def encode_dialog(self, dialog: Dialog) -> list[tuple[list[int], bool]]:
        """The ids in parts; with each, whether the assistant says it: its words and the token that ends them."""
        _check_dialog(dialog)
        kind, template = self.kind(), self.tokenizer.template
        if kind == "[INST]":
            return self._encode_llama2(dialog)
        has_bos = self.tokenizer.adds_bos and (kind != "<|im_start|>" or not template or "bos_token" in template)
        parts = [([self.tokenizer.bos_id], False)] if has_bos else []
        if kind == "<|im_start|>" and dialog[0]["role"] != "system" and (found := DEFAULT_SYSTEM.search(template)):
            dialog = [{"role": "system", "content": found[1]}, *dialog]
        for message in dialog:
            header, content, behind = self._encode_parts(message)
            parts += [(header, False), (content, message["role"] == "assistant"), (behind, False)]
        return parts

    def is_unsafe(self, dialog: Dialog) -> bool:
        """Whether a message spells one of Llama 2's tags, in its format, where they would be read as tags."""
        _check_dialog(dialog)
        tags = LLAMA2_TAGS if self.kind() == "[INST]" else ()
        return any(tag in message["content"] for message in dialog for tag in tags)

    def encode_header(self, message: Message) -> list[int]:
        """What stands before a message's content: its role."""
        special, role = self.tokenizer.special_tokens, message["role"]
        if self.kind() == "<|im_start|>":
            return [special["<|im_start|>"], *self._encode(f"{role}\n")]
        if self.kind() == "[INST]":
            raise InputError("Llama 2's chat format has no headers; use encode_dialog_prompt")
        role_ids, line_feeds = self._encode(role), self._encode("\n\n")
        return [special["<|start_header_id|>"], *role_ids, special["<|end_header_id|>"], *line_feeds]

    def encode_message(self, message: Message) -> list[int]:
        """Header, content and the token that ends it."""
        return [token for part in self._encode_parts(message) for token in part]

    def _encode_parts(self, message: Message) -> tuple[list[int], list[int], list[int]]:
        """Header; content with its end token; and what follows it."""
        special, header = self.tokenizer.special_tokens, self.encode_header(message)
        if self.kind() == "<|start_header_id|>":
            return header, [*self._encode(message["content"].strip()), special["<|eot_id|>"]], []
        content, ending = message["content"], [special["<|im_end|>"]]
        if message["role"] == "assistant":  # apart from its header, as it is generated
            content = self.tokenizer.encode(content, bos=False, eos=False, continues=True)
            return header, content + ending, self._encode("\n")
        return header[:1], self._encode(f"{message['role']}\n{content}") + ending, self._encode("\n")

    def _encode_llama2(self, dialog: Dialog) -> list[tuple[list[int], bool]]:
        """<s>[INST] question [/INST] answer </s> for each exchange; the first question holds the system."""
        if self.is_unsafe(dialog):
            raise InputError("Llama 2's chat tags ([INST], <<SYS>>) are plain text and may not appear in a message")
        turns = [message["content"].strip() for message in dialog]
        if dialog[0]["role"] == "system":
            turns = [f"<<SYS>>\n{dialog[0]['content']}\n<</SYS>>\n\n{dialog[1]['content']}".strip(), *turns[2:]]
        encode, parts = self.tokenizer.encode, []
        for i, turn in enumerate(turns):
            if i % 2 == 0:
                parts.append((encode(f"[INST] {turn} [/INST]", bos=True, eos=False), False))
            else:
                parts.append((encode(f" {turn} ", bos=False, eos=True, continues=True), True))
        return parts

    def _encode(self, text: str) -> list[int]:
        """Of a text behind a special token."""
        return self.tokenizer.encode(text, bos=False, eos=False, continues=not self.tokenizer.vocabulary.spaces_parts)

    def kind(self) -> str:
        special, template = self.tokenizer.special_tokens, self.tokenizer.template
        for mark, needed in FORMATS.items():
            if all(name in special for name in needed) and (not template or mark in template):
                return mark
        names = ", ".join(list(special)[:12]) or "none"
        raise InputError(
            "the tokenizer has no chat format known here (Llama 2, Llama 3, ChatML); its special tokens begin with "
            f"{names}{', its template writes another format' * bool(template)}; give text instead of a dialog"
        )


def _check_dialog(dialog: Dialog) -> None:
    if not dialog:
        raise InputError("a dialog needs at least one message")
    for i, message in enumerate(dialog):
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise InputError(f"message {i} must have exactly a 'role' and a text 'content'")
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != (["user", "assistant"] * len(turns))[: len(turns)] or not turns:
        raise InputError(f"roles must be an optional system, then user and assistant in turn: {roles}")
