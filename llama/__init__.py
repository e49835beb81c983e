"""Llama 2, 3, 3.1 and 3.2 in plain PyTorch, under the names of Meta's package."""

from llama.cache import KVCache
from llama.config import ModelArgs
from llama.generation import Llama
from llama.model import Transformer
from llama.tokenizer import Dialog, Tokenizer

__all__ = ["Dialog", "KVCache", "Llama", "ModelArgs", "Tokenizer", "Transformer"]
