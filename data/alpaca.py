"""Stanford Alpaca's records: one template for training and inference, labels on the answer alone.

    {"instruction": "Name a colour.", "input": "", "output": "Blue."}

How a record becomes the ids and labels of a sample: data/samples.py. How files are read, of Alpaca's records and of
others: data/records.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from data.samples import Parts
from llama.errors import InputError
from llama.tokenizer import Tokenizer

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Record:
    """One task: what to do, the input to do it with (may be empty), and the answer."""

    kind: ClassVar[str] = "Alpaca records"
    instruction: str
    input: str
    output: str

    def parts(self, tokenizer: Tokenizer) -> Parts:
        """The prompt, and what is trained. Raises InputError where either is missing."""
        if not self.instruction.strip():
            raise InputError("no instruction")
        if not self.output.strip():
            raise InputError("no answer")
        question = encode_prompt(tokenizer, self.instruction, self.input)
        answer = tokenizer.encode(self.output, bos=False, eos=True, continues=True)
        return [(question, False), (answer, True)]

    @staticmethod
    def ask(tokenizer: Tokenizer, question: str) -> list[int]:
        """A question to a model that was trained on such records."""
        return encode_prompt(tokenizer, question)


def prompt(instruction: str, input: str = "") -> str:
    """What the model is given, in training and in use; it ends with "### Response:"."""
    template = WITH_INPUT if input.strip() else WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def task(text: str) -> str:
    """Instruction and input of a prompt, without the sentences around them; any other text as it is."""
    return text.partition("### Instruction:\n")[2].removesuffix("\n\n### Response:") or text


def encode_prompt(tokenizer: Tokenizer, instruction: str, input: str = "") -> list[int]:
    """Begin-of-text and the ids of the prompt."""
    return tokenizer.encode(prompt(instruction, input), bos=True, eos=False)
