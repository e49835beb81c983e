"""Dialogs as token ids: formats of Llama 2 and 3, ChatML and Zephyr, told apart by the vocabulary's special tokens.

    Llama 3   <|begin_of_text|> <|start_header_id|>user<|end_header_id|>\\n\\n question <|eot_id|> ...
    ChatML    <|im_start|>user\\n question <|im_end|>\\n ...
    Zephyr    <|user|>\\n question </s>\\n ...                       (TinyLlama-Chat; the roles are plain text)
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

# Each format by what its templates write, and the special tokens that it needs. Zephyr's needs a template: others that
# write the same roles end their turns differently.
ZEPHYR = "'<|user|>\n' + message['content'] + eos_token"
FORMATS = {
    "<|im_start|>": ("<|im_start|>", "<|im_end|>"),
    "<|start_header_id|>": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "[INST]": ("<s>", "</s>"),
    ZEPHYR: (),
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
        is_llama3 = kind == "<|start_header_id|>"
        has_bos = self.tokenizer.adds_bos and (is_llama3 or not template or "bos_token" in template)
        parts = [([self.tokenizer.bos_id], False)] if has_bos else []
        if kind == "<|im_start|>" and dialog[0]["role"] != "system" and (found := DEFAULT_SYSTEM.search(template)):
            dialog = [{"role": "system", "content": found[1]}, *dialog]
        for message in dialog:
            header, content, behind = self._encode_parts(message, starts=not parts)
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
        if self.kind() == "[INST]":
            raise InputError("Llama 2's chat format has no headers; use encode_dialog_prompt")
        if self.kind() == "<|start_header_id|>":
            role_ids, line_feeds = self._encode(role), self._encode("\n\n")
            return [special["<|start_header_id|>"], *role_ids, special["<|end_header_id|>"], *line_feeds]
        mark, text, continues = self._role(role)
        return mark + self._encode(text, continues)

    def encode_message(self, message: Message) -> list[int]:
        """Header, content and the token that ends it."""
        return [token for part in self._encode_parts(message) for token in part]

    def _encode_parts(self, message: Message, starts: bool = False) -> tuple[list[int], list[int], list[int]]:
        """Header; content with its end token; and what follows it. starts: nothing stands before it."""
        special, content = self.tokenizer.special_tokens, message["content"]
        if self.kind() == "<|start_header_id|>":
            return self.encode_header(message), [*self._encode(content.strip()), special["<|eot_id|>"]], []
        mark, text, continues = self._role(message["role"], starts)
        end = [special["<|im_end|>"] if mark else self.tokenizer.eos_id]
        if message["role"] == "assistant":  # apart from its header, as it is generated
            return mark + self._encode(text, continues), self._encode(content, True) + end, self._encode("\n")
        return mark, self._encode(text + content, continues) + end, self._encode("\n")

    def _role(self, role: str, starts: bool = False) -> tuple[list[int], str, bool]:
        """ChatML's and Zephyr's header: a special token; text behind it, or that goes on behind a line feed."""
        if self.kind() == ZEPHYR:
            return [], f"<|{role}|>\n", not starts
        return [self.tokenizer.special_tokens["<|im_start|>"]], f"{role}\n", not self.tokenizer.vocabulary.spaces_parts

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

    def _encode(self, text: str, continues: bool | None = None) -> list[int]:
        """Of a text that goes on behind text; None: of one behind a special token."""
        continues = not self.tokenizer.vocabulary.spaces_parts if continues is None else continues
        return self.tokenizer.encode(text, bos=False, eos=False, continues=continues)

    def kind(self) -> str:
        """The entry of FORMATS. Raises InputError where there is none."""
        special, template = self.tokenizer.special_tokens, self.tokenizer.template.replace("\\n", "\n")
        for mark, needed in FORMATS.items():
            if all(name in special for name in needed) and (mark in template if template else needed):
                return mark
        names = ", ".join(list(special)[:12]) or "none"
        raise InputError(
            "the tokenizer has no chat format known here (Llama 2, Llama 3, ChatML, Zephyr); its special tokens begin "
            f"with {names}{', its template writes another format' * bool(template)}; give text instead of a dialog"
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
