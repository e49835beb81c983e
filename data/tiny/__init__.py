"""The embedded model: small, trained, and part of the repository, so that every script runs without other weights."""

from pathlib import Path

from llama import Tokenizer, checkpoint

EMBEDDED = Path(__file__).parent


def directory_of(ckpt_dir: str | None) -> Path:
    """The checkpoint directory, or GGUF file, that a user means; the embedded model's without one."""
    return EMBEDDED if ckpt_dir is None else checkpoint.locate(ckpt_dir)


def name_of(directory: Path) -> str:
    """What a measured row calls a model: the last part of its path, for where it lies changes no figure."""
    name = directory.resolve().name.removesuffix(".gguf")
    return "tiny" if directory.resolve() == EMBEDDED.resolve() else name


def has_tokenizer(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is the embedded model's: then there is text of its world to train and measure on."""
    return tokenizer.is_same(Tokenizer(EMBEDDED / "tokenizer.model"))
