"""Text to token ids and back, behind one interface for every kind of vocabulary (llama/vocabulary).

Text never becomes a special token, whatever it spells; those are added by `bos` and `eos` and by the chat formats
(llama/chat.py). Decoding is done on bytes, so that a stream can hold back an unfinished character and still give, in
the end, exactly what decoding all ids at once gives.

Left out on purpose: chat templates read from files (they are programs), training of tokenizers (data/tiny/train.py).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from llama import files, vocabulary
from llama.chat import ChatFormat, Dialog, Message
from llama.errors import InputError
from llama.gguf_header import MAGIC
from llama.vocabulary.ranks import llama3_special_tokens

__all__ = [
    "ChatFormat", "Dialog", "Message", "StreamDecoder", "Tokenizer", "find_tokenizer", "llama3_special_tokens"
]  # fmt: skip

# Hugging Face's directories, Meta's, and Meta's inside Hugging Face's.
TOKENIZER_PATHS = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")


class Tokenizer:
    """Token ids for one vocabulary file. Raises InputError for a file of no known format, or a broken one.

    n_words: vocabulary size. bos_id (None where there is none), eos_id: begin and end of text. pad_id: fills ragged
    batches. stop_tokens: ids that end a completion, or an answer in a dialog. special_tokens: control tokens by text.
    adds_bos: whether texts begin with bos_id. `vocabulary.model` is the library's own object.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.vocabulary = vocabulary.read(Path(model_path))
        self.kind, self.n_words = self.vocabulary.kind, self.vocabulary.n_words
        self.bos_id, self.eos_id, self.pad_id = self.vocabulary.bos_id, self.vocabulary.eos_id, self.vocabulary.pad_id
        self.adds_bos, self.template = self.vocabulary.adds_bos, self.vocabulary.template
        self.stop_tokens, self.special_tokens = self.vocabulary.stop_ids, self.vocabulary.special

    def encode(
        self,
        s: str,
        bos: bool,
        eos: bool,
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
        disallowed_special: Literal["all"] | Collection[str] = (),
        continues: bool = False,
    ) -> list[int]:
        """Ids of a text, between begin- and end-of-text ids if `bos` (and texts of this vocabulary have one), `eos`.

        Spelled special tokens stay text, but those in allowed_special become what they spell, and other ones in
        disallowed_special raise InputError; "all" are all. continues: the text goes on behind another, so it gets no
        leading space of its own. Where no token spans the border, those are the ids of both texts in one.
        """
        if not isinstance(s, str):
            raise InputError(f"a prompt must be text, not {type(s).__name__}")
        try:
            s.encode()
        except UnicodeEncodeError as error:  # Python gives bytes that it could not decode as such
            raise InputError(
                f"the text has a lone surrogate (U+{ord(s[error.start]):04X}) at character {error.start}, which is no "
                "character; re-encode it as UTF-8"
            ) from error
        special = self.special_tokens
        allowed = special if allowed_special == "all" else allowed_special
        refused = special if disallowed_special == "all" else disallowed_special
        if spelled := [name for name in refused if name not in allowed and name in s]:
            raise InputError(f"the text spells the special token {spelled[0]}, which is disallowed")
        ids = [self.bos_id] * (bos and self.adds_bos)
        names = "|".join(re.escape(name) for name in sorted(allowed, key=len, reverse=True))
        for i, part in enumerate(re.split(f"({names})", s) if names else [s]):
            ids += [special[part]] if i % 2 else self.vocabulary.encode(part, continues)
        return ids + [self.eos_id] * eos

    def encode_prompt(self, prompt: str) -> list[int]:
        """Begin-of-text and the ids of a prompt. Raises InputError for an empty one."""
        if prompt == "":
            raise InputError("the prompt is empty; write at least one character")
        return self.encode(prompt, bos=True, eos=False)

    def decode(self, t: Sequence[int]) -> str:
        """Text of ids. Bytes that are not UTF-8 become U+FFFD; special tokens show as their names (not Llama 2's)."""
        data = b"".join(map(self.token_bytes, t))
        return (data.removeprefix(b" ") if self.vocabulary.leading_space else data).decode(errors="replace")

    def is_same(self, other: Tokenizer) -> bool:
        """Whether every id means the same in both, whatever their files: models trained with either work together."""
        special = set(self.special_tokens.values())
        return (self.n_words, self.special_tokens) == (other.n_words, other.special_tokens) and all(
            self.token_bytes(i) == other.token_bytes(i) for i in range(self.n_words) if i not in special
        )

    def check_vocabulary(self, vocab_size: int, model: str = "the model") -> None:
        """Raise InputError where a model with a vocabulary of `vocab_size` was not trained with this tokenizer.

        Tables are often padded to a round number, or extended for tokens to come: up to an eighth more is accepted.
        """
        if not self.n_words <= vocab_size <= self.n_words * 9 // 8:
            remedy = "pass the one that belongs to this checkpoint, tokenizer_path=FILE"
            added = [name for name, i in self.special_tokens.items() if i >= vocab_size]
            if self.kind == "hf" and len(added) == self.n_words - vocab_size > 0:  # mostly a padding token
                remedy = f"take {', '.join(added[:3])} out of its added_tokens, for which {model} has no row"
            raise InputError(f"the tokenizer has {self.n_words} words, {model} {vocab_size}; {remedy}")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for. Raises InputError for an id outside the vocabulary."""
        if not 0 <= token < self.n_words:
            raise InputError(f"token id {token} is outside the vocabulary of {self.n_words}")
        return self.vocabulary.token_bytes(token)


class StreamDecoder:
    """Decode ids one at a time; what `push` and `flush` return, joined, is `decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.vocabulary.leading_space

    def push(self, token: int) -> str:
        """The characters that `token` completes; empty while a character is still unfinished."""
        data = self._tokenizer.token_bytes(token)
        if self._strip_space and data:
            data, self._strip_space = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got finished, else nothing."""
        return self._utf8.decode(b"", final=True)


def find_tokenizer(ckpt_dir: str | Path, tokenizer_path: str | Path | None = None) -> Path:
    """The file that the user names, or the one of the checkpoint. Raises InputError where there is none.

    A file inside a checkpoint's directory stands for the directory; a GGUF file holds its tokenizer itself. The user
    may name a directory, too.
    """
    if tokenizer_path is not None:
        path = Path(tokenizer_path).expanduser()
        return find_tokenizer(path) if path.is_dir() else path
    directory = Path(ckpt_dir).expanduser()
    if directory.is_file():
        if files.head(directory).startswith(MAGIC):
            return directory
        directory = directory.parent
    if not directory.is_dir():
        raise InputError(f"checkpoint directory {ckpt_dir} does not exist; check its name")
    for path in (directory / name for name in TOKENIZER_PATHS):
        if path.is_file():
            return path
    is_adapter = (directory / "adapter_config.json").is_file()
    remedy = "this is an adapter: pass it as adapter=DIR, and its base" if is_adapter else "pass tokenizer_path=FILE"
    raise InputError(f"{ckpt_dir} holds no tokenizer.json or tokenizer.model; {remedy}")


def other_tokenizer(ckpt_dir: str | Path, tokenizer: Tokenizer) -> Path | None:
    """The tokenizer file of a checkpoint that was trained with a different one. None where it brings none."""
    try:
        path = find_tokenizer(ckpt_dir)
    except InputError:
        return None
    return None if tokenizer.is_same(Tokenizer(path)) else path
