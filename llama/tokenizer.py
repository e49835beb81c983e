"""Text to token ids and back: Llama 2's sentencepiece model and Llama 3's tiktoken ranks behind one interface.

`Tokenizer(path)` tells the two apart by content. Text never becomes a special token, whatever it spells; those are
added by `bos` and `eos` and by the chat formats. Decoding is done on bytes, so that a stream can hold back an
unfinished character and still give, in the end, exactly what decoding all ids at once gives.

Left out on purpose: chat templates read from files (they are programs), training of tokenizers (data/tiny/train.py).
"""

from __future__ import annotations

import base64
import binascii
import codecs
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import sentencepiece
import tiktoken

from llama.errors import InputError

# How Llama 3 cuts text into pieces before byte-pair merging. Part of the vocabulary: other cuts give other ids.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL = 256
# Names by offset from the first special id (128,000 in the released vocabulary); the rest are reserved.
NAMED_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
# The regular expression engine backtracks over long runs and gives up at about a million characters. Meta's tokenizer
# cuts at these lengths; the same cuts give the same ids.
MAX_CHARS = 400_000
MAX_RUN = 25_000
RUN = re.compile(r"\s+|\S+")
MAX_FILE_BYTES = 64 << 20
TOKENIZER_PATHS = ("tokenizer.model", "original/tokenizer.model")  # Meta's directories, Hugging Face's


def llama3_special_tokens() -> list[str]:
    """The 256 special tokens in the order of their ids."""
    reserved = itertools.count()
    return [NAMED_SPECIAL.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(N_SPECIAL)]


class Tokenizer:
    """Token ids for one vocabulary file. Raises InputError for a file of neither format, or a broken one.

    n_words: vocabulary size. bos_id, eos_id: begin and end of text. pad_id: fills ragged batches.
    stop_tokens, chat_stop_tokens: ids that end a completion and an answer in a dialog.
    """

    def __init__(self, model_path: str | Path) -> None:
        path = Path(model_path)
        if not path.is_file():
            raise InputError(f"tokenizer {path} is not a file; pass tokenizer_path=FILE")
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise InputError(f"cannot read tokenizer {path}: {error.strerror}; pass tokenizer_path=FILE") from error
        if len(data) > MAX_FILE_BYTES:
            raise InputError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; it is no tokenizer")
        self.backend = _backend_for(data, path)
        self.kind = self.backend.kind
        self.n_words = self.backend.n_words
        self.bos_id, self.eos_id, self.pad_id = self.backend.bos_id, self.backend.eos_id, self.backend.pad_id
        self.stop_tokens = [self.eos_id]
        self.chat_stop_tokens = self.backend.chat_stop_tokens

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Ids of a text, between begin- and end-of-text ids if `bos`, `eos`. Spelled special tokens stay text."""
        if not isinstance(s, str):
            raise InputError(f"a prompt must be text, not {type(s).__name__}")
        try:
            s.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has a lone surrogate (U+{ord(s[error.start]):04X}) at character {error.start}, which is no "
                "character; re-encode it as UTF-8"
            ) from error
        ids = self.backend.encode(s)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Sequence[int]) -> str:
        """Text of ids. Bytes that are not UTF-8 become U+FFFD; special tokens of Llama 3 show as their names."""
        data = b"".join(map(self.token_bytes, t))
        return (data.removeprefix(b" ") if self.backend.leading_space else data).decode(errors="replace")

    def is_same(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same bytes in both, so that models trained with either can work together."""
        sizes = (self.kind, self.n_words, self.bos_id), (other.kind, other.n_words, other.bos_id)
        return sizes[0] == sizes[1] and all(self.token_bytes(i) == other.token_bytes(i) for i in range(self.n_words))

    def check_vocabulary(self, vocab_size: int, model: str = "the model") -> None:
        """Raise InputError where a model with a vocabulary of `vocab_size` was not trained with this tokenizer."""
        if self.n_words != vocab_size:
            raise InputError(
                f"the tokenizer has {self.n_words} words, {model} {vocab_size}; "
                "pass the one that belongs to this checkpoint, tokenizer_path=FILE"
            )

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for. Raises InputError for an id outside the vocabulary."""
        if not 0 <= token < self.n_words:
            raise InputError(f"token id {token} is outside the vocabulary of {self.n_words}")
        return self.backend.token_bytes(token)


class StreamDecoder:
    """Decode ids one at a time; what `push` and `flush` return, joined, is `decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.backend.leading_space

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
    """The file that the user names, or the directory's tokenizer.model. Raises InputError where there is none."""
    if tokenizer_path is not None:
        return Path(tokenizer_path)
    if not Path(ckpt_dir).is_dir():
        raise InputError(f"checkpoint directory {ckpt_dir} does not exist; check its name")
    for path in (Path(ckpt_dir) / name for name in TOKENIZER_PATHS):
        if path.is_file():
            return path
    raise InputError(f"{ckpt_dir} holds no tokenizer.model; pass tokenizer_path=FILE")


def _backend_for(data: bytes, path: Path) -> _Tiktoken | _SentencePiece:
    first_line = data.split(b"\n", 1)[0].split(b" ")
    if len(first_line) == 2 and first_line[1].strip().isdigit():
        return _Tiktoken(_read_ranks(data, path))
    if data.lstrip()[:1] == b"{":
        raise InputError(f"{path} is JSON; pass Meta's tokenizer.model (in Hugging Face's repositories: original/)")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, ValueError):
        model = None
    if model is None or not 0 < model.vocab_size() < 1 << 24 or model.bos_id() < 0 or model.eos_id() < 0:
        raise InputError(f"{path} is neither a tiktoken rank file nor a sentencepiece model; download it again")
    return _SentencePiece(model)


def _read_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Parse lines of `base64 rank`. tiktoken itself panics on gaps and on missing single bytes, so both are checked."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            piece = base64.b64decode(token, validate=True)
            valid = int(rank) == len(ranks) and piece not in ranks and piece != b""
        except (binascii.Error, ValueError):
            valid = False
        if not valid:
            raise InputError(f"{path}:{number}: expected a new base64 token and rank {len(ranks)}; download it again")
        ranks[piece] = len(ranks)
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise InputError(f"{path}: not every single byte has a rank, so some text could not be encoded")
    return ranks


class _Tiktoken:
    """Llama 3: byte-pair ranks first, then the 256 special tokens."""

    kind = "tiktoken"
    leading_space = False

    def __init__(self, ranks: dict[bytes, int]) -> None:
        special = {name: len(ranks) + i for i, name in enumerate(llama3_special_tokens())}
        self.model = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.special = special
        self.n_words = self.model.n_vocab
        self.bos_id, self.eos_id = special["<|begin_of_text|>"], special["<|end_of_text|>"]
        self.pad_id = special["<|finetune_right_pad_id|>"]
        self.chat_stop_tokens = [self.eos_id, special["<|eom_id|>"], special["<|eot_id|>"]]

    def encode(self, s: str) -> list[int]:
        pieces = (piece for start in range(0, len(s), MAX_CHARS) for piece in _cut_runs(s[start : start + MAX_CHARS]))
        return [token for piece in pieces for token in self.model.encode_ordinary(piece)]

    def token_bytes(self, token: int) -> bytes:
        return self.model.decode_single_token_bytes(token)


def _cut_runs(s: str) -> Iterator[str]:
    """Cut where a run of spaces, or of anything else, exceeds MAX_RUN characters."""
    start = 0
    for run in RUN.finditer(s):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield s[start:cut]
            start = cut
    yield s[start:]


class _SentencePiece:
    """Llama 2: pieces with U+2581 for a space, single bytes as <0xNN>, control tokens without text."""

    kind = "sentencepiece"
    leading_space = True  # the model prepends one to every text

    def __init__(self, model: sentencepiece.SentencePieceProcessor) -> None:
        self.model = model
        self.n_words = model.vocab_size()
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        self.pad_id = model.pad_id() if model.pad_id() >= 0 else self.eos_id
        self.chat_stop_tokens = [self.eos_id]

    def encode(self, s: str) -> list[int]:
        return self.model.encode(s)

    def token_bytes(self, token: int) -> bytes:
        if self.model.is_control(token):
            return b""
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        if self.model.is_unknown(token):
            piece = " \u2047 "  # what sentencepiece itself shows
        return piece.replace("\u2581", " ").encode()


class Message(TypedDict):
    """One turn of a dialog."""

    role: Literal["system", "user", "assistant"]
    content: str


Dialog = Sequence[Message]


class ChatFormat:
    """Ids of a dialog, ready for the assistant's next answer: Llama 3's headers, or Llama 2's [INST] by vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Raises InputError where the dialog is empty, a message malformed, or the last turn not the user's."""
        _check_dialog(dialog)
        if self.tokenizer.kind == "sentencepiece":
            return self._encode_llama2(dialog)
        ids = [self.tokenizer.bos_id]
        for message in dialog:
            ids += self.encode_message(message)
        return ids + self.encode_header("assistant")

    def encode_header(self, role: str) -> list[int]:
        """<|start_header_id|>role<|end_header_id|> and two line feeds."""
        special, encode = self.tokenizer.backend.special, self.tokenizer.encode
        role_ids = encode(role, bos=False, eos=False)
        line_feeds = encode("\n\n", bos=False, eos=False)
        return [special["<|start_header_id|>"], *role_ids, special["<|end_header_id|>"], *line_feeds]

    def encode_message(self, message: Message) -> list[int]:
        """Header, stripped content, <|eot_id|>."""
        content = self.tokenizer.encode(message["content"].strip(), bos=False, eos=False)
        return [*self.encode_header(message["role"]), *content, self.tokenizer.backend.special["<|eot_id|>"]]

    def _encode_llama2(self, dialog: Dialog) -> list[int]:
        """<s>[INST] question [/INST] answer </s> for each past exchange; the first question holds the system."""
        if any(tag in message["content"] for message in dialog for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")):
            raise InputError("Llama 2's chat tags ([INST], <<SYS>>) are plain text and may not appear in a message")
        turns = [message["content"].strip() for message in dialog]
        if dialog[0]["role"] == "system":
            turns = [f"<<SYS>>\n{dialog[0]['content']}\n<</SYS>>\n\n{dialog[1]['content']}".strip(), *turns[2:]]
        ids = []
        for question, answer in zip(turns[0:-1:2], turns[1::2], strict=True):
            ids += self.tokenizer.encode(f"[INST] {question} [/INST] {answer} ", bos=True, eos=True)
        return ids + self.tokenizer.encode(f"[INST] {turns[-1]} [/INST]", bos=True, eos=False)


def _check_dialog(dialog: Dialog) -> None:
    if not dialog:
        raise InputError("a dialog needs at least one message")
    for i, message in enumerate(dialog):
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise InputError(f"message {i} must have exactly a 'role' and a text 'content'")
        if not message["content"].strip():
            raise InputError(f"message {i} is empty; write at least one character")
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != (["user", "assistant"] * len(turns))[: len(turns)] or len(turns) % 2 == 0:
        raise InputError(
            f"roles must be an optional system, then user and assistant in turn, ending with user: {roles}"
        )
