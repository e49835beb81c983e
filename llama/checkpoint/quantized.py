"""Our layout of quantized models: params.json with a field `quantization`, and model.safetensors with Meta's names and
a `.scales` beside each quantized `.weight`, and `.offsets` where it has zero-points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from llama import files, quantization
from llama.checkpoint import meta, tokenizer_files
from llama.checkpoint.source import Source, naming, open_safetensors
from llama.config import ModelArgs
from llama.device import dtype_name
from llama.errors import InputError
from llama.model import Transformer
from llama.quantization import Quantization

WEIGHTS = ("model.safetensors",)
STORED_DTYPES = {  # of codes, scales and offsets
    "I8": torch.int8,
    "U8": torch.uint8,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class QuantizedSource(Source):
    """One file, whose tensors have the dtypes that the field `quantization` implies."""

    def __init__(self, directory: Path) -> None:
        params_path = directory / meta.PARAMS
        params = files.read_json(params_path)
        with naming(params_path):
            self.quantization = Quantization.from_params(params.pop("quantization"))
            self.args = ModelArgs.from_params(params)
            if self.args.vocab_size == -1:
                raise ValueError("vocab_size: is -1; a quantized checkpoint says it")
        self.where = directory / "model.safetensors"
        with open_safetensors(self.where) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dictionary)
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: STORED_DTYPES.get(part.get_dtype()) for name, part in slices.items()}
        self.check_depth()
        with torch.device("meta"):
            model = Transformer(self.args)
        with naming(params_path):
            quantization.lay_out(model, self.quantization)
        state = model.state_dict()
        self.codes = {name: tensor.dtype for name, tensor in state.items() if not name.endswith("norm.weight")}
        for name, expected in self.codes.items():
            if name in dtypes and dtypes[name] is not expected:
                stored = "another type" if dtypes[name] is None else dtype_name(dtypes[name])
                bits = self.quantization.of(name.rpartition(".")[0]).bits
                raise InputError(
                    f"{self.place(name)}: holds {stored}, {bits} bits have {dtype_name(expected)}; quantize the "
                    "original again"
                )

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        yield open_safetensors(self.where).get_tensor


def write(model: Transformer, directory: Path, tokenizer_path: Path | None) -> None:
    """Codes, scales and offsets as they are in memory."""
    params = {**model.args.to_params(), "quantization": quantization.quantization_of(model).to_params()}
    files.write_json(directory / meta.PARAMS, params)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer_files.copy(tokenizer_path, directory)
